"""The evaluation protocols of Section 5.1: from a checkpoint to a number. Masks and decoder are thrown away; the
unmasked encoder turns an image into tokens, and the mean of its last layer's tokens is the image's feature.

    python probe.py runs/NAME/checkpoint.pt                        # LIN, the paper's first column
    python probe.py runs/NAME/checkpoint.pt --random-init          # a floor: the same encoder, untrained
    python probe.py runs/NAME/checkpoint.pt --features pixels      # a floor: no encoder at all
    python probe.py runs/NAME/checkpoint.pt --protocol layers      # LIN at every depth
    python probe.py runs/NAME/checkpoint.pt --protocol finetune    # FT, the paper's second column
    python probe.py runs/NAME/checkpoint.pt --dataset folder --data-dir DIR --image-size 224    # transfer

The protocols and what they cost. A pass is one look of the encoder at every image: 60,000 images of 32 x 32 pixels
and the nano model take some minutes on two CPU cores.
  linear      LIN. Features of the frozen encoder, computed once and kept beside the checkpoint; multinomial logistic
              regression solved to its optimum: no training to tune. 1 pass, but seconds once the features are kept
  knn         nothing is learned: weighted vote of the 20 training images nearest by cosine similarity. The same pass
  layers      LIN at each encoder layer, as bars here and for visualize.py. 1 pass, and linear's seconds for each
  linear-sgd  LIN the paper's way: 90 epochs of a linear layer on augmented images through the frozen encoder. 90 passes
  finetune    FT: encoder and linear layer trained end to end, the usual supervised ViT recipe. 100 epochs, each as long
              as 4 passes: a GPU's job. With --from-scratch it is the paper's "supervised" row
Each prints its number and writes probe-PROTOCOL.json beside the checkpoint, floors and transfer under names of their
own. Accuracies are in percent of the test images, whose labels are used for nothing else.
"""
import argparse, dataclasses, functools, hashlib, json, math, os, shlex, sys, time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import v2
from tqdm import tqdm

from randsac import (RandSAC, augment, autocast, check, learning_rate, load_checkpoint, load_images, load_whole,
                     normalize, pick_device, restore, run_command, seeded, write_whole)

IMAGES, STEPS = ("dataset", "data_dir", "image_size"), ("epochs", "batch_size", "lr")  # flags
TRAINED = {"linear-sgd": dict(epochs=90, batch_size=256, lr=0.1),
           "finetune": dict(epochs=100, batch_size=256, lr=1e-3)}
NEXT = {"knn": "", "linear": "--random-init", "linear-random-init": "--features pixels",
        "linear-pixels": "--protocol layers", "finetune": "--protocol finetune --from-scratch"}
L2_GRID = [10.0 ** -k for k in range(1, 9)]  # from strong to weak: each fit starts from the one before
progress = functools.partial(tqdm, mininterval=0.5 if sys.stderr.isatty() else 30)

def read_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="checkpoint.pt of a run; results go beside it")
    add("--protocol", choices=["linear", "knn", "layers", *TRAINED], default="linear", help="default: linear")
    add("--random-init", "--from-scratch", action="store_true", help="random weights in place of the trained ones: a "
        "floor, or with finetune, which then has no layer-wise decay, the paper's supervised row")
    add("--features", choices=["encoder", "pixels"], default="encoder", help="pixels: the image itself, at most "
        "32 x 32, is the feature: a floor of linear and knn (default: encoder)")
    add("--dataset", help="probe on other images (default: those of the checkpoint)")
    add("--data-dir", help="where they lie or go (default: as in training; with another --dataset: data)")
    add("--image-size", type=int, metavar="X", help="side of an image in pixels (default: as in training)")
    add("--epochs", type=int, metavar="X", help="of linear-sgd (default: 90) or finetune (default: 100)")
    add("--batch-size", type=int, metavar="X", help="images in a step of linear-sgd or finetune (default: 256)")
    add("--lr", type=float, metavar="X", help="peak learning rate of linear-sgd (default: 0.1) or finetune (default: "
        "0.001), for each 256 images of the batch")
    add("--seed", type=int, default=0, metavar="X", help="seed of everything random (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    args = parser.parse_args(arguments)
    check(args.protocol in TRAINED or not given(args, STEPS), f"--protocol {args.protocol} is not trained in steps: "
          "leave out --epochs, --batch-size and --lr, or choose linear-sgd or finetune")
    check(args.batch_size != 1, "--batch-size must be 2 or more: features are standardized over a batch")
    check(args.features == "encoder" or args.protocol in ("linear", "knn") and not args.random_init,
          "--features pixels has no encoder: use it with --protocol linear or knn, and without --random-init")
    return args

def given(args, names):
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

def probe_config(trained, args):
    """The checkpoint's Config -> the probe's: which images, and how linear-sgd and finetune train."""
    moved = dict(data_dir="data") if args.dataset not in (None, trained.dataset) else {}
    # An image that is not cut in segments may have any size that the patch size divides.
    settings = dict(segments="patch", hierarchy=(), weight_decay=0.05, warmup=0.05, seed=args.seed, device=args.device)
    settings.update(**moved, **TRAINED.get(args.protocol, {}))
    return dataclasses.replace(trained, **{**settings, **given(args, IMAGES + STEPS)})

def file_endings(args):
    """What the names of a floor's and of a transfer's files end in: they never replace the checkpoint's own."""
    untrained = "-from-scratch" if args.protocol == "finetune" else "-random-init"
    floor = untrained * args.random_init + "-pixels" * (args.features == "pixels")
    return floor, "".join("-" + Path(str(value)).resolve().name for value in given(args, IMAGES).values())

def load_labelled(config):
    """-> uint8 images, labels for training, the same for the test, class names. UserError where a probe lacks some."""
    (images, labels, names), (test_images, test_labels, _) = (load_images(config, train) for train in (True, False))
    check(labels.min() >= 0, f"the images of {config.data_dir} have no labels, which a probe needs: sort them into "
          "train/CLASS/ and test/CLASS/, or choose another --dataset")
    check(len(labels.unique()) > 1, f"all images of {config.data_dir} are of one class: a probe needs two or more")
    check(len(test_images), f"{config.data_dir} has no test images to measure on: put some in test/CLASS/")
    return images, labels, test_images, test_labels, names

def make_encoder(saved, trained, args):
    """The checkpoint's model or, for a floor, one that never saw an image."""
    torch.manual_seed(args.seed)
    model = RandSAC(trained)
    if not args.random_init:
        restore(model, saved["model"], args.checkpoint)
    return model.eval().requires_grad_(args.protocol == "finetune")

# ---------------------------------------------------------------------------------------------------------------------
# Features of a frozen encoder

def pooled(model, depths, x):
    """x [B,3,H,W] -> [B,depths,D]: outputs of the last `depths` layers, normalized as in `encode`, mean over tokens."""
    return torch.stack([F.layer_norm(h, h.shape[-1:]).mean(1) for h in model.encode_layers(x)[-depths:]], 1)

def outputs(function, images, size, device, what):
    """function(x [B,3,size,size]) of all uint8 images [n,3,H,W] -> [n,...], float32 on the CPU."""
    found = []
    with torch.inference_mode(), autocast(device), progress(total=len(images), desc=what, unit="img") as bar:
        for batch in images.split(64 if device.type == "cpu" else 1024):  # a CPU is fastest where its cache holds one
            found.append(function(normalize(batch.to(device), size)).float().cpu())
            bar.update(len(batch))
    return torch.cat(found)

def kept_features(function, images, test_images, size, device, cache, key):
    """`outputs` of training and test images, computed once: `cache` counts only for the same key and pixels."""
    key = json.dumps([*key, size] + [hashlib.sha256(part.numpy()).hexdigest() for part in (images, test_images)])
    if cache.exists():
        try:
            kept = load_whole(cache)
            if kept["key"] == key:
                return kept["train"], kept["test"]
        except Exception as error:  # a damaged archive raises many kinds
            print(f"{cache} is damaged ({str(error).splitlines()[:1]}): computing the features again")
    train, test = (outputs(function, part, size, device, "features") for part in (images, test_images))
    write_whole(cache, lambda file: torch.save(dict(key=key, train=train, test=test), file))
    return train, test

# ---------------------------------------------------------------------------------------------------------------------
# LIN by a solver, and nearest neighbours

def standardize(train, test):
    """float32 [n,D], [m,D] -> float64: each feature with the training images' mean 0 and deviation 1, then all turned
    to principal axes: no prediction changes, and the solver can see how far the images spread along each axis."""
    train, test = train.double(), test.double()
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    axes = torch.linalg.eigh(train.T @ train).eigenvectors  # [D,D]
    return train @ axes, test @ axes

def logistic_regression(x, y, classes, l2, start=None):
    """x [n,D] float64, y [n] -> weight [C,D], bias [C] that minimize the mean cross-entropy + l2/2 |weight|^2; found by
    L-BFGS, from `start` if given, when no derivative exceeds 1e-6.

    Its unknowns are weight/scale. Along an axis the loss curves about as the images' variance + l2: in units of `scale`
    it curves alike along all, and 60 steps do what may take thousands."""
    scale = (x.square().mean(0) + l2).rsqrt()
    weight, bias = start or (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    unknown, bias = (weight / scale).requires_grad_(), bias.clone().requires_grad_()
    solver = torch.optim.LBFGS([unknown, bias], max_iter=2000, history_size=30, tolerance_grad=1e-6,
                               tolerance_change=0, line_search_fn="strong_wolfe")

    def loss_and_gradient():
        solver.zero_grad()
        loss = l2 / 2 * (unknown * scale).square().sum()
        loss.backward()
        for rows, labels in zip(x.split(20_000), y.split(20_000)):  # in parts, for memory
            part = F.cross_entropy(F.linear(rows, unknown * scale, bias), labels, reduction="sum") / len(x)
            part.backward()
            loss = loss + part.detach()
        return loss

    solver.step(loss_and_gradient)
    return (unknown * scale).detach(), bias.detach()

def linear(train, labels, test, classes, seed):
    """LIN (Section 5.1): training images' features [n,D], labels [n] -> scores [m,C] of the test features [m,D],
    settings. The strength of L2 is the best on a held-out tenth of the training images; then all of them are fitted."""
    order = torch.randperm(len(train), generator=seeded("cpu", seed, 20)).to(train.device)
    y, held, tried, start = labels[order], math.ceil(len(train) / 10), [], None
    with progress(total=len(L2_GRID) + 1, desc="fitting", unit="fit") as bar:
        x, test = standardize(train[order], test)
        for l2 in L2_GRID:
            start = logistic_regression(x[held:], y[held:], classes, l2, start)
            tried.append((percent(F.linear(x[:held], *start).argmax(1) == y[:held]), l2, start))
            bar.update()
        _, l2, start = max(tried, key=lambda row: row[:2])  # of equals the strongest
        scores = F.linear(test, *logistic_regression(x, y, classes, l2, start))
        bar.update()
    return scores.cpu(), dict(l2=l2, held_out_top1={f"{l2:.0e}": top1 for top1, l2, _ in tried})

def knn(train, labels, test, classes, k=20, temperature=0.07):
    """Training images' features [n,D], labels [n] -> scores [m,C] of the test features [m,D], settings: the k nearest
    vote, each with weight exp(cosine similarity / temperature)."""
    train, votes, k = F.normalize(train), [], min(k, len(train))
    for part in progress(F.normalize(test).split(500), "neighbours", unit="batch"):
        similarity, nearest = (part @ train.T).topk(k)  # [500,k]
        weight = (similarity / temperature).exp()
        votes.append(part.new_zeros(len(part), classes).scatter_add(1, labels[nearest], weight))
    return torch.cat(votes).cpu(), dict(k=k, temperature=temperature)

# ---------------------------------------------------------------------------------------------------------------------
# LIN and FT by gradient descent

def crop_and_flip(images, labels, config, generator):
    return augment(images, config.image_size, config.crop_scale, generator), labels

def strong_augmentation(classes):
    """-> f(uint8 images [B,3,H,W], labels [B], config, generator) -> images [B,3,size,size], soft labels [B,C]:
    RandAugment, crop and flip, MixUp or CutMix, label smoothing. torchvision draws one operation for all images that
    it is given, so it is given 8 at a time."""
    distort = v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR, fill=128)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)])

    def prepare(images, labels, config, generator):
        torch.manual_seed(generator.initial_seed())  # torchvision draws from the global generator
        images = torch.cat([distort(group) for group in images.split(8)])
        images, labels = crop_and_flip(images, labels, config, generator)
        images, labels = map(torch.cat, zip(*[mix(*group) for group in zip(images.split(8), labels.split(8))]))
        return images, 0.9 * labels + 0.1 / classes

    return prepare

def layer_groups(model, head, config, decay):
    """Parameter groups: a layer learns `decay` times as fast as the one above, as early features are more general."""
    layers = [head, *reversed(model.encoder), model.embed]
    return [dict(params=[p for p in layer.parameters() if (p.ndim == 2) == decays], share=decay ** above,
                 weight_decay=config.weight_decay * decays) for above, layer in enumerate(layers) for decays in (1, 0)]

def descend(forward, optimizer, prepare, images, labels, config, device):
    """config.epochs times over uint8 images [n,3,H,W]: minimizes the cross-entropy of forward(x [B,3,size,size]),
    scores [B,C], on prepared batches. The schedule is pre-training's; a parameter group has its `share` of the rate."""
    config = dataclasses.replace(config, batch_size=min(config.batch_size, len(images)))
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        images, labels = images.to(device), labels.to(device)
    per_epoch = len(images) // config.batch_size
    steps = config.epochs * per_epoch
    bar = progress(total=steps * config.batch_size, desc="training", unit="img")
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = torch.randperm(len(images), generator=seeded("cpu", config.seed, 21, epoch))
            order = order.to(images.device).split(config.batch_size)
        batch, classes = images[order[place]].to(device), labels[order[place]].to(device)
        x, target = prepare(batch, classes, config, seeded(device, config.seed, 22, step))
        with autocast(device):
            loss = F.cross_entropy(forward(x), target)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config) * group["share"]
        optimizer.step()
        bar.update(config.batch_size)
        if place + 1 == per_epoch:  # no oftener, as the host waits for the device here
            bar.set_postfix(epoch=f"{epoch + 1}/{config.epochs}", loss=f"{loss.item():.4f}", refresh=False)
            check(math.isfinite(loss.item()), f"the loss is {loss.item()} in epoch {epoch + 1}: lower --lr")
    bar.close()

def train_head(model, data, config, device, end_to_end, decay):
    """linear-sgd or, end to end, finetune (Section 5.1) -> scores [m,C] of the test images, settings."""
    images, labels, test_images, _, names = data
    # As in MAE's probe, features are standardized without a learned scale. The linear layer starts at zero.
    head = nn.Sequential(nn.BatchNorm1d(config.dim, affine=False), nn.Linear(config.dim, len(names))).to(device)
    nn.init.zeros_(head[1].weight), nn.init.zeros_(head[1].bias)

    def forward(x):
        return head(model.encode(x).mean(1))  # [B,n,D] -> [B,D] -> [B,C]

    if end_to_end:
        optimizer = torch.optim.AdamW(layer_groups(model, head, config, decay), fused=True)
        prepare, settings = strong_augmentation(len(names)), dict(layer_decay=decay, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.SGD([dict(params=head.parameters(), share=1)], momentum=0.9)
        prepare, settings = crop_and_flip, {}
    descend(forward, optimizer, prepare, images, labels, config, device)
    head.eval()
    return outputs(forward, test_images, config.image_size, device, "test"), settings

# ---------------------------------------------------------------------------------------------------------------------
# From scores to a number

def percent(hits):
    return round(100 * hits.double().mean().item(), 2)

def accuracies(scores, labels, names):
    """scores [m,C], labels [m] -> top1, top5 where there are more than 10 classes, each class's top-1: in percent."""
    hits = scores.argmax(1) == labels
    top5 = dict(top5=percent((scores.topk(5).indices == labels[:, None]).any(1))) if len(names) > 10 else {}
    each = {name: percent(hits[labels == c]) for c, name in enumerate(names) if (labels == c).any()}
    return dict(top1=percent(hits), **top5, per_class=each)

def measure(model, data, config, args, device, cache, key):
    """-> [(scores [m,C] of the test images, settings)]: a single pair, or with --protocol layers one for each layer."""
    if args.protocol in TRAINED:
        end_to_end, decay = args.protocol == "finetune", 1.0 if args.random_init else 0.75
        return [train_head(model, data, config, device, end_to_end, decay)]
    images, labels, test_images, _, names = data
    depths = config.depth if args.protocol == "layers" else 1
    if args.features == "pixels":  # the solver's time grows as the cube of the number of features
        train, test = (outputs(lambda x: x.flatten(1)[:, None], part, min(32, config.image_size), device, "pixels")
                       for part in (images, test_images))
    else:
        function = functools.partial(pooled, model, depths)
        train, test = kept_features(function, images, test_images, config.image_size, device, cache, [*key, depths])
    place = device if device.type == "cuda" else "cpu"  # Apple's mps lacks the solver's float64
    train, labels, test = train.to(place), labels.to(place), test.to(place)
    solve = knn if args.protocol == "knn" else functools.partial(linear, seed=args.seed)
    return [solve(train[:, k], labels, test[:, k], len(names)) for k in range(depths)]

def show(result, path, args, floor):
    """The number, where more of it lies, and what to run next."""
    for k, top1 in enumerate(result.get("accuracy", [])):
        print(f"layer {k + 1:2}  {top1:6.2f} %  " + "#" * round(top1 / 2))
    top5 = f", top-5 {result['top5']:.2f} %" if "top5" in result else ""
    print(f"{path.stem[6:]}: top-1 {result['top1']:.2f} %{top5} in {result['seconds']:.0f} s, more in {path}")
    checkpoint, following = shlex.quote(str(args.checkpoint)), NEXT.get(args.protocol + floor)
    same = [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in given(args, IMAGES).items()]
    print("next: python " + (f"visualize.py all --checkpoint {checkpoint}" if following is None else
                             " ".join(["probe.py", checkpoint, *same, following])))

def main(arguments):
    started, args = time.perf_counter(), read_arguments(arguments)
    saved, trained = load_checkpoint(args.checkpoint)
    sha256 = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()  # at once: a training may replace it at any time
    check(os.access(args.checkpoint.parent, os.W_OK), f"the result cannot be written beside {args.checkpoint}: copy it "
          "to a folder of yours")
    config, device = probe_config(trained, args), pick_device(args.device)
    model, data = make_encoder(saved, trained, args).to(device), load_labelled(config)
    floor, transfer = file_endings(args)
    cache = args.checkpoint.with_name(f"features{'-layers' * (args.protocol == 'layers')}{floor}{transfer}.pt")
    found = measure(model, data, config, args, device, cache, [sha256, args.random_init and ["random", args.seed]])

    settings = {name: getattr(config, name) for name in (*IMAGES, "seed", *TRAINED.get(args.protocol, {}))}
    settings.update(features=args.features, random_init=args.random_init, **found[-1][1])
    result = dict(protocol=args.protocol, **accuracies(found[-1][0], *data[3:]), settings=settings,
                  checkpoint=str(args.checkpoint), sha256=sha256, step=saved.get("step"))
    if args.protocol == "layers":
        result["accuracy"] = [accuracies(scores, *data[3:])["top1"] for scores, _ in found]
    result["seconds"] = round(time.perf_counter() - started, 1)
    path = args.checkpoint.with_name(f"probe-{args.protocol}{floor}{transfer}.json")
    write_whole(path, lambda file: file.write(json.dumps(result, indent=1).encode()))
    show(result, path, args, floor)

if __name__ == "__main__":
    run_command(main)
