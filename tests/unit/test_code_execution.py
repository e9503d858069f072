"""Programs in model answers: judged, limited, isolated from processes, network and environment, and run only when allowed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_a2d import evaluate
from megatron_a2d.evaluation import code_execution, sandbox
from megatron_a2d.utils.errors import UserError


@pytest.fixture
def allowed(monkeypatch):
    monkeypatch.setenv(code_execution.SWITCH, "1")
    monkeypatch.setenv(code_execution.NETWORK_SWITCH, "1")  # the tests run where no namespaces are granted, too


def test_programs_are_judged(allowed):
    assert code_execution.passes("def f(x):\n    return x + 1", "assert f(1) == 2")
    assert not code_execution.passes("def f(x):\n    return x", "assert f(1) == 2")
    assert not code_execution.passes("def f(x:", "assert f(1) == 2")
    assert not code_execution.passes("import sys; sys.exit(0)", "assert False"), "an early end is no success"
    assert not code_execution.passes("raise SystemExit", "")


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "x = bytearray(2 << 30)",
        "open('big', 'wb').write(bytes(2 << 20))",
        "import os, time\nif os.fork() == 0: time.sleep(60)\ntime.sleep(60)",
        "while True: print('x' * 10**6)",
    ],
)
def test_programs_have_limits(program, allowed):
    begin = time.monotonic()
    assert not code_execution.passes(program, "pass", seconds=1)
    assert time.monotonic() - begin < 50  # its own end would come after 60 s, or never
    assert not Path("big").exists()


# Any flag that unshare does not know is refused, as on a system that grants no namespaces.
NO_NAMESPACES = (1,)

# The words of a process that has left session, parent and environment behind; no other process has them.
ORPHAN = "import time; time.sleep(61.7)"

# The pipe is closed by the execve, until when the process that stays waits.
LEAVE = f"""import os, sys
reading, writing = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execve({sys.executable!r}, ["python", "-I", "-S", "-c", {ORPHAN!r}], {{}})
    os._exit(0)
os.close(writing)
os.read(reading, 1)
"""


def orphans() -> list[Path]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # gone, or of another user
            if ORPHAN.encode() in path.read_bytes().split(b"\0"):
                found.append(path)
    return found


@pytest.mark.parametrize("namespaces", [code_execution._NAMESPACES, NO_NAMESPACES], ids=["namespaces", "none"])
@pytest.mark.parametrize("end", ["pass", "while True: pass"])
def test_programs_leave_no_process(namespaces, end, allowed, monkeypatch):
    """Nor one in a separate session without its environment; where the kernel allows no namespaces, the program fails."""
    monkeypatch.setattr(code_execution, "_NAMESPACES", namespaces)
    started = code_execution.passes(LEAVE, end, seconds=2)
    assert started or end != "pass" or os.getuid() != 0
    assert not orphans()


def test_an_orphan_would_be_seen():
    """The control of the test above."""
    process = subprocess.Popen([sys.executable, "-c", LEAVE], start_new_session=True)
    process.wait()
    found = orphans()
    for path in found:
        os.kill(int(path.parent.name), signal.SIGKILL)
    assert found


def can_cut_network() -> bool:
    return subprocess.run(code_execution._command(1), input=b"").returncode != sandbox.UNISOLATED


def test_programs_have_no_network(allowed, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        monkeypatch.setattr(code_execution, "_NAMESPACES", NO_NAMESPACES)
        assert code_execution.passes(connect, "pass")  # the control: it would have one
        monkeypatch.undo()
        monkeypatch.setenv(code_execution.SWITCH, "1")
        monkeypatch.delenv(code_execution.NETWORK_SWITCH, raising=False)
        if not can_cut_network():
            pytest.skip("this system permits no network namespace")
        assert code_execution.passes("", "pass") and not code_execution.passes(connect, "pass")


def test_a_network_is_refused_unless_it_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(code_execution, "_NAMESPACES", NO_NAMESPACES)
    monkeypatch.setattr(evaluate, "load_model", lambda *a: pytest.fail("the model was loaded"))
    monkeypatch.setattr(evaluate, "check_model", lambda *a: None)  # there is no directory m
    monkeypatch.setattr(evaluate, "own_objective", lambda directory: "mdlm")
    monkeypatch.setattr(evaluate, "_open_tasks", lambda options: None)
    monkeypatch.setenv(code_execution.SWITCH, "0")  # what evaluate sets is undone after the test
    monkeypatch.setenv(code_execution.NETWORK_SWITCH, "1")  # an environment is no consent either
    common = ["--model", "m", "--out", str(tmp_path), "--tasks", "a"]
    with pytest.raises(UserError, match=r"permits no network namespace.*--allow-code-network"):
        evaluate.main([*common, "--allow-code-execution"])
    with pytest.raises(RuntimeError, match="permits no network namespace"):
        code_execution.passes("", "")
    with pytest.raises(pytest.fail.Exception):
        evaluate.main([*common, "--allow-code-execution", "--allow-code-network"])
    with pytest.raises(UserError, match="--allow-code-network: has no effect"):
        evaluate.main([*common, "--allow-code-network"])


def test_programs_see_no_environment(allowed, monkeypatch):
    monkeypatch.setenv("A_SECRET", "1")
    assert code_execution.passes("import os", "assert 'A_SECRET' not in os.environ and os.listdir('.') == []")


def test_programs_are_not_run_by_default(monkeypatch):
    monkeypatch.delenv(code_execution.SWITCH, raising=False)
    with pytest.raises(RuntimeError, match="code execution is off"):
        code_execution.passes("", "")


def test_programs_in_answers():
    assert code_execution.extract_program("Sure:\n```python\nx = 1\n```\nDone") == "x = 1"
    assert code_execution.extract_program("\nx = 1\n[DONE] more") == "x = 1"
    assert code_execution.extract_program("    indented") == "    indented"
