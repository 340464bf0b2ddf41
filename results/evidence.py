"""The paper's claims, tried at small scale: trains every variant, probes it, judges what came out.

    python results/evidence.py run --data-dir DIR   # many hours; stop it, start it again
    python results/evidence.py run --only mae       # only this variant
    python results/evidence.py run --passes 100 --batch-size 512 --jobs 4 --out results/gpu
    python results/evidence.py speed                # images/s of each variant, some minutes
    python results/evidence.py report               # results/README.md and assets/evidence.png
    python results/evidence.py report results/gpu   # the same of other logs

`run` does what randsac.py and probe.py do: first seed 0 of all variants, then seed 1, and so on. A
run that has its log is skipped, one that was cut off goes on.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from statistics import mean, median, stdev, variance
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import probe
import randsac
from randsac import UserError, check, user_path, write_whole
from visualize import DIM, GREY, HUES, Series, chart, column, sheet

LOGS = ROOT / "results/evidence"
RUNS = ROOT / "runs"
README = ROOT / "results/README.md"
PICTURE = ROOT / "assets/evidence.png"
BEGIN = "<!-- evidence -->"
END = "<!-- /evidence -->"
IMAGES = 50_000  # training images of CIFAR-10: a pass
ROUNDS = 15  # of speed
STEPS = 2  # of each variant in a round

RECIPE = (
    "--dataset folder --dim 64 --heads 2 --depth 4 --decoder-depth 1 --lr 4e-3 --batch-size 64 "
    "--epochs 10"
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
    ("random ≫ raster", "patch-random", "patch-raster", "+20.00 (Table 2)"),
    ("segments > patches", "square-16", "patch-random", "+5.85 (Table 3)"),
    ("coherent > incoherent", "blob-9", "scatter-9", "+3.29 (Table 5)"),
    ("even incoherent > patches", "scatter-9", "patch-random", "+3.06 (Tables 3, 5)"),
    ("hierarchical > flat", "square-16-4", "square-16", "+1.08 (Table 6)"),
    ("hierarchical > flat", "blob-7-3", "blob-7", "+0.19 (Table 6)"),
    ("skips > none", "square-16-4", "no-skip", "in its supplement"),
    ("RandSAC > MAE, equal passes", "square-16-4", "mae", "+4.80 (Table 7)"),
    ("RandSAC > MAE, about equal cost", "square-16-4-short", "mae", "not tried"),
    ("RandSAC with `--last-rank` > MAE, about equal cost", "square-16-k4", "mae", "not tried"),
]
FLOORS = {"--random-init": "untrained encoder", "--features pixels": "raw pixels"}  # of probe.py


def make_jobs(seeds=None):
    """-> {name of its files: (variant, seed)}, seed by seed: `seeds` of each variant (None: 3 where
    a claim is about it, else 1), and the floors."""
    jobs = {"floors": ("floors", 0)}
    for seed in range(seeds or 3):
        for name in VARIANTS:
            judged = any(name in claim for claim in CLAIMS)
            if seeds or judged or seed == 0:
                jobs[f"{name}-{seed}"] = (name, seed)
    return jobs


def config_of(flags, recipe=None):
    """-> the Config of a run with the recipe (None: RECIPE) and these flags."""
    given = randsac.make_parser("").parse_args(f"{recipe or RECIPE} {flags}".split())
    return randsac.Config(**vars(given))


def read_rows(path):
    """-> the rows of a .jsonl file, none where there is no file."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and run again") from error


def write_rows(path, rows):
    """Writes a .jsonl file, all or nothing."""
    part = Path(f"{path}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(part, path)


def machine():
    """-> where this runs, for a log."""
    name = platform.machine()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(": ")[1]
    return {"machine": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


# ------------------------------------------------------------------------------------------------
# run


def lin_and_knn(run, flags=""):
    """Probes a run -> top-1 % of LIN and of kNN."""
    probe.main([str(run / "checkpoint.pt"), *flags.split()])
    rows = read_rows(run / "probes.jsonl")
    top1 = {row["protocol"]: row["top1"] for row in rows}  # of earlier probes the last one counts
    return {"lin": top1["linear"], "knn": top1["knn"]}


class Plan(NamedTuple):
    """What all jobs of a `run` have in common."""

    recipe: str  # flags of randsac.py, before those of a variant
    data_dir: Path
    logs: Path
    runs: Path
    side_by_side: int  # jobs at a time
    deadline: float  # no job begins later, in seconds of time.time()


def train_and_probe(name, seed, run, plan):
    """Trains a run, or goes on with it, and probes it -> the rows of its log."""
    # Go on with the run, or begin: anew where it was cut off before its first checkpoint.
    start = time.perf_counter()
    flags = VARIANTS.get(name, "--max-steps 1")  # floors take no more of a run than its sizes
    words = ["--resume", str(run)]
    if not (run / "checkpoint.pt").exists():
        shutil.rmtree(run, ignore_errors=True)
        words = [*f"{plan.recipe} {flags} --seed {seed}".split(), "--out", str(run)]
    code = randsac.main([*words, "--data-dir", str(plan.data_dir)])
    check(code == 0, f"{run.name} was stopped: start again to go on")

    # Probe. What the log says first is how the run was made.
    if name == "floors":
        return [{"floor": floor, **lin_and_knn(run, floor)} for floor in FLOORS]
    metrics = read_rows(run / "metrics.jsonl")
    end = metrics[-1]
    results = {"pass": end["epoch"], "held_out_loss": end["held_out_loss"], **lin_and_knn(run)}
    settings = {"name": name, "flags": flags, "seed": seed, "recipe": plan.recipe}
    settings |= {"data": plan.data_dir.name, "passes": end["epoch"], **machine()}
    settings |= {"jobs": plan.side_by_side, "seconds": round(time.perf_counter() - start, 1)}
    settings["images_per_s"] = median(row["images_per_s"] for row in metrics)
    return [settings, results]


def run_one(job, name, seed, plan):
    """Makes the log of a job, unless it is there or the time is over."""
    log = plan.logs / f"{job}.jsonl"
    if log.exists():
        print(f"{job}: done", flush=True)
        return
    if time.time() > plan.deadline:
        print(f"{job}: not begun, the time is over", flush=True)
        return

    # Side by side, each job prints into a file of its own.
    print(f"{job}: starts", flush=True)
    with contextlib.ExitStack() as stack:
        if plan.side_by_side > 1:
            file = stack.enter_context(open(plan.logs / f"{job}.txt", "a"))
            stack.enter_context(contextlib.redirect_stdout(file))
            stack.enter_context(contextlib.redirect_stderr(file))
        try:
            rows = train_and_probe(name, seed, plan.runs / job, plan)
        except Exception:
            if plan.side_by_side > 1:
                traceback.print_exc()
            raise

    # The log comes last: where there is one, the run is whole.
    write_rows(log, rows)
    print(f"{job}: {json.dumps(rows[-1])}", flush=True)


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def begin_worker(count):
    """Gives a worker its share of the cores, and lets it end with its parent, however that ends."""
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    threading.Thread(target=end_with_parent, daemon=True).start()


def run_side_by_side(jobs, plan):
    """A failed job does not stop the others. UserError, in the end, names those that failed."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    count = plan.side_by_side
    failed = []
    with concurrent.futures.ProcessPoolExecutor(count, context, begin_worker, (count,)) as workers:
        parts = {}
        for job, (name, seed) in jobs.items():
            parts[workers.submit(run_one, job, name, seed, plan)] = job
        try:
            for part in concurrent.futures.as_completed(parts):
                error = part.exception()
                if error:
                    failed.append(parts[part])
                    print(f"{parts[part]}: failed: {error!r}", flush=True)
        except KeyboardInterrupt:
            workers.shutdown(cancel_futures=True)
            raise
    check(not failed, f"{', '.join(failed)} failed: see {plan.logs}, then start again to go on")


def run_all(args):
    data_dir = args.data_dir.resolve()
    check(data_dir.is_dir(), f"{args.data_dir} is not a folder: give --data-dir")
    logs = args.out.resolve()
    logs.mkdir(parents=True, exist_ok=True)
    recipe = RECIPE
    changes = {"--epochs": args.passes, "--batch-size": args.batch_size, "--lr": args.lr}
    for flag, value in changes.items():
        if value is not None:
            recipe = re.sub(f"{flag} [^ ]+", f"{flag} {value}", recipe)

    # Seed 0 of all variants comes first.
    jobs = {}
    for job, (name, seed) in make_jobs(args.seeds).items():
        if name in args.only:
            jobs[job] = name, seed
            for row in read_rows(logs / f"{job}.jsonl")[:1]:
                same = row.get("recipe", recipe) == recipe
                check(same, f"{logs} has {job} with other flags: choose another --out")

    # Another recipe or other images are other runs.
    key = hashlib.sha256(repr((recipe, data_dir, logs)).encode()).hexdigest()[:8]
    deadline = time.time() + args.seconds
    plan = Plan(recipe, data_dir, logs, RUNS / f"{logs.name}-{key}", args.jobs, deadline)
    plan.runs.mkdir(parents=True, exist_ok=True)
    if args.jobs == 1:
        for job, (name, seed) in jobs.items():
            run_one(job, name, seed, plan)
        return

    # The images are decoded once, before the workers read them.
    config = config_of(f"--data-dir {data_dir}", recipe)
    for train in (True, False):
        randsac.load_images(config, train)
    run_side_by_side(jobs, plan)


# ------------------------------------------------------------------------------------------------
# speed and cost


def time_all():
    """Times the training steps of all variants in turn, so that a change of the machine's pace
    meets them alike, in processor time, so that other programs count as little as can be."""
    torch.set_num_threads(1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    parts = {}
    for name, flags in VARIANTS.items():
        config = config_of(f"{flags} --device cpu")
        model = randsac.RandSAC(config)
        parts[name] = model, randsac.make_optimizer(model, config), config

    # What the images show changes nothing.
    images = torch.randint(256, (config.batch_size, 3, 32, 32), dtype=torch.uint8)
    rates = {name: [] for name in VARIANTS}
    for _ in range(ROUNDS):
        for name, (model, optimizer, config) in parts.items():
            start = time.process_time()
            for step in range(STEPS):
                randsac.training_step(model, optimizer, scaler, images, config, step, STEPS)
            seconds = time.process_time() - start
            rates[name].append(round(STEPS * len(images) / seconds, 1))

    rows = [machine()]
    for name, rounds in rates.items():
        print(f"{name}: {median(rounds):.0f} images/s")
        rows.append({"name": name, "images_per_s": median(rounds), "rounds": rounds})
    write_rows(LOGS / "speed.jsonl", rows)


def flops(config):
    """-> floating-point operations of a training step for one image, forward and backward, counted:
    matrix products only, on the path that training takes."""
    model = randsac.RandSAC(config)
    images = torch.zeros(1, 3, config.image_size, config.image_size)
    # A fused attention would count as nothing.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        randsac.batch_loss(model, images, config).backward()
    return counter.get_total_flops()


def costs():
    """-> {variant: (TFLOP, minutes)} of a whole run, minutes by the rates of speed.jsonl."""
    rates = {row["name"]: row["images_per_s"] for row in read_rows(LOGS / "speed.jsonl")[1:]}
    found = {}
    for name, flags in VARIANTS.items():
        check(name in rates, "not all is timed: python results/evidence.py speed")
        config = config_of(flags)
        images = config.epochs * IMAGES
        found[name] = images * flops(config) / 1e12, images / rates[name] / 60
    return found


# ------------------------------------------------------------------------------------------------
# report

# Two-sided 5 % critical values of Student's t for 1, 2, ... degrees of freedom: NIST/SEMATECH
# e-Handbook of Statistical Methods, section 1.3.6.7.2, column 0.975.
CRITICAL = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228


def welch(a, b):
    """-> Welch's t of two samples that differ, its Welch-Satterthwaite degrees of freedom."""
    error_a = variance(a) / len(a)
    error_b = variance(b) / len(b)
    t = (mean(a) - mean(b)) / (error_a + error_b) ** 0.5
    shares = error_a**2 / (len(a) - 1) + error_b**2 / (len(b) - 1)
    return t, (error_a + error_b) ** 2 / shares


def critical_value(freedom):
    """-> the table's value for the next lower degrees of freedom, which asks for more."""
    whole = int(freedom + 1e-9)  # what is whole may have been rounded down
    return CRITICAL[min(whole, len(CRITICAL)) - 1]


def judge(a, b):
    """Values of the seeds of two variants -> whether a is higher than b, in words."""
    if not a or not b:
        return "not run yet"
    difference = f"{mean(a) - mean(b):+.2f}"
    if min(len(a), len(b)) < 2:
        return f"{difference}: not enough seeds"
    if variance(a) + variance(b) == 0:
        return f"{difference}: seeds without a spread"

    # A t beyond the critical value: p < 0.05.
    t, freedom = welch(a, b)
    verdict = "no difference seen"
    if abs(t) > critical_value(freedom):
        direction = "higher" if t > 0 else "lower"
        verdict = f"**{direction}, p < 0.05**"
    return f"{difference}, t {t:.2f} at {freedom:.2f}: {verdict}"


def read_logs():
    """-> {variant: top-1 % of its seeds, by LIN and by kNN}, the jobs that have no log."""
    runs = {name: {"lin": [], "knn": []} for name in VARIANTS}
    data = set()
    missing = []
    for job, (name, _) in make_jobs().items():
        path = LOGS / f"{job}.jsonl"
        rows = read_rows(path)
        if not rows:
            missing.append(job)
        elif name != "floors":
            fits = rows[0]["recipe"] == RECIPE and rows[0]["flags"] == VARIANTS[name]
            check(fits, f"{path} is of other flags: remove it, and run again")
            data.add(rows[0]["data"])
            runs[name]["lin"].append(rows[-1]["lin"])
            runs[name]["knn"].append(rows[-1]["knn"])

    # What is compared must have been trained on the same images.
    check(data, f"no logs in {LOGS}: python results/evidence.py run --data-dir DIR")
    check(len(data) == 1, f"the logs in {LOGS} are of several data sets: {sorted(data)}")
    return runs, missing


def spread(numbers):
    """mean ± sample standard deviation"""
    if not numbers:
        return "-"
    if len(numbers) == 1:
        return f"{numbers[0]:.1f}"
    return f"{mean(numbers):.1f} ± {stdev(numbers):.1f}"


def describe(runs, missing, cost, floors):
    """-> the lines of the README between the markers."""
    yield "| variant | flags | seeds | LIN | kNN | TFLOP | minutes |"
    yield "|---|---|---|---|---|---|---|"
    for name, found in runs.items():
        tflop, minutes = cost[name]
        results = f"{len(found['lin'])} | {spread(found['lin'])} | {spread(found['knn'])}"
        yield f"| {name} | `{VARIANTS[name]}` | {results} | {tflop:.1f} | {minutes:.1f} |"
    for row in floors:
        results = f"1 | {row['lin']:.1f} | {row['knn']:.1f}"
        yield f"| floor | `probe.py {row['floor']}` | {results} |  |  |"

    # The same rule for LIN and kNN. What it costs to be higher stands beside it.
    yield "\n| claim | here | FLOP, minutes | the paper, LIN | LIN here | kNN here |"
    yield "|---|---|---|---|---|---|"
    for words, a, b, paper in CLAIMS:
        tflop = cost[a][0] / cost[b][0]
        minutes = cost[a][1] / cost[b][1]
        lin = judge(runs[a]["lin"], runs[b]["lin"])
        knn = judge(runs[a]["knn"], runs[b]["knn"])
        yield f"| {words} | {a} / {b} | {tflop:.2f}, {minutes:.2f} | {paper} | {lin} | {knn} |"

    yield f"\n{2 * len(CLAIMS)} comparisons at 5 %: about one in twenty comes out by chance."
    logged = sum(len(found["lin"]) for found in runs.values())
    absent = ", ".join(missing) or "none"
    yield f"{logged} runs are logged. Missing, by variant and seed: {absent}."


# Colours of the picture -> their variants.
COLOURS = {
    "square 16, K = 1, 2, 4, 8, all": [f"square-16{k}" for k in ("-k1", "-k2", "-k4", "-k8", "")],
    "square 16 in 4, K = 4, all": ["square-16-4-k4", "square-16-4"],
    "mae, MAE's order": ["mae"],
    "square 16 in 4, 4 passes": ["square-16-4-short"],
    "patch random, K = 16, all": ["patch-random-k16", "patch-random"],
    "patch raster": ["patch-raster"],
    "square 16 in 4, no skips": ["no-skip"],
    "square 4": ["square-4"],
    "blob 7, 7 in 3, 9, 11 in 5": ["blob-7", "blob-7-3", "blob-9", "blob-11-5"],
    "scatter 9": ["scatter-9"],
}


def dots(runs, cost, floors, key, axis):
    """-> what a panel shows: a dot for each variant, on a line over the range of its seeds."""
    series = []
    for (label, names), colour in zip(COLOURS.items(), HUES):
        shown = [name for name in names if runs[name][key]]
        xs = [cost[name][axis] for name in shown]
        means = [mean(runs[name][key]) for name in shown]
        for x, name in zip(xs, shown):
            seeds = runs[name][key]
            series.append(Series([x, x], [min(seeds), max(seeds)], colour, "line"))
        if shown:
            series.append(Series(xs, means, colour, "dots", label))

    right = max(found[axis] for found in cost.values())
    for floor, colour in zip(floors, (GREY, DIM)):
        label = FLOORS[floor["floor"]]
        series.append(Series([0, right], [floor[key]] * 2, colour, "line", label))
    return series


def draw_evidence(runs, cost, floors):
    """-> the picture: LIN and kNN, against minutes and against FLOP."""
    minutes = []
    flop = []
    for key, words in (("lin", "LIN, top-1 %"), ("knn", "kNN, top-1 %")):
        series = dots(runs, cost, floors, key, 1)
        minutes.append(("", chart(column(2), 860, series, "minutes of a run, one core", words)))

        # One legend above the other panel is enough.
        series = [one._replace(label="") for one in dots(runs, cost, floors, key, 0)]
        flop.append(("", chart(column(2), 560, series, "TFLOP of a run", words)))
    note = """A dot is a variant: the mean of its seeds, each at the end of its own schedule. The
        line through it goes from the lowest seed to the highest. K is --last-rank; all: none. mae
        is MAE's order in RandSAC's decoder, not He et al.'s decoder."""
    return sheet("What accuracy costs: CIFAR-10, a small model", note, [minutes, flop])


def report():
    runs, missing = read_logs()
    floors = read_rows(LOGS / "floors.jsonl")
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    check(begin and end, f"{README} has no line {BEGIN} with a line {END} below it: add them")

    # Only now, when all has been read and holds, anything is written.
    cost = costs()
    text = "\n".join(describe(runs, missing, cost, floors))
    picture = draw_evidence(runs, cost, floors)
    write_whole(PICTURE, lambda file: picture.save(file, "png"))
    page = f"{before}{BEGIN}\n{text}\n{END}{after}"
    write_whole(README, lambda file: file.write(page.encode()))
    print(text)


def main(arguments):
    form = argparse.RawDescriptionHelpFormatter
    parser = randsac.Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, dest="command", metavar="run, speed or report")
    commands.add_parser("speed", help="time a few training steps of each variant")
    commands.add_parser("report", help="tables and picture from the logs")
    add = commands.add_parser("run", help="train and probe what has no log yet").add_argument
    words = "folder with train/CLASS/ and test/CLASS/ (default: %(default)s)"
    add("--data-dir", type=user_path, default="data/cifar10-jpeg", help=words)
    names = [*VARIANTS, "floors"]
    words = f"only these of {', '.join(names)}"
    add("--only", nargs="+", default=names, choices=names, metavar="X", help=words)
    add("--seeds", type=int, metavar="K", help="of each variant (default: 3 if a claim needs it)")
    add("--passes", type=int, metavar="N", help="over the images (default: 10)")
    add("--batch-size", type=int, metavar="B", help="images in a step (default: 64)")
    add("--lr", type=float, metavar="X", help="for each 256 images of the batch (default: 4e-3)")
    add("--out", type=user_path, default=LOGS, metavar="DIR", help="where the logs go or are")
    add("--seconds", type=float, default=math.inf, metavar="S", help="begin no run after these")
    add("--jobs", type=int, default=1, metavar="J", help="runs side by side (default: 1)")

    args = parser.parse_args(arguments)
    if args.command == "run":
        run_all(args)
    elif args.command == "speed":
        time_all()
    else:
        report()


if __name__ == "__main__":
    randsac.run_command(main)
