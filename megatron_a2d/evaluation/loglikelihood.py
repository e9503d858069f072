"""Log-likelihoods of continuations given their contexts, batched over requests and masks and sorted by length.

A diffusion model evaluates the masks of diffusion/conditional_likelihood.py, an autoregressive one takes a single
pass. Sequences that are equal once masked share a forward pass: the four answer letters of a multiple-choice question
differ only in the label. Shapes: B sequences, L their padded length, N masked tokens in total, C labels per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_a2d.diffusion.conditional_likelihood import (
    MaskSamples,
    likelihood_samples,
    log_likelihood,
    pseudo_likelihood_samples,
)
from megatron_a2d.diffusion.model_interface import Head, Request, logits_in_chunks
from megatron_a2d.diffusion.rng import Stream
from megatron_a2d.evaluation.response_cache import ResponseCache
from megatron_a2d.inference.loaded_model import LoadedModel
from megatron_a2d.utils.errors import UserError

LIKELIHOODS = ("monte_carlo", "pseudo")
# Responses are written to the cache after this many full batches.
_BATCHES_PER_GROUP = 16

Pair = tuple[Sequence[int], Sequence[int]]
"""(context, continuation) in token ids"""


@dataclass(frozen=True)
class ScoringOptions:
    """likelihood: monte_carlo is a lower bound of log p(y | x), pseudo the sum of log p(y_i | everything else).

    mc_num: forward passes per request, at most. batch_tokens: tokens per batch, padding included.
    """

    likelihood: str = "monte_carlo"
    mc_num: int = 128
    batch_tokens: int = 4096
    seed: int = 0


class Scored(NamedTuple):
    """log p(continuation | context) in nats, and its Monte Carlo standard error (0: exact).

    is_greedy: the argmax at every position equals the continuation when all of it is masked; for an autoregressive
    model, greedy decoding gives the continuation.
    """

    log_likelihood: float
    standard_error: float
    is_greedy: bool


class MaskedRequest(NamedTuple):
    """A request under one of its masks: the input sequence, and what is predicted from it."""

    request: int
    mask: int  # row of `MaskSamples.masks`; one past the last is the full mask, added for is_greedy alone
    tokens: np.ndarray  # [l] input, masked
    positions: np.ndarray  # [n] of the logits needed
    labels: np.ndarray  # [n] target tokens


# Requests that one forward pass answers: same tokens, same positions, other labels.
Deduplicated = list[MaskedRequest]


def score(
    loaded: LoadedModel,
    requests: Sequence[Pair],
    options: ScoringOptions,
    cache: ResponseCache | None = None,
    on_progress: Callable[[float], None] = lambda num_requests: None,
) -> list[Scored]:
    """The log-likelihood of each (context, continuation); requests in the cache are not run again.

    A context needs at least one token under the label shift and for autoregressive models. `on_progress` is called
    with numbers of finished requests.
    """
    cache = cache or ResponseCache(None, None)
    # The stream of the masks is part of the key: estimates from another stream would not share their noise with these.
    keys = [
        cache.key("likelihood", int(Stream.CONTINUATION), list(context), list(continuation))
        for context, continuation in requests
    ]
    pending = [number for number, key in enumerate(keys) if cache.get(key) is None]
    on_progress(len(requests) - len(pending))
    # Longest first: running out of memory shows at once, and the estimated time left is conservative.
    # The choices of a question follow one another: those of equal length share sequences.
    pending.sort(key=lambda n: (-len(requests[n][0]) - len(requests[n][1]), list(requests[n][0]), keys[n]))
    for group in _groups(pending, requests, options, loaded):
        scored = _score_group(loaded, {number: requests[number] for number in group}, options)
        cache.add({keys[number]: list(result) for number, result in scored.items()})
        on_progress(len(group))
    return [Scored(*cache.get(key)) for key in keys]


def check_lengths(loaded: LoadedModel, requests: Sequence[Pair]) -> None:
    """UserError for a request that cannot be scored."""
    for context, continuation in requests:
        if len(context) + len(continuation) > loaded.max_positions:
            raise UserError(
                f"a request has {len(context) + len(continuation)} tokens, and the model has {loaded.max_positions} "
                "positions; shorten its context"
            )
        if not continuation:
            raise UserError("a request has an empty continuation; there is nothing to score")
        if not context and (loaded.label_shift or loaded.objective == "ar"):
            raise UserError("a request has an empty context, and nothing predicts its first token; give it a token")


def _groups(
    numbers: list[int], requests: Sequence[Pair], options: ScoringOptions, loaded: LoadedModel
) -> Iterator[list[int]]:
    """Consecutive sorted requests, about `_BATCHES_PER_GROUP` full batches per group."""
    group, tokens = [], 0
    for number in numbers:
        context, continuation = requests[number]
        masks = masks_of(len(continuation), loaded.objective, options).masks
        group.append(number)
        tokens += (len(context) + len(continuation)) * (len(masks) + 1)
        if tokens >= _BATCHES_PER_GROUP * options.batch_tokens:
            yield group
            group, tokens = [], 0
    if group:
        yield group


@lru_cache(maxsize=256)
def masks_of(num_tokens: int, objective: str, options: ScoringOptions) -> MaskSamples:
    """The masks under which a continuation of `num_tokens` is scored, and their weights. Cached: do not modify."""
    if objective == "ar":
        return MaskSamples(np.ones((1, num_tokens), bool), np.ones(1), np.zeros(1, np.int64), 1)
    if options.likelihood == "pseudo":
        return pseudo_likelihood_samples(num_tokens)
    return likelihood_samples(num_tokens, options.mc_num, options.seed)


def _score_group(loaded: LoadedModel, requests: dict[int, Pair], options: ScoringOptions) -> dict[int, Scored]:
    """Score requests by number: apply each one's masks, run them, and combine the losses."""
    masks = {number: masks_of(len(request[1]), loaded.objective, options) for number, request in requests.items()}
    losses = {number: np.zeros(len(masks[number].masks)) for number in requests}
    greedy = {}
    sequences = (
        masked for number, request in requests.items() for masked in _masked_requests(loaded, number, request, options)
    )
    for masked, losses_n, is_correct in token_losses(loaded, sequences, options.batch_tokens):
        if masked.mask < len(losses[masked.request]):
            losses[masked.request][masked.mask] = losses_n.sum()
        if len(masked.positions) == len(requests[masked.request][1]):  # the full mask
            greedy[masked.request] = is_correct
    scored = {}
    for number in requests:
        estimate = log_likelihood(masks[number], losses[number])
        error = 0.0 if loaded.objective == "ar" else estimate.standard_error
        scored[number] = Scored(estimate.mean, error, greedy[number])
    return scored


def _masked_requests(
    loaded: LoadedModel, number: int, request: Pair, options: ScoringOptions
) -> Iterator[MaskedRequest]:
    """The request under each of its masks, and under the full mask if it is not one of them."""
    masks = masks_of(len(request[1]), loaded.objective, options).masks
    if not masks.all(axis=1).any():
        masks = np.concatenate([masks, np.ones((1, len(request[1])), dtype=bool)])
    for index, mask in enumerate(masks):
        yield masked_request(loaded, request, mask, number, index)


def masked_request(loaded: LoadedModel, request: Pair, mask: np.ndarray, number: int, index: int) -> MaskedRequest:
    """The request with the tokens of `mask` [n] masked; `number` and `index` tell which one it is."""
    context, continuation = (np.asarray(tokens, dtype=np.int64) for tokens in request)
    inputs = np.concatenate([context, continuation])
    positions = np.arange(len(context), len(inputs))[mask]
    if loaded.objective != "ar":
        inputs[positions] = loaded.mask_token_id
    shift = int(loaded.label_shift or loaded.objective == "ar")
    return MaskedRequest(number, index, inputs, positions - shift, continuation[mask])


def token_losses(
    loaded: LoadedModel, requests: Iterable[MaskedRequest], batch_tokens: int
) -> Iterator[tuple[MaskedRequest, np.ndarray, bool]]:
    """For each request, in another order: cross-entropies in nats [n] float64, and whether every argmax is its label.

    Equal sequences are run once; the longest first.
    """
    deduplicated: dict[tuple[bytes, bytes], Deduplicated] = {}
    for masked in requests:
        deduplicated.setdefault((masked.tokens.tobytes(), masked.positions.tobytes()), []).append(masked)
    for batch in _batches(sorted(deduplicated.values(), key=lambda same: -len(same[0].tokens)), batch_tokens):
        yield from _losses(loaded, batch)


def _batches(sequences: list[Deduplicated], batch_tokens: int) -> Iterator[list[Deduplicated]]:
    """Consecutive sorted sequences whose padded size stays within `batch_tokens`; at least one per batch."""
    batch: list[Deduplicated] = []
    for same in sequences:
        if batch and (len(batch) + 1) * len(batch[0][0].tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(same)
    if batch:
        yield batch


def _losses(loaded: LoadedModel, batch: list[Deduplicated]) -> Iterator[tuple[MaskedRequest, np.ndarray, bool]]:
    """For each masked request, its cross-entropies in nats [n] and whether every argmax is its label."""
    shape = (len(batch), max(len(same[0].tokens) for same in batch))
    tokens_BL, visible_BL = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    needed_BL = np.zeros(shape, dtype=bool)
    counts = [len(same[0].positions) for same in batch]
    labels_NC = np.zeros((sum(counts), max(map(len, batch))), dtype=np.int64)
    starts = np.cumsum([0, *counts])
    for row, same in enumerate(batch):
        tokens = same[0].tokens
        tokens_BL[row, : len(tokens)], visible_BL[row, : len(tokens)] = tokens, True
        needed_BL[row, same[0].positions] = True
        for column, masked in enumerate(same):
            labels_NC[starts[row] : starts[row + 1], column] = masked.labels
    arrays = (tokens_BL, visible_BL, needed_BL, labels_NC)
    tokens_t, visible, needed, labels = (torch.from_numpy(array).to(loaded.device) for array in arrays)
    results = loaded.forward(Request(tokens_t, visible, needed), partial(label_losses, labels_NC=labels))
    losses_NC, correct_NC = (column.cpu().numpy() for column in results)
    for row, same in enumerate(batch):
        own = slice(starts[row], starts[row + 1])
        for column, masked in enumerate(same):
            yield masked, losses_NC[own, column].astype(np.float64), bool(correct_NC[own, column].all())


def label_losses(hidden_ND: Tensor, head: Head, labels_NC: Tensor) -> tuple[Tensor, Tensor]:
    """For each hidden state and each of its labels, the cross-entropy in nats and whether it is the argmax, [N, C]."""
    losses, correct = [], []
    for part, logits_nV in logits_in_chunks(hidden_ND, head):
        labels_nC = labels_NC[part]
        losses.append(logits_nV.logsumexp(-1, keepdim=True) - logits_nV.gather(-1, labels_nC))
        correct.append(logits_nV.argmax(-1, keepdim=True) == labels_nC)
    return torch.cat(losses), torch.cat(correct)
