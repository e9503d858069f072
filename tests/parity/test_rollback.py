"""Samples that a run leaves out, and rollbacks after a spike of the loss: exactly a resume that skips them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_a2d.checkpoint.directory import latest_iteration
from megatron_a2d.checkpoint.torch_dist_reader import read_common
from tests.cases import Case
from tests.parity.layouts import DISTRIBUTED, EP
from tests.parity.pool import Pool

TWO = {**EP, **DISTRIBUTED}


@pytest.fixture
def settings(cases: dict[str, Case]) -> dict[str, Any]:
    """Six iterations of 4 samples, saved after every second one."""
    case = cases["moe"]
    return {
        **case.settings, "load": case.checkpoint, "global_batch_size": 4, "train_iters": 6, "save_interval": 2,
        "log_interval": 1, "eval_interval": 100, "lr_warmup_iters": 3,
    }  # fmt: skip


def events(save: Path, kind: str) -> list[dict[str, Any]]:
    records = map(json.loads, (save / "log.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


def test_skipped_samples_are_remembered(settings: dict[str, Any], pool: Pool, tmp_path: Path) -> None:
    """The same in every layout; a resumed run skips them without being told, and more that lie ahead."""
    skip = {**settings, "skip_samples": ["5-9"]}
    alone = pool.run("run", 1, settings={**skip, "save": str(tmp_path / "alone")})[0]
    pair = pool.run("run", 2, settings={**skip, **TWO, "save": str(tmp_path / "pair")})
    plain = pool.run("run", 1, settings={**settings, "save": str(tmp_path / "plain")})[0]
    assert all(rank["losses"] == pytest.approx(alone["losses"], rel=1e-6) for rank in pair)
    assert plain["losses"][0] == alone["losses"][0] and abs(plain["losses"][1] / alone["losses"][1] - 1) > 1e-4
    stopped = {**settings, "save": str(tmp_path / "stopped")}
    pool.run("run", 1, settings={**skip, "save": stopped["save"]}, stop_at=2)
    resumed = pool.run("run", 1, settings=stopped)[0]
    assert resumed["weights"] == alone["weights"] and resumed["losses"] == alone["losses"][2:]
    assert read_common(tmp_path / "stopped" / "iter_0000006")["skipped_samples"] == [[5, 9]]
    recorded = json.loads((tmp_path / "stopped" / "iter_0000006" / "run.json").read_text())
    assert recorded["skip_samples"] == ["5-9"]
    pool.run("run", 1, settings={**skip, "save": str(tmp_path / "more")}, stop_at=2)
    more = {**settings, "save": str(tmp_path / "more"), "skip_samples": ["20-20"]}
    assert pool.run("run", 1, settings=more)[0]["losses"][0] == alone["losses"][2]
    assert read_common(tmp_path / "more" / "iter_0000006")["skipped_samples"] == [[5, 9], [20, 20]]


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {**TWO, "async_save": True})], ids=["1", "2, async"])
def test_a_rollback_is_a_resume(
    ranks: int, layout: dict[str, Any], settings: dict[str, Any], pool: Pool, tmp_path: Path
) -> None:
    """A spike in iteration 5 goes back to iteration 4, bitwise as by hand. The second one, in iteration 5 again, is
    beyond the limit. Iteration 4 is saved again, and knows what is skipped."""
    settings = {**settings, **layout}
    rolling = {**settings, "save": str(tmp_path / "run"), "on_spike": "rollback", "max_rollbacks": 1}
    results = pool.run("run", ranks, settings=rolling, spikes=(5, 6))
    by_hand = {**settings, "save": str(tmp_path / "by_hand")}
    pool.run("run", ranks, settings=by_hand, stop_at=4, finish_saves=True)
    expected = pool.run("run", ranks, settings={**by_hand, "skip_samples": ["16-19"]})
    for one, other in zip(results, expected, strict=True):
        assert (one["iteration"], other["start"]) == (6, 4) and one["losses"][5:] == other["losses"]
        assert one["weights"] == other["weights"] and one["optimizer"] == other["optimizer"]
    (rollback,) = events(tmp_path / "run", "rollback")
    assert [rollback[name] for name in ("iteration", "to", "samples", "number")] == [5, 4, [16, 20], 1]
    spikes = events(tmp_path / "run", "spike")
    assert [(record["iteration"], record["samples"]) for record in spikes] == [(5, [16, 20]), (5, [20, 24])]
    saved = read_common(tmp_path / "run" / "iter_0000004")
    assert (saved["skipped_samples"], saved["rollbacks"], saved["consumed_samples"]) == ([[16, 19]], 1, 16)
    with np.load(tmp_path / "run" / "spike_iter_0000005.npz") as batch:
        assert sorted(batch["sample_index"]) == [16, 17, 18, 19]


def test_a_run_that_dies_after_a_rollback(settings: dict[str, Any], pool: Pool, tmp_path: Path) -> None:
    """It resumes from the checkpoint that the rollback chose, not from a later one, and skips the same samples."""
    rolling = {**settings, "save": str(tmp_path / "run"), "on_spike": "rollback", "log_interval": 3}
    # Logged after 3 and 6 iterations; 4 and 6 were saved, and iteration 2 is the newest from before the interval 4 .. 6.
    pool.run("run", 1, settings=rolling, spikes=(2,), stop_at=6)
    assert latest_iteration(tmp_path / "run") == 2 and (tmp_path / "run" / "iter_0000004").is_dir()
    resumed = pool.run("run", 1, settings=rolling)[0]
    assert resumed["start"] == 2
    by_hand = {**settings, "save": str(tmp_path / "by_hand")}
    pool.run("run", 1, settings=by_hand, stop_at=2)
    expected = pool.run("run", 1, settings={**by_hand, "skip_samples": ["8-23"]})[0]
    assert resumed["weights"] == expected["weights"] and resumed["losses"] == expected["losses"]


def test_no_checkpoint_to_go_back_to(settings: dict[str, Any], pool: Pool, tmp_path: Path) -> None:
    rolling = {**settings, "save": str(tmp_path / "run"), "on_spike": "rollback"}
    (result,) = pool.run("run", 1, settings=rolling, spikes=(2,))
    plain = pool.run("run", 1, settings={**settings, "save": str(tmp_path / "plain")})
    assert result["weights"] == plain[0]["weights"] and events(tmp_path / "run", "rollback") == []
