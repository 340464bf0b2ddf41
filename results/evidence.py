"""The paper's claims, tried at small scale: trains every variant, probes it, judges what came out.

    python results/evidence.py run --data-dir DIR   # many hours; stop it, start it again
    python results/evidence.py run --only mae       # only this variant
    python results/evidence.py speed                # images/s of each variant, some minutes
    python results/evidence.py report               # results/README.md and assets/evidence.png

`run` does what randsac.py and probe.py do. A run that has its log is skipped, one that was cut off
goes on, and two of these commands side by side share the work (not on Windows).
"""

import argparse
import json
import platform
import shutil
import sys
import time
from pathlib import Path
from statistics import mean, median, stdev, variance

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import probe
import randsac
from randsac import UserError, check, own, user_path, write_whole
from visualize import DIM, GREY, HUES, Series, chart, column, sheet

LOGS = ROOT / "results/evidence"
RUNS = ROOT / "runs/evidence"
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
JOBS = {"floors": ("floors", 0)}  # name of its files -> variant, seed
for name in VARIANTS:
    judged = any(name in claim for claim in CLAIMS)
    for seed in range(3 if judged else 1):
        JOBS[f"{name}-{seed}"] = (name, seed)


def config_of(flags):
    """-> the Config of a run with the recipe and these flags."""
    given = randsac.make_parser("").parse_args(f"{RECIPE} {flags}".split())
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
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(path, lambda file: file.write(text.encode()))


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


def run_one(job, data_dir, lock):
    """Trains, probes and logs, unless that is done or another process is at it."""
    log = LOGS / f"{job}.jsonl"
    try:
        own(lock, f"{job}: skipped, another process is at it")
    except UserError as busy:
        print(busy, flush=True)
        return
    if log.exists():
        print(f"{job}: done", flush=True)
        return

    # Go on with the run, or begin: anew where it was cut off before its first checkpoint.
    print(f"{job}: starts", flush=True)
    run = RUNS / job
    name, seed = JOBS[job]
    flags = VARIANTS.get(name, "--max-steps 1")  # floors take no more of a run than its sizes
    words = ["--resume", str(run)]
    if not (run / "checkpoint.pt").exists():
        shutil.rmtree(run, ignore_errors=True)
        words = [*f"{RECIPE} {flags} --seed {seed}".split(), "--out", str(run)]
    code = randsac.main([*words, "--data-dir", str(data_dir)])
    check(code == 0, f"{job} was stopped: start again to go on")

    # Probe. What the log says first is how the run was made.
    if name == "floors":
        rows = [{"floor": floor, **lin_and_knn(run, floor)} for floor in FLOORS]
    else:
        settings = {"name": name, "flags": flags, "seed": seed, "recipe": RECIPE}
        settings |= {"data": data_dir.name, **machine()}
        end = read_rows(run / "metrics.jsonl")[-1]
        results = {"pass": end["epoch"], "held_out_loss": end["held_out_loss"]}
        rows = [settings, results | lin_and_knn(run)]

    # The log comes last: where there is one, the run is whole.
    write_rows(log, rows)
    print(f"{job}: {json.dumps(rows[-1])}", flush=True)


def run_all(data_dir, only):
    check(data_dir.is_dir(), f"{data_dir} is not a folder: give --data-dir")
    RUNS.mkdir(parents=True, exist_ok=True)
    for job in JOBS:
        if JOBS[job][0] in only:
            with open(RUNS / f"{job}.lock", "w") as lock:
                run_one(job, data_dir.resolve(), lock)


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
    for job, (name, _) in JOBS.items():
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

    args = parser.parse_args(arguments)
    if args.command == "run":
        run_all(args.data_dir, args.only)
    elif args.command == "speed":
        time_all()
    else:
        report()


if __name__ == "__main__":
    randsac.run_command(main)
