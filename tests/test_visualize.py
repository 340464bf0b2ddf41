"""visualize.py: pixels are read back from the pictures; the command draws every one of them."""

import base64
import importlib.machinery
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import (
    MICRO_FLAGS,
    ROOT,
    command,
    fails_in_one_line,
    micro,
    random_model,
    run_here,
)
from PIL import Image

import randsac
import visualize as vz
from randsac import RandSAC, UserError, attention_masks, sample_ranks

FREE = ["segments", "hierarchy", "order", "masks"]
TRAINED = ["predictions", "skips", "attention", "loss-by-rank", "curves", "layers"]
STRATEGIES = [("patch", ()), ("square", (16, 4)), ("blob", (11, 5)), ("scatter", (9,)), ("mae", ())]
PROBES = [
    {"protocol": "linear", "features": "encoder", "random_init": False, "top1": 41.25},
    {"protocol": "linear", "features": "encoder", "random_init": True, "top1": 30.5},
    {"protocol": "layers", "features": "encoder", "random_init": False, "top1": 35.0},
]
PROBES[2].update(layers=[30.5, 35.0], layers_knn=[20.0, 25.0])


@pytest.fixture(scope="session")
def run(tmp_path_factory, image_folder):
    """A run of 5 steps, and probes of it as probe.py would write them."""
    out = tmp_path_factory.mktemp("runs") / "micro"
    flags = [*MICRO_FLAGS, "--segments", "blob", "--hierarchy", 5, 2, "--data-dir", image_folder]
    assert run_here(*flags, "--max-steps", 5, "--out", out) == 0
    rows = [json.dumps({**row, "dataset": "folder", "data_dir": "images"}) for row in PROBES]
    (out / "probes.jsonl").write_text("\n".join(rows) + "\n")
    return out


def draw(*arguments):
    vz.main([str(argument) for argument in arguments])


def ranks_of(segments, hierarchy, **settings):
    settings = {"image_size": 32, **settings}
    return sample_ranks(micro(segments=segments, hierarchy=hierarchy, **settings), 1)[0]


def rgb(code):
    return np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)])


def cells(image, rows, columns):
    """The colours [rows,columns,3] a quarter into each cell, off the lines between cells and the
    numbers in them."""
    pixels = np.asarray(image.convert("RGB"))
    y = ((np.arange(rows) + 0.25) * pixels.shape[0] / rows).astype(int)
    x = ((np.arange(columns) + 0.25) * pixels.shape[1] / columns).astype(int)
    return pixels[y][:, x]


def colours(pixels):
    return len({tuple(colour) for colour in pixels.reshape(-1, 3).tolist()})


def find(page, image, tolerance=0.0):
    """-> where (y, x) the image stands on the page, unchanged up to a mean difference, or None."""
    page = np.asarray(page.convert("RGB")).astype(np.int16)
    image = np.asarray(image.convert("RGB")).astype(np.int16)
    H, W = page.shape[:2]
    h, w = image.shape[:2]
    rng = np.random.default_rng(0)
    corner = np.abs(page[: H - h + 1, : W - w + 1, 1] - image[0, 0, 1])
    near = np.argwhere(corner <= 9 * tolerance)
    for y, x in rng.integers(0, (h, w), (25, 2)):
        difference = np.abs(page[near[:, 0] + y, near[:, 1] + x, 1] - image[y, x, 1])
        near = near[difference <= 9 * tolerance]
    for y, x in near:
        if np.abs(page[y : y + h, x : x + w] - image).mean() <= tolerance:
            return y, x
    return None


def margins_are_white(page):
    pixels = np.asarray(page.convert("RGB"))
    edge = pixels.shape[1] // 160  # of a unit: 10 of 1600 pixels
    parts = pixels[:edge], pixels[-edge // 2 :], pixels[:, :edge], pixels[:, -edge:]
    return all((part >= 250).all() for part in parts)  # a GIF's white may not be quite white


# --- maps, masks, frames


@pytest.mark.parametrize("segments, hierarchy", STRATEGIES)
def test_a_map_has_one_colour_for_each_rank(segments, hierarchy):
    ranks = ranks_of(segments, hierarchy)
    seen = cells(vz.token_map(ranks, 370), 8, 8)
    grid = ranks.view(8, 8).numpy()
    assert colours(seen) == ranks.max() + 1
    for rank in range(ranks.max() + 1):
        assert colours(seen[grid == rank]) == 1


@pytest.mark.parametrize("segments, hierarchy", STRATEGIES)
def test_white_lines_are_around_segments_and_not_in_them(segments, hierarchy):
    ranks = ranks_of(segments, hierarchy)
    image = np.asarray(vz.token_map(ranks, 8 * 40))
    grid = ranks.view(8, 8).numpy()
    white = (image == 255).all(-1)
    middle = 40 * np.arange(8) + 4  # of a cell's edge, off its number
    assert (white[middle][:, 40 * np.arange(1, 8)] == (grid[:, 1:] != grid[:, :-1])).all()
    assert (white[40 * np.arange(1, 8)][:, middle] == (grid[1:] != grid[:-1])).all()
    assert white[0].all() and white[:, 0].all() and white[-1].all() and white[:, -1].all()


def test_the_segments_picture_holds_an_order_of_every_strategy():
    yours = micro(segments="blob", hierarchy=(7,), image_size=48, seed=2)
    photo = torch.randint(0, 255, (48, 48, 3), dtype=torch.uint8)
    page = vz.draw_segments(photo, yours)
    assert find(page, Image.fromarray(photo.numpy()).resize((288, 288), Image.NEAREST))
    strategies = [randsac.Config(**settings) for settings in vz.STRATEGIES.values()]
    for i, strategy in enumerate([*strategies, yours]):
        ranks = sample_ranks(strategy, 1, generator=randsac.seeded("cpu", 2, i))[0]
        assert find(page, vz.token_map(ranks, 288)), strategy.segments


@pytest.mark.parametrize("segments, hierarchy", STRATEGIES)
def test_mask_panels_are_the_masks_with_what_is_left_out(segments, hierarchy):
    ranks = ranks_of(segments, hierarchy, image_size=16)
    last_rank = ranks.max().item()
    panels = vz.mask_panels(ranks, 370, "raster order")
    first = (ranks == 0).numpy()
    last = (ranks == last_rank).numpy()
    forbidden, allowed, left_out = (rgb(colour) for colour in vz.MASK.values())
    ends = [(last, last), (first, first), (first, last)]
    assert [words for words, _ in panels] == [
        f"{name} mask\nraster order" for name in ("source", "target", "memory")
    ]
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


def test_the_masks_picture_holds_figure_4_and_blocks_when_serialized():
    ranks = ranks_of("square", (16, 4))
    page = vz.draw_masks(ranks)
    figure4 = torch.tensor([0, 0, 1, 1, 2, 2])
    hues = (vz.GREEN, vz.BLUE, vz.RED)
    panels = vz.mask_panels(figure4, vz.column(7), "", hues) + vz.mask_panels(
        ranks, vz.column(4), ""
    )
    serialized = vz.mask_panels(ranks.sort().values, vz.column(4), "")
    for _, image in panels + serialized:
        assert find(page, image)
    blue = (cells(serialized[0][1], 68, 68)[4:, 4:] == rgb(vz.BLUE)).all(-1)
    steps = np.diff(blue[:60, :60].astype(int), axis=1)
    assert (steps <= 0).all()  # a row is blue, and from some column on it is not


@pytest.mark.parametrize("segments, hierarchy", STRATEGIES)
def test_frames_reveal_segment_by_segment_and_end_with_the_whole_photo(
    segments, hierarchy, tmp_path
):
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 128, (32, 32, 3)).astype(np.uint8)  # never the grey of what is hidden
    ranks = ranks_of(segments, hierarchy, image_size=16)
    frames = vz.draw_order(torch.tensor(photo), ranks)
    side = vz.column(2) // 2
    assert len(frames) == ranks.max() + 1
    vz.save(frames, tmp_path / "order.gif")
    gif = Image.open(tmp_path / "order.gif")
    gif.seek(gif.n_frames - 1)
    whole = Image.fromarray(photo).resize((2 * side, 2 * side), Image.NEAREST).reduce(2)
    assert find(gif, whole, tolerance=9)  # of 256 levels: its palette has 256 colours
    assert not find(frames[-2], whole, tolerance=9)
    half = len(frames) // 2
    left = np.asarray(frames[half].convert("RGB"))[-side - 14 : -14, 20 : 20 + side]
    grey = np.abs(cells(Image.fromarray(left), 4, 4).astype(int) - 200).max(-1) < 8
    assert (grey == (ranks.view(4, 4) >= half + 1).numpy()).all()


def test_many_steps_are_thinned_out_but_the_first_and_the_last_are_drawn():
    photo = torch.zeros(16, 16, 3, dtype=torch.uint8)
    frames = vz.draw_order(photo, torch.arange(256), most=5)
    side = vz.column(2) // 2
    assert len(frames) == 5
    black = []
    for frame in frames:
        left = np.asarray(frame.convert("L"))[-side - 14 : -14, 20 : 20 + side]
        black.append((left < 20).mean())
    assert black[0] < 1.5 / 256 and black[-1] > 0.97 and black == sorted(black)


def test_hierarchical_orders_finish_a_partition_and_flat_ones_do_not():
    generator = torch.Generator().manual_seed(0)
    levels = randsac.sample_levels(micro(image_size=32), 1, generator=generator)
    nested = randsac.serialize(levels, "random", generator)[0]
    flat = randsac.serialize(levels[:1], "random", generator)[0]
    image, words = vz.traversal(levels[1][0], nested, 740)
    assert words == "leaves a partition in 3 of 15 steps"
    assert colours(cells(image, 8, 8)[::2, ::2]) == 16
    _, words = vz.traversal(levels[1][0], flat, 740)
    assert int(re.search(r"in (\d+) of 15", words)[1]) > 3


def test_two_segments_of_one_centre_have_no_arrow_between_them():
    ids = torch.tensor([0, 1, 1, 0])
    vz.traversal(torch.zeros(4, dtype=torch.int64), ids, 740)


# --- what a model does


def perfect(model, images, ranks):
    """A model that predicts what is true."""
    truth = model.target(randsac.patchify(images, model.config.patch_size))
    model.predict = lambda images, ranks: truth.masked_fill((ranks == 0)[..., None], torch.nan)
    return truth


@pytest.mark.parametrize("target", ["normalized", "pixels"])
def test_a_perfect_prediction_is_shown_as_the_image_and_has_no_error(target):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    model = RandSAC(micro(target=target))
    ranks = sample_ranks(micro(), 2)
    truth = perfect(model, images, ranks)
    photos, errors, zeros = vz.predict(model, images, ranks)
    true_photos = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    assert (photos == true_photos).all()
    assert (errors.isnan() == (ranks == 0)).all() and errors.nan_to_num(0).max() < 1e-9
    assert torch.allclose(zeros, truth.square().mean(-1))


@pytest.mark.parametrize("segments, hierarchy", STRATEGIES)
def test_a_step_shows_predictions_among_true_pixels_of_lower_ranks_only(segments, hierarchy):
    config = micro(segments=segments, hierarchy=hierarchy, image_size=32, target="pixels")
    model = RandSAC(config)
    model.predict = lambda images, ranks: torch.full((1, 64, 48), -1.0)  # black everywhere
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    ranks = sample_ranks(config, 1)
    page = vz.draw_predictions(model, images, ranks, ["name"])

    r = np.kron(ranks[0].view(8, 8).numpy(), np.ones((4, 4), int))[..., None]  # of each pixel
    photo = ((images[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    given = np.where(r == 0, photo, 200)
    predicted = np.where(r == 0, photo, 0)
    size = (vz.column(8), vz.column(8))
    for shown in (photo, given, predicted):
        image = Image.fromarray(shown.astype(np.uint8))
        assert find(page, image.resize(size, Image.NEAREST))

    # A step in the middle, within its frame of 4 pixels.
    last = ranks.max().item()
    k = int(np.round(np.linspace(1, last, min(last, 4)))[min(last, 4) // 3])
    step = np.select([r < k, r == k], [photo, np.zeros_like(photo)], 200).astype(np.uint8)
    image = Image.fromarray(step).resize(size, Image.NEAREST)
    assert find(page, vz.outline(image, ranks[0].view(8, 8) == k, vz.RED, 4))


def test_errors_are_those_of_the_loss(monkeypatch):
    config = micro(image_size=32)
    model = random_model(config).float()
    images = torch.rand(70, 3, 32, 32) * 2 - 1
    ranks = sample_ranks(config, 70)
    charts = []

    def chart(width, height, series, *words):
        charts.append(series)
        return Image.new("RGB", (width, height))

    monkeypatch.setattr(vz, "chart", chart)
    vz.draw_loss_by_rank(model, images, ranks)  # without no_grad, as in a notebook
    bars, line = charts[0]
    with torch.no_grad():
        assert list(bars.xs) == list(range(1, 16))
        assert sum(bars.ys) / 15 == pytest.approx(model(images, ranks).item(), rel=1e-4)
    assert line.ys[0] == pytest.approx(47 / 48, rel=1e-3)  # that variance has n - 1 under it


@pytest.mark.parametrize("masked", [True, False])
def test_attention_weights_are_those_that_make_the_output(masked):
    config = micro()
    model = random_model(config).float()
    images = torch.rand(1, 3, 16, 16)
    ranks = sample_ranks(config, 1)
    calls = []
    for layer in model.encoder:
        layer.attention.register_forward_hook(lambda *call: calls.append(call))
    mask = torch.ones(16, 16, dtype=torch.bool)
    if masked:
        mask = attention_masks(ranks[0])[0]
        model.predict(images, ranks)
    else:
        model.encode(images)
    seen = list(calls)
    weights = vz.attention_weights(model, images[0], mask)
    assert weights.shape == (2, 2, 16, 16)
    for w, (attention, inputs, output) in zip(weights, seen):
        assert ((w > 0) == mask).all()
        _, _, values = attention.split(*inputs[:2])
        mixed = (w[None] @ values).transpose(1, 2).flatten(2)
        assert torch.allclose(attention.out(mixed), output, atol=1e-5)


def test_attention_maps_hide_later_segments_on_the_masked_side_only():
    model = random_model(micro()).float()
    ranks = torch.arange(16)
    page = vz.draw_attention(model, torch.zeros(3, 16, 16), ranks, token=5)
    hidden = (np.asarray(page) == rgb(vz.GREY)).all(-1)
    assert hidden[:, :800].sum() > 10_000
    assert hidden[:, 800:].sum() < 100  # the edges of letters have all greys
    with pytest.raises(UserError, match="--token 16"):
        vz.draw_attention(model, torch.zeros(3, 16, 16), ranks, token=16)
    with pytest.raises(UserError, match="36 heads"):
        many = random_model(micro(dim=36, heads=36)).float()
        vz.draw_attention(many, torch.zeros(3, 16, 16), ranks)


def test_attention_maps_have_a_row_for_each_layer_and_a_column_for_each_head():
    model = random_model(micro(depth=3)).float()
    image = torch.rand(3, 16, 16)
    page = vz.draw_attention(model, image, torch.arange(16), token=15)
    source = attention_masks(torch.arange(16))[0]  # the last token may look at all
    weights = vz.attention_weights(model, image, source)[:, :, 15].view(3, 2, 4, 4)
    side = vz.column(4)
    here = torch.arange(16).view(4, 4) == 15
    places = []
    for heads in weights:
        for w in heads:
            heat = Image.fromarray(vz.blend(w / w.max()).numpy()).resize(
                (side, side), Image.NEAREST
            )
            y, x = find(page, vz.outline(heat, here, vz.RED, 3))
            places.append((y - places[0][0] if places else y, x))
    step = side + vz.GAP
    left, right = vz.MARGIN, vz.MARGIN + step
    assert places[1:] == [
        (0, right),
        (step, left),
        (step, right),
        (2 * step, left),
        (2 * step, right),
    ]
    assert places[0][1] == left


def test_the_token_whose_attention_is_drawn_is_not_of_the_last_segment_which_is_left_out(
    monkeypatch,
):
    framed = []
    outline = vz.outline
    monkeypatch.setattr(vz, "outline", lambda *call: framed.append(call[1]) or outline(*call))
    ranks = torch.ones(16, dtype=torch.int64)
    ranks[13] = 0
    vz.draw_attention(random_model(micro()).float(), torch.zeros(3, 16, 16), ranks)
    assert framed[-1].sum() == 1 and framed[-1].flatten()[13]


def test_skips_are_white_where_nothing_changed_and_coloured_by_sign():
    model = RandSAC(micro())
    with torch.no_grad():
        model.skip[0, 0] = 0.5  # from 0
        model.skip[1, 1] = 0.0  # from 1
    page = np.asarray(vz.draw_skips(model))
    change = Image.fromarray(page[-28 - 3 * 56 : -28, 40:-40])
    seen = cells(change, 3, 3)[1:, 1:].astype(int)
    orange = seen[0, 0]
    blue = seen[1, 1]
    assert (seen[0, 1] == 255).all() and (seen[1, 0] == 255).all()
    assert orange[0] > orange[2] + 50 and blue[2] > blue[0] + 50
    text = Image.fromarray(page[-28 - 3 * 56 : -28, 40:-40]).crop((507, 56, 1013, 112))
    written = Image.new("RGB", text.size, tuple(orange.tolist()))
    vz.write(written, (text.width / 2, text.height / 2), "0.50", 30, vz.INK, "mm")
    difference = np.abs(np.asarray(text).astype(int) - np.asarray(written).astype(int))
    assert difference.mean() < 9


# --- words and charts


def written(monkeypatch):
    """-> a list that the words drawn from now on are put in, with place, size and anchor."""
    calls = []
    write = vz.write

    def note(image, place, words, size=24, colour=vz.INK, anchor="la", *rest, **more):
        calls.append((place, words, size, anchor))
        write(image, place, words, size, colour, anchor, *rest, **more)

    monkeypatch.setattr(vz, "write", note)
    return calls


def box(place, words, size, anchor):
    """-> left, top, right, bottom of words on an image."""
    pen = vz.ImageDraw.Draw(Image.new("L", (1, 1)))
    return pen.textbbox(place, words, vz.font(size), anchor)


def test_letters_that_the_font_lacks_are_replaced_by_their_likeness():
    def drawn(words):
        image = Image.new("RGB", (200, 40), "white")
        vz.write(image, (5, 5), words)
        return np.asarray(image)

    assert (drawn("Müller, Zoë, Łódź") == drawn("Muller, Zoe, ?odz")).all()
    assert (drawn("Müller") != drawn("M?ller")).any()
    assert drawn("\N{CJK UNIFIED IDEOGRAPH-65E5}").min() < 128


def test_long_names_keep_both_ends():
    assert vz.shorten("runs/a", 20) == "runs/a"
    short = vz.shorten("runs/" + "x" * 100 + "/seed-1", 20)
    assert len(short) <= 20 and short.startswith("runs/") and short.endswith("seed-1")


def test_legends_of_long_names_wrap_and_stay_inside(monkeypatch):
    calls = written(monkeypatch)
    names = [f"{i} " + "m" * 40 for i in range(6)]
    series = [vz.Series([0, 1], [0, 1], "#0072B2", "line", name) for name in names]
    image = vz.chart(1520, 600, series, "x", "y")
    assert image.size == (1520, 600)
    boxes = [box(*call) for call in calls if call[1] in names]
    assert len(boxes) == 6 and max(right for _, _, right, _ in boxes) <= 1520
    assert_apart(boxes)


def assert_apart(boxes):
    for i, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:i]:
            beside = right < other[0] or other[2] < left
            above = bottom < other[1] or other[3] < top
            assert beside or above, (boxes[i], other)


@pytest.mark.parametrize("runs, count", [(1, 6), (1, 15), (3, 7), (8, 7), (1, 63), (2, 40)])
def test_numbers_over_bars_never_touch_and_are_there_if_there_is_room(runs, count, monkeypatch):
    calls = written(monkeypatch)
    series = []
    for i in range(runs):
        heights = [50 + 0.1 * i + 0.01 * x for x in range(count)]
        series.append(vz.Series(list(range(count)), heights, vz.HUES[i], "bars"))
    names = "finetune\nrandom weights\ndata/cifar10-jpeg"
    vz.chart(1520, 600, series, "", "", {x: names for x in range(count)})
    numbers = [box(*call) for call in calls if call[3] == "mb"]
    assert len(numbers) == (runs * count if runs * count <= 21 else 0)
    assert_apart(numbers)
    for left, _, right, _ in numbers:
        assert right - left < 1368 / count * 0.8 / runs  # not wider than its bar
    if count <= 15:
        assert_apart([box(*call) for call in calls if call[3] == "ma"])


def test_bars_have_whole_numbers_under_them(monkeypatch):
    calls = written(monkeypatch)
    vz.chart(1520, 640, [vz.Series([1, 2, 3, 4, 5], [1.0] * 5, vz.BLUE, "bars")], "layer", "")
    below = {words for _, words, _, anchor in calls if anchor == "ma"}
    assert below == {"1", "2", "3", "4", "5"}


def test_bars_are_as_high_as_their_values():
    one = vz.Series([1, 2, 3], [1.0, 2.0, 4.0], vz.BLUE, "bars")
    pixels = np.asarray(vz.chart(1520, 680, [one], "x", "y"))
    blue = (pixels == rgb(vz.BLUE)).all(-1).sum(0)
    edges = np.flatnonzero(np.diff((blue > 0).astype(int)))
    assert len(edges) == 6  # three bars
    heights = [blue[(a + b) // 2] for a, b in edges.reshape(3, 2)]
    assert heights[1] / heights[0] == pytest.approx(2, rel=0.02)
    assert heights[2] / heights[0] == pytest.approx(4, rel=0.02)


def test_lines_go_through_their_points_and_a_single_point_is_a_dot():
    line = vz.Series([0, 10], [0.0, 1.0], vz.BLUE, "line")
    point = vz.Series([5], [0.5], vz.RED, "line")
    pixels = np.asarray(vz.chart(1520, 680, [line, point], "x", "y"))
    y, x = np.nonzero((pixels == rgb(vz.BLUE)).all(-1))
    dot_y, dot_x = np.nonzero((pixels == rgb(vz.RED)).all(-1))
    assert len(dot_y) > 50
    assert dot_y.mean() == pytest.approx((y.min() + y.max()) / 2, abs=4)
    assert dot_x.mean() == pytest.approx((x.min() + x.max()) / 2, abs=4)


@pytest.mark.parametrize("ys", [[0.0], [3.0, 3.0], [0.5, 0.7], [1e-5, 2e-4], [-2.0, 1e6]])
def test_charts_of_any_values_have_numbers_beside_them(ys, monkeypatch):
    calls = written(monkeypatch)
    for style in ("line", "dots") if min(ys) < 0 else ("line", "dots", "bars"):
        calls.clear()
        one = vz.Series(list(range(len(ys))), ys, vz.BLUE, style)
        vz.chart(750, 400, [one], "x", "y")
        beside = [box(*call) for call in calls if call[3] == "rm"]
        assert len(beside) >= 2 and min(left for left, _, _, _ in beside) >= 0
        assert_apart(beside)


@pytest.mark.parametrize("low, high", [(0, 1), (0.3, 1.1), (-3e-5, 2e-4), (0, 12345), (99.5, 100)])
def test_ticks_are_round_few_and_inside(low, high):
    ticks = vz.ticks(low, high, 6)
    assert 2 <= len(ticks) <= 7 and all(low <= tick <= high for tick in ticks)
    assert all(len(f"{tick:g}") <= 7 for tick in ticks)


# --- the explorer


def photo_of(uri):
    kind, data = uri.split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("seed", [0, 3])
def test_the_explorer_shows_orders_that_sample_ranks_draws(seed):
    config = randsac.Config(
        segments="blob", hierarchy=(7, 3), last_rank=4, image_size=48, seed=seed
    )
    strategies = vz.with_yours(config)
    data = vz.explorer_data(strategies, config, None, "", torch.zeros(1, 3, 64, 64), None, None)
    assert [entry["name"] for entry in data["strategies"]] == [*vz.STRATEGIES, "yours: blob 7 -> 3"]
    for i, entry in enumerate(data["strategies"]):
        flags = randsac.make_parser("").parse_args(entry["flags"].split())
        strategy = randsac.Config(**vars(flags))
        orders = sample_ranks(strategy, 8, generator=randsac.seeded("cpu", seed, i))
        assert len(set(entry["ranks"])) == len(entry["ranks"])  # no order twice
        assert set(entry["ranks"]) == set(map(tuple, orders.tolist())), entry["name"]
        assert entry["patch_size"] == strategy.patch_size
        assert entry["grid"] == strategy.grid and list(entry["levels"]) == list(strategy.hierarchy)
    assert data["size"] == {"dim": 128, "depth": 6, "decoder_depth": 1, "patch_size": 4}
    assert data["model"] is None


def test_the_explorer_shows_what_the_model_predicts_and_its_errors():
    config = micro(image_size=32)
    model = random_model(config).float()
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    ranks = sample_ranks(config, 5)
    data = vz.explorer_data(vz.STRATEGIES, config, model, "micro", images, ranks, list("abcde"))
    assert data["model"]["name"] == "micro" and len(data["model"]["images"]) == 4
    assert data["size"] == {"dim": 16, "depth": 2, "decoder_depth": 2, "patch_size": 4}
    tokens = randsac.patchify(images, 4)
    with torch.no_grad():
        guess = model.predict(images, ranks)
    truth = randsac.normalize_patches(tokens)
    for i, entry in enumerate(data["model"]["images"]):
        assert entry["label"] == "abcd"[i] and entry["grid"] == 8
        assert entry["ranks"] == ranks[i].tolist()
        for token, error in enumerate(entry["errors"]):
            true_error = (guess[i, token] - truth[i, token]).square().mean().item()
            if ranks[i, token] == 0:
                assert error is None
            else:
                assert error == pytest.approx(true_error, abs=6e-4)
        photo = photo_of(entry["image"])
        true_photo = ((images[i] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert (photo == true_photo).all()
        given = np.kron(ranks[i].view(8, 8).numpy() == 0, np.ones((4, 4))) > 0
        assert (photo_of(entry["predicted"])[given] == photo[given]).all()
        assert (photo_of(entry["predicted"])[~given] != photo[~given]).any()


def embedded(page):
    [text] = re.findall(
        r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL
    )
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_the_page_holds_its_data_whatever_labels_are_called():
    data = {"label": "</script><b>&amp; \N{SNOWMAN} <!--", "numbers": [0.5, None]}
    page = vz.fill_page(data)
    assert embedded(page) == data
    template = (ROOT / "assets" / "explore.html").read_text(encoding="utf-8")
    before, after = template.split(">{}</script>")
    assert page.startswith(before) and page.endswith(after)


def test_explore_writes_one_page_without_and_with_a_model(run, tmp_path):
    draw("explore", "--out", tmp_path / "plain")
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["explore.html"]
    data = embedded((tmp_path / "plain" / "explore.html").read_text(encoding="utf-8"))
    assert data["model"] is None and not any("yours" in s["name"] for s in data["strategies"])
    height, width, _ = photo_of(data["image"]).shape
    assert height == width >= 64
    draw("explore", "--checkpoint", run / "checkpoint.pt", "--out", tmp_path, "--segments", "mae")
    page = (tmp_path / "explore.html").read_text(encoding="utf-8")
    assert len(page) < 1.5e6
    data = embedded(page)
    assert data["strategies"][-1]["name"] == "yours: mae"
    assert data["model"]["name"] == "micro"
    assert len({entry["label"] for entry in data["model"]["images"]}) == 3  # there are no more


def test_a_model_of_large_images_makes_a_page_that_is_not_large():
    config = micro(image_size=384, patch_size=16, segments="patch")
    images = torch.rand(4, 3, 384, 384) * 2 - 1
    ranks = sample_ranks(config, 4)
    data = vz.explorer_data(
        vz.STRATEGIES, config, RandSAC(config), "large", images, ranks, list("abcd")
    )
    assert len(vz.fill_page(data)) < 1.5e6


# --- the command


def test_without_a_model_four_pictures_are_drawn(tmp_path, capsys):
    draw("--segments", "mae", "--out", tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"segments.png", "hierarchy.png", "order.gif", "masks.png"}
    said = capsys.readouterr().out
    assert all(f"wrote {tmp_path / name}" in said for name in names)
    assert Image.open(tmp_path / "order.gif").n_frames == 2


@pytest.mark.parametrize(
    "flags",
    [
        "--segments blob --hierarchy 11 5",
        "--segments mae",
        "--segments patch --order raster --image-size 16",
        "--image-size 16 --patch-size 1 --last-rank 3",
        "--image-size 56 --patch-size 8 --segments scatter --seed 3",
        "--image-size 8 --segments blob --hierarchy 2",
    ],
)
def test_pictures_of_any_strategy_stay_inside_their_margins(tmp_path, flags):
    draw(*FREE, "--out", tmp_path, *flags.split())
    for path in tmp_path.iterdir():
        page = Image.open(path)
        assert margins_are_white(page), path
        assert page.width == (800 if path.suffix == ".gif" else 1600), path


def test_all_draws_everything_and_an_index_of_it(run, tmp_path, monkeypatch, capsys):
    titles = []
    sheet = vz.sheet
    monkeypatch.setattr(
        vz, "sheet", lambda title, *rest: titles.append(title) or sheet(title, *rest)
    )
    draw("all", "--checkpoint", run / "checkpoint.pt", "--out", tmp_path)
    files = [f"{name}.{'gif' if name == 'order' else 'png'}" for name in FREE + TRAINED]
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted([*files, "explore.html", "index.html"])
    index = (tmp_path / "index.html").read_text()
    places = [index.index(f'src="{name}"') for name in files]
    assert places == sorted(places) and 'href="explore.html"' in index
    for name in files:
        assert margins_are_white(Image.open(tmp_path / name)), name
    assert "skipped" not in capsys.readouterr().out
    assert len(set(titles)) == 10
    assert all(re.search(r"\((Figure|Section|Sections) \d", title) for title in titles)


@pytest.mark.parametrize("name", TRAINED)
def test_every_picture_of_a_model_can_be_drawn_by_name(run, tmp_path, name):
    draw(name, "--checkpoint", run / "checkpoint.pt", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.png"]


def test_images_are_of_different_classes_and_have_the_right_name(image_folder):
    config = randsac.Config(
        dataset="folder", data_dir=str(image_folder), image_size=8, patch_size=1
    )
    images, labels = vz.choose_images({"dataset": "folder"}, config, RandSAC(config))
    assert len(images) == 24 + 3 and set(labels[:3]) == {"ant", "bee", "cat"}
    brightest = images.mean((2, 3)).argmax(1)  # each class has more of one channel
    assert [("ant", "bee", "cat")[channel] for channel in brightest] == labels
    config.seed = 1
    _, others = vz.choose_images({"dataset": "folder"}, config, RandSAC(config))
    assert set(others[:3]) == {"ant", "bee", "cat"} and labels != others


def test_where_there_are_no_held_out_images_training_images_are_shown(
    run, image_folder, tmp_path, capsys
):
    shutil.copytree(image_folder / "train", tmp_path / "only" / "train")
    checkpoint = ["--checkpoint", run / "checkpoint.pt", "--out", tmp_path / "figures"]
    draw("predictions", *checkpoint, "--data-dir", tmp_path / "only")
    assert f"{tmp_path / 'only'} has no held-out images" in capsys.readouterr().out
    assert (tmp_path / "figures" / "predictions.png").exists()
    draw("predictions", *checkpoint)
    assert "no held-out" not in capsys.readouterr().out


def test_other_images_are_not_looked_for_in_the_folder_of_the_run(run, tmp_path, monkeypatch):
    asked = []

    def load_images(config, train):
        asked.append(config)
        return randsac.draw_shapes(8, 8, 0)

    monkeypatch.setattr(randsac, "load_images", load_images)
    flags = ["--checkpoint", run / "checkpoint.pt", "--out", tmp_path]
    draw("predictions", *flags, "--dataset", "cifar10")
    draw("predictions", *flags, "--dataset", "shapes")
    assert [(config.dataset, config.data_dir) for config in asked] == [
        ("cifar10", "data"),
        ("shapes", ""),
    ]


def test_another_strategy_than_the_model_s_begins_anew(run, tmp_path):
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    saved["config"].update(order="raster", last_rank=3)
    torch.save(saved, tmp_path / "checkpoint.pt")
    flags = ["--checkpoint", tmp_path / "checkpoint.pt", "--out", tmp_path]
    _, config = vz.read_config(vz.read_arguments([str(flag) for flag in flags])[1])
    assert (config.segments, config.order, config.last_rank) == ("blob", "raster", 3)
    draw("masks", *flags, "--segments", "mae")  # which has no raster order, no rank 3
    draw("masks", *flags, "--segments", "square")


@pytest.mark.parametrize("name", ["hierarchy", "masks", "skips", "curves", "layers"])
def test_pictures_without_an_image_need_none(run, tmp_path, name):
    moved = shutil.copytree(run, tmp_path / "moved")
    saved = torch.load(moved / "checkpoint.pt", weights_only=True)
    saved["config"]["data_dir"] = str(tmp_path / "nowhere")
    torch.save(saved, moved / "checkpoint.pt")
    draw(name, "--checkpoint", moved / "checkpoint.pt", "--out", tmp_path)
    with Image.open(tmp_path / f"{name}.png") as image:
        assert margins_are_white(image)
    with pytest.raises(UserError, match="nowhere"):
        draw(name, "segments", "--checkpoint", moved / "checkpoint.pt", "--out", tmp_path)


def test_an_image_another_strategy_and_a_token_can_be_chosen(run, image_folder, tmp_path):
    picture = next((image_folder / "test").rglob("*.png"))
    flags = ["--image", picture, "--segments", "blob", "--hierarchy", 5, "--token", 3]
    draw(
        "predictions", "attention", "--checkpoint", run / "checkpoint.pt", *flags, "--out", tmp_path
    )
    photo = randsac.decode_image(picture, 8).transpose(1, 2, 0)
    size = (vz.column(8), vz.column(8))
    shown = Image.fromarray(photo).resize(size, Image.NEAREST)
    assert find(Image.open(tmp_path / "predictions.png"), shown)


def test_curves_compares_runs_and_reads_one_that_is_still_being_written(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    with open(other / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    draw("curves", run, other, "--out", tmp_path / "figures")
    pixels = np.asarray(Image.open(tmp_path / "figures" / "curves.png"))
    for hue in vz.HUES[:2]:  # in legend and bars
        assert (pixels == rgb(hue)).all(-1).sum() > 5000


def test_curves_of_runs_with_long_and_foreign_names_stay_inside(run, tmp_path, monkeypatch):
    names = ["läufe-" + "é" * 60 + f"-{i}" for i in range(3)]
    runs = [shutil.copytree(run, tmp_path / name) for name in names]
    calls = written(monkeypatch)
    draw("curves", *runs, "--out", tmp_path)
    assert margins_are_white(Image.open(tmp_path / "curves.png"))
    labels = [words for _, words, _, _ in calls if words.endswith(("-0", "-1", "-2"))]
    assert len(set(labels)) == 3 and max(map(len, labels)) <= 60
    with pytest.raises(UserError, match="name fewer"):
        vz.draw_curves([(run, *vz.read_run(run))] * 11)


def test_probes_of_different_features_and_data_have_bars_of_their_own(run, tmp_path, monkeypatch):
    series = []
    chart = vz.chart
    monkeypatch.setattr(vz, "chart", lambda *call: series.append(call) or chart(*call))
    other = shutil.copytree(run, tmp_path / "other")
    rows = [json.loads(line) for line in (run / "probes.jsonl").read_text().splitlines()]
    rows += [{**rows[0], "features": "pixels", "top1": 11.0}]
    rows += [{**rows[0], "data_dir": "/data/of-anna-1/flowers", "top1": 12.0}]
    rows += [{**rows[0], "data_dir": "/data/of-anna-2/flowers", "top1": 15.0}]
    rows += [{**rows[0], "dataset": "cifar10", "top1": 14.0}]
    rows += [{**rows[0], "top1": 13.0}]  # once more: this counts
    (other / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw("curves", "layers", "--checkpoint", other / "checkpoint.pt", "--out", tmp_path)
    bars, names = series[2][2][0], series[2][5]
    found = [(names[x].replace("\n", " "), y) for x, y in zip(bars.xs, bars.ys)]
    assert sorted(found) == [
        ("layers encoder images", 35.0),
        ("linear encoder /data/o...flowers", 12.0),
        ("linear encoder /data/o...flowers", 15.0),
        ("linear encoder cifar10", 14.0),
        ("linear encoder images", 13.0),
        ("linear pixels images", 11.0),
        ("linear random weights images", 30.5),
    ]
    assert [one.ys for one in series[3][2]] == [[30.5, 35.0], [20.0, 25.0]]


def test_layers_without_knn_have_one_bar_each(monkeypatch):
    series = []
    chart = vz.chart
    monkeypatch.setattr(vz, "chart", lambda *call: series.append(call[2]) or chart(*call))
    row = {key: PROBES[2][key] for key in ("protocol", "layers")}
    vz.draw_layers([row])
    assert [(one.label, one.ys) for one in series[0]] == [("linear", [30.5, 35.0])]


def test_all_goes_on_where_something_is_missing_and_says_what_makes_it(run, tmp_path, capsys):
    bare = shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("probes*"))
    saved = torch.load(bare / "checkpoint.pt", weights_only=True)
    saved["config"]["skip"] = False
    del saved["model"]["skip"]
    torch.save(saved, bare / "checkpoint.pt")
    draw("all", "--checkpoint", bare / "checkpoint.pt", "--out", tmp_path / "figures")
    said = capsys.readouterr().out.splitlines()
    skipped = [line for line in said if line.startswith("skipped")]
    assert len(skipped) == 2 and "--no-skip" in skipped[0] and "probe.py" in skipped[1]
    assert "layers" not in (tmp_path / "figures" / "index.html").read_text()
    for name in ("skips", "layers"):
        with pytest.raises(UserError, match=f"cannot draw {name}"):
            draw(name, "--checkpoint", bare / "checkpoint.pt", "--out", tmp_path / "figures")


def test_all_without_a_model_draws_what_it_can(tmp_path, capsys):
    draw("all", "--segments", "mae", "--out", tmp_path)
    assert len(list(tmp_path.iterdir())) == 6  # four pictures, the explorer, the index
    skipped = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(skipped) == 6 and all("--checkpoint" in line for line in skipped)


def test_the_next_command_can_be_pasted(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    moved = shutil.copytree(run, tmp_path / "my runs; ä")
    draw(
        "masks",
        "--checkpoint",
        moved / "checkpoint.pt",
        "--token=1",
        "attention",
        "--out",
        "my out",
    )
    for expected in ("index.html", None):
        line = capsys.readouterr().out.splitlines()[-1]
        if expected:
            python, program, *words = shlex.split(line.partition("next: ")[2])
            assert "python" in python and (tmp_path / program).resolve() == ROOT / "visualize.py"
            draw(*words)
            assert (tmp_path / "my out" / expected).exists()
    assert line == f"next: open {os.path.join('my out', 'index.html')} in a browser"
    draw("segments", "--segments", "blob", "--hierarchy", 7, 3)
    line = capsys.readouterr().out.splitlines()[-1]
    draw(*shlex.split(line.partition("next: ")[2])[2:])
    place = os.path.join("figures", "explore.html")
    assert capsys.readouterr().out.splitlines()[-1] == f"next: open {place} in a browser"
    page = (tmp_path / "figures" / "explore.html").read_text(encoding="utf-8")
    assert embedded(page)["strategies"][-1]["name"] == "yours: blob 7 -> 3"


def test_a_tilde_is_the_home_also_after_an_equals_sign(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(run, tmp_path / "run")
    draw("masks", "curves", "~/run", "--checkpoint=~/run/checkpoint.pt", "--out=~/figures")
    assert (tmp_path / "figures" / "curves.png").exists()


def broken_runs(run, tmp_path):
    damages = {
        "cut": '{"step": 5}\n',
        "empty": "",
        "garbage": "no json\n",
        "words": '{"step": "a", "loss": 1, "lr": 1}\n',
        "number": "5\n",
        "nan": '{"step": 5, "loss": NaN, "lr": 1}\n',
    }
    for name, damage in damages.items():
        folder = shutil.copytree(run, tmp_path / name)
        (folder / "metrics.jsonl").write_text(damage)
        yield name, folder
    for name, damage in {"probe": '{"top1": "high"}\n', "row": '{"top1": 5}\n'}.items():
        folder = shutil.copytree(run, tmp_path / name)
        (folder / "probes.jsonl").write_text(damage)
        yield name, folder
    yield "not there", tmp_path / "not there"


def test_broken_runs_are_named_in_one_line(run, tmp_path):
    for name, folder in broken_runs(run, tmp_path):
        with pytest.raises(UserError) as caught:
            draw("curves", folder, "--out", tmp_path / "figures")
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words, arguments",
    [
        ("no picture curvs", "curvs"),
        ("no picture", "segments runs/x"),
        ("not the log of a run", "curves nowhere"),
        ("no.pt", "masks --checkpoint no.pt"),
        ("no.png", "order --image no.png"),
        ("--checkpoint", "attention"),
        ("--checkpoint", "curves"),
        ("hierarchy", "masks --hierarchy 7"),
        ("--token changes nothing", "masks --token 3"),
        ("--image changes nothing", "masks --image no.png"),
        ("--dataset changes nothing", "hierarchy masks --dataset cifar10"),
        ("--data-dir", "segments --data-dir nowhere"),
        ("--data-dir", "segments --dataset shapes --data-dir nowhere"),
        ("--image takes the place", "segments --image no.png --dataset cifar10"),
        ("--segments changes nothing", "curves runs/x --segments mae"),
        ("--seed changes nothing", "curves runs/x --seed 1"),
        ("--last-rank changes nothing", "hierarchy --last-rank 3"),
        ("two counts", "hierarchy --segments mae"),
        ("two counts", "hierarchy --hierarchy 16"),
        ("--epochs", "masks --epochs 3"),
        ("--order", "masks --order backwards"),
        ("--token", "attention --token x"),
    ],
)
def test_bad_input_and_flags_that_cannot_act_are_refused_in_one_line(words, arguments, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        draw(*arguments.split(), "--out", tmp_path / "figures")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "figures").exists() or "cannot draw" in str(caught.value)


@pytest.mark.parametrize("flag", ["--patch-size 4", "--image-size 32"])
def test_flags_that_the_checkpoint_fixes_are_refused(run, tmp_path, flag):
    with pytest.raises(UserError, match=flag.split()[0]):
        draw("masks", "--checkpoint", run / "checkpoint.pt", *flag.split(), "--out", tmp_path)


def test_the_process_ends_with_code_2_and_no_traceback(tmp_path):
    (tmp_path / "image.png").write_text("no image")
    result = command("visualize.py", "segments", "--image", "image.png", cwd=tmp_path)
    fails_in_one_line(result, "image.png")
    assert not (tmp_path / "figures").exists()


class Stripped(importlib.machinery.SourceFileLoader):
    """Compiles as python -OO does, which itself would compile all of torch anew."""

    def get_code(self, name):
        return compile(self.get_data(self.path), self.path, "exec", optimize=2)


def test_all_is_drawn_without_docstrings_too(run, tmp_path, monkeypatch, capsys):
    for name in ("randsac", "visualize"):
        loader = Stripped(name, str(ROOT / f"{name}.py"))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        monkeypatch.setitem(sys.modules, name, module)
        loader.exec_module(module)
    assert module.__doc__ is None and module.chart.__doc__ is None
    module.main(["all", "--checkpoint", str(run / "checkpoint.pt"), "--out", str(tmp_path)])
    assert "skipped" not in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 12
