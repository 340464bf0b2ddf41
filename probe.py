"""The evaluation protocols of Section 5.1: from a checkpoint to a number. Masks and decoder are thrown away; the
unmasked encoder turns an image into tokens, and the mean of its last block's tokens is the image's feature.

    python probe.py runs/NAME/checkpoint.pt                              # LIN, the paper's first column
    python probe.py runs/NAME/checkpoint.pt --random-init                # a floor: the same encoder, untrained
    python probe.py runs/NAME/checkpoint.pt --features pixels            # a floor: no encoder at all
    python probe.py runs/NAME/checkpoint.pt --protocol layers            # LIN at every depth
    python probe.py runs/NAME/checkpoint.pt --protocol finetune          # FT, the paper's second column
    python probe.py runs/NAME/checkpoint.pt --dataset folder --data-dir DIR --image-size 224   # transfer

protocols, and what they cost (a pass: the encoder looks at every image once; 60,000 CIFAR images and the nano model
take 2 minutes on two CPU cores, seconds on a GPU):
  linear      LIN. Frozen features, computed once and kept beside the checkpoint; multinomial logistic regression solved
              to its optimum, so that there is no training to tune. 1 pass and half a minute; again: half a minute
  knn         weighted vote of the 20 nearest training images by cosine similarity, nothing is learned. 1 pass, seconds
  layers      LIN at every encoder depth, for bars here and visualize.py's picture. 1 pass, half a minute a layer
  linear-sgd  LIN the paper's way: 90 epochs of a linear layer on augmented images through the frozen encoder. 90 passes
  finetune    FT: encoder and linear layer trained end to end, with the usual supervised ViT recipe. 100 epochs, each
              about 4 passes: a GPU's job. With --from-scratch, the paper's "supervised" row

Each prints a line and writes probe-PROTOCOL.json beside the checkpoint (floors and transfer have names of their own).
All accuracies are in percent of the test images, whose labels nothing but these accuracies ever sees.
"""
import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import v2
from tqdm import tqdm

from randsac import (Config, RandSAC, UserError, augment, autocast, check, learning_rate, load_checkpoint, load_images,
                     normalize, pick_device, restore, run_command, seeded, write_whole)

L2_GRID = [10.0 ** -k for k in range(1, 9)]  # strong to weak: each fit starts from the one before
DEFAULTS = {"linear-sgd": dict(epochs=90, batch_size=256, lr=0.1), "finetune": dict(epochs=100, batch_size=256, lr=1e-3)}
NEXT = {"linear": ["--random-init"], "linear-random-init": ["--features", "pixels"],
        "linear-pixels": ["--protocol", "layers"], "finetune": ["--protocol", "finetune", "--from-scratch"]}
progress = functools.partial(tqdm, mininterval=0.5 if sys.stderr.isatty() else 30)


def read_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="checkpoint.pt of a run; results go beside it")
    add("--protocol", choices=["linear", "knn", "layers", "linear-sgd", "finetune"], default="linear",
        help="see above (default: linear)")
    add("--random-init", "--from-scratch", action="store_true", help="fresh random weights in place of the trained ones: "
        "a floor, or with finetune (which then has no layer-wise decay) the paper's supervised row")
    add("--features", choices=["encoder", "pixels"], default="encoder",
        help="pixels: no encoder, the image itself (at most 32 x 32) is the feature, the other floor")
    add("--dataset", help="probe on other images (default: those of the checkpoint)")
    add("--data-dir", help="where they lie or go (default: as in training, with --dataset: data)")
    add("--image-size", type=int, help="probe at another size, in pixels (default: that of training)")
    add("--epochs", type=int, help="passes over the training images (default: linear-sgd 90, finetune 100)")
    add("--batch-size", type=int, help="images in a step (default: 256)")
    add("--lr", type=float, help="peak learning rate for each 256 images of the batch (default: linear-sgd 0.1, "
        "finetune 0.001)")
    add("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    args = parser.parse_args(arguments)
    trained = [name for name in ("epochs", "batch_size", "lr") if getattr(args, name) is not None]
    check(not trained or args.protocol in DEFAULTS, f"--{(trained + [''])[0].replace('_', '-')} is for linear-sgd and "
          f"finetune only: nothing is trained in steps by --protocol {args.protocol}")
    check(args.features == "encoder" or args.protocol in ("linear", "knn") and not args.random_init,
          "--features pixels has no encoder: use it with linear or knn, and without --random-init")
    return args


def probe_config(trained, args):
    """The checkpoint's Config -> that of the probe: its images, and how linear-sgd and finetune train."""
    given = {name: getattr(args, name) for name in ("dataset", "data_dir", "image_size", "epochs", "batch_size", "lr")}
    given = {name: value for name, value in given.items() if value is not None}
    elsewhere = dict(data_dir="data") if given.get("dataset", trained.dataset) != trained.dataset else {}
    # An image that is not to be segmented may have any size that the patch size divides.
    return dataclasses.replace(trained, **{
        **dict(segments="patch", hierarchy=(), weight_decay=0.05, warmup=0.05, seed=args.seed, device=args.device),
        **elsewhere, **DEFAULTS.get(args.protocol, {}), **given})


def result_name(trained, config, args):
    """Of what `probe-NAME.json` is the result: floors and transfer never overwrite the checkpoint's own number."""
    elsewhere = config.dataset == "folder" and Path(config.data_dir).resolve() != Path(trained.data_dir).resolve()
    return "-".join(
        [args.protocol] + ["from-scratch" if args.protocol == "finetune" else "random-init"] * args.random_init
        + ["pixels"] * (args.features == "pixels") + [config.dataset] * (config.dataset != trained.dataset or elsewhere)
        + [Path(config.data_dir).resolve().name] * elsewhere
        + [f"{config.image_size}px"] * (config.image_size != trained.image_size))


def load_labelled(config):
    """-> training images and labels, test images and labels, class names. UserError where there is nothing to probe with."""
    (images, labels, names), (test_images, test_labels, _) = (load_images(config, train) for train in (True, False))
    check(labels.min() >= 0, f"the images of {config.data_dir} have no labels, which every probe needs: sort them into "
          "train/CLASS/ and test/CLASS/, or choose another --dataset")
    check(len(labels.unique()) > 1, f"all images of {config.data_dir} are of one class: a probe needs two or more")
    check(len(test_images), f"{config.data_dir} has no test images, which a probe is measured on: put some in test/CLASS/")
    return images, labels, test_images, test_labels, names


def make_encoder(saved, trained, args):
    """The checkpoint's model, or with --random-init one that never saw an image."""
    torch.manual_seed(args.seed)
    model = RandSAC(trained)
    if not args.random_init:
        restore(model, saved["model"], args.checkpoint)
    return model.eval().requires_grad_(args.protocol == "finetune")


# ---------------------------------------------------------------------------------------------------------------------
# Features of a frozen encoder

def pooled(model, depths, x):
    """x [B,3,H,W] -> [B,depths,D]: the outputs of the last `depths` blocks, normalized as `encode` does, mean of tokens."""
    return torch.stack([F.layer_norm(h, h.shape[-1:]).mean(1) for h in model.encode_layers(x)[-depths:]], 1)


def pixels(x):
    """x [B,3,H,W] -> [B,1,3*H*W], at most 32 x 32 pixels: the floor is solved exactly too, and that is cubic in this."""
    return F.adaptive_avg_pool2d(x, min(32, x.shape[-1])).flatten(1)[:, None]


def outputs(function, images, config, device, what):
    """function of all uint8 images [n,3,H,W], batch by batch -> [n,...], float32 on the CPU."""
    results = []
    with torch.inference_mode(), autocast(device), progress(total=len(images), desc=what, unit="img") as bar:
        for batch in images.split(64 if device.type == "cpu" else 1024):  # on a CPU a batch should stay in its cache
            results.append(function(normalize(batch.to(device), config.image_size)).float().cpu())
            bar.update(len(batch))
    return torch.cat(results)


def digest(images):
    """sha256 of the pixels: whatever was changed, added or left out, features of other images are never taken for these."""
    return hashlib.sha256(images.numpy()).hexdigest()


def frozen_features(function, images, test_images, config, device, cache, key):
    """-> features [n,K,D] of training and test images, from the file `cache` where it was made with the same key."""
    key = json.dumps([*key, config.image_size, digest(images), digest(test_images)])
    if cache.exists():
        try:
            with zipfile.ZipFile(cache) as archive:  # torch itself loads a flipped bit without a word
                check(archive.testzip() is None, "wrong checksum")
            kept = torch.load(cache, weights_only=True)
            if kept["key"] == key:
                return kept["train"], kept["test"]
        except Exception as error:  # a damaged archive raises many kinds
            print(f"{cache} is damaged ({str(error).splitlines()[:1]}): computing the features again")
    kept = dict(key=key, train=outputs(function, images, config, device, "training features"),
                test=outputs(function, test_images, config, device, "test features"))
    write_whole(cache, lambda file: torch.save(kept, file))
    return kept["train"], kept["test"]


# ---------------------------------------------------------------------------------------------------------------------
# LIN by a solver, and nearest neighbours

def standardize(train, test):
    """float32 [n,D], [m,D] -> the same in float64: each feature with the training images' mean 0 and deviation 1, then
    all turned to principal axes, which changes no solution and lets the solver see how long each axis is."""
    train, test = train.double(), test.double()
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    axes = torch.linalg.eigh(train.T @ train)[1]  # [D,D]
    return train @ axes, test @ axes


def logistic_regression(x, y, classes, l2, start=None):
    """Multinomial logistic regression: x [n,D] float64, y [n] -> weight [C,D] and bias [C] that minimize the mean
    cross-entropy + l2/2 |weight|^2 (the bias is free), from `start` if given, until no gradient is above 1e-6.

    The unknowns are weights divided by `scale`: the loss bends along an axis about as its variance + l2. In these units
    it bends alike along all axes, and L-BFGS takes about 60 steps where it would take thousands."""
    scale = (x.square().mean(0) + l2).rsqrt()
    weight, bias = start or (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    unknown, bias = (weight / scale).requires_grad_(), bias.clone().requires_grad_()
    solver = torch.optim.LBFGS([unknown, bias], max_iter=2000, history_size=30, tolerance_grad=1e-6, tolerance_change=0,
                               line_search_fn="strong_wolfe")

    def loss_and_gradient():
        solver.zero_grad()
        total = l2 / 2 * (unknown * scale).square().sum()
        total.backward()
        for rows, labels in zip(x.split(20_000), y.split(20_000)):  # in parts, for memory
            part = F.cross_entropy(F.linear(rows, unknown * scale, bias), labels, reduction="sum") / len(x)
            part.backward()
            total = total.detach() + part.detach()
        return total

    solver.step(loss_and_gradient)
    return (unknown * scale).detach(), bias.detach()


def linear(train, labels, test, classes, seed):
    """LIN (Section 5.1) on features [n,D] of training and [m,D] of test images -> scores [m,C], settings. The strength of
    L2 is chosen on a held-out tenth of the training images, then all of them are fitted."""
    order = torch.randperm(len(train), generator=seeded("cpu", seed, 20))
    x, test = standardize(train[order], test)
    y, held = labels[order].to(x.device), math.ceil(len(train) / 10)
    tried, start = [], None
    for l2 in progress(L2_GRID, "choosing L2", unit="fit"):
        start = logistic_regression(x[held:], y[held:], classes, l2, start)
        hits = (F.linear(x[:held], *start).argmax(1) == y[:held]).double().mean().item()
        tried.append((hits, l2, start))
    hits, l2, start = max(tried, key=lambda row: row[:2])
    scores = F.linear(test, *logistic_regression(x, y, classes, l2, start))
    return scores.cpu(), dict(l2=l2, held_out_top1=[round(100 * row[0], 2) for row in tried], l2_grid=L2_GRID)


def knn(train, labels, test, classes, k=20, temperature=0.07):
    """Weighted vote of the k nearest training images by cosine similarity -> scores [m,C], settings."""
    train, votes, k = F.normalize(train), [], min(k, len(train))
    for part in progress(F.normalize(test).split(500), "neighbours", unit="batch"):
        similarity, nearest = (part @ train.T).topk(k)  # [500,k]
        votes.append(part.new_zeros(len(part), classes).scatter_add(1, labels[nearest], (similarity / temperature).exp()))
    return torch.cat(votes).cpu(), dict(k=k, temperature=temperature)
