"""Section 3.2: grouping tokens into segments."""

import math

import pytest
import torch
from conftest import micro

import randsac

STRATEGIES = [("patch", ()), ("mae", ())]
STRATEGIES += [("square", (4,)), ("square", (16, 4)), ("square", (64, 16, 4))]
STRATEGIES += [("blob", (7,)), ("blob", (11, 5)), ("blob", (20, 9, 3))]
STRATEGIES += [("scatter", (9,)), ("scatter", (11, 5))]
ORDERED = [(*strategy, "random") for strategy in STRATEGIES]
ORDERED += [(*strategy, "raster") for strategy in STRATEGIES if strategy[0] != "mae"]


def draw(segments, hierarchy, batch=50, seed=0, image_size=32, **settings):
    config = micro(image_size=image_size, segments=segments, hierarchy=hierarchy, **settings)
    return randsac.sample_ranks(config, batch, generator=randsac.seeded("cpu", seed))


@pytest.mark.parametrize("segments, hierarchy, order", ORDERED)
def test_ranks_are_dense_reproducible_and_fresh(segments, hierarchy, order):
    ranks = draw(segments, hierarchy, order=order)
    assert ranks.shape == (50, 64)
    assert ranks.dtype == torch.int64
    for row in ranks:
        assert row.unique().tolist() == list(range(int(row.max()) + 1))
    assert torch.equal(ranks, draw(segments, hierarchy, order=order))
    if order == "random":
        assert not torch.equal(ranks, draw(segments, hierarchy, order=order, seed=1))
        different = {tuple(row.tolist()) for row in ranks}
        assert len(different) > (15 if hierarchy == (4,) else 49)  # 4 segments have 24 orders


def test_blobs_are_won_by_random_gaussians_and_coarser_ones_win_their_means():
    config = micro(image_size=32, segments="blob", hierarchy=(11, 5))
    levels = randsac.sample_levels(config, 20, generator=randsac.seeded("cpu", 7))
    generator = randsac.seeded("cpu", 7)
    side = (torch.arange(8) + 0.5) / 8
    y, x = torch.meshgrid(side, side, indexing="ij")  # of the tokens' centres
    points = torch.stack([x, y], -1).view(64, 2).expand(20, -1, -1)
    groups = []
    for count in (11, 5):
        drawn = torch.rand(20, count, 5, generator=generator)
        means, deviations, angles = drawn.split((2, 2, 1), 2)
        gaussians = (means, 0.1 + 0.2 * deviations, math.pi * angles[..., 0])
        groups.append(randsac.nearest_gaussian(points, *gaussians))  # see test_exercises.py
        points = means
    blob_of_token, partition_of_blob = groups
    assert torch.equal(levels[0], blob_of_token)
    assert torch.equal(levels[1], partition_of_blob.gather(1, blob_of_token))


def test_scatter_has_the_sizes_of_blob_but_no_place():
    levels = []
    for segments in ("blob", "scatter"):
        config = micro(image_size=32, segments=segments, hierarchy=(9,))
        levels += randsac.sample_levels(config, 200, generator=randsac.seeded("cpu", 0))
    for a, b in zip(*levels):
        assert sorted(a.bincount().tolist()) == sorted(b.bincount().tolist())

    # Where a segment has a place, neighbours share it more often than any two tokens do.
    gains = []
    for ids in levels:
        grid = ids.view(200, 8, 8)
        neighbours = grid[:, :, 1:] == grid[:, :, :-1]
        any_two = ids[:, :, None] == ids[:, None]
        gains.append(neighbours.float().mean() - any_two.float().mean())
    assert gains[0] > 0.3
    assert abs(gains[1]) < 0.03


def test_mae_gives_a_random_quarter():
    ranks = draw("mae", (), batch=4000)
    assert (ranks.sum(1) == 48).all()
    share = (ranks == 0).float().mean(0)
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5
    assert (draw("mae", (), batch=8, image_size=8).sum(1) == 3).all()  # 4 tokens: 1 given


@pytest.mark.parametrize("segments, hierarchy, order", ORDERED)
def test_what_would_come_after_the_last_rank_is_predicted_with_it(segments, hierarchy, order):
    """By --last-rank, this project's own addition; 0 is none, the paper."""
    settings = {"segments": segments, "hierarchy": hierarchy, "order": order}
    whole = draw(**settings)
    count = hierarchy[0] if hierarchy else len(whole[0].unique())
    for K in {-1, 0, 1, 2, count // 2, count - 2, count - 1, count, 1000}:
        if K not in range(count - 1):  # it would change nothing
            with pytest.raises(randsac.UserError, match=f"--last-rank.* {K}"):
                micro(image_size=32, last_rank=K, **settings)
            continue
        ranks = draw(last_rank=K, **settings)
        last = K if K > 0 else count
        assert torch.equal(ranks, torch.where(whole > last, last, whole))

        # The sizes of segments are known where they never vary.
        sizes = randsac.segment_sizes(micro(image_size=32, last_rank=K, **settings))
        drawn = {tuple(row.bincount().tolist()) for row in ranks}
        if segments in ("blob", "scatter"):
            assert sizes is None
        else:
            assert drawn == {tuple(sizes)}
