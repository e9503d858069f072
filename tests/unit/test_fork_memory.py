"""Memory of forked processes: copies for them, and what they do not get."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import sys
from collections.abc import Callable

import pytest
import torch

from megatron_a2d.checkpoint.fork_memory import MemoryFile, not_inherited

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="forks withhold memory on Linux only")
NUM = 1 << 21


def in_a_fork(function: Callable[[], int]) -> int:
    """The exit code of a forked process that returns the function's result; of one that is killed, minus the signal."""
    child = os.fork()
    if not child:
        faulthandler.disable()
        code = 99
        with contextlib.suppress(Exception):
            code = function()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def page_faults(function: Callable[[], object]) -> int:
    """Of this process while `function` runs, with a fork beside it that does nothing."""
    child = os.fork()
    if not child:
        signal.pause()
    try:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        function()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_copies_are_equal_and_stay_so() -> None:
    originals = [
        torch.arange(1000.0), torch.ones(3, 5, dtype=torch.bfloat16), torch.tensor(7), torch.empty(0, 4),
        torch.arange(12).view(3, 4).T, torch.tensor([True, False, True]),
    ]  # fmt: skip
    expected = [tensor.clone() for tensor in originals]
    memory = MemoryFile()
    memory.write([torch.ones(10_000)])  # which the next ones replace
    copies = memory.read(memory.write(originals))
    for tensor in originals:
        tensor.zero_()
    for copy, tensor in zip(copies, expected, strict=True):
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor)
    assert memory.read(memory.write([])) == []
    (nothing,) = memory.read(memory.write([torch.empty(0, 4)]))
    assert nothing.shape == (0, 4)
    memory.close()


@linux_only
def test_its_memory_is_freed() -> None:
    memory = MemoryFile()
    memory.write([torch.ones(NUM)])
    assert os.fstat(memory._file).st_blocks
    memory.clear()
    assert os.fstat(memory._file).st_blocks == 0
    memory.close()


def test_without_such_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    memory = MemoryFile()
    stored = memory.write([torch.full((5,), 3.0)])
    assert in_a_fork(lambda: int(memory.read(stored)[0].sum())) == 15
    memory.close()


@linux_only
def test_a_fork_gets_the_copy_alone() -> None:
    tensor = torch.full((NUM,), 3.0)
    whole, part = tensor[: NUM // 2], tensor[NUM // 2 :]
    memory = MemoryFile()
    stored = memory.write([tensor])
    with not_inherited([part, whole]):  # of one storage
        assert in_a_fork(lambda: int(memory.read(stored)[0][NUM // 2])) == 3
        assert in_a_fork(lambda: int(tensor[NUM // 2])) == -signal.SIGSEGV
    assert in_a_fork(lambda: int(tensor[NUM // 2])) == 3, "later forks get it"
    assert tensor.sum() == 3 * NUM


@linux_only
def test_what_a_fork_does_not_get_is_changed_without_page_faults() -> None:
    tensor = torch.ones(NUM)
    pages = tensor.nbytes // resource.getpagesize()
    with not_inherited([tensor]):
        apart = page_faults(lambda: tensor.add_(1))
    shared = page_faults(lambda: tensor.add_(1))
    assert apart < pages // 10 < pages * 9 // 10 < shared


def test_small_tensors_and_those_elsewhere_are_left_alone() -> None:
    small = torch.ones(4)
    with not_inherited([small, torch.empty(NUM, device="meta")]):
        assert in_a_fork(lambda: int(small.sum())) == 4
