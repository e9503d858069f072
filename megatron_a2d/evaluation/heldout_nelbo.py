"""Held-out NELBO of a loaded model, with the same samples, masks and statistics as validation in training.

Samples and masks come from data/diffusion_samples.py, statistics from diffusion/metrics.py; only the forward pass
differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_a2d.config.settings import RunConfig
from megatron_a2d.data.dataloader import Batch, make_batch
from megatron_a2d.data.diffusion_samples import make_sample
from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.data.tokenizer_fingerprint import Vocabulary, find_foreign_tokens
from megatron_a2d.diffusion.loss import sample_sums
from megatron_a2d.diffusion.metrics import SampleTable, ValidationResult, summarise
from megatron_a2d.diffusion.model_interface import Request
from megatron_a2d.evaluation.loglikelihood import label_losses
from megatron_a2d.inference.loaded_model import LoadedModel
from megatron_a2d.training.validation import VALIDATION_SEED
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import is_name


class Source(NamedTuple):
    """A held-out dataset."""

    name: str
    dataset: PackedDataset


def open_sources(
    named_paths: Sequence[str],
    seq_length: int,
    vocab_size: int,
    mask_token_id: int | None = None,
    vocabulary: Vocabulary | None = None,
    eod_token_id: int | None = None,
) -> list[Source]:
    """Open `PREFIX` or `NAME=PREFIX` arguments; the default name is the last part of the prefix. `eod_token_id`
    separates documents in files of other tools.

    UserError for tokens that are not the model's: ids outside its vocabulary, its mask token, or, if its `vocabulary`
    is given, ids of another tokenizer.
    """
    sources: list[Source] = []
    for word in named_paths:
        name, equals, prefix = word.partition("=")
        if not equals:
            name, prefix = Path(word).name, word
        if not is_name(name):
            raise UserError(f"--valid-data-path {word}: {name!r} is not a valid name; write another NAME={prefix}")
        if any(name == source.name for source in sources):
            raise UserError(f"--valid-data-path {word}: two sources have the name {name!r}; give NAME={prefix}")
        dataset = PackedDataset(
            prefix, seq_length, seed=VALIDATION_SEED, vocab_size=vocab_size, mask_token_id=mask_token_id,
            eod_token_id=eod_token_id,
        )  # fmt: skip
        sources.append(Source(name, dataset))
    if vocabulary and (problems := list(find_foreign_tokens([source.dataset.file for source in sources], vocabulary))):
        raise UserError(problems)
    return sources


def token_losses(loaded: LoadedModel, batch: Batch, needed_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats at each needed position, and whether its label is the argmax, [N] on the CPU."""
    losses, correct = torch.zeros(needed_BL.numel()), torch.zeros(needed_BL.numel(), dtype=torch.bool)
    for indices_PX, real_PX in _passes(batch):
        tokens, needed, labels, levels, positions = (
            None if rows is None else rows.flatten()[indices_PX]
            for rows in (batch.tokens, needed_BL, batch.labels, batch.levels, batch.positions)
        )
        assert tokens is not None and needed is not None and labels is not None
        needed &= real_PX
        if not needed.any():
            continue
        if positions is not None:  # below the sequence length, the number of rotary angles in some models
            first = positions.masked_fill(~real_PX, positions.max()).amin(1, keepdim=True)
            positions = (positions - first) * real_PX
        rows = (None if row is None else row.to(loaded.device) for row in (tokens, real_PX, needed, levels, positions))
        tokens, visible, wanted, levels, positions = rows
        request = Request(tokens, visible, wanted, levels=levels, positions=positions)  # type: ignore[arg-type]
        labels_N1 = labels[needed].to(loaded.device)[:, None]
        losses_N1, correct_N1 = loaded.forward(request, partial(label_losses, labels_NC=labels_N1))
        losses[indices_PX[needed]], correct[indices_PX[needed]] = losses_N1[:, 0].float().cpu(), correct_N1[:, 0].cpu()
    return losses[needed_BL.flatten()], correct[needed_BL.flatten()]


def _passes(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """The sequences of each forward pass: [P, X] int64 indices into the flattened batch, [P, X] bool False at padding.

    With document masking each document is a separate sequence: rotary positions are relative, so it does not matter
    where a document starts, and exports need only a padding mask.
    """
    indices_BL = torch.arange(batch.tokens.numel()).view(batch.tokens.shape)
    if batch.documents is None:
        yield indices_BL, torch.ones_like(indices_BL, dtype=torch.bool)
        return
    documents = [
        indices_L[documents_L == number]
        for indices_L, documents_L in zip(indices_BL, batch.documents, strict=True)
        for number in documents_L.unique()
    ]
    documents.sort(key=len)
    while documents:
        count = max(1, batch.tokens.numel() // len(documents[-1]))  # no more tokens than the batch has
        part, documents = documents[-count:], documents[:-count]
        yield (
            pad_sequence(part, batch_first=True),
            pad_sequence([torch.ones_like(document, dtype=torch.bool) for document in part], batch_first=True),
        )


def evaluate_sources(
    loaded: LoadedModel,
    config: RunConfig,
    sources: Sequence[Source],
    num_samples: int,
    advance: Callable[[float], None] = lambda count: None,
) -> dict[str, ValidationResult]:
    """The result per source, and over all of them as "all" if there are several.

    Uses `num_samples` of each, or as many as it has; `config` determines the samples (objective, noise, documents).
    """
    results, tables = {}, []
    for source in sources:
        columns = SampleTable(min(num_samples, source.dataset.num_samples))
        make = make_sample(config, loaded.model_config, source.dataset, VALIDATION_SEED)
        for start in range(0, len(columns.table), config.training.micro_batch_size):
            size = min(config.training.micro_batch_size, len(columns.table) - start)
            batch = make_batch(source.dataset, make, start, size)
            needed_BL = batch.weights > 0
            losses_N, correct_N = token_losses(loaded, batch, needed_BL)
            sums = sample_sums(losses_N, batch.weights[needed_BL], correct_N, needed_BL.nonzero()[:, 0], size)
            columns.put(batch.sample_index, batch.times, batch.num_maskable, sums)
            advance(size)
        results[source.name] = summarise(columns)
        tables.append(columns.table)
    if len(sources) > 1:
        together = SampleTable(0)
        together.table = torch.cat(tables)
        results["all"] = summarise(together)
    return results
