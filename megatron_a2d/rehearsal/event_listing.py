"""A rank's communication in order, as text: `train --rehearse --rehearse-trace FILE`.

A line is an operation, its group, ranks and bytes; what is repeated is written once, under the number of times:

    rank 0, 2,054 events

    passes
        47 times:
            all_gather      TENSOR_MODEL_PARALLEL_GROUP     [0, 1, 2, 3]             33,554,432
            reduce_scatter  TENSOR_MODEL_PARALLEL_GROUP     [0, 1, 2, 3]             33,554,432
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from megatron_a2d.rehearsal.rank_rehearsal import RankRehearsal
from megatron_a2d.rehearsal.step_trace import Event

_LONGEST = 256  # events of a repeated part
_INDENT = "    "


class Repeated(NamedTuple):
    """Items that occur `times` in a row; items of them can be repeated parts too."""

    times: int
    items: tuple[int | Repeated, ...]


def text_of(done: Sequence[RankRehearsal]) -> str:
    """The communication of every rank, in the order in which it is begun."""
    return "\n\n".join("\n".join(_lines_of_rank(item)) for item in done) + "\n"


def _lines_of_rank(done: RankRehearsal) -> Iterator[str]:
    events = [event for event in done.events if len(event.ranks) > 1]
    yield f"rank {done.rank}, {len(events):,} events"
    for phase, of_phase in groupby(events, lambda event: event.phase):
        yield f"\n{phase}"
        lines = [_line(event) for event in of_phase]
        texts = list(dict.fromkeys(lines))
        numbers = {text: number for number, text in enumerate(texts)}
        yield from _indented(fold([numbers[line] for line in lines]), texts, _INDENT)


def _line(event: Event) -> str:
    """The operation and, of a send or a receive, its peer; group, ranks, bytes."""
    preposition = {"send": "to", "recv": "from", "wait": "for"}.get(event.operation)
    what = event.operation if preposition is None else f"{event.operation} {preposition} rank {event.peer}"
    size = "" if event.operation == "wait" else f"{event.num_bytes:,}"
    return f"{what:<20} {event.group:<42} {_ranks(event.ranks):<28} {size:>16}".rstrip()


def _ranks(ranks: tuple[int, ...]) -> str:
    """Ranks as a list, or where there are many at one distance as first, second ... last."""
    steps = {second - first for first, second in pairwise(ranks)}
    if len(ranks) > 4 and len(steps) == 1:
        return f"[{ranks[0]}, {ranks[1]} ... {ranks[-1]}]"
    return str(list(ranks))


def _indented(items: Sequence[int | Repeated], texts: list[str], indent: str) -> Iterator[str]:
    for item in items:
        if isinstance(item, int):
            yield indent + texts[item]
        elif len(item.items) == 1 and isinstance(item.items[0], int):
            yield f"{indent}{texts[item.items[0]]}  ({item.times} times)"
        else:
            yield f"{indent}{item.times} times:"
            yield from _indented(item.items, texts, indent + _INDENT)


def fold(items: Sequence[int | Repeated]) -> tuple[int | Repeated, ...]:
    """Repeated parts, written once: the shortest first, then those that hold them."""
    folded, length = tuple(items), 1
    while length <= min(_LONGEST, len(folded) // 2):
        shorter = _fold_parts(folded, length)
        length = length + 1 if shorter == folded else 1
        folded = shorter
    return folded


def _fold_parts(items: tuple[int | Repeated, ...], length: int) -> tuple[int | Repeated, ...]:
    """With parts of this many items that occur in a row written once."""
    result: list[int | Repeated] = []
    place = 0
    while place < len(items):
        part, times = items[place : place + length], 1
        while items[place + times * length : place + (times + 1) * length] == part:
            times += 1
        if times > 1 and len(part) == length:
            result.append(Repeated(times, part))
            place += times * length
        else:
            result.append(items[place])
            place += 1
    return tuple(result)
