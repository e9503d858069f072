"""Processes in which Transformer Engine's layers compute on a CPU.

One process imports torch, megatron.core and Transformer Engine over the stand-in, once; every rank of every job is forked
from it, and ends with its job.
"""

from __future__ import annotations

import gc
import os
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing

from tests.parity.pool import TIMEOUT


class EnginePool:
    """`run` as that of tests/parity/pool.py, for the jobs of engine_jobs.py."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}  # of the stand-in's kernels, by rank 0 of the last job
        self._process: Any = None

    def run(self, job: str, num_ranks: int, **kwargs: Any) -> list[Any]:
        """Call the function `job`(**kwargs) on `num_ranks` ranks; returns their results in order."""
        if self._process is None or not self._process.is_alive():
            self._start()
        self._pipe.send((job, num_ranks, kwargs))
        if not self._pipe.poll(2 * TIMEOUT):
            self.close()
            raise TimeoutError(f"job {job}: the process of Transformer Engine does not answer")
        answers = self._pipe.recv()
        failed = [f"job {job}, rank {rank} of {num_ranks}:\n{value}" for rank, (ok, value) in answers.items() if not ok]
        if failed:
            raise RuntimeError("\n".join(failed))
        results = [value for _, value in answers.values()]
        self.calls = results[0].pop("calls")
        return results

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()


def _serve(pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import warnings

    import torch

    from tests.transformer_engine.pretend_gpu import install

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    install()
    from tests.transformer_engine import engine_jobs

    gc.freeze()
    while True:
        try:
            job, num_ranks, kwargs = pipe.recv()
        except EOFError:
            return
        pipe.send(_run(getattr(engine_jobs, job), num_ranks, kwargs))


def _run(job: Any, num_ranks: int, kwargs: dict[str, Any]) -> dict[int, tuple[bool, Any]]:
    """What each rank answered: (True, result) or (False, why)."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as directory:
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            store = str(Path(directory, "store"))
            process = context.Process(target=_rank, args=(theirs, rank, num_ranks, store, job, kwargs))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        answers = {}
        for rank, pipe in enumerate(pipes):
            # After a failure the others wait for one that has ended: whatever they know, they say soon.
            patience = TIMEOUT if all(ok for ok, _ in answers.values()) else 5
            try:
                answers[rank] = pipe.recv() if pipe.poll(patience) else (False, f"no answer in {patience:.0f} s")
            except EOFError:
                answers[rank] = (False, "died")
        for process in processes:
            process.kill()
            process.join()
    return answers


def _rank(pipe: Any, rank: int, num_ranks: int, store: str, job: Any, kwargs: dict[str, Any]) -> None:
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
        result = (True, job(**kwargs))
        dist.barrier()
    except BaseException:
        result = (False, traceback.format_exc())
    pipe.send(result)
    os._exit(0)
