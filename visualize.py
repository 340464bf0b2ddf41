"""Pictures of RandSAC: the orders and masks of any strategy, and what a trained model does. Read them beside the paper.

    python visualize.py                                                  # Figures 1 to 4; nothing trained is needed
    python visualize.py segments order --segments blob --hierarchy 11 5  # strategy flags are those of randsac.py
    python visualize.py all --checkpoint runs/NAME/checkpoint.pt         # every picture, and index.html
    python visualize.py curves runs/A runs/B                             # runs side by side

With --checkpoint, a strategy flag's default is what the run had. Ranks, masks and predictions come from the functions
that training uses. A draw_... function returns a PIL image that a notebook can show (draw_order: the frames of a GIF).
Its docstring is the picture's title and note."""
import dataclasses, functools, inspect, json, math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

from randsac import (Config, RandSAC, UserError, attention_masks, check, decode, draw_shapes, load_images, make_parser,
                     normalize, normalize_patches, patchify, run_command, sample_levels, sample_ranks, seeded,
                     serialize, unpatchify, write_whole)

WIDTH, MARGIN, GAP = 1600, 40, 20  # of a sheet in pixels: twice what a README shows, so that it is sharp
INK, DIM, PALE, GREY, WHITE = "#1A1A1A", "#5A5A5A", "#DDDDDD", "#C8C8C8", "#FFFFFF"
HUES = BLUE, ORANGE, GREEN, PINK, RED, *_ = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442"
RAMP = "#440154", "#46327E", "#365C8D", "#277F8E", "#1FA187", "#4AC16D", "#A0DA39", "#FDE725"  # viridis
MASK = {"may not look": "#F4F4F4", "may look": BLUE, "left out": "#BDBDBD"}  # HUES: Okabe and Ito's, safe for every eye
LINE, DOTS = 0, -1  # styles of a chart; a positive one is the width of bars
STRATEGY = {"dataset", "data_dir", "image_size", "patch_size", "segments", "hierarchy", "order", "seed"}

# --------------------------------------------------------------------- Paper and pencil: images, sheets of them, charts
def blend(values, scale=RAMP):
    """Values in 0..1 -> uint8 [...,3] on a scale of colours."""
    values, at, stops = torch.as_tensor(values).detach(), np.linspace(0, 1, len(scale)), map(ImageColor.getrgb, scale)
    return np.stack([np.interp(values, at, stop) for stop in zip(*stops)], -1).round().astype(np.uint8)

def as_grid(tokens): return tokens.unflatten(0, (math.isqrt(len(tokens)), -1))  # [N] -> [R,C]
def share(n): return (WIDTH - 2 * MARGIN - GAP * (n - 1)) // n  # width of n images in a row of a sheet
def swatch(words, w, *colours): return words, heat(w, 24, blend(np.linspace(0, 1, 10), colours)[None])  # for a legend
def photos(images): return ((images + 1) * 127.5).clamp(0, 255).round().byte().movedim(1, -1).numpy()  # [B,H,W,3]
font = functools.lru_cache(lambda size: ImageFont.load_default(size=size))

def write(image, x, y, words, size=24, fill=INK, anchor="la", align="left"):
    ImageDraw.Draw(image).text((x, y), words, fill, font(size), anchor, spacing=10, align=align)

def heat(w, h, cells=blend(0, [WHITE, WHITE])[None, None], labels=()):
    """Cells uint8 [R,C,3] as an image (a photo, a heat map, by default a white page), labels [R][C] where legible."""
    (R, C), image = cells.shape[:2], Image.fromarray(np.ascontiguousarray(cells)).resize((w, h), Image.NEAREST)
    size = min(30, int(0.55 * h / R))
    fits = size >= 18 and all(font(size).getlength(label) < 0.95 * w / C for row in labels for label in row)
    for r, c in np.ndindex(R, C) if fits and len(labels) else ():
        ink = WHITE if cells[r, c] @ [0.3, 0.59, 0.11] < 110 else INK
        write(image, (c + 0.5) * w / C, (r + 0.5) * h / R, labels[r][c], size, ink, "mm")
    return image

def frame(image, ids, fill=WHITE, width=2):
    """Draws lines between cells of different ids [R,C] -> image. Outside the id is 0: others are framed there too."""
    (R, C), ids, pen = ids.shape, np.pad(np.asarray(ids, int), 1), ImageDraw.Draw(image)
    w, h = image.width / C, image.height / R
    for down, right in (1, 0), (0, 1):
        for r, c in np.argwhere(ids[down:, right:] != ids[:R + 2 - down, :C + 2 - right]):
            pen.line([(c - down) * w, (r - right) * h, c * w, r * h], fill, width)
    return image

def arrow(image, a, b, fill, edge):
    """From near a to near b [2], bowed to pass by what lies between. None where two segments have one centre."""
    if (a == b).all():
        return
    t, pen = np.linspace(0, 1, 50)[:, None], ImageDraw.Draw(image)
    curve = a + t * (b - a) + t * (1 - t) * (b - a)[::-1] * (-0.5, 0.5)
    curve = curve[np.linalg.norm(curve - b, axis=1) > min(34, 0.3 * np.linalg.norm(b - a))]  # b is under a disc
    for colour, width in (edge, 9), (fill, 4):
        pen.line([tuple(point) for point in curve], colour, width, "curve")
    pen.regular_polygon((*curve[-1], 13), 3, math.degrees(math.atan2(*(curve[-2] - curve[-1]))), fill, edge, 2)

def sheet(draw, *rows, **values):
    """Rows of (words, image) under a title and a note, the docstring of a draw_... function with its {values}."""
    title, _, note = inspect.cleandoc(draw.__doc__).format(**values).partition("\n")
    heights = [max(image.height + 36 * len(words.splitlines()) for words, image in row) + 28 for row in rows]
    page, y = heat(WIDTH, 132 + 36 * note.count("\n") + sum(heights)), 132 + 36 * note.count("\n")
    write(page, MARGIN, 24, title, 38)
    write(page, MARGIN, 80, note, 26, DIM)
    for row, height in zip(rows, heights):
        x = MARGIN
        for words, image in row:
            write(page, x, y, words, 25)
            page.paste(image, (x, y + 36 * len(words.splitlines())))
            x += image.width + GAP
        y += height
    page.info["title"] = title  # for index.html
    return page

def token_map(ranks, side, colours=None):
    """Ranks [N] as a grid of tokens, coloured and numbered by rank."""
    grid, colours = as_grid(ranks).numpy(), blend(np.linspace(0, 1, ranks.max() + 1)) if colours is None else colours
    return frame(heat(side, side * len(grid) // len(grid[0]), colours[grid], grid.astype(str)), grid + 1)

def reveal(photo, keep, behind=blend(0, [GREY, GREY])):
    """The tokens keep [R,C] of a photo uint8 [H,W,3], before another photo or grey."""
    return np.where(np.kron(keep, np.ones([len(photo) // len(keep)] * 2))[..., None] > 0, photo, behind)

def ticks(low, high, most):
    step = next(m * 10.0 ** e for e in range(-12, 12) for m in (1, 2, 5) if (high - low) / (m * 10.0 ** e) <= most)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]

def chart(h, x_label, series, names=None):
    """Lines, dots and bars. Series: (xs, ys, colour, style) each. Names {x: word} replace the numbers on the axis."""
    edges = [x + side * max(0, style) for xs, _, _, style in series for x in xs for side in (-0.75, 0.75)]
    x0, x1, ys = min(edges), max(*edges, min(edges) + 1), [y for _, ys, *_ in series for y in ys]
    bars = any(style > 0 for *_, style in series)
    low, high, foot = 0 if bars else min(ys), max(ys), h - (160 if names else 88)
    room = 0.12 * (high - low) or abs(high) or 1
    y0, y1, unit, image = low - room * (low != 0), high + room, 1360 / (x1 - x0), heat(share(1), h)
    pen, place = ImageDraw.Draw(image), lambda x, y: (112 + unit * (x - x0), 8 + (foot - 8) * (y1 - y) / (y1 - y0))
    for y in ticks(y0, y1, h / 80):
        pen.line([place(x0, y), place(x1, y)], PALE, 2)
        write(image, 100, place(x0, y)[1], f"{y:g}", 24, DIM, "rm")
    for x in names or [x for x in ticks(x0, x1, 12) if not bars or x == round(x)]:
        write(image, place(x, y0)[0], foot + 12, names[x] if names else f"{x:g}", 24, DIM, "ma", "center")
    pen.line([place(x0, y1), place(x0, y0), place(x1, y0)], DIM, 2)
    write(image, share(1), h - 4, x_label, 24, DIM, "rd")
    for xs, ys, colour, style in series:
        points = [place(x, y) for x, y in zip(xs, ys)]
        if style == LINE:
            pen.line(points, colour, 4, "curve")
        for i, (x, y) in enumerate(points if style > 0 else ()):
            pen.rectangle([x - style * unit / 2, y, x + style * unit / 2 - 2, foot], colour)
            if i % math.ceil(80 / (style * unit)) == 0:  # so that numbers never touch
                write(image, x, y - 6, f"{ys[i]:.3g}", anchor="mb")
        for x, y in points if style == DOTS or len(points) == 1 and style == LINE else ():
            pen.ellipse([x - 9, y - 9, x + 9, y + 9], colour, WHITE, 2)
    return image

# --------------------------------------------------------------------------------------- Pictures that need no training
def draw_segments(photo, config):
    """What is predicted when, by strategy (Figure 2)
    A cell is a token, its number and colour are its rank. Tokens of one rank form a segment and are predicted
    together, from those of lower rank. Rank 0 is given."""
    panels = [("(a) image\n ", heat(share(4), share(4), photo))]
    for i, (words, strategy) in enumerate({
            "(b) pixel raster": Config(image_size=16, patch_size=1, segments="patch", order="raster"),
            "(c) patch raster": Config(segments="patch", order="raster"), "(d) patch random": Config(segments="patch"),
            "(e) square, M = 2": Config(hierarchy=(16,)), "(f) blob, K = 5": Config(segments="blob", hierarchy=(5,)),
            "scatter, K = 5 (Table 5)": Config(segments="scatter", hierarchy=(5,)),
            f"yours: {config.segments} {' -> '.join(map(str, config.hierarchy))}": config}.items()):
        ranks = sample_ranks(strategy, 1, generator=seeded("cpu", config.seed, i))[0]
        panels.append((f"{words}\n{len(ranks)} tokens, {ranks.max() + 1} segments", token_map(ranks, share(4))))
    return sheet(draw_segments, panels[:4], panels[4:], [swatch("predicted first ... last", 300, *RAMP)])

def traversal(fine, coarse, ranks, side):
    """Segments, partitions, ranks [N] -> a map with arrows from segment to segment, and how often they leave."""
    grid, centres, homes, cells = as_grid(ranks), [], [], np.zeros((len(ranks), 3), np.uint8)
    for hue, home in zip(HUES * len(ranks), coarse.unique()):
        segments = fine[coarse == home].unique()
        for shade, segment in zip(np.linspace(0, 0.65, len(segments)), segments):
            cells[fine == segment] = blend(shade, [hue, WHITE])
    image = frame(heat(side, side, cells.reshape(*grid.shape, 3)), grid + 1)
    for k in range(ranks.max() + 1):
        tokens = (grid == k).nonzero().double().numpy() + 0.5  # [n,2], rows and columns
        far = np.linalg.norm(tokens - tokens.mean(0), axis=1)  # the mean may lie outside of a bent segment
        centres.append(tokens[far < far.min() + 1e-6].mean(0)[::-1] * side / len(grid))
        homes.append(coarse[ranks == k][0].item())  # the partition that the segment is in
    stays = [a == b for a, b in zip(homes, homes[1:])]
    for a, b, stay in [*zip(centres, centres[1:], stays)][::-1]:  # backwards, so that none covers an earlier one's head
        arrow(image, a, b, *(INK, WHITE) if stay else (WHITE, INK))
    for k, centre in enumerate(centres):
        ImageDraw.Draw(image).ellipse([*(centre - 22), *(centre + 22)], WHITE if k else INK, INK, 2)
        write(image, *centre, str(k), 24, INK if k else WHITE, "mm")
    return image, f"leaves a partition in {stays.count(False)} of {len(stays)} steps"

def draw_hierarchy(config):
    """Flat and hierarchical serialization (Figure 3)
    Hue: partition. Shade: segment. Arrows: order of prediction, white where they leave a partition, which a
    hierarchical order does only when all its segments are done."""
    rows = []
    for i, shown in enumerate([Config(hierarchy=(16, 4)), Config(segments="blob", hierarchy=(11, 5))]):
        shown = config if config.segments == shown.segments and len(config.hierarchy) > 1 else shown
        generator = seeded("cpu", config.seed, i)
        levels = sample_levels(shown, 1, generator=generator)
        rows.append([])
        for name, used in ("flat", levels[:1]), ("hierarchical", levels):
            ranks = serialize(used, config.order, generator)[0]
            image, leaves = traversal(levels[0][0], levels[-1][0], ranks, share(2))
            counts = " -> ".join(map(str, shown.hierarchy[:len(used)]))
            rows[-1].append((f"{shown.segments}, {name}: {counts}\n{leaves}", image))
    return sheet(draw_hierarchy, *rows)

def draw_order(photo, ranks, predicted=None, most=64):  # photos uint8 [H,W,3], ranks [N]; at `most` so many frames
    """Segment by segment: what is given, what comes next (Figure 1)
    Step {step} of {last}. Outlined: what this step predicts, from all that is given. The end: the whole image."""
    grid, last, side, frames = as_grid(ranks), ranks.max().item(), share(2), []
    words = "ranks: when each token is predicted" if predicted is None else "predicted, each segment from true pixels"
    for step in sorted({round(step) for step in np.linspace(1, last + 1, min(last + 1, most))}):  # ends with all given
        given = frame(heat(side, side, reveal(photo, grid < step)), torch.where(grid >= step, grid + 1, 0), "#E8E8E8")
        right = token_map(ranks, side) if predicted is None else heat(side, side, reveal(predicted, grid <= step))
        row = [("given: true pixels", frame(given, grid == step, RED, 6)), (words, frame(right, grid == step, RED, 6))]
        frames.append(sheet(draw_order, row, step=min(step, last), last=last).reduce(2))
    palette = Image.fromarray(np.vstack([frames[0], frames[-1]])).quantize(dither=0)  # one for all: a far smaller GIF
    return [image.quantize(palette=palette, dither=0) for image in frames]

def mask_panels(ranks, side, colours, order):
    """Source, target and memory mask of ranks [N], with bands in the colours of the ranks on both axes."""
    first, last, thick, panels = ranks == 0, ranks == ranks.max(), 1 + len(ranks) // 20, []
    left_out = dict(source=last[:, None] | last, target=first[:, None] | first, memory=first[:, None] | last)
    for (name, out), mask in zip(left_out.items(), attention_masks(ranks)):
        cells = blend(torch.where(out, 2, mask.long()) / 2, [*MASK.values()])
        cells = np.pad(cells, ((thick, 0), (thick, 0), (0, 0)), constant_values=255)
        cells[:thick, thick:], cells[thick:, :thick] = colours[ranks], colours[ranks][:, None]
        size = side // len(cells) * len(cells) if 4 * len(cells) < side else side  # few cells: all alike
        panels.append((f"{name} mask\n{order}", heat(size, size, cells)))
    return panels

def draw_masks(ranks):
    """Attention masks: who may look at whom (Figure 4)
    Row i may look at column j where the cell is blue. Bands: colours of the ranks. Serialized, that is sorted by rank,
    masks are made of blocks; in raster order they hold the same, less visibly. Left out are the last segment in the
    encoder, as nothing comes after it, and the first in the decoder, as nothing comes before it."""
    few, hues, rows = torch.tensor([2, 0, 1, 2, 0, 1]), blend([0, 0.5, 1], [GREEN, BLUE, RED]), []
    for r, side, colours in (few, share(7), hues), (ranks, share(4), blend(np.linspace(0, 1, ranks.max() + 1))):
        rows.append([(f"ranks\n{len(r)} tokens", token_map(r, side, colours)),
                     *mask_panels(r.sort().values, side, colours, "serialized")])
        rows.append([("", heat(side, 1)), *mask_panels(r, side, colours, "raster order")])
    return sheet(draw_masks, rows[0] + rows[1][1:], *rows[2:], [swatch(w, 200, c, c) for w, c in MASK.items()])

# ------------------------------------------------------------------------------------------ Pictures of a trained model
def predict(model, images, ranks):
    """-> predictions as photos, squared errors of tokens [B,N] (NaN if given), squared errors of predicting zero."""
    tokens, guess = patchify(images, model.config.patch_size), model.predict(images, ranks)
    pixels, target = guess, tokens
    if model.config.target == "normalized":  # to see pixels, borrow what was not predicted: true mean and deviation
        pixels = guess * (tokens.var(-1, keepdim=True) + 1e-6).sqrt() + tokens.mean(-1, keepdim=True)
        target = normalize_patches(tokens)
    pixels = unpatchify(pixels.where(ranks[..., None] > 0, tokens), model.config.patch_size)
    return photos(pixels), (guess - target).square().mean(-1), target.square().mean(-1)

def draw_predictions(model, images, ranks):  # images float [B,3,H,W], ranks [B,N]
    """Predictions, segment by segment (Sections 4 and 5)
    Outlined: predicted, from the true pixels shown. Grey: unknown; in the error: given. Normalized patches are shown
    with their true mean and deviation, which the model does not predict (as in MAE's demo)."""
    rows, square, (predicted, errors, _) = [], functools.partial(heat, *[share(8)] * 2), predict(model, images, ranks)
    worst = errors.nan_to_num(0).max().item() or 1
    for photo, r, guess, error in zip(photos(images), map(as_grid, ranks), predicted, map(as_grid, errors)):
        last, given = r.max().item(), reveal(photo, r == 0)
        row = {"target image": square(photo), "given": square(given)}
        for k in sorted({round(k) for k in np.linspace(1, last, min(last, 4))}):
            row[f"rank {k} of {last}"] = frame(square(reveal(guess, r == k, reveal(photo, r < k))), r == k, RED, 4)
        row["all predicted"] = square(reveal(guess, r > 0, given))
        cells = reveal(blend(error.nan_to_num(0) / worst), r > 0)
        row[f"error {error.nanmean():.2f}"] = square(cells)
        rows.append(row.items())
    return sheet(draw_predictions, *rows, [swatch(f"mean squared error of a token: 0 ... {worst:.2f}", 600, *RAMP)])

def draw_skips(model):
    """Trainable skip connections (Section 4.2)
    Decoder layer l reads Z[l], the sum over k of W[l,k] H[k], where H[k] is what encoder layer k puts out.
    Blue: below zero. Orange: above."""
    check(model.config.skip, "the model has no skip connections: train one without --no-skip")
    W, rows, (D, E) = model.skip, [], model.skip.shape
    for words, values in ("W", W), ("W less its initialization", W - RandSAC(model.config).skip):
        cells = blend(values / (values.abs().max() or 1) / 2 + 0.5, [BLUE, WHITE, ORANGE])
        cells = np.pad(cells, ((1, 0), (1, 0), (0, 0)), constant_values=255)
        labels = [["", *(f"H[{k + 1}]" for k in range(E))]]
        labels += [[f"Z[{l + 1}]", *(f"{value:.2f}" for value in row)] for l, row in enumerate(values.tolist())]
        rows.append([(words, heat(share(1), 56 * (D + 1), cells, labels))])
    return sheet(draw_skips, *rows)

def attention_weights(model, run):
    """-> [L,heads,n,n]: the weights of each encoder layer, for the first image, while run() uses the model."""
    kept = []
    hooks = [layer.attention.register_forward_pre_hook(lambda layer, x: kept.append(layer.weights(*x)[0]))
             for layer in model.encoder]
    run()
    for hook in hooks:
        hook.remove()
    return torch.stack(kept)

def draw_attention(model, images, ranks, token=None):  # images float [1,3,H,W], ranks [1,N]
    """Where a token looks (Section 4.1)
    The outlined token (rank {rank}): a row for each encoder layer, the first on top, a column for each head. Left: in
    pre-training, which hides later segments (grey) and leaves out the last. Right: in probing. A scale for each map."""
    grid, N = as_grid(torch.arange(ranks.shape[1])), ranks.shape[1]
    far = (torch.cartesian_prod(*[torch.arange(len(grid))] * 2) - len(grid) // 2).abs().sum(1)  # from the middle
    token = far.where(ranks[0] < ranks.max(), N).argmin().item() if token is None else token
    check(0 <= token < N, f"--token {token} is not one of the tokens 0 to {N - 1}")
    masked = attention_weights(model, lambda: model.predict(images, ranks))[:, :, token]  # [L,heads,N]
    free = attention_weights(model, lambda: model.encode(images))[:, :, token]
    hidden, (L, H, _) = ~attention_masks(ranks)[0][0, token].numpy(), masked.shape
    check(H <= 32, f"{H} heads do not fit on a page of {WIDTH} pixels")
    side, rows = share(2 * H), [[("", heat(240, 240, photos(images)[0])), ("", token_map(ranks[0], 240))]]
    for l in range(L):
        rows.append([])
        for words, weights, grey in ("masked", masked[l], hidden), ("no mask", free[l], hidden & False):
            for h, w in enumerate(weights):
                cells = np.where(grey[:, None], blend(0, [GREY, GREY]), blend(w / w.max()))
                rows[-1].append(("" if l else " " if h else words, heat(side, side, cells.reshape(*grid.shape, 3))))
    for _, image in sum(rows, []):
        frame(image, grid == token, RED, 4)
    return sheet(draw_attention, *rows, [swatch("weight: 0 ... largest of the map", 400, *RAMP)], rank=ranks[0, token])

def draw_loss_by_rank(model, images, ranks):  # images float [B,3,H,W], ranks [B,N]
    """Context helps: loss by rank (Section 3)
    Mean over {n} orders of prediction. The higher the rank, the more of an image is given."""
    errors, zero = map(torch.cat, zip(*(predict(model, *part)[1:] for part in zip(images.split(64), ranks.split(64)))))
    losses, zero = [errors[ranks == k].mean().item() for k in range(1, ranks.max() + 1)], zero[ranks > 0].mean().item()
    series = [(range(1, len(losses) + 1), losses, BLUE, 0.8), ([0.4, len(losses) + 0.6], [zero, zero], RED, LINE)]
    words = f"mean squared error\nline: predicting zero, {zero:.3g}"
    return sheet(draw_loss_by_rank, [(words, chart(680, "rank", series))], n=len(images))

def draw_curves(runs):  # {run: read_run(run)}
    """Loss, learning rate and probes (Section 5)
    Loss: lines, of crops of training images; dots, of whole held-out ones, which may be harder or easier."""
    loss, lr, bars, wide = [], [], [], 0.8 / len(runs)
    names = sorted({name for _, probes, _ in runs.values() for name in probes})
    for i, (hue, (rows, probes, _)) in enumerate(zip(HUES * len(runs), runs.values())):
        for series, key, style in (loss, "loss", LINE), (loss, "held_out_loss", DOTS), (lr, "lr", LINE):
            found = [row for row in rows if key in row]
            series.append(([row["step"] for row in found], [row[key] for row in found], hue, style))
        bars.append(([names.index(name) + wide * i for name in probes], [*probes.values()], hue, wide))
    words = {j + (0.8 - wide) / 2: name.replace("-", "\n") for j, name in enumerate(names)}
    return sheet(draw_curves, *([swatch(run, 200, hue, hue)] for run, hue in zip(runs, HUES * len(runs))),
                 [("loss", chart(580, "step", loss))], [("learning rate", chart(340, "step", lr))],
                 *[[("probe, top-1 %", chart(500, "", bars, words))] for _ in names[:1]])

def draw_layers(accuracy):
    """Linear probe by depth (Section 5.1)
    Accuracy of a linear classifier on the frozen features of a layer. The paper probes the last."""
    check(accuracy, "no probe-layers.json in the run: python probe.py CHECKPOINT --protocol layers")
    return sheet(draw_layers, [("top-1 %", chart(640, "layer", [(range(1, len(accuracy) + 1), accuracy, BLUE, 0.8)]))])

# ------------------------------------------------------------------------------------ From the command line to pictures
def read_run(folder):
    """Directory of a run -> rows of its metrics.jsonl, {NAME: top-1 % of probe-NAME.json}, those of the layers."""
    try:
        json.loads(Path(folder, "config.json").read_text())
        rows = [json.loads(row) for row in Path(folder, "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()]
        check(rows and all(math.isfinite(row["step"] + row["loss"] + row["lr"]) for row in rows), "no step is logged")
        found = {path.stem[6:]: json.loads(path.read_text()) for path in sorted(Path(folder).glob("probe-*.json"))}
        top1 = {name: float(probe["top1"]) for name, probe in found.items() if "top1" in probe}
        return rows, top1, [float(accuracy) for accuracy in found.get("layers", {}).get("accuracy", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not a whole run of randsac.py ({error}): name another directory") from error

def gather(of):
    """Adds what flags and pictures ask for: model or None, config, images float [n,3,H,W] and their ranks [n,N]."""
    of.model, trained = RandSAC.load(of.checkpoint) if of.checkpoint else (None, Config())
    flags = {name: value for name, value in vars(of).items() if name in STRATEGY}
    check(not of.model or not {"image_size", "patch_size"} & flags.keys(),
          "--image-size and --patch-size are those of the checkpoint: leave them out")
    other = dict(hierarchy=None) if "segments" in flags else {}  # not the hierarchy of other segments
    other.update(dict(data_dir="data") if flags.get("dataset", trained.dataset) != trained.dataset else {})
    of.config = config = Config(**{**dataclasses.asdict(trained), **other, **flags})
    if {*of.names} <= {"hierarchy", "skips", "curves", "layers"}:
        return  # they show no image, so none is downloaded
    size = config.image_size if of.model else config.grid * math.ceil(128 / config.grid)  # large if no model minds
    images = (torch.tensor(decode(of.image, size)).expand(5, -1, -1, -1) if of.image else load_images(config, False)[0]
              if of.model or "dataset" in flags else draw_shapes(8, size, seed=22)[0][7:])
    check(len(images), f"{config.data_dir} has no test images to show: name one with --image FILE")
    of.images = normalize(images[::len(images) // 512 or 1], size)  # of every class
    of.ranks = sample_ranks(config, len(of.images), generator=seeded("cpu", config.seed))

PICTURES = {  # in the order of index.html; the first four need no training
    "segments": lambda of: draw_segments(photos(of.images[:1])[0], of.config),
    "hierarchy": lambda of: draw_hierarchy(of.config),
    "order": lambda of: draw_order(photos(of.images[:1])[0], of.ranks[0], of.model and predict(
        of.model, of.images[:1], of.ranks[:1])[0][0]),
    "masks": lambda of: draw_masks(of.ranks[0]),
    "predictions": lambda of: draw_predictions(of.model, of.images[:5], of.ranks[:5]),
    "skips": lambda of: draw_skips(of.model),
    "attention": lambda of: draw_attention(of.model, of.images[:1], of.ranks[:1], of.token),
    "loss-by-rank": lambda of: draw_loss_by_rank(of.model, of.images, of.ranks),
    "curves": lambda of: draw_curves({run: read_run(run) for run in of.runs}),
    "layers": lambda of: draw_layers(read_run(of.runs[0])[2])}

@torch.no_grad()
def main(arguments):
    parser = make_parser(__doc__, {field.name for field in dataclasses.fields(Config)} - STRATEGY)
    add, free, page = functools.partial(parser.add_argument, default=None), [*PICTURES][:4], ""
    add("pictures", nargs="*", default=[], metavar="PICTURE", help=", ".join(PICTURES) + ", all; with curves also runs")
    add("--checkpoint", metavar="FILE", help="checkpoint.pt of a run")
    add("--image", metavar="FILE", help="the image to draw (default: held-out ones, or without a model a drawn one)")
    add("--token", type=int, metavar="I", help="whose attention to draw, row by row from 0 (default: near the middle)")
    add("--out", type=Path, default=Path("figures"), metavar="DIR", help="folder for the pictures (default: figures)")
    of = parser.parse_intermixed_args(arguments)
    of.runs = [name for name in of.pictures if name not in (*PICTURES, "all")]
    everything = "all" in of.pictures or not of.pictures and of.checkpoint
    check(not of.runs or {"curves", "all"} & {*of.pictures},
          f"there is no picture {' '.join(of.runs[:1])}: choose from {', '.join(PICTURES)} or all")
    of.runs = [str(Path(of.checkpoint).parent)] + of.runs if of.checkpoint else of.runs
    of.names = [*PICTURES] if everything else [name for name in of.pictures if name in PICTURES] or free
    gather(of)
    of.out.mkdir(parents=True, exist_ok=True)
    for name in of.names:
        try:
            check(of.model or name in free or name == "curves" and of.runs, "no --checkpoint: python randsac.py first")
            picture = PICTURES[name](of)
        except UserError as error:
            check(everything, f"cannot draw {name}: {error}")
            print(f"skipped {name}: {error}")
            continue
        first, *more = picture if isinstance(picture, list) else [picture]
        path = of.out / f"{name}.{'gif' if more else 'png'}"
        gif = dict(save_all=True, append_images=more, loop=0, duration=[500] * len(more) + [2500]) if more else {}
        write_whole(path, lambda file: first.save(file, path.suffix[1:], **gif))
        page += f'<h2>{first.info["title"]}</h2><img src="{path.name}" alt="{name}" width="800">\n'
        print(f"wrote {path}")
    if everything:
        page = '<!doctype html><title>RandSAC</title><body style="width:50em;margin:auto;font:1em sans-serif">' + page
        write_whole(of.out / "index.html", lambda file: file.write(page.encode()))
    print("next:", f"open {of.out}/index.html" if everything else
          f"python visualize.py all --checkpoint {of.checkpoint or 'FILE'}")

if __name__ == "__main__":
    run_command(main)
