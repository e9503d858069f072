#!/bin/bash
# Guess before running: GPTDatasetConfig.sequences_per_dataset (Megatron-LM's --per-dataset-sequences-path) only saves
# reading the counts of sequences from the .idx file; the samples stay the same.
#
# Seen with megatron-core 0.16.1 and 0.19.2: with it the type of the tokens is not read from the .idx file either, but
# guessed from the tokenizer: uint16 up to 65,536 tokens. Their own writer chooses uint16 below 65,500 only, and int32 is
# the builder's default. Where the two differ, a file of int32 is read as uint16, without an error or a warning: a zero
# after every token, and the second half of every document never. A document of 11 to 18:
#   vocabulary, type in the file   without it                with it
#   50,000, uint16                 11 12 13 14 15 16 17 18   11 12 13 14 15 16 17 18
#   50,000, int32                  11 12 13 14 15 16 17 18   11 0 12 0 13 0 14 0
#   65,500, int32                  11 12 13 14 15 16 17 18   11 0 12 0 13 0 14 0
#   151,936, int32                 11 12 13 14 15 16 17 18   11 12 13 14 15 16 17 18
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
  "$folder/venv/bin/python" -W ignore - "$folder" $version <<'PYTHON'
import pathlib
import sys
import types

import numpy

# 0.19.2 imports kernels for GPUs that need triton, which torch's CPU builds do not bring. Nothing here runs them.
kernels = types.ModuleType("placeholder")
vars(kernels).update(GLOBAL_BLOCK_SIZE=0, paged_stash_copy_kernel=None, paged_stash_pop_kernel=None)
sys.modules["megatron.core.transformer.moe.ops.paged_stash"] = kernels

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

root, version = pathlib.Path(sys.argv[1]), sys.argv[2]


def tokens(prefix, vocab_size, counts):
    tokenizer = types.SimpleNamespace(vocab_size=vocab_size, eod=0, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=8,
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        sequences_per_dataset=counts,
    )
    dataset = GPTDataset.build_low_level_dataset(prefix, config)  # documents are views of it
    return dataset[1].tolist()


right, wrong = [11, 12, 13, 14, 15, 16, 17, 18], [11, 0, 12, 0, 13, 0, 14, 0]
own = DType.optimal_dtype
changed = False
print(f"megatron-core {version}")
for vocab_size, dtype, with_it in (
    (50_000, own(50_000), right),
    (50_000, numpy.int32, wrong),
    (65_500, own(65_500), wrong),
    (151_936, own(151_936), right),
):
    prefix = str(root / f"{vocab_size}_{dtype.__name__}")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=dtype)
    for number in range(3):
        builder.add_document(torch.arange(10 * number + 1, 10 * number + 9), [8])
    builder.finalize(prefix + ".idx")
    seen = [tokens(prefix, vocab_size, counts) for counts in (None, {prefix: (3, 4)})]
    print(f"  {vocab_size}, {dtype.__name__}: {seen[0]} without, {seen[1]} with sequences_per_dataset")
    changed |= seen != [right, with_it]
sys.exit(changed)
PYTHON
done
