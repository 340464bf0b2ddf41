"""The evaluation protocols (Section 5.1): the solver's optimum, what a probe may see, the recipes, the
rows that it adds, the features that it keeps, what it refuses."""

import functools
import hashlib
import json
import os
import re
import runpy
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MICRO_FLAGS, ROOT, micro, run_here
from PIL import Image

import probe
import randsac

CPU = torch.device("cpu")
OWN_USE = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """Where decoded images go, and in which the tests of this file lie."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("here"))
        yield


@pytest.fixture(scope="module")
def trained(image_folder, here):
    """The checkpoint of a few steps on `image_folder`."""
    assert run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--max-steps", 4, "--out", "run") == 0
    return Path("run", "checkpoint.pt").resolve()


@pytest.fixture
def checkpoint(trained, tmp_path, monkeypatch):
    """A copy of it with nothing beside it, for tests of other things than LIN's strength of L2."""
    monkeypatch.setattr(probe, "L2_GRID", [1e-1, 1e-2])
    return shutil.copy(trained, tmp_path / "checkpoint.pt")


def words(*arguments):
    return [str(argument) for argument in (*arguments, "--device", "cpu")]


def run_probe(checkpoint, *arguments):
    """Runs a probe in this process -> the rows that it added."""
    path = checkpoint.parent / "probes.jsonl"
    before = path.read_text() if path.exists() else ""
    probe.main(words(checkpoint, *arguments))
    after = path.read_text()
    assert after.startswith(before)
    return [json.loads(line) for line in after[len(before) :].splitlines()]


def prepared(checkpoint, *flags):
    """What main prepares before it measures -> model, data, config, args."""
    args, _, config, model = probe.prepare(words(checkpoint, *flags))
    args.labelled = True
    images, labels, names = randsac.load_images(config, train=True)
    test_images, test_labels, _ = randsac.load_images(config, train=False)
    return model, probe.Labelled(images, labels, names, test_images, test_labels), config, args


def train(model, data, config, protocol):
    """-> the test images' scores by linear-sgd or finetune."""
    if protocol == "linear-sgd":
        return probe.linear_sgd(model, data, config, CPU)[0]
    return probe.finetune(model, data, config, CPU, decay=0.75)[0]


# --- the solver


def correlated():
    """Features with deviations from 1 to 100, correlated; classes that overlap."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 400)
    x = rng.normal(size=(400, 6)) + np.eye(4, 6)[y]
    x = x @ (np.eye(6) + 0.8 * rng.normal(size=(6, 6))) * 10 ** np.linspace(0, 2, 6) + 5
    return torch.from_numpy(x), torch.from_numpy(y)


def narrow():
    """Features of which the images' variance along directions goes from 4 to 1e-7, and is 0 along
    one: the classes differ everywhere."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, 600)
    axes, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    z = rng.normal(size=(600, 12)) + 0.7 * rng.normal(size=(3, 12))[y]
    x = z * np.append(np.logspace(0, -3.3, 11), 0) @ axes
    return torch.from_numpy(x), torch.from_numpy(y)


def standardized(x):
    return (x - x.mean(0)) / x.std(0)


def penalized(x, y, weight, bias, l2):
    return F.cross_entropy(x @ weight.T + bias, y) + l2 / 2 * weight.square().sum()


def newton(x, y, C, l2):
    """The optimum by damped Newton steps in float64 -> weight [C,D], bias [C]."""

    def loss(w):
        w = w.view(C, -1)
        return penalized(x, y, w[:, :-1], w[:, -1], l2)

    w = x.new_zeros(C * (x.shape[1] + 1))
    for _ in range(100):
        gradient = torch.autograd.functional.jacobian(loss, w)
        curvature = torch.autograd.functional.hessian(loss, w)
        # The same number added to all biases changes nothing: of such steps the smallest.
        step = torch.linalg.pinv(curvature, rtol=1e-13, hermitian=True) @ gradient
        while loss(w - step) > loss(w) and step.abs().max() > 1e-12:
            step /= 2
        w = w - step
        if step.abs().max() < 1e-10:
            break
    w = w.view(C, -1)
    return w[:, :-1], w[:, -1]


SOLVED = [  # features, their dtype, strengths of L2, slack of the loss
    (correlated, torch.float64, [1e-1, 1e-3, 1e-6], 1e-9),
    (narrow, torch.float32, probe.L2_GRID, 2e-6),
]


@pytest.mark.parametrize("make, dtype, strengths, slack", SOLVED)
def test_the_solver_finds_the_optimum_that_newton_finds(make, dtype, strengths, slack):
    x, y = make()
    x = standardized(x)
    C = int(y.max()) + 1
    fits = probe.logistic_regression(x.to(dtype), y, C, strengths)
    for l2, (weight, bias) in zip(strengths, fits, strict=True):
        W, b = newton(x, y, C, l2)
        loss = penalized(x, y, weight.double(), bias.double(), l2)
        assert abs(loss - penalized(x, y, W, b, l2)) < slack, l2
        same = (x @ weight.double().T + bias).argmax(1) == (x @ W.T + b).argmax(1)
        assert same.float().mean() > 0.99


@pytest.mark.parametrize("l2", [1e-1, 1e-4, 1e-7])
def test_the_solver_needs_few_steps_whatever_the_strength(monkeypatch, l2):
    calls = []
    cross_entropy = F.cross_entropy

    def counted(*args):
        calls.append(1)
        return cross_entropy(*args)

    monkeypatch.setattr(probe.F, "cross_entropy", counted)
    x, y = narrow()
    list(probe.logistic_regression(standardized(x).float(), y, 3, [l2]))
    assert len(calls) < 150


def test_lin_is_the_optimum_on_standardized_features_of_all_training_images():
    x, y = correlated()
    constant = torch.full((400, 1), 0.3)  # which does no harm
    train, test = torch.cat([x.float(), constant], 1).split(300)
    scores, chosen = probe.linear(train, y[:300], test, 4, seed=0)
    alone, _ = probe.linear(train, y[:300], test[:10], 4, seed=0)
    assert torch.allclose(scores[:10], alone, atol=1e-5)
    W, b = newton(standardized(x[:300]), y[:300], 4, chosen["l2"])
    expected = (x[300:] - x[:300].mean(0)) / x[:300].std(0) @ W.T + b
    assert torch.allclose(scores.double().softmax(1), expected.softmax(1), atol=1e-3)
    assert (scores.argmax(1) == expected.argmax(1)).all()


def test_the_strength_of_l2_is_the_best_on_held_out_training_images():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 2
    sign = (2 * y - 1)[:, None]
    noise = torch.randn(300, 200, generator=generator)
    # In the second case only a small difference of two features tells.
    hidden = noise[:, :1] + torch.cat([0 * sign, 0.02 * sign], 1)
    for features, low, high in [(noise + 0.15 * sign, 1e-4, 1), (hidden, 0, 1e-2)]:
        _, chosen = probe.linear(features, y, features, 2, seed=0)
        tried = {float(l2): top1 for l2, top1 in chosen["held_out_top1"].items()}
        assert list(tried) == probe.L2_GRID
        assert low < chosen["l2"] < high, chosen
        assert tried[chosen["l2"]] == max(tried.values())
        assert all(tried[l2] < max(tried.values()) for l2 in tried if l2 > chosen["l2"])

    # Nothing can be learned here but by heart, and that only of images that are fitted.
    labels = torch.randint(0, 2, (150,), generator=generator)
    _, chosen = probe.linear(noise[:150], labels, noise, 2, seed=0)
    assert max(chosen["held_out_top1"].values()) < 85, chosen


def test_neighbours_vote_as_a_loop_says():
    generator = torch.Generator().manual_seed(1)
    train = torch.randn(60, 5, generator=generator)
    test = torch.randn(7, 5, generator=generator)
    y = torch.randint(0, 3, (60,), generator=generator)
    scores, used = probe.knn(train, y, test.repeat(80, 1), 3)  # more than one part
    for i in range(len(test)):
        similar = [torch.dot(test[i], row) / test[i].norm() / row.norm() for row in train]
        votes = [0.0] * 3
        for j in sorted(range(60), key=similar.__getitem__, reverse=True)[:20]:
            votes[y[j]] += np.exp(similar[j].item() / 0.07)
        assert torch.allclose(scores[i::7], torch.tensor(votes, dtype=torch.float), rtol=1e-3)
    assert used == {"k": 20, "temperature": 0.07}
    _, used = probe.knn(train[:4], y[:4], test, 3)
    assert used["k"] == 4  # fewer images than neighbours


# --- features, and whose they are


def test_layers_are_measured_each_by_itself_and_the_last_as_linear_does_it(checkpoint):
    model, data, config, args = prepared(checkpoint, "--protocol", "layers")
    encode_layers = model.encode_layers

    def no_first_layer(x):
        first, last = encode_layers(x)
        return [torch.randn_like(first), last]

    model.encode_layers = no_first_layer
    [row] = probe.measure_frozen(model, data, config, args, CPU, "")
    args.protocol = "linear"
    lin, near = probe.measure_frozen(model, data, config, args, CPU, "")
    assert row["protocol"] == "layers"
    assert max(row["layers"][0], row["layers_knn"][0]) < 70
    assert min(lin["top1"], near["top1"]) > 90
    assert row["layers"][1] == row["top1"] == lin["top1"]
    assert row["layers_knn"][1] == near["top1"]
    assert row["per_class"] == lin["per_class"]


def test_features_are_whole_images_mean_over_tokens_or_pixels_at_most_32_wide(checkpoint, tmp_path):
    model, data, config, args = prepared(checkpoint)
    args.labelled = False
    args.save = tmp_path / "f.npz"
    for features, size, expected_size in [("encoder", 8, 8), ("pixels", 8, 8), ("pixels", 40, 32)]:
        args.features = features
        config.image_size = size
        images = torch.randint(0, 256, (72, 3, size, size), dtype=torch.uint8)
        probe.measure_frozen(model, data._replace(images=images), config, args, CPU, "")
        expected = randsac.normalize(images, expected_size).flatten(1)
        if features == "encoder":
            expected = model.encode(randsac.normalize(images, 8)).mean(1)
        found = torch.from_numpy(np.load(args.save)["train"])
        assert torch.allclose(found, expected, atol=1e-5)


def test_the_encoder_is_the_checkpoints_or_a_random_one(checkpoint):
    def weights(model):
        return torch.cat([weight.flatten() for weight in model.state_dict().values()]).tolist()

    def encoder(*flags):
        return weights(probe.prepare(words(checkpoint, *flags))[3])

    as_trained = weights(randsac.load_model(checkpoint)[0])
    assert encoder() == encoder("--seed", 1) == as_trained
    untrained = encoder("--random-init")
    assert as_trained != untrained == encoder("--random-init", "--protocol", "finetune")
    assert untrained != encoder("--random-init", "--seed", 1)


# --- what a probe may see


def few(data):
    """Fewer test images, with wrong labels."""
    wrong = torch.tensor([2, 1, 0, 2])
    return data._replace(test_images=data.test_images[:4], test_labels=wrong)


@pytest.mark.parametrize("protocol", ["linear-sgd", "finetune"])
def test_scores_hang_on_the_seed_and_on_no_other_test_image_nor_label(
    checkpoint, protocol, monkeypatch
):
    streams = []
    random_crops = randsac.random_crops

    def noted(count, scale, device, generator):
        streams.append((generator.initial_seed(), torch.initial_seed()))
        return random_crops(count, scale, device, generator)

    monkeypatch.setattr(randsac, "random_crops", noted)

    def scores(seed, change=lambda data: data):
        flags = ("--epochs", 2, "--lr", 0.1, "--batch-size", 24, "--seed", seed)
        model, data, config, _ = prepared(checkpoint, "--protocol", protocol, *flags)
        before = [p.clone() for p in model.encoder.parameters()]
        found = train(model, change(data), config, protocol)
        same = all(map(torch.equal, before, model.encoder.parameters()))
        assert same == (protocol == "linear-sgd")  # finetune alone changes the encoder
        return found

    whole = scores(3)
    assert torch.allclose(scores(3, few), whole[:4], atol=1e-4)
    assert streams[:6] == streams[6:]
    assert not torch.allclose(scores(4), whole, atol=1e-2)

    # 72 images are 3 steps an epoch, each with a stream of its own for crops and for the rest.
    crops, rest = map(set, zip(*streams))
    assert len(crops) == 12
    if protocol == "finetune":
        assert len(rest) == 12
        assert crops.isdisjoint(rest)


def test_frozen_scores_hang_on_no_other_test_image_nor_label(checkpoint, monkeypatch):
    def make_row(protocol, data, scores, settings):
        return {"top1": scores}

    monkeypatch.setattr(probe, "make_row", make_row)
    model, data, config, args = prepared(checkpoint)
    whole = probe.measure_frozen(model, data, config, args, CPU, "")
    part = probe.measure_frozen(model, few(data), config, args, CPU, "")
    for scores, alone in zip(whole, part, strict=True):
        assert scores["top1"].shape == (24, 3)
        assert torch.allclose(scores["top1"][:4], alone["top1"], rtol=1e-4)


# --- the recipes


def test_steps_follow_the_schedule_and_each_epoch_shows_all_images_in_an_order_of_its_own():
    rates = []
    seen = []

    class Recorded(torch.optim.SGD):
        def step(self):
            rates.append([group["lr"] for group in self.param_groups])
            super().step()

    def augmented(images, labels, config, step):
        assert step * config.batch_size == len(seen)
        seen.extend(labels.tolist())
        return randsac.normalize(images, 8).flatten(1), labels

    layer = torch.nn.Linear(192, 30)
    optimizer = Recorded(
        [{"params": layer.weight, "share": 1.0}, {"params": layer.bias, "share": 0.5}]
    )
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    data = probe.Labelled(images, torch.arange(30), range(30), images, None)
    sizes = {"image_size": 8, "patch_size": 2, "epochs": 4, "batch_size": 6}
    config = micro(**sizes, lr=0.5, warmup=0.2)
    probe.descend(layer, optimizer, augmented, data, config, CPU)
    expected = [randsac.learning_rate(step, 20, config) for step in range(20)]
    assert rates == [[rate, rate / 2] for rate in expected]
    epochs = [seen[start : start + 30] for start in range(0, 120, 30)]
    assert [sorted(order) for order in epochs] == [list(range(30))] * 4
    assert len(set(map(tuple, epochs))) == 4


def test_finetune_learns_what_colours_tell(checkpoint):
    flags = ("--protocol", "finetune", "--epochs", 15, "--lr", 0.1, "--batch-size", 24)
    model, data, config, _ = prepared(checkpoint, *flags)
    scores = train(model, data, config, "finetune")
    assert (scores.argmax(1) == data.test_labels).float().mean() > 0.8


def coloured(count, generator):
    """Noisy images of four classes, each a little more of some colours, among differences in
    brightness that are larger: what tells them is small in the features."""
    labels = torch.arange(count) % 4
    colour = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])[labels] - 0.5
    x = 128 + 12 * colour[:, :, None, None]
    for shape, strength in (((3, 1, 1), 8), ((1, 1, 1), 32), ((3, 8, 8), 5)):
        x = x + strength * torch.randn(count, *shape, generator=generator)
    return x.clamp(0, 255).to(torch.uint8), labels


def test_linear_sgd_reaches_lin():
    generator = torch.Generator().manual_seed(0)
    images, labels = coloured(512, generator)
    test_images, test_labels = coloured(2000, generator)
    data = probe.Labelled(images, labels, list("abcd"), test_images, test_labels)
    config = micro(image_size=8, patch_size=2, segments="patch", **probe.RECIPES["linear-sgd"])
    config.crop_scale = 0.5
    model = randsac.RandSAC(config).eval().requires_grad_(False)
    encode = functools.partial(probe.pooled, model, 1)
    features = [probe.outputs(encode, x, 8, CPU)[:, 0] for x in (images, test_images)]
    scores, _ = probe.linear(features[0], labels, features[1], 4, seed=0)
    lin = probe.percent(scores.argmax(1) == test_labels)
    scores, _ = probe.linear_sgd(model, data, config, CPU)
    assert abs(probe.percent(scores.argmax(1) == test_labels) - lin) < 1.5


@pytest.mark.parametrize("protocol, count", [("linear-sgd", 3), ("finetune", 16)])
def test_what_the_head_is_given_is_standardized(checkpoint, monkeypatch, protocol, count):
    """By a head that passes on the first `count` numbers that it is given."""
    inside = []

    def descend(forward, optimizer, augmented, data, config, device):
        weight = next(p for g in optimizer.param_groups for p in g["params"] if p.ndim == 2)
        with torch.no_grad():
            weight.copy_(torch.eye(count, 16))
            inside.append(forward(randsac.normalize(data.images[:30], 8)))

    monkeypatch.setattr(probe, "descend", descend)
    model, data, config, _ = prepared(checkpoint, "--protocol", protocol)
    data = data._replace(test_images=data.images, names=range(count))
    after = train(model, data, config, protocol)
    for given in (*inside, after):
        # linear-sgd: over a batch of crops, and then over all whole training images, so that a test
        # image is treated as one of them. finetune: each image by its own numbers.
        over = 0 if protocol == "linear-sgd" else 1
        assert given.mean(over).abs().max() < 0.01
        assert (given.std(over, correction=0) - 1).abs().max() < 0.05


def test_layers_learn_at_shares_of_the_rate(checkpoint):
    flags = ("--protocol", "finetune", "--epochs", 1)
    model, data, config, _ = prepared(checkpoint, *flags)
    head = torch.nn.Linear(16, 3)
    groups = probe.layer_groups(model, head, 0.5)
    shares = {id(p): (g["share"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert shares[id(head.weight)] == (1, 0.05)
    assert shares[id(head.bias)] == (1, 0)
    assert shares[id(model.encoder[1].norm_mlp.weight)] == (0.5, 0)
    assert shares[id(model.embed.weight)] == (0.125, 0.05)
    parts = (head, model.encoder, model.embed)
    assert set(shares) == {id(p) for part in parts for p in part.parameters()}
    before = [p.clone() for p in model.parameters()]
    probe.finetune(model, data, config, CPU, decay=0.0)
    assert all(map(torch.equal, before, model.parameters()))  # a share of 0 keeps a layer as it is


def test_stochastic_depth_leaves_out_branches_of_higher_layers_in_training_only(checkpoint):
    flags = ("--protocol", "finetune", "--epochs", 1)
    model, data, config, _ = prepared(checkpoint, *flags)
    train(model, data, config, "finetune")
    x = torch.randn(1, 4, 16).expand(4000, -1, -1)
    for layer, rate in zip(model.encoder, (0, 0.1)):
        for branch, inputs in ((layer.mlp, (x,)), (layer.attention, (x, x))):
            assert not branch.training
            with torch.no_grad():
                whole = branch(*inputs)
                thinned = branch.train()(*inputs)
            out = (thinned == 0).flatten(1).all(1)
            assert abs(out.float().mean() - rate) < 0.02
            assert torch.allclose(thinned[~out], whole[~out] / (1 - rate), atol=1e-4)


@pytest.fixture
def leave_out(monkeypatch):
    """-> a function that takes a distortion out of torchvision: so that others can be seen alone.
    Crops are out already."""
    crop = "crop"
    monkeypatch.setattr(randsac, crop, lambda images, _, size: randsac.normalize(images, size))

    def take_out(name):
        monkeypatch.setattr(probe.v2, name, lambda **_: torch.nn.Identity())

    return take_out


def test_mixup_and_cutmix_take_turns_and_labels_say_what_is_seen(leave_out):
    leave_out("RandAugment")
    leave_out("RandomErasing")
    labels = torch.tensor([0, 1] * 8)
    images = (255 * labels)[:, None, None, None].expand(-1, 3, 16, 16).to(torch.uint8)
    cut = []
    mixed = []
    for step in range(60):
        x, target = probe.strongly(2, images, labels, micro(image_size=16), step)
        assert x.shape == (16, 3, 16, 16)
        assert torch.allclose(target.sum(1), torch.ones(16))
        # A bright image is of the second class, a mixture as much so as it is bright.
        share = (x.mean((1, 2, 3)) + 1) / 2
        assert torch.allclose(target[:, 1], 0.9 * share + 0.05, atol=1e-3)
        if len(x[0].unique()) > 1 or x.abs().min() > 0.999:
            cut.append(share[0].item())  # parts of both images, each as it was
        else:
            mixed.append(share[0].item())  # a shade between them
    assert 18 <= len(cut) <= 42
    assert len(set(cut)) > 10
    assert len(set(mixed)) > 15


def test_one_image_in_four_is_erased_in_part_by_noise(leave_out):
    leave_out("RandAugment")
    # Images of one shade and one class: mixing them changes nothing, but where two differ.
    images = torch.full((64, 3, 16, 16), 90, dtype=torch.uint8)
    labels = torch.zeros(64, dtype=torch.int64)
    areas = []
    for step in range(30):
        x, _ = probe.strongly(2, images, labels, micro(image_size=16), step)
        changed = (x - x.flatten().mode().values).abs().amax(1) > 1e-3  # [64,16,16]
        groups = changed.view(8, 8, 16, 16)[:, 4]  # far from the neighbours that it is mixed with
        areas += groups.float().mean((1, 2)).tolist()
    erased = [area for area in areas if area > 0]
    assert 40 <= len(erased) <= 80, "of 240"
    assert min(erased) < 0.1
    assert 0.2 < max(erased) < 0.4
    assert len(set(erased)) > 20


def test_each_eight_images_are_distorted_in_a_way_of_their_own(leave_out):
    leave_out("RandomErasing")
    one = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    x, _ = probe.strongly(2, one.repeat(64, 1, 1, 1), torch.arange(64) % 2, micro(), step=5)
    groups = x.view(8, 8, -1)[:, 1:]  # the first is mixed with one of another group
    assert torch.allclose(groups, groups[:, :1], atol=1e-4)
    assert len(groups[:, 0].mul(100).round().unique(dim=0)) > 4


# --- rows and floors

FROZEN = {"linear": {}, "knn": {"k": 20, "temperature": 0.07}}
RECIPE = {"epochs": 1, "batch_size": 256, "lr": 1e-3, "warmup": 0.05}
COMMANDS = [  # flags, the rows' protocols and settings, what differs in the rows
    ("", FROZEN, {}),
    ("--random-init", FROZEN, {"random_init": True}),
    ("--features pixels", FROZEN, {"features": "pixels"}),
    ("--image-size 12", FROZEN, {"image_size": 12}),  # 36 tokens, which 16 squares do not cut
    ("--protocol layers", {"layers": {}}, {}),
    ("--protocol linear-sgd --epochs 1", {"linear-sgd": {"epochs": 1, "lr": 0.1}}, {}),
    ("--protocol finetune --epochs 1", {"finetune": {**RECIPE, "layer_decay": 0.75}}, {}),
    (
        "--protocol finetune --epochs 1 --random-init",
        {"finetune": {**RECIPE, "layer_decay": 1}},
        {"random_init": True},
    ),
]


@pytest.mark.parametrize("flags, protocols, changes", COMMANDS)
def test_a_command_adds_rows(checkpoint, image_folder, capsys, flags, protocols, changes):
    place = os.path.relpath(image_folder)
    rows = run_probe(checkpoint, "--data-dir", place, *flags.split())
    printed = capsys.readouterr().out
    assert [row["protocol"] for row in rows] == list(protocols)
    expected = {"dataset": "folder", "data_dir": str(image_folder.resolve()), "image_size": 8}
    expected |= {"checkpoint": "checkpoint.pt", "step": 4, "seed": 0, "commonest": 33.33}
    expected |= {"sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()}
    expected |= {"features": "encoder", "random_init": False, **changes}
    for row, settings in zip(rows, protocols.values()):
        assert row.items() >= expected.items()
        assert row["settings"].items() >= settings.items()
        assert ("l2" in row["settings"]) == (row["protocol"] in ("linear", "layers"))
        assert row["seconds"] >= 0
        assert list(row["per_class"]) == ["ant", "bee", "cat"]
        assert f"{row['protocol']}: top-1 {row['top1']:.2f} %\n" in printed
    assert str(checkpoint.with_name("probes.jsonl")) in printed


def test_a_row_counts_hits_of_all_and_of_each_class_and_the_commonest_class():
    labels = torch.tensor([0, 0, 0, 2, 2])
    data = probe.Labelled(None, None, ["ant", "bee", "cat"], None, labels)
    scores = torch.eye(3)[torch.tensor([0, 0, 2, 0, 1])]
    row = probe.make_row("knn", data, scores, {"k": 20})
    assert row == {
        "protocol": "knn",
        "settings": {"k": 20},
        "top1": 40,
        "commonest": 60,
        "per_class": {"ant": 66.67, "cat": 0},
    }


def test_floors_are_those_of_the_same_images_and_checkpoint(checkpoint, capsys):
    row, _ = run_probe(checkpoint)
    log = checkpoint.with_name("probes.jsonl")

    def line(**changes):
        capsys.readouterr()
        probe.report(row | changes, log, classes=3)
        return capsys.readouterr().out

    others = {"protocol": "layers", "dataset": "cifar10", "data_dir": "/x", "image_size": 12}
    others |= {"checkpoint": "other.pt", "sha256": "0"}
    for name, other in others.items():
        line(random_init=True, top1=1.0, **{name: other})
    alone = f"linear: top-1 {row['top1']:.2f} %"
    assert line() == f"{alone}\n"
    assert line(random_init=True, top1=40.0) == "linear: top-1 40.00 %\n"
    assert line(features="pixels", top1=50.0) == "linear: top-1 50.00 %\n"

    # A row that was cut off harms neither those before nor the next.
    whole = log.read_text()
    log.write_text(whole + whole[:50])
    floors = "from random weights 40.00 %, from raw pixels 50.00 %"
    assert line() == f"{alone}, {floors}\n"
    assert log.read_text() == f"{whole}{whole[:50]}\n{json.dumps(row)}\n"

    # Where classes differ in size, another floor is always to name the commonest.
    assert line(commonest=44.44).endswith("the commonest class 44.44 %\n")


def test_other_images_lie_where_the_flags_say_or_where_training_would_look(
    checkpoint, image_folder
):
    def place(*flags):
        return probe.prepare(words(checkpoint, *flags))[2].data_dir

    assert place() == place("--dataset", "folder") == str(image_folder)
    assert place("--dataset", "cifar10") == "data"
    assert place("--dataset", "cifar10", "--data-dir", "x y") == "x y"
    assert place("--dataset", "shapes") == ""
    assert place("--data-dir", "~/x") == os.path.expanduser("~/x")


def test_a_model_alone_will_do_and_is_named_as_it_was_when_read(checkpoint, monkeypatch):
    saved = torch.load(checkpoint, weights_only=True)
    torch.save({"config": saved["config"], "model": saved["model"]}, checkpoint)
    before = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    load_images = randsac.load_images

    def replaced_meanwhile(config, train):
        checkpoint.write_bytes(b"of a later step")
        return load_images(config, train)

    monkeypatch.setattr(randsac, "load_images", replaced_meanwhile)
    for row in run_probe(checkpoint):
        assert row["sha256"] == before
        assert row["step"] is None


# --- features for code of one's own


def test_features_are_kept_with_whose_they_are(checkpoint, image_folder, tmp_path):
    run_probe(checkpoint, "--save", tmp_path / "f.npz")
    kept = np.load(tmp_path / "f.npz")
    model, _ = randsac.load_model(checkpoint)
    assert str(kept["sha256"]) == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    for split, count in (("train", 72), ("test", 24)):
        names = kept[f"{split}_files"]
        assert kept[split].shape == (count, 16)
        assert kept[split].dtype == np.float32
        assert len(set(names)) == count
        images = [torch.tensor(randsac.decode_image(image_folder / name, 8)) for name in names]
        with torch.no_grad():
            features = model.encode(randsac.normalize(torch.stack(images), 8)).mean(1)
        assert np.allclose(kept[split], features.numpy(), atol=1e-5)
        classes = [name.split("/")[1] for name in names]
        assert kept["classes"][kept[f"{split}_labels"]].tolist() == classes

    # A classifier of one's own: least squares.
    wanted = np.eye(len(kept["classes"]))[kept["train_labels"]]
    weight = np.linalg.lstsq(kept["train"], wanted, rcond=None)[0]
    assert ((kept["test"] @ weight).argmax(1) == kept["test_labels"]).mean() > 0.9


def test_images_without_names_have_numbers(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(randsac, "load_images", lambda *_, **__: randsac.draw_shapes(30, 8, seed=0))
    run_probe(checkpoint, "--dataset", "shapes", "--save", tmp_path / "f.npz")
    kept = np.load(tmp_path / "f.npz")
    assert kept["train_files"].tolist() == kept["test_files"].tolist() == list(range(30))


@pytest.mark.parametrize("gone", ["test", "*/[bc]*"])
def test_without_labels_features_are_kept_and_no_number_is_given(
    checkpoint, image_folder, tmp_path, monkeypatch, capsys, gone
):
    images = shutil.copytree(image_folder, tmp_path / "images")
    for folder in images.glob(gone):
        shutil.rmtree(folder)
    flags = ("--data-dir", images)
    line = f"neighbours --checkpoint {checkpoint} --dataset folder --data-dir {images}"
    assert line in refused(monkeypatch, capsys, checkpoint, *flags)
    probe.main(words(checkpoint, *flags, "--save", tmp_path / "f.npz"))
    assert line in capsys.readouterr().out
    kept = np.load(tmp_path / "f.npz")
    assert kept["train"].shape == (len(kept["train_files"]), 16)
    assert kept["test"].shape == (len(kept["test_labels"]), 16)
    assert not (tmp_path / "probes.jsonl").exists()


# --- what it refuses


def refused(monkeypatch, capsys, *arguments):
    """The command ends with code 2 and one line on stderr, before anything is computed -> it."""
    monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, arguments)])
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(probe, "outputs", None)
        randsac.run_command(probe.main)
    said = capsys.readouterr().err
    # Progress bars are no lines of it.
    lines = [line for line in said.splitlines() if line and "%|" not in line]
    assert end.value.code == 2, said
    assert len(lines) == 1, said
    assert lines[0].startswith("error: ")
    return lines[0]


REFUSED = [  # flags, what the line names
    ("--epochs 3", "--epochs"),
    ("--protocol layers --batch-size 4", "--batch-size"),
    ("--protocol finetune --features pixels", "--features"),
    ("--features pixels --random-init", "--features"),
    ("--protocol knn", "knn"),
    ("--proto layers", "--proto"),
    ("--dataset mnist", "mnist"),
    ("--dataset shapes --data-dir x", "--data-dir"),
    ("--data-dir gone", "gone"),
    ("--image-size 9", "--patch-size"),
    ("--protocol finetune --epochs 0", "--epochs"),
    ("--protocol linear-sgd --lr -1", "--lr"),
    ("--seed -1", "--seed"),
    ("--device tpu", "--device"),
    ("--protocol linear-sgd --batch-size 1", "--batch-size"),
    ("--protocol layers --save f.npz", "--save"),
    ("--random-init --save f.npz", "--save"),
    ("--features pixels --save f.npz", "--save"),
    ("--save checkpoint.pt", "checkpoint.pt"),
    ("--save .", "--save"),
    ("--save gone/f.npz", "gone"),
]


@pytest.mark.parametrize("flags, part", REFUSED)
def test_flags_that_cannot_act_are_refused(checkpoint, monkeypatch, capsys, flags, part):
    monkeypatch.chdir(checkpoint.parent)
    before = checkpoint.read_bytes()
    assert part in refused(monkeypatch, capsys, "checkpoint.pt", *flags.split())
    assert checkpoint.read_bytes() == before
    assert not (checkpoint.parent / "probes.jsonl").exists()


@pytest.mark.parametrize("content", [None, b"no checkpoint"])
def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch, capsys, content):
    path = tmp_path / "other.pt"
    if content:
        path.write_bytes(content)
    assert "other.pt" in refused(monkeypatch, capsys, path)


@pytest.mark.parametrize("name", ["probes.jsonl", "", "elsewhere"])
def test_where_it_cannot_write_it_says_so_at_once(checkpoint, tmp_path, monkeypatch, capsys, name):
    place = tmp_path / name
    flags = ()
    if name == "probes.jsonl":
        place.touch()
    elif name == "elsewhere":
        place.mkdir()
        flags = ("--save", place / "f.npz")
    # As of another user: this one may be root, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda asked, mode: asked != place)
    assert str(place) in refused(monkeypatch, capsys, checkpoint, *flags)


def test_a_loss_that_is_not_finite_ends_the_training(checkpoint):
    with pytest.raises(randsac.UserError, match="lower --lr"):
        run_probe(checkpoint, "--protocol", "finetune", "--epochs", 4, "--lr", 1e9)


def test_files_that_came_or_went_meanwhile_are_noticed(checkpoint, tmp_path):
    _, data, config, _ = prepared(checkpoint)
    other = data._replace(labels=data.labels.flip(0))
    with pytest.raises(randsac.UserError, match="try again"):
        probe.save_features(
            tmp_path / "f.npz", torch.ones(72, 1), torch.ones(24, 1), other, config, ""
        )


def test_as_a_program_of_its_own(trained, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a run"
    folder.mkdir()
    shutil.copy(trained, folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ("--protocol", "finetune", "--epochs", 1)
    monkeypatch.setattr(sys, "argv", words("probe.py", "~/a run/checkpoint.pt", *flags))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "probe.py"), run_name="__main__")
    assert end.value.code is None  # which is 0
    assert "finetune: top-1" in capsys.readouterr().out
    assert len((folder / "probes.jsonl").read_text().splitlines()) == 1


# --- one's own use


def test_features_of_ones_own_images(tmp_path, monkeypatch):
    place = tmp_path / "assets" / "nano-cifar10"
    place.mkdir(parents=True)
    shutil.copy(ROOT / "assets" / "nano-cifar10" / "checkpoint.pt", place)
    for name, colour in (("a.jpg", "red"), ("b.jpg", "green")):
        Image.new("RGB", (50, 40), colour).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(OWN_USE, names)  # noqa: S102
    features = names["features"]
    assert features.shape == (2, 128)
    assert features.std(1).min() > 0.1
    assert not torch.allclose(features[0], features[1], atol=0.1)

    # They are those that a probe uses, and half precision needs nothing but `half`.
    model, images = names["model"], names["images"]
    used = probe.outputs(functools.partial(probe.pooled, model, 1), images, 32, CPU)[:, 0]
    assert torch.allclose(features, used, atol=1e-5)
    with torch.no_grad():
        half = model.half().encode(randsac.normalize(images, 32)).mean(1)
    assert half.dtype == torch.float16
    assert torch.allclose(half.float(), features, atol=0.05)


# --- speed, and what a trained model is worth


@pytest.mark.bench
def test_features_are_as_fast_as_the_encoder():
    model = randsac.RandSAC(randsac.Config(device="cpu")).eval()
    images = torch.randint(0, 256, (2048, 3, 32, 32), dtype=torch.uint8)

    def rate(work):
        start = time.perf_counter()
        work()
        return len(images) / (time.perf_counter() - start)

    @torch.inference_mode()
    def plain(batch):
        for x in randsac.normalize(images, 32).split(batch):
            model.encode(x)

    def ours():
        probe.outputs(functools.partial(probe.pooled, model, 1), images, 32, CPU)

    ours()
    ratios = []
    for _ in range(3):
        best = max(rate(functools.partial(plain, batch)) for batch in (16, 32, 64, 128, 256))
        ratios.append(rate(ours) / best)
        print(f"features {ratios[-1]:.2f} of the encoder's best, {best:.0f} images/s")
    assert max(ratios) >= 0.9


@pytest.mark.long
def test_on_shapes_finetune_beats_linear_and_linear_beats_both_floors(tmp_path):
    assert run_here("--out", tmp_path / "run", "--device", "cpu") == 0
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    probes = [(), ("--random-init",), ("--features", "pixels")]
    linear, *floors = (run_probe(checkpoint, *flags)[0]["top1"] for flags in probes)
    [tuned] = run_probe(checkpoint, "--protocol", "finetune", "--epochs", 3)
    assert tuned["top1"] > linear > max(floors), (tuned["top1"], linear, floors)
