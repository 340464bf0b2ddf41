"""Section 3.2: grouping tokens into segments."""
import math

import numpy as np
import pytest
import torch
from conftest import micro, random_config

import randsac

STRATEGIES = [("patch", ()), ("square", (4,)), ("square", (16, 4)), ("square", (64, 16, 4)), ("blob", (7,)),
              ("blob", (11, 5)), ("blob", (20, 9, 3)), ("scatter", (9,)), ("scatter", (11, 5)), ("mae", ())]


def draw(segments, hierarchy, batch=50, order="random", seed=0, size=32):
    config = micro(image_size=size, segments=segments, hierarchy=hierarchy, order=order)
    return randsac.sample_ranks(config, batch, generator=randsac.seeded("cpu", seed))


@pytest.mark.parametrize("order", ["random", "raster"])
@pytest.mark.parametrize("segments, hierarchy", STRATEGIES)
def test_ranks_are_dense_reproducible_and_fresh(segments, hierarchy, order):
    ranks = draw(segments, hierarchy, order=order)
    assert ranks.shape == (50, 64) and ranks.dtype == torch.int64
    for row in ranks:
        assert row.unique().tolist() == list(range(int(row.max()) + 1))
    assert torch.equal(ranks, draw(segments, hierarchy, order=order))
    if order == "random" or segments == "mae":
        assert not torch.equal(ranks, draw(segments, hierarchy, order=order, seed=1))
        assert len({tuple(row.tolist()) for row in ranks}) > (15 if hierarchy == (4,) else 49)  # 4 segments: 24 orders


def test_ranks_of_random_configurations_are_dense():
    rng = np.random.default_rng(0)
    for _ in range(100):
        config = random_config(rng)
        for row in randsac.sample_ranks(config, 4):
            assert row.unique().tolist() == list(range(int(row.max()) + 1)), config


@pytest.mark.parametrize("count, M", [(64, 1), (16, 2), (4, 4)])
def test_squares_are_M_by_M(count, M):
    for row in draw("square", (count,)):
        grid = row.view(8, 8)
        for i in range(0, 8, M):
            for j in range(0, 8, M):
                assert (grid[i:i + M, j:j + M] == grid[i, j]).all()
        assert row.bincount().tolist() == [M * M] * count


def test_square_of_one_token_is_patch():
    assert torch.equal(draw("square", (64,)), draw("patch", ()))


def test_blob_is_the_nearest_gaussian_by_mahalanobis_distance():
    B, K, grid = 20, 6, 8
    points = torch.tensor([[(x + 0.5) / grid, (y + 0.5) / grid] for y in range(grid) for x in range(grid)])
    ids, means = randsac.blob_segments(points.expand(B, -1, -1), K, randsac.seeded("cpu", 3))
    u = torch.rand(B, K, 5, generator=randsac.seeded("cpu", 3)).double().movedim(-1, 0)  # mean, deviations, angle
    assert torch.equal(means.double(), torch.stack([u[0], u[1]], -1))
    agree = 0
    for b in range(B):
        for n, point in enumerate(points.double().numpy()):
            distance = []
            for k in range(K):
                angle, scale = math.pi * u[4, b, k].item(), np.diag((0.1 + 0.2 * u[2:4, b, k].numpy()) ** 2)
                turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
                offset = point - means[b, k].double().numpy()
                distance.append(offset @ np.linalg.inv(turn @ scale @ turn.T) @ offset)
            agree += int(np.argmin(distance) == ids[b, n])
    assert agree >= B * 64 - 1  # one tie may fall otherwise in float32


def test_blob_counts_and_sizes_vary():
    ranks = draw("blob", (7,), batch=500)
    counts = ranks.max(1).values + 1
    assert counts.max() == 7 and counts.min() < 7  # a component that wins no token is not there
    assert len({tuple(sorted(row.bincount().tolist())) for row in ranks}) > 300


def test_blobs_nest():
    for counts in [(11, 5), (30, 11, 5, 2)]:
        config = micro(image_size=32, segments="blob", hierarchy=counts)
        levels = randsac.sample_levels(config, 100, generator=randsac.seeded("cpu", 0))
        for fine, coarse in zip(levels, levels[1:]):
            for b in range(100):
                for segment in fine[b].unique():
                    assert len(coarse[b][fine[b] == segment].unique()) == 1


def test_scatter_has_the_sizes_of_blob_but_no_place():
    config = {s: micro(image_size=32, segments=s, hierarchy=(9,)) for s in ("blob", "scatter")}
    blob, scatter = (randsac.sample_levels(c, 200, generator=randsac.seeded("cpu", 0))[0] for c in config.values())
    assert all(sorted(a.bincount().tolist()) == sorted(b.bincount().tolist()) for a, b in zip(blob, scatter))

    def spread(ids):  # mean distance of tokens to their segment's centre
        place = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
        return sum((place[row == k] - place[row == k].mean(0)).norm(dim=1).sum() for row in ids for k in row.unique()) / ids.numel()

    assert spread(blob) < 0.7 * spread(scatter)
    near_by = torch.stack([(row.view(8, 8)[:, 1:] == row.view(8, 8)[:, :-1]).float().mean() for row in scatter]).mean()
    chance = torch.stack([((row.bincount() / 64) ** 2).sum() for row in scatter]).mean()
    assert abs(near_by - chance) < 0.03  # neighbours share a segment no more often than any two tokens


def test_mae_gives_a_random_quarter():
    ranks = draw("mae", (), batch=4000)
    assert (ranks.sum(1) == 48).all()
    share = (ranks == 0).float().mean(0)
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5
    assert (draw("mae", (), batch=8, size=8).sum(1) == 3).all()  # 4 tokens: 1 given


@pytest.mark.parametrize("segments, hierarchy", STRATEGIES)
def test_segment_sizes_are_those_of_the_ranks(segments, hierarchy):
    sizes = randsac.segment_sizes(micro(image_size=32, segments=segments, hierarchy=hierarchy))
    drawn = {tuple(row.bincount().tolist()) for row in draw(segments, hierarchy)}
    assert drawn == {tuple(sizes)} if sizes else len(drawn) > 1
