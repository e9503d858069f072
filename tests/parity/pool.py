"""One pool of processes for every layout: starting Python with torch four times for each test would take minutes.

A job names a function of one of _JOBS and a number of ranks. Each job gets a process group of its own; ranks
that it does not need stay idle. A job that fails or hangs takes the pool down with it, and the next one starts anew.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing

# The modules of the jobs; a server imports them once, and every process is forked from it.
_JOBS = tuple(
    f"tests.parity.{name}"
    for name in ("parity_jobs", "balancing_jobs", "inference_jobs", "run_job", "memory_job", "muon_job")
)
TIMEOUT = 180.0  # seconds for a job, the start of the processes included
# megatron's DistributedDataParallel is never freed (its autograd hooks hold it), nor are its groups' threads, which wake
# a hundred times a second: after a number of jobs the processes are restarted, which takes a second.
MAX_JOBS = 3


class Pool:
    """`run` is the only thing to call."""

    def __init__(self, size: int):
        self._size = size
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._num_jobs = 0

    def run(self, job: str, num_ranks: int, **kwargs: Any) -> list[Any]:
        """Call the function `job`(**kwargs) on `num_ranks` ranks; returns their results in order."""
        if self._num_jobs >= MAX_JOBS:
            self.close()
        if not self._processes:
            self._start()
        self._num_jobs += 1
        with tempfile.TemporaryDirectory() as directory:
            store = str(Path(directory) / "store")
            for pipe in self._pipes[:num_ranks]:
                pipe.send((job, num_ranks, store, kwargs))
            results = []
            for rank, pipe in enumerate(self._pipes[:num_ranks]):
                if not pipe.poll(TIMEOUT):
                    self.close()
                    raise TimeoutError(f"job {job} on rank {rank} of {num_ranks}: no answer in {TIMEOUT:.0f} s")
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    self.close()
                    raise RuntimeError(f"job {job}: rank {rank} of {num_ranks} died") from None
                if not ok:
                    others = [self._answer(other) for other in range(rank + 1, num_ranks)]
                    self.close()
                    raise RuntimeError("\n".join([f"job {job} on rank {rank} of {num_ranks}:\n{value}", *others]))
                results.append(value)
        return results

    def _answer(self, rank: int) -> str:
        """What another rank says of a failure; the cause may be there."""
        try:
            ok, value = self._pipes[rank].recv() if self._pipes[rank].poll(10) else (False, "no answer")
        except EOFError:
            ok, value = False, "died"
        return f"rank {rank}: {'well' if ok else value}"

    def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it leads a group: what it started goes with it
            process.kill()
            process.join()
        self._processes, self._pipes, self._num_jobs = [], [], 0

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_JOBS))
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            # Not daemonic: dist_checkpointing starts processes of its own.
            process = context.Process(target=_serve, args=(rank, theirs))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _end_groups() -> None:
    """Leave the process groups, and let their threads end: each wakes a hundred times a second."""
    from megatron.core.distributed import DistributedDataParallel

    from megatron_a2d.distributed import process_groups

    for item in gc.get_objects():
        if isinstance(item, DistributedDataParallel):
            item.grad_accs.clear()  # a cycle through autograd's hooks, which nothing else breaks
    process_groups.finalize()
    gc.collect()


def _find(modules: list[Any], job: str) -> Any:
    return next(getattr(module, job) for module in modules if hasattr(module, job))


def _serve(rank: int, pipe: Any) -> None:
    os.setsid()
    os.environ["OMP_NUM_THREADS"] = "1"
    import warnings

    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    modules = [importlib.import_module(name) for name in _JOBS]
    while True:
        # megatron collects garbage twice a save: half a second each over torch's objects, and a copy of them all. What
        # an earlier job has left is passed over too.
        gc.freeze()
        try:
            job, num_ranks, store, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group("gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
            result = (True, _find(modules, job)(**kwargs))
            dist.barrier()
            _end_groups()
        except BaseException:
            result = (False, traceback.format_exc())
        pipe.send(result)
        if not result[0]:
            return
