"""The process that writes a rank's chunks: its priority, its memory, and what becomes of its errors."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_a2d import megatron_compat
from megatron_a2d.checkpoint import async_writer
from megatron_a2d.checkpoint.manifest import read_manifest, write_manifest
from megatron_a2d.config.model_config import model_config_from_hf
from megatron_a2d.config.settings import build
from megatron_a2d.distributed import process_groups
from megatron_a2d.megatron_compat.device import has_cuda
from megatron_a2d.training import checkpointing
from megatron_a2d.training.initialization import build_train_state
from megatron_a2d.training.optimizer import update_parameters
from tests.tiny import hub_config

megatron_compat.install()
NO_CHUNKS: Any = SimpleNamespace(write_buckets=[])


@pytest.mark.parametrize("in_background", [True, False])
def test_only_a_writer_beside_training_leaves_it_the_cpus(
    in_background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing else to do, training waits: then the process is as urgent as training itself."""

    def seen(directory: Path, names: list[str], num_threads: int = 8) -> dict[str, Any]:
        return {"niceness": os.nice(0), "num_threads": num_threads, "names": names}

    monkeypatch.setattr(async_writer, "measure", seen)
    entries: Any = async_writer.ChunkWriter(NO_CHUNKS, tmp_path, in_background).finish()
    ours = os.nice(0)
    assert entries == {"niceness": 19 if in_background else ours, "num_threads": 1, "names": []}


@pytest.mark.parametrize("in_background", [True, False])
def test_a_writer_starts_no_thread(in_background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short of memory, a thread that cannot be started would let all ranks wait for ever."""

    def refuse(thread: threading.Thread) -> None:
        raise AssertionError("a thread is started")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    (tmp_path / "file").write_bytes(b"xxxx")
    monkeypatch.setattr(
        async_writer, "FileSystemWriterAsync", SimpleNamespace(write_preloaded_data=lambda *_, **__: None)
    )
    chunks: Any = SimpleNamespace(write_buckets=[(str(tmp_path / "file"), "key", ([], []))])
    entries = async_writer.ChunkWriter(chunks, tmp_path, in_background).finish()
    assert entries["file"].size == 4
    write_manifest(tmp_path, num_threads=1)
    assert read_manifest(tmp_path) == entries


@pytest.mark.skipif(has_cuda(), reason="with a GPU the copies on the host are what is written")
@pytest.mark.parametrize("in_background", [True, False])
def test_beside_training_the_process_has_copies_alone(
    in_background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory has nothing where training changes tensors; a process that training waits for has no copies."""
    weights, written = torch.full((1 << 16,), 3.0), []

    def write(connection: Any, parent: int, buckets: list[Any], *_: Any) -> None:
        ((name, key, (objects, ((item, tensor),))),) = buckets
        assert (name, key, objects, item) == ("file", "key", [b"object"], "weights")
        connection.send(({}, {"copied": tensor.data_ptr() != weights.data_ptr(), "value": float(tensor[-1])}))

    def withheld(tensors: Iterable[torch.Tensor]) -> Any:
        written.append(list(tensors))
        return nullcontext()

    monkeypatch.setattr(async_writer, "_write", write)
    monkeypatch.setattr(async_writer, "not_inherited", withheld)
    chunks: Any = SimpleNamespace(write_buckets=[("file", "key", ([b"object"], [("weights", weights)]))])
    writer = async_writer.ChunkWriter(chunks, tmp_path, in_background, [weights])
    weights.zero_()
    assert writer.finish() == {"copied": in_background, "value": 3.0}
    assert written == [[weights] if in_background else []]


def test_what_a_step_changes() -> None:
    """The memory of weights, gradients and both moments: nothing that a step changes is shared with the writer."""
    config = build({"use_distributed_optimizer": True, "train_iters": 10})
    process_groups.initialize(config.parallel)
    try:
        state = build_train_state(model_config_from_hf(hub_config("moe"), "moe"), config)
        for parameter in state.models[0].parameters():
            parameter.main_grad.fill_(0.1)
        assert update_parameters(state.optimizer)
        memory = {tensor.untyped_storage().data_ptr() for tensor in state.tensors()}
        for parameter in state.models[0].parameters():
            assert {part.untyped_storage().data_ptr() for part in (parameter, parameter.main_grad)} <= memory
        moments = [value for part in state.optimizer.chained_optimizers for value in part.optimizer.state.values()]
        assert moments and all(
            value[name].untyped_storage().data_ptr() in memory
            for value in moments
            for name in ("exp_avg", "exp_avg_sq")
        )
    finally:
        process_groups.finalize()


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyError("anything")])
def test_what_stops_the_writer_is_raised_where_training_waits(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
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
    log: Any = SimpleNamespace(checkpoint=lambda *_, **__: None)
    for async_save in (True, False):
        config: Any = SimpleNamespace(training=SimpleNamespace(save=None, async_save=async_save))
        manager = checkpointing.CheckpointManager(config, Path("hf"), log)
        for last in (False, True):
            manager.save(SimpleNamespace(iteration=1), last)  # type: ignore[arg-type]
    assert said == [True, False, False, False]
