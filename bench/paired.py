"""Paired measurements: sides that run in turns, and the ratios of their times with quartiles.

    compared = compare(
        "convert", {"cp": copy, "convert_hf": convert}, [("convert_hf", "cp")], rounds=5, cache="cold", prepare=evict
    )

A side is a function that runs once and returns its Usage: `in_process`, `process_tree.command` and `workers.Worker`
make such functions. A round runs every side once, the next round in the opposite order (AB BA AB ...), so that a
machine that gets slower or faster meets all of them. A ratio is taken within a round. What is reported is the median
over rounds with the quartiles (of three or four rounds, the smallest and the largest). If these are further apart than
NOISY of the median, or there are fewer rounds, it is noisy, and documents do not show it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_a2d.terminal.console import console

NOISY = 0.10  # of the median, between the quartiles
FEWEST = 3  # rounds
FEWEST_WITH_QUARTILES = 5  # of fewer the smallest and largest stand in for the quartiles
CLOCKS = ("cpu", "wall")


class Usage(NamedTuple):
    """Seconds of one run: by the clock, and of all its threads and processes together."""

    wall: float
    cpu: float


Side = Callable[[], Usage]


def in_process(run: Callable[[], object], finish: Callable[[], object] = lambda: None) -> Side:
    """A side in this process; `finish` waits for what `run` has only started (a GPU)."""

    def side() -> Usage:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        finish()
        return Usage(time.perf_counter() - wall, time.process_time() - cpu)

    return side


class Spread(NamedTuple):
    """Median and quartiles of `number` values."""

    median: float
    lower: float
    upper: float
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
        if len(values) < FEWEST_WITH_QUARTILES:
            lower, upper = min(values), max(values)
        return cls(middle, lower, upper, len(values))

    @property
    def noisy(self) -> bool:
        return self.number < FEWEST or self.upper - self.lower > NOISY * abs(self.median)

    def text(self, digits: int = 2) -> str:
        """Median and quartiles, or `noisy`."""
        if self.noisy:
            return "noisy"
        return f"{self.median:.{digits}f} ({self.lower:.{digits}f} to {self.upper:.{digits}f})"


@dataclass
class Comparison:
    """Runs of all sides by round, and the pairs (side, over which other side) whose ratios count."""

    name: str
    runs: dict[str, list[Usage]]
    pairs: list[tuple[str, str]]
    cache: str | None = None  # of the files that are read: "warm" or "cold"
    figures: dict[str, Any] = field(default_factory=dict)  # others, by name: columns next to the ratios

    def ratio(self, side: str, over: str, clock: str) -> Spread:
        """Time of `side` over that of `over` in the same round."""
        return Spread.of(
            [getattr(a, clock) / getattr(b, clock) for a, b in zip(self.runs[side], self.runs[over], strict=True)]
        )

    def median(self, side: str, clock: str) -> float:
        """Seconds."""
        return statistics.median(getattr(usage, clock) for usage in self.runs[side])

    @property
    def noisy(self) -> bool:
        """Whether no clock gives a ratio that can be shown."""
        return any(all(self.ratio(*pair, clock).noisy for clock in CLOCKS) for pair in self.pairs)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "cache": self.cache,
            "ratios": [
                {"of": side, "over": over}
                | {
                    clock: {"median": found.median, "quartiles": [found.lower, found.upper], "noisy": found.noisy}
                    for clock in CLOCKS
                    for found in [self.ratio(side, over, clock)]
                }
                for side, over in self.pairs
            ],
            "median_seconds": {side: {clock: self.median(side, clock) for clock in CLOCKS} for side in self.runs},
            "figures": self.figures,
            "seconds": {
                side: {clock: [getattr(usage, clock) for usage in usages] for clock in CLOCKS}
                for side, usages in self.runs.items()
            },
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Comparison:
        """From the seconds; ratios and medians follow from them."""
        runs = {
            side: [Usage(wall, cpu) for wall, cpu in zip(seconds["wall"], seconds["cpu"], strict=True)]
            for side, seconds in stored["seconds"].items()
        }
        pairs = [(ratio["of"], ratio["over"]) for ratio in stored["ratios"]]
        return cls(stored["name"], runs, pairs, stored["cache"], stored["figures"])


def compare(
    name: str,
    sides: dict[str, Side],
    pairs: Sequence[tuple[str, str]],
    *,
    rounds: int,
    cache: str | None = None,
    prepare: Callable[[], object] = lambda: None,
    warm_up: int = 1,
) -> Comparison:
    """Run all sides in turns; `prepare` precedes each run, and its time does not count. Prints the ratios."""
    runs: dict[str, list[Usage]] = {side: [] for side in sides}
    for number in range(-warm_up, rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            prepare()
            usage = sides[side]()
            if number >= 0:
                runs[side].append(usage)
        console.print(f"  {name}{f', {cache}' if cache else ''}: round {number + 1} of {rounds}", style="dim")
    compared = Comparison(name, runs, list(pairs), cache)
    for line in lines(compared):
        console.print(line, soft_wrap=True)
    return compared


def lines(compared: Comparison) -> list[str]:
    """A line per pair for the terminal, noisy ones marked."""
    found = []
    for side, over in compared.pairs:
        spreads = {clock: compared.ratio(side, over, clock) for clock in CLOCKS}
        cells = [
            f"{clock} {s.median:.3f}x ({s.lower:.3f} to {s.upper:.3f}{', noisy' if s.noisy else ''})"
            f" {compared.median(side, clock):.3g} / {compared.median(over, clock):.3g} s"
            for clock, s in spreads.items()
        ]
        cache = f", {compared.cache} cache" if compared.cache else ""
        found.append(f"{compared.name}{cache}: {side} / {over}: " + "   ".join(cells))
    return found
