"""From a checkpoint to a number: the evaluation protocols of Section 5.1. Masks and decoder are
thrown away; the unmasked encoder turns an image into tokens, and the mean of its last layer's
tokens is the image's feature.

    python probe.py runs/NAME/checkpoint.pt                    # LIN and kNN
    python probe.py runs/NAME/checkpoint.pt --random-init      # their floor: an untrained encoder
    python probe.py runs/NAME/checkpoint.pt --features pixels  # another: no encoder at all
    python probe.py runs/NAME/checkpoint.pt --protocol layers  # or another of these four

  linear      LIN: a linear classifier on features of the frozen encoder, solved to its optimum, so
              there is no training to tune. kNN: the 20 nearest training images vote
  layers      both at every encoder layer
  linear-sgd  LIN the paper's way: 90 epochs of a linear layer on augmented images, --lr 0.1
  finetune    FT, the paper's other column: 100 epochs in which all is trained, end to end. With
              --random-init it is the paper's supervised row

linear and layers look at each image once: nano takes some minutes for 60,000 of 32 x 32 pixels on a
CPU core. linear-sgd looks 91 times, finetune 4 times an epoch: a GPU's job. Each number, in percent
of the test images, is printed and added to probes.jsonl beside the checkpoint. One more floor, all
that test labels are used for besides, is always to name the commonest class. Raw pixels lie in
[-1, 1]: with them kNN is right for 46.2 % of CIFAR-10; in [0, 1] it would be 36.3 %.

--save FILE.npz keeps `train` and `test`, float32 features [n,D]; `train_labels` and `test_labels`;
`train_files` and `test_files`, paths below the folder or numbers; `classes`; the model's `sha256`.

The paper leaves its recipe of fine-tuning to a supplement. Ours is MAE's (He et al. 2022, ViT-B),
but the head starts at zero, a batch has 256 images, not 1024, 5 % of the steps warm up, not 5
epochs, crops are those of pre-training, torchvision's RandAugment and random erasing treat 8 images
alike, and random weights have no layer decay.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2
from tqdm import tqdm

import randsac
from randsac import check, seeded

RECIPES = {  # of the protocols that train in steps
    "linear-sgd": {"epochs": 90, "batch_size": 256, "lr": 0.1, "warmup": 10 / 90},
    "finetune": {"epochs": 100, "batch_size": 256, "lr": 1e-3, "warmup": 0.05},
}
L2_GRID = [10.0**-k for k in range(1, 9)]  # from strong to weak
FLOORS = {("encoder", True): "random weights", ("pixels", False): "raw pixels"}

# Images uint8 [n,3,H,W], labels int64 [n], names of the classes, images and labels of the test.
Labelled = collections.namedtuple("Labelled", "images labels names test_images test_labels")
progress = functools.partial(tqdm, mininterval=0.5 if sys.stderr.isatty() else 30)  # seconds


@torch.inference_mode()
def outputs(function, images, size, device):
    """function(x float [B,3,size,size]) of uint8 images [n,3,H,W] -> float32 [n,...] on the CPU."""
    found = []
    batch = 64 if device.type == "cpu" else 1024  # a CPU is fastest where its cache holds a batch
    for part in progress(images.split(batch), desc="images", unit="batch"):
        x = randsac.normalize(part.to(device), size)
        with randsac.autocast(device):
            found.append(function(x).float().cpu())
    return torch.cat(found)


def pooled(model, depths, x):
    """x [B,3,H,W] -> [B,depths,D]: the last layers, normalized as in `encode`, mean over tokens."""
    layers = model.encode_layers(x)[-depths:]
    return torch.stack([F.layer_norm(H, H.shape[-1:]).mean(1) for H in layers], 1)


def percent(hits):
    return round(100 * hits.double().mean().item(), 2)


# ------------------------------------------------------------------------------------------------
# Frozen features: LIN by a solver, and nearest neighbours


def fit(x, y, l2, covariance, weight, bias):
    """One fit of `logistic_regression`: starts from weight [C,D] and bias [C] -> better ones."""
    # Along a direction the loss curves about as the images vary there, plus l2. Where that differs
    # by 1e8, L-BFGS needs thousands of steps, but 50 in units of the curvature's root, in which it
    # curves alike along all directions. So `scaled` is sought: weight = scaled @ inverse.
    curvature = covariance + l2 * torch.eye(len(covariance)).to(covariance)  # [D,D]
    root = torch.linalg.cholesky(curvature)
    inverse = torch.linalg.inv(root).to(x.dtype)
    scaled = (weight @ root.to(x.dtype)).requires_grad_()  # [C,D]
    bias = bias.clone().requires_grad_()
    settings = {"max_iter": 2000, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    solver = torch.optim.LBFGS([scaled, bias], **settings)

    def loss_and_gradient():
        solver.zero_grad()
        weight = scaled @ inverse
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(loss_and_gradient)
    return (scaled @ inverse).detach(), bias.detach()


def logistic_regression(x, y, classes, strengths):
    """x [n,D], y [n] -> for each strength l2, from strong to weak, the weight [C,D] and bias [C]
    that minimize the mean cross-entropy + l2/2 |weight|^2."""
    covariance = x.double().T @ x.double() / len(x)  # [D,D]
    weight = x.new_zeros(classes, x.shape[1])
    bias = x.new_zeros(classes)
    for l2 in strengths:
        weight, bias = fit(x, y, l2, covariance, weight, bias)
        yield weight, bias


def linear(train, labels, test, classes, seed):
    """LIN: training images' features [n,D], labels [n] -> scores [m,C] of the test features [m,D],
    settings."""
    # Each feature is given the training images' mean 0 and deviation 1. Some are alike for all.
    order = torch.randperm(len(train), generator=seeded("cpu", seed, 20)).to(train.device)
    mean = train.mean(0)
    deviation = train.std(0).clamp(min=1e-6)
    x = (train[order] - mean) / deviation
    y = labels[order]

    # The strength of L2 is the one that is best on a held-out tenth of the training images.
    held = (len(x) + 9) // 10
    fits = logistic_regression(x[held:], y[held:], classes, L2_GRID)
    top1 = {}
    for l2, (weight, bias) in zip(progress(L2_GRID, desc="fits", unit="fit"), fits):
        top1[l2] = percent(F.linear(x[:held], weight, bias).argmax(1) == y[:held])
    best = max(top1, key=top1.get)  # of equals the first, the strongest

    # With it all training images are fitted.
    [(weight, bias)] = logistic_regression(x, y, classes, [best])
    scores = F.linear((test - mean) / deviation, weight, bias)
    return scores, {"l2": best, "held_out_top1": {f"{l2:.0e}": top1[l2] for l2 in top1}}


def knn(train, labels, test, classes, k=20, temperature=0.07):
    """Training images' features [n,D], labels [n] -> scores [m,C] of the test features [m,D],
    settings: the k nearest vote, each with weight exp(cosine similarity / temperature)."""
    k = min(k, len(train))
    train = F.normalize(train)
    votes = []
    for part in progress(F.normalize(test).split(500), desc="neighbours", unit="batch"):
        similarity, nearest = (part @ train.T).topk(k)  # [500,k] each
        weight = (similarity / temperature).exp()
        vote = part.new_zeros(len(part), classes)  # [500,C]
        votes.append(vote.scatter_add(1, labels[nearest], weight))
    return torch.cat(votes), {"k": k, "temperature": temperature}


# ------------------------------------------------------------------------------------------------
# LIN and FT by gradient descent


def weakly(images, labels, config, step):
    """uint8 images [B,3,H,W], labels [B] -> float [B,3,size,size], cropped and flipped, labels."""
    drawn = seeded(images.device, config.seed, 22, step)
    crops = randsac.random_crops(len(images), config.crop_scale, images.device, drawn)
    return randsac.crop(images, crops, config.image_size), labels


def strongly(classes, images, labels, config, step):
    """Like `weakly`, but also distorts and mixes: the labels that it gives are soft, [B,C]."""
    # torchvision draws from the global generator, which here has its own stream in every step, and
    # treats all images that it is given alike: so it is given 8 at a time.
    torch.manual_seed(seeded("cpu", config.seed, 23, step).initial_seed())
    distort = v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR, fill=128)
    images = torch.cat([distort(group) for group in images.split(8)])
    x, labels = weakly(images, labels, config, step)
    erase = v2.RandomErasing(p=0.25, value="random")
    x = torch.cat([erase(group) for group in x.split(8)])

    # Two images become one, whose label says how much of each it is. No label is quite sure.
    mixes = [v2.MixUp(alpha=0.8, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)]
    x, target = v2.RandomChoice(mixes)(x, labels)  # [B,3,size,size], [B,C]
    return x, 0.9 * target + 0.1 / classes


def layer_groups(model, head, decay):
    """Parameter groups of an optimizer: a layer learns `decay` times as fast as the one above, as
    early features are more general."""
    groups = []
    for depth, layer in enumerate((head, *reversed(model.encoder), model.embed)):
        matrices = [p for p in layer.parameters() if p.ndim == 2]
        others = [p for p in layer.parameters() if p.ndim != 2]
        share = decay**depth
        groups.append({"params": matrices, "share": share, "weight_decay": 0.05})
        groups.append({"params": others, "share": share, "weight_decay": 0.0})
    return groups


def descend(forward, optimizer, augmented, data, config, device):
    """Minimizes the cross-entropy of forward(x [B,3,size,size]), scores [B,C], on augmented
    training images. A parameter group learns at its `share` of the rate."""
    config = dataclasses.replace(config, batch_size=min(config.batch_size, len(data.images)))
    per_epoch = len(data.images) // config.batch_size
    steps = config.epochs * per_epoch
    # In float16 small gradients would be lost, as nothing scales them here.
    small = randsac.pick_precision("auto", device) == "float16"
    bar = progress(range(steps), desc="training", unit="img", unit_scale=config.batch_size)
    for step in bar:
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            shuffle = seeded("cpu", config.seed, 21, epoch)
            order = torch.randperm(len(data.images), generator=shuffle).split(config.batch_size)
        images = data.images[order[place]].to(device)
        labels = data.labels[order[place]].to(device)
        x, target = augmented(images, labels, config, step)
        with randsac.autocast(device, "float32" if small else "auto"):
            loss = F.cross_entropy(forward(x), target)

        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = randsac.learning_rate(step, steps, config) * group["share"]
        optimizer.step()
        if place + 1 == per_epoch:  # seldom, as the host waits for the device here
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.4f}", refresh=False)
            check(loss.isfinite(), f"the loss is {loss} in epoch {epoch + 1}: lower --lr")


def linear_sgd(model, data, config, device):
    """LIN the paper's way, by MAE's recipe -> scores [m,C] of the test images, settings."""
    encode = functools.partial(pooled, model, 1)
    norm = nn.BatchNorm1d(config.dim, affine=False)
    head = nn.Sequential(norm, nn.Linear(config.dim, len(data.names))).to(device)
    for parameter in head[1].parameters():
        nn.init.zeros_(parameter)

    def forward(x):
        return head(encode(x)[:, 0])  # [B,3,H,W] -> [B,1,D] -> [B,C]

    # MAE's optimizer is LARS, for batches of 16384 images. BatchNorm needs 2.
    check(config.batch_size > 1, "--batch-size must be 2 or more: features are compared in a batch")
    optimizer = torch.optim.SGD([{"params": head.parameters(), "share": 1.0}], momentum=0.9)
    descend(forward, optimizer, weakly, data, config, device)

    # In training the features of crops had mean 0 and deviation 1. Test images are whole: they get
    # the statistics of whole training images, in place of those gathered on crops.
    features = outputs(encode, data.images, config.image_size, device)[:, 0].to(device)  # [n,D]
    norm.running_mean = features.mean(0)
    norm.running_var = features.var(0)
    head.eval()
    return outputs(forward, data.test_images, config.image_size, device), {"momentum": 0.9}


def finetune(model, data, config, device, decay):
    """FT, by the recipe above -> scores [m,C] of the test images, settings."""
    # LayerNorm uses an image's own statistics, so none of the strongly augmented images are kept.
    norm = nn.LayerNorm(config.dim)
    head = nn.Sequential(norm, nn.Linear(config.dim, len(data.names))).to(device)
    for parameter in head[1].parameters():
        nn.init.zeros_(parameter)
    for layer, rate in zip(model.encoder, torch.linspace(0, 0.1, config.depth).tolist()):
        layer.attention.out = nn.Sequential(layer.attention.out, StochasticDepth(rate, "row"))
        layer.mlp.append(StochasticDepth(rate, "row"))

    def forward(x):
        return head(model.encode_layers(x)[-1].mean(1))  # [B,3,H,W] -> [B,D] -> [B,C]

    optimizer = torch.optim.AdamW(layer_groups(model, head, decay), fused=True)
    model.train()
    descend(forward, optimizer, functools.partial(strongly, len(data.names)), data, config, device)
    model.eval()
    scores = outputs(forward, data.test_images, config.image_size, device)
    return scores, {"layer_decay": decay, "weight_decay": 0.05}


# ------------------------------------------------------------------------------------------------
# From scores to rows of probes.jsonl, and the command line


def make_row(protocol, data, scores, settings):
    """scores [m,C] of the test images -> a row: top-1, of all and of each class that has test
    images, and that of always naming the commonest class."""
    labels = data.test_labels
    hits = scores.argmax(1).cpu() == labels
    row = {"protocol": protocol, "settings": settings, "top1": percent(hits)}
    row["commonest"] = percent(labels == labels.mode().values)
    tested = labels.unique().tolist()
    row["per_class"] = {data.names[label]: percent(hits[labels == label]) for label in tested}
    return row


def save_features(path, train, test, data, config, sha256):
    """Writes features [n,D] and [m,D], and whose they are, for numpy.load."""
    names = range(len(train))
    test_names = range(len(test))
    if config.dataset == "folder":
        root = Path(config.data_dir)
        _, training, held_out, _ = randsac.list_folder(root)
        there = [label for _, label in training] == data.labels.tolist()
        check(there, f"files came to {root} or went meanwhile: try again")
        names = [file.relative_to(root).as_posix() for file, _ in training]
        test_names = [file.relative_to(root).as_posix() for file, _ in held_out]
    kept = {"train": train.numpy(), "train_labels": data.labels, "train_files": names}
    kept |= {"test": test.numpy(), "test_labels": data.test_labels, "test_files": test_names}
    with randsac.write_whole(path) as file:
        np.savez(file, classes=data.names, sha256=sha256, **kept)
    print(f"features of {len(train)} training and {len(test)} test images are in {path}")


def measure_frozen(model, data, config, args, device, sha256):
    """-> a row for each number of linear or layers, none without labels. Keeps what --save asks."""
    depths = config.depth if args.protocol == "layers" else 1
    function = functools.partial(pooled, model, depths)
    size = config.image_size
    if args.features == "pixels":
        function = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, -1)))  # [B,3,H,W] -> [B,1,D]
        size = min(size, 32)  # the solver's time grows as the cube of the number of features
    train = outputs(function, data.images, size, device)  # [n,depths,D]
    test = outputs(function, data.test_images, size, device) if len(data.test_images) else train[:0]
    if args.save:
        save_features(args.save, train[:, 0], test[:, 0], data, config, sha256)
    if not args.labelled:
        return []
    place = device if device.type == "cuda" else "cpu"  # Apple's mps lacks the solver's float64
    labels = data.labels.to(place)
    lin = []
    near = []
    for x, x_test in zip(train.to(place).unbind(1), test.to(place).unbind(1)):
        given = (x, labels, x_test, len(data.names))
        lin.append(make_row("linear", data, *linear(*given, config.seed)))
        near.append(make_row("knn", data, *knn(*given)))
    if args.protocol == "linear":
        return [lin[0], near[0]]
    tops = {"layers": [row["top1"] for row in lin], "layers_knn": [row["top1"] for row in near]}
    return [lin[-1] | {"protocol": "layers"} | tops]


def report(row, log, classes):
    """Adds a row to the log, and prints it. Beside a trained encoder's number stand its floors:
    rows of the same protocol, checkpoint and images that learned nothing."""
    added = json.dumps(row) + "\n"
    if log.exists() and not log.read_bytes().endswith(b"\n"):
        added = "\n" + added  # the row before was cut off, as by a full disk
    with open(log, "ab", buffering=0) as file:  # in a single write: two probes may add at once
        file.write(added.encode())
    floors = {}
    same = ("protocol", "dataset", "data_dir", "image_size", "checkpoint", "sha256")
    for line in log.read_text().splitlines():
        with contextlib.suppress(ValueError):  # of a row that was cut off
            other = json.loads(line)
            kind = FLOORS.get((other["features"], other["random_init"]))
            if kind and all(other.get(name) == row[name] for name in same):
                floors[kind] = other["top1"]
    for k, lin in enumerate(row.get("layers", [])):
        print(f"layer {k + 1:2}  LIN {lin:6.2f} %  kNN {row['layers_knn'][k]:6.2f} %")
    words = f"{row['protocol']}: top-1 {row['top1']:.2f} %"
    if (row["features"], row["random_init"]) not in FLOORS:
        words += "".join(f", from {kind} {floors[kind]:.2f} %" for kind in floors)
    if row["commonest"] > round(100 / classes, 2):
        words += f", by always naming the commonest class {row['commonest']:.2f} %"
    print(words)


def prepare(arguments):
    """-> args; what the checkpoint holds; the probe's Config (which images, how linear-sgd and
    finetune train); and the model: the checkpoint's, or one that never saw an image."""
    fields = {field.name for field in dataclasses.fields(randsac.Config)}
    shared = ("data_dir", "epochs", "batch_size", "lr", "seed", "device")
    parser = randsac.make_parser(__doc__, leave_out=fields.difference(shared))
    add = parser.add_argument
    add("checkpoint", type=randsac.user_path, help="checkpoint.pt of a run; rows go beside it")
    add("--protocol", choices=["linear", "layers", *RECIPES], default="linear", help="see above")
    add("--random-init", action="store_true", default=False, help="take random weights")
    add("--features", choices=["encoder", "pixels"], default="encoder", help="pixels: see above")
    add("--save", type=randsac.user_path, default=None, metavar="FILE", help="keep the features")
    add("--dataset", choices=randsac.DATASETS, help="other images than the checkpoint's")
    add("--image-size", type=int, metavar="X", help="side of an image (default: as in training)")
    args = parser.parse_args(arguments)
    given = {name: value for name, value in vars(args).items() if name in fields}

    # Every flag acts or is refused.
    steps = args.protocol in RECIPES or given.keys().isdisjoint(RECIPES["finetune"])
    check(steps, "--epochs, --batch-size and --lr are for linear-sgd and finetune: leave them out")
    alone = args.protocol == "linear" and not args.random_init
    encoder = args.features == "encoder"
    check(alone or encoder, "--features pixels: leave out --protocol and --random-init")
    check(not args.save or (alone and encoder), "--save: leave out --protocol and floors")

    # An image that is not cut in segments may have any size that the patch size divides.
    saved, model, trained = randsac.load_checkpoint(args.checkpoint)
    settings = {"segments": "patch", "last_rank": 0, "seed": 0} | RECIPES.get(args.protocol, {})
    config = randsac.with_flags(trained, settings | given)
    if args.random_init:
        torch.manual_seed(config.seed)
        model = randsac.RandSAC(trained).eval()
    return args, saved, config, model.requires_grad_(args.protocol == "finetune")


def main(arguments):
    started = time.perf_counter()
    args, saved, config, model = prepare(arguments)
    log = args.checkpoint.with_name("probes.jsonl")
    for path in {log, args.save} - {None}:
        check(path == log or not path.exists(), f"{path} is there already: --save takes a new file")
        place = path if path.exists() else path.parent
        check(os.access(place, os.W_OK), f"{place} cannot be written to: save or copy to another")
    device = randsac.pick_device(config.device)
    model = model.to(device)
    images, labels, names = randsac.load_images(config, train=True)
    data = Labelled(images, labels, names, *randsac.load_images(config, train=False)[:2])

    # A number needs labels, features do not.
    mine = ("--checkpoint", args.checkpoint)
    folder = ("--dataset", config.dataset, "--data-dir", config.data_dir)
    near = randsac.command_line("visualize.py", "neighbours", *mine, *folder)
    words = f"a number needs 2 classes and test images; without them: --save FILE.npz, or {near}"
    args.labelled = len(names) > 1 and len(data.test_images) > 0
    check(args.labelled or args.save, words)
    if args.protocol == "linear-sgd":
        rows = [make_row("linear-sgd", data, *linear_sgd(model, data, config, device))]
    elif args.protocol == "finetune":
        decay = 1.0 if args.random_init else 0.75
        rows = [make_row("finetune", data, *finetune(model, data, config, device, decay))]
    else:
        rows = measure_frozen(model, data, config, args, device, saved["sha256"])
    if not rows:
        print(words)
        return

    about = {name: getattr(config, name) for name in ("dataset", "image_size", "seed")}
    about["data_dir"] = os.path.realpath(config.data_dir) if config.data_dir else ""
    about |= {"features": args.features, "random_init": args.random_init, "step": saved.get("step")}
    about |= {"checkpoint": args.checkpoint.name, "sha256": saved["sha256"]}
    for row in rows:
        row["settings"] |= {name: getattr(config, name) for name in RECIPES.get(args.protocol, ())}
        row |= about
        row["seconds"] = round(time.perf_counter() - started, 1)
        report(row, log, len(names))
    print(f"in {row['seconds']} s, added to {log}; next: its floors, as in --help, or")
    print(randsac.command_line("visualize.py", "all", *mine))


if __name__ == "__main__":
    randsac.run_command(main)
