"""The three README files: small commands print what stands below them, and every command, flag,
function, file and picture that they name is there."""

import collections
import json
import re
import shlex
import shutil
import statistics

import pytest
import torch
from conftest import ROOT, go

import probe
import randsac
import visualize

NAMES = ("README.md", "tests/README.md", "results/README.md")
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
README = PAGES["README.md"]
PRINTED = re.findall(r"^\$ python -c '(.*)'\n((?:(?!\$ |```).*\n)+)", README, re.MULTILINE)
FLAG = r"(?<![\w-])--[a-z0-9]+(?:-[a-z0-9]+)*(?![\w-])"
FOREIGN = {"--nproc-per-node"}  # torchrun's
PROGRAMS = ["randsac.py", "probe.py", "visualize.py", "tests/assignment.py", "results/speed.py"]
COMMANDS = [(program,) for program in PROGRAMS]
COMMANDS += [("results/evidence.py", word) for word in ("run", "report")]


def test_commands_print_what_is_said(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert len(PRINTED) >= 3
    for code, output in PRINTED:
        exec(code, {})  # noqa: S102 (the README is ours)
        assert capsys.readouterr().out == output


@pytest.fixture(scope="module")
def flags():
    """-> {program: the flags in its --help}, of subcommands too."""
    found = collections.defaultdict(set)
    for program, *words in COMMANDS:
        code, text = go(*words, "--help", program=ROOT / program)
        assert code == 0
        found[program] |= {*re.findall(FLAG, text)}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_is_one_of_its_program(page, flags):
    known = set().union(*flags.values()) | FOREIGN
    used = set(re.findall(FLAG, PAGES[page]))
    assert used
    assert used <= known, used - known

    # And each stands behind its own program, but for mine.py, the reader's.
    start = r"(?:python|torchrun --nproc-per-node \d+)"
    lines = re.findall(start + r" (?!mine)(\S+\.py)([^\n`|#&]*)", PAGES[page])
    assert lines
    for program, rest in lines:
        used = set(re.findall(FLAG, rest))
        assert used <= flags[program], (program, used - flags[program])


def test_functions_are_there():
    steps = re.findall(r"Read (.*?)\.\s+Look", README, re.DOTALL)
    names = re.findall(r"`([A-Za-z_.]+)`", "".join(steps))
    assert len(names) > 15
    for name in {*names} - {"linear"}:  # a function of probe.py
        place = randsac
        for part in [] if name.endswith(".py") else name.split("."):
            place = getattr(place, part)


def table_after(words, page=README):
    """-> the rows of the first table after these words, a dict for each, by the names above."""
    lines = page.partition(words)[2].splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("---|"))
    rows = []
    for line in [lines[rule - 1], *lines[rule + 1 :]]:
        if "|" not in line:
            break
        rows.append([cell.strip() for cell in line.split("|")])
    return [dict(zip(rows[0], row)) for row in rows[1:]]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_are_there(page):
    links = re.findall(r"\]\(([^)#]+)\)", PAGES[page])
    for link in links:
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link
    for name in re.findall(r"`([a-z-]+)\.(?:png|gif)`", PAGES[page]):
        assert name in visualize.PICTURES, name


def test_paper_commands_make_a_configuration():
    commands = " ".join(row["flags"] for row in table_after("## The paper's settings"))
    found = re.findall(r"`(--[^`]*)`", commands)
    assert len(found) > 10
    for text in found:
        randsac.Config(**vars(randsac.make_parser("").parse_args(shlex.split(text))))


def test_the_model_that_comes_with_the_project():
    path = ROOT / "assets/nano-cifar10/checkpoint.pt"
    saved, _, config = randsac.load_checkpoint(path)
    assert path.stat().st_size < 5e6
    assert {value.dtype for value in saved["model"].values()} == {torch.float16}
    model, _ = randsac.load_model(path)
    images = randsac.normalize(randsac.draw_shapes(64, 32, 5)[0], 32)
    ranks = randsac.sample_ranks(config, 64, generator=randsac.seeded("cpu", 0))
    with torch.no_grad():
        trained = randsac.batch_loss(model, images, ranks, config)
        untrained = randsac.batch_loss(randsac.RandSAC(config), images, ranks, config)
    # Predicting zero has 0.979: what it learned helps with images of another kind.
    assert trained < 0.8 < untrained


def logged(folder):
    """-> all rows of the probes.jsonl below a folder."""
    paths = sorted((ROOT / folder).rglob("probes.jsonl"))
    return [json.loads(line) for path in paths for line in path.open()]


def check_row(row, names, probes):
    """LIN and kNN below the names for trained, untrained and raw pixels are those of the probes:
    the mean and, of several, the standard deviation of top-1."""
    kinds = [
        {"features": "encoder", "random_init": False},
        {"features": "encoder", "random_init": True},
        {"features": "pixels"},
    ]
    for name, kind in zip(names, kinds):
        for shown, protocol in zip(row[name].split(", "), ("linear", "knn"), strict=True):
            kind |= {"protocol": protocol, "dataset": probes[0]["dataset"]}
            found = [one["top1"] for one in probes if kind.items() <= one.items()]
            measured = [statistics.mean(found)]
            if len(found) > 1:
                measured.append(statistics.stdev(found))
            numbers = [float(number) for number in shown.split(" ± ")]
            assert numbers == pytest.approx(measured, abs=0.0501), (shown, name)


def test_the_table_of_results_says_what_the_logs_say():
    rows = table_after("## What to expect")
    folders = [re.search(r"\]\((.*)\)", row["images"])[1] for row in rows]
    everywhere = [row for folder in folders for row in logged(folder)]
    pixels = [row for row in everywhere if row["features"] == "pixels"]  # the same for every model
    assert len(rows) == 3
    for row, folder in zip(rows, folders):
        known = [row for row in logged(folder) if row["features"] != "pixels"]
        check_row(row, ("LIN, kNN (%)", "untrained", "raw pixels"), known + pixels)

    # The picture shows the last row, beside the paper's 92.1.
    bars = re.findall(r'"bars", {0: ([\d.]+)(?:, 1: ([\d.]+))?}', PAGES["results/README.md"])
    last = [rows[-1][name] for name in ("raw pixels", "untrained", "LIN, kNN (%)")]
    shown = [re.sub(r" ± [\d.]+", "", cell).split(", ") for cell in last]
    assert [list(pair) for pair in bars] == [*shown, ["92.1", ""]]


def test_the_table_of_few_images_says_what_the_logs_say():
    rows = table_after("**How many images?**")
    assert len(rows) >= 2
    floors = map(json.loads, (ROOT / "results/evidence/floors.jsonl").open())
    whole = [f"{row['lin']:.1f}, {row['knn']:.1f}" for row in floors]  # of the same network
    for row in rows:
        known = logged(f"results/few/{row['images'].replace(',', '')}")
        names = ["trained", "untrained"]
        if row["raw pixels"] != "not measured":
            names.append("raw pixels")
        if row["images"] == "50,000":
            assert [row["untrained"], row["raw pixels"]] == whole
            names = ["trained"]
        check_row(row, names, known)


def test_the_tables_of_speed_say_what_the_logs_say():
    gpu = [json.loads(line) for line in (ROOT / "results/gpu/speed.jsonl").open()][1:]
    cpu = (ROOT / "results/speed.txt").read_text().splitlines()
    rows = table_after("**Which size?**")
    assert len(rows) >= 3
    for row in rows:
        size = int(re.search(r"\d+", row["flags"])[0])
        assert int(row["tokens"]) == randsac.Config(image_size=size).tokens

        shown = re.fullmatch(r"`(\w+)`: ([\d,]+) \((\d+) GB, (\d+)\)", row["H200"])
        model, rate, memory, batch = shown.groups()
        kind = {"model": model, "image_size": size, "batch_size": int(batch), "compile": False}
        (found,) = [one for one in gpu if kind.items() <= one.items()]
        assert f"{found['images_per_s']:,}" == rate
        assert found["memory_gb"] == pytest.approx(int(memory), abs=0.5)

        if row["`nano`, two CPU cores"] != "not measured":
            name = "square (16, 4)" if size == 32 else f"{size} "
            (line,) = [line for line in cpu if line.startswith(name)]
            assert row["`nano`, two CPU cores"] == line.split()[-3]

    names = ("model", "image_size", "patch_size", "batch_size", "images_per_s", "memory_gb")
    names += ("ms", "host_ms")
    rows = table_after("### Speed on a GPU", PAGES["results/README.md"])
    assert len(rows) == len(gpu)
    for row, one in zip(rows, gpu):
        wanted = [str(one[name]) for name in names]
        wanted.append(f"{100 * one['share_of_peak']:.1f} %")
        assert list(row.values()) == wanted


def test_kept_features_serve_a_classifier_of_ones_own(monkeypatch, capsys):
    monkeypatch.setattr(randsac, "load_images", lambda *_, **__: randsac.draw_shapes(100, 32, 0))
    monkeypatch.setattr(probe, "L2_GRID", [0.01])
    path = shutil.copy(ROOT / "assets/nano-cifar10/checkpoint.pt", ".")
    probe.main([path, "--dataset", "shapes", "--save", "features.npz"])
    (code,) = re.findall(r"```python\n((?:(?!```).)*npz.*?)```", README, re.DOTALL)
    exec(code, {})  # noqa: S102
    # More numbers of an image than images: each is found again.
    assert float(capsys.readouterr().out.split("right: ")[1]) > 0.8
