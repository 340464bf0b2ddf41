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


@pytest.mark.parametrize("target", ["normalized", "pixels"])
def test_loss_is_mean_square_over_predicted_tokens_then_samples(target):
    config = micro(segments="blob", hierarchy=(3,), target=target)
    model = random_model(config)
    images = torch.randn(6, 3, 16, 16).double()
    ranks = randsac.sample_ranks(config, 6, generator=randsac.seeded("cpu", 5))
    ranks[0] = 0  # a single segment: nothing is predicted, it counts zero
    prediction = model.predict(images, ranks)
    tokens = randsac.patchify(images, 4)
    losses = []
    for b in range(6):
        errors = []
        for n in range(16):
            wanted = tokens[b, n]
            if target == "normalized":
                wanted = (wanted - wanted.mean()) / (wanted.var() + 1e-6).sqrt()
            if ranks[b, n] > 0:
                errors.append(((prediction[b, n] - wanted) ** 2).mean().item())
        losses.append(sum(errors) / max(len(errors), 1))
    counts = {int((row > 0).sum()) for row in ranks}
    assert len(counts) > 2  # else means over samples and over tokens would be the same
    assert model(images, ranks).item() == pytest.approx(sum(losses) / 6, abs=1e-10)


def test_pixel_tokens_are_predicted_as_plain_pixels_by_default():
    assert micro(patch_size=1, image_size=4, segments="patch").target == "pixels"
    assert micro().target == "normalized"
