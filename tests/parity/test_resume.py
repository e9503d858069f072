"""A run that was stopped and resumed is the run that was not."""

from __future__ import annotations

from pathlib import Path

from tests.cases import Case
from tests.exactness import Exactness
from tests.parity.layouts import CP, DISTRIBUTED, EP, ETP, OVERLAP, PP, TP_SP, VPP, Layout, each
from tests.parity.pool import Pool

QUICK = [
    Layout("moe", "one process", 1, {}),
    Layout("moe", "EP2, distributed optimizer", 2, {**EP, **DISTRIBUTED}),
    Layout("moe", "TP2+SP, EP2, asynchronous saves", 2, {**TP_SP, **EP, "async_save": True}),
    Layout("moe", "PP2 x DP2, distributed optimizer", 4, {**PP, **DISTRIBUTED}),
]
FULL = [
    Layout("dense_tied", "DP2", 2, {}),
    Layout("dense", "DP4, distributed optimizer, bf16", 4, {**DISTRIBUTED, "bf16": True}),
    Layout("moe", "TP2+SP, EP1, bf16", 2, {**TP_SP, "bf16": True}),
    Layout("moe", "TP2+SP x DP2, EP2, ETP2, overlap", 4, {**TP_SP, **EP, **ETP, **OVERLAP}),
    Layout("moe", "VPP2 x DP2, EP2, distributed optimizer", 4, {**VPP, **EP, **DISTRIBUTED}),
    Layout("isolated", "CP2 x PP2", 4, {**CP, **PP}),
    Layout("ar", "TP2+SP, EP2", 2, {**TP_SP, **EP}),
]


@each(QUICK + FULL, quick=lambda layout: layout in QUICK)
def test_resume_is_bitwise(
    layout: Layout, cases: dict[str, Case], pool: Pool, tmp_path: Path, exactness: Exactness
) -> None:
    """4 steps, and 2 + a new process group + 2: weights and losses agree in every bit. Warm-up, decay and learning
    rates by role are in force."""
    case, ranks = cases[layout.case], layout.ranks
    settings = {
        **case.settings, **layout.settings, "load": case.checkpoint, "train_iters": 4, "save_interval": 2,
        "log_interval": 1, "lr_warmup_iters": 3, "eval_interval": 4,
    }  # fmt: skip
    unbroken = pool.run("run", ranks, settings={**settings, "save": str(tmp_path / "unbroken")})
    stopped = str(tmp_path / "stopped")
    # With asynchronous saves the checkpoint of step 2 is whole a step later.
    pool.run("run", ranks, settings={**settings, "save": stopped}, stop_at=2, finish_saves=True)
    resumed = pool.run("run", ranks, settings={**settings, "save": stopped})
    assert [rank["start"] for rank in resumed] == [2] * ranks and [rank["start"] for rank in unbroken] == [0] * ranks
    for one, other in zip(unbroken, resumed, strict=True):
        assert one["weights"] == other["weights"] and one["optimizer"] == other["optimizer"]
        assert one["losses"][2:] == other["losses"][-2:]
    exactness.resumed.append((f"{layout.case}: {layout.name}", ranks))


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
