"""Asynchronous checkpoints: training continues, the state at the save is written, failures are reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_a2d.checkpoint.directory import list_iterations
from megatron_a2d.checkpoint.manifest import check_manifest
from tests.cases import copy_of
from tests.exactness import Exactness, Fault
from tests.parity.pool import Pool


def test_training_goes_on_while_chunks_are_written(trained: dict[str, Any], pool: Pool, tmp_path: Path) -> None:
    """Nothing is written until step 4 begins. By then two steps have followed the save of step 2, and nothing has appeared;
    the checkpoint then holds the weights of step 2: the run that resumes from it is the unbroken one, bit by bit."""
    settings = {**trained["settings"], "save": str(tmp_path / "run"), "save_interval": 2, "async_save": True}
    held = pool.run("run", 2, settings=settings, hold_writer=(str(tmp_path / "release"), 4))
    assert held[0]["newest_when_released"] == [None]
    assert list_iterations(tmp_path / "run") == [2, 4]
    assert all(check_manifest(tmp_path / "run" / name) == [] for name in ("iter_0000002", "iter_0000004"))
    again = {**settings, "load": str(tmp_path / "run"), "ckpt_step": 2, "save": str(tmp_path / "again")}
    resumed = pool.run("run", 2, settings=again)
    for rank, expected in zip(resumed, trained["results"], strict=True):
        assert rank["start"] == 2 and rank["losses"] == expected["losses"][2:]
        assert (rank["weights"], rank["optimizer"]) == (expected["weights"], expected["optimizer"])


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])
def test_a_killed_writer(
    asynchronous: bool, trained: dict[str, Any], pool: Pool, tmp_path: Path, exactness: Exactness
) -> None:
    """The process that writes rank 1's chunks is killed (out of memory, say): all ranks hear of it and none waits."""
    settings = {
        **trained["settings"], "save": str(tmp_path / "run"), "async_save": asynchronous, "on_save_error": "continue",
    }  # fmt: skip
    results = pool.run("run", 2, settings=settings, kill_writer=1)
    assert [rank["exit_code"] for rank in results] == [0, 0]
    assert list_iterations(tmp_path / "run") == [2, 3, 4] and not list((tmp_path / "run").glob(".*"))
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (error,) = [record for record in records if record["kind"] == "save_error"]
    assert error["iteration"] == 1 and "ended with exit code -9" in error["error"] and "on rank 1" in error["error"]
    when = "in the background" if asynchronous else "at once"
    exactness.faults.append(
        Fault(f"SIGKILL of the process that writes chunks {when}", 1, "that checkpoint", "logged, trains on")
    )


@pytest.mark.parametrize(("file", "asynchronous"), [("__1_0.distcp", True), ("manifest.json", False)])
def test_failed_saves_leave_nothing(
    file: str, asynchronous: bool, trained: dict[str, Any], pool: Pool, tmp_path: Path, exactness: Exactness
) -> None:
    """Ten saves in a row fail, at the first file of a rank's or at the last of all: no save finds what another left."""
    settings = copy_of(
        trained, tmp_path, train_iters=14, save_interval=1, async_save=asynchronous, on_save_error="continue"
    )
    first, _ = pool.run("run", 2, settings=settings, unwritable=file)
    assert first["partials"] == [1] * 10 and "the checkpoint of iteration 14 could not be written" in first["error"]
    assert list_iterations(tmp_path / "run") == [1, 2, 3, 4] and not list((tmp_path / "run").glob(".iter_*"))
    exactness.faults.append(Fault(f"{file} cannot be written, ten times in a row", 10, "-", "nothing left of them"))
