"""Hang detection: one heartbeat file per rank, and a watchdog that names the hung ranks.

A rank that hangs in a read, a lock or a driver is alive to distributed/rank_failure.py, and its peers wait for it
inside a collective. The training loop therefore records its progress (`mark`), and a thread writes the last mark into
$A2D_ATTEMPT/heartbeat/rank_N every few seconds, with the innermost stack frames of the main thread. `Watchdog` reads
all of these files (launch/torchrun.py, on the first node). Of the hung ranks, those that do not wait for a peer are the
cause, and among them those that are furthest behind.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

from megatron_a2d.utils.printable import print_line

ATTEMPT = "A2D_ATTEMPT"  # variable with the directory of this attempt of the run, on a file system that all nodes share
HEARTBEATS, PROGRESS = "heartbeat", "progress"
# Limit while a checkpoint is read or written, in seconds.
CHECKPOINTS = 2 * 3600.0
LONGEST_PAUSE = 10.0  # seconds between two heartbeats

# Source paths of the frames in which a rank waits for a peer.
_WAITING = ("torch/distributed/", "megatron/core/distributed/", "megatron/core/pipeline_parallel/", "tensor_parallel/")


class _Mark(NamedTuple):
    iteration: int
    place: int  # increases within an iteration
    doing: str
    limit: float  # seconds within which the next mark must come
    time: float


_last = _Mark(0, 0, "starting", CHECKPOINTS, time.monotonic())


def mark(doing: str, iteration: int | None = None, limit: float | None = None) -> None:
    """Record that the main thread has reached `doing`; a given iteration or limit also applies to later marks."""
    global _last
    iteration = _last.iteration if iteration is None else iteration
    place = _last.place + 1 if iteration == _last.iteration else 0
    _last = _Mark(iteration, place, doing, _last.limit if limit is None else limit, time.monotonic())


def note_progress(iteration: int) -> None:
    """Record that this attempt has written a checkpoint, so that the job may be requeued."""
    if directory := os.environ.get(ATTEMPT):
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            (Path(directory) / PROGRESS).write_text(f"{iteration}\n")
        except OSError as error:
            print_line(f"warning: {directory}: {error.strerror}: cannot record progress", sys.stderr)


@dataclass(frozen=True)
class Beat:
    """Contents of a rank's heartbeat file."""

    rank: int
    host: str
    pid: int
    number: int
    iteration: int
    place: int
    doing: str
    still: float  # seconds since the last mark
    limit: float
    where: str  # "file:line function" of the main thread, innermost first
    waits: bool  # whether `where` is a collective or another wait for a peer

    def __str__(self) -> str:
        who = f"rank {self.rank} ({self.host}, pid {self.pid})"
        return f"{who} in iteration {self.iteration}, {self.doing}, {self.where}"


class Heartbeat:
    """Writes this rank's heartbeat file: `with Heartbeat(rank): train()`. Does nothing without $A2D_ATTEMPT."""

    def __init__(self, rank: int):
        directory = os.environ.get(ATTEMPT)
        self._path = Path(directory, HEARTBEATS, f"rank_{rank:05d}") if directory else None
        self._rank, self._number = rank, 0
        self._main = threading.get_ident()
        self._leaving = threading.Event()

    def __enter__(self) -> Heartbeat:
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._path:
            self._leaving.set()
            self._thread.join()
            self._path.unlink(missing_ok=True)  # a rank that has finished is not hung

    def _run(self) -> None:
        written = -LONGEST_PAUSE
        while not self._leaving.wait(min(0.5, pause(_last.limit))):  # a mark may shorten the limit
            if time.monotonic() - written < pause(_last.limit):
                continue
            written = time.monotonic()
            try:
                self._write()
            except OSError as error:
                print_line(f"warning: {self._path}: {error.strerror}: cannot write the heartbeat", sys.stderr)

    def _write(self) -> None:
        assert self._path is not None
        self._number += 1
        where, waits = _where(sys._current_frames().get(self._main))
        last = _last
        still = time.monotonic() - last.time
        beat = Beat(
            self._rank, socket.gethostname(), os.getpid(), self._number, last.iteration, last.place, last.doing,
            still, last.limit, where, waits,
        )  # fmt: skip
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(beat)))
        os.replace(partial, self._path)


def pause(limit: float) -> float:
    """Seconds between two heartbeats, or between two checks of them."""
    return min(LONGEST_PAUSE, limit / 10)


class Watchdog:
    """Periodic check of all heartbeats in a directory."""

    def __init__(self, attempt: str | Path):
        self._directory = Path(attempt) / HEARTBEATS
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> number of its last heartbeat, when first seen
        self.pause = LONGEST_PAUSE

    def look(self) -> str | None:
        """None if no rank hangs, otherwise a line that names the ranks that do."""
        now = time.monotonic()
        beats = list(read_beats(self._directory))
        silent: dict[int, float] = {}
        for beat in beats:
            if self._seen.get(beat.rank, (0, 0.0))[0] != beat.number:
                self._seen[beat.rank] = beat.number, now
            silent[beat.rank] = now - self._seen[beat.rank][1]
        self.pause = min([pause(beat.limit) for beat in beats], default=LONGEST_PAUSE)
        return judge(beats, silent)


def read_beats(directory: Path) -> Iterable[Beat]:
    """Heartbeats of all ranks that have started and not finished."""
    for path in sorted(directory.glob("rank_?????")):
        try:
            yield Beat(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue  # the rank has finished, or the file is incomplete


def judge(beats: list[Beat], silent: dict[int, float]) -> str | None:
    """A line that names the hung ranks, or None. `silent`: rank -> seconds since its file last changed."""
    late = [beat for beat in beats if max(beat.still, silent[beat.rank] - LONGEST_PAUSE) > beat.limit]
    if not late:
        return None
    frozen = [beat for beat in beats if silent[beat.rank] > beat.limit]
    suspects = frozen or [beat for beat in late if not beat.waits] or beats
    behind = min((beat.iteration, beat.place) for beat in suspects)
    culprits = [beat for beat in suspects if (beat.iteration, beat.place) == behind]
    named = "; ".join(map(str, culprits[:4])) + (f"; and {len(culprits) - 4} more" if len(culprits) > 4 else "")
    others = len(beats) - len(culprits)
    waiting = f", and {others} other{'s' if others > 1 else ''} waiting" if others else ""
    return f"hung for {late[0].limit:.0f} s: {named}{waiting}"


def _where(frame: FrameType | None) -> tuple[str, bool]:
    """The three innermost frames of a stack, and whether the innermost one waits for a peer."""
    places: list[str] = []
    waits = frame is not None and any(part in frame.f_code.co_filename for part in _WAITING)
    while frame is not None and len(places) < 3:
        places.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return "at " + " < ".join(places), waits
