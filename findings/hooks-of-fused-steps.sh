#!/bin/sh
# torch: GradScaler and fused=True change what hooks of an optimizer's step see, and when they run.
#
# Guess: fused=True is the same optimizer, faster. With a GradScaler a hook before the step sees
# gradients as they are used, and a hook after it runs for each step that was taken.
# Seen, in four steps, one of which the scaler leaves out (its gradient is infinite):
#     fused=False: largest gradient seen 1,     hooks ran 3 times, weight moved by 0.3
#     fused=True:  largest gradient seen 65536, hooks ran 4 times, weight moved by 6.1e-06
# The hook clips to a norm of 1. With fused=True it clips gradients that are still times the scale;
# the kernel then divides them by it, and training stands still.
# Why: a fused optimizer takes scale and found_inf into its kernel; scaler.step() neither unscales
# nor decides, and always calls optimizer.step() (it also misleads Accelerate: its issue 4242).
# It matters to who puts clipping, logs of norms, moving averages of weights or counts of steps in
# hooks: fused=True, set for speed, breaks them in silence, under Adam hardly visibly.
# Remedy: scaler.unscale_(optimizer) before scaler.step(optimizer) (the last line of the output);
# whether a step was left out is seen by the scale before and after scaler.update().
# Versions: torch 2.14.1, Python 3.11, Linux, on a CPU. Date: 2026-11-27.
# It ends with 1 where this is no longer so.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.14.1
"$place/venv/bin/python" - <<'END'
import math

import torch


def train(fused, unscale=False):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu")  # it begins with a scale of 65536
    seen = []

    def clip(*_):
        seen.append(weight.grad.item())
        torch.nn.utils.clip_grad_norm_([weight], 1.0)

    optimizer.register_step_pre_hook(clip)
    for slope in (1.0, 1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(slope * weight).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    largest = max(filter(math.isfinite, seen))
    print(f"fused {fused}, unscale_ {unscale}: largest gradient {largest:.0f}", end=", ")
    print(f"{len(seen)} calls, moved by {-weight.item():.2g}")
    return len(seen), largest, round(-weight.item(), 4)


print("torch", torch.__version__)
as_guessed = train(fused=False) == (3, 1, 0.3)
surprise = train(fused=True) == (4, 65536, 0)
remedied = train(fused=True, unscale=True) == (4, 1, 0.3)
raise SystemExit(0 if as_guessed and surprise and remedied else 1)
END
