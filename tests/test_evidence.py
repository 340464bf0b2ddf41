"""results/evidence.py: a run that is done is skipped, one that was cut off goes on, and the logs
decide the verdicts."""

import functools
import json
import math
import os
import re
import signal
import sys
import time

import evidence as ev
import numpy as np
import pytest
import torch
from conftest import MICRO_FLAGS, ROOT, refusal
from PIL import Image

import randsac
from randsac import UserError

TEN = ev.RECIPE.format(lr="4e-3", batch_size=64, passes=10)
MICRO = " ".join(MICRO_FLAGS + ["--epochs", "{passes}"])  # passes of 4 steps

ev.tflop = functools.cache(ev.tflop)  # the same is counted again and again


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The command in a folder of its own."""
    monkeypatch.setattr(ev, "ROOT", tmp_path)
    monkeypatch.setattr(ev, "LOGS", tmp_path / "results/evidence")
    for name in ("results/evidence", "assets"):
        (tmp_path / name).mkdir(parents=True)
    words = "above\n<!-- evidence -->\nold\n<!-- /evidence -->\nbelow\n"
    (tmp_path / "results/README.md").write_text(words)
    return tmp_path


@pytest.fixture
def micro(here, monkeypatch):
    """The same with a micro recipe, and LIN fitted twice, not nine times."""
    monkeypatch.setattr(ev, "RECIPE", MICRO)
    monkeypatch.setattr(ev.probe, "L2_GRID", [0.01])
    return here / "out"


def run(folder, out, *words, passes=2):
    given = ["run", "--data-dir", folder, "--out", out, "--passes", passes, "--seeds", 1, *words]
    ev.main([str(word) for word in given])


# --- run


def test_jobs_come_seed_by_seed():
    """Seed 0 of all variants, then the seeds 1 and 2 of those that a claim compares."""
    compared = {name for _, *pair, _ in ev.CLAIMS for name in pair}
    assert compared <= ev.VARIANTS.keys()
    wanted = ["floors"]
    for seed in range(3):
        wanted += [f"{name}-{seed}" for name in ev.VARIANTS if seed == 0 or name in compared]
    assert list(ev.JOBS) == wanted
    assert wanted[1:3] == ["mae-0", "square-16-k4-0"]
    assert ev.JOBS["square-16-4-short-2"] == ("square-16-4-short", 2)


def test_flags_are_what_the_names_say():
    for name, flags in ev.VARIANTS.items():
        config = ev.config_of(flags, TEN)
        assert (config.dim, config.depth, config.batch_size, config.lr) == (64, 4, 64, 4e-3)
        assert config.epochs == (4 if name.endswith("short") else 10)
        last_rank = re.search(r"-k(\d+)$", name)
        assert config.last_rank == (int(last_rank[1]) if last_rank else 0)
        assert config.skip == (name != "no-skip")
    assert ev.read_rows(ROOT / "results/evidence/mae-0.jsonl")[0]["recipe"] == TEN


def test_the_papers_differences():
    # LIN on CIFAR-10: Tables 2, 3, 5, 6, and 7 for MAE.
    printed = {"patch-raster": 55.53, "patch-random": 75.53, "square-16": 81.38}
    printed |= {"square-16-4": 82.46, "blob-9": 81.88, "scatter-9": 78.59}
    printed |= {"blob-7": 82.52, "blob-7-3": 82.71}
    for words, a, b, paper in ev.CLAIMS:
        if a in printed and b in printed:
            assert paper.startswith(f"{printed[a] - printed[b]:+.2f} ("), words
        elif words == "RandSAC > MAE, equal passes":
            assert paper.startswith(f"{92.1 - 87.3:+.2f} (Table 7)")
        else:
            assert paper in ("not tried", "in its supplement")


def test_a_run_and_its_log(micro, image_folder):
    run(image_folder, micro, "--only", "mae-0", "--lr", "2e-3")
    first, last = ev.read_rows(micro / "mae-0.jsonl")
    expected = {"name": "mae", "seed": 0, "recipe": MICRO.format(passes=2), "jobs": 1}
    expected |= {"flags": "--segments mae", "data": image_folder.name, "threads": 1}
    assert first.items() >= expected.items()
    assert first["machine"] and first["torch"] == torch.__version__
    assert first["images_per_s"] > 0
    assert str(image_folder.parent) not in json.dumps(first)
    folder = micro.parent / "runs/out/mae-0"
    end = ev.read_rows(folder / "metrics.jsonl")[-1]
    assert (end["step"], last["pass"], last["held_out_loss"]) == (8, 2, end["held_out_loss"])
    probes = {row["protocol"]: row["top1"] for row in ev.read_rows(folder / "probes.jsonl")}
    assert (last["lin"], last["knn"]) == (probes["linear"], probes["knn"])

    # What has a log is not done again.
    run(image_folder, micro, "--only", "mae")
    assert len(ev.read_rows(folder / "probes.jsonl")) == 2
    with pytest.raises(UserError, match="mae-0 is of another recipe: change --out"):
        run(image_folder, micro, "--only", "mae", passes=3)
    run(image_folder, micro, "--only", "no-skip", "blob-7", "--seconds", -1)
    assert [*micro.iterdir()] == [micro / "mae-0.jsonl"]


def test_floors(micro, image_folder):
    run(image_folder, micro, "--only", "floors")
    floors = ev.read_rows(micro / "floors.jsonl")
    assert [row["floor"] for row in floors] == ["--random-init", "--features pixels"]
    rows = ev.read_rows(micro.parent / "runs/out/floors/probes.jsonl")
    untrained = ("encoder", True)
    pixels = ("pixels", False)
    assert [(row["features"], row["random_init"]) for row in rows] == [untrained] * 2 + [pixels] * 2
    assert [row["protocol"] for row in rows] == ["linear", "knn"] * 2


def test_of_several_probes_the_last_ones_count(tmp_path, monkeypatch):
    monkeypatch.setattr(ev.probe, "main", lambda words: None)
    rows = [("linear", 10), ("knn", 20), ("linear", 30), ("knn", 40)]
    lines = [json.dumps({"protocol": name, "top1": top1}) for name, top1 in rows]
    (tmp_path / "probes.jsonl").write_text("\n".join(lines))
    assert ev.lin_and_knn(tmp_path) == {"lin": 30, "knn": 40}


SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved"))
print(*sys.argv[1:], flush=True)
time.sleep(60)
"""


def test_jobs_side_by_side(micro, image_folder, tmp_path, monkeypatch):
    """Each is the same command again, for which scripts stand here: they print their arguments."""
    words = f"run --data-dir {image_folder} --out {micro} --passes 2 --seeds 1 --jobs 2".split()
    words += ["--only", "mae", "patch-random", "no-skip"]
    script = tmp_path / "script.py"
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    pause = time.sleep

    def stopped(seconds):
        """Ctrl-C, while two run and the third waits."""
        if all(path.read_text() for path in micro.glob("*.txt")):
            raise KeyboardInterrupt
        pause(seconds)

    # When it is told to end, so are its runs, which save: it waits for them.
    script.write_text(SAVES)
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", stopped)
        with pytest.raises(KeyboardInterrupt):
            ev.main(words)
    said = {path.stem: path.read_text().splitlines()[-1] for path in micro.glob("*.txt")}
    assert said == {"mae-0": "saved", "patch-random-0": "saved"}

    # A job that fails does not stop the others, and is named.
    script.write_text("import sys; print(*sys.argv[1:]); sys.exit('mae-0' in sys.argv)")
    with pytest.raises(UserError, match=r"failed: \['mae-0'\]; see the .txt in"):
        ev.main(words)
    said = {path.stem: path.read_text().splitlines()[-1] for path in micro.glob("*.txt")}
    jobs = [f"{name}-0" for name in ("mae", "patch-random", "no-skip")]
    assert said == {job: " ".join([*words, "--only", job]) for job in jobs}


def test_a_job_that_was_stopped_goes_on(micro, image_folder, monkeypatch):
    take_step = randsac.training_step
    steps = []

    def interrupted(*arguments):
        steps.append(arguments[5])
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(*arguments)

    monkeypatch.setattr(randsac, "training_step", interrupted)
    words = ["--jobs", 2, "--only", "mae", "patch-random", "--only", "patch-random-0"]
    with pytest.raises(UserError, match="patch-random-0 was stopped: start again to go on"):
        run(image_folder, micro, *words)
    assert not [*micro.iterdir()]
    run(image_folder, micro, *words)
    assert steps == [*range(8)]
    first, last = ev.read_rows(micro / "patch-random-0.jsonl")
    assert (first["jobs"], last["pass"]) == (2, 2)


def test_what_the_user_can_mend(micro, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "train/CLASS" in refusal(run, tmp_path / "empty", micro, "--only", "mae", "no-skip")
    assert "invalid choice: 'square'" in refusal(run, tmp_path, micro, "--only", "square")


# --- cost and verdicts


def test_cost_of_a_run():
    cost = {name: ev.tflop(flags, TEN) for name, flags in ev.VARIANTS.items()}

    # Products of mae: 16 tokens are given, 48 hidden; two operations each, backward takes twice as
    # many as forward, but no pixel needs a gradient.
    D = 64
    encoder = 4 * (16 * 12 * D * D + 2 * 16 * 16 * D)
    decoder = 48 * 14 * D * D + 16 * 2 * D * D
    decoder += 2 * 48 * 48 * D + 2 * 48 * 16 * D
    mixing = 4 * 16 * D
    embedding = 16 * 48 * D
    forward = encoder + decoder + mixing + 48 * D * 48 + embedding
    assert cost["mae"] == pytest.approx(500_000 * 2 * (3 * forward - embedding) / 1e12)
    assert cost["square-16-4-short"] == pytest.approx(0.4 * cost["square-16-4"])
    assert cost["square-16"] == cost["square-16-4"] > cost["square-16-k8"] > cost["square-16-k4"]


def density_p(t, freedom):
    """Two-sided p of Student's t by its plain density, another way than in evidence.py."""
    x = (np.arange(10_000) + 0.5) * t / 10_000
    factor = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    density = factor * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    return 1 - 2 * density.sum() * t / 10_000


def test_students_distribution():
    for freedom in (1, 2, 2.97, 4):
        for t in (0.1, 1, 3, 10):
            p = 1 - np.interp(t, *ev.student(freedom))
            assert p == pytest.approx(density_p(t, freedom), abs=1e-6)
    # NIST/SEMATECH e-Handbook, section 1.3.6.7.2: t of p 0.05 for 1 and 10 degrees, 0.01 for 4.
    for p, freedom, printed in [(0.05, 1, 12.706), (0.05, 10, 2.228), (0.01, 4, 4.604)]:
        t, within = ev.student(freedom)
        assert np.interp(1 - p, within, t) == pytest.approx(printed, abs=0.00051)


def test_welch():
    # By hand: means 2 and 6, variances 1 and 32/3, squared errors 1/3 and 8/3.
    difference, half, p = ev.compare([1, 2, 3], [2, 6, 6, 10])
    freedom = 3**2 / ((1 / 3) ** 2 / 2 + (8 / 3) ** 2 / 3)
    assert difference == -4
    assert p == pytest.approx(density_p(4 / 3**0.5, freedom), abs=1e-7)
    assert density_p(half / 3**0.5, freedom) == pytest.approx(0.05, abs=1e-7)

    # Equal variances have 4 degrees, a side without a spread leaves 2, two of these say nothing.
    assert ev.compare([1, 2, 3], [2, 3, 4])[2] == pytest.approx(density_p(1.5**0.5, 4), abs=1e-7)
    assert ev.compare([1, 2, 3], [5, 5, 5])[2] == pytest.approx(density_p(3 * 3**0.5, 2), abs=1e-7)
    assert ev.compare([50, 50], [40, 40]) == (10, 0, 1)


# --- report


def log(folder, name, *ends, **settings):
    """A log for each seed: LIN is `ends`, kNN 10 less."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, end in enumerate(ends):
        first = {"name": name, "flags": ev.VARIANTS[name], "recipe": TEN, "data": "d"}
        early = {"pass": 1, "lin": 0.0, "knn": 0.0}  # old logs have some
        rows = [{**first, **settings}, early, {"pass": 10, "lin": end, "knn": end - 10}]
        lines = [json.dumps(row) for row in rows]
        (folder / f"{name}-{seed}.jsonl").write_text("\n".join(lines))


@pytest.fixture
def logged(here):
    """Logs of some variants."""
    log(ev.LOGS, "patch-random", 49, 50, 51)
    log(ev.LOGS, "patch-raster", 44, 45, 46)
    log(ev.LOGS, "square-16-4", 50, 51, 52)
    log(ev.LOGS, "mae", 52, 53, 57)
    log(ev.LOGS, "square-16", 40, 41, 42)
    log(ev.LOGS, "square-16-k4", 50)
    rows = [{"floor": "--random-init", "lin": 33.3, "knn": 22.2}]
    rows += [{"floor": "--features pixels", "lin": 35.5, "knn": 36.6}]
    (ev.LOGS / "floors.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return here


def report(*words):
    ev.main(["report", *map(str, words)])
    return (ev.ROOT / "results/README.md").read_text()


def cells(text, first):
    """-> the cells of the last row that begins so."""
    line = [line for line in text.splitlines() if line.startswith(f"| {first} |")][-1]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_tables(logged):
    text = report()
    assert text.startswith("above\n<!-- evidence -->\n")
    assert text.endswith("\n<!-- /evidence -->\nbelow\n") and "\nold" not in text
    assert report() == text

    assert cells(text, "patch-random")[2:5] == ["3", "50.0 ± 1.0", "40.0 ± 1.0"]
    assert cells(text, "square-16-k4")[2:5] == ["1", "50.0", "40.0"]
    assert "| blob-9 |" not in text
    assert cells(text, "untrained")[1:] == ["`--random-init`", "1", "33.3", "22.2", "0.0"]
    raster = cells(text, "random > raster")
    assert raster[1:4] == ["patch-random / patch-raster", "1.00", "+20.00 (Table 2)"]
    assert raster[4] == raster[5] == "+5.00 ± 2.27, p = 0.004: **higher**"
    assert cells(text, "segments > patches")[4] == "-9.00 ± 2.27, p = 0.000: **lower**"
    assert cells(text, "K = 4 > MAE, equal cost")[4] == "-4.00: not enough seeds"
    assert "coherent > incoherent" not in text
    assert cells(text, "RandSAC > MAE, equal passes")[4].endswith("no difference seen")
    assert f"Comparisons at 5 %: {text.count('p = ')}." in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {7}


def test_a_planted_log_changes_a_verdict_and_the_picture(logged):
    before = cells(report(), "random > raster")
    picture = (logged / "assets/evidence.png").read_bytes()
    log(ev.LOGS, "patch-raster", 44, 45, 51)
    after = cells(report(), "random > raster")
    assert before[4].endswith("**higher**") and after[4].endswith("no difference seen")
    assert before[:4] == after[:4]
    assert (logged / "assets/evidence.png").read_bytes() != picture


def test_other_logs_have_their_own_place_and_are_in_the_picture(logged, monkeypatch):
    drawn = {}

    def note(pen, place, words, *others):
        drawn[words] = place

    monkeypatch.setattr(ev.ImageDraw.ImageDraw, "text", note)
    before = report()
    assert "10" in drawn and "100" not in drawn and "50.0 patch-random" in drawn
    hundred = logged / "results/gpu/hundred"
    recipe = ev.RECIPE.format(lr="4e-3", batch_size=512, passes=100)
    log(hundred, "mae", 60, 61, recipe=recipe)
    log(hundred, "square-16-4", 62, 63, recipe=recipe)
    report()
    assert "100" in drawn
    assert drawn["60.5 mae"][1] < drawn["50.0 patch-random"][1] - 60  # it is higher up

    assert "no lines <!-- hundred --> and <!-- /hundred -->" in refusal(report, hundred)
    (logged / "results/README.md").write_text(f"{before}<!-- hundred --><!-- /hundred -->")
    text = report(hundred)
    assert text.startswith(before) and f"<!-- hundred -->\n`{recipe}`" in text
    assert cells(text, "RandSAC > MAE, equal passes")[4].startswith("+2.00 ±")
    assert Image.open(logged / "assets/hundred.png").width == 1600


@pytest.mark.parametrize("setting", [{"recipe": MICRO}, {"data": "other"}])
def test_logs_that_cannot_be_compared_are_refused(here, setting):
    assert "has logs of 0 recipes, not one: run or remove some" in refusal(report)
    log(ev.LOGS, "mae", 50)
    log(ev.LOGS, "no-skip", 50, **setting)
    assert "has logs of 2 recipes, not one: run or remove some" in refusal(report)
    log(ev.LOGS, "no-skip", 50, flags="--segments patch")
    assert "no-skip-0 is of other flags" in refusal(report)
    assert "\nold\n" in (here / "results/README.md").read_text()
    assert not [*(here / "assets").iterdir()]


def test_the_readme_says_what_the_logs_say():
    page = (ROOT / "results/README.md").read_text()
    found = re.findall(r"<!-- /(\w+) -->", page)
    assert "evidence" in found
    for name in found:
        (logs,) = [path for path in ev.LOGS.parent.rglob(name) if path.is_dir()]
        text = "\n".join(ev.describe(*ev.read_logs(logs)))
        assert f"<!-- {name} -->\n{text}\n<!-- /{name} -->" in page, "run evidence.py report"
        for path in logs.glob("*-[0-9].jsonl"):
            first = ev.read_rows(path)[0]
            assert first["machine"] in page and f"PyTorch {first['torch']}" in page, path
            assert first["data"] == "cifar10-jpeg"
            assert "/" not in path.read_text(), path  # no place on a machine
    assert "one for each run but no-skip-2" in page
    for path in ev.LOGS.glob("*-[0-9].jsonl"):
        assert ev.read_rows(path)[0]["threads"] == (2 if path.stem == "no-skip-2" else 1), path
