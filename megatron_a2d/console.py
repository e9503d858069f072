"""What a person sees in the terminal: progress, and the end of a command that was given bad input."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from megatron_a2d.errors import SaveError, UserError
from megatron_a2d.exit_codes import INTERRUPTED, USER_ERROR

console = Console(stderr=True, highlight=False)


def entry_point(main: Callable[[], None]) -> None:
    """Run a command: a `UserError` becomes lines on stderr and exit code 2, a `SaveError` one and 74; no traceback."""
    # SIGTERM unwinds as an exception does, so that nothing half-written stays behind (training has its own handler).
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.stderr.flush()
        code = USER_ERROR
    except SaveError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.stderr.flush()
        code = SaveError.EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.strerror}: make room, and run the same command again", file=sys.stderr)
        code = SaveError.EXIT_CODE
    else:
        return
    sys.exit(code)


def human(number: float, unit: str = "") -> str:
    """1_234_567 -> '1.23M'; with a unit, '1.23 MB'."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{' ' if unit else ''}{prefix}{unit}"
    return f"{number:.3g}{' ' if unit else ''}{unit}"


class _Rate(ProgressColumn):
    """Amount done, and the speed, in the task's unit."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        speed = task.finished_speed or task.speed or 0.0
        return Text(f"{human(task.completed, unit)}  {human(speed, unit)}/s", style="cyan")


@contextmanager
def progress(description: str, total: float, unit: str, done: int = 0) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr with speed and ETA; yields `advance(amount)`. `done` is what an earlier run did.

    Where stderr is no terminal only the closing line is printed.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        _Rate(), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, completed=done, unit=unit)
        yield lambda amount: bar.advance(task, amount)
