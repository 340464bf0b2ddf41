"""The command randsac.py: flags, runs, resuming, several processes."""
import dataclasses
import json
import math
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import MICRO_FLAGS, ROOT, command, fails_in_one_line, forks, micro, random_model, run_here

import randsac


def weights(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["model"]


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- flags

def test_defaults_are_filled_by_dataset_model_and_strategy():
    assert dataclasses.asdict(randsac.Config()).items() >= dict(
        model="nano", dim=128, depth=6, heads=4, hierarchy=(16, 4), target="normalized").items()
    assert randsac.Config(dataset="cifar10").model == "small" and randsac.Config(dim=64, heads=2).depth == 6
    assert randsac.Config(segments="blob").hierarchy == (11, 5) and randsac.Config(segments="mae").hierarchy == ()
    assert randsac.Config(model="base").dim == 768 and randsac.Config(model="tiny", depth=3).depth == 3
    assert {"model", "dim", "hierarchy"} <= set(randsac.Config().filled)


def test_every_field_is_a_flag_with_help():
    text = " ".join(randsac.make_parser("").format_help().split())
    for field in dataclasses.fields(randsac.Config):
        assert f"--{field.name.replace('_', '-')}" in text and field.metadata["help"]
    flags = vars(randsac.make_parser("").parse_args("--hierarchy 64 16 4 --no-skip --lr 1e-3 --patch-size 4".split()))
    assert flags == dict(hierarchy=[64, 16, 4], skip=False, lr=1e-3, patch_size=4)
    assert randsac.Config(**flags).hierarchy == (64, 16, 4)


WRONG = [("patch_size", 5, "does not divide"), ("patch_size", 32, "nothing is left"), ("hierarchy", (8,), "squares"),
         ("hierarchy", (9,), "squares"), ("hierarchy", (4, 16), "descend"), ("hierarchy", (16, 16), "descend"),
         ("hierarchy", (), "at least one"), ("hierarchy", (1,), "from 2"), ("hierarchy", ("a",), "int"),
         ("heads", 3, "does not divide"), ("dim", 130, "multiple of 4"), ("dim", 0, "from 4"), ("depth", 0, "from 1"),
         ("depth", 1.5, "int"), ("lr", -1.0, "from"), ("lr", math.nan, "from"), ("lr", math.inf, "from"),
         ("lr", "fast", "float"), ("epochs", 0, "from 1"), ("batch_size", -4, "from 1"), ("warmup", 1.0, "to 0.9"),
         ("crop_scale", 0.0, "from 0.01"), ("seed", -1, "from 0"), ("dataset", "mnist", "one of"), ("model", "huge", "one of"),
         ("segments", "stripes", "one of"), ("order", "spiral", "one of"), ("target", "tokens", "one of"),
         ("device", "tpu", "one of"), ("skip", 1, "bool"), ("image_size", True, "int"), ("save_every", -1, "from 0")]


@pytest.mark.parametrize("name, value, words", WRONG)
def test_a_wrong_setting_is_refused_with_its_reason(name, value, words):
    with pytest.raises(ValueError) as error:
        randsac.Config(**{name: value})
    assert words in str(error.value) and f"--{name.replace('_', '-')}" in str(error.value).replace("one patch fills", "--patch-size")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [dict(segments="patch", hierarchy=(16,)), dict(segments="mae", hierarchy=(4,)),
                                      dict(segments="blob", hierarchy=(65,)), dict(segments="blob", hierarchy=(5, 11))])
def test_a_wrong_hierarchy_is_refused(settings):
    with pytest.raises(ValueError, match="--hierarchy"):
        randsac.Config(**settings)


def test_the_command_refuses_in_one_line(tmp_path):
    fails_in_one_line(command("randsac.py", "--patch-size", 5, cwd=tmp_path), "--patch-size", "choose")
    assert list(tmp_path.iterdir()) == []
    if not torch.cuda.is_available():
        fails_in_one_line(command("randsac.py", "--device", "cuda", cwd=tmp_path), "--device cuda")


# --- a run

def test_a_run_leaves_config_metrics_and_checkpoint(tmp_path, image_folder, capsys):
    out = tmp_path / "run"
    assert run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--out", out, "--epochs", 5) == 0
    said = capsys.readouterr().out
    assert f"probe.py {out}/checkpoint.pt" in said and "visualize.py" in said and "minutes" in said
    assert json.loads((out / "config.json").read_text())["epochs"] == 5
    log = rows(out)
    assert [r["step"] for r in log] == [4, 8, 10, 12, 16, 20]  # at the end of each epoch of 4 steps, and every 10 steps
    assert all({"step", "epoch", "loss", "lr", "images_per_s"} <= r.keys() for r in log)
    assert [r["epoch"] for r in log if "held_out_loss" in r] == [1, 2, 3, 4, 5]
    assert log[-1]["lr"] < log[1]["lr"] and {p.name for p in out.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    model, config = randsac.RandSAC.load(out / "checkpoint.pt")
    assert config.dim == 16 and not model.training and config.hierarchy == (16, 4)


def test_without_a_name_a_run_gets_a_fresh_one(tmp_path, image_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 1) == 0
    run, = (tmp_path / "runs").iterdir()
    assert run.name.startswith("folder-square-")


def test_loss_falls(tmp_path, image_folder):
    run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--out", tmp_path / "run", "--epochs", 30, "--lr", 0.05)
    log = [r["held_out_loss"] for r in rows(tmp_path / "run") if "held_out_loss" in r]
    assert log[-1] < 0.9 * log[0]


def test_same_seed_same_weights_whatever_the_folder_is_called(tmp_path, image_folder):
    (tmp_path / "other name").symlink_to(image_folder)
    for name, data, seed in [("a", image_folder, 0), ("b", tmp_path / "other name", 0), ("c", image_folder, 1)]:
        run_here(*MICRO_FLAGS, "--data-dir", data, "--out", tmp_path / name, "--epochs", 2, "--seed", seed)
    assert same_weights(tmp_path / "a", tmp_path / "b") and not same_weights(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("segments", ["patch", "square", "blob", "scatter", "mae"])
def test_resuming_after_every_step_gives_the_same_run(tmp_path, image_folder, segments, monkeypatch):
    """A run stopped by a signal after each step and resumed ends in the weights of one that was never disturbed."""
    flags = [*MICRO_FLAGS, "--data-dir", image_folder, "--epochs", 2, "--segments", segments]
    run_here(*flags, "--out", tmp_path / "whole")
    step = randsac.training_step

    def interrupted(*args):
        os.kill(os.getpid(), 15)
        return step(*args)

    monkeypatch.setattr(randsac, "training_step", interrupted)
    assert run_here(*flags, "--out", tmp_path / "parts") == 128 + 15
    for _ in range(7):
        code = run_here("--out", tmp_path / "parts", "--resume")
    assert code == 128 + 15 and rows(tmp_path / "parts")[-1]["step"] == 8
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    whole, parts = ({r["step"]: r.get("held_out_loss") for r in rows(tmp_path / n)} for n in ("whole", "parts"))
    assert whole[8] == parts[8] and whole[4] == parts[4]
    assert run_here("--out", tmp_path / "parts", "--resume") == 0  # nothing left to do


def test_resume_refuses_what_would_change_the_run_by_name(tmp_path, image_folder):
    out = tmp_path / "run"
    run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--out", out, "--epochs", 1)
    before = (out / "checkpoint.pt").read_bytes()
    for flag in ("--lr 0.5", "--seed 3", "--epochs 9", "--segments blob", "--no-skip", "--hierarchy 4"):
        with pytest.raises(ValueError, match=flag.split()[0].replace("--no-", "--")):
            run_here("--out", out, "--resume", *flag.split())
    with pytest.raises(ValueError, match="--resume"):
        run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--out", out)  # a run is never overwritten
    (tmp_path / "model alone").mkdir()
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    torch.save({"config": saved["config"], "model": saved["model"]}, tmp_path / "model alone/checkpoint.pt")
    with pytest.raises(ValueError, match="only a model"):
        run_here("--resume", "--out", tmp_path / "model alone")
    with pytest.raises(ValueError, match="holds a run"):
        run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--out", tmp_path / "model alone")
    shutil.copytree(image_folder / "train", tmp_path / "images/train")
    next((tmp_path / "images/train").rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="71 training images, but the run began with 72"):
        run_here("--resume", "--out", out, "--data-dir", tmp_path / "images")
    with pytest.raises(ValueError, match="--out"):
        run_here("--resume")
    with pytest.raises((ValueError, OSError), match="nowhere"):
        run_here("--resume", "--out", tmp_path / "nowhere")
    assert before == (out / "checkpoint.pt").read_bytes()
    assert run_here("--out", out, "--resume", "--save-every", 3, "--data-dir", image_folder) == 0  # these may change


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path, image_folder):
    out = tmp_path / "run"
    run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--out", out, "--epochs", 2)
    good = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(good + '{"step": 9, "loss": 1}\n{"step": 10, "lo')
    assert run_here("--out", out, "--resume") == 0
    assert (out / "metrics.jsonl").read_text() == good


@pytest.mark.parametrize("n", [0, 7, 2000, 3999, 4000, 10_000])
@pytest.mark.parametrize("sort", [False, True])  # as those of shapes (there are 4,000), as those of a folder
def test_held_out_images_are_of_every_class(n, sort, monkeypatch):
    labels = torch.arange(n) % 10
    labels = labels.sort().values if sort or n == 10_000 else labels
    images = labels.byte().view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    monkeypatch.setattr(randsac, "load_images", lambda config, train: (images if not train else torch.zeros(
        4, 3, 16, 16, dtype=torch.uint8), labels, []))
    _, held_out, *_ = randsac.set_up(micro(batch_size=4), None, torch.device("cpu"), 0, 1)
    assert held_out[:, 0, 0, 0].unique().tolist() == list(range(min(n, 10)))
    assert min(n, randsac.HELD_OUT / 2) <= len(held_out) < 2 * randsac.HELD_OUT


def test_too_few_images_for_a_batch(tmp_path, image_folder):
    with pytest.raises(ValueError, match="--batch-size"):
        run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--out", tmp_path / "run", "--batch-size", 73)


def test_learning_rate_rises_then_falls():
    config = micro(lr=1e-3, batch_size=512, warmup=0.1)
    rates = [randsac.learning_rate(t, 100, config) for t in range(100)]
    assert max(rates) == pytest.approx(2e-3) and rates.index(max(rates)) == 10  # per 256 images, 512 in the batch
    assert all(a < b for a, b in zip(rates[:10], rates[1:11])) and all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert 0 < rates[0] < 2.5e-4 and 0 < rates[-1] < 1e-5


def test_weight_decay_is_on_matrices_only():
    model = randsac.RandSAC(micro())
    decayed, free = randsac.make_optimizer(model, model.config).param_groups
    names = {p: n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] > 0 == free["weight_decay"] and len(decayed["params"]) + len(free["params"]) == len(names)
    assert all(p.ndim == 2 for p in decayed["params"]) and model.skip in set(free["params"])


# --- several processes

def other_process(process, world, file, images, ranks):
    """One of `world` processes: gradients of its share of the batch, averaged by DistributedDataParallel."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=process, world_size=world)
    model = random_model(micro(segments="blob", hierarchy=(5, 2)))
    nn = torch.nn.parallel.DistributedDataParallel(model)
    nn(images[process::world], ranks[process::world]).backward()
    if process == 0:
        torch.save([p.grad for p in model.parameters()], f"{file}.gradients")
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path):
    config = micro(segments="blob", hierarchy=(5, 2))
    model, images, ranks = random_model(config), torch.randn(8, 3, 16, 16).double(), randsac.sample_ranks(config, 8)
    model(images, ranks).backward()
    both = [forks.Process(target=other_process, args=(i, 2, str(tmp_path / "meet"), images, ranks)) for i in range(2)]
    [process.start() for process in both], [process.join(100) for process in both]
    for p, gradient in zip(model.parameters(), torch.load(tmp_path / "meet.gradients")):
        assert torch.allclose(p.grad, gradient, atol=1e-10)


def one_is_told_to_stop(process, world, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=process, world_size=world)
    signals = [15] * (process == 1)
    stops = [step for step in range(1, 21) if randsac.any_process(signals, step, torch.device("cpu"), world)]
    torch.save(stops, f"{file}.{process}")
    dist.destroy_process_group()


def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path):
    both = [forks.Process(target=one_is_told_to_stop, args=(i, 2, str(tmp_path / "meet"))) for i in range(2)]
    [process.start() for process in both], [process.join(100) for process in both]
    assert [torch.load(tmp_path / f"meet.{i}") for i in range(2)] == [[10, 20]] * 2


def test_torchrun_trains_one_run(tmp_path, image_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr",
                             "127.0.0.1", "--master-port", port, str(ROOT / "randsac.py"), *MICRO_FLAGS,
                             "--data-dir", str(image_folder), "--out", "run", "--epochs", "2"], cwd=tmp_path,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert rows(tmp_path / "run")[-1]["step"] == 8 and "2 x cpu" in result.stdout


# --- nothing in a step waits for the device

class HostReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes every operation by which the host reads a value off the device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "aten.equal", "masked_select")):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("segments", ["patch", "square", "blob", "scatter", "mae"])
def test_a_step_reads_no_value_on_the_host(segments):
    config = micro(segments=segments, hierarchy={"square": (16, 4), "blob": (11, 5), "scatter": (9,)}.get(segments))
    model = randsac.RandSAC(config)
    optimizer, batch = randsac.make_optimizer(model, config), torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    randsac.training_step(model, optimizer, batch, config, 0, 10)  # the first step makes the optimizer's state
    with HostReads() as reads:
        randsac.training_step(model, optimizer, batch, config, 1, 10)
    assert reads.seen == []
    with HostReads() as reads:
        batch.sum().item()
    assert reads.seen  # the test can fail


def test_a_gradient_that_is_not_finite_shows_in_the_loss_of_its_step():
    config = micro()
    model = randsac.RandSAC(config)
    optimizer, batch = randsac.make_optimizer(model, config), torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    assert randsac.training_step(model, optimizer, batch, config, 0, 10).isfinite()
    model.embed.bias.register_hook(lambda gradient: gradient / 0)
    assert not randsac.training_step(model, optimizer, batch, config, 1, 10).isfinite()


def test_out_of_memory_is_said_in_one_line(capsys):
    def main(arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(SystemExit) as ended:
        randsac.run_command(main)
    assert ended.value.code == 2 and "--batch-size" in capsys.readouterr().err


class Recorder(torch.nn.Module):
    """Keeps what a training step shows the model."""

    def __init__(self):
        super().__init__()
        self.weight, self.shown = torch.nn.Parameter(torch.ones(2, 2)), []

    def forward(self, images, ranks, trim):
        self.shown.append((images, ranks))
        return self.weight.sum()


@pytest.mark.parametrize("segments", ["patch", "square", "blob", "scatter", "mae"])
def test_crops_and_orders_are_fresh_at_each_step_and_in_each_process(segments):
    config, recorder = micro(segments=segments, hierarchy={"blob": (5, 2), "scatter": (5,)}.get(segments)), Recorder()
    optimizer, batch = randsac.make_optimizer(recorder, config), torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    for step, process in [(0, 0), (0, 0), (1, 0), (2, 0), (1, 1)]:
        randsac.training_step(recorder, optimizer, batch, config, step, 10, process)
    first, *others = recorder.shown
    assert all(torch.equal(a, b) for a, b in zip(first, others[0]))  # the same step is the same, so that a run can resume
    for i, one in enumerate(others):
        assert not any(torch.equal(a, b) for two in others[:i] for a, b in zip(one, two))
