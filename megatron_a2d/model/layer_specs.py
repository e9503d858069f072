"""Layer specs: the modules of which megatron.core builds a transformer layer.

Two implementations of the same layer, whose checkpoints are the same file: `transformer_engine` for GPUs,
`local` for any device. The attention mask is part of the spec, and the only difference between the
autoregressive model and the diffusion model.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, Literal, NamedTuple

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_a2d.config.fp8_recipe import Emulation, emulation_of
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig, flag
from megatron_a2d.config.validate_performance import needs_transformer_engine
from megatron_a2d.megatron_compat.device import device, has_cuda
from megatron_a2d.megatron_compat.versions import missing_router_product
from megatron_a2d.model.chunked_cross_entropy import OutputLayer
from megatron_a2d.model.emulated_layers import (
    EmulatedColumnParallelLinear,
    EmulatedOutputLayer,
    EmulatedRowParallelLinear,
    emulated,
)
from megatron_a2d.model.experts import GroupedExperts, can_group
from megatron_a2d.model.grafted_attention import GraftedSelfAttention, LocalGraftedSelfAttention
from megatron_a2d.model.local_attention import LocalSelfAttention
from megatron_a2d.model.local_layers import CoreAttention
from megatron_a2d.model.local_linear import LocalColumnParallelLinear, LocalRowParallelLinear
from megatron_a2d.model.local_moe import LocalMoELayer
from megatron_a2d.model.matrix_products import is_widened
from megatron_a2d.model.rms_norm import RMSNorm, TorchRMSNorm
from megatron_a2d.model.router import Router
from megatron_a2d.model.swiglu import LocalMLP
from megatron_a2d.utils.errors import UserError


class Parts(NamedTuple):
    """The modules of a local layer."""

    column: type
    row: type
    norm: type
    attention: type
    mlp: type
    moe: type


FUSED_PARTS = Parts(
    LocalColumnParallelLinear, LocalRowParallelLinear, RMSNorm, LocalSelfAttention, LocalMLP, LocalMoELayer
)
# For emulation. Rounding to few bits turns a last bit into a step wherever a value lies on a tie, so that all but the
# products is computed by the formulas of what is emulated.
TORCHS_PARTS = Parts(ColumnParallelLinear, RowParallelLinear, TorchRMSNorm, SelfAttention, MLP, MoELayer)
# Transformer Engine fuses a norm into the linear layer that follows. A norm before it is stored under the same name, so
# that one checkpoint serves both.
_NORM_OF_ATTENTION = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}

Implementation = Literal["transformer_engine", "local"]


def choose_implementation(config: RunConfig) -> Implementation:
    """Resolve --transformer-impl for this machine and run."""
    requested = config.training.transformer_impl
    available = has_cuda() and importlib.util.find_spec("transformer_engine") is not None
    if requested != "local" and available:
        return "transformer_engine"
    missing = "package transformer_engine is not installed" if has_cuda() else "machine has no CUDA device"
    if requested == "transformer_engine":
        raise UserError(f"--transformer-impl transformer_engine: this {missing}; use local")
    if needed := needs_transformer_engine(config):
        raise UserError(f"{flag(name)}: needs Transformer Engine, but this {missing}; remove it" for name in needed)
    return "local"


def notes(config: RunConfig, model_config: ModelConfig) -> list[str]:
    """Log lines: where the chosen layers compute something in an unexpected way."""
    uses_engine = choose_implementation(config) == "transformer_engine"
    missing = missing_router_product() if uses_engine and model_config.is_moe else None
    emulation = emulation_of(config)
    one_by_one = None
    if model_config.is_moe and config.optimization.optimizer == "muon" and not uses_engine:
        one_by_one = "Muon needs a matrix for each expert: the local layers compute experts one after another"
    widened = None
    uses_bf16 = config.training.bf16 and not uses_engine and not emulation
    if uses_bf16 and is_widened(torch.empty(0, dtype=torch.bfloat16, device=device())):
        widened = "bf16: this processor has no bf16 products; they are computed in fp32 and rounded"
    return [line for line in (missing, emulation and str(emulation), one_by_one, widened) if line]


def build_block_spec(
    config: TransformerConfig,
    implementation: Implementation,
    causal: bool,
    vp_stage: int | None = None,
    grafts: bool = False,
    own_attention: bool = False,
    emulation: Emulation | None = None,
) -> TransformerBlockSubmodules:
    """The spec of the layers that this (virtual) pipeline stage builds, and of the final norm.

    `grafts`: attention can be regressed on its causal form. `own_attention`: Transformer Engine's layers have our core
    attention, which takes any mask. `emulation`: of FP8 or FP4, in local layers.
    """
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    mask_type = AttnMaskType.causal if causal else AttnMaskType.no_mask
    if implementation == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer = _transformer_engine_layer(config, mask_type)
        if own_attention:
            layer.submodules.self_attention.submodules.core_attention = CoreAttention
        if grafts:
            _graft(layer.submodules)
        layers, final_norm = [layer] * num_layers, TENorm
    else:
        first = get_transformer_layer_offset(config, vp_stage) if emulation else 0
        recipes = [emulation and emulation.of_layer(first + n, config.num_layers) for n in range(num_layers)]
        # Emulated experts are not grouped, and all layers of a model store theirs in one way.
        grouped = config.moe_grouped_gemm and can_group(config) and emulation is None
        parts = TORCHS_PARTS if emulation else FUSED_PARTS
        specs = {recipe: _local_layer(config, mask_type, grouped, parts, recipe) for recipe in dict.fromkeys(recipes)}
        layers, final_norm = [specs[recipe] for recipe in recipes], parts.norm
        for layer in specs.values() if grafts else ():
            layer.submodules.self_attention.module = LocalGraftedSelfAttention
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)


def output_layer(emulation: Emulation | None) -> type[OutputLayer]:
    """The class of the LM head."""
    return emulated(EmulatedOutputLayer, emulation.recipe) if emulation and emulation.head else OutputLayer


def _transformer_engine_layer(config: TransformerConfig, mask_type: AttnMaskType) -> ModuleSpec:
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    layer.submodules.self_attention.params["attn_mask_type"] = mask_type
    if config.num_moe_experts is not None:
        _moe_submodules(layer.submodules.mlp).router = Router
    return layer


def _graft(layer: TransformerLayerSubmodules) -> None:
    """Use grafted attention, with a separate norm before it, because grafting trains attention but not the norm."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    layer.self_attention.module = GraftedSelfAttention
    layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    layer.input_layernorm = TENorm
    layer.sharded_state_dict_keys_map = {**layer.sharded_state_dict_keys_map, **_NORM_OF_ATTENTION}


def _moe_submodules(mlp: Any) -> MoESubmodules:
    """The submodules in a MoE layer's spec, which is a ModuleSpec (megatron-core 0.16.1) or a partial (0.19.2)."""
    submodules: MoESubmodules = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    return submodules


def _local_layer(
    config: TransformerConfig,
    mask_type: AttnMaskType,
    grouped: bool,
    parts: Parts = FUSED_PARTS,
    recipe: str | None = None,
) -> ModuleSpec:
    """`recipe`: that of the FP8 or FP4 products that are emulated; None: they are in the parameters' type."""
    column = emulated(EmulatedColumnParallelLinear, recipe) if recipe else parts.column
    row = emulated(EmulatedRowParallelLinear, recipe) if recipe else parts.row
    linears = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    stored_as = dict(_NORM_OF_ATTENTION)
    if config.num_moe_experts is None:
        mlp = ModuleSpec(module=parts.mlp, submodules=linears)
        stored_as["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    else:
        experts = ModuleSpec(module=GroupedExperts if grouped else SequentialMLP, submodules=linears)
        mlp = ModuleSpec(module=parts.moe, submodules=MoESubmodules(experts=experts, router=Router))
    attention = ModuleSpec(
        module=parts.attention,
        params={"attn_mask_type": mask_type},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=CoreAttention,
            linear_proj=row,
            q_layernorm=parts.norm if config.qk_layernorm else None,
            k_layernorm=parts.norm if config.qk_layernorm else None,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=stored_as,
        ),
    )
