"""Pictures of RandSAC: the orders and masks of any strategy, and what a trained model does.

    python visualize.py                                                  # Figures 1 to 4
    python visualize.py segments order --segments blob --hierarchy 11 5  # flags of randsac.py
    python visualize.py explore                                          # a page to try them on
    python visualize.py all --checkpoint runs/NAME/checkpoint.pt         # all, and index.html
    python visualize.py curves runs/A runs/B                             # runs side by side

With --checkpoint, the flags that are not given are those of the run; with another --segments, its
other strategy flags begin anew. A flag that has nothing to do with a picture does not change it.
In a notebook, draw_masks(Shown({"segments": "blob"})) is an image, and the others are alike.
"""

import base64
import collections
import dataclasses
import functools
import io
import itertools
import json
import math
import re
import textwrap
from pathlib import Path

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
WHITE = "#FFFFFF"
# Okabe and Ito's colours, which colour-blind eyes can tell apart, and more.
BLUE = "#0072B2"
RED = "#D55E00"
ORANGE = "#E69F00"
GREEN = "#009E73"
HUES = (BLUE, RED, INK, ORANGE, "#56B4E9", GREEN, "#8C510A", "#882255", "#CC79A7", "#999933")
RAMP = ("#440154", "#46327E", "#365C8D", "#277F8E", "#1FA187", "#4AC16D", "#A0DA39", "#FDE725")
MASK = {"may not look": "#F4F4F4", "may look": BLUE, "left out": "#BDBDBD"}
GREY_PIXEL = torch.tensor([200, 200, 200], dtype=torch.uint8)

font = functools.cache(ImageFont.load_default)  # by size

# ------------------------------------------------------------------------------------------------
# 1. Cells, words, pages and charts


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


def enlarge(cells, width):
    """Cells uint8 [R,C,3] of a photo, a map or a mask -> an image of them as squares."""
    height = width * cells.shape[0] // cells.shape[1]
    return Image.fromarray(cells.numpy()).resize((width, height), Image.NEAREST)


def outline(image, ids, colour=WHITE, width=1):
    """Draws lines inside of cells [R,C], where those of another id begin. Id 0 has none."""
    large = F.interpolate(ids[None, None].float(), image.size[::-1])[0, 0]  # [H,W]
    H, W = large.shape

    # A pixel lies on a line where one of its eight neighbours, `width` away, has another id.
    around = F.pad(large, [width] * 4)
    edge = torch.zeros(H, W, dtype=torch.bool)
    for y, x in itertools.product((0, width, 2 * width), repeat=2):
        edge |= around[y : y + H, x : x + W] != large
    image.paste(colour, mask=to_pil_image(255 * (edge & (large > 0)).byte()))
    return image


def tile(images, columns):
    """Images of one size -> one image of them, row by row."""
    tiles = make_grid([pil_to_tensor(image) for image in images], columns, GAP, pad_value=255)
    return to_pil_image(tiles[:, GAP:-GAP, GAP:-GAP])


def write(image, place, words, size=24, colour=INK, anchor="la", align="left"):
    ImageDraw.Draw(image).text(place, words, colour, font(size), anchor, 10, align)


def numbered(cells, width, labels):
    """Cells uint8 [R,C,3] -> an image with their labels [R][C] in them, where these fit."""
    image = enlarge(cells, width)
    unit = width / len(labels[0])
    longest = max(len(words) for row in labels for words in row)
    dark = cells.float() @ torch.tensor([0.3, 0.59, 0.11]) < 110  # [R,C]
    for r, row in enumerate(labels):
        for c, words in enumerate(row):
            ink = WHITE if dark[r, c] else INK
            if unit > 13 * longest:
                place = (unit * (c + 0.5), unit * (r + 0.5))
                write(image, place, words, 22, ink, "mm")
    return image


def token_map(ranks, width, scale=RAMP):
    """Ranks [N] as a grid of tokens, coloured and numbered by rank."""
    grid = as_grid(ranks)
    cells = blend(grid / max(1, grid.max()), scale)
    labels = [[str(rank) for rank in row] for row in grid.tolist()]
    return outline(numbered(cells, width, labels), grid + 1)


def swatch(words, scale=RAMP):
    """-> (words, image): what colours mean."""
    return words, enlarge(blend(torch.linspace(0, 1, 10), scale)[None], 300)


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


def ticks(low, high, most):
    """-> the round numbers from low to high, about `most` of them."""
    for exponent, digit in itertools.product(range(-12, 40), (1, 2, 5)):
        step = digit * 10.0**exponent
        if (high - low) / step <= most:
            numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
            return [round(i * step, 12) for i in numbers]


def chart(height, series, x_label, y_label, names=None, marks=()):
    """Series (style, points {x: y}, colour, label) -> an image. Styles: lines, dots, and bars,
    which stand side by side. Names {x: words} replace the numbers below. Marks: vertical lines."""
    image = Image.new("RGB", (column(1), height), WHITE)
    pen = ImageDraw.Draw(image)

    # What y is, and what the colours are.
    write(image, (0, 0), y_label)
    top = 48
    for _, _, colour, label in series:
        if label:
            pen.rectangle([0, top, 28, top + 20], colour)
            write(image, (40, top - 4), label)
            top += 36

    # The part of the plane that is shown. Bars are whole and begin at zero.
    xs = [x for _, points, _, _ in series for x in points]
    ys = [y for _, points, _, _ in series for y in points.values()]
    bars = [one for one in series if one[0] == "bars"]
    left = min(xs) - 0.5
    right = max(xs) + 0.5
    low = 0 if bars else min(ys)
    high = max(*ys, low + 1e-9)

    # Where it lies in the image, with room for words on all sides.
    if names is None:
        names = {x: f"{x:g}" for x in ticks(left, right, 12) if x == round(x)}
    foot = height - 76 - 34 * max(words.count("\n") for words in names.values())
    x_unit = (image.width - 152) / (right - left)
    y_unit = (foot - top - 40) / (high - low)

    def place(x, y):
        return 112 + x_unit * (x - left), foot - y_unit * (y - low)

    # Axes, with round numbers or names.
    for y in ticks(low, high, 6):
        pen.line([place(left, y), place(right, y)], "#DDDDDD", 2)
        write(image, place(left - 12 / x_unit, y), f"{y:g}", 24, DIM, "rm")
    for x, words in names.items():
        write(image, place(x, low - 12 / y_unit), words, 24, DIM, "ma", "center")
    write(image, (image.width, height - 4), x_label, 24, DIM, "rd")

    # The bars of one x fill four fifths of its room. Lines and dots lie over them.
    share = 0.8 / max(1, len(bars))
    for i, (_, points, colour, _) in enumerate(bars):
        for x, y in points.items():
            start = x - 0.4 + share * i
            pen.rectangle([place(start, y), place(start + 0.96 * share, 0)], colour)
            if share * x_unit > 60:  # as wide as a number
                write(image, place(start + 0.48 * share, y), f"{y:#.3g}", 22, INK, "md")
    for x in marks:
        pen.line([place(x, low), place(x, high)], DIM, 4)
    for style, points, colour, _ in series:
        places = [place(x, y) for x, y in points.items()]
        if style == "line" and len(points) > 1:
            pen.line(places, colour, 4, "curve")
        elif style != "bars":
            for centre in places:
                pen.circle(centre, 9, colour, WHITE, 2)
    return image


# ------------------------------------------------------------------------------------------------
# 2. Pictures that need no training

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


def strategies(shown):
    """-> STRATEGIES and, where flags ask for one, yours: of its settings those of no default."""
    if shown.flags.keys().isdisjoint(ORDER_FLAGS):
        return STRATEGIES
    config = shown.config
    name = f"yours: {config.segments} {' -> '.join(map(str, config.hierarchy))}"
    changed = [flag for flag in ORDER_FLAGS if getattr(config, flag) != getattr(Config(), flag)]
    return {**STRATEGIES, name.strip(): {flag: getattr(config, flag) for flag in changed}}


def draw_segments(shown):
    """The strategies of the paper differ only in the rank that each token gets."""
    in_figure = ["pixel raster", "patch raster", "patch random", "square 16", "blob 11 -> 5"]
    images, _ = shown.images
    [photo] = photos(images[:1])
    panels = [("(a) image", enlarge(photo, column(5)))]
    for i, (name, settings) in enumerate(strategies(shown).items()):
        strategy = Config(**settings)
        ranks = sample_ranks(strategy, 1, generator=seeded("cpu", shown.config.seed, i))[0]
        kind = "pixels" if strategy.patch_size == 1 else "patches"
        words = f"{name}\n{strategy.grid} x {strategy.grid} {kind}, {ranks.max() + 1} ranks"
        if name in in_figure:
            words = f"({'bcdef'[in_figure.index(name)]}) {words}"
        panels.append((words, token_map(ranks, column(5))))
    note = """A cell is a token; its number and its colour are its rank. The tokens of one rank form
        a segment: they are predicted together, from those of lower rank. Rank 0 is given."""
    rows = [panels[:5], panels[5:], [swatch("predicted first ... last")]]
    return sheet("What is predicted when, by strategy (Figure 2)", note, rows)


def traversal(partitions, ranks, width):
    """Partitions and ranks [N] -> a map with arrows from segment to segment, and words for it."""
    # One of seven pale hues for each partition.
    grid = as_grid(ranks)
    hues = blend(as_grid(partitions) % 7 / 6, HUES[3:])
    image = outline(enlarge(hues // 5 * 2 + 153, width), grid + 1)

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
        start, end = centres[k : k + 2]
        ahead = F.normalize(end - start, dim=0)
        aside = 6 * ahead.flip(0) * torch.tensor([1, -1])
        neck = end - 56 * ahead
        corners = [start + aside, neck + aside, neck + 3 * aside, end - 24 * ahead]
        corners += [neck - 3 * aside, neck - aside, start - aside]
        pen.polygon(torch.cat(corners).tolist(), RED if leaves[k] else INK, WHITE, 2)
    for k, centre in enumerate(centres):
        pen.circle(centre.tolist(), 24, WHITE, INK, 2)
        write(image, centre.tolist(), str(k), 28, INK, "mm")
    return image, f"leaves a partition in {leaves.sum()} of {len(leaves)} steps"


def draw_hierarchy(shown):
    """A hierarchical order finishes a partition before it begins the next."""
    config = shown.config
    configs = {"square": Config(), "blob": Config(segments="blob")}
    if len(config.hierarchy) > 1:
        configs[config.segments] = config
    rows = []
    for i, (segments, config) in enumerate(configs.items()):
        generator = seeded("cpu", shown.config.seed, i)
        levels = randsac.sample_levels(config, 1, generator=generator)
        row = []
        for used in (levels[:1], levels):
            ranks = randsac.serialize(used, shown.config.order, generator)[0]
            image, leaves = traversal(levels[-1][0], ranks, column(2))
            counts = " -> ".join(map(str, config.hierarchy[: len(used)]))
            row.append((f"{segments} {counts}\n{leaves}", image))
        rows.append(row)
    note = """A hue is a partition, a number a segment's rank. Arrows lead to the next segment; they
        are red where a partition is left. Left: a flat order. Right: a hierarchical one."""
    return sheet("Flat and hierarchical serialization (Figure 3)", note, rows)


def draw_order(shown, most=64):
    """One image, predicted segment by segment."""
    images, _ = shown.images
    ranks = shown.ranks[0]
    grid = as_grid(ranks)
    last = ranks.max().item()
    [photo] = photos(images[:1])
    words = "ranks: when each token is predicted"
    in_numbers = token_map(ranks, len(grid) * (column(2) // len(grid)))
    predicted = pil_to_tensor(in_numbers).movedim(0, -1)
    if shown.model:
        words = "predicted, each segment from true pixels"
        [predicted], _ = predict(shown.model, images[:1], shown.ranks[:1])
    frames = []
    for step in torch.linspace(1, last + 1, min(last + 1, most)).round().int().tolist():
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

    # One palette for all frames makes a far smaller file. The last two have all colours.
    palette = tile(frames[-2:], 1).quantize(method=Image.Quantize.FASTOCTREE)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def mask_panels(ranks, width, order, scale=RAMP):
    """Source, target and memory mask of ranks [N], the colours of the ranks along their sides."""
    # Section 4.1 leaves out the last segment as it encodes, and the first as it is decoded.
    first = ranks == 0
    last = ranks == ranks.max()
    ends = {"source": (last, last), "target": (first, first), "memory": (first, last)}
    bands = blend(ranks / max(1, ranks.max()), scale)  # [N,3]
    thick = 1 + len(ranks) // 20
    size = len(ranks) + thick
    panels = []
    for (name, (rows, columns)), mask in zip(ends.items(), randsac.attention_masks(ranks)):
        kind = mask.long().masked_fill(rows[:, None] | columns, 2)  # as in MASK
        cells = torch.full((size, size, 3), 255, dtype=torch.uint8)
        cells[thick:, thick:] = blend(kind / 2, MASK.values())
        cells[:thick, thick:] = bands
        cells[thick:, :thick] = bands[:, None]
        alike = width - width % size  # so are all cells, if there are not too many
        panels.append((f"{name} mask\n{order}", enlarge(cells, max(alike, min(width, size)))))
    return panels


def draw_masks(shown):
    """The three attention masks are three comparisons of ranks."""
    ranks = shown.ranks[0]
    few = torch.tensor([2, 0, 1, 2, 0, 1])
    hues = (GREEN, BLUE, RED)
    top = [("ranks\n6 tokens", token_map(few, column(7), hues))]
    top += mask_panels(few.sort().values, column(7), "serialized", hues)
    top += mask_panels(few, column(7), "raster order", hues)
    rows = [top]
    for order, tokens in (("serialized", ranks.sort().values), ("raster order", ranks)):
        panels = mask_panels(tokens, column(4), order)
        rows.append([(f"ranks\n{order}", token_map(tokens, column(4))), *panels])
    rows.append([swatch(words, (colour, colour)) for words, colour in MASK.items()])
    note = """The token of row i may look at that of column j where the cell is blue. The bands are
        their ranks. The encoder leaves out the last segment, as nothing comes after it, and the
        decoder the first. When tokens are serialized (sorted by rank), these are the ends."""
    return sheet("Attention masks: who may look at whom (Figure 4)", note, rows)


# ------------------------------------------------------------------------------------------------
# 3. Pictures of a trained model and its run


@torch.no_grad()
def predict(model, images, ranks):
    """-> predictions as photos [B,H,W,3], squared errors of the tokens [B,N], NaN where given."""
    ranks = ranks[: len(images)]  # orders may be more than images
    P = model.config.patch_size
    tokens = randsac.patchify(images, P)
    guess = model.predict(images, ranks)
    errors = (guess - model.target(tokens)).square().mean(-1)

    # A normalized patch is shown with its true mean and deviation, as in MAE's demo.
    if model.config.target == "normalized":
        deviation = (tokens.var(-1, keepdim=True) + 1e-6).sqrt()
        guess = guess * deviation + tokens.mean(-1, keepdim=True)
    pixels = torch.where((ranks == 0)[..., None], tokens, guess)
    return photos(randsac.unpatchify(pixels, P)), errors


def draw_predictions(shown):
    """What the model predicts from the segments that are known."""
    images, labels = shown.images
    predicted, errors = predict(shown.model, images[:5], shown.ranks[:5])
    worst = errors.nan_to_num(0).max().item()
    heats = blend(errors.nan_to_num(0) / max(worst, 1e-9))  # [B,N,3]
    rows = []
    for i, photo in enumerate(photos(images[:5])):
        grid = as_grid(shown.ranks[i])
        last = grid.max().item()
        steps = torch.linspace(1, last, min(last, 4)).round().int().tolist()

        # What is given, some of the steps, all that they predict, and how far off it is.
        given = reveal(photo, grid == 0)
        row = {labels[i][:14]: photo, "given": given}
        for step in steps:
            known = reveal(photo, grid < step)
            row[f"rank {step} of {last}"] = reveal(predicted[i], grid == step, known)
        row["all predicted"] = reveal(predicted[i], grid > 0, given)
        error = errors[i].nanmean()
        row[f"error {error:.2f}"] = reveal(as_grid(heats[i]), grid > 0)
        rows.append([(words, enlarge(cells, column(8))) for words, cells in row.items()])
        for step, (_, image) in zip(steps, rows[i][2:]):
            outline(image, grid == step, RED, 4)
    rows.append([swatch(f"mean squared error of a token: 0 ... {worst:.2f}")])
    note = """The outlined tokens are predicted from the true pixels shown. What is grey is not
        known yet or, where the error is shown, given. A normalized patch has its true mean and
        contrast, which the model does not predict."""
    return sheet("Predictions, segment by segment (Sections 4 and 5)", note, rows)


def draw_skips(shown):
    """How much each decoder layer reads from each encoder layer."""
    check(shown.model.config.skip, "the model has no skip connections: train without --no-skip")
    # White is zero. A row and a column for names come before the weights.
    W = shown.model.skip.detach()
    scaled = W / W.abs().max().clamp(min=1e-9)
    cells = F.pad(blend((scaled + 1) / 2, (BLUE, WHITE, ORANGE)), (0, 0, 1, 0, 1, 0), value=255)
    labels = [["", *(f"H[{k + 1}]" for k in range(W.shape[1]))]]
    for i, row in enumerate(W.tolist()):
        labels.append([f"Z[{i + 1}]", *(f"{weight:.2f}" for weight in row)])
    image = numbered(cells, min(column(1), 110 * len(labels[0])), labels)
    note = """Decoder layer l reads Z[l], the sum of the encoder layers' outputs H[k] with these
        weights. Before training, that of the last layer was 1 and all others were 0."""
    return sheet("Trainable skip connections (Section 4.2)", note, [[("", image)]])


@torch.no_grad()
def attention_weights(model, run, *inputs):
    """-> weights [h,N,N] of each attention of the model as it does run(*inputs), in order: of the
    encoder layers, then of each decoder layer's self- and cross-attention."""
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
    run(*inputs)
    for hook in hooks:
        hook.remove()
    return found


def draw_attention(shown):
    """Where a token looks, in every head of every layer."""
    model = shown.model
    image = shown.images[0][:1]  # [1,3,H,W]
    ranks = shown.ranks[0]
    # By default the first of a middle rank: some segments are hidden from it.
    middle = (ranks == ranks.max() // 2).nonzero()[0].item()
    token = shown.flags.get("token", middle)
    L = model.config.depth
    heads = model.config.heads
    check(0 <= token < len(ranks), f"there is no --token {token}: the last is {len(ranks) - 1}")

    # The model as it was trained, the encoder as it is probed, and what each of them may look at.
    trained = attention_weights(model, model.predict, image, ranks[None])
    probed = attention_weights(model, model.encode, image)
    source, target, memory = randsac.attention_masks(ranks)  # [N,N] each
    kinds = {
        "encoder in pre-training, masked": (trained[:L], source),
        "encoder in probing, not masked": (probed, torch.ones_like(source)),
        "decoder, self-attention: what else is asked for": (trained[L::2], target),
        "decoder, cross-attention: what is known": (trained[L + 1 :: 2], memory),
    }

    # A row of maps for each layer, one for each head. Above them: which token it is.
    here = as_grid(torch.arange(len(ranks)) == token)
    panels = []
    for words, (layers, mask) in kinds.items():
        maps = []
        for weights in torch.cat(layers)[:, token]:  # [N]
            cells = blend(as_grid(weights / weights.max()))
            seen = reveal(cells, as_grid(mask[token]))
            maps.append(outline(enlarge(seen, column(2 * heads)), here, RED, 3))
        panels.append((words, tile(maps, heads)))
    [photo] = photos(image)
    top = [("", outline(enlarge(photo, 240), here, RED, 4))]
    top.append(("", outline(token_map(ranks, 240), here, RED, 4)))
    note = f"""How much the outlined token (of rank {ranks[token]}) attends to every other, in a row
        for each layer, the first on top, and a column for each head. Grey: the mask hides it."""
    rows = [top, panels[:2], panels[2:], [swatch("weight: 0 ... largest of the map")]]
    return sheet("Where a token looks (Section 4.1)", note, rows)


def draw_loss_by_rank(shown):
    """The more is known around a token, the better it is predicted."""
    images, _ = shown.images
    config = shown.config
    ranks = shown.ranks[: len(images)]
    parts = zip(images.split(32), ranks.split(32))
    errors = torch.cat([predict(shown.model, *part)[1] for part in parts])  # [B,N]
    tokens = randsac.patchify(images, config.patch_size)
    zero = shown.model.target(tokens).square().mean().item()
    last = ranks.max().item()
    losses = {step: errors[ranks == step].mean().item() for step in range(1, last + 1)}
    series = [("bars", losses, BLUE, "")]
    series.append(("line", {1: zero, last: zero}, RED, f"predicting zero: {zero:.3g}"))
    note = f"Mean over {len(images)} images. The more is known, the lower is the loss."

    # Partitions of squares begin at the same ranks in all images.
    marks = []
    if config.segments == "square" and len(config.hierarchy) > 1:
        note += """ It jumps where a new partition begins (grey lines): there, few neighbours are
            known yet, or none."""
        each = config.hierarchy[0] // config.hierarchy[1]
        marks = [step - 0.5 for step in range(each, last + 1, each)]
    image = chart(760, series, "rank", "mean squared error of a token", marks=marks)
    return sheet("Context helps: loss by rank (Section 3)", note, [[("", image)]])


@torch.no_grad()
def unit_vectors(model, images):
    """Images uint8 [B,3,H,W] -> their features [B,D] and their pixels [B,3SS], of length 1."""
    x = randsac.normalize(images, model.config.image_size)
    return F.normalize(model.encode(x).mean(1), dim=1), F.normalize(x.flatten(1), dim=1)


def draw_neighbours(shown):
    """What the model's features find alike, and what raw pixels do."""
    model = shown.model
    images, labels = shown.images
    count = 1 if "image" in shown.flags else 4
    asked = photos(images[:count]).movedim(-1, 1)
    others, classes, names = randsac.load_images(shown.config, train=True)
    among = torch.linspace(0, len(others) - 1, min(len(others), SEARCHED)).long()

    # Cosines with all others, in parts that fit in memory. What equals an image is left out.
    features, pixels = unit_vectors(model, asked)
    cosines = []
    for part in tqdm(among.split(max(1, 4096 // model.config.tokens)), "neighbours", disable=None):
        x, y = unit_vectors(model, others[part])
        cosines.append(torch.stack([features @ x.T, pixels @ y.T]))
    cosines = torch.cat(cosines, 2)  # [2,Q,n]
    cosines = cosines.masked_fill(cosines[1] > 1 - 1e-5, -torch.inf)
    enough = (cosines[0] > -torch.inf).sum(1).min() >= NEAREST
    check(enough, f"it shows {NEAREST} other training images, and there are {len(others)} in all")

    # Where there are labels, a frame tells the same class.
    labelled = len(names) > 1 and labels[0] in names
    width = column(NEAREST + 2)
    rows = []
    for i, image in enumerate(asked):
        tiles = []
        for k in among[cosines[:, i].topk(NEAREST).indices.flatten()].tolist():
            tiles.append(enlarge(others[k].movedim(0, -1), width))
            if labelled and names[classes[k]] == labels[i]:
                outline(tiles[-1], torch.ones(1, 1), GREEN, 8)
        large = enlarge(image.movedim(0, -1), 2 * width + GAP)
        words = "nearest by features, and below by raw pixels"
        rows.append([(labels[i][:28], large), (words, tile(tiles, NEAREST))])
    note = f"""The {NEAREST} nearest of {len(among)} training images, by the cosine between the
        model's features and, below, between raw pixels."""
    if labelled:
        note += " A green frame marks the same class. The model saw no labels."
    return sheet("What the features find alike (Section 5.1)", note, rows)


def read_rows(path):
    """Rows of a .jsonl file, if there is one, without a last row that is half written."""
    try:
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
    except ValueError as error:
        raise UserError(f"{path} cannot be read as the log of a run: {error}") from error


def probed(row):
    """A row of probes.jsonl -> on which images it was measured, and what was probed how."""
    what = {"encoder": "trained", "pixels": "raw pixels"}.get(row["features"], row["features"])
    if row["random_init"]:
        what = "untrained"
    place = f"{row['dataset']} {row['data_dir'][-80:]}".strip()
    return place, f"{row['protocol']}\n{what}"


def draw_curves(shown):
    """How training went, and what the features are worth."""
    hues = dict(zip(shown.runs, itertools.cycle(HUES)))
    losses = []
    probes = collections.defaultdict(dict)  # {place: {(run, kind): top-1}}, where the last counts
    for run, hue in hues.items():
        rows = read_rows(run / "metrics.jsonl")
        check(rows, f"{run} has no step logged yet: wait a little, or name another directory")
        # The first losses are so high that all later ones would look alike.
        late = [row for row in rows if row["step"] > 0.02 * rows[-1]["step"]]
        line = {row["step"]: row["loss"] for row in late}
        losses.append(("line", line, hue, str(run)[-100:]))
        dots = {row["step"]: row["held_out_loss"] for row in late if "held_out_loss" in row}
        losses.append(("dots", dots, hue, ""))
        for row in read_rows(run / "probes.jsonl"):
            place, kind = probed(row)
            if row["protocol"] != "layers":  # of which there is a picture
                probes[place][run, kind] = row["top1"]
    charts = [chart(660, losses, "step", "loss, without the first 2 % of the steps")]

    # A chart of the probes on each data set.
    for place, found in sorted(probes.items()):
        kinds = sorted({kind for _, kind in found})
        bars = []
        for run, hue in hues.items():
            top1 = {x: found[run, kind] for x, kind in enumerate(kinds) if (run, kind) in found}
            bars.append(("bars", top1, hue, ""))
        names = dict(enumerate(kinds))
        charts.append(chart(520, bars, "", f"probes of {place}, top-1 %", names))
    note = "Lines: random crops of training images. Dots: whole held-out images."
    return sheet("Loss and probes (Sections 5 and 5.1)", note, [[("", image)] for image in charts])


def draw_layers(shown):
    """What the features of each encoder layer are worth."""
    rows = read_rows(shown.runs[0] / "probes.jsonl")
    rows = [row for row in rows if row["protocol"] == "layers"]
    trained = [row for row in rows if not row["random_init"]]
    check(trained, "its layers are not probed yet: use probe.py with --protocol layers")
    last = trained[-1]
    place, _ = probed(last)
    floors = [row for row in rows if row["random_init"] and probed(row)[0] == place]
    note = "Accuracy of classifiers on the frozen features of a layer. The paper probes the last."
    bars = {"linear": last["layers"], "kNN": last["layers_knn"]}
    for row in floors[-1:]:
        bars |= {"linear, untrained": row["layers"], "kNN, untrained": row["layers_knn"]}
    series = []
    for hue, (name, top1) in zip((BLUE, ORANGE, "#A9CFE5", "#F5DDA8"), bars.items()):
        series.append(("bars", dict(enumerate(top1, 1)), hue, name))
    image = chart(760, series, "layer", f"top-1 % on {place}")
    return sheet("Probes by depth (Section 5.1)", note, [[("", image)]])


# ------------------------------------------------------------------------------------------------
# 4. The explorer: assets/explore.html, filled with orders and with what a model predicts


def data_uri(photo):
    """A photo uint8 [H,W,3] -> a PNG file, at most 160 pixels wide, as an address."""
    image = Image.fromarray(photo.numpy())
    image.thumbnail((160, 160))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def draw_explore(shown):
    """A page to touch: orders, masks and, of a trained model, predictions."""
    config = shown.config
    images, labels = shown.images
    [photo] = photos(images[:1])
    data = {"strategies": [], "image": data_uri(photo), "model": None}
    sizes = ("dim", "depth", "decoder_depth", "patch_size")
    data["size"] = {size: getattr(config, size) for size in sizes}
    for i, (title, settings) in enumerate(strategies(shown).items()):
        strategy = Config(**settings)
        orders = sample_ranks(strategy, 8, generator=seeded("cpu", config.seed, i))
        flags = " ".join(f"{flag_name(name)} {value}" for name, value in settings.items())
        entry = {"name": title, "flags": re.sub(r"[](),[]", "", flags)}
        entry.update(grid=strategy.grid, levels=strategy.hierarchy, patch_size=strategy.patch_size)
        entry["ranks"] = list(dict.fromkeys(map(tuple, orders.tolist())))  # raster has one order
        data["strategies"].append(entry)

    # What the model predicts, each segment from true pixels.
    if shown.model:
        data["model"] = {"name": shown.runs[0].resolve().name, "images": []}
        predicted, errors = predict(shown.model, images[:4], shown.ranks[:4])
        for i, photo in enumerate(photos(images[:4])):
            numbers = [round(e, 3) if math.isfinite(e) else None for e in errors[i].tolist()]
            entry = {"label": labels[i], "grid": config.grid, "ranks": shown.ranks[i].tolist()}
            entry.update(image=data_uri(photo), predicted=data_uri(predicted[i]), errors=numbers)
            data["model"]["images"].append(entry)

    page = Path(__file__).with_name("assets").joinpath("explore.html").read_text(encoding="utf-8")
    text = json.dumps(data).replace("<", "\\u003c")  # so no label ends the script
    return page.replace(">{}</script>", f">{text}</script>")


# ------------------------------------------------------------------------------------------------
# 5. From the command line to pictures

SHARED_FLAGS = (*ORDER_FLAGS, "dataset", "data_dir")  # with randsac.py
MOST = 512  # images at most: the first few for pictures, all for loss-by-rank
NEAREST = 6  # neighbours shown
SEARCHED = 5_000  # training images that neighbours are looked for among, at most
FIGURES = (draw_segments, draw_hierarchy, draw_order, draw_masks)  # 1 to 4 of the paper
OF_MODELS = (draw_predictions, draw_neighbours, draw_loss_by_rank, draw_attention, draw_skips)
OF_RUNS = (draw_curves, draw_layers)
PICTURES = {}
for function in (draw_explore, *FIGURES, *OF_MODELS, *OF_RUNS):
    PICTURES[function.__name__[5:].replace("_", "-")] = function
ENDINGS = {"order": "gif", "explore": "html"}
INDEX = '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>RandSAC</title>\n'


class Shown:
    """What pictures show, as flags {name: value} and directories of runs say."""

    def __init__(self, flags, runs=()):
        self.flags = flags
        self.runs = list(runs)
        self.model = None
        given = {name: flags[name] for name in SHARED_FLAGS if name in flags}
        if "checkpoint" in flags:
            check("image_size" not in flags, "--image-size is the checkpoint's: leave it out")
            self.runs.insert(0, flags["checkpoint"].parent)
            self.model, trained = randsac.load_model(flags["checkpoint"])
            self.config = randsac.with_flags(trained, given)
        else:
            self.config = Config(**given)
        generator = seeded("cpu", self.config.seed)
        self.ranks = sample_ranks(self.config, MOST, generator=generator)  # [MOST,N]

    @functools.cached_property
    def images(self):
        """Float [n,3,S,S], the first ones of different classes, and a label for each. They are read
        when a picture first asks for them, as many need none."""
        flags = self.flags
        config = self.config
        size = config.image_size
        if self.model is None:  # no model minds: the larger, the nicer
            size = config.grid * math.ceil(128 / config.grid)

        # A shipped checkpoint has a few images beside it, for a machine without its data set.
        paths = []
        if "image" in flags:
            paths = [flags["image"]] * 5
        elif self.model and flags.keys().isdisjoint(("dataset", "data_dir")):
            beside = sorted(flags["checkpoint"].parent.glob("images/*.png"), reverse=True)
            if beside and not any(Path(config.data_dir).glob("cifar-10-*")):
                where = f"CIFAR-10 is not in {config.data_dir}/ (--dataset cifar10 downloads it)"
                print(f"{where}: the images in {beside[0].parent}/ are shown")
                paths = beside
        if paths:
            found = [torch.tensor(randsac.decode_image(path, size)) for path in paths]
            return randsac.normalize(torch.stack(found), size), [path.stem for path in paths]

        if self.model is None and "dataset" not in flags:
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
        order = list(dict.fromkeys([*firsts.values(), *order]))[:MOST]
        return randsac.normalize(images[order], size), [names[i] for i in order]


def read_arguments(arguments):
    """-> the words of the command line, and {flag: value} of the flags that were given."""
    fields = {field.name for field in dataclasses.fields(Config)}
    parser = randsac.make_parser(__doc__, fields.difference(SHARED_FLAGS))
    add = parser.add_argument
    path = randsac.user_path
    pictures = f"{', '.join(PICTURES)}, all; with curves also directories of runs"
    add("pictures", nargs="*", default=[], metavar="PICTURE", help=pictures)
    add("--checkpoint", type=path, metavar="FILE", help="checkpoint.pt of a run")
    add("--image", type=path, metavar="FILE", help="show this image, not held-out ones")
    add("--token", type=int, metavar="I", help="whose attention to show, in raster order from 0")
    add("--out", type=path, metavar="DIR", default="figures", help="where to (default: figures)")
    read = vars(parser.parse_intermixed_args(arguments))
    return read.pop("pictures"), {name: value for name, value in read.items() if value is not None}


def save(picture, path):
    """Writes a page of HTML, the frames of a GIF, or an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
    everything = "all" in words or (not words and "checkpoint" in flags)
    names = [word for word in words if word in PICTURES]
    if everything:
        names = list(PICTURES)
    elif not words:
        names = [name for name, function in PICTURES.items() if function in FIGURES]
    runs = [randsac.user_path(word) for word in words if word not in [*PICTURES, "all"]]
    for run in runs:
        known = "curves" in names
        check(known, f"there is no picture {run}: choose from {', '.join(PICTURES)}, all")
    shown = Shown(flags, runs)

    # With "all", what cannot be drawn is left out.
    out = flags["out"]
    index = INDEX
    for name in names:
        draw = PICTURES[name]
        path = out / f"{name}.{ENDINGS.get(name, 'png')}"
        try:
            check(shown.model or draw not in OF_MODELS, "it needs a --checkpoint")
            check(shown.runs or draw not in OF_RUNS, "it needs a run, or its --checkpoint")
            picture = draw(shown)
        except UserError as error:
            check(everything, f"cannot draw {name}: {error}")
            print(f"skipped {name}: {error}")
            continue
        save(picture, path)
        index += f'<p><a href="{path.name}">{draw.__doc__}</a></p>\n'
        if name != "explore":
            index += f'<img src="{path.name}" width="800" alt="{name}">\n'

    if everything:
        save(index, out / "index.html")
        print(f"next: open {out / 'index.html'} in a browser")


if __name__ == "__main__":
    randsac.run_command(main)
