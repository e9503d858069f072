"""Console, progress bars, log filters for libraries, and the entry point that turns user errors into exit codes."""

from __future__ import annotations

import atexit
import errno
import gc
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from megatron_a2d.utils.errors import SaveError, UserError
from megatron_a2d.utils.exit_codes import INTERRUPTED, USER_ERROR
from megatron_a2d.utils.printable import lines_of, one_line, print_line


class PlainConsole(Console):
    """A console that prints strings as one line of data: `[/x]` and `:smile:` are not interpreted, and control
    characters are escaped."""

    def __init__(self, **kwargs: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **kwargs)

    def render_str(self, text: str, **kwargs: Any) -> Text:
        return super().render_str(one_line(text), **kwargs)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=lines_of(segment.text))


console = PlainConsole(stderr=True)

# Errors that a path given by the user can cause, unlike a failing file system (EIO, ESTALE).
_WRONG_PATH = {
    errno.EACCES, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENODEV, errno.ENOENT,
    errno.ENOTDIR, errno.ENOTEMPTY, errno.ENXIO, errno.EPERM, errno.EROFS,
}  # fmt: skip


PYTHONS_GC_THRESHOLD = gc.get_threshold()
_GC_THRESHOLD = 200_000  # objects


def entry_point(main: Callable[[], None]) -> None:
    """Run a command; errors that the user can fix become lines on stderr and an exit code (utils/exit_codes.py)."""
    # Imports make half a million objects, and Python would look for garbage among them again and again, and once more
    # at the end: a third of a short command's CPU time. (Training collects as usual: manual_gc.py.)
    gc.set_threshold(_GC_THRESHOLD)
    atexit.register(gc.freeze)
    # SIGTERM unwinds like an exception, so that no partial files are left (training has its own handler).
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the terminal cannot encode are no error
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        for problem in error.problems:
            print_line(f"error: {problem}", sys.stderr)
        code = USER_ERROR
    except SaveError as error:
        print_line(f"error: {error}", sys.stderr)
        code = SaveError.EXIT_CODE
    except KeyboardInterrupt:
        print_line("interrupted", sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        code = _exit_code_of(error)
    else:
        return
    sys.exit(code)


def _exit_code_of(error: OSError) -> int:
    """Report an unusable path or a full disk and return its exit code; other errors are raised again."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        print_line(f"error: {error.strerror}: free some space and run the same command again", sys.stderr)
        return SaveError.EXIT_CODE
    if error.errno in _WRONG_PATH and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        print_line(f"error: {name}: {error.strerror}; check the path and its permissions", sys.stderr)
        return USER_ERROR
    raise error


def human(number: float, unit: str = "") -> str:
    """1_234_567 -> '1.23M', billions with B as models and corpora are counted; with a unit, '1.23 MB', '1.23 GB'."""
    for factor, prefix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{' ' if unit else ''}{prefix}{unit}"
    return f"{number:.3g}{' ' if unit else ''}{unit}"


class _Rate(ProgressColumn):
    """Amount done and speed, in the task's unit."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        speed = task.finished_speed or task.speed or 0.0
        return Text(f"{human(task.completed, unit)}  {human(speed, unit)}/s", style="cyan")


@contextmanager
def progress(description: str, total: float, unit: str, done: int = 0) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr with speed and ETA; yields `advance(amount)`. `done` is the amount of an earlier run.

    `total` may be an upper bound: the bar ends at 100% with the amount that was done. If stderr is not a terminal, only
    that final line is printed.
    """
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        _Rate(), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(one_line(description), total=total, completed=done, unit=unit)
        yield lambda amount: bar.advance(task, amount)
        bar.update(task, total=bar.tasks[0].completed or total)


# These warn about every missing GPU library, and about each other's deprecated functions.
LIBRARIES = ("megatron", "torch", "transformer_engine", "apex")


def hide_noise(*loggers: str) -> None:
    """Suppress everything below errors from LIBRARIES (warnings and logs) and from `loggers`.

    Call it before the libraries are imported, and after setting the environment variables that torch reads.
    """
    for package in LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")
    import torch as torch  # its import sets the levels of its loggers

    for name in (*LIBRARIES, *loggers):
        logging.getLogger(name).setLevel(logging.ERROR)
