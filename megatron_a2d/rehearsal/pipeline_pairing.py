"""Simulation of the sends and receives of one rank per pipeline stage: finds mismatches and deadlocks.

A send or receive is posted when its rank reaches it and completes when the peer has posted its counterpart; between two
ranks of a group they are matched in the order of posting, as in NCCL. A rank continues until it waits for an incomplete
one, or reaches a collective with ranks of other stages, which all of them must reach.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from megatron_a2d.rehearsal.step_trace import Event

_COUNTERPART = {"send": "recv", "recv": "send"}


class Pairing(NamedTuple):
    """Result of the simulation."""

    num_pairs: int
    num_bytes: int  # of all sends
    problems: list[str]  # empty: all pair up, and every rank completes its step


def pair(steps: Mapping[int, Sequence[Event]]) -> Pairing:
    """The events of one step by rank; those with other ranks, or within a stage, are ignored."""
    return _Run(steps).finish()


class _Channel:
    """Sends and receives that two ranks of a group posted for one another."""

    def __init__(self) -> None:
        self.posted: dict[int, list[Event]] = defaultdict(list)
        self._numbers: dict[tuple[int, int], int] = {}

    def post(self, rank: int, event: Event) -> None:
        self._numbers[rank, event.handle] = len(self.posted[rank])
        self.posted[rank].append(event)

    def is_over(self, rank: int, wait: Event) -> bool:
        """Whether the peer has posted the counterpart of what `rank` waits for."""
        assert wait.peer is not None
        return len(self.posted[wait.peer]) > self._numbers[rank, wait.handle]


class _Run:
    def __init__(self, steps: Mapping[int, Sequence[Event]]):
        self._steps = {rank: [event for event in step if _crosses(event, steps)] for rank, step in steps.items()}
        self._next = dict.fromkeys(steps, 0)
        # By the ranks of the group, the lower and the higher of the two.
        self._channels: dict[tuple[tuple[int, ...], int, int], _Channel] = defaultdict(_Channel)
        # By rank and group: event numbers of its collectives.
        self._collectives: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
        for rank, step in self._steps.items():
            for place, event in enumerate(step):
                if event.peer is None:
                    self._collectives[rank, event.ranks].append(place)
        self._problems: list[str] = []

    def finish(self) -> Pairing:
        while any([self._advance(rank) for rank in self._steps]):
            pass
        self._compare()
        if not self._problems:
            self._problems += [
                f"rank {rank} hangs at event {place + 1} of {len(self._steps[rank])}: {_text(self._steps[rank][place])}"
                for rank, place in self._next.items()
                if place < len(self._steps[rank])
            ]
        posted = [event for channel in self._channels.values() for own in channel.posted.values() for event in own]
        sends = [event for event in posted if event.operation == "send"]
        return Pairing(len(sends), sum(event.num_bytes for event in sends), self._problems)

    def _advance(self, rank: int) -> bool:
        """Advance a rank as far as possible; returns whether it advanced."""
        start, step = self._next[rank], self._steps[rank]
        while self._next[rank] < len(step) and self._can_pass(rank, step[self._next[rank]]):
            self._next[rank] += 1
        return self._next[rank] > start

    def _can_pass(self, rank: int, event: Event) -> bool:
        if event.peer is None:
            return self._all_arrived(rank, event)
        channel = self._channels[event.ranks, min(rank, event.peer), max(rank, event.peer)]
        if event.operation == "wait":
            return channel.is_over(rank, event)
        channel.post(rank, event)
        return True

    def _all_arrived(self, rank: int, event: Event) -> bool:
        """Whether the other ranks have reached a collective or passed it."""
        number = self._collectives[rank, event.ranks].index(self._next[rank])
        others = [other for other in event.ranks if other != rank and other in self._steps]
        return all(
            number < len(places := self._collectives[other, event.ranks]) and self._next[other] >= places[number]
            for other in others
        )

    def _compare(self) -> None:
        """Record mismatches among sends, receives and collectives."""
        for (_, low, high), channel in self._channels.items():
            for one, other in zip_longest(channel.posted[low], channel.posted[high]):
                if one is None or other is None or _kind(one) != (_COUNTERPART[other.operation], other.num_bytes):
                    self._differ(low, one, high, other)
                    break
        for (rank, group), places in self._collectives.items():
            for other in (other for other in group if other > rank and other in self._steps):
                theirs = self._collectives[other, group]
                for one, place in zip(places, theirs, strict=False):
                    mine, its = self._steps[rank][one], self._steps[other][place]
                    if _kind(mine) != _kind(its):
                        self._differ(rank, mine, other, its)
                        break

    def _differ(self, rank: int, one: Event | None, other_rank: int, other: Event | None) -> None:
        self._problems.append(f"rank {rank} has {_text(one)} where rank {other_rank} has {_text(other)}")


def _crosses(event: Event, steps: Mapping[int, Sequence[Event]]) -> bool:
    """Whether the event is between simulated ranks."""
    if event.peer is not None:
        return event.peer in steps
    return sum(rank in steps for rank in event.ranks) > 1


def _kind(event: Event) -> tuple[str, int]:
    return event.operation, event.num_bytes


def _text(event: Event | None) -> str:
    if event is None:
        return "nothing"
    what = f"{event.operation} of {event.num_bytes:,} bytes"
    return what if event.peer is None else f"{what} with rank {event.peer}"
