"""The validation of training, on a model that was opened for evaluation: same samples, same noise, same sums.

What a sample is and how it is masked comes from training/loop.py and data/, what is made of the sums from
diffusion/validation.py; the forward pass alone is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_a2d.config import RunConfig
from megatron_a2d.data.batches import make_batch
from megatron_a2d.data.dataset import PackedDataset
from megatron_a2d.data.vocabulary import Vocabulary, find_foreign_tokens
from megatron_a2d.diffusion.forward import Request
from megatron_a2d.diffusion.objective import sample_sums
from megatron_a2d.diffusion.validation import SampleColumns, ValidationResult, summarise
from megatron_a2d.errors import UserError
from megatron_a2d.evaluation.scoring import label_losses
from megatron_a2d.inference.opened import Opened
from megatron_a2d.printable import is_name
from megatron_a2d.training.loop import make_sample
from megatron_a2d.training.validation import VALIDATION_SEED


class Source(NamedTuple):
    """Held-out data of one kind."""

    name: str
    dataset: PackedDataset


def open_sources(
    named_paths: Sequence[str],
    seq_length: int,
    vocab_size: int,
    mask_token_id: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> list[Source]:
    """From `PREFIX` or `NAME=PREFIX` words; a name is by default the prefix's last part.

    UserError for tokens that are not the model's: outside of its rows, its mask token, or, where its `vocabulary` is
    given, made with another.
    """
    sources: list[Source] = []
    for word in named_paths:
        name, equals, prefix = word.partition("=")
        if not equals:
            name, prefix = Path(word).name, word
        if not is_name(name):
            raise UserError(f"--valid-data-path {word}: {name!r} is no name for a source; write another NAME={prefix}")
        if any(name == source.name for source in sources):
            raise UserError(f"--valid-data-path {word}: there are two sources called {name!r}; write NAME={prefix}")
        dataset = PackedDataset(
            prefix, seq_length, seed=VALIDATION_SEED, vocab_size=vocab_size, mask_token_id=mask_token_id
        )
        sources.append(Source(name, dataset))
    if vocabulary and (problems := list(find_foreign_tokens([source.dataset.file for source in sources], vocabulary))):
        raise UserError(problems)
    return sources


def evaluate_sources(
    opened: Opened,
    config: RunConfig,
    sources: Sequence[Source],
    num_samples: int,
    advance: Callable[[float], None] = lambda count: None,
) -> dict[str, ValidationResult]:
    """The result of each source, and "all" of them together where there are several.

    `num_samples` of each, or as many as it has; `config` says how samples are made (objective, noise, documents).
    """
    results, tables = {}, []
    for source in sources:
        columns = SampleColumns(min(num_samples, source.dataset.num_samples))
        make = make_sample(config, opened.architecture, source.dataset, VALIDATION_SEED)
        for start in range(0, len(columns.table), config.training.micro_batch_size):
            size = min(config.training.micro_batch_size, len(columns.table) - start)
            batch = make_batch(source.dataset, make, start, size)
            needed_BL = batch.weights > 0
            labels_N, weights_N = batch.labels[needed_BL].to(opened.device), batch.weights[needed_BL]
            visible_BL = torch.ones_like(needed_BL)
            tokens, visible, needed = (x.to(opened.device) for x in (batch.tokens, visible_BL, needed_BL))
            levels, positions = (
                None if rows is None else rows.to(opened.device) for rows in (batch.levels, batch.positions)
            )
            request = Request(tokens, visible, needed, levels=levels, positions=positions)
            losses_N, correct_N = opened.run(request, partial(label_losses, labels_NC=labels_N[:, None]))
            sums = sample_sums(losses_N[:, 0].cpu(), weights_N, correct_N[:, 0].cpu(), needed_BL.nonzero()[:, 0], size)
            columns.put(batch.sample_index, batch.times, batch.num_maskable, sums)
            advance(size)
        results[source.name] = summarise(columns)
        tables.append(columns.table)
    if len(sources) > 1:
        together = SampleColumns(0)
        together.table = torch.cat(tables)
        results["all"] = summarise(together)
    return results
