"""What sampling and evaluation ask of a model: numbers for some of its rows, whatever runs it.

The model runs the transformer, takes the rows that are needed, and hands them with its head to a
`reduce` of the caller, which makes a few numbers a row of them. So the head sees needed rows only, the logits of a
large vocabulary exist a few rows at a time, and where several processes run the model, only those few numbers travel.
Row r of the output predicts position r + 1 under the label shift, else position r; whoever asks knows which.

Shapes: B batch, L sequence, A window, N needed rows (row by row, from left to right), n a part of them, D hidden,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

Head = Callable[[Tensor], Tensor]  # hidden [n, D] -> logits [n, V]
Reduce = Callable[[Tensor, Head], tuple[Tensor, ...]]  # hidden [N, D], head -> any number of tensors [N]

# Few large parts: each reads the head's whole weight, which at Qwen3's vocabulary costs as much as 30 rows do on a CPU.
_PART_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


class Request(NamedTuple):
    """One forward pass."""

    tokens: Tensor  # [B, L] int64
    visible: Tensor  # [B, L] bool, False at padding
    needed: Tensor  # [B, L] bool, the rows that are wanted
    # For models with caches (see `Window`); None: everything is computed and nothing is kept.
    window: Window | None = None
    # For models of block diffusion (diffusion/block_diffusion.py); None: all tokens see one another.
    levels: Tensor | None = None  # [B, L] int64
    positions: Tensor | None = None  # [B, L] int64, where they are not 0 .. L - 1


class Window(NamedTuple):
    """Which positions are computed anew; keys and values of the others are those of the last time."""

    slots: Tensor  # [B] int64, which of the caches each row of the batch uses
    active: Tensor  # [B, L] bool; all needed rows are active


class Model(Protocol):
    """Anything that can run a `Request`."""

    def __call__(self, request: Request, reduce: Reduce) -> tuple[Tensor, ...]: ...


def from_logits(logits_fn: Callable[[Tensor], Tensor]) -> Model:
    """A `Model` of a function from tokens [B, L] to logits [B, L, V]; padding is its own business."""

    def run(request: Request, reduce: Reduce) -> tuple[Tensor, ...]:
        return reduce(logits_fn(request.tokens)[request.needed], lambda logits_nV: logits_nV)

    return run


def logits_in_chunks(hidden_ND: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
    """The head's fp32 logits, a few rows at a time; they may be changed in place."""
    start, size = 0, 64
    while start < len(hidden_ND):
        part = slice(start, start + size)
        logits_nV = head(hidden_ND[part]).float()
        yield part, logits_nV
        start += size
        size = max(1, _PART_BYTES.get(hidden_ND.device.type, _PART_BYTES["cuda"]) // (4 * logits_nV.shape[-1]))
