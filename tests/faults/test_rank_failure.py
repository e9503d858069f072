"""The ranks that outlive another end soon, and say which one it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from megatron_a2d.utils.exit_codes import PEER_LOST
from tests.exactness import Exactness, Fault

ROOT = Path(__file__).resolve().parents[2]
SIZE, VICTIM = 3, 1
PATIENCE = 12.0  # seconds; a rank that a busy machine holds up for so long would be named too

PROGRAM = """
import os, signal, sys, time
import torch, torch.distributed as dist
from megatron_a2d.utils.errors import UserError
from megatron_a2d.distributed.rank_failure import PeerMonitor

fault, patience = sys.argv[1], float(sys.argv[2])
dist.init_process_group("gloo")
with PeerMonitor(patience):
    for step in range(30):
        time.sleep(0.02)
        if dist.get_rank() == 1 and step == 10:
            if fault == "raises":
                raise ValueError("no such thing")
            if fault == "has bad input":
                raise UserError("--x: is bad; change it")
            if fault != "nothing":
                os.kill(os.getpid(), {"dies": signal.SIGKILL, "hangs": signal.SIGSTOP}[fault])
        dist.all_reduce(torch.zeros(1))
dist.destroy_process_group()
"""


def start(fault: str, patience: float = PATIENCE) -> tuple[list[int | None], list[str], float]:
    """Exit codes, what each rank said, and the seconds until the last one that can end had ended."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(SIZE),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, fault, str(patience)]
    begin = time.monotonic()
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(SIZE)
    ]
    said = [""] * SIZE
    for rank, process in enumerate(ranks):
        if fault != "hangs" or rank != VICTIM:
            try:
                said[rank] = process.communicate(timeout=600)[1]
            except subprocess.TimeoutExpired:
                for other in ranks:
                    other.kill()
                raise
    seconds = time.monotonic() - begin
    codes = [process.poll() for process in ranks]
    if fault == "hangs":
        ranks[VICTIM].send_signal(signal.SIGKILL)
        ranks[VICTIM].communicate()
    return codes, said, seconds


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("dies", "no heartbeat"),
        pytest.param("hangs", "no heartbeat", marks=pytest.mark.full),
        pytest.param("raises", "failed with ValueError", marks=pytest.mark.full),
        pytest.param("has bad input", "ended: --x: is bad", marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_a_lost_rank_is_named(fault: str, word: str, exactness: Exactness) -> None:
    codes, said, seconds = start(fault)
    for rank in set(range(SIZE)) - {VICTIM}:
        assert codes[rank] == PEER_LOST, said[rank]
        (line,) = [line for line in said[rank].splitlines() if line.startswith("error: ")]
        assert f"rank {VICTIM} (" in line and word in line and f"(rank {rank} exits)" in line
        assert not any(f"rank {other} (" in line for other in range(SIZE) if other != VICTIM), "an innocent is named"
    if fault == "raises":
        assert "ValueError: no such thing" in said[VICTIM] and codes[VICTIM] == 1
    exactness.faults.append(
        Fault(f"one of three ranks {fault}", 1, "-", f"both others named it and ended; {seconds:.0f} s with start-up")
    )


def test_nobody_is_named_without_a_fault() -> None:
    codes, said, _ = start("nothing", patience=300.0)
    assert codes == [0] * SIZE and not any("error: " in text for text in said), said
