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
def test_loss_is_that_of_the_predictions_and_their_targets(patch, target):
    """Normalized patches, unless a patch is a pixel. test_exercises.py shows what these are, and
    what the loss of a prediction is."""
    settings = {"image_size": 4 * patch, "patch_size": patch, "target": target}
    config = micro(segments="blob", hierarchy=(3,), **settings)
    model = random_model(config)
    images = torch.randn(6, 3, 4 * patch, 4 * patch).double()
    ranks = randsac.sample_ranks(config, 6, generator=randsac.seeded("cpu", 5))
    wanted = randsac.patchify(images, patch)
    if patch > 1 and target is None:
        wanted = randsac.normalize_patches(wanted)
    prediction = model.predict(images, ranks).nan_to_num()  # NaN at rank 0
    expected = randsac.token_loss(prediction, wanted, ranks)
    torch.testing.assert_close(model(images, ranks), expected)
