"""Detection of dead ranks: heartbeats in the process group's store, so that the remaining ranks name it and exit.

Otherwise a dead process shows as a connection error on some ranks and a hang on others. Every rank updates its
heartbeat each second and watches the next rank's. When one stops, all ranks are checked once, and the verdict
is written to the store, where every rank reads it within a second, prints it and exits, even inside a collective.
A rank that fails by itself writes its own verdict. The store's load is one write and two reads per second and rank.
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
# Seconds without a heartbeat after which a rank is dead, once a connection has failed somewhere. Otherwise the limit is
# --distributed-timeout-minutes: a machine may be slow.
SUSPICION = 3.0 * BEAT
JUDGEMENT = 4  # heartbeats for which a rank must stop to be judged dead
# Seconds to wait for a verdict after a connection error; the verdict ends the process. Without one, the failure is this
# rank's own.
ANSWER = 25.0 * BEAT

# Seconds to wait after a rank exited with a user error; if all ranks have the same error, all have exited by then.
COMPANY = 10.0 * BEAT

# Messages of a broken connection or a timed-out collective, in gloo and NCCL.
_CONNECTION = re.compile(r"connect|timed out|time-?out|broken pipe|gloo|nccl", re.IGNORECASE)

_VERDICT, _SUSPECT, _ENDED = "a2d/verdict", "a2d/suspect", "a2d/ended"


class PeerMonitor:
    """Context manager that detects dead ranks: `with PeerMonitor(patience): train()`. `patience` in seconds.

    When a rank is dead, the process prints one line that names it and exits with PEER_LOST.
    """

    def __init__(self, patience: float):
        self._patience = patience
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._next = (self._rank + 1) % self._size
        self._leaving = threading.Event()

    def __enter__(self) -> PeerMonitor:
        if self._size > 1:
            # A separate connection: the main one may be blocked by a collective.
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
        """Handle an error of this rank, which may be caused by another rank's death; the watchers know which."""
        store = _own_connection()
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _CONNECTION.search(str(error))):
            store.set(_SUSPECT, "1")
            time.sleep(ANSWER)  # a verdict ends the process during this
        self._leave()  # otherwise its own verdict would end it, without a traceback
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
        """Write a verdict that names every rank without a heartbeat."""
        before = [_beat(store, rank) for rank in range(self._size)]
        number = 10**9
        for _ in range(JUDGEMENT):  # other ranks may be checking too, and must see this one alive
            number += 1
            store.set(f"a2d/beat/{self._rank}", str(number))
            time.sleep(BEAT)
        lost = [
            _who(store, rank)
            for rank in range(self._size)
            if _beat(store, rank) == before[rank] and rank != self._rank and not store.check([f"a2d/left/{rank}"])
        ]
        if lost:
            remedy = "run the same command again, it resumes from the newest checkpoint"
            _give_verdict(store, f"{', '.join(lost)}: no heartbeat; {remedy}")

    def _end(self, verdict: str) -> None:
        print_line(f"error: {verdict} (rank {self._rank} exits)", sys.stderr)  # one write: all ranks print it
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
    """Write a verdict to the store; only the first one counts."""
    if not store.check([_VERDICT]):
        store.set(_VERDICT, text)
