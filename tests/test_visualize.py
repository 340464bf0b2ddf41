"""visualize.py: pixels are read back from the pictures, and every picture is drawn by the command."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import MICRO_FLAGS, command, fails_in_one_line, micro, random_model, run_here
from PIL import Image

import randsac
import visualize as vz
from randsac import RandSAC, UserError, attention_masks, sample_ranks

FREE, TRAINED = list(vz.PICTURES)[:4], list(vz.PICTURES)[4:]
STRATEGIES = [("patch", ()), ("square", (16, 4)), ("blob", (11, 5)), ("scatter", (9,)), ("mae", ())]


@pytest.fixture(scope="session")
def run(tmp_path_factory, image_folder):
    """A run of 5 steps, with results as probe.py would leave them."""
    out = tmp_path_factory.mktemp("runs") / "micro"
    assert run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--max-steps", 5, "--out", out) == 0
    (out / "probe-linear.json").write_text(json.dumps(dict(protocol="linear", top1=41.25)))
    (out / "probe-layers.json").write_text(json.dumps(dict(protocol="layers", accuracy=[30.5, 35.0])))
    return out


def draw(*arguments):
    vz.main([str(argument) for argument in arguments])


def ranks_of(segments, hierarchy, **settings):
    return sample_ranks(micro(segments=segments, hierarchy=hierarchy, **{**dict(image_size=32), **settings}), 1)[0]


def cells(image, rows, columns, left=0, top=0):
    """The colours [rows,columns,3] a quarter into each cell, off the lines between cells and the numbers on them."""
    pixels = np.asarray(image.convert("RGB"))[top:, left:]
    y = ((np.arange(rows) + 0.25) * len(pixels) / rows).astype(int)
    x = ((np.arange(columns) + 0.25) * pixels.shape[1] / columns).astype(int)
    return pixels[y][:, x]


def colours(pixels):
    return len({tuple(colour) for colour in pixels.reshape(-1, 3).tolist()})


def find(page, image, tolerance=0.0):
    """-> whether the image stands somewhere on the page, unchanged up to a mean difference."""
    page, image = (np.asarray(i.convert("RGB")).astype(np.int16) for i in (page, image))
    (H, W), (h, w), rng = page.shape[:2], image.shape[:2], np.random.default_rng(0)
    near = np.argwhere(np.abs(page[:H - h + 1, :W - w + 1, 1] - image[0, 0, 1]) <= 9 * tolerance)  # corners?
    for y, x in rng.integers(0, (h, w), (25, 2)):
        near = near[np.abs(page[near[:, 0] + y, near[:, 1] + x, 1] - image[y, x, 1]) <= 9 * tolerance]
    return any(np.abs(page[y:y + h, x:x + w] - image).mean() <= tolerance for y, x in near)


def margins_are_white(page):
    pixels = np.asarray(page.convert("RGB"))
    edge = pixels.shape[1] // 160  # of a unit: 10 of 1600 pixels
    parts = pixels[:edge], pixels[-edge // 2:], pixels[:, :edge], pixels[:, -edge:]
    return all((part >= 250).all() for part in parts)  # a GIF's white may not be quite white


# --- maps, masks, frames

@pytest.mark.parametrize("segments, hierarchy", STRATEGIES)
def test_a_map_has_one_colour_for_each_rank(segments, hierarchy):
    ranks = ranks_of(segments, hierarchy)
    seen, grid = cells(vz.token_map(ranks, 370), 8, 8), vz.as_grid(ranks).numpy()
    assert colours(seen) == ranks.max() + 1
    assert all(colours(seen[grid == k]) == 1 for k in range(ranks.max() + 1))


@pytest.mark.parametrize("segments, hierarchy", STRATEGIES)
def test_mask_panels_are_the_masks_with_what_is_left_out(segments, hierarchy):
    ranks, N = ranks_of(segments, hierarchy, image_size=16), 16
    K, thick = ranks.max().item() + 1, 1 + N // 20
    palette = vz.blend(np.linspace(0, 1, K))
    panels = vz.mask_panels(ranks, 370, palette, "raster order")
    first, last = (ranks == 0).numpy(), (ranks == K - 1).numpy()
    rows, columns = (last, first, first), (last, first, last)
    for (words, image), mask, row, column in zip(panels, attention_masks(ranks), rows, columns):
        seen, out = cells(image, N + thick, N + thick), row[:, None] | column
        forbidden, allowed, left_out = (vz.blend([0], [colour] * 2)[0] for colour in vz.MASK.values())
        assert ((seen[thick:, thick:] == left_out).all(-1) == out).all(), words
        assert ((seen[thick:, thick:] == allowed).all(-1) == (mask.numpy() & ~out)).all(), words
        assert ((seen[thick:, thick:] == forbidden).all(-1) == (~mask.numpy() & ~out)).all(), words
        assert colours(seen[:thick, thick:]) == colours(seen[thick:, :thick]) == K
        assert (seen[0, thick:] == palette[ranks]).all() and (seen[thick:, 0] == palette[ranks]).all()


def test_the_masks_picture_holds_figure_4_and_blocks_when_serialized():
    ranks = ranks_of("square", (16, 4))
    page, palette = vz.draw_masks(ranks), vz.blend(np.linspace(0, 1, 16))
    figure4 = torch.tensor([0, 0, 1, 1, 2, 2])
    hues = vz.blend([0, 0.5, 1], [vz.GREEN, vz.BLUE, vz.RED])
    for _, image in vz.mask_panels(figure4, vz.share(7), hues, "") + vz.mask_panels(ranks, vz.share(4), palette, ""):
        assert find(page, image)
    source = vz.mask_panels(ranks.sort().values, vz.share(4), palette, "")[0][1]
    assert find(page, source)
    blue = (cells(source, 68, 68)[4:, 4:] == vz.blend([0], [vz.BLUE] * 2)).all(-1)
    assert (np.diff(blue[:60, :60].astype(int), axis=1) <= 0).all()  # a row is blue, and from some column on it is not


@pytest.mark.parametrize("segments, hierarchy", STRATEGIES)
def test_frames_reveal_segment_by_segment_and_end_with_the_whole_photo(segments, hierarchy, tmp_path):
    photo = np.random.default_rng(0).integers(0, 128, (32, 32, 3)).astype(np.uint8)  # never the grey of what is hidden
    ranks = ranks_of(segments, hierarchy)
    frames, side = vz.draw_order(photo, ranks), vz.share(2) // 2
    assert len(frames) == ranks.max() + 1
    frames[0].save(tmp_path / "order.gif", save_all=True, append_images=frames[1:])
    gif = Image.open(tmp_path / "order.gif")
    gif.seek(gif.n_frames - 1)
    whole = Image.fromarray(photo).resize((2 * side, 2 * side), Image.NEAREST).reduce(2)
    assert find(gif, whole, tolerance=9)  # of 256 levels: its palette has 256 colours, the photo 1024
    assert not any(find(frame, whole, tolerance=9) for frame in frames[-2:-1])
    half = len(frames) // 2
    left = np.asarray(frames[half].convert("RGB"))[-side - 14:-14, 20:20 + side]
    grey = np.abs(cells(Image.fromarray(left), 8, 8).astype(int) - 200).max(-1) < 8
    assert (grey == (vz.as_grid(ranks) >= half + 1).numpy()).all()


def test_many_steps_are_thinned_out_but_the_first_and_the_last_are_drawn():
    ranks = torch.arange(256)
    frames, side = vz.draw_order(np.zeros((16, 16, 3), np.uint8), ranks, most=5), vz.share(2) // 2
    assert len(frames) == 5
    black = [(np.asarray(frame.convert("L"))[-side - 14:-14, 20:20 + side] < 20).mean() for frame in frames]
    assert black[0] < 1.5 / 256 and black[-1] > 0.97 and black == sorted(black)


def test_hierarchical_orders_finish_a_partition_and_flat_ones_do_not():
    config = micro(image_size=32)
    generator = torch.Generator().manual_seed(0)
    levels = randsac.sample_levels(config, 1, generator=generator)
    nested, flat = (randsac.serialize(used, "random", generator)[0] for used in (levels, levels[:1]))
    image, words = vz.traversal(levels[0][0], levels[1][0], nested, 740)
    assert words == "leaves a partition in 3 of 15 steps" and colours(cells(image, 8, 8)[::2, ::2]) == 16
    _, words = vz.traversal(levels[0][0], levels[1][0], flat, 740)
    assert int(re.search(r"in (\d+) of 15", words)[1]) > 3


# --- what a model does

@pytest.mark.parametrize("target", ["normalized", "pixels"])
def test_a_perfect_prediction_is_shown_as_the_image_and_has_no_error(target):
    config, images = micro(target=target), torch.rand(2, 3, 16, 16) * 2 - 1
    model, ranks = RandSAC(config), sample_ranks(micro(), 2)
    tokens = randsac.patchify(images, 4)
    truth = randsac.normalize_patches(tokens) if target == "normalized" else tokens
    model.predict = lambda images, ranks: truth.masked_fill((ranks == 0)[..., None], torch.nan)
    photos, errors, zero = vz.predict(model, images, ranks)
    assert (photos == vz.photos(images)).all()
    assert (errors.isnan() == (ranks == 0)).all() and errors.nan_to_num(0).max() < 1e-9
    assert torch.allclose(zero, truth.square().mean(-1))


@pytest.mark.parametrize("segments, hierarchy", STRATEGIES)
def test_a_step_shows_predictions_among_true_pixels_of_lower_ranks_only(segments, hierarchy):
    config = micro(segments=segments, hierarchy=hierarchy, image_size=32, target="pixels")
    model, images, ranks = RandSAC(config), torch.rand(1, 3, 32, 32) * 2 - 1, sample_ranks(config, 1)
    model.predict = lambda images, ranks: torch.full((1, 64, 48), -1.0)  # predicts black everywhere
    page, side, last = vz.draw_predictions(model, images, ranks), vz.share(8), ranks.max().item()
    r, photo, grey = vz.as_grid(ranks[0]).numpy(), vz.photos(images)[0], np.full((32, 32, 3), 200)

    def pieces(*layers):  # (tokens, what they show), the first on top
        return np.select([np.kron(keep, np.ones((4, 4)))[..., None] > 0 for keep, _ in layers], [x for _, x in layers])

    k = max(1, round(last / 2)) if last < 4 else round(np.linspace(1, last, 4)[1])
    for shown in (pieces((r == 0, photo), (r > 0, grey)), pieces((r == 0, photo), (r > 0, photo * 0))):
        assert find(page, vz.heat(side, side, shown.astype(np.uint8)))
    step = vz.heat(side, side, pieces((r < k, photo), (r == k, photo * 0), (r > k, grey)).astype(np.uint8))
    assert find(page, vz.frame(step, r == k, vz.RED, 4))


def test_errors_are_those_of_the_loss(monkeypatch):
    config = micro(image_size=32)
    model, images, ranks = random_model(config).float(), torch.rand(70, 3, 32, 32) * 2 - 1, sample_ranks(config, 70)
    charts = []
    monkeypatch.setattr(vz, "chart", lambda h, x_label, series: charts.append(series) or vz.heat(100, 100))
    vz.draw_loss_by_rank(model, images, ranks)  # without no_grad, as in a notebook
    (steps, losses, *_), (_, zero, *_) = charts[0]
    with torch.no_grad():
        assert list(steps) == list(range(1, 16))
        assert sum(losses) / 15 == pytest.approx(model(images, ranks).item(), rel=1e-4)
    assert zero[0] == pytest.approx(47 / 48, rel=1e-3)  # the variance that normalizes has n - 1 under it


def test_attention_weights_are_those_that_make_the_output():
    config = micro()
    model, images, ranks = random_model(config).float(), torch.rand(1, 3, 16, 16), sample_ranks(micro(), 1)
    calls = []
    for layer in model.encoder:
        layer.attention.register_forward_hook(lambda layer, inputs, output: calls.append((layer, inputs, output)))
    for run, allowed in ((lambda: model.predict(images, ranks), attention_masks(ranks)[0][0]),
                         (lambda: model.encode(images), torch.ones(16, 16, dtype=torch.bool))):
        calls.clear()
        weights = vz.attention_weights(model, run)
        assert weights.shape == (2, 2, 16, 16) and ((weights > 0) == allowed).all()
        for w, (layer, inputs, output) in zip(weights, calls):
            _, _, values = layer.split(*inputs[:2])
            assert torch.allclose(layer.out((w[None] @ values).transpose(1, 2).flatten(2)), output, atol=1e-5)
    assert not any(layer.attention._forward_pre_hooks for layer in model.encoder)


def test_attention_maps_hide_later_segments_on_the_masked_side_only():
    model, images, ranks = random_model(micro()).float(), torch.zeros(1, 3, 16, 16), torch.arange(16)[None]
    page = vz.draw_attention(model, images, ranks, token=5)
    pixels, grey = np.asarray(page), vz.blend([0], [vz.GREY] * 2)
    hidden = (pixels == grey).all(-1)
    assert hidden[:, :800].sum() > 10_000 and hidden[:, 800:].sum() < 100  # the edges of letters have all greys
    with pytest.raises(UserError, match="--token 16"):
        vz.draw_attention(model, images, ranks, token=16)
    with pytest.raises(UserError, match="36 heads"):
        vz.draw_attention(random_model(micro(dim=36, heads=36)).float(), images, ranks)


def test_the_token_whose_attention_is_drawn_is_not_of_the_last_segment_which_is_left_out(monkeypatch):
    framed, frame = [], vz.frame
    monkeypatch.setattr(vz, "frame", lambda image, ids, *rest: framed.append(np.asarray(ids)) or frame(image, ids, *rest))
    ranks = torch.ones(1, 16, dtype=torch.long)
    ranks[0, 13] = 0
    vz.draw_attention(random_model(micro()).float(), torch.zeros(1, 3, 16, 16), ranks)
    assert framed[-1].sum() == 1 and framed[-1].flatten()[13]


def test_bars_have_whole_numbers_under_them(monkeypatch):
    written = []
    monkeypatch.setattr(vz, "write", lambda image, x, y, words, *rest, **more: written.append(words))
    vz.chart(640, "layer", [(range(1, 6), [1.0] * 5, vz.BLUE, 0.8)])
    assert {*"12345"} <= {*written} and not {"1.5", "2.5", "3.5", "4.5"} & {*written}


def test_two_segments_of_one_centre_have_no_arrow_between_them():
    vz.traversal(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 1, 0]), 740)


def test_skips_are_white_where_nothing_changed_and_coloured_by_sign():
    model = RandSAC(micro())
    with torch.no_grad():
        model.skip[0, 0], model.skip[1, 1] = 0.5, 0.0  # from 0 and 1
    seen = []
    original = vz.heat
    try:
        vz.heat = lambda w, h, cells=None, labels=(): seen.append((cells, labels)) or original(w, h)
        vz.draw_skips(model)
    finally:
        vz.heat = original
    change, labels = next((c, t) for c, t in seen[1:] if len(t) and t[2][2] == "-1.00")
    orange, white, blue = change[1, 1].tolist(), change[1, 2].tolist(), change[2, 2].tolist()
    assert white == [255] * 3 and orange[0] > orange[2] and blue[2] > blue[0] and labels[1][1] == "0.50"


# --- charts

def test_bars_are_as_high_as_their_values():
    pixels = np.asarray(vz.chart(680, "x", [([1, 2, 3], [1.0, 2.0, 4.0], vz.BLUE, 0.8)]))
    blue = (pixels == vz.blend([0], [vz.BLUE] * 2)).all(-1).sum(0)
    edges = np.flatnonzero(np.diff((blue > 0).astype(int)))
    assert len(edges) == 6  # three bars
    heights = [blue[(a + b) // 2] for a, b in edges.reshape(3, 2)]
    assert heights[1] / heights[0] == pytest.approx(2, rel=0.02)
    assert heights[2] / heights[0] == pytest.approx(4, rel=0.02)


def test_lines_go_through_their_points_and_a_single_point_is_a_dot():
    image = vz.chart(680, "x", [([0, 10], [0.0, 1.0], vz.BLUE, vz.LINE), ([5], [0.5], vz.RED, vz.LINE)])
    pixels = np.asarray(image)
    blue, red = ((pixels == vz.blend([0], [colour] * 2)).all(-1) for colour in (vz.BLUE, vz.RED))
    (top, bottom), (left, right) = ((axis.min(), axis.max()) for axis in np.nonzero(blue))
    y, x = (axis.mean() for axis in np.nonzero(red))
    assert y == pytest.approx((top + bottom) / 2, abs=4) and x == pytest.approx((left + right) / 2, abs=4)


@pytest.mark.parametrize("low, high", [(0, 1), (0.3, 1.1), (-3e-5, 2e-4), (0, 12345), (99.5, 100)])
def test_ticks_are_round_few_and_inside(low, high):
    ticks = vz.ticks(low, high, 6)
    assert 2 <= len(ticks) <= 7 and all(low <= tick <= high for tick in ticks)
    assert all(len(f"{tick:g}") <= 7 for tick in ticks)


# --- the command

def test_without_a_model_four_pictures_are_drawn(tmp_path, capsys):
    draw("--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"segments.png", "hierarchy.png", "order.gif", "masks.png"}
    written = capsys.readouterr().out
    assert all(f"wrote {tmp_path / name}" in written for name in ("segments.png", "order.gif"))
    assert "next: python" in written
    assert Image.open(tmp_path / "order.gif").n_frames == 16


@pytest.mark.parametrize("flags", [
    "--segments blob --hierarchy 11 5", "--segments mae", "--segments patch --order raster",
    "--image-size 16 --patch-size 1",
    "--image-size 56 --patch-size 8 --segments scatter --seed 3", "--image-size 8 --segments blob --hierarchy 2"])
def test_pictures_of_any_strategy_stay_inside_their_margins(tmp_path, flags):
    draw(*FREE, "--out", tmp_path, *flags.split())
    for path in tmp_path.iterdir():
        page = Image.open(path)
        assert margins_are_white(page) and page.width == (800 if path.suffix == ".gif" else 1600), path


def test_all_draws_everything_and_an_index_of_it(run, tmp_path, capsys):
    draw("all", "--checkpoint", run / "checkpoint.pt", "--out", tmp_path)
    names = [f"{name}.{'gif' if name == 'order' else 'png'}" for name in vz.PICTURES]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "index.html"])
    index = (tmp_path / "index.html").read_text()
    places = [index.index(f'src="{name}"') for name in names]
    assert places == sorted(places)
    lines = re.findall("<h2>(.+?)</h2>", index)
    assert len(lines) == len(names) and all(re.search(r"\((Figure|Section|Sections) \d", line) for line in lines)
    for name in names:
        assert margins_are_white(Image.open(tmp_path / name)), name
    assert "skipped" not in capsys.readouterr().out


@pytest.mark.parametrize("name", TRAINED)
def test_every_picture_of_a_model_can_be_drawn_by_name(run, tmp_path, name):
    draw(name, "--checkpoint", run / "checkpoint.pt", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.png"]


def test_other_images_are_not_looked_for_in_the_folder_of_the_run(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(vz, "load_images", lambda config, train: asked.append(config) or randsac.draw_shapes(8, 8, 0))
    draw("segments", "--checkpoint", run / "checkpoint.pt", "--dataset", "cifar10", "--out", tmp_path)
    assert asked[0].dataset == "cifar10" and asked[0].data_dir == "data"


@pytest.mark.parametrize("name", ["hierarchy", "skips", "curves", "layers"])
def test_pictures_without_an_image_need_none(run, tmp_path, name):
    nowhere = "--data-dir", tmp_path / "nowhere"
    draw(name, "--checkpoint", run / "checkpoint.pt", "--out", tmp_path, *nowhere)
    with Image.open(tmp_path / f"{name}.png") as image:
        assert margins_are_white(image)
    with pytest.raises(UserError, match="nowhere"):
        draw(name, "segments", "--checkpoint", run / "checkpoint.pt", "--out", tmp_path, *nowhere)


def test_an_image_another_strategy_and_a_token_can_be_chosen(run, image_folder, tmp_path):
    picture = next((image_folder / "test").rglob("*.png"))
    flags = ["--image", picture, "--segments", "blob", "--hierarchy", 5, "--token", 3, "--out", tmp_path]
    draw("predictions", "attention", "--checkpoint", run / "checkpoint.pt", *flags)
    photo = randsac.decode(picture, 8).transpose(1, 2, 0)
    assert find(Image.open(tmp_path / "predictions.png"), vz.heat(vz.share(8), vz.share(8), photo))


def test_curves_compares_runs_and_reads_one_that_is_still_being_written(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    with open(other / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    draw("curves", run, other, "--out", tmp_path / "figures")
    pixels = np.asarray(Image.open(tmp_path / "figures" / "curves.png"))
    for hue in vz.HUES[:2]:  # in legend and bars
        assert (pixels == vz.blend([0], [hue] * 2)).all(-1).sum() > 5000


def test_all_goes_on_where_something_is_missing_and_says_what_makes_it(run, tmp_path, capsys):
    bare = shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("probe-*"))
    saved = torch.load(bare / "checkpoint.pt", weights_only=True)
    saved["config"]["skip"] = False
    del saved["model"]["skip"]
    torch.save(saved, bare / "checkpoint.pt")
    draw("all", "--checkpoint", bare / "checkpoint.pt", "--out", tmp_path / "figures")
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert len(skipped) == 2 and "--no-skip" in skipped[0] and "probe.py" in skipped[1]
    assert "layers" not in (tmp_path / "figures" / "index.html").read_text()
    for name in "skips", "layers":
        with pytest.raises(UserError, match=f"cannot draw {name}"):
            draw(name, "--checkpoint", bare / "checkpoint.pt", "--out", tmp_path / "figures")


def test_all_without_a_model_draws_what_it_can(tmp_path, capsys):
    draw("all", "--out", tmp_path)
    assert len(list(tmp_path.iterdir())) == 5
    assert sum("skipped" in line and "randsac.py" in line for line in capsys.readouterr().out.splitlines()) == 6


def broken_runs(run, tmp_path):
    damages = dict(cut='{"step": 5}\n', empty="", garbage="no json\n", words='{"step": "a", "loss": 1, "lr": 1}\n')
    for name, damage in damages.items():
        folder = shutil.copytree(run, tmp_path / name)
        (folder / "metrics.jsonl").write_text(damage)
        yield name, folder
    folder = shutil.copytree(run, tmp_path / "config")
    (folder / "config.json").unlink()
    yield "config.json", folder
    folder = shutil.copytree(run, tmp_path / "probe")
    (folder / "probe-layers.json").write_text('{"accuracy": ["high"]}')
    yield "probe", folder


def test_broken_runs_are_named_in_one_line(run, tmp_path):
    for name, folder in broken_runs(run, tmp_path):
        with pytest.raises(UserError) as caught:
            draw("curves", folder, "--out", tmp_path / "figures")
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("words, arguments", [
    ("no picture curvs", ["curvs"]), ("no picture", ["segments", "runs/x"]), ("not a whole run", ["curves", "nowhere"]),
    ("no.pt", ["masks", "--checkpoint", "no.pt"]), ("no.png", ["order", "--image", "no.png"]),
    ("--checkpoint", ["attention"]), ("hierarchy", ["masks", "--hierarchy", "7"])])
def test_bad_input_is_said_in_one_line(words, arguments, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        draw(*arguments, "--out", tmp_path)
    assert "\n" not in str(caught.value)


def test_flags_that_the_checkpoint_fixes_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="--patch-size"):
        draw("masks", "--checkpoint", run / "checkpoint.pt", "--patch-size", 4, "--out", tmp_path)


def test_the_process_ends_with_code_2_and_no_traceback(tmp_path):
    (tmp_path / "image.png").write_text("no image")
    fails_in_one_line(command("visualize.py", "segments", "--image", "image.png", cwd=tmp_path), "image.png", "decoded")
    assert not (tmp_path / "figures").exists()
