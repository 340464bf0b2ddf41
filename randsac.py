"""RandSAC in one file: Self-supervision through Random Segments with Autoregressive Coding
(Hua, Tian, Ren, Raptis, Zhao, Sigal; ICLR 2023; arXiv 2203.12054). Read it beside the paper, top to bottom.

One integer per token, its *rank*, carries the whole method: rank r means "predicted at step r". Tokens that share a
rank form a segment and are predicted together; rank 0 is given and never predicted. Strategies differ only in how
they fill in the ranks, and the three attention masks of Figure 4 are three comparisons of ranks.

    images --augment--> images --patchify--> tokens [B,N,P*P*3]
    strategy --sample_ranks--> ranks [B,N]
    (tokens, ranks) --> encoder -- H1..HL --> skips -- Z1..ZM --> decoder --> predictions of the tokens with rank >= 1

    python randsac.py                                          # 20,000 drawn shapes, within ten minutes on a laptop
    python randsac.py --dataset cifar10                        # the real job, for one GPU
    python randsac.py --segments blob --hierarchy 11 5         # the paper's other strategy
    python randsac.py --dataset folder --data-dir DIR          # your own images
    torchrun --nproc-per-node 8 randsac.py --dataset cifar10   # several GPUs
"""
import argparse, dataclasses, datetime, hashlib, json, math, os, signal, sys, time, zipfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Configuration. The paper leaves the sizes of its CIFAR model, the optimizer and the learning rate to a supplement:
# those below are this project's own choices.

MODELS = {  # what --model fills in where nothing else is said; nano's small batch suits short runs on a CPU
    "nano": dict(dim=128, depth=6, heads=4, decoder_depth=1, lr=5.6e-3, batch_size=32),
    "tiny": dict(dim=192, depth=12, heads=3, decoder_depth=4, lr=1e-3),
    "small": dict(dim=384, depth=12, heads=6, decoder_depth=4, lr=5e-4),
    "base": dict(dim=768, depth=12, heads=12, decoder_depth=8, lr=1.5e-4)}
DATASETS = {  # what --dataset fills in: shapes for a laptop, the others for one GPU
    "shapes": dict(model="nano", epochs=3, batch_size=128),
    "cifar10": dict(model="small", epochs=400, batch_size=512),
    "cifar100": dict(model="small", epochs=400, batch_size=512),
    "folder": dict(model="small", epochs=100, batch_size=256)}
HIERARCHIES = {"patch": (), "square": (16, 4), "blob": (11, 5), "scatter": (9,), "mae": ()}  # Tables 5 and 7
LOG_EVERY, HELD_OUT = 10, 2000  # steps between rows of metrics.jsonl; test images in held_out_loss, about

class UserError(ValueError):
    """Something the user can mend. Its one line says what is wrong and how; commands print it and exit with code 2."""

def check(holds, message):
    if not holds:
        raise UserError(message)

def flag(default, help, choices=(), low=0, high=1e9):
    return dataclasses.field(default=default, metadata=dict(help=help, choices=tuple(choices), low=low, high=high))

@dataclasses.dataclass
class Config:
    """All settings of a run, each a flag of the command line. Building one fills in what was left out (None) and raises
    UserError, a ValueError, where a setting is wrong."""
    dataset: str = flag("shapes", "what to train on", DATASETS)
    data_dir: str = flag("data", "where images are or go; folder: train/CLASS/*.png, test/ (or val/); or any images")
    image_size: int = flag(32, "side of an image in pixels", low=1)
    patch_size: int = flag(4, "side P of a patch (token) in pixels; 1: iGPT's pixel tokens", low=1)
    segments: str = flag("square", "how tokens form segments (Section 3.2); scatter: blobs with their tokens shuffled "
                         "(Table 5); mae: a random quarter given, the rest predicted at once", HIERARCHIES)
    hierarchy: tuple = flag(None, "segment counts from fine to coarse (Section 3.3), as in 16 4: 16 in 4 partitions "
                            "(default: square 16 4, blob 11 5, scatter 9)", low=2)
    order: str = flag("random", "new each time, or row by row (mae: always random)", ("random", "raster"))
    model: str = flag(None, "size of the model: fills in the next flags to lr, and nano batch_size", MODELS)
    dim: int = flag(None, "width of encoder and decoder", low=4)
    depth: int = flag(None, "encoder layers", low=1)
    heads: int = flag(None, "attention heads", low=1)
    decoder_depth: int = flag(None, "decoder layers", low=1)
    lr: float = flag(None, "peak learning rate for each 256 images of the batch", low=1e-9)
    skip: bool = flag(True, "trainable skip connections (Section 4.2)")
    target: str = flag(None, "(Section 5; default: normalized; pixels at --patch-size 1)", ("normalized", "pixels"))
    crop_scale: float = flag(0.3, "about the smallest share of the image that a random crop keeps", low=0.01, high=1)
    epochs: int = flag(None, "passes over the training images; the paper's low-data runs take 1600", low=1)
    max_steps: int = flag(0, "stop after this many steps; 0: after the last epoch")
    batch_size: int = flag(None, "images in a step, over all processes", low=1)
    weight_decay: float = flag(0.05, "weight decay of matrices")
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises", high=0.9)
    seed: int = flag(0, "seed of everything random")
    device: str = flag("auto", "where to compute", ("auto", "cpu", "cuda", "mps"))
    compile: bool = flag(False, "compile the model: a slow start, then faster steps")
    out: str = flag("", "directory of the run (default: a fresh one in runs/)")
    resume: bool = flag(False, "go on with the run in --out, whose flags are remembered")
    save_every: int = flag(0, "save every so many steps, besides every epoch")

    def __post_init__(self):
        self.filled = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is None]
        self.model = self.model or DATASETS.get(self.dataset, {}).get("model")
        self._fill(MODELS.get(self.model, {}))
        self._fill(DATASETS.get(self.dataset, {}))
        self._fill(dict(hierarchy=HIERARCHIES.get(self.segments)))
        self._fill(dict(target="pixels" if self.patch_size == 1 else "normalized"))
        self.hierarchy = tuple(self.hierarchy) if isinstance(self.hierarchy, list) else self.hierarchy  # from argparse
        for f in dataclasses.fields(self):
            value, (_, choices, low, high) = getattr(self, f.name), f.metadata.values()
            values, kind = (value, int) if f.type is tuple and type(value) is tuple else ((value,), f.type)
            good = all((type(v) is kind or (kind, type(v)) == (float, int)) and (not choices or v in choices)
                       and (kind in (str, bool) or low <= v <= high) for v in values)
            wanted = "one of " + ", ".join(choices) if choices else f"{kind.__name__}, from {low} to {high:g}"
            check(good, f"--{f.name.replace('_', '-')} is {value!r} but must be {wanted}")
        self._check_together()

    def _fill(self, defaults):
        for name in defaults:
            if getattr(self, name) is None:
                setattr(self, name, defaults[name])

    def _check_together(self):
        check(self.image_size % self.patch_size == 0,
              f"--patch-size {self.patch_size} does not divide --image-size {self.image_size}: choose one that does")
        check(self.tokens > 1, "one patch fills the image, nothing is left to predict: choose a smaller --patch-size")
        check(self.dim % 4 == 0, f"--dim {self.dim} must be a multiple of 4: sine and cosine of row and column")
        check(self.dim % self.heads == 0, f"--heads {self.heads} does not divide --dim {self.dim}: change one of them")
        levels, roots = self.hierarchy, [self.grid] + [math.isqrt(k) for k in self.hierarchy]
        check(bool(levels) == bool(HIERARCHIES[self.segments]), f"--segments {self.segments} takes "
              + ("no --hierarchy: leave it out" if levels else "at least one --hierarchy count, such as 16 4"))
        check(all(a > b for a, b in zip((self.tokens + 1, *levels), levels)),
              f"--hierarchy {levels} must descend, as 16 4 does, from at most {self.tokens}, the number of tokens")
        check(self.segments != "square" or all(a % b == 0 and k == b * b for a, b, k in zip(roots, roots[1:], levels)),
              f"--hierarchy {levels} does not cut {self.grid} x {self.grid} tokens in squares within squares: choose, "
              f"each root dividing the one before, of {[r * r for r in range(self.grid, 1, -1) if self.grid % r == 0]}")

    @property
    def grid(self):  # tokens along a side
        return self.image_size // self.patch_size

    @property
    def tokens(self):  # N
        return self.grid ** 2

def make_parser(description, leave_out=()):
    """A parser with a flag for each field of Config. Flags not given are not in its result: --resume can tell."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for f in dataclasses.fields(Config):
        kind = dict(type=f.type, choices=f.metadata["choices"] or None, metavar=None if f.metadata["choices"] else "X")
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else kind
        kind = dict(type=int, nargs="+", metavar="K") if f.type is tuple else kind
        default = "" if f.default in (None, "") or f.type is bool else f" (default: {f.default})"
        if f.name not in leave_out:
            parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"] + default, **kind)
    return parser

def run_command(main):
    """Runs a command's main(arguments). What the user or the machine can mend ends in one line and exit code 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        mend = ": choose a smaller --batch-size, or --device cpu" if isinstance(error, torch.OutOfMemoryError) else ""
        sys.exit(print(f"error: {error}{mend}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("stopped", file=sys.stderr) or 130)

def seeded(device, *numbers):
    """A generator for one purpose and step: nothing random has to be saved, and a resumed run is the same run."""
    seed, = np.random.SeedSequence(numbers).generate_state(1, np.uint64) >> 1
    return torch.Generator(device).manual_seed(int(seed))

def write_whole(path, write):
    """Calls write(file) on a file beside `path`, which takes its name when it is on disk: whole, or not at all."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}, which is as before ({error}): make room or go elsewhere") from error
    finally:
        part.unlink(missing_ok=True)

# ---------------------------------------------------------------------------------------------------------------------
# Data: one uint8 array of images

def load_images(config, train):
    """-> images uint8 [n,3,H,W], labels int64 [n] (-1: none), names of the classes. n is 0 where a folder has no test
    images. UserError where images are missing, broken or cannot be downloaded."""
    if config.dataset == "shapes":
        return draw_shapes(20_000 if train else 4_000, config.image_size, seed=int(train))
    if config.dataset == "folder":
        return load_folder(Path(config.data_dir), config.image_size, train)
    cifar = getattr(torchvision.datasets, config.dataset.upper())
    archive = Path(config.data_dir, cifar.filename)
    own = archive.exists()
    try:
        data = cifar(config.data_dir, train, download=True)
    except Exception as error:  # whatever the network did; torchvision trusts no archive whose checksum is wrong
        if not own:
            archive.unlink(missing_ok=True)
        raise UserError(f"cannot download {config.dataset} from {cifar.url} ({error}): put {cifar.filename} in "
                        f"{config.data_dir}/ yourself, or use --dataset shapes") from error
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets), data.classes

FORMS = {  # (u, v) in units of the form's radius -> below zero inside
    "disc": lambda u, v: u.hypot(v) - 0.85,
    "ring": lambda u, v: (u.hypot(v) - 0.7).abs() - 0.2,
    "half disc": lambda u, v: torch.maximum(u.hypot(v) - 1, v - 0.1),
    "crescent": lambda u, v: torch.maximum(u.hypot(v) - 0.95, 0.75 - (u - 0.45).hypot(v)),
    "triangle": lambda u, v: torch.maximum(v.abs() * 0.87 + u * 0.5, -u) - 0.5,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - 0.72,
    "cross": lambda u, v: torch.maximum(torch.maximum(u.abs(), v.abs()) - 0.95, torch.minimum(u.abs(), v.abs()) - 0.28),
    "star": lambda u, v: u.hypot(v) - 0.65 - 0.33 * torch.cos(5 * torch.atan2(v, u)),
    "bars": lambda u, v: torch.maximum(u.abs() - 0.85, (v.abs() - 0.5).abs() - 0.22),
    "corner": lambda u, v: torch.maximum(torch.maximum(u.abs(), v.abs()) - 0.8, torch.minimum(u, v) + 0.2)}

def draw_shapes(n, size, seed):
    """`n` images of 10 forms. Colours, place, size, angle, texture and background vary and say nothing of the class."""
    images, labels = torch.empty(n, 3, size, size, dtype=torch.uint8), torch.arange(n) % len(FORMS)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    for start in range(0, n, 2000):  # in parts, for memory
        part, generator = labels[start:start + 2000], seeded("cpu", seed, start)

        def uniform(low, high, channels=1):  # [B,channels,1,1]
            return low + (high - low) * torch.rand(len(part), channels, 1, 1, generator=generator)

        def texture():  # [B,1,size,size], a wave of random direction, length and strength, often none
            angle, strength = uniform(0, 2 * math.pi), uniform(-0.2, 0.2).clamp(min=0)
            return strength * torch.sin(uniform(1, 12) * (x * angle.cos() + y * angle.sin()) + uniform(0, 6.3))

        angle, radius = uniform(-0.5, 0.5), uniform(0.5, 0.75)
        dx, dy = (x - uniform(-0.25, 0.25)) / radius, (y - uniform(-0.25, 0.25)) / radius
        u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()  # [B,1,size,size]
        depth = torch.empty_like(u)
        for label, form in enumerate(FORMS.values()):
            depth[part == label] = form(u[part == label], v[part == label])
        back = uniform(0, 1, 3)
        front = (back + uniform(0.25, 0.75, 3)) % 1  # another colour in every channel, and none typical of a class
        cover = (0.5 - depth * radius * size / 2).clamp(0, 1)  # the edge is one pixel soft
        noise = 0.02 * torch.randn(len(part), 3, size, size, generator=generator)
        image = torch.lerp(back + texture(), front + texture(), cover) + noise
        images[start:start + 2000] = (image.clamp(0, 1) * 255).round().byte()
    return images, labels, list(FORMS)

def load_folder(root, size, train):
    """Decodes each image once to ROOT/randsac-cache/*.npy, which later runs map from disk -> as load_images."""
    files, labels, names = list_images(root, train)
    check(files or not train, f"no images in {root}: it takes train/CLASS/*.jpg (and test/ or val/), or any images")
    shape = (len(files), 3, size, size)
    if not files:
        return torch.empty(shape, dtype=torch.uint8), torch.empty(0, dtype=torch.long), names
    key = repr([(str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files])  # no outdated cache
    cache = root / "randsac-cache" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}-{size}.npy"

    def write(file):
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
        with ThreadPool() as pool:
            decoded = pool.imap(lambda path: decode(path, size), files, chunksize=16)
            for image in tqdm(decoded, f"decoding once, {math.prod(shape) / 1e9:.2f} GB", len(files), unit="img"):
                file.write(image.tobytes())

    try:
        images = np.load(cache, mmap_mode="c")
        check(images.shape == shape and images.dtype == np.uint8, "of another shape")
    except (OSError, ValueError, EOFError) as error:
        if cache.exists():
            print(f"{cache} is damaged ({error}): decoding again")
        cache.parent.mkdir(exist_ok=True)
        write_whole(cache, write)
        images = np.load(cache, mmap_mode="c")
    return torch.from_numpy(images), torch.tensor(labels), names

def list_images(root, train):
    """-> paths, labels (-1: none), class names. The folders in train/ are the classes, in test/ and val/ too."""
    check(root.is_dir(), f"{root} is not a folder: name one with --data-dir")
    splits = [root / "train", root] if train else [root / "test", root / "val"]  # root itself: images without classes
    split = next((s for s in splits if s.is_dir()), None)
    check(split != root or not (root / "test").is_dir() and not (root / "val").is_dir(),
          f"{root} has test images but no train/: put the others there, as all images of {root} would be trained on")
    names = sorted(d.name for d in root.glob("train/*") if d.is_dir()) if split != root else []
    extra = {d.name for d in split.glob("*") if d.is_dir()} - set(names) if names and split else None
    check(not extra, f"{split} has classes that train/ has not, such as {extra and min(extra)}: rename or remove them")
    folders = [] if split is None else [(i, split / name) for i, name in enumerate(names)] or [(-1, split)]
    found = sorted((Path(place, name), label) for label, folder in folders for place, _, files in os.walk(folder)
                   for name in files if name.lower().endswith(torchvision.datasets.folder.IMG_EXTENSIONS))
    return [path for path, _ in found], [label for _, label in found], names

def decode(path, size):
    """-> uint8 [3,size,size]: shorter side to `size`, middle kept; the first frame of an animation, 16 bits cut to 8,
    transparent parts on white. UserError names a broken file."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.BICUBIC)).transpose(2, 0, 1)
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{path} cannot be decoded ({error}): mend or remove it") from error

def normalize(images, size):
    """uint8 [B,3,H,W] -> float [B,3,size,size] in [-1, 1], alike for all data sets, so that transfer is easy."""
    x = images.float() / 127.5 - 1
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode="bilinear", antialias=True)

def augment(images, size, crop_scale=0.3, generator=None):
    """uint8 [B,3,H,W] -> float [B,3,size,size] in [-1, 1]: random resized crop and flip of a whole batch on its device.
    Section 5 calls its augmentation minimal; the details are this project's choice, the usual ones."""
    area, aspect, x, y, flip = torch.rand(5, len(images), generator=generator, device=images.device)
    area, aspect = crop_scale + (1 - crop_scale) * area, (4 / 3) ** (aspect - 0.5)
    width, height = (area.sqrt() * aspect).clamp(max=1), (area.sqrt() / aspect).clamp(max=1)  # shares of the side
    zero = torch.zeros_like(x)
    theta = torch.stack([torch.where(flip < 0.5, width, -width), zero, (2 * x - 1) * (1 - width),
                         zero, height, (2 * y - 1) * (1 - height)], 1).view(-1, 2, 3)
    where = F.affine_grid(theta, [len(images), 3, size, size], align_corners=True)  # [B,size,size,2]
    return F.grid_sample(images.float() / 127.5 - 1, where, align_corners=True)

# ---------------------------------------------------------------------------------------------------------------------
# Tokens (Section 3.1) and targets (Section 5)

def patchify(images, patch_size):
    """images [B,C,H,W] -> tokens [B,N,P*P*C], N = HW/P^2, row by row; a token is [P,P,C]: its pixels row by row, a
    pixel's channels together. UserError where P does not divide H and W."""
    (B, C, H, W), P = images.shape, patch_size
    check(H % P == 0 and W % P == 0, f"--patch-size {P} does not divide an image of {H} x {W} pixels")
    x = images.reshape(B, C, H // P, P, W // P, P)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, P * P * C)  # [B,H/P,W/P,P,P,C] -> [B,N,PPC]

def unpatchify(tokens, patch_size):
    """tokens [B,N,P*P*C] of square images -> images [B,C,H,H]: the exact inverse of patchify."""
    (B, N, D), P, side = tokens.shape, patch_size, math.isqrt(tokens.shape[1])
    x = tokens.reshape(B, side, side, P, P, D // P**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, side * P, side * P)  # [B,C,side,P,side,P] -> [B,C,H,H]

def normalize_patches(tokens):
    """Each token [...,P*P*C] less its mean, over sqrt(its unbiased variance + 1e-6): Section 5, as in MAE."""
    return (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True) + 1e-6).sqrt()

def token_loss(prediction, target, ranks):
    """prediction, target [B,n,P*P*C], ranks [B,n] -> loss (Section 5): squared error, mean over a token's values, then
    over a sample's predicted tokens (rank >= 1), then over the batch. A sample with none of these counts zero."""
    error, scored = (prediction.float() - target).square().mean(-1), (ranks >= 1).float()  # [B,n] each
    return ((error * scored).sum(1) / scored.sum(1).clamp(min=1)).mean()

# ---------------------------------------------------------------------------------------------------------------------
# Segments (Section 3.2): which tokens belong together. A level is an id (any of 0..N-1) for each token, [B,N].

def square_segments(grid, count):
    """-> an id for each token, int64 [N] row by row: grid x grid tokens cut in `count` squares of M x M tokens,
    count = HW/(PM)^2 (Table 3). Tokens of one square share an id, any of 0..N-1."""
    M = grid // math.isqrt(count)
    index = torch.arange(grid) // M
    return (index[:, None] * (grid // M) + index).flatten()

def nearest_gaussian(points, mean, deviation, angle):
    """points [B,n,2] (x, y), means [B,K,2], deviations [B,K,2] along the axes x and y turned by angle [B,K] (radians,
    from x towards y) -> the index of the nearest of the K Gaussians to each point by Mahalanobis distance, int64 [B,n].
    A segment of Figure 2 (f) is what one wins."""
    x, y = (points[:, :, None] - mean[:, None]).unbind(-1)  # [B,n,K] each
    cos, sin = angle[:, None].cos(), angle[:, None].sin()
    turned = torch.stack([x * cos + y * sin, y * cos - x * sin], -1)  # [B,n,K,2]
    return (turned / deviation[:, None]).square().sum(-1).argmin(-1)

def blob_segments(points, count, generator=None):
    """points [B,n,2] in the unit square -> ids [B,n] of the nearest of `count` random Gaussians, and their means
    [B,count,2]. One that is nearest to no point is simply not there. The range of deviations is open in the paper: a
    common factor would change nothing, only their ratio, here up to 3, shapes the blobs."""
    drawn = torch.rand(len(points), count, 5, generator=generator, device=points.device)
    mean, deviation, angle = drawn.split((2, 2, 1), -1)
    return nearest_gaussian(points, mean, 0.1 + 0.2 * deviation, math.pi * angle[..., 0]), mean

def sample_levels(config, batch, device="cpu", generator=None):
    """-> levels [B,N] from fine to coarse, of every strategy but mae."""
    if config.segments in ("patch", "square"):  # a patch is a square of one token
        counts = config.hierarchy or (config.tokens,)
        with torch.device(device):  # made there, as a copy would make the host wait
            return [square_segments(config.grid, count).expand(batch, -1) for count in counts]
    centre = (torch.arange(config.grid, device=device) + 0.5) / config.grid
    points, levels = torch.cartesian_prod(centre, centre).flip(-1).expand(batch, -1, -1), []  # [B,N,2]: x and y
    for count in config.hierarchy:
        ids, points = blob_segments(points, count, generator)  # a coarser blob groups finer ones by their means:
        levels.append(ids.gather(1, levels[-1]) if levels else ids)  # my partition is that of my blob, so blobs nest
    if config.segments == "scatter":  # Table 5's control: the sizes of blobs, the tokens anywhere
        places = permutations(batch, config.tokens, device, generator)
        levels = [level.gather(1, places) for level in levels]
    return levels

# ---------------------------------------------------------------------------------------------------------------------
# Serialization (Sections 3.1, 3.3): when each segment is predicted

def permutations(batch, n, device="cpu", generator=None):
    return torch.rand(batch, n, generator=generator, device=device).argsort(1)  # [B,n]

def dense(values):
    """values [B,N] -> [B,N]: each row's values replaced by 0..K-1 in the same order."""
    ordered, index = values.sort(1)
    steps = (ordered.diff(dim=1, prepend=ordered[:, :1]) != 0).cumsum(1)
    return torch.empty_like(values).scatter(1, index, steps)

def serialize(levels, order="random", generator=None):
    """levels, a list of [B,N] from fine to coarse -> ranks [B,N], 0..K-1 for the K finest segments of a sample: visits
    the coarsest partitions in random order (each sample its own, all equally likely, drawn from `generator`) or raster
    order (that of their first tokens), and finishes each, by the same rule, before the next (Figure 3)."""
    (B, N), device = levels[0].shape, levels[0].device
    ranks = torch.zeros_like(levels[0])
    for ids in reversed(levels):
        if order == "random":
            place = permutations(B, N, device, generator)  # of all ids there can be, so uniform over those there are
        else:  # a segment's place is that of its first token
            place = torch.full_like(ids, N).scatter_reduce(1, ids, torch.arange(N, device=device).expand(B, N), "amin")
        ranks = dense(ranks * N + place.gather(1, ids))
    return ranks

def sample_ranks(config, batch, device="cpu", generator=None):
    """-> ranks int64 [B,N] in raster order: the step at which each token is predicted, 0..K-1; 0 is given."""
    if config.segments == "mae":  # He et al. 2021 in two steps: the baseline of Tables 7 and 8
        return (permutations(batch, config.tokens, device, generator) >= segment_sizes(config)[0]).long()
    return serialize(sample_levels(config, batch, device, generator), config.order, generator)

def segment_sizes(config):
    """-> how many tokens each rank has, where that never varies (patch, square, mae), else None."""
    N, count = config.tokens, (config.hierarchy or (config.tokens,))[0]
    given = max(1, N // 4)  # MAE hides 75 %
    return {"mae": [given, N - given], "patch": [1] * N, "square": [N // count] * count}.get(config.segments)

# ---------------------------------------------------------------------------------------------------------------------
# Masked transformer (Section 4.1, Figure 4) with trainable skip connections (Section 4.2)

def attention_masks(ranks):
    """ranks [...,N] -> source, target, memory mask, bool [...,N,N]; True: row i may attend to column j (Figure 4).
    Source: j's segment is i's or earlier; target: so, and j has a rank >= 1; memory: j's segment is earlier."""
    i, j = ranks[..., :, None], ranks[..., None, :]
    return i >= j, (i >= j) & (j >= 1), i > j

def positions(rows, cols, dim, device=None):
    """-> [rows*cols,dim]: fixed sine-cosine code of each token's row and column."""
    frequency = 10_000 ** -torch.arange(0, 1 - 2 / dim, 4 / dim, device=device)  # [dim/4], however 4 / dim is rounded
    place = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(cols, device=device))  # [rows*cols,2]
    angle = (place[..., None] * frequency).flatten(1)  # [rows*cols,dim/2]
    return torch.cat([angle.sin(), angle.cos()], 1)

def take(x, index):
    """x [B,N,D], index [B,n] -> [B,n,D]"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

class Attention(nn.Module):
    """Multi-head attention of x [B,n,D] to memory [B,m,D]; a row that its mask [1 or B,1,n,m] leaves empty is zero."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def split(self, x, memory):
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,h,n,d]
        k, v = self.key_value(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B,h,m,d] each
        return q, k, v

    def forward(self, x, memory, mask=None):
        y = F.scaled_dot_product_attention(*self.split(x, memory), attn_mask=mask)  # [B,h,n,d]
        return self.out(y.transpose(1, 2).flatten(2))

    def weights(self, x, memory, mask=None):
        """-> [B,h,n,m], by which forward weighs the values: for pictures, as fused attention does not return them."""
        q, k, _ = self.split(x, memory)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1).nan_to_num(0)

def mlp(dim):
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

class EncoderLayer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm_attention, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), mlp(dim)

    def forward(self, x, mask=None):
        y = self.norm_attention(x)
        x = x + self.attention(y, y, mask)
        return x + self.mlp(self.norm_mlp(x))

class DecoderLayer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm_self, self.self_attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm_cross, self.norm_memory = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), mlp(dim)

    def forward(self, x, memory, target_mask, memory_mask):
        y = self.norm_self(x)
        x = x + self.self_attention(y, y, target_mask)  # the tokens of a segment coordinate
        x = x + self.cross_attention(self.norm_cross(x), self.norm_memory(memory), memory_mask)
        return x + self.mlp(self.norm_mlp(x))

class RandSAC(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, dim, pixels = config, config.dim, 3 * config.patch_size ** 2
        self.embed = nn.Linear(pixels, dim)
        self.encoder = nn.ModuleList(EncoderLayer(dim, config.heads) for _ in range(config.depth))
        self.decoder = nn.ModuleList(DecoderLayer(dim, config.heads) for _ in range(config.decoder_depth))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, pixels))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        if config.skip:  # W of Section 4.2, indexed [l,k] as in its formula (the text prints the shape turned)
            W = torch.zeros(config.decoder_depth, config.depth)
            W[:, -1] = 1  # open in the paper; so training begins as the vanilla decoder, which reads the last layer
            self.skip = nn.Parameter(W)

    def forward(self, images, ranks, trim=False):
        """images [B,3,H,W], ranks [B,N] -> the loss of all tokens of rank >= 1."""
        tokens = patchify(images, self.config.patch_size)  # [B,N,PPC]
        target = normalize_patches(tokens) if self.config.target == "normalized" else tokens
        prediction, queries, ranks = self.decode(tokens, ranks, trim)
        return token_loss(prediction, take(target, queries), ranks)

    def decode(self, tokens, ranks, trim=False):
        """tokens [B,N,PPC], ranks [B,N] -> predictions [B,n,PPC], which tokens they are [B,n], those tokens' ranks.

        Right for any ranks: all tokens in raster order, masks for each sample. With `trim`, where segment sizes never
        vary: tokens sorted by rank, one mask for the batch, the last segment left out of the encoder, as nothing comes
        after it, and the first out of the decoder, as nothing comes before it (Section 4.1)."""
        (B, N, _), device = tokens.shape, tokens.device
        order, first, last = torch.arange(N, device=device).expand(B, N), 0, N
        if trim:
            sizes = segment_sizes(self.config)
            check(sizes, f"{self.config.segments} segments vary in size: they cannot be trimmed")
            order, first, last = ranks.argsort(1), sizes[0], N - sizes[-1]
            ranks = torch.cat([torch.full((1, n), rank, device=device) for rank, n in enumerate(sizes)], 1)  # [1,N]
        source, target, memory = (mask[:, None] for mask in attention_masks(ranks))  # [1 or B,1,N,N]
        context, queries = order[:, :last], order[:, first:]  # [B,last], [B,n]
        position = positions(self.config.grid, self.config.grid, self.config.dim, device).to(tokens.dtype)  # [N,D]

        layers = self.run_encoder(self.embed(take(tokens, context)) + position[context], source[..., :last, :last])
        y = position[queries]  # [B,n,D]: where, and no pixels
        for layer, Z in zip(self.decoder, self.mix_skips(layers)):
            y = layer(y, Z, target[..., first:, first:], memory[..., first:, :last])
        return self.head(y), queries, ranks[:, first:]

    def run_encoder(self, x, mask=None):
        """x [B,n,D] -> the outputs H^1..H^L of all layers, [B,n,D] each."""
        return [x := layer(x, mask) for layer in self.encoder]

    def mix_skips(self, layers):
        """H^1..H^L, a list of [B,n,D] -> a memory [B,n,D] for each decoder layer l: Z^l = sum over k of W[l,k] H^k, W =
        self.skip (Section 4.2); with --no-skip, where there is no W, H^L for each."""
        if not self.config.skip:
            return layers[-1:] * len(self.decoder)
        return torch.einsum("lk,kbnd->lbnd", self.skip, torch.stack(layers)).unbind()

    def predict(self, images, ranks):
        """-> [B,N,P*P*C] in raster order and the target's units, NaN where the rank is 0. Teacher-forced: a segment is
        predicted from the true pixels of those before it."""
        prediction, _, _ = self.decode(patchify(images, self.config.patch_size), ranks)
        return prediction.masked_fill((ranks == 0)[..., None], torch.nan)

    def encode_layers(self, images):
        """images [B,3,H,W], any size that P divides -> all encoder layers' outputs [B,n,D], unmasked (Section 5.1)."""
        P, (H, W) = self.config.patch_size, images.shape[-2:]
        position = positions(H // P, W // P, self.config.dim, images.device)
        return self.run_encoder(self.embed(patchify(images, P)) + position)

    def encode(self, images):
        """-> features [B,n,D] of the last layer. The LayerNorm has no scale: pre-training would leave it untrained."""
        return F.layer_norm(self.encode_layers(images)[-1], (self.config.dim,))

    @staticmethod
    def load(path):
        """Checkpoint -> model in eval mode on the CPU, its Config. UserError as in load_checkpoint."""
        saved, config = load_checkpoint(path)
        model = RandSAC(config)
        restore(model, saved["model"], path)
        return model.eval(), config

# ---------------------------------------------------------------------------------------------------------------------
# Runs: a run is a directory with config.json, metrics.jsonl and checkpoint.pt

def load_whole(path):
    """-> what torch.save wrote there. Raises many kinds of errors where the file is damaged or no such file."""
    with zipfile.ZipFile(path) as archive:  # torch itself loads a flipped bit without a word
        check(archive.testzip() is None, "wrong checksum")
    return torch.load(path, map_location="cpu", weights_only=True)  # runs no code that a file may hold

def load_checkpoint(path):
    """-> what was saved, its Config. UserError where the file is damaged, no checkpoint, or of another version."""
    try:
        saved = load_whole(path)
        unknown = saved["config"].keys() - {f.name for f in dataclasses.fields(Config)}
        check("model" in saved and not unknown, f"another version wrote it, with {', '.join(sorted(unknown))}")
        return saved, Config(**saved["config"])
    except Exception as error:  # a damaged archive raises many kinds
        raise UserError(f"{path} is not a whole checkpoint of randsac.py ({str(error).splitlines()[:1]})") from error

def restore(model, state, path):
    own = model.state_dict()
    wrong = [k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape]
    check(not wrong, f"{path} does not fit the model that its configuration describes: see {', '.join(sorted(wrong))}")
    model.load_state_dict(state)

def read_flags(flags):
    """The flags given -> Config and, with --resume, what was saved; refuses what would make it another run."""
    if not flags.get("resume"):
        config = Config(**flags)
        check(not config.out or not any(Path(config.out, name).exists() for name in ("metrics.jsonl", "checkpoint.pt")),
              f"{config.out} holds a run: go on with it by --resume, or choose another --out")
        return config, None
    check(flags.get("out"), "--resume needs the run's directory: --out DIR")
    saved, before = load_checkpoint(Path(flags["out"], "checkpoint.pt"))
    check({"optimizer", "images"} <= saved.keys(), f"{flags['out']} holds only a model: --resume cannot go on with it")
    config = Config(**{**saved["config"], **flags})
    may_change = {"out", "resume", "data_dir", "device", "compile", "save_every"}
    changed = [f"--{name.replace('_', '-')} (was {value})" for name, value in dataclasses.asdict(before).items()
               if name not in may_change and value != getattr(config, name)]
    check(not changed, f"--resume goes on with the same run: leave out {', '.join(changed)}")
    return config, saved

def open_run(config, saved):
    """Makes the run's directory, or cuts its metrics back to the checkpoint -> the open metrics file."""
    config.out = config.out or f"runs/{config.dataset}-{config.segments}-{time.strftime('%Y%m%d-%H%M%S')}"
    Path(config.out).mkdir(parents=True, exist_ok=True)
    metrics = open(Path(config.out, "metrics.jsonl"), "rb+" if saved else "xb+")  # x: only one run gets the name
    rows, end = metrics.readlines(), 0
    while rows and rows[0].endswith(b"\n") and json.loads(rows[0])["step"] <= saved["step"]:
        end += len(rows.pop(0))
    metrics.truncate(end)
    metrics.seek(end)
    settings = json.dumps(dataclasses.asdict(config), indent=1) + "\n"
    write_whole(Path(config.out, "config.json"), lambda file: file.write(settings.encode()))
    return metrics

# ---------------------------------------------------------------------------------------------------------------------
# Training (Section 5)

def pick_device(name):
    """auto: CUDA, else Apple's mps, else the CPU -> torch.device. UserError where torch cannot use it."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(n for n in there if there[n]) if name == "auto" else name
    check(there[name], f"--device {name} is not there, or not for this torch: leave it out, or choose cpu")
    return torch.device(name)

def autocast(device):
    """bfloat16 on CUDA chips that have it, else float32 (CPUs can be hundreds of times slower in bfloat16)."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

def learning_rate(step, steps, config):
    """Linear warm-up, then half a cosine down to zero."""
    warm = config.warmup * steps
    share = (step + 1) / (warm + 1) if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))
    return config.lr * config.batch_size / 256 * share

def make_optimizer(model, config):
    decays = {p: p.ndim == 2 and name != "skip" for name, p in model.named_parameters()}
    groups = [dict(params=[p for p in decays if decays[p]], weight_decay=config.weight_decay),
              dict(params=[p for p in decays if not decays[p]], weight_decay=0.0)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

def batch_loss(model, images, config, generator=None):
    """Loss of normalized images [B,3,S,S] in freshly drawn orders, trimmed where that is possible."""
    ranks = sample_ranks(config, len(images), images.device, generator)
    with autocast(images.device):
        return model(images, ranks, trim=segment_sizes(config) is not None)

def training_step(model, optimizer, batch, config, step, steps, process=0):
    """One step on uint8 images [B,3,H,W] -> its loss. The host reads no value here, so a GPU never waits for it."""
    generator = seeded(batch.device, config.seed, 1, step, process)
    loss = batch_loss(model, augment(batch, config.image_size, config.crop_scale, generator), config, generator)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, config)
    optimizer.step()
    return loss.detach() + 0 * norm  # not finite where the gradient, and so a weight, is not

@torch.no_grad()
def held_out_loss(model, images, config, device):
    """Mean loss on uint8 images never trained on, in the same orders at each call."""
    parts = [normalize(part.to(device), config.image_size) for part in images.split(500)]
    losses = [batch_loss(model, x, config, seeded(device, config.seed, 2, i)) * len(x) for i, x in enumerate(parts)]
    return sum(losses).item() / len(images)

def announce(model, images, config, steps, world, device):
    """Before the first step: what was filled in, and the time that the run will take, from a pass over a few images."""
    print("filled in:", ", ".join(f"{name} {getattr(config, name)}" for name in config.filled) or "nothing")
    few = normalize(images[:32 if device.type == "cpu" else config.batch_size // world].to(device), config.image_size)
    for _ in range(2):  # the first is slower
        start = time.perf_counter()
        batch_loss(model, few, config).backward()
        model.embed.bias.grad.sum().item()  # waits for a GPU
    minutes = (time.perf_counter() - start) / len(few) * config.batch_size / world * steps / 60
    print(f"{config.out}: {steps} steps of {config.batch_size} images, {world} x {device}: about {minutes:.0f} minutes")
    if device.type == "cpu" and minutes > 120:
        print("That is long for a CPU: --model nano --epochs 7, or --dataset shapes, is for one.")

def set_up(config, saved, device, process, world):
    """-> training images, held-out images, model, the model as training calls it, optimizer."""
    if process > 0:
        dist.barrier()  # the first process downloads and decodes, then the others find it done
    images, held_out = (load_images(config, train)[0] for train in (True, False))
    if world > 1 and process == 0:
        dist.barrier()
    check(len(images) >= config.batch_size, f"{len(images)} images do not fill a --batch-size of {config.batch_size}")
    check(not saved or len(images) == saved["images"], f"{config.data_dir} has {len(images)} training images, but the "
          f"run began with {saved and saved['images']}: put them back, or begin another run")
    held_out = held_out[::len(held_out) // HELD_OUT | 1]  # of every class: odd, as the classes of shapes alternate
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        images = images.to(device)
    torch.manual_seed(config.seed)
    model = RandSAC(config).to(device)
    optimizer = make_optimizer(model, config)
    if saved:
        restore(model, saved["model"], config.out)
        optimizer.load_state_dict(saved["optimizer"])
    wrapped = torch.compile(model) if config.compile else model
    wrapped = nn.parallel.DistributedDataParallel(wrapped) if world > 1 else wrapped
    return images, held_out, model, wrapped, optimizer

def any_process(signals, step, device, world):
    """Whether to stop: all processes must agree on the step, and ask each other only now and then."""
    if world == 1 or step % LOG_EVERY:
        return world == 1 and bool(signals)
    count = torch.tensor(len(signals), device=device)
    dist.all_reduce(count)
    return count.item() > 0

def train(config, saved, device, process=0, world=1):
    """Trains to the last step or to the first signal -> exit code."""
    images, held_out, model, wrapped, optimizer = set_up(config, saved, device, process, world)
    metrics, step = open_run(config, saved) if process == 0 else None, saved["step"] if saved else 0
    per_epoch = len(images) // config.batch_size
    steps = min(config.epochs * per_epoch, config.max_steps or math.inf)

    def save():
        content = dict(config=dataclasses.asdict(config), step=step, images=len(images), model=model.state_dict(),
                       optimizer=optimizer.state_dict())
        write_whole(Path(config.out, "checkpoint.pt"), lambda file: torch.save(content, file))

    if process == 0:
        save()  # before the first step too: --resume always finds the run
        announce(model, images, config, steps - step, world, device)
    signals, stop, losses, order, start = [], False, [], None, time.perf_counter()
    for number in (signal.SIGINT, signal.SIGTERM):  # the first is obeyed between two steps, a second at once
        signal.signal(number, lambda n, _: signals.append(n) or signal.signal(n, signal.SIG_DFL))
    with tqdm(total=steps * config.batch_size, initial=step * config.batch_size, unit="img", disable=process > 0,
              mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        while step < steps and not stop:
            epoch, place = divmod(step, per_epoch)
            if place == 0 or order is None:
                order = torch.randperm(len(images), generator=seeded("cpu", config.seed, 0, epoch)).to(images.device)
            index = order[place * config.batch_size:(place + 1) * config.batch_size][process::world]
            loss = training_step(wrapped, optimizer, images[index].to(device), config, step, steps, process)
            losses += [loss] * (process == 0)  # the others never read it
            step += 1
            bar.update(config.batch_size)
            stop, epoch_ends = any_process(signals, step, device, world), place + 1 == per_epoch or step == steps
            saves = epoch_ends or stop or config.save_every and step % config.save_every == 0
            if process > 0 or not saves and step % LOG_EVERY:
                continue
            rate = len(losses) * config.batch_size / (time.perf_counter() - start)
            row = dict(step=step, epoch=epoch + 1, loss=torch.stack(losses).mean().item(),
                       lr=optimizer.param_groups[0]["lr"], images_per_s=round(rate, 1))
            check(math.isfinite(row["loss"]), f"the loss is {row['loss']} at step {step}: lower --lr. "
                  f"{config.out}/checkpoint.pt is from before")
            if epoch_ends and len(held_out):
                row["held_out_loss"] = held_out_loss(model, held_out, config, device)
            metrics.write(json.dumps(row).encode() + b"\n")
            metrics.flush()
            bar.set_postfix(epoch=f"{epoch + 1}/{config.epochs}", loss=f"{row['loss']:.4f}", refresh=False)
            if saves:
                save()
            losses, start = [], time.perf_counter()
    if process == 0 and stop:
        print(f"stopped after step {step}. To go on: python randsac.py --out {config.out} --resume")
    elif process == 0:
        print(f"trained. Next: python probe.py {config.out}/checkpoint.pt\n"
              f"         and: python visualize.py all --checkpoint {config.out}/checkpoint.pt")
    return 128 + (signals or [signal.SIGTERM])[0] if stop else 0

def main(arguments):
    config, saved = read_flags(vars(make_parser(__doc__).parse_args(arguments)))
    process, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    check(config.batch_size % world == 0, f"--batch-size {config.batch_size} does not divide over {world} processes")
    device = pick_device(config.device)
    if device.type == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        check(local < count, f"there is no GPU {local}: start torchrun with --nproc-per-node {count}")
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # with a mask its gradients can be NaN (PyTorch's issue 196678)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    return train(config, saved, device, process, world)

if __name__ == "__main__":
    run_command(main)
