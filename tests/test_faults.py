"""Whatever is done to the program, it says one clear line, loses nothing and can be started again.

Training runs in processes forked from one that has imported torch, so that killing one costs no seconds."""
import errno
import json
import math
import os
import pickle
import resource
import signal
import sys
import time

import numpy as np
import pytest
import torch
from conftest import MICRO_FLAGS, forks, micro, random_model, run_here
from test_training import rows, same_weights

import randsac


def child(arguments, log, fault=None, at=0):
    """Runs the command in this process, its output in the file `log`, with a `fault` in its `at`-th file operation."""
    torch.set_num_threads(1)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["randsac.py", *map(str, arguments)]
    calls = dict(n=0)

    def failing(function, act):
        def call(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == at:
                act()
            return function(*args, **kwargs)
        return call

    if fault == "kill while writing":
        save = torch.save

        def half(content, file):
            calls["n"] += 1
            save(content, file)
            if calls["n"] == at:
                file.flush()
                os.truncate(file.name, file.tell() // 2)
                os.kill(os.getpid(), 9)
        torch.save = half
    elif fault == "kill before rename":
        os.replace = failing(os.replace, lambda: os.kill(os.getpid(), 9))
    elif fault == "kill before flush":
        os.fsync = failing(os.fsync, lambda: os.kill(os.getpid(), 9))
    elif fault == "disk full":  # a real refusal by the system: files may not grow beyond half a checkpoint
        torch.save = failing(torch.save, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    randsac.run_command(randsac.main)


def start(arguments, log, *fault):
    process = forks.Process(target=child, args=([str(a) for a in arguments], str(log), *fault))
    process.start()
    return process


def finish(process, log, seconds=60):
    process.join(seconds)
    assert process.exitcode is not None, "does not end"
    text = log.read_text().replace("\r", "\n") if log.exists() else ""
    return process.exitcode, text


def one_line(code, text, *words):
    line = [line for line in text.strip().splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in text and len(line) == 1, (code, text)
    assert all(word in line[0] for word in words), line[0]


@pytest.fixture
def flags(image_folder):
    return [*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 10, "--save-every", 3]  # 40 steps


@pytest.fixture(scope="module")
def undisturbed(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert finish(start([*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 10, "--save-every", 3, "--out", out],
                        out.parent / "log"), out.parent / "log")[0] == 0
    return out


# --- killed

def kill_and_resume(flags, folder, undisturbed, kills, rng):
    """`kills` runs, each killed by kill -9 at a random moment of its life and resumed to its end -> the steps of the
    checkpoints that the kills left."""
    log, left, lifetime = folder / "log", [], 0.0

    def begin(out):
        process = start([*flags, "--out", out], log)
        while not (out / "checkpoint.pt").exists():
            assert process.is_alive()
            time.sleep(0.001)
        return process, time.perf_counter()

    for _ in range(2):  # how long a run lives; the first is slower
        process, born = begin(folder / f"whole{_}")
        assert finish(process, log)[0] == 0
        lifetime = time.perf_counter() - born
    while len(left) < kills:
        out = folder / str(time.perf_counter_ns())
        process, _ = begin(out)
        time.sleep(rng.uniform(0, lifetime))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was faster
            continue
        assert process.exitcode == -signal.SIGKILL
        left.append(randsac.load_checkpoint(out / "checkpoint.pt")[0]["step"])  # always whole
        code, text = finish(start(["--out", out, "--resume"], log), log)
        assert code == 0 and same_weights(out, undisturbed), text
        assert [r["step"] for r in rows(out)] == [r["step"] for r in rows(undisturbed)]
    return left


def test_kill_9_at_random_moments(flags, tmp_path, undisturbed):
    kill_and_resume(flags, tmp_path, undisturbed, 4, np.random.default_rng(0))


@pytest.mark.long
def test_kill_9_twenty_times(flags, tmp_path, undisturbed):
    left = kill_and_resume(flags, tmp_path, undisturbed, 20, np.random.default_rng(1))
    print("killed with checkpoints of steps", sorted(left))
    assert len(set(left)) > 5  # all over the run


@pytest.mark.parametrize("fault", ["kill while writing", "kill before flush", "kill before rename"])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_killed_inside_a_write(flags, tmp_path, undisturbed, fault, at):
    out, log = tmp_path / "run", tmp_path / "log"
    assert finish(start([*flags, "--out", out], log, fault, at), log)[0] == -signal.SIGKILL
    if (out / "checkpoint.pt").exists():
        randsac.load_checkpoint(out / "checkpoint.pt")
        assert finish(start(["--out", out, "--resume"], log), log)[0] == 0
    else:  # within milliseconds of its birth: nothing was trained yet, and the program says how to go on
        one_line(*finish(start([*flags, "--out", out], log), log), "--out")
        out = tmp_path / "another"
        assert finish(start([*flags, "--out", out], log), log)[0] == 0
    assert same_weights(out, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_between_steps_saves_and_says_how_to_resume(flags, tmp_path, undisturbed, number):
    out, log = tmp_path / "run", tmp_path / "log"
    process = start([*flags, "--out", out], log)
    while not (log.exists() and "0/640" in log.read_text()):
        assert process.is_alive(), log.read_text()
        time.sleep(0.005)
    time.sleep(0.02)
    os.kill(process.pid, number)
    code, text = finish(process, log)
    assert code == 128 + number and f"--out {out} --resume" in text, text
    assert 0 < rows(out)[-1]["step"] == randsac.load_checkpoint(out / "checkpoint.pt")[0]["step"]
    assert finish(start(["--out", out, "--resume"], log), log)[0] == 0 and same_weights(out, undisturbed)


# --- disks, directories, numbers

def test_full_disk_keeps_the_last_good_checkpoint(flags, tmp_path, undisturbed):
    out, log = tmp_path / "run", tmp_path / "log"
    code, text = finish(start([*flags, "--out", out], log, "disk full", 4), log)
    one_line(code, text, "checkpoint.pt", "make room")
    assert randsac.load_checkpoint(out / "checkpoint.pt")[0]["step"] == 4  # saved: 0, 3, 4, and not 6
    assert {p.name for p in out.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    assert finish(start(["--out", out, "--resume"], log), log)[0] == 0 and same_weights(out, undisturbed)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(flags, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    code, text = finish(start([*flags, "--out", out, "--lr", 1e9], log), log)
    one_line(code, text, "loss is nan at step", "--lr")
    saved, _ = randsac.load_checkpoint(out / "checkpoint.pt")
    assert all(torch.isfinite(p).all() for p in saved["model"].values())
    assert all(math.isfinite(r["loss"]) for r in rows(out))


def test_of_two_runs_with_one_name_one_wins(flags, tmp_path, undisturbed):
    for i in range(5):
        out, logs = tmp_path / f"run{i}", [tmp_path / f"a{i}", tmp_path / f"b{i}"]
        both = [start([*flags, "--out", out], log) for log in logs]
        ends = sorted((finish(process, log) for process, log in zip(both, logs)), key=lambda end: end[0])
        assert ends[0][0] == 0
        one_line(*ends[1], "run")
        assert same_weights(out, undisturbed)


def test_a_place_that_cannot_be_written(flags, tmp_path):
    (tmp_path / "file").write_text("")
    for i, out in enumerate([tmp_path / "file" / "run", "/proc/run"]):
        one_line(*finish(start([*flags, "--out", out], tmp_path / f"log{i}"), tmp_path / f"log{i}"), "run")


@pytest.mark.long
def test_memory_is_flat_over_5000_steps(image_folder, tmp_path):
    process = start([*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 1250, "--out", tmp_path / "run"], tmp_path / "log")
    sizes = []
    while process.is_alive():
        try:
            pages = int(open(f"/proc/{process.pid}/statm").read().split()[1])
            sizes.append((rows(tmp_path / "run")[-1]["step"], pages))
        except (OSError, IndexError, json.JSONDecodeError):
            pass
        time.sleep(0.2)
    assert process.exitcode == 0
    early, late = (np.mean([p for s, p in sizes if a <= s < b]) for a, b in [(500, 1000), (4500, 5001)])
    print(f"pages at steps 500-1000: {early:.0f}, at 4500-5000: {late:.0f}")
    assert late < 1.05 * early


# --- checkpoints

@pytest.fixture(scope="module")
def checkpoint(undisturbed):
    return (undisturbed / "checkpoint.pt").read_bytes()


def refused(path, *words):
    with pytest.raises(ValueError) as error:
        randsac.RandSAC.load(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message and all(w in message for w in words), message


def test_a_checkpoint_cut_short_anywhere_is_refused(checkpoint, tmp_path):
    path = tmp_path / "cut.pt"
    for end in np.linspace(0, len(checkpoint) - 1, 100).astype(int):
        path.write_bytes(checkpoint[:end])
        refused(path)


def test_a_flipped_bit_is_refused_or_harmless(checkpoint, tmp_path):
    path, rng = tmp_path / "flipped.pt", np.random.default_rng(0)
    path.write_bytes(checkpoint)
    good, good_config = randsac.RandSAC.load(path)
    outcomes = [0, 0]
    for place in rng.integers(0, 8 * len(checkpoint), 100):
        damaged = bytearray(checkpoint)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            model, config = randsac.RandSAC.load(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            outcomes[0] += 1
            continue
        assert config == good_config
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), good.state_dict().values()))
        outcomes[1] += 1
    assert outcomes[0] > 50


class Payload:
    """Unpickled by a careless program, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_file_that_would_run_code_does_not(tmp_path):
    trace = tmp_path / "it ran"
    torch.save(dict(config={}, model=Payload(str(trace))), tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Payload(str(trace))))
    for name in ("zip.pt", "pickle.pt"):
        refused(tmp_path / name)
        assert not trace.exists()
    pickle.loads((tmp_path / "pickle.pt").read_bytes()).close()
    assert trace.exists()  # the payload works where it is let


def test_other_files_are_refused_by_name(checkpoint, undisturbed, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    refused(tmp_path / "text.pt")
    refused(tmp_path / "missing.pt", "No such file")
    refused(tmp_path)  # a directory
    saved = torch.load(undisturbed / "checkpoint.pt", weights_only=True)
    for name, change, words in [
            ("other.pt", dict(model={}), ("embed.weight",)),
            ("more.pt", dict(model={**saved["model"], "extra": torch.zeros(1)}), ("extra",)),
            ("larger.pt", dict(config={**saved["config"], "dim": 32}), ("embed.weight",)),
            ("newer.pt", dict(config={**saved["config"], "flavour": 1}), ("flavour",)),
            ("odd.pt", dict(config={**saved["config"], "heads": 3}), ("--heads",))]:
        torch.save({**saved, **change}, tmp_path / name)
        refused(tmp_path / name, *words)
    for i, content in enumerate([[1, 2], {}, dict(config=3, model=4), dict(config={}), dict(model={})]):
        torch.save(content, tmp_path / f"{i}.pt")
        refused(tmp_path / f"{i}.pt")


def test_resuming_from_a_damaged_checkpoint_is_refused_and_touches_nothing(checkpoint, undisturbed, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for file in undisturbed.iterdir():
        (out / file.name).write_bytes(file.read_bytes()[:-9 if file.suffix == ".pt" else None])
    before = {file: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(ValueError, match="checkpoint"):
        run_here("--out", out, "--resume")
    assert before == {file: file.read_bytes() for file in out.iterdir()}


def test_half_precision_checkpoint_loads_as_float32(tmp_path):
    model = random_model(micro())
    half = {k: v.half() for k, v in model.state_dict().items()}
    import dataclasses
    torch.save(dict(config=dataclasses.asdict(micro()), model=half), tmp_path / "half.pt")
    loaded, _ = randsac.RandSAC.load(tmp_path / "half.pt")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())


# --- any configuration at all

POOLS = dict(image_size=[1, 2, 4, 6, 8, 9, 12], patch_size=[0, 1, 2, 3, 4], segments=["patch", "square", "blob", "scatter", "mae", "x"],
             hierarchy=[None, None, (), (4,), (9,), (16, 4), (5, 3), (3, 5), (2,), (1,), (100,), ("a",), 7, (6, 4, 2)],
             order=["random", "raster", "up"], dim=[4, 8, 12, 6, 0, -8, None, 8.0], heads=[1, 2, 3, 0], depth=[1, 2, 0],
             decoder_depth=[1, 2, -1], skip=[True, False, None], target=[None, "pixels", "normalized", ""],
             lr=[1e-3, 0.0, -1.0, math.nan, math.inf, "1", None], batch_size=[1, 4, 0, None], warmup=[0.0, 0.5, 1.5],
             crop_scale=[0.01, 1.0, 0.0, 2.0], seed=[0, 2**31, -1], weight_decay=[0.0, -0.1, 1], epochs=[1, None, 0],
             model=["nano", None, "mega"], dataset=["shapes", "folder", "what"])
LIKELY = dict(image_size=8, patch_size=2, dim=8, heads=2, depth=1, decoder_depth=1, batch_size=4)


def try_configuration(rng):
    """One random configuration: trains a step with a finite loss (True) or is refused with a ValueError (False)."""
    settings = dict(LIKELY)
    for name in rng.choice(list(POOLS), rng.integers(1, 6), replace=False):
        settings[str(name)] = POOLS[name][rng.integers(len(POOLS[name]))]
    try:
        config = randsac.Config(**settings)
    except ValueError as error:
        assert "\n" not in str(error) and "--" in str(error), settings
        return False
    model = randsac.RandSAC(config)
    images = torch.randint(0, 256, (3, 3, config.image_size, config.image_size), dtype=torch.uint8)
    optimizer = randsac.make_optimizer(model, config)
    for step in range(2):
        loss = randsac.training_step(model, optimizer, images, config, step, 2)
        assert math.isfinite(loss.item()), settings
    assert all(torch.isfinite(p).all() for p in model.parameters()), settings
    return True


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.long)])
def test_any_configuration_trains_or_is_refused(count):
    rng = np.random.default_rng(count)
    trained = sum(try_configuration(rng) for _ in range(count))
    assert 0.2 * count < trained < 0.8 * count
