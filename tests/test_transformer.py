"""Section 4: the masked transformer and its skip connections. No information may reach a prediction
from its own or a later segment: shown by gradients (exact zeros), by perturbation (not a bit
changes), and against a slow version that is never given the future. All in float64. (Masks and
skips are tested alone in test_exercises.py, other precisions in test_gpu.py.)"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    assert_no_gradient_leaks,
    micro,
    random_config,
    random_model,
    run_path,
)

import randsac

STRATEGIES = [  # grid, segments, hierarchy, last ranks: none, the smallest, the largest
    (3, "patch", (), (0, 1, 7)),
    (4, "square", (4,), (0, 1, 2)),
    (4, "square", (16, 4), (0, 1, 14)),
    (6, "square", (9,), (0, 1, 7)),
    (2, "mae", (), (0,)),
    (4, "mae", (), (0,)),
    (2, "blob", (3,), (0, 1)),  # often a sample is a single segment
    (4, "blob", (11, 5, 3), (0, 1, 9)),
    (3, "scatter", (9, 2), (0, 1, 7)),
    (4, "scatter", (6,), (0, 1, 4)),
]
every_strategy = pytest.mark.parametrize("grid, segments, hierarchy, last_ranks", STRATEGIES)


def small(grid, segments, hierarchy, **settings):
    size = {"image_size": 2 * grid, "patch_size": 2}
    return micro(**size, segments=segments, hierarchy=hierarchy, **settings)


def paths(config):
    """-> the values of `trim` that the strategy allows."""
    return (True, False) if randsac.segment_sizes(config) else (False,)


# --- nothing leaks


def assert_no_leak(config, trim, seed):
    model = random_model(config, seed)
    generator = randsac.seeded("cpu", seed)

    # 16 samples, each with an order of its own and asked for another step: for all, if so few.
    side = config.image_size
    ranks = randsac.sample_ranks(config, 16, generator=generator)  # [16,N]
    images = torch.randn(16, 3, side, side, generator=generator, dtype=torch.double)
    step = 1 + torch.arange(16)[:, None] % ranks.amax(1, keepdim=True).clamp(min=1)  # [16,1]
    prediction, rank = assert_no_gradient_leaks(model, images, ranks, step, trim)
    assert ((ranks > 0).sum(1) == (rank > 0).sum(1)).all()  # every one of rank >= 1 is predicted

    # By perturbation. Other pixels from this step on: predictions up to it keep every bit, and all
    # later ones, which see the new pixels, change.
    tokens = (ranks >= step)[..., None].expand(-1, -1, 3 * config.patch_size**2)
    hidden = randsac.unpatchify(tokens, config.patch_size)
    noise = torch.randn(images.shape, generator=generator, dtype=torch.double)
    again, _ = run_path(model, torch.where(hidden, noise, images), ranks, trim)
    before = (rank <= step) & (rank > 0)
    assert torch.equal(again[before], prediction[before]), config
    after = rank > step
    assert (again[after] != prediction[after]).any(-1).all(), config


@every_strategy
def test_no_leak_for_every_strategy(grid, segments, hierarchy, last_ranks):
    """In `decode` tokens of rank 0 look at everything: who read them would be found here, too."""
    orders = [("random", True), ("random", False)]
    if segments != "mae":
        orders.append(("raster", True))
    for K, (order, skip) in itertools.product(last_ranks, orders):
        config = small(grid, segments, hierarchy, order=order, last_rank=K, skip=skip, dim=8)
        for trim in paths(config):
            assert_no_leak(config, trim, seed=1)


def test_no_leak_for_random_configurations():
    """Of larger grids, other depths and patch sizes, too."""
    rng = np.random.default_rng(2)
    tried = set()
    for seed in range(16):
        config = random_config(rng, dim=8)
        for trim in paths(config):
            assert_no_leak(config, trim, seed)
            tried.add((config.segments, trim))
    assert len(tried) == 3 * 2 + 2  # each strategy, on each of its paths


@every_strategy
def test_every_row_of_every_attention_may_look_at_something(grid, segments, hierarchy, last_ranks):
    """Some kernels return NaN for a row that may look at nothing. Nor is a batch harmful in which
    every sample is a single segment, so that nothing is predicted."""
    config = small(grid, segments, hierarchy, last_rank=last_ranks[-1])
    model = randsac.RandSAC(config)
    masks = []
    for part in model.modules():
        if isinstance(part, randsac.Attention):
            part.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[2]))
    images = torch.randn(4, 3, 2 * grid, 2 * grid)
    ranks = randsac.sample_ranks(config, 4)
    for trim in paths(config):
        model(images, ranks, trim=trim)
    loss = model(images, torch.zeros_like(ranks))
    loss.backward()
    assert loss == 0
    for parameter in model.parameters():
        assert (parameter.grad == 0).all()
    assert len(masks) == 6 * (len(paths(config)) + 1)
    for mask in masks:
        assert mask.any(-1).all()


# --- an independent slow version: one sample, one token, one head at a time, and no masks; what it
# --- is given grows by one segment a step


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights, name, x):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def mlp(weights, name, x):
    return linear(weights, f"{name}.2", F.gelu(linear(weights, f"{name}.0", x)))


def slow_attention(weights, name, heads, queries, memory, allowed):
    """Each query attends to the list of memory rows that `allowed` gives it."""
    D = queries.shape[-1]
    d = D // heads
    rows = []
    for row, seen in zip(queries, allowed):
        query = linear(weights, f"{name}.query", row)
        key_value = linear(weights, f"{name}.key_value", memory[seen])
        parts = []
        for start in range(0, D, d):
            key = key_value[:, start : start + d]
            value = key_value[:, D + start : D + start + d]
            share = torch.softmax(key @ query[start : start + d] / math.sqrt(d), 0)
            parts.append(share @ value)
        rows.append(linear(weights, f"{name}.out", torch.cat(parts)))
    return torch.stack(rows)


def slow_encoder(model, tokens, place, ranks):
    """Outputs of all layers for these tokens alone."""
    config = model.config
    w = model.state_dict()
    earlier = [[j for j, b in enumerate(ranks) if b <= a] for a in ranks]
    x = linear(w, "embed", tokens) + place
    layers = []
    for k in range(config.depth):
        name = f"encoder.{k}"
        y = norm(w, f"{name}.norm_attention", x)
        x = x + slow_attention(w, f"{name}.attention", config.heads, y, y, earlier)
        x = x + mlp(w, f"{name}.mlp", norm(w, f"{name}.norm_mlp", x))
        layers.append(x)
    return layers


def slow_predict(model, image, ranks):
    """Predictions of one image's tokens of rank >= 1 -> {token: prediction}."""
    config = model.config
    w = model.state_dict()
    tokens = randsac.patchify(image[None], config.patch_size)[0]
    place = randsac.positions(config.grid, config.grid, config.dim).double()
    predictions = {}
    for step in range(1, max(ranks) + 1):
        past = [n for n, rank in enumerate(ranks) if rank < step]  # all that is given
        layers = slow_encoder(model, tokens[past], place[past], [ranks[n] for n in past])

        asked = [n for n, rank in enumerate(ranks) if 1 <= rank <= step]
        lateral = [[j for j, b in enumerate(asked) if ranks[b] <= ranks[a]] for a in asked]
        context = [[j for j, b in enumerate(past) if ranks[b] < ranks[a]] for a in asked]
        y = place[asked]
        for layer in range(config.decoder_depth):
            name = f"decoder.{layer}"
            Z = layers[-1]
            if config.skip:
                Z = sum(w["skip"][layer, k] * layers[k] for k in range(config.depth))
            z = norm(w, f"{name}.norm_self", y)
            y = y + slow_attention(w, f"{name}.self_attention", config.heads, z, z, lateral)
            z = norm(w, f"{name}.norm_cross", y)
            Z = norm(w, f"{name}.norm_memory", Z)
            y = y + slow_attention(w, f"{name}.cross_attention", config.heads, z, Z, context)
            y = y + mlp(w, f"{name}.mlp", norm(w, f"{name}.norm_mlp", y))
        prediction = linear(w, "head.1", norm(w, "head.0", y))
        for n, value in zip(asked, prediction):
            if ranks[n] == step:
                predictions[n] = value
    return predictions


def test_predictions_equal_the_slow_version():
    rng = np.random.default_rng(6)
    configs = [small(4, "square", (4,))]
    while len(configs) < 12:
        config = random_config(rng)
        if config.tokens <= 9:
            configs.append(config)
    assert {config.segments for config in configs} == {*randsac.HIERARCHIES}
    assert any(config.last_rank for config in configs)
    for seed, config in enumerate(configs):
        model = random_model(config, seed)
        ranks = randsac.sample_ranks(config, 2, generator=randsac.seeded("cpu", seed))
        if seed == 0:
            ranks[:, 1:] = torch.randint(0, 5, (2, 15))  # any will do, not only a strategy's
            ranks[:, 0] = 0
        images = torch.randn(2, 3, config.image_size, config.image_size, dtype=torch.double)
        prediction = model.predict(images, ranks)
        assert torch.equal(prediction.isnan().all(-1), ranks == 0)
        for b in range(2):
            slow = slow_predict(model, images[b], ranks[b].tolist())
            assert sorted(slow) == ranks[b].nonzero()[:, 0].tolist()
            for n, value in slow.items():
                assert torch.allclose(prediction[b, n], value, atol=1e-9), config


# --- the two paths


TRIMMED = []
for *strategy, last_ranks in STRATEGIES:
    if strategy[1] in ("patch", "square", "mae"):
        TRIMMED += [(*strategy, K) for K in last_ranks]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("grid, segments, hierarchy, K", TRIMMED)
def test_trimmed_path_is_the_masked_one(grid, segments, hierarchy, K, skip):
    """The same predictions, loss and gradients. Section 4.1: the last segment is left out of the
    encoder's input, the first of the decoder's."""
    config = small(grid, segments, hierarchy, last_rank=K, skip=skip)
    model = random_model(config)
    images = torch.randn(4, 3, 2 * grid, 2 * grid).double()
    ranks = randsac.sample_ranks(config, 4)

    losses = []
    gradients = []
    for trim in (False, True):
        loss = model(images, ranks, trim=trim)
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert torch.allclose(*losses, atol=1e-10)
    for masked, trimmed in zip(*gradients):
        assert torch.allclose(masked, trimmed, atol=1e-9)

    tokens = randsac.patchify(images, 2)
    masked = model.decode(tokens, ranks)
    entered = []
    for part in (model.encoder[0], model.decoder[0]):
        part.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].shape[1]))
    trimmed, which = model.decode_trimmed(tokens, ranks)
    assert torch.allclose(randsac.take(masked, which), trimmed, atol=1e-10)
    for b in range(4):
        assert sorted(which[b].tolist()) == ranks[b].nonzero()[:, 0].tolist()
    sizes = ranks[0].bincount().tolist()
    assert entered == [grid**2 - sizes[-1], grid**2 - sizes[0]]


@pytest.mark.parametrize("segments", ["blob", "scatter"])
def test_segments_of_varying_size_cannot_be_trimmed(segments):
    config = micro(segments=segments, hierarchy=(4,))
    ranks = randsac.sample_ranks(config, 2)
    with pytest.raises(randsac.UserError, match=f"{segments} segments vary in size"):
        randsac.RandSAC(config)(torch.randn(2, 3, 16, 16), ranks, trim=True)


# --- how a model begins


def test_every_decoder_layer_begins_by_reading_the_last_encoder_layer():
    model = randsac.RandSAC(micro(depth=3, decoder_depth=2))
    assert model.skip.tolist() == [[0, 0, 1], [0, 0, 1]]


def test_products_begin_as_xavier_says():
    """Uniform within sqrt(6 / (inputs + outputs)), biases 0, at every one of them."""
    model = randsac.RandSAC(micro(dim=64, heads=4))
    layers = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    assert len(layers) == 1 + 2 * 5 + 2 * 8 + 1
    for layer in layers:
        share = layer.weight.detach() / math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.99 < share.abs().max() <= 1 + 1e-6
        assert share.abs().mean().item() == pytest.approx(0.5, rel=0.05)
        assert share.mean().abs() < 0.05
        assert (layer.bias == 0).all()


@pytest.mark.parametrize("skip", [True, False])
def test_every_parameter_is_trained(skip):
    model = randsac.RandSAC(micro(skip=skip))
    ranks = randsac.sample_ranks(model.config, 4)
    for trim in (True, False):
        loss = model(torch.randn(4, 3, 16, 16), ranks, trim=trim)
        # Of one that is not used there is no gradient: several processes would wait for ever.
        for gradient in torch.autograd.grad(loss, list(model.parameters())):
            assert gradient.any()


# --- features and positions


def test_encode_equals_the_slow_version():
    """In which every token sees all others of its image: the rank of all is 0."""
    model = random_model(micro(depth=3))
    images = torch.randn(2, 3, 8, 12).double()  # another grid than the Config's
    layers = model.encode_layers(images)
    tokens = randsac.patchify(images, 4)
    place = randsac.positions(2, 3, 16).double()
    for b in range(2):
        slow = slow_encoder(model, tokens[b], place, [0] * 6)
        for ours, theirs in zip(layers, slow, strict=True):
            assert torch.allclose(ours[b], theirs, atol=1e-10)
    assert torch.allclose(model.encode(images), F.layer_norm(layers[-1], (16,)))


@pytest.mark.parametrize("dtype, near", [("float64", 1e-4), ("float16", 0.01), ("bfloat16", 0.1)])
def test_a_model_of_any_dtype_encodes(dtype, near):
    config = micro(dim=64, heads=4, depth=4)
    model = randsac.RandSAC(config)
    images = torch.rand(4, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        expected = model.encode(images)
        model = model.to(getattr(torch, dtype))
        features = model.encode(images)
        layers = model.encode_layers(images)
    assert {layer.dtype for layer in [*layers, features]} == {getattr(torch, dtype)}
    assert features.isfinite().all()
    assert (features - expected).abs().max() < near
    assert expected.abs().max() > 2


def test_positions_are_those_of_the_formula():
    """Half of the width codes the row, half the column: sines, then cosines, whose wavelengths go
    from 2 pi to nearly 10,000 times that."""
    for dim in (4, 8, 20, 64, 192, 768):
        n = dim // 4
        frequency = 1 / np.power(10_000.0, np.arange(n) / n)
        code = randsac.positions(3, 5, dim)
        assert code.shape == (15, dim)
        for row in range(3):
            for col in range(5):
                angle = np.concatenate([row * frequency, col * frequency])
                expected = np.concatenate([np.sin(angle), np.cos(angle)])
                assert np.abs(code[5 * row + col].numpy() - expected).max() < 1e-5, dim
