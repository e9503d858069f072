#!/bin/bash
# Guess before running: the name of a subclass of Qwen3ForCausalLM decides whether its labels are shifted only where
# config.loss_type does not.
#
# Seen with transformers 4.57.6 and 5.23.0 (torch 2.13.0): whether labels are shifted follows from the name of the class.
# The first entry of a table of losses that is found in the name decides, and the same weights with the same labels have
# another loss (position i predicts token i + 1, shifted, or token i):
#   Qwen3ForCausalLM              5.7517   shifted
#   Qwen3ForMaskedLM              5.6427   not shifted
#   DiffusionForMaskedLMHead      5.6427   not shifted
#   Qwen3ForCausalLMForMaskedLM   5.7517   shifted
#   DiffusionQwen3                5.7517   shifted
#   RND1LM                        5.7517   shifted
# For the last two, whose names hold no entry, a line says that loss_type=None "was set in the config"; for others nothing.
# But config.loss_type, "ForMaskedLM" or "ForCausalLM", changes nothing under any name; model.loss_type does.
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" --disable-pip-version-check install --quiet "$@"; }
pip torch==2.13.0
for pins in "transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2" \
  "transformers==5.23.0 huggingface_hub==2.4.0 tokenizers==0.23.3"; do
  # shellcheck disable=SC2086
  pip $pins numpy==2.4.6 safetensors==0.8.0
  HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=8, initializer_range=0.3)


def loss(name, in_config=None, on_model=None):
    """The offset of the position whose logits predict token 4, and the loss of that token alone."""
    torch.manual_seed(0)
    settings = {} if in_config is None else {"loss_type": in_config}
    config = Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, **settings)
    model = type(name, (Qwen3ForCausalLM,), {})(config).eval()
    if on_model is not None:
        model.loss_type = on_model
    labels = torch.full((1, 8), -100)
    labels[0, 4] = 9
    with torch.no_grad():
        output = model(torch.arange(1, 9)[None], labels=labels)
    by_position = -output.logits[0].log_softmax(-1)[:, 9]
    (position,) = (abs(by_position - output.loss) < 1e-5).nonzero().flatten().tolist()
    return position - 4, round(output.loss.item(), 4)


names = {
    "Qwen3ForCausalLM": -1,
    "Qwen3ForMaskedLM": 0,
    "DiffusionForMaskedLMHead": 0,
    "Qwen3ForCausalLMForMaskedLM": -1,
    "DiffusionQwen3": -1,
    "RND1LM": -1,
}
print(f"transformers {transformers.__version__}")
changed = False
for name, offset in names.items():
    seen, value = loss(name)
    print(f"  {name}: {value}, predicted at offset {seen}")
    changed |= seen != offset
    for kind, its_offset in (("ForMaskedLM", 0), ("ForCausalLM", -1)):
        changed |= loss(name, in_config=kind)[0] != offset or loss(name, on_model=kind)[0] != its_offset
sys.exit(changed)
PYTHON
done
