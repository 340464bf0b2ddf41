"""The evaluation protocols (Section 5.1): the solver's optimum, what a probe may see, the recipes,
the rows that it adds, the features that it keeps, what it refuses."""

import functools
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MICRO_FLAGS, ROOT, go, micro, one_line, refusal, run_here
from evidence import read_rows
from PIL import Image

import probe
import randsac

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory):
    """A model after a few steps on `image_folder`. Without the optimizer, which takes longer to
    load."""
    out = tmp_path_factory.mktemp("trained") / "run"
    flags = ("--data-dir", image_folder, "--max-steps", 4, "--seed", 5, "--out", out)
    assert run_here(*MICRO_FLAGS, *flags) == 0
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    torch.save({name: saved[name] for name in ("config", "model", "step")}, out / "checkpoint.pt")
    return out / "checkpoint.pt"


@pytest.fixture
def checkpoint(trained, tmp_path, monkeypatch):
    """A copy of it with nothing beside it, for tests of other things than LIN's strength of L2."""
    monkeypatch.setattr(probe, "L2_GRID", [1e-2])
    return shutil.copy(trained, tmp_path / "checkpoint.pt")


def words(*arguments):
    return [str(argument) for argument in (*arguments, "--device", "cpu")]


def run_probe(checkpoint, *arguments):
    """Runs a probe in this process -> all rows beside the checkpoint."""
    probe.main(words(checkpoint, *arguments))
    return read_rows(checkpoint.with_name("probes.jsonl"))


def prepared(checkpoint, *flags):
    """What main prepares before it measures -> model, data, config, args."""
    args, _, config, model = probe.prepare(words(checkpoint, *flags))
    args.labelled = True
    images, labels, names = randsac.load_images(config, train=True)
    data = probe.Labelled(images, labels, names, *randsac.load_images(config, train=False)[:2])
    return model, data, config, args


def trained_scores(model, data, config, args):
    """-> scores [m,C] of linear-sgd or finetune."""
    if args.protocol == "linear-sgd":
        return probe.linear_sgd(model, data, config, CPU)[0]
    return probe.finetune(model, data, config, CPU, decay=0.75)[0]


# --- the solver

# Features X [600,12], standardized, and labels Y of three classes, which differ everywhere. The
# images' variance along directions goes from 4 to 1e-7, and is 0 along one.
generator = torch.Generator().manual_seed(1)
draw = functools.partial(torch.randn, generator=generator, dtype=torch.double)
Y = torch.arange(600) % 3
axes, _ = torch.linalg.qr(draw(12, 12))
deviations = F.pad(torch.logspace(0, -3.3, 11), (0, 1))
X = (draw(600, 12) + 0.7 * draw(3, 12)[Y]) * deviations @ axes
X = (X - X.mean(0)) / X.std(0)


def least(l2, w):
    """w float64 [39], 12 weights and a bias for each class, near the optimum -> the least mean
    cross-entropy + l2/2 |weight|^2, and that of w."""

    def loss(w):
        weight, bias = w.view(3, 13).split((12, 1), 1)
        return F.cross_entropy(X @ weight.T + bias.T, Y) + l2 / 2 * weight.square().sum()

    # The same number added to all biases changes nothing: of such Newton steps the smallest.
    best = w
    for _ in range(3):
        curvature = torch.autograd.functional.hessian(loss, best, vectorize=True)
        inverse = torch.linalg.pinv(curvature, rtol=1e-13, hermitian=True)
        best = best - inverse @ torch.autograd.functional.jacobian(loss, best)

    # A convex function is least where its gradient is zero.
    gradient = torch.autograd.functional.jacobian(loss, best)
    assert gradient.abs().max() < 1e-12
    return loss(best), loss(w)


@pytest.mark.parametrize("dtype, slack", [(torch.float64, 1e-9), (torch.float32, 2e-6)])
def test_the_solver_finds_the_optimum(dtype, slack):
    fits = probe.logistic_regression(X.to(dtype), Y, 3, probe.L2_GRID)
    for l2, (weight, bias) in zip(probe.L2_GRID, fits, strict=True):
        w = torch.cat([weight, bias[:, None]], 1).double().flatten()
        best, found = least(l2, w)
        assert found - best < slack, l2


def test_lin_is_the_optimum_on_standardized_features_of_all_training_images():
    # As they might come: of other means and deviations, and one that is alike for all.
    train = X * 10 ** torch.linspace(0, 2, 12) + 5
    train = F.pad(train.float(), (0, 1), value=0.3)
    scores, chosen = probe.linear(train, Y, train[:100], 3, seed=0)
    [(weight, bias)] = probe.logistic_regression(X, Y, 3, [chosen["l2"]])
    expected = (X[:100] @ weight.T + bias).float()
    assert torch.allclose(scores.softmax(1), expected.softmax(1), atol=1e-3)
    assert (scores.argmax(1) == expected.argmax(1)).all()


def test_the_strength_of_l2_is_the_best_on_held_out_training_images(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 2
    sign = (2 * y - 1)[:, None]
    noise = torch.randn(300, 100, generator=generator)
    # In the second case only a small difference of two features tells.
    hidden = noise[:, :1] + torch.cat([0 * sign, 0.02 * sign], 1)
    for features, low, high in [(noise + 0.15 * sign, 1e-4, 1), (hidden, 0, 1e-2)]:
        _, chosen = probe.linear(features, y, features, 2, seed=0)
        tried = {float(l2): top1 for l2, top1 in chosen["held_out_top1"].items()}
        assert list(tried) == probe.L2_GRID
        assert low < chosen["l2"] < high, chosen
        best = [l2 for l2 in tried if tried[l2] == max(tried.values())]
        assert chosen["l2"] == max(best)  # of equals the strongest

    # Nothing can be learned here but by heart, and that only of images that are fitted.
    monkeypatch.setattr(probe, "L2_GRID", [1e-4])
    labels = torch.randint(0, 2, (150,), generator=generator)
    _, chosen = probe.linear(noise[:150], labels, noise, 2, seed=0)
    assert chosen["held_out_top1"]["1e-04"] < 85, chosen


def test_neighbours_vote_as_a_loop_says():
    generator = torch.Generator().manual_seed(1)
    train = torch.randn(60, 5, generator=generator)
    test = torch.randn(7, 5, generator=generator)
    y = torch.randint(0, 3, (60,), generator=generator)
    scores, used = probe.knn(train, y, test.repeat(80, 1), 3)  # more than one part
    for i in range(len(test)):
        similar = torch.cosine_similarity(test[i], train).tolist()
        votes = [0.0] * 3
        for j in sorted(range(60), key=similar.__getitem__, reverse=True)[:20]:
            votes[y[j]] += math.exp(similar[j] / 0.07)
        assert torch.allclose(scores[i::7], torch.tensor(votes), rtol=1e-3)
    assert used == {"k": 20, "temperature": 0.07}
    _, used = probe.knn(train[:4], y[:4], test, 3)
    assert used["k"] == 4  # fewer images than neighbours


# --- what is measured, and what a probe may see


def test_layers_are_measured_each_and_the_last_as_linear_does_it(checkpoint, monkeypatch):
    encode_layers = randsac.RandSAC.encode_layers

    def with_noise(self, x):
        return [torch.randn(len(x), 16, 16), encode_layers(self, x)[-1]]

    monkeypatch.setattr(randsac.RandSAC, "encode_layers", with_noise)
    run_probe(checkpoint)
    lin, near, row = run_probe(checkpoint, "--protocol", "layers")
    assert max(row["layers"][0], row["layers_knn"][0]) < 70
    assert row["layers"][1] == row["top1"] == lin["top1"]
    assert row["layers_knn"][1] == near["top1"]
    assert row["per_class"] == lin["per_class"]


@pytest.mark.parametrize("size", [8, 40])
def test_raw_pixels_are_the_image_itself_at_most_32_wide(checkpoint, tmp_path, size):
    model, data, config, args = prepared(checkpoint, "--features", "pixels")
    args.labelled = False
    args.save = tmp_path / "f.npz"
    config.dataset = "shapes"  # whose images have no names
    config.image_size = size
    images = torch.randint(0, 256, (72, 3, size, size), dtype=torch.uint8)
    probe.measure_frozen(model, data._replace(images=images), config, args, CPU, "")
    kept = np.load(args.save)
    expected = randsac.normalize(images, min(size, 32)).flatten(1)
    assert torch.equal(torch.from_numpy(kept["train"]), expected)
    assert kept["train_files"].tolist() == list(range(72))
    assert kept["test_files"].tolist() == list(range(24))


def test_the_encoder_is_the_checkpoints_or_a_random_one(checkpoint):
    def encoder(*flags):
        model = probe.prepare(words(checkpoint, *flags))[3]
        return torch.nn.utils.parameters_to_vector(model.parameters()).tolist()

    saved = torch.load(checkpoint, weights_only=True)["model"]
    as_trained = torch.cat([weight.flatten() for weight in saved.values()]).tolist()
    assert encoder() == encoder("--seed", 1) == as_trained
    untrained = encoder("--random-init")
    assert as_trained != untrained == encoder("--random-init", "--protocol", "finetune")
    assert untrained != encoder("--random-init", "--seed", 1)


@pytest.mark.parametrize("protocol", ["linear-sgd", "finetune"])
def test_scores_hang_on_seed_and_no_other_test_image_nor_label(checkpoint, protocol, monkeypatch):
    streams = []
    random_crops = randsac.random_crops

    def noted(count, scale, device, generator):
        streams.append((generator.initial_seed(), torch.initial_seed()))
        return random_crops(count, scale, device, generator)

    monkeypatch.setattr(randsac, "random_crops", noted)

    def scores(seed, count):
        flags = ("--epochs", 2, "--lr", 0.1, "--batch-size", 24, "--seed", seed)
        model, data, config, args = prepared(checkpoint, "--protocol", protocol, *flags)
        wrong = torch.randint(0, 3, (count,))
        data = data._replace(test_images=data.test_images[:count], test_labels=wrong)
        return trained_scores(model, data, config, args)[:4]

    whole = scores(3, count=24)
    assert torch.allclose(scores(3, count=4), whole, atol=1e-4)
    assert not torch.allclose(scores(4, count=4), whole, atol=1e-2)

    # 72 images are 3 steps an epoch, each with a stream of its own for crops and for the rest.
    assert streams[:6] == streams[6:12]
    crops, rest = map(set, zip(*streams))
    assert len(crops) == 12
    if protocol == "finetune":
        assert len(rest - crops) == 12


# --- the recipes


def test_steps_follow_the_schedule_and_each_epoch_has_an_order_of_its_own():
    rates = []
    seen = []

    class Recorded(torch.optim.SGD):
        def step(self):
            rates.append([group["lr"] for group in self.param_groups])

    def augmented(images, labels, config, step):
        assert step * config.batch_size == len(seen)
        seen.extend(labels.tolist())
        return images.float(), labels

    layer = torch.nn.Linear(2, 30)
    groups = [{"params": layer.weight, "share": 1.0}, {"params": layer.bias, "share": 0.5}]
    data = probe.Labelled(torch.zeros(30, 2), torch.arange(30), None, None, None)
    config = micro(epochs=4, batch_size=6, lr=0.5, warmup=0.2)
    probe.descend(layer, Recorded(groups), augmented, data, config, CPU)
    expected = [randsac.learning_rate(step, 20, config) for step in range(20)]
    assert rates == [[rate, rate / 2] for rate in expected]
    epochs = {tuple(seen[start : start + 30]) for start in range(0, 120, 30)}
    assert len(epochs) == 4
    assert all(sorted(order) == list(range(30)) for order in epochs)


@pytest.mark.parametrize("protocol, count", [("linear-sgd", 3), ("finetune", 16)])
def test_what_the_head_is_given_is_standardized(checkpoint, monkeypatch, protocol, count):
    """By a head that passes on the first `count` numbers that it is given."""
    found = []

    def descend(forward, optimizer, augmented, data, config, device):
        learned = [p for group in optimizer.param_groups for p in group["params"]]
        weight = next(p for p in learned if p.ndim == 2)
        with torch.no_grad():
            weight.copy_(torch.eye(count, 16))
            found.append(forward(randsac.normalize(data.images[:30], 8)))
        if protocol == "linear-sgd":
            assert len(learned) == 2  # the head's weight and bias
            assert optimizer.defaults["momentum"] == 0.9

    monkeypatch.setattr(probe, "descend", descend)
    model, data, config, args = prepared(checkpoint, "--protocol", protocol)
    data = data._replace(test_images=data.images, names=range(count))
    found.append(trained_scores(model, data, config, args))
    for given in found:
        # linear-sgd: over a batch of crops, and then over all whole training images, so that a test
        # image is treated as one of them. finetune: each image by its own numbers.
        over = 0 if protocol == "linear-sgd" else 1
        assert given.mean(over).abs().max() < 0.01
        assert (given.std(over, correction=0) - 1).abs().max() < 0.05


def test_layers_learn_at_shares_of_the_rate_and_higher_ones_are_left_out_at_times(checkpoint):
    model, data, config, _ = prepared(checkpoint, "--protocol", "finetune", "--epochs", 1)
    head = torch.nn.Linear(16, 3)
    groups = probe.layer_groups(model, head, 0.5)
    shares = {p: (g["share"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert shares[head.weight] == (1, 0.05)
    assert shares[head.bias] == (1, 0)
    assert shares[model.encoder[1].norm_mlp.weight] == (0.5, 0)
    assert shares[model.embed.weight] == (0.125, 0.05)
    parts = (head, model.encoder, model.embed)
    assert set(shares) == {p for part in parts for p in part.parameters()}
    before = [p.clone() for p in model.parameters()]
    probe.finetune(model, data, config, CPU, decay=0.0)
    assert all(map(torch.equal, before, model.parameters()))  # a share of 0 keeps a layer as it is

    # Stochastic depth: of 4000 images alike, a branch leaves out some, in training only.
    x = torch.randn(1, 4, 16).expand(4000, -1, -1)
    for layer, rate in zip(model.encoder, (0, 0.1)):
        for branch, inputs in ((layer.mlp, (x,)), (layer.attention, (x, x))):
            with torch.no_grad():
                whole = branch(*inputs)
                thinned = branch.train()(*inputs)
            out = (thinned == 0).flatten(1).all(1)
            assert abs(out.float().mean() - rate) < 0.02
            assert torch.allclose(thinned[~out], whole[~out] / (1 - rate), atol=1e-4)


def distorted(images, labels, step, *without):
    """`strongly` without crops, and without what is named: so that the rest can be seen alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randsac, "crop", lambda images, crops, size: randsac.normalize(images, size))
        for name in without:
            patch.setattr(probe.v2, name, lambda **_: torch.nn.Identity())
        return probe.strongly(2, images, labels, micro(image_size=16), step)


def test_mixup_and_cutmix_take_turns_and_labels_say_what_is_seen():
    labels = torch.tensor([0, 1] * 8)
    images = torch.zeros(16, 3, 16, 16, dtype=torch.uint8)
    images[labels == 1] = 255
    cut = set()
    mixed = set()
    for step in range(60):
        x, target = distorted(images, labels, step, "RandAugment", "RandomErasing")
        # A bright image is of the second class, a mixture as much so as it is bright.
        share = (x.mean((1, 2, 3)) + 1) / 2
        expected = 0.9 * torch.stack([1 - share, share], 1) + 0.05
        assert torch.allclose(target, expected, atol=1e-3)
        if len(x[0].unique()) > 1 or x.abs().min() > 0.999:
            cut.add(share[0].item())  # parts of both images, each as it was
        else:
            mixed.add(share[0].item())  # a shade between them
    assert len(cut) > 10
    assert len(mixed) > 15


def test_one_image_in_four_is_erased_in_part_by_noise():
    # Images of one shade and one class: mixing them changes nothing, but where two differ.
    images = torch.full((64, 3, 16, 16), 90, dtype=torch.uint8)
    areas = []
    for step in range(30):
        x, _ = distorted(images, torch.zeros(64).long(), step, "RandAugment")
        changed = (x - x.flatten().mode().values).abs().amax(1) > 1e-3  # [64,16,16]
        groups = changed.view(8, 8, 16, 16)[:, 4]  # far from the neighbours that it is mixed with
        areas += groups.float().mean((1, 2)).tolist()
    erased = [area for area in areas if area > 0]
    assert 40 <= len(erased) <= 80, "of 240"
    assert min(erased) < 0.1
    assert 0.2 < max(erased) < 0.4
    assert len(set(erased)) > 20
    assert len(x.unique()) > 100  # noise has many shades


def test_each_eight_images_are_distorted_in_a_way_of_their_own():
    alike = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8).expand(64, -1, -1, -1)
    x, _ = distorted(alike, torch.arange(64) % 2, 5, "RandomErasing")
    groups = x.view(8, 8, -1)[:, 1:]  # the first is mixed with one of another group
    assert torch.allclose(groups, groups[:, :1], atol=1e-4)
    assert len(groups[:, 0].mul(100).round().unique(dim=0)) > 4


# --- rows and floors

FROZEN = {"linear": {}, "knn": {"k": 20, "temperature": 0.07}}
SGD = {"linear-sgd": {"epochs": 1, "batch_size": 256, "lr": 0.1, "warmup": 10 / 90}}
TUNED = {"epochs": 1, "batch_size": 256, "lr": 1e-3, "warmup": 0.05}
UNTRAINED = {"random_init": True}
COMMANDS = [  # flags, the rows' protocols and settings, what differs in the rows
    ("", FROZEN, {}),
    ("--random-init", FROZEN, UNTRAINED),
    ("--features pixels", FROZEN, {"features": "pixels"}),
    ("--image-size 12", FROZEN, {"image_size": 12}),  # 36 tokens, which 16 squares do not cut
    ("--protocol layers", {"layers": {}}, {}),
    ("--epochs 1 --protocol linear-sgd", SGD, {}),
    ("--epochs 1 --protocol finetune", {"finetune": TUNED | {"layer_decay": 0.75}}, {}),
    ("--epochs 1 --protocol finetune --random-init", {"finetune": {"layer_decay": 1}}, UNTRAINED),
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
        assert row["top1"] > 80  # as colours tell
        assert row["seconds"] >= 0
        assert list(row["per_class"]) == ["ant", "bee", "cat"]
        assert f"{row['protocol']}: top-1 {row['top1']:.2f} %\n" in printed
    assert str(checkpoint.with_name("probes.jsonl")) in printed


def test_a_row_counts_hits_of_all_and_of_each_class_and_the_commonest_class():
    labels = torch.tensor([0, 0, 2, 2, 2])
    data = probe.Labelled(None, None, ["ant", "bee", "cat"], None, labels)
    scores = torch.eye(3)[[0, 1, 2, 0, 1]]
    row = probe.make_row("knn", data, scores, {})
    expected = {"top1": 40, "commonest": 60, "per_class": {"ant": 50, "cat": 33.33}}
    assert row == {"protocol": "knn", "settings": {}, **expected}


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


def test_a_model_alone_will_do_and_is_named_as_it_was_when_read(checkpoint, monkeypatch):
    saved = torch.load(checkpoint, weights_only=True)
    del saved["step"]
    torch.save(saved, checkpoint)
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

    # Files that came or went meanwhile would have the features of others.
    _, data, config, _ = prepared(checkpoint)
    data = data._replace(labels=data.labels.flip(0))
    with pytest.raises(randsac.UserError, match="try again"):
        probe.save_features(tmp_path / "f.npz", *torch.ones(2, 72, 16), data, config, "")


@pytest.mark.parametrize("gone", ["test", "*/[bc]*"])
def test_without_labels_features_are_kept_alone(checkpoint, image_folder, capsys, gone):
    images = shutil.copytree(image_folder, checkpoint.with_name("images"))
    for folder in images.glob(gone):
        shutil.rmtree(folder)
    flags = words(checkpoint, "--data-dir", images)
    file = checkpoint.with_name("f.npz")
    line = f"neighbours --checkpoint {checkpoint} --dataset folder --data-dir {images}"
    assert line in refusal(probe.main, flags)
    probe.main([*flags, "--save", str(file)])
    assert line in capsys.readouterr().out
    kept = np.load(file)
    assert kept["train"].shape == (len(kept["train_files"]), 16)
    assert kept["test"].shape == (len(kept["test_labels"]), 16)
    assert not checkpoint.with_name("probes.jsonl").exists()


# --- what it refuses

# Flags, and what the line names.
REFUSED = """
--epochs 3: --epochs
--protocol layers --batch-size 4: --batch-size
--protocol finetune --features pixels: --features
--features pixels --random-init: --features
--proto layers: --proto
--protocol linear-sgd --batch-size 1: --batch-size
--protocol finetune --epochs 4 --lr 1e9: lower --lr
--protocol layers --save f.npz: --save
--random-init --save f.npz: --save
--features pixels --save f.npz: --save
--save checkpoint.pt: checkpoint.pt
--save gone/f.npz: gone
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_a_flag_that_cannot_act_is_named(checkpoint, monkeypatch, line):
    flags, part = line.split(": ")
    monkeypatch.setattr(probe, "outputs", None)  # before features are computed
    before = checkpoint.read_bytes()
    assert part in refusal(run_probe, checkpoint, *flags.split())
    assert checkpoint.read_bytes() == before
    assert not Path("probes.jsonl").exists()


@pytest.mark.parametrize("name, flags", [("probes.jsonl", ""), (".", ""), ("x", "--save ~/x/f")])
def test_as_a_program_it_says_where_it_cannot_write(checkpoint, monkeypatch, name, flags):
    home = checkpoint.parent
    (home / "x").mkdir()
    if name == "probes.jsonl":
        (home / name).touch()
    # As of another user: this one may be root, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda asked, mode: asked != home / name)
    monkeypatch.setattr(randsac, "load_images", None)
    monkeypatch.setenv("HOME", str(home))
    ended = go("~/checkpoint.pt", *flags.split(), program=ROOT / "probe.py")
    one_line(*ended, f"{home / name} cannot be written")


# --- one's own use


def test_features_of_ones_own_images(tmp_path):
    shutil.copytree(ROOT / "assets" / "nano-cifar10", tmp_path / "assets" / "nano-cifar10")
    for name, colour in (("a.jpg", "red"), ("b.jpg", "green")):
        Image.new("RGB", (50, 40), colour).save(tmp_path / name)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)  # noqa: S102
    features = names["features"]
    assert features.shape == (2, 128)
    assert not torch.allclose(features[0], features[1], atol=0.1)

    # They are those that a probe uses.
    function = functools.partial(probe.pooled, names["model"], 1)
    used = probe.outputs(function, names["images"], 32, CPU)
    assert torch.allclose(features, used[:, 0], atol=1e-5)


# --- what a trained model is worth


@pytest.mark.long
def test_on_shapes_finetune_beats_linear_and_linear_beats_both_floors(tmp_path):
    assert run_here("--out", tmp_path / "run", "--device", "cpu") == 0
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    probes = [(), ("--random-init",), ("--features", "pixels")]
    linear, *floors = (run_probe(checkpoint, *flags)[-2]["top1"] for flags in probes)
    tuned = run_probe(checkpoint, "--protocol", "finetune", "--epochs", 3)[-1]["top1"]
    assert tuned > linear > max(floors), (tuned, linear, floors)
