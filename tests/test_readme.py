"""The three README files: small commands print what stands below them, and every command, flag,
function, file and picture that they name is there."""

import contextlib
import io
import json
import re
import shlex
import statistics
import sys

import assignment
import pytest
import torch
from conftest import ROOT

import probe
import randsac
import visualize

sys.path.insert(0, str(ROOT / "results"))
import evidence

README = (ROOT / "README.md").read_text()
PAGES = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "tests/README.md", "results/README.md")
}
PRINTED = re.findall(r"^\$ python -c '(.*)'\n((?:(?!\$ |```).*\n)+)", README, re.MULTILINE)
FLAG = r"(?<![\w-])--[a-z0-9]+(?:-[a-z0-9]+)*(?![\w-])"
FOREIGN = {"--nproc-per-node"}  # torchrun's


@pytest.mark.parametrize("code, output", PRINTED)
def test_a_command_prints_what_is_said(code, output, monkeypatch):
    monkeypatch.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})  # noqa: S102 (the README is ours)
    assert printed.getvalue() == output


def test_commands_were_found():
    assert len(PRINTED) >= 6


def flags_of(main, *ways):
    """-> the flags in the --help of a program, and of its subcommands."""
    found = set()
    for way in ((), *ways):
        with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
            main([*way, "--help"])
        found |= set(re.findall(FLAG, printed.getvalue()))
    return found


@pytest.fixture(scope="module")
def flags():
    """-> {program: the flags in its --help}, of subcommands too."""
    found = {
        "randsac.py": flags_of(randsac.main),
        "probe.py": flags_of(probe.main),
        "visualize.py": flags_of(visualize.main),
        "results/evidence.py": flags_of(evidence.main, ["run"], ["report"]),
        "tests/assignment.py": flags_of(assignment.main),
    }
    assert all(found.values())
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_is_one_of_some_program(page, flags):
    known = set().union(*flags.values()) | FOREIGN
    used = set(re.findall(FLAG, PAGES[page]))
    assert used
    assert used <= known, used - known


@pytest.mark.parametrize("page", PAGES)
def test_a_command_has_only_flags_of_its_program(page, flags):
    lines = re.findall(
        r"(?:python|torchrun --nproc-per-node \d+) (\S+\.py)([^\n`|#&]*)", PAGES[page]
    )
    assert lines
    for program, rest in lines:
        assert program in flags, program
        used = set(re.findall(FLAG, rest))
        assert used <= flags[program], (program, used - flags[program])


def test_functions_are_there():
    table = README.partition("## The paper, line by line")[2].partition("Tables 1 to 6")[0]
    rows = [row.split("|")[2] for row in table.splitlines() if row.startswith("| ")][1:]
    steps = re.findall(r"Read (.*?)\. Look", README, re.DOTALL)
    names = re.findall(r"`([A-Za-z_.]+)`", "".join([*rows, *steps]))
    assert len(names) > 20
    for name in {*names} - {"raster", "linear"}:  # a value of --order; a function of probe.py
        place = randsac
        for part in [] if name.endswith(".py") else name.split("."):
            place = getattr(place, part)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_are_there(page):
    links = re.findall(r"\]\(([^)#]+)\)", PAGES[page])
    for link in links:
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link
    for name in re.findall(r"`([a-z-]+)\.(?:png|gif)`", PAGES[page]):
        assert name in visualize.PICTURES, name


def test_paper_commands_make_a_configuration():
    table = README.partition("## The paper, line by line")[2].partition("Tables 1 to 6")[0]
    commands = [row.rsplit("|", 2)[1] for row in table.splitlines() if row.startswith("| ")]
    tried = 0
    for text in re.findall(r"`(--[^`]*)`", " ".join(commands)):
        if "--dim --depth" in text or text in ("--crop-scale",):  # names of flags alone
            continue
        given = vars(randsac.make_parser("").parse_args(shlex.split(text)))
        randsac.Config(**given)
        tried += 1
    assert tried > 10


def test_the_model_that_comes_with_the_project():
    path = ROOT / "assets/nano-cifar10/checkpoint.pt"
    saved, _, config = randsac.load_checkpoint(path)
    assert path.stat().st_size < 5e6
    assert {value.dtype for value in saved["model"].values()} == {torch.float16}
    model, _ = randsac.load_model(path)
    images = randsac.normalize(randsac.draw_shapes(64, 32, 5)[0], 32)
    losses = []
    for tried in (model, randsac.RandSAC(config)):
        with torch.no_grad():
            loss = randsac.batch_loss(tried, images, config, randsac.seeded("cpu", 0))
        losses.append(loss.item())
    # Predicting zero has 0.979: what it learned helps with images of another kind.
    assert losses[0] < 0.8 < losses[1]


def test_the_table_of_results_says_what_the_logs_say():
    part = README.partition("## What to expect")[2].partition("**Why do predictions")[0]
    table = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    names, _, *rows = table
    logs = {}
    for row in rows:
        folder = re.search(r"\]\((.*)\)", row[-1])[1]
        paths = sorted((ROOT / folder).rglob("probes.jsonl"))
        logs[folder] = [json.loads(line) for path in paths for line in path.open()]
    assert len(logs) == len(rows) >= 3

    everywhere = [found for probes in logs.values() for found in probes]
    for row, probes in zip(rows, logs.values()):
        for name, features, untrained, known in (
            ("LIN, kNN", "encoder", False, probes),
            ("untrained encoder", "encoder", True, probes),
            ("raw pixels", "pixels", False, everywhere),  # the same for every model
        ):
            lin, knn = row[names.index(name)].removesuffix(" %").split(", ")
            for shown, protocol in ((lin, "linear"), (knn, "knn")):
                kind = (features, untrained, protocol, probes[0]["dataset"])
                keys = ("features", "random_init", "protocol", "dataset")
                found = [one["top1"] for one in known if tuple(map(one.get, keys)) == kind]
                measured = [statistics.mean(found)]
                if len(found) > 1:
                    measured.append(statistics.stdev(found))
                numbers = [float(number) for number in shown.split(" ± ")]
                assert numbers == pytest.approx(measured, abs=0.0501), (shown, kind)
