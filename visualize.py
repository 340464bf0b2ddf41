"""Pictures of RandSAC: the orders and masks of any strategy, and what a trained model does.

    python visualize.py                                                  # Figures 1 to 4
    python visualize.py segments order --segments blob --hierarchy 11 5  # flags of randsac.py
    python visualize.py explore                                          # a page to try them on
    python visualize.py all --checkpoint runs/NAME/checkpoint.pt         # all, and index.html
    python visualize.py curves runs/A runs/B                             # runs side by side

With --checkpoint, strategy flags default to those of the run; --segments begins anew. A draw_...
function returns a PIL image, which a notebook can show (draw_order: the frames of a GIF).
"""

import base64
import dataclasses
import functools
import io
import itertools
import json
import math
import textwrap
import unicodedata
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

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


def shorten(words, most):
    """A long name loses its middle."""
    if len(words) > most:
        half = (most - 3) // 2
        words = f"{words[:half]}...{words[-half:]}"
    return words


def write(image, place, words, size=24, colour=INK, anchor="la", align="left", halo=0):
    """The font has only ASCII: an ä is written as a, and what has no such likeness as ?."""
    parts = unicodedata.normalize("NFKD", words)
    letters = "".join(letter for letter in parts if not unicodedata.combining(letter))
    letters = letters.encode("ascii", "replace").decode()
    edge = {"stroke_width": halo, "stroke_fill": WHITE}
    ImageDraw.Draw(image).text(place, letters, colour, font(size), anchor, 10, align, **edge)


def fitting_size(words, width, most=24, least=16):
    """-> the largest font size in which all words fit, or 0."""
    lines = "\n".join(words).split("\n")
    for size in range(most, least - 1, -1):
        if all(font(size).getlength(line) <= width for line in lines):
            return size
    return 0


def write_in_cells(image, cells, labels):
    """Writes labels [R][C] into the cells uint8 [R,C,3] of an image, if they fit."""
    h = image.height / len(labels)
    w = image.width / len(labels[0])
    size = fitting_size(itertools.chain(*labels), 0.9 * w, most=min(30, int(0.55 * h)))
    dark = cells.float() @ torch.tensor([0.3, 0.59, 0.11]) < 110  # [R,C]
    for r, c in itertools.product(range(len(labels)), range(len(labels[0]))):
        if size > 0:
            ink = WHITE if dark[r, c] else INK
            write(image, ((c + 0.5) * w, (r + 0.5) * h), labels[r][c], size, ink, "mm")


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
    note = textwrap.fill(" ".join(note.split()), 120)
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


def write_legend(image, y_label, series):
    """What y is, and what the colours are -> where the room below begins."""
    write(image, (0, 0), y_label)
    x = 60 + font(24).getlength(y_label)
    y = 0
    for one in series:
        if not one.label:
            continue
        width = 84 + font(24).getlength(one.label)
        if x + width > image.width:
            x = 0
            y += 40
        ImageDraw.Draw(image).rectangle([x, y + 4, x + 28, y + 24], one.colour)
        write(image, (x + 40, y), one.label)
        x += width
    return y + 48


def draw_series(image, series, place):
    """Draws bars, lines and dots where place(x, y) says."""
    pen = ImageDraw.Draw(image)
    bars = [one for one in series if one.style == "bars"]

    # The bars of one x stand side by side and fill four fifths of its room.
    share = 0.8 / max(1, len(bars))
    width = place(share, 0)[0] - place(0, 0)[0]
    numbers = {}
    for i, one in enumerate(bars):
        for x, y in zip(one.xs, one.ys):
            left, top = place(x - 0.4 + share * i, y)
            pen.rectangle([left, top, left + width - 2, place(x, 0)[1]], one.colour)
            numbers[left + width / 2, top - 6] = f"{y:#.3g}".rstrip(".")

    # Lines and dots lie over bars. A line of one point is a dot.
    for one in series:
        points = [place(x, y) for x, y in zip(one.xs, one.ys)]
        if one.style == "line":
            pen.line(points, one.colour, 4, "curve")
        if one.style == "dots" or (one.style == "line" and len(points) == 1):
            for x, y in points:
                pen.ellipse([x - 9, y - 9, x + 9, y + 9], one.colour, WHITE, 2)

    # Numbers over all bars, or over none where two could touch.
    size = fitting_size(numbers.values(), width - 8)
    if size > 0:
        for where, words in numbers.items():
            write(image, where, words, size, anchor="mb", halo=4)


def chart(width, height, series, x_label, y_label, names=None):
    """Series as lines, dots and bars -> an image. Names {x: words} replace the numbers below."""
    image = Image.new("RGB", (width, height), WHITE)
    pen = ImageDraw.Draw(image)

    # The part of the plane that is shown. Bars are whole and begin at zero.
    xs = [x for one in series for x in one.xs]
    ys = [y for one in series for y in one.ys]
    left = min(xs)
    right = max(*xs, left + 1)
    room = 0.12 * (max(ys) - min(ys))
    if room == 0:
        room = 0.1
    low = min(ys) - room
    high = max(ys) + room
    if any(one.style == "bars" for one in series):
        left = round(left) - 0.5
        right = round(max(xs)) + 0.5
        low = 0

    # Where it lies in the image.
    top = write_legend(image, y_label, series)
    if names is None:
        names = {x: f"{x:g}" for x in ticks(left, right, width // 120) if x == round(x)}
    foot = height - 76 - 37 * max(words.count("\n") for words in names.values())
    x_unit = (width - 152) / (right - left)
    y_unit = (foot - top) / (high - low)

    def place(x, y):
        return 112 + x_unit * (x - left), foot - y_unit * (y - low)

    # Axes, with round numbers or names.
    for y in ticks(low, high, (foot - top) / 80):
        pen.line([place(left, y), place(right, y)], "#DDDDDD", 2)
        write(image, (100, place(left, y)[1]), f"{y:g}", 24, DIM, "rm")
    size = fitting_size(names.values(), 0.85 * (width - 152) / len(names), least=10)
    for x, words in names.items():
        write(image, (place(x, low)[0], foot + 12), words, max(10, size), DIM, "ma", "center")
    pen.line([112, top, 112, foot, width - 40, foot], DIM, 2)
    write(image, (width, height - 4), x_label, 24, DIM, "rd")
    draw_series(image, series, place)
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


def draw_segments(photo, config):
    """A photo uint8 [H,W,3], and an order of every strategy, yours (config) last."""
    in_figure = ("pixel raster", "patch raster", "patch random", "square 16", "blob 11 -> 5")
    letters = dict(zip(in_figure, ("(b) ", "(c) ", "(d) ", "(e) ", "(f) ")))
    panels = [("(a) image", enlarge(photo, column(5)))]
    for i, (name, settings) in enumerate(with_yours(config).items()):
        generator = seeded("cpu", config.seed, i)
        ranks = sample_ranks(Config(**settings), 1, generator=generator)[0]
        words = f"{letters.get(name, '')}{name}\n{len(ranks)} tokens, {ranks.max() + 1} ranks"
        panels.append((words, token_map(ranks, column(5))))
    note = """A cell is a token, its number and colour are its rank. Tokens of one rank form a
        segment: they are predicted together, from those of lower rank. Rank 0 is given. Scatter:
        the control of Table 5. Yours: as your flags say."""
    rows = [panels[:5], panels[5:], [swatch("predicted first ... last", 300)]]
    return sheet("What is predicted when, by strategy (Figure 2)", note, rows)


def arrow(image, start, end, colour, edge):
    """From start to shortly before end, both [2] (x, y), bowed to pass by what lies between."""
    # The curve ends before the disc that marks a segment.
    way = end - start
    gap = (34 / way.norm()).clamp(max=0.3)
    t = torch.linspace(0, 1, 50)[:, None] * (1 - gap)
    bow = way.flip(0) * torch.tensor([-0.5, 0.5])  # across the way
    curve = start + t * way + t * (1 - t) * bow  # [50,2]

    # Its head looks along its last piece.
    points = [tuple(point) for point in curve.tolist()]
    pen = ImageDraw.Draw(image)
    pen.line(points, edge, 9, "curve")
    pen.line(points, colour, 4, "curve")
    back = curve[-2] - curve[-1]
    angle = math.degrees(math.atan2(back[0], back[1]))
    pen.regular_polygon((*points[-1], 13), 3, angle, colour, edge, 2)


def traversal(partitions, ranks, width):
    """Partitions and ranks [N] -> a map with arrows from segment to segment, and how often they
    leave a partition."""
    # One of seven hues for each partition, lighter for later segments.
    grid = as_grid(ranks)
    hues = blend(as_grid(partitions) % 7 / 6, HUES[3:]).float()
    late = grid[..., None] / max(1, grid.max())
    cells = hues.lerp(torch.tensor(255.0), 0.65 * late).byte()
    image = outline(enlarge(cells, width), grid + 1)

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
    for k in reversed(range(len(leaves))):
        colours = (WHITE, INK) if leaves[k] else (INK, WHITE)
        arrow(image, centres[k], centres[k + 1], *colours)
    for k, centre in enumerate(centres):
        x, y = centre.tolist()
        ImageDraw.Draw(image).ellipse([x - 22, y - 22, x + 22, y + 22], WHITE, INK, 2)
        write(image, (x, y), str(k), 24, INK, "mm")
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
    note = """Hue: partition. Light: late. Arrows: order of prediction, white where they leave a
        partition. Left: flat. Right: hierarchical, each partition is done before it is left."""
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
    for step in some_steps(last + 1, most):  # in the end all is given
        given = enlarge(reveal(photo, grid < step), column(2))
        right = enlarge(reveal(predicted, grid <= step), column(2))
        outline(given, (grid + 1) * (grid >= step), "#E8E8E8")
        for image in (given, right):
            outline(image, grid == step, RED, 6)
        note = f"Step {min(step, last)} of {last}. Outlined: predicted from all that is given."
        page = sheet("Segment by segment (Figure 1)", note, [[("given", given), (words, right)]])
        frames.append(page.reduce(2))

    # One palette for all makes a far smaller file. Halfway all colours are there.
    palette = frames[(len(frames) - 1) // 2].quantize()
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
    note = """Row i may look at column j where the cell is blue. Bands: colours of the ranks. Left
        out are the last segment in the encoder, as nothing comes after it, and the first in the
        decoder, as nothing comes before it. Sorted by rank (serialized) these are the ends."""
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
        row = [(shorten(labels[i], 14), photo), ("given", given)]
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
    note = """Outlined: predicted, from the true pixels shown. Grey: unknown; in the error: given.
        Normalized patches have their true mean and deviation, which the model does not predict."""
    return sheet("Predictions, segment by segment (Sections 4 and 5)", note, rows)


@torch.no_grad()
def draw_skips(model):
    """The weights W of Section 4.2."""
    check(model.config.skip, "the model has no skip connections: train one without --no-skip")
    W = model.skip
    rows = []
    for words, values in (("W", W), ("W less its start", W - randsac.RandSAC(model.config).skip)):
        # White is zero. A row and a column for names come before the weights.
        scaled = values / values.abs().max().clamp(min=1e-9)
        cells = F.pad(blend((scaled + 1) / 2, (BLUE, WHITE, ORANGE)), (0, 0, 1, 0, 1, 0), value=255)
        labels = [["", *(f"H[{k + 1}]" for k in range(W.shape[1]))]]
        for i, row in enumerate(values.tolist()):
            labels.append([f"Z[{i + 1}]", *(f"{value:.2f}" for value in row)])
        image = enlarge(cells, column(1), 56 * len(cells))
        write_in_cells(image, cells, labels)
        rows.append([(words, image)])
    note = "Decoder layer l reads Z[l], the sum over k of W[l,k] H[k]. Blue: below zero."
    return sheet("Trainable skip connections (Section 4.2)", note, rows)


@torch.no_grad()
def attention_weights(model, image, mask):
    """Image float [3,H,W], mask [N,N] -> weights [L,h,N,N] of all heads of all encoder layers."""
    grid = model.config.grid
    tokens = randsac.patchify(image[None], model.config.patch_size)
    x = model.embed(tokens) + randsac.positions(grid, grid, model.config.dim)
    weights = []
    for layer in model.encoder:
        y = layer.norm_attention(x)
        q, k, _ = layer.attention.split(y, y)  # [1,h,N,d] each
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [1,h,N,N]
        weights.append(scores.masked_fill(~mask, -torch.inf).softmax(-1))
        x = layer(x, mask)
    return torch.cat(weights)


def draw_attention(model, image, ranks, token=None):
    """Image float [3,H,W], ranks [N]: where a token looks, in every head of every encoder layer."""
    if token is None:  # the first of a middle rank: some segments are hidden from it
        token = (ranks == ranks.max() // 2).nonzero()[0].item()
    N = len(ranks)
    heads = model.config.heads
    check(0 <= token < N, f"--token {token} is not one of the tokens 0 to {N - 1}")
    check(heads <= 32, f"{heads} heads do not fit on a page of {WIDTH} pixels")

    # A map of each head and layer, with the mask and without it.
    here = as_grid(torch.arange(N) == token)
    source = randsac.attention_masks(ranks)[0]  # [N,N]
    everything = torch.ones_like(source)
    panels = []
    for words, mask in (("masked: pre-training", source), ("not masked: probing", everything)):
        maps = []
        for weights in attention_weights(model, image, mask)[:, :, token].flatten(0, 1):  # [N]
            cells = reveal(blend(as_grid(weights / weights.max())), as_grid(mask[token]))
            maps.append(pil_to_tensor(outline(enlarge(cells, column(2 * heads)), here, RED, 3)))
        tiles = to_pil_image(make_grid(maps, heads, GAP, pad_value=255))
        panels.append((words, tiles.crop((GAP, GAP, tiles.width - GAP, tiles.height))))

    # Above them: which token it is.
    top = [("", enlarge(photos(image[None])[0], 240)), ("", token_map(ranks, 240))]
    for _, picture in top:
        outline(picture, here, RED, 4)
    note = f"""The outlined token (rank {ranks[token]}): a row for each encoder layer, the first on
        top, a column for each head. Left, later segments are hidden (grey). A scale per map."""
    rows = [top, panels, [swatch("weight: 0 ... largest of the map", 400)]]
    return sheet("Where a token looks (Section 4.1)", note, rows)


def draw_loss_by_rank(model, images, ranks):
    """Images float [B,3,H,W], ranks [B,N]: the mean error of the tokens of each rank."""
    _, errors, zeros = predict(model, images, ranks)  # [B,N]
    steps = list(range(1, ranks.max() + 1))
    losses = [errors[ranks == step].mean().item() for step in steps]
    zero = zeros[ranks > 0].mean().item()
    ends = [0.6, len(steps) + 0.4]
    line = Series(ends, [zero, zero], RED, "line", f"predicting zero: {zero:.3g}")
    series = [Series(steps, losses, BLUE, "bars"), line]
    image = chart(column(1), 760, series, "rank", "mean squared error")
    note = f"Mean over {len(images)} images and orders. The higher the rank, the more is given."
    return sheet("Context helps: loss by rank (Section 3)", note, [[("", image)]])


def probe_name(row):
    """A row of probes.jsonl -> protocol, what was probed, on which images."""
    what = "random weights" if row["random_init"] else row["features"]
    where = row["data_dir"] if row["dataset"] == "folder" else row["dataset"]
    return row["protocol"], what, where


def over_steps(rows, key, colour, style, label=""):
    """Rows of metrics.jsonl -> a series of what those have that have this key."""
    points = {row["step"]: row[key] for row in rows if key in row}
    return Series(list(points), list(points.values()), colour, style, label)


def draw_curves(runs):
    """A list of (directory of a run, rows of its metrics.jsonl, rows of its probes.jsonl)."""
    check(len(runs) <= len(HUES), f"{len(runs)} runs do not all have a colour: name fewer")
    losses = []
    rates = []
    bars = []
    probed = sorted({probe_name(row) for _, _, probes in runs for row in probes})
    for hue, (run, rows, probes) in zip(HUES, runs):
        # The first losses are so high that all later ones would look alike.
        late = [row for row in rows if row["step"] > 0.02 * rows[-1]["step"]]
        losses.append(over_steps(late, "loss", hue, "line", shorten(str(run), 60)))
        losses.append(over_steps(rows, "held_out_loss", hue, "dots"))
        rates.append(over_steps(rows, "lr", hue, "line"))

        # Of probes of one kind the last counts.
        top1 = {probed.index(probe_name(row)): row["top1"] for row in probes}
        bars.append(Series(list(top1), list(top1.values()), hue, "bars"))
    charts = [chart(column(1), 660, losses, "step", "loss, from 2 % of the steps on")]
    charts.append(chart(column(1), 400, rates, "step", "learning rate"))
    if probed:
        names = ["\n".join(shorten(word, 18) for word in kind) for kind in probed]
        charts.append(chart(column(1), 560, bars, "", "probe, top-1 %", dict(enumerate(names))))
    note = "Lines: crops of training images. Dots: whole held-out ones, maybe harder or easier."
    rows = [[("", image)] for image in charts]
    return sheet("Loss, learning rate and probes (Section 5)", note, rows)


def draw_layers(probes):
    """Rows of probes.jsonl: how good the features of each encoder layer are."""
    found = [row for row in probes if row["protocol"] == "layers"]
    check(found, "its layers are not probed yet: use probe.py with --protocol layers")
    series = []
    for key, label, hue in (("layers", "linear", BLUE), ("layers_knn", "kNN", ORANGE)):
        if key in found[-1]:
            layers = list(range(1, len(found[-1][key]) + 1))
            series.append(Series(layers, found[-1][key], hue, "bars", label))
    image = chart(column(1), 700, series, "layer", "top-1 %")
    note = "Accuracy of classifiers on the frozen features of a layer. The paper probes the last."
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
OF_MODELS = ["predictions", "skips", "attention", "loss-by-rank"]
PICTURES = [*FIGURES, *OF_MODELS, "curves", "layers", "explore"]  # in the order of index.html
SHOW_IMAGES = {"segments", "order", "predictions", "attention", "loss-by-rank", "explore"}
SHOW_ORDERS = SHOW_IMAGES | {"hierarchy", "masks"}
# Which pictures a flag changes: beside others alone it is refused.
ACTS = dict.fromkeys(ORDER_FLAGS, SHOW_ORDERS)
ACTS.update(dict.fromkeys(("image", "dataset", "data_dir"), SHOW_IMAGES))
ACTS.update(last_rank=SHOW_ORDERS - {"hierarchy"}, token={"attention"})
ENDINGS = {"order": "gif", "explore": "html"}
SHOWN = 128  # images at most: the first few for pictures, all for loss-by-rank
INDEX = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>RandSAC</title>
<style>body { max-width: 50em; margin: auto; font-family: sans-serif } img { width: 100% }</style>
"""


def read_arguments(arguments):
    """-> the words of the command line, and {flag: value} of the flags that were given."""
    fields = {field.name for field in dataclasses.fields(Config)}
    parser = randsac.make_parser(__doc__, leave_out=fields - ACTS.keys())
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
    model = None
    settings = {}
    if "checkpoint" in flags:
        fixed = {"image_size", "patch_size"} & flags.keys()
        check(not fixed, "--image-size and --patch-size are the checkpoint's: leave them out")
        model, trained = randsac.load_model(flags["checkpoint"])
        settings = dataclasses.asdict(trained)
        if "segments" in flags:  # another strategy
            for name in ("hierarchy", "order", "last_rank"):
                settings.pop(name)
        if flags.get("dataset", trained.dataset) != trained.dataset:  # in another folder
            settings.pop("data_dir")

    # What is given on the command line comes before what the run had.
    for name in (*ORDER_FLAGS, "dataset", "data_dir"):
        if name in flags:
            settings[name] = flags[name]
    return model, Config(**settings)


def choose_pictures(words, flags, config):
    """-> names of pictures, directories of runs, and whether all that can be drawn are wanted."""
    everything = "all" in words or (not words and "checkpoint" in flags)
    names = [word for word in words if word in PICTURES]
    if everything:
        names = PICTURES
    elif not words:
        names = FIGURES
    runs = [randsac.user_path(word) for word in words if word not in [*PICTURES, "all"]]
    if runs and "curves" not in names:
        raise UserError(f"there is no picture {runs[0]}: choose from {', '.join(PICTURES)}, all")
    if "checkpoint" in flags:
        runs = [flags["checkpoint"].parent, *runs]

    # Every flag changes one of the pictures, or is refused.
    for flag in flags.keys() & ACTS.keys():
        acts = not ACTS[flag].isdisjoint(names)
        check(acts, f"{flag_name(flag)} changes nothing in {', '.join(names)}: leave it out")
    flat = len(config.hierarchy) < 2 and ("segments" in flags or "hierarchy" in flags)
    wanted = "give --hierarchy two counts, such as 16 4"
    check(not flat or names != ["hierarchy"], f"hierarchy shows segments in partitions: {wanted}")
    return names, runs, everything


def choose_images(flags, config, model):
    """-> images float [n,3,S,S], the first ones of different classes, and a label for each."""
    size = config.image_size
    if model is None:  # no model minds: the larger, the nicer
        size = config.grid * math.ceil(128 / config.grid)
    if "image" in flags:
        alone = "dataset" not in flags and "data_dir" not in flags
        check(alone, "--image takes the place of a data set: leave out --dataset and --data-dir")
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
    order = [*firsts.values(), *order][:SHOWN]
    return randsac.normalize(images[order], size), [names[i] for i in order]


def read_rows(path, numbers, words=()):
    """Rows of a .jsonl file that hold these numbers and words, without a last one, half written."""
    try:
        rows = [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()]
        for row in rows:
            values = [row[key] for key in numbers] + [row.get("held_out_loss", 0)]
            values += row.get("layers", []) + row.get("layers_knn", [])
            check(math.isfinite(sum(values)), f"its numbers are {values}")
            check(row.keys() >= set(words), f"a row has not all of {', '.join(words)}")
        check(rows, "no row is written yet")
        return rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path} is not the log of a run ({error}): name another directory"
        raise UserError(message) from error


def read_run(folder):
    """Directory of a run -> rows of its metrics.jsonl, rows of its probes.jsonl if there is one."""
    rows = read_rows(folder / "metrics.jsonl", ("step", "loss", "lr"))
    if not (folder / "probes.jsonl").exists():
        return rows, []
    words = ("protocol", "features", "random_init", "dataset", "data_dir")
    return rows, read_rows(folder / "probes.jsonl", ("top1",), words)


def draw(name, model, config, images, labels, ranks, runs, flags):
    """-> the picture of that name: an image, frames of a GIF, or a page of HTML."""
    check(model or name not in OF_MODELS, "it shows what a model does: give its --checkpoint")
    check(runs or name not in ("curves", "layers"), "it shows a run: give the --checkpoint of one")
    if name == "segments":
        return draw_segments(photos(images[:1])[0], config)
    if name == "hierarchy":
        return draw_hierarchy(config)
    if name == "order":
        predicted = predict(model, images[:1], ranks[:1])[0][0] if model else None
        return draw_order(photos(images[:1])[0], ranks[0], predicted)
    if name == "masks":
        return draw_masks(ranks[0])
    if name == "predictions":
        return draw_predictions(model, images[:5], ranks[:5], labels)
    if name == "skips":
        return draw_skips(model)
    if name == "attention":
        return draw_attention(model, images[0], ranks[0], flags.get("token"))
    if name == "loss-by-rank":
        return draw_loss_by_rank(model, images, ranks[: len(images)])
    if name == "curves":
        return draw_curves([(run, *read_run(run)) for run in runs])
    if name == "layers":
        return draw_layers(read_run(runs[0])[1])
    strategies = STRATEGIES
    if not flags.keys().isdisjoint(ORDER_FLAGS):
        strategies = with_yours(config)
    title = runs[0].resolve().name if model else ""
    return fill_page(explorer_data(strategies, config, model, title, images, ranks, labels))


def save(picture, path):
    """Writes a page of HTML, the frames of a GIF, or an image."""
    if path.suffix == ".html":
        randsac.write_whole(path, lambda file: file.write(picture.encode()))
    elif path.suffix == ".gif":
        times = [500] * (len(picture) - 1) + [2500]  # ms: the end stays longer
        more = {"save_all": True, "append_images": picture[1:], "loop": 0, "duration": times}
        randsac.write_whole(path, lambda file: picture[0].save(file, "GIF", **more))
    else:
        randsac.write_whole(path, lambda file: picture.save(file, "PNG"))
    print(f"wrote {path}")


def main(arguments):
    words, flags = read_arguments(arguments)
    model, config = read_config(flags)
    names, runs, everything = choose_pictures(words, flags, config)

    # What the pictures show. Pictures of runs, masks or weights need no images, and load none.
    images = None
    labels = None
    if not SHOW_IMAGES.isdisjoint(names):
        images, labels = choose_images(flags, config, model)
    ranks = sample_ranks(config, SHOWN, generator=seeded("cpu", config.seed))

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
            index += f'<p><a href="{path.name}">Orders and masks, to play with</a></p>\n'
        else:
            index += f'<img src="{path.name}" alt="{name}">\n'

    if everything:
        save(index, out / "index.html")
        print(f"next: open {out / 'index.html'} in a browser")
    elif "explore" in names:
        print(f"next: open {out / 'explore.html'} in a browser")
    else:
        following = "all" if model else "explore"
        print("next:", randsac.command_line("visualize.py", following, *flag_words(flags)))


if __name__ == "__main__":
    randsac.run_command(main)
