"""Trace of one rank's step: memory, collectives in order, and where the host waits for the GPU."""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup, Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_a2d.rehearsal import balanced_routing, cuda_names, dataless_gpu

c10d = torch.ops.c10d
_HERE = str(Path(__file__).parent)


class Event(NamedTuple):
    """A collective, a send or a receive; or, as the operation "wait", that later work waits for one of the latter."""

    operation: str
    group: str  # megatron.core's name
    ranks: tuple[int, ...]
    num_bytes: int  # of the whole tensor that is reduced, gathered, scattered or exchanged
    peer: int | None = None  # of a send or a receive
    handle: int = 0  # of a send or a receive, for its wait
    phase: str = ""

    @property
    def sent_bytes(self) -> float:
        """Bytes that leave this rank, in a ring where there is one."""
        n = len(self.ranks)
        share = {"all_reduce": 2 * (n - 1) / n, "send": 1.0, "recv": 0.0, "wait": 0.0, "broadcast": 1.0}
        return self.num_bytes * share.get(self.operation, (n - 1) / n)


class Wait(NamedTuple):
    """A line of code where the host waits for the GPU."""

    place: str  # file:line
    operation: str
    phase: str


class _Work(Work):
    """A communication that is complete at once; waiting for it is recorded."""

    def __init__(self, events: list[Event], event: Event | None):
        super().__init__()
        self._events, self._event = events, event

    def wait(self, *_: Any) -> bool:
        if self._event:
            self._events.append(self._event)
        return True

    def is_completed(self) -> bool:
        return True


# Operation -> its name, and the argument numbers of its tensors and of its group. The message is the larger one of
# inputs and outputs.
_COLLECTIVES: dict[Any, tuple[str, tuple[int, ...], int]] = {
    c10d.broadcast_.default: ("broadcast", (0,), 1),
    c10d.allreduce_.default: ("all_reduce", (0,), 1),
    c10d.allreduce_coalesced_.default: ("all_reduce", (0,), 1),
    c10d.reduce_.default: ("reduce", (0,), 1),
    c10d.allgather_.default: ("all_gather", (0,), 2),
    c10d._allgather_base_.default: ("all_gather", (0,), 2),
    c10d.allgather_into_tensor_coalesced_.default: ("all_gather", (0,), 2),
    c10d.allgather_coalesced_.default: ("all_gather", (0,), 2),
    c10d.reduce_scatter_.default: ("reduce_scatter", (1,), 2),
    c10d._reduce_scatter_base_.default: ("reduce_scatter", (1,), 2),
    c10d.reduce_scatter_tensor_coalesced_.default: ("reduce_scatter", (1,), 2),
    c10d.alltoall_base_.default: ("all_to_all", (0, 1), 2),
    c10d.alltoall_.default: ("all_to_all", (0, 1), 2),
    c10d.send.default: ("send", (0,), 1),
    c10d.recv_.default: ("recv", (0,), 1),
    c10d.barrier.default: ("barrier", (), 1),
}
# Those that return tensors as well as the work.
_RETURNS_TENSORS = {name for name in _COLLECTIVES if "Work)" in str(name._schema)}


class StepTrace(TorchDispatchMode):
    """Records every operation while it is active.

    `now` and `peak` are bytes of GPU tensors, without intermediate values of a kernel.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled; to keep the compiler away takes time in every operation

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.events: list[Event] = []
        self.waits: Counter[Wait] = Counter()
        self.phase = "build"
        self._inside_kernels = 0
        self._storages: dict[int, tuple[Any, int]] = {}
        self._handles = 0
        self._works: list[_Work] = []

    def __enter__(self) -> StepTrace:
        dataless_gpu.listeners.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        dataless_gpu.listeners.remove(self)
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # torch's own kernels see the meta device, without CudaNames
            return self._record(function, args, kwargs)

    def _record(self, function: Any, args: Any, kwargs: Any) -> Any:
        if kwargs and cuda_names.is_gpu(kwargs.get("device")):  # created by torch itself
            kwargs = {**kwargs, "device": cuda_names.META}
        if function in _COLLECTIVES:
            return self._communicate(function, args)
        if how := balanced_routing.why_host_waits(function, args, kwargs or {}):
            if not (kwargs or {}).get("non_blocking"):  # else it waits for the stream or event that follows
                self.host_waits(how)
            result = balanced_routing.answer(function, args, kwargs or {})
            self.count(result)
            return result
        result = function(*args, **(kwargs or {}))
        if not self._inside_kernels and _allocates(function):
            self.count(result)
        return result

    def count(self, result: Any) -> None:
        """Add the storages of new tensors on the GPU."""
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._storages:
                    size = storage.nbytes()
                    self._storages[key] = weakref.ref(storage, functools.partial(self._forget, key)), size
                    self._grow(size)

    def _grow(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, _: Any) -> None:
        known = self._storages.pop(key)
        self.now -= known[1]

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage was resized in place, as recomputation does."""
        if known := self._storages.get(storage._cdata):
            self._storages[storage._cdata] = known[0], storage.nbytes()
            self._grow(storage.nbytes() - known[1])

    @contextmanager
    def one_kernel(self) -> Iterator[None]:
        """Context whose operations are one kernel: intermediate tensors take no memory."""
        self._inside_kernels += 1
        try:
            yield
        finally:
            self._inside_kernels -= 1

    def host_waits(self, how: str) -> None:
        self.waits[Wait(_place(), how, self.phase)] += 1

    def _communicate(self, function: Any, args: Any) -> Any:
        operation, places, group_place = _COLLECTIVES[function]
        group = ProcessGroup.unbox(args[group_place])
        sizes = [sum(_bytes(tensor) for tensor in tree_leaves(args[place])) for place in places]
        peer = handle = None
        if operation in ("send", "recv"):
            self._handles += 1
            peer, handle = dist.get_global_rank(group, args[2]), self._handles
        ranks = tuple(dist.get_process_group_ranks(group))
        event = Event(operation, group.group_desc, ranks, max(sizes, default=0), peer, handle or 0, self.phase)
        self.events.append(event)
        balanced_routing.communicate(operation, args, len(ranks))
        work = _Work(self.events, event._replace(operation="wait") if handle else None)
        self._works.append(work)
        return (args[0], work.boxed()) if function in _RETURNS_TENSORS else work.boxed()


def _place() -> str:
    """file:line of the innermost frame outside of torch and this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and not name.startswith((_HERE, "<")):
            break
        frame = frame.f_back
    path = frame.f_code.co_filename
    for root in ("site-packages/", "megatron_a2d/"):
        if root in path:
            path = path[path.rindex(root) + (len(root) if root == "site-packages/" else 0) :]
            break
    return f"{path}:{frame.f_lineno}"


@functools.cache
def _allocates(function: Any) -> bool:
    """Whether an operation returns tensors that are not its arguments or views of them."""
    return any(value.alias_info is None for value in function._schema.returns)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
