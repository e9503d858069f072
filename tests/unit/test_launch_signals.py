"""Signals to launch/torchrun.py while it waits for a node that never comes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("node", "number"), [(0, signal.SIGUSR1), (1, signal.SIGTERM)])
def test_a_signal_ends_the_wait_for_another_node(node: int, number: signal.Signals) -> None:
    """On the first node, which listens for the other one, and on the second, whose first node accepts and is silent."""
    with socket.create_server(("127.0.0.1", 0)) as first_node:
        port = first_node.getsockname()[1]
        if node == 0:
            first_node.close()  # the launcher itself listens on this port
        command = [
            sys.executable, "-m", "launch.torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node),
            "--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "never_started",
        ]  # fmt: skip
        environment = {**os.environ, "NNODES": "2", "NODE_RANK": str(node)}
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            if node == 0:
                wait_for_listener(port)
            else:
                first_node.settimeout(300)
                _connection, _ = first_node.accept()  # kept open, without an answer
            launcher.send_signal(number)
            _, said = launcher.communicate(timeout=60)
        finally:
            launcher.kill()
            launcher.wait()
    assert launcher.returncode == -number, said
    assert "Traceback" not in said


def wait_for_listener(port: int) -> None:
    """Without a connection that stays open: the launcher would count it as the other node."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(f"nothing listens on port {port}")
