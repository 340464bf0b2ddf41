"""Grades the exercises of the assignment: `pytest -m exercise3` grades the third alone, `pytest`
all.

Any correct solution passes. Inputs are fixed and no test calls the function of another exercise, so
that the exercises can be solved in any order."""

import math
from collections import Counter

import pytest
import torch
from conftest import micro

import randsac

# --- 1: tokens (Section 3.1)


@pytest.mark.exercise1
def test_tokens_are_the_patches_row_by_row():
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)  # every value is there once
    tokens = randsac.patchify(images, 2)
    shape = list(tokens.shape)
    assert shape == [2, 6, 12], (
        f"4 x 6 pixels are 2 x 3 tokens of 2 * 2 * 3 values: [2, 6, 12], not {shape}"
    )
    for b in range(2):
        for i in range(6):
            row = i // 3
            col = i % 3
            patch = images[b, :, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
            assert sorted(tokens[b, i].tolist()) == sorted(patch.flatten().tolist()), (
                f"token {i} is the patch at row {i} // 3 = {row} and column {i} % 3 = {col} of the "
                f"2 x 3 patches"
            )


@pytest.mark.exercise1
def test_values_in_a_token_are_pixels_row_by_row_each_with_its_channels():
    image = torch.arange(3 * 4 * 4).view(1, 3, 4, 4)
    token = randsac.patchify(image, 4)[0, 0]  # the image is one patch
    for y in range(4):
        for x in range(4):
            start = (4 * y + x) * 3
            assert token[start : start + 3].tolist() == image[0, :, y, x].tolist(), (
                f"a token is [P,P,C]: the 3 channels of the pixel at row {y}, column {x} begin at "
                f"(4 * {y} + {x}) * 3 = {start}"
            )


@pytest.mark.exercise1
def test_a_patch_size_that_does_not_divide_the_image_is_refused():
    for height, width in [(4, 6), (6, 4)]:
        with pytest.raises(ValueError):  # UserError is one: call check(condition, message)
            randsac.patchify(torch.zeros(1, 3, height, width), 4)


# --- 2: square segments (Section 3.2)


@pytest.mark.exercise2
def test_squares_are_M_by_M_tokens():
    for grid, count, M in [(4, 4, 2), (8, 16, 2), (8, 4, 4), (6, 9, 2), (6, 4, 3), (4, 16, 1)]:
        ids = randsac.square_segments(grid, count)
        N = grid * grid
        shape = list(ids.shape)
        assert shape == [N], f"one id for each of the {grid} x {grid} tokens: [{N}], not {shape}"
        assert ids.dtype == torch.int64, f"ids are int64, not {ids.dtype}"
        low = int(ids.min())
        high = int(ids.max())
        assert 0 <= low, f"ids are of 0..{N - 1}; here is one of {low}"
        assert high < N, f"ids are of 0..{N - 1}; here is one of {high}"
        square = [(i // grid // M, i % grid // M) for i in range(N)]
        for i in range(N):
            for j in range(i):
                together = square[i] == square[j]
                assert (ids[i] == ids[j]) == together, (
                    f"{grid} x {grid} tokens in {count} squares of M = {M}: token {j} "
                    f"(row {j // grid}, column {j % grid}) and token {i} (row {i // grid}, column "
                    f"{i % grid}) belong to {'one square' if together else 'two squares'}"
                )


# --- 3: blob segments (Section 3.2)


def winners(points, *gaussians):
    """Of Gaussians ((mean x, y), (deviations), angle), those that win these points (x, y)."""
    mean = torch.tensor([g[0] for g in gaussians], dtype=torch.double)
    deviation = torch.tensor([g[1] for g in gaussians], dtype=torch.double)
    angle = torch.tensor([g[2] for g in gaussians], dtype=torch.double)
    points = torch.tensor(points, dtype=torch.double)
    ids = randsac.nearest_gaussian(points[None], mean[None], deviation[None], angle[None])
    return ids[0].tolist()


@pytest.mark.exercise3
def test_distance_counts_in_deviations():
    wide = ((0, 0), (4, 1), 0)
    narrow = ((3, 0), (0.5, 0.5), 0)
    assert winners([(2, 0)], wide, narrow) == [0], (
        "(2, 0) is 2 / 4 deviations from the wide Gaussian at (0, 0) and 1 / 0.5 from the narrow "
        "one at (3, 0): the first wins, though the mean of the second is nearer, and its density "
        "there larger"
    )
    large = ((0, 0), (4, 4), 0)
    small = ((4.2, 0), (1, 1), 0)
    assert winners([(3, 0)], large, small) == [0], "3 / 4 deviations are less than 1.2 / 1"
    circle = ((0, 0), (2, 2), 0)
    assert winners([(0, 3)], wide, circle) == [1], (
        "(0, 3) lies along y, where the wide Gaussian deviates by 1 only"
    )


@pytest.mark.exercise3
def test_the_angle_turns_from_x_towards_y():
    long = ((0, 0), (4, 1), math.pi / 4)
    circle = ((0, 0), (2, 2), 0)
    assert winners([(2, 2), (2, -2)], long, circle) == [0, 1], (
        "turned by pi / 4 from x towards y, the long axis runs through (2, 2), not through (2, -2)"
    )


@pytest.mark.exercise3
def test_the_nearest_gaussian_is_that_of_the_formula():
    B, n, K = 3, 20, 4
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(B, n + 3 * K, 2, generator=generator, dtype=torch.double)
    points, mean, deviation, angle = drawn.split((n, K, K, K), 1)
    deviation = 0.1 + deviation
    angle = math.pi * angle[..., 0]
    nearest = randsac.nearest_gaussian(points, mean, deviation, angle)
    assert nearest.shape == (B, n), f"an index for each point: [B,n], not {list(nearest.shape)}"
    assert nearest.dtype == torch.int64, f"indices are int64, not {nearest.dtype}"
    for b in range(B):
        for i in range(n):
            squared = []
            for k in range(K):
                cos = angle[b, k].cos()
                sin = angle[b, k].sin()
                turn = torch.stack([cos, -sin, sin, cos]).view(2, 2)
                covariance = turn @ deviation[b, k].square().diag() @ turn.T
                offset = points[b, i] - mean[b, k]
                squared.append((offset @ covariance.inverse() @ offset).item())
            assert squared[nearest[b, i]] == min(squared), (
                f"sample {b}, point {i}: the squared Mahalanobis distances, offset S^-1 offset "
                f"with S = R diag(deviation^2) R^T, are {squared}, and Gaussian {nearest[b, i]} "
                f"was chosen"
            )


# --- 4: hierarchical serialization (Section 3.3)


@pytest.mark.exercise4
def test_raster_order_goes_by_first_tokens():
    # The ids say nothing of the order.
    fine = torch.tensor([[4, 1, 4, 1, 0, 0, 6, 1], [7, 7, 2, 2, 5, 5, 3, 3]])
    coarse = torch.tensor([[7, 3, 7, 3, 7, 7, 3, 3], [6, 6, 1, 1, 6, 6, 1, 1]])
    flat = randsac.serialize([fine], "raster").tolist()
    nested = randsac.serialize([fine, coarse], "raster").tolist()
    assert flat == [[0, 1, 0, 1, 2, 2, 3, 1], [0, 0, 1, 1, 2, 2, 3, 3]], (
        "a segment's place is that of its first token: in the first sample 4, 1, 0, 6"
    )
    assert nested == [[0, 2, 0, 2, 1, 1, 3, 2], [0, 0, 2, 2, 1, 1, 3, 3]], (
        "first sample: partition 7 holds token 0 and comes first, all of it (segments 4, 0); then "
        "partition 3 (1, 6)"
    )


# Levels of two samples of 12 tokens; the second sample has fewer segments.
NESTED = [
    torch.tensor([[9, 9, 2, 11, 0, 0, 5, 7, 7, 2, 11, 5], [3, 8, 8, 3, 1, 1, 10, 10, 3, 1, 10, 8]]),
    torch.tensor([[4, 4, 8, 8, 4, 4, 1, 6, 6, 8, 8, 1], [2, 2, 2, 2, 9, 9, 5, 5, 2, 9, 5, 2]]),
    torch.tensor([[0, 0, 3, 3, 0, 0, 3, 0, 0, 3, 3, 3], [7, 7, 7, 7, 7, 7, 5, 5, 7, 7, 5, 7]]),
]


@pytest.mark.exercise4
def test_random_ranks_are_dense_and_every_partition_is_finished_before_the_next():
    for depth in (1, 2, 3):
        levels = [level.repeat(30, 1) for level in NESTED[:depth]]
        ranks = randsac.serialize(levels, "random", torch.Generator().manual_seed(depth))
        shape = list(ranks.shape)
        assert shape == [60, 12], f"a rank for each token: [B,N] = [60, 12], not {shape}"
        assert ranks.dtype == torch.int64, f"ranks are int64, not {ranks.dtype}"
        for b, row in enumerate(ranks):
            K = len(levels[0][b].unique())
            assert row.unique().tolist() == list(range(K)), (
                f"{K} segments: ranks 0..{K - 1}, not {row.tolist()}"
            )
            for level in levels:
                ids = level[b]
                for part in ids.unique():
                    mine = row[ids == part].unique()
                    segments = levels[0][b][ids == part].unique()
                    assert len(mine) == len(segments), (
                        "the tokens of one finest segment, and no others, share a rank"
                    )
                    assert mine[-1] - mine[0] + 1 == len(mine), (
                        f"a partition of {len(mine)} segments is finished before the next begins, "
                        f"so that its ranks follow each other; here they are {mine.tolist()}"
                    )


@pytest.mark.exercise4
def test_every_order_is_equally_likely():
    gaps = [torch.tensor([3, 0, 2, 3])]  # 3 segments: 6 orders
    nested = [  # 2 partitions of 2 segments: 8 orders
        torch.tensor([6, 2, 5, 4, 4, 2, 6, 6]),
        torch.tensor([1, 1, 7, 7, 7, 1, 1, 1]),
    ]
    for levels, orders in [(gaps, 6), (nested, 8)]:
        expanded = [ids.expand(4000, -1) for ids in levels]
        ranks = randsac.serialize(expanded, "random", torch.Generator().manual_seed(1))
        counts = Counter(map(tuple, ranks.tolist()))
        expected = 4000 / orders
        words = (
            f"there are {orders} orders, and each comes in about {expected:.0f} of 4000 samples; "
            f"here: {dict(counts)}"
        )
        assert len(counts) == orders, words
        chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
        assert chi_square < 45, words  # above it by chance less than once in a million times


@pytest.mark.exercise4
def test_the_generator_decides_the_order():
    levels = [level.repeat(30, 1) for level in NESTED]
    first = randsac.serialize(levels, "random", torch.Generator().manual_seed(2))
    again = randsac.serialize(levels, "random", torch.Generator().manual_seed(2))
    assert torch.equal(first, again), (
        "draw from `generator` only: with the same seed the ranks are the same"
    )


# --- 5: attention masks (Section 4.1)


def mask_called(name, ranks):
    source, target, memory = randsac.attention_masks(ranks)
    return {"source": source, "target": target, "memory": memory}[name]


def compare_mask(name, may_see, rule):
    ranks = torch.tensor([[0, 2, 1, 0, 3, 1], [1, 1, 0, 2, 2, 3]])
    mask = mask_called(name, ranks)
    assert mask.dtype == torch.bool, f"{name} mask: bool, not {mask.dtype}"
    assert mask.shape == (2, 6, 6), f"{name} mask: [B,N,N] for ranks [B,N], not {list(mask.shape)}"
    for b, row in enumerate(ranks.tolist()):
        for i in range(6):
            for j in range(6):
                assert mask[b, i, j] == may_see(row[i], row[j]), (
                    f"{name} mask at row {i} (rank {row[i]}) and column {j} (rank {row[j]}) is "
                    f"wrong: {rule}"
                )
    alone = mask_called(name, ranks[0])
    assert torch.equal(alone, mask[0]), f"{name} mask: ranks [N], without a batch, give [N,N]"


@pytest.mark.exercise5
def test_source_mask():
    compare_mask(
        "source",
        lambda i, j: j <= i,
        "in the encoder a token sees its own segment and earlier ones",
    )


@pytest.mark.exercise5
def test_target_mask():
    compare_mask(
        "target",
        lambda i, j: 1 <= j <= i,
        "in the decoder a token sees its own segment and earlier ones, but no rank 0: it is not "
        "predicted",
    )


@pytest.mark.exercise5
def test_memory_mask():
    compare_mask(
        "memory",
        lambda i, j: j < i,
        "a prediction reads pixels of strictly earlier segments: its own segment is what it has to "
        "predict",
    )


# --- 6: trainable skip connections (Section 4.2)


def skip_model(W):
    """A model whose W is this one [L_dec,L_enc], and three encoder outputs: H^2 is 10 H^1, H^3 is
    100 H^1."""
    model = randsac.RandSAC(micro(depth=3, decoder_depth=len(W)))
    with torch.no_grad():
        model.skip.copy_(torch.tensor(W))
    H = 1 + torch.arange(2 * 5 * 16.0).view(2, 5, 16)
    return model, [H, 10 * H, 100 * H]


@pytest.mark.exercise6
def test_memory_of_a_decoder_layer_is_its_row_of_W_times_the_encoder_layers():
    for W in [[[3.0, 2, 1], [0, 5, 4], [-1, 0, 0]], [[0.5, 0, 2], [1, 1, 1]]]:
        model, layers = skip_model(W)
        memories = list(model.mix_skips(layers))
        assert len(memories) == len(W), (
            f"{len(W)} decoder layers have a memory each, not {len(memories)}"
        )
        for layer, (a, b, c) in enumerate(W):
            Z = memories[layer]
            assert Z.shape == layers[0].shape, (
                f"a memory has the shape of an encoder output, not {list(Z.shape)}"
            )
            expected = a + 10 * b + 100 * c
            assert torch.allclose(Z, expected * layers[0]), (
                f"Z of decoder layer {layer} = {a} H^1 + {b} H^2 + {c} H^3, by W[{layer}] as it "
                f"is: with H^2 = 10 H^1, H^3 = 100 H^1 that is {expected} H^1; here it begins with "
                f"{Z[0, 0, 0].item()} H^1"
            )


@pytest.mark.exercise6
def test_W_is_trained():
    model, layers = skip_model([[1.0, 0, 0], [0, 0, 1]])
    total = sum(Z.sum() for Z in model.mix_skips(layers))
    assert total.requires_grad, (
        "the gradient reaches W: use the parameter model.skip itself, not its numbers"
    )
    total.backward()
    words = "every entry of W gets a gradient"
    assert model.skip.grad is not None, words
    assert (model.skip.grad != 0).all(), words


@pytest.mark.exercise6
def test_without_skips_every_decoder_layer_reads_the_last_encoder_layer():
    model = randsac.RandSAC(micro(depth=3, decoder_depth=2, skip=False))
    layers = [torch.full((2, 5, 16), value) for value in (1.0, 2.0, 3.0)]
    memories = list(model.mix_skips(layers))
    words = (
        "with --no-skip (model.config.skip is False, there is no W) each of the 2 decoder layers "
        "reads H^3"
    )
    assert len(memories) == 2, words
    for Z in memories:
        assert torch.equal(Z, layers[-1]), words


# --- 7: patch-normalized loss (Section 5)


@pytest.mark.exercise7
def test_each_patch_is_normalized_by_its_own_mean_and_variance():
    tokens = torch.tensor(
        [[[1.0, 2, 3, 6], [10, 20, 30, 40]], [[5, 5, 5, 5], [0.001, 0.002, 0.003, 0.006]]]
    ).double()
    target = randsac.normalize_patches(tokens)
    assert target.shape == tokens.shape, (
        f"a target has the shape of the tokens {list(tokens.shape)}"
    )
    for b in range(2):
        for n in range(2):
            values = tokens[b, n].tolist()
            mean = sum(values) / 4
            variance = sum((v - mean) ** 2 for v in values) / 3  # unbiased: 4 - 1
            expected = torch.tensor([(v - mean) / math.sqrt(variance + 1e-6) for v in values])
            assert torch.allclose(target[b, n], expected.double(), atol=1e-6), (
                f"a patch of the values {values} has the mean {mean:.4g} and the unbiased variance "
                f"{variance:.4g}; less the mean, over sqrt(variance + 1e-6), it is {expected}, not "
                f"{target[b, n]}"
            )


def loss_of(errors, ranks):
    """The loss where the 3 values of a token are off by -e, e and 2 e: its mean squared error is
    2 e^2."""
    ranks = torch.tensor(ranks)
    target = torch.arange(3.0).expand(*ranks.shape, 3)
    prediction = target + torch.tensor(errors)[..., None] * torch.tensor([-1.0, 1.0, 2.0])
    prediction.requires_grad_()
    loss = randsac.token_loss(prediction, target, ranks)
    assert loss.shape == (), f"the loss is one number, not {list(loss.shape)}"
    loss.backward()
    assert prediction.grad.isfinite().all(), (
        "a sample that predicts nothing has no NaN gradient: divide by 0 nowhere"
    )
    return round(loss.item(), 4)


@pytest.mark.exercise7
def test_loss_of_a_token_is_the_mean_square_over_its_values():
    assert loss_of([[9.0, 3.0]], [[0, 1]]) == 18, (
        "off by -3, 3 and 6 a token's error is (9 + 9 + 36) / 3 = 18"
    )


@pytest.mark.exercise7
def test_tokens_of_rank_0_are_not_scored():
    assert loss_of([[9.0, 1.0, 2.0, 9.0]], [[0, 1, 2, 0]]) == 5, (
        "the errors of the two tokens of rank >= 1 are 2 and 8: their mean is 5, whatever the two "
        "of rank 0 are"
    )


@pytest.mark.exercise7
def test_loss_is_the_mean_over_samples_of_their_means():
    errors = [[9.0, 1.0, 1.0, 1.0], [9.0, 9.0, 9.0, 3.0]]
    ranks = [[0, 1, 1, 2], [0, 0, 0, 1]]
    assert loss_of(errors, ranks) == 10, (
        "the first sample's three tokens have the mean 2, the second's one has 18: the loss is "
        "(2 + 18) / 2 = 10, each sample counting the same however many tokens it predicts"
    )


@pytest.mark.exercise7
def test_a_sample_that_predicts_nothing_counts_zero():
    assert loss_of([[9.0, 3.0], [9.0, 9.0]], [[0, 1], [0, 0]]) == 9, (
        "the second sample is one segment, of rank 0: it counts zero, so the loss is (18 + 0) / 2 "
        "= 9"
    )
