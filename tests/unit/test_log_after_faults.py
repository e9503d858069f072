"""log.jsonl and the tracker after what a kill or a power loss leaves of them, and a clock that is set meanwhile."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_a2d.checkpoint.directory import TRACKER, directory_name
from megatron_a2d.checkpoint.manifest import write_manifest
from megatron_a2d.config.settings import RunConfig, build
from megatron_a2d.report.plots import read_log
from megatron_a2d.training.logger import RunLog
from megatron_a2d.training.resume import newest_intact_until

RECORD: dict[str, Any] = {"kind": "train", "iteration": 3, "loss": 1.5, "accuracy": 0.1, "grad_norm": 1.0, "lr": 1e-3}


def log_of(save: Path, iteration: int, said: list[str]) -> RunLog:
    log = RunLog(build({"save": str(save), "global_batch_size": 8}), iteration, enabled=True)
    log.say = said.append  # type: ignore[method-assign]
    return log


def test_an_unfinished_line_does_not_spoil_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A kill in the middle of a write leaves half a record: without its end the next one would be lost with it."""
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(RECORD) + '\n{"kind": "tra')
    log = RunLog(build({"save": str(tmp_path)}), 2, enabled=True)
    log.event("end", iteration=4)
    log.close()
    assert "its last line was unfinished" in capsys.readouterr().err
    assert [record["kind"] for record in read_log(tmp_path)] == ["train", "end"]


def test_a_whole_log_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.dumps(RECORD) + "\n"
    (tmp_path / "log.jsonl").write_text(before)
    RunLog(build({"save": str(tmp_path)}), 3, enabled=True).close()
    assert (tmp_path / "log.jsonl").read_text() == before and "unfinished" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("iteration", "line"),
    [
        (1, "iterations 2 to 3 are in log.jsonl but not in this checkpoint, and computed again (16 samples)"),
        (2, "iteration 3 is in log.jsonl but not in this checkpoint, and computed again (8 samples)"),
        (3, None),
    ],
)
def test_what_is_computed_again_is_said(iteration: int, line: str | None, tmp_path: Path) -> None:
    records = [RECORD | {"iteration": number} for number in (1, 2, 3)] + [{"kind": "checkpoint", "iteration": 1}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    said: list[str] = []
    log = log_of(tmp_path, iteration, said)
    log.repeated(iteration)
    log.close()
    assert said == ([line] if line else [])


def test_a_clock_that_is_set_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log = log_of(tmp_path, 0, said)
    real = time.time
    for ahead in (0.0, 2.0, 3600.0, 3600.0, -60.0):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: real() + ahead)
        log.event("train", iteration=1)
    log.close()
    assert [line.split(";")[0] for line in said] == [
        f"warning: the clock jumped by {jump} s" for jump in ("+3,600", "-3,660")
    ]


def test_what_a_checkpoint_costs_is_in_all_logs(tmp_path: Path) -> None:
    said: list[str] = []
    log = log_of(tmp_path, 0, said)
    log.checkpoint(4, tmp_path / "iter_0000004", seconds=2.5, stall=0.25)
    log.close()
    assert said == [f"checkpoint {tmp_path}/iter_0000004: written in 2.50 s, training waited 0.25 s"]
    (record,) = read_log(tmp_path)
    assert (record["seconds"], record["seconds_waited"], record["consumed_samples"]) == (2.5, 0.25, 32)
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name, value in (("seconds", 2.5), ("seconds_waited", 0.25)):
        assert [(event.step, event.value) for event in curves.Scalars(f"checkpoint/{name}")] == [(4, value)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_neither_the_run_nor_its_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard writes in a thread, which a full disk ends; the next curve would raise, in the middle of training."""
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said: list[str] = []
    log = log_of(tmp_path, 0, said)
    with monkeypatch.context() as disk:
        disk.setattr(LocalFileSystem, "_write", full)
        for number in range(1, 2000):
            log.checkpoint(number, tmp_path, seconds=float(number), stall=0.0)
            if any("cannot be written now" in line for line in said):
                break
            time.sleep(0.01)
    warnings = [line for line in said if line.startswith("warning: ")]
    assert warnings == [f"warning: {tmp_path}/tensorboard: cannot be written now (No space left on device)"]
    for later in (number + 1, number + 2):
        log.checkpoint(later, tmp_path, seconds=float(later), stall=0.0)
    log.close()
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in curves.Scalars("checkpoint/seconds")][-2:] == [number + 1, number + 2]


def two_checkpoints(save: Path, tracker: str) -> RunConfig:
    """The settings of a run that has saved iterations 2 and 4."""
    for number in (2, 4):
        directory = save / directory_name(number)
        directory.mkdir()
        (directory / "common.pt").write_bytes(b"x")
        write_manifest(directory)
    (save / TRACKER).write_text(tracker)
    return build({"save": str(save)})


def test_a_checkpoint_that_is_passed_over_is_not_missing(tmp_path: Path) -> None:
    """A rollback looks for one from before the spike; the newest may be from after it."""
    said: list[str] = []
    config = two_checkpoints(tmp_path, "4\n")
    assert newest_intact_until(config.training, 3, said.append) == tmp_path / directory_name(2)
    assert said == []


@pytest.mark.parametrize("torn", ["", "x", "99999999999999999999", "3"])
def test_a_torn_tracker_costs_nothing(torn: str, tmp_path: Path) -> None:
    """The directories themselves say which checkpoint is the newest."""
    said: list[str] = []
    config = two_checkpoints(tmp_path, torn)
    assert newest_intact_until(config.training, 9, said.append) == tmp_path / directory_name(4)
    missing = f"{tmp_path}/iter_0000003: is missing"
    assert said == [missing] if torn == "3" else said[0].endswith("; the newest intact checkpoint is used")
    assert len(said) == 1 and (TRACKER in said[0] or torn == "3")


def test_a_torn_tracker_does_not_bring_back_what_a_rollback_left(tmp_path: Path) -> None:
    """Iteration 4 was written before the rollback, 2 after it."""
    config = two_checkpoints(tmp_path, "")
    os.utime(tmp_path / directory_name(4), (1, 1))
    assert newest_intact_until(config.training, 9, lambda said: None) == tmp_path / directory_name(2)
