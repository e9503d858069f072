"""Transformer Engine's layers compute what the local layers of one process compute, in fp32.

Its real Python runs over kernels in plain torch (stand_in/). Compared are, as in tests/parity/test_layouts.py, losses,
gradient norms, every gradient by its place in the global model and every parameter after two optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_a2d.config.installed_versions import find_version_problems
from megatron_a2d.config.settings import build
from tests.cases import Case
from tests.parity.layouts import DISTRIBUTED, EP, OVERLAP, TP_SP, VPP
from tests.parity.test_layouts import compare
from tests.transformer_engine.engine_cases import CASES, DENSE_FUSIONS, FUSIONS, QUICK, EngineCase
from tests.transformer_engine.engine_pool import EnginePool
from tests.transformer_engine.engine_results import EngineResults

TOLERANCE = 1e-6
Reference = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=() if str(case) in QUICK else pytest.mark.full) for case in CASES]
)
def test_equal_to_local_layers(
    case: EngineCase,
    cases: dict[str, Case],
    reference: Reference,
    engine_pool: EnginePool,
    engine_results: EngineResults,
) -> None:
    layout = case.layout
    settings = case.shared | layout.settings
    differences = compare(
        engine_pool, cases[layout.case], reference(layout.case, **case.shared), layout.ranks, settings
    )
    shown = differences | ({"gradients": float("nan")} if layout.is_sharded else {})
    engine_results.add("fp32", layout.case, layout.name, str(layout.ranks), **shown)
    assert case.kernels <= engine_pool.calls.keys()
    assert all(value < TOLERANCE for value in differences.values()), differences


@pytest.mark.parametrize("fused", [False, True], ids=["no fusion", "all fusions"])
def test_biases_and_no_norms_on_queries_and_keys(
    fused: bool, cases: dict[str, Case], reference: Reference, engine_pool: EnginePool
) -> None:
    """Qwen2.5's layers."""
    settings = {**TP_SP, **(DENSE_FUSIONS if fused else {})}
    differences = compare(engine_pool, cases["qwen2"], reference("qwen2"), 2, settings)
    assert all(value < TOLERANCE for value in differences.values()), differences


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("dense", {**DENSE_FUSIONS, **VPP, **DISTRIBUTED}), ("moe", {**FUSIONS, **TP_SP, **EP, **OVERLAP})],
    ids=["dense, VPP2 x DP2", "moe, TP2+SP x DP2, EP2"],
)
def test_muon_with_its_state_divided(
    kind: str, layout: dict[str, Any], cases: dict[str, Case], reference: Reference, engine_pool: EnginePool
) -> None:
    """Experts of a grouped GEMM are matrices of their own; fused norms are AdamW's."""
    muon = {"optimizer": "muon", "muon_fp32_matmul_prec": "highest"}
    if missing := find_version_problems(build({**muon, "train_iters": 1})):
        pytest.skip("; ".join(missing))
    differences = compare(engine_pool, cases[kind], reference(kind, **muon), 4, {**muon, **layout})
    assert all(value < TOLERANCE for value in differences.values()), differences
