"""The process that writes a rank's chunks: its priority, and what becomes of its errors."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_a2d.checkpoint import async_writer
from megatron_a2d.training import checkpointing

NO_CHUNKS: Any = SimpleNamespace(write_buckets=[])


@pytest.mark.parametrize("in_background", [True, False])
def test_only_a_writer_beside_training_leaves_it_the_cpus(
    in_background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing else to do, training waits: then the process may use all CPUs, in competition with other jobs."""

    def seen(directory: Path, names: list[str], num_threads: int = 8) -> dict[str, Any]:
        return {"niceness": os.nice(0), "num_threads": num_threads, "names": names}

    monkeypatch.setattr(async_writer, "measure", seen)
    entries: Any = async_writer.ChunkWriter(NO_CHUNKS, tmp_path, in_background).finish()
    ours = os.nice(0)
    assert entries == {
        "niceness": 19 if in_background else ours, "num_threads": 1 if in_background else 8, "names": [],
    }  # fmt: skip


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyError("anything")])
def test_what_stops_the_writer_is_raised_where_training_waits(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(async_writer, "measure", fails)
    with pytest.raises(OSError if isinstance(error, OSError) else RuntimeError, match=str(error.args[0])):
        async_writer.ChunkWriter(NO_CHUNKS, tmp_path).finish()


def test_training_is_beside_every_asynchronous_save_but_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[bool] = []

    def writer(state: Any, config: Any, hf_files: Path, in_background: bool) -> Any:
        said.append(in_background)
        return SimpleNamespace(finish=lambda: Path("run/iter_0000001"), iteration=1)

    monkeypatch.setattr(checkpointing, "CheckpointWriter", writer)
    monkeypatch.setattr(checkpointing, "dist", SimpleNamespace(get_rank=lambda: 1))
    log: Any = SimpleNamespace(event=lambda *_, **__: None, say=lambda *_: None)
    for async_save in (True, False):
        config: Any = SimpleNamespace(training=SimpleNamespace(save=None, async_save=async_save))
        manager = checkpointing.CheckpointManager(config, Path("hf"), log)
        for last in (False, True):
            manager.save(SimpleNamespace(iteration=1), last)  # type: ignore[arg-type]
    assert said == [True, False, False, False]
