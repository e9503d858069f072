"""Samples that a run skips (--skip-samples), as ranges of indices.

A sample is a function of its index, so skipping some changes no other one: the run reads the remaining samples in their
order. Its place in the run (as `consumed_samples` counts) and its index are functions of one another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

LARGEST = 1 << 53

_RANGE = re.compile(r"(\d{1,19})-(\d{1,19})")


class Range(NamedTuple):
    """Sample indices, both ends included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    @property
    def size(self) -> int:
        return self.last - self.first + 1


def read_range(text: str) -> str:
    """Check the text of a range, FROM-TO, and return it; ValueError if it is invalid."""
    if (match := _RANGE.fullmatch(text)) is None:
        raise ValueError(f"{text!r} is not a range of sample indices FROM-TO, such as 1000-1999")
    first, last = map(int, match.groups())
    if not first <= last < LARGEST:
        raise ValueError(f"{text!r} is not a range: it must end after its beginning, and below 2**53")
    return text


@dataclass(frozen=True)
class SkippedSamples:
    """Ranges in ascending order, none of which overlaps or touches another one."""

    ranges: tuple[Range, ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> SkippedSamples:
        """The union of the ranges (first, last)."""
        merged: list[Range] = []
        for first, last in sorted(ranges):
            if merged and first <= merged[-1].last + 1:
                first, last = merged[-1].first, max(last, merged.pop().last)
            merged.append(Range(first, last))
        return cls(tuple(merged))

    @classmethod
    def read(cls, texts: Iterable[str]) -> SkippedSamples:
        """From the texts of ranges, FROM-TO."""
        return cls.of((int(first), int(last)) for first, last in (text.split("-") for text in texts))

    def texts(self) -> tuple[str, ...]:
        return tuple(map(str, self.ranges))

    def index_of(self, place: int) -> int:
        """Index of the sample that the run reads as number `place`, counted from 0."""
        for item in self.ranges:
            if place < item.first:
                break
            place += item.size
        return place

    def place_of(self, index: int) -> int:
        """Number of samples that the run reads before the sample `index`: its `place`, unless it is skipped itself."""
        return index - sum(min(item.last + 1, index) - item.first for item in self.ranges if item.first < index)

    def with_more(self, more: SkippedSamples, consumed: int) -> SkippedSamples:
        """These and more of them, for a run that has trained on `consumed` samples.

        ValueError if that would skip a sample on which it has trained.
        """
        together = SkippedSamples.of([*self.ranges, *more.ranges])
        reached = self.index_of(consumed - 1)
        if together.place_of(reached + 1) != consumed:
            raise ValueError(f"the run has trained on samples up to {reached}")
        return together


NONE_SKIPPED = SkippedSamples()
