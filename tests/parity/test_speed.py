"""Settings of speed and memory change when things are computed, and how often, not what."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cases import Case
from tests.parity.layouts import EP, VPP
from tests.parity.pool import Pool
from tests.parity.test_monitor import flat

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, EP),
    "EP2, distributed optimizer, overlap": (
        2, {**EP, "use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "EP2, frozen embedding": (2, {**EP, "lr_mult": {"embedding": 0.0, "mlp": 0.5}}),
    "VPP2 x EP2": (4, {**VPP, **EP}),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if "VPP" in name else ()) for name in LAYOUTS]
)
def test_interleaved_micro_batches(name: str, cases: dict[str, Case], pool: Pool) -> None:
    """The plain schedule's losses and gradient norms, after two steps; control: another micro-batch size's differ."""
    ranks, layout = LAYOUTS[name]

    def steps(**more: Any) -> list[float]:
        settings = {**cases["moe"].settings, **layout, "bf16": True, **more}
        results = pool.run("train_steps", ranks, checkpoint=cases["moe"].checkpoint, settings=settings, num_steps=2)
        return [value for result in results for value in (*result["losses"], *result["grad_norms"]) if value == value]

    plain = steps()
    assert steps(overlap_moe_expert_parallel_comm=True) == pytest.approx(plain, rel=1e-6)
    assert steps(lr=2e-2) != pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("name", ["EP2", pytest.param("VPP2 x EP2", marks=pytest.mark.full)])
def test_interleaved_micro_batches_are_freed(name: str, cases: dict[str, Case], pool: Pool) -> None:
    """No tensor waits for Python's garbage collection, which --manual-gc puts off, and no graph for the next step."""
    ranks, layout = LAYOUTS[name]
    settings = {**cases["moe"].settings, **layout, "bf16": True, "overlap_moe_expert_parallel_comm": True}
    for left in pool.run("left_by_a_step", ranks, checkpoint=cases["moe"].checkpoint, settings=settings):
        assert left == {"cycles": [], "graphs": []}


def test_interleaved_micro_batches_are_watched(cases: dict[str, Case], pool: Pool) -> None:
    """Monitoring says of them what it says of the plain schedule's, the routers' counts by kind of token among it."""
    case = cases["moe"]
    settings = {**case.settings, **EP, "bf16": True}
    plain, interleaved = (
        flat(pool.run("monitored", 2, checkpoint=case.checkpoint, settings={**settings, **more})[0]["moe"])
        for more in ({}, {"overlap_moe_expert_parallel_comm": True})
    )
    assert {"load_imbalance_masked", "load_imbalance_unmasked"} < plain.keys()
    for name, value in plain.items():
        assert interleaved[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("moe", {"recompute_granularity": "full", "recompute_num_layers": 2}),
        ("dense", {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3}),
        ("dense", {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")}),
        ("moe", {"recompute_granularity": "selective", "recompute_modules": ("core_attn",)}),
        ("moe", {"recompute_granularity": "selective", "recompute_modules": ("layernorm", "moe_act")}),
        ("dense", {"recompute_granularity": "selective", "recompute_modules": ("layernorm",)}),
        ("moe", {"moe_grouped_gemm": False}),
    ],
    ids=str,
)
def test_same_numbers(kind: str, settings: dict[str, Any], cases: dict[str, Case], pool: Pool) -> None:
    """Bit for bit; or to fp32's last digits, where gradients are added up in another order: experts one by one, norms
    that are computed again."""
    case, found = cases[kind], []
    in_another_order = "moe_grouped_gemm" in settings or "layernorm" in settings.get("recompute_modules", ())
    for more in ({}, settings):
        (result,) = pool.run(
            "train_steps", 1, checkpoint=case.checkpoint, settings={**case.settings, **more}, num_steps=2
        )
        found.append([*result["losses"], *result["grad_norms"]])
    assert found[0] == pytest.approx(found[1], rel=1e-6 if in_another_order else 1e-12)
