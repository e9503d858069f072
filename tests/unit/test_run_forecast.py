"""`plan --run`: checkpoint intervals and durations of runs with failures, against published and hand-computed values."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_a2d import plan
from megatron_a2d.planner import run_forecast
from megatron_a2d.planner.cluster import read_cluster
from megatron_a2d.planner.run_forecast import Failures, daly_interval, forecast, wall_time, young_interval
from megatron_a2d.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MINUTE, HOUR = 60.0, 3600.0


@pytest.fixture(scope="module")
def plans():
    return run_forecast.standard_plans()


@pytest.mark.parametrize(("mtbf", "minutes"), [(24 * HOUR, 117), (6 * HOUR, 57), (15 * MINUTE, 9.1)])
def test_dalys_own_examples(mtbf: float, minutes: float) -> None:
    """Figures 3 to 5 of his paper: a checkpoint takes 5 minutes."""
    assert daly_interval(5 * MINUTE, mtbf) / MINUTE == pytest.approx(minutes, abs=0.5 if minutes > 10 else 0.05)


def test_young_by_hand() -> None:
    assert young_interval(5 * MINUTE, 24 * HOUR) == pytest.approx(120 * MINUTE)  # sqrt(2 x 300 x 86,400) = 7,200
    assert daly_interval(1.0, 1e8) == pytest.approx(young_interval(1.0, 1e8), rel=1e-3)
    assert daly_interval(20.0, 10.0) == daly_interval(100.0, 10.0) == 10.0  # a checkpoint takes two MTBFs


@pytest.mark.parametrize(("save", "mtbf"), [(55.0, 33 * 86_400), (421.0, 4 * 86_400), (300.0, 6 * HOUR)])
def test_the_best_interval_is_the_shortest_run(save: float, mtbf: float) -> None:
    best = daly_interval(save, mtbf)

    def wall(interval: float) -> float:
        return wall_time(500 * HOUR, interval, save, mtbf, 600.0)

    assert wall(best) < min(wall(0.9 * best), wall(1.1 * best))
    tried = np.geomspace(best / 20, best * 20, 4001)
    shortest = tried[np.argmin([wall(interval) for interval in tried])]
    assert best == pytest.approx(shortest, rel=0.01)


def test_the_expected_duration_is_that_of_simulated_runs() -> None:
    work, interval, save, mtbf, restart = 100 * HOUR, HOUR, 200.0, 5 * HOUR, 900.0
    generator = np.random.default_rng(0)

    def attempt(seconds: float) -> float:
        """Time until so many seconds passed without a failure, restarts included; a restart may fail, too."""
        spent, needed = 0.0, seconds
        while (left := generator.exponential(mtbf)) < needed:
            spent, needed = spent + left, seconds + restart
        return spent + needed

    runs = [sum(attempt(interval + save) for _ in range(round(work / interval))) for _ in range(300)]
    expected = wall_time(work, interval, save, mtbf, restart)
    assert np.mean(runs) == pytest.approx(expected, rel=0.02)
    assert expected == pytest.approx(5 * HOUR * math.exp(0.05) * (math.exp(3800 / 18_000) - 1) * 100)


def test_a_forecast_by_hand(plans) -> None:
    rnd1 = plans[0]
    failures = Failures(node_mtbf_hours=800, restart_minutes=5, storage_gb_per_s=2)
    found = forecast(rnd1, failures)
    parameters = rnd1.job.model_config.num_parameters()
    assert found.checkpoint_bytes == 14 * parameters and 30e9 < parameters < 31e9
    assert found.mtbf == 100 * HOUR  # 8 nodes
    assert found.save == pytest.approx(14 * parameters / 16e9)
    assert found.restart == pytest.approx(300 + found.save)
    assert found.save_interval == round(daly_interval(found.save, found.mtbf) / rnd1.time.total)
    assert found.interval == found.save_interval * rnd1.time.total
    assert found.data_bytes == pytest.approx(4 * 500e9, rel=1e-4)
    assert found.failures == pytest.approx(found.wall / found.mtbf)
    assert found.lost == pytest.approx(found.saving + found.repeated + found.restarting)
    # To first order half an interval is lost in a failure.
    assert found.repeated / found.failures == pytest.approx((found.interval + found.save) / 2, rel=0.05)
    often = forecast(rnd1, failures, 100)
    assert often.save_interval == 100 and often.saving > found.saving and often.lost > found.lost
    assert often.num_saves == math.ceil(59_605 / 100)
    rare = forecast(rnd1, failures._replace(node_mtbf_hours=1e9))
    assert rare.save_interval == 59_605 and rare.failures < 1e-3 and rare.num_saves == 1


def test_a_cluster_may_give_its_storage(plans) -> None:
    fast = plans[0]._replace(cluster=replace(read_cluster("b200"), storage_gb_per_s=10.0))
    default, given, flagged = (
        forecast(plans[0], Failures()), forecast(fast, Failures()), forecast(fast, Failures(storage_gb_per_s=5.0)),
    )  # fmt: skip
    assert default.save == pytest.approx(given.save * 10 / run_forecast.STORAGE_GB_PER_S)
    assert flagged.save == pytest.approx(2 * given.save)


def test_nodes_that_fail_too_often_are_refused(plans) -> None:
    with pytest.raises(UserError, match=r"--node-mtbf-hours 1: 8 nodes fail every 7.5 minutes, .* would not advance"):
        forecast(plans[0], Failures(node_mtbf_hours=1))
    hardly = forecast(plans[0], Failures(node_mtbf_hours=3, restart_minutes=10))
    assert hardly.wall > 2 * hardly.work and hardly.interval < hardly.mtbf
    saved_once = forecast(plans[0], Failures(node_mtbf_hours=1, restart_minutes=0), 59_605)
    assert saved_once.wall == math.inf  # e^786 of the time between failures


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--run", "--node-mtbf-hours", "0"], "--node-mtbf-hours 0: must be above 0 to 1e+09"),
        (["--run", "--node-mtbf-hours", "1e305"], "--node-mtbf-hours 1e+305: must be above 0 to 1e+09"),
        (["--run", "--restart-minutes", "-1"], "--restart-minutes -1: must be 0 to 1e+09"),
        (["--run", "--storage-gb-per-s", "0"], "--storage-gb-per-s 0: must be above 0"),
        (["--run", "--node-mtbf-hours", "nan"], "--node-mtbf-hours"),
        (["--node-mtbf-hours", "10"], "are only valid with --run"),
        (["--run", "--cluster", "b200"], "--gpus: is missing"),
        (["--run", "--micro-batch-size", "4"], "--cluster: is missing"),
        (["--run", "--plot", "plan.png"], "--cluster: is missing"),
    ],
)
def test_bad_input(words: list[str], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        plan.main(words)
    assert any(problem in line for line in caught.value.problems)


def test_the_docs_have_the_commands_table(plans, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(run_forecast, "standard_plans", lambda: plans)
    plan.main(["--run"])
    printed = capsys.readouterr().out.strip()
    page = (ROOT / "docs" / "planning.md").read_text()
    assert printed in page and printed.count("\n") == 17
    assert all(plan.fits for plan in plans)


def test_a_run_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(ROOT / "launch" / "recipes" / "qwen3_0p6b.yaml"), "--cluster", "h100", "--gpus", "2"]
    plan.main([*words, "--run", "--node-mtbf-hours", "500"])
    said = " ".join(capsys.readouterr().out.split())
    assert "best interval (Daly; Young)" in said and "a failure every │ 20.8 days" in said
    assert "hours lost, saved every 500" in said
