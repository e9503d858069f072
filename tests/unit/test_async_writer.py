"""The process that writes a rank's chunks: its priority, its memory, and what becomes of its errors."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_a2d import megatron_compat
from megatron_a2d.checkpoint import async_writer
from megatron_a2d.checkpoint.async_writer import BackgroundWriter, ChunkWriter
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


def chunks_of(*buckets: Any) -> Any:
    return SimpleNamespace(write_buckets=list(buckets))


@pytest.fixture
def background() -> Iterator[BackgroundWriter]:
    """To be asked for after everything that its process is to inherit."""
    writers: list[BackgroundWriter] = []

    def make(changing: Iterable[torch.Tensor] = ()) -> BackgroundWriter:
        writers.append(BackgroundWriter(lambda: changing))
        return writers[-1]

    yield make  # type: ignore[misc]
    for writer in writers:
        writer.close()


@pytest.mark.parametrize("in_background", [True, False])
def test_only_a_writer_beside_training_leaves_it_the_cpus(
    in_background: bool, background: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing else to do, training waits: then the process is as urgent as training itself."""

    def seen(directory: Path, names: list[str], num_threads: int = 8) -> dict[str, Any]:
        return {"niceness": os.nice(0), "num_threads": num_threads, "names": names}

    monkeypatch.setattr(async_writer, "measure", seen)
    entries: Any = ChunkWriter(chunks_of(), tmp_path, background() if in_background else None).finish()
    assert entries == {"niceness": 19 if in_background else os.nice(0), "num_threads": 1, "names": []}


@pytest.mark.parametrize("in_background", [True, False])
def test_a_writer_starts_no_thread(
    in_background: bool, background: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short of memory, a thread that cannot be started would let all ranks wait for ever."""

    def refuse(thread: threading.Thread) -> None:
        raise AssertionError("a thread is started")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    (tmp_path / "file").write_bytes(b"xxxx")
    monkeypatch.setattr(
        async_writer, "FileSystemWriterAsync", SimpleNamespace(write_preloaded_data=lambda *_, **__: None)
    )
    chunks = chunks_of((str(tmp_path / "file"), "key", ([], [])))
    entries = ChunkWriter(chunks, tmp_path, background() if in_background else None).finish()
    assert entries["file"].size == 4
    write_manifest(tmp_path, num_threads=1)
    assert read_manifest(tmp_path) == entries


def seen_weights(buckets: list[Any], *_: Any) -> Any:
    ((name, key, (objects, ((item, tensor),))),) = buckets
    assert (name, key, objects, item) == ("file", "key", [b"object"], "weights")
    return {}, {"process": os.getpid(), "value": float(tensor[-1])}


@pytest.mark.skipif(has_cuda(), reason="with a GPU the copies on the host are what is written")
def test_one_process_writes_all_saves_beside_training(
    background: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is handed copies, and its memory has nothing where training changes tensors."""
    weights, withheld = torch.full((1 << 16,), 3.0), []

    def not_inherited(tensors: Iterable[torch.Tensor]) -> Any:
        withheld.append(list(tensors))
        return nullcontext()

    monkeypatch.setattr(async_writer, "_write", seen_weights)
    monkeypatch.setattr(async_writer, "not_inherited", not_inherited)
    writer, processes = background([weights]), set()
    for value in (3.0, 4.0):
        weights.fill_(value)
        save = ChunkWriter(chunks_of(("file", "key", ([b"object"], [("weights", weights)]))), tmp_path, writer)
        weights.zero_()
        entries: Any = save.finish()
        assert entries["value"] == value
        processes.add(entries["process"])
    assert len(processes) == 1 and os.getpid() not in processes
    assert withheld == [[weights]], "forked once"


@pytest.mark.skipif(has_cuda(), reason="with a GPU each save has a process of its own")
@pytest.mark.parametrize("while_writing", [True, False])
def test_a_killed_process_is_replaced(
    while_writing: bool, background: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any) -> Any:
        if while_writing and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {}, {"process": os.getpid()}

    monkeypatch.setattr(async_writer, "_write", write)
    writer = background()
    if while_writing:
        with pytest.raises(OSError, match="ended with exit code -9 before it was done"):
            ChunkWriter(chunks_of(), tmp_path, writer).finish()
    else:
        writer._process.kill()
    assert set(ChunkWriter(chunks_of(), tmp_path, writer).finish()) == {"process"}


@pytest.mark.skipif(has_cuda(), reason="with a GPU each save has a process of its own")
def test_a_save_that_nobody_waited_for(background: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank could not start to write its part: the next save gets its own answer."""
    monkeypatch.setattr(async_writer, "_write", lambda buckets, transforms, directory: ({}, {"of": directory.name}))
    writer = background()
    ChunkWriter(chunks_of(), Path("first"), writer)
    entries: Any = ChunkWriter(chunks_of(), Path("second"), writer).finish()
    assert entries == {"of": "second"}


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
        ChunkWriter(chunks_of(), tmp_path).finish()


def test_training_is_beside_every_asynchronous_save_but_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[bool] = []

    def writer(state: Any, config: Any, hf_files: Path, background: BackgroundWriter | None) -> Any:
        said.append(background is not None)
        return SimpleNamespace(finish=lambda: Path("run/iter_0000001"), iteration=1)

    monkeypatch.setattr(checkpointing, "CheckpointWriter", writer)
    monkeypatch.setattr(checkpointing, "dist", SimpleNamespace(get_rank=lambda: 1))
    log: Any = SimpleNamespace(checkpoint=lambda *_, **__: None)
    for async_save in (True, False):
        config: Any = SimpleNamespace(training=SimpleNamespace(save="run", async_save=async_save))
        state: Any = SimpleNamespace(iteration=1, tensors=list)
        manager = checkpointing.CheckpointManager(state, config, Path("hf"), log)
        for last in (False, True):
            manager.save(state, last)
        manager.close()
    assert said == [True, False, False, False]
