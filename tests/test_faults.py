"""Whatever is done to the program, it says one clear line, loses nothing and can be started again.

Training runs in processes forked from one that has imported torch, so that killing one costs no
seconds."""

import contextlib
import ctypes
import dataclasses
import errno
import json
import math
import os
import pickle
import pwd
import re
import resource
import runpy
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
from conftest import MICRO_FLAGS, ROOT, forks, micro, random_model, run_here
from PIL import Image
from test_training import rows, same_weights

import randsac

# --- faults, each put into a process before its command begins


def at_call(number, function, act):
    """`function`, but in its call of this number `act()` comes first."""
    calls = 0

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return function(*args, **kwargs)

    return call


def kill_while_writing(number):
    save = torch.save
    calls = 0

    def half(content, file):
        nonlocal calls
        calls += 1
        save(content, file)
        if calls == number:
            file.flush()
            os.truncate(file.name, file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def kill_before_rename(number):
    os.replace = at_call(number, os.replace, lambda: os.kill(os.getpid(), signal.SIGKILL))


def no_file_beyond(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def full_at_checkpoint(number):
    """A real refusal by the system: files may not grow beyond half a checkpoint."""
    torch.save = at_call(number, torch.save, lambda: no_file_beyond(20_000))


def full_at_log(path):
    def full():
        no_file_beyond(Path(path).stat().st_size + 10)

    randsac.training_step = at_call(1, randsac.training_step, full)


def signal_in_step(number):
    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    randsac.training_step = at_call(number, randsac.training_step, stop)


def signals_in_a_step(*numbers):
    """All of them come in the first step, which itself takes a minute."""
    step = randsac.training_step

    def slow(*arguments):
        for number in numbers:
            os.kill(os.getpid(), number)
        time.sleep(60 if len(numbers) > 1 else 0)
        return step(*arguments)

    randsac.training_step = slow


def slow_steps(seconds):
    def wait():
        time.sleep(seconds)

    step = randsac.training_step
    for number in range(1, 41):
        step = at_call(number, step, wait)
    randsac.training_step = step


def decoding_waits(path):
    """For a file."""
    decode = randsac.decode_image

    def wait(*arguments):
        while not Path(path).exists():
            time.sleep(0.01)
        return decode(*arguments)

    randsac.decode_image = wait


def no_locks(number):
    """A file system without locks: Lustre without -o flock, Google's Drive in a notebook."""

    def flock(file, what):
        raise OSError(number, os.strerror(number))

    randsac.fcntl.flock = flock


def ascii_terminal():
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="ascii", errors="strict")


def little_memory(megabytes):
    """So much more than the process has now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = now + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def no_compiler(cache):
    os.environ.update(CXX="/no/such/compiler", PATH="/none", TORCHINDUCTOR_CACHE_DIR=cache)


def nameless_user():
    """A number that the system has no name for, as under `docker run --user 54321`."""

    def getpwuid(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    pwd.getpwuid = getpwuid
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        os.environ.pop(name, None)


def read_only(place):
    """For this process alone, as nothing else stops an administrator. Exit code 77: not possible
    here."""
    if os.geteuid() != 0:
        os.chmod(place, 0o555)
        return
    libc = ctypes.CDLL(None)
    private, bind, again = 0x44000, 0x1000, 0x1021
    name = str(place).encode()
    done = [
        libc.unshare(0x20000),
        libc.mount(b"none", b"/", None, private, None),
        libc.mount(name, name, None, bind, None),
        libc.mount(None, name, None, again, None),
    ]
    if any(done) or os.access(place, os.W_OK):
        os._exit(77)


# --- processes


def child(arguments, log, cwd, fault, values):
    """Runs randsac.py, or the script that `arguments` begin with, in this process, its output in
    the file `log`."""
    torch.set_num_threads(1)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ["HOME"] = f"{log}.home"
    if fault is not None:
        fault(*values)
    os.chdir(cwd)
    if arguments[0].endswith(".py"):
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    sys.argv = ["randsac.py", *arguments]
    randsac.run_command(randsac.main)


def start(arguments, log, fault=None, *values, cwd=None):
    words = [str(argument) for argument in arguments]
    given = (words, str(log), str(cwd or log.parent), fault, values)
    process = forks.Process(target=child, args=given)
    process.start()
    return process


def finish(process, log, seconds=100):
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("does not end: " + log.read_text())
    text = log.read_text().replace("\r", "\n") if log.exists() else ""
    if process.exitcode == 77:
        pytest.skip("nothing can be made read-only here")
    return process.exitcode, text


def run(arguments, log, fault=None, *values, cwd=None):
    return finish(start(arguments, log, fault, *values, cwd=cwd), log)


def one_line(code, text, *words):
    lines = [line for line in text.strip().splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in text and len(lines) == 1, (code, text)
    assert text.strip().splitlines()[-1] == lines[0], text
    assert all(word in lines[0] for word in words), lines[0]


def wait_for(path, process):
    while not path.exists():
        assert process.is_alive()
        time.sleep(0.002)


def common_flags(image_folder):
    """40 steps."""
    return [*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 10, "--save-every", 3]


@pytest.fixture
def flags(image_folder):
    return common_flags(image_folder)


@pytest.fixture(scope="module")
def undisturbed(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    code, text = run([*common_flags(image_folder), "--out", out], out.parent / "log")
    assert code == 0, text
    return out


# --- killed


def kill_and_resume(flags, folder, undisturbed, kills, rng):
    """`kills` runs, each killed by kill -9 at a random moment of its life and resumed to its end
    -> the steps of the checkpoints that the kills left."""
    log = folder / "log"

    def begin(out):
        process = start([*flags, "--out", out], log)
        wait_for(out / "checkpoint.pt", process)
        return process, time.perf_counter()

    process, born = begin(folder / "whole")
    assert finish(process, log)[0] == 0
    lifetime = time.perf_counter() - born
    left = []
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
        code, text = run(["--resume", out], log)
        assert code == 0 and same_weights(out, undisturbed), text
        assert [r["step"] for r in rows(out)] == [r["step"] for r in rows(undisturbed)]
        assert {p.name for p in out.iterdir()} == {p.name for p in undisturbed.iterdir()}
    return left


def test_kill_9_at_random_moments(flags, tmp_path, undisturbed):
    kill_and_resume(flags, tmp_path, undisturbed, 2, np.random.default_rng(0))


@pytest.mark.long
def test_kill_9_twenty_times(flags, tmp_path, undisturbed):
    left = kill_and_resume(flags, tmp_path, undisturbed, 20, np.random.default_rng(1))
    print("killed with checkpoints of steps", sorted(left))
    assert len(set(left)) > 5  # all over the run


@pytest.mark.parametrize(
    "fault, at",
    [
        (kill_while_writing, 1),
        (kill_while_writing, 3),
        (kill_before_rename, 1),  # config.json
        (kill_before_rename, 2),  # the first checkpoint
        (kill_before_rename, 5),
    ],
)
def test_killed_inside_a_write(flags, tmp_path, undisturbed, fault, at):
    out = tmp_path / "run"
    log = tmp_path / "log"
    assert run([*flags, "--out", out], log, fault, at)[0] == -signal.SIGKILL
    # Before the first checkpoint nothing was trained, and the name is free.
    again = [*flags, "--out", out]
    if (out / "checkpoint.pt").exists():
        randsac.load_checkpoint(out / "checkpoint.pt")
        again = ["--resume", out]
    code, text = run(again, log)
    assert code == 0 and same_weights(out, undisturbed), text
    assert {p.name for p in out.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt"}


# --- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(flags, tmp_path, undisturbed, number):
    out = tmp_path / "run"
    log = tmp_path / "log"
    process = start([*flags, "--out", out], log, slow_steps, 0.05)
    while not (log.exists() and "0/640" in log.read_text()):
        assert process.is_alive(), log.read_text()
        time.sleep(0.005)
    time.sleep(0.2)
    os.kill(process.pid, number)
    code, text = finish(process, log)
    assert code == 128 + number and "Traceback" not in text, text
    assert "stopped. To go on: " in text
    step = randsac.load_checkpoint(out / "checkpoint.pt")[0]["step"]
    assert 0 < step == rows(out)[-1]["step"] < 40
    assert run(["--resume", out], log)[0] == 0
    assert same_weights(out, undisturbed)


@pytest.mark.parametrize(
    "first, second",
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
    ],
)
def test_a_second_signal_ends_the_program_at_once(flags, tmp_path, first, second):
    out = tmp_path / "run"
    log = tmp_path / "log"
    begin = time.perf_counter()
    code, text = run([*flags, "--out", out], log, signals_in_a_step, first, second)
    assert code == -second, text
    assert time.perf_counter() - begin < 50  # the step would have taken a minute
    assert "stopped" not in text
    assert randsac.load_checkpoint(out / "checkpoint.pt")[0]["step"] == 0


# --- one owner


def test_a_live_run_cannot_be_resumed(flags, tmp_path, undisturbed):
    out = tmp_path / "run"
    log = tmp_path / "log"
    process = start([*flags, "--out", out], log, slow_steps, 0.03)
    wait_for(out / "checkpoint.pt", process)
    for i in range(2):
        code, text = run(["--resume", out], tmp_path / f"other{i}")
        one_line(code, text, str(out), "another process", "wait for it")
        assert "--out" not in text  # --resume does not take it
    assert process.is_alive()
    assert finish(process, log)[0] == 0
    assert same_weights(out, undisturbed)
    assert [r["step"] for r in rows(out)] == [r["step"] for r in rows(undisturbed)]
    assert run(["--resume", out], log)[0] == 0


def test_of_two_runs_with_one_name_one_wins(flags, tmp_path, undisturbed):
    for i in range(2):
        out = tmp_path / f"run{i}"
        logs = [tmp_path / f"a{i}", tmp_path / f"b{i}"]
        both = [start([*flags, "--out", out], log) for log in logs]
        ends = [finish(process, log) for process, log in zip(both, logs)]
        ends.sort(key=lambda end: end[0])
        assert ends[0][0] == 0
        one_line(*ends[1], "run")
        assert same_weights(out, undisturbed)


def test_a_start_that_was_overtaken_does_not_overwrite(flags, tmp_path, image_folder, undisturbed):
    """It was told that the name is free, then decoded for long, and meanwhile another run of this
    name has come to its end."""
    out = tmp_path / "run"
    data = shutil.copytree(image_folder, tmp_path / "data")
    slow = [*MICRO_FLAGS, "--data-dir", data, "--epochs", 1, "--seed", 5, "--out", out]
    process = start(slow, tmp_path / "slow", decoding_waits, str(tmp_path / "go"))
    wait_for(tmp_path / "data.cache", process)
    assert run([*flags, "--out", out], tmp_path / "fast")[0] == 0
    log = rows(out)
    assert process.is_alive()
    (tmp_path / "go").touch()
    one_line(*finish(process, tmp_path / "slow"), "holds a run")
    assert same_weights(out, undisturbed) and rows(out) == log


def test_two_runs_without_a_name_at_once(image_folder, tmp_path, undisturbed):
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--max-steps", 1]
    logs = [tmp_path / "a", tmp_path / "b"]
    both = [start(flags, log) for log in logs]
    assert [finish(process, log)[0] for process, log in zip(both, logs)] == [0, 0]
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(image_folder, tmp_path, number):
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 1, "--out", "run"]
    code, text = run(flags, tmp_path / "log", no_locks, number)
    assert code == 0, text


# --- disks, directories, memory, terminals


def test_full_disk_keeps_the_last_good_checkpoint(flags, tmp_path, undisturbed):
    out = tmp_path / "run"
    log = tmp_path / "log"
    code, text = run([*flags, "--out", out], log, full_at_checkpoint, 4)
    one_line(code, text, "checkpoint.pt", "make room")
    # Saved were those of steps 0, 3 and 4, and not that of 6.
    assert randsac.load_checkpoint(out / "checkpoint.pt")[0]["step"] == 4
    assert {p.name for p in out.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    assert run(["--resume", out], log)[0] == 0
    assert same_weights(out, undisturbed)


def test_a_disk_that_is_full_when_the_log_is_written(flags, tmp_path, undisturbed):
    out = tmp_path / "run"
    log = tmp_path / "log"
    assert run([*flags, "--out", out], log, signal_in_step, 31)[0] == 128 + 15
    log.unlink()
    one_line(*run(["--resume", out], log, full_at_log, str(out / "metrics.jsonl")))
    assert randsac.load_checkpoint(out / "checkpoint.pt")[0]["step"] == 31
    assert run(["--resume", out], log)[0] == 0
    assert same_weights(out, undisturbed)
    steps = {row["step"] for row in rows(undisturbed)}
    assert [row["step"] for row in rows(out)] == sorted({*steps, 31})


def test_a_left_over_part_file_is_no_hindrance(undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    (out / "checkpoint.pt.part").write_bytes(b"half a checkpoint")
    assert run(["--resume", out], tmp_path / "log")[0] == 0
    assert {p.name for p in out.iterdir()} == {p.name for p in undisturbed.iterdir()}
    assert same_weights(out, undisturbed)


def test_a_place_that_cannot_be_written(flags, tmp_path):
    (tmp_path / "file").write_text("")
    for i, out in enumerate([tmp_path / "file", tmp_path / "file" / "run", "/proc/run"]):
        one_line(*run([*flags, "--out", out], tmp_path / f"log{i}"), Path(out).name)
    # A run without a name goes to runs/ where one stands.
    code, text = run(flags, tmp_path / "log", cwd="/proc")
    one_line(code, text, "runs")


def test_a_directory_that_is_read_only(flags, tmp_path):
    place = tmp_path / "read only"
    (place / "run").mkdir(parents=True)
    log = tmp_path / "log"
    for out in (place / "new", place / "run", place / "run" / "deeper"):
        code, text = run([*flags, "--out", out], log, read_only, place)
        one_line(code, text, str(out))
        log.unlink()
    code, text = run(flags, log, read_only, place, cwd=place)
    one_line(code, text, "runs")


def test_images_in_a_read_only_place_are_decoded_elsewhere(image_folder, tmp_path):
    """Two folders of one name, whose files agree in name, size and time: each is read as itself."""
    disk = tmp_path / "disk"
    for i, colour in enumerate(["red", "blue"]):
        path = disk / str(i) / "data" / "train" / "all" / "1.bmp"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(path)
        os.utime(path, (1, 1))
    before = sorted(disk.rglob("*"))
    flags = [*MICRO_FLAGS, "--batch-size", 1, "--epochs", 1]
    losses = []
    (tmp_path / "work").mkdir()
    for name, data in [("a", "0"), ("b", "1"), ("a again", "0"), ("b again", "1")]:
        given = [*flags, "--data-dir", disk / data / "data", "--out", name]
        code, text = run(given, tmp_path / name, read_only, disk, cwd=tmp_path / "work")
        assert code == 0, text
        assert "read-only" in text and "runs/cache" in text
        assert ("decoding" in text) == ("again" not in name)
        losses.append(rows(tmp_path / "work" / name)[-1]["loss"])
    assert losses[0] == losses[2] != losses[1] == losses[3]
    assert sorted(disk.rglob("*")) == before


def test_a_finished_run_in_a_read_only_place_is_refused(undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    before = {path: path.read_bytes() for path in out.iterdir()}
    code, text = run(["--resume", out], tmp_path / "log", read_only, out)
    one_line(code, text, str(out))
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize(
    "given, megabytes",
    [
        ("--dim 80000", 500),  # the model
        ("--dataset shapes --image-size 1024 --patch-size 256 --hierarchy 4", 500),  # the images
        ("--image-size 256 --hierarchy 4", 700),  # a step, with 16,384 tokens
    ],
)
def test_out_of_the_cpus_memory_is_one_line(image_folder, tmp_path, given, megabytes):
    flags = [*MICRO_FLAGS, *given.split(), "--out", "run"]
    if "shapes" not in given:
        flags += ["--data-dir", image_folder]
    code, text = run(flags, tmp_path / "log", little_memory, megabytes)
    one_line(code, text, "memory", "--batch-size")
    if "256 --h" not in given:
        assert not (tmp_path / "run").exists()  # the name is not used up


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"),
        RuntimeError("CUDA error: out of memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_every_devices_word_for_out_of_memory_is_one_line(error, capsys, monkeypatch):
    def main(arguments):
        raise error

    monkeypatch.setattr(sys, "argv", ["randsac.py"])
    with pytest.raises(SystemExit) as ended:
        randsac.run_command(main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert "memory" in said and "--batch-size" in said


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), KeyError("x")])
def test_an_error_of_the_program_itself_is_not_hidden(error, monkeypatch):
    def main(arguments):
        raise error

    monkeypatch.setattr(sys, "argv", ["randsac.py"])
    with pytest.raises(type(error)):
        randsac.run_command(main)


def test_what_a_compiler_says_is_one_line(image_folder, tmp_path, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no compiler\nhere")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=backend))
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--compile"]
    with pytest.raises(randsac.UserError, match="--compile.* leave it out: .*no compiler here"):
        run_here(*flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()  # the name is not used up
    torch.compiler.reset()


@pytest.mark.long
def test_compile_without_a_compiler_is_one_line(image_folder, tmp_path):
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--out", "run", "--compile"]
    code, text = run(flags, tmp_path / "log", no_compiler, str(tmp_path / "inductor"))
    one_line(code, text, "--compile", "leave it out", "ompiler")
    assert not (tmp_path / "run").exists()  # the name is not used up


def test_a_wrong_flag_is_one_line_and_leaves_nothing(tmp_path):
    log = tmp_path / "log"
    for given in (["--patch-size", 5], ["--lr", "fast"], ["--no-such-flag"]):
        one_line(*run(given, log), given[0])
        log.unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_that_lacks_a_letter(image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "Böden")
    flags = [*MICRO_FLAGS, "--data-dir", data, "--max-steps", 1, "--out", tmp_path / "Läufe"]
    code, text = run(flags, tmp_path / "log", ascii_terminal)
    assert code == 0 and "B\\xf6den" in text and "L\\xe4ufe" in text, text
    one_line(*run(flags, tmp_path / "log", ascii_terminal), "L\\xe4ufe")


def test_a_log_file_can_be_read_while_the_run_goes_on(flags, tmp_path):
    log = tmp_path / "log"
    process = start([*flags, "--out", tmp_path / "run"], log, slow_steps, 0.05)
    wait_for(tmp_path / "run" / "checkpoint.pt", process)
    time.sleep(0.3)
    assert process.is_alive()
    text = log.read_text()
    process.kill()
    process.join()
    assert "72 images of 3 classes" in text and "run: 40 steps" in text


def test_a_loss_that_is_not_finite_stops_and_names_the_step(flags, tmp_path):
    out = tmp_path / "run"
    code, text = run([*flags, "--out", out, "--lr", 1e9], tmp_path / "log")
    one_line(code, text, "loss is nan at step", "--lr", "another run")
    saved, _, _ = randsac.load_checkpoint(out / "checkpoint.pt")
    assert all(torch.isfinite(p).all() for p in saved["model"].values())
    assert all(math.isfinite(row["loss"]) for row in rows(out))


@pytest.mark.long
def test_memory_is_flat_over_5000_steps(image_folder, tmp_path):
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 1250, "--out", tmp_path / "run"]
    process = start(flags, tmp_path / "log")
    sizes = []
    while process.is_alive():
        try:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            sizes.append((rows(tmp_path / "run")[-1]["step"], pages))
        except (OSError, IndexError, json.JSONDecodeError):
            pass
        time.sleep(0.2)
    assert process.exitcode == 0
    early = np.mean([pages for step, pages in sizes if 500 <= step < 1000])
    late = np.mean([pages for step, pages in sizes if 4500 <= step <= 5000])
    print(f"pages at steps 500-1000: {early:.0f}, at 4500-5000: {late:.0f}")
    assert late < 1.05 * early


def test_a_user_without_a_name(image_folder, tmp_path):
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 1, "--out", "run"]
    code, text = run(flags, tmp_path / "log", nameless_user)
    assert code == 0, text
    one_line(*run(["--resume=~/run"], tmp_path / "home", nameless_user), "~/run")
    one_line(*run(["--resume=~nobody-of-this-name/run"], tmp_path / "other"), "~nobody")


# --- in a notebook: main() in a process that lives on

HANDLED = (signal.SIGINT, signal.SIGTERM)


def test_main_puts_everything_back(image_folder, tmp_path, monkeypatch, request):
    """Twice in one process, once stopped, once failed: handlers, files and streams are as before."""
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 1]
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may run without one
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, own))
    before = [signal.getsignal(number) for number in HANDLED]
    streams = (sys.stdout, sys.stderr)
    directory = os.getcwd()
    for name in ("first", "second"):
        assert run_here(*flags, "--out", tmp_path / name) == 0
        assert [signal.getsignal(number) for number in HANDLED] == before

    step = randsac.training_step
    with monkeypatch.context() as patched:
        patched.setattr(randsac, "training_step", at_call(2, step, lambda: os.kill(os.getpid(), 2)))
        assert run_here(*flags, "--out", tmp_path / "stopped") == 130
    assert [signal.getsignal(number) for number in HANDLED] == before
    with pytest.raises(randsac.UserError):
        run_here(*flags, "--out", tmp_path / "failed", "--lr", 1e9, "--epochs", 9)
    assert [signal.getsignal(number) for number in HANDLED] == before

    # Ctrl-C works in the next cell.
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            path = os.readlink(f"/proc/self/fd/{number}")
            assert not path.endswith((".jsonl", ".pt", "lock", ".part")), path
    assert (sys.stdout, sys.stderr) == streams and os.getcwd() == directory
    assert same_weights(tmp_path / "first", tmp_path / "second")


def test_main_in_a_thread(image_folder, tmp_path):
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 1]
    codes = []

    def work():
        codes.append(run_here(*flags, "--out", tmp_path / "thread"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert codes == [0]
    run_here(*flags, "--out", tmp_path / "main")
    assert same_weights(tmp_path / "thread", tmp_path / "main")


class Notebook:
    """What stands for stdout and stderr in a notebook: it takes text and can do little else."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return False


@pytest.mark.parametrize("stream", [Notebook(), None])
def test_streams_that_are_no_terminals(image_folder, tmp_path, monkeypatch, stream):
    """`%run randsac.py` in a notebook; a service without stdout."""
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--max-steps", 1, "--out", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["randsac.py", *map(str, flags)])
    monkeypatch.setattr(sys, "stdout", stream)
    if stream is not None:
        monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit) as ended:
        randsac.run_command(randsac.main)
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        randsac.run_command(randsac.main)
    assert ended.value.code == 2
    if stream is not None:
        assert "trained. Next: " in stream.text and "error: " in stream.text


def test_a_program_without_docstrings_trains(image_folder, tmp_path, monkeypatch):
    """`python -OO` leaves them out."""
    monkeypatch.setattr(randsac, "__doc__", None)
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--max-steps", 1]
    assert run_here(*flags, "--out", tmp_path / "run") == 0


# --- what is printed can be pasted


def pasted(line, folder):
    """What a shell makes of a printed line: the words after the interpreter's name."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    python = tools / Path(sys.executable).name
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    env = {"PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(line, shell=True, check=True, capture_output=True, text=True, env=env)
    return done.stdout.splitlines()


def printed_after(words, text):
    """The rest of the one line that has these words."""
    (line,) = [line.partition(words)[2] for line in text.splitlines() if words in line]
    return line


ODD = ["my run's ü", "~", "-x", "a$(touch oops) `b`;#&", "star * [1]"]


@pytest.mark.parametrize("name", ODD)
def test_the_line_after_a_stop_can_be_pasted(image_folder, tmp_path, name):
    log = tmp_path / "log"
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 1, f"--out=./{name}"]
    code, text = run(flags, log, signals_in_a_step, signal.SIGTERM)
    assert code == 128 + 15, text
    log.unlink()
    words = pasted(printed_after("To go on: ", text), tmp_path)
    code, text = run(words, log)
    assert code == 0, (words, text)
    assert [row["step"] for row in rows(tmp_path / name)] == [1, 4]
    assert not (tmp_path / "oops").exists() and not (tmp_path / "log.home").exists()


def test_the_line_after_a_stop_with_the_interpreter_itself(flags, tmp_path, undisturbed):
    log = tmp_path / "log"
    _, text = run([*flags, "--out", "my run"], log, signals_in_a_step, signal.SIGINT)
    line = printed_after("To go on: ", text)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    done = subprocess.run(line, shell=True, check=False, cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert same_weights(tmp_path / "my run", undisturbed)


def test_a_home_directory_is_understood(image_folder, tmp_path, monkeypatch):
    """In --out=~/run no shell replaces the ~."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(image_folder, tmp_path / "home/data")
    flags = [*MICRO_FLAGS, "--data-dir=~/data", "--max-steps", 1]
    assert run_here(*flags, "--out=~/run") == 0
    assert run_here("--resume=~/run") == 0
    assert run_here(*flags, "--out=~/other", "--init=~/run/checkpoint.pt") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home"]
    assert {"data", "data.cache", "other", "run"} == {p.name for p in (tmp_path / "home").iterdir()}


@pytest.mark.parametrize("labels", [True, False])
def test_the_lines_after_a_training_can_be_pasted(image_folder, tmp_path, labels):
    """Probing needs classes and test images: where there are none, it is not advised."""
    data = tmp_path / "my images"
    shutil.copytree(image_folder, data)
    if not labels:
        shutil.rmtree(data / "test")
        for name in ("bee", "cat"):
            shutil.rmtree(data / "train" / name)
    log = tmp_path / "log"
    flags = [*MICRO_FLAGS, "--data-dir", data, "--epochs", 2, "--out", "my run"]
    code, text = run(flags, log)
    assert code == 0 and ("probe.py" in text) == labels
    lines = [printed_after("trained. Next: ", text)]
    if labels:
        lines.append(printed_after("and: ", text))
    for line in lines:
        log.unlink()
        code, text = run(pasted(line, tmp_path), log)
        assert code == 0, (line, text)
    assert len(list((tmp_path / "figures").iterdir())) > 5
    assert (tmp_path / "my run/probes.jsonl").exists() == labels


def test_the_line_for_a_name_that_is_taken_can_be_pasted(flags, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "my run")
    log = tmp_path / "log"
    code, text = run([*flags, "--out", "my run"], log)
    one_line(code, text, "holds a run", "another --out")
    log.unlink()
    line = re.search(r"go on with it by (.*), or choose another", text)[1]
    assert run(pasted(line, tmp_path), log)[0] == 0


def test_the_line_for_a_model_alone_can_be_pasted(undisturbed, tmp_path):
    """The model that comes with the project, in a folder whose name has a space. --init wants the
    sizes of the model, and names them all."""
    shutil.copytree(ROOT / "assets/nano-cifar10", tmp_path / "my model")
    log = tmp_path / "log"
    code, text = run(["--resume", "my model"], log)
    one_line(code, text, "only a model")
    log.unlink()
    words = pasted(re.search(r"begin a run from it by (.*)", text)[1], tmp_path)
    shorter = ["--max-steps", "1", "--image-size", "16", "--hierarchy", "4"]
    code, text = run([*words, *shorter], log)
    assert code == 0, text


# --- checkpoints


@pytest.fixture(scope="module")
def checkpoint(undisturbed):
    return (undisturbed / "checkpoint.pt").read_bytes()


def refused(path, *words):
    with pytest.raises(randsac.UserError) as error:
        randsac.load_model(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message, message
    assert all(word in message for word in words), message


def test_a_checkpoint_cut_short_anywhere_is_refused(checkpoint, tmp_path):
    path = tmp_path / "cut.pt"
    for end in np.linspace(0, len(checkpoint) - 1, 100).astype(int):
        path.write_bytes(checkpoint[:end])
        refused(path)


def test_a_flipped_bit_is_refused_or_harmless(checkpoint, tmp_path):
    path = tmp_path / "flipped.pt"
    path.write_bytes(checkpoint)
    good, good_config = randsac.load_model(path)
    good = good.state_dict()
    refusals = 0
    for place in np.random.default_rng(0).integers(0, 8 * len(checkpoint), 100):
        damaged = bytearray(checkpoint)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            model, config = randsac.load_model(path)
        except randsac.UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refusals += 1
            continue
        assert config == good_config
        assert all(torch.equal(value, good[name]) for name, value in model.state_dict().items())
    assert refusals > 50


class Payload:
    """Unpickled by a careless program, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_file_that_would_run_code_does_not(tmp_path):
    trace = tmp_path / "it ran"
    torch.save({"config": {}, "model": Payload(str(trace))}, tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Payload(str(trace))))
    for name in ("zip.pt", "pickle.pt"):
        refused(tmp_path / name)
        assert not trace.exists()
    pickle.loads((tmp_path / "pickle.pt").read_bytes()).close()
    assert trace.exists()  # the payload works where it is let


def test_other_files_are_refused_by_name(undisturbed, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    refused(tmp_path / "text.pt")
    refused(tmp_path / "missing.pt", "No such file")
    refused(tmp_path)  # a directory
    saved = torch.load(undisturbed / "checkpoint.pt", weights_only=True)
    model = saved["model"]
    config = saved["config"]
    changes = {
        "other.pt": ({"model": {}}, "embed.weight"),
        "more.pt": ({"model": {**model, "extra": torch.zeros(1)}}, "extra"),
        "larger.pt": ({"config": {**config, "dim": 32}}, "embed.weight"),
        "newer.pt": ({"config": {**config, "flavour": 1}}, "flavour"),
        "odd.pt": ({"config": {**config, "heads": 3}}, "--heads"),
    }
    for name, (change, word) in changes.items():
        torch.save({**saved, **change}, tmp_path / name)
        refused(tmp_path / name, word)
    contents = [[1, 2], {}, {"config": 3, "model": 4}, {"config": {}}, {"model": {}}]
    for i, content in enumerate(contents):
        torch.save(content, tmp_path / f"{i}.pt")
        refused(tmp_path / f"{i}.pt")


def test_a_damaged_checkpoint_is_refused_and_nothing_is_touched(undisturbed, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    os.truncate(out / "checkpoint.pt", (out / "checkpoint.pt").stat().st_size - 9)
    before = {file: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(randsac.UserError, match=re.escape(str(out / "checkpoint.pt"))):
        run_here("--resume", out)
    assert before == {file: file.read_bytes() for file in out.iterdir()}


def test_what_is_given_to_resume_is_the_directory(undisturbed):
    with pytest.raises(randsac.UserError, match="directory of a run"):
        run_here("--resume", undisturbed / "checkpoint.pt")


def test_half_precision_checkpoint_loads_as_float32(tmp_path):
    model = random_model(micro())
    half = {name: value.half() for name, value in model.state_dict().items()}
    content = {"config": dataclasses.asdict(micro()), "model": half}
    torch.save(content, tmp_path / "half.pt")
    loaded, _ = randsac.load_model(tmp_path / "half.pt")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())


def test_another_files_name_or_place_changes_nothing(checkpoint, tmp_path, monkeypatch):
    """Also one that no UTF-8 terminal can show."""
    monkeypatch.chdir(tmp_path)
    for name in ("with space.pt", "ü.pt", os.fsdecode(b"\xff.pt"), "no ending"):
        Path(name).write_bytes(checkpoint)
        assert randsac.load_model(name)[1].dim == 16
        assert randsac.load_model(tmp_path / name)[1].dim == 16


# --- any configuration at all

POOLS = {
    "image_size": [1, 2, 4, 6, 8, 9, 12],
    "patch_size": [0, 1, 2, 3, 4],
    "segments": ["patch", "square", "blob", "scatter", "mae", "x"],
    "hierarchy": [None, None, (), (4,), (9,), (16, 4), (5, 3), (3, 5), (2,), (1,), (100,)]
    + [("a",), 7, (6, 4, 2), (2.0,)],
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
    "seed": [0, 2**29, -1],
    "weight_decay": [0.0, -0.1, 1],
    "epochs": [1, None, 0],
    "model": ["nano", None, "mega"],
    "dataset": ["shapes", "folder", "what"],
    "data_dir": [None, "", "/x"],
    "precision": ["auto", "float32", "bfloat16", "float16", "int8"],
}
LIKELY = {"image_size": 8, "patch_size": 2, "dim": 8, "heads": 2, "depth": 1}
LIKELY |= {"decoder_depth": 1, "batch_size": 4}


def try_configuration(rng):
    """One random configuration: trains a step with a finite loss (True) or is refused with a
    UserError (False)."""
    settings = dict(LIKELY)
    for name in rng.choice(list(POOLS), rng.integers(1, 6), replace=False):
        pool = POOLS[str(name)]
        settings[str(name)] = pool[rng.integers(len(pool))]
    try:
        config = randsac.Config(**settings)
    except randsac.UserError as error:
        assert "\n" not in str(error) and "--" in str(error), settings
        return False
    model = randsac.RandSAC(config)
    size = config.image_size
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
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
