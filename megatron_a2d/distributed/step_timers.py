"""Step timers: the phases of a training step, marked in the code and measured while profiling.

    with phase("data"): ...                                     a block of code
    both_ways("head", function, hidden, ...)                    a part of the model, forward and backward

A nested phase is not counted in the enclosing one. megatron.core's own phases come from its schedules, which report
to `config.timers`. Each phase is also a scope of the same name in torch's profiler, within one called step.

Without profiling, `phase` returns a shared no-op context, `config.timers` is None, and no tensor has a hook. On a GPU
the times are measured by events on the step's stream, so nothing is synchronised; work on other streams is visible
only in the trace.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from megatron_a2d.megatron_compat.device import has_cuda

PHASES = ("data", "forward", "head", "backward", "all-to-all", "pipeline", "grad_sync", "optimizer", "other")

# Phases by the names of megatron.core's timers. Those that wait for another stage's tensors end in -recv or -send.
_TIMERS = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "all-grads-sync": "grad_sync",
    "non-tensor-parallel-grads-all-reduce": "grad_sync",
    "embedding-grads-all-reduce": "grad_sync",
}

_OFF: AbstractContextManager[None] = nullcontext()
_recorder: Recorder | None = None


def phase(name: str) -> AbstractContextManager[None]:
    """Context manager whose body is the phase `name` of PHASES."""
    return _OFF if _recorder is None else _recorder.span(name)


def both_ways(name: str, function: Callable[..., Any], tensor: torch.Tensor, *arguments: Any) -> Any:
    """function(tensor, *arguments) as phase `name`, including its backward pass from the (first) result to `tensor`."""
    recorder = _recorder
    if recorder is None:
        return function(tensor, *arguments)
    with recorder.span(name):
        result = function(tensor, *arguments)
    first = result[0] if isinstance(result, tuple) else result
    if tensor.requires_grad and first.requires_grad:
        first.register_hook(lambda gradient: recorder.enter(name))
        tensor.register_hook(lambda gradient: recorder.leave(name))
    return result


class Recorder:
    """Timer of the phases of all steps that run inside `measuring`."""

    def __init__(self, configs: list[Any]):
        """`configs`: megatron.core's configurations of this rank's model chunks."""
        self._configs = configs
        self._scopes: list[tuple[str, Any]] = []
        self._changes: list[tuple[Any, str | None]] = []  # (time or event, the phase that begins there)
        self._stream: Any = None  # the step's stream; not the default one if kernels are captured

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Context manager around one step."""
        global _recorder
        assert _recorder is None
        self._stream = torch.cuda.current_stream() if has_cuda() else None
        _recorder, exchange = self, dist.all_to_all_single

        def all_to_all(*arguments: Any, **options: Any) -> Any:
            with self.span("all-to-all"):
                return exchange(*arguments, **options)

        dist.all_to_all_single = all_to_all
        for config in self._configs:
            config.timers = self._timer
        self.enter("other")
        try:
            yield
        finally:
            self.leave("other")
            _recorder, dist.all_to_all_single = None, exchange
            for config in self._configs:
                config.timers = None

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave(name)

    def enter(self, name: str) -> None:
        assert name in PHASES, name
        scope = record_function("step" if name == "other" else name)  # in the trace it spans the others
        scope.__enter__()
        self._scopes.append((name, scope))
        self._changes.append((_now(self._stream), name))

    def leave(self, name: str) -> None:
        """End this phase, and any unfinished phases within it."""
        while True:
            inner, scope = self._scopes.pop()
            scope.__exit__(None, None, None)
            if inner == name:
                break
        self._changes.append((_now(self._stream), self._scopes[-1][0] if self._scopes else None))

    def milliseconds(self) -> dict[str, float]:
        """Time of all measured steps by phase; on a GPU it synchronises with the last of them."""
        if has_cuda():
            torch.cuda.synchronize()
        total = dict.fromkeys(PHASES, 0.0)
        for (begin, name), (end, _) in zip(self._changes, self._changes[1:], strict=False):
            if name is not None:
                total[name] += _milliseconds(begin, end)
        return total

    def _timer(self, name: str, log_level: int | None = None) -> _Timer:
        """Stands in for megatron.core's Timers."""
        is_waiting = name.endswith(("-recv", "-send"))
        return _Timer(self, "pipeline" if is_waiting else _TIMERS.get(name))


class _Timer:
    """Stands in for one of megatron.core's timers."""

    def __init__(self, recorder: Recorder, name: str | None):
        self._recorder, self._name = recorder, name

    def start(self, barrier: bool = False) -> None:
        if self._name:
            self._recorder.enter(self._name)

    def stop(self, barrier: bool = False) -> None:
        if self._name:
            self._recorder.leave(self._name)


def _now(stream: Any) -> Any:
    if stream is None:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def _milliseconds(begin: Any, end: Any) -> float:
    return begin.elapsed_time(end) if has_cuda() else 1000 * (end - begin)
