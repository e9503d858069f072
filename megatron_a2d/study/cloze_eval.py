"""A cloze test on facts of the corpus: what a model can know only from having read this text.

A fact is a context of `CONTEXT` tokens that the training text holds at least `LEAST` times and always continues with
one and the same token, which is not in the context itself: repetitions need no knowledge. Asked are the places of
held-out text where such a context stands, and the fact holds.
"""

from __future__ import annotations

import numpy as np

from megatron_a2d.data.indexed_dataset import TokenFile

CONTEXT, LEAST = 6, 8
MOST_TOKENS = 20_000_000  # of the training text that are read: enough for thousands of facts
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
        facts = starts[is_sure & (counts >= LEAST)]
        self._contexts, self._answers = contexts[facts], answers[facts]  # contexts ascending

    def __len__(self) -> int:
        return len(self._contexts)

    def asked(self, tokens_L: np.ndarray) -> np.ndarray:
        """[L] bool: True at tokens that a fact before them decides."""
        asked_L = np.zeros(len(tokens_L), dtype=bool)
        if not len(self) or len(tokens_L) <= CONTEXT:
            return asked_L
        contexts, answers = _contexts(tokens_L), tokens_L[CONTEXT:]
        place = np.searchsorted(self._contexts, contexts).clip(max=len(self) - 1)
        good = (self._contexts[place] == contexts) & (self._answers[place] == answers)
        windows = np.lib.stride_tricks.sliding_window_view(tokens_L, CONTEXT)[:-1]
        good &= (windows != answers[:, None]).all(axis=1)
        if self._end is not None:  # a context that spans two documents says nothing
            good &= (windows != self._end).all(axis=1)
        asked_L[CONTEXT:] = good
        return asked_L


def _contexts(tokens: np.ndarray) -> np.ndarray:
    """A hash of the `CONTEXT` tokens before each token from the number `CONTEXT` on, uint64 modulo 2^64."""
    values = tokens.astype(np.uint64) + np.uint64(1)
    count = len(tokens) - CONTEXT
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(CONTEXT):
        hashes = (hashes ^ values[place : place + count]) * _FACTOR
        hashes ^= hashes >> np.uint64(29)
    return hashes
