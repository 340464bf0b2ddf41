"""The explorer: its script is compared with randsac.py by node, its page is used in a browser."""

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, micro, random_model
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import randsac
import visualize

TEMPLATE = (ROOT / "assets" / "explore.html").read_text(encoding="utf-8")
SHIPPED = (ROOT / "assets" / "explore-nano.html").read_text(encoding="utf-8")
CHECKPOINT = ROOT / "assets" / "nano-cifar10" / "checkpoint.pt"
MASKS = ("source", "target", "memory")
ASKED = SimpleNamespace(config=micro(), flags={})
RANKS = [ranks for _, _, _, [ranks] in visualize.strategies(ASKED, 1)]
RANKS += [torch.zeros(4, dtype=torch.int64), torch.tensor([1, 0, 2, 1])]


# --- the method, by node


def run_node(expression, inputs):
    """-> for each of the inputs what the expression gives of it, after the page's "method"."""
    node = shutil.which("node")
    if not node:
        pytest.skip("there is no node")
    [method] = re.findall(r'<script id="method">(.*?)</script>', TEMPLATE, re.DOTALL)
    read = 'const inputs = JSON.parse(require("fs").readFileSync(0, "utf8"));'
    write = f"console.log(JSON.stringify(inputs.map((input) => ({expression}))));"
    words = [node, "-e", method + read + write]
    return json.loads(subprocess.check_output(words, input=json.dumps(inputs), text=True))


def test_masks_and_counts_are_those_of_randsac():
    method = "[attentionMasks(input), countPass(input)]"
    answers = run_node(method, [ranks.tolist() for ranks in RANKS])
    for ranks, (masks, counts) in zip(RANKS, answers, strict=True):
        expected = dict(zip(MASKS, randsac.attention_masks(ranks)))
        assert masks == {name: mask.tolist() for name, mask in expected.items()}

        # The encoder leaves the last segment out, the decoder the first.
        encoder = ranks < ranks.max()
        decoder = ranks > 0
        assert counts == {
            "encoder": encoder.sum(),
            "decoder": decoder.sum(),
            "source": expected["source"][encoder].sum(),
            "target": expected["target"][decoder].sum(),
            "memory": expected["memory"][decoder].sum(),
        }


def test_the_tail_merges_as_last_rank_does():
    cases = [(ranks, K) for ranks in RANKS for K in (1, 3)]
    answers = run_node("mergeTail(...input)", [[ranks.tolist(), K] for ranks, K in cases])
    assert answers == [ranks.clamp(max=K).tolist() for ranks, K in cases]
    assert run_node("mergeTail(input, 0)", [[0, 2, 1]]) == [[0, 2, 1]]


@pytest.mark.parametrize("strategy", [{"hierarchy": (4,)}, {"segments": "mae"}, {"last_rank": 3}])
def test_cost_is_what_torch_counts(strategy):
    config = micro(depth=3, **strategy)
    ranks = randsac.sample_ranks(config, 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        randsac.RandSAC(config)(torch.zeros(1, 3, 16, 16), ranks, trim=True)

    size = {name: getattr(config, name) for name in ("dim", "depth", "decoder_depth", "patch_size")}
    counts = "countPass(input.ranks)"
    cost = f"passCost({counts}.encoder, {counts}.decoder, input.size)"
    inputs = [{"ranks": ranks[0].tolist(), "size": size}]
    [[cost, mae]] = run_node(f"[{cost}, maeCost(input.ranks.length, input.size)]", inputs)
    assert 2 * cost == counted.get_total_flops()  # a multiply-add is two
    assert (cost == mae) == (strategy.get("segments") == "mae")


def test_sentences_name_the_tokens_that_the_masks_allow():
    ranks = torch.tensor([3, 0, 1, 1, 2, 2, 2, 0, 3])
    answers = run_node("describe(...input)", [[i, ranks.tolist()] for i in range(9)])
    for name, mask in zip(MASKS, randsac.attention_masks(ranks)):
        out = ranks == (3 if name == "source" else 0)
        for i, answer in enumerate(answers):
            assert out[i] == ("left out" in answer[name])
            if not out[i]:
                low, high = ranks[mask[i]].aminmax()
                span = f"ranks {low} to {high}" if low < high else f"rank {low}"
                assert f"the {mask[i].sum()} tokens of {span}" in answer[name]


# --- the page


def data_of(page):
    [text] = re.findall(r'type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def picture_of(address):
    """A PNG file as an address -> int64 [H,W,4]"""
    file = io.BytesIO(base64.b64decode(address.split(",")[1]))
    return np.asarray(Image.open(file).convert("RGBA")).astype(int)


def test_the_explorer_shows_orders_that_sample_ranks_draws_and_what_the_model_predicts(tmp_path):
    flags = {"segments": "blob", "hierarchy": (16, 4), "last_rank": 4, "image_size": 48, "seed": 3}
    model = random_model(micro(**flags)).float()
    images = torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8)
    ranks = randsac.sample_ranks(model.config, 5)
    labels = ["a", "</script><b>&amp; \N{SNOWMAN} <!--", "c", "d", "e"]
    what = SimpleNamespace(model=model, config=model.config, ranks=ranks, flags=flags)
    what.images = (images / 127.5 - 1, labels)
    what.runs = [tmp_path / "micro"]
    page = visualize.draw_explore(what)
    before, after = TEMPLATE.split(">{}</script>")
    assert page.startswith(before) and page.endswith(after)
    data = data_of(page)
    assert data["size"] == {"dim": 16, "depth": 2, "decoder_depth": 2, "patch_size": 4}

    names = [entry["name"] for entry in data["strategies"]]
    assert names == [*visualize.STRATEGIES, "yours: blob 16 4"]
    for i, entry in enumerate(data["strategies"]):
        typed = randsac.make_parser("").parse_args(entry["flags"].split())
        strategy = randsac.Config(**vars(typed))
        orders = randsac.sample_ranks(strategy, 8, generator=randsac.seeded("cpu", 3, i)).tolist()
        assert entry["ranks"] == [r for k, r in enumerate(orders) if r not in orders[:k]]
        assert entry["patch_size"] == strategy.patch_size
        assert entry["grid"] == strategy.grid and entry["levels"] == list(strategy.hierarchy)
    assert all(getattr(strategy, flag) == value for flag, value in flags.items())  # yours

    assert data["model"]["name"] == "micro" and len(data["model"]["images"]) == 4
    x = images / 127.5 - 1
    truth = randsac.normalize_patches(randsac.patchify(x, 4))
    with torch.no_grad():
        errors = (model.predict(x, ranks) - truth).square().mean(-1)
    for i, entry in enumerate(data["model"]["images"]):
        assert entry["label"] == labels[i] and entry["grid"] == 12
        assert entry["ranks"] == ranks[i].tolist()
        found = [math.nan if error is None else error for error in entry["errors"]]
        assert found == pytest.approx(errors[i].tolist(), abs=6e-4, nan_ok=True)
        photo = picture_of(entry["image"])[..., :3]
        predicted = picture_of(entry["predicted"])[..., :3]
        given = np.kron(ranks[i].view(12, 12) == 0, np.ones((4, 4))) > 0
        assert (photo == images[i].movedim(0, -1).numpy()).all()
        assert (predicted[given] == photo[given]).all()
        assert (predicted[~given] != photo[~given]).any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds explore.html as the README's command writes it where there is no data set, and pictures
    for which the four images beside the checkpoint are enough."""
    folder = tmp_path_factory.mktemp("explore")
    names = ["explore", "predictions", "attention", "loss-by-rank"]
    visualize.main([*names, "--checkpoint", str(CHECKPOINT), "--out", str(folder)])
    return folder


def test_template_has_one_place_for_data_and_needs_no_network():
    assert TEMPLATE.count('<script id="data" type="application/json">{}</script>') == 1
    assert not re.search(r"https?:|//\w+\.|@import|\bsrc=|\bhref=|fetch\(|XMLHttp", TEMPLATE)
    assert len(TEMPLATE.encode()) < 60_000


def test_the_shipped_page_is_what_the_command_writes(folder):
    written = data_of((folder / "explore.html").read_text(encoding="utf-8"))
    shipped = data_of(SHIPPED)
    assert SHIPPED == TEMPLATE.replace(">{}</script>", f">{json.dumps(shipped)}</script>")
    assert len(SHIPPED.encode()) < 1_500_000

    # Predictions are alike to rounding, whichever machine made them; all else is the same.
    parts = [(written, shipped), *zip(written["model"]["images"], shipped["model"]["images"])]
    for one, other in parts:
        for name in one.keys() & {"image", "predicted"}:
            difference = picture_of(one.pop(name)) - picture_of(other.pop(name))
            assert np.abs(difference).max() <= (name == "predicted")
        assert one.pop("errors", []) == pytest.approx(other.pop("errors", []), abs=0.002)
    assert written == shipped


def test_images_beside_a_checkpoint_are_shown_unless_others_are_asked_for(monkeypatch):
    flags = {"checkpoint": CHECKPOINT}
    images, labels = visualize.Shown(flags).images
    for image, label in zip(images, labels, strict=True):
        photo = np.asarray(Image.open(CHECKPOINT.parent / "images" / f"{label}.png"))
        assert (visualize.photos(image[None]).numpy() == photo).all()

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar")
    for given in ({"dataset": "cifar10"}, {"data_dir": "data"}):
        with pytest.raises(randsac.UserError, match="cannot be had"):
            _ = visualize.Shown(flags | given).images


# --- the page, in a browser

# What a page shows, and what is done on it, one after the other. Each move is followed by a look.
SHOWN = """
  const shown = () => ({
    ...state, name: now.view.name, ranks: now.ranks, tokens: now.tokens,
    cells: [...element("grid").children].map((cell) => cell.className.split(" ")[0]),
    filled: [...element("grid").children].map((cell) => ["image", "predicted"].find(
      (kind) => getComputedStyle(cell).backgroundImage.includes(now.order[kind]))),
    inTabOrder: [...element("grid").children].filter((cell) => cell.tabIndex === 0).length,
    text: Object.fromEntries(
      [...document.querySelectorAll("[id]")].map((e) => [e.id, e.textContent])),
    hidden: [...document.querySelectorAll("[id]")].filter((e) => e.hidden).map((e) => e.id),
    sentences: [...document.querySelectorAll("figure p")].map((p) => p.textContent),
    small: document.querySelector("#prediction canvas").toDataURL(),
    maps: [...document.querySelectorAll(".map")].map((canvas) => canvas.toDataURL()),
    masks: [...document.querySelectorAll(".mask")].map((canvas) => canvas.toDataURL()),
    behind: getComputedStyle(document.querySelector(".mask")).backgroundImage,
    colours: { look: styleColour("look"), out: styleColour("out") },
    segments: element("timeline").children.length,
    width: document.documentElement.scrollWidth,
    gap: element("token-text").getBoundingClientRect().top -
      element("grid").getBoundingClientRect().bottom,
  });
  const cell = (token) => element("grid").children[token];
  const press = (target, key) =>
    target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const slide = (id, value) => {
    element(id).value = value;
    element(id).dispatchEvent(new Event("input"));
  };
"""
POINT = 'dispatchEvent(new PointerEvent("pointerover", { bubbles: true }))'
VIEWS = ["what nano-cifar10 predicts", *visualize.STRATEGIES]
MOVES = {
    "before": f"chooseView({VIEWS.index('square 16 -> 4')}); goTo(2)",
    "hovered": f"cell(now.ranks.indexOf(9)).{POINT}",
    "down": "cell(20).focus(); press(cell(20), 'ArrowDown')",
    "stepped": "document.activeElement.blur(); press(document.body, 'ArrowRight')",
    "played": "element('play').click(); await new Promise((done) => setTimeout(done, 2500))",
    "sorted": f"chooseView({VIEWS.index('blob 11 -> 5')}); slide('last-rank', 5); cell(3).{POINT}",
    "in place": f"element('serialized').click(); cell(60).{POINT}",
}
for number, name in enumerate(VIEWS):
    MOVES[name] = f"chooseView({number})"
    MOVES[f"{name}, next"] = "element('next-order').click()"
    MOVES[f"{name}, merged"] = "slide('last-rank', element('last-rank').max)"
for number in range(4):
    MOVES[f"image {number}"] = f"chooseView(0); element('images').children[{number}].click()"
    MOVES[f"image {number}, step"] = "goTo(3)"
    MOVES[f"image {number}, end"] = "goTo(now.last + 1)"


@pytest.fixture(scope="module")
def visits(folder):
    """-> {visit: {move: what the page showed then}}, and the text of the bare template."""
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    browser = next(filter(None, found), None)
    if browser is None:
        pytest.skip("there is no Chromium")

    # One browser, with a frame for each visit, which can be as narrow as a phone.
    moves = "".join(f"{move}; all[{json.dumps(name)}] = shown();" for name, move in MOVES.items())
    moves = f"{SHOWN} const all = {{}}; {moves} return all;"
    page = (folder / "explore.html").read_text(encoding="utf-8")
    outer = """<!DOCTYPE html><body><script>
      onmessage = (event) => {
        const report = document.createElement("pre");
        report.textContent = JSON.stringify(event.data);
        document.body.append(report);
      };
    </script>"""
    reading = "return document.body.innerText"
    for width, text, act in ((360, page, moves), (1200, page, moves), (500, TEMPLATE, reading)):
        act = f"""<script>addEventListener("load", async () => {{
          const act = async () => {{ {act} }};
          parent.postMessage(["{width}", await act()], "*");
        }});</script>"""
        (folder / f"{width}.html").write_text(text.replace("</html>", act), encoding="utf-8")
        outer += f'<iframe src="{width}.html" style="width: {width}px; height: 900px"></iframe>'
    (folder / "visits.html").write_text(outer, encoding="utf-8")

    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    flags += " --virtual-time-budget=20000 --enable-logging=stderr"
    words = [browser, *flags.split(), f"--user-data-dir={folder / 'profile'}"]
    words.append(str(folder / "visits.html"))
    result = subprocess.run(words, check=False, capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in result.stderr, result.stderr  # there errors of scripts are told
    found = re.findall("<pre>(.*?)</pre>", result.stdout, re.DOTALL)
    assert len(found) == 3, result.stderr
    return dict(json.loads(html.unescape(text)) for text in found)


@pytest.fixture(params=["360", "1200"])
def seen(request, visits):
    return visits[request.param]


def test_a_hover_and_the_keys_change_what_is_marked(seen):
    before, hovered, down, stepped, played = list(seen.values())[:5]
    for marks in ("maps", "masks", "sentences"):
        assert len({*before[marks], *hovered[marks]}) == 6, marks  # each of three has changed
    assert hovered["ranks"][hovered["token"]] == 9
    assert hovered["text"]["token-text"].startswith(f"Token {hovered['token']} has rank 9:")
    assert (down["token"], down["inTabOrder"]) == (28, 1)
    assert (before["step"], down["step"], stepped["step"]) == (2, 2, 3)
    assert (before["cells"].count("known"), stepped["cells"].count("known")) == (8, 12)
    assert played["step"] > 3


def marks_of(address, n, edge, colours):
    """A picture of n x n cells, right of and below an edge -> what each is marked as, [n,n]."""
    picture = picture_of(address)
    unit = (len(picture) - edge) / n
    middles = (edge + unit * (np.arange(n) + 0.5)).astype(int)
    cells = picture[middles][:, middles]
    marks = np.full((n, n), "pixels")
    for name, colour in colours.items():
        marks[(cells[..., :3] == colour).all(-1)] = name
    marks[cells[..., 3] == 0] = "hatch"  # it lies behind
    return marks


@pytest.mark.parametrize("move", ["sorted", "in place"])
def test_marks_are_the_rows_of_the_masks(seen, move):
    shown = seen[move]
    assert "repeating-linear-gradient" in shown["behind"]
    ranks = torch.tensor(shown["ranks"])
    order = shown["tokens"]
    assert ranks.max() == 5
    orders = {"sorted": ranks.argsort(stable=True).tolist(), "in place": list(range(64))}
    assert order == orders[move]
    first = ranks == 0
    last = ranks == 5
    ends = [(last, last), (first, first), (first, last)]  # of rows, of columns
    for k, mask in enumerate(randsac.attention_masks(ranks)):
        rows, columns = ends[k]
        cells = np.where(mask, "look", "hatch")
        cells = np.where(rows[:, None] | columns, "out", cells)

        # On the image, the pixels of what is looked at. The decoder knows none.
        row = cells[shown["token"]]
        if k != 1:
            row = np.where(row == "look", "pixels", row)
        on_image = marks_of(shown["maps"][k], 8, 0, shown["colours"])
        assert (on_image.flatten() == row).all()

        # The frame of the token's row hides its neighbours and the ends of the row.
        on_mask = marks_of(shown["masks"][k], 64, 8, shown["colours"])
        same = on_mask == cells[order][:, order]
        far = np.abs(np.arange(64) - order.index(shown["token"]))
        assert same[(far == 0) | (far > 7), 5:-5].all()


def test_every_strategy_is_shown(seen):
    for strategy in data_of(SHIPPED)["strategies"]:
        name = strategy["name"]
        orders = strategy["ranks"]
        shown = seen[name]
        following = seen[f"{name}, next"]
        merged = seen[f"{name}, merged"]
        assert shown["name"] == name and shown["ranks"] == orders[0]
        assert following["ranks"] == orders[1 % len(orders)]
        assert ("next-order" in shown["hidden"]) == name.endswith("raster")
        last = max(following["ranks"])
        assert merged["segments"] == max(last, 2)  # as far as it goes
        assert shown["text"]["command"].startswith("python randsac.py")
        assert (f"--last-rank {last - 1}" in merged["text"]["command"]) == (last > 1)
    assert seen["mae"]["text"]["encoder-tokens"] == "16 of 64"
    assert seen["pixel raster, merged"]["text"]["encoder-tokens"] == "254 of 256"
    assert "varying" not in seen["blob 11 -> 5"]["hidden"]
    assert "varying" in seen["square 16"]["hidden"]


def test_a_page_is_not_wider_than_a_phone_and_names_the_token_below_the_image(visits):
    for shown in visits["360"].values():
        assert shown["width"] <= 360
        assert 0 <= shown["gap"] < 30


FILLINGS = {"known": "image", "next": "predicted", "later": None}


def test_predictions_are_shown_and_the_end_shows_them_large(seen):
    for number, image in enumerate(data_of(SHIPPED)["model"]["images"]):
        step = seen[f"image {number}, step"]
        end = seen[f"image {number}, end"]
        ranks = torch.tensor(image["ranks"])
        assert step["ranks"] == image["ranks"]
        assert {"next-order", "merging"} <= {*step["hidden"]}
        cells = np.select([ranks < 3, ranks == 3], ["known", "next"], "later").tolist()
        assert step["cells"] == cells
        assert step["filled"] == [FILLINGS[cell] for cell in cells]
        assert end["filled"] == ["predicted"] * 64

        errors = torch.tensor([math.nan if e is None else e for e in image["errors"]])
        errors = {"error-now": errors[ranks == 3].mean(), "error-all": errors.nanmean()}
        for place, error in errors.items():
            assert float(step["text"][place]) == pytest.approx(error.item(), abs=0.006)

        # At the end the small image is the true one.
        small = picture_of(end["small"])
        middles = (len(small) / 32 * (np.arange(32) + 0.5)).astype(int)
        assert (small[middles][:, middles] == picture_of(image["image"])).all()


def test_the_bare_template_says_how_to_make_the_page(visits):
    assert "python visualize.py explore" in visits["500"]
