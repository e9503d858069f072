"""How a run's processes end, and what that means for a job that can be started again: the one table of both.

torchrun makes a 1 of every exit code; `python -m launch.torchrun` keeps the workers' own and looks them up here.
launch/train.sbatch starts a job again only where `comes_back` says so, and only if the attempt wrote a checkpoint.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import NamedTuple

DONE, FAILED, USER_ERROR, SIGNALLED, NOT_FINITE, PEER_LOST, STALLED, SAVE_FAILED, INTERRUPTED = (
    0, 1, 2, 3, 4, 5, 6, 74, 130,
)  # fmt: skip
KILLED = 128  # and the signal's number, as a shell says it


class Ending(NamedTuple):
    """What an exit code means. `comes_back`: starting the same command again can help."""

    code: int
    meaning: str
    comes_back: bool
    why: str


# The most telling first: where several processes of a machine end at once, that is the reason of the others.
ENDINGS = (
    Ending(USER_ERROR, "something given to it is wrong: flags, files, a node that preflight names", False,
           "it would be wrong again"),
    Ending(SAVE_FAILED, "a checkpoint could not be written", False, "a full disk does not empty itself"),
    Ending(NOT_FINITE, "too many steps in a row had a gradient that is not finite", False,
           "the same samples would come again"),
    Ending(INTERRUPTED, "interrupted from the keyboard", False, "somebody wanted that"),
    Ending(SIGNALLED, "SIGUSR1 or SIGTERM: it saved after the running step", True, "the next attempt goes on"),
    Ending(STALLED, "a rank stood still for --distributed-timeout-minutes, and was named", True,
           "another attempt may pass"),
    Ending(FAILED, "an error with a traceback", True, "on GPUs often the hardware; progress tells it from a defect"),
    Ending(KILLED, "128 + N: a process died by signal N (out of memory, a fault of the driver)", True,
           "another attempt may pass"),
    Ending(PEER_LOST, "another process died or failed, and was named", True, "the next attempt goes on"),
    Ending(DONE, "the run is complete, or --exit-interval or --exit-duration-in-mins ended it", False,
           "nothing is left to do"),
)  # fmt: skip


def ending(code: int) -> Ending:
    """The table's row for an exit code of a process or a shell; negative codes are signals, as Python has them."""
    code = KILLED - code if code < 0 else code
    known = {row.code: row for row in ENDINGS}
    if code in known:
        return known[code]
    if code > KILLED:
        return known[KILLED]._replace(code=code, meaning=f"died by {_name(code - KILLED)}")
    return known[FAILED]._replace(code=code, meaning=f"exit code {code}")


def most_telling(codes: Iterable[int]) -> Ending:
    """Of processes that ended together, the one that the others probably ended for."""
    order = {row.code: place for place, row in enumerate(ENDINGS)}

    def place(row: Ending) -> int:
        return order.get(row.code, order[KILLED if row.code > KILLED else FAILED])

    return min((ending(code) for code in codes), key=place)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def as_markdown() -> str:
    """The table for docs/cluster.md."""
    rows = sorted(ENDINGS, key=lambda row: row.code)
    lines = ["| exit code | what happened | started again after progress | because |", "| --- | --- | --- | --- |"]
    for row in rows:
        code = f"{KILLED} + N" if row.code == KILLED else str(row.code)
        meaning = row.meaning.removeprefix(f"{code}: ")
        lines.append(f"| {code} | {meaning} | {'yes' if row.comes_back else 'no'} | {row.why} |")
    return "\n".join(lines)
