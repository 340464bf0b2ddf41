"""Pictures of RandSAC: the orders and masks of any strategy, and what a trained model does.

    python visualize.py                                                  # Figures 1 to 4
    python visualize.py segments order --segments blob --hierarchy 11 5  # flags of randsac.py
    python visualize.py explore                                          # a page to try them on
    python visualize.py all --checkpoint runs/NAME/checkpoint.pt         # all, and index.html
    python visualize.py curves runs/A runs/B                             # runs side by side

With --checkpoint, the flags that are not given are those of the run; with another --segments, its
other strategy flags begin anew. A flag that has nothing to do with a picture does not change it.
A draw_... function returns a PIL image, which a notebook can show (draw_order: a GIF's frames).
"""

import base64
import dataclasses
import functools
import io
import itertools
import json
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

import randsac
from randsac import Config, UserError, check, flag_name, sample_ranks, seeded

WIDTH = 1600  # of a page in pixels: twice what a README shows, so that it is sharp
MARGIN = 40
GAP = 20  # between images

INK = "#1A1A1A"
DIM = "#5A5A5A"
GREY = "#C8C8C8"
WHITE = "#FFFFFF"
# Okabe and Ito's colours, which colour-blind eyes can tell apart, and more.
BLUE = "#0072B2"
RED = "#D55E00"
ORANGE = "#E69F00"
GREEN = "#009E73"
HUES = (BLUE, RED, INK, ORANGE, "#56B4E9", GREEN, "#8C510A", "#882255", "#CC79A7", "#999933")
PALE_BLUE = "#A9CFE5"
PALE_ORANGE = "#F5DDA8"
RAMP = ("#440154", "#46327E", "#365C8D", "#277F8E", "#1FA187", "#4AC16D", "#A0DA39", "#FDE725")
MASK = {"may not look": "#F4F4F4", "may look": BLUE, "left out": "#BDBDBD"}
GREY_PIXEL = torch.tensor(ImageColor.getrgb(GREY), dtype=torch.uint8)

font = functools.cache(ImageFont.load_default)  # by size

# ------------------------------------------------------------------------------------------------
# 1. Cells, words and pages


def blend(values, scale=RAMP):
    """Values in 0..1 -> colours uint8 [...,3], in between those of the scale."""
    stops = torch.tensor([ImageColor.getrgb(code) for code in scale]).float()  # [S,3]
    place = torch.as_tensor(values).float() * (len(scale) - 1)
    below = place.long().clamp(max=len(scale) - 2)
    share = (place - below)[..., None]
    return stops[below].lerp(stops[below + 1], share).round().byte()


def photos(images):
    """Images float [B,3,H,W] in [-1, 1] -> uint8 [B,H,W,3]."""
    return ((images + 1) * 127.5).clamp(0, 255).round().byte().movedim(1, -1)


def as_grid(tokens):
    """[N] -> [R,C]"""
    return tokens.unflatten(0, (math.isqrt(len(tokens)), -1))


def column(count):
    """-> the width of `count` images side by side on a page."""
    return (WIDTH - 2 * MARGIN - GAP * (count - 1)) // count


def reveal(photo, keep, behind=GREY_PIXEL):
    """The tokens keep [R,C] of a photo uint8 [H,W,3], before another photo or grey."""
    P = len(photo) // len(keep)
    pixels = keep.repeat_interleave(P, 0).repeat_interleave(P, 1)  # [H,W]
    return torch.where(pixels[..., None], photo, behind)


def enlarge(cells, width, height=None):
    """Cells uint8 [R,C,3] of a photo, a map or a mask -> an image. By default they are square."""
    if height is None:
        height = width * cells.shape[0] // cells.shape[1]
    return Image.fromarray(cells.numpy()).resize((width, height), Image.NEAREST)


def outline(image, ids, colour=WHITE, width=1):
    """Draws lines inside of cells [R,C], where those of another id begin. Id 0 has none."""
    W, H = image.size
    large = F.interpolate(ids[None, None].float(), (H, W))[0, 0]  # [H,W]

    # A pixel lies on a line where one of its eight neighbours, `width` away, has another id.
    around = F.pad(large, [width] * 4)
    edge = torch.zeros(H, W, dtype=torch.bool)
    for y, x in itertools.product((0, width, 2 * width), repeat=2):
        edge = edge | (around[y : y + H, x : x + W] != large)
    edge = edge & (large > 0)
    image.paste(colour, mask=to_pil_image(edge.byte() * 255))
    return image


def tile(images, columns):
    """Images of one size -> one image of them, row by row."""
    tiles = make_grid([pil_to_tensor(image) for image in images], columns, GAP, pad_value=255)
    return to_pil_image(tiles[:, GAP:-GAP, GAP:-GAP])


def write(image, place, words, size=24, colour=INK, anchor="la", align="left"):
    ImageDraw.Draw(image).text(place, words, colour, font(size), anchor, 10, align)


def write_in_cells(image, cells, labels):
    """Writes labels [R][C] into the cells uint8 [R,C,3] of an image, if they fit."""
    h = image.height / len(labels)
    w = image.width / len(labels[0])
    longest = max(len(words) for words in itertools.chain(*labels))
    size = int(min(30, 0.55 * h, 1.6 * w / longest))  # a letter is about half as wide as high
    if size < 16:
        return
    dark = cells.float() @ torch.tensor([0.3, 0.59, 0.11]) < 110  # [R,C]
    for r, row in enumerate(labels):
        for c, words in enumerate(row):
            ink = WHITE if dark[r, c] else INK
            write(image, ((c + 0.5) * w, (r + 0.5) * h), words, size, ink, "mm")


def token_map(ranks, width, scale=RAMP):
    """Ranks [N] as a grid of tokens, coloured and numbered by rank."""
    grid = as_grid(ranks)
    cells = blend(grid / max(1, grid.max()), scale)
    image = outline(enlarge(cells, width), grid + 1)
    write_in_cells(image, cells, [[str(rank) for rank in row] for row in grid.tolist()])
    return image


def swatch(words, width, scale=RAMP):
    """-> (words, image): what colours mean."""
    return words, enlarge(blend(torch.linspace(0, 1, 10), scale)[None], width, 24)


def sheet(title, note, rows):
    """Rows of (words, image), the words above, under a title and a note -> a page."""
    note = textwrap.fill(" ".join(note.split()), 115)
    page = Image.new("RGB", (WIDTH, 132 + 36 * note.count("\n")), WHITE)
    write(page, (MARGIN, 24), title, 38)
    write(page, (MARGIN, 80), note, 26, DIM)
    for row in rows:
        # The page grows by the highest words and the highest image of the row.
        y = page.height
        head = 36 * max(len(words.splitlines()) for words, _ in row)
        tallest = max(image.height for _, image in row)
        page = ImageOps.expand(page, (0, 0, 0, head + tallest + 28), WHITE)
        x = MARGIN
        for words, image in row:
            write(page, (x, y), words, 25)
            page.paste(image, (x, y + head))
            x += image.width + GAP
    return page


# ------------------------------------------------------------------------------------------------
# 2. A chart


class Series(NamedTuple):
    """What one colour of a chart shows. Bars of several series stand side by side."""

    xs: list
    ys: list
    colour: str
    style: str  # line, dots, bars
    label: str = ""  # in the legend


def ticks(low, high, most):
    """-> the round numbers from low to high, about `most` of them."""
    for exponent, digit in itertools.product(range(-12, 40), (1, 2, 5)):
        step = digit * 10.0**exponent
        if (high - low) / step <= most:
            numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
            return [round(i * step, 12) for i in numbers]


def chart(width, height, series, x_label, y_label, names=None):
    """Series as lines, dots and bars -> an image. Names {x: words} replace the numbers below."""
    image = Image.new("RGB", (width, height), WHITE)
    pen = ImageDraw.Draw(image)

    # What y is, and what the colours are.
    write(image, (0, 0), y_label)
    top = 48
    for one in series:
        if one.label:
            pen.rectangle([0, top, 28, top + 20], one.colour)
            write(image, (40, top - 4), one.label)
            top += 36

    # The part of the plane that is shown. Bars are whole and begin at zero.
    xs = [x for one in series for x in one.xs]
    ys = [y for one in series for y in one.ys]
    bars = [one for one in series if one.style == "bars"]
    left = min(xs)
    right = max(*xs, left + 1)
    room = max(0.12 * (max(ys) - min(ys)), 1e-9)
    low = min(ys) - room
    high = max(ys) + room
    if bars:
        left = round(left) - 0.5
        right = round(max(xs)) + 0.5
        low = 0

    # Where it lies in the image.
    if names is None:
        names = {x: f"{x:g}" for x in ticks(left, right, width // 120) if x == round(x)}
    foot = height - 76 - 34 * max(words.count("\n") for words in names.values())
    x_unit = (width - 152) / (right - left)
    y_unit = (foot - top) / (high - low)

    def place(x, y):
        return 112 + x_unit * (x - left), foot - y_unit * (y - low)

    # Axes, with round numbers or names.
    for y in ticks(low, high, (foot - top) / 80):
        pen.line([place(left, y), place(right, y)], "#DDDDDD", 2)
        write(image, (100, place(left, y)[1]), f"{y:g}", 24, DIM, "rm")
    for x, words in names.items():
        write(image, (place(x, low)[0], foot + 12), words, 24, DIM, "ma", "center")
    pen.line([112, top, 112, foot, width - 40, foot], DIM, 2)
    write(image, (width, height - 4), x_label, 24, DIM, "rd")

    # The bars of one x stand side by side and fill four fifths of its room.
    share = 0.8 / max(1, len(bars))
    for i, one in enumerate(bars):
        for x, y in zip(one.xs, one.ys):
            start, bar_top = place(x - 0.4 + share * i, y)
            end = start + share * x_unit - 2
            pen.rectangle([start, bar_top, end, foot], one.colour)
            number = f"{y:#.3g}"
            if font(22).getlength(number) < end - start + 4:
                write(image, ((start + end) / 2, bar_top - 6), number, 22, INK, "mb")

    # Lines and dots lie over bars. A line of one point is a dot.
    for one in series:
        points = [place(x, y) for x, y in zip(one.xs, one.ys)]
        if one.style == "line":
            pen.line(points, one.colour, 4, "curve")
        if one.style == "dots" or (one.style == "line" and len(points) == 1):
            for point in points:
                pen.circle(point, 9, one.colour, WHITE, 2)
    return image


# ------------------------------------------------------------------------------------------------
# 3. Pictures that need no training

STRATEGIES = {
    "pixel raster": {"image_size": 16, "patch_size": 1, "segments": "patch", "order": "raster"},
    "patch raster": {"segments": "patch", "order": "raster"},
    "patch random": {"segments": "patch"},
    "square 16": {"segments": "square", "hierarchy": (16,)},
    "square 16 -> 4": {"segments": "square", "hierarchy": (16, 4)},
    "blob 11 -> 5": {"segments": "blob", "hierarchy": (11, 5)},
    "scatter 9": {"segments": "scatter", "hierarchy": (9,)},
    "mae": {"segments": "mae"},
}
ORDER_FLAGS = ("image_size", "patch_size", "segments", "hierarchy", "order", "last_rank", "seed")


def with_yours(config):
    """-> STRATEGIES and that of config, of which only what is not the default."""
    name = f"yours: {config.segments} {' -> '.join(map(str, config.hierarchy))}"
    changed = [flag for flag in ORDER_FLAGS if getattr(config, flag) != getattr(Config(), flag)]
    return {**STRATEGIES, name.strip(): {flag: getattr(config, flag) for flag in changed}}


def draw_segments(photo, strategies=STRATEGIES, seed=0):
    """A photo uint8 [H,W,3] and an order of each of the strategies {name: settings}."""
    in_figure = ("pixel raster", "patch raster", "patch random", "square 16", "blob 11 -> 5")
    letters = dict(zip(in_figure, ("(b) ", "(c) ", "(d) ", "(e) ", "(f) ")))
    panels = [("(a) image", enlarge(photo, column(5)))]
    for i, (name, settings) in enumerate(strategies.items()):
        strategy = Config(**settings)
        ranks = sample_ranks(strategy, 1, generator=seeded("cpu", seed, i))[0]
        kind = "pixels" if strategy.patch_size == 1 else "patches"
        size = f"{strategy.grid} x {strategy.grid} {kind}, {ranks.max() + 1} ranks"
        panels.append((f"{letters.get(name, '')}{name}\n{size}", token_map(ranks, column(5))))
    note = """A cell is a token; its number and its colour are its rank. The tokens of one rank form
        a segment: they are predicted together, from those of lower rank. Those of rank 0 are given.
        (The pixel raster is shown for a smaller image: 32 x 32 pixels would have 1024 ranks.)"""
    rows = [panels[:5], panels[5:], [swatch("predicted first ... last", 300)]]
    return sheet("What is predicted when, by strategy (Figure 2)", note, rows)


def arrow(pen, start, end, colour):
    """Draws an arrow from start to shortly before end, both [2] (x, y)."""
    way = end - start
    tip = end - way * (38 / way.norm()).clamp(max=0.5)  # before the disc that marks a segment
    points = [tuple(start.tolist()), tuple(tip.tolist())]
    pen.line(points, WHITE, 14)
    pen.line(points, colour, 8)
    angle = math.degrees(math.atan2(-way[0], -way[1]))
    pen.regular_polygon((*points[1], 18), 3, angle, colour, WHITE)


def traversal(partitions, ranks, width):
    """Partitions and ranks [N] -> a map with arrows from segment to segment, and how often they
    leave a partition."""
    # One of seven pale hues for each partition.
    grid = as_grid(ranks)
    hues = blend(as_grid(partitions) % 7 / 6, HUES[3:]).float()
    image = outline(enlarge(hues.lerp(torch.tensor(255.0), 0.6).byte(), width), grid + 1)

    # The centre of a segment lies inside it, however bent it is: its tokens nearest to the mean.
    centres = []
    for rank in range(grid.max() + 1):
        tokens = (grid == rank).nonzero().flip(1) + 0.5  # [n,2]: x, y
        far = (tokens - tokens.mean(0)).norm(dim=1)
        centres.append(tokens[far < far.min() + 1e-5].mean(0) * width / len(grid))

    # Backwards, so that no arrow covers the head of an earlier one.
    homes = ranks.new_zeros(len(centres))
    homes[ranks] = partitions
    leaves = homes.diff() != 0
    pen = ImageDraw.Draw(image)
    for k in reversed(range(len(leaves))):
        arrow(pen, centres[k], centres[k + 1], RED if leaves[k] else INK)
    for k, centre in enumerate(centres):
        pen.circle(centre.tolist(), 24, WHITE, INK, 2)
        write(image, centre.tolist(), str(k), 28, INK, "mm")
    return image, f"leaves a partition in {leaves.sum()} of {len(leaves)} steps"


def draw_hierarchy(config):
    """Squares and blobs in flat and hierarchical order, and config's segments if in partitions."""
    strategies = {"square": Config(), "blob": Config(segments="blob")}
    if len(config.hierarchy) > 1:
        strategies[config.segments] = config
    rows = []
    for i, (segments, shown) in enumerate(strategies.items()):
        generator = seeded("cpu", config.seed, i)
        levels = randsac.sample_levels(shown, 1, generator=generator)
        row = []
        for used in (levels[:1], levels):
            ranks = randsac.serialize(used, config.order, generator)[0]
            image, leaves = traversal(levels[-1][0], ranks, column(2))
            counts = " -> ".join(map(str, shown.hierarchy[: len(used)]))
            row.append((f"{segments} {counts}\n{leaves}", image))
        rows.append(row)
    note = """A hue is a partition, a number a segment's rank. Arrows show the order of prediction:
        black within a partition, red where it is left. On the left, the order is flat. On the
        right it is hierarchical: each partition is finished before the next is begun."""
    return sheet("Flat and hierarchical serialization (Figure 3)", note, rows)


def some_steps(last, most):
    """-> the steps 1 to last or, where they are more than `most`, only so many of them, evenly."""
    return torch.linspace(1, last, min(last, most)).round().int().tolist()


def draw_order(photo, ranks, predicted=None, most=64):
    """A photo uint8 [H,W,3], its predictions alike, ranks [N] -> frames of a GIF, one a step."""
    grid = as_grid(ranks)
    last = ranks.max().item()
    words = "predicted, each segment from true pixels"
    if predicted is None:
        words = "ranks: when each token is predicted"
        in_numbers = token_map(ranks, len(grid) * (column(2) // len(grid)))
        predicted = pil_to_tensor(in_numbers).movedim(0, -1)
    frames = []
    for step in some_steps(last + 1, most):
        known = enlarge(reveal(photo, grid < step), column(2))
        right = enlarge(reveal(predicted, grid <= step), column(2))
        outline(known, (grid + 1) * (grid >= step), "#E8E8E8")
        for image in (known, right):
            outline(image, grid == step, RED, 6)
        note = f"Step {step} of {last}: the outlined tokens are predicted from all that is known."
        if step > last:
            note = f"After step {last} all tokens are predicted."
        page = sheet("Segment by segment (Figure 1)", note, [[("known", known), (words, right)]])
        frames.append(page.reduce(2))

    # One palette for all frames makes a far smaller file: it has the colours of words and lines,
    # and those of the last frame, where all of the photo and all ranks are seen.
    words_and_lines = [*blend(torch.linspace(0, 1, 8), (INK, WHITE)), *blend([0, 1], (RED, GREY))]
    fixed = torch.stack(words_and_lines).flatten().tolist()
    shown = frames[-1].quantize(256 - 10).getpalette()
    # Pillow compares in steps of 4: below 249, no other colour is nearer to white than white.
    palette = Image.new("P", (1, 1))
    palette.putpalette(fixed + [min(248, value) for value in shown])
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def mask_panels(ranks, width, order, scale=RAMP):
    """Source, target and memory mask of ranks [N], the colours of the ranks along their sides."""
    # Rows and columns that Section 4.1 leaves out: the last segment as it encodes, the first as it
    # is decoded.
    first = ranks == 0
    last = ranks == ranks.max()
    left_out = (last[:, None] | last, first[:, None] | first, first[:, None] | last)  # [N,N] each

    # Cells in the colours of MASK, with a band above and one on the left.
    thick = 1 + len(ranks) // 20
    bands = blend(ranks / max(1, ranks.max()), scale)  # [N,3]
    panels = []
    for i, mask in enumerate(randsac.attention_masks(ranks)):
        kind = torch.where(left_out[i], 2, mask.long())  # as in MASK
        cells = F.pad(blend(kind / 2, MASK.values()), (0, 0, thick, 0, thick, 0), value=255)
        cells[:thick, thick:] = bands
        cells[thick:, :thick] = bands[:, None]
        if len(cells) <= width:  # all cells alike
            width = width - width % len(cells)
        panels.append((f"{('source', 'target', 'memory')[i]} mask\n{order}", enlarge(cells, width)))
    return panels


def draw_masks(ranks):
    """The masks of six tokens, as in Figure 4, and those of ranks [N]."""
    few = torch.tensor([2, 0, 1, 2, 0, 1])
    hues = (GREEN, BLUE, RED)
    top = [("ranks\n6 tokens", token_map(few, column(7), hues))]
    top += mask_panels(few.sort().values, column(7), "serialized", hues)
    top += mask_panels(few, column(7), "raster order", hues)
    rows = [top]
    for order, shown in (("serialized", ranks.sort().values), ("raster order", ranks)):
        panels = mask_panels(shown, column(4), order)
        rows.append([(f"ranks\n{order}", token_map(shown, column(4))), *panels])
    rows.append([swatch(words, 200, (colour, colour)) for words, colour in MASK.items()])
    note = """The token of row i may look at that of column j where the cell is blue. The bands show
        the colours of their ranks. The last segment is left out of the encoder, as nothing comes
        after it, and the first out of the decoder, as nothing comes before it. When tokens are
        serialized (sorted by rank), these are the ends."""
    return sheet("Attention masks: who may look at whom (Figure 4)", note, rows)


# ------------------------------------------------------------------------------------------------
# 4. Pictures of a trained model


@torch.no_grad()
def predict(model, images, ranks):
    """-> predictions as photos [B,H,W,3], squared errors of the tokens [B,N], NaN where given, and
    what they were if zero were predicted."""
    P = model.config.patch_size
    tokens = randsac.patchify(images, P)
    target = model.target(tokens)
    guess = model.predict(images, ranks)
    errors = (guess - target).square().mean(-1)
    zeros = target.square().mean(-1)

    # A normalized patch is shown with its true mean and deviation, as in MAE's demo.
    if model.config.target == "normalized":
        deviation = (tokens.var(-1, keepdim=True) + 1e-6).sqrt()
        guess = guess * deviation + tokens.mean(-1, keepdim=True)
    pixels = torch.where((ranks == 0)[..., None], tokens, guess)
    return photos(randsac.unpatchify(pixels, P)), errors, zeros


def draw_predictions(model, images, ranks, labels):
    """Images float [B,3,H,W], ranks [B,N], a label for each image."""
    predicted, errors, _ = predict(model, images, ranks)
    worst = errors.nan_to_num(0).max().item()
    heats = blend(errors.nan_to_num(0) / max(worst, 1e-9))  # [B,N,3]
    rows = []
    for i, photo in enumerate(photos(images)):
        grid = as_grid(ranks[i])
        last = grid.max().item()
        steps = some_steps(last, 4)

        # What is given, some of the steps, all that they predict, and how far off it is.
        given = reveal(photo, grid == 0)
        row = [(labels[i][:14], photo), ("given", given)]
        for step in steps:
            shown = reveal(predicted[i], grid == step, reveal(photo, grid < step))
            row.append((f"rank {step} of {last}", shown))
        row.append(("all predicted", reveal(predicted[i], grid > 0, given)))
        row.append((f"error {errors[i].nanmean():.2f}", reveal(as_grid(heats[i]), grid > 0)))
        row = [(words, enlarge(cells, column(8))) for words, cells in row]
        for step, (_, image) in zip(steps, row[2:]):
            outline(image, grid == step, RED, 4)
        rows.append(row)
    rows.append([swatch(f"mean squared error of a token: 0 ... {worst:.2f}", 600)])
    note = """The outlined tokens are predicted from the true pixels shown. What is grey is not
        known yet, or in the picture of the error: given."""
    if model.config.target == "normalized":
        note += " Each patch has its true mean and contrast, which the model does not predict."
    return sheet("Predictions, segment by segment (Sections 4 and 5)", note, rows)


@torch.no_grad()
def draw_skips(model):
    """The weights W of Section 4.2."""
    check(model.config.skip, "the model has no skip connections: train one without --no-skip")
    # White is zero. A row and a column for names come before the weights.
    W = model.skip
    scaled = W / W.abs().max().clamp(min=1e-9)
    cells = F.pad(blend((scaled + 1) / 2, (BLUE, WHITE, ORANGE)), (0, 0, 1, 0, 1, 0), value=255)
    labels = [["", *(f"H[{k + 1}]" for k in range(W.shape[1]))]]
    for i, row in enumerate(W.tolist()):
        labels.append([f"Z[{i + 1}]", *(f"{weight:.2f}" for weight in row)])
    image = enlarge(cells, column(1), 56 * len(cells))
    write_in_cells(image, cells, labels)
    note = """Decoder layer l reads Z[l], the sum of the encoder layers' outputs H[k], weighted by
        W[l,k]. Before training, the weight of the last encoder layer was 1 and all others were 0.
        Orange: above zero. Blue: below zero."""
    return sheet("Trainable skip connections (Section 4.2)", note, [[("", image)]])


@torch.no_grad()
def attention_weights(model, image, ranks=None):
    """Image float [3,H,W], ranks [N] -> weights [h,N,N] of each attention as the model predicts: of
    the encoder layers, then of each decoder layer's self- and cross-attention. Without ranks: of
    the encoder layers as it encodes, without a mask."""
    found = []

    def note(attention, inputs, output):
        x, memory, mask = inputs
        q, k, _ = attention.split(x, memory)  # [1,h,N,d] each
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [1,h,N,N]
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        found.append(scores.softmax(-1)[0])

    parts = [part for part in model.modules() if isinstance(part, randsac.Attention)]
    hooks = [part.register_forward_hook(note) for part in parts]
    if ranks is None:
        model.encode(image[None])
    else:
        model.predict(image[None], ranks[None])
    for hook in hooks:
        hook.remove()
    return found


def draw_attention(model, image, ranks, token=None):
    """Image float [3,H,W], ranks [N]: where a token looks, in every head of every layer."""
    if token is None:  # the first of a middle rank: some segments are hidden from it
        token = (ranks == ranks.max() // 2).nonzero()[0].item()
    N = len(ranks)
    L = model.config.depth
    heads = model.config.heads
    check(0 <= token < N, f"--token {token} is not one of the tokens 0 to {N - 1}")

    # What was trained to predict, the encoder as it is probed, and what each of them may look at.
    masked = attention_weights(model, image, ranks)
    free = attention_weights(model, image)
    source, target, memory = randsac.attention_masks(ranks)  # [N,N] each
    kinds = [
        ("encoder in pre-training, masked", masked[:L], source),
        ("encoder in probing, not masked", free, torch.ones_like(source)),
        ("decoder, self-attention: what else is asked for", masked[L::2], target),
        ("decoder, cross-attention: what is known", masked[L + 1 :: 2], memory),
    ]
    if ranks[token] == 0:  # the decoder is never asked for it
        kinds = kinds[:2]

    # A row of maps for each layer, one for each head.
    here = as_grid(torch.arange(N) == token)
    panels = []
    for words, layers, mask in kinds:
        maps = []
        for weights in torch.cat(layers)[:, token]:  # [N]
            cells = reveal(blend(as_grid(weights / weights.max())), as_grid(mask[token]))
            maps.append(outline(enlarge(cells, column(2 * heads)), here, RED, 3))
        panels.append((words, tile(maps, heads)))

    # Above them: which token it is.
    top = [("", enlarge(photos(image[None])[0], 240)), ("", token_map(ranks, 240))]
    for _, picture in top:
        outline(picture, here, RED, 4)
    note = f"""Each map shows how much the outlined token (of rank {ranks[token]}) attends to every
        other: a row of maps for each layer, the first on top, a column for each head. Grey: the
        mask hides it. Each map has a scale of its own."""
    legend = [swatch("weight: 0 ... largest of the map", 400)]
    rows = [row for row in (top, panels[:2], panels[2:], legend) if row]
    return sheet("Where a token looks (Section 4.1)", note, rows)


def draw_loss_by_rank(model, config, images, ranks):
    """Images float [B,3,H,W], ranks [B,N] as config says: the mean error of tokens of each rank."""
    parts = zip(images.split(32), ranks.split(32))
    found = [torch.stack(predict(model, *part)[1:]) for part in parts]
    errors, zeros = torch.cat(found, 1)  # [B,N] each
    steps = list(range(1, ranks.max() + 1))
    losses = [errors[ranks == step].mean().item() for step in steps]
    zero = zeros[ranks > 0].mean().item()
    series = [Series(steps, losses, BLUE, "bars")]
    ends = [0.6, len(steps) + 0.4]
    series.append(Series(ends, [zero, zero], RED, "line", f"predicting zero: {zero:.3g}"))
    note = f"""The mean over {len(images)} images, each in an order of its own. The more is
        known, the lower is the loss."""

    # Partitions of squares begin at the same ranks in all images.
    if config.segments == "square" and len(config.hierarchy) > 1:
        note += """ It jumps where a new partition begins (grey lines): there, few neighbours of a
            segment are known yet, or none."""
        each = config.hierarchy[0] // config.hierarchy[1]
        for step in range(each, len(steps) + 1, each):
            series.append(Series([step - 0.5, step - 0.5], [0, zero], DIM, "line"))
    image = chart(column(1), 760, series, "rank", "mean squared error of a token")
    return sheet("Context helps: loss by rank (Section 3)", note, [[("", image)]])


@torch.no_grad()
def unit_vectors(model, images):
    """Images uint8 [B,3,H,W] -> their features [B,D] and their pixels [B,3SS], of length 1."""
    x = randsac.normalize(images, model.config.image_size)
    return F.normalize(model.encode(x).mean(1), dim=1), F.normalize(x.flatten(1), dim=1)


def draw_neighbours(model, images, labels, others, names, among):
    """Images uint8 [Q,3,H,W] with a label each: which of the others, with names, are the nearest.
    Those that equal an image, such as itself, are left out. `among`: words for the others."""
    features, pixels = unit_vectors(model, images)
    cosines = []
    parts = others.split(max(1, 4096 // model.config.tokens))  # all at once may not fit in memory
    for part in tqdm(parts, "neighbours", unit="part"):
        x, y = unit_vectors(model, part)
        cosines.append(torch.stack([features @ x.T, pixels @ y.T]))
    cosines = torch.cat(cosines, 2)  # [2,Q,n]
    cosines = cosines.masked_fill(cosines[1] > 1 - 1e-5, -torch.inf)
    enough = (cosines[0] > -torch.inf).sum(1).min() >= NEAREST
    check(enough, f"it shows {NEAREST} other training images, and there are {len(others)} in all")

    # Where there are labels, a frame tells the same class.
    labelled = len(set(names)) > 1 and labels[0] in names
    width = column(NEAREST + 2)
    rows = []
    for i, image in enumerate(images):
        tiles = []
        for k in cosines[:, i].topk(NEAREST).indices.flatten().tolist():
            tiles.append(enlarge(others[k].movedim(0, -1), width))
            if labelled and names[k] == labels[i]:
                outline(tiles[-1], torch.ones(1, 1), GREEN, 8)
        large = enlarge(image.movedim(0, -1), 2 * width + GAP)
        words = "nearest by features, and below by raw pixels"
        rows.append([(labels[i][:28], large), (words, tile(tiles, NEAREST))])
    note = f"""The {NEAREST} nearest of {among}, by the cosine between the model's features
        and, below, between raw pixels."""
    if labelled:
        note += " A green frame marks the same class. The model saw no labels."
    return sheet("What the features find alike (Section 5.1)", note, rows)


def probed(row):
    """A row of probes.jsonl -> its protocol, and what was probed."""
    if row["features"] == "pixels":
        return row["protocol"], "raw pixels"
    return row["protocol"], "untrained" if row["random_init"] else "trained"


def place_of(row):
    """A row of probes.jsonl -> on which images it was measured."""
    return row["data_dir"] if row["dataset"] == "folder" else row["dataset"]


def over_steps(rows, key, colour, style, label=""):
    """Rows of metrics.jsonl -> a series of what those have that have this key."""
    points = {row["step"]: row[key] for row in rows if key in row}
    return Series(list(points), list(points.values()), colour, style, label)


def draw_curves(runs):
    """A list of (directory of a run, rows of its metrics.jsonl, rows of its probes.jsonl)."""
    check(len(runs) <= len(HUES), f"{len(runs)} runs do not all have a colour: name fewer")
    losses = []
    for hue, (run, rows, _) in zip(HUES, runs):
        # The first losses are so high that all later ones would look alike.
        late = [row for row in rows if row["step"] > 0.02 * rows[-1]["step"]]
        losses.append(over_steps(late, "loss", hue, "line", str(run)[-100:]))
        losses.append(over_steps(rows, "held_out_loss", hue, "dots"))
    charts = [chart(column(1), 660, losses, "step", "loss, without the first 2 % of the steps")]

    # A chart of the probes on each data set. Each layer's probe has a picture of its own.
    probes = [[row for row in rows if row["protocol"] != "layers"] for _, _, rows in runs]
    for place in sorted({place_of(row) for rows in probes for row in rows}):
        top1 = [
            {probed(row): row["top1"] for row in rows if place_of(row) == place} for rows in probes
        ]
        kinds = sorted(set().union(*top1))
        bars = []
        for hue, values in zip(HUES, top1):
            xs = [kinds.index(kind) for kind in values]
            bars.append(Series(xs, list(values.values()), hue, "bars"))
        names = dict(enumerate("\n".join(kind) for kind in kinds))
        charts.append(chart(column(1), 520, bars, "", f"probes of {place[-90:]}, top-1 %", names))
    note = """Lines: the loss on random crops of training images. Dots: on whole held-out images,
        which may be harder or easier. Untrained: the same encoder with random weights."""
    rows = [[("", image)] for image in charts]
    return sheet("Loss and probes (Sections 5 and 5.1)", note, rows)


def draw_layers(probes):
    """Rows of probes.jsonl: how good the features of each encoder layer are."""
    rows = [row for row in probes if row["protocol"] == "layers"]
    trained = [row for row in rows if not row["random_init"]]
    check(trained, "its layers are not probed yet: use probe.py with --protocol layers")
    last = trained[-1]
    floors = [row for row in rows if row["random_init"] and place_of(row) == place_of(last)]
    note = "Accuracy of classifiers on the frozen features of a layer. The paper probes the last."
    if not floors:
        note += " For that of an untrained encoder, use probe.py --protocol layers --random-init."
    xs = list(range(1, len(last["layers"]) + 1))
    series = []
    for key, name, colour, pale in (
        ("layers", "linear", BLUE, PALE_BLUE),
        ("layers_knn", "kNN", ORANGE, PALE_ORANGE),
    ):
        series.append(Series(xs, last[key], colour, "bars", name))
        if floors:
            series.append(Series(xs, floors[-1][key], pale, "bars", f"{name}, untrained"))
    image = chart(column(1), 760, series, "layer", f"top-1 % on {place_of(last)[-90:]}")
    return sheet("Probes by depth (Section 5.1)", note, [[("", image)]])


# ------------------------------------------------------------------------------------------------
# 5. The explorer: assets/explore.html, filled with orders and with what a model predicts


def flag_words(settings):
    """-> what to type for them, as --hierarchy 16 4."""
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [flag_name(name), *values]
    return words


def data_uri(photo):
    """A photo uint8 [H,W,3] -> a PNG file, at most 160 pixels wide, as an address."""
    image = Image.fromarray(photo.numpy())
    image.thumbnail((160, 160))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def explorer_data(strategies, config, model, name, images, ranks, labels):
    """Strategies {title: settings}; a Config, whose sizes count; a model and its name, or None;
    images float [B,3,H,W], ranks [B,N] and labels, of which four are shown -> what the page is
    filled with."""
    data = {"strategies": [], "image": data_uri(photos(images[:1])[0]), "model": None}
    sizes = ("dim", "depth", "decoder_depth", "patch_size")
    data["size"] = {size: getattr(config, size) for size in sizes}
    for i, (title, settings) in enumerate(strategies.items()):
        strategy = Config(**settings)
        orders = sample_ranks(strategy, 8, generator=seeded("cpu", config.seed, i))
        entry = {"name": title, "flags": " ".join(map(str, flag_words(settings)))}
        entry.update(grid=strategy.grid, levels=strategy.hierarchy, patch_size=strategy.patch_size)
        entry["ranks"] = list(dict.fromkeys(map(tuple, orders.tolist())))  # raster has one order
        data["strategies"].append(entry)

    # What the model predicts, each segment from true pixels.
    if model:
        data["model"] = {"name": name, "images": []}
        predicted, errors, _ = predict(model, images[:4], ranks[:4])
        for i, photo in enumerate(photos(images[:4])):
            numbers = [round(e, 3) if math.isfinite(e) else None for e in errors[i].tolist()]
            entry = {"label": labels[i], "grid": config.grid, "ranks": ranks[i].tolist()}
            entry.update(image=data_uri(photo), predicted=data_uri(predicted[i]), errors=numbers)
            data["model"]["images"].append(entry)
    return data


def fill_page(data):
    """-> explore.html with its data."""
    path = Path(__file__).with_name("assets") / "explore.html"
    check(path.exists(), f"{path} is missing: take it from a fresh copy of the project")
    text = json.dumps(data).replace("<", "\\u003c")  # so no label ends the script
    return path.read_text(encoding="utf-8").replace(">{}</script>", f">{text}</script>")


# ------------------------------------------------------------------------------------------------
# 6. From the command line to pictures

FIGURES = ["segments", "hierarchy", "order", "masks"]  # 1 to 4 of the paper
OF_MODELS = ["predictions", "neighbours", "loss-by-rank", "attention", "skips"]
# What index.html says of each picture, in its order.
CAPTIONS = {
    "explore": "A page to touch: orders, masks and, of a trained model, predictions.",
    "segments": "The strategies of the paper differ only in the rank that each token gets.",
    "hierarchy": "A hierarchical order finishes a partition before it begins the next.",
    "order": "One image, predicted segment by segment.",
    "masks": "The three attention masks are three comparisons of ranks.",
    "predictions": "What the model predicts from the segments that are known.",
    "neighbours": "What the model's features find alike, and what raw pixels do.",
    "loss-by-rank": "The more is known around a token, the better it is predicted.",
    "attention": "Where a token looks, in every head of every layer.",
    "skips": "How much each decoder layer reads from each encoder layer.",
    "curves": "How training went, and what the features are worth.",
    "layers": "What the features of each encoder layer are worth.",
}
PICTURES = list(CAPTIONS)
SHOW_IMAGES = {"segments", "order", "explore", *OF_MODELS} - {"skips"}
ENDINGS = {"order": "gif", "explore": "html"}
SHOWN = 512  # images at most: the first few for pictures, all for loss-by-rank
NEAREST = 6  # neighbours shown
SEARCHED = 5_000  # training images that neighbours are looked for among, at most
INDEX = '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>RandSAC</title>\n'


def read_arguments(arguments):
    """-> the words of the command line, and {flag: value} of the flags that were given."""
    fields = {field.name for field in dataclasses.fields(Config)}
    shown = {*ORDER_FLAGS, "dataset", "data_dir"}
    parser = randsac.make_parser(__doc__, leave_out=fields - shown)
    add = parser.add_argument
    path = randsac.user_path
    pictures = f"{', '.join(PICTURES)}, all; with curves also directories of runs"
    add("pictures", nargs="*", default=[], metavar="PICTURE", help=pictures)
    add("--checkpoint", type=path, metavar="FILE", help="checkpoint.pt of a run")
    add("--image", type=path, metavar="FILE", help="show this image, not held-out ones")
    add("--token", type=int, metavar="I", help="whose attention to show, in raster order from 0")
    add("--out", type=path, metavar="DIR", help="where to (default: figures)")
    flags = vars(parser.parse_intermixed_args(arguments))
    return flags.pop("pictures"), flags


def read_config(flags):
    """-> the model or None, and Config: that of the model, with the flags that were given."""
    given = {name: flags[name] for name in (*ORDER_FLAGS, "dataset", "data_dir") if name in flags}
    if "checkpoint" not in flags:
        return None, Config(**given)
    check("image_size" not in flags, "--image-size is the checkpoint's: leave it out")
    model, trained = randsac.load_model(flags["checkpoint"])
    return model, randsac.with_flags(trained, given)


def choose_images(flags, config, model):
    """-> images float [n,3,S,S], the first ones of different classes, and a label for each."""
    size = config.image_size
    if model is None:  # no model minds: the larger, the nicer
        size = config.grid * math.ceil(128 / config.grid)
    if "image" in flags:
        image = torch.tensor(randsac.decode_image(flags["image"], size))
        return randsac.normalize(image.expand(5, -1, -1, -1), size), [flags["image"].name] * 5

    # A shipped checkpoint has a few images beside it, for a machine without its data set.
    beside = []
    if model and flags.keys().isdisjoint(("dataset", "data_dir")):
        beside = sorted(flags["checkpoint"].parent.glob("images/*.png"), reverse=True)
    if beside and not any(Path(config.data_dir).glob("cifar-10-*")):
        where = f"CIFAR-10 is not in {config.data_dir}/ (--dataset cifar10 downloads it)"
        print(f"{where}: the images in {beside[0].parent}/ are shown")
        images = torch.stack([torch.tensor(randsac.decode_image(path, size)) for path in beside])
        return randsac.normalize(images, size), [path.stem for path in beside]

    if model is None and "dataset" not in flags:
        images, labels, classes = randsac.draw_shapes(12, size, seed=6)
    else:
        images, labels, classes = randsac.load_images(config, train=False)
    if len(images) == 0:
        images, labels, classes = randsac.load_images(config, train=True)
        print(f"{config.data_dir} has no held-out images: training images are shown")

    # In random order, but first one of each class.
    names = [classes[label] for label in labels.tolist()]
    order = torch.randperm(len(names), generator=seeded("cpu", config.seed, 1)).tolist()
    firsts = {names[i]: i for i in reversed(order)}
    order = list(dict.fromkeys([*firsts.values(), *order]))[:SHOWN]
    return randsac.normalize(images[order], size), [names[i] for i in order]


def choose_others(config):
    """-> training images uint8 [n,3,H,W] among which to look for neighbours, their classes, and
    words for them."""
    images, labels, classes = randsac.load_images(config, train=True)
    n = len(images)
    kept = torch.linspace(0, n - 1, min(n, SEARCHED)).long()
    among = f"{len(kept)} training images"
    if n > SEARCHED:
        among += f", evenly spread over all {n}"
    return images[kept], [classes[label] for label in labels[kept].tolist()], among


def read_rows(path):
    """Rows of a .jsonl file, without a last one that is half written. None where it is missing."""
    try:
        return [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as the log of a run: {error}") from error


def read_run(folder):
    """Directory of a run -> rows of its metrics.jsonl, rows of its probes.jsonl if there is one."""
    rows = read_rows(folder / "metrics.jsonl")
    check(rows, f"{folder} has no step logged yet: wait a little, or name another directory")
    probes = folder / "probes.jsonl"
    return rows, read_rows(probes) if probes.exists() else []


def draw(name, model, config, images, labels, ranks, runs, flags):
    """-> the picture of that name: an image, frames of a GIF, or a page of HTML."""
    check(model or name not in OF_MODELS, "it shows what a model does: give its --checkpoint")
    check(runs or name not in ("curves", "layers"), "it shows a run: give the --checkpoint of one")
    strategies = STRATEGIES
    if not flags.keys().isdisjoint(ORDER_FLAGS):
        strategies = with_yours(config)
    if name == "segments":
        return draw_segments(photos(images[:1])[0], strategies, config.seed)
    if name == "hierarchy":
        return draw_hierarchy(config)
    if name == "order":
        predicted = predict(model, images[:1], ranks[:1])[0][0] if model else None
        return draw_order(photos(images[:1])[0], ranks[0], predicted)
    if name == "masks":
        return draw_masks(ranks[0])
    if name == "predictions":
        return draw_predictions(model, images[:5], ranks[:5], labels)
    if name == "neighbours":
        count = len(set(labels[:4]))  # --image gives the same one several times
        asked = photos(images[:count]).movedim(-1, 1)
        return draw_neighbours(model, asked, labels, *choose_others(config))
    if name == "loss-by-rank":
        return draw_loss_by_rank(model, config, images, ranks)
    if name == "attention":
        return draw_attention(model, images[0], ranks[0], flags.get("token"))
    if name == "skips":
        return draw_skips(model)
    if name == "curves":
        return draw_curves([(run, *read_run(run)) for run in runs])
    if name == "layers":
        return draw_layers(read_run(runs[0])[1])
    title = runs[0].resolve().name if model else ""
    return fill_page(explorer_data(strategies, config, model, title, images, ranks, labels))


def save(picture, path):
    """Writes a page of HTML, the frames of a GIF, or an image."""
    with randsac.write_whole(path) as file:
        if path.suffix == ".html":
            file.write(picture.encode())
        elif path.suffix == ".gif":
            times = [500] * (len(picture) - 1) + [2500]  # ms: the end stays longer
            more = {"save_all": True, "append_images": picture[1:], "loop": 0, "duration": times}
            picture[0].save(file, "GIF", **more)
        else:
            picture.save(file, "PNG")
    print(f"wrote {path}")


def main(arguments):
    words, flags = read_arguments(arguments)
    model, config = read_config(flags)
    everything = "all" in words or (not words and "checkpoint" in flags)
    names = [word for word in words if word in PICTURES]
    if everything:
        names = PICTURES
    elif not words:
        names = FIGURES
    runs = [randsac.user_path(word) for word in words if word not in [*PICTURES, "all"]]
    for run in runs:
        known = "curves" in names
        check(known, f"there is no picture {run}: choose from {', '.join(PICTURES)}, all")
    if model:
        runs.insert(0, flags["checkpoint"].parent)

    # What the pictures show. Pictures of runs, masks or weights need no images, and load none.
    images = None
    labels = None
    ranks = sample_ranks(config, SHOWN, generator=seeded("cpu", config.seed))
    if not SHOW_IMAGES.isdisjoint(names):
        images, labels = choose_images(flags, config, model)
        ranks = ranks[: len(images)]

    # With "all", what cannot be drawn is left out.
    out = flags.get("out", Path("figures"))
    out.mkdir(parents=True, exist_ok=True)
    index = INDEX
    for name in names:
        path = out / f"{name}.{ENDINGS.get(name, 'png')}"
        try:
            picture = draw(name, model, config, images, labels, ranks, runs, flags)
        except UserError as error:
            check(everything, f"cannot draw {name}: {error}")
            print(f"skipped {name}: {error}")
            continue
        save(picture, path)
        if name == "explore":
            index += f'<p><a href="{path.name}">{CAPTIONS[name]}</a></p>\n'
        else:
            index += (
                f'<p><img src="{path.name}" width="800" alt="{name}"><br>{CAPTIONS[name]}</p>\n'
            )

    if everything:
        save(index, out / "index.html")
        print(f"next: open {out / 'index.html'} in a browser")


if __name__ == "__main__":
    randsac.run_command(main)
