"""The paper's claims, tried at small scale: trains every variant, probes it, and reports what came out.

    python results/evidence.py run --data-dir DIR    # takes hours; may be stopped at any time and started again
    python results/evidence.py run --only mae        # only this variant
    python results/evidence.py report                # README's table and assets/evidence.png from the logs

All variants share one recipe, tuned for none of them. `run` calls randsac.py and probe.py as a user would and leaves
a log for each run in results/evidence/. A run that has its log is skipped, one that was cut off goes on, and of two
commands at work side by side each takes the next run that is free. (For Linux and macOS: Windows has no fcntl.)"""
import argparse, contextlib, fcntl, io, json, math, os, platform, shutil, signal, sys
from pathlib import Path
from statistics import mean, stdev
from subprocess import Popen, TimeoutExpired

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import randsac  # noqa: E402
from randsac import UserError, check, write_whole  # noqa: E402

LOGS, RUNS = ROOT / "results/evidence", ROOT / "runs/evidence"
README, PICTURE = ROOT / "README.md", ROOT / "assets/evidence.png"
BEGIN, END = "<!-- evidence -->", "<!-- /evidence -->"
PASSES = 1, 3, 10  # over the images, after which to probe; the last ends a run
POLL, PATIENCE = 0.5, 3  # seconds between two looks at a training; for it to end by itself
RECIPE = ("--dataset folder --dim 64 --heads 2 --depth 4 --decoder-depth 1 --lr 4e-3 --batch-size 64 "
          f"--epochs {PASSES[-1]}")
VARIANTS = {  # in the order of importance
    "square-16-4": "--segments square --hierarchy 16 4",
    "patch-raster": "--segments patch --order raster",
    "mae": "--segments mae",
    "patch-random": "--segments patch",
    "no-skip": "--segments square --hierarchy 16 4 --no-skip",
    "square-16": "--segments square --hierarchy 16",
    "square-4": "--segments square --hierarchy 4",
    "blob-11-5": "--segments blob --hierarchy 11 5",
    "blob-7": "--segments blob --hierarchy 7",
    "scatter-9": "--segments scatter --hierarchy 9"}
MORE_SEEDS = "patch-raster", "patch-random", "square-16-4", "mae", "no-skip"
JOBS = [(name, 0) for name in VARIANTS] + [(name, seed) for seed in (1, 2) for name in MORE_SEEDS]
JOBS.insert(1, ("floors", None))  # they need a checkpoint, any one
FLOORS = {"random-init": "--random-init", "pixels": "--features pixels"}  # ending of its files -> flags of probe.py
CLAIMS = [  # with what the paper prints, LIN on CIFAR-10
    ("random >> raster", "patch-random", "patch-raster", "75.53 against 55.53 in the paper's Table 2"),
    ("segments > patches", "square-16", "patch-random", "81.38 against 75.53 in Table 3"),
    ("segments > patches", "square-4", "patch-random", "79.38 against 75.53 in Table 3"),
    ("coherent > incoherent", "blob-7", "scatter-9", "82.52 against 78.59 in Table 5, with 7 and 9 segments too"),
    ("hierarchical > flat", "square-16-4", "square-16", "82.46 against 81.38 in Table 6"),
    ("hierarchical > flat", "blob-11-5", "blob-7", "82.71 against 82.52 in Table 6, for 7→3 and 7"),
    ("skip connections > none", "square-16-4", "no-skip", "the paper's figures are in its supplement"),
    ("RandSAC > MAE, equal passes", "square-16-4", "mae", "92.1 against 87.3 in Table 7")]

# ---------------------------------------------------------------------------------------------------------------- run
def call(script, *arguments, watch=lambda: None):
    """`python SCRIPT ARGUMENTS`, as a user would, with a watch() every POLL seconds. Stopped, it stops it."""
    # close_fds: it inherits what is inheritable, which is the lock of `claim`, so that an orphan keeps its run.
    child = Popen([sys.executable, str(ROOT / script), *map(str, arguments)], close_fds=False)
    code = None
    try:
        while code is None:
            with contextlib.suppress(TimeoutExpired):
                code = child.wait(POLL)
            watch()
    finally:  # Ctrl-C reaches the child too, and a second signal would end it before it has saved: wait a little
        with contextlib.suppress(TimeoutExpired):
            child.wait(PATIENCE)
        child.terminate()
        child.wait()
    check(code == 0, f"{script} ended with code {code}, see above: start again to go on")

@contextlib.contextmanager
def claim(job):
    """-> whether nobody else is at this job. The system frees the lock of a process that died, however it died."""
    RUNS.mkdir(parents=True, exist_ok=True)
    with open(RUNS / f"{job}.lock", "w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True

def copy_of(run, number):
    return run / f"pass-{number}/checkpoint.pt"

def read_metrics(run):
    path = run / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""  # the last line may be half written
    return [json.loads(row) for row in whole.splitlines()]

def keep_copy(run):
    """Copies checkpoint.pt, which every pass overwrites, to pass-N/ if pass N has just ended and is to be probed."""
    ends = [row for row in read_metrics(run) if "held_out_loss" in row]  # written just before the checkpoint
    if ends and ends[-1]["epoch"] in PASSES and not (copy := copy_of(run, ends[-1]["epoch"])).exists():
        content = (run / "checkpoint.pt").read_bytes()
        if torch.load(io.BytesIO(content), weights_only=True)["step"] == ends[-1]["step"]:
            copy.parent.mkdir(exist_ok=True)
            write_whole(copy, lambda file: file.write(content))

def train(run, flags):
    """Starts the run or goes on with it; copies are kept on the way."""
    resume = (run / "checkpoint.pt").exists()
    if run.exists() and not resume:
        shutil.rmtree(run)  # cut off before its first checkpoint
    keep_copy(run)
    call("randsac.py", *flags, "--out", run, *["--resume"] * resume, watch=lambda: keep_copy(run))
    check(copy_of(run, PASSES[-1]).exists(), f"{run} ended without pass {PASSES[-1]}: remove it and start again")

def probe(checkpoint, floor="", flags=""):
    """-> top-1 % of LIN and of kNN."""
    found = {}
    for key, protocol in ("lin", "linear"), ("knn", "knn"):
        result = checkpoint.with_name(f"probe-{protocol}{floor and '-' + floor}.json")
        if not result.exists():
            call("probe.py", checkpoint, "--protocol", protocol, *flags.split())
        found[key] = json.loads(result.read_text())["top1"]
    for cache in checkpoint.parent.glob("features*"):  # both protocols have used it, and it is large
        cache.unlink()
    return found

def machine():
    """What the minutes were measured on."""
    if randsac.pick_device("auto").type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())

def measure(name, seed, args):
    """Trains and probes -> the lines of a run's log: its settings, then one for each probed pass."""
    run, flags = RUNS / f"{name}-{seed}", f"{RECIPE} {VARIANTS[name]}"
    if not copy_of(run, PASSES[-1]).exists():
        train(run, [*flags.split(), "--seed", seed, "--data-dir", args.data_dir.resolve()])
    lines = [dict(name=name, flags=VARIANTS[name], seed=seed, recipe=RECIPE, data=args.data_dir.resolve().name,
                  machine=machine(), threads=args.threads, torch=torch.__version__)]
    minutes, step, batch = 0.0, 0, json.loads((run / "config.json").read_text())["batch_size"]
    for row in read_metrics(run):
        minutes += (row["step"] - step) * batch / row["images_per_s"] / 60  # of training alone: no pause counts
        step, copy = row["step"], copy_of(run, row["epoch"])
        if "held_out_loss" in row and copy.exists():
            lines.append({"pass": row["epoch"], "minutes": round(minutes, 2),
                          "held_out_loss": round(row["held_out_loss"], 5), **probe(copy)})
    missed = {*PASSES} - {line["pass"] for line in lines[1:]}
    if missed:
        print(f"{run.name}: no copy was kept of pass {', '.join(map(str, sorted(missed)))}; its log is without")
    return lines

def measure_floors():
    """-> the lines of floors.jsonl, none as long as there is no checkpoint, of which floors take only the sizes."""
    checkpoint = RUNS / "floors/checkpoint.pt"  # of its own, as the run may be another process's
    for found in [] if checkpoint.exists() else sorted(RUNS.glob("*/pass-*/checkpoint.pt"))[:1]:
        checkpoint.parent.mkdir(exist_ok=True)
        write_whole(checkpoint, lambda file: file.write(found.read_bytes()))
    return [dict(floor=flags, **probe(checkpoint, floor, flags)) for floor, flags in FLOORS.items()
            if checkpoint.exists()]

def run(args):
    check(args.data_dir.is_dir(), f"{args.data_dir} is not a folder: name the one with the images by --data-dir")
    check(args.threads > 0, f"--threads is {args.threads} but must be 1 or more")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the commands that are started
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it stops them too
    LOGS.mkdir(parents=True, exist_ok=True)
    for name, seed in JOBS:
        if name not in args.only:
            continue
        job = name if seed is None else f"{name}-{seed}"
        log = LOGS / f"{job}.jsonl"
        with claim(job) as free:
            if log.exists() or not free:
                print(f"{job}: {'done' if log.exists() else 'skipped, another process is at it'}", flush=True)
                continue
            print(f"{job}: starts", flush=True)
            lines = measure(name, seed, args) if name in VARIANTS else measure_floors()
            if lines:
                write_whole(log, lambda file: file.write("".join(json.dumps(line) + "\n" for line in lines).encode()))
            print(f"{job}: " + (json.dumps(lines[-1]) if lines else "waits for a first checkpoint, start again later"),
                  flush=True)

# ------------------------------------------------------------------------------------------------------------- report
RULE = """The rule, fixed before any result was seen: a claim is *reproduced* if the difference of mean LIN (after the
last pass, where nothing else is said) exceeds twice its standard error, *contradicted* if it is below minus that, else
*not seen at this budget*. A variant with one seed is given the standard deviation pooled over those with several. The
learning rate falls to zero only at the last pass: a point before it is not the end of a shorter run."""

def read_log(path):
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and run again") from error

def read_logs():
    """-> {variant: a list of probed passes for each seed}, settings of all runs, floors."""
    logs = {job: read_log(LOGS / f"{job[0]}-{job[1]}.jsonl") for job in JOBS if job[0] in VARIANTS}
    runs = {name: [log[1:] for job, log in logs.items() if job[0] == name and log] for name in VARIANTS}
    settings = [log[0] for log in logs.values() if log]
    check(settings, f"no logs in {LOGS}: python results/evidence.py run --data-dir DIR")
    mixed = [key for key in ("recipe", "data") if len({first[key] for first in settings}) > 1]
    check(not mixed, f"the runs logged in {LOGS} differ in {' and '.join(mixed)}: keep those of one kind")
    return {name: found for name, found in runs.items() if found}, settings, read_log(LOGS / "floors.jsonl")

def at(runs, number, key="lin"):
    """-> that value after that pass, of each run that was probed there."""
    return [line[key] for passes in runs for line in passes if line["pass"] == number]

def spread(values, digits=1):
    """mean ± sample standard deviation"""
    words = f"{mean(values):.{digits}f}" if values else "-"
    return words + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")

def pooled_deviation(groups):
    """Standard deviation pooled over the groups of more than one value, None where there are none."""
    groups = [values for values in groups if len(values) > 1]
    squares, freedom = sum(stdev(v) ** 2 * (len(v) - 1) for v in groups), sum(len(v) - 1 for v in groups)
    return math.sqrt(squares / freedom) if freedom else None

def verdict(a, b, pooled):
    """LIN of the seeds of two variants -> whether a > b, in words."""
    if not a or not b:
        return "not run yet"
    difference, words = mean(a) - mean(b), f"{spread(a, 2)} against {spread(b, 2)}, difference {mean(a) - mean(b):+.2f}"
    if pooled is None:
        return f"not decided: one seed each ({words})"
    error = math.sqrt(sum((stdev(v) if len(v) > 1 else pooled) ** 2 / len(v) for v in (a, b)))
    found = "reproduced" if difference > 2 * error else "contradicted" if difference < -2 * error else \
        "not seen at this budget"
    return f"**{found}** ({words}, standard error {error:.2f})"

def equal_minutes(a, b, pooled):
    """The verdict at the last minute that all runs [{minutes, lin} ...] of both variants reached."""
    if not a or not b:
        return "not run yet"
    first, last = (f(passes[i]["minutes"] for passes in a + b) for f, i in ((max, 0), (min, -1)))
    if first > last:
        return f"not comparable: one has its first probe after {first:.1f} minutes, the other its last after {last:.1f}"
    a, b = ([np.interp(last, *zip(*[(line["minutes"], line["lin"]) for line in passes])) for passes in runs]
            for runs in (a, b))
    return f"{verdict(a, b, pooled)}, after {last:.1f} minutes, on straight lines between probed points"

def flops(config):
    """Floating-point operations of one image's forward pass, counted."""
    images, ranks = torch.zeros(1, 3, config.image_size, config.image_size), randsac.sample_ranks(config, 1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        randsac.RandSAC(config)(images, ranks, trim=True)
    return counter.get_total_flops()

def draw_evidence(runs, floors):
    """Accuracy against passes and against minutes
    LIN, top-1 % of the test images, mean over seeds. Dots: probed; lines between them: only a guide."""
    import visualize as vz  # here, as `run` needs no pictures
    hues = [vz.BLUE, vz.RED, vz.INK, vz.ORANGE, "#56B4E9", vz.GREEN, "#8C510A", "#882255", vz.PINK, "#999933"]
    colours, charts = dict(zip(VARIANTS, hues)), []
    floors = [line["lin"] for line in floors if line["floor"] == FLOORS["random-init"]]
    for key, words in ("pass", "passes over the images"), ("minutes", "minutes of training"):
        series = []
        for name, found in runs.items():
            passes = [number for number in PASSES if at(found, number)]
            points = [[mean(at(found, number, k)) for number in passes] for k in (key, "lin")]
            series += [(*points, colours[name], style) for style in (vz.LINE, vz.DOTS)]
        end = max(x for xs, *_ in series for x in xs)
        series += [([0, end], [lin, lin], vz.GREY, vz.LINE) for lin in floors]
        charts.append([("", vz.chart(640, words, series))])
    legend = [(name, colours[name]) for name in runs] + [("random encoder", vz.GREY) for _ in floors]
    legend = [vz.swatch(words, vz.share(4), colour, colour) for words, colour in legend]
    return vz.sheet(draw_evidence, *[legend[i:i + 4] for i in range(0, len(legend), 4)], *charts)

def describe(runs, settings, floors):
    """-> the lines of README between the markers."""
    last, recipe = PASSES[-1], settings[0]["recipe"]
    where = sorted({f"{s['machine']} (threads: {s['threads']}, PyTorch {s['torch']})" for s in settings})
    yield (f"All variants: `python randsac.py {recipe}`\non {settings[0]['data']}; minutes of training on "
           f"{' and '.join(where)}.\nLIN and kNN: top-1 %, mean ± sample standard deviation over seeds.\n")
    yield f"| variant | flags | seeds | {' | '.join(f'LIN, pass {n}' for n in PASSES)} | kNN, pass {last} | minutes |"
    yield "|---" * (len(PASSES) + 5) + "|"
    for name, found in runs.items():
        columns = [name, f"`{VARIANTS[name]}`", str(len(found)), *(spread(at(found, n)) for n in PASSES),
                   spread(at(found, last, "knn")), spread(at(found, last, "minutes"))]
        yield f"| {' | '.join(columns)} |"
    for line in floors:
        yield (f"| floor | `probe.py {line['floor']}` | 1 |" + " |" * (len(PASSES) - 1) + f" {line['lin']:.1f} | "
               f"{line['knn']:.1f} | |")
    raster = VARIANTS["patch-raster"]
    pixels, patches = (randsac.Config(**vars(randsac.make_parser("").parse_args(f"{recipe} {raster} {more}".split())))
                       for more in ("--patch-size 1", ""))
    yield (f"| pixel-raster | `{raster} --patch-size 1` | 0 |" + " |" * (len(PASSES) + 1) + f" out of reach: "
           f"{pixels.tokens} tokens an image, {flops(pixels) / flops(patches):.0f} times patch-raster's arithmetic |")
    yield "\n![LIN against passes and against minutes](assets/evidence.png)\n"
    pooled = pooled_deviation([at(found, last) for found in runs.values()])
    for claim, a, b, paper in CLAIMS:
        found = verdict(*(at(runs.get(name, []), last) for name in (a, b)), pooled)
        yield f"- {claim}, {a} against {b} ({paper}): {found}"
    yield ("- RandSAC > MAE, equal minutes, square-16-4 against mae: "
           + equal_minutes(*(runs.get(name, []) for name in ("square-16-4", "mae")), pooled))
    done, total = sum(map(len, runs.values())), sum(name in VARIANTS for name, _ in JOBS)
    if done < total:
        several = ", ".join(name for name, found in runs.items() if len(found) > 1) or "none"
        yield (f"\n{done} of {total} runs are logged, so these verdicts are preliminary. Variants with several seeds: "
               f"{several}.")
    yield f"\n{RULE}"

def report(args):
    runs, settings, floors = read_logs()
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    check(begin and end, f"{README} has no line {BEGIN} with a line {END} below it: put them where the table should go")
    text = "\n".join(describe(runs, settings, floors))
    picture = draw_evidence(runs, floors)
    write_whole(PICTURE, lambda file: picture.save(file, "png"))
    write_whole(README, lambda file: file.write(f"{before}{BEGIN}\n{text}\n{END}{after}".encode()))
    print(text)

def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="run or report")
    add = commands.add_parser("run", help="train and probe what has no log yet")
    add.set_defaults(command=run)
    add.add_argument("--data-dir", type=Path, default=Path("data/cifar10-jpeg"), help="folder with train/CLASS/ and "
                     "test/CLASS/ (default: data/cifar10-jpeg)")
    add.add_argument("--threads", type=int, default=1, help="of each training (default: 1)")
    add.add_argument("--only", nargs="+", default=[*VARIANTS, "floors"], choices=[*VARIANTS, "floors"], metavar="NAME",
                     help=f"only these of {', '.join(VARIANTS)}, floors")
    commands.add_parser("report", help="README's table and the picture, from the logs").set_defaults(command=report)
    args = parser.parse_args(arguments)
    args.command(args)

if __name__ == "__main__":
    randsac.run_command(main)
