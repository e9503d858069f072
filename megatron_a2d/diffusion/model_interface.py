"""The model interface of sampling and evaluation: a few numbers for some output positions, however the model is run.

The model runs the transformer, gathers the hidden states of the needed positions, and passes them with its LM head to a
`reduce` of the caller, which returns a few numbers per position. So the head sees needed positions only, the logits of
a large vocabulary exist a few positions at a time, and several processes exchange only those few numbers. The output at
position i predicts position i + 1 under the label shift, else position i; the caller knows which.

Shapes: B batch, L sequence, N needed positions (sample by sample, from left to right), n those of a chunk, D hidden,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

Head = Callable[[Tensor], Tensor]  # hidden [n, D] -> logits [n, V]
Reduce = Callable[[Tensor, Head], tuple[Tensor, ...]]  # hidden [N, D], head -> any number of tensors [N]

# Few large chunks: each reads the LM head's full weight, which costs as much as 30 positions at Qwen3's vocabulary on a
# CPU.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


class Request(NamedTuple):
    """One forward pass."""

    tokens: Tensor  # [B, L] int64
    visible: Tensor  # [B, L] bool, False at padding
    needed: Tensor  # [B, L] bool, the output positions that are wanted
    # For models with caches (see `Window`); None: everything is computed and nothing is cached.
    window: Window | None = None
    # For block diffusion models (diffusion/block_diffusion.py); None: full attention.
    levels: Tensor | None = None  # [B, L] int64
    positions: Tensor | None = None  # [B, L] int64, where they are not 0 .. L - 1


class Window(NamedTuple):
    """The positions to compute; keys and values of the others are taken from the cache."""

    slots: Tensor  # [B] int64, the cache of each sequence of the batch
    active: Tensor  # [B, L] bool; all needed positions are active


class Model(Protocol):
    """Anything that can run a `Request`."""

    def __call__(self, request: Request, reduce: Reduce) -> tuple[Tensor, ...]: ...


def from_logits(logits_fn: Callable[[Tensor], Tensor]) -> Model:
    """A `Model` from a function of tokens [B, L] to logits [B, L, V], which must handle padding itself."""

    def run(request: Request, reduce: Reduce) -> tuple[Tensor, ...]:
        return reduce(logits_fn(request.tokens)[request.needed], lambda logits_nV: logits_nV)

    return run


def logits_in_chunks(hidden_ND: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
    """The LM head's fp32 logits, a chunk of positions at a time; they may be changed in place."""
    start, size = 0, 64
    while start < len(hidden_ND):
        chunk = slice(start, start + size)
        logits_nV = head(hidden_ND[chunk]).float()
        yield chunk, logits_nV
        start += size
        size = max(1, _CHUNK_BYTES.get(hidden_ND.device.type, _CHUNK_BYTES["cuda"]) // (4 * logits_nV.shape[-1]))
