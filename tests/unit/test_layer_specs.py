"""Layer specs: the attention's mask, which of the model's modules read, and what the log says of the layers chosen."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_a2d import megatron_compat
from megatron_a2d.config.fp8_recipe import Emulation
from megatron_a2d.config.settings import build
from megatron_a2d.model import layer_specs, matrix_products
from megatron_a2d.model.chunked_cross_entropy import OutputLayer
from megatron_a2d.model.emulated_layers import EmulatedOutputLayer
from megatron_a2d.model.grafted_attention import GraftedSelfAttention, LocalGraftedSelfAttention
from megatron_a2d.model.local_layers import CoreAttention
from megatron_a2d.model.router import Router
from tests.unit.test_training import QWEN3_8B, QWEN3_30B_A3B

megatron_compat.install()


def transformer(num_experts: int | None = None, **fields: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_moe_experts=num_experts, qk_layernorm=True, **fields
    )  # fmt: skip


@pytest.mark.parametrize(("causal", "mask"), [(False, AttnMaskType.no_mask), (True, AttnMaskType.causal)])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_the_mask_is_part_of_the_spec(
    implementation: Any, causal: bool, mask: AttnMaskType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways for masked diffusion, causal for --objective ar; Transformer Engine's own spec says causal by itself."""
    asked: list[dict[str, Any]] = []

    def engine_spec(**arguments: Any) -> Any:
        asked.append(arguments)
        return layer_specs._local_layer(transformer(arguments["num_experts"]), AttnMaskType.causal, grouped=False)

    monkeypatch.setattr(layer_specs, "get_gpt_layer_with_transformer_engine_spec", engine_spec)
    monkeypatch.setattr(layer_specs, "get_num_layers_to_build", lambda config, vp_stage: 2)
    for num_experts, grouped in ((None, False), (8, False), (8, True)):
        config = transformer(num_experts, moe_grouped_gemm=grouped)
        block = layer_specs.build_block_spec(config, implementation, causal)
        assert len(block.layer_specs) == 2
        for layer in block.layer_specs:
            assert layer.submodules.self_attention.params == {"attn_mask_type": mask}
            assert not issubclass(layer.submodules.self_attention.module, GraftedSelfAttention)
            assert num_experts is None or layer.submodules.mlp.submodules.router is Router
        if implementation == "transformer_engine":
            assert asked.pop() == {"num_experts": num_experts, "moe_grouped_gemm": grouped, "qk_layernorm": True}
        elif not causal:
            grafted = layer_specs.build_block_spec(config, implementation, causal, grafts=True).layer_specs[0]
            assert grafted.submodules.self_attention.module is LocalGraftedSelfAttention
    assert not asked


@pytest.mark.parametrize(("num_experts", "experts"), [(None, None), (8, SequentialMLP)])
def test_emulated_layers(num_experts: int | None, experts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stage of a model with 2 layers kept in bf16 at the start and 1 at the end, of 5."""
    monkeypatch.setattr(layer_specs, "get_num_layers_to_build", lambda config, vp_stage: 4)
    monkeypatch.setattr(layer_specs, "get_transformer_layer_offset", lambda config, vp_stage: 1)
    config = transformer(num_experts, moe_grouped_gemm=num_experts is not None)
    config.num_layers = 5
    emulation = Emulation("mxfp8", 2, 1)
    for layer, recipe in zip(
        layer_specs.build_block_spec(config, "local", False, emulation=emulation).layer_specs,
        (None, "mxfp8", "mxfp8", None),
        strict=True,
    ):
        mlp = layer.submodules.mlp
        if experts:
            assert mlp.submodules.experts.module is experts, "one expert at a time; all layers store theirs alike"
        linears = mlp.submodules.experts.submodules if experts else mlp.submodules
        attention = layer.submodules.self_attention.submodules
        found = (attention.linear_qkv, linears.linear_fc1, attention.linear_proj, linears.linear_fc2)
        assert [getattr(linear, "recipe", None) for linear in found] == [recipe] * 4
        assert [issubclass(linear, ColumnParallelLinear) for linear in found] == [True, True, False, False]
    assert layer_specs.output_layer(emulation) is layer_specs.output_layer(None) is OutputLayer
    head = layer_specs.output_layer(emulation._replace(head=True))
    assert issubclass(head, EmulatedOutputLayer) and head.recipe == "mxfp8"
    config_with = build({"bf16": True, "fp8_recipe": "mxfp8", "transformer_impl": "local"})
    (line,) = layer_specs.notes(config_with, QWEN3_8B)
    assert line.startswith("precision: mxfp8 is emulated") and "\n" not in line


def test_a_router_is_set_in_either_form_of_spec() -> None:
    for wrap in (ModuleSpec, functools.partial):
        submodules = MoESubmodules(experts=SequentialMLP)
        assert layer_specs._moe_submodules(wrap(MoELayer, submodules=submodules)) is submodules


def test_a_portable_attention_obeys_its_mask() -> None:
    for mask, is_causal in ((AttnMaskType.no_mask, False), (AttnMaskType.causal, True)):
        assert CoreAttention(transformer(), 1, mask, "self").is_causal == is_causal
    with pytest.raises(AssertionError):
        CoreAttention(transformer(), 1, AttnMaskType.padding, "self")


def test_a_router_without_its_product_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Transformer Engine's layers are in use and have routers; not where the product is there."""
    config = build({})
    monkeypatch.setattr(moe_utils, "te_general_gemm", None)
    assert layer_specs.notes(config, QWEN3_30B_A3B) == [], "local layers ask for no such product"
    monkeypatch.setattr(layer_specs, "choose_implementation", lambda config: "transformer_engine")
    (line,) = layer_specs.notes(config, QWEN3_30B_A3B)
    assert line.startswith("routers: torch's GEMM") and "\n" not in line
    assert layer_specs.notes(config, QWEN3_8B) == [] == layer_specs.notes(config, replace(QWEN3_30B_A3B, num_experts=0))
    monkeypatch.setattr(moe_utils, "te_general_gemm", lambda: None)
    assert layer_specs.notes(config, QWEN3_30B_A3B) == []


@pytest.mark.parametrize("has_products", [True, False])
def test_products_of_bf16_in_fp32_are_in_the_log(has_products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_products, "_has_bf16_products", lambda: has_products)
    config = build({"bf16": True, "transformer_impl": "local"})
    assert [line[:5] for line in layer_specs.notes(config, QWEN3_8B)] == ([] if has_products else ["bf16:"])
    assert layer_specs.notes(build({"transformer_impl": "local"}), QWEN3_8B) == []
