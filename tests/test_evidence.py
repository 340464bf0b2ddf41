"""results/evidence.py: a run that is done is skipped, one cut off goes on, and the logs decide the verdicts."""
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MICRO_FLAGS, ROOT, forks
from PIL import Image

import randsac
from randsac import UserError

sys.path.insert(0, str(ROOT / "results"))
import evidence as ev  # noqa: E402

MICRO = " ".join(MICRO_FLAGS + ["--epochs", "2"])  # 2 passes of 4 steps


def child(script, arguments, delay):
    torch.set_num_threads(1)
    training_step = randsac.training_step
    randsac.training_step = lambda *args: time.sleep(delay) or training_step(*args)
    module, sys.argv = importlib.import_module(script), [script, *arguments]
    module.L2_GRID = [0.01]  # so that LIN is fitted twice, not nine times
    randsac.run_command(module.main)


def alone(settings, folder):
    """The command as it is, but for its settings, in a process group of its own."""
    os.setpgrp()
    for name, value in settings.items():
        setattr(ev, name, value)
    run(folder, settings["JOBS"][0][0])


class Forked:
    """Stands for subprocess.Popen: the same command in a fork of a process that has imported torch already."""
    started, delay = [], 0.15  # seconds that a step takes longer, so that a pass lasts many looks

    def __init__(self, words, close_fds):
        script = Path(words[1]).stem
        Forked.started.append(" ".join(words[1:]))
        self.process = forks.Process(target=child, args=(script, words[2:], Forked.delay))
        self.process.start()
        self.terminate = self.process.terminate

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("child", timeout)
        return self.process.exitcode


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The command in a folder of its own, with a micro recipe."""
    settings = dict(LOGS=tmp_path / "logs", RUNS=tmp_path / "runs", README=tmp_path / "README.md", RECIPE=MICRO,
                    PICTURE=tmp_path / "evidence.png", PASSES=(1, 2), POLL=0.02)
    for name, value in settings.items():
        monkeypatch.setattr(ev, name, value)
    monkeypatch.setattr(ev, "Popen", Forked)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "README.md").write_text("above\n<!-- evidence -->\nold\n<!-- /evidence -->\nbelow\n")
    before = signal.getsignal(signal.SIGTERM)
    Forked.started = []
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def run(folder, *only):
    ev.main(["run", "--data-dir", str(folder), "--only", *only])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- run

def test_order_of_jobs():
    assert len(ev.JOBS) == len({*ev.JOBS}) == 10 + 1 + 10 and ev.JOBS[:3] == [
        ("square-16-4", 0), ("floors", None), ("patch-raster", 0)]
    assert [seed for _, seed in ev.JOBS[2:]] == [0] * 9 + [1] * 5 + [2] * 5
    for flags in ev.VARIANTS.values():  # the recipe and the flags are valid
        randsac.Config(**vars(randsac.make_parser("").parse_args(f"{ev.RECIPE} {flags}".split())))


def test_run_probes_passes_and_is_not_done_twice(here, image_folder, capsys, monkeypatch):
    monkeypatch.setattr(ev, "JOBS", [("mae", 0), ("floors", None)])
    (here / "runs/mae-0").mkdir(parents=True)
    (here / "runs/mae-0/metrics.jsonl").touch()  # cut off before its first checkpoint
    run(image_folder, "mae", "floors")
    folder, (first, *passes) = here / "runs/mae-0", read(here / "logs/mae-0.jsonl")
    assert first.items() >= dict(name="mae", seed=0, recipe=MICRO, flags="--segments mae", threads=1).items()
    assert str(image_folder.parent) not in json.dumps(first)
    ends = [row for row in read(folder / "metrics.jsonl") if "held_out_loss" in row]
    assert [line["pass"] for line in passes] == [1, 2] and len(ends) == 2
    assert [line["held_out_loss"] for line in passes] == [round(row["held_out_loss"], 5) for row in ends]
    seconds = sum(64 / row["images_per_s"] for row in ends)  # 4 steps of 16 images make a pass and a row
    assert passes[1]["minutes"] == pytest.approx(seconds / 60, abs=0.011)
    for line in passes:
        copy = folder / f"pass-{line['pass']}"
        assert torch.load(copy / "checkpoint.pt", weights_only=True)["step"] == 4 * line["pass"]
        for key, protocol in ("lin", "linear"), ("knn", "knn"):
            assert line[key] == json.loads((copy / f"probe-{protocol}.json").read_text())["top1"]
    assert [line["floor"] for line in read(here / "logs/floors.jsonl")] == ["--random-init", "--features pixels"]
    assert not [*here.rglob("features*")] and len(Forked.started) == 5 + 4

    capsys.readouterr()
    run(image_folder, "mae", "floors")
    assert capsys.readouterr().out.split("\n") == ["mae-0: done", "floors: done", ""]
    assert len(Forked.started) == 9
    ev.main(["report"])
    assert "| mae | `--segments mae` | 1 |" in (here / "README.md").read_text()


def test_stopped_goes_on(here, image_folder, monkeypatch, capsys):
    monkeypatch.setattr(ev, "JOBS", [("square-16-4", 0)])
    metrics, keep = here / "runs/square-16-4-0/metrics.jsonl", ev.keep_copy

    def stop(run):
        keep(run)
        if ev.copy_of(run, 1).exists():
            raise KeyboardInterrupt
    monkeypatch.setattr(ev, "keep_copy", stop)
    monkeypatch.setattr(ev, "PATIENCE", 0)
    with pytest.raises(KeyboardInterrupt):
        run(image_folder, "square-16-4")
    step = torch.load(metrics.with_name("checkpoint.pt"), weights_only=True)["step"]
    assert 4 <= step < 8 and not [*here.glob("logs/*")]  # it saved before it ended
    kept = ev.copy_of(metrics.parent, 1).stat().st_mtime_ns

    monkeypatch.setattr(ev, "keep_copy", keep)
    run(image_folder, "square-16-4")
    assert "--resume" in Forked.started[1] and read(metrics)[-1]["step"] == 8
    assert [line["pass"] for line in read(here / "logs/square-16-4-0.jsonl")[1:]] == [1, 2]
    assert ev.copy_of(metrics.parent, 1).stat().st_mtime_ns == kept


def test_killed_goes_on_and_its_orphan_keeps_the_run(here, image_folder, capsys, monkeypatch):
    settings = dict(LOGS=ev.LOGS, RUNS=ev.RUNS, POLL=ev.POLL, JOBS=[("patch-random", 0)], PASSES=(1, 30),
                    RECIPE=MICRO.replace("--epochs 2", "--epochs 30"))
    for name, value in settings.items():
        monkeypatch.setattr(ev, name, value)
    monkeypatch.setattr(Forked, "delay", 0)
    process = forks.Process(target=alone, args=(settings, image_folder))
    process.start()
    metrics, end = here / "runs/patch-random-0/metrics.jsonl", time.time() + 60
    while len(ev.read_metrics(metrics.parent)) < 5 and time.time() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGSTOP)  # so that the training does not end meanwhile
    process.kill()
    process.join()
    run(image_folder, "patch-random")
    assert "another process is at it" in capsys.readouterr().out and not Forked.started
    os.killpg(process.pid, signal.SIGKILL)
    while "another" in capsys.readouterr().out or not Forked.started:  # until the system has buried it
        run(image_folder, "patch-random")
    rows, (_, *passes) = read(metrics), read(here / "logs/patch-random-0.jsonl")
    assert "--resume" in Forked.started[0] and passes[-1]["pass"] == 30
    assert sorted({row["step"] for row in rows}) == [row["step"] for row in rows] and rows[-1]["step"] == 120


def test_a_missed_pass_is_said_and_no_more(here, image_folder, capsys, monkeypatch):
    monkeypatch.setattr(ev, "JOBS", [("mae", 0)])
    monkeypatch.setattr(Forked, "delay", 0)
    keep = ev.keep_copy
    monkeypatch.setattr(ev, "keep_copy", lambda run: ev.read_metrics(run)[-1:] and ev.read_metrics(run)[-1]["step"] == 8
                        and keep(run))
    run(image_folder, "mae")
    assert "no copy was kept of pass 1" in capsys.readouterr().out
    assert [line["pass"] for line in read(here / "logs/mae-0.jsonl")[1:]] == [2]


def test_a_command_that_fails_is_named(here, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="randsac.py ended with code 2"):
        run(tmp_path / "empty", "mae")
    assert not [*here.glob("logs/*")]
    with pytest.raises(UserError, match="not a folder"):
        run(tmp_path / "nowhere", "mae")


# --- report

def log(name, *ends, minutes=(1, 3, 10), recipe=MICRO):
    """Writes a log for each seed, whose LIN is `ends` after pass 10, and 10 and 5 less after passes 1 and 3."""
    ev.LOGS.mkdir(exist_ok=True)
    for seed, end in enumerate(ends):
        lines = [dict(name=name, seed=seed, flags="", recipe=recipe, data="d", machine="m", threads=1, torch="2")]
        lines += [{"pass": n, "minutes": m, "held_out_loss": 1, "lin": end - less, "knn": 30 + seed}
                  for n, m, less in zip((1, 3, 10), minutes, (10, 5, 0))]
        (ev.LOGS / f"{name}-{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def report(monkeypatch):
    monkeypatch.setattr(ev, "PASSES", (1, 3, 10))
    ev.main(["report"])
    return ev.README.read_text()


def test_table_verdicts_and_picture(here, monkeypatch):
    log("patch-random", 49, 50, 51)  # 50 +- 1
    log("patch-raster", 44, 45, 46)  # 45 +- 1
    log("square-16-4", 39, 40, 41, minutes=(2, 6, 20))
    log("no-skip", 40, 41, 39)
    log("mae", 52, 53, 54)
    log("square-16", 50)
    log("square-4", 53)
    (ev.LOGS / "floors.jsonl").write_text('{"floor": "--random-init", "lin": 33.3, "knn": 22.2}\n')
    text = report(monkeypatch)
    assert text.startswith("above\n<!-- evidence -->\n") and text.endswith("\n<!-- /evidence -->\nbelow\n")
    assert "\nold" not in text and report(monkeypatch) == text
    assert "| 3 | 40.0 ± 1.0 | 45.0 ± 1.0 | 50.0 ± 1.0 | 31.0 ± 1.0 | 10.0 ± 0.0 |" in text
    assert "| 1 | 40.0 | 45.0 | 50.0 | 30.0 | 10.0 |" in text
    assert "`probe.py --random-init` | 1 | | | 33.3 | 22.2 |" in text and "1024 tokens" not in text  # 8 x 8 pixels
    verdicts = [line.split(": ", 1)[1] for line in text.splitlines() if line.startswith("- ")]
    assert [line.split(" (")[0] for line in verdicts] == [
        "**reproduced**", "**not seen at this budget**", "**reproduced**", "not run yet", "**contradicted**",
        "not run yet", "**not seen at this budget**", "**contradicted**", "**contradicted**"]
    assert "50.00 ± 1.00 against 45.00 ± 1.00, difference +5.00, standard error 0.82" in verdicts[0]  # sqrt(2/3)
    assert "53.00 against 50.00 ± 1.00, difference +3.00, standard error 1.15" in verdicts[2]  # sqrt(1 + 1/3)
    # At minute 10 the slow variant stands 4/14 of the way from 35 to 40.
    assert "36.43 ± 1.00 against 53.00" in verdicts[8] and "after 10.0 minutes" in verdicts[8]
    assert "17 of 20 runs are logged, so these verdicts are preliminary. Variants with several seeds: square-16-4, " \
        "patch-raster, mae, patch-random, no-skip." in text
    rows = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert rows == {9}
    picture = Image.open(here / "evidence.png").convert("RGB")
    seen = {colour for _, colour in picture.getcolors(1 << 24)}
    assert picture.width == 1600 and {(0, 114, 178), (213, 94, 0), (26, 26, 26)} <= seen  # 16-4, raster, mae
    assert (136, 34, 85) not in seen  # blob-11-5 has no log


def test_one_seed_each_decides_nothing(here, monkeypatch):
    log("patch-random", 50)
    log("patch-raster", 45)
    log("mae", 50, minutes=(1, 2, 3))
    log("square-16-4", 50, minutes=(4, 8, 12))
    text = report(monkeypatch)
    assert "4 of 20 runs" in text and "seeds: none." in text
    assert "not decided: one seed each (50.00 against 45.00, difference +5.00)" in text and "**" not in text
    assert "not comparable: one has its first probe after 4.0 minutes, the other its last after 3.0" in text


def test_once_all_runs_are_logged_nothing_is_preliminary(here, monkeypatch):
    for name in ev.VARIANTS:
        log(name, *[50, 51, 52][:3 if name in ev.MORE_SEEDS else 1])
    assert "preliminary" not in report(monkeypatch)


def test_pooled_deviation_and_the_edge_of_a_verdict():
    assert ev.pooled_deviation([[1, 3], [5], [0, 0, 0]]) == pytest.approx((2 / 3) ** 0.5)  # (1*2 + 2*0) / 3
    assert ev.pooled_deviation([[1], [2]]) is None
    for gap, word in (2.9, "reproduced"), (2.8, "not seen"), (-2.8, "not seen"), (-2.9, "contradicted"):  # 2 sqrt 2
        assert ev.verdict([gap], [0], 1.0).startswith(f"**{word}")


def test_what_the_user_can_mend(here, monkeypatch):
    with pytest.raises(UserError, match="no logs"):
        report(monkeypatch)
    log("mae", 50)
    log("no-skip", 50, recipe=MICRO + " --lr 1")
    with pytest.raises(UserError, match="differ in recipe"):
        report(monkeypatch)
    log("no-skip", 50)
    ev.README.write_text("no markers")
    with pytest.raises(UserError, match="has no line <!-- evidence -->"):
        report(monkeypatch)
    (ev.LOGS / "mae-0.jsonl").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        report(monkeypatch)
    assert ev.README.read_text() == "no markers" and not ev.PICTURE.exists()


def test_the_readme_has_the_markers():
    text = (ROOT / "README.md").read_text()
    assert text.index(ev.BEGIN) < text.index(ev.END)
