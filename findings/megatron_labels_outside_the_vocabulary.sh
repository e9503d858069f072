#!/bin/bash
# Guess before running: vocab_parallel_cross_entropy gives a label of -100, as Hugging Face's collators write it, neither
# loss nor gradient, or refuses it.
#
# Seen with megatron-core 0.16.1 and 0.19.2 (torch 2.13.0): such a label, and every other one outside of the vocabulary,
# has the loss of the token that the model finds most probable, and a gradient that is not that loss's: the probabilities
# themselves, which pushes every logit down. Of an ordinary label they add up to zero, of an ignored one they are zero.
#   label    loss     -log of the largest p   its own -log p   sum of the gradient
#   1        3.3399   1.3389                  3.3399           0
#   -100     1.5100   1.5100                  -                1
#   9        3.3735   0.8418                  3.3735           0
#   10       1.1236   1.1236                  -                1
# Ten logits, labels 0 to 9 are in the vocabulary. Without a loss mask positions that should not count are trained.
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" --disable-pip-version-check install --quiet "$@"; }
pip torch==2.13.0
pip numpy==2.4.6 packaging==26.3
for version in 0.16.1 0.19.2; do
  # 0.19.2 asks for Python 3.12, and runs on 3.11 as well.
  pip --no-deps --ignore-requires-python megatron-core==$version
  "$folder/venv/bin/python" -W ignore - "$folder/rendezvous-$version" $version <<'PYTHON'
import sys
import types

# 0.19.2 imports kernels for GPUs that need triton, which torch's CPU builds do not bring. Nothing here runs them.
kernels = types.ModuleType("placeholder")
vars(kernels).update(GLOBAL_BLOCK_SIZE=0, paged_stash_copy_kernel=None, paged_stash_pop_kernel=None)
sys.modules["megatron.core.transformer.moe.ops.paged_stash"] = kernels

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

rendezvous, version = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
parallel_state.initialize_model_parallel()

torch.manual_seed(0)
logits = torch.randn(1, 4, 10)
labels = torch.tensor([[1, -100, 9, 10]])
given = logits.clone().requires_grad_()
loss = vocab_parallel_cross_entropy(given * 1, labels)
loss.sum().backward()

log_p = logits.log_softmax(-1)[0]
print(f"megatron-core {version}: label, loss, -log of the largest p, its own -log p, sum of the gradient")
changed = False
for row, label in enumerate(labels[0].tolist()):
    is_inside = 0 <= label < 10
    own, largest = -log_p[row, label if is_inside else 0], -log_p[row].max()
    gradient = given.grad[0, row]
    print(f"  {label} {loss[0, row]:.4f} {largest:.4f} {f'{own:.4f}' if is_inside else '-'} {gradient.sum():.4f}")
    changed |= not torch.allclose(loss[0, row], own if is_inside else largest)
    changed |= abs(gradient.sum().item() - (0 if is_inside else 1)) > 1e-5
    changed |= not is_inside and not torch.allclose(gradient, log_p[row].exp())
torch.distributed.destroy_process_group()
sys.exit(changed)
PYTHON
done
