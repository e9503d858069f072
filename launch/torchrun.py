"""torchrun with the exit code of its workers, signals forwarded to them, and hang detection.

    python -m launch.torchrun TORCHRUN-ARGUMENTS...         # as launch/train.sh does

torchrun itself turns every failure into exit code 1, kills workers 30 seconds after a SIGTERM, dies of a SIGUSR1, and
waits for a rank that hangs. Here both signals reach the workers, which save and exit (before there are workers, either
signal ends the launcher); the first node watches all ranks' heartbeats; and the first node to exit with a code other
than 0 writes the reason to $A2D_ATTEMPT/outcome, one line: exit code, "again" or "stay" (requeue or not;
megatron_a2d/utils/exit_codes.py), and a message.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from megatron_a2d.distributed.hang_watchdog import ATTEMPT, Watchdog
from megatron_a2d.utils.exit_codes import DONE, KILLED, STALLED, Ending, ending, most_telling
from megatron_a2d.utils.printable import one_line, print_line

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
OUTCOME = "outcome"


def main() -> NoReturn:
    logging.disable(logging.ERROR)  # torchrun's own report of an exit code; the workers have logged the reason
    # The signals on which torchrun still stops its workers; it also reads each of its options from PET_...
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGINT,SIGHUP,SIGQUIT")
    with contextlib.ExitStack() as stack:
        reason = _run(sys.argv[1:], before_workers=lambda: _prepare(stack))
        if reason.code != DONE:
            _tell(reason, f"{reason.meaning} on {socket.gethostname()}")
    sys.exit(reason.code)


def _run(arguments: list[str], before_workers: Callable[[], None]) -> Ending:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    start = PContext.start

    def start_workers(context: PContext) -> None:
        before_workers()
        start(context)

    PContext.start = start_workers  # type: ignore[assignment, method-assign]
    try:
        run.main(arguments)
    except ChildFailedError as error:
        return most_telling(failure.exitcode for failure in error.failures.values())
    except SignalException as error:
        return ending(KILLED + error.sigval)
    return ending(DONE)


def _prepare(stack: contextlib.ExitStack) -> None:
    """Just before the workers are started, in the main thread.

    Until then the signals have their default action, which ends the process at once. A handler of Python's would not
    run while the rendezvous waits, in native code, for the other nodes. From here on one runs either before a fork,
    when it ends the process, or after it, when it finds the worker.
    """
    for number in FORWARDED:
        signal.signal(number, _forward)
    stack.enter_context(_attempt())
    if os.environ.get("NODE_RANK", "0") == "0" and ATTEMPT in os.environ:
        threading.Thread(target=_watch, daemon=True).start()


@contextlib.contextmanager
def _attempt() -> Iterator[None]:
    """A temporary directory for the heartbeats of a single-node run that has no $A2D_ATTEMPT."""
    if ATTEMPT in os.environ or os.environ.get("NNODES", "1") != "1":
        yield
        return
    with tempfile.TemporaryDirectory(prefix="a2d_attempt_") as directory:
        os.environ[ATTEMPT] = directory
        yield


def _workers() -> list[psutil.Process]:
    return psutil.Process().children()


def _forward(number: int, frame: FrameType | None) -> None:
    workers = _workers()
    if not workers:  # none has been started yet
        sys.exit(KILLED + number)
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(number)


def _watch() -> None:
    """Kill this node's workers when the run hangs; the other nodes then notice that this one is gone."""
    watchdog = Watchdog(os.environ[ATTEMPT])
    while True:
        threading.Event().wait(watchdog.pause)
        if verdict := watchdog.look():
            print_line(f"error: {verdict}", sys.stderr)
            _tell(ending(STALLED), verdict)
            for worker in _workers():
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
            os._exit(STALLED)


def _tell(reason: Ending, words: str) -> None:
    """Write the reason for the parent process; only the first one counts, the others are its consequences."""
    if directory := os.environ.get(ATTEMPT):
        try:
            with open(Path(directory) / OUTCOME, "x") as file:
                file.write(f"{reason.code} {'again' if reason.is_requeued else 'stay'} {one_line(words)}\n")
        except FileExistsError:
            return
    if reason.code > KILLED:
        print_line(f"error: a worker {words}", sys.stderr)


if __name__ == "__main__":
    main()
