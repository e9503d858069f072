"""Log-likelihoods of many continuations: sorted by length and batched over requests and draws.

A diffusion model takes the draws of diffusion/conditional_likelihood.py; an autoregressive one a single pass.
Sequences that are equal once they are masked are run once: the four letters that may answer a question differ in the
label alone. Shapes: B sequences, L their padded length, N masked tokens of all of them, C labels of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_a2d.diffusion.conditional_likelihood import (
    Draws,
    likelihood_draws,
    log_likelihood,
    pseudo_likelihood_draws,
)
from megatron_a2d.diffusion.model_interface import Head, Request, logits_in_chunks
from megatron_a2d.diffusion.rng import Stream
from megatron_a2d.evaluation.response_cache import Journal
from megatron_a2d.inference.loaded_model import Opened
from megatron_a2d.utils.errors import UserError

LIKELIHOODS = ("monte_carlo", "pseudo")
# Requests between two writes of the journal, in sequences of a full batch.
_BATCHES_PER_GROUP = 16


@dataclass(frozen=True)
class ScoringOptions:
    """likelihood: monte_carlo bounds log p(y | x), pseudo adds up log p(y_i | everything else).

    mc_num: forward passes a request, at most. batch_tokens: tokens of a batch, padding included.
    """

    likelihood: str = "monte_carlo"
    mc_num: int = 128
    batch_tokens: int = 4096
    seed: int = 0


class Scored(NamedTuple):
    """log p(continuation | context) in nats, and its Monte Carlo standard error (0: exact).

    is_greedy: with the whole continuation masked, the likeliest token is the right one everywhere; for an
    autoregressive model, greedy decoding gives the continuation.
    """

    log_likelihood: float
    standard_error: float
    is_greedy: bool


class Item(NamedTuple):
    """A draw of a request."""

    request: int
    draw: int
    tokens: np.ndarray  # [l], masked
    rows: np.ndarray  # [n] output rows that are needed
    labels: np.ndarray  # [n] their right tokens


# The draws that one sequence answers: equal tokens, equal rows.
Shared = list[Item]


def score(
    opened: Opened,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    options: ScoringOptions,
    journal: Journal | None = None,
    advance: Callable[[float], None] = lambda count: None,
) -> list[Scored]:
    """For each (context, continuation) in tokens. A context needs a token under the label shift and for AR models.

    `advance` is told how many requests are done. What the journal knows is not run again.
    """
    journal = journal or Journal(None, None)
    # With the stream of draws: answers from another one would not share their noise with these.
    keys = [
        journal.key("likelihood", int(Stream.CONTINUATION), list(context), list(continuation))
        for context, continuation in requests
    ]
    unknown = [number for number, key in enumerate(keys) if journal.get(key) is None]
    advance(len(requests) - len(unknown))
    # Long ones first: the largest batch is the first, and the estimate of the time left errs on the safe side.
    # The choices of a question come together: those of one length share sequences.
    unknown.sort(key=lambda n: (-len(requests[n][0]) - len(requests[n][1]), list(requests[n][0]), keys[n]))
    plans: dict[int, Draws] = {}
    for group in _groups(unknown, requests, options, opened, plans):
        found = _run(opened, {number: requests[number] for number in group}, plans, options)
        journal.add({keys[number]: list(scored) for number, scored in found.items()})
        advance(len(group))
    return [Scored(*journal.get(key)) for key in keys]


def check_lengths(opened: Opened, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """UserError for what cannot be scored."""
    for context, continuation in requests:
        if len(context) + len(continuation) > opened.max_positions:
            raise UserError(
                f"a request has {len(context) + len(continuation)} tokens, and the model has {opened.max_positions} "
                "positions; shorten its context"
            )
        if not continuation:
            raise UserError("a request has an empty continuation; there is nothing to score")
        if not context and (opened.label_shift or opened.objective == "ar"):
            raise UserError("a request has an empty context, and nothing predicts its first token; give it a token")


def _groups(
    numbers: list[int],
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    options: ScoringOptions,
    opened: Opened,
    plans: dict[int, Draws],
) -> Iterator[list[int]]:
    """Pieces of the sorted requests that fill some batches each."""
    group, tokens = [], 0
    for number in numbers:
        context, continuation = requests[number]
        draws = _draws(opened, len(continuation), options, plans)
        group.append(number)
        tokens += (len(context) + len(continuation)) * (len(draws.masks) + 1 if draws is not None else 1)
        if tokens >= _BATCHES_PER_GROUP * options.batch_tokens:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _draws(opened: Opened, num_tokens: int, options: ScoringOptions, plans: dict[int, Draws]) -> Draws:
    if num_tokens not in plans:
        if opened.objective == "ar":
            plans[num_tokens] = Draws(np.ones((1, num_tokens), bool), np.ones(1), np.zeros(1, np.int64), 1)
        elif options.likelihood == "pseudo":
            plans[num_tokens] = pseudo_likelihood_draws(num_tokens)
        else:
            plans[num_tokens] = likelihood_draws(num_tokens, options.mc_num, options.seed)
    return plans[num_tokens]


def _run(
    opened: Opened,
    requests: dict[int, tuple[Sequence[int], Sequence[int]]],
    plans: dict[int, Draws],
    options: ScoringOptions,
) -> dict[int, Scored]:
    merged: dict[tuple[bytes, bytes], Shared] = {}
    for number, request in requests.items():
        for item in _items(opened, number, request, plans):
            merged.setdefault((item.tokens.tobytes(), item.rows.tobytes()), []).append(item)
    losses = {number: np.zeros(len(plans[len(request[1])].masks)) for number, request in requests.items()}
    greedy = {}
    for batch in _batches(sorted(merged.values(), key=lambda shared: -len(shared[0].tokens)), options.batch_tokens):
        for item, loss, correct in _losses(opened, batch):
            # The last item of a request has everything masked; its weight may be that of a draw, or none.
            if item.draw < len(losses[item.request]):
                losses[item.request][item.draw] = loss
            if len(item.rows) == len(requests[item.request][1]):
                greedy[item.request] = correct
    found = {}
    for number, (_, continuation) in requests.items():
        estimate = log_likelihood(plans[len(continuation)], losses[number])
        error = 0.0 if opened.objective == "ar" else estimate.standard_error
        found[number] = Scored(estimate.mean, error, greedy[number])
    return found


def _items(
    opened: Opened, number: int, request: tuple[Sequence[int], Sequence[int]], plans: dict[int, Draws]
) -> Iterator[Item]:
    context, continuation = (np.asarray(part, dtype=np.int64) for part in request)
    tokens = np.concatenate([context, continuation])
    positions = np.arange(len(context), len(tokens))
    shift = int(opened.label_shift or opened.objective == "ar")
    masks = plans[len(continuation)].masks
    if not masks.all(axis=1).any():
        masks = np.concatenate([masks, np.ones((1, len(continuation)), dtype=bool)])
    for draw, mask in enumerate(masks):
        masked = tokens.copy()
        if opened.objective != "ar":
            masked[positions[mask]] = opened.mask_token_id
        yield Item(number, draw, masked, positions[mask] - shift, continuation[mask])


def _batches(sequences: list[Shared], batch_tokens: int) -> Iterator[list[Shared]]:
    """Runs of the sorted sequences whose padded size stays within `batch_tokens`; at least one each."""
    batch: list[Shared] = []
    for shared in sequences:
        if batch and (len(batch) + 1) * len(batch[0][0].tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(shared)
    if batch:
        yield batch


def _losses(opened: Opened, batch: list[Shared]) -> Iterator[tuple[Item, float, bool]]:
    """Of each item: the sum of its rows' cross-entropies in nats, and whether every likeliest token is right."""
    shape = (len(batch), max(len(shared[0].tokens) for shared in batch))
    tokens_BL, visible_BL = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    needed_BL = np.zeros(shape, dtype=bool)
    counts = [len(shared[0].rows) for shared in batch]
    labels_NC = np.zeros((sum(counts), max(map(len, batch))), dtype=np.int64)
    starts = np.cumsum([0, *counts])
    for row, shared in enumerate(batch):
        tokens = shared[0].tokens
        tokens_BL[row, : len(tokens)], visible_BL[row, : len(tokens)] = tokens, True
        needed_BL[row, shared[0].rows] = True
        for column, item in enumerate(shared):
            labels_NC[starts[row] : starts[row + 1], column] = item.labels
    arrays = (tokens_BL, visible_BL, needed_BL, labels_NC)
    tokens_t, visible, needed, labels = (torch.from_numpy(array).to(opened.device) for array in arrays)
    found = opened.run(Request(tokens_t, visible, needed), partial(label_losses, labels_NC=labels))
    losses_NC, correct_NC = (column.cpu().numpy() for column in found)
    for row, shared in enumerate(batch):
        rows = slice(starts[row], starts[row + 1])
        for column, item in enumerate(shared):
            yield item, float(losses_NC[rows, column].sum(dtype=np.float64)), bool(correct_NC[rows, column].all())


def label_losses(hidden_ND: Tensor, head: Head, labels_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row's labels [N, C] in nats, and whether they are the likeliest token [N, C]."""
    losses, correct = [], []
    for part, logits_nV in logits_in_chunks(hidden_ND, head):
        labels_nC = labels_NC[part]
        losses.append(logits_nV.logsumexp(-1, keepdim=True) - logits_nV.gather(-1, labels_nC))
        correct.append(logits_nV.argmax(-1, keepdim=True) == labels_nC)
    return torch.cat(losses), torch.cat(correct)
