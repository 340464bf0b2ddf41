"""What the tests share. `pytest` runs the quick ones, `pytest -m long` those that take minutes,
`pytest -m bench -s` the timings."""

import gc
import multiprocessing
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import randsac

# A server that has imported torch, from which other processes are forked: an import takes seconds.
os.environ["PYTHONPATH"] = str(ROOT)
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["randsac"])

MARKERS = {
    "long": "takes minutes; run with -m long",
    "bench": "measures speed; run with -m bench -s",
}


def pytest_configure(config):
    if "bench" not in config.getoption("-m"):
        torch.set_num_threads(1)  # models this small gain nothing by more, and lose to other work
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    for number in range(1, 9):
        meaning = f"grades exercise {number} of the assignment alone"
        config.addinivalue_line("markers", f"exercise{number}: {meaning}")


def pytest_collection_finish(session):
    gc.freeze()  # what torch and pytest hold stays: not to look through it again saves seconds
    gc.set_threshold(50_000)


def pytest_collection_modifyitems(config, items):
    for name, meaning in MARKERS.items():
        if name in config.getoption("-m"):
            continue
        for item in items:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=meaning))


@pytest.fixture(autouse=True, scope="session")
def elsewhere(tmp_path_factory):
    """Runs and decoded images lie in the current directory: not in the project's, while testing."""
    os.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(autouse=True)
def fixed_seed():
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
    target, where `settings` say nothing else."""
    grid = int(rng.choice([2, 3, 4, 6, 8]))
    patch = int(rng.choice([1, 2, 3]))
    strategies = ["patch", "square", "blob", "scatter", "mae"]
    if settings.get("order") == "raster":
        strategies.remove("mae")
    segments = str(rng.choice(strategies))
    drawn = {
        "image_size": grid * patch,
        "patch_size": patch,
        "segments": segments,
        "hierarchy": random_hierarchy(rng, segments, grid),
        "order": str(rng.choice(["random", "raster"])),
        "skip": bool(rng.integers(2)),
        "target": str(rng.choice(["normalized", "pixels"])),
        "depth": int(rng.integers(1, 4)),
        "decoder_depth": int(rng.integers(1, 3)),
    }
    if settings.get("segments", segments) == "mae":
        drawn["order"] = "random"  # it has no other
    chosen = {**drawn, **settings}

    # Where there are fewer than three segments, no last rank changes anything.
    count = (chosen["image_size"] // chosen["patch_size"]) ** 2
    if chosen["hierarchy"]:
        count = chosen["hierarchy"][0]
    cut = bool(rng.integers(2)) and count > 2 and chosen["segments"] != "mae"
    if cut and "last_rank" not in settings:
        chosen["last_rank"] = int(rng.integers(1, count - 1))
    return micro(**chosen)


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


def command(script, *arguments, cwd, timeout=600, **kwargs):
    """Runs `python SCRIPT ARGUMENTS` in a process of its own, on one thread -> CompletedProcess
    with its output as text."""
    words = [sys.executable, str(ROOT / script), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    kwargs |= {"cwd": cwd, "timeout": timeout, "env": env}
    return subprocess.run(words, check=False, capture_output=True, text=True, **kwargs)


def fails_in_one_line(result, *words):
    """The command ended with code 2, without a traceback, and with one line that says `words`."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    *before, line = result.stderr.strip().splitlines()
    assert line.startswith("error: "), result.stderr
    assert not any("error: " in other for other in before), result.stderr
    for word in words:
        assert word in line, line


def run_here(*arguments):
    """randsac.main in this process (an import of torch takes seconds) -> its exit code."""
    return randsac.main([str(argument) for argument in arguments])


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
