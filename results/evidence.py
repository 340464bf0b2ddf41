"""The paper's claims, tried at small scale: trains every variant, probes it, judges what came out.

    python results/evidence.py run --data-dir DIR   # many hours; stop it, start it again
    python results/evidence.py run --only mae       # only this variant
    python results/evidence.py run --passes 100 --batch-size 512 --jobs 4 --out results/hundred
    python results/evidence.py report               # results/README.md and assets/evidence.png
    python results/evidence.py report results/gpu/hundred   # other logs: assets/hundred.png

`run` does what randsac.py and probe.py do: first seed 0 of all variants, then seed 1, then seed 2.
A run that has its log is skipped, and one that was cut off goes on.
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import platform
import sys
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, median, stdev, variance

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import probe
import randsac
from randsac import check, user_path, write_whole

LOGS = ROOT / "results/evidence"
RUNS = ROOT / "runs"
README = ROOT / "results/README.md"
PICTURES = ROOT / "assets"
IMAGES = 50_000  # training images of CIFAR-10: a pass

RECIPE = (  # completed by the flags of `run`
    "--dataset folder --dim 64 --heads 2 --depth 4 --decoder-depth 1 --lr {lr} "
    "--batch-size {batch_size} --epochs {passes}"
)
VARIANTS = {  # in the order of what they decide
    "mae": "--segments mae",
    "square-16-k4": "--segments square --hierarchy 16 --last-rank 4",
    "square-16-4": "--segments square --hierarchy 16 4",
    "square-16-4-short": "--segments square --hierarchy 16 4 --epochs 4",
    "patch-raster": "--segments patch --order raster",
    "patch-random": "--segments patch",
    "square-16": "--segments square --hierarchy 16",
    "blob-9": "--segments blob --hierarchy 9",
    "scatter-9": "--segments scatter --hierarchy 9",
    "no-skip": "--segments square --hierarchy 16 4 --no-skip",
    "blob-7": "--segments blob --hierarchy 7",
    "blob-7-3": "--segments blob --hierarchy 7 3",
    "square-16-k1": "--segments square --hierarchy 16 --last-rank 1",
    "square-16-k2": "--segments square --hierarchy 16 --last-rank 2",
    "square-16-k8": "--segments square --hierarchy 16 --last-rank 8",
    "square-16-4-k4": "--segments square --hierarchy 16 4 --last-rank 4",
    "patch-random-k16": "--segments patch --last-rank 16",
    "square-4": "--segments square --hierarchy 4",
    "blob-11-5": "--segments blob --hierarchy 11 5",
}
CLAIMS = [  # claim, a variant, one that it should exceed, the paper's difference: LIN on CIFAR-10
    ("random > raster", "patch-random", "patch-raster", "+20.00 (Table 2)"),
    ("segments > patches", "square-16", "patch-random", "+5.85 (Table 3)"),
    ("coherent > incoherent", "blob-9", "scatter-9", "+3.29 (Table 5)"),
    ("incoherent > patches", "scatter-9", "patch-random", "+3.06 (Tables 3, 5)"),
    ("hierarchy > flat, squares", "square-16-4", "square-16", "+1.08 (Table 6)"),
    ("hierarchy > flat, blobs", "blob-7-3", "blob-7", "+0.19 (Table 6)"),
    ("skips > none", "square-16-4", "no-skip", "in its supplement"),
    ("RandSAC > MAE, equal passes", "square-16-4", "mae", "+4.80 (Table 7)"),
    ("RandSAC, 4 passes > MAE", "square-16-4-short", "mae", "not tried"),
    ("K = 4 > MAE, equal cost", "square-16-k4", "mae", "not tried"),
]
FLOORS = {"--random-init": "untrained", "--features pixels": "raw pixels"}  # flags of probe.py
JOBS = {"floors": ("floors", 0)}  # name of its files -> variant, seed
for seed in range(3):
    for name in VARIANTS:
        if seed == 0 or any(name in claim for claim in CLAIMS):
            JOBS[f"{name}-{seed}"] = (name, seed)


def config_of(flags, recipe):
    """-> the Config of a run with the recipe and these flags."""
    return randsac.Config(**vars(randsac.make_parser("").parse_args(f"{recipe} {flags}".split())))


def read_rows(path):
    """-> the rows of a .jsonl file, none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------
# run


def lin_and_knn(run, flags=""):
    """Probes a run -> top-1 % of LIN and of kNN."""
    probe.main([str(run / "checkpoint.pt"), *flags.split()])
    rows = read_rows(run / "probes.jsonl")
    top1 = {row["protocol"]: row["top1"] for row in rows}  # of earlier probes the last one counts
    return {"lin": top1["linear"], "knn": top1["knn"]}


def train_and_probe(job, args):
    """Trains and probes, or goes on with it -> the rows of the job's log."""
    start = time.perf_counter()
    name, seed = JOBS[job]
    flags = VARIANTS.get(name, "--max-steps 1")  # floors take no more of a run than its sizes
    run = args.runs / job
    words = f"{args.recipe} {flags} --seed {seed}".split()
    code = randsac.main([*words, "--data-dir", str(args.data_dir), "--resume", str(run)])
    check(code == 0, f"{job} was stopped: start again to go on")

    # What the log says first is how the run was made.
    if name == "floors":
        return [{"floor": floor, **lin_and_knn(run, floor)} for floor in FLOORS]
    metrics = read_rows(run / "metrics.jsonl")
    end = metrics[-1]
    results = {"pass": end["epoch"], "held_out_loss": end["held_out_loss"], **lin_and_knn(run)}
    settings = {"name": name, "flags": flags, "seed": seed, "recipe": args.recipe}
    on_gpu = torch.cuda.is_available()
    settings["machine"] = torch.cuda.get_device_name() if on_gpu else platform.machine()
    settings |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    settings |= {"data": args.data_dir.name, "passes": end["epoch"], "jobs": args.jobs}
    settings["seconds"] = round(time.perf_counter() - start, 1)
    settings["images_per_s"] = median(row["images_per_s"] for row in metrics)
    return [settings, results]


def say(job, words):
    print(f"{job}: {words}", file=sys.__stdout__, flush=True)


def run_one(job, args):
    """Makes the log of a job, unless the time is over."""
    if time.time() > args.deadline:
        say(job, "not begun, the time is over")
        return
    say(job, "starts")
    rows = train_and_probe(job, args)

    # The log comes last: where there is one, the run is whole.
    with write_whole(args.out / f"{job}.jsonl") as file:
        file.writelines(f"{json.dumps(row)}\n".encode() for row in rows)
    say(job, json.dumps(rows[-1]))


def run_beside_others(job, args):
    """run_one in a worker, where it prints into a file of its own -> whether it failed."""
    with (
        open(args.out / f"{job}.txt", "a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            run_one(job, args)
            return False
        except (OSError, RuntimeError, ValueError):
            traceback.print_exc()
            return True


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def begin_worker(count):
    """Gives a worker its share of the cores, and lets it end with its parent, however that ends."""
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    threading.Thread(target=end_with_parent, daemon=True).start()


def run_all(args):
    args.data_dir = args.data_dir.resolve()
    args.out = args.out.resolve()
    args.deadline = time.time() + args.seconds
    args.recipe = RECIPE.format(**vars(args))
    args.runs = RUNS / args.out.name
    jobs = []
    for job, (name, seed) in JOBS.items():
        if name in args.only and seed < args.seeds:
            rows = read_rows(args.out / f"{job}.jsonl")
            same = name == "floors" or not rows or rows[0]["recipe"] == args.recipe
            check(same, f"{args.out} has {job} with another recipe: choose another --out")
            if rows:
                say(job, "done")
            else:
                jobs.append(job)

    # Images are decoded once, before several workers read them.
    config = config_of(f"--data-dir {args.data_dir}", args.recipe)
    for train in (True, False):
        randsac.load_images(config, train)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.jobs == 1:
        for job in jobs:
            run_one(job, args)
        return

    # CUDA does not survive a fork.
    work = functools.partial(run_beside_others, args=args)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, begin_worker, (args.jobs,)) as workers:
        failed = [job for job, bad in zip(jobs, workers.map(work, jobs)) if bad]
    check(not failed, f"{', '.join(failed)} failed, see the .txt in {args.out}; start again")


# ------------------------------------------------------------------------------------------------
# report


def student(freedom):
    """-> t, rising from 0, and the two-sided p of each: 1 less the integral of Student's density
    from -t to t. In the angle whose tangent is t / sqrt(freedom) it is a power of the cosine."""
    edges = np.linspace(0, math.pi / 2, 100_001)
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(np.cos(middles) ** (freedom - 1))
    return math.sqrt(freedom) * np.tan(edges[1:]), 1 - below / below[-1]


def compare(a, b):
    """Values of the seeds of two variants -> the difference of their means, half its 95 % interval
    and p by Welch's test; no interval and p 1 where seeds are too few or show no spread."""
    difference = mean(a) - mean(b)
    if min(len(a), len(b)) < 2 or variance(a) + variance(b) == 0:
        return difference, 0, 1
    error_a = variance(a) / len(a)
    error_b = variance(b) / len(b)
    error = (error_a + error_b) ** 0.5
    freedom = error**4 / (error_a**2 / (len(a) - 1) + error_b**2 / (len(b) - 1))
    t, p = student(freedom)
    critical = np.interp(0.95, 1 - p, t)
    return difference, error * critical, np.interp(abs(difference) / error, t, p)


def judge(a, b):
    """-> whether a is higher than b, in words."""
    if not a or not b:
        return "not run"
    difference, half, p = compare(a, b)
    if half == 0:
        return f"{difference:+.2f}: not enough seeds"
    verdict = "no difference seen"
    if p < 0.05:
        verdict = "**higher**" if difference > 0 else "**lower**"
    return f"{difference:+.2f} ± {half:.2f}, p = {p:.3f}: {verdict}"


def read_logs(logs):
    """-> {variant: top-1 % of its seeds, by LIN and by kNN} of those that have logs; the recipe.
    UserError where the logs cannot be compared."""
    runs = {}
    kinds = set()
    for job, (name, _) in JOBS.items():
        path = logs / f"{job}.jsonl"
        rows = read_rows(path)
        if rows and name != "floors":
            check(rows[0]["flags"] == VARIANTS[name], f"{path} is of other flags: remove it")
            kinds.add((rows[0]["recipe"], rows[0]["data"]))
            found = runs.setdefault(name, {"lin": [], "knn": []})
            found["lin"].append(rows[-1]["lin"])
            found["knn"].append(rows[-1]["knn"])
    check(kinds, f"no logs in {logs}: python results/evidence.py run --data-dir DIR")
    check(len(kinds) == 1, f"the logs in {logs} are of several recipes or data: {sorted(kinds)}")
    return {name: runs[name] for name in VARIANTS if name in runs}, kinds.pop()[0]


def tflop(flags, recipe):
    """-> 10^12 floating-point operations of a run, forward and backward, counted: matrix products
    only, on the path that training takes."""
    config = config_of(flags, recipe)
    model = randsac.RandSAC(config)
    images = torch.zeros(1, 3, config.image_size, config.image_size)
    ranks = randsac.sample_ranks(config, 1)
    trim = randsac.segment_sizes(config) is not None
    # A fused attention would count as nothing.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images, ranks, trim).backward()
    return counter.get_total_flops() * config.epochs * IMAGES / 1e12


def spread(numbers):
    """mean ± sample standard deviation"""
    deviation = f" ± {stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.1f}{deviation}"


def describe(runs, recipe, floors):
    """-> the lines of the README between the markers."""
    cost = {name: tflop(VARIANTS[name], recipe) for name in runs}
    yield f"`{recipe}`\n"
    yield "| variant | flags | seeds | LIN | kNN | TFLOP |"
    yield "|---|---|---|---|---|---|"
    for name, found in runs.items():
        results = f"{len(found['lin'])} | {spread(found['lin'])} | {spread(found['knn'])}"
        yield f"| {name} | `{VARIANTS[name]}` | {results} | {cost[name]:.1f} |"
    for row in floors:
        yield f"| floor | `probe.py {row['floor']}` | 1 | {row['lin']:.1f} | {row['knn']:.1f} | |"

    # The same rule for LIN and kNN. What it costs to be higher stands beside it.
    yield "\n| claim | here | TFLOP | the paper, LIN | LIN here | kNN here |"
    yield "|---|---|---|---|---|---|"
    judged = 0
    for words, a, b, paper in CLAIMS:
        share = f"{cost[a] / cost[b]:.2f}" if a in runs and b in runs else ""
        verdicts = [judge(*(runs.get(x, {}).get(key) for x in (a, b))) for key in ("lin", "knn")]
        judged += " ".join(verdicts).count("p = ")
        yield f"| {words} | {a} / {b} | {share} | {paper} | {' | '.join(verdicts)} |"

    yield f"\nComparisons at 5 %: {judged}. About one in twenty comes out by chance."


PROBES = {"lin": "LIN", "knn": "kNN"}
INK = "#1A1A1A"
GREY = "#A8A8A8"
FONT = ImageFont.load_default(26)  # of 1600 pixels, of which a README shows half
ORDERS = {  # beside their lines in the picture
    "patch-raster": "patch raster",
    "patch-random": "patch random",
    "square-16-k4": "square, K = 4",
    "mae": "mae",
}


def dot(pen, x, y, fill=INK, radius=9):
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill, INK, 3)


def draw_claims(pen, runs):
    """Draws two lines for each claim, LIN and kNN: the paper's difference, ours, its interval."""

    def across(points):  # -> x; what lies beyond an end is shown at the end
        return 530 + 14 * min(max(points, -10), 22)

    bottom = 80 * len(CLAIMS) + 100
    for points in (-10, 0, 10, 20):
        x = across(points)
        pen.line((x, 90, x, bottom), GREY, 4 if points == 0 else 2)
        pen.text((x, bottom + 24), f"{points:+d}", INK, FONT, "mm")
    for row, (words, a, b, paper) in enumerate(CLAIMS):
        y = 80 * row + 115
        pen.text((20, y + 15), words, INK, FONT, "lm")
        if paper.startswith("+"):
            dot(pen, across(float(paper.split()[0])), y, "white", 11)
        for key, name in PROBES.items():
            pen.text((across(22) + 20, y), name, INK, FONT, "lm")
            if a in runs and b in runs:
                difference, half, _ = compare(runs[a][key], runs[b][key])
                pen.line((across(difference - half), y, across(difference + half), y), INK, 4)
                dot(pen, across(difference), y)
            y += 32


def draw_passes(pen, budgets, floors, key, top):
    """Draws accuracy against passes, from `top` down. budgets: {passes: as from read_logs}."""
    pen.text((1040, top - 70), f"{PROBES[key]}, top-1 %", INK, FONT, "lm")
    for column, passes in enumerate(budgets):
        pen.text((1080 + 220 * column, top + 345), f"{passes} passes", INK, FONT, "mm")
    lines = {}
    for name, words in ORDERS.items():
        points = []
        for column, runs in enumerate(budgets.values()):
            if name in runs:
                points.append((1080 + 220 * column, mean(runs[name][key])))
        if points:
            lines[words] = points
    for row in floors:
        lines[FLOORS[row["floor"]]] = [(1040, row[key]), (1320, row[key])]

    # A label stands at the end of its line, or below the label before.
    values = [value for points in lines.values() for _, value in points]
    scale = 280 / max(max(values) - min(values), 1)
    free = top
    for words, points in sorted(lines.items(), key=lambda line: -line[1][-1][1]):
        places = [(x, top + scale * (max(values) - value)) for x, value in points]
        is_floor = words in FLOORS.values()
        pen.line(places, GREY if is_floor else INK, 2 if is_floor else 4)
        for x, y in places:
            if not is_floor:
                dot(pen, x, y)
        free = max(free, places[-1][1])
        pen.line((places[-1], (1350, free)), GREY, 2)
        pen.text((1358, free), f"{points[-1][1]:.1f} {words}", INK, FONT, "lm")
        free += 30


def report(logs):
    runs, recipe = read_logs(logs)
    passes = config_of("", recipe).epochs
    floors = read_rows(LOGS / "floors.jsonl")
    text = "\n".join(describe(runs, recipe, floors))
    print(text)

    # Beside these logs the picture shows what other numbers of passes came to.
    budgets = {passes: runs}
    for path in LOGS.parent.rglob("mae-0.jsonl"):
        others, other = read_logs(path.parent)
        budgets.setdefault(config_of("", other).epochs, others)
    image = Image.new("RGB", (1600, 80 * len(CLAIMS) + 150), "white")
    pen = ImageDraw.Draw(image)
    words = f"Points of top-1, {passes} passes: ours (95 %) and the paper's (hollow)"
    pen.text((20, 40), words, INK, FONT, "lm")
    draw_claims(pen, runs)
    draw_passes(pen, dict(sorted(budgets.items())), floors, "lin", 110)
    draw_passes(pen, dict(sorted(budgets.items())), floors, "knn", 580)

    # Only now, when all has been read and holds, anything is written.
    begin = f"<!-- {logs.name} -->"
    end = f"<!-- /{logs.name} -->"
    before, found, rest = README.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    check(found and ended, f"{README} has no lines {begin} and {end} to write between: add them")
    with write_whole(PICTURES / f"{logs.name}.png") as file:
        image.save(file, "png")
    with write_whole(README) as file:
        file.write(f"{before}{begin}\n{text}\n{end}{after}".encode())


def main(arguments):
    form = argparse.RawDescriptionHelpFormatter
    parser = randsac.Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, dest="command", metavar="run or report")
    add = commands.add_parser("report", help="tables and picture from the logs").add_argument
    add("logs", type=user_path, nargs="?", default=LOGS, help="where they are (results/evidence)")
    add = commands.add_parser("run", help="train and probe what has no log yet").add_argument
    words = "folder with train/CLASS/ and test/CLASS/ (default: %(default)s)"
    add("--data-dir", type=user_path, default="data/cifar10-jpeg", help=words)
    names = [*VARIANTS, "floors"]
    words = f"only these of {', '.join(names)}"
    add("--only", nargs="+", default=names, choices=names, metavar="X", help=words)
    add("--seeds", type=int, default=3, metavar="K", help="of each variant at most (3)")
    add("--passes", type=int, default=10, metavar="N", help="over the images (10)")
    add("--batch-size", type=int, default=64, metavar="B", help="images in a step (64)")
    add("--lr", default="4e-3", metavar="X", help="for each 256 images of the batch (4e-3)")
    add("--out", type=user_path, default=LOGS, metavar="DIR", help="where the logs go")
    add("--seconds", type=float, default=math.inf, metavar="S", help="begin no run after these")
    add("--jobs", type=int, default=1, metavar="J", help="runs side by side (1)")

    args = parser.parse_args(arguments)
    if args.command == "run":
        run_all(args)
    else:
        report(args.logs.resolve())


if __name__ == "__main__":
    randsac.run_command(main)
