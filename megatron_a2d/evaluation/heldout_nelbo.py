"""The validation of training, on a model that was opened for evaluation: same samples, same noise, same sums.

What a sample is and how it is masked comes from data/diffusion_samples.py, what is made of the sums from
diffusion/metrics.py; the forward pass alone is another one.
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
from megatron_a2d.inference.loaded_model import Opened
from megatron_a2d.training.validation import VALIDATION_SEED
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import is_name


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
    eod_token_id: int | None = None,
) -> list[Source]:
    """From `PREFIX` or `NAME=PREFIX` words; a name is by default the prefix's last part. `eod_token_id` closes
    documents where a file of another tool does not say.

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
            prefix, seq_length, seed=VALIDATION_SEED, vocab_size=vocab_size, mask_token_id=mask_token_id,
            eod_token_id=eod_token_id,
        )  # fmt: skip
        sources.append(Source(name, dataset))
    if vocabulary and (problems := list(find_foreign_tokens([source.dataset.file for source in sources], vocabulary))):
        raise UserError(problems)
    return sources


def _judge(opened: Opened, batch: Batch, needed_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The loss in nats of each needed row, and whether its label is the likeliest token, [N] on the CPU."""
    losses, correct = torch.zeros(needed_BL.numel()), torch.zeros(needed_BL.numel(), dtype=torch.bool)
    for places_PX, real_PX in _passes(batch):
        tokens, needed, labels, levels, positions = (
            None if rows is None else rows.flatten()[places_PX]
            for rows in (batch.tokens, needed_BL, batch.labels, batch.levels, batch.positions)
        )
        assert tokens is not None and needed is not None and labels is not None
        needed &= real_PX
        if not needed.any():
            continue
        if positions is not None:  # below the row's length, for models with as many rotary angles
            first = positions.masked_fill(~real_PX, positions.max()).amin(1, keepdim=True)
            positions = (positions - first) * real_PX
        rows = (None if row is None else row.to(opened.device) for row in (tokens, real_PX, needed, levels, positions))
        tokens, visible, wanted, levels, positions = rows
        request = Request(tokens, visible, wanted, levels=levels, positions=positions)  # type: ignore[arg-type]
        labels_N1 = labels[needed].to(opened.device)[:, None]
        losses_N1, correct_N1 = opened.run(request, partial(label_losses, labels_NC=labels_N1))
        losses[places_PX[needed]], correct[places_PX[needed]] = losses_N1[:, 0].float().cpu(), correct_N1[:, 0].cpu()
    return losses[needed_BL.flatten()], correct[needed_BL.flatten()]


def _passes(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of each forward pass: [P, X] int64, places in the flattened batch, and [P, X] bool, False at padding.

    Documents that do not see one another have rows of their own: rotary positions are relative, so that it makes no
    difference where a document begins, and exports need no other mask than padding's.
    """
    places_BL = torch.arange(batch.tokens.numel()).view(batch.tokens.shape)
    if batch.documents is None:
        yield places_BL, torch.ones_like(places_BL, dtype=torch.bool)
        return
    pieces = [
        places_L[documents_L == number]
        for places_L, documents_L in zip(places_BL, batch.documents, strict=True)
        for number in documents_L.unique()
    ]
    pieces.sort(key=len)
    while pieces:
        count = max(1, batch.tokens.numel() // len(pieces[-1]))  # no more tokens than the batch has
        part, pieces = pieces[-count:], pieces[:-count]
        yield (
            pad_sequence(part, batch_first=True),
            pad_sequence([torch.ones_like(piece, dtype=torch.bool) for piece in part], batch_first=True),
        )


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
        columns = SampleTable(min(num_samples, source.dataset.num_samples))
        make = make_sample(config, opened.architecture, source.dataset, VALIDATION_SEED)
        for start in range(0, len(columns.table), config.training.micro_batch_size):
            size = min(config.training.micro_batch_size, len(columns.table) - start)
            batch = make_batch(source.dataset, make, start, size)
            needed_BL = batch.weights > 0
            losses_N, correct_N = _judge(opened, batch, needed_BL)
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
