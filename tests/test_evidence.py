"""results/evidence.py: a run that is done is skipped, one cut off goes on, and the logs decide the
verdicts."""

import json
import math
import os
import re
import signal
import sys
import time

import numpy as np
import pytest
import torch
from conftest import MICRO_FLAGS, ROOT, forks
from PIL import Image

import randsac
from randsac import UserError

sys.path.insert(0, str(ROOT / "results"))
import evidence as ev

MICRO = " ".join(MICRO_FLAGS + ["--epochs", "2"])  # 2 passes of 4 steps
FLOPS = {}  # of what has been counted


@pytest.fixture(autouse=True)
def operations_are_counted_once(monkeypatch):
    flops = ev.flops

    def counted_once(config):
        if repr(config) not in FLOPS:
            FLOPS[repr(config)] = flops(config)
        return FLOPS[repr(config)]

    monkeypatch.setattr(ev, "flops", counted_once)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The command in a folder of its own."""
    settings = {
        "LOGS": tmp_path / "logs",
        "RUNS": tmp_path / "runs",
        "README": tmp_path / "README.md",
        "PICTURE": tmp_path / "evidence.png",
    }
    for name, value in settings.items():
        monkeypatch.setattr(ev, name, value)
    monkeypatch.setattr(ev.probe, "L2_GRID", [0.01])  # so that LIN is fitted twice, not nine times
    (tmp_path / "logs").mkdir()
    (tmp_path / "README.md").write_text(
        "above\n<!-- evidence -->\nold\n<!-- /evidence -->\nbelow\n"
    )
    return tmp_path


@pytest.fixture
def micro(here, monkeypatch):
    """The same with a micro recipe."""
    monkeypatch.setattr(ev, "RECIPE", MICRO)
    return here


@pytest.fixture
def called(monkeypatch):
    """-> the words of each training and probe, as they begin."""
    found = []
    for module in (randsac, ev.probe):

        def noted(words, main=module.main):
            found.append(words)
            return main(words)

        monkeypatch.setattr(module, "main", noted)
    return found


def run(folder, *only):
    ev.main(["run", "--data-dir", str(folder), "--only", *only])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def only_first_seeds(monkeypatch):
    jobs = {job: found for job, found in ev.JOBS.items() if found[1] == 0}
    monkeypatch.setattr(ev, "JOBS", jobs)


# ------------------------------------------------------------------------------------------------
# run


def test_jobs():
    names = list(ev.JOBS)
    assert names[:4] == ["floors", "mae-0", "mae-1", "mae-2"]
    assert len(names) == 1 + 12 * 3 + 7
    for _, a, b, _ in ev.CLAIMS:
        assert {f"{name}-{seed}" for name in (a, b) for seed in range(3)} <= ev.JOBS.keys()
    assert "blob-11-5-0" in names and "blob-11-5-1" not in names
    assert ev.JOBS["square-16-4-short-2"] == ("square-16-4-short", 2)


def test_flags_are_what_the_names_say():
    config = ev.config_of(ev.VARIANTS["square-16-4-short"])
    assert (config.hierarchy, config.epochs, config.last_rank) == ((16, 4), 4, 0)
    for name, flags in ev.VARIANTS.items():
        config = ev.config_of(flags)
        assert (config.dim, config.depth, config.batch_size, config.lr) == (64, 4, 64, 4e-3)
        assert config.epochs == (4 if name.endswith("short") else 10)
        last_rank = re.search(r"-k(\d+)$", name)
        assert config.last_rank == (int(last_rank[1]) if last_rank else 0)
        assert config.skip == (name != "no-skip")


def test_the_papers_differences():
    printed = {  # LIN on CIFAR-10: Tables 2, 3, 5, 6, and 7 for MAE
        "patch-raster": 55.53,
        "patch-random": 75.53,
        "square-16": 81.38,
        "square-16-4": 82.46,
        "blob-9": 81.88,
        "scatter-9": 78.59,
        "blob-7": 82.52,
        "blob-7-3": 82.71,
    }
    found = 0
    for words, a, b, paper in ev.CLAIMS:
        if a in printed and b in printed:
            assert paper.startswith(f"{printed[a] - printed[b]:+.2f} ("), words
            found += 1
        elif words == "RandSAC > MAE, equal passes":
            assert paper.startswith(f"{92.1 - 87.3:+.2f} (Table 7)")
        else:
            assert paper in ("not tried", "in its supplement")
    assert found == 6


def test_run_probes_and_is_not_done_twice(micro, image_folder, called, capsys, monkeypatch):
    only_first_seeds(monkeypatch)
    (micro / "runs/mae-0").mkdir(parents=True)
    (micro / "runs/mae-0/metrics.jsonl").touch()  # cut off before its first checkpoint
    run(image_folder, "mae", "floors")

    first, last = read(micro / "logs/mae-0.jsonl")
    expected = {"name": "mae", "seed": 0, "recipe": MICRO, "flags": "--segments mae"}
    assert first.items() >= {**expected, "data": image_folder.name}.items()
    assert first["machine"] and first["threads"] and first["torch"] == torch.__version__
    assert str(image_folder.parent) not in json.dumps(first)
    folder = micro / "runs/mae-0"
    end = read(folder / "metrics.jsonl")[-1]
    assert (end["step"], last["pass"], last["held_out_loss"]) == (8, 2, end["held_out_loss"])
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["config"]["seed"] == 0
    probes = {row["protocol"]: row["top1"] for row in read(folder / "probes.jsonl")}
    assert (last["lin"], last["knn"]) == (probes["linear"], probes["knn"])

    floors = read(micro / "logs/floors.jsonl")
    assert [row["floor"] for row in floors] == ["--random-init", "--features pixels"]
    rows = read(micro / "runs/floors/probes.jsonl")
    kinds = [(row["protocol"], row["random_init"], row["features"]) for row in rows]
    assert kinds == [
        ("linear", True, "encoder"),
        ("knn", True, "encoder"),
        ("linear", False, "pixels"),
        ("knn", False, "pixels"),
    ]
    found = [value for row in floors for value in (row["lin"], row["knn"])]
    assert found == [row["top1"] for row in rows]
    assert len(called) == 5

    capsys.readouterr()
    run(image_folder, "mae", "floors")
    assert capsys.readouterr().out.splitlines() == ["floors: done", "mae-0: done"]
    assert len(called) == 5


def test_stopped_it_saves_and_goes_on(micro, image_folder, called, monkeypatch):
    only_first_seeds(monkeypatch)
    folder = micro / "runs/square-16-4-0"
    training_step = randsac.training_step

    def stopped_in_the_fifth(model, optimizer, scaler, batch, config, step, *others):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return training_step(model, optimizer, scaler, batch, config, step, *others)

    monkeypatch.setattr(randsac, "training_step", stopped_in_the_fifth)
    with pytest.raises(UserError, match="square-16-4-0 was stopped: start again"):
        run(image_folder, "square-16-4", "no-skip")
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 5
    assert len(called) == 1 and not [*micro.glob("logs/*")]

    # A line cut off in the middle is written anew.
    monkeypatch.setattr(randsac, "training_step", training_step)
    metrics = folder / "metrics.jsonl"
    with open(metrics, "a") as file:
        file.write('{"step": 7, "lo')
    (folder / "probes.jsonl").write_text('{"protocol": "linear", "top1": -1}\n')  # an older one
    run(image_folder, "square-16-4")
    assert called[1][:2] == ["--resume", str(folder)]
    steps = [row["step"] for row in read(metrics)]
    assert steps == sorted(set(steps)) and steps[-1] == 8
    _, last = read(micro / "logs/square-16-4-0.jsonl")
    assert last["pass"] == 2 and last["lin"] == read(folder / "probes.jsonl")[1]["top1"]


def test_interrupted_in_the_probe_it_logs_nothing(micro, image_folder, called, monkeypatch):
    only_first_seeds(monkeypatch)
    knn = ev.probe.knn

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ev.probe, "knn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(image_folder, "mae")
    assert not [*micro.glob("logs/*")]
    monkeypatch.setattr(ev.probe, "knn", knn)
    run(image_folder, "mae")
    assert [words[0] for words in called[2:]] == [
        "--resume",
        str(micro / "runs/mae-0/checkpoint.pt"),
    ]
    assert len(read(micro / "logs/mae-0.jsonl")) == 2


def killed(settings, folder):
    """The command as it is, but for its settings, which the system ends in the tenth step."""
    torch.set_num_threads(1)
    for name, value in settings.items():
        setattr(ev, name, value)
    training_step = randsac.training_step

    def last(model, optimizer, scaler, batch, config, step, *others):
        if step == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(model, optimizer, scaler, batch, config, step, *others)

    randsac.training_step = last
    run(folder, "patch-random")


def test_killed_it_goes_on(micro, image_folder, called, monkeypatch):
    only_first_seeds(monkeypatch)
    monkeypatch.setattr(ev, "RECIPE", MICRO.replace("--epochs 2", "--epochs 3"))
    settings = {name: getattr(ev, name) for name in ("LOGS", "RUNS", "JOBS", "RECIPE")}
    process = forks.Process(target=killed, args=(settings, image_folder))
    process.start()
    process.join()
    folder = micro / "runs/patch-random-0"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 8  # of a pass
    run(image_folder, "patch-random")
    assert called[0][:2] == ["--resume", str(folder)]
    assert read(micro / "logs/patch-random-0.jsonl")[1]["pass"] == 3


def test_two_at_once_share_the_runs(micro, image_folder, capsys, monkeypatch):
    only_first_seeds(monkeypatch)
    (micro / "runs").mkdir()
    with open(micro / "runs/mae-0.lock", "w") as lock:
        ev.own(lock, "is free")
        run(image_folder, "mae", "no-skip")
    printed = capsys.readouterr().out
    assert "mae-0: skipped" in printed and "no-skip-0: starts" in printed
    assert [path.name for path in micro.glob("logs/*")] == ["no-skip-0.jsonl"]


def test_what_training_refuses_is_said(micro, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has the folders \[\]; wanted are train/CLASS/"):
        run(tmp_path / "empty", "mae")
    assert not [*micro.glob("logs/*")]
    with pytest.raises(UserError, match="not a folder: give --data-dir"):
        run(tmp_path / "nowhere", "mae")
    with pytest.raises(UserError, match="invalid choice: 'square'"):
        run(tmp_path, "square")


# ------------------------------------------------------------------------------------------------
# speed and cost


def test_speed_times_the_variants_in_turn(here, monkeypatch):
    names = ("mae", "square-16-k4")
    monkeypatch.setattr(ev, "VARIANTS", {name: ev.VARIANTS[name] for name in names})
    monkeypatch.setattr(ev, "RECIPE", MICRO)
    monkeypatch.setattr(ev, "ROUNDS", 3)
    training_step = randsac.training_step
    seen = []

    def noted(model, optimizer, scaler, batch, config, *others):
        seen.append(config.segments)
        if len(seen) <= 2 * ev.STEPS:
            time.sleep(0.2)  # is no processor time
        return training_step(model, optimizer, scaler, batch, config, *others)

    monkeypatch.setattr(randsac, "training_step", noted)
    ev.main(["speed"])
    assert seen == (["mae"] * ev.STEPS + ["square"] * ev.STEPS) * 3
    first, *rows = read(here / "logs/speed.jsonl")
    assert first["threads"] == 1 and first["machine"]
    assert [row["name"] for row in rows] == list(names)
    for row in rows:
        assert row["images_per_s"] == np.median(row["rounds"]) and len(row["rounds"]) == 3
        assert min(row["rounds"]) > 16 / 0.2


def test_cost_of_a_run(here):
    rows = [{}] + [{"name": name, "images_per_s": 100.0} for name in ev.VARIANTS]
    ev.write_rows(here / "logs/speed.jsonl", rows)
    cost = ev.costs()
    assert cost["mae"][1] == pytest.approx(10 * 50_000 / 100 / 60)
    assert cost["square-16-4-short"][1] == pytest.approx(4 * 50_000 / 100 / 60)

    # Products of mae: 16 tokens are given, 48 hidden; two operations each, backward takes twice as
    # many as forward, but no pixel needs a gradient.
    D = 64
    encoder = 4 * (16 * 12 * D * D + 2 * 16 * 16 * D)
    decoder = 48 * 14 * D * D + 16 * 2 * D * D + 2 * 48 * 48 * D + 2 * 48 * 16 * D
    mixing = 4 * 16 * D
    embedding = 16 * 48 * D
    forward = encoder + decoder + mixing + 48 * D * 48 + embedding
    assert cost["mae"][0] == pytest.approx(500_000 * 2 * (3 * forward - embedding) / 1e12)
    assert cost["square-16-4-short"][0] == pytest.approx(0.4 * cost["square-16-4"][0])
    assert cost["square-16"] == cost["square-16-4"] > cost["square-16-k8"] > cost["square-16-k4"]

    ev.write_rows(here / "logs/speed.jsonl", rows[:-1])
    with pytest.raises(UserError, match="not all is timed: python results/evidence.py speed"):
        ev.costs()


# ------------------------------------------------------------------------------------------------
# verdicts


def within(t, freedom):
    """Integral of the density of Student's t from -t to t, by the midpoint rule."""
    x = (np.arange(10_000) + 0.5) * t / 10_000
    factor = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    density = factor * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    return 2 * density.sum() * t / 10_000


def test_critical_values():
    assert within(1.0, 1) == pytest.approx(0.5)  # Cauchy's quartile
    for freedom, value in enumerate(ev.CRITICAL, 1):
        assert within(value - 0.0006, freedom) < 0.95 < within(value + 0.0006, freedom)
        assert ev.critical_value(freedom) == ev.critical_value(freedom + 0.999) == value
        assert ev.critical_value(freedom - 1e-12) == value
    assert ev.critical_value(1000) == ev.CRITICAL[-1]


def test_welch():
    # By hand: means 2 and 6, variances 1 and 32/3, squared errors 1/3 and 8/3.
    t, freedom = ev.welch([1, 2, 3], [2, 6, 6, 10])
    assert t == pytest.approx(-4 / (1 / 3 + 32 / 3 / 4) ** 0.5)
    assert freedom == pytest.approx(3**2 / ((1 / 3) ** 2 / 2 + (8 / 3) ** 2 / 3))
    assert ev.welch([1, 2, 3], [2, 3, 4])[1] == pytest.approx(4)
    assert ev.welch([1, 2, 3], [5, 5, 5])[1] == pytest.approx(2)


def test_a_verdict_is_that_of_the_p_value():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        a = rng.normal(0, rng.uniform(0.2, 3), 3).tolist()
        b = rng.normal(rng.uniform(-5, 5), rng.uniform(0.2, 3), 3).tolist()
        t, freedom = ev.welch(a, b)
        verdict = ev.judge(a, b).split(": ")[1]
        significant = 1 - within(abs(t), math.floor(freedom)) < 0.05
        if not significant:
            assert verdict == "no difference seen"
        elif np.mean(a) > np.mean(b):
            assert verdict == "**higher, p < 0.05**"
        else:
            assert verdict == "**lower, p < 0.05**"
        seen.add(verdict)
    assert len(seen) == 3


def test_verdicts_in_words():
    assert ev.judge([50, 51, 52], [44, 45, 46]) == "+6.00, t 7.35 at 4.00: **higher, p < 0.05**"
    assert ev.judge([44, 45, 46], [50, 51, 52]) == "-6.00, t -7.35 at 4.00: **lower, p < 0.05**"
    assert ev.judge([50, 51, 52], [49, 50, 51]) == "+1.00, t 1.22 at 4.00: no difference seen"
    assert ev.judge([50, 51, 52], [40]) == "+11.00: not enough seeds"
    assert ev.judge([50], [40, 41, 42]) == "+9.00: not enough seeds"
    assert ev.judge([50, 51], []) == ev.judge([], [1, 2]) == "not run yet"
    assert ev.judge([50, 50], [40, 40]) == "+10.00: seeds without a spread"


# ------------------------------------------------------------------------------------------------
# report


def log(name, *ends, **settings):
    """A log for each seed: LIN is `ends`, kNN 10 less."""
    for seed, end in enumerate(ends):
        first = {"name": name, "seed": seed, "flags": ev.VARIANTS[name], "recipe": ev.RECIPE}
        first |= {"data": "d", "machine": "m", "threads": 1, "torch": "2", **settings}
        early = {"pass": 1, "held_out_loss": 1.0, "lin": 0.0, "knn": 0.0}  # old logs have some
        last = {"pass": 10, "held_out_loss": 1.0, "lin": end, "knn": end - 10}
        ev.write_rows(ev.LOGS / f"{name}-{seed}.jsonl", [first, early, last])


@pytest.fixture
def logged(here):
    """Logs of some variants, and rates of all."""
    rows = [{"machine": "m"}] + [{"name": name, "images_per_s": 100.0} for name in ev.VARIANTS]
    rows[1]["images_per_s"] = 250.0  # of mae
    ev.write_rows(here / "logs/speed.jsonl", rows)
    log("patch-random", 49, 50, 51)
    log("patch-raster", 44, 45, 46)
    log("square-16-4", 50, 51, 52)
    log("mae", 52, 53, 57)
    log("square-16", 50)
    return here


def report():
    ev.main(["report"])
    return ev.README.read_text()


def cells(text, first):
    """-> the cells of the row that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_tables_and_picture(logged):
    floors = [
        {"floor": "--random-init", "lin": 33.3, "knn": 22.2},
        {"floor": "--features pixels", "lin": 35.5, "knn": 36.6},
    ]
    ev.write_rows(ev.LOGS / "floors.jsonl", floors)
    text = report()
    assert text.startswith("above\n<!-- evidence -->\n")
    assert text.endswith("\n<!-- /evidence -->\nbelow\n") and "\nold" not in text
    picture = (logged / "evidence.png").read_bytes()
    assert report() == text and (logged / "evidence.png").read_bytes() == picture

    assert cells(text, "patch-random")[2:5] == ["3", "50.0 ± 1.0", "40.0 ± 1.0"]
    assert cells(text, "square-16")[2:5] == ["1", "50.0", "40.0"]
    assert cells(text, "blob-9")[2:5] == ["0", "-", "-"]
    assert cells(text, "mae")[6] == "33.3" and cells(text, "square-16-4")[6] == "83.3"
    assert "| floor | `probe.py --random-init` | 1 | 33.3 | 22.2 |" in text

    raster = cells(text, "random ≫ raster")
    assert raster[1] == "patch-random / patch-raster" and raster[3] == "+20.00 (Table 2)"
    assert raster[4] == raster[5] == "+5.00, t 6.12 at 4.00: **higher, p < 0.05**"
    assert cells(text, "segments > patches")[4] == "+0.00: not enough seeds"
    assert cells(text, "coherent > incoherent")[4:] == ["not run yet"] * 2
    passes = cells(text, "RandSAC > MAE, equal passes")
    assert passes[2].endswith(", 2.50") and passes[4].endswith("no difference seen")
    assert "20 comparisons at 5 %" in text
    assert "13 runs are logged. Missing, by variant and seed: square-16-k4-0, " in text
    assert "blob-9-1" in text and "mae-2" not in text and "square-16-0" not in text
    assert "square-16-1, square-16-2, " in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {7, 8}

    image = Image.open(logged / "evidence.png").convert("RGB")
    seen = {colour for _, colour in image.getcolors(1 << 24)}
    assert image.width == 1600
    assert {(0, 114, 178), (26, 26, 26), (0, 158, 115)} <= seen  # square 16, mae, raster
    assert (136, 34, 85) not in seen  # square 4 has no log


def test_a_planted_log_changes_a_verdict(logged):
    before = cells(report(), "random ≫ raster")
    log("patch-raster", 44, 45, 51)
    after = cells(report(), "random ≫ raster")
    assert before[4].endswith("**higher, p < 0.05**") and after[4].endswith("no difference seen")
    assert before[:4] == after[:4]


def test_every_variant_has_its_dot_in_the_picture():
    drawn = [name for names in ev.COLOURS.values() for name in names]
    assert sorted(drawn) == sorted(ev.VARIANTS) and len(ev.COLOURS) <= len(ev.HUES)


def test_once_all_runs_are_logged_none_is_missing(logged):
    ev.write_rows(ev.LOGS / "floors.jsonl", [{"floor": "--random-init", "lin": 1.0, "knn": 2.0}])
    for name in ev.VARIANTS:
        log(name, *[50, 51, 53][: sum(found[0] == name for found in ev.JOBS.values())])
    text = report()
    assert "43 runs are logged. Missing, by variant and seed: none." in text
    assert "seeds" not in text.partition("| claim |")[2]


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"recipe": MICRO}, "no-skip-0.jsonl is of other flags"),
        ({"flags": "--segments patch"}, "no-skip-0.jsonl is of other flags"),
        ({"data": "other"}, "several data sets: .'d', 'other'."),
    ],
)
def test_logs_of_another_kind_are_refused(logged, setting, words):
    log("no-skip", 50, **setting)
    with pytest.raises(UserError, match=words):
        report()
    assert "\nold\n" in ev.README.read_text() and not ev.PICTURE.exists()


def test_what_the_user_can_mend(logged):
    (ev.LOGS / "speed.jsonl").unlink()
    with pytest.raises(UserError, match="not all is timed"):
        report()
    ev.README.write_text("no markers")
    with pytest.raises(UserError, match="has no line <!-- evidence -->"):
        report()
    (ev.LOGS / "mae-0.jsonl").write_text("{")
    with pytest.raises(UserError, match="mae-0.jsonl is damaged .* remove it"):
        report()
    for path in ev.LOGS.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no logs .* run --data-dir DIR"):
        report()
    assert ev.README.read_text() == "no markers" and not ev.PICTURE.exists()


def test_the_readme_says_what_the_logs_say():
    runs, missing = ev.read_logs()
    floors = ev.read_rows(ev.LOGS / "floors.jsonl")
    text = "\n".join(ev.describe(runs, missing, ev.costs(), floors))
    page = ev.README.read_text()
    assert f"{ev.BEGIN}\n{text}\n{ev.END}" in page, "run evidence.py report"

    # What stands above the tables is written by hand.
    assert f"\npython randsac.py {ev.RECIPE}\n" in page
    assert "on CIFAR-10 (JPEG)" in page
    assert "one for each run but no-skip-2" in page
    for path in ev.LOGS.glob("*-[0-9].jsonl"):
        first = read(path)[0]
        assert first["data"] == "cifar10-jpeg", path
        assert first["machine"] in page and f"PyTorch {first['torch']}" in page, path
        assert first["threads"] == (2 if path.stem == "no-skip-2" else 1), path


def test_logs_name_no_place_on_a_machine():
    for path in ev.LOGS.iterdir():
        assert "/" not in path.read_text(), path
