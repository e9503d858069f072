"""Start many training runs quickly, and kill them: python and torch are loaded once, every rank is a fork of that.

    python -m tests.faults.zygote SETTINGS.json COMMANDS...     is started by test_kill.py, and speaks JSON lines

One line in, {"kill_after": seconds or null, "victims": [ranks]}; one line out, {"codes": [...], "seconds": ...}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

NUM_RANKS = 2
# A rank whose peer is dead must end by itself within this time.
PATIENCE = 60.0


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    warnings.filterwarnings("ignore")
    import torch

    import tests.parity.jobs  # noqa: F401  (everything that a rank needs, imported before the fork)

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(attempt(settings, **json.loads(line))), flush=True)


def attempt(settings: dict[str, Any], kill_after: float | None, victims: list[int]) -> dict[str, Any]:
    """One start of the run on all ranks; `victims` get SIGKILL after `kill_after` seconds."""
    with tempfile.TemporaryDirectory() as directory:
        begin = time.monotonic()
        ranks = [fork_rank(rank, str(Path(directory) / "store"), settings) for rank in range(NUM_RANKS)]
        if kill_after is not None:
            time.sleep(kill_after)
            for rank in victims:
                os.killpg(ranks[rank], signal.SIGKILL)
        killed = time.monotonic()
        codes = [wait(pid, killed + PATIENCE + 120 * (kill_after is None)) for pid in ranks]
        return {"codes": codes, "seconds": time.monotonic() - begin, "survivors_ended_after": time.monotonic() - killed}


def fork_rank(rank: int, store: str, settings: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    code = 1
    try:
        code = run_rank(rank, store, settings)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_rank(rank: int, store: str, settings: dict[str, Any]) -> int:
    """The training entry point's work on one rank; writes a fingerprint of the final weights."""
    import torch.distributed as dist

    from tests.parity import jobs

    sys.stdout = sys.stderr
    dist.init_process_group("gloo", store=dist.FileStore(store, NUM_RANKS), rank=rank, world_size=NUM_RANKS)
    result = jobs.run(settings)
    Path(settings["save"], f"final_{rank}.json").write_text(json.dumps(result))
    return int(result["exit_code"])


def wait(pid: int, deadline: float) -> int | None:
    """The exit code (negative: the signal), None if the process had to be put down at the deadline."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


if __name__ == "__main__":
    main()
