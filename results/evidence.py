"""The paper's claims, tried at small scale: trains every variant, probes it, judges what came out.

    python results/evidence.py run --data-dir DIR   # many hours; stop it, start it again
    python results/evidence.py run --only mae       # only this variant
    python results/evidence.py speed                # images/s of each variant, some minutes
    python results/evidence.py report               # results/README.md and assets/evidence.png

All variants share one recipe, tuned for none of them. `run` calls randsac.py and probe.py as a user
would, and leaves a log of each run in results/evidence/. A run that has its log is skipped, one
that was cut off goes on, and two of these commands side by side share the work: give each its
cores, as in OMP_NUM_THREADS=1. (For Linux and macOS: Windows has no such locks.)
"""

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from pathlib import Path
from statistics import mean, median, stdev, variance
from subprocess import Popen, TimeoutExpired

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import randsac
from randsac import UserError, check, own, user_path, write_whole
from visualize import DIM, GREY, HUES, Series, chart, column, sheet

LOGS = ROOT / "results/evidence"
RUNS = ROOT / "runs/evidence"
README = ROOT / "results/README.md"
PICTURE = ROOT / "assets/evidence.png"
BEGIN = "<!-- evidence -->"
END = "<!-- /evidence -->"
PATIENCE = 3  # seconds that a stopped training has to save
IMAGES = 50_000  # training images of CIFAR-10: a pass

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
SEEDS = 3  # of each side of a claim; the other variants have one
FLOORS = {"--random-init": "untrained encoder", "--features pixels": "raw pixels"}  # of probe.py
JOBS = {"floors": ("floors", 0)}  # name of its files -> variant, seed
for name in VARIANTS:
    judged = any(name in claim for claim in CLAIMS)
    for seed in range(SEEDS if judged else 1):
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


def write_text(path, text):
    write_whole(path, lambda file: file.write(text.encode()))


def write_rows(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def machine():
    """-> where this runs, for a log."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    name = [*names, platform.machine()][0]
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return {"machine": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


# ------------------------------------------------------------------------------------------------
# run


def call(script, *arguments):
    """`python SCRIPT ARGUMENTS`, as a user would. Stopped, it stops it."""
    # close_fds: it inherits the lock of `claim`, so that an orphan keeps its run.
    words = [sys.executable, str(ROOT / script), *map(str, arguments)]
    child = Popen(words, close_fds=False)
    try:
        code = child.wait()
    finally:
        # Ctrl-C has reached the child too, and a second signal would end it before it has saved.
        with contextlib.suppress(TimeoutExpired):
            child.wait(PATIENCE)
        child.terminate()
        child.wait()
    check(code == 0, f"{script} ended with code {code}, see above: start again to go on")


@contextlib.contextmanager
def claim(job):
    """-> whether nobody else is at this job. The system frees the lock of a process that died."""
    RUNS.mkdir(parents=True, exist_ok=True)
    with open(RUNS / f"{job}.lock", "w") as lock:
        os.set_inheritable(lock.fileno(), True)
        free = True
        try:
            own(lock, f"another process is at {job}")
        except UserError:
            free = False
        yield free


def train(job, flags, data_dir):
    """Starts the run or goes on with it -> its directory."""
    run = RUNS / job
    if (run / "checkpoint.pt").exists():
        call("randsac.py", "--resume", run, "--data-dir", data_dir)
    else:
        shutil.rmtree(run, ignore_errors=True)  # cut off before its first checkpoint
        call("randsac.py", *RECIPE.split(), *flags.split(), "--data-dir", data_dir, "--out", run)
    return run


def probe(run, flags=""):
    """-> top-1 % of LIN and of kNN."""
    call("probe.py", run / "checkpoint.pt", *flags.split())
    top1 = {}
    for row in read_rows(run / "probes.jsonl"):  # earlier probes stand first: the last one counts
        top1[row["protocol"]] = row["top1"]
    return {"lin": top1["linear"], "knn": top1["knn"]}


def measure(job, data_dir):
    """Trains and probes -> the rows of the log."""
    # The floors take no more from a checkpoint than its sizes.
    name, seed = JOBS[job]
    if name == "floors":
        run = train(job, "--max-steps 1", data_dir)
        return [{"floor": flags, **probe(run, flags)} for flags in FLOORS]

    run = train(job, f"{VARIANTS[name]} --seed {seed}", data_dir)
    found = probe(run)
    end = read_rows(run / "metrics.jsonl")[-1]
    settings = {"name": name, "flags": VARIANTS[name], "seed": seed, "recipe": RECIPE}
    settings |= {"data": data_dir.name, **machine()}
    return [settings, {"pass": end["epoch"], "held_out_loss": end["held_out_loss"], **found}]


def run_all(args):
    check(args.data_dir.is_dir(), f"{args.data_dir} is not a folder: give --data-dir")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it stops them too
    LOGS.mkdir(parents=True, exist_ok=True)
    for job, (name, _) in JOBS.items():
        if name not in args.only:
            continue
        log = LOGS / f"{job}.jsonl"
        with claim(job) as free:
            if log.exists():
                words = "done"
            elif not free:
                words = "skipped, another process is at it"
            else:
                # The log comes last: where there is one, the run is whole.
                print(f"{job}: starts", flush=True)
                rows = measure(job, args.data_dir.resolve())
                write_rows(log, rows)
                words = json.dumps(rows[-1])
            print(f"{job}: {words}", flush=True)


# ------------------------------------------------------------------------------------------------
# speed and cost

ROUNDS = 15
STEPS = 2  # of each variant in a round


def time_all(args):
    """Times the training steps of all variants in turn, so that a change of the machine's pace
    meets them alike, in processor time, so that other programs count as little as can be."""
    torch.set_num_threads(1)
    parts = {}
    for name, flags in VARIANTS.items():
        config = config_of(f"{flags} --device cpu")
        model = randsac.RandSAC(config)
        parts[name] = model, randsac.make_optimizer(model, config), config

    # What the images show changes nothing.
    images = torch.randint(256, (config.batch_size, 3, 32, 32), dtype=torch.uint8)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
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
    rates = {}
    for row in read_rows(LOGS / "speed.jsonl")[1:]:
        rates[row["name"]] = row["images_per_s"]
    check(rates.keys() >= VARIANTS.keys(), "not all is timed: python results/evidence.py speed")

    found = {}
    for name, flags in VARIANTS.items():
        config = config_of(flags)
        images = config.epochs * IMAGES
        found[name] = images * flops(config) / 1e12, images / rates[name] / 60
    return found


# ------------------------------------------------------------------------------------------------
# report: the verdicts

# Two-sided 5 % critical values of Student's t for 1, 2, ... degrees of freedom: NIST/SEMATECH
# e-Handbook of Statistical Methods, section 1.3.6.7.2, column 0.975.
CRITICAL = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228


def welch(a, b):
    """-> Welch's t of two samples that differ, its Welch-Satterthwaite degrees of freedom."""
    error_a = variance(a) / len(a)
    error_b = variance(b) / len(b)
    t = (mean(a) - mean(b)) / math.sqrt(error_a + error_b)
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
    return f"{difference}, t {t:.2f} at {freedom:.1f}: {verdict}"


# ------------------------------------------------------------------------------------------------
# report: table and picture


def read_logs():
    """-> {variant: the last row of each of its runs}, settings of all runs, the jobs missing."""
    runs = {name: [] for name in VARIANTS}
    settings = []
    missing = []
    for job, (name, _) in JOBS.items():
        path = LOGS / f"{job}.jsonl"
        rows = read_rows(path)
        if not rows:
            missing.append(job)
        elif name != "floors":
            first = rows[0]
            fits = first["recipe"] == RECIPE and first["flags"] == VARIANTS[name]
            check(fits, f"{path} is of other flags: remove it, and run again")
            settings.append(first)
            runs[name].append(rows[-1])
    check(settings, f"no logs in {LOGS}: python results/evidence.py run --data-dir DIR")

    # What is compared must have been trained on the same images.
    data = {first["data"] for first in settings}
    check(len(data) == 1, f"the logs in {LOGS} are of several data sets: {sorted(data)}")
    return runs, settings, missing


def values(rows, key):
    return [row[key] for row in rows]


def spread(numbers):
    """mean ± sample standard deviation"""
    if not numbers:
        return "-"
    if len(numbers) == 1:
        return f"{numbers[0]:.1f}"
    return f"{mean(numbers):.1f} ± {stdev(numbers):.1f}"


def table(*rows):
    """Rows of cells, the first of them the head -> lines of Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def describe(runs, settings, missing, cost, floors):
    """-> the lines of the README between the markers."""
    where = {f"{s['machine']} (threads: {s['threads']}, PyTorch {s['torch']})" for s in settings}
    yield f"All variants: `python randsac.py {RECIPE}`"
    yield f"and the flags of the table, on {settings[0]['data']}; {' and '.join(sorted(where))}."
    yield "LIN and kNN: top-1 %, mean ± standard deviation over seeds, at the end of a run.\n"

    rows = [["variant", "flags", "seeds", "LIN", "kNN", "TFLOP", "minutes"]]
    for name, found in runs.items():
        cells = [name, f"`{VARIANTS[name]}`", str(len(found))]
        cells += [spread(values(found, "lin")), spread(values(found, "knn"))]
        cells += [f"{number:.1f}" for number in cost[name]]
        rows.append(cells)
    for floor in floors:
        numbers = [f"{floor[key]:.1f}" for key in ("lin", "knn")]
        rows.append(["floor", f"`probe.py {floor['floor']}`", "1", *numbers, "", ""])
    yield from table(*rows)
    yield "\n![LIN and kNN against minutes and FLOP](../assets/evidence.png)\n"

    # The same rule for LIN and kNN. What it costs to be higher stands beside it.
    rows = [["claim", "here", "FLOP, minutes", "the paper, LIN", "LIN here", "kNN here"]]
    for words, a, b, paper in CLAIMS:
        ratios = [f"{one / other:.2f}" for one, other in zip(cost[a], cost[b])]
        cells = [words, f"{a} / {b}", ", ".join(ratios), paper]
        cells += [judge(values(runs[a], key), values(runs[b], key)) for key in ("lin", "knn")]
        rows.append(cells)
    yield from table(*rows)
    yield f"\n{2 * len(CLAIMS)} comparisons at 5 %: about one in twenty comes out by chance."
    absent = ", ".join(missing or ["none"])
    yield f"{len(settings)} runs are logged. Missing, by variant and seed: {absent}."


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
        xs = []
        ys = []
        for name in filter(runs.get, names):  # those that have run
            found = values(runs[name], key)
            xs.append(cost[name][axis])
            ys.append(mean(found))
            series.append(Series([xs[-1]] * 2, [min(found), max(found)], colour, "line"))
        if xs:
            series.append(Series(xs, ys, colour, "dots", label))

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


def report(args):
    runs, settings, missing = read_logs()
    floors = read_rows(LOGS / "floors.jsonl")
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    check(begin and end, f"{README} has no line {BEGIN} with a line {END} below it: add them")

    # Only now, when all has been read and holds, anything is written.
    cost = costs()
    text = "\n".join(describe(runs, settings, missing, cost, floors))
    picture = draw_evidence(runs, cost, floors)
    write_whole(PICTURE, lambda file: picture.save(file, "png"))
    write_text(README, f"{before}{BEGIN}\n{text}\n{END}{after}")
    print(text)


def main(arguments):
    parser = randsac.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="run, speed or report")
    runs = commands.add_parser("run", help="train and probe what has no log yet")
    runs.set_defaults(command=run_all)
    words = "folder with train/CLASS/ and test/CLASS/ (default: data/cifar10-jpeg)"
    folder = Path("data/cifar10-jpeg")
    runs.add_argument("--data-dir", type=user_path, default=folder, help=words)
    names = [*VARIANTS, "floors"]
    words = f"only these of {', '.join(names)}"
    runs.add_argument("--only", nargs="+", default=names, choices=names, metavar="X", help=words)
    times = commands.add_parser("speed", help="time a few training steps of each variant")
    times.set_defaults(command=time_all)
    reports = commands.add_parser("report", help="tables and picture from the logs")
    reports.set_defaults(command=report)
    args = parser.parse_args(arguments)
    args.command(args)


if __name__ == "__main__":
    randsac.run_command(main)
