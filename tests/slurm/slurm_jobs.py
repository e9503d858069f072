"""A training job on the cluster, submitted as a user submits it, and what became of it."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_a2d.checkpoint.directory import directory_name, latest_iteration
from megatron_a2d.distributed.hang_watchdog import HEARTBEATS
from tests.slurm.slurm_cluster import ROOT, Cluster

TRAIN_ITERS, SAVE_INTERVAL = 6, 2
PATIENCE = 120.0  # seconds for anything to happen; a start takes about ten


class Material(NamedTuple):
    """What all runs train on."""

    checkpoint: Path
    tokens: Path


class Job:
    """Two nodes, one process each, six steps, a checkpoint after every second one."""

    def __init__(
        self,
        cluster: Cluster,
        material: Material,
        directory: Path,
        fault: dict[str, Any] | None = None,
        preflight: bool = True,
        options: tuple[str, ...] = (),
        **settings: Any,
    ):
        self._cluster, self._directory, self.save = cluster, directory, directory / "run"
        self._release = directory / "release"
        cluster.wait_idle()
        environment = {
            "BIN": str(Path(sys.executable).parent), "NPROC": "1", "PREFLIGHT": str(int(preflight)), "LOGS": str(directory / "logs"),
            "A2D_TEST_FAULT": json.dumps({"attempt": 0, "rank": None, **fault} if fault else None),
            "A2D_TEST_RELEASE": str(self._release),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "fixtures" / "faults"), str(ROOT)]),
        }  # fmt: skip
        flags = {
            "load": material.checkpoint, "save": self.save, "train_data_path": material.tokens, "seq_length": 32,
            "global_batch_size": 4, "train_iters": TRAIN_ITERS, "save_interval": SAVE_INTERVAL, "log_interval": 1,
            "lr": 1e-3, "use_distributed_optimizer": None,
            "distributed_timeout_minutes": 0.5, **settings,
        }  # fmt: skip
        words = [
            word
            for name, value in flags.items()
            for word in (f"--{name.replace('_', '-')}", *([] if value is None else [str(value)]))
        ]
        cluster.environment |= environment
        self.id = cluster.run(
            "sbatch",
            "--parsable",
            "--nodes=2",
            *options,
            f"--output={directory}/job.log",
            "launch/train.sbatch",
            *words,
        )

    def state(self) -> str:
        """Slurm's word for it, as PENDING or COMPLETED."""
        words = dict(word.partition("=")[::2] for word in self._scontrol().split())
        return words["JobState"]

    def restarts(self) -> int:
        return int(dict(word.partition("=")[::2] for word in self._scontrol().split())["Restarts"])

    def wait_until_over(self) -> None:
        self.wait_for(lambda: self.state() in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"), "an end")

    def wait_until_held(self, attempt: int, iteration: int) -> None:
        """Until the run stands before the step of `iteration`."""
        beats = self.attempt(attempt) / HEARTBEATS

        def is_there() -> bool:
            found = [json.loads(path.read_text()) for path in beats.glob("rank_?????")]
            return len(found) == 2 and all(beat["iteration"] == iteration and beat["still"] > 0.5 for beat in found)

        self.wait_for(is_there, f"iteration {iteration}")

    def wait_for(self, condition: Any, what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"no {what} within {PATIENCE:.0f} s\n{self.story()}")
            time.sleep(0.2)

    def release(self) -> None:
        self._release.touch()

    def attempt(self, number: int) -> Path:
        return self._directory / "logs" / f"megatron_a2d-{self.id}" / f"attempt_{number}"

    def log(self) -> str:
        """What train.sbatch said."""
        path = self._directory / "job.log"
        return path.read_text() if path.exists() else ""

    def story(self) -> str:
        """All that was said, for a test that failed."""
        parts = [f"--- job {self.id}\n{self._scontrol()}\n--- job.log\n{self.log()}"]
        for path in sorted(self._directory.glob("logs/*/attempt_*/*.log")):
            parts.append(f"--- {path.parent.name}/{path.name}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)

    def starts(self) -> list[int]:
        """The iterations that training started from, attempt by attempt."""
        log = self.save / "log.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [record["iteration"] for record in records if record["kind"] == "start"]

    def _scontrol(self) -> str:
        return self._cluster.run("scontrol", "show", "job", self.id)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer of a checkpoint, by name."""
    reader = FileSystemReader(directory)
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):  # no_dist alone is not enough to make it quiet
        dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def differences(one: Path, other: Path) -> list[str]:
    """The tensors of two checkpoints that are not the same bit by bit."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys() and len(first) > 20
    return [name for name in first if not torch.equal(first[name], second[name])]


def final(save: Path) -> Path:
    """The last checkpoint; it must be that of the last iteration."""
    assert latest_iteration(save) == TRAIN_ITERS
    return save / directory_name(TRAIN_ITERS)
