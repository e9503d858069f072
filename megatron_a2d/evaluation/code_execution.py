"""Run a model's program with its tests in a subprocess under limits. Off unless --allow-code-execution was given.

The limits keep accidents small: time, memory, file size, no output, no further processes (which the kernel grants to
root all the same: they are killed at the end), an empty directory and environment. The network, and the number of
files, have none. They are no sandbox against a program that wants to do harm: use a container or a machine of its own
for models that you do not trust.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

SECONDS = 10
MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20
SWITCH = "A2D_ALLOW_CODE_EXECUTION"  # set by evaluate --allow-code-execution for its own process alone

_NAME = "A2D_PROGRAM"  # marks a program's processes

# The child limits itself before it reads the program.
_CHILD = """
import resource, sys
seconds, memory, file = map(int, sys.argv[1:])
for kind, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, file),
                    (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 0)):
    resource.setrlimit(kind, (value, value))
exec(compile(sys.stdin.read(), "program", "exec"), {"__name__": "__main__"})
"""


def passes(program: str, tests: str, seconds: int = SECONDS) -> bool:
    """True when program and tests run to their end without an error. RuntimeError when execution is not allowed."""
    if os.environ.get(SWITCH) != "1":
        raise RuntimeError("code execution is off; evaluate --allow-code-execution switches it on")
    # Programs may leave what cannot be removed, and print without end: their output goes nowhere.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        # The mark at the end tells a program that ended early (sys.exit(0)) from one that passed.
        mark = os.urandom(16).hex()
        reader, writer = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD, str(seconds), str(MEMORY_BYTES), str(FILE_BYTES)],
            cwd=directory, env={"PATH": "/usr/bin:/bin", _NAME: mark[:8]}, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, pass_fds=(writer,),
        )  # fmt: skip
        os.close(writer)
        try:
            source = f"{program}\n{tests}\nimport os as _os; _os.write({writer}, {mark.encode()!r})\n"
            with suppress(subprocess.TimeoutExpired):
                process.communicate(source.encode(errors="replace"), timeout=seconds + 1)
        finally:
            # Whatever it started goes with it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _kill_escaped(f"{_NAME}={mark[:8]}".encode())
            os.set_blocking(reader, False)
            output = b""
            with suppress(BlockingIOError):
                output = os.read(reader, 2 * len(mark))
            os.close(reader)
        return process.returncode == 0 and output == mark.encode()


def _kill_escaped(variable: bytes) -> None:
    """Kill the processes that have left the program's session; they still have its environment."""
    for _ in range(100):  # one of them may start another meanwhile, but not for ever
        found = False
        for path in Path("/proc").glob("[0-9]*/environ"):
            # Gone, or another user's: not ours to kill.
            with suppress(OSError):
                if variable in path.read_bytes().split(b"\0"):
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    found = True
        if not found:
            return


def extract_program(text: str) -> str:
    """The code in a model's answer: a fenced block if there is one, else all of it up to a closing mark."""
    fenced = re.search(r"```(?:python)?\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return (fenced[1] if fenced else re.split(r"\[DONE\]|\n```", text)[0]).strip("\r\n")


def pass_at_1(references: list[str], predictions: list[str]) -> float:
    """A metric for the harness: the tests of `references` on the program in `predictions`."""
    prediction = predictions[0] if isinstance(predictions[0], str) else predictions[0][0]
    return float(passes(extract_program(prediction), references[0]))
