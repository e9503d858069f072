"""What monitoring says does not depend on the layout, and monitoring changes nothing."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_a2d.report.plots import draw_run, read_log
from megatron_a2d.training.tensorboard_layout import LAYOUT
from tests.cases import Case
from tests.parity.layouts import CP, DISTRIBUTED, EP, OVERLAP, PP, TP_SP, VPP, Layout, each
from tests.parity.pool import Pool

# The small batch of the noise scale is two samples in each of these: the first ones of the iteration.
LAYOUTS = [
    Layout("moe", "EP2, distributed optimizer", 2, {**EP, **DISTRIBUTED}),
    Layout("moe", "DP2, overlap", 2, OVERLAP),
    Layout("moe", "TP2+SP, EP1", 2, {**TP_SP, "micro_batch_size": 2}),
    Layout("moe", "CP2, EP2", 2, {**CP, **EP, "micro_batch_size": 2}),
    Layout("moe", "PP2 x DP2", 4, PP),
    Layout("moe", "VPP2, distributed optimizer", 2, {**VPP, **DISTRIBUTED}),
    Layout("dense_tied", "PP2 x DP2, distributed optimizer", 4, {**PP, **DISTRIBUTED}),
    Layout("dense_tied", "CP2 x TP2+SP", 4, {**CP, **TP_SP, "micro_batch_size": 2}),
]
QUICK = {
    "moe: EP2, distributed optimizer",
    "moe: TP2+SP, EP1",
    "moe: CP2, EP2",
    "dense_tied: PP2 x DP2, distributed optimizer",
}


def flat(values: Any, prefix: str = "") -> dict[str, float]:
    """Numbers by dotted name, those of lists too."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    found: dict[str, float] = {}
    for name, value in items:
        more = flat(value, f"{prefix}{name}.") if isinstance(value, dict | list) else {f"{prefix}{name}": value}
        found |= more
    return found


@pytest.fixture(scope="module")
def one_process(cases: dict[str, Case], pool: Pool) -> dict[str, dict[str, float]]:
    return {
        kind: flat(
            pool.run("monitored", 1, checkpoint=case.checkpoint, settings={**case.settings, "micro_batch_size": 2})[0]
        )
        for kind, case in cases.items()
        if kind in ("moe", "dense_tied")
    }


@each(LAYOUTS, quick=lambda layout: str(layout) in QUICK)
def test_a_layout_says_what_one_process_says(
    layout: Layout, cases: dict[str, Case], one_process: dict[str, dict[str, float]], pool: Pool
) -> None:
    case = cases[layout.case]
    results = pool.run(
        "monitored", layout.ranks, checkpoint=case.checkpoint, settings={**case.settings, **layout.settings}
    )
    expected = one_process[layout.case]
    kinds = {
        "grad_norm_by_role",
        "update_to_weight_ratio",
        "relative_weight_change",
        "loss_by_t",
        "accuracy_by_mask_ratio",
    }
    assert {name.partition(".")[0] for name in expected} >= kinds | {"tr_sigma"}
    for found in map(flat, results):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            # Differences of nearly equal sums: relative to the larger of the two that they come from.
            tolerance = 1e-4 if name in ("tr_sigma", "grad_norm_sq", "grad_noise_scale") else 2e-6
            assert value == pytest.approx(expected[name], rel=tolerance, abs=1e-6, nan_ok=True), name


def test_the_comparison_can_fail(cases: dict[str, Case], one_process: dict[str, dict[str, float]], pool: Pool) -> None:
    """Negative control: another learning rate and another seed."""
    case = cases["moe"]
    (other,) = pool.run(
        "monitored", 1, checkpoint=case.checkpoint,
        settings={**case.settings, "micro_batch_size": 2, "seed": 5, "lr": 1.01e-2},
    )  # fmt: skip
    found, expected = flat(other), one_process["moe"]
    for name in ("grad_norm_by_role.mlp", "update_to_weight_ratio.mlp", "moe.entropy_masked", "tr_sigma"):
        assert abs(found[name] - expected[name]) > 1e-4 * abs(expected[name]), name


@pytest.mark.parametrize(
    ("kind", "ranks", "layout"),
    [("moe", 1, {}), ("moe", 2, TP_SP), ("dense_tied", 2, PP), ("dense_tied", 4, {**TP_SP, **PP})],
)
def test_the_mask_row_may_begin_as_the_mean_of_all(
    kind: str, ranks: int, layout: dict[str, Any], cases: dict[str, Case], pool: Pool
) -> None:
    case = cases[kind]
    results = pool.run("mask_rows", ranks, checkpoint=case.checkpoint, settings={**case.settings, **layout})
    found = [row for result in results for row in result]
    assert len(found) == (2 if kind == "dense_tied" and "pipeline_model_parallel_size" in layout else 1)
    for before, after, mean in found:
        assert (
            after == pytest.approx(mean, abs=1e-6)
            and max(abs(a - b) for a, b in zip(before, after, strict=True)) > 0.01
        )


def test_roles_add_up(one_process: dict[str, dict[str, float]], cases: dict[str, Case], pool: Pool) -> None:
    """The norms by role are parts of the whole one; every choice of an expert is served."""
    case = cases["moe"]
    (result,) = pool.run(
        "train_steps", 1, checkpoint=case.checkpoint, settings={**case.settings, "micro_batch_size": 2}, num_steps=2
    )
    seen = one_process["moe"]
    squares = [value**2 for name, value in seen.items() if name.startswith("grad_norm_by_role.")]
    assert len(squares) == 6 and math.sqrt(sum(squares)) == pytest.approx(result["grad_norms"][-1], rel=1e-6)
    assert seen["moe.dropped_token_frac"] == 0 and 0 < seen["moe.over_mean_load_frac"] < 1
    assert 1 < seen["moe.load_imbalance_masked"] < 8 and 0 < seen["moe.entropy_unmasked"] < math.log(8)
    assert 0 < seen["relative_weight_change.attention"] < 1


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({**EP, **DISTRIBUTED, "bf16": True}, id="distributed, bf16"),
        pytest.param(OVERLAP, id="overlap"),
        pytest.param({"bf16": True}, id="bf16", marks=pytest.mark.full),
    ],
)
def test_monitoring_changes_nothing(layout: dict[str, Any], cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """Bit for bit, the optimizer's state too; and what it has seen is in the log and on the page."""
    case = cases["moe"]
    settings = {
        **case.settings, **layout, "load": case.checkpoint, "train_iters": 5, "log_interval": 2, "eval_interval": 5,
        "save_interval": 5,
    }  # fmt: skip
    runs = {
        monitor: pool.run("run", 2, settings={**settings, "monitor": monitor, "save": str(tmp_path / str(monitor))})
        for monitor in (True, False)
    }
    for with_it, without in zip(runs[True], runs[False], strict=True):
        assert with_it == without
    records = [record for record in read_log(tmp_path / "True") if record["kind"] == "train"]
    assert [record["iteration"] for record in records] == [2, 4, 5]
    drift = [record["relative_weight_change"]["attention"] for record in records]
    assert 0 < drift[0] < drift[1] <= drift[2]  # the learning rate ends at 0
    assert all("moe" not in record for record in read_log(tmp_path / "False"))
    assert draw_run(tmp_path / "True", tmp_path / "page.png").stat().st_size > 20_000
    curves = EventAccumulator(str(tmp_path / "True" / "tensorboard")).Reload()
    tags = curves.Tags()
    assert any(tag.startswith("custom_scalars") for tag in tags["tensors"])
    charts = {chart: patterns for category in LAYOUT.values() for chart, (_, patterns) in category.items()}
    for record in records:
        numbers = {name: value for name, value in flat(record).items() if name != "time" and "by_layer" not in name}
        for name, value in numbers.items():
            depth = 2 if name.startswith("moe.") else 1  # not the dot of loss_by_t.0.1
            if isinstance(value, float):
                (curve,) = [
                    event.value
                    for event in curves.Scalars(f"train/{name.replace('.', '/', depth)}")
                    if event.step == record["iteration"]
                ]
                assert curve == pytest.approx(value, rel=1e-6), name
    del charts["MFU"]  # this machine has no peak to compare with
    for chart, patterns in charts.items():
        for pattern in patterns:
            found = [tag for tag in tags["scalars"] if re.match(pattern, tag)]
            assert found, (chart, pattern)


def test_a_resumed_run_counts_drift_from_its_beginning(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    case = cases["moe"]
    settings = {**case.settings, **EP, "load": case.checkpoint, "log_interval": 1, "train_iters": 4, "save_interval": 2}
    pool.run("run", 2, settings={**settings, "save": str(tmp_path / "unbroken")})
    stopped = {**settings, "save": str(tmp_path / "resumed")}
    pool.run("run", 2, settings=stopped, stop_at=2)
    pool.run("run", 2, settings=stopped)
    unbroken, resumed = (
        {
            record["iteration"]: record["relative_weight_change"]
            for record in read_log(tmp_path / name)
            if record["kind"] == "train"
        }
        for name in ("unbroken", "resumed")
    )
    assert resumed == unbroken
    # Without the checkpoint that it began with, a run continues and logs no drift.
    gone = {**stopped, "load": str(tmp_path / "gone"), "train_iters": 5}
    pool.run("run", 2, settings=gone)
    newest = [record for record in read_log(tmp_path / "resumed") if record["kind"] == "train"][-1]
    assert newest["iteration"] == 5 and "relative_weight_change" not in newest and "moe" in newest
