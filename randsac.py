"""RandSAC in one file: Self-supervision through Random Segments with Autoregressive Coding
(Hua, Tian, Ren, Raptis, Zhao, Sigal; ICLR 2023; arXiv 2203.12054). Read it beside the paper.

One integer per token, its *rank*, carries the whole method: it says at which step the token is
predicted. Tokens of one rank form a segment: they are predicted together, from all tokens of
lower rank. Rank 0 is given and never predicted. The strategies of the paper differ only in how
they fill in the ranks, and its three attention masks are three comparisons of ranks.

    images --augment--> images --patchify--> tokens [B,N,P*P*3]
    strategy --sample_ranks--> ranks [B,N]
    (tokens, ranks) --> encoder -- H1..HL --> skips -- Z1..ZM --> decoder --> tokens of rank >= 1

    python randsac.py                                   # drawn shapes: minutes on a laptop
    python randsac.py --dataset cifar10                 # the real job, for one GPU
    python randsac.py --segments blob --hierarchy 11 5  # the paper's other strategy
    python randsac.py --dataset folder --data-dir DIR   # your own images
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import io
import itertools
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
import zipfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import maximum, minimum, nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows, where training is for WSL
    fcntl = None


class UserError(ValueError):
    """What the user can mend. Its line says what is wrong and how; the command exits with 2."""


def check(holds, message):
    if not holds:
        raise UserError(message)


# ------------------------------------------------------------------------------------------------
# 1. Tokens (Section 3.1)


def patchify(images, patch_size):
    """images [B,C,H,W] -> tokens [B,N,P*P*C], N = HW/P^2, in raster order. A token is [P,P,C]: its
    pixels row by row, a pixel's channels together. UserError where P does not divide H and W."""
    B, C, H, W = images.shape
    P = patch_size
    check(H % P == 0 and W % P == 0, f"--patch-size {P} does not divide {H} x {W} pixels")
    x = images.reshape(B, C, H // P, P, W // P, P)
    x = x.permute(0, 2, 4, 3, 5, 1)  # [B,H/P,W/P,P,P,C]
    return x.reshape(B, -1, P * P * C)  # [B,N,P*P*C]


def unpatchify(tokens, patch_size):
    """tokens [B,N,P*P*C] of square images -> images [B,C,H,H]: undoes patchify."""
    B, N, D = tokens.shape
    P = patch_size
    grid = math.isqrt(N)
    x = tokens.reshape(B, grid, grid, P, P, D // P**2)
    x = x.permute(0, 5, 1, 3, 2, 4)  # [B,C,grid,P,grid,P]
    return x.reshape(B, -1, grid * P, grid * P)  # [B,C,H,H]


# ------------------------------------------------------------------------------------------------
# 2. Segments (Section 3.2): which tokens belong together. A *level* holds an id for each token, a
# whole number below N; tokens with the same id belong together. Not every id has to be used.


def square_segments(grid, count):
    """-> ids int64 [N] in raster order: grid x grid tokens cut in `count` squares of M x M tokens,
    count = HW/(PM)^2 (Table 3). Tokens of one square share an id, any of 0..N-1."""
    M = grid // math.isqrt(count)
    square = torch.arange(grid) // M  # [grid]: which square a row or a column lies in
    ids = square[:, None] * (grid // M) + square  # [grid,grid]
    return ids.flatten()


def nearest_gaussian(points, mean, deviation, angle):
    """points [B,n,2] (x, y); K Gaussians: means [B,K,2], angles [B,K] of their axes (radians, from
    x towards y), deviations [B,K,2] along these axes -> ids int64 [B,n]: the Gaussian that is
    nearest to each point by Mahalanobis distance. What one wins is a segment of Figure 2 (f)."""
    offset = points[:, :, None] - mean[:, None]  # [B,n,K,2]
    x, y = offset.unbind(-1)  # [B,n,K] each

    # How far a point is off along the first axis of a Gaussian and along the second.
    cos = angle[:, None].cos()
    sin = angle[:, None].sin()
    along = x * cos + y * sin
    across = y * cos - x * sin

    # The Mahalanobis distance counts both in deviations.
    in_deviations = torch.stack([along, across], -1) / deviation[:, None]  # [B,n,K,2]
    return in_deviations.square().sum(-1).argmin(-1)


def blob_segments(points, count, generator=None):
    """points [B,n,2] in the unit square -> ids [B,n], means [B,count,2]: the nearest of `count`
    random Gaussians. One that is nearest to no point is simply not there.

    The range of the deviations is open in the paper. A common factor would change nothing: only
    their ratio, here up to 3, shapes the blobs. That their axes are turned is our choice too."""
    drawn = torch.rand(len(points), count, 5, generator=generator, device=points.device)
    mean = drawn[..., 0:2]
    deviation = 0.1 + 0.2 * drawn[..., 2:4]
    angle = math.pi * drawn[..., 4]
    return nearest_gaussian(points, mean, deviation, angle), mean


def permutations(batch, n, device="cpu", generator=None):
    """-> int64 [B,n]: a random order of 0..n-1 for each sample."""
    return torch.rand(batch, n, generator=generator, device=device).argsort(1)


def sample_levels(config, batch, device="cpu", generator=None):
    """-> levels [B,N] from fine to coarse, of every strategy but mae: the segments, then the
    partitions that group them (Section 3.3), and so on."""
    # Squares are the same in every sample. A patch is a square of one token.
    if config.segments in ("patch", "square"):
        counts = config.hierarchy
        if config.segments == "patch":
            counts = (config.tokens,)
        with torch.device(device):  # made there, as a copy would make the host wait
            squares = [square_segments(config.grid, count) for count in counts]
        return [ids.expand(batch, -1) for ids in squares]

    # The finest blobs group tokens, by the tokens' centres.
    centre = (torch.arange(config.grid, device=device) + 0.5) / config.grid
    points = torch.cartesian_prod(centre, centre).flip(-1)  # [N,2]: y and x, turned to x and y
    points = points.expand(batch, -1, -1)  # [B,N,2]
    ids, means = blob_segments(points, config.hierarchy[0], generator)
    levels = [ids]

    # Coarser blobs group the blobs below, by their means (our choice), so that partitions nest.
    for count in config.hierarchy[1:]:
        partition_of_blob, means = blob_segments(means, count, generator)  # [B,K], [B,count,2]
        levels.append(partition_of_blob.gather(1, levels[-1]))

    # Table 5's incoherent control ("Shuffle"): segments as large as blobs, their tokens anywhere.
    if config.segments == "scatter":
        places = permutations(batch, config.tokens, device, generator)
        levels = [ids.gather(1, places) for ids in levels]
    return levels


# ------------------------------------------------------------------------------------------------
# 3. Serialization (Sections 3.1, 3.3): when each segment is predicted


def dense(values):
    """values [B,N] -> [B,N]: each row's values replaced by 0..K-1, in the same order."""
    ordered, index = values.sort(1)
    # In sorted order, count one up wherever a new value begins; then put every count back.
    begins = ordered.diff(dim=1, prepend=ordered[:, :1]) != 0
    return torch.empty_like(values).scatter(1, index, begins.cumsum(1))


def serialize(levels, order="random", generator=None):
    """levels, a list of [B,N] from fine to coarse -> ranks [B,N], 0..K-1 for the K finest segments
    of a sample: visits the coarsest partitions in random order (each sample its own, all equally
    likely, drawn from `generator`) or raster order (that of their first tokens), and finishes each,
    by the same rule, before the next (Figure 3)."""
    B, N = levels[0].shape
    device = levels[0].device
    ranks = torch.zeros_like(levels[0])
    for ids in reversed(levels):
        # When each id comes: a number below N, another for each.
        if order == "random":
            place = permutations(B, N, device, generator)
        else:  # that of the first token with this id
            token = torch.arange(N, device=device).expand(B, N)
            place = torch.full_like(ids, N).scatter_reduce(1, ids, token, "amin")

        # Sort first by the partition's rank, which this level may not change, then by place in it.
        ranks = dense(ranks * N + place.gather(1, ids))
    return ranks


def segment_sizes(config):
    """-> how many tokens each rank has, where that never varies (patch, square, mae), else None."""
    N = config.tokens
    if config.segments == "mae":
        given = max(1, N // 4)  # MAE hides 75 %
        sizes = [given, N - given]
    elif config.segments == "patch":
        sizes = [1] * N
    elif config.segments == "square":
        count = config.hierarchy[0]
        sizes = [N // count] * count
    else:
        return None

    K = config.last_rank
    if K:
        sizes = sizes[:K] + [sum(sizes[K:])]
    return sizes


def sample_ranks(config, batch, device="cpu", generator=None):
    """-> ranks int64 [B,N] in raster order, 0..K-1: the step at which each token is predicted."""
    # MAE's order as a baseline (Tables 7 and 8): a random quarter is given, the rest one segment.
    # He et al.'s decoder is another: one self-attention over given and hidden tokens, no skips.
    if config.segments == "mae":
        given = segment_sizes(config)[0]
        place = permutations(batch, config.tokens, device, generator)
        return (place >= given).long()

    levels = sample_levels(config, batch, device, generator)
    ranks = serialize(levels, config.order, generator)

    # Our own addition: what would come after the last rank is predicted with it, in one step.
    if config.last_rank:
        ranks = ranks.clamp(max=config.last_rank)
    return ranks


# ------------------------------------------------------------------------------------------------
# 4. Masked transformer (Section 4.1, Figure 4) with trainable skip connections (Section 4.2)


def attention_masks(ranks):
    """ranks [...,N] -> source, target, memory mask, bool [...,N,N] each (Figure 4). True: row i may
    attend to column j. Source: the segment of j is that of i or an earlier one. Target: the same,
    and j has a rank >= 1. Memory: the segment of j is an earlier one."""
    i = ranks[..., :, None]
    j = ranks[..., None, :]
    source = i >= j
    target = (i >= j) & (j >= 1)
    memory = i > j
    return source, target, memory


def positions(rows, cols, dim, device=None):
    """-> [rows*cols,dim]: fixed sine-cosine code of each token's row and column. The paper leaves
    open whether positions have one dimension or, as here, two."""
    frequency = 10_000 ** -(torch.arange(dim // 4, device=device) * 4 / dim)  # [dim/4]
    row = torch.arange(rows, device=device)
    col = torch.arange(cols, device=device)
    place = torch.cartesian_prod(row, col)  # [rows*cols,2]
    angle = (place[..., None] * frequency).flatten(1)  # [rows*cols,dim/2]
    return torch.cat([angle.sin(), angle.cos()], 1)


def take(x, index):
    """x [B,N,D], index [B,n] -> [B,n,D]: the tokens of each sample that its index names."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Attention(nn.Module):
    """Multi-head attention of x [B,n,D] to memory [B,m,D] where the mask [1 or B,1,n,m] is True."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def split(self, x, memory):
        """-> query [B,h,n,d], key [B,h,m,d], value [B,h,m,d] of all h heads, d = D/h."""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,h,n,d]
        kv = self.key_value(memory).unflatten(-1, (2, self.heads, -1))  # [B,m,2,h,d]
        k, v = kv.permute(2, 0, 3, 1, 4)  # [B,h,m,d] each
        return q, k, v

    def forward(self, x, memory, mask=None):
        q, k, v = self.split(x, memory)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B,h,n,d]
        return self.out(y.transpose(1, 2).flatten(2))  # [B,n,D]


def mlp(dim):
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class EncoderLayer(nn.Module):
    """Self-attention, then an MLP. That a LayerNorm stands before each, and GELU, is our choice."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = mlp(dim)

    def forward(self, x, source_mask=None):
        y = self.norm_attention(x)
        x = x + self.attention(y, y, source_mask)
        return x + self.mlp(self.norm_mlp(x))


class DecoderLayer(nn.Module):
    """Self-attention over the tokens asked for, cross-attention to the encoder's memory, an MLP."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm_self = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, heads)
        self.norm_cross = nn.LayerNorm(dim)
        self.norm_memory = nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = mlp(dim)

    def forward(self, x, memory, target_mask, memory_mask):
        # The tokens of a segment coordinate.
        y = self.norm_self(x)
        x = x + self.self_attention(y, y, target_mask)

        # They read what is known: the segments before theirs.
        y = self.norm_cross(x)
        x = x + self.cross_attention(y, self.norm_memory(memory), memory_mask)
        return x + self.mlp(self.norm_mlp(x))


class RandSAC(nn.Module):
    """The encoder-decoder of Figure 4. Its input are images float [B,3,H,W] in [-1, 1] and ranks
    int64 [B,N]."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dim = config.dim
        pixels = 3 * config.patch_size**2
        self.embed = nn.Linear(pixels, dim)
        heads = config.heads
        self.encoder = nn.ModuleList(EncoderLayer(dim, heads) for _ in range(config.depth))
        self.decoder = nn.ModuleList(DecoderLayer(dim, heads) for _ in range(config.decoder_depth))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, pixels))

        # Xavier's initialization is our choice.
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

        # W of Section 4.2, with rows l and columns k as in the formula. Its start is open in the
        # paper: here every decoder layer begins by reading the last encoder layer alone.
        if config.skip:
            W = torch.zeros(config.decoder_depth, config.depth)
            W[:, -1] = 1
            self.skip = nn.Parameter(W)

    def forward(self, images, ranks, trim=False):
        """-> the loss of all tokens of rank >= 1. trim: by the cheaper decode_trimmed."""
        tokens = patchify(images, self.config.patch_size)  # [B,N,PPC]
        target = self.target(tokens)  # [B,N,PPC]
        if trim:
            prediction, predicted = self.decode_trimmed(tokens, ranks)  # [B,n,PPC], [B,n]
            target = take(target, predicted)
            ranks = ranks.gather(1, predicted)
        else:
            prediction = self.decode(tokens, ranks)  # [B,N,PPC]
        return token_loss(prediction, target, ranks)

    def decode(self, tokens, ranks):
        """tokens [B,N,PPC], ranks [B,N] -> predictions [B,N,PPC] of all tokens, in raster order,
        right for any ranks. Figure 4, line by line. The ends, which Section 4.1 leaves out, are
        there but change nothing; what is said of tokens of rank 0 means nothing."""
        source_mask, target_mask, memory_mask = attention_masks(ranks[:, None])  # [B,1,N,N] each

        # A given token is never predicted, so it has nobody to look at; yet some attention kernels
        # return NaN for such a row. It may look at all: nobody reads what it finds.
        given = (ranks == 0)[:, None, :, None]  # [B,1,N,1]
        target_mask = target_mask | given
        memory_mask = memory_mask | given

        # The encoder sees pixels and positions. A token reads its own and earlier segments.
        grid = self.config.grid
        position = positions(grid, grid, self.config.dim, tokens.device).to(tokens.dtype)  # [N,D]
        layers = self.run_encoder(self.embed(tokens) + position, source_mask)

        # The decoder is given positions and no pixels: where, not what.
        y = position.expand(len(tokens), -1, -1)  # [B,N,D]
        for layer, Z in zip(self.decoder, self.mix_skips(layers)):
            y = layer(y, Z, target_mask, memory_mask)
        return self.head(y)

    def decode_trimmed(self, tokens, ranks):
        """The same predictions at less cost, where segment sizes never vary -> predictions
        [B,n,PPC] of the tokens of rank >= 1, and which tokens these are [B,n].

        Section 4.1 leaves out the last segment in the encoder, as nothing comes after it, and the
        first in the decoder, as nothing comes before it. With tokens sorted by rank these are the
        two ends, and one mask serves the whole batch."""
        sizes = segment_sizes(self.config)
        check(sizes, f"{self.config.segments} segments vary in size: they cannot be trimmed")
        given = sizes[0]  # tokens of rank 0
        known = sum(sizes[:-1])  # tokens before the last segment

        # Sorted by rank, all samples are alike.
        order = ranks.argsort(1)  # [B,N]
        sorted_ranks = ranks[:1].sort(1).values  # [1,N]
        masks = attention_masks(sorted_ranks[:, None])
        source_mask, target_mask, memory_mask = masks  # [1,1,N,N] each
        encoded = order[:, :known]  # [B,known]
        predicted = order[:, given:]  # [B,n]

        # As in decode, for the tokens that are left.
        grid = self.config.grid
        position = positions(grid, grid, self.config.dim, tokens.device).to(tokens.dtype)  # [N,D]
        x = self.embed(take(tokens, encoded)) + position[encoded]  # [B,known,D]
        layers = self.run_encoder(x, source_mask[..., :known, :known])
        target_mask = target_mask[..., given:, given:]  # [1,1,n,n]
        memory_mask = memory_mask[..., given:, :known]  # [1,1,n,known]
        y = position[predicted]  # [B,n,D]
        for layer, Z in zip(self.decoder, self.mix_skips(layers)):
            y = layer(y, Z, target_mask, memory_mask)
        return self.head(y), predicted

    def run_encoder(self, x, source_mask=None):
        """x [B,n,D] -> the outputs H^1..H^L of all encoder layers, a list of [B,n,D]."""
        layers = []
        for layer in self.encoder:
            x = layer(x, source_mask)
            layers.append(x)
        return layers

    def mix_skips(self, layers):
        """H^1..H^L, a list of [B,n,D] -> a memory [B,n,D] for each decoder layer l (Section 4.2):
        Z^l = sum over k of W[l,k] H^k, where W is self.skip. With --no-skip there is no W, and each
        decoder layer reads H^L."""
        if not self.config.skip:
            return [layers[-1]] * len(self.decoder)
        H = torch.stack(layers)  # [L,B,n,D]
        Z = torch.einsum("lk,kbnd->lbnd", self.skip, H)  # [decoder layers,B,n,D]
        return Z.unbind()

    def target(self, tokens):
        """tokens [B,N,PPC] -> what is to be predicted of each (Section 5)."""
        if self.config.target == "normalized":
            return normalize_patches(tokens)
        return tokens

    def predict(self, images, ranks):
        """-> predictions [B,N,PPC] in raster order and the target's units, NaN where the rank is 0.
        Teacher-forced: a segment is predicted from the true pixels of those before it."""
        tokens = patchify(images, self.config.patch_size)
        prediction = self.decode(tokens, ranks)
        return prediction.masked_fill((ranks == 0)[..., None], torch.nan)

    def encode_layers(self, images):
        """images [B,3,H,W] of any size that P divides -> the outputs of all encoder layers, a list
        of [B,n,D]. For probing masks and decoder are thrown away (Sections 4.1, 5.1)."""
        P = self.config.patch_size
        rows = images.shape[2] // P
        cols = images.shape[3] // P
        tokens = patchify(images, P).to(self.embed.weight.dtype)  # [B,n,PPC]
        position = positions(rows, cols, self.config.dim, images.device).to(tokens.dtype)  # [n,D]
        return self.run_encoder(self.embed(tokens) + position)

    def encode(self, images):
        """images [B,3,H,W] -> features [B,n,D] of the last layer. The LayerNorm has no scale:
        pre-training, whose loss does not pass it, would leave one untrained."""
        return F.layer_norm(self.encode_layers(images)[-1], (self.config.dim,))


# ------------------------------------------------------------------------------------------------
# 5. Target (Sections 3.1, 5) and loss. Section 3.1 speaks of plain pixels, Section 5 of pixels
# normalized per patch; which of the two Tables 1 to 6 used is open.


def normalize_patches(tokens):
    """Each token [...,P*P*C] less its mean, over sqrt(its unbiased variance + 1e-6), as in MAE."""
    mean = tokens.mean(-1, keepdim=True)
    variance = tokens.var(-1, keepdim=True)
    return (tokens - mean) / (variance + 1e-6).sqrt()


def token_loss(prediction, target, ranks):
    """prediction, target [B,n,P*P*C], ranks [B,n] -> loss: squared error, mean over a token's
    values, then over a sample's predicted tokens (rank >= 1), then over the batch. A sample with
    none of these counts zero."""
    error = (prediction - target).square().mean(-1)  # [B,n]
    scored = (ranks >= 1).float()  # [B,n]
    loss = (error * scored).sum(1) / scored.sum(1).clamp(min=1)  # [B]
    return loss.mean()


# ------------------------------------------------------------------------------------------------
# 6. Configuration. The paper leaves the sizes of its CIFAR model, the optimizer and the learning
# rate to a supplement: these are our choices.

# What --model fills in where nothing else is said; nano's small batch suits short runs on a CPU.
MODELS = {
    "nano": {
        "dim": 128,
        "depth": 6,
        "heads": 4,
        "decoder_depth": 1,
        "lr": 5.6e-3,
        "batch_size": 32,
    },
    "tiny": {"dim": 192, "depth": 12, "heads": 3, "decoder_depth": 4, "lr": 1e-3},
    "small": {"dim": 384, "depth": 12, "heads": 6, "decoder_depth": 4, "lr": 5e-4},
    "base": {"dim": 768, "depth": 12, "heads": 12, "decoder_depth": 8, "lr": 1.5e-4},
}
# What --dataset fills in: shapes for a laptop, the others for one GPU.
DATASETS = {
    "shapes": {"model": "nano", "epochs": 3, "batch_size": 128, "data_dir": ""},
    "cifar10": {"model": "small", "epochs": 400, "batch_size": 512, "data_dir": "data"},
    "cifar100": {"model": "small", "epochs": 400, "batch_size": 512, "data_dir": "data"},
    "folder": {"model": "small", "epochs": 100, "batch_size": 256, "data_dir": "data"},
}
# What --segments fills in: the hierarchies of Tables 5 and 7.
HIERARCHIES = {"patch": (), "square": (16, 4), "blob": (11, 5), "scatter": (9,), "mae": ()}


def flag(default, help, choices=(), low=0):
    metadata = {"help": help, "choices": tuple(choices), "low": low}
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(field_name):
    return "--" + field_name.replace("_", "-")


@dataclasses.dataclass
class Config:
    """All settings of a run, each a flag of the command line. Building one fills in what was left
    out (None) and raises UserError, a ValueError, where a setting is wrong."""

    dataset: str = flag("shapes", "what to train on", DATASETS)
    data_dir: str = flag(None, "where images are or go: folder takes train/CLASS/ and test/CLASS/")
    image_size: int = flag(32, "side of an image in pixels", low=1)
    patch_size: int = flag(4, "side P of a patch (token) in pixels; 1: as iGPT", low=1)
    segments: str = flag("square", "how tokens form segments (Section 3.2)", HIERARCHIES)
    hierarchy: tuple = flag(None, "how many segments, partitions, ... (Section 3.3), as 16 4")
    order: str = flag("random", "new each time, or row by row", ("random", "raster"))
    last_rank: int = flag(0, "predict all later segments with this one; 0: none (the paper)")
    model: str = flag(None, "size of the model: fills in the flags from dim to lr", MODELS)
    dim: int = flag(None, "width of encoder and decoder", low=1)
    depth: int = flag(None, "encoder layers", low=1)
    heads: int = flag(None, "attention heads", low=1)
    decoder_depth: int = flag(None, "decoder layers", low=1)
    lr: float = flag(None, "peak learning rate for each 256 images of the batch")
    skip: bool = flag(True, "trainable skip connections (Section 4.2; Tables 1 to 6: none)")
    target: str = flag(None, "what is predicted (Section 5)", ("normalized", "pixels"))
    crop_scale: float = flag(0.3, "smallest share of the image that a random crop keeps, about")
    epochs: int = flag(None, "passes over the training images (Table 7: 1600)", low=1)
    max_steps: int = flag(0, "stop after this many steps; 0: after the last epoch")
    batch_size: int = flag(None, "images in a step, over all processes", low=1)
    weight_decay: float = flag(0.05, "weight decay of matrices")
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises")
    seed: int = flag(0, "seed of everything random")
    device: str = flag("auto", "where to compute", ("auto", "cpu", "cuda", "mps"))
    precision: str = flag("auto", "of products", ("auto", "float32", "bfloat16", "float16"))
    compile: bool = flag(False, "compile the model: a slow start, then faster steps")
    out: str = flag("", "directory of the run (default: a fresh one in runs/)")
    init: str = flag("", "checkpoint of a trained model whose weights to start from")
    save_every: int = flag(0, "save every so many steps, besides every epoch")

    def __post_init__(self):
        # Fill in what was left out. What is given wins, then --model, then --dataset.
        dataset = DATASETS.get(self.dataset, {})
        if self.model is None:
            self.model = dataset.get("model")
        defaults = dataset | MODELS.get(self.model, {})
        defaults["hierarchy"] = HIERARCHIES.get(self.segments)
        # A token of one pixel, less its own mean, would be nothing.
        defaults["target"] = "pixels" if self.patch_size == 1 else "normalized"
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if isinstance(self.hierarchy, list):  # from the command line
            self.hierarchy = tuple(self.hierarchy)

        # Check each setting alone.
        for field in dataclasses.fields(self):
            name = flag_name(field.name)
            value = getattr(self, field.name)
            choices = field.metadata["choices"]
            kinds = (int, float) if field.type is float else (field.type,)
            check(type(value) in kinds, f"{name} is {value!r} but must be {field.type.__name__}")
            check(not choices or value in choices, f"{name} {value} is not one of {choices}")
            if int in kinds:
                low = field.metadata["low"]
                check(low <= value <= 1e9, f"{name} is {value} but must be from {low} to 1e9")
        for name in ("data_dir", "out", "init"):  # ~ is left to us in --out=~/run
            setattr(self, name, os.path.expanduser(getattr(self, name)))
        check(self.lr > 0, "--lr must be above 0")
        check(0 < self.crop_scale <= 1, "--crop-scale must be above 0, at most 1")
        check(self.warmup < 1, "--warmup must be below 1")

        # Check what must fit together.
        N = self.tokens
        S, P = self.image_size, self.patch_size
        drawn = self.dataset == "shapes"
        check(not (drawn and self.data_dir), "--data-dir: shapes are drawn, not read; leave it out")
        check(S % P == 0, f"--patch-size {P} does not divide --image-size {S}: choose another")
        check(N > 1, "one patch is the whole image: choose a smaller --patch-size")
        check(self.dim % 4 == 0, f"--dim {self.dim} must be a multiple of 4, for the positions")
        check(self.dim % self.heads == 0, f"--heads {self.heads} does not divide --dim {self.dim}")
        self.check_order()

    def check_order(self):
        counts = self.hierarchy
        segments = counts[0] if counts else self.tokens
        if self.segments == "mae":
            segments = 2
            check(self.order == "random", "--order: mae has only a random one; leave it out")
        if HIERARCHIES[self.segments]:
            whole = counts and all(type(count) is int and count > 1 for count in counts)
            check(whole, f"--hierarchy {counts} must be whole numbers from 2, such as 16 4")
            falls = all(a > b for a, b in itertools.pairwise([self.tokens + 1, *counts]))
            check(falls, f"--hierarchy {counts} must descend from at most {self.tokens} tokens")
        else:
            check(not counts, f"--segments {self.segments} takes no --hierarchy: leave it out")
        if self.segments == "square":
            squares = [root**2 for root in range(2, self.grid + 1) if self.grid % root == 0]
            nested = all(a % b == 0 for a, b in itertools.pairwise(counts))
            fits = nested and all(count in squares for count in counts)
            message = f"--hierarchy {counts} cuts no squares within squares: choose of {squares}"
            check(fits, f"{message}, each dividing the one before")
        acts = self.last_rank < max(segments - 1, 1)
        check(acts, f"--last-rank {self.last_rank} changes nothing in {segments} segments")

    @property
    def grid(self):
        """Tokens along a side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self):
        """N, the number of tokens."""
        return self.grid**2


# ------------------------------------------------------------------------------------------------
# 7. Data: one uint8 array of images


def load_images(config, train):
    """-> images uint8 [n,3,H,W], labels int64 [n], names of the classes. n is 0 where a folder has
    no test images. UserError where images are missing, broken or cannot be downloaded."""
    if config.dataset == "shapes":
        count = 20_000 if train else 4_000
        return draw_shapes(count, config.image_size, seed=int(train))
    if config.dataset == "folder":
        return load_folder(Path(config.data_dir), config.image_size, train)

    cifar = getattr(torchvision.datasets, config.dataset.upper())
    try:
        data = cifar(config.data_dir, train, download=True)
    except Exception as error:  # whatever the network did; torchvision checks the archive's sum
        mend = f"put {cifar.filename} in {config.data_dir}/ yourself, or use --dataset shapes"
        raise UserError(f"{cifar.url} cannot be had ({error}): {mend}") from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # [n,3,32,32]
    return images, torch.tensor(data.targets), data.classes


# Ten forms: (u, v) in units of the form's radius -> below zero inside.
FORMS = {
    "disc": lambda u, v: u.hypot(v) - 0.85,
    "ring": lambda u, v: (u.hypot(v) - 0.7).abs() - 0.2,
    "half disc": lambda u, v: maximum(u.hypot(v) - 1, v - 0.1),
    "crescent": lambda u, v: maximum(u.hypot(v) - 0.95, 0.75 - (u - 0.45).hypot(v)),
    "triangle": lambda u, v: maximum(v.abs() * 0.87 + u * 0.5, -u) - 0.5,
    "square": lambda u, v: maximum(u.abs(), v.abs()) - 0.72,
    "cross": lambda u, v: maximum(
        maximum(u.abs(), v.abs()) - 0.95, minimum(u.abs(), v.abs()) - 0.28
    ),
    "star": lambda u, v: u.hypot(v) - 0.65 - 0.33 * torch.cos(5 * torch.atan2(v, u)),
    "bars": lambda u, v: maximum(u.abs() - 0.85, (v.abs() - 0.5).abs() - 0.22),
    "corner": lambda u, v: maximum(maximum(u.abs(), v.abs()) - 0.8, minimum(u, v) + 0.2),
}


def draw_shapes(count, size, seed):
    """-> as load_images, `count` images of the ten forms. Colours, place, size, angle, texture and
    background vary and say nothing of the class."""
    labels = torch.arange(count) % len(FORMS)
    parts = []
    for start in range(0, count, 2000):  # in parts, for memory
        parts.append(draw_part(labels[start : start + 2000], size, seeded("cpu", seed, start)))
    return torch.cat(parts), labels, list(FORMS)


def draw_part(labels, size, generator):
    """labels [B] -> images uint8 [B,3,size,size]."""
    side = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(side, side, indexing="ij")  # [size,size] each

    def uniform(low, high, channels=1):  # [B,channels,1,1]
        drawn = torch.rand(len(labels), channels, 1, 1, generator=generator)
        return low + (high - low) * drawn

    def texture():  # [B,1,size,size]: a wave of random direction, length and strength, often none
        angle = uniform(0, 2 * math.pi)
        strength = uniform(-0.2, 0.2).clamp(min=0)
        along = x * angle.cos() + y * angle.sin()
        return strength * torch.sin(uniform(1, 12) * along + uniform(0, 6.3))

    # Where each pixel lies as the form sees it: moved, turned, in units of its radius.
    angle = uniform(-0.5, 0.5)
    radius = uniform(0.5, 0.75)
    dx = (x - uniform(-0.25, 0.25)) / radius
    dy = (y - uniform(-0.25, 0.25)) / radius
    u = dx * angle.cos() + dy * angle.sin()  # [B,1,size,size]
    v = dy * angle.cos() - dx * angle.sin()

    # Inside or outside? The edge is one pixel soft.
    depth = torch.empty_like(u)
    for label, form in enumerate(FORMS.values()):
        chosen = labels == label
        depth[chosen] = form(u[chosen], v[chosen])
    cover = (0.5 - depth * radius * size / 2).clamp(0, 1)

    # Another colour inside, in every channel, and none that is typical of a class.
    back = uniform(0, 1, 3)
    front = (back + uniform(0.25, 0.75, 3)) % 1
    noise = 0.02 * torch.randn(len(labels), 3, size, size, generator=generator)
    image = torch.lerp(back + texture(), front + texture(), cover) + noise
    return (image.clamp(0, 1) * 255).round().byte()


def is_visible(name):
    """Whether a name is the user's: entries like .git, @eaDir and __MACOSX are a system's."""
    return not name.startswith((".", "@", "__", "$RECYCLE", "lost+found", "randsac-cache"))


def is_image(name):
    return is_visible(name) and name.lower().endswith(torchvision.datasets.folder.IMG_EXTENSIONS)


def list_folder(root):
    """-> names of the classes, (path, label) of the training images, of the held-out ones, and the
    files left out. UserError where root is not as wanted."""
    wanted = "wanted are train/CLASS/ and test/CLASS/ or val/CLASS/, with all images in a CLASS"
    check(root.is_dir(), f"{root} is not a folder: name one by --data-dir; {wanted}")

    def folders(place):
        lost = [f.name for f in place.iterdir() if not f.exists()]
        check(not lost, f"{place} has links that lead nowhere: {lost[:9]}")
        loose = [f.name for f in place.iterdir() if f.is_file() and is_image(f.name)]
        check(not loose, f"{place} has images that are in no class, such as {loose[:1]}; {wanted}")
        return sorted(f.name for f in place.iterdir() if f.is_dir() and is_visible(f.name))

    splits = folders(root)
    known = splits in (["train"], ["test", "train"], ["train", "val"])
    check(known, f"{root} has the folders {splits[:9]}; {wanted}")
    classes = folders(root / "train")
    training = []
    held_out = []
    left_out = []
    for split in splits:
        unknown = set(folders(root / split)) - set(classes)
        check(not unknown, f"{root / split} has classes that train/ has not: {sorted(unknown)[:9]}")
        for label, name in enumerate(classes):
            for place, inner, files in os.walk(root / split / name):
                inner[:] = filter(is_visible, inner)
                links = [f"{place}/{f}" for f in inner if Path(place, f).is_symlink()]
                check(not links, f"links to folders in a class may lead in circles: {links[:9]}")
                found = training if split == "train" else held_out
                found += [(Path(place, file), label) for file in files if is_image(file)]
                left_out += [file for file in files if not is_image(file)]
    there = {label for _, label in training}
    empty = [name for label, name in enumerate(classes) if label not in there]
    full = training and not empty
    check(full, f"{root / 'train'} has no images of {empty or 'any class'}; {wanted}")
    return classes, sorted(training), sorted(held_out), left_out


def load_folder(root, size, train):
    """-> as load_images. Decodes all images once; later runs map them from disk."""
    classes, training, held_out, left_out = list_folder(root)
    if train:
        endings = " ".join(sorted({Path(file).suffix for file in left_out})[:9])
        found = f"{len(training)} images of {len(classes)} classes, {len(held_out)} held out"
        print(f"{root}: {found}, {len(left_out)} files left out {endings}")
    chosen = training if train else held_out
    files = [path for path, _ in chosen]
    labels = torch.tensor([label for _, label in chosen], dtype=torch.int64)
    shape = (len(files), 3, size, size)
    if not files:
        return torch.empty(shape, dtype=torch.uint8), labels, classes

    # The decoded images lie beside the folder. Their name tells what they were made of.
    known = []
    for file in files:
        stat = file.exists() and (file.stat().st_size, file.stat().st_mtime_ns)
        known.append((str(file.relative_to(root)), stat))
    key = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
    place = Path(f"{root.resolve()}.cache")
    if not os.access(place.parent, os.W_OK):
        print(f"{place.parent} is read-only: decoded images go to runs/cache")
        where = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]
        place = Path("runs/cache", f"{root.resolve().name}-{where}")
    place.mkdir(parents=True, exist_ok=True)
    kind = f"{'train' if train else 'test'}-{size}"
    cache = place / f"{kind}-{key}.npy"
    images = map_images(cache, shape)
    if images is None:
        with open(place / "lock", "w") as lock:
            own(lock, f"another process decodes {root}: this one waits for it", wait=True)
            images = map_images(cache, shape)  # what that process has decoded
            if images is None:
                for old in place.glob(f"{kind}-*"):
                    old.unlink()
                write_whole(cache, lambda file: decode_all(files, size, file))
                images = torch.from_numpy(np.load(cache, mmap_mode="c"))
    return images, labels, classes


def map_images(path, shape):
    """-> decoded images uint8, mapped from disk; None where they are missing or damaged."""
    with contextlib.suppress(Exception):  # of many kinds
        images = np.load(path, mmap_mode="c")
        if images.shape == shape and images.dtype == np.uint8:
            return torch.from_numpy(images)


def decode_all(paths, size, file):
    """Writes the images to an open .npy file. UserError names all that cannot be used."""

    def decode(path):
        try:
            return decode_image(path, size)
        except UserError as error:
            return error

    shape = (len(paths), 3, size, size)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    broken = []
    with ThreadPool() as pool:
        decoded = pool.imap(decode, paths, chunksize=16)
        words = f"decoding once, {math.prod(shape) / 1e9:.2f} GB"
        for image in tqdm(decoded, words, len(paths), unit="img"):
            if isinstance(image, UserError):
                broken.append(str(image))
            else:
                file.write(image.tobytes())
    names = "; ".join(broken[:20])
    check(not broken, f"{len(broken)} images cannot be used, mend or remove them: {names}")


def decode_image(path, size):
    """-> uint8 [3,size,size]: the shorter side brought to `size`, the middle kept; the first frame
    of an animation, transparent parts on white. UserError says why a file cannot be used."""
    try:
        with Image.open(path) as image:
            deep = image.mode[0] in "IF"
            if image.format != "BMP":  # whose 16 bits are a whole pixel's
                deep = deep or ";16" in str(image.tile)
            check(not deep, "more than 8 bits a channel, of unknown range: convert it to 8")
            with contextlib.suppress(Exception):  # a damaged note on how the camera was held
                image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.BICUBIC)
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{path} ({error})") from error


def normalize(images, size):
    """uint8 [B,3,H,W] -> float [B,3,size,size] in [-1, 1], alike for all data sets."""
    x = images.float() / 127.5 - 1
    if x.shape[-1] == size:
        return x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)


def augment(images, size, crop_scale=0.3, generator=None):
    """uint8 [B,3,H,W] -> float [B,3,size,size] in [-1, 1]: random resized crop and flip, of a whole
    batch on its device. Section 5 calls its augmentation minimal; the details are ours."""
    drawn = torch.rand(5, len(images), generator=generator, device=images.device)
    area, aspect, x, y, flip = drawn  # [B] each

    # The crop's sides, as shares of the image's. The square of `stretch` is width over height.
    side = (crop_scale + (1 - crop_scale) * area).sqrt()
    stretch = (4 / 3) ** (aspect - 0.5)
    width = (side * stretch).clamp(max=1)
    height = (side / stretch).clamp(max=1)

    # An affine map from the crop's coordinates to the image's, both from -1 to 1: shrunk to the
    # crop's size, moved anywhere inside the image. A negative width flips.
    move_x = (2 * x - 1) * (1 - width)
    move_y = (2 * y - 1) * (1 - height)
    width = torch.where(flip < 0.5, width, -width)
    zero = torch.zeros_like(x)
    to_x = torch.stack([width, zero, move_x], 1)  # [B,3]
    to_y = torch.stack([zero, height, move_y], 1)  # [B,3]
    theta = torch.stack([to_x, to_y], 1)  # [B,2,3]
    shape = (len(images), 3, size, size)
    where = F.affine_grid(theta, shape, align_corners=True)  # [B,size,size,2]
    return F.grid_sample(images.float() / 127.5 - 1, where, align_corners=True)


# ------------------------------------------------------------------------------------------------
# 8. Training (Section 5)

LOG_EVERY = 10  # steps between rows of metrics.jsonl
HELD_OUT = 2000  # images that held_out_loss looks at, about


def seeded(device, *numbers):
    """A generator for one purpose and step: (seed, purpose, step, ...), where the purposes are 0:
    order of the images, 1: crops and ranks of a step, 2: held-out loss. So nothing random has to be
    saved with a run, and a resumed run is the same run."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    seed = int(state[0]) >> 1  # torch takes 63 bits
    return torch.Generator(device).manual_seed(seed)


def pick_device(name):
    """auto: CUDA, else Apple's mps, else the CPU -> torch.device. UserError where it is missing."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    usable = [kind for kind in there if there[kind]] + ["cpu"]
    if name == "auto":
        name = usable[0]
    check(name in usable, f"--device {name} cannot be used here: choose {' or '.join(usable)}")
    return torch.device(name)


def pick_precision(name, device):
    """auto: bfloat16 where a GPU has it, float16 on older ones with fast products, else float32
    (CPUs can be hundreds of times slower in bfloat16) -> the name of a dtype."""
    if name != "auto":
        return name
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (7, 0):
        return "float16"
    return "float32"


def autocast(device, precision="auto"):
    dtype = getattr(torch, pick_precision(precision, device))
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def learning_rate(step, steps, config):
    """Linear warm-up, then half a cosine down to zero."""
    warm = config.warmup * steps
    if step < warm:
        share = (step + 1) / (warm + 1)
    else:
        share = 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))
    return config.lr * config.batch_size / 256 * share


def make_optimizer(model, config):
    """AdamW, with weight decay on matrices only, not on the skips' W. training_step sets its lr."""
    decayed = {"params": [], "weight_decay": config.weight_decay}
    free = {"params": [], "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        group = decayed if parameter.ndim == 2 and name != "skip" else free
        group["params"].append(parameter)
    return torch.optim.AdamW([decayed, free], betas=(0.9, 0.95), fused=True)


def batch_loss(model, images, config, generator=None):
    """Loss of normalized images [B,3,S,S] in freshly drawn orders, on the cheaper path if any."""
    ranks = sample_ranks(config, len(images), images.device, generator)
    with autocast(images.device, config.precision):
        return model(images, ranks, trim=segment_sizes(config) is not None)


def training_step(model, optimizer, scaler, batch, config, step, steps, process=0):
    """One step on uint8 images [B,3,H,W] -> its loss. The host reads no value of the device here,
    so that a GPU never waits for it."""
    # Fresh crops and fresh orders for every step and process.
    generator = seeded(batch.device, config.seed, 1, step, process)
    images = augment(batch, config.image_size, config.crop_scale, generator)
    loss = batch_loss(model, images, config, generator)

    # The scaler keeps small gradients alive in float16; in other precisions it does nothing.
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, config)
    scaler.step(optimizer)
    scaler.update()

    # A gradient that is not finite has spoilt the weights, though this loss does not show it yet.
    if scaler.is_enabled():  # it leaves out such a step
        return loss.detach()
    return torch.where(norm.isfinite(), loss.detach(), torch.nan)


@torch.no_grad()
def held_out_loss(model, images, config, device):
    """Mean loss of whole uint8 images never trained on, in the same orders at each call."""
    total = 0.0
    for i, part in enumerate(images.split(500)):
        x = normalize(part.to(device), config.image_size)
        total = total + batch_loss(model, x, config, seeded(device, config.seed, 2, i)) * len(x)
    return total.item() / len(images)


def write_whole(path, write):
    """Calls write(file) on a file beside `path`, which then takes its place: all or nothing."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        words = f"cannot write {path}, which is as before ({error}): make room or go elsewhere"
        raise UserError(words) from error
    finally:
        part.unlink(missing_ok=True)


def own(file, message, wait=False):
    """Makes this process the file's one owner until it closes it or ends, however it ends. Where
    another process is: UserError or, with `wait`, a line and patience."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        if not wait:
            raise UserError(message) from error
        print(message, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except (OSError, AttributeError):  # some file systems have no locks, nor has Windows
        pass


def load_checkpoint(path):
    """-> what was saved, with the file's sha256; the model, in eval mode on the CPU; its Config.
    UserError where the file is damaged, no checkpoint, or of another version."""
    try:
        content = Path(path).read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # torch itself loads a flipped bit without a word.
            check(archive.testzip() is None, "wrong checksum")
        # weights_only: no code that a file may hold is run.
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        saved["sha256"] = hashlib.sha256(content).hexdigest()
        config = Config(**saved["config"])
        model = RandSAC(config).eval()
        model.load_state_dict(saved["model"])
    except Exception as error:  # a damaged archive raises many kinds
        words = " ".join(str(error).split())[:300]
        raise UserError(f"{path} is not a whole checkpoint of this version: {words}") from error
    return saved, model, config


def load_model(path):
    """Checkpoint -> model in eval mode on the CPU, its Config. UserError as in load_checkpoint."""
    _, model, config = load_checkpoint(path)
    return model, config


def fingerprint(images):
    """sha256 of uint8 images (of a part, beyond a gigabyte), to tell whether they are the same."""
    some = images[:: 1 + images.nbytes // 10**9]
    return hashlib.sha256(some.numpy().tobytes()).hexdigest()


def load_training_images(config, process, world):
    """-> training images, held-out images of every class, whether probe.py can use the labels."""
    if process > 0:
        dist.barrier()  # the first process downloads and decodes, then the others find it done
    images, _, classes = load_images(config, train=True)
    held_out, _, _ = load_images(config, train=False)
    if world > 1 and process == 0:
        dist.barrier()
    enough = len(images) >= config.batch_size
    check(enough, f"{len(images)} images do not fill a --batch-size of {config.batch_size}")
    stride = len(held_out) // HELD_OUT | 1  # 3 for shapes: 2 would leave out every second class
    return images, held_out[::stride], len(classes) > 1 and len(held_out) > 0


def build(config, saved, device):
    """-> model, optimizer, scaler: with a random start, with the weights that --init names, or as
    the run to be resumed left them."""
    torch.manual_seed(config.seed)
    model = RandSAC(config).to(device)
    optimizer = make_optimizer(model, config)
    small = pick_precision(config.precision, device) == "float16"
    scaler = torch.amp.GradScaler(device.type, enabled=small)
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty where precision "auto" was another, on another device
            scaler.load_state_dict(saved["scaler"])
    elif config.init:
        start, before = load_model(config.init)
        sizes = ("patch_size", "dim", "depth", "heads", "decoder_depth", "skip")
        other = [name for name in sizes if getattr(config, name) != getattr(before, name)]
        words = ", ".join(f"{flag_name(name)} {getattr(before, name)}" for name in other)
        check(not other, f"the model that --init names has {words}: give this run the same")
        model.load_state_dict(start.state_dict())
    return model, optimizer, scaler


def wrap(model, config, device, world):
    """-> the model as training calls it. UserError where --compile does not work."""
    wrapped = model
    if config.compile:
        wrapped = torch.compile(model)
        side = config.image_size
        images = torch.zeros(config.batch_size // world, 3, side, side, device=device)
        try:  # here, before the run has begun
            batch_loss(wrapped, images, config).backward()
        except Exception as error:  # a compiler's errors are many
            words = " ".join(str(error).split())[:300]
            raise UserError(f"--compile does not work here, leave it out: {words}") from error
    if world > 1:
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    return wrapped


def check_free(config):
    again = command_line("randsac.py", "--resume", config.out)
    log = Path(config.out, "metrics.jsonl")
    logged = log.exists() and log.stat().st_size > 0
    taken = config.out and (logged or Path(config.out, "checkpoint.pt").exists())
    check(not taken, f"{config.out} holds a run: go on with it by {again}, or choose another --out")


@contextlib.contextmanager
def open_run(config, saved, device):
    """Makes the run's directory, whose name config.out then has, and this process its owner ->
    metrics.jsonl, with the rows up to the checkpoint of a resumed run."""
    if not config.out:
        moment = time.strftime("%Y%m%d-%H%M%S")
        config.out = f"runs/{config.dataset}-{config.segments}-{moment}-{os.getpid()}"
    run = Path(config.out)
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "metrics.jsonl", "a") as log:
        own(log, f"another process trains the run {run}: wait for it, or begin another")
        if not saved:
            check_free(config)  # again, now that nobody else can take it
        log.truncate(0)
        if saved:
            log.writelines(json.dumps(row) + "\n" for row in saved["rows"])
            log.flush()
        settings = dataclasses.asdict(config)
        settings["precision"] = pick_precision(config.precision, device)
        text = json.dumps(settings, indent=1) + "\n"
        write_whole(run / "config.json", lambda file: file.write(text.encode()))
        yield log


@contextlib.contextmanager
def stop_signals(world):
    """-> a list of the signals received (Ctrl-C, SIGTERM): training stops after its step. A second
    one ends the program at once; so does the first with torchrun, or outside the main thread."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    received = []
    before = {}  # the handlers that were there

    def note(number, frame):
        received.append(number)
        for kind in kinds:
            signal.signal(kind, signal.SIG_DFL)

    if world == 1 and threading.current_thread() is threading.main_thread():
        for kind in kinds:
            before[kind] = signal.signal(kind, note)
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def train(config, saved, device, process=0, world=1):
    """Trains to the last step or to the first signal -> exit code. `saved` is None, or what the
    checkpoint of the run to be resumed holds. `process` is one of `world` processes."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        # With a mask cuDNN's attention can give gradients that are NaN (PyTorch's issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    images, held_out, can_probe = load_training_images(config, process, world)
    seen = fingerprint(images)
    first = saved["step"] if saved else 0
    rows = saved["rows"] if saved else []
    if saved:
        check(saved["images"] == seen, "these are not the images that the run began with")
        check(saved["world"] == world, f"it began with {saved['world']} processes, not {world}")
    model, optimizer, scaler = build(config, saved, device)
    wrapped = wrap(model, config, device, world)
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        images = images.to(device)
    B = config.batch_size
    per_epoch = len(images) // B
    steps = min(config.epochs * per_epoch, config.max_steps or math.inf)

    def save(step):
        content = {"config": dataclasses.asdict(config), "step": step, "rows": rows}
        content |= {"images": seen, "world": world}
        for name, part in {"model": model, "optimizer": optimizer, "scaler": scaler}.items():
            content[name] = part.state_dict()
        write_whole(Path(config.out, "checkpoint.pt"), lambda file: torch.save(content, file))

    with contextlib.ExitStack() as stack:
        # The first process alone keeps log and checkpoint, from before the first step on.
        if process == 0:
            log = stack.enter_context(open_run(config, saved, device))
            save(first)
            print(f"{config.out}: {steps} steps of {B} images, {world} x {device.type}")
        signals = stack.enter_context(stop_signals(world))
        bar = tqdm(total=steps * B, initial=first * B, unit="img", disable=process > 0)
        bar.mininterval = 0.5 if sys.stderr.isatty() else 30  # no flood of lines in a log file
        stack.enter_context(bar)

        losses = []
        start = time.perf_counter()
        for step in range(first, steps):
            # Each epoch, also one that a resumed run is in, has its own order of the images.
            epoch, step_of_epoch = divmod(step, per_epoch)
            if step_of_epoch == 0 or step == first:
                generator = seeded("cpu", config.seed, 0, epoch)
                order = torch.randperm(len(images), generator=generator).to(images.device)

            # Each process takes its share of the batch.
            index = order[step_of_epoch * B : (step_of_epoch + 1) * B][process::world]
            batch = images[index].to(device)
            loss = training_step(wrapped, optimizer, scaler, batch, config, step, steps, process)
            if process > 0:
                continue

            # A row of the log now and then; a checkpoint too when an epoch ends or on demand.
            losses.append(loss)
            bar.update(B)
            done = step + 1
            stop = len(signals) > 0
            epoch_ends = step_of_epoch + 1 == per_epoch or done == steps
            asked = config.save_every > 0 and done % config.save_every == 0
            saves = epoch_ends or asked or stop
            if not saves and done % LOG_EVERY != 0:
                continue
            rate = len(losses) * B / (time.perf_counter() - start)
            mean_loss = torch.stack(losses).mean().item()
            mend = f"begin another run with a lower --lr; {config.out}/checkpoint.pt is from before"
            check(math.isfinite(mean_loss), f"the loss is {mean_loss} at step {done}: {mend}")
            row = {"step": done, "epoch": epoch + 1, "loss": mean_loss}
            row |= {"lr": optimizer.param_groups[0]["lr"], "images_per_s": round(rate, 1)}
            if epoch_ends and len(held_out) > 0:
                row["held_out_loss"] = held_out_loss(model, held_out, config, device)
            rows.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
            shown = {"epoch": f"{epoch + 1}/{config.epochs}", "loss": f"{mean_loss:.4f}"}
            bar.set_postfix(shown, refresh=False)
            if saves:
                save(done)
            if stop:
                bar.close()
                print(f"stopped. To go on: {command_line('randsac.py', '--resume', config.out)}")
                return 128 + signals[0]
            losses = []
            start = time.perf_counter()

    checkpoint = Path(config.out, "checkpoint.pt")
    print("trained. Next:", command_line("visualize.py", "all", "--checkpoint", checkpoint))
    if can_probe:
        print("         and:", command_line("probe.py", checkpoint))
    return 0


# ------------------------------------------------------------------------------------------------
# 9. Command line


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line."""

    def error(self, message):
        raise UserError(f"{message}; see --help")


def make_parser(description, leave_out=()):
    """A parser with a flag for each field of Config. What is not given is not in its result."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(Config):
        if field.name in leave_out:
            continue
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif field.type is tuple:
            kind = {"type": int, "nargs": "+", "metavar": "K"}
        elif field.metadata["choices"]:
            kind = {"choices": field.metadata["choices"]}
        else:
            kind = {"type": field.type, "metavar": "X"}
        help = field.metadata["help"]
        if field.default not in (None, "", True, False):
            help += f" (default: {field.default})"
        parser.add_argument(flag_name(field.name), help=help, **kind)
    return parser


def user_path(text):
    """A path as a shell reads it, also where none does, as in --out=~/run."""
    return Path(os.path.expanduser(text))


def command_line(script, *arguments):
    """-> a command to be pasted, whatever its paths are called."""
    program = os.path.relpath(Path(__file__).with_name(script))
    return shlex.join([Path(sys.executable).name, program, *map(str, arguments)])


def run_command(main):
    """Runs a command's main(arguments). This is the one place where an error that the user or the
    machine can mend becomes a line, and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # of a notebook
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack a path's letters
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        words = " ".join(str(error).split())
        full = "out of memory" in words or "allocate memory" in words
        if isinstance(error, MemoryError) or (full and not isinstance(error, UserError)):
            words = "out of memory: choose a smaller --batch-size, --image-size or --model"
        elif isinstance(error, RuntimeError):
            raise
    print(f"error: {words}", file=sys.stderr)
    sys.exit(2)


def read_flags(given):
    """The flags given -> Config of the run and, with --resume, what its checkpoint holds."""
    for name, value in given.items():
        check(value != "", f"{flag_name(name)} is empty: give it a name, or leave it out")
    if "resume" not in given:
        config = Config(**given)
        out = Path(config.out or "runs").resolve()
        inside = config.dataset == "folder" and out.is_relative_to(Path(config.data_dir).resolve())
        check(not inside, "the run would lie among the images: choose another --out")
        check_free(config)
        return config, None

    run = os.path.expanduser(given.pop("resume"))
    check(os.path.isdir(run), f"--resume takes the directory of a run, and {run} is none")
    saved, _, config = load_checkpoint(Path(run, "checkpoint.pt"))
    whole = {"optimizer", "scaler", "rows", "images", "step", "world"} <= saved.keys()
    again = command_line("randsac.py", "--init", Path(run, "checkpoint.pt"))
    check(whole, f"{run} holds only a model: begin a run from it by {again}")
    others = sorted(flag_name(name) for name in given.keys() - {"device", "data_dir", "compile"})
    check(not others, f"--resume takes its flags from the run: leave out {' '.join(others)}")
    return dataclasses.replace(config, **given, out=run), saved


def join_processes(config, device):
    """-> which process this is, and of how many: several where torchrun has started them."""
    if not dist.is_torchelastic_launched():
        alone = os.environ.get("WORLD_SIZE", "") in ("", "1")
        check(alone, "WORLD_SIZE is set, but not by torchrun: unset it or use torchrun")
        return 0, 1
    process = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    shares = config.batch_size % world == 0
    check(shares, f"--batch-size {config.batch_size} does not divide over {world} processes")
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        count = torch.cuda.device_count()
        check(local < count, f"there is no GPU {local}: use torchrun --nproc-per-node {count}")
        torch.cuda.set_device(local)
    if process == 0:
        print(f"torchrun ends at a signal; to go on, give --resume RUN to {world} processes again")
    else:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the first process speaks for all)
    backend = "nccl" if device.type == "cuda" else "gloo"
    patience = datetime.timedelta(days=1)  # while the first process decodes
    dist.init_process_group(backend, timeout=patience)
    return process, world


def main(arguments):
    parser = make_parser(__doc__)
    words = "go on with the run in this directory; it takes --device, --data-dir, --compile alone"
    parser.add_argument("--resume", metavar="RUN", help=words)
    config, saved = read_flags(vars(parser.parse_args(arguments)))
    device = pick_device(config.device)
    process, world = join_processes(config, device)
    code = train(config, saved, device, process, world)
    if world > 1:
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    run_command(main)
