"""The evaluation protocols (Section 5.1): the solver's optimum, what a probe may see, its files, what it refuses."""
import functools
import hashlib
import json
import pickle
import shutil
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MICRO_FLAGS, command, micro, run_here

import probe
import randsac

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def trained(image_folder, tmp_path_factory):
    """The checkpoint of a few steps on `image_folder`."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run_here(*MICRO_FLAGS, "--data-dir", image_folder, "--max-steps", 4, "--out", out) == 0
    return out / "checkpoint.pt"


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy of it with nothing beside it."""
    return shutil.copy(trained, tmp_path / "checkpoint.pt")


def probed(checkpoint, *arguments):
    """Runs a probe in this process -> what it wrote, as {file name: content}, for files it wrote or changed."""
    before = {path: path.stat().st_mtime_ns for path in checkpoint.parent.glob("probe-*.json")}
    probe.main([str(argument) for argument in (checkpoint, "--device", "cpu", *arguments)])
    return {path.name: json.loads(path.read_text()) for path in checkpoint.parent.glob("probe-*.json")
            if before.get(path) != path.stat().st_mtime_ns}


def settings(protocol, checkpoint, *flags):
    """What main prepares before it measures: arguments, config, model in eval mode, data."""
    args = probe.read_arguments([str(part) for part in (checkpoint, "--protocol", protocol, "--device", "cpu", *flags)])
    saved, trained = randsac.load_checkpoint(checkpoint)
    config = probe.probe_config(trained, args)
    return args, config, probe.make_encoder(saved, trained, args), probe.load_labelled(config)


def measured(protocol, checkpoint, cache, *flags, change=lambda data: data):
    args, config, model, data = settings(protocol, checkpoint, *flags)
    return model, probe.measure(model, change(data), config, args, CPU, cache, ["key"])


# --- the solver

def correlated(n=240, D=6, C=4, seed=0):
    """A problem whose features have deviations from 1 to 100 and are correlated, and whose classes overlap."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, n)
    x = rng.normal(size=(n, D)) + np.eye(C, D)[y]
    x = x @ (np.eye(D) + 0.8 * rng.normal(size=(D, D))) * 10 ** np.linspace(0, 2, D) + 5
    return x, y


def standardized(n=240):
    x, y = correlated(n)
    return torch.from_numpy((x - x.mean(0)) / x.std(0)), torch.from_numpy(y)


def newton(x, y, C, l2):
    """Damped Newton on mean cross-entropy + l2/2 |W|^2, all in numpy and float64 -> loss, W [C,D], b [C]."""
    n, D = x.shape
    x1, penalty = np.hstack([x, np.ones((n, 1))]), np.tile(np.r_[np.full(D, l2), 0], C)

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
                hessian[a * (D + 1):(a + 1) * (D + 1), b * (D + 1):(b + 1) * (D + 1)] += curvature
        step, size = np.linalg.lstsq(hessian, gradient, rcond=None)[0], 1.0
        while size > 1e-9 and evaluate(w - size * step)[0] > loss:
            size /= 2
        w = w - size * step
    w = w.reshape(C, D + 1)
    return evaluate(w.ravel())[0], w[:, :-1], w[:, -1] - w[:, -1].mean()


def loss_of(x, y, W, b, l2):
    return (F.cross_entropy(x @ W.T + b, y) + l2 / 2 * W.square().sum()).item()


@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-6])
def test_the_solver_finds_the_optimum_that_newton_finds(l2):
    x, y = standardized()
    best, W, b = newton(x.numpy(), y.numpy(), 4, l2)
    weight, bias = probe.logistic_regression(x, y, 4, l2)
    assert abs(loss_of(x, y, weight, bias, l2) - best) < 1e-9
    assert np.abs(weight.numpy() - W).max() < 1e-4 * max(1, np.abs(W).max()) and np.abs(bias.numpy() - b).max() < 1e-4
    assert ((x @ weight.T + bias).argmax(1).numpy() == (x.numpy() @ W.T + b).argmax(1)).all()


def test_the_solver_forgets_where_it_started():
    x, y = standardized()
    cold = probe.logistic_regression(x, y, 4, 1e-3)
    warm = probe.logistic_regression(x, y, 4, 1e-3, (torch.randn(4, 6).double(), torch.zeros(4).double()))
    for a, b in zip(cold, warm):
        assert torch.allclose(a, b, atol=1e-3)


def test_the_solver_counts_every_row_of_a_large_problem_once():
    x, y = standardized(n=300)
    few = probe.logistic_regression(x, y, 4, 1e-2)
    many = probe.logistic_regression(x.repeat(100, 1), y.repeat(100), 4, 1e-2)  # 30,000 rows: more than one part
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(few, many))


def test_lin_is_the_optimum_on_standardized_features_of_all_training_images():
    x, y = correlated(n=400)
    train, test = torch.from_numpy(x[:300]).float(), torch.from_numpy(x[300:]).float()
    scores, chosen = probe.linear(train, torch.from_numpy(y[:300]), test, 4, seed=0)
    mean, deviation = train.double().mean(0).numpy(), train.double().std(0).numpy()
    best, W, b = newton((train.double().numpy() - mean) / deviation, y[:300], 4, chosen["l2"])
    expected = torch.from_numpy((test.double().numpy() - mean) / deviation @ W.T + b)
    assert torch.allclose(scores.softmax(1), expected.softmax(1), atol=1e-4)
    assert (scores.argmax(1) == expected.argmax(1)).all() and scores.shape == (100, 4)


def test_the_strength_of_l2_is_the_best_on_held_out_training_images():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 2
    noise, sign = torch.randn(300, 200, generator=generator), (2 * y - 1)[:, None]
    hidden = noise[:, :1] + torch.cat([0 * sign, 0.02 * sign], 1)  # only the small difference of two features tells
    for features, right in ((noise + 0.15 * sign, lambda l2: l2 > 1e-4), (hidden, lambda l2: l2 < 1e-2)):
        _, chosen = probe.linear(features, y, features, 2, seed=0)
        tried = {float(l2): top1 for l2, top1 in chosen["held_out_top1"].items()}
        assert list(tried) == probe.L2_GRID and right(chosen["l2"]), chosen
        assert tried[chosen["l2"]] == max(tried.values())
        assert all(top1 < tried[chosen["l2"]] for l2, top1 in tried.items() if l2 > chosen["l2"])


def test_the_held_out_images_of_that_choice_are_not_among_those_fitted():
    generator = torch.Generator().manual_seed(0)
    features, y = torch.randn(200, 400, generator=generator), torch.randint(0, 2, (200,), generator=generator)
    held_out = probe.linear(features, y, features, 2, seed=0)[1]["held_out_top1"]  # what is fitted is learned by heart
    assert max(held_out.values()) < 85, held_out


def test_test_images_do_not_change_each_others_scores():
    x, y = correlated(n=300)
    train, y, test = torch.from_numpy(x[:200]).float(), torch.from_numpy(y[:200]), torch.from_numpy(x[200:]).float()
    for solve in (functools.partial(probe.linear, seed=0), probe.knn):
        assert torch.allclose(solve(train, y, test, 4)[0][:10], solve(train, y, test[:10], 4)[0], atol=1e-5)


def test_constant_features_do_no_harm():
    x, y = correlated(n=200)
    x[:, 2] = 0.3
    train, y = torch.from_numpy(x).float(), torch.from_numpy(y)
    scores, _ = probe.linear(train, y, train + 0.0, 4, seed=0)
    kept = train[:, [0, 1, 3, 4, 5]]
    assert torch.allclose(scores.softmax(1), probe.linear(kept, y, kept, 4, seed=0)[0].softmax(1), atol=1e-4)


def test_neighbours_vote_as_a_loop_says():
    generator = torch.Generator().manual_seed(1)
    train, test = torch.randn(60, 5, generator=generator), torch.randn(7, 5, generator=generator)
    y = torch.randint(0, 3, (60,), generator=generator)
    scores, used = probe.knn(train, y, test, 3)
    for i in range(len(test)):
        similar = [(torch.dot(test[i], row) / test[i].norm() / row.norm()).item() for row in train]
        votes = [0.0] * 3
        for j in sorted(range(60), key=lambda j: -similar[j])[:20]:
            votes[y[j]] += np.exp(similar[j] / 0.07)
        assert torch.allclose(scores[i], torch.tensor(votes, dtype=torch.float), rtol=1e-3)
    assert used == dict(k=20, temperature=0.07)
    assert probe.knn(train[:4], y[:4], test, 3)[1]["k"] == 4  # fewer images than neighbours


# --- features

def test_features_are_encodes_mean_over_tokens(checkpoint, tmp_path):
    _, config, model, data = settings("layers", checkpoint)
    all_layers = probe.outputs(functools.partial(probe.pooled, model, config.depth), data[0], 8, CPU, "features")
    last = probe.outputs(functools.partial(probe.pooled, model, 1), data[0], 8, CPU, "features")
    with torch.no_grad():
        expected = model.encode(randsac.normalize(data[0], 8)).mean(1)
    assert last.shape == (72, 1, 16) and all_layers.shape == (72, 2, 16) and last.dtype == torch.float32
    assert torch.allclose(last[:, 0], expected, atol=1e-5) and torch.allclose(all_layers[:, -1], expected, atol=1e-5)
    assert not torch.allclose(all_layers[:, 0], expected, atol=1e-2)


def test_features_are_computed_once_for_the_same_checkpoint_and_images(tmp_path):
    images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    changed, cache, calls = images.clone(), tmp_path / "features.pt", []
    changed[7, 1, 2, 3] ^= 1

    def function(x):
        calls.append(len(x))
        return x.flatten(1) * len(calls)

    def kept(images=images, size=8, key="checkpoint"):
        before = len(calls)
        train, test = probe.kept_features(function, images, images[:5], size, CPU, cache, [key])
        assert torch.equal(train, torch.load(cache)["train"]) and test.shape == (5, 3 * size * size)
        return len(calls) > before

    assert kept() and not kept()
    for other in (dict(key="another"), dict(images=changed), dict(images=images[:29]), dict(images=images.flip(0)),
                  dict(size=4)):
        assert kept(**other) and not kept(**other), other
        assert kept()  # and this one's own are not taken for those


class Trap:
    """Loaded as a pickle, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("damage", ["flip", "cut", "text", "code"])
def test_damaged_features_are_said_and_computed_again(checkpoint, capsys, damage):
    first = probed(checkpoint, "--protocol", "knn")["probe-knn.json"]
    cache = checkpoint.parent / "features.pt"
    with zipfile.ZipFile(cache) as archive:  # a place inside of a tensor
        record = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(cache.read_bytes())
    content[record.header_offset + 200] ^= 1
    if damage == "code":
        torch.save(dict(key=Trap(checkpoint.parent / "trapped")), cache)
    else:
        cache.write_bytes(dict(flip=content, cut=content[:len(content) // 2], text=b"hello")[damage])
    capsys.readouterr()
    again = probed(checkpoint, "--protocol", "knn")["probe-knn.json"]
    assert f"{cache} is damaged" in capsys.readouterr().out
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    probed(checkpoint, "--protocol", "knn")
    assert "is damaged" not in capsys.readouterr().out and not (checkpoint.parent / "trapped").exists()


# --- what a probe may change and see

def fingerprint(model):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.state_dict().values())).hexdigest()


def test_the_encoder_is_the_checkpoints_or_a_random_one(checkpoint):
    def encoder(*flags):
        return fingerprint(settings("linear", checkpoint, *flags)[2])

    assert encoder() == encoder("--seed", 1) == fingerprint(randsac.RandSAC.load(checkpoint)[0])
    assert encoder() != encoder("--random-init") == encoder("--random-init") != encoder("--random-init", "--seed", 1)


@pytest.mark.parametrize("protocol, flags", [("linear", ()), ("knn", ()), ("layers", ()),
                                             ("linear-sgd", ("--epochs", 2)), ("finetune", ("--epochs", 2))])
def test_test_labels_change_nothing_and_only_finetune_changes_the_encoder(checkpoint, tmp_path, protocol, flags):
    def permuted(data):
        return *data[:3], data[3][torch.randperm(len(data[3]))], data[4]

    untouched = fingerprint(settings(protocol, checkpoint, *flags)[2])
    model, found = measured(protocol, checkpoint, tmp_path / "a", *flags)
    _, again = measured(protocol, checkpoint, tmp_path / "b", *flags, change=permuted)
    assert (fingerprint(model) == untouched) == (protocol != "finetune")
    assert len(found) == len(again) == (2 if protocol == "layers" else 1)
    for (scores, chosen), (same_scores, same_chosen) in zip(found, again):
        assert torch.equal(scores, same_scores) and chosen == same_chosen and scores.shape == (24, 3)


@pytest.mark.parametrize("protocol", ["linear-sgd", "finetune"])
def test_the_seed_decides_the_training(checkpoint, tmp_path, protocol):
    scores = [measured(protocol, checkpoint, None, "--epochs", 2, "--seed", seed)[1][0][0] for seed in (3, 3, 4)]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


def test_every_step_and_seed_crops_in_a_way_of_its_own(checkpoint, monkeypatch):
    drawn = []
    monkeypatch.setattr(probe, "augment", lambda images, size, scale, generator: (
        drawn.append(generator.initial_seed()), randsac.normalize(images, size))[1])
    for seed in (3, 4):
        measured("linear-sgd", checkpoint, None, "--epochs", 2, "--batch-size", 24, "--seed", seed)
    assert len(drawn) == len(set(drawn)) == 12  # 72 images: 3 steps an epoch


@pytest.mark.parametrize("protocol", ["linear-sgd", "finetune"])
def test_a_trained_head_scores_each_test_image_alone(checkpoint, protocol):
    scores = [measured(protocol, checkpoint, None, "--epochs", 2, "--lr", 0.1, "--batch-size", 24, change=lambda data: (
        *data[:2], data[2][:n], data[3][:n], data[4]))[1][0][0][:4] for n in (24, 4)]
    assert torch.allclose(*scores, atol=1e-4)


@pytest.mark.parametrize("protocol, epochs, lr", [("linear-sgd", 20, 1), ("finetune", 30, 0.05)])
def test_training_learns_what_colours_tell(checkpoint, tmp_path, protocol, epochs, lr):
    _, [(scores, _)] = measured(protocol, checkpoint, None, "--epochs", epochs, "--lr", lr, "--batch-size", 24)
    assert (scores.argmax(1) == torch.arange(24) // 8).float().mean() > 0.8


def test_layers_learn_at_shares_of_the_rate(checkpoint):
    _, config, model, _ = settings("finetune", checkpoint)
    head = torch.nn.Linear(16, 3)
    groups = probe.layer_groups(model, head, config, 0.5)
    shares = {id(p): (group["share"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert shares[id(head.weight)] == (1, 0.05) and shares[id(head.bias)] == (1, 0)
    assert shares[id(model.encoder[1].norm_mlp.weight)] == (0.5, 0) and shares[id(model.embed.weight)] == (0.125, 0.05)
    assert set(shares) == {id(p) for part in (head, model.encoder, model.embed) for p in part.parameters()}
    args, config, model, data = settings("finetune", checkpoint, "--epochs", 1)
    before = fingerprint(model)
    probe.train_head(model, data, config, CPU, True, 0.0)
    assert fingerprint(model) == before, "a share of 0 keeps a layer as it is"
    assert measured("finetune", checkpoint, None, "--epochs", 1)[1][0][1]["layer_decay"] == 0.75
    assert measured("finetune", checkpoint, None, "--epochs", 1, "--from-scratch")[1][0][1]["layer_decay"] == 1


def test_strong_augmentation_differs_between_groups_of_images_and_keeps_what_the_labels_say():
    config = micro(image_size=16)
    images = torch.full((64, 3, 16, 16), 30, dtype=torch.uint8)
    images[32:] = 220  # two classes, dark and bright: a mixture's label says how bright it is
    labels = torch.arange(64) // 32
    order = torch.randperm(64)
    prepare = probe.strong_augmentation(2)
    x, target = prepare(images[order], labels[order], config, randsac.seeded("cpu", 1))
    assert x.shape == (64, 3, 16, 16) and x.dtype == torch.float32 and x.abs().max() <= 1
    assert torch.allclose(target.sum(1), torch.ones(64)) and target.min() >= 0.05 - 1e-6 and target.max() <= 0.95 + 1e-6
    share = ((target - 0.05) / 0.9)[:, 1].view(8, 8)
    mixing = {round(v, 4) for row in share.tolist() for v in row} - {0.0, 1.0}
    assert len(mixing) > 6, "each group of 8 has its own MixUp or CutMix"
    assert torch.corrcoef(torch.stack([x.mean((1, 2, 3)), target[:, 1]]))[0, 1] > 0.7
    again = prepare(images[order], labels[order], config, randsac.seeded("cpu", 1))
    other = prepare(images[order], labels[order], config, randsac.seeded("cpu", 2))
    assert torch.equal(x, again[0]) and torch.equal(target, again[1]) and not torch.equal(x, other[0])


def test_each_eight_images_are_distorted_in_a_way_of_their_own(monkeypatch):
    monkeypatch.setattr(probe, "augment", lambda images, size, scale, generator: images.float())
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).repeat(64, 1, 1, 1)  # a mix of equals is equal
    x, _ = probe.strong_augmentation(2)(images, torch.arange(64) % 2, micro(), randsac.seeded("cpu", 5))
    groups = x.view(8, 8, -1)
    assert torch.allclose(groups, groups[:, :1], atol=1e-2) and len(groups[:, 0].round().unique(dim=0)) > 4


# --- the command

def test_every_protocol_floor_and_transfer_has_a_result_of_its_own(checkpoint, image_folder, capsys, tmp_path):
    expected = {(): "probe-linear.json", ("--random-init",): "probe-linear-random-init.json",
                ("--features", "pixels"): "probe-linear-pixels.json", ("--protocol", "knn"): "probe-knn.json",
                ("--protocol", "layers"): "probe-layers.json",
                ("--protocol", "linear-sgd", "--epochs", 1): "probe-linear-sgd.json",
                ("--protocol", "finetune", "--epochs", 1): "probe-finetune.json",
                ("--protocol", "finetune", "--from-scratch", "--epochs", 1): "probe-finetune-from-scratch.json",
                ("--image-size", 12): "probe-linear-12.json",  # 6 x 6 tokens, which 16 and 4 squares do not cut
                ("--data-dir", image_folder): f"probe-linear-{image_folder.name}.json"}
    for arguments, name in expected.items():
        [(written, result)] = probed(checkpoint, *arguments).items()
        printed = capsys.readouterr().out
        assert written == name and f"top-1 {result['top1']:.2f} %" in printed and name in printed
        assert "\nnext: python " in printed and str(checkpoint) in printed
        assert {"protocol", "top1", "per_class", "settings", "sha256", "step", "seconds"} <= result.keys()
        assert result["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest() and result["step"] == 4
        assert list(result["per_class"]) == ["ant", "bee", "cat"]
        assert abs(np.mean(list(result["per_class"].values())) - result["top1"]) < 0.02  # classes of equal size
    assert json.loads((checkpoint.parent / "probe-linear-pixels.json").read_text())["top1"] == 100
    layers, linear, finetune = (json.loads((checkpoint.parent / f"probe-{name}.json").read_text())
                                for name in ("layers", "linear", "finetune"))
    assert linear["settings"].items() >= dict(dataset="folder", data_dir=str(image_folder), image_size=8, seed=0,
                                              features="encoder", random_init=False).items()
    assert linear["settings"]["l2"] in probe.L2_GRID and "epochs" not in linear["settings"]
    assert finetune["settings"].items() >= dict(epochs=1, batch_size=256, lr=1e-3, layer_decay=0.75).items()
    assert len(layers["accuracy"]) == 2 and layers["accuracy"][-1] == layers["top1"] == linear["top1"]


def test_the_same_command_gives_the_same_result(checkpoint):
    first = probed(checkpoint, "--random-init")["probe-linear-random-init.json"]
    (checkpoint.parent / "features-random-init.pt").unlink()
    again = probed(checkpoint, "--random-init")["probe-linear-random-init.json"]
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


def test_what_next_says_runs(checkpoint, capsys):
    said = ["probe.py", str(checkpoint), "--image-size", "12"]
    for floor in ("--random-init", "--features pixels", "--protocol layers"):
        probe.main(said[1:])
        said = capsys.readouterr().out.splitlines()[-1].removeprefix("next: python ").split()
        assert " ".join(said) == f"probe.py {checkpoint} --image-size 12 {floor}"
    probe.main(said[1:])
    assert "visualize.py" in capsys.readouterr().out


def test_top5_counts_where_there_are_more_than_ten_classes():
    scores = torch.eye(12) + torch.linspace(0.5, 0, 12)  # every class scores best where it is right, 0..4 come next
    labels = torch.tensor([0, 1, 2, 3, 11, 3, 3, 3, 3, 3, 3, 3])
    names = [f"c{i}" for i in range(12)]
    result = probe.accuracies(scores, labels, names)
    assert result["top1"] == round(100 * 4 / 12, 2) and result["top5"] == round(100 * 11 / 12, 2)
    assert result["per_class"] == dict(c0=100, c1=100, c2=100, c3=12.5, c11=0)
    assert "top5" not in probe.accuracies(scores[:, :10], labels.clamp(max=9), names[:10])


def test_a_smaller_checkpoint_in_half_precision_will_do(checkpoint):
    whole = probed(checkpoint, "--protocol", "knn")["probe-knn.json"]
    saved = torch.load(checkpoint, weights_only=True)
    model = {name: weight.half() for name, weight in saved["model"].items()}
    torch.save(dict(config=saved["config"], model=model), checkpoint)
    cache = checkpoint.parent / "features.pt"
    before = torch.load(cache)["train"]
    half = probed(checkpoint, "--protocol", "knn")["probe-knn.json"]
    assert not torch.equal(torch.load(cache)["train"], before), "another checkpoint in its place has other features"
    assert half["step"] is None and abs(half["top1"] - whole["top1"]) < 13 and half["sha256"] != whole["sha256"]


def test_help_teaches_every_protocol(capsys):
    with pytest.raises(SystemExit) as end:
        probe.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, text.splitlines())) <= 120
    for protocol in ("linear", "knn", "layers", "linear-sgd", "finetune"):
        assert f"\n  {protocol} " in text
    assert text.count("pass") > 5


# --- what it refuses

def refused(monkeypatch, capsys, *arguments):
    """The command ends with code 2 and one line on stderr -> that line."""
    monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        randsac.run_command(probe.main)
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line and "%|" not in line]  # without progress bars
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), said
    return lines[0]


@pytest.mark.parametrize("content", ["text", "nothing", "cut", "code", "other", "directory"])
def test_what_is_no_checkpoint_is_refused_and_runs_nothing(checkpoint, tmp_path, monkeypatch, capsys, content):
    if content == "code":
        torch.save(dict(config={}, model=Trap(tmp_path / "trapped")), checkpoint)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(checkpoint, weights_only=True)
    elif content == "other":
        torch.save(dict(weights=torch.zeros(3)), checkpoint)
    elif content in ("nothing", "directory"):
        checkpoint.unlink()
        content == "directory" and checkpoint.mkdir()
    else:
        checkpoint.write_bytes(dict(text=b"hello", cut=checkpoint.read_bytes()[:5000])[content])
    assert "checkpoint.pt is not a whole checkpoint" in refused(monkeypatch, capsys, checkpoint)
    assert not (tmp_path / "trapped").exists()


def test_a_model_of_gray_images_is_refused(checkpoint, monkeypatch, capsys):
    saved = torch.load(checkpoint, weights_only=True)
    saved["model"]["embed.weight"] = saved["model"]["embed.weight"][:, :4]  # one channel in place of three
    torch.save(saved, checkpoint)
    assert "embed.weight" in refused(monkeypatch, capsys, checkpoint)


def without_labels(root):
    shutil.copytree(root / "train" / "ant", root / "flat")
    return root / "flat"


def without_test_images(root):
    shutil.rmtree(root / "test")
    return root


def with_one_class(root):
    for name in ("bee", "cat"):
        shutil.rmtree(root / "train" / name), shutil.rmtree(root / "test" / name)
    return root


@pytest.mark.parametrize("change, words", [(without_labels, "have no labels"), (without_test_images, "no test images"),
                                           (with_one_class, "one class"), (lambda root: root / "gone", "gone")])
def test_images_that_cannot_be_probed_with_are_refused(
        checkpoint, image_folder, tmp_path, monkeypatch, capsys, change, words):
    shutil.copytree(image_folder, tmp_path / "images")
    assert words in refused(monkeypatch, capsys, checkpoint, "--data-dir", change(tmp_path / "images"))


@pytest.mark.parametrize("flags, words", [
    ("--epochs 3", "leave out"), ("--protocol knn --lr 1", "leave out"),
    ("--protocol layers --batch-size 4", "leave out"),
    ("--protocol finetune --features pixels", "no encoder"), ("--features pixels --random-init", "no encoder"),
    ("--dataset mnist", "mnist"), ("--image-size 9", "--patch-size"), ("--image-size 0", "--image-size"),
    ("--protocol finetune --epochs 0", "--epochs"), ("--protocol linear-sgd --lr -1", "--lr"), ("--seed -1", "--seed"),
    ("--device tpu", "--device"), ("--protocol linear-sgd --batch-size 0", "--batch-size"),
    ("--protocol finetune --batch-size 1", "2 or more")])
def test_flags_that_cannot_be_are_refused(checkpoint, monkeypatch, capsys, flags, words):
    assert words in refused(monkeypatch, capsys, checkpoint, *flags.split())
    assert not list(checkpoint.parent.glob("probe-*"))


def test_a_loss_that_is_not_finite_ends_the_training(checkpoint):
    with pytest.raises(randsac.UserError, match="lower --lr"):
        measured("finetune", checkpoint, None, "--epochs", 3, "--lr", 1e9)


def test_a_directory_that_cannot_be_written_to_is_said_at_once(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(probe.os, "access", lambda path, mode: path != checkpoint.parent)
    assert "cannot be written" in refused(monkeypatch, capsys, checkpoint)


def test_as_a_process_of_its_own(checkpoint):
    done = command("probe.py", checkpoint, "--protocol", "knn", cwd=checkpoint.parent)
    assert done.returncode == 0 and "knn: top-1" in done.stdout and "next: python" in done.stdout, done.stderr


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
        probe.outputs(functools.partial(probe.pooled, model, 1), images, 32, CPU, "features")

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
    top1 = [result["top1"] for flags in ((), ("--random-init",), ("--features", "pixels"))
            for result in probed(checkpoint, *flags).values()]
    [finetuned] = probed(checkpoint, "--protocol", "finetune", "--epochs", 3).values()
    assert finetuned["top1"] > top1[0] > max(top1[1:]), (finetuned["top1"], top1)
