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
import functools
import io
import itertools
import json
import math
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
MOST = 512  # images at most: the first few for pictures, all for loss-by-rank
NEAREST = 6  # neighbours shown
SEARCHED = 5_000  # training images that neighbours are looked for among, at most

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
    W, H = image.size
    large = F.interpolate(ids[None, None].float(), (H, W))[0, 0]  # [H,W]

    # A pixel lies on a line where one of its eight neighbours, `width` away, has another id.
    around = F.pad(large, [width] * 4).unfold(0, H, width).unfold(1, W, width)  # [3,3,H,W]
    line = (around != large).any(1).any(0) & (large > 0)
    image.paste(colour, mask=to_pil_image(255 * line.byte()))
    return image


def tile(images, columns):
    """Images of one size -> one image of them, row by row."""
    tiles = make_grid([pil_to_tensor(image) for image in images], columns, GAP, pad_value=255)
    return to_pil_image(tiles[:, GAP:-GAP, GAP:-GAP])


def write(image, place, words, size=24, colour=INK, anchor="la", align="left"):
    ImageDraw.Draw(image).text(place, words, colour, font(size), anchor, 10, align)


def token_map(ranks, width, scale=RAMP):
    """Ranks [N] as a grid of tokens, coloured by rank and, where the numbers fit in, numbered."""
    grid = as_grid(ranks)
    cells = blend(grid / max(1, grid.max()), scale)
    image = enlarge(cells, width)
    columns = grid.shape[1]
    unit = width / columns
    if unit > 13 * len(str(grid.max().item())):
        light = cells.flatten(0, 1).float() @ torch.tensor([0.3, 0.59, 0.11])  # [N]
        for i, rank in enumerate(ranks.tolist()):
            row, col = divmod(i, columns)
            place = (unit * (col + 0.5), unit * (row + 0.5))
            write(image, place, str(rank), 22, WHITE if light[i] < 110 else INK, "mm")
    return outline(image, grid + 1)


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
    """Series (style, points {x: y}, colour, label) -> an image. Styles: line, dots, and bars, which
    come first. Names {x: words} replace the numbers below. Marks: where grey lines stand."""
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

    # The part of the plane that is shown. Bars begin at zero.
    xs = [x for _, points, _, _ in series for x in points]
    ys = [y for _, points, _, _ in series for y in points.values()]
    bars = sum(style == "bars" for style, _, _, _ in series)
    if bars:
        ys.append(0)
    left = min(xs) - 0.5
    right = max(xs) + 0.5
    low = min(ys)
    high = max(*ys, low + 1e-9)

    # Where it lies in the image, with room for words on all sides.
    if names is None:
        names = {x: f"{x:g}" for x in ticks(left, right, 12) if x == round(x)}
    foot = height - 76 - 34 * max(words.count("\n") for words in names.values())
    unit = (image.width - 152) / (right - left)

    def across(x):
        return 112 + unit * (x - left)

    def up(y):
        return foot - (y - low) / (high - low) * (foot - top - 40)

    # Axes, with round numbers or names.
    for y in ticks(low, high, 6):
        pen.line([112, up(y), image.width - 40, up(y)], "#DDDDDD", 2)
        write(image, (100, up(y)), f"{y:g}", 24, DIM, "rm")
    for x, words in names.items():
        write(image, (across(x), foot + 12), words, 24, DIM, "ma", "center")
    for x in marks:
        pen.line([across(x), foot, across(x), up(high)], DIM, 4)
    write(image, (image.width, height - 4), x_label, 24, DIM, "rd")

    # The bars of one x fill four fifths of its room.
    wide = 0.8 * unit / max(1, bars)
    for i, (style, points, colour, _) in enumerate(series):
        places = [(across(x), up(y)) for x, y in points.items()]
        if style == "bars":
            for (x, peak), y in zip(places, points.values()):
                start = x + wide * (i - bars / 2)
                upper, lower = sorted([peak, up(0)])
                pen.rectangle([start, upper, start + 0.96 * wide, lower], colour)
                if wide > 60:  # as a number is
                    write(image, (start + 0.48 * wide, upper), f"{y:#.3g}", 22, INK, "md")
        elif style == "line" and len(places) > 1:
            pen.line(places, colour, 4, "curve")
        else:
            for place in places:
                pen.circle(place, 9, colour, WHITE, 2)
    return image


# ------------------------------------------------------------------------------------------------
# 2. Pictures that need no training

STRATEGIES = {
    "pixel raster": "--image-size 16 --patch-size 1 --segments patch --order raster",
    "patch raster": "--segments patch --order raster",
    "patch random": "--segments patch",
    "square 16": "--segments square --hierarchy 16",
    "square 16 -> 4": "--segments square --hierarchy 16 4",
    "blob 11 -> 5": "--segments blob --hierarchy 11 5",
    "scatter 9": "--segments scatter --hierarchy 9",
    "mae": "--segments mae",
}
ORDER_FLAGS = ("image_size", "patch_size", "segments", "hierarchy", "order", "last_rank", "seed")


def strategies(shown, count):
    """-> the name, flags, Config and `count` orders [count,N] of each of STRATEGIES and, where
    shown.flags ask for one, of yours."""
    chosen = dict(STRATEGIES)
    config = shown.config
    if not shown.flags.keys().isdisjoint(ORDER_FLAGS):
        name = " ".join(["yours:", config.segments, *map(str, config.hierarchy)])
        # The flags as one would type them: those that differ, and any hierarchy, (7, 3) as 7 3.
        settings = vars(config)
        default = vars(Config()) | {"hierarchy": ()}
        changed = [flag for flag in ORDER_FLAGS if settings[flag] != default[flag]]
        words = [f"{flag_name(flag)} {settings[flag]}" for flag in changed]
        chosen[name] = " ".join(words).translate(str.maketrans("", "", "(),"))
    parser = randsac.make_parser("")
    for i, (name, flags) in enumerate(chosen.items()):
        strategy = Config(**vars(parser.parse_args(flags.split())))
        generator = seeded("cpu", config.seed, i)
        yield name, flags, strategy, sample_ranks(strategy, count, generator=generator)


def draw_segments(shown):
    """The strategies of the paper differ only in the rank that each token gets."""
    letters = {"pixel raster": "(b) ", "patch raster": "(c) ", "patch random": "(d) "}
    letters |= {"square 16": "(e) ", "blob 11 -> 5": "(f) "}
    [photo] = photos(shown.images[0][:1])
    panels = [("(a) image", enlarge(photo, column(5)))]
    for name, _, strategy, [ranks] in strategies(shown, 1):
        title = letters.get(name, "") + name
        kind = "pixels" if strategy.patch_size == 1 else "patches"
        count = ranks.max() + 1
        words = f"{title}\n{strategy.grid} x {strategy.grid} {kind}, {count} ranks"
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
    homes = []
    for rank in range(grid.max() + 1):
        tokens = (grid == rank).nonzero().flip(1) + 0.5  # [n,2]: x, y
        far = (tokens - tokens.mean(0)).norm(dim=1)
        nearest = tokens[far < far.min() + 1e-5]
        centres.append(nearest.mean(0) * width / len(grid))
        homes.append(partitions[ranks == rank][0].item())

    # Backwards, so that no arrow covers the head of an earlier one.
    leaves = [one != other for one, other in itertools.pairwise(homes)]
    pen = ImageDraw.Draw(image)
    for k in reversed(range(len(leaves))):
        start, end = centres[k : k + 2]
        ahead = F.normalize(end - start, dim=0)
        aside = 6 * ahead.flip(0) * torch.tensor([1, -1])
        length = (end - start).norm()
        neck = end - min(56, length / 2) * ahead
        corners = [start + aside, neck + aside, neck + 3 * aside, end - 24 * ahead]
        corners += [neck - 3 * aside, neck - aside, start - aside]
        pen.polygon(torch.cat(corners).tolist(), RED if leaves[k] else INK, WHITE, 2)
    for k, centre in enumerate(centres):
        pen.circle(centre.tolist(), 24, WHITE, INK, 2)
        write(image, centre.tolist(), str(k), 28, INK, "mm")
    return image, f"leaves a partition in {sum(leaves)} of {len(leaves)} steps"


def draw_hierarchy(shown):
    """A hierarchical order finishes a partition before it begins the next."""
    configs = {"square": Config(), "blob": Config(segments="blob")}
    if len(shown.config.hierarchy) > 1:
        configs[shown.config.segments] = shown.config
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
        are orange where a partition is left. Left: a flat order. Right: a hierarchical one."""
    return sheet("Flat and hierarchical serialization (Figure 3)", note, rows)


def draw_order(shown, most=64):
    """One image, predicted segment by segment."""
    images, _ = shown.images
    [photo] = photos(images[:1])
    ranks = shown.ranks[0]
    grid = as_grid(ranks)
    last = ranks.max().item()
    if shown.model:
        words = "predicted, each segment from true pixels"
        [predicted], _ = predict(shown.model, images[:1], shown.ranks)
    else:
        words = "ranks: when each token is predicted"
        width = column(2) - column(2) % len(grid)
        predicted = pil_to_tensor(token_map(ranks, width)).movedim(0, -1)

    note = "The outlined tokens are predicted next, from all that is known."
    frames = []
    for step in torch.linspace(1, last + 1, min(last + 1, most)).round().int().tolist():
        known = enlarge(reveal(photo, grid < step), column(2))
        right = enlarge(reveal(predicted, grid <= step), column(2))
        outline(known, (grid + 1) * (grid >= step), "#E8E8E8")
        for image in (known, right):
            outline(image, grid == step, RED, 6)
        left = (f"known after {step - 1} of {last} steps", known)
        page = sheet("Segment by segment (Figure 1)", note, [[left, (words, right)]])
        frames.append(page.reduce(2))

    # One palette for all frames makes a far smaller file. The last two have all colours.
    palette = tile(frames[-2:], 1).quantize(method=Image.Quantize.FASTOCTREE)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def mask_panels(ranks, width, order, scale=RAMP):
    """Source, target and memory mask of ranks [N], the colours of the ranks along their sides."""
    bands = blend(ranks / max(1, ranks.max()), scale)  # [N,3]
    thick = 1 + len(ranks) // 20
    size = len(ranks) + thick
    if size < width:
        width -= width % size  # so that all cells are alike

    # Section 4.1 leaves out the last segment as it encodes, and the first as it is decoded.
    first = ranks == 0
    last = ranks == ranks.max()
    ends = {"source": (last, last), "target": (first, first), "memory": (first, last)}
    panels = []
    for name, mask in zip(ends, randsac.attention_masks(ranks)):
        rows, columns = ends[name]
        kind = mask.long().masked_fill(rows[:, None] | columns, 2)  # as in MASK
        cells = blend(kind / 2, MASK.values())
        cells = F.pad(cells, (0, 0, thick, 0, thick, 0), value=255)
        cells[:thick, thick:] = bands
        cells[thick:, :thick] = bands[:, None]
        panels.append((f"{name} mask\n{order}", enlarge(cells, width)))
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
# 3. Pictures of a trained model and its run, and the page to touch


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
    predicted, errors = predict(shown.model, images[:5], shown.ranks)
    errors = errors.nan_to_num(0)  # of what is given
    worst = errors.max().item()
    heats = blend(errors / max(worst, 1e-9))  # [B,N,3]
    side = column(8)
    rows = []
    for i, photo in enumerate(photos(images[:5])):
        grid = as_grid(shown.ranks[i])
        last = grid.max().item()

        # What is given, some of the steps, all that they predict, and how far off it is.
        given = reveal(photo, grid == 0)
        row = [(labels[i][:14], enlarge(photo, side))]
        row.append(("given", enlarge(given, side)))
        for step in torch.linspace(1, last, min(last, 4)).round().int().tolist():
            known = reveal(photo, grid < step)
            image = enlarge(reveal(predicted[i], grid == step, known), side)
            row.append((f"rank {step} of {last}", outline(image, grid == step, RED, 4)))
        row.append(("all predicted", enlarge(reveal(predicted[i], grid > 0, given), side)))
        heat = reveal(as_grid(heats[i]), grid > 0)
        error = errors[i][shown.ranks[i] > 0].mean()
        row.append((f"error {error:.2f}", enlarge(heat, side)))
        rows.append(row)
    rows.append([swatch(f"mean squared error of a token: 0 ... {worst:.2f}")])
    note = """The outlined tokens are predicted from the true pixels shown. What is grey is not
        known yet or, where the error is shown, given. A normalized patch has its true mean and
        contrast, which the model does not predict."""
    return sheet("Predictions, segment by segment (Sections 4 and 5)", note, rows)


def draw_skips(shown):
    """How much each decoder layer reads from each encoder layer."""
    check(shown.model.config.skip, "the model has no skip connections: train without --no-skip")
    series = []
    for i, (weights, hue) in enumerate(zip(shown.model.skip.tolist(), itertools.cycle(HUES))):
        series.append(("bars", dict(enumerate(weights, 1)), hue, f"Z[{i + 1}]"))
    note = """Decoder layer l reads Z[l], the sum of the encoder layers' outputs H[k] with these
        weights. Before training, that of the last layer was 1 and all others were 0."""
    image = chart(760, series, "k", "weight of H[k] in Z[l]")
    return sheet("Trainable skip connections (Section 4.2)", note, [[("", image)]])


@torch.no_grad()
def attention_weights(model, run, *inputs):
    """-> weights [h,N,N] of each attention of the model as it does run(*inputs), in order: of the
    encoder layers, then of each decoder layer's self- and cross-attention."""
    found = []

    def note(attention, inputs, output):
        x, memory, mask = inputs
        q, k, _ = attention.split(x, memory)  # [1,h,N,d] each
        # Of values that are one-hot, attention makes its weights.
        one_hot = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)  # [1,h,N,N]
        weights = F.scaled_dot_product_attention(q, k, one_hot, attn_mask=mask)
        found.append(weights[0])

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
    middle = max(1, ranks.max().item() // 2)
    token = shown.flags.get("token", ranks.tolist().index(middle))
    check(0 <= token < len(ranks), f"there is no --token {token}: the last is {len(ranks) - 1}")

    # The model as it was trained, the encoder as it is probed, and what each of them may look at.
    trained = attention_weights(model, model.predict, image, ranks[None])
    probed = attention_weights(model, model.encode, image)
    source, target, memory = randsac.attention_masks(ranks)  # [N,N] each
    L = model.config.depth
    kinds = [
        ("encoder in pre-training, masked", trained[:L], source),
        ("encoder in probing, not masked", probed, torch.ones_like(source)),
        ("decoder, self-attention: what else is asked for", trained[L::2], target),
        ("decoder, cross-attention: what is known", trained[L + 1 :: 2], memory),
    ]

    # A row of maps for each layer, one for each head. Above them: which token it is.
    here = as_grid(torch.arange(len(ranks)) == token)
    [photo] = photos(image)
    top = [("", outline(enlarge(photo, 240), here, RED, 4))]
    top.append(("", outline(token_map(ranks, 240), here, RED, 4)))
    panels = []
    heads = model.config.heads
    for words, layers, mask in kinds:
        maps = []
        for weights in torch.cat(layers)[:, token]:  # [N]
            cells = blend(as_grid(weights / weights.max()))
            seen = reveal(cells, as_grid(mask[token]))
            maps.append(outline(enlarge(seen, column(2 * heads)), here, RED, 3))
        panels.append((words, tile(maps, heads)))
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
    last = ranks.max().item()
    losses = {step: errors[ranks == step].mean().item() for step in range(1, last + 1)}
    tokens = randsac.patchify(images, config.patch_size)
    zero = shown.model.target(tokens).square().mean().item()
    series = [("bars", losses, BLUE, "")]
    series.append(("line", {1: zero, last: zero}, RED, f"predicting zero: {zero:.3g}"))
    note = f"""Mean over {len(images)} images. After enough training, the loss is lower, the more is
        known."""

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
def draw_neighbours(shown):
    """What the model's features find alike, and what raw pixels do."""
    model = shown.model
    size = shown.config.image_size
    images, labels = shown.images
    asked = images[: 1 if "image" in shown.flags else 4]
    Q = len(asked)
    others, classes, names = randsac.load_images(shown.config, train=True)
    check(len(others) > NEAREST, f"it takes more than {NEAREST} training images")
    count = min(len(others), SEARCHED)
    among = torch.linspace(0, len(others) - 1, count).long()

    # Cosines with all others, in parts that fit in memory.
    parts = []
    batch = max(1, 4096 // model.config.tokens)
    for part in tqdm(among.split(batch), "neighbours", disable=None):
        x = torch.cat([asked, randsac.normalize(others[part], size)])
        features = F.normalize(model.encode(x).mean(1), dim=1)  # [Q+n,D]
        pixels = F.normalize(x.flatten(1), dim=1)  # [Q+n,3SS]
        parts.append(torch.stack([v[:Q] @ v[Q:].T for v in (features, pixels)]))
    cosines = torch.cat(parts, 2)  # [2,Q,n]
    cosines = cosines.masked_fill(cosines[1] > 1 - 1e-5, -torch.inf)  # the same image comes last
    nearest = among[cosines.topk(NEAREST).indices]  # [2,Q,NEAREST]

    # A frame tells the same class.
    width = column(NEAREST + 2)
    rows = []
    for i, photo in enumerate(photos(asked)):
        tiles = []
        for k in nearest[:, i].flatten().tolist():
            tiles.append(enlarge(others[k].movedim(0, -1), width))
            if len(names) > 1 and names[classes[k]] == labels[i]:
                outline(tiles[-1], torch.ones(1, 1), GREEN, 8)
        left = (labels[i][:28], enlarge(photo, 2 * width + GAP))
        right = ("nearest by features, and below by raw pixels", tile(tiles, NEAREST))
        rows.append([left, right])
    note = f"""The {NEAREST} nearest of {len(among)} training images, by the cosine between the
        model's features and, below, between raw pixels. A green frame marks the same class. The
        model saw no labels."""
    return sheet("What the features find alike (Section 5.1)", note, rows)


def read_rows(path):
    """Rows of a .jsonl file, if there is one, without a last row that is half written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]


def probed(row):
    """A row of probes.jsonl -> on which images it was measured, and of what."""
    place = f"{row['dataset']} {row['data_dir']}".strip()
    place += f" at {row['image_size']} pixels"
    if row["features"] == "pixels":
        return place, "raw pixels"
    return place, "untrained" if row["random_init"] else "trained"


def draw_curves(shown):
    """How training went, and what the features are worth."""
    hues = dict(zip(shown.runs, itertools.cycle(HUES)))
    losses = []
    probes = {}  # {place: {run: {what: top-1}}}, where the last counts
    for run, hue in hues.items():
        rows = read_rows(run / "metrics.jsonl")
        check(rows, f"{run} has no step logged yet: wait a little, or name another directory")
        # The first losses are so high that all later ones would look alike.
        late = [row for row in rows if row["step"] > 0.02 * rows[-1]["step"]]
        line = {row["step"]: row["loss"] for row in late}
        dots = {row["step"]: row["held_out_loss"] for row in late if "held_out_loss" in row}
        losses.append(("line", line, hue, str(run)))
        losses.append(("dots", dots, hue, ""))
        for row in read_rows(run / "probes.jsonl"):
            place, what = probed(row)
            if row["protocol"] != "layers":  # of which there is a picture
                top1 = probes.setdefault(place, {}).setdefault(run, {})
                top1[f"{row['protocol']}\n{what}"] = row["top1"]
    charts = [chart(660, losses, "step", "loss, without the first 2 % of the steps")]

    # A chart of the probes on each data set.
    for place, found in sorted(probes.items()):
        names = sorted(set().union(*found.values()))
        bars = []
        for run, top1 in found.items():
            points = {names.index(name): value for name, value in top1.items()}
            bars.append(("bars", points, hues[run], ""))
        words = f"probes of {place}, top-1 %"
        charts.append(chart(520, bars, "", words, dict(enumerate(names))))
    note = "Lines: random crops of training images. Dots: whole held-out images."
    return sheet("Loss and probes (Sections 5 and 5.1)", note, [[("", image)] for image in charts])


def draw_layers(shown):
    """What the features of each encoder layer are worth."""
    bars = {}  # where the last row counts
    for row in read_rows(shown.runs[0] / "probes.jsonl"):
        if row["protocol"] == "layers":
            place, what = probed(row)
            bars[f"linear, {what}: {place}"] = row["layers"]
            bars[f"kNN, {what}: {place}"] = row["layers_knn"]
    check(bars, "its layers are not probed yet: use probe.py with --protocol layers")
    hues = (BLUE, ORANGE, "#A9CFE5", "#F5DDA8", *HUES)
    series = []
    for hue, (words, top1) in zip(hues, bars.items()):
        series.append(("bars", dict(enumerate(top1, 1)), hue, words))
    note = "Accuracy of classifiers on the frozen features of a layer. The paper probes the last."
    image = chart(760, series, "layer", "top-1 %")
    return sheet("Probes by depth (Section 5.1)", note, [[("", image)]])


def data_uri(photo):
    """A photo uint8 [H,W,3] -> a PNG file as an address."""
    file = io.BytesIO()
    Image.fromarray(photo.numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def draw_explore(shown):
    """A page to touch: orders, masks and, of a trained model, predictions."""
    config = shown.config
    images, labels = shown.images
    images = images[:4]
    data = {"strategies": [], "image": data_uri(photos(images)[0]), "model": None}
    sizes = ("dim", "depth", "decoder_depth", "patch_size")
    data["size"] = {size: getattr(config, size) for size in sizes}
    for name, flags, strategy, orders in strategies(shown, 8):
        entry = {"name": name, "flags": flags, "grid": strategy.grid}
        entry |= {"levels": strategy.hierarchy, "patch_size": strategy.patch_size}
        entry["ranks"] = list(dict.fromkeys(map(tuple, orders.tolist())))  # raster has one order
        data["strategies"].append(entry)

    # What the model predicts, each segment from true pixels.
    if shown.model:
        data["model"] = {"name": shown.runs[0].resolve().name, "images": []}
        predicted, errors = predict(shown.model, images, shown.ranks)
        for i, photo in enumerate(photos(images)):
            entry = {"label": labels[i], "grid": config.grid, "ranks": shown.ranks[i].tolist()}
            entry |= {"image": data_uri(photo), "predicted": data_uri(predicted[i])}
            found = errors[i].tolist()
            entry["errors"] = [None if math.isnan(error) else round(error, 3) for error in found]
            data["model"]["images"].append(entry)

    file = Path(__file__).with_name("assets") / "explore.html"
    template = file.read_text(encoding="utf-8")
    text = json.dumps(data).replace("<", "\\u003c")  # so no label ends the script
    return template.replace(">{}</script>", f">{text}</script>")


# ------------------------------------------------------------------------------------------------
# 4. From the command line to pictures

SHARED_FLAGS = (*ORDER_FLAGS, "dataset", "data_dir")  # with randsac.py
FIGURES = ("segments", "hierarchy", "order", "masks")  # 1 to 4 of the paper
OF_MODELS = (draw_predictions, draw_neighbours, draw_loss_by_rank, draw_attention, draw_skips)
OF_MODELS += (draw_layers,)  # from the log of the model's probes
PICTURES = {}
OF_ANY = (draw_explore, draw_segments, draw_hierarchy, draw_order, draw_masks)
for function in (*OF_ANY, *OF_MODELS, draw_curves):
    PICTURES[function.__name__[5:].replace("_", "-")] = function
ENDINGS = {"order": "gif", "explore": "html"}


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

        # A shipped checkpoint has a few images beside it, shown unless others are asked for.
        paths = []
        if "image" in flags:
            paths = [flags["image"]] * 5
        elif self.model and flags.keys().isdisjoint(("dataset", "data_dir")):
            paths = sorted(flags["checkpoint"].parent.glob("images/*.png"), reverse=True)
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
        generator = seeded("cpu", config.seed, 1)
        order = torch.randperm(len(names), generator=generator).tolist()
        firsts = {names[i]: i for i in reversed(order)}
        order = list(dict.fromkeys([*firsts.values(), *order]))[:MOST]
        return randsac.normalize(images[order], size), [names[i] for i in order]


def save(picture, path):
    """Writes a page of HTML, the frames of a GIF, or an image."""
    if path.suffix == ".html":
        path.write_text(picture, encoding="utf-8")
    elif path.suffix == ".gif":
        first, *rest = picture
        times = [500] * len(rest) + [2500]  # ms: the end stays longer
        first.save(path, save_all=True, append_images=rest, loop=0, duration=times)
    else:
        picture.save(path)
    print(f"wrote {path}")


def main(arguments):
    parser = randsac.make_parser(__doc__, vars(Config()).keys() - SHARED_FLAGS)
    add = parser.add_argument
    path = randsac.user_path
    every = f"{', '.join(PICTURES)}, all"
    say = f"{every}; with curves also runs"
    add("words", nargs="*", default=FIGURES, metavar="PICTURE", help=say)
    add("--checkpoint", type=path, metavar="FILE", help="checkpoint.pt of a run")
    add("--image", type=path, metavar="FILE", help="show this image, not held-out ones")
    add("--token", type=int, metavar="I", help="whose attention to show, in raster order from 0")
    add("--out", type=path, metavar="DIR", default="figures", help="where to (default: figures)")
    flags = vars(parser.parse_intermixed_args(arguments))

    # Words name pictures and, for curves, directories of runs.
    words = flags.pop("words")
    everything = "all" in words
    names = list(PICTURES) if everything else [word for word in words if word in PICTURES]
    runs = [Path(word) for word in words if word not in (*PICTURES, "all")]
    if runs and "curves" not in names:
        raise UserError(f"there is no picture {runs[0]}: choose from {every}")
    shown = Shown(flags, runs)

    # With "all", what cannot be drawn is left out.
    out = flags["out"]
    index = '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>RandSAC</title>\n'
    for name in names:
        draw = PICTURES[name]
        file = f"{name}.{ENDINGS.get(name, 'png')}"
        try:
            check(shown.model or draw not in OF_MODELS, "it needs a --checkpoint")
            check(shown.runs or draw != draw_curves, "it needs a run, or its --checkpoint")
            picture = draw(shown)
        except UserError as error:
            check(everything, f"cannot draw {name}: {error}")
            print(f"skipped {name}: {error}")
            continue
        out.mkdir(parents=True, exist_ok=True)
        save(picture, out / file)
        index += f'<p><a href="{file}">{draw.__doc__}</a></p>\n'
        if name != "explore":
            index += f'<img src="{file}" width="800" alt="{name}">\n'

    if everything:
        save(index, out / "index.html")
        print(f"next: open {out / 'index.html'} in a browser")


if __name__ == "__main__":
    randsac.run_command(main)
