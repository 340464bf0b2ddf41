"""What the tests share. `pytest` runs the quick ones; `pytest -m long` the long ones, `pytest -m bench -s` the timings."""
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import randsac  # noqa: E402

os.environ["PYTHONPATH"] = str(ROOT)  # for the process that has imported torch and that others are forked from
forks = multiprocessing.get_context("forkserver" if os.name == "posix" else None)
if os.name == "posix":  # Windows has none; there the tests of an exercise, which need none, still run
    forks.set_forkserver_preload(["randsac"])

MARKERS = {"long": "takes minutes; run with -m long", "bench": "measures speed; run with -m bench -s"}


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    for number in range(1, 8):
        config.addinivalue_line("markers", f"exercise{number}: grades exercise {number} of the assignment alone")


def pytest_collection_modifyitems(config, items):
    for name in MARKERS:
        if name not in config.getoption("-m"):
            for item in items:
                if item.get_closest_marker(name):
                    item.add_marker(pytest.mark.skip(reason=MARKERS[name]))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def micro(**settings):
    """A Config whose model is as small as one can be."""
    return randsac.Config(**{**dict(dim=16, depth=2, heads=2, decoder_depth=2, image_size=16, device="cpu"), **settings})


def random_config(rng, **settings):
    """A random valid Config over every strategy, hierarchy, order, grid, skip setting and target."""
    grid = int(rng.choice([2, 3, 4, 6, 8]))
    patch = int(rng.choice([1, 2, 3]))
    segments = str(rng.choice(["patch", "square", "blob", "scatter", "mae"]))
    hierarchy = ()
    if segments == "square":
        roots = [grid]
        while len(roots) < 4 and any(roots[-1] % r == 0 for r in range(2, roots[-1])):
            roots.append(int(rng.choice([r for r in range(2, roots[-1]) if roots[-1] % r == 0])))
        first = int(rng.integers(0, len(roots)))
        hierarchy = tuple(r * r for r in roots[first:])
    elif segments in ("blob", "scatter"):
        counts = rng.choice(np.arange(2, grid * grid + 1), min(int(rng.integers(1, 4)), grid * grid - 1), replace=False)
        hierarchy = tuple(sorted(map(int, counts), reverse=True))
    return micro(**{**dict(image_size=grid * patch, patch_size=patch, segments=segments, hierarchy=hierarchy,
                           order=str(rng.choice(["random", "raster"])), skip=bool(rng.integers(2)),
                           target=str(rng.choice(["normalized", "pixels"])), depth=int(rng.integers(1, 4)),
                           decoder_depth=int(rng.integers(1, 3))), **settings})


def random_model(config, seed=0):
    """A model with random weights everywhere, skip weights and norms too, so that no path is closed by its initial zeros."""
    model = randsac.RandSAC(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.5 if p.ndim < 2 else p.shape[-1] ** -0.5))
    return model


def command(script, *arguments, cwd, timeout=120, **kwargs):
    """Runs `python SCRIPT ARGUMENTS` in a process of its own, on one thread -> CompletedProcess with text output."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=cwd, timeout=timeout, env=env,
                          capture_output=True, text=True, **kwargs)


def fails_in_one_line(result, *words):
    """The command ended with code 2 and a line that says all `words`, and no traceback."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert "error: " in line and all(word in line for word in words), line


@contextlib.contextmanager
def signals_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_here(*arguments):
    """randsac.main in this process (an import of torch costs seconds) -> its exit code."""
    with signals_restored():
        return randsac.main([str(a) for a in arguments])


MICRO_FLAGS = ("--dim 16 --depth 2 --heads 2 --decoder-depth 1 --image-size 8 --patch-size 2 --batch-size 16 "
               "--device cpu --dataset folder").split()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """An ImageFolder of small noisy images: 3 classes, 24 + 8 images each."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, n in dict(train=24, test=8).items():
        for label, name in enumerate(["ant", "bee", "cat"]):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 120, (10, 12, 3)) + np.eye(3)[label] * 120
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root
