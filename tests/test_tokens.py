"""Section 3.1: from pixels to tokens; Section 5: what is predicted, and the loss."""

import pytest
import torch
from conftest import micro, random_model

import randsac


@pytest.mark.parametrize("size, patch", [(8, 1), (8, 2), (8, 4), (8, 8), (12, 3), (32, 4)])
def test_patchify_is_cut_out_by_hand(size, patch):
    images = torch.randn(2, 5, size, size)  # any number of channels
    tokens = randsac.patchify(images, patch)
    side = size // patch
    assert tokens.shape == (2, side * side, 5 * patch * patch)
    for n in range(side * side):
        y = n // side * patch
        x = n % side * patch
        cut = images[:, :, y : y + patch, x : x + patch]  # [B,C,P,P]
        assert torch.equal(tokens[:, n], cut.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(randsac.unpatchify(tokens, patch), images)


@pytest.mark.parametrize("patch, target", [(4, None), (4, "pixels"), (1, None)])
def test_loss_is_mean_square_over_predicted_tokens_then_samples(patch, target):
    settings = {"image_size": 4 * patch, "patch_size": patch, "target": target}
    config = micro(segments="blob", hierarchy=(3,), **settings)
    model = random_model(config)
    images = torch.randn(6, 3, 4 * patch, 4 * patch).double()
    ranks = randsac.sample_ranks(config, 6, generator=randsac.seeded("cpu", 5))
    ranks[0] = 0  # a single segment: nothing is predicted, it counts zero
    losses = []
    counts = set()
    for row, prediction, tokens in zip(
        ranks, model.predict(images, ranks), randsac.patchify(images, patch)
    ):
        errors = []
        for n in range(16):
            wanted = tokens[n]
            if patch > 1 and target is None:  # by default, but not of a single pixel
                wanted = (wanted - wanted.mean()) / (wanted.var() + 1e-6).sqrt()
            if row[n] > 0:
                errors.append((prediction[n] - wanted).square().mean().item())
        losses.append(sum(errors) / max(len(errors), 1))
        counts.add(len(errors))
    assert len(counts) > 2  # else means over samples and over tokens would be the same
    assert model(images, ranks).item() == pytest.approx(sum(losses) / 6, abs=1e-10)
