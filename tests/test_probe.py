"""The evaluation protocols (Section 5.1): the solver's optimum, what a probe may see, the recipes, the
rows that it adds, the features that it keeps, what it refuses."""

import functools
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MICRO_FLAGS, ROOT, command, micro, run_here
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
    monkeypatch.setattr(probe, "L2_GRID", [1e-2, 1e-4])
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


def all_scores(checkpoint, *flags, change=lambda data: data):
    """-> model, and the test images' scores of each number that a probe with these flags gives."""
    models = []
    seen = []
    originals = (probe.prepare, probe.make_row, probe.Labelled)

    def prepare(arguments):
        found = originals[0](arguments)
        models.append(found[-1])
        return found

    def make_row(protocol, data, scores, settings):
        seen.append(scores)
        return originals[1](protocol, data, scores, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "prepare", prepare)
        patch.setattr(probe, "make_row", make_row)
        patch.setattr(probe, "Labelled", lambda *parts: change(originals[2](*parts)))
        run_probe(checkpoint, *flags)
    return models[0], seen


def tuned(protocol, *flags):
    return ("--protocol", protocol, "--epochs", 2, *flags)


# --- the solver


def correlated(n=240, D=6, C=4, seed=0):
    """Features with deviations from 1 to 100, correlated; classes that overlap."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, n)
    x = rng.normal(size=(n, D)) + np.eye(C, D)[y]
    x = x @ (np.eye(D) + 0.8 * rng.normal(size=(D, D))) * 10 ** np.linspace(0, 2, D) + 5
    return x, y


def narrow(n=600, D=12, C=3):
    """Standardized features of which the images' variance along directions goes from 4 to 1e-7, and is
    0 along one: the classes differ everywhere."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, C, n)
    axes, _ = np.linalg.qr(rng.normal(size=(D, D)))
    z = rng.normal(size=(n, D)) + 0.7 * rng.normal(size=(C, D))[y]
    x = z * np.append(np.logspace(0, -3.3, D - 1), 0) @ axes
    x = (x - x.mean(0)) / x.std(0)
    return torch.from_numpy(x), torch.from_numpy(y)


def newton(x, y, C, l2):
    """Damped Newton on mean cross-entropy + l2/2 |W|^2, in numpy and float64 -> loss, W [C,D], b [C]."""
    n, D = x.shape
    x1 = np.hstack([x, np.ones((n, 1))])
    penalty = np.tile(np.r_[np.full(D, l2), 0], C)

    def evaluate(w):
        scores = x1 @ w.reshape(C, D + 1).T
        scores -= scores.max(1, keepdims=True)
        p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        return -np.log(p[np.arange(n), y]).mean() + (penalty * w * w).sum() / 2, p

    w = np.zeros(C * (D + 1))
    for _ in range(100):
        loss, p = evaluate(w)
        gradient = ((p - np.eye(C)[y]).T @ x1 / n).ravel() + penalty * w
        hessian = np.diag(penalty)
        for a in range(C):
            for b in range(C):
                curvature = (x1 * (p[:, a] * ((a == b) - p[:, b]))[:, None]).T @ x1 / n
                rows = slice(a * (D + 1), (a + 1) * (D + 1))
                columns = slice(b * (D + 1), (b + 1) * (D + 1))
                hessian[rows, columns] += curvature
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        size = 1.0
        while size > 1e-9 and evaluate(w - size * step)[0] > loss:
            size /= 2
        w = w - size * step
        if np.abs(size * step).max() < 1e-12 * np.abs(w).max():
            break
    w = w.reshape(C, D + 1)
    return evaluate(w.ravel())[0], w[:, :-1], w[:, -1] - w[:, -1].mean()


def check_optimum(x, y, C, l2, weight, bias, slack):
    """The weight and bias predict as newton's do, and their loss is its loss."""
    best, W, b = newton(x.double().numpy(), y.numpy(), C, l2)
    x, weight, bias = x.double(), weight.double(), bias.double()
    loss = F.cross_entropy(F.linear(x, weight, bias), y) + l2 / 2 * weight.square().sum()
    assert abs(loss.item() - best) < slack, l2
    right = (x @ torch.from_numpy(W).T + torch.from_numpy(b)).argmax(1)
    assert (F.linear(x, weight, bias).argmax(1) == right).float().mean() > 0.99
    return np.abs(weight.numpy() - W).max() / max(1, np.abs(W).max())


def test_the_solver_finds_the_optimum_that_newton_finds():
    x, y = correlated()
    x = torch.from_numpy((x - x.mean(0)) / x.std(0))
    y = torch.from_numpy(y)
    for l2 in (1e-1, 1e-3, 1e-6):
        [(weight, bias)] = probe.logistic_regression(x, y, 4, [l2])
        assert check_optimum(x, y, 4, l2, weight, bias, slack=1e-9) < 1e-4


def test_in_float32_it_finds_it_where_images_hardly_vary_in_some_directions():
    x, y = narrow()
    fits = probe.logistic_regression(x.float(), y, 3, probe.L2_GRID)
    for l2, (weight, bias) in zip(probe.L2_GRID, fits, strict=True):
        check_optimum(x, y, 3, l2, weight, bias, slack=2e-6)


def test_the_solver_needs_few_steps_whatever_the_strength(monkeypatch):
    x, y = narrow()
    calls = []
    cross_entropy = F.cross_entropy

    def counted(*args):
        calls.append(1)
        return cross_entropy(*args)

    monkeypatch.setattr(probe.F, "cross_entropy", counted)
    for l2 in (1e-1, 1e-4, 1e-7):
        calls.clear()
        list(probe.logistic_regression(x.float(), y, 3, [l2]))
        assert len(calls) < 150, (l2, len(calls))


def test_lin_is_the_optimum_on_standardized_features_of_all_training_images():
    x, y = correlated(n=400)
    train = torch.from_numpy(x[:300]).float()
    test = torch.from_numpy(x[300:]).float()
    scores, chosen = probe.linear(train, torch.from_numpy(y[:300]), test, 4, seed=0)
    mean = train.double().mean(0).numpy()
    deviation = train.double().std(0).numpy()
    _, W, b = newton((train.double().numpy() - mean) / deviation, y[:300], 4, chosen["l2"])
    expected = torch.from_numpy((test.double().numpy() - mean) / deviation @ W.T + b)
    assert torch.allclose(scores.double().softmax(1), expected.softmax(1), atol=1e-3)
    assert (scores.argmax(1) == expected.argmax(1)).all()
    assert scores.shape == (100, 4)


def test_the_strength_of_l2_is_the_best_on_held_out_training_images():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 2
    noise = torch.randn(300, 200, generator=generator)
    sign = (2 * y - 1)[:, None]
    # In the second case only a small difference of two features tells.
    hidden = noise[:, :1] + torch.cat([0 * sign, 0.02 * sign], 1)
    cases = [(noise + 0.15 * sign, 1e-4, 1), (hidden, 0, 1e-2)]
    for features, low, high in cases:
        _, chosen = probe.linear(features, y, features, 2, seed=0)
        tried = {float(l2): top1 for l2, top1 in chosen["held_out_top1"].items()}
        assert list(tried) == probe.L2_GRID
        assert low < chosen["l2"] < high, chosen
        assert tried[chosen["l2"]] == max(tried.values())
        assert all(tried[l2] < max(tried.values()) for l2 in tried if l2 > chosen["l2"])


def test_the_held_out_images_of_that_choice_are_not_among_those_fitted():
    # Nothing can be learned here but by heart, and that only of images that are fitted.
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 400, generator=generator)
    y = torch.randint(0, 2, (200,), generator=generator)
    _, chosen = probe.linear(features, y, features, 2, seed=0)
    assert max(chosen["held_out_top1"].values()) < 85, chosen


def test_test_images_do_not_change_each_others_scores():
    x, y = correlated(n=300)
    train = torch.from_numpy(x[:200]).float()
    test = torch.from_numpy(x[200:]).float()
    y = torch.from_numpy(y[:200])
    for solve in (functools.partial(probe.linear, seed=0), probe.knn):
        together, _ = solve(train, y, test, 4)
        alone, _ = solve(train, y, test[:10], 4)
        assert torch.allclose(together[:10], alone, atol=1e-5)


def test_constant_features_do_no_harm():
    x, y = correlated(n=200)
    x[:, 2] = 0.3
    train = torch.from_numpy(x).float()
    kept = train[:, [0, 1, 3, 4, 5]]
    with_it, chosen = probe.linear(train, torch.from_numpy(y), train.clone(), 4, seed=0)
    without, same = probe.linear(kept, torch.from_numpy(y), kept, 4, seed=0)
    assert chosen["l2"] == same["l2"]
    assert torch.allclose(with_it.softmax(1), without.softmax(1), atol=1e-3)


def test_neighbours_vote_as_a_loop_says():
    generator = torch.Generator().manual_seed(1)
    train = torch.randn(60, 5, generator=generator)
    test = torch.randn(7, 5, generator=generator)
    y = torch.randint(0, 3, (60,), generator=generator)
    scores, used = probe.knn(train, y, test, 3)
    for i in range(len(test)):
        similar = [torch.dot(test[i], row) / test[i].norm() / row.norm() for row in train]
        votes = [0.0] * 3
        for j in sorted(range(60), key=similar.__getitem__, reverse=True)[:20]:
            votes[y[j]] += np.exp(similar[j].item() / 0.07)
        assert torch.allclose(scores[i], torch.tensor(votes, dtype=torch.float), rtol=1e-3)
    assert used == {"k": 20, "temperature": 0.07}
    _, used = probe.knn(train[:4], y[:4], test, 3)
    assert used["k"] == 4, "fewer images than neighbours"


# --- features


def features_of(model, data, config, args):
    """-> what `measure_frozen` computes of the training images and of the test images."""
    seen = []
    original = probe.outputs

    def outputs(*given):
        seen.append(original(*given))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "outputs", outputs)
        rows = probe.measure_frozen(model, data, config, args, CPU, "")
    return *seen, rows


def test_features_are_encodes_mean_over_tokens(checkpoint):
    model, data, config, args = prepared(checkpoint, "--protocol", "layers")
    every, test, _ = features_of(model, data, config, args)
    args.protocol = "linear"
    last, _, _ = features_of(model, data, config, args)
    with torch.no_grad():
        expected = model.encode(randsac.normalize(data.images, 8)).mean(1)
    assert every.shape == (72, 2, 16)
    assert test.shape == (24, 2, 16)
    assert last.shape == (72, 1, 16)
    assert last.dtype == torch.float32
    assert torch.allclose(last[:, 0], expected, atol=1e-5)
    assert torch.allclose(every[:, 1], expected, atol=1e-5)
    assert not torch.allclose(every[:, 0], expected, atol=1e-2)


def test_layers_are_measured_each_by_itself_and_the_last_as_linear_does_it(checkpoint):
    model, data, config, args = prepared(checkpoint, "--protocol", "layers")
    encode_layers = model.encode_layers

    def no_first_layer(x):
        first, last = encode_layers(x)
        return [torch.randn_like(first), last]

    model.encode_layers = no_first_layer
    *_, [row] = features_of(model, data, config, args)
    args.protocol = "linear"
    *_, [lin, near] = features_of(model, data, config, args)
    assert row["protocol"] == "layers"
    assert max(row["layers"][0], row["layers_knn"][0]) < 70
    assert min(lin["top1"], near["top1"]) > 90
    assert row["layers"][1] == row["top1"] == lin["top1"]
    assert row["layers_knn"][1] == near["top1"]
    assert row["per_class"] == lin["per_class"]


def test_raw_pixels_are_the_image_itself_at_most_32_wide(checkpoint):
    model, data, config, args = prepared(checkpoint, "--features", "pixels")
    train, _, _ = features_of(model, data, config, args)
    assert torch.equal(train[:, 0], randsac.normalize(data.images, 8).flatten(1))
    args.labelled = False
    config.image_size = 40
    large = torch.randint(0, 256, (6, 3, 40, 40), dtype=torch.uint8)
    train, _, _ = features_of(model, data._replace(images=large, test_images=large), config, args)
    assert torch.equal(train[:, 0], randsac.normalize(large, 32).flatten(1))


# --- what a probe may change and see


def fingerprint(model):
    content = b"".join(p.detach().numpy().tobytes() for p in model.state_dict().values())
    return hashlib.sha256(content).hexdigest()


def test_the_encoder_is_the_checkpoints_or_a_random_one(checkpoint):
    def encoder(*flags):
        return fingerprint(prepared(checkpoint, *flags)[0])

    as_trained = fingerprint(randsac.load_model(checkpoint)[0])
    assert encoder() == encoder("--seed", 1) == as_trained
    untrained = encoder("--random-init")
    assert as_trained != untrained == encoder("--random-init", "--protocol", "finetune")
    assert untrained != encoder("--random-init", "--seed", 1)


@pytest.mark.parametrize("protocol", ["layers", "linear-sgd", "finetune"])
def test_test_labels_change_nothing_and_only_finetune_changes_the_encoder(checkpoint, protocol):
    def permuted(data):
        shuffled = data.test_labels[torch.randperm(len(data.test_labels))]
        return data._replace(test_labels=shuffled)

    flags = ("--protocol", protocol) if protocol == "layers" else tuned(protocol)
    untouched, *_ = prepared(checkpoint, *flags)
    model, scores = all_scores(checkpoint, *flags)
    _, again = all_scores(checkpoint, *flags, change=permuted)
    before = [p.clone() for p in untouched.encoder.parameters()]
    same = all(map(torch.equal, before, model.encoder.parameters()))
    assert same == (protocol != "finetune")
    assert len(scores) == {"layers": 4}.get(protocol, 1)
    for before, after in zip(scores, again, strict=True):
        assert before.shape == (24, 3)
        assert torch.equal(before, after)


@pytest.mark.parametrize("protocol", ["linear-sgd", "finetune"])
def test_the_seed_decides_the_training_and_a_test_image_is_scored_alone(checkpoint, protocol):
    def few(data):
        return data._replace(test_images=data.test_images[:4], test_labels=data.test_labels[:4])

    flags = tuned(protocol, "--lr", 0.1, "--batch-size", 24, "--seed")
    scores = [all_scores(checkpoint, *flags, seed)[1][0] for seed in (3, 3, 4)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])
    _, [alone] = all_scores(checkpoint, *flags, 3, change=few)
    assert torch.allclose(alone, scores[0][:4], atol=1e-4)


def test_every_step_and_seed_has_streams_of_its_own_for_crops_and_for_the_rest(
    checkpoint, monkeypatch
):
    seeds = []
    original = randsac.random_crops

    def random_crops(count, scale, device, generator):
        seeds.extend([generator.initial_seed(), torch.initial_seed()])
        return original(count, scale, device, generator)

    monkeypatch.setattr(randsac, "random_crops", random_crops)
    for seed in (3, 4):
        all_scores(checkpoint, *tuned("finetune", "--batch-size", 24, "--seed", seed))
    assert len(seeds) == 24, "72 images are 3 steps an epoch"
    assert len(set(seeds)) == 24


# --- the recipes


@pytest.mark.parametrize("protocol, epochs, lr", [("linear-sgd", 20, 1), ("finetune", 15, 0.1)])
def test_training_learns_what_colours_tell(checkpoint, protocol, epochs, lr):
    flags = ("--protocol", protocol, "--epochs", epochs, "--lr", lr, "--batch-size", 24)
    _, [scores] = all_scores(checkpoint, *flags)
    assert (scores.argmax(1) == torch.arange(24) // 8).float().mean() > 0.8


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
    # Without momentum, or without the norm, it is 3 and 6 points below.
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
    assert config.epochs == 90
    assert abs(probe.percent(scores.argmax(1) == test_labels) - lin) < 1.5


def scores_with_head(checkpoint, monkeypatch, protocol):
    """-> scores of the training images by a head that passes on the first 3 (linear-sgd) or all 16
    (finetune) of the numbers that it is given, and whatever it gave in training."""
    inside = []
    count = {"linear-sgd": 3, "finetune": 16}[protocol]

    def descend(forward, optimizer, augmented, data, config, device):
        weight = next(p for g in optimizer.param_groups for p in g["params"] if p.ndim == 2)
        with torch.no_grad():
            weight.copy_(torch.eye(count, 16))
            inside.append(forward(randsac.normalize(data.images[:30], 8)))

    def change(data):
        names = [str(i) for i in range(count)]
        return data._replace(test_images=data.images, test_labels=data.labels, names=names)

    monkeypatch.setattr(probe, "descend", descend)
    _, [scores] = all_scores(checkpoint, *tuned(protocol), change=change)
    return scores, inside[0]


def test_linear_sgd_standardizes_batches_of_crops_and_then_whole_images(checkpoint, monkeypatch):
    # So a test image, which is whole, is treated as a training image that is whole would be.
    scores, inside = scores_with_head(checkpoint, monkeypatch, "linear-sgd")
    for given in (scores, inside):
        spread = given - given.mean(0)
        assert torch.allclose(given.mean(0), given.mean(), atol=0.6), "only the biases differ"
        assert torch.allclose(spread.square().mean(0), torch.ones(3), atol=0.05)


def test_finetune_standardizes_each_image_by_its_own_numbers(checkpoint, monkeypatch):
    scores, inside = scores_with_head(checkpoint, monkeypatch, "finetune")
    for given in (scores, inside):
        assert given.shape[1] == 16
        assert given.mean(1).abs().max() < 0.3, "only the biases differ from 0"
        assert (given.std(1) - 1).abs().max() < 0.3


def test_layers_learn_at_shares_of_the_rate(checkpoint):
    model, data, config, _ = prepared(checkpoint, *tuned("finetune"))
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
    assert all(map(torch.equal, before, model.parameters())), "a share of 0 keeps a layer as it is"


def test_stochastic_depth_leaves_out_branches_of_higher_layers_in_training_only(checkpoint):
    model, _ = all_scores(checkpoint, *tuned("finetune"))
    x = torch.randn(1, 4, 16).expand(4000, -1, -1)
    low, high = model.encoder
    branches = [
        (low.mlp, (x,), 0),
        (low.attention, (x, x), 0),
        (high.mlp, (x,), 0.1),
        (high.attention, (x, x), 0.1),
    ]
    for branch, inputs, rate in branches:
        with torch.no_grad():
            whole = branch.eval()(*inputs)
            thinned = branch.train()(*inputs)
        out = (thinned == 0).flatten(1).all(1)
        assert abs(out.float().mean() - rate) < 0.02
        assert torch.allclose(thinned[~out], whole[~out] / (1 - rate), atol=1e-4)


@pytest.fixture
def undistorted(monkeypatch):
    """Images as they are but for mixing and erasing: so that these can be seen alone."""
    monkeypatch.setattr(probe.v2, "RandAugment", lambda **_: torch.nn.Identity())
    monkeypatch.setattr(
        randsac, "crop", lambda images, crops, size: randsac.normalize(images, size)
    )


def test_mixup_and_cutmix_take_turns_and_labels_say_what_is_seen(undistorted, monkeypatch):
    monkeypatch.setattr(probe.v2, "RandomErasing", lambda **_: torch.nn.Identity())
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


def test_one_image_in_four_is_erased_in_part_by_noise(undistorted, monkeypatch):
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


def test_each_eight_images_are_distorted_in_a_way_of_their_own(monkeypatch):
    monkeypatch.setattr(randsac, "crop", lambda images, *_: images.float())
    monkeypatch.setattr(probe.v2, "RandomErasing", lambda **_: torch.nn.Identity())
    one = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    x, _ = probe.strongly(2, one.repeat(64, 1, 1, 1), torch.arange(64) % 2, micro(), step=5)
    groups = x.view(8, 8, -1)[:, 1:]  # the first is mixed with one of another group
    assert torch.allclose(groups, groups[:, :1], atol=1e-2)
    assert len(groups[:, 0].round().unique(dim=0)) > 4


def test_strong_augmentation_is_the_same_in_the_same_step():
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(16) % 2
    config = micro(image_size=8, patch_size=2)
    once, again, other = (probe.strongly(2, images, labels, config, step) for step in (7, 7, 8))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])
    assert not torch.equal(once[0], other[0])


# --- the command


def test_every_protocol_and_floor_adds_rows(checkpoint, image_folder, capsys):
    short = ("--epochs", 1, "--protocol")
    cases = [
        ((), ["linear", "knn"]),
        (("--random-init",), ["linear", "knn"]),
        (("--random-init",), ["linear", "knn"]),
        (("--features", "pixels"), ["linear", "knn"]),
        (("--protocol", "layers"), ["layers"]),
        ((*short, "linear-sgd"), ["linear-sgd"]),
        ((*short, "finetune"), ["finetune"]),
        ((*short, "finetune", "--random-init"), ["finetune"]),
        (("--image-size", 12), ["linear", "knn"]),  # 36 tokens, which 16 squares do not cut
    ]
    rows = {}
    for flags, protocols in cases:
        found = run_probe(checkpoint, *flags)
        printed = capsys.readouterr().out
        assert [row["protocol"] for row in found] == protocols
        for row in found:
            assert f"{row['protocol']}: top-1 {row['top1']:.2f} %" in printed
            assert row["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
            assert (row["checkpoint"], row["step"], row["seed"]) == ("checkpoint.pt", 4, 0)
            assert row.pop("seconds") >= 0
            assert (row["dataset"], row["data_dir"]) == ("folder", str(image_folder.resolve()))
            assert row["image_size"] == (12 if "--image-size" in flags else 8)
            assert row["features"] == ("pixels" if "pixels" in flags else "encoder")
            assert row["random_init"] == ("--random-init" in flags)
            assert list(row["per_class"]) == ["ant", "bee", "cat"]
            # Classes are of equal size here.
            assert abs(np.mean(list(row["per_class"].values())) - row["top1"]) < 0.02
            assert row["commonest"] == 33.33
            key = (flags, row["protocol"])
            assert rows.get(key, row) == row, "the same command gives the same numbers"
            rows[key] = row
        assert str(checkpoint.parent / "probes.jsonl") in printed
        assert "commonest" not in printed

    linear = rows[(), "linear"]
    assert linear["settings"]["l2"] in probe.L2_GRID
    assert "epochs" not in linear["settings"]
    assert rows[(), "knn"]["settings"] == {"k": 20, "temperature": 0.07}
    assert rows[("--features", "pixels"), "linear"]["top1"] == 100
    layers = rows[("--protocol", "layers"), "layers"]
    assert layers["layers"][-1] == layers["top1"] == linear["top1"]
    assert layers["layers_knn"][-1] == rows[(), "knn"]["top1"]
    for flags, decay in (((), 0.75), (("--random-init",), 1)):
        settings = rows[(*short, "finetune", *flags), "finetune"]["settings"]
        recipe = {"epochs": 1, "batch_size": 256, "lr": 1e-3, "layer_decay": decay}
        assert settings.items() >= recipe.items()


def test_floors_are_those_of_the_same_images_and_checkpoint(
    checkpoint, image_folder, tmp_path, capsys, monkeypatch
):
    for user in ("one", "two"):
        shutil.copytree(image_folder, tmp_path / user / "imgs")

    def line(user, *flags):
        monkeypatch.chdir(tmp_path / user)
        probe.main(words(checkpoint, "--data-dir", "imgs", *flags))
        [found] = [row for row in capsys.readouterr().out.splitlines() if row.startswith("linear:")]
        return found

    assert line("one", "--random-init").count("%") == 1
    assert line("two").count("%") == 1
    assert line("one", "--image-size", 12).count("%") == 1
    floor = line("one", "--features", "pixels").removeprefix("linear: top-1 ")
    found = line("one")
    assert found.count("%") == 3
    assert "from random weights" in found
    assert f"from raw pixels {floor}" in found
    saved = torch.load(checkpoint, weights_only=True)
    torch.save({**saved, "step": 5}, checkpoint)
    assert line("one").count("%") == 1


def test_where_classes_differ_in_size_the_commonest_is_a_floor(
    checkpoint, image_folder, tmp_path, capsys
):
    images = shutil.copytree(image_folder, tmp_path / "images")
    for number in range(6):
        (images / "test" / "ant" / f"{number}.png").unlink()
    lin, near = run_probe(checkpoint, "--data-dir", images)
    assert lin["commonest"] == near["commonest"] == round(100 * 8 / 18, 2)
    assert capsys.readouterr().out.count("commonest class 44.44 %") == 2


def test_a_row_that_was_cut_off_harms_neither_those_before_nor_the_next(checkpoint, capsys):
    path = checkpoint.parent / "probes.jsonl"
    run_probe(checkpoint, "--random-init")
    whole = path.read_text()
    path.write_text(whole + whole[:50])
    capsys.readouterr()
    probe.main(words(checkpoint))
    assert "from random weights" in capsys.readouterr().out
    lines = path.read_text().splitlines()
    assert lines[2] == whole[:50]
    untrained = [json.loads(line)["random_init"] for line in (*lines[:2], *lines[3:])]
    assert untrained == [True, True, False, False]


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


def test_a_smaller_checkpoint_in_half_precision_will_do(checkpoint):
    _, whole = run_probe(checkpoint)
    saved = torch.load(checkpoint, weights_only=True)
    model = {name: weight.half() for name, weight in saved["model"].items()}
    torch.save({"config": saved["config"], "model": model}, checkpoint)
    _, half = run_probe(checkpoint)
    assert half["step"] is None
    assert abs(half["top1"] - whole["top1"]) < 13


def test_a_checkpoint_that_is_replaced_meanwhile_is_named_as_it_was_read(checkpoint, monkeypatch):
    before = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    original = randsac.load_images

    def load_images(config, train):
        checkpoint.write_bytes(b"of a later step")
        return original(config, train)

    monkeypatch.setattr(randsac, "load_images", load_images)
    assert {row["sha256"] for row in run_probe(checkpoint)} == {before}


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
    said = refused(monkeypatch, capsys, checkpoint, *flags)
    assert (
        f"visualize.py neighbours --checkpoint {checkpoint} --dataset folder --data-dir {images}"
        in said
    )
    file = tmp_path / "f.npz"
    probe.main(words(checkpoint, *flags, "--save", file))
    assert "neighbours" in capsys.readouterr().out
    kept = np.load(file)
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


class Trap:
    """Loaded as a pickle, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("content", ["text", "nothing", "cut", "code", "other", "gray"])
def test_what_is_no_checkpoint_is_refused_and_runs_nothing(
    checkpoint, tmp_path, monkeypatch, capsys, content
):
    saved = torch.load(checkpoint, weights_only=True)
    if content == "text":
        checkpoint.write_bytes(b"hello")
    elif content == "nothing":
        checkpoint.unlink()
    elif content == "cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    elif content == "code":
        torch.save({"config": {}, "model": Trap(tmp_path / "trapped")}, checkpoint)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(checkpoint, weights_only=True)
    elif content == "other":
        torch.save({"weights": torch.zeros(3)}, checkpoint)
    else:  # one channel in place of three
        saved["model"]["embed.weight"] = saved["model"]["embed.weight"][:, :4]
        torch.save(saved, checkpoint)
    assert "checkpoint.pt" in refused(monkeypatch, capsys, checkpoint)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    "flags, part",
    [
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
    ],
)
def test_flags_that_cannot_act_are_refused(checkpoint, monkeypatch, capsys, flags, part):
    monkeypatch.chdir(checkpoint.parent)
    before = checkpoint.read_bytes()
    assert part in refused(monkeypatch, capsys, "checkpoint.pt", *flags.split())
    assert checkpoint.read_bytes() == before
    assert not (checkpoint.parent / "probes.jsonl").exists()


def test_a_loss_that_is_not_finite_ends_the_training(checkpoint):
    with pytest.raises(randsac.UserError, match="lower --lr"):
        all_scores(checkpoint, "--protocol", "finetune", "--epochs", 4, "--lr", 1e9)


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


def test_as_a_process_of_its_own(trained, tmp_path):
    folder = tmp_path / "a run"
    folder.mkdir()
    shutil.copy(trained, folder / "checkpoint.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", {**os.environ, "HOME": str(tmp_path)})
        flags = ("--protocol", "finetune", "--epochs", 1, "--device", "cpu")
        done = command("probe.py", "~/a run/checkpoint.pt", *flags, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "finetune: top-1" in done.stdout
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
