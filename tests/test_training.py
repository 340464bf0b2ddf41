"""The command randsac.py: flags, a step, runs, resuming, several processes."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MICRO_FLAGS, ROOT, forks, micro, refusal, run_here

import randsac


def names(flag, text):
    """Whether a text names this flag, and not only one that it begins."""
    return re.search(rf"(?<![\w-]){flag}(?![\w-])", text) is not None


# --- flags


def test_defaults_are_filled_by_dataset_model_and_strategy():
    config = randsac.Config()
    assert (config.model, config.dim, config.depth, config.heads) == ("nano", 128, 6, 4)
    assert (config.hierarchy, config.target, config.data_dir) == ((16, 4), "normalized", "")
    cifar = randsac.Config(dataset="cifar10")
    assert (cifar.model, cifar.data_dir, cifar.batch_size) == ("small", "data", 512)
    assert randsac.Config(dataset="cifar10", model="nano").batch_size == 32
    assert randsac.Config(segments="blob").hierarchy == (11, 5)
    assert randsac.Config(segments="mae").hierarchy == ()
    assert randsac.Config(model="tiny", depth=3).depth == 3
    assert randsac.Config(patch_size=1).target == "pixels"


# Each of these is refused by the name of its last flag. None may be shortened; '' is what
# "$CHECKPOINT" can be.
REFUSED = """
--lr fast; --lr 0; --lr -1; --lr nan; --lr inf; --depth 1.5; --depth 0; --seed -1; --epoch 3
--dim 130; --dim 0; --heads 3; --warmup 1; --crop-scale 0; --crop-scale 1.5; --batch-size 1e9
--patch-size 5; --patch-size 32; --order up; --segments stripes; --data-dir x; --device tpu
--hierarchy; --hierarchy 8; --hierarchy 9; --hierarchy 4 16; --hierarchy 16 16; --hierarchy 1
--segments patch --hierarchy 16; --segments mae --hierarchy 4; --segments blob --hierarchy 65
--segments blob --hierarchy 5 11; --segments mae --order raster; --segments mae --last-rank 1
--last-rank 15; --last-rank -1; --segments patch --last-rank 63; --hierarchy 4 --last-rank 3
--out ''; --init ''; --data-dir ''; --resume ''; --resume; --resume=~no-one/run --lr 0
"""


@pytest.mark.parametrize("given", re.split("[;\n] *", REFUSED.strip()))
def test_what_is_wrong_is_refused_by_its_flag_and_leaves_nothing(given, tmp_path):
    words = shlex.split(given)
    flag = [word for word in words if word.startswith("--")][-1]
    said = refusal(run_here, "--max-steps", 1, *words)
    assert names(flag, said) or (words[-1] == "" and "empty" in said)
    assert list(tmp_path.iterdir()) == []


def test_flags_given_take_the_place_of_a_trained_models():
    trained = micro(dataset="folder", data_dir="x", hierarchy=(4,), order="raster", last_rank=2)
    blob = randsac.with_flags(trained, {"segments": "blob"})
    assert (blob.hierarchy, blob.order, blob.last_rank) == ((11, 5), "random", 0)
    assert randsac.with_flags(trained, {"dataset": "cifar10"}).data_dir == "data"
    others = {"dim": 32, "depth": 3, "heads": 4, "decoder_depth": 1, "patch_size": 2, "skip": False}
    for name, value in others.items():
        flag = randsac.flag_name(name)
        assert names(flag, refusal(randsac.with_flags, trained, {name: value}))


@pytest.mark.parametrize(
    "bfloat16, capability, choice",
    [(True, (8, 0), "bfloat16"), (False, (7, 5), "float16"), (False, (6, 1), "float32")],
)
def test_auto_takes_the_precision_that_a_device_has(bfloat16, capability, choice, monkeypatch):
    """An A100, the T4 of a free notebook, and a card older than that. Any CPU keeps float32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert randsac.pick_precision("auto", torch.device("cuda")) == choice
    assert randsac.pick_precision("auto", torch.device("cpu")) == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert names("--device", refusal(randsac.pick_device, "cuda"))


# --- a step


def random_batch(count, size=16):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def one_step(model, batch, step=0, optimizer=None, process=0, world=1):
    if optimizer is None:
        optimizer = randsac.make_optimizer(model, model.config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    rest = (model.config, step, 10, process, world)
    return randsac.training_step(model, optimizer, scaler, batch, *rest)


class Recorder(torch.nn.Module):
    """Keeps what a training step shows the model. Its loss is `slope` times the sum of a weight,
    so the gradient of that weight is `slope` everywhere."""

    def __init__(self, config, slope=1.0):
        super().__init__()
        self.config = config
        self.slope = slope
        self.weight = torch.nn.Parameter(torch.ones(2, 2))

    def forward(self, images, ranks, trim):
        self.shown = (images, ranks)
        return self.slope * self.weight.sum()


@pytest.mark.parametrize("segments", ["patch", "square", "blob", "scatter", "mae"])
def test_crops_and_orders_are_fresh_and_drawn_for_all_processes_at_once(segments):
    batch = random_batch(16)

    def shown(step, seed=0, process=0, world=1):
        recorder = Recorder(micro(segments=segments, seed=seed))
        one_step(recorder, batch[process::world], step, process=process, world=world)
        return recorder.shown

    # The same step is always the same, so that a run can be resumed, and each process takes its
    # share of it.
    first = shown(0)
    for world in (1, 2, 4):
        for process in range(world):
            shares = shown(0, process=process, world=world)
            for whole, share in zip(first, shares):
                assert torch.equal(whole[process::world], share)

    # Other steps and seeds are others.
    for one, two in itertools.pairwise([shown(0, seed=1), first, shown(1), shown(2)]):
        assert not any(torch.equal(a, b) for a, b in zip(one, two))


def test_a_step_shows_what_is_drawn_for_it():
    """Crops of images whose channels tell x, y, x: what is seen where is linear, as between pixels
    it is interpolated."""
    config = micro(segments="blob", crop_scale=0.1, image_size=8, patch_size=2, seed=3)
    ramp = torch.arange(0, 256, 16, dtype=torch.uint8).expand(9, 1, 16, 16)
    recorder = Recorder(config)
    one_step(recorder, torch.cat([ramp, ramp.mT, ramp], 1), 5)
    cropped, ranks = recorder.shown
    generator = randsac.seeded("cpu", 3, 1, 5)
    crops = randsac.random_crops(9, 0.1, generator=generator)
    assert torch.equal(ranks, randsac.sample_ranks(config, 9, generator=generator))

    side = torch.linspace(-1, 1, 8)
    y, x = torch.meshgrid(side, side, indexing="ij")
    place = torch.stack([x, y, torch.ones(8, 8)])
    seen = torch.einsum("bck,kij->bcij", crops[:, [0, 1, 0]], place)  # -1: pixel 0, 1: pixel 15
    torch.testing.assert_close(cropped, (seen + 1) * 120 / 127.5 - 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("slope, moved", [(1000.0, 1.0), (0.5, 1.0), (0.01, 0.02)])
def test_a_gradient_longer_than_one_is_clipped(slope, moved):
    """Plain descent moves the weight by rate times the gradient, whose norm is 2 * slope."""
    recorder = Recorder(micro(lr=0.5, batch_size=256, warmup=0.0), slope)
    one_step(recorder, random_batch(4), optimizer=torch.optim.SGD(recorder.parameters()))
    assert (recorder.weight - 1).norm().item() == pytest.approx(0.5 * moved, rel=1e-4)


def test_the_learning_rate_rises_then_falls_and_steps_follow_it():
    config = micro(lr=1e-3, batch_size=512, warmup=0.1)
    rates = [randsac.learning_rate(t, 100, config) for t in range(100)]
    assert max(rates) == rates[10] == pytest.approx(2e-3)  # per 256 images, 512 in the batch
    assert rates[:11] == sorted(rates[:11])
    assert rates[:9:-1] == sorted(rates[10:])
    assert 0 < rates[0] < 2.5e-4 and 0 < rates[-1] < 1e-5

    model = randsac.RandSAC(config)
    optimizer = randsac.make_optimizer(model, config)
    for step in (0, 3, 9):
        one_step(model, random_batch(4), step, optimizer)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert rates == {randsac.learning_rate(step, 10, config)}


def test_weight_decay_is_on_matrices_only():
    model = randsac.RandSAC(micro())
    decayed, free = randsac.make_optimizer(model, model.config).param_groups
    assert decayed["weight_decay"] == model.config.weight_decay > 0 == free["weight_decay"]
    assert len(decayed["params"]) + len(free["params"]) == len([*model.parameters()])
    assert all(p.ndim == 2 and p is not model.skip for p in decayed["params"])
    assert all(p.ndim < 2 or p is model.skip for p in free["params"])


def test_a_gradient_that_is_not_finite_shows_in_the_loss_of_its_step():
    model = randsac.RandSAC(micro())
    assert one_step(model, random_batch(4)).isfinite()
    model.embed.bias.register_hook(lambda gradient: gradient / 0)
    assert not one_step(model, random_batch(4), 1).isfinite()


# --- a run, and going on with it by --resume


def flags_of(image_folder, **settings):
    """Flags of a run of 6 steps, 3 an epoch, where `settings` say nothing else."""
    words = [*MICRO_FLAGS]
    settings = {"data_dir": image_folder, "batch_size": 24, "epochs": 2} | settings
    for name, value in settings.items():
        words += [randsac.flag_name(name), value]
    return words


def weights(run):
    """All of them, flat."""
    saved = torch.load(f"{run}/checkpoint.pt", weights_only=True)
    return torch.cat([weight.flatten() for weight in saved["model"].values()])


def rows(run):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").open()]


def steps(run):
    """Those that its log has a row of."""
    return [row["step"] for row in rows(run)]


def contents(run):
    return {path.name: path.read_bytes() for path in Path(run).iterdir()}


def test_a_run_learns_and_leaves_config_metrics_and_checkpoint(tmp_path, image_folder):
    out = tmp_path / "run"
    assert run_here(*flags_of(image_folder, out=out, epochs=20, lr=0.05)) == 0

    # A row at the end of each epoch of 3 steps, and every 10 steps.
    log = rows(out)
    assert steps(out) == sorted({*range(3, 61, 3), *range(10, 61, 10)})
    for row in log:
        assert {"step", "epoch", "loss", "lr", "images_per_s"} <= row.keys()
    held_out = [row for row in log if "held_out_loss" in row]
    assert [row["epoch"] for row in held_out] == list(range(1, 21))
    assert held_out[-1]["held_out_loss"] < 0.95 * held_out[0]["held_out_loss"]
    assert contents(out).keys() == {"config.json", "metrics.jsonl", "checkpoint.pt"}

    # The checkpoint keeps the wish, as it may be resumed on another device.
    assert json.loads((out / "config.json").read_text())["precision"] == "float32"
    saved, model, config = randsac.load_checkpoint(out / "checkpoint.pt")
    assert saved["rows"] == log and not model.training
    assert (config.dim, config.hierarchy, config.precision) == (16, (16, 4), "auto")


def shown_images(monkeypatch, count, *flags):
    """Trains on the images 0, 1, ... `count` - 1 with the loss 1, 4, 9, ... -> what each step was
    shown, a list of lists."""
    images = torch.arange(count)
    shown = []

    def load(config, train):
        return images if train else images[:0], None, ["a"]

    def step(model, optimizer, scaler, batch, *rest):
        shown.append(batch.tolist())
        return torch.tensor(float(len(shown) ** 2))

    monkeypatch.setattr(randsac, "load_images", load)
    monkeypatch.setattr(randsac, "training_step", step)
    assert run_here(*MICRO_FLAGS, "--dataset", "shapes", *flags) == 0
    return shown


def test_every_epoch_shows_the_images_once_in_an_order_of_its_own(tmp_path, monkeypatch):
    """But for those that do not fill a batch, which are others each time."""
    flags = ["--epochs", 9, "--max-steps", 34]  # a run ends earlier, and never later
    shown = shown_images(monkeypatch, 72, *flags, "--out", tmp_path / "a")
    assert len(shown) == 34
    epochs = torch.tensor(shown[:32]).view(8, 64)  # 4 batches of 16 images each
    assert all(len(epoch.unique()) == 64 for epoch in epochs)
    assert len(epochs.unique()) == 72
    # In two random orders of 72 images some 1 is at the same place.
    for one, two in itertools.combinations([torch.arange(64), *epochs], 2):
        assert (one == two).sum() < 12
    flags = ["--seed", 1, "--max-steps", 99, "--out", tmp_path / "b"]
    other = shown_images(monkeypatch, 72, *flags)
    assert len(other) == 3 * 4
    assert other[0] != shown[0]


def test_a_row_has_the_mean_loss_since_the_row_before(tmp_path, monkeypatch, capsys):
    shown_images(monkeypatch, 64, "--epochs", 4, "--save-every", 7, "--out", tmp_path / "run")
    begin = 0
    for row in rows(tmp_path / "run"):
        expected = np.mean(np.arange(begin + 1, row["step"] + 1) ** 2)
        assert row["loss"] == pytest.approx(expected)
        begin = row["step"]
    # Ends of an epoch, every tenth step, and those that are saved.
    assert steps(tmp_path / "run") == [4, 7, 8, 10, 12, 14, 16]
    assert "probe.py" not in capsys.readouterr().out  # as there is but one class


@pytest.mark.parametrize("n", [0, 7, 3999, 4000, 22_000])
@pytest.mark.parametrize("by_class", [False, True])  # as those of shapes; as those of a folder
def test_held_out_images_are_of_every_class(n, by_class, monkeypatch):
    images = torch.arange(n) % 10  # each is its class
    if by_class:
        images = images.sort().values

    def load(config, train):
        return torch.arange(99) if train else images, None, list("abcdefghij")

    monkeypatch.setattr(randsac, "load_images", load)
    _, chosen, _, can_probe = randsac.load_training_images(micro(batch_size=4))
    assert chosen.unique().tolist() == list(range(min(n, 10)))
    assert min(n, randsac.HELD_OUT / 2) <= len(chosen) < 2 * randsac.HELD_OUT
    assert can_probe == (n > 0)


def stop_at_once():
    """In place of stop_signals: a signal has come in the first step."""
    return contextlib.nullcontext([signal.SIGTERM])


RESUMED = [("patch", "auto"), ("square", "bfloat16"), ("blob", "auto"), ("mae", "float16")]


@pytest.mark.parametrize("segments, precision", RESUMED)
def test_resuming_changes_nothing(tmp_path, image_folder, segments, precision, monkeypatch):
    """A run stopped by a signal after each step and resumed ends in the bits of one that was never
    disturbed: weights, optimizer, scaler, held-out losses."""
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    flags = flags_of(image_folder, segments=segments, precision=precision)
    run_here(*flags, "--out", whole)
    with monkeypatch.context() as patched:
        patched.setattr(randsac, "stop_signals", stop_at_once)
        assert run_here(*flags, "--out", parts) == 128 + signal.SIGTERM
        for _ in range(5):
            assert run_here("--resume", parts) == 128 + signal.SIGTERM
    log = rows(parts)
    assert steps(parts) == [1, 2, 3, 4, 5, 6]
    for row in rows(whole):
        assert row["held_out_loss"] == log[row["step"] - 1]["held_out_loss"]
    saved, _, _ = randsac.load_checkpoint(whole / "checkpoint.pt")
    found, _, _ = randsac.load_checkpoint(parts / "checkpoint.pt")
    for name in ("model", "optimizer", "scaler"):
        torch.testing.assert_close(found[name], saved[name], rtol=0, atol=0)
    assert (len(saved["scaler"]) > 0) == (precision == "float16")


UNUSUAL = """--segments blob --hierarchy 5 2 --order raster --last-rank 2 --target pixels --no-skip
--crop-scale 0.9 --weight-decay 0.2 --warmup 0.1 --lr 0.01 --seed 3 --save-every 7"""


@pytest.fixture(scope="module")
def finished(image_folder, tmp_path_factory):
    """A run of 3 steps. Not to be written to."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run_here(*flags_of(image_folder, out=out, epochs=1), *UNUSUAL.split())
    return out


def test_a_run_and_its_images_may_move(finished, image_folder, tmp_path, monkeypatch):
    """But the images be no others. They are known by names and sizes of files, not by times nor by
    pixels, of which another Pillow may make a little different ones."""
    decode = randsac.decode_image
    monkeypatch.setattr(randsac, "decode_image", lambda *given: decode(*given) ^ 1)
    out = shutil.copytree(finished, tmp_path / "moved run")
    data = shutil.copytree(image_folder, tmp_path / "moved", copy_function=shutil.copyfile)
    assert run_here("--resume", out, "--data-dir", data, "--device", "cpu", "--no-compile") == 0
    _, _, config = randsac.load_checkpoint(out / "checkpoint.pt")
    assert (config.out, config.data_dir) == (str(out), str(data))

    before = contents(out)
    (data / "train/ant/1.png").rename(data / "train/ant/1-.png")  # at the same place
    assert "images" in refusal(run_here, "--resume", out)
    (data / "train/ant/1-.png").unlink()
    assert "images" in refusal(run_here, "--resume", out)
    assert contents(out) == before


def test_init_begins_with_weights_and_settings_alone(finished, tmp_path, monkeypatch):
    """With a schedule and an optimizer of its own; it resumes without what it began with."""
    start = shutil.copy(finished / "checkpoint.pt", tmp_path / "start.pt")
    _, trained, config = randsac.load_checkpoint(start)
    flags = ["--init", start, "--epochs", 2, "--device", "cpu", "--out"]
    assert run_here(*flags, tmp_path / "whole") == 0
    with monkeypatch.context() as patched:
        patched.setattr(randsac, "stop_signals", stop_at_once)
        assert run_here(*flags, tmp_path / "parts") == 128 + signal.SIGTERM
    saved, begun, settings = randsac.load_checkpoint(tmp_path / "parts/checkpoint.pt")
    changed = {"init": str(start), "epochs": 2, "out": str(tmp_path / "parts")}
    assert settings == dataclasses.replace(config, **changed)

    # It is Adam's first step, which moves no weight by more than the rate.
    [row] = rows(tmp_path / "parts")
    assert saved["optimizer"]["state"][0]["step"] == row["step"] == 1
    assert row["lr"] == randsac.learning_rate(0, 6, config)
    for name, weight in trained.state_dict().items():
        assert (begun.state_dict()[name] - weight).abs().max() < 1.1 * row["lr"]
    (tmp_path / "start.pt").unlink()
    assert run_here("--resume", tmp_path / "parts") == 0
    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


# --- several processes


def free_port():
    """Of those that no system hands out by itself: no connection takes it in the meantime."""
    while True:
        port = random.randrange(15_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return str(port)


def member(process, world, cwd, commands, ports, stop):
    """One of the processes that torchrun starts, forked here as an import of torch takes seconds
    -> exit code of the last command, in which the last process may get a signal."""
    os.chdir(cwd)
    torch.set_num_threads(1)
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}
    os.environ |= {"RANK": str(process), "WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    for words, port in zip(commands, ports):
        os.environ["MASTER_PORT"] = port
        if stop and words is commands[-1] and process == world - 1:
            randsac.stop_signals = stop_at_once
        code = run_here(*words)
    return code


def train_on(world, commands, stop=False):
    """Runs each of these commands on `world` processes -> exit codes of the last."""
    rest = (world, os.getcwd(), commands, [free_port() for _ in commands], stop)
    with forks.Pool(world) as pool:
        jobs = [(process, *rest) for process in range(world)]
        return pool.starmap_async(member, jobs, chunksize=1).get(300)


def assert_same_log(one, other):
    for ours, theirs in zip(rows(one), rows(other), strict=True):
        del ours["images_per_s"], theirs["images_per_s"]
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_a_training_is_the_same_on_any_number_of_processes(tmp_path, image_folder):
    """To rounding, with random crops; also where it is stopped on two processes, goes on on one and
    ends on four. Of the strategies, one on each of the two paths through the decoder."""

    def command(segments, name):
        out = tmp_path / f"{segments}-{name}"
        return flags_of(image_folder, segments=segments, out=out, save_every=1)

    for segments in ("square", "blob"):
        run_here(*command(segments, "1"))
    run_here(*command("blob", "begins"), "--lr", 1e-12)
    mixed = ["--resume", tmp_path / "blob-mixed"]
    stopped = [128 + signal.SIGTERM]
    on_two = [command(name, "2") for name in ("square", "blob")] + [command("blob", "mixed")]
    assert train_on(2, on_two, stop=True) == stopped * 2
    assert train_on(1, [mixed], stop=True) == stopped
    assert train_on(4, [command("square", "4"), command("blob", "4"), mixed]) == [0] * 4

    moved = (weights(tmp_path / "blob-1") - weights(tmp_path / "blob-begins")).norm()
    for name in ("square-2", "square-4", "blob-2", "blob-4", "blob-mixed"):
        one = tmp_path / f"{name.partition('-')[0]}-1"
        assert_same_log(one, tmp_path / name)
        # Adam makes much of rounding where a gradient is nothing else, as that of a key's bias.
        assert (weights(one) - weights(tmp_path / name)).norm() < 0.05 * moved


@pytest.mark.long
def test_torchrun_starts_it(tmp_path, image_folder):
    """The first process speaks for both, and they train what one does."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2]
    words += ["--master-addr", "127.0.0.1", "--master-port", free_port(), ROOT / "randsac.py"]
    words = [str(word) for word in [*words, *flags_of(image_folder, out=tmp_path / "two")]]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    said = subprocess.run(words, check=True, capture_output=True, env=env, text=True).stdout
    assert said.count("trained.") == 1
    run_here(*flags_of(image_folder, out=tmp_path / "one"))
    assert_same_log(tmp_path / "one", tmp_path / "two")


TORCHRUN = "TORCHELASTIC_RUN_ID=x RANK=0 WORLD_SIZE=5 "
LAUNCHED = [  # what a process is told, and what the line names with which it is refused
    ("WORLD_SIZE=5", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_SIZE=4", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_SIZE=4", "PMI_SIZE"),
    ("SLURM_STEP_NUM_TASKS=2", "SLURM_STEP_NUM_TASKS"),
    (TORCHRUN + "SLURM_STEP_NUM_TASKS=2", "SLURM_STEP_NUM_TASKS"),
    # Where one task is started on each machine, only the next fault is named.
    (TORCHRUN + "SLURM_STEP_NUM_TASKS=2 GROUP_WORLD_SIZE=2", "--batch-size"),
    ("SLURM_STEP_NUM_TASKS=1 SLURM_NTASKS=2 SLURM_PROCID=0", "--data-dir"),
]


@pytest.mark.parametrize("told, word", LAUNCHED)
def test_processes_that_do_not_fit_are_refused(told, word, tmp_path, monkeypatch):
    """As many trainings side by side as there are tasks; processes that do not share a batch."""
    for words in told.split():
        name, value = words.split("=")
        monkeypatch.setenv(name, value)
    said = refusal(run_here, *flags_of("images", out=tmp_path / "run"))
    assert names(word, said) and ("torchrun" in said) == (word in told)
    assert list(tmp_path.iterdir()) == []
