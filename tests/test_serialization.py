"""Sections 3.1 and 3.3: the order of prediction, flat and hierarchical."""
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import micro, random_config

import randsac


def chi_square(counts, cells):
    """Of the hypothesis that all `cells` outcomes are equally likely; with 23 degrees of freedom it is above 58 by
    chance once in 10,000 times."""
    expected = sum(counts.values()) / cells
    return sum((counts.get(c, 0) - expected) ** 2 / expected for c in range(cells))


ORDERS = {order: i for i, order in enumerate(itertools.permutations(range(4)))}


def places(ranks):
    """ranks [B,4], all different -> which of the 24 orders each row is."""
    return Counter(ORDERS[tuple(row)] for row in ranks.argsort(1).argsort(1).tolist())


def test_every_permutation_of_patches_is_equally_likely():
    ranks = randsac.sample_ranks(micro(image_size=8, segments="patch"), 24_000, generator=randsac.seeded("cpu", 0))
    assert chi_square(places(ranks), 24) < 58


def test_partitions_and_segments_inside_them_are_uniform_and_independent():
    config = micro(image_size=16, hierarchy=(16, 4))  # 16 segments of one token, partitions are quadrants
    ranks = randsac.sample_ranks(config, 48_000, generator=randsac.seeded("cpu", 1)).view(-1, 2, 2, 2, 2)  # [B,Y,y,X,x]
    ranks = ranks.transpose(2, 3).reshape(-1, 4, 4)  # [B, partition, segment in it]
    partition = ranks.amin(2)
    assert chi_square(places(partition), 24) < 58
    for p in range(4):
        assert chi_square(places(ranks[:, p]), 24) < 58
    inner = torch.tensor([ORDERS[tuple(row)] for row in ranks[:, 0].argsort(1).argsort(1).tolist()])
    outer = torch.tensor([ORDERS[tuple(row)] for row in partition.argsort(1).argsort(1).tolist()])
    joint = Counter((inner * 24 + outer).tolist())
    assert chi_square(joint, 576) < 720  # 575 degrees of freedom: above 710 once in 10,000 times


def test_blobs_that_are_there_come_in_every_order():
    levels = [torch.tensor([0, 5, 5, 7, 7, 7, 2, 2]).expand(24_000, -1)]  # ids with gaps
    ranks = randsac.serialize(levels, "random", randsac.seeded("cpu", 2))
    assert chi_square(places(ranks[:, [0, 1, 3, 6]]), 24) < 58


def slow_raster(levels):
    """Ranks by the words of Section 3.3: the place of a group is its first token's, coarse before fine."""
    ranks = []
    for b in range(len(levels[0])):
        rows = [level[b].tolist() for level in levels]
        key = [tuple(row.index(row[n]) for row in reversed(rows)) for n in range(len(rows[0]))]
        ranks.append([sorted(set(key)).index(k) for k in key])
    return torch.tensor(ranks)


def test_raster_order_equals_a_slow_version():
    rng = np.random.default_rng(1)
    for i in range(60):
        config = random_config(rng, order="raster")
        if config.segments == "mae":
            continue
        levels = randsac.sample_levels(config, 3, generator=randsac.seeded("cpu", i))
        assert torch.equal(randsac.sample_ranks(config, 3, generator=randsac.seeded("cpu", i)), slow_raster(levels)), config


def test_raster_patches_go_row_by_row():
    ranks = randsac.sample_ranks(micro(image_size=32, segments="patch", order="raster"), 2)
    assert torch.equal(ranks, torch.arange(64).expand(2, -1))


@pytest.mark.parametrize("order", ["random", "raster"])
@pytest.mark.parametrize("segments, hierarchy", [("square", (16, 4)), ("square", (64, 16, 4)), ("blob", (11, 5)),
                                                 ("blob", (40, 12, 4)), ("scatter", (11, 5))])
def test_a_partition_is_finished_before_the_next_begins(segments, hierarchy, order):
    config = micro(image_size=32, segments=segments, hierarchy=hierarchy, order=order)
    levels = randsac.sample_levels(config, 50, generator=randsac.seeded("cpu", 4))
    ranks = randsac.serialize(levels, order, randsac.seeded("cpu", 5))
    for level in levels:
        for ids, row in zip(level, ranks):
            spans = sorted((int(row[ids == k].min()), int(row[ids == k].max())) for k in ids.unique())
            assert all(a[1] < b[0] for a, b in zip(spans, spans[1:]))
    for ids, row in zip(levels[0], ranks):  # and a finest segment is one rank
        assert all(len(row[ids == k].unique()) == 1 for k in ids.unique()) and len(ids.unique()) == row.max() + 1


def test_hierarchy_changes_the_order_but_not_the_segments():
    flat, deep = (randsac.sample_ranks(micro(image_size=32, hierarchy=h), 1) for h in [(16,), (16, 4)])
    same = lambda ranks: ranks[:, :, None] == ranks[:, None]  # noqa: E731
    assert torch.equal(same(flat), same(deep))


def test_dense_keeps_order_and_ties():
    values = torch.tensor([[5, 5, -2, 9], [0, 0, 0, 0], [3, 2, 1, 0]])
    assert randsac.dense(values).tolist() == [[1, 1, 0, 2], [0, 0, 0, 0], [3, 2, 1, 0]]
