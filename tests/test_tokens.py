"""Section 3.1: from pixels to tokens; Section 5: what is predicted."""
import pytest
import torch
from conftest import micro, random_model

import randsac


@pytest.mark.parametrize("size, patch", [(8, 1), (8, 2), (8, 4), (8, 8), (12, 3), (32, 4)])
def test_patchify_is_cut_out_by_hand(size, patch):
    images = torch.randn(2, 3, size, size)
    tokens = randsac.patchify(images, patch)
    side = size // patch
    assert tokens.shape == (2, side * side, 3 * patch * patch)
    for n in range(side * side):
        row, col = divmod(n, side)
        cut = images[:, :, row * patch:(row + 1) * patch, col * patch:(col + 1) * patch]  # [B,C,P,P]
        assert torch.equal(tokens[:, n], cut.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(randsac.unpatchify(tokens, patch), images)


def test_patchify_takes_oblong_images_and_refuses_a_wrong_patch_size():
    assert randsac.patchify(torch.zeros(1, 3, 4, 8), 4).shape == (1, 2, 48)
    with pytest.raises(ValueError, match="does not divide"):
        randsac.patchify(torch.zeros(1, 3, 4, 6), 4)


def test_normalized_target_has_mean_0_and_deviation_1_in_each_patch_alone():
    tokens = torch.randn(2, 5, 48) * (1 + torch.rand(2, 5, 1) * 9) + torch.randn(2, 5, 1)
    target = randsac.normalize_patches(tokens)
    assert target.mean(-1).abs().max() < 1e-5 and (target.std(-1) - 1).abs().max() < 1e-4
    alone = torch.stack([torch.stack([randsac.normalize_patches(patch[None])[0] for patch in image]) for image in tokens])
    assert torch.allclose(target, alone, atol=1e-6)
    assert torch.isfinite(randsac.normalize_patches(torch.ones(1, 1, 48))).all()  # a patch of one colour


def test_loss_is_mean_square_over_predicted_tokens_then_samples():
    for target in ("normalized", "pixels"):
        config = micro(segments="blob", hierarchy=(3,), target=target)
        model, images = random_model(config), torch.randn(6, 3, 16, 16).double()
        ranks = randsac.sample_ranks(config, 6, generator=randsac.seeded("cpu", 5))
        ranks[0] = 0  # a single segment: nothing is predicted, it counts zero
        tokens = randsac.patchify(images, 4)
        wanted = randsac.normalize_patches(tokens) if target == "normalized" else tokens
        prediction = model.predict(images, ranks)
        losses = []
        for b in range(6):
            errors = [((prediction[b, n] - wanted[b, n]) ** 2).mean() for n in range(16) if ranks[b, n] > 0]
            losses.append(sum(errors) / len(errors) if errors else torch.zeros(()))
        assert torch.allclose(model(images, ranks), torch.stack([x.double() for x in losses]).mean(), atol=1e-10)


def test_pixel_tokens_are_predicted_as_plain_pixels_by_default():
    assert micro(patch_size=1, image_size=4, segments="patch").target == "pixels"
    assert micro().target == "normalized"


def test_image_of_one_sample_is_not_touched_by_another():
    config = micro()
    model, ranks = random_model(config), randsac.sample_ranks(config, 2)
    images = torch.randn(2, 3, 16, 16).double()
    changed = images.clone()
    changed[1] += 1
    assert torch.equal(model.predict(images, ranks)[0].nan_to_num(), model.predict(changed, ranks)[0].nan_to_num())
