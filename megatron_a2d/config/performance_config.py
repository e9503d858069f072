"""Settings of precision, kernels, overlap, CUDA graphs and memory, declared as in settings.py.

Invalid combinations: validate_performance.py; what installed versions lack: installed_versions.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class PerformanceConfig:
    """Faster training or less memory; most settings need Transformer Engine on a GPU."""

    fp8_recipe: Literal["none", "auto", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """FP8 recipe of the layers' GEMMs; auto: mxfp8 on Blackwell, tensorwise on Hopper; emulated with
    --transformer-impl local, on any device"""
    fp4_recipe: Literal["none", "nvfp4"] = "none"
    """FP4 recipe of the layers' GEMMs, on Blackwell; emulated with --transformer-impl local, on any device"""
    fp8_output_proj: bool = False
    """also run the LM head's GEMMs in FP8; only in emulation"""
    first_last_layers_bf16: bool = False
    """keep the first and last layers in bf16 under FP8 or FP4"""
    num_layers_at_start_in_bf16: int = 1
    """with first_last_layers_bf16: how many layers at the start"""
    num_layers_at_end_in_bf16: int = 1
    """with first_last_layers_bf16: how many layers at the end"""
    fp8_param_gather: bool = False
    """keep the layers' weights in FP8 and all-gather them in FP8; checkpoints still hold bf16"""
    moe_grouped_gemm: bool = True
    """compute a rank's experts with one grouped GEMM, where the device has one"""
    moe_flex_dispatcher_backend: Literal["auto", "deepep", "hybridep"] = "auto"
    """kernels of the flex dispatcher (package deep_ep); auto: hybridep, else deepep, else the alltoall dispatcher with
    a warning"""
    moe_hybridep_num_sms: int | None = None
    """SMs of HybridEP's dispatch and combine; default: megatron.core's (0.16) or DeepEP's"""
    moe_hybridep_num_sms_preprocessing: int | None = None
    """SMs of HybridEP's routing-map scan; needs megatron-core 0.19, whose default is 108"""
    use_transformer_engine_op_fuser: bool = False
    """build experts from Transformer Engine's fusible operations, whose grouped GEMMs take tokens-per-expert from
    device memory"""
    moe_expert_rank_capacity_factor: float | None = None
    """with hybridep and use_transformer_engine_op_fuser: buffers for this multiple of the mean number of tokens per
    rank, which removes the host sync; a step that exceeds it is repeated without the limit"""
    moe_permute_fusion: bool = False
    """permute tokens for the experts in a fused kernel"""
    moe_router_fusion: bool = False
    """fused kernel for top-k routing"""
    moe_router_force_load_balancing: bool = False
    """ignore the router and spread tokens evenly: for benchmarks only"""
    overlap_moe_expert_parallel_comm: bool = False
    """overlap the expert all-to-all of one micro-batch with the compute of another"""
    delay_wgrad_compute: bool = False
    """with overlap_moe_expert_parallel_comm: compute weight gradients during the all-to-all"""
    apply_rope_fusion: bool = False
    """fused kernel for rotary embeddings"""
    gradient_accumulation_fusion: bool = False
    """accumulate weight gradients into the fp32 buffer inside the GEMM"""
    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = "none"
    """capture layers as CUDA graphs and replay them; megatron.core's or Transformer Engine's implementation"""
    cuda_graph_scope: tuple[str, ...] = field(
        default=("attn",), metadata={"choices": ("attn", "mlp", "moe_router", "moe_preprocess")}
    )
    """parts of a layer that are captured: attn mlp moe_router moe_preprocess"""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """activations that the backward pass recomputes: those of recompute_modules, or of whole layers"""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """with full recomputation: all layers (uniform), or the first recompute_num_layers of each stage (block)"""
    recompute_num_layers: int = 1
    """with full recomputation: layers per recomputed unit (uniform), or per stage (block)"""
    recompute_modules: tuple[str, ...] = field(
        default=(), metadata={"choices": ("core_attn", "moe_act", "layernorm", "mlp", "moe")}
    )
    """with selective recomputation: modules to recompute, of core_attn moe_act layernorm mlp moe"""
    grad_reduce_in_fp32: bool = True
    """accumulate and reduce gradients in fp32; without: in the parameters' dtype"""
    use_precision_aware_optimizer: bool = False
    """Transformer Engine's Adam with moments in the dtypes below"""
    exp_avg_dtype: Literal["fp32", "bf16"] = "fp32"
    """with use_precision_aware_optimizer: dtype of the first moment"""
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = "fp32"
    """with use_precision_aware_optimizer: dtype of the second moment"""
    manual_gc: bool = False
    """run Python's garbage collection on all ranks at the same time, every manual_gc_interval iterations"""
    manual_gc_interval: int = 100
    """with manual_gc: iterations between collections"""
