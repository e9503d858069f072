#!/bin/bash
# Guess before running: a Qwen3 whose attention modules all have is_causal = False is bidirectional with sdpa attention,
# but for the rows of a batch that are padded; and transformers 4.57 knows config.is_causal as 5 does.
#
# Seen with transformers 4.57.6 and 5.23.0 (torch 2.13.0), Qwen3 and Qwen3-MoE. Whether a token sees a later one of its
# row, in a batch without a mask, with a mask of ones, and of a row without padding beside one that has some:
#   is_causal = False on          attention   4.57.6          5.23.0
#   every attention module        sdpa        yes yes NO      yes yes NO
#   every attention module        eager       no  no  no      no  no  no
#   the configuration             sdpa        no  no  no      yes yes yes
#   the configuration             eager       no  no  no      yes yes yes
# So under the first, one padded row makes every row of its batch causal. Nothing is raised or logged in any case.
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
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8, initializer_range=0.3)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
EXPERTS = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)


def build(is_moe, place, attention):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, **HEADS, **EXPERTS) if is_moe else Qwen3Config(**SIZES, **HEADS)
    config._attn_implementation = attention
    if place == "configuration":
        config.is_causal = False
    model = (Qwen3MoeForCausalLM if is_moe else Qwen3ForCausalLM)(config).eval()
    if place == "module":
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
    return model


@torch.no_grad()
def sees_later_token(model, mask):
    """Whether token 4 of row 0, which has no padding, depends on its token 7."""
    tokens = torch.arange(1, 9).repeat(2, 1)
    others = tokens.clone()
    others[0, 7] = 50
    first, second = (model(given, attention_mask=mask).logits[0, 4] for given in (tokens, others))
    return not torch.allclose(first, second, atol=1e-6)


ones = torch.ones(2, 8, dtype=torch.long)
padded = ones.clone()
padded[1, :3] = 0
five = transformers.__version__.startswith("5.")
expected = {
    ("module", "sdpa"): [True, True, False],
    ("module", "eager"): [False, False, False],
    ("configuration", "sdpa"): [five] * 3,
    ("configuration", "eager"): [five] * 3,
}
print(f"transformers {transformers.__version__}: no mask, a mask of ones, a padded row beside it")
changed = False
for (place, attention), answers in expected.items():
    for is_moe in (False, True):
        model = build(is_moe, place, attention)
        seen = [sees_later_token(model, mask) for mask in (None, ones, padded)]
        print(f"  {place}, {attention}, {'MoE' if is_moe else 'dense'}: {seen}")
        changed |= seen != answers
sys.exit(changed)
PYTHON
done
