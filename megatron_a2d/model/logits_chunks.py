"""Size of a chunk of logits: used by chunked_cross_entropy.py and counted by the planner. Imports no torch."""

from __future__ import annotations

# Logits of a chunk: 1 GB in bf16 on a GPU, 270 MB in fp32 on a CPU.
_ELEMENTS = {"cuda": 2**29, "cpu": 2**26}


def rows_per_chunk(vocabulary: int, device: str) -> int:
    """How many rows' logits over `vocabulary` are made at once: a multiple of 64, at least that."""
    return max(64, _ELEMENTS[device] // vocabulary // 64 * 64)
