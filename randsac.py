"""RandSAC in one file: Self-supervision through Random Segments with Autoregressive Coding
(Hua, Tian, Ren, Raptis, Zhao, Sigal; ICLR 2023; arXiv 2203.12054). Read it beside the paper, top to bottom.

One integer per token, its *rank*, carries the whole method: rank r means "predicted at step r". Tokens that share a
rank form a segment and are predicted together; rank 0 is given and never predicted. Strategies differ only in how
they fill in the ranks, and the three attention masks of Figure 4 are three comparisons of ranks.

    images --augment--> images --patchify--> tokens [B,N,P*P*3]
    strategy --sample_ranks--> ranks [B,N]
    (tokens, ranks) --> encoder -- H1..HL --> skips -- Z1..ZM --> decoder --> predictions of the tokens with rank >= 1

    python randsac.py                                          # 20,000 drawn shapes, a few minutes on a laptop
    python randsac.py --dataset cifar10                        # the real job, for one GPU
    python randsac.py --segments blob --hierarchy 11 5         # the paper's other strategy
    python randsac.py --dataset folder --data-dir DIR          # your own images
    torchrun --nproc-per-node 8 randsac.py --dataset cifar10   # several GPUs
"""
import argparse, dataclasses, hashlib, json, math, os, signal, sys, time, zipfile
from dataclasses import dataclass
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

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None


class UserError(ValueError):
    """Something that the user can mend. Its one line says what is wrong and how; commands print it and exit with 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: every field is a flag (patch_size is --patch-size). The paper leaves the CIFAR model, optimizer and
# learning rate to a supplement; the sizes and rates below are this project's own choices.

MODELS = {  # what --model fills in where the command line says nothing; lr is per 256 images
    "nano": dict(dim=128, depth=6, heads=4, decoder_depth=2, lr=1.5e-3),
    "tiny": dict(dim=192, depth=12, heads=3, decoder_depth=4, lr=1e-3),
    "small": dict(dim=384, depth=12, heads=6, decoder_depth=4, lr=5e-4),
    "base": dict(dim=768, depth=12, heads=12, decoder_depth=8, lr=1.5e-4),
}
DATASETS = {  # what --dataset fills in: shapes for a laptop, the others for one GPU
    "shapes": dict(model="nano", epochs=3, batch_size=128),
    "cifar10": dict(model="small", epochs=400, batch_size=512),
    "cifar100": dict(model="small", epochs=400, batch_size=512),
    "folder": dict(model="small", epochs=100, batch_size=256),
}
LOG_EVERY, HELD_OUT = 10, 2000  # steps between two rows of metrics.jsonl; images of the test split in held_out_loss
HIERARCHIES = {"patch": (), "square": (16, 4), "blob": (11, 5), "scatter": (9,), "mae": ()}  # Tables 5 and 7


def flag(default, help, choices=None, low=-math.inf, high=math.inf):
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


@dataclass
class Config:
    """All settings of a run; building one checks it and raises ValueError (UserError) with the reason and the mend."""
    dataset: str = flag("shapes", "what to train on", list(DATASETS))
    data_dir: str = flag("data", "where images lie or are downloaded to; for folder: train/CLASS/*.png and test/ "
                         "(or val/), or any folder of images")
    image_size: int = flag(32, "side of an image in pixels", low=1)
    patch_size: int = flag(4, "side P of a patch (token) in pixels; 1 is iGPT's pixel tokens", low=1)
    segments: str = flag("square", "how tokens form segments (Section 3.2); scatter is Table 5's shuffled control, mae "
                         "the two-step baseline: a random 25%% given, the rest predicted at once", list(HIERARCHIES))
    hierarchy: tuple = flag(None, "segment counts from fine to coarse (Section 3.3), as in 16 4: 16 segments in 4 "
                            "partitions (default: square 16 4, blob 11 5, scatter 9)", low=2)
    order: str = flag("random", "order of prediction, new for each image and step or row by row (mae: always random)",
                      ["random", "raster"])
    model: str = flag(None, "size of the model; the next five flags override single numbers", list(MODELS))
    dim: int = flag(None, "width of encoder and decoder", low=4)
    depth: int = flag(None, "encoder layers", low=1)
    heads: int = flag(None, "attention heads", low=1)
    decoder_depth: int = flag(None, "decoder layers", low=1)
    lr: float = flag(None, "peak learning rate per 256 images of the batch", low=1e-9)
    skip: bool = flag(True, "trainable skip connections (Section 4.2)")
    target: str = flag(None, "what is predicted (Section 5; default: normalized, but pixels with --patch-size 1)",
                       ["normalized", "pixels"])
    crop_scale: float = flag(0.3, "smallest share of the image's area that a random crop keeps", low=0.01, high=1)
    epochs: int = flag(None, "passes over the training images; the paper's low-data runs take 1600", low=1)
    max_steps: int = flag(0, "stop after this many steps, 0: after the last epoch", low=0)
    batch_size: int = flag(None, "images in a step, over all processes", low=1)
    weight_decay: float = flag(0.05, "AdamW's weight decay, on matrices only", low=0)
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises", low=0, high=0.99)
    seed: int = flag(0, "seed of everything random", low=0)
    device: str = flag("auto", "where to compute", ["auto", "cpu", "cuda", "mps"])
    compile: bool = flag(False, "compile the model (slow start, faster steps)")
    out: str = flag("", "directory of the run (default: a fresh one in runs/)")
    resume: bool = flag(False, "go on with the run in --out; its flags are remembered")
    save_every: int = flag(0, "save every so many steps, besides every epoch", low=0)

    def __post_init__(self):
        self.filled = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is None]
        check(self.dataset in DATASETS, f"dataset {self.dataset!r} is unknown: choose from {', '.join(DATASETS)}")
        self._fill(DATASETS[self.dataset])
        check(self.model in MODELS, f"model {self.model!r} is unknown: choose from {', '.join(MODELS)}")
        self._fill(MODELS[self.model])
        self._fill(dict(hierarchy=HIERARCHIES.get(self.segments), target="pixels" if self.patch_size == 1 else "normalized"))
        for f in dataclasses.fields(self):
            check_field(f, getattr(self, f.name))
        self.hierarchy = tuple(self.hierarchy)
        self._check_together()

    def _fill(self, defaults):
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _check_together(self):
        check(self.image_size % self.patch_size == 0, f"patch size {self.patch_size} does not divide the image size "
              f"{self.image_size}: choose a --patch-size that does")
        check(self.tokens >= 2, "one patch fills the image, nothing is left to predict: choose a smaller --patch-size")
        check(self.dim % 4 == 0, f"dim {self.dim} is not a multiple of 4, which the position code (sine and cosine of "
              "row and column) needs")
        check(self.dim % self.heads == 0, f"{self.heads} heads do not divide dim {self.dim}: change --heads or --dim")
        takes_levels = self.segments in ("square", "blob", "scatter")
        check(takes_levels == bool(self.hierarchy), f"--segments {self.segments} takes "
              + ("at least one count: --hierarchy 16 4" if takes_levels else "no hierarchy: leave --hierarchy out"))
        check(all(a > b for a, b in zip(self.hierarchy, self.hierarchy[1:])),
              f"hierarchy {self.hierarchy} must descend from fine to coarse, as 16 4 does")
        check(all(k <= self.tokens for k in self.hierarchy),
              f"hierarchy {self.hierarchy} asks for more segments than the image has tokens, {self.tokens}")
        sides = [self.grid] + [math.isqrt(k) for k in self.hierarchy]
        check(self.segments != "square" or all(k == s * s and finer % s == 0
                                               for k, finer, s in zip(self.hierarchy, sides, sides[1:])),
              f"hierarchy {self.hierarchy} cannot be cut in squares from {self.grid} x {self.grid} tokens: each count "
              "must be s*s, where s divides the grid's side and the s of the count before it")

    @property
    def grid(self):  # tokens along one side
        return self.image_size // self.patch_size

    @property
    def tokens(self):  # N
        return self.grid ** 2


def check(holds, message):
    if not holds:
        raise UserError(message)


def check_field(f, value):
    kinds = {float: (int, float), tuple: (tuple, list)}.get(f.type, f.type)
    numbers = list(value) if f.type is tuple and isinstance(value, kinds) else [value]
    check(isinstance(value, kinds) and (f.type is bool or bool not in map(type, numbers)),
          f"{f.name} is {value!r} but must be of type {f.type.__name__}")
    check(not f.metadata["choices"] or value in f.metadata["choices"],
          f"{f.name} {value!r} is unknown: choose from {', '.join(f.metadata['choices'] or [])}")
    low, high = f.metadata["low"], f.metadata["high"]
    for number in numbers if f.type in (int, float, tuple) else []:
        check(isinstance(number, (int, float)) and math.isfinite(number) and low <= number <= high
              and (f.type is float or isinstance(number, int)),
              f"{f.name} is {value!r} but must be " + ("whole, " if f.type is not float else "finite, ")
              + (f"at least {low}" if high == math.inf else f"from {low} to {high}"))


def make_parser(description, leave_out=()):
    """A parser with a flag for every field of Config. What the user leaves out is not in its result, so that --resume
    and --checkpoint can tell it from what was said."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for f in dataclasses.fields(Config):
        if f.name in leave_out:
            continue
        kinds = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(type=int, nargs="+", metavar="K")}
        default = "" if f.default in (None, "") or f.type is bool else f" (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"] + default, **kinds.get(
            f.type, dict(type=f.type, choices=f.metadata["choices"], metavar=None if f.metadata["choices"] else "X")))
    return parser


def run_command(main):
    """Runs a command's main(argv); what the user can mend ends in one line and exit code 2, Ctrl-C in 130."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def seeded(device, *numbers):
    """A generator for exactly this purpose and step: nothing random has to be saved, and a resumed run is the same run."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator(device).manual_seed(int(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Data: one uint8 array of images. Normalized with mean and deviation 0.5 for every data set, so that a model can be
# probed on other images than it was trained on without bookkeeping.

def load_images(config, train):
    """-> images uint8 [n,3,H,W], labels int64 [n] (-1: none), names of the classes. A folder without a test split has
    n = 0 test images. Raises UserError where images are missing, broken or cannot be downloaded."""
    if config.dataset == "shapes":
        return draw_shapes(20_000 if train else 4_000, config.image_size, seed=1 if train else 2)
    if config.dataset == "folder":
        return load_folder(Path(config.data_dir), config.image_size, train)
    cifar = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[config.dataset]
    try:
        data = cifar(config.data_dir, train, download=True)
    except Exception as error:  # whatever the network or a half archive did; torchvision checks the archive's MD5
        (Path(config.data_dir) / cifar.filename).unlink(missing_ok=True)
        raise UserError(f"cannot get {config.dataset} from {cifar.url} ({error}): put {cifar.filename} in "
                        f"{config.data_dir}/ yourself, or use --dataset shapes") from error
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets), data.classes


FORMS = {  # (u, v) in units of the form's radius -> below zero inside, growing like a distance
    "disc": lambda u, v: u.hypot(v) - 0.85,
    "ring": lambda u, v: (u.hypot(v) - 0.7).abs() - 0.2,
    "half disc": lambda u, v: torch.maximum(u.hypot(v) - 1, v - 0.1),
    "crescent": lambda u, v: torch.maximum(u.hypot(v) - 0.95, 0.75 - (u - 0.45).hypot(v)),
    "triangle": lambda u, v: torch.maximum(v.abs() * 0.87 + u * 0.5, -u) - 0.5,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - 0.72,
    "cross": lambda u, v: torch.minimum(torch.maximum(u.abs() - 0.95, v.abs() - 0.28),
                                        torch.maximum(v.abs() - 0.95, u.abs() - 0.28)),
    "star": lambda u, v: u.hypot(v) - 0.65 - 0.33 * torch.cos(5 * torch.atan2(v, u)),
    "bars": lambda u, v: torch.maximum(u.abs() - 0.85, (v.abs() - 0.5).abs() - 0.22),
    "corner": lambda u, v: torch.maximum(torch.maximum(u.abs(), v.abs()) - 0.8, torch.minimum(u, v) + 0.2),
}


def draw_shapes(n, size, seed):
    """`n` images of 10 forms. Colour, place, size, angle, texture and background vary and say nothing of the class."""
    images, labels = torch.empty(n, 3, size, size, dtype=torch.uint8), torch.arange(n) % len(FORMS)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    for start in range(0, n, 2000):  # in parts, for memory
        part = labels[start:start + 2000]
        generator = seeded("cpu", seed, start)

        def uniform(low, high, *shape):
            return torch.rand(len(part), *(shape or (1, 1)), generator=generator) * (high - low) + low

        def stripes():  # [B,1,size,size], a wave of random direction, frequency and strength
            angle = uniform(0, 2 * math.pi)
            wave = torch.sin(uniform(4, 20) * (x * angle.cos() + y * angle.sin()) + uniform(0, 6.3))
            return (uniform(0, 0.25) * wave)[:, None]

        angle, radius = uniform(0, 2 * math.pi), uniform(0.4, 0.65)
        dx, dy = (x - uniform(-0.4, 0.4)) / radius, (y - uniform(-0.4, 0.4)) / radius
        u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()  # [B,size,size]
        inside = torch.empty(len(part), size, size)
        for label, form in enumerate(FORMS.values()):
            inside[part == label] = form(u[part == label], v[part == label])
        cover = (0.5 - inside * radius * size / 2).clamp(0, 1)[:, None]  # soft edge, one pixel wide
        back = uniform(0, 1, 3, 1, 1)
        front = (back + uniform(0.25, 0.75, 3, 1, 1)) % 1  # another colour, and neither is ever typical of a class
        image = torch.lerp(back + stripes(), front + stripes(), cover) + 0.05 * torch.randn(
            len(part), 3, size, size, generator=generator)
        images[start:start + 2000] = (image.clamp(0, 1) * 255).round().byte()
    return images, labels, list(FORMS)


def load_folder(root, size, train):
    """Decodes every image once, to ROOT/randsac-cache/*.npy, and maps that file from then on."""
    files, labels, names = list_images(root, train)
    if not files:
        check(not train, f"no images in {root}: expected train/CLASS/*.jpg (and test/ or val/), or images anywhere below it")
        return torch.empty(0, 3, size, size, dtype=torch.uint8), torch.empty(0, dtype=torch.long), names
    try:  # the key changes with the files and the size, so that an outdated cache is never read
        key = json.dumps([[str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
        cache = root / "randsac-cache" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}-{size}.npy"
        shape = (len(files), 3, size, size)
        if cache.exists() and cache.stat().st_size != 128 + math.prod(shape):  # 128 bytes: numpy's header
            print(f"{cache} is cut short: decoding again")
        elif cache.exists():
            return torch.from_numpy(np.load(cache, mmap_mode="c")), torch.tensor(labels), names
        cache.parent.mkdir(exist_ok=True)
        write_cache(cache, files, shape)
    except OSError as error:
        raise UserError(f"cannot decode the images of {root} to {root}/randsac-cache ({error}): "
                        f"that takes {math.prod(shape) / 1e9:.2f} GB in a folder that can be written to") from error
    return torch.from_numpy(np.load(cache, mmap_mode="c")), torch.tensor(labels), names


def list_images(root, train):
    """-> paths, labels (-1: none) and class names of a split. A class is a folder in train/; the same names in test/."""
    check(root.is_dir(), f"{root} is not a folder: name one with --data-dir")
    splits = [root / "train", root] if train else [root / "test", root / "val"]  # root itself: images without labels
    split = next((s for s in splits if s.is_dir()), None)
    if split is None:
        return [], [], []
    names = sorted(d.name for d in (root / "train").glob("*/")) if split != root else []
    unknown = sorted({d.name for d in split.glob("*/")} - set(names)) if names else []
    check(not unknown, f"{split} has a class that {root / 'train'} lacks, {unknown[:1]}: rename or remove it")

    def fail(error):
        raise error

    found = []
    for label, folder in [(i, split / name) for i, name in enumerate(names)] or [(-1, split)]:
        for place, _, entries in os.walk(folder, onerror=fail if folder.exists() else None):  # follows no link: no loop
            found += [(Path(place) / entry, label) for entry in entries
                      if entry.lower().endswith(torchvision.datasets.folder.IMG_EXTENSIONS)]
    found.sort()
    return [path for path, _ in found], [label for _, label in found], names


def write_cache(cache, files, shape):
    """Decodes `files` into the .npy file `cache`, which appears only when it is whole."""
    part = cache.with_suffix(f".{os.getpid()}.part")
    try:
        with open(part, "wb") as out, ThreadPool(os.cpu_count()) as pool:
            header = dict(descr="|u1", fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(out, header)
            images = pool.imap(lambda path: decode(path, shape[-1]), files, chunksize=16)
            for image in tqdm(images, f"decoding to {cache}, once", len(files), unit="img", disable=None):
                out.write(image.tobytes())
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, cache)
    finally:
        part.unlink(missing_ok=True)


def decode(path, size):
    """-> uint8 [3,size,size]: shorter side to `size`, centre kept. Of an animation the first frame, 16 bits cut to 8,
    transparent parts over white."""
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
    """uint8 [B,3,H,W] -> float [B,3,size,size] in [-1, 1]."""
    x = images.float() / 127.5 - 1
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode="bilinear", antialias=True)


def augment(images, size, crop_scale=0.3, generator=None):
    """uint8 [B,3,H,W] -> float [B,3,size,size] in [-1, 1]: random resized crop and flip, whole batch at once, on the
    images' device ("minimal" in Section 5; the details are this project's choice, the usual ones)."""
    area, aspect, x, y, flip = torch.rand(5, len(images), generator=generator, device=images.device)
    area, aspect = crop_scale + (1 - crop_scale) * area, (4 / 3) ** (aspect - 0.5)
    width, height = (area.sqrt() * aspect).clamp(max=1), (area.sqrt() / aspect).clamp(max=1)  # shares of the side
    zero, mirror = torch.zeros_like(x), torch.where(flip < 0.5, -1.0, 1.0)
    theta = torch.stack([torch.stack([width * mirror, zero, (2 * x - 1) * (1 - width)], 1),
                         torch.stack([zero, height, (2 * y - 1) * (1 - height)], 1)], 1)  # [B,2,3]
    where = F.affine_grid(theta, [len(images), 3, size, size], align_corners=True)
    return F.grid_sample(images.float() / 127.5 - 1, where, align_corners=True)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens (Section 3.1)

def patchify(images, patch_size):
    """[B,C,H,W] -> tokens [B,N,P*P*C] in raster order, N = HW/P^2 (Section 3.1). ValueError where P does not divide."""
    B, C, H, W = images.shape
    P = patch_size
    check(H % P == 0 and W % P == 0, f"patch size {P} does not divide an image of {H} x {W} pixels")
    x = images.reshape(B, C, H // P, P, W // P, P)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // P) * (W // P), P * P * C)  # [B,H/P,W/P,P,P,C] -> [B,N,PPC]


def unpatchify(tokens, patch_size):
    """[B,N,P*P*C] -> [B,C,H,H], the exact inverse of patchify for square images."""
    B, N, D = tokens.shape
    P, side = patch_size, math.isqrt(N)
    check(side * side == N, f"{N} tokens do not fill a square image")
    x = tokens.reshape(B, side, side, P, P, D // P**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, D // P**2, side * P, side * P)  # [B,C,H/P,P,W/P,P] -> [B,C,H,W]


def normalize_patches(tokens):
    """Target of Section 5: each patch [...,P*P*C] less its own mean, over its own standard deviation (as MAE does)."""
    mean, var = tokens.mean(-1, keepdim=True), tokens.var(-1, keepdim=True)
    return (tokens - mean) / (var + 1e-6).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Segments (Section 3.2): which tokens belong together. A level is an id per token, [B,N]; ids need not be dense.

def square_segments(grid, count):
    """[N]: a grid x grid image cut in `count` squares (square size M = grid / sqrt(count), Table 3)."""
    M = grid // math.isqrt(count)
    index = torch.arange(grid) // M
    return (index[:, None] * (grid // M) + index).flatten()


def blob_segments(points, count, generator=None):
    """points [B,n,2] in the unit square -> ids [B,n] of the nearest of `count` random Gaussians by Mahalanobis distance,
    and the Gaussians' means [B,count,2]. One that is nearest to no point is simply not there.

    The range of the deviations is open in the paper. A common factor changes nothing: only their ratio matters."""
    u = torch.rand(5, len(points), count, generator=generator, device=points.device)
    mean, deviation, angle = u[:2], 0.1 + 0.2 * u[2:4], math.pi * u[4]
    dx, dy = points.permute(2, 0, 1)[..., None] - mean[:, :, None]  # [B,n,count] each
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    along, across = (dx * cos + dy * sin) / deviation[0, :, None], (dy * cos - dx * sin) / deviation[1, :, None]
    return (along**2 + across**2).argmin(-1), mean.permute(1, 2, 0)


def blob_levels(grid, counts, batch, device, generator):
    """Levels [B,N] from fine to coarse. A coarse level groups the finer blobs by their means, so blobs nest (3.3)."""
    centre = (torch.arange(grid, device=device) + 0.5) / grid
    points = torch.stack(torch.meshgrid(centre, centre, indexing="xy"), -1).view(1, -1, 2).expand(batch, -1, -1)
    levels = []
    for count in counts:
        ids, points = blob_segments(points, count, generator)
        levels.append(ids if not levels else ids.gather(1, levels[-1]))  # id of my blob's blob
    return levels


# ---------------------------------------------------------------------------------------------------------------------
# Serialization (Sections 3.1 and 3.3): when each segment is predicted.

def shuffled(batch, n, device, generator):
    """[B,n]: for each sample its own permutation of 0..n-1."""
    return torch.rand(batch, n, generator=generator, device=device).argsort(1)


def dense(values):
    """[B,N] -> [B,N]: replaces each row's values by 0..K-1, in order, equal for equal."""
    ordered, index = values.sort(1)
    steps = F.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(1), (1, 0))
    return torch.zeros_like(values).scatter(1, index, steps)


def serialize(levels, order, generator=None):
    """Levels [B,N] from fine to coarse -> ranks [B,N]. Visits the coarsest partitions in random (or raster) order and
    finishes each, level by level, before the next (Section 3.3, Figure 3)."""
    ranks = torch.zeros_like(levels[-1])
    B, N = ranks.shape
    for segment in reversed(levels):
        if order == "random":
            place = shuffled(B, N, ranks.device, generator)  # of every id there can be: uniform over those there are
        else:  # raster: a segment's place is its first token's
            index = torch.arange(N, device=ranks.device).expand(B, N)
            place = torch.full_like(ranks, N).scatter_reduce(1, segment, index, "amin")
        ranks = dense(ranks * N + place.gather(1, segment))
    return ranks


def sample_ranks(config, batch, device="cpu", generator=None):
    """-> int64 [B,N] in raster order: when each token is predicted; dense 0..K-1, and rank 0 is given."""
    N = config.tokens
    if config.segments == "mae":  # He et al. 2021 as a two-step order: the baseline of Tables 7 and 8
        return (shuffled(batch, N, device, generator) >= segment_sizes(config)[0]).long()
    if config.segments in ("blob", "scatter"):
        levels = blob_levels(config.grid, config.hierarchy, batch, device, generator)
    else:  # a patch is a square of one token
        levels = [square_segments(config.grid, k).to(device).expand(batch, N) for k in config.hierarchy or (N,)]
    if config.segments == "scatter":  # Table 5's control: the same sizes, tokens anywhere
        places = shuffled(batch, N, device, generator)
        levels = [level.gather(1, places) for level in levels]
    return serialize(levels, config.order, generator)


def segment_sizes(config):
    """Number of tokens of each rank where that never varies (patch, square, mae), else None."""
    N = config.tokens
    if config.segments == "mae":
        given = max(1, N // 4)  # 75 % masked
        return [given, N - given]
    count = config.hierarchy[0] if config.hierarchy else N
    return [N // count] * count if config.segments in ("patch", "square") else None


# ---------------------------------------------------------------------------------------------------------------------
# Masked transformer (Section 4.1, Figure 4)

def attention_masks(ranks):
    """ranks [...,N] -> source, target, memory masks, bool [...,N,N]; True: row i may attend to column j (Figure 4)."""
    i, j = ranks[..., :, None], ranks[..., None, :]
    return i >= j, (i >= j) & (j >= 1), i > j


def positions(rows, cols, dim, device=None):
    """Fixed sine-cosine code of each token's row and column, [rows*cols, dim], for the grid at hand."""
    frequency = 10_000 ** -torch.linspace(0, 1, dim // 4 + 1, device=device)[:-1]
    y, x = (torch.arange(n, device=device)[:, None] * frequency for n in (rows, cols))  # [n,dim/4]
    y, x = y[:, None].expand(-1, cols, -1), x.expand(rows, -1, -1)
    return torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], -1).flatten(0, 1)


def take(x, index):
    """x [B,N,D], index [B,n] -> [B,n,D]: for each sample the tokens that its indices name."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Attention(nn.Module):
    """Multi-head attention of x [B,n,D] to memory [B,m,D]. A row that its mask leaves empty gets zeros."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def split(self, x, memory):
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,h,n,d]
        k, v = self.key_value(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B,h,m,d] each
        return q, k, v

    def forward(self, x, memory, mask=None):  # mask [1 or B,1,n,m]
        out = F.scaled_dot_product_attention(*self.split(x, memory), attn_mask=mask)  # [B,h,n,d]
        return self.out(out.transpose(1, 2).flatten(2))

    def weights(self, x, memory, mask=None):
        """[B,h,n,m], what forward weighs the values with: for pictures, fused attention does not return it."""
        q, k, _ = self.split(x, memory)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1).nan_to_num(0)


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
        self.norm_cross, self.norm_memory, self.cross_attention = nn.LayerNorm(dim), nn.LayerNorm(dim), Attention(dim, heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), mlp(dim)

    def forward(self, x, memory, target_mask, memory_mask):
        y = self.norm_self(x)
        x = x + self.self_attention(y, y, target_mask)  # tokens of a segment coordinate
        x = x + self.cross_attention(self.norm_cross(x), self.norm_memory(memory), memory_mask)
        return x + self.mlp(self.norm_mlp(x))


class RandSAC(nn.Module):
    """Masked encoder-decoder transformer with trainable skip connections (Section 4)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        pixels = 3 * config.patch_size ** 2
        self.embed = nn.Linear(pixels, config.dim)
        self.encoder = nn.ModuleList(EncoderLayer(config.dim, config.heads) for _ in range(config.depth))
        self.decoder = nn.ModuleList(DecoderLayer(config.dim, config.heads) for _ in range(config.decoder_depth))
        self.head = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, pixels))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if config.skip:  # W of Section 4.2, [L_dec, L_enc] as its formula indexes it (the text has the shape turned)
            W = torch.zeros(config.decoder_depth, config.depth)
            W[:, -1] = 1  # open in the paper: we begin as the vanilla decoder, which reads the last layer
            self.skip = nn.Parameter(W)
        sizes = segment_sizes(config)
        if sizes:  # ranks of the tokens in the order of prediction, the same for every sample
            self.register_buffer("sorted_ranks", torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[None],
                                 persistent=False)

    def forward(self, images, ranks, trim=False):
        """images [B,3,H,W], ranks [B,N] -> loss: squared error of a token, mean over a sample's predicted tokens, mean
        over the batch (Section 5). A sample of a single segment counts zero."""
        tokens = patchify(images, self.config.patch_size)  # [B,N,PPC]
        target = normalize_patches(tokens) if self.config.target == "normalized" else tokens
        prediction, index, ranks = self.decode(tokens, ranks, trim)
        error = (prediction.float() - take(target, index)).square().mean(-1)  # [B,n]
        scored = (ranks >= 1).float()  # [1 or B,n]
        return ((error * scored).sum(1) / scored.sum(1).clamp(min=1)).mean()

    def decode(self, tokens, ranks, trim=False):
        """tokens [B,N,PPC], ranks [B,N] -> predictions [B,n,PPC], which tokens they are [B,n], their ranks [1 or B,n].

        All tokens stay in raster order under masks of their own (n = N), right for any ranks. With `trim`, where all
        samples have the same segment sizes, tokens are sorted by rank so that one mask serves the batch, and what the
        masks would only waste is left out: the last segment of the encoder, the first of the decoder (Section 4.1)."""
        B, N, _ = tokens.shape
        order, first, last = torch.arange(N, device=tokens.device).expand(B, N), 0, N
        if trim:
            sizes = segment_sizes(self.config)
            check(sizes, f"segments of {self.config.segments} vary in size: they cannot be trimmed")
            order, ranks, first, last = ranks.argsort(1), self.sorted_ranks, sizes[0], N - sizes[-1]
        source, target, memory = (mask[:, None] for mask in attention_masks(ranks))  # [1 or B,1,N,N]
        context, queries, position = order[:, :last], order[:, first:], self.positions(self.config.grid, self.config.grid)

        x, layers = self.embed(take(tokens, context)) + position[context], []  # [B,last,D]
        for layer in self.encoder:
            x = layer(x, source[..., :last, :last])
            layers.append(x)
        y = position[queries]  # [B,n,D]: where, and no pixels
        for layer, Z in zip(self.decoder, self.mix_skips(layers)):
            y = layer(y, Z, target[..., first:, first:], memory[..., first:, :last])
        return self.head(y), queries, ranks[:, first:]

    def positions(self, rows, cols):
        return positions(rows, cols, self.config.dim, self.embed.weight.device)

    def mix_skips(self, layers):
        """Encoder outputs H^1..H^L [B,n,D] -> one memory for each decoder layer l, Z^l = sum_k W[l,k] H^k (Section 4.2)."""
        if not self.config.skip:
            return layers[-1:] * len(self.decoder)
        return torch.einsum("lk,kbnd->lbnd", self.skip, torch.stack(layers)).unbind()

    def predict(self, images, ranks):
        """-> [B,N,P*P*C] in raster order and in the target's units; NaN where the rank is 0. Teacher-forced: each
        segment is predicted from the true pixels of the earlier ones."""
        prediction, _, _ = self.decode(patchify(images, self.config.patch_size), ranks)
        return prediction.masked_fill((ranks == 0)[..., None], torch.nan)

    def encode_layers(self, images):
        """images [B,3,H,W] of any size that the patch size divides -> every encoder layer's output [B,n,D], unmasked."""
        P, layers = self.config.patch_size, []
        x = self.embed(patchify(images, P)) + self.positions(images.shape[-2] // P, images.shape[-1] // P)
        for layer in self.encoder:
            x = layer(x)
            layers.append(x)
        return layers

    def encode(self, images):
        """-> features [B,n,D] (Section 5.1: masks and decoder removed, the last layer is probed). The LayerNorm has no
        scale of its own, as pre-training never reads it."""
        return F.layer_norm(self.encode_layers(images)[-1], (self.config.dim,))

    @staticmethod
    def load(path):
        """A checkpoint file -> (model in eval mode on the CPU, its Config). UserError where that cannot be."""
        saved, config = load_checkpoint(path)
        model = RandSAC(config)
        restore(model, saved, path)
        return model.eval(), config


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and runs: a run is a directory with config.json, metrics.jsonl and checkpoint.pt.

def write_whole(path, write):
    """Calls write(file) for a file beside `path` and renames it when it is on disk: whole, or not there at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path} ({error}): free some space or choose another place; what was there "
                        "before is untouched") from error
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path):
    """-> what was saved, and its Config. UserError where the file is damaged, not a checkpoint, or of another version."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself would load a flipped bit without a word
            check(archive.testzip() is None, "its checksums do not match")
        saved = torch.load(path, map_location="cpu", weights_only=True)  # runs no code that the file may hold
        check(isinstance(saved, dict) and {"config", "model"} <= saved.keys(), "it holds no config and model")
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a whole checkpoint of randsac.py ({reason}): name another file") from error
    unknown = saved["config"].keys() - {f.name for f in dataclasses.fields(Config)}
    check(not unknown, f"{path} is of another version, its configuration has {', '.join(sorted(unknown))}")
    return saved, Config(**saved["config"])


def restore(model, state, path):
    """Loads a state dict; UserError lists what does not fit."""
    own = model.state_dict()
    wrong = sorted(k for k in own.keys() | state.keys()
                   if k not in own or k not in state or own[k].shape != state[k].shape)
    check(not wrong, f"{path} does not fit the model that its configuration describes: {', '.join(wrong)}")
    model.load_state_dict(state)


def resumed(flags):
    """Flags of a command with --resume -> Config, saved checkpoint. Refuses flags that would make it another run."""
    check(flags.get("out"), "--resume needs the directory of the run: --out DIR")
    saved, before = load_checkpoint(Path(flags["out"]) / "checkpoint.pt")
    config = Config(**{**saved["config"], **flags})
    free = {"out", "resume", "data_dir", "device", "compile", "save_every", "filled"}
    changed = [name for name, value in vars(config).items() if name not in free and value != getattr(before, name)]
    check(not changed, "--resume goes on with the same run, but other values were given for "
          + ", ".join(f"--{name.replace('_', '-')} (was {getattr(before, name)})" for name in changed))
    return config, saved


def open_run(config, step):
    """Makes the run's directory, locks it, -> its metrics file, cut back to `step`. Sets config.out where it was left out."""
    if not config.out:
        name = "-".join([config.dataset, config.segments, *map(str, config.hierarchy)])
        Path("runs").mkdir(exist_ok=True)
        for number in range(1, 10_000):
            config.out = f"runs/{name}-{number}"
            try:
                os.mkdir(config.out)
                break
            except FileExistsError:
                pass
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    metrics = open(out / "metrics.jsonl", "ab+")
    if fcntl:
        try:
            fcntl.flock(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {out}: choose another --out")
    check(config.resume or not (out / "checkpoint.pt").exists(), f"{out} holds a run: go on with it by --resume, or choose "
          "another --out")
    end = 0
    metrics.seek(0)
    for row in metrics:
        if not row.endswith(b"\n") or json.loads(row)["step"] > step:
            break
        end += len(row)
    metrics.truncate(end)
    settings = json.dumps(dataclasses.asdict(config), indent=1) + "\n"
    write_whole(out / "config.json", lambda file: file.write(settings.encode()))
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# Training (Section 5)

def learning_rate(step, steps, config):
    """Linear warm-up, then half a cosine to zero; the peak is config.lr per 256 images."""
    warm = config.warmup * steps
    share = (step + 1) / (warm + 1) if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))
    return config.lr * config.batch_size / 256 * share


def make_optimizer(model, config):
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name != "skip"]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or name == "skip"]
    return torch.optim.AdamW([dict(params=matrices, weight_decay=config.weight_decay), dict(params=others, weight_decay=0.0)],
                             betas=(0.9, 0.95), fused=True)


def start_processes(config):
    """-> device, number of this process, number of processes (more than one under torchrun)."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    check(name == "cpu" or getattr(torch.backends, name).is_built() and getattr(torch, name).is_available(),
          f"this machine has no {name} device that torch can use: choose --device cpu")
    process, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check(config.batch_size % world == 0, f"batch size {config.batch_size} does not divide over {world} processes")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
    return torch.device(name), process, world


def autocast(device):
    """bfloat16 where a CUDA chip has it, float32 elsewhere (on CPUs bfloat16 products can be hundreds of times slower)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and torch.cuda.is_bf16_supported(False))


@torch.no_grad()
def held_out_loss(model, images, config, device):
    """Mean loss on images never trained on, with the same ranks at every call."""
    total = 0
    for start in range(0, len(images), 500):
        batch = normalize(images[start:start + 500].to(device), config.image_size)
        ranks = sample_ranks(config, len(batch), device, seeded(device, config.seed, 2, start))
        with autocast(device):
            total += model(batch, ranks, trim=segment_sizes(config) is not None).item() * len(batch)
    return total / len(images)


def announce(model, config, steps, images, device, world):
    """Says how long the run will take, from two timed steps of a small batch, before the first real one."""
    x = normalize(images[:config.batch_size if device.type == "cuda" else 32].to(device), config.image_size)
    for _ in range(2):
        start = time.perf_counter()
        with autocast(device):
            loss = model(x, sample_ranks(config, len(x), device), trim=segment_sizes(config) is not None)
        loss.backward()
        loss.item(), model.zero_grad()
        seconds = (time.perf_counter() - start) / len(x) * config.batch_size / world * steps
    duration = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.0f} minutes"
    tqdm.write(f"{steps} steps of {config.batch_size} images on {world} x {device}: about {duration}")
    if device.type == "cpu" and seconds > 3 * 3600:
        tqdm.write("that is long for a CPU: a machine with a GPU, or --model nano --batch-size 128 --epochs 5, or --dataset "
                   "shapes, is within minutes")


def set_up(config, saved, device, process, world):
    """-> training images, held-out images, model, its wrapper for compiling and several processes, optimizer."""
    if process > 0:
        dist.barrier()  # the first process downloads and decodes; the others then find it done
    images, held_out = (load_images(config, split)[0] for split in (True, False))
    if process == 0 and world > 1:
        dist.barrier()
    check(len(images) >= config.batch_size, f"{len(images)} images do not fill a batch of {config.batch_size}: lower "
          "--batch-size")
    held_out = held_out[::max(1, len(held_out) // HELD_OUT)][:HELD_OUT]  # of every class, the same at every call
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        images = images.to(device)
    torch.manual_seed(config.seed)
    model = RandSAC(config).to(device)
    optimizer = make_optimizer(model, config)
    if saved:
        restore(model, saved["model"], config.out)
        optimizer.load_state_dict(saved["optimizer"])
    forward = torch.compile(model) if config.compile else model
    forward = nn.parallel.DistributedDataParallel(forward) if world > 1 else forward
    return images, held_out, model, forward, optimizer


def training_step(forward, optimizer, batch, config, step, steps, process=0):
    """One step on a uint8 batch [B,3,H,W] -> its loss. The host reads no value here, so a GPU never waits for it."""
    generator = seeded(batch.device, config.seed, 1, step, process)
    images = augment(batch, config.image_size, config.crop_scale, generator)
    ranks = sample_ranks(config, len(batch), batch.device, generator)
    with autocast(batch.device):
        loss = forward(images, ranks, trim=segment_sizes(config) is not None)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(forward.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, config)
    optimizer.step()
    return loss.detach()


def train(config, saved, device, process, world):
    """Trains to the end or to the first signal -> exit code. A run is its directory: config.json, checkpoint.pt and
    metrics.jsonl, a row every LOG_EVERY steps and at every save."""
    step = saved["step"] if saved else 0
    metrics = open_run(config, step) if process == 0 else None
    images, held_out, model, forward, optimizer = set_up(config, saved, device, process, world)
    per_epoch = len(images) // config.batch_size
    steps = min(config.epochs * per_epoch, config.max_steps or math.inf)

    def save():
        content = dict(config=dataclasses.asdict(config), step=step, model=model.state_dict(), optimizer=optimizer.state_dict())
        write_whole(Path(config.out, "checkpoint.pt"), lambda file: torch.save(content, file))

    if process == 0:
        announce(model, config, steps - step, images, device, world)
        save()  # before the first step too: --resume always finds the run
    signals, losses, order, start = catch_signals(), [], None, time.perf_counter()
    bar = tqdm(total=steps * config.batch_size, initial=step * config.batch_size, unit="img", disable=process > 0,
               mininterval=0.5 if sys.stderr.isatty() else 30)
    while step < steps and not signals:
        epoch, place = divmod(step, per_epoch)
        if place == 0 or order is None:
            order = torch.randperm(len(images), generator=seeded("cpu", config.seed, 0, epoch)).to(images.device)
        index = order[place * config.batch_size:(place + 1) * config.batch_size][process::world]
        losses.append(training_step(forward, optimizer, images[index].to(device), config, step, steps, process))
        step += 1
        bar.update(config.batch_size)
        epoch_ends = place + 1 == per_epoch or step == steps
        saves = epoch_ends or config.save_every and step % config.save_every == 0 or signals
        if not saves and step % LOG_EVERY:
            continue
        row = dict(step=step, epoch=epoch + 1, loss=torch.stack(losses).mean().item(), lr=optimizer.param_groups[0]["lr"],
                   images_per_s=round(len(losses) * config.batch_size / (time.perf_counter() - start), 1))
        check(math.isfinite(row["loss"]), f"the loss is {row['loss']} at step {step}: try a lower --lr; "
              f"{config.out}/checkpoint.pt is from before")
        if process == 0:
            if epoch_ends and len(held_out):
                row["held_out_loss"] = held_out_loss(model, held_out, config, device)
            metrics.write(json.dumps(row).encode() + b"\n")
            metrics.flush()
            bar.set_postfix(epoch=f"{epoch + 1}/{config.epochs}", loss=f"{row['loss']:.4f}")
            if saves:
                save()
        losses, start = [], time.perf_counter()
    bar.close()
    if signals:
        tqdm.write(f"stopped after step {step}: python randsac.py --out {config.out} --resume   goes on")
        return 128 + signals[0]
    if process == 0:
        print(f"done: {config.out}  next:\n  python probe.py {config.out}/checkpoint.pt\n"
              f"  python visualize.py all --checkpoint {config.out}/checkpoint.pt")
    return 0


def catch_signals():
    """-> a list that is empty until Ctrl-C or SIGTERM; a second signal ends the program at once."""
    signals = []

    def note(number, _):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return signals


def main(argv):
    flags = vars(make_parser(__doc__).parse_args(argv))
    config, saved = resumed(flags) if flags.get("resume") else (Config(**flags), None)
    device, process, world = start_processes(config)
    return train(config, saved, device, process, world)


if __name__ == "__main__":
    run_command(main)
