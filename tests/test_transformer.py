"""Section 4: the masked transformer and its skip connections. No information may reach a prediction from its own or a
later segment: shown by gradients (exact zeros), by perturbation, and against a slow version that never sees the future."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import micro, random_config, random_model

import randsac


def test_masks_of_figure_4():
    source, target, memory = randsac.attention_masks(torch.tensor([0, 0, 1, 1, 2, 2]))  # green, blue, red
    t = True
    assert source[:4, :4].tolist() == [[t, t, 0, 0], [t, t, 0, 0], [t, t, t, t], [t, t, t, t]]
    assert target[2:, 2:].tolist() == [[t, t, 0, 0], [t, t, 0, 0], [t, t, t, t], [t, t, t, t]]
    assert memory[2:, :4].tolist() == [[t, t, 0, 0], [t, t, 0, 0], [t, t, t, t], [t, t, t, t]]
    assert not target[:2].any() and not target[:, :2].any() and not memory[:2].any()  # the first segment asks nothing


def test_masks_are_the_three_comparisons_of_ranks():
    ranks = randsac.sample_ranks(micro(segments="blob", hierarchy=(5,)), 3)
    for mask, rule in zip(randsac.attention_masks(ranks), [lambda i, j: i >= j, lambda i, j: i >= j >= 1, lambda i, j: i > j]):
        assert mask.dtype == torch.bool and mask.shape == (3, 16, 16)
        for b in range(3):
            r = ranks[b].tolist()
            assert mask[b].tolist() == [[rule(i, j) for j in r] for i in r]


def run(model, images, ranks, trim):
    """-> predictions [B,n,PPC], their ranks [B,n]"""
    if not trim:
        prediction = model.predict(images, ranks)
        return prediction, ranks
    tokens = randsac.patchify(images, model.config.patch_size)
    prediction, queries, _ = model.decode(tokens, ranks, trim=True)
    return prediction, ranks.gather(1, queries)


def assert_no_leak(config, trim, seed):
    model = random_model(config, seed)
    generator = randsac.seeded("cpu", seed)
    ranks = randsac.sample_ranks(config, 2, generator=generator)
    images = torch.randn(2, 3, config.image_size, config.image_size, generator=generator, dtype=torch.double)
    images.requires_grad_()
    prediction, rank = run(model, images, ranks, trim)
    weight = torch.randn(prediction.shape, generator=generator, dtype=torch.double)
    for r in range(1, int(ranks.max()) + 1):
        chosen = (prediction * weight)[rank == r].sum()
        gradient, = torch.autograd.grad(chosen, images, retain_graph=True)
        gradient = randsac.patchify(gradient, config.patch_size).abs().amax(-1)  # [B,N]
        there = (ranks == r).any(1, keepdim=True)
        assert (gradient[ranks >= r] == 0).all(), (config, r)
        assert (gradient[(ranks < r) & there] > 0).all(), (config, r)

        noise = torch.randn(images.shape, generator=generator, dtype=torch.double)
        hidden = randsac.unpatchify((ranks >= r)[..., None].expand(-1, -1, 3 * config.patch_size**2), config.patch_size)
        again, _ = run(model, torch.where(hidden, noise, images), ranks, trim)
        known = (rank <= r) & (rank > 0)
        assert torch.equal(again[known], prediction[known]), (config, r)


GRID_8 = [("patch", ()), ("square", (4,)), ("square", (16,)), ("square", (64,)), ("square", (16, 4)), ("square", (64, 16, 4)),
          ("blob", (3,)), ("blob", (11, 5)), ("blob", (16, 7, 3)), ("scatter", (9,)), ("scatter", (11, 5)), ("mae", ())]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("segments, hierarchy", GRID_8)
def test_no_leak_for_every_strategy(segments, hierarchy, skip):
    for order in ("random", "raster"):
        config = micro(image_size=16, patch_size=2, segments=segments, hierarchy=hierarchy, skip=skip, order=order)
        for trim in [False, True] if randsac.segment_sizes(config) else [False]:
            assert_no_leak(config, trim, seed=1)


def test_no_leak_for_200_random_configurations():
    rng, paths = np.random.default_rng(2), [0, 0]
    for seed in range(200):
        config = random_config(rng)
        trim = bool(randsac.segment_sizes(config)) and bool(rng.integers(2))
        assert_no_leak(config, trim, seed)
        paths[trim] += 1
    assert min(paths) > 40  # both paths were tried


def test_no_leak_when_ranks_are_arbitrary():
    config = micro(image_size=8, patch_size=2)  # any ranks will do, not only a strategy's
    model = random_model(config)
    ranks = torch.randint(0, 5, (3, 16), generator=randsac.seeded("cpu", 0))
    images = torch.randn(3, 3, 8, 8).double().requires_grad_()
    prediction = model.predict(images, ranks)
    assert torch.equal(prediction.isnan().all(-1), ranks == 0)
    for b, n in [(0, 3), (1, 7), (2, 15)]:
        gradient, = torch.autograd.grad(prediction[b, n].nan_to_num().sum(), images, retain_graph=True)
        gradient = randsac.patchify(gradient, 2).abs().amax(-1)
        assert torch.equal(gradient[b] > 0, ranks[b] < ranks[b, n])


# --- an independent slow version: one sample, one token, one head at a time, no masks; the context grows by one segment

def slow_attention(weights, name, heads, queries, memory, allowed):
    """Each query attends to the list of memory rows that `allowed` gives it."""
    linear = lambda part, x: x @ weights[f"{name}.{part}.weight"].T + weights[f"{name}.{part}.bias"]  # noqa: E731
    D = queries.shape[-1]
    d, rows = D // heads, []
    for i, row in enumerate(queries):
        seen = memory[allowed[i]]
        q, keys, values = linear("query", row), linear("key_value", seen)[:, :D], linear("key_value", seen)[:, D:]
        parts = []
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            weight = torch.softmax((keys[:, part] @ q[part]) / d ** 0.5, 0)
            parts.append(weight @ values[:, part])
        rows.append(linear("out", torch.cat(parts)))
    return torch.stack(rows)


def slow_predict(model, image, ranks):
    """Predictions of one image's tokens of rank >= 1 -> {token: prediction}."""
    config, w = model.config, model.state_dict()
    norm = lambda name, x: F.layer_norm(x, (config.dim,), w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    mlp = lambda name, x: F.gelu(x @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"]) @ w[f"{name}.2.weight"].T + w[f"{name}.2.bias"]  # noqa: E731
    tokens = randsac.patchify(image[None], config.patch_size)[0]
    place = randsac.positions(config.grid, config.grid, config.dim).double()
    out = {}
    for step in range(1, max(ranks) + 1):
        past = [n for n in range(len(ranks)) if ranks[n] < step]  # all that the encoder is given
        x, layers = tokens[past] @ w["embed.weight"].T + w["embed.bias"] + place[past], []
        causal = [[j for j, b in enumerate(past) if ranks[b] <= ranks[a]] for a in past]
        for k in range(config.depth):
            y = norm(f"encoder.{k}.norm_attention", x)
            x = x + slow_attention(w, f"encoder.{k}.attention", config.heads, y, y, causal)
            x = x + mlp(f"encoder.{k}.mlp", norm(f"encoder.{k}.norm_mlp", x))
            layers.append(x)
        asked = [n for n in range(len(ranks)) if 1 <= ranks[n] <= step]  # the target positions so far
        lateral = [[j for j, b in enumerate(asked) if ranks[b] <= ranks[a]] for a in asked]
        context = [[j for j, b in enumerate(past) if ranks[b] < ranks[a]] for a in asked]
        y = place[asked]
        for l in range(config.decoder_depth):
            Z = sum(w["skip"][l, k] * layers[k] for k in range(config.depth)) if config.skip else layers[-1]
            z = norm(f"decoder.{l}.norm_self", y)
            y = y + slow_attention(w, f"decoder.{l}.self_attention", config.heads, z, z, lateral)
            y = y + slow_attention(w, f"decoder.{l}.cross_attention", config.heads, norm(f"decoder.{l}.norm_cross", y),
                                   norm(f"decoder.{l}.norm_memory", Z), context)
            y = y + mlp(f"decoder.{l}.mlp", norm(f"decoder.{l}.norm_mlp", y))
        prediction = norm("head.0", y) @ w["head.1.weight"].T + w["head.1.bias"]
        out.update({n: prediction[i] for i, n in enumerate(asked) if ranks[n] == step})
    return out


def test_predictions_equal_the_slow_version():
    rng = np.random.default_rng(3)
    for seed in range(25):
        config = random_config(rng, **(dict(image_size=8, patch_size=2, segments="square", hierarchy=(4,)) if seed < 2 else {}))
        if config.tokens > 16:
            continue
        model = random_model(config, seed)
        ranks = randsac.sample_ranks(config, 2, generator=randsac.seeded("cpu", seed))
        images = torch.randn(2, 3, config.image_size, config.image_size, dtype=torch.double)
        prediction = model.predict(images, ranks)
        for b in range(2):
            slow = slow_predict(model, images[b], ranks[b].tolist())
            assert sorted(slow) == [n for n in range(config.tokens) if ranks[b, n] > 0]
            for n, value in slow.items():
                assert torch.allclose(prediction[b, n], value, atol=1e-9), config


@pytest.mark.parametrize("segments, hierarchy", [c for c in GRID_8 if c[0] in ("patch", "square", "mae")])
@pytest.mark.parametrize("skip", [True, False])
def test_trimmed_path_has_the_loss_and_gradients_of_the_masked_one(segments, hierarchy, skip):
    config = micro(image_size=16, patch_size=2, segments=segments, hierarchy=hierarchy, skip=skip)
    model, images = random_model(config).float(), torch.randn(4, 3, 16, 16)
    ranks = randsac.sample_ranks(config, 4)
    results = []
    for trim in (False, True):
        model.zero_grad()
        loss = model(images, ranks, trim=trim)
        loss.backward()
        results.append((loss, [p.grad.clone() for p in model.parameters()]))
    (loss, gradients), (trimmed, trimmed_gradients) = results
    assert torch.allclose(loss, trimmed, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, trimmed_gradients))


def test_segments_of_varying_size_cannot_be_trimmed():
    config = micro(segments="blob", hierarchy=(4,))
    with pytest.raises(ValueError):
        randsac.RandSAC(config)(torch.randn(2, 3, 16, 16), randsac.sample_ranks(config, 2), trim=True)


def test_rows_without_anything_to_attend_to_are_zero_and_harmless():
    layer = randsac.Attention(16, 2)
    x = torch.randn(2, 5, 16, requires_grad=True)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[:, :, 2] = False
    y = layer(x, x, mask)
    assert torch.allclose(y[:, 2], layer.out.bias.expand(2, -1), atol=1e-6)
    y.sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()
    everything = randsac.RandSAC(micro(segments="blob", hierarchy=(5,)))
    everything(torch.randn(8, 3, 16, 16), torch.zeros(8, 16, dtype=torch.long)).backward()  # nothing to predict at all
    assert all(torch.isfinite(p.grad).all() for p in everything.parameters())


def test_skips_are_the_sum_of_the_formula_and_begin_as_the_vanilla_decoder():
    config = micro(depth=3, decoder_depth=2)
    model, layers = random_model(config), [torch.randn(2, 5, 16).double() for _ in range(3)]
    for l, Z in enumerate(model.mix_skips(layers)):
        assert torch.allclose(Z, sum(model.skip[l, k] * layers[k] for k in range(3)))
    torch.manual_seed(0)
    with_skip = randsac.RandSAC(config)
    vanilla = randsac.RandSAC(micro(depth=3, decoder_depth=2, skip=False))
    vanilla.load_state_dict({k: v for k, v in with_skip.state_dict().items() if k != "skip"})
    images, ranks = torch.randn(2, 3, 16, 16), randsac.sample_ranks(config, 2)
    assert with_skip.skip.shape == (2, 3) and torch.allclose(with_skip(images, ranks), vanilla(images, ranks), atol=1e-6)


def test_every_parameter_is_trained():
    for skip in (True, False):
        model = randsac.RandSAC(micro(skip=skip))
        model(torch.randn(4, 3, 16, 16), randsac.sample_ranks(model.config, 4), trim=True).backward()
        assert all(p.grad is not None for p in model.parameters())  # else several processes would wait for ever
        silent = [name for name, p in model.named_parameters() if not p.grad.any()]
        assert not silent


def test_encode_is_unmasked_and_takes_other_grids():
    config = micro()
    model = random_model(config)
    images = torch.randn(2, 3, 16, 16).double().requires_grad_()
    features = model.encode(images)
    assert features.shape == (2, 16, 16) and len(model.encode_layers(images)) == config.depth
    gradient, = torch.autograd.grad((features * torch.randn_like(features))[0, 0].sum(), images)
    assert (randsac.patchify(gradient, 4)[0].abs().amax(-1) > 0).all()  # the first token sees all others
    assert torch.allclose(F.layer_norm(model.encode_layers(images)[-1], (16,)), features)
    for rows, cols in [(5, 5), (2, 7)]:
        assert model.encode(torch.randn(1, 3, 4 * rows, 4 * cols).double()).shape == (1, rows * cols, 16)


def test_positions_are_fixed_and_tell_all_tokens_apart():
    code = randsac.positions(8, 8, 32)
    assert code.shape == (64, 32) and torch.equal(code, randsac.positions(8, 8, 32))
    assert torch.cdist(code, code).add(torch.eye(64) * 9).min() > 0.5
    assert all(randsac.positions(1, 2, dim).shape == (2, dim) for dim in range(4, 2000, 4))
    assert torch.equal(randsac.positions(8, 3, 32).view(8, 3, 32), code.view(8, 8, 32)[:, :3])  # a place is a place in any grid


def test_attention_weights_are_those_of_the_output():
    layer = randsac.Attention(16, 4).double()
    x, memory = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    mask = torch.rand(2, 1, 5, 7) < 0.6
    mask[0, 0, 3] = False
    weights = layer.weights(x, memory, mask)
    values = layer.split(x, memory)[2]
    assert torch.allclose(layer.out((weights @ values).transpose(1, 2).flatten(2)), layer(x, memory, mask))
    assert (weights.masked_select(~mask) == 0).all()
