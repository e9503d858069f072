"""--overlap-moe-expert-parallel-comm changes when things are computed, not what."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cases import Case
from tests.parity.layouts import EP, VPP
from tests.parity.pool import Pool

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, EP),
    "EP2, distributed optimizer, overlap": (
        2, {**EP, "use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
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
