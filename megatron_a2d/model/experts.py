"""Grouped-GEMM experts: a rank's experts as two stacked weights, multiplied in one kernel by torch's grouped matmul.

megatron.core's SequentialMLP runs one expert after another, a kernel for each of many small products. The checkpoint
is the same: expert e is at index e of `experts.experts.linear_fc1.weight` [experts, 2 f, h], gate and up as separate
shards, and of `experts.experts.linear_fc2.weight` [experts, h, f]. Shapes: T tokens sorted by expert, E this rank's
experts, h hidden, f this rank's rows of an expert.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_a2d.megatron_compat.device import device
from megatron_a2d.model.matrix_products import multiply
from megatron_a2d.model.swiglu import swiglu
from megatron_a2d.model.weight_gradients import add_product, gradient_buffer, hand_over

# torch 2.10 gave it a public name.
_grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


@functools.cache
def has_grouped_products(dtype: torch.dtype) -> bool:
    """Whether this torch has a grouped matmul for `dtype` on this device, found by trying it."""
    if _grouped_mm is None:
        return False
    tokens, weight = (torch.ones(shape, dtype=dtype, device=device()) for shape in ((16, 16), (1, 16, 16)))
    try:
        grouped_product(tokens, weight, torch.tensor([16], dtype=torch.int32, device=device()))
    except (RuntimeError, NotImplementedError):
        return False
    return True


def can_group(config: TransformerConfig) -> bool:
    """Whether a layer's experts can be one grouped product here: its rows must be aligned to 16 bytes."""
    rows = config.moe_ffn_hidden_size // config.expert_tensor_parallel_size
    aligned = all(size * config.params_dtype.itemsize % 16 == 0 for size in (config.hidden_size, rows))
    return aligned and has_grouped_products(config.params_dtype)


def grouped_product(tokens_Ti: Tensor, weight_Eoi: Tensor, ends_E: Tensor) -> Tensor:
    """[T, o]: each token times its expert's matrix. Expert e's tokens end before ends_E[e] (int32, on the device)."""
    if tokens_Ti.device.type == "cpu":
        return _ProductsOneByOne.apply(tokens_Ti, weight_Eoi, ends_E.diff(prepend=ends_E.new_zeros(1)).tolist())
    return _grouped_mm(tokens_Ti, weight_Eoi.transpose(1, 2), offs=ends_E)


class _ProductsOneByOne(torch.autograd.Function):
    """The same on a CPU, with the weights' gradient added to megatron's main_grad as it is computed."""

    @staticmethod
    def forward(ctx: Any, tokens_Ti: Tensor, weight_Eoi: Tensor, counts: list[int]) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(tokens_Ti, weight_Eoi)
        ctx.counts = counts
        output_To = tokens_Ti.new_empty(len(tokens_Ti), weight_Eoi.size(1))
        for tokens, weight, output in zip(tokens_Ti.split(counts), weight_Eoi, output_To.split(counts), strict=True):
            multiply(tokens, weight.T, out=output)
        return output_To

    @staticmethod
    def backward(ctx: Any, gradient_To: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tokens_Ti, weight_Eoi = ctx.saved_tensors
        gradients = gradient_To.split(ctx.counts)
        tokens_gradient = buffer_Eoi = None
        if ctx.needs_input_grad[0]:
            tokens_gradient = torch.empty_like(tokens_Ti)
            for gradient, weight, output in zip(gradients, weight_Eoi, tokens_gradient.split(ctx.counts), strict=True):
                multiply(gradient, weight, out=output)
        if ctx.needs_input_grad[1]:
            buffer_Eoi = gradient_buffer(weight_Eoi)
            for buffer, gradient, tokens in zip(buffer_Eoi, gradients, tokens_Ti.split(ctx.counts), strict=True):
                add_product(buffer, gradient, tokens)
        return tokens_gradient, hand_over(weight_Eoi, buffer_Eoi), None


class GroupedExperts(MegatronModule):
    """The experts of an MoE layer, called as megatron.core calls SequentialMLP."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        assert pg_collection is not None and config.gated_linear_unit and not config.add_bias_linear
        self.num_local_experts, self.groups = num_local_experts, pg_collection
        self.recomputes_activation = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )
        rows = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": device()}
        self.weight1 = torch.nn.Parameter(torch.empty(num_local_experts, 2 * rows, config.hidden_size, **options))
        self.weight2 = torch.nn.Parameter(torch.empty(num_local_experts, config.hidden_size, rows, **options))
        for weight, dim, initialise in (
            (self.weight1, 1, config.init_method),
            (self.weight2, 2, config.output_layer_init_method),
        ):
            set_tensor_model_parallel_attributes(weight, True, dim, 1)
            # As in megatron's own experts; megatron_compat/versions.py says why that is not enough, and corrects both.
            weight.allreduce = pg_collection.ep.size() == 1  # type: ignore[attr-defined]
            if config.perform_initialization:
                with torch.no_grad():
                    initialise(weight)

    def forward(self, tokens_Th: Tensor, tokens_per_expert_E: Tensor, probs_T: Tensor) -> tuple[Tensor, None]:
        """The weighted outputs [T, h] and no bias."""
        if not len(tokens_Th):  # the parameters still need a gradient, zeros
            nothing = (tokens_Th @ self.weight1[0].T)[:, : self.weight2.size(2)] * probs_T[:, None].to(tokens_Th.dtype)
            return nothing @ self.weight2[0].T, None
        ends_E = tokens_per_expert_E.to(tokens_Th.device, non_blocking=True).cumsum(0).int()
        inner_T2f = grouped_product(tokens_Th, self.weight1, ends_E)
        if not self.recomputes_activation:
            return grouped_product(swiglu(inner_T2f, probs_T), self.weight2, ends_E), None
        kept = CheckpointWithoutOutput()
        output_Th = grouped_product(kept.checkpoint(swiglu, inner_T2f, probs_T), self.weight2, ends_E)
        kept.discard_output_and_register_recompute(output_Th)
        return output_Th, None

    def backward_dw(self) -> None:
        """Nothing: weight gradients are not delayed here."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The keys and shapes of SequentialMLP, in fewer shards."""
        axes, groups = len(sharded_offsets), self.groups
        replica = (0, 0, groups.expt_dp.rank())
        experts = (axes, groups.ep.rank(), groups.ep.size())
        tp_rank, tp_size = groups.expt_tp.rank(), groups.expt_tp.size()

        def shard(key: str, data: Tensor, replica_id: Any, partition: tuple[int, int, int]) -> ShardedTensor:
            offsets = (*sharded_offsets, experts, partition)
            return ShardedTensor.from_rank_offsets(key, data, *offsets, replica_id=replica_id, prepend_axis_num=axes)

        # The optimizer calls this with its own tensors and keys.
        def gate_and_up(key: str, data: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
            halves = enumerate(data.chunk(2, dim=1))
            return [
                shard(key, half, replica_id, (axes + 1, part * tp_size + tp_rank, 2 * tp_size)) for part, half in halves
            ]

        key = f"{prefix}experts.linear_fc"
        state: dict[str, Any] = {
            f"{prefix}weight1": ShardedTensorFactory(
                f"{key}1.weight", self.weight1, gate_and_up, lambda halves: torch.cat(halves, dim=1), replica
            ),
            f"{prefix}weight2": shard(f"{key}2.weight", self.weight2, replica, (axes + 2, tp_rank, tp_size)),
        }
        # Megatron's own layers keep an extra state for each expert; it is empty.
        for local in range(self.num_local_experts):
            number = groups.ep.rank() * self.num_local_experts + local
            offsets = [*sharded_offsets, (axes, number, groups.ep.size() * self.num_local_experts)]
            shape, index = tuple(size for _, _, size in offsets), tuple(index for _, index, _ in offsets)
            for layer in (1, 2):
                extra = ShardedObject(f"{key}{layer}._extra_state", None, shape, index, (0, tp_rank, replica[2]))
                state[f"{prefix}linear_fc{layer}._extra_state{local}"] = extra
        return state
