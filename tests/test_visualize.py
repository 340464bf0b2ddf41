"""visualize.py: pixels are read back from the pictures; the command draws every one of them."""

import functools
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    MICRO_FLAGS,
    ROOT,
    go,
    micro,
    one_line,
    random_model,
    refusal,
    run_here,
)
from PIL import Image
from torch.nn import functional as F

import randsac
import visualize as vz
from randsac import RandSAC, attention_masks, sample_ranks

of_every_strategy = pytest.mark.parametrize("segments", randsac.HIERARCHIES)
PROBE = {"dataset": "folder", "data_dir": "images", "image_size": 8}
PROBE |= {"features": "encoder", "random_init": False}
LINEAR = {**PROBE, "protocol": "linear", "top1": 41.25}
UNTRAINED = {**LINEAR, "random_init": True, "top1": 30.5}
LAYERS = {**PROBE, "protocol": "layers", "layers": [30.5, 35.0], "layers_knn": [20.0, 25.0]}


def write_probes(folder, *rows):
    (folder / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def run(tmp_path_factory, image_folder):
    """A run of 5 steps, and probes of it as probe.py would write them."""
    out = tmp_path_factory.mktemp("runs") / "micro"
    flags = [*MICRO_FLAGS, "--segments", "blob", "--hierarchy", 5, 2, "--data-dir", image_folder]
    assert run_here(*flags, "--max-steps", 5, "--out", out) == 0
    write_probes(out, LINEAR, UNTRAINED, LAYERS)
    return out


@pytest.fixture(scope="session")
def bare(run, tmp_path_factory):
    """A copy of the run whose images are gone, without skips and probes. In it, an empty run."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("bare") / "run")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    saved["config"].update(data_dir="nowhere", skip=False)
    del saved["model"]["skip"]
    torch.save(saved, folder / "checkpoint.pt")
    write_probes(folder)
    (folder / "empty").mkdir()
    return folder


draw = functools.partial(run_here, main=vz.main)


def shown(model=None, images=None, labels=(), ranks=None, **parts):
    """What the pictures show; images are uint8 [B,3,H,W]."""
    if images is not None:
        parts["images"] = (images / 127.5 - 1, list(labels))
    parts = {"flags": {}, "runs": [], "config": model and model.config, **parts}
    return SimpleNamespace(model=model, ranks=ranks, **parts)


def random_images(count, size):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def as_image(pixels, size):
    """Pixels uint8 [3,H,W] -> an enlarged image of them."""
    return Image.fromarray(pixels.movedim(0, -1).numpy()).resize((size, size), Image.NEAREST)


def ranks_of(segments, image_size=32):
    return sample_ranks(micro(segments=segments, image_size=image_size), 1)[0]


def rgb(code):
    return np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)])


def array(image):
    return np.asarray(image.convert("RGB")).astype(int)


def cells(image, rows, columns):
    """The colours [rows,columns,3] a quarter into each cell, off the lines between cells and the
    numbers in them."""
    pixels = array(image)
    y = ((np.arange(rows) + 0.25) * pixels.shape[0] / rows).astype(int)
    x = ((np.arange(columns) + 0.25) * pixels.shape[1] / columns).astype(int)
    return pixels[y][:, x]


def colours(pixels):
    return len({tuple(colour) for colour in pixels.reshape(-1, 3).tolist()})


def images_of(sheet):
    """The arguments of a call of vz.sheet -> the images on that page."""
    return [image for row in sheet[2] for _, image in row]


def tiles_of(image, side):
    """-> the square images that vz.tile has put together."""
    step = side + vz.GAP
    corners = [(x, y) for y in range(0, image.height, step) for x in range(0, image.width, step)]
    return [image.crop((x, y, x + side, y + side)) for x, y in corners]


def halves(frame):
    """-> the two pictures of a frame, int64 [side,side,3]."""
    pixels = array(frame)
    side = vz.column(2) // 2
    return pixels[-side - 14 : -14, 20 : 20 + side], pixels[-side - 14 : -14, -side - 20 : -20]


def margins_are_white(page):
    pixels = array(page)
    edge = pixels.shape[1] // 160  # of a unit: 10 of 1600 pixels
    parts = pixels[:edge], pixels[-edge // 2 :], pixels[:, :edge], pixels[:, -edge:]
    return all((part >= 250).all() for part in parts)  # a GIF's white may not be quite white


def calls_of(name, monkeypatch):
    """-> a list that the arguments of each call of vz.NAME are put in from now on."""
    calls = []
    function = getattr(vz, name)
    monkeypatch.setattr(vz, name, lambda *c, **d: calls.append([*c, d]) or function(*c, **d))
    return calls


# --- pages, maps, masks, frames


def test_a_page_holds_images_in_rows_below_their_words():
    pixels = torch.randint(0, 256, (3, 90, 70, 3), dtype=torch.uint8).numpy()
    images = [Image.fromarray(part[:height]) for part, height in zip(pixels, (50, 90, 60))]
    one, two, three = images
    page = vz.sheet("title", "note " * 60, [[("a", one), ("b\nc", two)], [("", three)]])
    below = page.height - 28 - 60
    above = below - 28 - 90
    for image, x, y in zip(images, (40, 40 + 70 + 20, 40), (above, above, below)):
        assert page.crop((x, y, x + 70, y + image.height)) == image
    text = array(page)[above - 72 : above]  # of one line and of two
    assert (text[36:, :130] == 255).all() and (text[:36, :130] < 100).any()
    assert (text[36:, 130:] < 100).any()


@of_every_strategy
def test_a_map_has_a_colour_for_each_rank_and_white_lines_around_segments(segments):
    ranks = ranks_of(segments)
    image = vz.token_map(ranks, 8 * 40)
    seen = cells(image, 8, 8)
    grid = ranks.view(8, 8).numpy()
    assert colours(seen) == ranks.max() + 1
    assert all(colours(seen[grid == rank]) == 1 for rank in range(ranks.max() + 1))

    white = (array(image) == 255).all(-1)
    middle = 40 * np.arange(8) + 4  # of a cell's edge, off its number
    assert (white[middle][:, 40 * np.arange(1, 8)] == (grid[:, 1:] != grid[:, :-1])).all()
    assert (white[40 * np.arange(1, 8)][:, middle] == (grid[1:] != grid[:-1])).all()
    for edge in (white[0], white[-1], white[:, 0], white[:, -1]):
        assert edge.all()


def test_the_segments_picture_holds_an_order_of_every_strategy_and_of_yours(monkeypatch):
    yours = {"segments": "blob", "hierarchy": (7,), "image_size": 48, "seed": 2}
    photo = random_images(1, 48)
    what = shown(images=photo, config=randsac.Config(**yours), flags=yours)
    sheets = calls_of("sheet", monkeypatch)
    vz.draw_segments(what)
    first, *maps = images_of(sheets[0])[:-1]
    assert first == as_image(photo[0], 288)
    typed = [randsac.make_parser("").parse_args(flags.split()) for flags in vz.STRATEGIES.values()]
    for i, settings in enumerate([*map(vars, typed), yours]):
        strategy = randsac.Config(**settings)
        ranks = sample_ranks(strategy, 1, generator=randsac.seeded("cpu", 2, i))[0]
        assert maps[i] == vz.token_map(ranks, 288), settings
    what.flags = {"dataset": "shapes"}  # not of an order
    vz.draw_segments(what)
    assert images_of(sheets[1])[1:-1] == maps[:-1]


@of_every_strategy
def test_mask_panels_are_the_masks_with_what_is_left_out(segments):
    ranks = ranks_of(segments, 16)
    last_rank = ranks.max().item()
    first = (ranks == 0).numpy()
    last = (ranks == last_rank).numpy()
    forbidden, allowed, left_out = (rgb(colour) for colour in vz.MASK.values())
    ends = [(last, last), (first, first), (first, last)]
    panels = vz.mask_panels(ranks, 370, "raster order")
    for (_, image), mask, (rows, columns) in zip(panels, attention_masks(ranks), ends):
        seen = cells(image, 17, 17)
        inside = seen[1:, 1:]
        out = rows[:, None] | columns
        assert ((inside == left_out).all(-1) == out).all()
        assert ((inside == allowed).all(-1) == (mask.numpy() & ~out)).all()
        assert ((inside == forbidden).all(-1) == (~mask.numpy() & ~out)).all()
        for band in (seen[0, 1:], seen[1:, 0]):  # one colour for each rank
            assert colours(band) == last_rank + 1
            assert all(colours(band[ranks == k]) == 1 for k in range(last_rank + 1))


def test_the_masks_picture_holds_figure_4_and_blocks_when_serialized(monkeypatch):
    words = calls_of("write", monkeypatch)
    sheets = calls_of("sheet", monkeypatch)
    few = torch.tensor([2, 0, 1, 2, 0, 1])
    ranks = ranks_of("square")
    vz.draw_masks(shown(ranks=ranks[None]))
    unit = vz.column(7) / 3
    middles = [(unit * (c + 0.5), unit * (r + 0.5)) for r in range(2) for c in range(3)]
    assert [call[1] for call in words[:6]] == middles
    hues = (vz.GREEN, vz.BLUE, vz.RED)
    panels = vz.mask_panels(few.sort().values, vz.column(7), "", hues)
    panels += vz.mask_panels(few, vz.column(7), "", hues)
    serialized = vz.mask_panels(ranks.sort().values, vz.column(4), "")
    panels += serialized + vz.mask_panels(ranks, vz.column(4), "")
    top, middle, bottom, _ = sheets[0][2]
    found = [*top[1:], *middle[1:], *bottom[1:]]
    assert [image for _, image in found] == [image for _, image in panels]
    blue = (cells(serialized[0][1], 68, 68)[4:, 4:] == rgb(vz.BLUE)).all(-1)
    steps = np.diff(blue[:60, :60].astype(int), axis=1)
    assert (steps <= 0).all()  # a row is blue, and from some column on it is not


@pytest.mark.parametrize("segments", ["square", "blob", "mae"])
def test_frames_reveal_segment_by_segment_and_end_with_the_whole_photo(segments, tmp_path):
    photo = random_images(1, 32) // 2  # never the grey of what is hidden
    ranks = ranks_of(segments, 16).clamp(max=6)
    frames = vz.draw_order(shown(images=photo, ranks=ranks[None]))
    assert len(frames) == ranks.max() + 1
    vz.save(frames, tmp_path / "order.gif")
    gif = Image.open(tmp_path / "order.gif")
    gif.seek(gif.n_frames - 1)
    assert margins_are_white(gif) and gif.info["duration"] == 2500
    whole = array(as_image(photo[0], vz.column(2)).reduce(2))
    assert np.abs(halves(gif)[0] - whole).mean() < 9  # of 256 levels: a palette has 256 colours
    assert np.abs(halves(frames[-2])[0] - whole).mean() > 9
    half = len(frames) // 2
    left = Image.fromarray(halves(frames[half])[0].astype(np.uint8))
    grey = np.abs(cells(left, 4, 4) - 200).max(-1) < 8
    assert (grey == (ranks.view(4, 4) >= half + 1).numpy()).all()


def test_all_ranks_keep_their_colours_in_the_last_of_a_few_frames():
    photo = random_images(1, 32)  # which wants all the palette
    frames = vz.draw_order(shown(images=photo, ranks=torch.arange(16)[None]), most=3)
    assert len(frames) == 3
    right = Image.fromarray(halves(frames[-1])[1].astype(np.uint8))
    seen = cells(right, 4, 4).reshape(-1, 3)
    assert np.abs(seen - vz.blend(torch.arange(16) / 15).numpy()).max() <= 6
    assert colours(seen) == 16


def test_arrows_are_red_where_a_partition_is_left_and_black_elsewhere():
    image, words = vz.traversal(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 3, 2]), 400)
    assert words == "leaves a partition in 1 of 3 steps"
    hues = array(image)[30::200, 30::200]  # of the squares, off arrows and discs
    assert colours(hues) == 2 and colours(hues[:1]) == colours(hues[1:]) == 1
    red = (array(image) == rgb(vz.RED)).all(-1)
    black = (array(image) == rgb(vz.INK)).all(-1)
    assert black[90:110, 150:250].sum() > 200 and not red[90:110, 150:250].any()  # 0 to 1
    assert red[150:250, 290:310].sum() > 200 and not black[150:250, 290:310].any()  # 1 to 2
    vz.traversal(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 1, 0]), 740)  # one centre


# --- what a model does


@pytest.mark.parametrize("target", ["normalized", "pixels"])
def test_a_perfect_prediction_is_shown_as_the_image_and_has_no_error(target):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    model = RandSAC(micro(target=target))
    ranks = sample_ranks(micro(), 2)
    truth = model.target(randsac.patchify(images, 4))
    model.predict = lambda images, ranks: truth.masked_fill((ranks == 0)[..., None], torch.nan)
    photos, errors = vz.predict(model, images, ranks)
    assert (photos == ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1)).all()
    assert (errors.isnan() == (ranks == 0)).all() and errors.nan_to_num(0).max() < 1e-9


@of_every_strategy
def test_steps_show_predictions_among_true_pixels_of_lower_ranks_only(segments, monkeypatch):
    config = micro(segments=segments, image_size=32, target="pixels")
    model = RandSAC(config)
    model.predict = lambda images, ranks: torch.full((1, 64, 48), -1.0)  # black everywhere
    images = random_images(1, 32)
    ranks = sample_ranks(config, 1)
    sheets = calls_of("sheet", monkeypatch)
    vz.draw_predictions(shown(model, images, ["name"], ranks))
    photo, given, *steps, predicted, _ = (image for _, image in sheets[0][2][0])

    r = torch.kron(ranks[0].view(8, 8), torch.ones(4, 4, dtype=torch.int64))  # of each pixel
    pixels = images[0]
    grey = torch.full_like(pixels, 200)
    black = torch.zeros_like(pixels)
    side = vz.column(8)
    assert photo == as_image(pixels, side)
    assert given == as_image(torch.where(r == 0, pixels, grey), side)
    assert predicted == as_image(torch.where(r == 0, pixels, black), side)
    last = ranks.max().item()
    for k, step in zip(np.linspace(1, last, min(last, 4)).round(), steps, strict=True):
        known = torch.where(r < k, pixels, torch.where(r == k, black, grey))
        assert step == vz.outline(as_image(known, side), ranks[0].view(8, 8) == k, vz.RED, 4)


def test_errors_are_those_of_the_loss_and_partitions_are_marked(monkeypatch):
    config = micro(image_size=32)
    model = random_model(config).float()
    images = random_images(70, 32)
    ranks = sample_ranks(config, 70)
    charts = calls_of("chart", monkeypatch)
    vz.draw_loss_by_rank(shown(model, images, ranks=ranks))  # without no_grad, as in a notebook
    (_, bars, _, _), (_, line, _, _) = charts[0][1]
    with torch.no_grad():
        loss = model(images / 127.5 - 1, ranks).item()
    assert list(bars) == list(range(1, 16))
    assert sum(bars.values()) / 15 == pytest.approx(loss, rel=1e-4)
    assert line[1] == pytest.approx(47 / 48, rel=1e-3)  # that variance has n - 1 under it

    # A line stands before each rank at which, in every image, another square of 16 tokens begins.
    partition = randsac.square_segments(8, 4)
    home = [[partition[row == step][0].item() for step in range(16)] for row in ranks]
    changes = np.flatnonzero((np.diff(home) != 0).all(0)) + 1
    marks = charts[0][-1]["marks"]
    assert [x + 0.5 for x in marks] == changes.tolist() == [4, 8, 12]
    model.config = micro(segments="blob", image_size=32)
    vz.draw_loss_by_rank(shown(model, images[:8], ranks=sample_ranks(model.config, 8)))
    assert charts[1][-1]["marks"] == []


def test_attention_weights_are_those_that_make_the_output():
    model = random_model(micro()).float()
    images = torch.rand(1, 3, 16, 16)
    ranks = sample_ranks(micro(), 1)
    seen = []  # inputs and output of each attention
    for part in model.modules():
        if isinstance(part, randsac.Attention):
            part.register_forward_hook(lambda *found: seen.append(found))
    weights = vz.attention_weights(model, model.predict, images, ranks)
    weights += vz.attention_weights(model, model.encode, images)
    source, target, memory = attention_masks(ranks[0])
    everything = source | True
    masks = [source, source, target, memory, target, memory, everything, everything]
    for w, mask, (attention, inputs, output) in zip(weights, masks, seen, strict=True):
        assert ((w > 0) == mask)[:, ranks[0] > 0].all()
        _, _, values = attention.split(*inputs[:2])
        mixed = (w[None] @ values).transpose(1, 2).flatten(2)
        assert torch.allclose(attention.out(mixed), output, atol=1e-5)


def test_attention_maps_have_a_row_for_each_layer_and_a_column_for_each_head(monkeypatch):
    model = random_model(micro(depth=3)).float()
    images = random_images(1, 16)
    ranks = torch.arange(16)[None]
    what = shown(model, images, ranks=ranks, flags={"token": 9})
    sheets = calls_of("sheet", monkeypatch)
    vz.draw_attention(what)
    _, encoder, decoder, _ = sheets[0][2]
    here = torch.arange(16).view(4, 4) == 9
    found = vz.attention_weights(model, model.predict, images / 127.5 - 1, ranks)
    free = vz.attention_weights(model, model.encode, images / 127.5 - 1)
    source, target, memory = attention_masks(ranks[0])
    kinds = [(found[:3], source), (free, source | True), (found[3::2], target)]
    kinds.append((found[4::2], memory))
    side = vz.column(4)
    for (_, image), (layers, mask) in zip([*encoder, *decoder], kinds, strict=True):
        maps = []
        for w in torch.cat(layers)[:, 9]:
            colour = vz.blend(w / w.max())
            colour[~mask[9]] = vz.GREY_PIXEL
            heat = as_image(colour.view(4, 4, 3).movedim(-1, 0), side)
            maps.append(vz.outline(heat, here, vz.RED, 3))
        assert tiles_of(image, side) == maps
    what.flags["token"] = 16
    assert "--token 16" in refusal(vz.draw_attention, what)


def test_skips_have_a_bar_for_each_weight_with_its_number(monkeypatch):
    model = RandSAC(micro())
    with torch.no_grad():
        model.skip.copy_(torch.tensor([[0.5, 0.25], [0.0, -0.5]]))
    words = calls_of("write", monkeypatch)
    charts = calls_of("chart", monkeypatch)
    vz.draw_skips(shown(model))
    weights = {label: points for _, points, _, label in charts[0][1]}
    assert weights == {"Z[1]": {1: 0.5, 2: 0.25}, "Z[2]": {1: 0.0, 2: -0.5}}
    assert {"0.500", "0.250", "0.00", "-0.500"} <= {call[2] for call in words}


def test_neighbours_are_nearest_by_features_and_by_pixels_and_frames_tell_the_class(monkeypatch):
    model = random_model(micro(), seed=3).float()
    others = random_images(601, 16)
    names = ["ant", "bee", "cat"]
    found = [others, torch.arange(601) % 3, names]
    monkeypatch.setattr(randsac, "load_images", lambda config, train: found)
    monkeypatch.setattr(vz, "SEARCHED", 301)  # every second one
    sheets = calls_of("sheet", monkeypatch)

    asked = others[[8, 200, 8]]  # training images themselves, which must not be found
    labels = ["cat", "bee", "photo"]
    what = shown(model, asked, labels)
    vz.draw_neighbours(what)
    x = randsac.normalize(others[::2], 16)
    with torch.no_grad():
        features = F.normalize(model.encode(x).mean(1), dim=1)
    pixels = F.normalize(x.flatten(1), dim=1)
    for i, label, [(_, large), (_, small)] in zip((4, 100, 4), labels, sheets[0][2], strict=True):
        assert large == as_image(others[2 * i], large.width)
        nearest = []
        for vectors in (features, pixels):
            order = (vectors @ vectors[i]).argsort(descending=True)
            nearest += order[order != i][:6].tolist()
        assert nearest[:6] != nearest[6:]
        for k, seen in zip(nearest, tiles_of(small, vz.column(8)), strict=True):
            true = array(as_image(others[2 * k], seen.width))
            assert (array(seen)[20:-20, 20:-20] == true[20:-20, 20:-20]).all()
            framed = (array(seen)[:8] == rgb(vz.GREEN)).all()
            assert framed == (names[2 * k % 3] == label)

    found[0] = others[:6]
    assert "more than 6 training images" in refusal(vz.draw_neighbours, what)


# --- charts


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [1.0, 2.0, 4.0, -2.0]])
def test_bars_are_as_long_as_their_values_from_zero_on(values):
    one = ("bars", dict(enumerate(values)), vz.BLUE, "")
    blue = (array(vz.chart(680, [one], "x", "y")) == rgb(vz.BLUE)).all(-1)
    edges = np.flatnonzero(np.diff(blue.any(0).astype(int)))
    bars = blue[:, edges.reshape(-1, 2).sum(1) // 2]
    lengths = bars.sum(0)
    assert (lengths / lengths[0]).tolist() == pytest.approx([*map(abs, values)], rel=0.02)
    feet = [*(680 - bars[::-1, :3].argmax(0)), *bars[:, 3:].argmax(0)]
    assert feet == pytest.approx([feet[0]] * len(values), abs=2)


def test_lines_go_through_their_points_and_a_single_point_is_a_dot():
    line = ("line", {0: 0.0, 10: 1.0}, vz.BLUE, "")
    point = ("line", {5: 0.5}, vz.RED, "")
    pixels = array(vz.chart(680, [line, point], "x", "y"))
    line = np.argwhere((pixels == rgb(vz.BLUE)).all(-1))
    dot = np.argwhere((pixels == rgb(vz.RED)).all(-1))
    assert len(dot) > 50
    assert dot.mean(0) == pytest.approx((line.min(0) + line.max(0)) / 2, abs=4)


@pytest.mark.parametrize("style", ["line", "dots", "bars"])
def test_charts_of_any_values_have_numbers_beside_them(style, monkeypatch):
    words = calls_of("write", monkeypatch)
    for ys in ([0.0], [3.0, 3.0], [0.5, 0.7], [1e-5, 2e-4], [2.0, 1e6]):
        words.clear()
        vz.chart(400, [(style, dict(enumerate(ys)), vz.BLUE, "")], "x", "y")
        assert sum("rm" in call for call in words) >= 2


# --- the command

FOUR = {"segments.png", "hierarchy.png", "order.gif", "masks.png"}
PIXELS = "--image-size 16 --patch-size 1 --last-rank 3"
MAE = "all --image-size 56 --patch-size 8 --segments mae"


@pytest.mark.parametrize("flags, more", [(PIXELS, set()), (MAE, {"explore.html", "index.html"})])
def test_without_a_model_four_figures_are_drawn_in_their_margins(flags, more, tmp_path, capsys):
    draw("--out", tmp_path, *flags.split())
    assert {path.name for path in tmp_path.iterdir()} == FOUR | more
    for name in FOUR:
        page = Image.open(tmp_path / name)
        assert margins_are_white(page), name
        assert page.width == (800 if name == "order.gif" else 1600), name
    skipped = re.findall("skipped (.*?): .*--checkpoint", capsys.readouterr().out)
    assert skipped == (list(vz.PICTURES)[5:] if more else [])


def test_all_draws_everything_and_an_index_that_says_what_it_is(run, tmp_path, capsys):
    draw("all", "--checkpoint", run / "checkpoint.pt", "--out", tmp_path)
    files = [f"{name}.{vz.ENDINGS.get(name, 'png')}" for name in vz.PICTURES]
    made = sorted(path.name for path in tmp_path.glob("*.*"))
    assert made == sorted([*files, "index.html"])
    said = capsys.readouterr().out
    assert "skipped" not in said and f"open {tmp_path / 'index.html'}" in said
    index = (tmp_path / "index.html").read_text()
    links = re.findall(r'<p><a href="(.*?)">[A-Z][^<]*\.</a></p>', index)
    assert links == files and links[0] == "explore.html"
    for name in files[1:]:
        assert margins_are_white(Image.open(tmp_path / name)), name
        assert f'<img src="{name}"' in index
    page = (tmp_path / "explore.html").read_text(encoding="utf-8")
    assert '"model": {"name": "micro"' in page
    assert len({*re.findall('"label": "(.*?)"', page)}) == 3  # there are no more


def test_all_goes_on_where_something_is_missing_and_says_what(bare, tmp_path, capsys):
    draw("all", "--checkpoint", bare / "checkpoint.pt", "--out", tmp_path)
    skipped = dict(re.findall("skipped (.*?): (.*)", capsys.readouterr().out))
    assert "--no-skip" in skipped.pop("skips") and "probe.py" in skipped.pop("layers")
    assert len(skipped) == 7 and all("nowhere" in reason for reason in skipped.values())
    made = ["hierarchy", "masks", "curves"]  # these need no images
    assert {path.stem for path in tmp_path.iterdir()} == {*made, "index"}
    assert re.findall('src="(.*?).png"', (tmp_path / "index.html").read_text()) == made


def test_images_are_of_different_classes_and_have_the_right_name(run):
    seen = []
    for seed in (0, 1):
        images, labels = vz.Shown({"checkpoint": run / "checkpoint.pt", "seed": seed}).images
        assert len(images) == 24 and set(labels[:3]) == {"ant", "bee", "cat"}
        brightest = images.mean((2, 3)).argmax(1)  # each class has more of one channel
        assert [("ant", "bee", "cat")[channel] for channel in brightest] == labels
        seen.append(labels)
    assert seen[0] != seen[1]


def test_neighbours_without_held_out_images(run, image_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "train" / "all").mkdir(parents=True)
    for i, path in enumerate(sorted((image_folder / "train").rglob("*.png"))):
        shutil.copy(path, tmp_path / "train" / "all" / f"{i}.png")
    sheets = calls_of("sheet", monkeypatch)
    flags = {"checkpoint": run / "checkpoint.pt", "data_dir": str(tmp_path)}
    page = vz.draw_neighbours(vz.Shown(flags))
    assert f"{tmp_path} has no held-out images" in capsys.readouterr().out
    for (_, large), (_, small) in sheets[0][2]:
        asked = cells(large, 8, 8)
        assert not any((cells(tile, 8, 8) == asked).all() for tile in tiles_of(small, vz.column(8)))
    assert not (array(page) == rgb(vz.GREEN)).all(-1).any()  # there is one class


def test_image_strategy_and_token_can_be_chosen(run, image_folder, tmp_path, monkeypatch):
    picture = next((image_folder / "test").rglob("*.png"))
    flags = ["--image", picture, "--segments", "blob", "--hierarchy", 5, "--token", 3]
    flags += ["--checkpoint", run / "checkpoint.pt", "--out", tmp_path]
    sheets = calls_of("sheet", monkeypatch)
    draw("predictions", "neighbours", "attention", *flags)
    photo = torch.tensor(randsac.decode_image(picture, 8))
    sides = (vz.column(8), 2 * vz.column(8) + vz.GAP, 240)
    for sheet, side in zip(sheets, sides, strict=True):
        image = as_image(photo, side)
        if side == 240:
            vz.outline(image, torch.arange(16).view(4, 4) == 3, vz.RED, 4)
        assert images_of(sheet)[0] == image


def test_curves_compare_runs_and_probes_of_each_data_set_have_a_chart(run, tmp_path, monkeypatch):
    # Another run, which is still being written.
    other = shutil.copytree(run, tmp_path / ("läufe-" + "é" * 60))
    with open(other / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    pixels = {**LINEAR, "features": "pixels", "top1": 11.0}
    larger = {**LINEAR, "image_size": 16, "top1": 12.0}
    again = {**LINEAR, "top1": 13.0}  # this counts
    cifar = {**LINEAR, "dataset": "cifar10", "data_dir": "data", "top1": 14.0}
    floor = {**LAYERS, "random_init": True, "layers": [10.0, 9.0], "layers_knn": [8.0, 7.0]}
    write_probes(other, LINEAR, UNTRAINED, LAYERS, pixels, larger, cifar, again, floor)

    charts = calls_of("chart", monkeypatch)
    draw("curves", "layers", run, "--checkpoint", other / "checkpoint.pt", "--out", tmp_path)
    page = Image.open(tmp_path / "curves.png")
    assert margins_are_white(page)
    for hue in vz.HUES[:2]:  # in legend and bars
        assert (array(page) == rgb(hue)).all(-1).sum() > 5000
    found = []
    for _, bars, _, place, names, _ in charts[1:-1]:
        for _, points, hue, _ in bars:
            top1 = {names[x].replace("\n", " "): y for x, y in points.items()}
            found.append((place[10:-9], hue, top1))
    floors = {"linear raw pixels": 11.0, "linear untrained": 30.5}
    assert found == [
        ("cifar10 data at 8 pixels", vz.BLUE, {"linear trained": 14.0}),
        ("folder images at 16 pixels", vz.BLUE, {"linear trained": 12.0}),
        ("folder images at 8 pixels", vz.BLUE, {"linear trained": 13.0, **floors}),
        ("folder images at 8 pixels", vz.RED, {"linear trained": 41.25, "linear untrained": 30.5}),
    ]
    layers = {words.partition(":")[0]: [*points.values()] for _, points, _, words in charts[-1][1]}
    assert list(layers.values()) == [[30.5, 35.0], [20.0, 25.0], [10.0, 9.0], [8.0, 7.0]]
    trained = ["linear, trained", "kNN, trained"]
    assert list(layers) == [*trained, "linear, untrained", "kNN, untrained"]


BAD = [
    ("no picture curvs", "curvs"),
    ("no picture", "segments runs/x"),
    ("nowhere", "curves nowhere"),
    ("empty", "curves BARE/empty"),
    ("no.pt", "masks --checkpoint no.pt"),
    ("no.png", "order --image no.png"),
    ("--out", "masks --out="),
    ("--checkpoint", "attention"),
    ("--checkpoint", "curves"),
    ("hierarchy", "masks --hierarchy 7"),
    ("--data-dir", "segments --data-dir nowhere"),
    ("--epochs", "masks --epochs 3"),
    ("--order", "masks --order backwards"),
    ("--token", "attention --token x"),
    ("--image-size", "masks --checkpoint BARE/checkpoint.pt --image-size 32"),
    ("--patch-size", "masks --checkpoint BARE/checkpoint.pt --patch-size 4"),
]


@pytest.mark.parametrize("words, arguments", BAD)
def test_bad_input_is_refused_in_one_line(words, arguments, bare, tmp_path):
    given = arguments.replace("BARE", str(bare)).split()
    assert words in refusal(draw, *given, "--out", tmp_path / "figures")


def test_the_program_ends_with_code_2_and_one_line(tmp_path):
    (tmp_path / "image.png").write_text("no image")
    ended = go("segments", "--image", "image.png", program=ROOT / "visualize.py")
    one_line(*ended, "image.png")
    assert not (tmp_path / "figures").exists()
