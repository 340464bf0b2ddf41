"""Whatever is done to the program, it says one clear line, loses nothing and can be started again.

What kills a training, or binds a whole process, happens in one that is forked from another that has
imported torch, so that it costs no seconds. The rest happens in this process."""

import contextlib
import ctypes
import dataclasses
import io
import itertools
import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MICRO_FLAGS, ROOT, forks, go, micro, one_line, refusal, run_here
from test_training import contents, random_batch, rows, steps, weights

import randsac


@pytest.fixture(scope="module")
def flags(image_folder):
    """20 steps."""
    return [*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 5, "--save-every", 3]


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    """A run to compare with. Not to be written to."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_here(*flags, "--out", out) == 0
    return out


def saved_step(out):
    """The step of a run's checkpoint, which is always whole."""
    return randsac.load_checkpoint(f"{out}/checkpoint.pt")[0]["step"]


def lost_nothing(out, undisturbed):
    """A run that has come to its end is as one that was never disturbed, but for rows of the log
    that it has more."""
    assert torch.equal(weights(out), weights(undisturbed))
    log = {row["step"]: row for row in rows(out)}
    assert steps(out) == sorted(log)
    for row in rows(undisturbed):
        assert log[row["step"]].get("held_out_loss") == row.get("held_out_loss")


def send(*numbers):
    """-> a function that sends these signals to this process."""
    return lambda *_: [os.kill(os.getpid(), number) for number in numbers]


def at_call(number, function, act):
    """`function`, but in its call of this number `act`, with the same arguments, comes first."""
    calls = itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == number:
            act(*args)
        return function(*args, **kwargs)

    return call


def at(patch, number, act):
    """In this step of a training (1: the first) `act` comes first."""
    patch.setattr(randsac, "training_step", at_call(number, randsac.training_step, act))


# --- a command in a process of its own, in which a fault waits


def kill_in_a_write(number):
    """In the write of this number, when half of the file is on the disk."""

    def act(descriptor):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = at_call(number, os.fsync, act)


def signals_in_a_step(step, *numbers):
    at(pytest.MonkeyPatch(), step, send(*numbers))


def little_memory(megabytes):
    """So much more than the process has now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = now + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def read_only(place):
    """For this process, which gives up all rights of an administrator."""
    for path in (place, *place.rglob("*")):
        path.chmod(0o555)
    version = (ctypes.c_uint32 * 2)(0x20080522)
    ctypes.CDLL(None).capset(version, (ctypes.c_uint32 * 6)())


def child(arguments, place, fault, values):
    torch.set_num_threads(1)
    os.chdir(place)
    with open("log", "w") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    if fault is not None:
        fault(*values)
    sys.argv = ["randsac.py", *arguments]
    randsac.run_command(randsac.main)


def start(arguments, fault=None, *values):
    """-> a process that runs the command here. What it says goes into the file `log`."""
    words = [str(argument) for argument in arguments]
    process = forks.Process(target=child, args=(words, os.getcwd(), fault, values))
    process.start()
    return process


def run(arguments, fault, *values):
    """-> its exit code, all that it has said."""
    process = start(arguments, fault, *values)
    process.join(100)
    said = Path("log").read_text().replace("\r", "\n")
    if process.exitcode is None:
        process.kill()
        raise AssertionError("does not end: " + said)
    return process.exitcode, said


# --- killed, interrupted


# In the write of images, of the first checkpoint, of a later one; in a step, with a row not saved.
KILLS = [(kill_in_a_write, 1), (kill_in_a_write, 3), (kill_in_a_write, 5)]
KILLS.append((signals_in_a_step, 11, signal.SIGKILL))


@pytest.mark.parametrize("fault", KILLS)
def test_killed(flags, undisturbed, fault):
    again = ["--resume", "run", *flags]
    assert run(again, *fault)[0] == -signal.SIGKILL
    assert run_here(*again) == 0
    lost_nothing("run", undisturbed)


@pytest.mark.long
def test_twenty_kills_at_random_moments(flags, undisturbed):
    """Each is resumed to the end. Runs that are faster tell how long a life is."""
    rng = np.random.default_rng(0)
    lifetime = 60
    left = []
    while len(left) < 20:
        out = Path(str(time.perf_counter_ns()))
        process = start([*flags, "--out", out])
        while process.is_alive() and not (out / "checkpoint.pt").exists():
            time.sleep(0.002)
        born = time.perf_counter()
        process.join(rng.uniform(0, lifetime))
        process.kill()
        process.join()
        if process.exitcode == 0:
            lifetime = time.perf_counter() - born
            continue
        left.append(saved_step(out))
        assert run_here("--resume", out) == 0
        lost_nothing(out, undisturbed)
    assert len(set(left)) > 3, left  # all over the run


# SIGHUP of a closed terminal, Ctrl-C, SIGUSR1 and SIGTERM of a scheduler; and what Slurm sends
# under srun at the time limit, where SIGTERM and SIGCONT are followed by SIGTERM 6 ms later.
@pytest.mark.parametrize("numbers", [(1,), (2,), (10,), (15,), (15, 18, 15, 10, 10, 1, 1, 15)])
def test_a_signal_ends_the_step_and_is_told_how_to_go_on(flags, undisturbed, numbers, monkeypatch):
    at(monkeypatch, 5, send(*numbers))
    code, text = go(*flags, "--out", "run")
    assert code == 128 + numbers[0] and "--resume run" in text, text
    assert saved_step("run") == steps("run")[-1] == 5
    assert run_here("--resume", "run") == 0
    lost_nothing("run", undisturbed)


def test_a_second_ctrl_c_ends_the_program_at_once(flags):
    """All that was said until then stands in the log."""
    code, text = run([*flags, "--out", "run"], signals_in_a_step, 1, 2, 2)
    assert code == -signal.SIGINT and "--resume" not in text, text
    assert saved_step("run") == 0
    assert "72 images of 3 classes" in text and "20 steps" in text


def test_sigterm_while_images_are_decoded_leaves_no_part_of_them(flags, monkeypatch):
    decode = at_call(3, randsac.decode_image, send(signal.SIGTERM))
    monkeypatch.setattr(randsac, "decode_image", decode)
    code, text = go(*flags)
    assert code >= 128 and "Traceback" not in text, text
    assert os.listdir("runs/cache") == []


def test_under_nohup_a_closed_terminal_ends_nothing(flags, undisturbed, monkeypatch, request):
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at(monkeypatch, 5, send(signal.SIGHUP))
    assert run_here(*flags, "--out", "run") == 0
    lost_nothing("run", undisturbed)


# --- started again, elsewhere, from another model, by others


def test_a_scheduler_repeats_one_command(flags, undisturbed, monkeypatch):
    out = "runs/a"
    command = ["--resume", out, *flags]
    at(monkeypatch, 5, send(signal.SIGTERM))
    assert go(*command)[0] == 128 + 15
    assert go(*command)[0] == 0
    log = rows(out)
    assert go(*command)[0] == 0
    assert rows(out) == log
    lost_nothing(out, undisturbed)

    # A name that was mistyped is not begun, nor is anything begun where something else lies.
    assert "runs/b" in refusal(randsac.read_flags, {"resume": "runs/b", "device": "cpu"})
    one_line(*go("--resume", "runs", *flags), "runs")
    assert set(os.listdir("runs")) == {"a", "cache"}
    shutil.copytree(out, "kept", ignore=lambda *_: ["checkpoint.pt"])  # as in results/
    one_line(*go("--resume", "kept", *flags), "kept is in use: choose another")

    # Flags that differ from the run's are refused by name, and nothing is touched.
    before = contents(out)
    one_line(*go(*command, "--no-skip"), "--skip")
    one_line(*go(*command, "--weight-decay", 0.1), "--weight-decay 0.05", "--init")
    assert contents(out) == before


def test_a_run_that_was_overtaken_does_not_overwrite(flags, undisturbed, monkeypatch):
    """Its name was free; then it decoded for long, and meanwhile another took it, to the end."""
    overtakes = at_call(1, randsac.load_images, lambda *_: run_here(*flags, "--out", "run"))
    monkeypatch.setattr(randsac, "load_images", overtakes)
    one_line(*go(*flags, "--out", "run", "--seed", 5), "run")
    lost_nothing("run", undisturbed)


# --- disks, directories, memory, terminals


@pytest.mark.parametrize("full, size", [("checkpoint.pt", 20_000), ("", 500)])
def test_a_full_disk_keeps_the_last_good_checkpoint(flags, undisturbed, full, size, monkeypatch):
    """That of step 4, an epoch's end: where that of step 6 has no room, or its row of the log."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    at(monkeypatch, 5, lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1])))
    try:
        code, text = go(*flags, "--out", "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    one_line(code, text, full)
    assert saved_step("run") == 4
    assert contents("run").keys() == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    assert run_here("--resume", "run") == 0
    lost_nothing("run", undisturbed)


def test_a_place_that_cannot_be_written(flags, image_folder, tmp_path, undisturbed):
    """It may hold images, as those of another user; it can hold no run."""
    place = tmp_path / "read only"
    shutil.copytree(undisturbed, place / "run")
    data = shutil.copytree(image_folder, place / "data")
    code, text = run([*flags, "--data-dir", data, "--out", "run"], read_only, place)
    assert code == 0 and "into runs/cache" in text, text
    lost_nothing("run", undisturbed)

    before = contents(place / "run")
    for given in ([*flags, "--out", place / "new"], ["--resume", place / "run"]):
        one_line(*run(given, read_only, place), given[-1].name)
    assert contents(place / "run") == before
    Path("file").write_text("")
    for out in ("file", "file/run", "/proc/run"):
        one_line(*go(*flags, "--out", out), out)
        one_line(*go(*flags, "--resume", out), out)


def test_out_of_the_cpus_memory_is_one_line(flags):
    """In a step, with 16,384 tokens."""
    given = [*flags, "--image-size", 256, "--hierarchy", 4]
    one_line(*run(given, little_memory, 700), "memory", "--batch-size")


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"),
    RuntimeError("CUDA error: out of memory"),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", [*MEMORY, RuntimeError("shapes differ"), KeyError("x")])
def test_out_of_memory_is_one_line_on_every_device_and_no_fault_is_hidden(error, monkeypatch):
    def main(arguments):
        raise error

    monkeypatch.setattr(randsac, "main", main)
    if error in MEMORY:
        one_line(*go(), "memory", "--batch-size")
    else:
        with pytest.raises(type(error)):
            go()


def test_what_a_compiler_says_is_one_line(flags, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no compiler\nhere")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=backend))
    one_line(*go(*flags, "--compile"), "no compiler here")
    torch.compiler.reset()


@pytest.mark.long
def test_memory_is_flat_over_5000_steps(flags):
    process = start([*flags, "--epochs", 1250, "--save-every", 0, "--out", "run"])
    sizes = []
    while process.is_alive():
        with contextlib.suppress(OSError, IndexError, json.JSONDecodeError):
            _, pages, *_ = Path(f"/proc/{process.pid}/statm").read_text().split()
            sizes.append((steps("run")[-1], int(pages)))
        time.sleep(0.2)
    assert process.exitcode == 0
    early = np.mean([pages for step, pages in sizes if 500 <= step < 1000])
    late = np.mean([pages for step, pages in sizes if 4500 <= step <= 5000])
    assert late < 1.05 * early


# --- in a notebook: main() in a process that lives on


def test_main_puts_everything_back(flags, undisturbed, monkeypatch, request):
    """Handlers, streams and open files are as before, also after a run that stopped or failed."""
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may run without one
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, own))

    def state():
        handlers = [signal.getsignal(number) for number in (1, 2, 10, 15)]
        return handlers, sys.stdout, sys.stderr, os.getcwd(), len(os.listdir("/proc/self/fd"))

    before = state()
    at(monkeypatch, 21, send(signal.SIGINT))
    assert run_here(*flags, "--out", "whole") == 0
    assert state() == before
    assert run_here(*flags, "--out", "stopped") == 130
    assert state() == before
    with pytest.raises(randsac.UserError, match=r"loss is nan at step \d+: .* --lr"):
        run_here(*flags, "--out", "failed", "--lr", 1e9)
    assert state() == before
    assert weights("failed").isfinite().all()  # they are from before
    for row in rows("failed"):
        assert math.isfinite(row["loss"])
    with pytest.raises(KeyboardInterrupt):  # Ctrl-C works in the next cell
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_main_in_a_thread(flags, undisturbed):
    thread = threading.Thread(target=run_here, args=[*flags, "--out", "run"])
    thread.start()
    thread.join(60)
    lost_nothing("run", undisturbed)


def test_streams_that_are_no_terminals(flags, monkeypatch):
    """A terminal that lacks a letter; a service without stdout; python -OO, without docstrings. In
    all other tests `go` has a stream that can do little, as `%run randsac.py` in a notebook."""
    monkeypatch.setattr(randsac, "__doc__", None)
    given = [*flags, "--out", "Läufe"]
    terminal = {"stream": lambda: io.TextIOWrapper(io.BytesIO(), "ascii")}
    code, text = go(*given, **terminal)
    assert code == 0 and "trained" in text, text
    one_line(*go(*given, **terminal), "L\\xe4ufe is in use")
    monkeypatch.setattr(sys, "stdout", None)
    assert run_here("--resume", "Läufe") == 0


# --- what is printed can be pasted


def pasted(text, before, after="\n"):
    """What a shell makes of the command printed between these words: the arguments of Python."""
    line = text.partition(before)[2].partition(after)[0]
    line = f'{Path(sys.executable).name}() {{ printf "%s\\n" "$@"; }}; {line}'
    return subprocess.check_output(["bash", "-c", line], text=True).splitlines()


NAME = "my run's ü * [1] $(touch oops) `b`;#&"


@pytest.mark.parametrize("name", ["~", "-x", NAME])
def test_the_line_after_a_stop_can_be_pasted(flags, name, monkeypatch):
    at(monkeypatch, 1, send(signal.SIGTERM))
    code, text = go(*flags, "--epochs", 1, f"--out=./{name}")
    assert code == 128 + 15, text
    script, *arguments = pasted(text, "To go on: ")
    assert Path(script).samefile(ROOT / "randsac.py")
    assert run_here(*arguments) == 0
    assert steps(name) == [1, 3, 4]
    assert not Path("oops").exists()


@pytest.mark.parametrize("name", [NAME, "./-x"])
def test_the_lines_of_a_run_that_is_done_can_be_pasted(name, flags, undisturbed):
    """Also that for somebody who would take its name, and that of a model alone."""
    run = Path(shutil.copytree(undisturbed, name))
    before = contents(run)
    code, text = go(*flags, f"--out={name}")
    one_line(code, text, "go on by")
    assert contents(run) == before
    code, text = go(*pasted(text, "go on by ", ", or")[1:])
    assert code == 0
    for program, *words in (pasted(text, "Next: "), pasted(text, "and: ")):
        assert go(*words, program=program)[0] in (None, 0), words
    assert len(os.listdir("figures")) > 5
    assert (run / "probes.jsonl").exists()

    shutil.copytree(ROOT / "assets/nano-cifar10", "my model")
    code, text = go("--resume", "my model")
    one_line(code, text, "only a model")
    assert pasted(text, "another run by ")[1:] == ["--init", "my model/checkpoint.pt"]


def test_a_home_directory_is_understood(image_folder, tmp_path, monkeypatch):
    """In --out=~/run no shell replaces the ~."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(image_folder, tmp_path / "home/data")
    flags = [*MICRO_FLAGS, "--data-dir=~/data", "--max-steps", 1]
    assert run_here(*flags, "--out=~/run") == 0
    assert run_here("--resume=~/run") == 0
    assert run_here(*flags, "--out=~/other", "--init=~/run/checkpoint.pt") == 0
    assert set(os.listdir()) == {"home", "runs"}
    assert set(os.listdir("home")) == {"data", "other", "run"}


# --- checkpoints


def refused(path, *words):
    said = refusal(randsac.load_model, path)
    assert str(path) in said and all(word in said for word in words), said


def test_a_checkpoint_cut_short_anywhere_is_refused_and_the_run_left_as_it_is(undisturbed):
    path = Path(shutil.copytree(undisturbed, "run"), "checkpoint.pt")
    for end in np.linspace(path.stat().st_size - 1, 0, 60).astype(int):
        os.truncate(path, end)
        refused(path)
    before = contents(path.parent)
    one_line(*go("--resume", "run"), path)
    assert contents(path.parent) == before


def test_a_flipped_bit_is_refused_or_harmless(undisturbed):
    whole = (undisturbed / "checkpoint.pt").read_bytes()
    good, good_config = randsac.load_model(undisturbed / "checkpoint.pt")
    harmless = 0
    for place in np.random.default_rng(0).integers(0, 8 * len(whole), 60):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << (place % 8)
        Path("flipped.pt").write_bytes(damaged)
        with contextlib.suppress(randsac.UserError):
            model, config = randsac.load_model("flipped.pt")
            assert config == good_config
            torch.testing.assert_close(model.state_dict(), good.state_dict(), rtol=0, atol=0)
            harmless += 1
    assert harmless < 30


class Payload:
    """Unpickled by a careless program, makes a file."""

    def __reduce__(self):
        return open, ("it ran", "w")


def test_a_file_that_would_run_code_does_not():
    torch.save({"config": {}, "model": Payload()}, "zip.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Payload()))
    for name in ("zip.pt", "pickle.pt"):
        refused(name)
        assert not Path("it ran").exists()
    pickle.loads(Path("pickle.pt").read_bytes()).close()
    assert Path("it ran").exists()  # the payload works where it is let


def test_other_files_are_refused_by_name(undisturbed):
    Path("text.pt").write_text("hello")
    refused("text.pt")
    refused("missing.pt", "No such file")
    refused(undisturbed)  # a directory
    saved = torch.load(undisturbed / "checkpoint.pt", weights_only=True)
    for change, word in [
        ({"model": {}}, "embed.weight"),
        ({"model": {**saved["model"], "extra": torch.zeros(1)}}, "extra"),
        ({"config": {**saved["config"], "dim": 32}}, "embed.weight"),
        ({"config": {**saved["config"], "flavour": 1}}, "flavour"),
        ({"config": {**saved["config"], "heads": 3}}, "--heads"),
    ]:
        torch.save(saved | change, "other.pt")
        refused("other.pt", word)
    for content in ([1, 2], {}, saved | {"config": 3}, saved | {"model": 4}):
        torch.save(content, "other.pt")
        refused("other.pt")


def test_a_checkpoint_may_be_in_half_precision_and_of_any_name():
    """Also one that no UTF-8 terminal can show."""
    half = randsac.RandSAC(micro()).half().state_dict()
    for name in ("with space.pt", "ü.pt", os.fsdecode(b"\xff.pt"), "no ending"):
        with open(name, "wb") as file:
            torch.save({"config": dataclasses.asdict(micro()), "model": half}, file)
        model, _ = randsac.load_model(name)
        assert all(weight.dtype == torch.float32 for weight in model.parameters())


POOLS = {
    "image_size": [1, 2, 4, 6, 8, 9, 12],
    "patch_size": [0, 1, 2, 3, 4],
    "segments": ["patch", "square", "blob", "scatter", "mae", "x"],
    "hierarchy": [None, None, (), (4,), (9,), (16, 4), (5, 3), (3, 5), (2,), (1,), (6, 4, 2), 7],
    "order": ["random", "raster", "up"],
    "last_rank": [0, 1, 2, 14, -1, 99, None],
    "dim": [4, 8, 12, 6, 0, -8, None, 8.0],
    "heads": [1, 2, 3, 0],
    "depth": [1, 2, 0],
    "decoder_depth": [1, 2, -1],
    "skip": [True, False, None],
    "target": [None, "pixels", "normalized", ""],
    "lr": [1e-3, 0.0, -1.0, math.nan, math.inf, "1", None],
    "batch_size": [1, 4, 0, None],
    "warmup": [0.0, 0.5, 1.5],
    "crop_scale": [0.01, 1.0, 0.0, 2.0],
    "model": ["nano", None, "mega"],
    "precision": ["auto", "float32", "bfloat16", "float16", "int8"],
}


def try_configuration(rng):
    """One random configuration: trains a step with a finite loss (True) or is refused with a
    UserError (False)."""
    settings = {"image_size": 8, "patch_size": 2, "batch_size": 4}
    for name in rng.choice(list(POOLS), rng.integers(1, 6), replace=False):
        pool = POOLS[str(name)]
        settings[str(name)] = pool[rng.integers(len(pool))]
    try:
        config = micro(**settings)
    except randsac.UserError as error:
        assert "\n" not in str(error) and "--" in str(error), settings
        return False
    model = randsac.RandSAC(config)
    images = random_batch(3, config.image_size)
    optimizer = randsac.make_optimizer(model, config)
    scaler = torch.amp.GradScaler("cpu", enabled=config.precision == "float16")
    for step in range(2):
        loss = randsac.training_step(model, optimizer, scaler, images, config, step, 2)
        assert math.isfinite(loss.item()), settings
    assert all(torch.isfinite(p).all() for p in model.parameters()), settings
    return True


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.long)])
def test_any_configuration_trains_or_is_refused(count):
    rng = np.random.default_rng(count)
    trained = sum(try_configuration(rng) for _ in range(count))
    assert 0.2 * count < trained < 0.8 * count
