"""What the tests share. `pytest` runs the quick ones, `pytest -m long` those that take minutes,
`pytest -m bench -s` the timings."""

import gc
import io
import multiprocessing
import os
import runpy
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import randsac

# A server that has imported torch, from which other processes are forked: an import takes seconds.
os.environ["PYTHONPATH"] = str(ROOT)
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["randsac"])


def pytest_configure(config):
    if config.option.markexpr == "":
        config.option.markexpr = "not long and not bench"
    if config.option.markexpr != "bench":
        torch.set_num_threads(1)  # models this small gain nothing by more, and lose to other work
    config.addinivalue_line("markers", "long: takes minutes")
    config.addinivalue_line("markers", "bench: measures speed; run with -s")
    for number in range(1, 9):
        config.addinivalue_line("markers", f"exercise{number}: grades exercise {number} alone")


def pytest_collection_finish(session):
    gc.freeze()  # what torch and pytest hold stays: not to look through it again saves seconds
    gc.set_threshold(50_000)


@pytest.fixture(autouse=True, scope="session")
def elsewhere(tmp_path_factory):
    """Runs and decoded images lie in the current directory: not in the project's, while testing."""
    os.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(autouse=True)
def alike(tmp_path, monkeypatch):
    """Each test has a directory of its own, and the same random numbers whatever ran before it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def micro(**settings):
    """A Config whose model is as small as one can be."""
    smallest = {"dim": 16, "depth": 2, "heads": 2, "decoder_depth": 2, "image_size": 16}
    return randsac.Config(**{**smallest, "device": "cpu", **settings})


def random_hierarchy(rng, segments, grid):
    if segments in ("patch", "mae"):
        return ()
    possible = range(2, grid**2 + 1)
    if segments == "square":
        possible = [root**2 for root in range(2, grid + 1) if grid % root == 0]
    levels = min(int(rng.integers(1, 4)), len(possible))
    counts = []
    for count in sorted(rng.choice(possible, levels, replace=False).tolist(), reverse=True):
        if segments != "square" or not counts or counts[-1] % count == 0:  # squares in squares
            counts.append(count)
    return tuple(counts)


def random_config(rng, **settings):
    """A random valid Config: every strategy, hierarchy, grid, order, last rank, skip setting and
    target, where `settings` (dim, order, last rank) say nothing else."""
    grid = int(rng.choice([2, 3, 4, 6, 8]))
    patch = int(rng.choice([1, 2, 3]))
    segments = str(rng.choice(["patch", "square", "blob", "scatter", "mae"]))
    if segments == "mae" and settings.get("order") == "raster":
        segments = "patch"
    hierarchy = random_hierarchy(rng, segments, grid)
    drawn = {
        "image_size": grid * patch,
        "patch_size": patch,
        "segments": segments,
        "hierarchy": hierarchy,
        "skip": bool(rng.integers(2)),
        "target": str(rng.choice(["normalized", "pixels"])),
        "depth": int(rng.integers(1, 4)),
        "decoder_depth": int(rng.integers(1, 3)),
    }
    if segments != "mae":  # it has no other order
        drawn["order"] = str(rng.choice(["random", "raster"]))
        count = hierarchy[0] if hierarchy else grid**2
        drawn["last_rank"] = int(rng.integers(count - 1)) if rng.integers(2) else 0
    return micro(**{**drawn, **settings})


def random_model(config, seed=0):
    """A model with random weights everywhere, in norms and skips too, so that no path is closed by
    the zeros that it begins with."""
    model = randsac.RandSAC(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
            drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(scale * drawn)
    return model


def training(config, build=randsac.RandSAC):
    """-> model, optimizer, scaler, a batch, config: what training_step takes before the step."""
    device = torch.device(config.device)
    model = build(config).to(device)
    optimizer = randsac.make_optimizer(model, config)
    small = randsac.pick_precision(config.precision, device) == "float16"
    scaler = torch.amp.GradScaler(device.type, enabled=small)
    shape = (config.batch_size, 3, config.image_size, config.image_size)
    batch = torch.randint(0, 256, shape, dtype=torch.uint8)
    return model, optimizer, scaler, batch.to(device), config


def run_path(model, images, ranks, trim):
    """-> predictions [B,n,PPC], their ranks [B,n], by either path."""
    if not trim:
        return model.predict(images, ranks), ranks
    tokens = randsac.patchify(images, model.config.patch_size)
    prediction, which = model.decode_trimmed(tokens, ranks)
    return prediction, ranks.gather(1, which)


def assert_no_gradient_leaks(model, images, ranks, step, trim):
    """Of predictions at these steps [B,1] no gradient reaches their own or a later segment: it is
    exactly zero there, and not zero at every earlier token. -> the predictions, their ranks."""
    images = images.clone().requires_grad_()
    prediction, rank = run_path(model, images, ranks, trim)
    asked = rank == step
    assert torch.equal(asked.any(1), (ranks > 0).any(1))  # a sample of one segment predicts nothing
    (gradient,) = torch.autograd.grad(prediction[asked].square().sum(), images)
    gradient = randsac.patchify(gradient, model.config.patch_size).abs().amax(-1)  # [B,N]
    assert (gradient[ranks >= step] == 0).all(), model.config
    assert (gradient[(ranks < step) & asked.any(1, keepdim=True)] > 0).all(), model.config
    return prediction.detach(), rank


class HostReads(TorchDispatchMode):
    """Notes what makes the host wait for a device: values read, and shapes that values decide."""

    waits = ("_local_scalar_dense", "nonzero", "equal.default", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        parts = [x for arg in args if isinstance(arg, (list, tuple)) for x in arg]
        masks = [x for x in parts if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        by_mask = "index" in str(func) and len(masks) > 0
        if by_mask or any(name in str(func) for name in self.waits):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def run_here(*arguments, main=randsac.main):
    """A command in this process (an import of torch takes seconds) -> its exit code."""
    return main([str(argument) for argument in arguments])


def go(*arguments, program=None, stream=io.StringIO):
    """The same with all that is around it; it may be another program, a file -> its exit code, all
    that it has said."""
    said = stream()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(program), *map(str, arguments)])
        patch.setattr(sys, "stdout", said)
        patch.setattr(sys, "stderr", said)
        try:
            if program is None:
                randsac.run_command(randsac.main)
            runpy.run_path(str(program), run_name="__main__")
        except SystemExit as ended:
            said.seek(0)
            return ended.code, said.read()
        finally:
            signal.signal(signal.SIGTERM, before)


def one_line(code, text, *words):
    """A command ended with code 2, and with one line that has these words."""
    assert code == 2 and "Traceback" not in text and text.count("error: ") == 1, (code, text)
    line = text.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(str(word) in line for word in words), line


def refusal(act, *arguments, **settings):
    """The line with which this is refused."""
    with pytest.raises(randsac.UserError) as error:
        act(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


MICRO_FLAGS = shlex.split(
    "--dim 16 --depth 2 --heads 2 --decoder-depth 1 --image-size 8 --patch-size 2 --batch-size 16 "
    "--device cpu --dataset folder"
)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """train/CLASS/ and test/CLASS/ of small noisy images: 3 classes, 24 + 8 images each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in {"train": 24, "test": 8}.items():
        for label, name in enumerate(["ant", "bee", "cat"]):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (10, 12, 3)) + np.eye(3)[label] * 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root
