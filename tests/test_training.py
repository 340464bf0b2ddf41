"""The command randsac.py: flags, a step, runs, resuming, several processes."""

import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    MICRO_FLAGS,
    ROOT,
    HostReads,
    forks,
    micro,
    random_model,
    run_here,
)

import randsac

STRATEGIES = ["patch", "square", "blob", "scatter", "mae"]


def weights(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["model"]


def same_weights(a, b):
    one = weights(a)
    other = weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def whole_flag(name):
    """A pattern of this flag, and not of one that it begins."""
    return rf"(?<![\w-]){re.escape(name)}(?![\w-])"


# --- flags


def test_defaults_are_filled_by_dataset_model_and_strategy():
    config = randsac.Config()
    assert (config.model, config.dim, config.depth, config.heads) == ("nano", 128, 6, 4)
    assert (config.hierarchy, config.target, config.data_dir) == ((16, 4), "normalized", "")
    assert randsac.Config(dataset="cifar10").model == "small"
    assert randsac.Config(dataset="cifar10").data_dir == "data"
    assert randsac.Config(dim=64, heads=2).depth == 6
    assert randsac.Config(segments="blob").hierarchy == (11, 5)
    assert randsac.Config(segments="mae").hierarchy == ()
    assert randsac.Config(model="base").dim == 768
    assert randsac.Config(model="tiny", depth=3).depth == 3
    assert randsac.Config(patch_size=1).target == "pixels"
    # The batch of a data set, but for nano, which is for a CPU.
    assert randsac.Config(dataset="cifar10").batch_size == 512
    assert randsac.Config(dataset="cifar10", model="nano").batch_size == 32


def test_every_field_is_a_flag_with_help():
    text = randsac.make_parser("").format_help()
    for field in dataclasses.fields(randsac.Config):
        flag = "--" + field.name.replace("_", "-")
        assert re.search(whole_flag(flag), text), flag
        assert field.metadata["help"]
    given = shlex.split("--hierarchy 64 16 4 --no-skip --lr 1e-3 --patch-size 4")
    flags = vars(randsac.make_parser("").parse_args(given))
    assert flags == {"hierarchy": [64, 16, 4], "skip": False, "lr": 1e-3, "patch_size": 4}
    assert randsac.Config(**flags).hierarchy == (64, 16, 4)


@pytest.mark.parametrize(
    "given, words",
    [
        ("--lr fast", "--lr: invalid float value: 'fast'"),
        ("--epoch 3", "--epoch 3"),  # no flag may be shortened
        ("--order up", "--order: invalid choice: 'up'"),
        ("--hierarchy", "--hierarchy: expected at least one argument"),
        ("--depth 1.5", "--depth: invalid int value: '1.5'"),
        ("--skip False", "False"),
        ("runs/x", "runs/x"),
        ("--local-rank=0", "--local-rank=0"),  # of torchrun's predecessor
    ],
)
def test_a_flag_that_cannot_be_read_is_one_line(given, words):
    with pytest.raises(randsac.UserError) as error:
        randsac.main(given.split())
    assert words in str(error.value) and "--help" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["--out", "--init", "--data-dir", "--resume"])
def test_a_flag_whose_value_is_empty_is_refused(flag, tmp_path, monkeypatch):
    """As `--init "$CHECKPOINT"` is, where the variable is not set: it would train from scratch."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(randsac.UserError, match=f"^{flag} is empty"):
        run_here("--dataset", "folder", flag, "")
    assert list(tmp_path.iterdir()) == []


WRONG = [
    ("patch_size", 5, "does not divide"),
    ("patch_size", 32, "one patch is the whole image"),
    ("hierarchy", (8,), "squares"),
    ("hierarchy", (9,), "squares"),
    ("hierarchy", (4, 16), "descend"),
    ("hierarchy", (16, 16), "descend"),
    ("hierarchy", (), "whole numbers from 2"),
    ("hierarchy", (1,), "whole numbers from 2"),
    ("hierarchy", ("a",), "whole numbers from 2"),
    ("hierarchy", 16, "tuple"),
    ("last_rank", 15, "changes nothing in 16 segments"),
    ("last_rank", -1, "from 0"),
    ("heads", 3, "does not divide"),
    ("dim", 130, "multiple of 4"),
    ("dim", 0, "from 1"),
    ("depth", 0, "from 1"),
    ("depth", 1.5, "int"),
    ("lr", -1.0, "from 0"),
    ("lr", 0.0, "above 0"),
    ("lr", math.nan, "from 0"),
    ("lr", math.inf, "from 0"),
    ("lr", "fast", "float"),
    ("epochs", 0, "from 1"),
    ("batch_size", -4, "from 1"),
    ("warmup", 1.0, "below 1"),
    ("crop_scale", 0.0, "above 0"),
    ("crop_scale", 1.5, "at most 1"),
    ("seed", -1, "from 0"),
    ("dataset", "mnist", "one of"),
    ("model", "huge", "one of"),
    ("segments", "stripes", "one of"),
    ("order", "spiral", "one of"),
    ("target", "tokens", "one of"),
    ("device", "tpu", "one of"),
    ("precision", "float64", "one of"),
    ("skip", 1, "bool"),
    ("image_size", True, "int"),
    ("save_every", -1, "from 0"),
    ("data_dir", "/no/such", "shapes are drawn"),  # a flag that cannot act
]


def refused_settings(**settings):
    """The message with which a Config of these settings is refused: one line."""
    with pytest.raises(randsac.UserError) as error:
        randsac.Config(**settings)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name, value, words", WRONG)
def test_a_wrong_setting_is_refused_with_its_reason(name, value, words):
    message = refused_settings(**{name: value})
    assert words in message
    assert re.search(whole_flag("--" + name.replace("_", "-")), message), message


@pytest.mark.parametrize(
    "flag, settings",
    [
        ("--hierarchy", {"segments": "patch", "hierarchy": (16,)}),
        ("--hierarchy", {"segments": "mae", "hierarchy": (4,)}),
        ("--hierarchy", {"segments": "blob", "hierarchy": (65,)}),
        ("--hierarchy", {"segments": "blob", "hierarchy": (5, 11)}),
        ("--order", {"segments": "mae", "order": "raster"}),
        ("--last-rank", {"segments": "mae", "last_rank": 1}),
        ("--last-rank", {"segments": "patch", "last_rank": 63}),
        ("--last-rank", {"hierarchy": (4,), "last_rank": 3}),
    ],
)
def test_what_cannot_act_on_a_strategy_is_refused(flag, settings):
    assert re.search(whole_flag(flag), refused_settings(**settings))


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(randsac.UserError, match=rf"^--device {name} .*choose cpu$"):
        run_here("--device", name)
    assert list(tmp_path.iterdir()) == []


# --- a step

UINT8 = {"dtype": torch.uint8}
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def one_step(model, batch, step=0, steps=10, process=0, optimizer=None, scaler=NO_SCALER):
    optimizer = optimizer or randsac.make_optimizer(model, model.config)
    rest = (model.config, step, steps, process)
    return randsac.training_step(model, optimizer, scaler, batch, *rest)


class Recorder(torch.nn.Module):
    """Keeps what a training step shows the model. Its loss is `slope` times the sum of a weight,
    so the gradient of that weight is `slope` everywhere."""

    def __init__(self, config, slope=1.0):
        super().__init__()
        self.config = config
        self.slope = slope
        self.weight = torch.nn.Parameter(torch.ones(2, 2))
        self.shown = []

    def forward(self, images, ranks, trim):
        self.shown.append((images, ranks))
        return self.slope * self.weight.sum()


@pytest.mark.parametrize("segments", STRATEGIES)
def test_crops_and_orders_are_fresh_at_each_step_and_in_each_process(segments):
    hierarchy = {"blob": (5, 2), "scatter": (5,)}.get(segments)
    recorder = Recorder(micro(segments=segments, hierarchy=hierarchy))
    batch = torch.randint(0, 256, (8, 3, 16, 16), **UINT8)
    for step, process in [(0, 0), (0, 0), (1, 0), (2, 0), (1, 1)]:
        one_step(recorder, batch, step, process=process)
    first, *others = recorder.shown
    # The same step is the same, so that a run can be resumed.
    assert all(torch.equal(a, b) for a, b in zip(first, others[0]))
    for i, one in enumerate(others):
        for two in others[:i]:
            assert not any(torch.equal(a, b) for a, b in zip(one, two))


def test_another_seed_gives_other_crops_and_orders():
    shown = []
    batch = torch.randint(0, 256, (8, 3, 16, 16), **UINT8)
    for seed in (0, 1):
        recorder = Recorder(micro(seed=seed))
        one_step(recorder, batch)
        shown += recorder.shown
    assert not any(torch.equal(a, b) for a, b in zip(*shown))


def test_a_step_crops_as_the_flag_says():
    """Brightness rises with x, so a crop's range of brightness tells its width."""
    ramp = torch.arange(0, 256, 16, **UINT8).expand(500, 3, 16, 16).contiguous()
    narrowest = {}
    for scale in (0.05, 0.3, 1.0):
        recorder = Recorder(micro(crop_scale=scale))
        one_step(recorder, ramp)
        image = recorder.shown[0][0][:, 0, 0]  # [B,16]
        width = (image.amax(1) - image.amin(1)) / (240 / 127.5)
        narrowest[scale] = width.min().item()
    # A crop of area a is at least sqrt(a * 3/4) wide.
    assert 0.19 < narrowest[0.05] < 0.35
    assert 0.47 < narrowest[0.3] < 0.6
    assert narrowest[1.0] > 0.86


@pytest.mark.parametrize("slope, moved", [(1000.0, 1.0), (0.5, 1.0), (0.01, 0.02)])
def test_a_gradient_longer_than_one_is_clipped(slope, moved):
    """Plain descent moves the weight by rate times the gradient, whose norm is 2 * slope."""
    recorder = Recorder(micro(lr=0.5, batch_size=256, warmup=0.0), slope)
    optimizer = torch.optim.SGD(recorder.parameters())
    one_step(recorder, torch.zeros(4, 3, 16, 16, **UINT8), optimizer=optimizer)
    assert (recorder.weight - 1).norm().item() == pytest.approx(0.5 * moved, rel=1e-4)


def test_a_step_follows_the_learning_rate():
    config = micro(warmup=0.5)
    model = randsac.RandSAC(config)
    optimizer = randsac.make_optimizer(model, config)
    batch = torch.randint(0, 256, (4, 3, 16, 16), **UINT8)
    for step in (0, 3, 9):
        one_step(model, batch, step, optimizer=optimizer)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert rates == {randsac.learning_rate(step, 10, config)}


def test_learning_rate_rises_then_falls():
    config = micro(lr=1e-3, batch_size=512, warmup=0.1)
    rates = [randsac.learning_rate(t, 100, config) for t in range(100)]
    assert max(rates) == pytest.approx(2e-3)  # per 256 images, 512 in the batch
    assert rates.index(max(rates)) == 10
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[0] < 2.5e-4 and 0 < rates[-1] < 1e-5


def test_weight_decay_is_on_matrices_only():
    model = randsac.RandSAC(micro())
    decayed, free = randsac.make_optimizer(model, model.config).param_groups
    assert decayed["weight_decay"] == model.config.weight_decay > 0 == free["weight_decay"]
    every = {id(p) for p in model.parameters()}
    assert {id(p) for p in decayed["params"] + free["params"]} == every
    assert len(decayed["params"]) + len(free["params"]) == len(every)
    assert all(p.ndim == 2 for p in decayed["params"])
    assert any(p is model.skip for p in free["params"])
    assert all(p.ndim < 2 or p is model.skip for p in free["params"])


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("segments", STRATEGIES)
def test_a_step_reads_no_value_on_the_host(segments, precision):
    hierarchy = {"square": (16, 4), "blob": (11, 5), "scatter": (9,)}.get(segments)
    config = micro(segments=segments, hierarchy=hierarchy, precision=precision)
    model = randsac.RandSAC(config)
    optimizer = randsac.make_optimizer(model, config)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16")
    batch = torch.randint(0, 256, (4, 3, 16, 16), **UINT8)
    # The first step makes the optimizer's state.
    one_step(model, batch, 0, optimizer=optimizer, scaler=scaler)
    if precision == "float16":
        # On a CPU the scaler's own part reads on the host; ours must not.
        scaler = torch.amp.GradScaler("cpu", enabled=False)
    with HostReads() as reads:
        one_step(model, batch, 1, optimizer=optimizer, scaler=scaler)
    assert reads.calls > 100 and reads.found == []


def test_a_gradient_that_is_not_finite_shows_in_the_loss_of_its_step():
    model = randsac.RandSAC(micro())
    batch = torch.randint(0, 256, (4, 3, 16, 16), **UINT8)
    assert one_step(model, batch).isfinite()
    model.embed.bias.register_hook(lambda gradient: gradient / 0)
    assert not one_step(model, batch, 1).isfinite()


# --- precision


def test_auto_is_float32_on_a_cpu_and_the_choice_is_kept(tmp_path, image_folder):
    out = tmp_path / "run"
    run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--out", out, "--max-steps", 1)
    assert json.loads((out / "config.json").read_text())["precision"] == "float32"
    # The checkpoint keeps the wish, as it may be resumed on another device.
    assert randsac.load_checkpoint(out / "checkpoint.pt")[2].precision == "auto"


@pytest.mark.parametrize(
    "bfloat16, capability, choice",
    [(True, (8, 0), "bfloat16"), (False, (7, 5), "float16"), (False, (6, 1), "float32")],
)
def test_auto_takes_what_a_gpu_has(bfloat16, capability, choice, monkeypatch):
    """An A100, the T4 of a free notebook, and a card older than that."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert randsac.pick_precision("auto", torch.device("cuda")) == choice


def test_a_step_in_float16_computes_in_float16_and_leaves_out_what_overflows():
    model = randsac.RandSAC(micro(precision="float16"))
    scaler = torch.amp.GradScaler("cpu")
    batch = torch.randint(0, 256, (4, 3, 16, 16), **UINT8)
    seen = []
    model.encoder[0].attention.query.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    optimizer = randsac.make_optimizer(model, model.config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert one_step(model, batch, optimizer=optimizer, scaler=scaler).isfinite()
    assert seen == [torch.float16]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    # W of the skips is the first layer only at the start, and every other parameter moves at once.
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) == len(before)

    # A gradient that overflows: the weights stay, the scale is halved, training goes on.
    hook = model.embed.bias.register_hook(lambda gradient: gradient / 0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    scale = scaler.get_scale()
    assert one_step(model, batch, 1, optimizer=optimizer, scaler=scaler).isfinite()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert scaler.get_scale() == scale / 2
    hook.remove()
    one_step(model, batch, 2, optimizer=optimizer, scaler=scaler)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(model.embed.weight, before["embed.weight"])


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_run_in_half_precision_trains_and_resumes_bit_for_bit(
    tmp_path, image_folder, precision, monkeypatch
):
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 3]
    half = [*flags, "--precision", precision]
    run_here(*half, "--out", tmp_path / "whole")
    run_here(*flags, "--out", tmp_path / "float32")
    assert not same_weights(tmp_path / "whole", tmp_path / "float32")
    assert json.loads((tmp_path / "whole/config.json").read_text())["precision"] == precision
    saved, _, _ = randsac.load_checkpoint(tmp_path / "whole/checkpoint.pt")
    if precision == "float16":
        assert saved["scaler"]["scale"] > 0 and saved["scaler"]["_growth_tracker"] > 0
    else:
        assert saved["scaler"] == {}
    for ours, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "float32")):
        assert ours["loss"] == pytest.approx(other["loss"], rel=0.05)

    interrupt_each_step(monkeypatch)
    code = run_here(*half, "--out", tmp_path / "parts")
    for _ in range(11):
        assert code == 128 + 15
        code = run_here("--resume", tmp_path / "parts")
    assert rows(tmp_path / "parts")[-1]["step"] == 12
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    again, _, _ = randsac.load_checkpoint(tmp_path / "parts/checkpoint.pt")
    assert again["scaler"] == saved["scaler"]


# --- a run


def test_a_run_leaves_config_metrics_and_checkpoint(tmp_path, image_folder, capsys):
    out = tmp_path / "run"
    assert run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--out", out, "--epochs", 5) == 0
    said = capsys.readouterr().out
    assert f"{image_folder}: 72 images of 3 classes, 24 held out, 0 files left out" in said
    assert f"{out}: 20 steps of 16 images, 1 x cpu" in said
    assert f"visualize.py all --checkpoint {out}/checkpoint.pt" in said
    assert f"probe.py {out}/checkpoint.pt" in said
    assert json.loads((out / "config.json").read_text())["epochs"] == 5

    # A row at the end of each epoch of 4 steps, and every 10 steps.
    log = rows(out)
    assert [row["step"] for row in log] == [4, 8, 10, 12, 16, 20]
    assert all({"step", "epoch", "loss", "lr", "images_per_s"} <= row.keys() for row in log)
    assert [row["epoch"] for row in log if "held_out_loss" in row] == [1, 2, 3, 4, 5]
    assert log[-1]["lr"] < log[1]["lr"]
    assert {p.name for p in out.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    model, config = randsac.load_model(out / "checkpoint.pt")
    assert config.dim == 16 and config.hierarchy == (16, 4) and not model.training
    assert randsac.load_checkpoint(out / "checkpoint.pt")[0]["rows"] == log


def test_without_a_name_a_run_gets_a_fresh_one(tmp_path, image_folder, monkeypatch):
    """Runs that begin in the same second too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(randsac.time, "strftime", lambda *_: "20250101-000000")
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--max-steps", 1]
    assert run_here(*flags) == 0
    monkeypatch.setattr(os, "getpid", lambda: 12345)
    assert run_here(*flags) == 0
    names = sorted(run.name for run in (tmp_path / "runs").iterdir())
    assert len(names) == 2
    assert all(name.startswith("folder-square-20250101-000000-") for name in names)


def test_loss_falls(tmp_path, image_folder):
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 30, "--lr", 0.05]
    run_here(*flags, "--out", tmp_path / "run")
    log = [row["held_out_loss"] for row in rows(tmp_path / "run") if "held_out_loss" in row]
    assert log[-1] < 0.9 * log[0]


def test_same_seed_same_weights_whatever_the_folder_is_called(tmp_path, image_folder):
    (tmp_path / "other name").symlink_to(image_folder)
    runs = {"a": (image_folder, 0), "b": (tmp_path / "other name", 0), "c": (image_folder, 1)}
    for name, (data, seed) in runs.items():
        flags = [*MICRO_FLAGS, "--data-dir", data, "--epochs", 2, "--seed", seed]
        run_here(*flags, "--out", tmp_path / name)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert not same_weights(tmp_path / "a", tmp_path / "c")


def numbered(monkeypatch, count):
    """`count` training images, each of them one number, and no held-out ones."""
    images = torch.arange(count, **UINT8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
    none = torch.zeros(0, 3, 16, 16, **UINT8)
    labels = torch.zeros(count, dtype=torch.int64)

    def load(config, train):
        return (images, labels, ["a"]) if train else (none, labels[:0], ["a"])

    monkeypatch.setattr(randsac, "load_images", load)


def shown_images(monkeypatch, count, flags):
    """-> the numbers of the images that each step of a run is given, a list of lists."""
    numbered(monkeypatch, count)
    shown = []

    def step(model, optimizer, scaler, batch, *rest):
        shown.append(batch[:, 0, 0, 0].tolist())
        return torch.tensor(0.0)

    monkeypatch.setattr(randsac, "training_step", step)
    assert run_here(*MICRO_FLAGS, "--dataset", "shapes", *flags) == 0
    return shown


def test_every_epoch_shows_all_images_once_in_an_order_of_its_own(tmp_path, monkeypatch):
    flags = ["--batch-size", 16, "--epochs", 4, "--image-size", 16]
    shown = shown_images(monkeypatch, 64, [*flags, "--out", tmp_path / "run"])
    assert len(shown) == 16 and all(len(batch) == 16 for batch in shown)
    epochs = [[*itertools.chain(*shown[i : i + 4])] for i in (0, 4, 8, 12)]
    assert all(sorted(epoch) == list(range(64)) for epoch in epochs)
    assert list(range(64)) not in epochs  # shuffled
    # In two random orders of 64 images some 1 is at the same place.
    for i, one in enumerate(epochs):
        assert sum(a == b for a, b in zip(one, range(64))) < 12
        for two in epochs[:i]:
            assert sum(a == b for a, b in zip(one, two)) < 12
    other = [*flags, "--seed", 1, "--out", tmp_path / "other"]
    assert shown_images(monkeypatch, 64, other)[0] != shown[0]


def test_what_does_not_fill_a_batch_is_left_to_another_epoch(tmp_path, monkeypatch):
    flags = ["--batch-size", 16, "--epochs", 9, "--image-size", 16, "--out", tmp_path / "run"]
    shown = shown_images(monkeypatch, 40, flags)
    assert len(shown) == 18
    for i in range(0, 18, 2):
        assert len({*shown[i], *shown[i + 1]}) == 32
    assert set(itertools.chain(*shown)) == set(range(40))


def test_max_steps_ends_a_run_earlier_and_never_later(tmp_path, monkeypatch):
    flags = ["--batch-size", 16, "--epochs", 2, "--image-size", 16]
    for i, (most, steps) in enumerate([(3, 3), (4, 4), (100, 8)]):
        given = [*flags, "--max-steps", most, "--out", tmp_path / str(i)]
        assert len(shown_images(monkeypatch, 64, given)) == steps


def test_a_row_has_the_mean_loss_since_the_row_before(tmp_path, monkeypatch):
    numbered(monkeypatch, 64)
    losses = iter(torch.arange(1.0, 100).square())
    monkeypatch.setattr(randsac, "training_step", lambda *_: next(losses))
    flags = ["--dataset", "shapes", "--epochs", 4, "--image-size", 16, "--save-every", 7]
    run_here(*MICRO_FLAGS, *flags, "--out", tmp_path / "run")
    log = rows(tmp_path / "run")
    # Ends of an epoch, every tenth step, and those that are saved.
    assert [row["step"] for row in log] == [4, 7, 8, 10, 12, 14, 16]
    begins = 0
    for row in log:
        expected = np.mean(np.arange(begins + 1, row["step"] + 1) ** 2)
        assert row["loss"] == pytest.approx(expected)
        begins = row["step"]


@pytest.mark.parametrize("n", [0, 7, 2000, 3999, 4000, 10_000])
@pytest.mark.parametrize("sort", [False, True])  # as those of shapes; as those of a folder
def test_held_out_images_are_of_every_class(n, sort, monkeypatch):
    labels = torch.arange(n) % 10
    if sort or n == 10_000:
        labels = labels.sort().values
    held_out = labels.byte().view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    training = torch.zeros(4, 3, 16, 16, **UINT8)

    def load(config, train):
        return training if train else held_out, labels, list("abcdefghij")

    monkeypatch.setattr(randsac, "load_images", load)
    _, chosen, _ = randsac.load_training_images(micro(batch_size=4), 0, 1)
    assert chosen[:, 0, 0, 0].unique().tolist() == list(range(min(n, 10)))
    assert min(n, randsac.HELD_OUT / 2) <= len(chosen) < 2 * randsac.HELD_OUT


def test_the_held_out_loss_is_the_mean_over_all_of_them(monkeypatch):
    """Also where their number is no multiple of the parts that they are looked at in."""
    losses = {500: 1.0, 200: 8.0}

    def loss(model, images, config, generator):
        return torch.tensor(losses[len(images)])

    monkeypatch.setattr(randsac, "batch_loss", loss)
    images = torch.zeros(1200, 3, 16, 16, **UINT8)
    found = randsac.held_out_loss(None, images, micro(), torch.device("cpu"))
    assert found == pytest.approx((500 + 500 + 200 * 8) / 1200)


def test_too_few_images_for_a_batch(tmp_path, image_folder):
    out = tmp_path / "run"
    with pytest.raises(randsac.UserError, match="^72 images do not fill a --batch-size of 73$"):
        run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--out", out, "--batch-size", 73)
    assert not out.exists()  # the name is not used up


# --- going on: --resume


def interrupt_each_step(monkeypatch):
    """From now on a signal comes in each training step."""
    step = randsac.training_step

    def interrupted(*arguments):
        os.kill(os.getpid(), 15)
        return step(*arguments)

    monkeypatch.setattr(randsac, "training_step", interrupted)


@pytest.mark.parametrize("segments", STRATEGIES)
def test_resuming_after_every_step_gives_the_same_run(
    tmp_path, image_folder, segments, monkeypatch
):
    """A run stopped by a signal after each step and resumed ends in the weights of one that was
    never disturbed."""
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 2, "--segments", segments]
    run_here(*flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupt_each_step(patched)
        assert run_here(*flags, "--out", tmp_path / "parts") == 128 + 15
        for _ in range(7):
            code = run_here("--resume", tmp_path / "parts")
        assert code == 128 + 15
    log = rows(tmp_path / "parts")
    assert [row["step"] for row in log] == list(range(1, 9))
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    held_out = {row["step"]: row["held_out_loss"] for row in log if "held_out_loss" in row}
    for row in rows(tmp_path / "whole"):
        assert row["held_out_loss"] == held_out[row["step"]]
    assert run_here("--resume", tmp_path / "parts") == 0  # nothing is left to do
    assert rows(tmp_path / "parts") == log


@pytest.fixture(scope="module")
def finished(image_folder, tmp_path_factory):
    """A run of 4 steps. Not to be written to."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--out", out, "--epochs", 1)
    return out


def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_resume_takes_every_flag_from_the_run(finished, tmp_path):
    """Every flag but three is refused by name, even where it would change nothing."""
    out = copied(finished, tmp_path)
    before = {path: path.read_bytes() for path in out.iterdir()}
    allowed = {"device", "data_dir", "compile"}
    parser = randsac.make_parser("")
    values = {"hierarchy": ["4"], "out": ["elsewhere"], "init": ["other.pt"]}
    for field in dataclasses.fields(randsac.Config):
        if field.name in allowed:
            continue
        flag = "--" + field.name.replace("_", "-")
        given = [flag]
        if field.type is not bool:
            choices = [str(choice) for choice in field.metadata["choices"]]
            given += values.get(field.name, choices[:1] or ["1"])
        parser.parse_args(given)  # it is a flag, well given
        with pytest.raises(randsac.UserError, match=r"--resume.*leave out " + flag + "$"):
            run_here("--resume", out, *given)
    with pytest.raises(randsac.UserError, match=r"leave out --lr --skip$"):
        run_here("--resume", out, "--no-skip", "--lr", 1)
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def test_resume_lets_the_images_move(finished, image_folder, tmp_path):
    out = copied(finished, tmp_path)
    shutil.copytree(image_folder, tmp_path / "moved")
    given = ["--data-dir", tmp_path / "moved", "--device", "cpu", "--no-compile"]
    assert run_here("--resume", out, *given) == 0
    assert randsac.load_checkpoint(out / "checkpoint.pt")[2].data_dir == str(tmp_path / "moved")


def test_a_moved_run_goes_on_where_it_lies_now(finished, tmp_path):
    out = copied(finished, tmp_path).rename(tmp_path / "moved run")
    before = (finished / "checkpoint.pt").read_bytes()
    assert run_here("--resume", out) == 0
    assert randsac.load_checkpoint(out / "checkpoint.pt")[2].out == str(out)
    assert (finished / "checkpoint.pt").read_bytes() == before


def test_resume_refuses_other_images_of_the_same_number(finished, image_folder, tmp_path):
    out = copied(finished, tmp_path)
    before = {path: path.read_bytes() for path in out.iterdir()}
    data = shutil.copytree(image_folder, tmp_path / "data")
    shutil.copy(data / "train/ant/0.png", data / "train/ant/1.png")
    with pytest.raises(randsac.UserError, match="not the images that the run began with"):
        run_here("--resume", out, "--data-dir", data)
    (data / "train/ant/1.png").unlink()
    with pytest.raises(randsac.UserError, match="not the images that the run began with"):
        run_here("--resume", out, "--data-dir", data)
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def test_resume_of_what_is_no_run(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(randsac.UserError, match="nowhere"):
        run_here("--resume", "nowhere")
    with pytest.raises(randsac.UserError, match="expected one argument"):
        run_here("--resume")
    assert list(tmp_path.iterdir()) == []

    # A checkpoint that holds a model alone, as the one that comes with the project.
    saved, _, _ = randsac.load_checkpoint(finished / "checkpoint.pt")
    (tmp_path / "alone").mkdir()
    alone = {"config": saved["config"], "model": saved["model"]}
    torch.save(alone, tmp_path / "alone/checkpoint.pt")
    with pytest.raises(randsac.UserError, match="only a model.* --init alone/checkpoint.pt"):
        run_here("--resume", "alone")


def test_a_run_is_never_overwritten(finished, image_folder, tmp_path):
    out = copied(finished, tmp_path)
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--out", out]
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(randsac.UserError, match="holds a run.*--resume.*--out"):
        run_here(*flags)
    for name in ("metrics.jsonl", "checkpoint.pt"):  # the one without the other
        aside = (out / name).rename(tmp_path / name)
        with pytest.raises(randsac.UserError, match="holds a run"):
            run_here(*flags)
        aside.rename(out / name)
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("out", ["images/run", "images/train/run", "images", "link/run", None])
def test_a_run_among_its_images_is_refused(image_folder, tmp_path, monkeypatch, out):
    """It would be taken for a class, or keep the folder from ever being read again."""
    data = shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "link").symlink_to(data)
    monkeypatch.chdir(data if out is None else tmp_path)
    flags = [*MICRO_FLAGS, "--data-dir", "." if out is None else "images"]
    if out is not None:
        flags += ["--out", out]
    with pytest.raises(randsac.UserError, match="among the images.*--out"):
        run_here(*flags)
    assert sorted(p.name for p in data.iterdir()) == ["test", "train"]


def test_the_weights_have_their_own_names_after_compiling(image_folder, tmp_path, monkeypatch):
    """As without --compile: they load into a model that was never wrapped."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="eager"))
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--max-steps", 1, "--compile"]
    assert run_here(*flags, "--out", tmp_path / "run") == 0
    _, config = randsac.load_model(tmp_path / "run/checkpoint.pt")
    assert weights(tmp_path / "run").keys() == randsac.RandSAC(config).state_dict().keys()
    torch.compiler.reset()


@pytest.mark.parametrize(
    "log", ["as it was", "more rows", "half a row", "blank", "foreign", "none"]
)
def test_a_resumed_run_writes_its_log_anew(finished, tmp_path, log):
    out = copied(finished, tmp_path)
    path = out / "metrics.jsonl"
    good = path.read_text()
    if log == "more rows":
        path.write_text(good + '{"step": 9, "loss": 1}\n')
    elif log == "half a row":
        path.write_text(good[:-20])
    elif log == "blank":
        path.write_text(good.replace("\n", "\n\n \n"))
    elif log == "foreign":
        path.write_bytes(b"my notes: \xff\x00\n[1, 2]\nnull\n" + good.encode())
    elif log == "none":
        path.unlink()
    assert run_here("--resume", out) == 0
    assert path.read_text() == good


# --- going on: --init


def test_init_starts_from_the_weights_with_a_schedule_of_its_own(
    finished, image_folder, tmp_path, monkeypatch
):
    begins = {}
    step = randsac.training_step

    def first_step(model, optimizer, scaler, batch, config, number, steps, process):
        if number == 0:
            begins.update({name: p.clone() for name, p in model.state_dict().items()})
            begins["optimizer"] = len(optimizer.state)
        return step(model, optimizer, scaler, batch, config, number, steps, process)

    monkeypatch.setattr(randsac, "training_step", first_step)
    out = tmp_path / "run"
    # Other images, crops, orders, targets and sizes of the image: all but the sizes of the model.
    flags = ["--segments", "blob", "--hierarchy", 5, "--target", "pixels", "--image-size", 12]
    flags += ["--data-dir", image_folder, "--epochs", 2, "--crop-scale", 0.5, "--out", out]
    assert run_here(*MICRO_FLAGS, *flags, "--init", finished / "checkpoint.pt") == 0
    assert begins.pop("optimizer") == 0  # no memory of the run before
    assert all(torch.equal(begins[name], value) for name, value in weights(finished).items())
    assert [row["step"] for row in rows(out)] == [4, 8]
    config = randsac.load_checkpoint(out / "checkpoint.pt")[2]
    assert rows(out)[-1]["lr"] == randsac.learning_rate(7, 8, config)
    assert config.target == "pixels" and not same_weights(finished, out)


def test_a_run_from_init_resumes_without_it(finished, image_folder, tmp_path, monkeypatch):
    start = shutil.copy(finished / "checkpoint.pt", tmp_path / "start.pt")
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 2, "--init", start]
    run_here(*flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupt_each_step(patched)
        assert run_here(*flags, "--out", tmp_path / "parts") == 128 + 15
    (tmp_path / "start.pt").unlink()
    assert run_here("--resume", tmp_path / "parts") == 0
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "given, named",
    [
        ("--dim 32", ["dim 16"]),
        ("--depth 3", ["depth 2"]),
        ("--heads 4", ["heads 2"]),
        ("--decoder-depth 2", ["decoder.depth 1"]),
        ("--patch-size 4 --hierarchy 4", ["patch.size 2"]),
        ("--no-skip", ["skip"]),
        ("--dim 32 --depth 3 --heads 4", ["dim 16", "depth 2", "heads 2"]),  # all at once
    ],
)
def test_init_refuses_a_model_of_another_shape_by_its_flag(
    finished, image_folder, tmp_path, given, named
):
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--out", tmp_path / "run"]
    with pytest.raises(randsac.UserError, match="--init") as error:
        run_here(*flags, *given.split(), "--init", finished / "checkpoint.pt")
    for word in named:
        assert re.search(rf"(?<!\w){word}(?!\w)", str(error.value)), error.value
    assert not (tmp_path / "run").exists()


def test_init_refuses_what_is_no_checkpoint(image_folder, tmp_path):
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--out", tmp_path / "run"]
    (tmp_path / "text.pt").write_text("no checkpoint")
    for path in (tmp_path / "nowhere.pt", tmp_path / "text.pt", tmp_path):
        with pytest.raises(randsac.UserError, match=re.escape(str(path))):
            run_here(*flags, "--init", path)
    assert not (tmp_path / "run").exists()


# --- several processes


def other_process(process, world, file, images, ranks):
    """One of `world` processes: gradients of its share of the batch, averaged over all."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=process, world_size=world
    )
    model = random_model(micro(segments="blob", hierarchy=(5, 2)))
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    wrapped(images[process::world], ranks[process::world]).backward()
    if process == 0:
        torch.save([p.grad for p in model.parameters()], f"{file}.gradients")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path):
    config = micro(segments="blob", hierarchy=(5, 2))
    model = random_model(config)
    images = torch.randn(8, 3, 16, 16).double()
    ranks = randsac.sample_ranks(config, 8)
    model(images, ranks).backward()
    rest = (2, str(tmp_path / "meet"), images, ranks)
    both = [forks.Process(target=other_process, args=(i, *rest)) for i in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(100)
    for p, gradient in zip(model.parameters(), torch.load(tmp_path / "meet.gradients")):
        assert torch.allclose(p.grad, gradient, atol=1e-10)


# The command, with crops that do not depend on the process: whole images. Its strategy is given by
# flags: single patches in raster order, which are the same for every sample.
WHOLE_IMAGES = """
import randsac
randsac.augment = lambda images, size, *_: randsac.normalize(images, size)
randsac.run_command(randsac.main)
"""
SAME_EVERYWHERE = ["--segments", "patch", "--order", "raster", "--epochs", "2"]


def torchrun(script, arguments, cwd):
    """Two processes, on this machine alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words += ["--master-addr", "127.0.0.1", "--master-port", port, str(script)]
    words += [str(argument) for argument in arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        words, cwd=cwd, env=env, check=False, capture_output=True, text=True, timeout=300
    )


def test_torchrun_trains_what_one_process_trains(tmp_path, image_folder, monkeypatch):
    script = tmp_path / "whole_images.py"
    script.write_text(WHOLE_IMAGES)
    flags = [*MICRO_FLAGS, *SAME_EVERYWHERE, "--data-dir", image_folder]
    result = torchrun(script, [*flags, "--out", "two"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "two: 8 steps of 16 images, 2 x cpu" in result.stdout
    # The first process speaks for all, and says how to go on.
    assert result.stdout.count("trained.") == 1
    assert result.stdout.count("--resume") == 1 and "2 processes" in result.stdout

    monkeypatch.setattr(randsac, "augment", lambda x, size, *_: randsac.normalize(x, size))
    run_here(*flags, "--out", tmp_path / "one")
    run_here(*flags, "--out", tmp_path / "none", "--max-steps", 1, "--lr", 1e-9)
    start = weights(tmp_path / "none")
    one = weights(tmp_path / "one")
    two = weights(tmp_path / "two")
    for name in one:
        mine = one[name]
        difference = mine - two[name]
        if "key_value.bias" in name:  # no key's bias changes any output, so its gradient is noise
            difference = difference[16:]
            mine = mine[16:]
        moved = (one[name] - start[name]).abs().max()
        assert moved > 1e-4
        assert difference.abs().max() < 0.01 * moved, name
    assert two.keys() == one.keys()
    assert rows(tmp_path / "two")[-1]["step"] == 8
    for ours, other in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert ours["held_out_loss"] == pytest.approx(other["held_out_loss"], rel=1e-4)
        assert ours["loss"] == pytest.approx(other["loss"], rel=0.2)  # of its own half
    # One process would go on as another run.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(randsac.UserError, match="began with 2 processes, not 1"):
        run_here("--resume", "two")


@pytest.mark.long
def test_two_processes_resume_bit_for_bit(tmp_path, image_folder):
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 2]
    program = ROOT / "randsac.py"
    assert torchrun(program, [*flags, "--out", "whole"], tmp_path).returncode == 0
    # A process that falls over in step 6 of 8, after a checkpoint of step 4.
    falls = WHOLE_IMAGES.replace("randsac.augment", "randsac.unused").replace(
        "randsac.run_command",
        "step = randsac.training_step\n"
        "def falling(*given):\n"
        "    assert given[5] < 6\n"
        "    return step(*given)\n"
        "randsac.training_step = falling\n"
        "randsac.run_command",
    )
    (tmp_path / "falls.py").write_text(falls)
    result = torchrun(tmp_path / "falls.py", [*flags, "--out", "parts"], tmp_path)
    assert result.returncode != 0
    assert randsac.load_checkpoint(tmp_path / "parts/checkpoint.pt")[0]["step"] == 4
    assert torchrun(program, ["--resume", "parts"], tmp_path).returncode == 0
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


LEFT_OVER = [
    {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"},
    {"WORLD_SIZE": "2"},
    {"RANK": "1", "LOCAL_RANK": "1"},
    {"RANK": "", "WORLD_SIZE": ""},
    {"RANK": "x"},
    {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "10.0.0.1"},
]


@pytest.mark.parametrize("left", LEFT_OVER)
def test_what_a_cluster_left_in_the_environment(left, finished, tmp_path, monkeypatch):
    """Either one process trains, or one line says what is set."""
    out = copied(finished, tmp_path)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    if left.get("WORLD_SIZE") in ("2", "8"):
        with pytest.raises(randsac.UserError, match="WORLD_SIZE.*torchrun"):
            run_here("--resume", out)
    else:
        assert run_here("--resume", out) == 0


def test_a_batch_that_does_not_divide_over_the_processes(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(randsac.UserError, match="--batch-size 32 does not divide over 3 proc"):
        run_here("--device", "cpu", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
