"""A run whose batch grows: the same under every layout, and when it stops and resumes in the middle of the ramp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_a2d.checkpoint.torch_dist_reader import read_common
from tests.cases import Case
from tests.parity.layouts import CP, DISTRIBUTED, EP, OVERLAP, PP, TP_SP, Layout, each
from tests.parity.pool import Pool

TOLERANCE = 1e-6
# Iterations of 4, 4, 6, 8 and 8 samples; the rates rise over the first 12 and fall over the last 10.
RAMP: dict[str, Any] = {
    "rampup_batch_size": [4, 2, 12], "global_batch_size": 8, "train_iters": None, "train_samples": 30,
    "lr_warmup_samples": 12, "lr_decay_style": "WSD", "lr_wsd_decay_samples": 10, "save_interval": 2, "log_interval": 1,
}  # fmt: skip
SIZES = [4, 4, 6, 8, 8]
ALONE = Layout("moe", "one process", 1, {})
QUICK = [ALONE, Layout("moe", "EP2, distributed optimizer", 2, {**EP, **DISTRIBUTED})]
FULL = [
    Layout("moe", "TP2+SP, EP2", 2, {**TP_SP, **EP}),
    Layout("moe", "PP2", 2, PP),
    Layout("moe", "CP2 x PP2, EP2", 4, {**CP, **PP, **EP}),
    Layout("moe", "DP2, overlap", 2, OVERLAP),
    Layout("moe", "micro-batches of 2", 1, {"micro_batch_size": 2}),
]


def settings_of(case: Case, layout: Layout, save: Path) -> dict[str, Any]:
    return {**case.settings, **layout.settings, **RAMP, "load": case.checkpoint, "save": str(save)}


def records(save: Path, kind: str = "train") -> list[dict[str, Any]]:
    found = map(json.loads, (save / "log.jsonl").read_text().splitlines())
    return [record for record in found if record["kind"] == kind]


@pytest.fixture(scope="session")
def alone(cases: dict[str, Case], pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The whole run on one process, and its directory."""
    save = tmp_path_factory.mktemp("ramp") / "run"
    return pool.run("run", 1, settings=settings_of(cases["moe"], ALONE, save))[0], save


def test_what_a_ramp_logs(alone: tuple[dict[str, Any], Path]) -> None:
    """Batch sizes, samples and tokens, in log and checkpoint; the rate follows the samples."""
    _, save = alone
    train, saved = records(save), read_common(save / "iter_0000005")
    samples = [sum(SIZES[:count]) for count in range(1, 6)]
    assert [record["batch_size"] for record in train] == SIZES
    assert [record["consumed_samples"] for record in train] == samples
    assert [record["consumed_tokens"] for record in train] == [32 * count for count in samples]
    rates = [record["lr"] for record in train]
    assert rates[:2] == pytest.approx([1e-2 * 4 / 12, 1e-2 * 8 / 12]) and rates[2] == pytest.approx(1e-2)
    assert rates[4] == 0 < rates[3] < rates[2]
    assert (saved["iteration"], saved["consumed_samples"], saved["consumed_tokens"]) == (5, 30, 960)
    assert saved["scheduler"]["num_steps"] == 30
    assert [record["consumed_tokens"] for record in records(save, "validation")] == [0, 960]
    assert [record["consumed_samples"] for record in records(save, "checkpoint")] == [8, 22, 30]


@each(QUICK + FULL, quick=lambda layout: layout in QUICK)
def test_a_ramp_in_every_layout(
    layout: Layout, cases: dict[str, Case], pool: Pool, tmp_path: Path, alone: tuple[dict[str, Any], Path]
) -> None:
    """Stopped after its first increment and resumed, a run is bitwise the unbroken one; and all layouts, and their
    continuations of one process's checkpoint, agree."""
    settings, ranks = settings_of(cases["moe"], layout, tmp_path / "run"), layout.ranks
    reference, saved = alone
    whole = [reference] if layout == ALONE else pool.run("run", ranks, settings=settings)
    stopped = {**settings, "save": str(tmp_path / "stopped")}
    pool.run("run", ranks, settings=stopped, stop_at=2)
    resumed = pool.run("run", ranks, settings=stopped)
    for one, other in zip(whole, resumed, strict=True):
        assert other["start"] == 2 and one["losses"][2:] == other["losses"]
        assert one["weights"] == other["weights"] and one["optimizer"] == other["optimizer"]
        assert one["losses"] == pytest.approx(reference["losses"], rel=TOLERANCE)
    if layout == ALONE:
        return
    shutil.copytree(saved / "iter_0000002", tmp_path / "other" / "iter_0000002")
    other = pool.run("run", ranks, settings={**settings, "save": str(tmp_path / "other")})
    assert [rank["start"] for rank in other] == [2] * ranks
    assert all(rank["losses"] == pytest.approx(reference["losses"][2:], rel=TOLERANCE) for rank in other)


def test_the_ramp_matters(
    cases: dict[str, Case], pool: Pool, tmp_path: Path, alone: tuple[dict[str, Any], Path]
) -> None:
    """Controls: another batch, and a schedule in iterations, give other losses; a constant batch by samples does not."""
    settings = settings_of(cases["moe"], ALONE, tmp_path / "run")
    constant = {
        **settings,
        "rampup_batch_size": [],
        "train_samples": 24,
        "lr_warmup_samples": 16,
        "lr_wsd_decay_samples": 8,
    }
    by_samples = pool.run("run", 1, settings=constant)[0]["losses"]
    by_iterations = {
        **constant, "save": str(tmp_path / "iterations"), "train_samples": None, "train_iters": 3, "lr_warmup_iters": 2,
        "lr_warmup_samples": 0, "lr_wsd_decay_iters": 1, "lr_wsd_decay_samples": 0,
    }  # fmt: skip
    assert by_samples == pool.run("run", 1, settings=by_iterations)[0]["losses"]
    assert abs(by_samples[2] - alone[0]["losses"][2]) > 100 * TOLERANCE


def test_a_run_by_iterations_may_be_extended_by_samples(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """The scheduler's place is converted: the rate is that of a run that was counted in samples from the start."""
    settings = settings_of(cases["moe"], ALONE, tmp_path / "run")
    settings |= {"rampup_batch_size": [], "lr_warmup_samples": 0, "lr_wsd_decay_samples": 0, "lr_decay_style": "linear"}
    by_iterations = {**settings, "train_samples": None, "train_iters": 4}
    pool.run("run", 1, settings=by_iterations, stop_at=2)
    pool.run("run", 1, settings={**settings, "train_samples": 32})
    rates = [record["lr"] for record in records(tmp_path / "run")]
    assert rates == pytest.approx([1e-2 * share for share in (3 / 4, 1 / 2, 1 / 4, 0)], abs=1e-12)
