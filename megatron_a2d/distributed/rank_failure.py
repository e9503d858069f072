"""Detection of dead ranks: heartbeats in the process group's store, so that the remaining ranks name it and exit.

Without them a dead process is a connection error on some ranks and endless waiting on others. Every rank sets its
beat each second and watches the next rank's. Where a beat stands still, all others are looked at once, and the verdict
goes into the store, where every rank reads it within a second, prints it and ends, even in the middle of a collective.
A rank that fails by itself leaves its own verdict. One write and two reads a second and rank: the store does not mind.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from types import TracebackType

import torch.distributed as dist

from megatron_a2d.utils.errors import SaveError, UserError
from megatron_a2d.utils.exit_codes import PEER_LOST
from megatron_a2d.utils.printable import print_line

BEAT = 1.0  # seconds
# A beat that stands still so long is a dead rank, once a connection broke somewhere. Before, patience is --distributed-
# timeout-minutes: a machine may be slow.
SUSPICION = 3.0 * BEAT
JUDGEMENT = 4  # beats over which the judge sees a rank stand still
# A broken connection waits so long for a verdict, which ends the process; without one it is this rank's own failure.
ANSWER = 25.0 * BEAT

# A rank that ends with an error for the user leaves it; where all have the same one, all have left by then.
COMPANY = 10.0 * BEAT

# What a broken connection or a collective without an answer calls itself, in gloo and NCCL.
_CONNECTION = re.compile(r"connect|timed out|time-?out|broken pipe|gloo|nccl", re.IGNORECASE)

_VERDICT, _SUSPECT, _ENDED = "a2d/verdict", "a2d/suspect", "a2d/ended"


class PeerMonitor:
    """Detection of lost ranks while the block runs: `with PeerMonitor(patience): train()`. `patience` in seconds.

    When a rank is lost the process prints one line that names it and ends with PEER_LOST.
    """

    def __init__(self, patience: float):
        self._patience = patience
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._next = (self._rank + 1) % self._size
        self._leaving = threading.Event()

    def __enter__(self) -> PeerMonitor:
        if self._size > 1:
            # Connections of their own: a collective may wait inside the other one.
            self._store = _own_connection()
            self._store.set(f"a2d/who/{self._rank}", f"rank {self._rank} ({socket.gethostname()}, pid {os.getpid()})")
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._size == 1:
            return
        if isinstance(error, UserError | SaveError):
            store = _own_connection()
            store.set(_ENDED, f"{_who(store, self._rank)} ended: {error}")
        elif error is not None and not isinstance(error, SystemExit | KeyboardInterrupt):
            self._failed(error)
            return
        self._leave()

    def _leave(self) -> None:
        self._leaving.set()
        self._thread.join()

    def _failed(self, error: BaseException) -> None:
        """An error of this rank, or what the death of another looks like from here: the watchers know which."""
        store = _own_connection()
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _CONNECTION.search(str(error))):
            store.set(_SUSPECT, "1")
            time.sleep(ANSWER)  # a verdict ends the process before this does
        self._leave()  # before its own verdict ends it, without a traceback
        reason = " ".join(str(error).split())[:200]
        _give_verdict(
            store, f"{_who(store, self._rank)} failed with {type(error).__name__}: {reason}; see its traceback"
        )

    def _watch(self) -> None:
        store, number, seen = self._store, 0, b""
        moved = alone = time.monotonic()
        try:
            while not self._leaving.wait(BEAT):
                number += 1
                store.set(f"a2d/beat/{self._rank}", str(number))
                if store.check([_VERDICT]):
                    self._end(store.get(_VERDICT).decode())
                if not store.check([_ENDED]):
                    alone = time.monotonic()
                elif time.monotonic() - alone > COMPANY:
                    self._end(store.get(_ENDED).decode())
                beat = _beat(store, self._next)
                if beat != seen:
                    seen, moved = beat, time.monotonic()
                still = time.monotonic() - moved
                if still > (SUSPICION if store.check([_SUSPECT]) else self._patience):
                    self._judge(store)
                    moved = time.monotonic()
            store.set(f"a2d/left/{self._rank}", "1")
        except (dist.DistError, RuntimeError) as error:
            if not self._leaving.is_set():
                self._end(f"the store of the process group is gone, and with it rank 0's node ({error})")

    def _judge(self, store: dist.Store) -> None:
        """Name every rank whose beat stands still."""
        before = [_beat(store, rank) for rank in range(self._size)]
        number = 10**9
        for _ in range(JUDGEMENT):  # others may be judging too, and must see this rank alive
            number += 1
            store.set(f"a2d/beat/{self._rank}", str(number))
            time.sleep(BEAT)
        lost = [
            _who(store, rank)
            for rank in range(self._size)
            if _beat(store, rank) == before[rank] and rank != self._rank and not store.check([f"a2d/left/{rank}"])
        ]
        if lost:
            remedy = "start the same command again, it goes on from the newest checkpoint"
            _give_verdict(store, f"{', '.join(lost)} gave no sign of life; {remedy}")

    def _end(self, verdict: str) -> None:
        print_line(f"error: {verdict} (rank {self._rank} ends with it)", sys.stderr)  # one piece: all ranks do it
        sys.stderr.flush()
        os._exit(PEER_LOST)


def _own_connection() -> dist.Store:
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def _beat(store: dist.Store, rank: int) -> bytes:
    key = f"a2d/beat/{rank}"
    return store.get(key) if store.check([key]) else b""


def _who(store: dist.Store, rank: int) -> str:
    key = f"a2d/who/{rank}"
    return store.get(key).decode() if store.check([key]) else f"rank {rank}"


def _give_verdict(store: dist.Store, text: str) -> None:
    """The first one counts."""
    if not store.check([_VERDICT]):
        store.set(_VERDICT, text)
