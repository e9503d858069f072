"""Execution of generated programs with their tests, in a subprocess with limits. Needs --allow-code-execution.

The limits contain accidents: time, memory, file size, no output, no child processes (which the kernel still permits
root), an empty directory and environment; nothing that was started outlives the program, and there is no network
(sandbox.py). The number of files is not limited. This does not protect against malicious programs: use a container or a
separate machine for models that you do not trust.
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
from typing import Any

from megatron_a2d.evaluation import sandbox
from megatron_a2d.utils.errors import UserError

SECONDS = 10
MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20
# Set by evaluate in its own process only: --allow-code-execution and --allow-code-network.
SWITCH, NETWORK_SWITCH = "A2D_ALLOW_CODE_EXECUTION", "A2D_ALLOW_CODE_NETWORK"

_NAME = "A2D_PROGRAM"  # marks a program's processes
# unshare(2) flags, tried in order until one is permitted: PID and network namespaces; the same in a user namespace.
_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_NAMESPACES = (_NEW_PID | _NEW_NET, _NEW_USER | _NEW_PID | _NEW_NET)


def allow_programs(execution: bool, network: bool) -> None:
    """Set the permissions of programs in this process. UserError if they would have network access unasked."""
    os.environ[SWITCH], os.environ[NETWORK_SWITCH] = str(int(execution)), str(int(network))
    if network and not execution:
        raise UserError("--allow-code-network: has no effect without --allow-code-execution; add that or remove this")
    if execution and _is_networked(subprocess.run(_command(1), input=b"").returncode):
        raise UserError(
            "--allow-code-execution: this system permits no network namespace, so programs would have network access; "
            "run it in a container without network and give --allow-code-network"
        )


def passes(program: str, tests: str, seconds: int = SECONDS) -> bool:
    """True if program and tests complete without an error. RuntimeError if execution is not allowed."""
    if os.environ.get(SWITCH) != "1":
        raise RuntimeError("code execution is off; evaluate --allow-code-execution switches it on")
    # Programs may leave files that cannot be removed, and print endlessly: their output is discarded.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        # Written at the end, the mark tells a program that passed from one that exited early (sys.exit(0)).
        mark = os.urandom(16).hex()
        reader, writer = os.pipe()
        process = subprocess.Popen(
            _command(seconds), cwd=directory, env={"PATH": "/usr/bin:/bin", _NAME: mark[:8]}, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, pass_fds=(writer,),
        )  # fmt: skip
        os.close(writer)
        try:
            source = f"{program}\n{tests}\nimport os as _os; _os.write({writer}, {mark.encode()!r})\n"
            with suppress(subprocess.TimeoutExpired):  # the sandbox stops it earlier, unless killed
                process.communicate(source.encode(errors="replace"), timeout=seconds + 30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _kill_escaped(f"{_NAME}={mark[:8]}".encode())
            os.set_blocking(reader, False)
            output = b""
            with suppress(BlockingIOError):
                output = os.read(reader, 2 * len(mark))
            os.close(reader)
        if _is_networked(process.returncode):
            raise RuntimeError(
                "this system permits no network namespace; evaluate --allow-code-network runs without one"
            )
        return process.returncode == 0 and output == mark.encode()


def _command(seconds: int) -> list[str]:
    needs_no_network = int(os.environ.get(NETWORK_SWITCH) != "1")
    limits = (seconds, MEMORY_BYTES, FILE_BYTES, needs_no_network, *_NAMESPACES)
    return [sys.executable, "-I", "-S", str(sandbox.__file__), *map(str, limits)]


def _is_networked(exit_code: int) -> bool:
    return exit_code == sandbox.UNISOLATED


def _kill_escaped(variable: bytes) -> None:
    """Kill processes that survive if the program killed its sandbox process; they still have `variable` set."""
    for _ in range(100):  # one may start another meanwhile, but not forever
        found = False
        for path in Path("/proc").glob("[0-9]*/environ"):
            # Gone, or another user's.
            with suppress(OSError):
                if variable in path.read_bytes().split(b"\0"):
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    found = True
        if not found:
            return


def extract_program(text: str) -> str:
    """The code in a model's answer: a fenced block if there is one, else everything up to a closing mark."""
    fenced = re.search(r"```(?:python)?\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return (fenced[1] if fenced else re.split(r"\[DONE\]|\n```", text)[0]).strip("\r\n")


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """pass@1 of an answer to a task of MBPP's form, as lm-eval asks for it: whether its program passes the tests."""
    tests = doc["test_list"]
    lines = [doc.get("test_setup_code") or "", *(tests if isinstance(tests, list) else [tests])]
    return {"pass_at_1": float(passes(extract_program(results[0]), "\n".join(lines)))}
