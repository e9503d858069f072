"""The weight table is a bijection, at the true shapes of every Qwen3, checked on metadata alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest

from megatron_a2d.checkpoint.tensor_rows import RowRange
from megatron_a2d.config.model_config import ModelConfig, model_config_from_hf
from megatron_a2d.conversion.weight_map import WeightMap
from megatron_a2d.families.qwen3 import SIZES, hub_config
from tests import tiny


def model_config(size: str) -> ModelConfig:
    return model_config_from_hf(hub_config(size), size)


def fused_names(a: ModelConfig) -> list[str]:
    return [
        f"model.layers.{layer}.mlp.experts.{name}"
        for layer in range(a.num_layers)
        for name in ("gate_up_proj", "down_proj")
    ]


def uncovered(row_ranges: list[RowRange], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The tensors of `shapes` whose rows are not covered exactly once by `spans`."""
    by_matrix: dict[tuple, list[RowRange]] = {}
    for row_range in row_ranges:
        by_matrix.setdefault((row_range.name, row_range.lead), []).append(row_range)
    wrong = {name for name, _ in by_matrix if name not in shapes}
    num_matrices = dict.fromkeys(shapes, 0)
    for (name, lead), pieces in by_matrix.items():
        if name in wrong:
            continue
        num_matrices[name] += 1
        end = 0
        for piece in sorted(pieces, key=lambda piece: piece.start):
            wrong |= {name} if piece.start != end or piece.stop <= piece.start else set()
            end = piece.stop
        wrong |= {name} if end != shapes[name][len(lead)] else set()
        wrong |= {name} if any(i >= n for i, n in zip(lead, shapes[name], strict=False)) else set()
    lead_axes = {name: len(lead) for name, lead in by_matrix}
    for name, count in num_matrices.items():
        wrong |= {name} if count != math.prod(shapes[name][: lead_axes.get(name, 0)]) else set()
    return sorted(wrong)


@pytest.mark.parametrize(
    ("size", "fused"), [*((size, False) for size in SIZES), ("30B-A3B", True), ("235B-A22B", True)]
)
def test_every_element_has_exactly_one_counterpart(size: str, fused: bool) -> None:
    a = model_config(size)
    weights = WeightMap(a, fused_names(a) if fused else ())
    matrices = [RowRange(block.key, block.lead, 0, block.num_rows) for block in weights.blocks()]
    assert uncovered(matrices, weights.megatron_shapes) == []
    to_hf = [row_range for matrix in matrices for row_range in weights.to_hf(matrix)]
    assert uncovered(to_hf, weights.hf_shapes) == []
    parts = [part for block in weights.blocks() for part in block.parts]
    to_megatron = [row_range for part in parts for row_range in weights.to_megatron(part)]
    assert uncovered(to_megatron, weights.megatron_shapes) == []
    elements = sum(math.prod(shape) for shape in weights.hf_shapes.values())
    assert elements == sum(math.prod(shape) for shape in weights.megatron_shapes.values()) == a.num_parameters()
    assert fused or not a.is_moe or len(weights.hf_shapes) == a.num_layers * (8 + 3 * a.num_experts + 1) + 3


def test_coverage_check_notices_gaps_and_overlaps() -> None:
    shapes = {"w": (2, 10, 4)}
    good = [RowRange("w", (0,), 0, 10), RowRange("w", (1,), 0, 4), RowRange("w", (1,), 4, 10)]
    assert uncovered(good, shapes) == []
    assert uncovered(good[:2], shapes) == ["w"]
    assert uncovered(good[1:], shapes) == ["w"]
    assert uncovered([*good, RowRange("w", (0,), 3, 5)], shapes) == ["w"]
    assert uncovered([*good, RowRange("x", (), 0, 1)], shapes) == ["x"]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_names_and_shapes_are_those_of_transformers(kind: str) -> None:
    model = tiny.hf_model(kind)
    config = tiny.hub_config(kind)
    a = model_config_of(config)
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if kind == "dense_tied":
        assert state.pop("lm_head.weight") == state["model.embed_tokens.weight"]
    fused = [name for name in state if name.endswith(("gate_up_proj", "experts.down_proj"))]
    assert WeightMap(a, fused).hf_shapes == state


def model_config_of(config: dict) -> ModelConfig:
    return model_config_from_hf(config, "config.json")


def test_rows_go_there_and_back() -> None:
    """Any cut of any matrix maps to as many rows, and each of them maps back to itself, in order."""
    a = model_config_of(tiny.hub_config("moe"))
    weights = WeightMap(a, fused_names(a)[:2])  # the first layer fused, the others not
    for block in weights.blocks():
        cuts = sorted({0, 1, block.num_rows // 3, block.num_rows // 2 + 1, block.num_rows})
        for start, stop in itertools.pairwise(cuts):
            rows = [(block.key, block.lead, row) for row in range(start, stop)]
            there = [
                row
                for row_range in weights.to_hf(RowRange(block.key, block.lead, start, stop))
                for row in each(row_range)
            ]
            back = [row for one in there for row_range in weights.to_megatron(one) for row in each(row_range)]
            assert [(one.name, one.lead, one.start) for one in back] == rows


def each(row_range: RowRange) -> list[RowRange]:
    return [row_range._replace(start=row, stop=row + 1) for row in range(row_range.start, row_range.stop)]


def test_qkv_is_interleaved_by_group_and_fc1_is_gate_then_up() -> None:
    weights = WeightMap(model_config("30B-A3B"))
    qkv = weights.to_hf(RowRange("decoder.layers.self_attention.linear_qkv.weight", (5,), 0, 5120))
    names = [row_range.name.removeprefix("model.layers.5.self_attn.") for row_range in qkv]
    assert names == ["q_proj.weight", "k_proj.weight", "v_proj.weight"] * 4
    assert [(row_range.start, row_range.stop) for row_range in qkv[3:6]] == [(1024, 2048), (128, 256), (128, 256)]
    fc1 = weights.to_hf(RowRange("decoder.layers.mlp.experts.experts.linear_fc1.weight", (5, 7), 700, 800))
    assert fc1 == [
        RowRange("model.layers.5.mlp.experts.7.gate_proj.weight", (), 700, 768),
        RowRange("model.layers.5.mlp.experts.7.up_proj.weight", (), 0, 32),
    ]


def test_counterparts_are_found_by_either_name() -> None:
    weights = WeightMap(model_config("0.6B"))
    assert weights.counterpart("model.layers.3.mlp.up_proj.weight") == [
        RowRange("decoder.layers.mlp.linear_fc1.weight", (3,), 3072, 6144)
    ]
    down = weights.counterpart("decoder.layers.mlp.linear_fc2.weight")
    assert [row_range.name for row_range in down] == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(28)]
    with pytest.raises(KeyError):
        weights.counterpart("lm_head.weight")  # tied


def test_extra_states_of_every_layer_and_expert() -> None:
    """Dense: qkv, proj, fc1, fc2 of each layer; MoE: qkv, proj of each layer, fc1, fc2 of each expert; one of the head."""
    dense, moe = (
        list(WeightMap(model_config_of(tiny.hub_config(kind))).extra_state_keys()) for kind in ("dense_tied", "moe")
    )
    head, layers, experts = "output_layer._extra_state/shard_0_1", range(4), range(8)
    attention = {
        f"decoder.layers.self_attention.{name}._extra_state/shard_{layer}_4"
        for name in ("linear_qkv", "linear_proj")
        for layer in layers
    }
    assert len(dense) == 17 and len(moe) == 9 + 64
    assert set(dense) == {head} | attention | {
        f"decoder.layers.mlp.{name}._extra_state/shard_{layer}_4"
        for name in ("linear_fc1", "linear_fc2")
        for layer in layers
    }
    assert set(moe) == {head} | attention | {
        f"decoder.layers.mlp.experts.experts.{name}._extra_state/shard_{layer}.{expert}_4.8" for name in ("linear_fc1", "linear_fc2") for layer in layers for expert in experts
    }  # fmt: skip


def test_shapes_in_megatron() -> None:
    """Hidden size 64, 4 query heads of 24, 2 groups, worked out manually; experts have axes of their own."""
    layer = "decoder.layers."
    common = {
        "embedding.word_embeddings.weight": (256, 64), "decoder.final_layernorm.weight": (64,),
        layer + "self_attention.linear_qkv.layer_norm_weight": (4, 64), layer + "self_attention.linear_qkv.weight": (4, 96 + 2 * 48, 64),
        layer + "self_attention.q_layernorm.weight": (4, 24), layer + "self_attention.k_layernorm.weight": (4, 24),
        layer + "self_attention.linear_proj.weight": (4, 64, 96),
    }  # fmt: skip
    dense = common | {
        layer + "mlp.linear_fc1.layer_norm_weight": (4, 64),
        layer + "mlp.linear_fc1.weight": (4, 320, 64),
        layer + "mlp.linear_fc2.weight": (4, 64, 160),
    }
    moe = common | {
        "output_layer.weight": (256, 64), layer + "pre_mlp_layernorm.weight": (4, 64), layer + "mlp.router.weight": (4, 8, 64),
        layer + "mlp.experts.experts.linear_fc1.weight": (4, 8, 80, 64), layer + "mlp.experts.experts.linear_fc2.weight": (4, 8, 64, 40),
    }  # fmt: skip
    for kind, expected in (("dense_tied", dense), ("dense", dense | {"output_layer.weight": (256, 64)}), ("moe", moe)):
        a = model_config_of(tiny.hub_config(kind))
        assert WeightMap(a).megatron_shapes == expected
        if kind == "moe":
            assert WeightMap(a, fused_names(a)).megatron_shapes == expected


def test_matrices_come_layer_by_layer() -> None:
    """All of a layer, then its experts one by one: what is read together lies together."""
    blocks = list(WeightMap(model_config_of(tiny.hub_config("moe"))).blocks())
    assert [block.key for block in (blocks[0], *blocks[-2:])] == [
        "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]
    inside = [block.lead for block in blocks[1:-2]]
    expected = [
        lead
        for layer in range(4)
        for lead in [(layer,)] * 7 + [(layer, expert) for expert in range(8) for _ in range(2)]
    ]
    assert inside == expected
    assert [block.groups for block in blocks if block.key.endswith("linear_qkv.weight")] == [2] * 4
    assert {block.groups for block in blocks if not block.key.endswith("linear_qkv.weight")} == {1}


def test_every_tensor_knows_its_counterpart() -> None:
    weights = WeightMap(model_config_of(tiny.hub_config("moe")))
    assert weights.megatron_keys.keys() == weights.hf_shapes.keys()
    for name, shape in weights.hf_shapes.items():
        row_ranges = weights.counterpart(name)
        assert {row_range.name for row_range in row_ranges} == {weights.megatron_keys[name]} and sum(
            row_range.stop - row_range.start for row_range in row_ranges
        ) == shape[0]
    assert weights.counterpart("model.layers.2.self_attn.v_proj.weight") == [
        RowRange("decoder.layers.self_attention.linear_qkv.weight", (2,), start, start + 24) for start in (48 + 24, 96 + 48 + 24)
    ]  # fmt: skip
    fused = WeightMap(weights.model_config, fused_names(weights.model_config))
    down = fused.counterpart("model.layers.1.mlp.experts.down_proj")
    assert down == [
        RowRange("decoder.layers.mlp.experts.experts.linear_fc2.weight", (1, expert), 0, 64) for expert in range(8)
    ]
    both = fused.counterpart("decoder.layers.mlp.experts.experts.linear_fc1.weight")
    assert both == [
        RowRange(f"model.layers.{layer}.mlp.experts.gate_up_proj", (expert,), 0, 80)
        for layer in range(4)
        for expert in range(8)
    ]
