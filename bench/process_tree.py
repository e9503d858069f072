"""Time and memory of commands with all their processes: of a side that is a command, and of one that is a worker.

CPU time is that of the command and of every descendant, whoever waits for it: a small process above the command
becomes the parent of orphans (prctl(2), PR_SET_CHILD_SUBREAPER), waits for all of them, and reads its children's
resource usage. Its own start is not in the times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from bench.paired import Side, Usage

# Time of the command by the clock, and CPU time of the tree, as JSON to the file descriptor argv[1].
_ABOVE = """
import ctypes, os, resource, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
begin = time.perf_counter()
code = subprocess.call(sys.argv[2:])
wall = time.perf_counter() - begin
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
used = resource.getrusage(resource.RUSAGE_CHILDREN)
os.write(int(sys.argv[1]), b"%.9f %.9f" % (wall, used.ru_utime + used.ru_stime))
sys.exit(code)
"""


def module(name: str, *arguments: object) -> list[str]:
    """The command line of a module of this project."""
    return [sys.executable, "-W", "ignore", "-m", name, *map(str, arguments)]


def run(
    words: Sequence[str], environment: Mapping[str, str] | None = None, code: int = 0, directory: Path | None = None
) -> Usage:
    """Run a command once, its output discarded; RuntimeError with its last lines for another exit code than `code`.

    `directory`: the checkout that it runs in, and whose packages it imports. Bytecode is cached, as users' is: without
    it the import of torch takes more than twice as long.
    """
    read, write = os.pipe()
    own = {"PYTHONPATH": str(directory)} if directory else {}
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile("w+") as log:
        finished = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _ABOVE, str(write), *words], stdout=log, stderr=log, cwd=directory,
            env={**inherited, **own, **(environment or {})}, pass_fds=[write],
        )  # fmt: skip
        os.close(write)
        with open(read) as result:
            measured = result.read().split()
        if finished.returncode != code:
            log.seek(0)
            raise RuntimeError(f"{' '.join(words)}: exit code {finished.returncode}: {log.read()[-2000:]}")
    return Usage(*map(float, measured))


def command(
    words: Sequence[str], environment: Mapping[str, str] | None = None, code: int = 0, directory: Path | None = None
) -> Side:
    """A side that runs a command."""
    return lambda: run(words, environment, code, directory)


def peak_memory(words: Sequence[str]) -> int:
    """Peak resident memory of a command and its processes together in bytes, sampled 20 times a second.

    Shared memory counts for each. The first process's own peak is exact (VmHWM, which only its very end can miss).
    """
    peak = 0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        while job.poll() is None:
            with suppress(psutil.NoSuchProcess, OSError, StopIteration):
                watched = psutil.Process(job.pid)
                held = sum(process.memory_info().rss for process in [watched, *watched.children(recursive=True)])
                status = Path(f"/proc/{job.pid}/status").read_text().splitlines()
                own = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
                peak = max(peak, held, own)
            time.sleep(0.05)
    if job.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {job.returncode}")
    return peak


class Worker:
    """A side in a separate process that lives as long as the comparison: `words` answer each line with a Usage.

    `directory` is the checkout whose packages it imports.
    """

    def __init__(self, words: Sequence[str], directory: Path):
        environment = {**os.environ, "PYTHONPATH": str(directory)}
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=directory, env=environment
        )
        self.ready = self._answer()  # what it says about itself

    def __call__(self) -> Usage:
        assert self._process.stdin
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return Usage(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"a worker ended with exit code {self._process.wait()}; its error is above")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
