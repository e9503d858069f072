"""Exit codes of a run's processes, and which of them a job is requeued for.

torchrun replaces every exit code by 1; `python -m launch.torchrun` keeps the workers' codes and looks them up here.
launch/train.sbatch requeues a job only if the code is marked `is_requeued` and the attempt wrote a checkpoint.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import NamedTuple

DONE, FAILED, USER_ERROR, SIGNALLED, NOT_FINITE, PEER_LOST, STALLED, SAVE_FAILED, INTERRUPTED = (
    0, 1, 2, 3, 4, 5, 6, 74, 130,
)  # fmt: skip
KILLED = 128  # plus the signal number, as shells report it
TERMINATED = KILLED + signal.SIGTERM


class Ending(NamedTuple):
    """The meaning of an exit code. `is_requeued`: running the same command again can help."""

    code: int
    meaning: str
    is_requeued: bool
    why: str


# By precedence: if several processes of a node end together, the first of these is the cause of the others.
ENDINGS = (
    Ending(USER_ERROR, "invalid input: flags, files, or a node that failed preflight", False,
           "it would fail again"),
    Ending(SAVE_FAILED, "a checkpoint could not be written", False, "the disk would still be full"),
    Ending(NOT_FINITE, "too many consecutive steps with a non-finite gradient", False,
           "the same samples would be repeated"),
    Ending(INTERRUPTED, "interrupted from the keyboard", False, "it was intended"),
    Ending(SIGNALLED, "SIGUSR1 or SIGTERM: saved after the current step", True, "the next attempt resumes"),
    Ending(STALLED, "a rank hung for --distributed-timeout-minutes; the log names it", True,
           "another attempt may succeed"),
    Ending(FAILED, "an error with a traceback", True, "on GPUs often a hardware fault; a bug would prevent progress"),
    Ending(KILLED, "128 + N: a process was killed by signal N (out of memory, driver fault)", True,
           "another attempt may succeed"),
    Ending(PEER_LOST, "another process died or failed; the log names it", True, "the next attempt resumes"),
    Ending(TERMINATED, "killed by SIGTERM, which torchrun sends to the other processes of a node", True,
           "the next attempt resumes"),
    Ending(DONE, "the run is complete, or stopped by --exit-interval or --exit-duration-in-mins", False,
           "nothing is left to do"),
)  # fmt: skip


def ending(code: int) -> Ending:
    """The table's entry for the exit code of a process or a shell; negative codes are signals, as in Python."""
    code = KILLED - code if code < 0 else code
    known = {row.code: row for row in ENDINGS}
    if code in known:
        return known[code]
    if code > KILLED:
        return known[KILLED]._replace(code=code, meaning=f"killed by {_name(code - KILLED)}")
    return known[FAILED]._replace(code=code, meaning=f"exit code {code}")


def most_telling(codes: Iterable[int]) -> Ending:
    """The probable cause among processes that ended together."""
    precedence = {row.code: index for index, row in enumerate(ENDINGS)}

    def rank(row: Ending) -> int:
        return precedence.get(row.code, precedence[KILLED if row.code > KILLED else FAILED])

    return min((ending(code) for code in codes), key=rank)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def as_markdown() -> str:
    """The table for docs/cluster.md."""
    rows = sorted(ENDINGS, key=lambda row: row.code)
    lines = ["| exit code | meaning | requeued after progress | reason |", "| --- | --- | --- | --- |"]
    for row in rows:
        code = f"{KILLED} + N" if row.code == KILLED else str(row.code)
        meaning = row.meaning.removeprefix(f"{code}: ")
        lines.append(f"| {code} | {meaning} | {'yes' if row.is_requeued else 'no'} | {row.why} |")
    return "\n".join(lines)
