"""All ranks stop, skip steps and continue together."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_a2d.training.loss_spikes import SpikeDetector
from megatron_a2d.utils.exit_codes import NOT_FINITE, SIGNALLED
from tests.cases import Case
from tests.exactness import Exactness, Fault
from tests.parity.pool import Pool

ONE = {"expert_model_parallel_size": 1}
LAYOUT = {"expert_model_parallel_size": 2, "use_distributed_optimizer": True}


@pytest.fixture
def settings(cases: dict[str, Case]) -> dict[str, Any]:
    case = cases["moe"]
    return {
        **case.settings,
        **LAYOUT,
        "load": case.checkpoint,
        "train_iters": 4,
        "log_interval": 1,
        "eval_interval": 100,
    }


def events(save: Path, kind: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (save / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_ends_all_and_loses_nothing(
    number: signal.Signals, settings: dict[str, Any], pool: Pool, tmp_path: Path, exactness: Exactness
) -> None:
    unbroken = pool.run("run", 2, settings={**settings, "save": str(tmp_path / "unbroken")})
    save = tmp_path / "stopped"
    stopped = pool.run("run", 2, settings={**settings, "save": str(save)}, signal_at=(2, 1, int(number)))
    assert [(rank["iteration"], rank["exit_code"]) for rank in stopped] == [(2, SIGNALLED)] * 2
    assert number.name in events(save, "end")[0]["reason"]
    resumed = pool.run("run", 2, settings={**settings, "save": str(save)})
    for one, other in zip(unbroken, resumed, strict=True):
        assert (one["weights"], one["optimizer"]) == (other["weights"], other["optimizer"])
        assert other["exit_code"] == 0 and other["start"] == 2
    exactness.faults.append(
        Fault(f"{number.name} to one rank in a step", 1, "nothing", "saves, exit code 3; resumes bitwise")
    )


def test_exit_interval(settings: dict[str, Any], pool: Pool, tmp_path: Path) -> None:
    (result,) = pool.run(
        "run", 1, settings={**settings, "expert_model_parallel_size": 1, "save": str(tmp_path), "exit_interval": 3}
    )
    assert (result["iteration"], result["exit_code"]) == (3, 0) and (tmp_path / "iter_0000003").is_dir()


def test_exit_duration(settings: dict[str, Any], pool: Pool, tmp_path: Path) -> None:
    late = {**settings, "save": str(tmp_path), "exit_duration_in_mins": 1e-6}
    results = pool.run("run", 2, settings=late)
    assert [(rank["iteration"], rank["exit_code"]) for rank in results] == [(1, 0)] * 2


def test_a_step_that_is_not_finite_is_skipped_by_all(
    settings: dict[str, Any], pool: Pool, tmp_path: Path, exactness: Exactness
) -> None:
    """One rank's loss is NaN in step 2: no rank updates, and the run continues."""
    results = pool.run("run", 2, settings={**settings, "save": str(tmp_path)}, poison=(2,))
    assert [rank["iteration"] for rank in results] == [4, 4]
    (skipped,) = events(tmp_path, "skipped")
    assert skipped["iteration"] == 2 and skipped["samples"] == [8, 16]
    assert skipped["not_finite"] == [9, 11, 13, 15], "the samples of the last rank, as they are dealt out"
    losses = {record["iteration"]: record["loss"] for record in events(tmp_path, "train")}
    assert losses[2] is None and all(losses[number] > 0 for number in (1, 3, 4)), "weights must have stayed finite"
    clean = pool.run("run", 2, settings={**settings, "save": str(tmp_path / "clean")})
    assert clean[0]["weights"] != results[0]["weights"]
    exactness.faults.append(
        Fault("a loss that is not a number on one rank", 1, "that step", "skipped by all, samples named")
    )


def test_too_many_skipped_steps_end_the_run(
    settings: dict[str, Any], pool: Pool, tmp_path: Path, exactness: Exactness
) -> None:
    """The run ends with its own exit code, and its checkpoint holds the last good weights."""
    bad = {**settings, "save": str(tmp_path / "bad"), "max_skipped_steps": 2}
    results = pool.run("run", 2, settings=bad, poison=(2, 3, 4))
    assert [(rank["iteration"], rank["exit_code"]) for rank in results] == [(3, NOT_FINITE)] * 2
    with np.load(tmp_path / "bad" / "not_finite_iter_0000003.npz") as batch:
        kept = {int(index): batch["tokens"][row].tobytes() for row, index in enumerate(batch["sample_index"])}
    fed = pool.run("batch_fingerprints", 1, checkpoint=settings["load"], settings=settings | ONE, num_batches=24)[0]
    assert sorted(kept) == list(range(16, 24))
    assert all(content.startswith(kept[index]) for index, content in fed if index in kept), "what the model saw"
    one_step = {**settings, "save": str(tmp_path / "good"), "exit_interval": 1}
    good = pool.run("run", 2, settings=one_step)
    assert [rank["weights"] for rank in good] == [rank["weights"] for rank in results]
    end = "exit code 4; last good weights and the batch are saved"
    exactness.faults.append(Fault("--max-skipped-steps of them in a row", 1, "nothing", end))


def test_spikes_are_flagged() -> None:
    detector = SpikeDetector()
    falling = [8.0 - 0.02 * step + 0.05 * (step % 3) for step in range(60)]
    assert not any(detector.is_spike(loss) for loss in falling)
    assert detector.is_spike(9.5) and detector.is_spike(float("nan"))
    assert not detector.is_spike(6.8)
