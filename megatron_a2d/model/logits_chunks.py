"""Chunk size of the chunked cross entropy, also used by the planner; imports no torch."""

from __future__ import annotations

# Logits of a chunk: 1 GB in bf16 on a GPU, 270 MB in fp32 on a CPU.
_ELEMENTS = {"cuda": 2**29, "cpu": 2**26}


def rows_per_chunk(vocabulary: int, device: str) -> int:
    """The number of positions per chunk of logits over `vocabulary`: a multiple of 64, at least 64."""
    return max(64, _ELEMENTS[device] // vocabulary // 64 * 64)
