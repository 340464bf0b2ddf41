"""Section 4: the masked transformer and its skip connections. No information may reach a prediction
from its own or a later segment: shown by gradients (exact zeros), by perturbation (not a bit
changes), and against a slow version that is never given the future. All in float64. (Masks and
skips are tested alone in test_exercises.py.)"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import micro, random_config, random_model

import randsac

# --- nothing leaks


def run(model, images, ranks, trim):
    """-> predictions [B,n,PPC], their ranks [B,n], by either path."""
    if not trim:
        return model.predict(images, ranks), ranks
    tokens = randsac.patchify(images, model.config.patch_size)
    prediction, which = model.decode_trimmed(tokens, ranks)
    return prediction, ranks.gather(1, which)


def count_segments(config):
    """Of a sample, at most."""
    if config.segments == "mae":
        return 2
    count = config.hierarchy[0] if config.hierarchy else config.tokens
    return min(count, config.last_rank + 1) if config.last_rank else count


def assert_no_leak(config, trim, seed):
    model = random_model(config, seed)
    generator = randsac.seeded("cpu", seed)

    # As many samples as segments, each with an order of its own and asked for another step.
    B = max(4, count_segments(config))
    side = config.image_size
    ranks = randsac.sample_ranks(config, B, generator=generator)  # [B,N]
    images = torch.randn(B, 3, side, side, generator=generator, dtype=torch.double)
    images.requires_grad_()
    last = ranks.amax(1, keepdim=True)
    step = 1 + torch.arange(B)[:, None] % last.clamp(min=1)  # [B,1]
    prediction, rank = run(model, images, ranks, trim)
    assert ((ranks > 0).sum(1) == (rank > 0).sum(1)).all()  # every one of rank >= 1 is predicted

    # By gradient. A prediction hangs on no token of its own or a later segment, and on every token
    # of an earlier one. (A sample of a single segment predicts nothing.)
    asked = rank == step
    assert torch.equal(asked.any(1, keepdim=True), last > 0)
    weight = torch.randn(prediction.shape, generator=generator, dtype=torch.double)
    (gradient,) = torch.autograd.grad((prediction * weight)[asked].sum(), images)
    gradient = randsac.patchify(gradient, config.patch_size).abs().amax(-1)  # [B,N]
    assert (gradient[ranks >= step] == 0).all(), config
    assert (gradient[(ranks < step) & (last > 0)] > 0).all(), config

    # By perturbation. Other pixels from this step on: predictions up to it keep every bit, and all
    # later ones, which see the new pixels, change.
    tokens = (ranks >= step)[..., None].expand(-1, -1, 3 * config.patch_size**2)
    hidden = randsac.unpatchify(tokens, config.patch_size)
    noise = torch.randn(images.shape, generator=generator, dtype=torch.double)
    again, _ = run(model, torch.where(hidden, noise, images), ranks, trim)
    before = (rank <= step) & (rank > 0)
    assert torch.equal(again[before], prediction[before]), config
    after = rank > step
    assert (again[after] != prediction[after]).any(-1).all(), config


def all_orders():
    """(grid, segments, hierarchy): each strategy on small grids, squares on larger ones too."""
    found = [(6, "square", (9,)), (8, "square", (16, 4)), (4, "square", (16, 4))]
    found += [(4, "blob", (11, 5, 3)), (4, "scatter", (11, 5, 3))]
    for grid in (2, 3, 4):
        N = grid**2
        found += [(grid, "patch", ()), (grid, "mae", ())]
        found.append((grid, "square", (9 if grid == 3 else 4,)))
        for segments in ("blob", "scatter"):
            found += [(grid, segments, (N // 2 + 1,)), (grid, segments, (N, 2))]
    return found


def last_ranks(config):
    """0, and others that change something: the smallest, and the largest or, where that takes very
    many steps, one between."""
    largest = count_segments(config) - 2
    other = largest if largest < 20 else largest // 3
    return sorted({0, min(1, largest), other})


@pytest.mark.parametrize("grid, segments, hierarchy", all_orders())
def test_no_leak_for_every_strategy(grid, segments, hierarchy):
    settings = {"image_size": grid, "patch_size": 1, "segments": segments, "hierarchy": hierarchy}
    settings |= {"dim": 8}
    for order in ("random", "raster"):
        if segments == "mae" and order == "raster":
            continue
        for K in last_ranks(micro(**settings)):
            for skip in (True, False):
                config = micro(order=order, last_rank=K, skip=skip, **settings)
                assert_no_leak(config, trim=False, seed=1)
                if segments in ("patch", "square", "mae"):
                    assert_no_leak(config, trim=True, seed=1)


def test_no_leak_for_60_random_configurations():
    rng = np.random.default_rng(2)
    tried = {False: 0, True: 0}
    for seed in range(60):
        config = random_config(rng, dim=8)
        trim = config.segments in ("patch", "square", "mae") and bool(rng.integers(2))
        assert_no_leak(config, trim, seed)
        tried[trim] += 1
    assert min(tried.values()) > 10  # both paths were tried


@pytest.mark.parametrize("segments, hierarchy", [("square", (4,)), ("blob", (5, 2)), ("mae", ())])
def test_nobody_reads_what_the_given_find_in_the_decoder(segments, hierarchy):
    """In `decode` the rows of rank 0 look at everything. If they find something else, no bit of a
    prediction changes."""
    config = micro(segments=segments, hierarchy=hierarchy, decoder_depth=3)
    model = random_model(config)
    tokens = torch.randn(3, 16, 48).double()
    ranks = randsac.sample_ranks(config, 3)
    given = ranks == 0
    prediction = model.decode(tokens, ranks)

    def replace(module, inputs, output):
        return torch.where(given[..., None], 100 * torch.randn_like(output), output)

    for layer in model.decoder:
        layer.self_attention.register_forward_hook(replace)
        layer.cross_attention.register_forward_hook(replace)
    again = model.decode(tokens, ranks)
    assert torch.equal(again[~given], prediction[~given])
    assert (again[given] != prediction[given]).any(-1).all()


# --- no row of an attention is empty, and everything is finite

STRATEGIES = [
    ("patch", ()),
    ("square", (4,)),
    ("square", (16,)),
    ("square", (64,)),
    ("square", (16, 4)),
    ("square", (64, 16, 4)),
    ("blob", (3,)),
    ("blob", (11, 5)),
    ("blob", (16, 7, 3)),
    ("scatter", (9,)),
    ("scatter", (11, 5)),
    ("mae", ()),
]
TRIMMED = [strategy for strategy in STRATEGIES if strategy[0] in ("patch", "square", "mae")]
PATHS = [(*strategy, False) for strategy in STRATEGIES]
PATHS += [(*strategy, True) for strategy in TRIMMED]


@pytest.mark.parametrize("segments, hierarchy, trim", PATHS)
def test_every_row_of_every_attention_may_look_at_something(segments, hierarchy, trim):
    """Some kernels return NaN for a row that may look at nothing."""
    config = micro(image_size=16, patch_size=2, segments=segments, hierarchy=hierarchy)
    model = randsac.RandSAC(config)
    masks = []
    for part in model.modules():
        if isinstance(part, randsac.Attention):
            part.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[2]))
    model(torch.randn(4, 3, 16, 16), randsac.sample_ranks(config, 4), trim=trim)
    if not trim:  # samples of a single segment, too
        model(torch.randn(4, 3, 16, 16), torch.zeros(4, 64, dtype=torch.int64))
    assert len(masks) == (6 if trim else 12)
    for mask in masks:
        assert mask.any(-1).all()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("segments, hierarchy, trim", PATHS)
def test_losses_predictions_and_gradients_are_finite(segments, hierarchy, trim, dtype):
    settings = {"image_size": 16, "patch_size": 2, "segments": segments, "hierarchy": hierarchy}
    config = micro(**settings, last_rank=2 if len(hierarchy) == 2 else 0)
    model = randsac.RandSAC(config)
    images = torch.randn(4, 3, 16, 16)
    ranks = randsac.sample_ranks(config, 4)
    if not trim:
        ranks[0] = 0  # a sample in which nothing is predicted
    exact = model(images, ranks).item()
    if dtype == "float64":
        model = model.double()
        images = images.double()
    low = dtype in ("bfloat16", "float16")
    with torch.autocast("cpu", getattr(torch, dtype) if low else None, enabled=low):
        prediction, rank = run(model, images, ranks, trim)
        loss = model(images, ranks, trim=trim)
    assert prediction.dtype == getattr(torch, dtype)
    assert prediction[rank > 0].isfinite().all()
    assert loss.item() == pytest.approx(exact, rel=0.02)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_a_batch_in_which_nothing_is_predicted_is_harmless():
    model = randsac.RandSAC(micro(segments="blob", hierarchy=(5,)))
    loss = model(torch.randn(8, 3, 16, 16), torch.zeros(8, 16, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    for parameter in model.parameters():
        assert (parameter.grad == 0).all()


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
    rng = np.random.default_rng(3)
    settings = {"image_size": 8, "patch_size": 2, "segments": "square", "hierarchy": (4,)}
    configs = [random_config(rng, **settings) for _ in range(2)]
    while len(configs) < 24:
        config = random_config(rng)
        if config.tokens <= 16:
            configs.append(config)
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
            assert sorted(slow) == [n for n in range(config.tokens) if ranks[b, n] > 0]
            for n, value in slow.items():
                assert torch.allclose(prediction[b, n], value, atol=1e-9), config


# --- the two paths


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("segments, hierarchy", TRIMMED)
def test_trimmed_path_is_the_masked_one(segments, hierarchy, skip):
    """The same predictions, loss and gradients, with and without a last rank."""
    settings = {"image_size": 16, "patch_size": 2, "segments": segments, "hierarchy": hierarchy}
    for K in last_ranks(micro(**settings)):
        config = micro(last_rank=K, skip=skip, **settings)
        model = random_model(config)
        images = torch.randn(4, 3, 16, 16).double()
        ranks = randsac.sample_ranks(config, 4)

        predictions = model.decode(randsac.patchify(images, 2), ranks)
        trimmed, which = model.decode_trimmed(randsac.patchify(images, 2), ranks)
        assert torch.allclose(randsac.take(predictions, which), trimmed, atol=1e-10)
        for b in range(4):
            assert sorted(which[b].tolist()) == ranks[b].nonzero()[:, 0].tolist()

        losses = []
        gradients = []
        for trim in (False, True):
            model.zero_grad()
            loss = model(images, ranks, trim=trim)
            loss.backward()
            losses.append(loss)
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        assert torch.allclose(*losses, atol=1e-10)
        for masked, trimmed in zip(*gradients):
            assert torch.allclose(masked, trimmed, atol=1e-9)


@pytest.mark.parametrize("segments, hierarchy", [("square", (4,)), ("patch", ()), ("mae", ())])
def test_trimmed_path_leaves_the_ends_out(segments, hierarchy):
    """Section 4.1: the last segment of the encoder's input, the first of the decoder's."""
    for K in last_ranks(micro(segments=segments, hierarchy=hierarchy)):
        config = micro(segments=segments, hierarchy=hierarchy, last_rank=K)
        model = random_model(config)
        inputs = [[], []]
        for part, kept in zip((model.encoder[0], model.decoder[0]), inputs):
            part.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0]))
        ranks = randsac.sample_ranks(config, 2)
        model.decode_trimmed(torch.randn(2, 16, 48).double(), ranks)
        sizes = ranks[0].bincount().tolist()
        ((encoder_input,), (decoder_input,)) = inputs
        assert encoder_input.shape == (2, 16 - sizes[-1], 16)
        assert decoder_input.shape == (2, 16 - sizes[0], 16)


@pytest.mark.parametrize("segments", ["blob", "scatter"])
def test_segments_of_varying_size_cannot_be_trimmed(segments):
    config = micro(segments=segments, hierarchy=(4,))
    ranks = randsac.sample_ranks(config, 2)
    with pytest.raises(randsac.UserError, match=f"{segments} segments vary in size"):
        randsac.RandSAC(config)(torch.randn(2, 3, 16, 16), ranks, trim=True)


# --- skips, initialization, parameters


def test_every_decoder_layer_begins_by_reading_the_last_encoder_layer():
    model = randsac.RandSAC(micro(depth=3, decoder_depth=2))
    assert model.skip.tolist() == [[0, 0, 1], [0, 0, 1]]


def test_products_begin_as_xavier_says():
    """Uniform within sqrt(6 / (inputs + outputs)), biases 0, at every one of them."""
    model = randsac.RandSAC(micro(dim=64, heads=4))
    layers = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    assert len(layers) == 1 + 2 * 5 + 2 * 8 + 1
    for layer in layers:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        size = layer.weight.detach().abs().double()
        assert size.max() <= bound + 1e-6
        assert size.max() > 0.99 * bound
        assert size.mean().item() == pytest.approx(bound / 2, rel=0.05)
        assert layer.weight.mean().abs() < 0.05 * bound
        assert (layer.bias == 0).all()


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_every_parameter_is_trained(skip, trim):
    model = randsac.RandSAC(micro(skip=skip))
    ranks = randsac.sample_ranks(model.config, 4)
    model(torch.randn(4, 3, 16, 16), ranks, trim=trim).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # else several processes would wait for ever
        assert parameter.grad.any(), name


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
