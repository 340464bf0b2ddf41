"""The paper's claims, tried at small scale: trains every variant, probes it, judges what came out.

    python results/evidence.py run --data-dir DIR    # many hours; stop it, start it again
    python results/evidence.py run --passes 100 --batch-size 512 --jobs 4 --out results/hundred
    python results/evidence.py report                # results/README.md and assets/evidence.png
    python results/evidence.py report results/gpu/hundred    # other logs: assets/hundred.png

First comes seed 0 of all variants, then seed 1, then seed 2, each in a process that prints into a
.txt beside its log. A run that has its log is skipped, and one that was cut off goes on.
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median, stdev, variance

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import speed

import probe
import randsac
from randsac import check, user_path, write_whole

LOGS = ROOT / "results/evidence"

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
FLOORS = {"untrained": "--random-init", "raw pixels": "--features pixels"}  # flags of probe.py
PROBES = {"lin": "LIN", "knn": "kNN"}
JOBS = {"floors": ("floors", 0)}  # name of its files -> variant, seed
for seed in range(3):
    for name in VARIANTS:
        if seed == 0 or any(name in claim for claim in CLAIMS):
            JOBS[f"{name}-{seed}"] = (name, seed)


def config_of(flags, recipe):
    """-> the Config of a run with the recipe and these flags."""
    words = f"{recipe} {flags}".split()
    given = randsac.make_parser("").parse_args(words)
    return randsac.Config(**vars(given))


def read_rows(path):
    """-> the rows of a .jsonl file, none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def lin_and_knn(run, flags=""):
    """Probes a run -> top-1 % of LIN and of kNN, by the last of its probes."""
    probe.main([str(run / "checkpoint.pt"), *flags.split()])
    top1 = {row["protocol"]: row["top1"] for row in read_rows(run / "probes.jsonl")}
    return {"lin": top1["linear"], "knn": top1["knn"]}


def train_and_probe(job, args):
    """Trains and probes, or goes on with it, and writes the job's log."""
    torch.set_num_threads(max(1, torch.get_num_threads() // args.jobs))
    name, seed = JOBS[job]
    flags = VARIANTS.get(name, "--max-steps 1")  # floors take no more of a run than its sizes
    run = ROOT / "runs" / args.out.name / job
    words = f"{args.recipe} {flags} --seed {seed}".split()
    code = randsac.main([*words, "--data-dir", str(args.data_dir), "--resume", str(run)])
    check(code == 0, f"{job} was stopped: start again to go on")
    if name == "floors":
        rows = [{"floor": floor, **lin_and_knn(run, floor)} for floor in FLOORS.values()]
    else:  # what the log says first is how the run was made
        metrics = read_rows(run / "metrics.jsonl")
        end = metrics[-1]
        results = {"pass": end["epoch"], "held_out_loss": end["held_out_loss"], **lin_and_knn(run)}
        settings = {"name": name, "flags": flags, "seed": seed, "recipe": args.recipe}
        settings |= {"data": args.data_dir.resolve().name, "jobs": args.jobs}
        settings |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        settings["machine"] = speed.machine()
        settings["images_per_s"] = median(row["images_per_s"] for row in metrics)
        rows = [settings, results]

    # The log comes last: where there is one, the run is whole.
    with write_whole(args.out / f"{job}.jsonl") as file:
        file.writelines(f"{json.dumps(row)}\n".encode() for row in rows)


def run_all(args):
    """Begins what has no log yet. A job alone runs here; of several each is this command again."""
    args.recipe = RECIPE.format(**vars(args))
    jobs = []
    for job, (name, seed) in JOBS.items():
        if seed < args.seeds and {job, name} & {*args.only}:
            rows = read_rows(args.out / f"{job}.jsonl")
            if not rows:
                jobs.append(job)
            elif name != "floors":
                check(rows[0]["recipe"] == args.recipe, f"{job} is of another recipe: change --out")
    args.out.mkdir(parents=True, exist_ok=True)
    if len(jobs) == 1:
        train_and_probe(jobs[0], args)
        return

    # Images are looked at, and decoded, before several runs read them.
    config = randsac.with_flags(config_of("", args.recipe), {"data_dir": str(args.data_dir)})
    randsac.load_images(config, train=True)
    end = time.monotonic() + args.seconds
    children = {}
    try:
        for job in jobs:
            while sum(child.poll() is None for child in children.values()) >= args.jobs:
                time.sleep(0.2)
            if time.monotonic() < end:
                print(f"{job}: starts", flush=True)
                with open(args.out / f"{job}.txt", "a") as file:
                    words = [sys.executable, *sys.argv, "--only", job]
                    children[job] = subprocess.Popen(words, stdout=file, stderr=file)
        failed = [job for job, child in children.items() if child.wait() != 0]
    finally:
        for child in children.values():  # one that still trains saves what it has
            child.terminate()
            child.wait()
    check(not failed, f"failed: {failed}; see the .txt in {args.out}, and start again")


def student(freedom):
    """-> t, rising from 0, and the integral of Student's density from -t to t for each of them.
    In the angle whose tangent is t / sqrt(freedom) that density is a power of the cosine."""
    edges = np.linspace(0, math.pi / 2, 100_001)
    middles = (edges[:-1] + edges[1:]) / 2
    within = np.cumsum(np.cos(middles) ** (freedom - 1))
    t = math.sqrt(freedom) * np.tan(edges[1:])
    return t, within / within[-1]


def compare(a, b):
    """Values of the seeds of two variants -> the difference of their means, half its 95 % interval
    and p by Welch's test; no interval and p 1 where seeds are too few or show no spread."""
    difference = mean(a) - mean(b)
    if min(len(a), len(b)) < 2 or variance(a) + variance(b) == 0:
        return difference, 0, 1
    seeds = np.array([len(a), len(b)])
    squares = [variance(a), variance(b)] / seeds
    error = math.sqrt(squares.sum())  # the difference's standard error
    t, within = student(error**4 / (squares**2 / (seeds - 1)).sum())
    half = error * np.interp(0.95, within, t)
    return difference, half, 1 - np.interp(abs(difference) / error, t, within)


def tried(runs):
    """-> the claims that have logs of both variants."""
    return [claim for claim in CLAIMS if runs[claim[1]]["lin"] and runs[claim[2]]["lin"]]


def judge(a, b):
    """-> whether a is higher than b, in words."""
    difference, half, p = compare(a, b)
    if half == 0:
        return f"{difference:+.2f}: not enough seeds"
    verdict = "no difference seen"
    if p < 0.05:
        verdict = "**higher**" if difference > 0 else "**lower**"
    return f"{difference:+.2f} ± {half:.2f}, p = {p:.3f}: {verdict}"


def read_logs(logs):
    """-> {variant or floor: {"lin": top-1 % of its seeds, "knn": the same}}, and the recipe.
    UserError where the logs cannot be compared."""
    ends = list(zip(FLOORS, read_rows(LOGS / "floors.jsonl")))
    kinds = set()
    for job, (name, _) in JOBS.items():
        rows = read_rows(logs / f"{job}.jsonl")
        if rows and name != "floors":
            first = rows[0]
            check(first["flags"] == VARIANTS[name], f"{job} is of other flags: remove its log")
            kinds.add((first["recipe"], first["data"]))
            ends.append((name, rows[-1]))
    check(len(kinds) == 1, f"{logs} has logs of {len(kinds)} recipes, not one: run or remove some")
    runs = {name: {"lin": [], "knn": []} for name in VARIANTS | FLOORS}
    for name, row in ends:
        runs[name]["lin"].append(row["lin"])
        runs[name]["knn"].append(row["knn"])
    return runs, kinds.pop()[0]


def tflop(flags, recipe):
    """-> 10^12 floating-point operations of a run's matrix products, forward and backward."""
    config = config_of(flags, recipe)
    images = config.epochs * 50_000  # as many are in CIFAR-10
    return speed.flops(config) * images / 1e12


def spread(numbers):
    """mean ± sample standard deviation"""
    deviation = f" ± {stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.1f}{deviation}"


def describe(runs, recipe):
    """-> the lines of the README between the markers."""
    cost = {name: tflop(flags, recipe) for name, flags in VARIANTS.items()}
    yield f"`{recipe}`\n"
    yield "| variant | flags | seeds | LIN | kNN | TFLOP |"
    yield "|---|---|---|---|---|---|"
    for name, flags in (VARIANTS | FLOORS).items():
        seeds = len(runs[name]["lin"])
        if seeds:
            probes = " | ".join(spread(runs[name][key]) for key in PROBES)
            yield f"| {name} | `{flags}` | {seeds} | {probes} | {cost.get(name, 0):.1f} |"

    # The same rule for LIN and kNN. What it costs to be higher stands beside it.
    yield "\n| claim | here | TFLOP | the paper, LIN | LIN here | kNN here |"
    yield "|---|---|---|---|---|---|"
    judged = 0
    for words, a, b, paper in tried(runs):
        here = f"{a} / {b} | {cost[a] / cost[b]:.2f}"
        verdicts = " | ".join(judge(runs[a][key], runs[b][key]) for key in PROBES)
        judged += verdicts.count("p = ")
        yield f"| {words} | {here} | {paper} | {verdicts} |"
    yield f"\nComparisons at 5 %: {judged}. About one in twenty comes out by chance."


FONT = ImageFont.load_default(26)  # of 1600 pixels, of which a README shows half
ORDERS = ("patch-raster", "patch-random", "square-16-k4", "mae")  # in the right half


def draw_claims(pen, runs):
    """Draws two lines for each claim, LIN and kNN: the paper's difference, ours, its interval."""

    def across(points):  # -> x; what lies beyond an end is shown at the end
        return 530 + 14 * np.clip(points, -10, 22)

    for points, width in {-10: 2, 0: 4, 10: 2, 20: 2}.items():
        x = across(points)
        pen.line((x, 90, x, 900), "darkgrey", width)
        pen.text((x, 924), f"{points:+d}", "black", FONT, "mm")
    for row, (words, a, b, paper) in enumerate(tried(runs)):
        y = 80 * row + 115
        pen.text((20, y + 15), words, "black", FONT, "lm")
        if paper.startswith("+"):
            pen.circle((across(float(paper.split()[0])), y), 11, "white", "black", 3)
        for key, name in PROBES.items():
            pen.text((858, y), name, "black", FONT, "lm")
            difference, half, _ = compare(runs[a][key], runs[b][key])
            left = across(difference - half)
            right = across(difference + half)
            pen.line((left, y, right, y), "black", 4)
            pen.circle((across(difference), y), 9, "black")
            y += 32


def draw_passes(pen, budgets, key, top):
    """Draws accuracy against passes, from `top` down. budgets: {passes: runs as of read_logs}."""
    pen.text((1040, top - 70), f"{PROBES[key]}, top-1 %, after so many passes", "black", FONT, "lm")
    lines = {}  # name -> accuracy, x: the most passes come first
    for passes in sorted(budgets, reverse=True):
        x = 860 + 220 * math.log10(passes)
        pen.text((x, top + 345), str(passes), "black", FONT, "mm")
        for name in (*ORDERS, *FLOORS):
            found = budgets[passes][name][key]
            if found:
                lines.setdefault(name, []).append((mean(found), x))
    values = [value for points in lines.values() for value, _ in points]
    highest = max(values)
    scale = 280 / max(np.ptp(values), 1)

    # A label stands at the end of its line, or below the label before.
    free = top
    for name in sorted(lines, key=lines.get, reverse=True):
        places = [(x, top + scale * (highest - value)) for value, x in lines[name]]
        weight = 4 if name in ORDERS else 1
        pen.line(places, "black", weight)
        for place in places:
            pen.circle(place, 2 * weight, "black")
        free = max(free, places[0][1])
        pen.line((places[0], (1350, free)), "darkgrey", 2)
        label = f"{lines[name][0][0]:.1f} {name}"
        pen.text((1358, free), label, "black", FONT, "lm")
        free += 30


def report(logs):
    runs, recipe = read_logs(logs)
    text = "\n".join(describe(runs, recipe))
    print(text)

    # Beside these logs the picture shows what other numbers of passes came to.
    passes = config_of("", recipe).epochs
    budgets = {passes: runs}
    for path in LOGS.parent.rglob("mae-0.jsonl"):
        others, recipe = read_logs(path.parent)
        budgets.setdefault(config_of("", recipe).epochs, others)
    image = Image.new("RGB", (1600, 950), "white")
    pen = ImageDraw.Draw(image)
    words = f"Points of top-1, {passes} passes: ours (95 %) and the paper's (hollow)"
    pen.text((20, 40), words, "black", FONT, "lm")
    draw_claims(pen, runs)
    draw_passes(pen, budgets, "lin", 110)
    draw_passes(pen, budgets, "knn", 580)

    # Only now, when all has been read and holds, anything is written.
    page = ROOT / "results/README.md"
    begin = f"<!-- {logs.name} -->"
    end = f"<!-- /{logs.name} -->"
    before, _, rest = page.read_text().partition(begin)
    _, found, after = rest.partition(end)
    check(found, f"{page} has no lines {begin} and {end} to write between: add them")
    with write_whole(ROOT / f"assets/{logs.name}.png") as file:
        image.save(file, "png")
    with write_whole(page) as file:
        file.write(f"{before}{begin}\n{text}\n{end}{after}".encode())


def main(arguments):
    parser = randsac.make_parser(__doc__, leave_out=vars(randsac.Config()))
    commands = parser.add_subparsers(required=True, dest="command", metavar="run or report")
    add = commands.add_parser("report", help="tables and picture from the logs").add_argument
    add("logs", type=user_path, nargs="?", default=LOGS, help="where they are (results/evidence)")
    add = commands.add_parser("run", help="train and probe what has no log yet").add_argument
    add("--data-dir", type=user_path, default="data/cifar10-jpeg", help="of train/ and test/")
    words = "only these variants (mae), runs (mae-0) or floors; one run alone prints here"
    add("--only", nargs="+", default=JOBS, choices=[*VARIANTS, *JOBS], metavar="X", help=words)
    add("--seeds", type=int, default=3, help="of each variant at most (3)")
    add("--passes", default="10", help="over the images (10)")
    add("--batch-size", default="64", help="images in a step (64)")
    add("--lr", default="4e-3", help="for each 256 images of the batch (4e-3)")
    add("--out", type=user_path, default=LOGS, help="where the logs go (results/evidence)")
    add("--seconds", type=float, default=math.inf, help="begin no run after these")
    add("--jobs", type=int, default=1, help="runs side by side (1)")
    args = parser.parse_args(arguments)
    if args.command == "run":
        run_all(args)
    else:
        report(args.logs)


if __name__ == "__main__":
    randsac.run_command(main)
