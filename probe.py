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
  linear-sgd  LIN the paper's way: 90 epochs of a linear layer on augmented images
  finetune    FT, the paper's other column: 100 epochs in which all is trained, end to end. With
              --from-scratch it is the paper's supervised row

A pass is one look of the encoder at every image: 60,000 images of 32 x 32 pixels and the nano model
take some minutes on one CPU core. linear and layers cost 1 pass, linear-sgd 91, and an epoch of
finetune 4: a GPU's job. --dataset and --data-dir take other images than those of the training.
Each number is printed, and added as a row to probes.jsonl beside the checkpoint. Accuracies are in
percent of the test images, whose labels are used for nothing else.

The paper leaves its recipe of fine-tuning to a supplement. Ours is MAE's (He et al. 2022, ViT-B),
but for what the last column says:

  head               mean of the tokens, LayerNorm, linear       starts at zero, not near it
  optimizer          AdamW, betas 0.9 and 0.999
  learning rate      1e-3 for each 256 images of the batch
  batch, epochs      1024, 100                                   ours: 256, 100
  schedule           5 epochs of warm-up, then half a cosine     ours: 5 % of the steps
  layer decay        0.75 from each layer to the one below       ours: none with --from-scratch
  weight decay       0.05, of matrices
  stochastic depth   0 in the first layer, to 0.1 in the last
  crop and flip      a crop keeps 8 to 100 % of the image        ours: as in pre-training
  RandAugment        2 operations of magnitude 9                 ours: torchvision's, 8 images alike
  mixup or CutMix    alpha 0.8 or 1.0, one draw for the batch
  label smoothing    0.1
  random erasing     1 image in 4, by noise                      ours: 8 images alike
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2
from tqdm import tqdm

import randsac
from randsac import check, seeded

RECIPES = {  # of the protocols that train in steps
    "linear-sgd": {"epochs": 90, "batch_size": 256, "lr": 0.1, "warmup": 10 / 90},
    "finetune": {"epochs": 100, "batch_size": 256, "lr": 1e-3, "warmup": 0.05},
}
CONFIG_FLAGS = ("dataset", "data_dir", "image_size", "epochs", "batch_size", "lr", "seed", "device")
L2_GRID = [10.0**-k for k in range(1, 9)]  # from strong to weak

# Images uint8 [n,3,H,W] and labels int64 [n], the same of the test, names of the classes.
Labelled = collections.namedtuple("Labelled", "images labels test_images test_labels names")
# Where nobody watches the bar, a line of it every half minute will do.
progress = functools.partial(tqdm, mininterval=0.5 if sys.stderr.isatty() else 30)


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
    """x [B,3,H,W] -> [B,depths,D]: the outputs of the last `depths` layers, normalized as `encode`
    does it, mean over tokens."""
    layers = model.encode_layers(x)[-depths:]
    return torch.stack([F.layer_norm(H, H.shape[-1:]).mean(1) for H in layers], 1)


def percent(hits):
    return round(100 * hits.double().mean().item(), 2)


# ------------------------------------------------------------------------------------------------
# Frozen features: LIN by a solver, and nearest neighbours


def fit(x, y, l2, covariance, weight, bias):
    """One fit of `logistic_regression`: starts from weight [C,D] and bias [C] -> better ones."""
    # Along a direction the loss curves about as the images vary there, plus l2. Where that differs
    # by 1e8, L-BFGS needs thousands of steps. In units of the curvature's root it curves alike
    # along all directions, and 50 steps do. So `scaled` is sought: weight = scaled @ inverse.
    curvature = covariance + l2 * torch.eye(len(covariance)).to(covariance)  # [D,D]
    root = torch.linalg.cholesky(curvature)
    inverse = torch.linalg.inv(root).to(x.dtype)
    scaled = (weight @ root.to(x.dtype)).requires_grad_()  # [C,D]
    bias = bias.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [scaled, bias], max_iter=2000, tolerance_change=0, line_search_fn="strong_wolfe"
    )

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
    held = math.ceil(len(x) / 10)
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
    crops = seeded(images.device, config.seed, 22, step)
    return randsac.augment(images, config.image_size, config.crop_scale, crops), labels


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
    mixup = v2.MixUp(alpha=0.8, num_classes=classes)
    cutmix = v2.CutMix(alpha=1.0, num_classes=classes)
    x, target = v2.RandomChoice([mixup, cutmix])(x, labels)  # [B,3,size,size], [B,C]
    return x, 0.9 * target + 0.1 / classes


def drop_path(rate, module, inputs, output):
    """Stochastic depth: a hook that, in training, leaves out a module for this share of images."""
    return stochastic_depth(output, rate, "row", module.training)


def layer_groups(model, head, decay):
    """Parameter groups of an optimizer: a layer learns `decay` times as fast as the one above, as
    early features are more general."""
    groups = []
    share = 1.0
    for layer in (head, *reversed(model.encoder), model.embed):
        matrices = [p for p in layer.parameters() if p.ndim == 2]
        others = [p for p in layer.parameters() if p.ndim != 2]
        groups.append({"params": matrices, "share": share, "weight_decay": 0.05})
        groups.append({"params": others, "share": share, "weight_decay": 0.0})
        share *= decay
    return groups


def descend(forward, optimizer, augmented, data, config, device):
    """Minimizes the cross-entropy of forward(x [B,3,size,size]), scores [B,C], on augmented
    training images. A parameter group learns at its `share` of the rate."""
    config = dataclasses.replace(config, batch_size=min(config.batch_size, len(data.images)))
    per_epoch = len(data.images) // config.batch_size
    steps = config.epochs * per_epoch
    # In float16 small gradients would be lost, as nothing scales them here.
    half = randsac.pick_precision("auto", device) == "float16"
    precision = "float32" if half else "auto"

    bar = progress(range(steps), desc="training", unit="img", unit_scale=config.batch_size)
    for step in bar:
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            shuffle = seeded("cpu", config.seed, 21, epoch)
            order = torch.randperm(len(data.images), generator=shuffle).split(config.batch_size)
        images = data.images[order[place]].to(device)
        labels = data.labels[order[place]].to(device)
        x, target = augmented(images, labels, config, step)
        with randsac.autocast(device, precision):
            loss = F.cross_entropy(forward(x), target)

        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = randsac.learning_rate(step, steps, config) * group["share"]
        optimizer.step()
        if place + 1 == per_epoch:  # seldom, as the host waits for the device here
            value = loss.item()
            bar.set_postfix(epoch=epoch + 1, loss=f"{value:.4f}", refresh=False)
            check(math.isfinite(value), f"the loss is {value} in epoch {epoch + 1}: lower --lr")


def linear_sgd(model, data, config, device):
    """LIN the paper's way, by MAE's recipe -> scores [m,C] of the test images, settings."""
    # BatchNorm without scale, then a linear layer.
    encode = functools.partial(pooled, model, 1)
    norm = nn.BatchNorm1d(config.dim, affine=False)
    head = nn.Sequential(norm, nn.Linear(config.dim, len(data.names))).to(device)
    for parameter in head[1].parameters():
        nn.init.zeros_(parameter)

    def forward(x):
        return head(encode(x)[:, 0])  # [B,3,H,W] -> [B,1,D] -> [B,C]

    # MAE's optimizer is LARS, for batches of 16384 images.
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
        layer.attention.register_forward_hook(functools.partial(drop_path, rate))
        layer.mlp.register_forward_hook(functools.partial(drop_path, rate))

    def forward(x):
        return head(model.encode_layers(x)[-1].mean(1))  # [B,3,H,W] -> [B,D] -> [B,C]

    optimizer = torch.optim.AdamW(layer_groups(model, head, decay), fused=True)
    augmented = functools.partial(strongly, len(data.names))
    model.train()
    descend(forward, optimizer, augmented, data, config, device)
    model.eval()
    scores = outputs(forward, data.test_images, config.image_size, device)
    return scores, {"layer_decay": decay, "weight_decay": 0.05}


# ------------------------------------------------------------------------------------------------
# From scores to rows of probes.jsonl, and the command line


def make_row(protocol, data, scores, settings):
    """scores [m,C] of the test images -> a row: what was measured; top-1, top-5 where there are
    more than 10 classes, and the top-1 of each class that has test images."""
    scores = scores.cpu()
    labels = data.test_labels
    hits = scores.argmax(1) == labels
    row = {"protocol": protocol, "settings": settings, "top1": percent(hits)}
    if len(data.names) > 10:
        row["top5"] = percent((scores.topk(5).indices == labels[:, None]).any(1))
    tested = labels.unique().tolist()
    row["per_class"] = {data.names[label]: percent(hits[labels == label]) for label in tested}
    return row


def measure(model, data, config, args, device):
    """-> a row for each number that the protocol gives."""
    if args.protocol == "linear-sgd":
        return [make_row("linear-sgd", data, *linear_sgd(model, data, config, device))]
    if args.protocol == "finetune":
        decay = 1.0 if args.from_scratch else 0.75
        return [make_row("finetune", data, *finetune(model, data, config, device, decay))]

    # One pass gives the features of all depths that are asked for.
    depths = config.depth if args.protocol == "layers" else 1
    function = functools.partial(pooled, model, depths)
    size = config.image_size
    if args.features == "pixels":
        function = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, -1)))  # [B,3,H,W] -> [B,1,D]
        size = min(size, 32)  # the solver's time grows as the cube of the number of features
    place = device if device.type == "cuda" else "cpu"  # Apple's mps lacks the solver's float64
    train = outputs(function, data.images, size, device).to(place)  # [n,depths,D]
    test = outputs(function, data.test_images, size, device).to(place)  # [m,depths,D]
    labels = data.labels.to(place)
    classes = len(data.names)

    lin = []
    near = []
    for x, x_test in zip(train.unbind(1), test.unbind(1)):
        lin.append(make_row("linear", data, *linear(x, labels, x_test, classes, config.seed)))
        near.append(make_row("knn", data, *knn(x, labels, x_test, classes)))
    if args.protocol == "linear":
        return [lin[0], near[0]]
    layers = [found["top1"] for found in lin]
    layers_knn = [found["top1"] for found in near]
    return [{**lin[-1], "protocol": "layers", "layers": layers, "layers_knn": layers_knn}]


def add_row(path, row):
    """Adds a row in a single write: of two probes at once, none overwrites the other's."""
    added = json.dumps(row) + "\n"
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        added = "\n" + added  # the row before was cut off, as by a full disk
    with open(path, "ab", buffering=0) as file:
        file.write(added.encode())


def find_floors(path, row):
    """-> {name: top-1} of the rows that learned nothing before, by this row's protocol, on its
    images. A row that was cut off is skipped."""
    same = ("protocol", "dataset", "data_dir", "image_size", "checkpoint")
    floors = {}
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            other = json.loads(line)
            if all(other.get(name) == row[name] for name in same):
                if other["features"] == "pixels":
                    floors["raw pixels"] = other["top1"]
                elif other["random_init"]:
                    floors["random weights"] = other["top1"]
    return floors


def show(row, floors):
    """Prints what was measured; beside a trained encoder's number those of its floors."""
    for k, lin in enumerate(row.get("layers", [])):
        print(f"layer {k + 1:2}  LIN {lin:6.2f} %  kNN {row['layers_knn'][k]:6.2f} %")
    words = f"{row['protocol']}: top-1 {row['top1']:.2f} %"
    if "top5" in row:
        words += f", top-5 {row['top5']:.2f} %"
    if row["features"] == "encoder" and not row["random_init"]:
        for name, top1 in floors.items():
            words += f", from {name} {top1:.2f} %"
    print(words)


def next_command(args, floors):
    """-> what to run after this probe."""
    if args.protocol == "linear" and "random weights" not in floors:
        following = ["--random-init"]
    elif args.protocol == "linear" and "raw pixels" not in floors:
        following = ["--features", "pixels"]
    elif args.protocol == "linear":
        following = ["--protocol", "layers"]
    elif args.protocol == "finetune" and not args.from_scratch:
        following = ["--protocol", "finetune", "--from-scratch"]
    else:
        return randsac.command_line("visualize.py", "all", "--checkpoint", args.checkpoint)
    for name, value in args.given.items():
        following += [randsac.flag_name(name), value]
    return randsac.command_line("probe.py", args.checkpoint, *following)


def read_arguments(arguments):
    """-> args; args.given holds, of the flags that are fields of Config, those that were given."""
    form = argparse.RawDescriptionHelpFormatter
    parser = randsac.Parser(description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    protocols = ["linear", "layers", *RECIPES]
    add("checkpoint", type=randsac.user_path, help="checkpoint.pt of a run; rows go beside it")
    add("--protocol", choices=protocols, default="linear", help="see above (default: linear)")
    add("--random-init", action="store_true", help="a floor: random weights, not the trained ones")
    add("--from-scratch", action="store_true", help="finetune from random weights")
    add("--features", choices=["encoder", "pixels"], default="encoder", help="pixels: see above")
    add("--dataset", choices=randsac.DATASETS, help="probe on other images than the checkpoint's")
    add("--data-dir", metavar="X", help="where they are or go (default: as in training, or data)")
    add("--image-size", type=int, metavar="X", help="side of an image (default: as in training)")
    add("--epochs", type=int, metavar="X", help="default: 90 of linear-sgd, 100 of finetune")
    add("--batch-size", type=int, metavar="X", help="of linear-sgd and finetune (default: 256)")
    add("--lr", type=float, metavar="X", help="default: 0.1 of linear-sgd, 0.001 of finetune")
    add("--seed", type=int, metavar="X", help="seed of everything random (default: 0)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], help="where to compute (default: auto)")
    args = parser.parse_args(arguments)
    settings = {name: vars(args)[name] for name in CONFIG_FLAGS}
    args.given = {name: value for name, value in settings.items() if value is not None}

    # Every flag acts or is refused.
    tuned = args.protocol == "finetune"
    check(tuned or not args.from_scratch, "--from-scratch is for finetune: give --random-init")
    check(not tuned or not args.random_init, "--random-init: with finetune give --from-scratch")
    steps = args.protocol in RECIPES or args.given.keys().isdisjoint(RECIPES["finetune"])
    check(steps, "--epochs, --batch-size and --lr are for linear-sgd and finetune: leave them out")
    single = args.protocol == "linear-sgd" and args.batch_size == 1
    check(not single, "--batch-size must be 2 or more: features are standardized over a batch")
    alone = args.protocol == "linear" and not args.random_init
    words = "--features pixels has no encoder: leave out --protocol and --random-init"
    check(args.features == "encoder" or alone, words)
    directory = args.checkpoint.is_dir()
    check(not directory, f"{args.checkpoint} is a directory: name {args.checkpoint}/checkpoint.pt")
    return args


def prepare(args):
    """-> what the checkpoint holds, the probe's Config (which images, how linear-sgd and finetune
    train), and the model: the checkpoint's, or one that never saw an image."""
    saved, model, trained = randsac.load_checkpoint(args.checkpoint)
    # An image that is not cut in segments may have any size that the patch size divides.
    settings = {"segments": "patch", "hierarchy": (), "last_rank": 0, "seed": 0, "device": "auto"}
    if args.dataset not in (None, trained.dataset):
        settings["data_dir"] = None  # Config's default
    settings.update(RECIPES.get(args.protocol, {}))
    settings.update(args.given)
    config = dataclasses.replace(trained, **settings)

    if args.random_init or args.from_scratch:
        torch.manual_seed(config.seed)
        model = randsac.RandSAC(trained).eval()
    return saved, config, model.requires_grad_(args.protocol == "finetune")


def load_labelled(config):
    """-> Labelled. UserError where images are missing that a probe needs."""
    images, labels, names = randsac.load_images(config, train=True)
    test_images, test_labels, _ = randsac.load_images(config, train=False)
    check(len(labels.unique()) > 1, f"{config.data_dir} has one class: a probe needs two or more")
    check(len(test_labels), f"{config.data_dir} has no test images: put some in test/CLASS/")
    return Labelled(images, labels, test_images, test_labels, names)


def main(arguments):
    started = time.perf_counter()
    args = read_arguments(arguments)
    saved, config, model = prepare(args)
    path = args.checkpoint.with_name("probes.jsonl")
    place = path if path.exists() else path.parent
    check(os.access(place, os.W_OK), f"{place} cannot be written to: copy the checkpoint elsewhere")
    device = randsac.pick_device(config.device)
    data = load_labelled(config)

    about = {name: getattr(config, name) for name in ("dataset", "data_dir", "image_size", "seed")}
    about["features"] = args.features
    about["random_init"] = args.random_init or args.from_scratch
    about["checkpoint"] = args.checkpoint.name
    about["sha256"] = saved["sha256"]
    about["step"] = saved.get("step")
    for row in measure(model.to(device), data, config, args, device):
        for name in RECIPES.get(args.protocol, {}):
            row["settings"][name] = getattr(config, name)
        row.update(about)
        row["seconds"] = round(time.perf_counter() - started, 1)
        add_row(path, row)
        floors = find_floors(path, row)
        show(row, floors)
    print(f"in {row['seconds']} s, added to {path}")
    print("next:", next_command(args, floors))


if __name__ == "__main__":
    randsac.run_command(main)
