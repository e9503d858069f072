"""Load of the busiest expert-parallel rank over the mean: assumed, given, or measured by a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_a2d.config.settings import RunConfig


class RankImbalance(NamedTuple):
    """Load of the busiest expert-parallel rank over the mean, at least 1."""

    mean: float  # over layers and steps: all ranks wait for it in every layer
    peak: float  # of the worst layer and step: a rank needs memory for it


EVEN = RankImbalance(1.0, 1.0)


@dataclass(frozen=True)
class Routing:
    """Imbalance by the number of expert-parallel ranks, ascending."""

    by_ranks: tuple[tuple[int, RankImbalance], ...]

    @classmethod
    def of(cls, mean: float, peak: float | None = None) -> Routing:
        """The same imbalance for any number of ranks."""
        return cls(((2, RankImbalance(mean, mean if peak is None else peak)),))

    def at(self, num_ranks: int) -> RankImbalance:
        """Imbalance for `num_ranks` ranks; if unknown, for the next larger known number, else the largest one."""
        if num_ranks == 1:
            return EVEN
        return next((found for size, found in self.by_ranks if size >= num_ranks), self.by_ranks[-1][1])


# Without a measurement of the run, by whether its routers are balanced: the study on routers (docs/studies/routers.md).
BALANCED, UNBALANCED = Routing.of(1.32, 1.54), Routing.of(1.46, 1.76)


def assumed(config: RunConfig) -> Routing:
    """What `plan` and the check of memory expect of a run whose routing has not been measured."""
    if config.performance.moe_router_force_load_balancing:
        return Routing.of(1.0)
    return BALANCED if config.balancing.has_aux_loss else UNBALANCED


def measured(records: Iterable[dict[str, Any]]) -> Routing | None:
    """From the training records of a run's log; None if they have no loads of ranks."""
    found: dict[int, list[float]] = {}  # of all layers and steps
    for record in records:
        by_ranks: Any = record
        for key in ("moe", "by_layer", "rank_imbalance"):
            by_ranks = by_ranks.get(key) if isinstance(by_ranks, dict) else None
        for name, layers in by_ranks.items() if isinstance(by_ranks, dict) else ():
            size = name.removeprefix("ep")
            if size.isdecimal() and isinstance(layers, list):
                found.setdefault(int(size), []).extend(value for value in layers if _is_ratio(value))
    known = sorted((size, values) for size, values in found.items() if values)
    by_size = tuple((size, RankImbalance(sum(values) / len(values), max(values))) for size, values in known)
    return Routing(by_size) if by_size else None


def _is_ratio(value: Any) -> bool:
    """Whether a value of a log can be a load over the mean."""
    return isinstance(value, int | float) and 1 <= value < math.inf
