"""Other ways to compute what a job computes: samples in another order, sums in pieces, attention in tiles."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_a2d.model import attention_tiles, experts, masked_attention


class Reversed:
    """The micro-batches of an iteration, last one first."""

    def __init__(self, batches: Any):
        self.num_microbatches = batches.num_microbatches
        self._batches, self._waiting = batches, []

    def __next__(self) -> Any:
        if not self._waiting:
            self._waiting = [next(self._batches) for _ in range(self.num_microbatches)]
        return self._waiting.pop()

    def __iter__(self) -> Any:
        return self


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    """Masked attention in tiles (model/tiled_attention.py) as small as the samples, which are too short for others."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (attention_tiles, "CHUNK", 8), (attention_tiles, "SHORT", 2), (masked_attention, "SHORTEST", 0),
            (masked_attention, "_LARGEST_SHARE", 2.0),
        ):  # fmt: skip
            patch.setattr(module, name, value)
        masked_attention._tiles_of_fields.cache_clear()
        yield
    masked_attention._tiles_of_fields.cache_clear()
    assert any(name[0] == "tiles" for name in masked_attention._made), "nothing was tiled"
    masked_attention._made.clear()


@contextlib.contextmanager
def split_contractions(pieces: int) -> Iterator[None]:
    """a @ b as a sum over slices of the contraction, each rounded to a's dtype, as in tensor parallelism."""
    original, method = torch.matmul, torch.Tensor.matmul

    def split(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        if b.dim() != 2 or pieces == 1:
            return original(a, b, **options)
        parts = zip(a.tensor_split(pieces, -1), b.tensor_split(pieces, 0), strict=True)
        return torch.stack([original(left, right, **options) for left, right in parts]).sum(0)

    def split_groups(tokens: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        if pieces == 1:
            return grouped_product(tokens, weight, ends)
        bounds = itertools.pairwise([0, *ends.tolist()])
        return torch.cat([split(tokens[a:b], matrix.T) for matrix, (a, b) in zip(weight, bounds, strict=True)])

    grouped_product = experts.grouped_product
    torch.matmul, torch.Tensor.matmul = split, split  # type: ignore[assignment]
    experts.grouped_product = split_groups
    try:
        yield
    finally:
        torch.matmul, torch.Tensor.matmul, experts.grouped_product = original, method, grouped_product
