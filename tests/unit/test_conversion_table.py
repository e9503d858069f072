"""The weight table is a bijection, at the true shapes of every Qwen3, checked on metadata alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest

from megatron_a2d.architecture import Architecture, architecture_from_config
from megatron_a2d.conversion.qwen3 import SIZES, hub_config
from megatron_a2d.conversion.rows import Span
from megatron_a2d.conversion.table import WeightMap
from tests import tiny


def architecture(size: str) -> Architecture:
    return architecture_from_config(hub_config(size), size)


def fused_names(a: Architecture) -> list[str]:
    return [
        f"model.layers.{layer}.mlp.experts.{name}"
        for layer in range(a.num_layers)
        for name in ("gate_up_proj", "down_proj")
    ]


def uncovered(spans: list[Span], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The tensors of `shapes` whose rows are not covered exactly once by `spans`."""
    by_matrix: dict[tuple, list[Span]] = {}
    for span in spans:
        by_matrix.setdefault((span.name, span.lead), []).append(span)
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
    a = architecture(size)
    weights = WeightMap(a, fused_names(a) if fused else ())
    matrices = [Span(block.key, block.lead, 0, block.num_rows) for block in weights.blocks()]
    assert uncovered(matrices, weights.megatron_shapes) == []
    to_hf = [span for matrix in matrices for span in weights.to_hf(matrix)]
    assert uncovered(to_hf, weights.hf_shapes) == []
    parts = [part for block in weights.blocks() for part in block.parts]
    to_megatron = [span for part in parts for span in weights.to_megatron(part)]
    assert uncovered(to_megatron, weights.megatron_shapes) == []
    elements = sum(math.prod(shape) for shape in weights.hf_shapes.values())
    assert elements == sum(math.prod(shape) for shape in weights.megatron_shapes.values()) == a.num_parameters()
    assert fused or not a.is_moe or len(weights.hf_shapes) == a.num_layers * (8 + 3 * a.num_experts + 1) + 3


def test_coverage_check_notices_gaps_and_overlaps() -> None:
    shapes = {"w": (2, 10, 4)}
    good = [Span("w", (0,), 0, 10), Span("w", (1,), 0, 4), Span("w", (1,), 4, 10)]
    assert uncovered(good, shapes) == []
    assert uncovered(good[:2], shapes) == ["w"]
    assert uncovered(good[1:], shapes) == ["w"]
    assert uncovered([*good, Span("w", (0,), 3, 5)], shapes) == ["w"]
    assert uncovered([*good, Span("x", (), 0, 1)], shapes) == ["x"]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_names_and_shapes_are_those_of_transformers(kind: str) -> None:
    model = tiny.hf_model(kind)
    config = tiny.hub_config(kind)
    a = architecture_of(config)
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if kind == "dense_tied":
        assert state.pop("lm_head.weight") == state["model.embed_tokens.weight"]
    fused = [name for name in state if name.endswith(("gate_up_proj", "experts.down_proj"))]
    assert WeightMap(a, fused).hf_shapes == state


def architecture_of(config: dict) -> Architecture:
    return architecture_from_config(config, "config.json")


def test_rows_go_there_and_back() -> None:
    """Any cut of any matrix maps to as many rows, and each of them maps back to itself, in order."""
    a = architecture_of(tiny.hub_config("moe"))
    weights = WeightMap(a, fused_names(a)[:2])  # the first layer fused, the others not
    for block in weights.blocks():
        cuts = sorted({0, 1, block.num_rows // 3, block.num_rows // 2 + 1, block.num_rows})
        for start, stop in itertools.pairwise(cuts):
            rows = [(block.key, block.lead, row) for row in range(start, stop)]
            there = [row for span in weights.to_hf(Span(block.key, block.lead, start, stop)) for row in each(span)]
            back = [row for one in there for span in weights.to_megatron(one) for row in each(span)]
            assert [(one.name, one.lead, one.start) for one in back] == rows


def each(span: Span) -> list[Span]:
    return [span._replace(start=row, stop=row + 1) for row in range(span.start, span.stop)]


def test_qkv_is_interleaved_by_group_and_fc1_is_gate_then_up() -> None:
    weights = WeightMap(architecture("30B-A3B"))
    qkv = weights.to_hf(Span("decoder.layers.self_attention.linear_qkv.weight", (5,), 0, 5120))
    names = [span.name.removeprefix("model.layers.5.self_attn.") for span in qkv]
    assert names == ["q_proj.weight", "k_proj.weight", "v_proj.weight"] * 4
    assert [(span.start, span.stop) for span in qkv[3:6]] == [(1024, 2048), (128, 256), (128, 256)]
    fc1 = weights.to_hf(Span("decoder.layers.mlp.experts.experts.linear_fc1.weight", (5, 7), 700, 800))
    assert fc1 == [
        Span("model.layers.5.mlp.experts.7.gate_proj.weight", (), 700, 768),
        Span("model.layers.5.mlp.experts.7.up_proj.weight", (), 0, 32),
    ]


def test_counterparts_are_found_by_either_name() -> None:
    weights = WeightMap(architecture("0.6B"))
    assert weights.counterpart("model.layers.3.mlp.up_proj.weight") == [
        Span("decoder.layers.mlp.linear_fc1.weight", (3,), 3072, 6144)
    ]
    down = weights.counterpart("decoder.layers.mlp.linear_fc2.weight")
    assert [span.name for span in down] == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(28)]
    with pytest.raises(KeyError):
        weights.counterpart("lm_head.weight")  # tied
