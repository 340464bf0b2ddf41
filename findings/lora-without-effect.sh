#!/bin/sh
# peft and torch meet: LoRA on nn.TransformerEncoderLayer trains, and has no effect in eval mode.
#
# Guess: a layer whose Linear modules were replaced by peft's gives the same output in train and in
# eval mode where nothing is dropped, with or without gradients: the adapter is part of both.
# Seen: in train mode the adapter acts and learns. In eval mode the output is that of the base model
# to rounding, as if there were no adapter, under no_grad or not, and no error or warning.
#     the adapter moves the output by 1.0000 in train mode (the loss falls from 1.99 to 1.44),
#     by 0.0000 in eval mode, and by 0.7817 with a hook that does nothing in the first layer
# Why: in eval mode the layer hands linear1.weight and linear2.weight to one fused kernel and calls
# no module. peft's wrapper answers for `.weight` with the base weight. Where these want gradients
# torch takes the long way, but they are frozen. A forward hook inside a layer makes that layer
# take it, too, so that its adapter comes back as soon as somebody looks.
# It matters to who fine-tunes torch's own layers: the loss falls, evaluations are the base model's.
# Remedies: merge_and_unload() or torch.backends.mha.set_fastpath_enabled(False).
# Versions: torch 2.14.1, peft 0.21.2, Python 3.11, CPU; 2026-11-27. Exits with 1 if it changes.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.14.1 peft==0.21.2
"$place/venv/bin/python" - <<'END'
import peft
import torch
from torch import nn

print("torch", torch.__version__, "peft", peft.__version__)
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
x, target = torch.randn(2, 64, 10, 32)
plain = base(x).detach()
model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["linear1", "linear2"]))

# Train the adapter alone.
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)  # frozen weights have no gradient
for step in range(50):
    optimizer.zero_grad()
    loss = (model(x) - target).square().mean()
    loss.backward()
    optimizer.step()
    if step in (0, 49):
        print(f"step {step}, training loss {loss:.3f}")


def moved():
    return (model(x) - plain).abs().mean().item()


training = moved()
model.eval()
evaluation = moved()
base.layers[0].linear1.register_forward_hook(lambda *_: None)
with torch.no_grad():
    hooked = moved()
print(f"moved by the adapter: {training:.4f} in train mode, {evaluation:.4f} in eval mode,")
print(f"{hooked:.4f} in eval mode with an idle hook in the first layer")
raise SystemExit(0 if training > 0.05 and evaluation < 1e-5 and hooked > 0.01 else 1)
END
