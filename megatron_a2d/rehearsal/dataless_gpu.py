"""A simulated GPU: torch's CUDA interface in a process without CUDA, over tensors that hold no data.

Training code takes its CUDA branches: `torch.cuda.is_available()` is true, streams and events exist. cuda_names.py
makes the tensors. `listeners` are notified of everything that is not an operation of torch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from megatron_a2d.rehearsal.cuda_names import GPU, CudaNames


class Listener(Protocol):
    """Receiver of the simulated GPU's events."""

    def host_waits(self, how: str) -> None: ...

    def one_kernel(self) -> AbstractContextManager[None]: ...

    def count(self, result: Any) -> None: ...

    def resized(self, storage: torch.UntypedStorage) -> None: ...


listeners: list[Listener] = []


def host_waits(how: str) -> None:
    for listener in listeners:
        listener.host_waits(how)


def one_kernel(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs) as one kernel: only its results take memory."""
    with contextlib.ExitStack() as inside:
        for listener in listeners:
            inside.enter_context(listener.one_kernel())
        result = function(*args, **kwargs)
    with torch._C.DisableTorchFunction():
        for listener in listeners:
            listener.count(result)
    return result


class Stream:
    """Substitute for CUDA's streams and events."""

    cuda_stream = stream_id = 0
    device = GPU

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def record_event(self, *args: Any) -> Stream:
        return self

    def elapsed_time(self, *args: Any) -> float:
        return 0.0

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        host_waits("synchronize")

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = wait = record = _nothing


def install(name: str, capability: tuple[int, int]) -> None:
    """Simulate a GPU of this name and compute capability for the rest of the process.

    Call it before megatron.core is imported, which compiles functions at import.
    """
    assert not torch.cuda.is_available(), "a rehearsal would hide a real GPU"
    stream = Stream()
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=132, total_memory=80 << 30
    )
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 8, "current_device": 0,
        "get_device_name": name, "get_device_capability": capability, "is_bf16_supported": True,
        "is_current_stream_capturing": False, "get_device_properties": properties,
        "current_stream": stream, "default_stream": stream, "memory_allocated": 0, "max_memory_allocated": 0,
        "memory_reserved": 0, "max_memory_reserved": 0, "memory_stats": {}, "set_device": None, "empty_cache": None,
        "init": None, "_lazy_init": None, "ipc_collect": None, "reset_peak_memory_stats": None, "set_stream": None,
        "stream": contextlib.nullcontext(), "device": contextlib.nullcontext(),
    }  # fmt: skip
    for function, answer in answers.items():
        setattr(torch.cuda, function, lambda *args, answer=answer, **kwargs: answer)
    _replace(
        torch.cuda,
        Stream=Stream,
        Event=Stream,
        synchronize=lambda *args, **kwargs: host_waits("torch.cuda.synchronize"),
        default_generators=(torch.default_generator,) * 8,
    )
    for module in (torch.cuda, torch.cuda.random):
        _replace(
            module,
            manual_seed=torch.manual_seed,
            get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
            set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        )
    _replace(torch.cuda.nvtx, range_push=lambda *args: None, range_pop=lambda *args: None)
    _replace(torch.version, cuda="12.9")
    _replace(torch, compile=_as_one_kernel)
    _replace(torch.Tensor, record_stream=lambda tensor, stream: None, pin_memory=lambda tensor, *args, **kwargs: tensor)
    _replace(torch.UntypedStorage, resize_=_notifying(torch.UntypedStorage.resize_))
    # torch.autograd.backward is a function of torch, inside which modes like CudaNames are off.
    _replace(torch.autograd, _engine_run_backward=_with_names(torch.autograd._engine_run_backward))  # type: ignore[attr-defined]
    _replace(torch.distributed, all_gather_object=_all_gather_object)


def _replace(where: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(where, name, value)


def _as_one_kernel(function: Any = None, **_: Any) -> Any:
    """torch.compile: one kernel, whose intermediate values take no memory."""
    if function is None:
        return _as_one_kernel

    @functools.wraps(function)
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return one_kernel(function, *args, **kwargs)

    return kernel


def _notifying(resize: Callable[..., Any]) -> Callable[..., Any]:
    def resize_and_notify(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        for listener in listeners:
            listener.resized(storage)
        return result

    return resize_and_notify


def _with_names(run_backward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with CudaNames():
            return run_backward(*args, **kwargs)

    return run


def _all_gather_object(objects: list[Any], value: Any, *_: Any, **__: Any) -> None:
    """Every rank has what this one has."""
    objects[:] = [value] * len(objects)
