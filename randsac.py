"""RandSAC in one file: Self-supervision through Random Segments with Autoregressive Coding
(Hua, Tian, Ren, Raptis, Zhao, Sigal; ICLR 2023; arXiv 2203.12054). Read it beside the paper.

One integer per token, its *rank*, carries the whole method: it says at which step the token is
predicted. Tokens of one rank form a segment: they are predicted together, from all tokens of
lower rank. Rank 0 is given and never predicted. The strategies of the paper differ only in how
they fill in the ranks, and its three attention masks are three comparisons of ranks.

    images --crop--> images --patchify--> tokens [B,N,P*P*3]
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
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
import zlib
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
        # A CPU's kernel is slow backward in bfloat16 (torch 2.14.1): there it gets float32.
        if q.is_cpu and q.dtype == torch.bfloat16:
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B,h,n,d]
        return self.out(y.transpose(1, 2).flatten(2).to(x.dtype))  # [B,n,D]


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

# What --model fills in where nothing else is said.
MODELS = {
    "nano": {"dim": 128, "depth": 6, "heads": 4, "decoder_depth": 1, "lr": 5.6e-3},
    "tiny": {"dim": 192, "depth": 12, "heads": 3, "decoder_depth": 4, "lr": 1e-3},
    "small": {"dim": 384, "depth": 12, "heads": 6, "decoder_depth": 4, "lr": 5e-4},
    "base": {"dim": 768, "depth": 12, "heads": 12, "decoder_depth": 8, "lr": 1.5e-4},
}
MODELS["nano"]["batch_size"] = 32  # a small batch suits short runs on a CPU
# What --dataset fills in: shapes for a laptop, the others for one GPU.
DATASETS = {
    "shapes": {"model": "nano", "epochs": 3, "batch_size": 128, "data_dir": ""},
    "cifar10": {"model": "small", "epochs": 400, "batch_size": 512, "data_dir": "data"},
    "cifar100": {"model": "small", "epochs": 400, "batch_size": 512, "data_dir": "data"},
    "folder": {"model": "small", "epochs": 100, "batch_size": 256, "data_dir": "data"},
}
# What --segments fills in: the hierarchies of Tables 5 and 7.
HIERARCHIES = {"patch": (), "square": (16, 4), "blob": (11, 5), "scatter": (9,), "mae": ()}
PRECISION = "of products; on CPUs with avx512_bf16 or amx_bf16, bfloat16 is faster than float32"


def flag(default, help, **how):
    """A field of Config, with what argparse is told of its flag."""
    return dataclasses.field(default=default, metadata={"help": help, **how})


def flag_name(field_name):
    return "--" + field_name.replace("_", "-")


@dataclasses.dataclass
class Config:
    """All settings of a run, each a flag of the command line. Building one fills in what was left
    out (None) and raises UserError, a ValueError, where a setting is wrong."""

    dataset: str = flag("shapes", "what to train on", choices=[*DATASETS])
    data_dir: str = flag(None, "where images are or go: folder takes train/CLASS/ and test/CLASS/")
    image_size: int = flag(32, "side of an image in pixels")
    patch_size: int = flag(4, "side P of a patch (token) in pixels; 1: as iGPT")
    segments: str = flag("square", "how tokens form segments (Section 3.2)", choices=[*HIERARCHIES])
    hierarchy: tuple = flag(None, "segments, partitions, ... (Section 3.3), as 16 4", nargs="+")
    order: str = flag("random", "new each time, or row by row", choices=["random", "raster"])
    last_rank: int = flag(0, "predict all later segments with this one; 0: none (the paper)")
    model: str = flag(None, "size: fills in the flags from dim to lr", choices=[*MODELS])
    dim: int = flag(None, "width of encoder and decoder")
    depth: int = flag(None, "encoder layers")
    heads: int = flag(None, "attention heads")
    decoder_depth: int = flag(None, "decoder layers")
    lr: float = flag(None, "peak learning rate for each 256 images of the batch")
    skip: bool = flag(True, "trainable skip connections (Section 4.2; Tables 1 to 6: none)")
    target: str = flag(None, "what is predicted (Section 5)", choices=["normalized", "pixels"])
    crop_scale: float = flag(0.3, "smallest share of the image, roughly, that a random crop keeps")
    epochs: int = flag(None, "passes over the training images (Table 7: 1600)")
    max_steps: int = flag(0, "stop after this many steps; 0: after the last epoch")
    batch_size: int = flag(None, "images in a step, over all processes")
    weight_decay: float = flag(0.05, "weight decay of matrices")
    warmup: float = flag(0.05, "share of the steps in which the learning rate rises")
    seed: int = flag(0, "seed of everything random")
    device: str = flag("auto", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
    precision: str = flag("auto", PRECISION, choices=["auto", "float32", "bfloat16", "float16"])
    compile: bool = flag(False, "compile the model: a slow start, then faster steps")
    out: str = flag("", "directory of the run (default: a fresh one in runs/)")
    init: str = flag("", "checkpoint to start from: its weights, and its settings but those given")
    save_every: int = flag(0, "save every so many steps, besides every epoch")

    def __post_init__(self):
        # Fill in what was left out. What is given wins, then --model, then --dataset.
        dataset = DATASETS.get(self.dataset, {})
        if self.model is None:
            self.model = dataset.get("model")
        defaults = dataset | MODELS.get(self.model, {})
        defaults["hierarchy"] = HIERARCHIES.get(self.segments)
        # A token of one grey pixel, less its own mean, would be nothing.
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
            choices = field.metadata.get("choices", [value])
            kinds = (int, float) if field.type is float else (field.type,)
            check(type(value) in kinds, f"{name} is {value!r} but must be {field.type.__name__}")
            check(value in choices, f"{name} {value} is not one of {choices}")
            if int in kinds:
                low = 0 if field.type is float or field.default == 0 else 1
                check(low <= value <= 1e9, f"{name} is {value} but must be from {low} to 1e9")
        for name in ("data_dir", "out", "init"):  # ~ is left to us in --out=~/run
            setattr(self, name, os.path.expanduser(getattr(self, name)))
        check(self.lr > 0, "--lr must be above 0")
        check(0 < self.crop_scale <= 1, "--crop-scale must be above 0, at most 1")
        check(self.warmup < 1, "--warmup must be below 1")

        # Check what must fit together.
        S, P = self.image_size, self.patch_size
        drawn = self.dataset == "shapes"
        check(not (drawn and self.data_dir), "--data-dir: shapes are drawn, not read; leave it out")
        check(S % P == 0, f"--patch-size {P} does not divide --image-size {S}: choose another")
        check(S > P, "one patch is the whole image: choose a smaller --patch-size")
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
            falls = all(a > b for a, b in itertools.pairwise([self.tokens + 1, *counts, 1]))
            wanted = f"must fall from at most {self.tokens} tokens and stay above 1, as 16 4"
            check(counts and falls, f"--hierarchy {counts} {wanted}")
        else:
            check(not counts, f"--segments {self.segments} takes no --hierarchy: leave it out")
        if self.segments == "square":
            squares = {root**2 for root in range(2, self.grid + 1) if self.grid % root == 0}
            nested = all(a % b == 0 for a, b in itertools.pairwise(counts))
            wanted = f"choose of {sorted(squares)}, each dividing the one before"
            fits = nested and squares.issuperset(counts)
            check(fits, f"--hierarchy {counts} cuts no squares within squares: {wanted}")
        words = f"--last-rank {self.last_rank} changes nothing in {segments} segments"
        check(self.last_rank < max(segments - 1, 1), words)

    @property
    def grid(self):
        """Tokens along a side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self):
        """N, the number of tokens."""
        return self.grid**2


def with_flags(trained, given):
    """A trained model's Config with the flags given, a dict, in its place. Settings that depend on
    a changed flag go back to their defaults. UserError where a flag contradicts the model."""
    settings = dataclasses.asdict(trained) | {"out": "", "init": "", "device": "auto"}
    for name in ("patch_size", "model", "dim", "depth", "heads", "decoder_depth", "skip"):
        words = f"the trained model has {flag_name(name)} {settings[name]}: leave this flag out"
        check(given.get(name, settings[name]) == settings[name], words)
    if given.get("segments", trained.segments) != trained.segments:
        settings |= {"hierarchy": None, "order": "random", "last_rank": 0}
    if given.get("dataset", trained.dataset) != trained.dataset:
        settings["data_dir"] = None
    return Config(**settings | given)


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
        how = dict(field.metadata)
        if field.default not in (None, "", True, False):
            how["help"] += f" (default: {field.default})"
        if field.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how["type"] = int if field.type is tuple else field.type
        if "choices" not in how and field.type is not bool:
            how["metavar"] = "X"
        parser.add_argument(flag_name(field.name), **how)
    return parser


# ------------------------------------------------------------------------------------------------
# 7. Data: one uint8 array of images


def progress(total, **about):
    """A bar that counts images: in a log file a line every half minute, no flood of them."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(total=total, unit="img", mininterval=interval, maxinterval=30, **about)


@contextlib.contextmanager
def write_whole(path):
    """-> a binary file beside `path`, to be written, which then takes its place: all or nothing.
    It has a name of its own, as another process may be writing the same."""
    part = Path(f"{path}.{os.urandom(4).hex()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a machine that fails may leave an empty file
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}, which is as before: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def load_images(config, train):
    """-> images uint8 [n,3,H,W], labels int64 [n], names of the classes. n is 0 where a folder has
    no test images. UserError where images are missing, broken or cannot be downloaded."""
    if config.dataset == "shapes":
        count = 20_000 if train else 4_000
        return draw_shapes(count, config.image_size, seed=int(train))
    if config.dataset == "folder":
        return load_folder(config, train)

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


def is_hidden(name):
    """Whether a file or folder is a system's, and not the user's."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN")


def list_split(split):
    """-> (path, class) of the images in split/CLASS/ and below, and the paths of all else."""
    images = []
    others = []
    for path in sorted([*split.glob("*"), *split.glob("*/**/*")]):
        *folders, name = path.relative_to(split).parts
        if any(map(is_hidden, folders)):
            continue  # it is left out with its folder
        linked = folders and path.is_symlink()  # in a class links to folders may lead in circles
        named = name.lower().endswith(torchvision.datasets.folder.IMG_EXTENSIONS)
        if is_hidden(name):
            others.append(path)
        elif path.is_dir() and not linked:
            next(path.iterdir(), None)  # an error where it may not be read: glob would say nothing
        elif folders and named and path.is_file():
            images.append((path, folders[0]))
        else:
            others.append(path)
    return images, others


def list_folder(root):
    """-> names of the classes, (path, label) of the training images, of the held-out ones, and the
    paths left out. UserError where there is nothing to train on."""
    test = "test" if (root / "test").is_dir() else "val"
    training, left_out = list_split(root / "train")
    held_out, others = list_split(root / test)
    left_out += others + [path for path in root.glob("*") if path.name not in ("train", test)]
    wanted = "wanted are train/CLASS/ and test/CLASS/ or val/CLASS/: check --data-dir"
    check(training, f"{root} has no image in train/CLASS/; {wanted}")

    classes = sorted({name for _, name in training})
    unknown = sorted({name for _, name in held_out}.difference(classes))
    check(not unknown, f"{root / test} has classes that train/ has no image of: {unknown[:9]}")
    label = {name: i for i, name in enumerate(classes)}
    training = [(path, label[name]) for path, name in training]
    held_out = [(path, label[name]) for path, name in held_out]
    return classes, training, held_out, left_out


def images_key(config, files):
    """A key that is the same for the same images: of the names and sizes of all files and the bytes
    of some, never of times, nor of decoded pixels, which differ between releases of Pillow."""
    known = [config.dataset, config.image_size]
    for file in files:
        known.append((file.relative_to(config.data_dir).as_posix(), file.stat().st_size))
    known += [zlib.crc32(file.read_bytes()) for file in files[:: 1 + len(files) // 100]]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def load_folder(config, train):
    """-> as load_images. Decodes all images once; later runs map them from disk."""
    size = config.image_size
    classes, training, held_out, left_out = list_folder(Path(config.data_dir))
    if train:
        folders = sum(path.is_dir() for path in left_out)
        kinds = ", ".join(sorted({path.suffix or path.name for path in left_out})[:9]) or "none"
        found = f"{len(training)} images of {len(classes)} classes, {len(held_out)} held out"
        rest = f"{len(left_out) - folders} files and {folders} folders left out ({kinds})"
        print(f"{config.data_dir}: {found}, {rest}")
    chosen = training if train else held_out
    labels = torch.tensor([label for _, label in chosen], dtype=torch.int64)
    if not chosen:
        return torch.empty(0, 3, size, size, dtype=torch.uint8), labels, classes

    files = [path for path, _ in chosen]
    cache = Path("runs/cache", f"{images_key(config, files)}.npy")
    if not cache.exists() or cache.stat().st_size < len(files) * 3 * size**2:
        decode_all(files, size, cache)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nobody may write to it: nobody does
        images = torch.from_numpy(np.load(cache, mmap_mode="r"))
    return images, labels, classes


def decode_all(files, size, cache):
    """Decodes the images into a .npy file. UserError names all that cannot be used."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache.parent).free / 1e9
    need = len(files) * 3 * size**2 / 1e9
    print(f"decoding {len(files)} images, once, into {cache}: {need:.2f} GB")
    check(need < free, f"only {free:.2f} GB are free there: link {cache.parent} to a larger disk")
    broken = []

    def decode(path):
        try:
            return decode_image(path, size).tobytes()
        except UserError as error:
            broken.append(str(error))
            return b""

    # As many threads as the process may use; parts of 30 MB, lest images pile up at a slow disk.
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), 3, size, size)}
    with ThreadPool(threads) as pool, write_whole(cache) as file, progress(len(files)) as bar:
        np.lib.format.write_array_header_1_0(file, header)
        part = 1 + 30_000_000 // (3 * size**2)
        for start in range(0, len(files), part):
            for image in pool.map(decode, files[start : start + part]):
                file.write(image)
                bar.update()
        names = "; ".join(sorted(broken)[:20])
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


def random_crops(count, crop_scale, device="cpu", generator=None):
    """-> `count` random resized crops and flips [count,2,3]: affine maps from a crop's coordinates
    to its image's, both from -1 to 1. Section 5 calls its augmentation minimal; the details are
    ours."""
    drawn = torch.rand(5, count, generator=generator, device=device)
    area, aspect, x, y, flip = drawn  # [count] each

    # The crop's sides, as shares of the image's. The square of `stretch` is width over height.
    side = (crop_scale + (1 - crop_scale) * area).sqrt()
    stretch = (4 / 3) ** (aspect - 0.5)
    width = (side * stretch).clamp(max=1)
    height = (side / stretch).clamp(max=1)

    # Shrunk to the crop's size, moved anywhere inside the image. A negative width flips.
    move_x = (2 * x - 1) * (1 - width)
    move_y = (2 * y - 1) * (1 - height)
    width = torch.where(flip < 0.5, width, -width)
    zero = torch.zeros_like(x)
    rows = torch.stack([width, zero, move_x, zero, height, move_y], 1)  # [count,6]
    return rows.view(count, 2, 3)


def crop(images, crops, size):
    """uint8 [B,3,H,W], crops [B,2,3] -> float [B,3,size,size] in [-1, 1]."""
    shape = (len(images), 3, size, size)
    where = F.affine_grid(crops, shape, align_corners=True)  # [B,size,size,2]
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


def batch_loss(model, images, ranks, config):
    """Loss of normalized images [B,3,S,S] in orders [B,N], on the cheaper path if there is one."""
    with autocast(images.device, config.precision):
        return model(images, ranks, trim=segment_sizes(config) is not None)


def training_step(model, optimizer, scaler, batch, config, step, steps, process=0, world=1):
    """One step on the share that this process has of the batch, uint8 images [b,3,H,W] -> its loss.
    The host reads no value of the device here, so that a GPU never waits for it."""
    # Crops and orders are drawn for the whole batch, so that a training is the same on any number
    # of processes: each takes every world-th. Apple's sorts are in doubt (PyTorch's issue 184028).
    device = batch.device
    place = "cpu" if device.type == "mps" else device
    generator = seeded(place, config.seed, 1, step)
    crops = random_crops(len(batch) * world, config.crop_scale, place, generator)
    ranks = sample_ranks(config, len(batch) * world, place, generator)
    images = crop(batch, crops[process::world].to(device), config.image_size)
    loss = batch_loss(model, images, ranks[process::world].to(device), config)

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
def held_out_loss(model, images, config, device, world=1):
    """Mean loss of whole uint8 images never trained on, in the same orders at each call. It takes
    no more of them at once than a process has of a batch, and so no more memory than training."""
    generator = seeded("cpu", config.seed, 2)
    counts = [len(part) for part in images.split(250)]  # drawing takes memory too
    ranks = torch.cat([sample_ranks(config, count, generator=generator) for count in counts])

    share = config.batch_size // world
    total = 0.0
    for part, part_ranks in zip(images.split(share), ranks.split(share)):
        x = normalize(part.to(device), config.image_size)
        loss = batch_loss(model, x, part_ranks.to(device), config)
        total = total + loss * len(x)
    return total.item() / len(images)


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


def load_training_images(config, process=0, world=1):
    """-> training images, held-out images of every class, the key of the training images, and
    whether probe.py can use their labels."""
    if process > 0:
        dist.barrier()  # the first process downloads and decodes, then the others find it done
    images, _, classes = load_images(config, train=True)
    held_out, _, _ = load_images(config, train=False)
    if world > 1 and process == 0:
        dist.barrier()
    most = len(images) // world * world
    message = f"--batch-size {config.batch_size} is more than there are images: take {most} or less"
    check(config.batch_size <= most, message)

    files = []
    if config.dataset == "folder":
        _, training, _, _ = list_folder(Path(config.data_dir))
        files = [path for path, _ in training]
    can_probe = len(classes) > 1 and len(held_out) > 0
    stride = len(held_out) // HELD_OUT | 1  # 3 for shapes: 2 would leave out every second class
    return images, held_out[::stride], images_key(config, files), can_probe


def build(config, saved, device):
    """-> model, optimizer, scaler: with a random start, with the weights that --init names, or as
    the run to be resumed left them."""
    torch.manual_seed(config.seed)
    model = RandSAC(config).to(device)
    optimizer = make_optimizer(model, config)
    small = pick_precision(config.precision, device) == "float16"
    scaler = torch.amp.GradScaler(device.type, enabled=small)
    for name, part in {"model": model, "optimizer": optimizer, "scaler": scaler}.items():
        if saved.get(name):  # a scaler's is empty where "auto" was another precision
            part.load_state_dict(saved[name])
    return model, optimizer, scaler


def begin_run(config, saved, model, device):
    """Makes the run's directory, notes its name in config.out, writes the log up to here, and says
    what is about to happen."""
    if not config.out:
        moment = time.strftime("%Y%m%d-%H%M%S")
        config.out = f"runs/{config.dataset}-{config.segments}-{moment}-{os.getpid()}"
    run = Path(config.out)
    run.mkdir(parents=True, exist_ok=True)
    mode = "w" if "rows" in saved else "x"  # x fails where another process was faster
    with open(run / "metrics.jsonl", mode) as log:
        log.writelines(json.dumps(row) + "\n" for row in saved.get("rows", []))
    precision = pick_precision(config.precision, device)
    settings = dataclasses.asdict(config) | {"precision": precision}
    (run / "config.json").write_text(json.dumps(settings, indent=1) + "\n")

    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    S, N = config.image_size, config.tokens
    more = f"--image-size {2 * S} keeps more, at {4 * N} tokens"
    print(f"each image is {S} x {S} pixels here, which are {N} tokens: {more}")
    print(f"{run}: {config.model}, {millions:.2f} million parameters, {device.type}, {precision}")
    if device.type == "cpu" and millions > 2:  # nano has 1.5
        words = f"--model nano --max-steps {320_000 // max(64, N)}"
        print(f"without a GPU this may take days; with {words} it ends within the hour")


@contextlib.contextmanager
def stop_signals():
    """-> a list of the signals received, to stop after the step. A second Ctrl-C ends at once."""
    received = []
    before = {}  # the handlers that were there

    def note(number, frame):
        received.append(number)
        if number == signal.SIGINT:  # a person is impatient; Slurm sends SIGTERM twice
            signal.signal(number, signal.SIG_DFL)

    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        ignored = signal.getsignal(kind) == signal.SIG_IGN  # by nohup
        if threading.current_thread() is threading.main_thread() and not ignored:
            before[kind] = signal.signal(kind, note)
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def over_processes(number, world, how):
    """A number, a tensor, -> its sum or maximum over all processes."""
    if world > 1:
        dist.all_reduce(number, how)
    return number.item()


def train(config, saved, device, process=0, world=1):
    """Trains to the last step or to the first signal -> exit code. `saved` is what the checkpoint
    of the run to be resumed holds, or a model to begin with, or {}. `process` is one of `world`."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        # With a mask cuDNN's attention can give gradients that are NaN (PyTorch's issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    images, held_out, key, can_probe = load_training_images(config, process, world)
    mend = "begin another run, by --init with this one's checkpoint.pt"
    check(saved.get("images", key) == key, f"these are not the images of the run: {mend}")
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info()[0] / 2:
        images = images.to(device)
    model, optimizer, scaler = build(config, saved, device)
    wrapped = torch.compile(model) if config.compile else model
    if world > 1:
        wrapped = nn.parallel.DistributedDataParallel(wrapped)

    B = config.batch_size
    per_epoch = len(images) // B
    steps = min(config.epochs * per_epoch, config.max_steps or math.inf)
    first = saved.get("step", 0)
    rows = saved.get("rows", [])

    def save(step):
        content = {"config": dataclasses.asdict(config), "step": step, "rows": rows, "images": key}
        for name, part in {"model": model, "optimizer": optimizer, "scaler": scaler}.items():
            content[name] = part.state_dict()
        with write_whole(Path(config.out, "checkpoint.pt")) as file:
            torch.save(content, file)

    # The first process alone keeps log and checkpoint, from before the first step on.
    if process == 0:
        begin_run(config, saved, model, device)
        save(first)
        print(f"{steps / per_epoch:.4g} passes, {steps} steps of {B} images, from step {first + 1}")

    losses = []
    bar = progress(steps * B, initial=first * B, disable=process > 0)
    with stop_signals() as signals, bar:
        start = time.perf_counter()
        for step in range(first, steps):
            # Each epoch, also one that a resumed run is in, has its own order of the images.
            epoch, step_of_epoch = divmod(step, per_epoch)
            if step_of_epoch == 0 or step == first:
                generator = seeded("cpu", config.seed, 0, epoch)
                order = torch.randperm(len(images), generator=generator).to(images.device)

            # Each process takes its share of the batch.
            index = order[step_of_epoch * B : (step_of_epoch + 1) * B][process::world]
            parts = (wrapped, optimizer, scaler, images[index].to(device))
            losses.append(training_step(*parts, config, step, steps, process, world))
            bar.update(B)

            # A row of the log now and then; a checkpoint too when an epoch ends or on demand.
            done = step + 1
            here = torch.tensor(max(signals, default=0))
            stop = over_processes(here, world, dist.ReduceOp.MAX)
            epoch_ends = done % per_epoch == 0 or done == steps
            asked = config.save_every > 0 and done % config.save_every == 0
            saves = epoch_ends or asked or stop
            if not saves and done % LOG_EVERY != 0:
                continue
            loss = over_processes(torch.stack(losses).mean() / world, world, dist.ReduceOp.SUM)
            mend = "begin another run with a lower --lr; the last checkpoint is from before"
            check(math.isfinite(loss), f"the loss is {loss} at step {done}: {mend}")
            if process == 0:
                rate = len(losses) * B / (time.perf_counter() - start)
                row = {"step": done, "epoch": epoch + 1, "loss": loss}
                row |= {"lr": optimizer.param_groups[0]["lr"], "images_per_s": round(rate, 1)}
                if epoch_ends and len(held_out) > 0:
                    row["held_out_loss"] = held_out_loss(model, held_out, config, device, world)
                rows.append(row)
                with open(Path(config.out, "metrics.jsonl"), "a") as log:
                    log.write(json.dumps(row) + "\n")
                bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.4f}", refresh=False)
                if saves:
                    save(done)
            if stop:
                bar.close()
                print(f"stopped. To go on: {command_line('randsac.py', '--resume', config.out)}")
                return 128 + stop
            losses = []
            start = time.perf_counter()

    checkpoint = f"{config.out}/checkpoint.pt"
    print("trained. Next:", command_line("visualize.py", "all", "--checkpoint", checkpoint))
    if can_probe:
        print("         and:", command_line("probe.py", checkpoint))
    return 0


# ------------------------------------------------------------------------------------------------
# 9. Command line


def user_path(text):
    """A path as a shell reads it, also where none does, as in --out=~/run."""
    check(text, "a path is empty")
    return Path(os.path.expanduser(text))


def command_line(script, *arguments):
    """-> a command to be pasted, whatever its paths are called."""
    program = os.path.relpath(Path(__file__).with_name(script))
    return shlex.join([Path(sys.executable).name, program, *map(str, arguments)])


def run_command(main):
    """Runs a command's main(arguments). This is the one place where an error that the user or the
    machine can mend becomes a line, and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left half done
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack the letters of a path
        with contextlib.suppress(AttributeError):  # a notebook's
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        words = " ".join(str(error).split())[:2000]
        if isinstance(error, MemoryError) or "out of memory" in words or "allocate memory" in words:
            words = "out of memory: choose a smaller --batch-size, --image-size or --model"
        elif type(error) is RuntimeError:  # a fault of the program: its traceback says where
            raise
    print(f"error: {words}", file=sys.stderr)
    sys.exit(2)


ELSEWHERE = {"out", "device", "data_dir", "compile"}  # flags that may change when a run goes on


def go_on(checkpoint, given):
    """-> the Config of a run that is there, and all that its checkpoint holds. Flags may repeat the
    run's; those of ELSEWHERE may differ."""
    saved, _, trained = load_checkpoint(checkpoint)
    begin = command_line("randsac.py", "--init", checkpoint)
    check("optimizer" in saved, f"{checkpoint} holds only a model: begin another run by {begin}")
    config = with_flags(trained, {"init": trained.init, "device": trained.device} | given)
    for name in given.keys() - ELSEWHERE:
        value = getattr(trained, name)
        words = f"the run has {flag_name(name)} {value}: leave that as it is, or add the flag to"
        check(getattr(config, name) == value, f"{words} {begin}")
    return config, saved


def read_flags(given):
    """The flags given -> Config of the run, and what it begins with: all that the checkpoint of a
    run to go on with holds, or the weights that --init names, or nothing."""
    check("" not in given.values(), "a flag is empty: give it a value, or leave it out")
    resumes = "resume" in given
    if resumes:
        check("out" not in given, "--resume names the run's directory: leave out --out")
        given["out"] = given.pop("resume")
    run = os.path.expanduser(given.get("out", ""))
    checkpoint = f"{run}/checkpoint.pt"  # a Path would lose the ./ of ./-x
    if resumes and os.path.exists(checkpoint):
        return go_on(checkpoint, given)

    # A directory holds one run. One that was cut off before its first checkpoint has an empty log.
    flags = given.keys() - ELSEWHERE
    check(flags or not resumes, f"{run} holds no run; to begin one there, give its flags too")
    mend = "choose another directory"
    if os.path.exists(checkpoint):
        mend = f"go on by {command_line('randsac.py', '--resume', run)}, or {mend}"
    log = f"{run}/metrics.jsonl"
    begun = resumes and os.path.exists(log) and os.path.getsize(log) == 0
    used = os.path.isdir(run) and os.listdir(run)  # never where there is no --out
    check(begun or not used, f"{run} is in use: {mend}")
    saved = {"rows": []} if resumes else {}  # with rows, the log may be written anew
    if "init" not in given:
        return Config(**given), saved
    start, _, trained = load_checkpoint(user_path(given["init"]))
    return with_flags(trained, given), saved | {"model": start["model"]}


def join_processes(config, device):
    """-> which process this is, and of how many: several where torchrun has started them."""
    # On a machine srun or mpirun may start one task, and torchrun in it what trains together.
    launched = dist.is_torchelastic_launched()
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    launchers = ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]
    if not launched:
        launchers.append("WORLD_SIZE")
    for name in launchers:
        tasks = os.environ.get(name, machines)
        words = "as many trainings would run side by side: start one task, with torchrun in it"
        check(tasks in ("", machines), f"{name} is {tasks}; {words}")
    if not launched:
        return 0, 1
    process = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    shares = config.batch_size % world == 0
    check(shares, f"--batch-size {config.batch_size} does not divide over {world} processes")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if process > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the first process speaks for all)
    # gloo and, for GPUs, nccl; with patience, while the first process decodes.
    dist.init_process_group(timeout=datetime.timedelta(days=1))
    return process, world


def main(arguments):
    parser = make_parser(__doc__)
    words = "go on with the run in this directory, or begin it there with the flags given"
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
