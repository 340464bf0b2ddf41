#!/bin/sh
# lightly and timm meet: to wrap a trained ViT for masked training is to forget what it has learned.
#
# Guess: MaskedVisionTransformerTIMM(vit=vit) adds masks to a ViT and leaves its weights as they
# are, as one would have it to go on with a trained one, or to probe it.
# Seen: its constructor writes into the model that it is given, without a word: by default new random
# weights into every Linear and the patch embedding, and a sine-cosine code, which is frozen, in place
# of the learned positions. With weight_initialization="skip" the positions are lost all the same.
# Cosine of the features of the same images, before and after, by the same vit:
#     default                                   -0.04, and 11 of 30 tensors are others
#     weight_initialization="skip"              -0.01, and 1 of 30 (the positions)
#     ... and pos_embed_initialization="skip"    1.00, and none
# It matters to who pre-trains in two stages, continues from a published checkpoint, or compares a
# model's features before and after: the loss falls as from random weights, since that is what it is.
# The vit itself is changed, so that another use of the same object is hit, too.
# Remedy: both arguments "skip", or load the state dict after wrapping.
# Versions: torch 2.14.1, timm 1.0.31, lightly 1.6.0, Python 3.11, CPU; 2026-11-27.
# It ends with 1 where this is no longer so.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 lightly==1.6.0
"$place/venv/bin/python" - <<'END'
import lightly
import timm
import torch
from lightly.models.modules import MaskedVisionTransformerTIMM

print("torch", torch.__version__, "timm", timm.__version__, "lightly", lightly.__version__)
images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
skip_weights = {"weight_initialization": "skip"}
skip_both = skip_weights | {"pos_embed_initialization": "skip"}
seen = []
for how in ({}, skip_weights, skip_both):
    # What a model has learned is, here, a random draw: positions as large as embeddings.
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2}
    vit = timm.models.VisionTransformer(**size, num_classes=0).eval()
    torch.nn.init.normal_(vit.pos_embed)

    before = {name: weight.clone() for name, weight in vit.state_dict().items()}
    with torch.no_grad():
        features = vit(images)
        MaskedVisionTransformerTIMM(vit=vit, **how)
        cosine = torch.cosine_similarity(features, vit(images)).mean().item()
    changed = [name for name, weight in vit.state_dict().items() if not weight.equal(before[name])]
    print(f"{how}: cosine {cosine:.2f}, {len(changed)} of {len(before)} tensors changed", end="")
    print(f", positions are trained: {vit.pos_embed.requires_grad}")
    seen.append((cosine, changed))
(by_default, many), (without, positions), (whole, none) = seen
surprise = by_default < 0.5 and len(many) > 9 and without < 0.5 and positions == ["pos_embed"]
raise SystemExit(0 if surprise and none == [] and whole > 0.99 else 1)
END
