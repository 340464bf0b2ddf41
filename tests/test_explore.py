"""The explorer: its script is compared with randsac.py by node, its page is used in a browser."""

import html
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, micro
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import randsac
import visualize

TEMPLATE = (ROOT / "assets" / "explore.html").read_text(encoding="utf-8")
STRATEGIES = [
    {"segments": "patch", "order": "raster", "patch_size": 1},
    {"segments": "patch"},
    {"hierarchy": (16,)},
    {"hierarchy": (16, 4)},
    {"segments": "blob", "hierarchy": (11, 5)},
    {"segments": "scatter", "hierarchy": (9,)},
    {"segments": "mae"},
]
RANKS = [randsac.sample_ranks(micro(**strategy), 1)[0] for strategy in STRATEGIES]
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
    result = subprocess.run(
        [node, "-e", method + read + write],
        input=json.dumps(inputs),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_masks_are_those_of_randsac():
    answers = run_node("attentionMasks(input)", [ranks.tolist() for ranks in RANKS])
    for ranks, answer in zip(RANKS, answers):
        for name, mask in zip(("source", "target", "memory"), randsac.attention_masks(ranks)):
            assert answer[name] == mask.tolist()


def test_the_tail_merges_as_last_rank_does():
    cases = [(ranks, K) for ranks in RANKS for K in (0, 1, 3)]
    answers = run_node("mergeTail(...input)", [[ranks.tolist(), K] for ranks, K in cases])
    for (ranks, K), answer in zip(cases, answers):
        merged = ranks.clamp(max=K) if K else ranks
        assert answer == merged.tolist()


def test_counter_counts_what_is_left_of_the_masks():
    answers = run_node("countStep(input)", [ranks.tolist() for ranks in RANKS])
    for ranks, answer in zip(RANKS, answers):
        # Sorted by rank, as decode_trimmed does it: the ends can be cut off.
        ordered = ranks.sort().values
        sizes = ordered.bincount()
        first = int(sizes[0])
        last = len(ranks) - int(sizes[-1])
        source, target, memory = randsac.attention_masks(ordered)
        assert answer == {
            "encoder": last,
            "decoder": len(ranks) - first,
            "source": int(source[:last, :last].sum()),
            "target": int(target[first:, first:].sum()),
            "memory": int(memory[first:, :last].sum()),
        }


@pytest.mark.parametrize("strategy", [{"hierarchy": (4,)}, {"segments": "mae"}, {"last_rank": 3}])
def test_cost_is_what_torch_counts(strategy):
    config = micro(depth=3, **strategy)
    model = randsac.RandSAC(config)
    images = torch.zeros(1, 3, 16, 16)
    ranks = randsac.sample_ranks(config, 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model(images, ranks, trim=True)

    size = {name: getattr(config, name) for name in ("dim", "depth", "decoder_depth", "patch_size")}
    counts = "countStep(input.ranks)"
    cost = f"stepCost({counts}.encoder, {counts}.decoder, input.size)"
    inputs = [{"ranks": ranks[0].tolist(), "size": size}]
    [answer] = run_node(f"[{cost}, maeCost(input.ranks.length, input.size)]", inputs)
    assert 2 * answer[0] == counted.get_total_flops()  # a multiply-add is two
    assert (answer[0] == answer[1]) == (strategy.get("segments") == "mae")


def test_sentences_name_the_tokens_that_the_masks_allow():
    ranks = torch.tensor([3, 0, 1, 1, 2, 2, 2, 0, 3])
    answers = run_node("describe(...input)", [[i, ranks.tolist()] for i in range(9)])
    masks = dict(zip(("source", "target", "memory"), randsac.attention_masks(ranks)))
    for name, mask in masks.items():
        out = ranks == (3 if name == "source" else 0)
        for i, answer in enumerate(answers):
            assert out[i] == ("left out" in answer[name])
            if not out[i]:
                low, high = ranks[mask[i]].aminmax()
                span = f"ranks {low} to {high}" if low < high else f"rank {low}"
                assert f"the {mask[i].sum()} tokens of {span}" in answer[name]


# --- the page, in a browser


def test_template_has_one_place_for_data_and_needs_no_network():
    assert TEMPLATE.count('<script id="data" type="application/json">{}</script>') == 1
    assert not re.search(r"https?:|//\w+\.|@import|\bsrc=|\bhref=|fetch\(|XMLHttp", TEMPLATE)
    assert len(TEMPLATE.encode()) < 60_000


def data_of(page):
    return json.loads(re.search(r'type="application/json">(.*?)</script>', page).group(1))


# What is done on a page when it has loaded. Each returns what was seen.
POINTING = """
  const shown = () => ({
    token: state.token, step: state.step,
    words: [...document.querySelectorAll("#token-text, figure p")].map((p) => p.textContent),
    pictures: [...document.querySelectorAll("figure canvas")].map((c) => c.toDataURL()),
    given: document.querySelectorAll("#grid .given").length,
    inTabOrder: document.querySelectorAll("#grid [tabindex='0']").length,
  });
  const press = (target, key) =>
    target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const cells = element("grid").children;
  chooseView(views.findIndex((view) => view.name === "square 16 -> 4"));
  goTo(2);
  const all = [shown()];
  const far = now.ranks.indexOf(9);
  cells[far].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  all.push(shown());
  cells[20].focus();
  press(cells[20], "ArrowDown");
  all.push(shown());
  document.activeElement.blur();
  press(document.body, "ArrowRight");
  all.push(shown());
  element("play").click();
  await new Promise((done) => setTimeout(done, 2500));
  all.push(shown());
  return all;
"""
MARKS = """
  const names = Object.fromEntries(
    ["look", "empty", "out"].map((name) => [styleColour(name).join(), name]));
  const read = (canvas) => {
    const copy = canvas.cloneNode().getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    const all = copy.getImageData(0, 0, canvas.width, canvas.width).data;
    return (x, y) => {
      const at = 4 * (Math.floor(y) * canvas.width + Math.floor(x));
      return names[all.slice(at, at + 3).join()] || "pixels";
    };
  };
  const count = (n, make) => Array.from({ length: n }, (_, number) => make(number));
  const answers = [];
  chooseView(views.findIndex((view) => view.name === "blob 11 -> 5"));
  for (const [token, serialized] of [[3, true], [60, false]]) {
    Object.assign(state, { lastRank: 5, serialized, token });
    settle();
    draw();
    const maps = [...document.querySelectorAll(".map")].map((map) => {
      const pixel = read(map);
      const unit = map.width / 8;
      return count(64, (j) => pixel((j % 8 + 0.5) * unit, (Math.floor(j / 8) + 0.5) * unit));
    });
    const masks = [...document.querySelectorAll(".mask")].map((mask) => {
      const pixel = read(mask);
      const edge = Math.round(8 * window.devicePixelRatio);
      const middle = (at) => edge + (at + 0.5) * (mask.width - edge) / 64;
      return count(64, (row) => count(64, (column) => pixel(middle(column), middle(row))));
    });
    answers.push({ token, serialized, ranks: now.order.ranks, maps, masks });
  }
  return answers;
"""
STRATEGIES_SHOWN = """
  const answers = {};
  views.forEach((view, number) => {
    chooseView(number);
    const orders = view.orders.map(() => {
      element("next-order").click();
      return state.order;
    });
    const slider = element("last-rank");
    slider.value = slider.max;
    slider.dispatchEvent(new Event("input"));
    answers[view.name] = {
      orders,
      most: Number(slider.max),
      segments: element("timeline").children.length,
      command: element("command").textContent,
      encoder: element("encoder-tokens").textContent,
      varies: !element("varying").hidden,
      width: document.documentElement.scrollWidth,
    };
  });
  return answers;
"""
PREDICTIONS = """
  return [...element("images").children].map((button) => {
    button.click();
    goTo(3);
    const next = [...document.querySelectorAll("#grid .next")];
    return {
      label: button.textContent,
      tokens: next.map((cell) => Number(cell.dataset.token)),
      background: getComputedStyle(next[0]).backgroundImage,
      now: Number(element("error-now").textContent),
      all: Number(element("error-all").textContent),
      most: element("last-rank").max,
    };
  });
"""
READING = "return document.body.innerText;"


def watched(page, name, act):
    """The page, which tells the page around it what the script `act` returns and all errors."""
    watch = """<script>
      const errors = [];
      addEventListener("error", (event) => errors.push(event.message));
      console.error = (...words) => errors.push(words.join(" "));
    </script>"""
    act = """<script>
      addEventListener("load", async () => {
        const act = async () => { ACT };
        const answer = await act().catch((error) => { errors.push(error.stack); });
        parent.postMessage({ name: "NAME", answer, errors }, "*");
      });
    </script>""".replace("ACT", act).replace("NAME", name)
    return page.replace("<title>", watch + "<title>").replace("</html>", act + "</html>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds explore.html as the command makes it, with a model."""
    folder = tmp_path_factory.mktemp("explore")
    checkpoint = ROOT / "assets" / "nano-cifar10" / "checkpoint.pt"
    flags = ["--checkpoint", str(checkpoint), "--dataset", "shapes", "--out", str(folder)]
    visualize.main(["explore", *flags])
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "explore.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def seen(folder, page):
    """-> what was seen on the page in a browser, by the name of what was done there."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browsers = [shutil.which(name) for name in names if shutil.which(name)]
    if not browsers:
        pytest.skip("there is no Chromium")

    # All in one visit, in frames, which can be as narrow as a phone.
    visits = [
        ("pointing", page, POINTING, 1200),
        ("marks", page, MARKS, 1200),
        ("strategies", page, STRATEGIES_SHOWN, 360),
        ("predictions", page, PREDICTIONS, 1200),
        ("template", TEMPLATE, READING, 1200),
    ]
    frames = ""
    for name, text, act, width in visits:
        (folder / f"{name}.html").write_text(watched(text, name, act), encoding="utf-8")
        frames += f'<iframe src="{name}.html" style="width: {width}px; height: 900px"></iframe>'
    hear = """<script>
      onmessage = (event) => {
        const report = document.createElement("pre");
        report.textContent = JSON.stringify(event.data);
        document.body.append(report);
      };
    </script>"""
    outer = folder / "visits.html"
    outer.write_text(f"<!DOCTYPE html><body>{hear}{frames}", encoding="utf-8")

    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    flags += " --virtual-time-budget=20000 --enable-logging=stderr"
    result = subprocess.run(
        [browsers[0], *flags.split(), f"--user-data-dir={folder / 'profile'}", outer],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "CONSOLE" not in result.stderr, result.stderr
    found = re.findall("<pre>(.*?)</pre>", result.stdout, re.DOTALL)
    reports = [json.loads(html.unescape(text)) for text in found]
    assert len(reports) == len(visits), result.stderr
    assert [report["errors"] for report in reports] == [[]] * len(visits)
    return {report["name"]: report["answer"] for report in reports}


def test_a_hover_and_the_keys_change_what_is_marked(seen):
    before, hovered, down, stepped, played = seen["pointing"]
    assert len(before["pictures"]) == 6
    for marks in ("words", "pictures"):
        for one, other in zip(before[marks], hovered[marks]):
            assert one != other
    assert hovered["words"][0].startswith(f"Token {hovered['token']} has rank 9:")
    assert down["token"] == 28
    assert down["inTabOrder"] == 1
    assert (before["step"], down["step"], stepped["step"]) == (2, 2, 3)
    assert (before["given"], stepped["given"]) == (8, 12)
    assert played["step"] > 3


def test_marks_are_the_rows_of_the_masks(seen):
    for answer in seen["marks"]:
        ranks = torch.tensor(answer["ranks"]).clamp(max=5)
        token = answer["token"]
        order = ranks.argsort(stable=True) if answer["serialized"] else torch.arange(64)
        first = ranks == 0
        last = ranks == 5
        ends = [(last, last), (first, first), (first, last)]  # of rows, of columns
        for k, mask in enumerate(randsac.attention_masks(ranks)):
            rows, columns = ends[k]
            cells = np.where(mask, "look", "empty")
            cells = np.where(rows[:, None] | columns, "out", cells)

            # The decoder knows no pixels.
            marked = cells[token]
            if k != 1:
                marked = np.where(marked == "look", "pixels", marked)
            assert answer["maps"][k] == marked.tolist()

            # The frame of the token's row hides its neighbours and the ends of the row.
            drawn = np.array(answer["masks"][k])[:, 3:-3]
            expected = cells[order][:, order][:, 3:-3]
            far = np.abs(np.arange(64) - order.tolist().index(token))
            assert (drawn == expected)[(far == 0) | (far > 4)].all()


def test_every_strategy_is_shown_in_a_narrow_window(seen, page):
    answers = seen["strategies"]
    assert all(answer["width"] <= 360 for answer in answers.values())
    for answer in answers.values():
        n = len(answer["orders"])
        assert answer["orders"] == [*range(1, n), 0]  # once around
    for strategy in data_of(page)["strategies"]:
        answer = answers[strategy["name"]]
        last = max(strategy["ranks"][0])
        assert answer["most"] == last - 1
        assert answer["segments"] == max(last, 2)  # merged as far as it goes
        assert answer["command"].startswith("python randsac.py")
        assert (f" --last-rank {last - 1}" in answer["command"]) == (last > 1)
    assert answers["mae"]["encoder"] == "16 of 64"
    assert answers["pixel raster"]["encoder"] == "254 of 256"
    assert answers["blob 11 -> 5"]["varies"]
    assert not answers["square 16"]["varies"]


def test_the_model_shows_its_predictions_and_errors(seen, page):
    images = data_of(page)["model"]["images"]
    assert len(images) == 4
    for answer, image in zip(seen["predictions"], images, strict=True):
        ranks = torch.tensor(image["ranks"])
        errors = torch.tensor([math.nan if e is None else e for e in image["errors"]])
        assert answer["label"] == image["label"]
        assert answer["tokens"] == (ranks == 3).nonzero().flatten().tolist()
        assert image["predicted"] in answer["background"]
        assert answer["now"] == pytest.approx(errors[ranks == 3].mean().item(), abs=0.006)
        assert answer["all"] == pytest.approx(errors.nanmean().item(), abs=0.006)
        assert answer["most"] == "0"  # these predictions are of this order


def test_the_bare_template_says_how_to_make_the_page(seen):
    assert "python visualize.py explore" in seen["template"]
