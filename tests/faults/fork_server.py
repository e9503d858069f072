"""Start many training runs quickly, and kill them: python and torch are loaded once, every rank is a fork of that.

    python -m tests.faults.fork_server SETTINGS.json COMMANDS...     is started by test_kill.py, and speaks JSON lines

One line in, {"victims": [ranks], "after": seconds or null, "point": name or null, "pass_by": times}; one line out,
{"codes": [...], "seconds": ..., "survivors_ended_after": ..., "said": [each rank's last error line]}.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

NUM_RANKS = 2
# A rank whose peer is dead must end by itself within this time.
PATIENCE = 60.0
# Where a rank kills itself, as (module, object or None, function): when that is called for the nth time.
POINTS: dict[str, tuple[str, str | None, str]] = {
    "while it loads the checkpoint": ("megatron_a2d.training.initialization", None, "load_checkpoint"),
    "in the middle of a step": ("megatron_a2d.training.train_step", None, "_loss"),
    "between backward and update": ("megatron_a2d.training.train_step", None, "update_parameters"),
    "while chunks are written": ("megatron_a2d.checkpoint.save", "CollectiveSave", "finish_writing"),
    "while they are written in the background": ("megatron_a2d.training.train_loop", None, "train_step"),
    "before the manifest is written": ("megatron_a2d.checkpoint.save", None, "write_manifest"),
    "between rename and tracker": ("megatron_a2d.checkpoint.save", None, "new_file"),
    "while an old checkpoint is removed": ("megatron_a2d.training.checkpointing", None, "remove_old"),
}
# There the victim's chunks take ten seconds more to write: their process must end with it, or its peers wait for that.
SLOW_WRITER = "while they are written in the background"
# The first rank alone does these.
OF_FIRST_RANK = {
    "before the manifest is written",
    "between rename and tracker",
    "while an old checkpoint is removed",
}


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    warnings.filterwarnings("ignore")
    import torch

    import tests.parity.run_job  # noqa: F401  (everything that a rank needs, imported before the fork)

    torch.set_num_threads(1)
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(attempt(settings, **json.loads(line))), flush=True)


def attempt(
    settings: dict[str, Any], victims: list[int], after: float | None, point: str | None, pass_by: int
) -> dict[str, Any]:
    """One start of the run on all ranks; `victims` are killed by SIGKILL, after a number of seconds or at a kill point."""
    from torch.distributed import TCPStore

    with tempfile.TemporaryDirectory() as directory:
        begin = time.monotonic()
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's agent holds it too
        errors = [Path(directory) / str(rank) for rank in range(NUM_RANKS)]
        ranks = [
            fork_rank(rank, store.port, settings, errors[rank], (point, pass_by) if rank in victims and point else None)
            for rank in range(NUM_RANKS)
        ]
        if after is not None:
            time.sleep(after)
            for rank in victims:
                os.kill(
                    ranks[rank], signal.SIGKILL
                )  # not what it has started: the kernel's memory killer does not either
        codes, first_end = wait(ranks, time.monotonic() + PATIENCE + 120 * (after is None))
        return {
            "codes": codes,
            "seconds": time.monotonic() - begin,
            "survivors_ended_after": time.monotonic() - first_end,
            "said": [last_error(path) for path in errors],
        }


def fork_rank(rank: int, port: int, settings: dict[str, Any], errors: Path, kill: tuple[str, int] | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    code = 1
    try:
        os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
        if kill:
            kill_at(*kill)
        code = run_rank(rank, port, settings)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def kill_at(point: str, pass_by: int) -> None:
    """Let this process kill itself when it comes to `point`, after it has come there `pass_by` times."""
    if point == SLOW_WRITER:
        from megatron_a2d.checkpoint import async_writer

        write = async_writer._write
        async_writer._write = lambda *arguments: (time.sleep(10), write(*arguments))[1]
    module_name, owner_name, function_name = POINTS[point]
    owner: Any = sys.modules[module_name]
    owner = getattr(owner, owner_name) if owner_name else owner
    original: Callable[..., Any] = getattr(owner, function_name)
    calls = 0

    def wrapper(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > pass_by:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, function_name, wrapper)


def run_rank(rank: int, port: int, settings: dict[str, Any]) -> int:
    """The training entry point's work on one rank; writes a fingerprint of the final weights."""
    import torch.distributed as dist

    from megatron_a2d.distributed import rank_failure
    from tests.parity import run_job

    rank_failure.BEAT, rank_failure.SUSPICION = (
        0.25,
        0.75,
    )  # two ranks: no third rank can be slow (test_rank_failure.py has the real ones)
    sys.stdout = sys.stderr
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    timeout = timedelta(seconds=PATIENCE / 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS, timeout=timeout)
    with rank_failure.PeerMonitor(PATIENCE):
        result = run_job.run(settings)
    Path(settings["save"], f"final_{rank}.json").write_text(json.dumps(result))
    return int(result["exit_code"])


def wait(ranks: list[int], deadline: float) -> tuple[list[int | None], float]:
    """Exit codes (negative: the signal; None: had to be put down at the deadline), and when the first rank ended."""
    codes: dict[int, int | None] = {}
    first_end = None
    while len(codes) < len(ranks):
        for pid in set(ranks) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                first_end = first_end or time.monotonic()
            elif time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = None
        time.sleep(0.02)
    return [codes[pid] for pid in ranks], first_end or time.monotonic()


def last_error(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    return lines[-1] if lines else ""


if __name__ == "__main__":
    main()
