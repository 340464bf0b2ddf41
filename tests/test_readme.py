"""The README: its small commands print what it says, and the functions, flags and files that it names are there."""
import contextlib
import io
import re

import pytest
import torch
from conftest import ROOT

import randsac
import visualize

TEXT = (ROOT / "README.md").read_text()
PRINTED = re.findall(r"^\$ python -c '(.*)'\n((?:(?!\$ |```).*\n)+)", TEXT, re.M)


@pytest.mark.parametrize("code, output", PRINTED)
def test_a_command_prints_what_is_said(code, output, monkeypatch):
    monkeypatch.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue() == output


def test_commands_were_found():
    assert len(PRINTED) >= 6


def test_functions_and_flags_are_there():
    table = TEXT.partition("## The paper, line by line")[2].partition("Section and table numbers")[0]
    rows = [row.split("|")[2:4] for row in table.splitlines() if row.startswith("| ")][1:]
    names = re.findall(r"`([A-Za-z_.]+)`", "".join(row[0] for row in rows))
    assert len(names) > 20
    for name in {*names} - {"raster"}:  # a value of --order
        place = randsac
        for part in [] if name.endswith(".py") else name.split("."):
            place = getattr(place, part)
    sources = "probe.py", "visualize.py", "results/evidence.py", "tests/assignment.py"
    known = randsac.make_parser("").format_help() + "".join((ROOT / source).read_text() for source in sources)
    for flag in set(re.findall(r"(?<![\w-])--[a-z0-9]+(?:-[a-z0-9]+)*(?![\w-])", TEXT)) - {"--nproc-per-node"}:
        assert flag in known, flag
    assert "--help" in TEXT


def test_files_and_pictures_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 10
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link
    for name in re.findall(r"`([a-z-]+)\.(?:png|gif)`", TEXT):
        assert name in visualize.PICTURES, name


def test_the_model_that_comes_with_the_project():
    path = ROOT / "assets/nano-cifar10/checkpoint.pt"
    saved, config = randsac.load_checkpoint(path)
    assert path.stat().st_size < 5e6 and {v.dtype for v in saved["model"].values()} == {torch.float16}
    model, _ = randsac.RandSAC.load(path)
    images = randsac.normalize(randsac.draw_shapes(64, 32, 5)[0], 32)
    with torch.no_grad():
        trained, untrained = (randsac.batch_loss(m, images, config, randsac.seeded("cpu", 0)).item()
                              for m in (model, randsac.RandSAC(config)))
    assert trained < 0.8 < untrained  # predicting zero is 0.979: what it learned helps with images of another kind
