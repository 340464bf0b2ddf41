"""Grades the exercises of the assignment: `pytest -m exercise3` grades the third alone, `pytest`
all of them.

Any correct solution passes. The inputs are fixed, and no test calls the function of another
exercise, so the exercises can be solved in any order."""

from collections import Counter

import pytest
import torch

import randsac


def check_form(returned, words, shape, dtype=None):
    """What a function returned, and `words` describe, has this shape and, if given, this dtype."""
    found = list(returned.shape)
    assert found == shape, f"{words}: shape {shape}, not {found}"
    if dtype is not None:
        assert returned.dtype == dtype, f"{words}: {dtype}, not {returned.dtype}"


# --- 1: tokens (Section 3.1)

TOKEN = [0, 1, 2, 10, 11, 12, 100, 101, 102, 110, 111, 112]


def numbered_images(height, width):
    """-> [2,3,height,width], where 1234 is channel 4 of the pixel in row 2, column 3 of image 1."""
    axes = [torch.arange(size) for size in (2, 3, height, width)]
    image, channel, row, column = torch.meshgrid(*axes, indexing="ij")
    return (1000 * image + 100 * row + 10 * column + channel).float()


def tokens_by_hand(corners):
    """-> the tokens [2,N,12] of numbered images in patches of 2 x 2 pixels. A corner is the number
    in the upper left of a patch, in channel 0 of image 0."""
    image = 1000 * torch.arange(2)[:, None, None]
    return image + torch.tensor(corners)[:, None] + torch.tensor(TOKEN)


@pytest.mark.exercise1
def test_tokens_are_the_patches_in_raster_order():
    tokens = randsac.patchify(numbered_images(4, 6), 2).long()
    words = "4 x 6 pixels in patches of 2 x 2 are 6 tokens of 2 * 2 * 3 values"
    check_form(tokens, words, [2, 6, 12])
    expected = tokens_by_hand([0, 20, 40, 200, 220, 240])
    for b in range(2):
        for n in range(6):
            right = expected[b, n].tolist()
            found = tokens[b, n].tolist()
            words = f"token {n} of image {b} should be {right} but is {found} (1234 is channel 4 "
            words += "of the pixel in row 2, column 3 of image 1)"
            assert sorted(found) == sorted(right), f"not the pixels of patch {n}: {words}"
            order = "a token is [P,P,C], its pixels row by row, a pixel's channels together"
            assert found == right, f"{order}: {words}"


@pytest.mark.exercise1
def test_a_patch_size_that_does_not_divide_the_image_is_refused():
    for height, width in [(4, 6), (6, 4)]:
        with pytest.raises(ValueError):  # a UserError is one: call check(condition, message)
            randsac.patchify(torch.zeros(1, 3, height, width), 4)


@pytest.mark.exercise1
def test_unpatchify_puts_every_pixel_back():
    tokens = tokens_by_hand([0, 20, 40, 200, 220, 240, 400, 420, 440])
    images = randsac.unpatchify(tokens.float(), 2)
    check_form(images, "9 tokens of 2 x 2 pixels are 6 x 6 pixels", [2, 3, 6, 6])
    wrong = (images != numbered_images(6, 6)).nonzero().tolist()
    words = f"{len(wrong)} of 216 values are in the wrong place, the first at"
    assert not wrong, f"{words} [image, channel, row, column] = {wrong[0]}"


# --- 2: square segments (Section 3.2)

SQUARES = {  # grid, count: rows of tokens; the tokens of one square have one letter
    (4, 4): "aabb aabb ccdd ccdd",
    (4, 16): "abcd efgh ijkl mnop",
    (6, 9): "aabbcc aabbcc ddeeff ddeeff gghhii gghhii",
    (6, 4): "aaabbb aaabbb aaabbb cccddd cccddd cccddd",
}


@pytest.mark.exercise2
def test_squares_are_M_by_M_tokens():
    for (grid, count), picture in SQUARES.items():
        letters = picture.replace(" ", "")
        N = grid * grid
        ids = randsac.square_segments(grid, count)
        check_form(ids, f"an id for each of {grid} x {grid} tokens", [N], torch.int64)
        outside = [k for k in ids.tolist() if k not in range(N)]
        assert not outside, f"an id is one of 0..{N - 1}, not {outside[0]}"
        for i in range(N):
            for j in range(i):
                together = letters[i] == letters[j]
                squares = "one square" if together else "two squares"
                words = f"{grid} x {grid} tokens in {count} squares: tokens {j} and {i} are in"
                assert (ids[i] == ids[j]) == together, f"{words} {squares} of {picture}"


# --- 3: blob segments (Section 3.2)


def winners(points, *gaussians):
    """Of Gaussians ((mean x, y), (deviations), angle), those that win these points (x, y)."""
    mean, deviation, angle = (torch.tensor(part).double()[None] for part in zip(*gaussians))
    points = torch.tensor(points).double()[None]
    return randsac.nearest_gaussian(points, mean, deviation, angle)[0].tolist()


@pytest.mark.exercise3
def test_distance_counts_in_deviations():
    wide = ((0, 0), (4, 1), 0)
    narrow = ((3, 0), (0.5, 0.5), 0)
    words = "(2, 0) is 2 / 4 deviations from the wide Gaussian and 1 / 0.5 from the narrow one: so "
    words += "the first wins, though the second's mean is nearer and its density there is higher"
    assert winners([(2, 0)], wide, narrow) == [0], words
    circle = ((0, 0), (2, 2), 0)
    words = "(0, 3) lies along y, where the wide Gaussian has a deviation of only 1"
    assert winners([(0, 3)], wide, circle) == [1], words


@pytest.mark.exercise3
def test_the_angle_turns_from_x_towards_y():
    long = ((0, 0), (4, 1), 0.7854)  # pi / 4
    circle = ((0, 0), (2, 2), 0)
    words = "turned by pi / 4 from x towards y, the long axis runs through (2, 2), not (2, -2)"
    assert winners([(2, 2), (2, -2)], long, circle) == [0, 1], words


# What 20 random points are nearest to, in three samples, by inverting covariance matrices.
NEAREST = ["20001002000000120021", "30130333333330223313", "11210302012222322122"]


@pytest.mark.exercise3
def test_the_nearest_of_random_gaussians():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(3, 32, 2, generator=generator, dtype=torch.double)
    points, mean, deviation, angle = drawn.split((20, 4, 4, 4), 1)
    ids = randsac.nearest_gaussian(points, mean, 0.1 + deviation, 3.14 * angle[..., 0])
    check_form(ids, "an id for each point: [B,n]", [3, 20], torch.int64)
    for b in range(3):
        for n in range(20):
            words = f"sample {b}: point {n} is nearest to Gaussian {NEAREST[b][n]}, not {ids[b, n]}"
            hint = "is each axis turned, and divided by its own deviation?"
            assert ids[b, n] == int(NEAREST[b][n]), f"{words}; {hint}"


# --- 4: hierarchical serialization (Section 3.3)


@pytest.mark.exercise4
def test_raster_order_goes_by_first_tokens():
    # The ids say nothing about the order.
    fine = torch.tensor([[4, 1, 4, 1, 0, 0, 6, 1], [7, 7, 2, 2, 5, 5, 3, 3]])
    coarse = torch.tensor([[7, 3, 7, 3, 7, 7, 3, 3], [6, 6, 1, 1, 6, 6, 1, 1]])
    flat = randsac.serialize([fine], "raster").tolist()
    words = "the place of a segment is that of its first token: 4, 1, 0, 6 in the first sample"
    assert flat == [[0, 1, 0, 1, 2, 2, 3, 1], [0, 0, 1, 1, 2, 2, 3, 3]], words
    nested = randsac.serialize([fine, coarse], "raster").tolist()
    words = "in the first sample partition 7 holds token 0, so all of it comes first (segments 4, "
    words += "0); then comes partition 3 (segments 1, 6)"
    assert nested == [[0, 2, 0, 2, 1, 1, 3, 2], [0, 0, 2, 2, 1, 1, 3, 3]], words


# Levels of two samples of 12 tokens; the second sample has fewer segments.
NESTED = [
    torch.tensor([[9, 9, 2, 11, 0, 0, 5, 7, 7, 2, 11, 5], [3, 8, 8, 3, 1, 1, 10, 10, 3, 1, 10, 8]]),
    torch.tensor([[4, 4, 8, 8, 4, 4, 1, 6, 6, 8, 8, 1], [2, 2, 2, 2, 9, 9, 5, 5, 2, 9, 5, 2]]),
    torch.tensor([[0, 0, 3, 3, 0, 0, 3, 0, 0, 3, 3, 3], [7, 7, 7, 7, 7, 7, 5, 5, 7, 7, 5, 7]]),
]


@pytest.mark.exercise4
def test_random_ranks_are_dense_and_every_partition_is_finished_before_the_next():
    for depth in (1, 2, 3):
        levels = [level.repeat(10, 1) for level in NESTED[:depth]]
        ranks = randsac.serialize(levels, "random", torch.Generator().manual_seed(depth))
        check_form(ranks, "a rank for each token: [B,N]", [20, 12], torch.int64)
        for b, row in enumerate(ranks):
            finest = levels[0][b]
            K = len(finest.unique())
            words = f"{K} segments have the ranks 0..{K - 1}, not {row.tolist()}"
            assert row.unique().tolist() == list(range(K)), words
            for i, level in enumerate(levels):
                for part in level[b].unique():
                    tokens = level[b] == part
                    mine = row[tokens].unique().tolist()
                    words = "the tokens of one finest segment, and no others, share a rank"
                    assert len(mine) == len(finest[tokens].unique()), words
                    words = f"the {len(mine)} segments of one in levels[{i}] have ranks that "
                    words += f"follow one another, not {mine}"
                    follow = mine[-1] - mine[0] + 1 == len(mine)
                    assert follow, f"a partition is finished before the next begins: {words}"


@pytest.mark.exercise4
def test_each_sample_draws_its_own_order_and_all_are_equally_likely():
    gaps = [torch.tensor([3, 0, 2, 3])]  # 3 segments: 6 orders
    # 2 partitions of 2 segments: 8 orders
    nested = [torch.tensor([6, 2, 5, 4, 4, 2, 6, 6]), torch.tensor([1, 1, 7, 7, 7, 1, 1, 1])]
    for levels, orders in [(gaps, 6), (nested, 8)]:
        expanded = [ids.expand(4000, -1) for ids in levels]
        ranks = randsac.serialize(expanded, "random", torch.Generator().manual_seed(1))
        counts = Counter(map(tuple, ranks.tolist()))
        words = "each sample draws its own order; here all 4000 have the same"
        assert len(counts) > 1, f"{words}: {ranks[0].tolist()}"
        expected = 4000 / orders
        words = f"there are {orders} orders, each of about {expected:.0f} of 4000 samples; "
        words += f"here they are {dict(counts)}"
        assert len(counts) == orders, words
        chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
        assert chi_square < 45, words  # above it by chance less than once in a million times


@pytest.mark.exercise4
def test_the_generator_decides_the_order():
    levels = [level.repeat(30, 1) for level in NESTED]
    first = randsac.serialize(levels, "random", torch.Generator().manual_seed(2))
    again = randsac.serialize(levels, "random", torch.Generator().manual_seed(2))
    words = "draw from `generator` only: with the same seed the ranks are the same"
    assert torch.equal(first, again), words


# --- 5: attention masks (Section 4.1)


def check_mask(name, may_look, reason):
    """May_look has "1" where a token of one rank (row 0..3) may look at one of another (column)."""
    number = ["source", "target", "memory"].index(name)  # the order in which they are returned
    ranks = torch.tensor([[2, 0, 1, 0, 3, 1], [1, 1, 0, 2, 2, 3]])
    mask = randsac.attention_masks(ranks)[number]
    check_form(mask, f"{name} mask [B,N,N] for ranks [B,N]", [2, 6, 6], torch.bool)
    for b, row in enumerate(ranks.tolist()):
        for i, rank in enumerate(row):
            for j, other in enumerate(row):
                right = may_look[rank][other] == "1"
                place = f"{name} mask at row {i} (rank {rank}) and column {j} (rank {other})"
                assert mask[b, i, j] == right, f"{place} should be {right}: {reason}"
    alone = randsac.attention_masks(ranks[0])[number]
    assert torch.equal(alone, mask[0]), f"{name} mask: ranks [N], without a batch, give [N,N]"


@pytest.mark.exercise5
def test_source_mask():
    reason = "in the encoder a token sees its own segment and earlier ones"
    check_mask("source", ["1000", "1100", "1110", "1111"], reason)


@pytest.mark.exercise5
def test_target_mask():
    reason = "in the decoder a token sees its own segment and earlier ones, but not rank 0"
    check_mask("target", ["0000", "0100", "0110", "0111"], reason)


@pytest.mark.exercise5
def test_memory_mask():
    reason = "only pixels of earlier segments are read, and no segment is earlier than rank 0"
    check_mask("memory", ["0000", "1000", "1100", "1110"], reason)


# --- 6: trainable skip connections (Section 4.2)


def small_model(decoder_depth, skip=True):
    """A model of three encoder layers, and what these give: H^2 is 10 H^1, H^3 is 100 H^1."""
    sizes = {"image_size": 16, "dim": 16, "heads": 2, "depth": 3, "decoder_depth": decoder_depth}
    model = randsac.RandSAC(randsac.Config(**sizes, skip=skip, device="cpu"))
    H = 1 + torch.arange(2 * 5 * 16.0).view(2, 5, 16)
    return model, [H, 10 * H, 100 * H]


@pytest.mark.exercise6
def test_memory_of_a_decoder_layer_is_its_row_of_W_times_the_encoder_layers():
    for W in [[[3.0, 2, 1], [0, 5, 4], [-1, 0, 0]], [[0.5, 0, 2], [1, 1, 1]]]:
        model, layers = small_model(decoder_depth=len(W))
        model.skip.data = torch.tensor(W)
        memories = list(model.mix_skips(layers))
        assert len(memories) == len(W), f"{len(W)} decoder layers, but {len(memories)} memories"
        for Z, row in zip(memories, W):
            check_form(Z, "a memory is [B,n,D]", [2, 5, 16])
            expected = row[0] + 10 * row[1] + 100 * row[2]
            words = f"with H^2 = 10 H^1, H^3 = 100 H^1 and a row {row} of W, Z is {expected} H^1"
            right = torch.allclose(Z, expected * layers[0])
            assert right, f"{words}; here it begins with {Z[0, 0, 0].item()} H^1"


@pytest.mark.exercise6
def test_W_is_trained():
    model, layers = small_model(decoder_depth=2)
    total = sum(Z.sum() for Z in model.mix_skips(layers))
    assert total.requires_grad, "no gradient reaches W: use the parameter self.skip itself"
    total.backward()
    gradient = model.skip.grad
    assert gradient is not None and gradient.all(), "every entry of W gets a gradient"


@pytest.mark.exercise6
def test_without_skips_every_decoder_layer_reads_the_last_encoder_layer():
    model, layers = small_model(decoder_depth=2, skip=False)
    memories = list(model.mix_skips(layers))
    words = "with --no-skip (self.config.skip is False: there is no W) both decoder layers read H^3"
    assert len(memories) == 2, words
    for Z in memories:
        assert torch.equal(Z, layers[-1]), words


# --- 7: patch-normalized target (Section 5)

PATCHES = [  # values, mean, unbiased variance, target
    ([1.0, 2, 3, 6], 3, 14 / 3, [-0.9258, -0.4629, 0, 1.3887]),
    ([10.0, 20, 30, 40], 25, 500 / 3, [-1.1619, -0.3873, 0.3873, 1.1619]),
    ([5.0, 5, 5, 5], 5, 0, [0.0, 0, 0, 0]),
    ([0.001, 0.002, 0.003, 0.006], 0.003, 14e-6 / 3, [-0.8402, -0.4201, 0, 1.2603]),
]


@pytest.mark.exercise7
def test_each_patch_is_normalized_by_its_own_mean_and_variance():
    values = [patch[0] for patch in PATCHES]
    tokens = torch.tensor(values, dtype=torch.double).view(2, 2, 4)
    target = randsac.normalize_patches(tokens)
    check_form(target, "a target is shaped as the tokens are", [2, 2, 4])
    for found, (patch, mean, variance, expected) in zip(target.view(4, 4).tolist(), PATCHES):
        words = f"{patch} have the mean {mean} and the unbiased variance {variance:.3g}; less the "
        words += f"mean, over sqrt(variance + 1e-6), they are {expected}, not {found}"
        assert found == pytest.approx(expected, abs=1e-4), words


# --- 8: loss (Section 5)


def loss_of(errors, ranks):
    """The loss where the 3 values of a token are off by -e, e and 2 e: its mean squared error is
    2 e^2."""
    ranks = torch.tensor(ranks)
    target = torch.arange(3.0).expand(*ranks.shape, 3)
    prediction = target + torch.tensor(errors)[..., None] * torch.tensor([-1.0, 1.0, 2.0])
    prediction.requires_grad_()
    loss = randsac.token_loss(prediction, target, ranks)
    check_form(loss, "the loss is one number", [])
    loss.backward()
    words = "the gradient of a sample that predicts nothing is NaN: something is divided by 0"
    assert prediction.grad.isfinite().all(), words
    return round(loss.item(), 4)


@pytest.mark.exercise8
def test_loss_of_a_token_is_the_mean_square_over_its_values():
    words = "a token that is off by -3, 3 and 6 has the error (9 + 9 + 36) / 3 = 18"
    assert loss_of([[9.0, 3.0]], [[0, 1]]) == 18, words


@pytest.mark.exercise8
def test_tokens_of_rank_0_are_not_scored():
    words = "two tokens have a rank >= 1, and the errors 2 and 8: their mean is 5"
    assert loss_of([[9.0, 1.0, 2.0, 9.0]], [[0, 1, 2, 0]]) == 5, words


@pytest.mark.exercise8
def test_loss_is_the_mean_over_samples_of_their_means():
    errors = [[9.0, 1.0, 1.0, 1.0], [9.0, 9.0, 9.0, 3.0]]
    ranks = [[0, 1, 1, 2], [0, 0, 0, 1]]
    words = "three tokens of one sample have the mean 2, one of the other has 18: samples count "
    words += "alike however many tokens they predict, so the loss is (2 + 18) / 2 = 10"
    assert loss_of(errors, ranks) == 10, words


@pytest.mark.exercise8
def test_a_sample_that_predicts_nothing_counts_zero():
    words = "the second sample has only rank 0 and counts zero: the loss is (18 + 0) / 2 = 9"
    assert loss_of([[9.0, 3.0], [9.0, 9.0]], [[0, 1], [0, 0]]) == 9, words
