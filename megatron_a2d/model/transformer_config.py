"""megatron.core's TransformerConfig, built from a model's architecture and a run's settings.

Built here and nowhere else. TransformerConfig adds and renames fields between releases; an unknown field fails here, by
name, instead of being ignored.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import megatron.core
import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_te_version, is_te_min_version

from megatron_a2d.config.fp8_recipe import engine_scaling
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.performance_config import PerformanceConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.config.validate_performance import find_performance_problems
from megatron_a2d.distributed.environment import rank
from megatron_a2d.megatron_compat import versions
from megatron_a2d.megatron_compat.device import compute_capability, cuda_version, has_cuda
from megatron_a2d.model.layer_specs import choose_implementation
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_line

# Eager steps before CUDA graphs are captured, after which allocator, autotuning and FP8 scales have settled.
GRAPH_WARMUP_STEPS = 3
_FP4_ENGINE = "2.7.0"  # the first release with NVFP4 (megatron.core, fp4_utils.py)


def build_transformer_config(model_config: ModelConfig, config: RunConfig) -> TransformerConfig:
    """The configuration of every layer, on every rank of the run's layout."""
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    interleaved = config.parallel.virtual_pipeline_size is not None
    fields: dict[str, Any] = dict(
        num_layers=model_config.num_layers,
        hidden_size=model_config.hidden_size,
        num_attention_heads=model_config.num_attention_heads,
        num_query_groups=model_config.num_key_value_heads,
        kv_channels=model_config.head_dim,
        ffn_hidden_size=model_config.intermediate_size,
        # What all families have: RMS norms, SwiGLU, no dropout, no biases but those of queries, keys and values.
        normalization="RMSNorm",
        layernorm_epsilon=model_config.rms_norm_eps,
        qk_layernorm=model_config.qk_layernorm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model_config.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        init_method_std=model_config.initializer_range,
        # The layout.
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        sequence_parallel=config.parallel.sequence_parallel,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.parallel.virtual_pipeline_size,
        context_parallel_size=config.parallel.context_parallel_size,
        expert_model_parallel_size=config.parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=config.parallel.expert_tensor_parallel_size,
        # Numbers.
        bf16=config.training.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=not has_cuda(),
        # The loss is divided once, by the global number of maskable tokens (see diffusion/loss.py).
        calculate_per_token_loss=True,
        # These need apex: its norm, its fused softmax.
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=True,
        masked_softmax_fusion=False,
        # A send that overlaps with computation still reads its tensor.
        deallocate_pipeline_outputs=not interleaved,
        variable_seq_lengths=False,
        batch_p2p_comm=False,
        overlap_p2p_comm=interleaved,  # the plain schedule has nothing to overlap with
    )
    if model_config.rope_scaling:
        # Queries and keys times the attention factor are scores times its square. megatron.core has its own way, which
        # its fused kernel cannot do, and which is lost for packed sequences (0.16.1, rope_utils.py).
        fields["softmax_scale"] = model_config.rope_scaling.attention_factor**2 / model_config.head_dim**0.5
    if model_config.is_moe:
        fields.update(
            num_moe_experts=model_config.num_experts,
            moe_router_topk=model_config.num_experts_per_tok,
            moe_ffn_hidden_size=model_config.moe_intermediate_size,
            moe_router_score_function="softmax",
            # Hugging Face takes the softmax over all experts and renormalises the chosen ones (norm_topk_prob);
            # a softmax over the chosen ones alone is the same number.
            moe_router_pre_softmax=not model_config.norm_topk_prob,
            moe_router_dtype="fp32",
            # megatron.core's auxiliary losses depend on the layout; ours: load_balancing.py.
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
            moe_expert_capacity_factor=config.balancing.moe_expert_capacity_factor,
            moe_token_drop_policy=config.balancing.moe_token_drop_policy,
            moe_pad_expert_input_to_capacity=config.balancing.moe_pad_expert_input_to_capacity,
            moe_token_dispatcher_type=config.parallel.moe_token_dispatcher_type,
        )
    fields.update(_speed_fields(model_config, config))
    known = {item.name for item in dataclasses.fields(TransformerConfig)}
    if unknown := sorted(set(fields) - known):
        raise UserError(f"megatron-core {megatron.core.__version__}: its TransformerConfig has no {', '.join(unknown)}")
    return TransformerConfig(**fields)


def _speed_fields(model_config: ModelConfig, config: RunConfig) -> dict[str, Any]:
    """Precision, fusions, overlap, graphs and recomputation, under megatron.core's names."""
    performance = config.performance
    implementation = choose_implementation(config)
    # GroupedMLP of ours or TEGroupedMLP; megatron.core reads it where it decides on recomputation. Muon orthogonalises
    # matrices, and ours has a rank's experts in one tensor (Transformer Engine's has a matrix for each).
    stacked_for_muon = config.optimization.optimizer == "muon" and implementation != "transformer_engine"
    grouped = model_config.is_moe and performance.moe_grouped_gemm and not stacked_for_muon
    fields: dict[str, Any] = dict(
        transformer_impl="transformer_engine" if implementation == "transformer_engine" else "local",
        gradient_accumulation_fusion=performance.gradient_accumulation_fusion,
        apply_rope_fusion=performance.apply_rope_fusion,
        moe_grouped_gemm=grouped,
    )
    if scaling := engine_scaling(config, compute_capability(), cuda_version()):
        kind = "fp8" if scaling.is_fp8 else "fp4"
        if kind == "fp4" and not is_te_min_version(_FP4_ENGINE):
            raise UserError(
                f"--fp4-recipe {scaling.recipe}: needs Transformer Engine {_FP4_ENGINE} or later, and "
                f"{get_te_version()} is installed; update it, or use --fp8-recipe auto"
            )
        fields.update(
            {kind: scaling.format, f"{kind}_recipe": scaling.recipe},
            fp8_param=performance.fp8_param_gather,
            first_last_layers_bf16=performance.first_last_layers_bf16,
            num_layers_at_start_in_bf16=performance.num_layers_at_start_in_bf16,
            num_layers_at_end_in_bf16=performance.num_layers_at_end_in_bf16,
        )
    if model_config.is_moe:
        fields.update(
            moe_permute_fusion=performance.moe_permute_fusion,
            moe_router_fusion=performance.moe_router_fusion,
            moe_router_force_load_balancing=performance.moe_router_force_load_balancing,
            overlap_moe_expert_parallel_comm=performance.overlap_moe_expert_parallel_comm,
            delay_wgrad_compute=performance.delay_wgrad_compute,
        )
        if performance.use_transformer_engine_op_fuser:
            fields["use_transformer_engine_op_fuser"] = True
    if config.parallel.moe_token_dispatcher_type == "flex":
        if backend := _flex_backend(performance.moe_flex_dispatcher_backend):
            fields.update(moe_flex_dispatcher_backend=backend, **_hybridep_fields(performance, backend))
        else:
            fields.update(_all_to_all(model_config, config))
    if performance.cuda_graph_impl != "none":
        fields.update(
            cuda_graph_impl=performance.cuda_graph_impl,
            cuda_graph_warmup_steps=GRAPH_WARMUP_STEPS,
            **versions.graphed_parts(performance.cuda_graph_scope),
        )
    if performance.cuda_graph_impl != "none" and not scaling:
        # Otherwise a graph is captured as that of a step's first micro-batch, and every later one, with fused
        # accumulation, replaces the gradients of those before it (Transformer Engine's pull request 2715).
        fields["disable_parameter_transpose_cache"] = True
    if config.diffusion.conversion == "grafting":
        # Otherwise the FP8 copies of a micro-batch's first weights, the old operator's, also serve the new operator.
        fields["disable_parameter_transpose_cache"] = True
    if performance.recompute_granularity == "full":
        fields.update(
            recompute_granularity="full",
            recompute_method=performance.recompute_method,
            recompute_num_layers=performance.recompute_num_layers,
        )
    elif performance.recompute_granularity == "selective":
        fields.update(recompute_granularity="selective", recompute_modules=list(performance.recompute_modules))
    return fields


def _hybridep_fields(performance: PerformanceConfig, backend: str) -> dict[str, Any]:
    """HybridEP's fields; none if --moe-flex-dispatcher-backend auto found another backend."""
    if backend != "hybridep":
        return {}
    sms, preprocessing = performance.moe_hybridep_num_sms, performance.moe_hybridep_num_sms_preprocessing
    fields: dict[str, Any] = {} if sms is None else dict(versions.hybridep_sms(sms))
    if preprocessing is not None:
        fields["moe_hybridep_num_sms_preprocessing"] = preprocessing
    if performance.moe_expert_rank_capacity_factor is not None:
        fields["moe_expert_rank_capacity_factor"] = performance.moe_expert_rank_capacity_factor
    return fields


def _flex_backend(requested: str) -> str | None:
    """The flex dispatcher's backend here. None if auto finds none, UserError if the requested one is missing."""
    for backend in ("hybridep", "deepep") if requested == "auto" else (requested,):
        try:
            _need_dispatcher(backend)
            return backend
        except UserError:
            if requested != "auto":
                raise
    return None


def _all_to_all(model_config: ModelConfig, config: RunConfig) -> dict[str, Any]:
    """The fields of the alltoall dispatcher, which needs no extra kernels; UserError if it does not fit the run."""
    parallel = dataclasses.replace(config.parallel, moe_token_dispatcher_type="alltoall")
    performance = dataclasses.replace(
        config.performance, moe_hybridep_num_sms=None, moe_hybridep_num_sms_preprocessing=None
    )
    config = dataclasses.replace(config, parallel=parallel, performance=performance)
    if problems := find_performance_problems(config, model_config):
        raise UserError(problems)
    if rank() == 0:
        print_line(
            "warning: --moe-token-dispatcher-type flex: its kernels, the package deep_ep, are not installed; tokens "
            "are dispatched by alltoall, which is slower (launch/container/Dockerfile says how to install them)",
            sys.stderr,
        )
    return {"moe_token_dispatcher_type": "alltoall"}


def _need_dispatcher(backend: str) -> None:
    """UserError if the flex dispatcher's kernels, which are not part of megatron.core, are missing."""
    from megatron.core.transformer.moe import fused_a2a

    if not getattr(fused_a2a, {"deepep": "HAVE_DEEP_EP", "hybridep": "HAVE_HYBRIDEP"}[backend], False):
        raise UserError(
            f"--moe-flex-dispatcher-backend {backend}: the package deep_ep is not installed or lacks it; "
            "install it from DeepEP's repository, or use --moe-token-dispatcher-type alltoall"
        )
