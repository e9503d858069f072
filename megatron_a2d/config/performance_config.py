"""The settings of precision, kernels, overlap, graphs and memory, as settings.py describes settings.

What does not go together: validate_performance.py; what an installed version lacks: installed_versions.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class PerformanceConfig:
    """The same training, faster or in less memory; most of it needs Transformer Engine on a GPU."""

    fp8_recipe: Literal["none", "auto", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """scaling of the layers' matrix products in FP8; auto: mxfp8 on Blackwell, tensorwise on Hopper; with
    --transformer-impl local it is emulated, on any device"""
    fp4_recipe: Literal["none", "nvfp4"] = "none"
    """the layers' matrix products in FP4, on Blackwell; with --transformer-impl local it is emulated, on any device"""
    fp8_output_proj: bool = False
    """the LM head's products in FP8 too; emulated alone"""
    first_last_layers_bf16: bool = False
    """keep the first and last layers in bf16 where the others compute in FP8 or FP4"""
    num_layers_at_start_in_bf16: int = 1
    """with first_last_layers_bf16: how many layers at the start"""
    num_layers_at_end_in_bf16: int = 1
    """with first_last_layers_bf16: how many layers at the end"""
    fp8_param_gather: bool = False
    """hold the layers' weights in FP8 and gather them so; checkpoints hold bf16 all the same"""
    moe_grouped_gemm: bool = True
    """all experts' products of a rank in one kernel, where the device has one"""
    moe_flex_dispatcher_backend: Literal["auto", "deepep", "hybridep"] = "auto"
    """kernels of the flex dispatcher, of the package deep_ep; auto: hybridep, else deepep, and where both are missing
    the alltoall dispatcher, with a line in the log"""
    moe_hybridep_num_sms: int | None = None
    """streaming multiprocessors of hybridep's dispatch and combine; default: megatron.core's (0.16) or DeepEP's"""
    moe_hybridep_num_sms_preprocessing: int | None = None
    """streaming multiprocessors of hybridep's scan of the routing map; megatron-core 0.19, whose default is 108"""
    use_transformer_engine_op_fuser: bool = False
    """experts of Transformer Engine's fusible operations, which read the experts' group sizes on the device"""
    moe_expert_rank_capacity_factor: float | None = None
    """with hybridep and use_transformer_engine_op_fuser: room for so many times the mean number of tokens on each
    rank, so that the host need not wait for their number; a step that exceeds it is repeated without"""
    moe_permute_fusion: bool = False
    """sort tokens by expert in one kernel"""
    moe_router_fusion: bool = False
    """choose experts in one kernel"""
    moe_router_force_load_balancing: bool = False
    """ignore the router and spread tokens evenly: for benchmarks alone"""
    overlap_moe_expert_parallel_comm: bool = False
    """send one micro-batch's tokens to their experts while another one computes"""
    delay_wgrad_compute: bool = False
    """with overlap_moe_expert_parallel_comm: compute weight gradients during the all-to-all"""
    apply_rope_fusion: bool = False
    """rotate queries and keys in one kernel"""
    gradient_accumulation_fusion: bool = False
    """add weight gradients to the fp32 buffer inside their matrix products"""
    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = "none"
    """capture layers as CUDA graphs and replay them; megatron.core's or Transformer Engine's implementation"""
    cuda_graph_scope: tuple[str, ...] = field(
        default=("attn",), metadata={"choices": ("attn", "mlp", "moe_router", "moe_preprocess")}
    )
    """parts of a layer that are captured: attn mlp moe_router moe_preprocess"""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """what the backward pass computes again instead of keeping: the modules of recompute_modules, or whole layers"""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """with full recomputation: all layers, or the first recompute_num_layers of each stage"""
    recompute_num_layers: int = 1
    """with full recomputation: layers of a unit (uniform), or of a stage (block)"""
    recompute_modules: tuple[str, ...] = field(
        default=(), metadata={"choices": ("core_attn", "moe_act", "layernorm", "mlp", "moe")}
    )
    """with selective recomputation: core_attn moe_act layernorm mlp moe"""
    grad_reduce_in_fp32: bool = True
    """sum gradients over micro-batches and processes in fp32; without: in the parameters' type"""
    use_precision_aware_optimizer: bool = False
    """let Transformer Engine's Adam keep its moments in the types below"""
    exp_avg_dtype: Literal["fp32", "bf16"] = "fp32"
    """with use_precision_aware_optimizer: type of the first moment"""
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = "fp32"
    """with use_precision_aware_optimizer: type of the second moment"""
    manual_gc: bool = False
    """collect Python's garbage on all ranks at the same time, every manual_gc_interval iterations"""
    manual_gc_interval: int = 100
    """with manual_gc: iterations between collections"""
