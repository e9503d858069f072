"""Jobs that only run a model forward: logits, samples and held-out losses of a layout."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch

from megatron_a2d import megatron_compat
from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, make_canvas
from megatron_a2d.hf.kv_cache_a2d import KeyValueCache
from megatron_a2d.inference.parallel_model import load_parallel_model
from megatron_a2d.model.local_layers import CoreAttention
from tests.parity.parity_jobs import SETTINGS, _start
from tests.tiny import MASK_TOKEN_ID


def logits(
    checkpoint: str,
    settings: dict[str, Any],
    tokens: torch.Tensor,
    documents: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    packed: bool = False,
) -> torch.Tensor:
    """Full logits [b, s, V] of a one-process model. `packed`: documents as packed sequences, as on a GPU, with an
    attention in the place of Transformer Engine's."""
    _, state, _ = _start(checkpoint, settings)
    state.models[0].packs_documents = packed
    original = CoreAttention.forward
    CoreAttention.forward = _packed_attention if packed else original
    try:
        with torch.no_grad():
            return state.models[0].logits(tokens, documents=documents, positions=positions).float()
    finally:
        CoreAttention.forward = original


def _packed_attention(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **more: Any
) -> torch.Tensor:
    """What Transformer Engine computes for packed sequences, [t, n, d]: each attends to itself."""
    bounds = more["packed_seq_params"].cu_seqlens_q.tolist()
    assert attention_mask is None and more["packed_seq_params"].qkv_format == "thd"
    pieces = []
    for start, stop in itertools.pairwise(bounds):
        heads = [tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value)]
        context = torch.nn.functional.scaled_dot_product_attention(*heads, enable_gqa=True)
        pieces.append(context[0].transpose(0, 1))
    return torch.cat(pieces).flatten(1)


def sample(
    checkpoint: str,
    layout: dict[str, Any],
    options: dict[str, Any],
    rows: list[list[int]],
    breaks_cache: bool = False,
) -> dict[str, Any]:
    """Fill the holes of `rows` with a sharded model. `breaks_cache`: keys are stored a position too far to the left."""
    megatron_compat.install()
    opened = load_parallel_model(checkpoint, layout)
    canvas = make_canvas([[MASK_TOKEN_ID if token < 0 else token for token in row] for row in rows], MASK_TOKEN_ID)
    original = KeyValueCache._updated

    def shifted(self: KeyValueCache, layer: int, *tensors: torch.Tensor) -> Any:
        return original(self, layer, *(tensor.roll(-1, 0) for tensor in tensors))

    KeyValueCache._updated = shifted if breaks_cache else original  # type: ignore[method-assign]
    try:
        sampled = denoise(
            opened.forward, canvas, opened.mask_token_id, SamplingOptions(**options), label_shift=opened.label_shift, seed=3
        )  # fmt: skip
    finally:
        KeyValueCache._updated = original  # type: ignore[method-assign]
    return {"tokens": sampled.tokens.tolist(), "num_forwards": sampled.num_forwards}


def held_out(checkpoint: str, layout: dict[str, Any], prefix: str, num_samples: int) -> dict[str, Any]:
    """What `evaluate --valid-data-path` reports of a checkpoint."""
    from megatron_a2d import evaluate

    megatron_compat.install()
    opened = load_parallel_model(checkpoint, layout)
    options = argparse.Namespace(
        valid_data_path=[prefix],
        seq_length=SETTINGS["seq_length"],
        micro_batch_size=3,
        num_samples=num_samples,
        verify_tokenizer=True,
    )
    (result,) = evaluate._held_out(options, opened, {}).values()
    return result
