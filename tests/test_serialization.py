"""Sections 3.1 and 3.3: the order of prediction, flat and hierarchical."""

import itertools

import numpy as np
import pytest
import torch
from conftest import micro, random_config

import randsac


def chi_square(outcomes, cells):
    """Of the hypothesis that all `cells` outcomes are equally likely; with 23 degrees of freedom it
    is above 58 by chance once in 10,000 times."""
    _, counts = outcomes.unique(return_counts=True)
    expected = len(outcomes) / cells
    absent = cells - len(counts)
    return ((counts - expected) ** 2 / expected).sum() + absent * expected


def orders(ranks):
    """ranks [B,4], all different -> a number below 256 for the order of each row, one of 24."""
    return ranks.argsort(1).argsort(1) @ torch.tensor([64, 16, 4, 1])


def test_partitions_and_segments_inside_them_are_uniform_and_independent():
    # 16 segments of one token in 4 partitions, the quadrants.
    config = micro(image_size=16, hierarchy=(16, 4))
    ranks = randsac.sample_ranks(config, 48_000, generator=randsac.seeded("cpu", 1))
    ranks = ranks.view(-1, 2, 2, 2, 2).transpose(2, 3)  # [B,Y,X,y,x]
    ranks = ranks.reshape(-1, 4, 4)  # [B,partition,segment in it]
    outer = orders(ranks.amin(2))
    inner = [orders(ranks[:, p]) for p in range(4)]
    for one in (outer, *inner):
        assert chi_square(one, 24) < 58

    # 575 degrees of freedom: above 710 once in 10,000 times.
    for some, others in [(inner[0], outer), (inner[3], outer), (inner[1], inner[2])]:
        assert chi_square(256 * some + others, 576) < 720


def slow_raster(levels):
    """Ranks by the words of Section 3.3: the place of a group is its first token's, coarse before
    fine."""
    ranks = []
    for b in range(len(levels[0])):
        rows = [level[b].tolist() for level in reversed(levels)]
        keys = []
        for ids in zip(*rows):  # of each token, from coarse to fine
            keys.append(tuple(row.index(k) for row, k in zip(rows, ids)))
        visited = sorted(set(keys))
        ranks.append([visited.index(key) for key in keys])
    return torch.tensor(ranks)


def test_raster_order_equals_a_slow_version():
    rng = np.random.default_rng(1)
    for i in range(60):
        config = random_config(rng, order="raster", last_rank=0)
        levels = randsac.sample_levels(config, 3, generator=randsac.seeded("cpu", i))
        ranks = randsac.sample_ranks(config, 3, generator=randsac.seeded("cpu", i))
        assert torch.equal(ranks, slow_raster(levels)), config


NESTED = [("square", (64, 16, 4)), ("blob", (40, 12, 4, 2)), ("scatter", (11, 5))]


@pytest.mark.parametrize("segments, hierarchy", NESTED)
def test_every_partition_is_finished_before_the_next_begins(segments, hierarchy):
    config = micro(image_size=32, segments=segments, hierarchy=hierarchy)
    levels = randsac.sample_levels(config, 50, generator=randsac.seeded("cpu", 4))
    ranks = randsac.sample_ranks(config, 50, generator=randsac.seeded("cpu", 4))
    assert len(levels) == len(hierarchy)
    if segments == "square":
        assert tuple(len(level[0].unique()) for level in levels) == hierarchy
    for level in levels:
        for ids, row in zip(level, ranks):
            parts = [row[ids == k] for k in ids.unique()]
            spans = sorted((int(part.min()), int(part.max())) for part in parts)
            assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))
            if level is levels[0]:  # a finest segment is one rank
                assert spans == [(rank, rank) for rank in range(len(spans))]
