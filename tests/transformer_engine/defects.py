"""Defects that are planted to see that the comparison finds them; each stays for the rest of its process."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_a2d.model import diffusion_lm, layer_specs
from tests.transformer_engine.stand_in import per_tensor_fp8, products


def causal_mask() -> None:
    """Tokens do not see those after them."""
    layer = layer_specs._transformer_engine_layer
    layer_specs._transformer_engine_layer = lambda config, _: layer(config, AttnMaskType.causal)


def lost_micro_batch() -> None:
    """The third product that is added to a gradient takes its place."""
    store, seen = products._store, Counter[int]()

    def replace(total: Tensor, out: Tensor, accumulate: bool, beta: float = 1.0) -> None:
        seen[out.data_ptr()] += 1
        store(total, out, accumulate and seen[out.data_ptr()] != 3, beta)

    products._store = replace


def wrong_transpose() -> None:
    """The transposed copy of an FP8 tensor, which the backward pass reads, holds the tensor as it was."""
    fill = per_tensor_fp8.fill

    def fill_wrongly(quantizer: Any, values: Tensor, output: Any) -> None:
        fill(quantizer, values, output)
        if output._data is not None and output._transpose is not None:
            output._transpose.copy_(output._data.reshape(output._transpose.shape))

    per_tensor_fp8.fill = fill_wrongly


def stale_weights() -> None:
    """The quantised copies of weights are made for the first batch, and stay."""
    MegatronModule.set_is_first_microbatch = lambda self: None  # type: ignore[method-assign]


def wrong_expert_group() -> None:
    """Experts' gradients are averaged over the processes that share them, as though those held the same data."""
    build = DistributedDataParallel.__init__

    @functools.wraps(build)
    def build_wrongly(self: Any, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        for group in self.expert_parallel_bucket_groups:
            for bucket in group.buckets:
                bucket.gradient_scaling_factor /= 2

    DistributedDataParallel.__init__ = build_wrongly  # type: ignore[method-assign]


def shifted_documents() -> None:
    """The packed sequences of a sample begin one token late."""
    pack = diffusion_lm.PackedSeqParams

    def pack_wrongly(**fields: Any) -> Any:
        for name in ("cu_seqlens_q", "cu_seqlens_kv"):
            fields[name] = fields[name].clone()
            fields[name][1:-1] += 1
        for name in ("max_seqlen_q", "max_seqlen_kv"):
            fields[name] += 1
        return pack(**fields)

    diffusion_lm.PackedSeqParams = pack_wrongly
