"""A run that was stopped and resumed is the run that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.conftest import Case
from tests.parity.pool import Pool

LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("one process", 1, {}),
    ("EP2, distributed optimizer", 2, {"expert_model_parallel_size": 2, "use_distributed_optimizer": True}),
    (
        "TP2+SP, EP2",
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
    ),
    (
        "PP2 x DP2, distributed optimizer",
        4,
        {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True},
    ),
]


@pytest.mark.parametrize(("name", "ranks", "layout"), LAYOUTS, ids=[name for name, *_ in LAYOUTS])
def test_resume_is_bitwise(
    name: str, ranks: int, layout: dict[str, Any], cases: dict[str, Case], pool: Pool, tmp_path: Path
) -> None:
    """4 steps, and 2 + a new process group + 2: weights and losses agree in every bit. Warm-up, decay and learning
    rates by role are in force."""
    case = cases["moe"]
    settings = {
        **case.settings, **layout, "load": case.checkpoint, "train_iters": 4, "save_interval": 2, "log_interval": 1,
        "lr_warmup_iters": 3, "eval_interval": 4,
    }  # fmt: skip
    unbroken = pool.run("run", ranks, settings={**settings, "save": str(tmp_path / "unbroken")})
    stopped = str(tmp_path / "stopped")
    pool.run("run", ranks, settings={**settings, "save": stopped}, stop_at=2)
    resumed = pool.run("run", ranks, settings={**settings, "save": stopped})
    assert [rank["start"] for rank in resumed] == [2] * ranks and [rank["start"] for rank in unbroken] == [0] * ranks
    for one, other in zip(unbroken, resumed, strict=True):
        assert one["weights"] == other["weights"] and one["optimizer"] == other["optimizer"]
        assert one["losses"][2:] == other["losses"][-2:]


def test_other_layout_goes_on(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """A checkpoint of EP2 goes on under TP2+SP with EP1, and under PP2: the next losses agree."""
    case = cases["moe"]
    settings = {
        **case.settings, "load": case.checkpoint, "train_iters": 4, "save_interval": 2, "log_interval": 1,
        "use_distributed_optimizer": True,
    }  # fmt: skip
    ep2 = {**settings, "expert_model_parallel_size": 2}
    unbroken = pool.run("run", 2, settings={**ep2, "save": str(tmp_path / "unbroken")})[0]["losses"]
    for number, layout in enumerate(
        (
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            {"pipeline_model_parallel_size": 2},
            {},
        )
    ):
        save = str(tmp_path / f"stopped{number}")
        pool.run("run", 2, settings={**ep2, "save": save}, stop_at=2)
        resumed = pool.run("run", 2, settings={**settings, **layout, "save": save})[0]["losses"]
        assert resumed[-2:] == pytest.approx(unbroken[-2:], rel=1e-6)


def test_weights_alone_start_at_zero(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """--finetune takes a trained checkpoint's weights: iteration 0, and losses other than those of a resume."""
    case = cases["moe"]
    settings = {
        **case.settings,
        "load": case.checkpoint,
        "train_iters": 3,
        "log_interval": 1,
        "save_interval": 2,
    }
    first = pool.run("run", 1, settings={**settings, "save": str(tmp_path / "first")}, stop_at=2)[0]
    finetune = {
        **settings,
        "load": str(tmp_path / "first"),
        "save": str(tmp_path / "second"),
        "finetune": True,
    }
    second = pool.run("run", 1, settings=finetune)[0]
    assert second["start"] == 0 and first["losses"][0] != second["losses"][0]
