"""Cloze evaluation of facts in the training corpus, which a model can only know from having seen it.

A fact is a context of `CONTEXT` tokens that occurs at least `MIN_COUNT` times in the training text, always followed by
the same token, which is not in the context itself (repetitions need no knowledge). The test covers all positions of
held-out text where such a context occurs and the fact holds.
"""

from __future__ import annotations

import numpy as np

from megatron_a2d.data.indexed_dataset import TokenFile

CONTEXT, MIN_COUNT = 6, 8
MOST_TOKENS = 20_000_000  # read from the training text; enough for thousands of facts
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Facts:
    """The facts of a training text."""

    def __init__(self, train: TokenFile, end_of_document: int | None):
        self._end = end_of_document
        tokens = train.read(0, min(train.num_tokens, MOST_TOKENS))
        contexts, answers = _contexts(tokens), tokens[CONTEXT:]
        order = np.argsort(contexts, kind="stable")
        contexts, answers = contexts[order], answers[order]
        starts = np.flatnonzero(np.append(True, contexts[1:] != contexts[:-1]))
        counts = np.diff(np.append(starts, len(contexts)))
        is_sure = np.minimum.reduceat(answers, starts) == np.maximum.reduceat(answers, starts)
        facts = starts[is_sure & (counts >= MIN_COUNT)]
        self._contexts, self._answers = contexts[facts], answers[facts]  # sorted by context

    def __len__(self) -> int:
        return len(self._contexts)

    def asked(self, tokens_L: np.ndarray) -> np.ndarray:
        """[L] bool: True at tokens that are determined by a fact, the context before them."""
        asked_L = np.zeros(len(tokens_L), dtype=bool)
        if not len(self) or len(tokens_L) <= CONTEXT:
            return asked_L
        contexts, answers = _contexts(tokens_L), tokens_L[CONTEXT:]
        index = np.searchsorted(self._contexts, contexts).clip(max=len(self) - 1)
        good = (self._contexts[index] == contexts) & (self._answers[index] == answers)
        windows = np.lib.stride_tricks.sliding_window_view(tokens_L, CONTEXT)[:-1]
        good &= (windows != answers[:, None]).all(axis=1)
        if self._end is not None:  # exclude contexts that span two documents
            good &= (windows != self._end).all(axis=1)
        asked_L[CONTEXT:] = good
        return asked_L


def _contexts(tokens: np.ndarray) -> np.ndarray:
    """A uint64 hash of the `CONTEXT` tokens before each token from index `CONTEXT` on."""
    values = tokens.astype(np.uint64) + np.uint64(1)
    count = len(tokens) - CONTEXT
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(CONTEXT):
        hashes = (hashes ^ values[offset : offset + count]) * _FACTOR
        hashes ^= hashes >> np.uint64(29)
    return hashes
