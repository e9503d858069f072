"""Sandbox script that runs one generated program and kills all that it started; code_execution.py executes it.

    python -I -S sandbox.py SECONDS MEMORY_BYTES FILE_BYTES NEEDS_NO_NETWORK FLAGS ... < PROGRAM

If the system permits it, the program runs in separate namespaces: without network, and under a PID 1 whose exit kills
all its processes. Otherwise this process is the subreaper of orphans, and kills them. The exit code is 0 if the
program's is 0, and UNISOLATED if it was not run because it would have had network access.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

UNISOLATED = 77
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main() -> int:
    seconds, memory, file_size, needs_no_network, *flags = map(int, sys.argv[1:])
    source = sys.stdin.buffer.read()
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # in case the evaluation is killed
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    is_isolated = any(libc.unshare(wanted) == 0 for wanted in flags)
    if needs_no_network and not is_isolated:
        return UNISOLATED
    child = os.fork()
    if child == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # PID 1 of a namespace ignores signals and must reap orphans, so the program runs in its child.
        if is_isolated and (program := os.fork()):
            while (ended := os.wait())[0] != program:
                pass
            os._exit(0 if ended[1] == 0 else 1)
        for kind, value in (
            (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, file_size),
            (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 0),
        ):  # fmt: skip
            resource.setrlimit(kind, (value, value))
        exec(compile(source, "program", "exec"), {"__name__": "__main__"})
        sys.exit(0)
    try:
        return 0 if _status(child, time.monotonic() + seconds + 1) == 0 else 1
    finally:
        _kill_all()


def _status(child: int, deadline: float) -> int | None:
    """The wait status of `child`; None if it has not exited by `deadline`."""
    while time.monotonic() < deadline:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == child:
            return status
        if not ended:
            time.sleep(0.005)
    return None


def _kill_all() -> None:
    """Kill the children of this process until it has none; their orphans become its children."""
    while True:
        for child in _children():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # exited meanwhile
            # pid (name) state ppid ...; the name may hold anything
            if int(path.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                yield int(path.parent.name)


if __name__ == "__main__":
    sys.exit(main())
