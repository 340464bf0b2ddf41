"""How fast a training step is on this machine, and how much memory it takes.

    python results/speed.py                    # on the GPU, if there is one
    python results/speed.py --out speed.jsonl  # a row for each setting, as soon as it is timed

TFLOP/s counts matrix products only, forward and backward; its share is of the rate of one large
product in the same precision. `host` is the time that Python takes to ask for a step: where it is
as long as the step itself, the device waits, and a larger batch costs little more.
"""

import argparse
import json
import platform
import re
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import randsac

# Model, image size, patch size, --compile, batch sizes. Where memory is short, a row says so.
GPU = [
    ("nano", 32, 4, False, (512, 2048)),
    ("tiny", 32, 4, False, (512, 2048)),
    ("small", 32, 4, False, (512, 2048)),
    ("small", 32, 4, True, (512,)),  # about 45 s more, and results/gpu.sh gives 120 for all
    ("small", 64, 4, False, (256,)),
    ("small", 96, 4, False, (128,)),
    ("base", 192, 16, False, (128, 512)),
]
CPU = [("nano", 32, 4, False, (32, 128))]


def machine():
    """-> the name of the GPU or, where there is none, of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search("model name.*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()


def wait(device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def flops(config):
    """-> floating-point operations of a training step for one image, forward and backward, counted:
    matrix products only, on the path that training takes."""
    model = randsac.RandSAC(config)
    images = torch.zeros(1, 3, config.image_size, config.image_size)
    ranks = randsac.sample_ranks(config, 1)
    # A fused attention would count as nothing.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        randsac.batch_loss(model, images, ranks, config).backward()
    return counter.get_total_flops()


def peak_rate(device, dtype):
    """-> the rate of one large matrix product, in FLOP/s: the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(10):
        wait(device)
        start = time.perf_counter()
        a @ a
        wait(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def time_step(config, device, seconds):
    """Training steps of this config -> seconds of a step and of the host's part of it, both the
    median of several, and the peak memory in bytes (0 on a CPU)."""
    model = randsac.RandSAC(config).to(device)
    optimizer = randsac.make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    if config.compile:
        model.compile()
    shape = (config.batch_size, 3, config.image_size, config.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)

    def step():
        return randsac.training_step(model, optimizer, scaler, images, config, 0, 10)

    for _ in range(3):  # the first steps choose kernels and take memory
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    whole = []
    host = []
    end = time.perf_counter() + seconds
    while len(whole) < 3 or time.perf_counter() < end:
        wait(device)
        start = time.perf_counter()
        step()
        host.append(time.perf_counter() - start)
        for _ in range(4):
            step()
        wait(device)
        whole.append((time.perf_counter() - start) / 5)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return median(whole), median(host), memory


def main(arguments):
    parser = randsac.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of rows to write (default: none)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each setting (default: 1)")
    args = parser.parse_args(arguments)
    device = randsac.pick_device("auto")
    precision = randsac.pick_precision("auto", device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in training

    peak = peak_rate(device, getattr(torch, precision))
    where = {"machine": machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    rows = [{**where, "precision": precision, "peak_tflops": round(peak / 1e12, 3)}]
    print(json.dumps(rows[0]), flush=True)
    for name, size, patch, compiled, batches in GPU if device.type == "cuda" else CPU:
        model = {"model": name, "image_size": size, "patch_size": patch}
        cost = flops(randsac.Config(**model))
        for batch in batches:
            row = model | {"batch_size": batch, "compile": compiled}
            config = randsac.Config(**row)
            row["gflop_an_image"] = round(cost / 1e9, 2)
            try:
                seconds, host, memory = time_step(config, device, args.seconds)
                rate = batch / seconds
                row |= {"ms": round(1000 * seconds, 2), "host_ms": round(1000 * host, 2)}
                row |= {"images_per_s": round(rate), "memory_gb": round(memory / 1e9, 2)}
                row["share_of_peak"] = round(rate * cost / peak, 3)
            except RuntimeError as error:  # the others are timed all the same
                row["failed"] = " ".join(str(error).split())[:300]
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                args.out.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return 0


if __name__ == "__main__":
    randsac.run_command(main)
