"""Confidence intervals of means over seeds, and the gradient noise scale from gradient moments."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# Student's t, two-sided 95%, by degrees of freedom; approximated beyond the table.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

# A note for pages with many verdicts.
MANY_COMPARISONS = (
    "Comparisons are at 95% each, uncorrected for their number: of twenty without a true difference one is expected to "
    "be significant."
)


def t95(degrees: int) -> float:
    return _T95[degrees - 1] if degrees <= len(_T95) else 1.960 + 2.4 / degrees


class Interval(NamedTuple):
    """A mean with the half-width of its 95% confidence interval; nan if there is only one value.

    Bitwise equal values do not depend on the seed: their interval has width 0.
    """

    mean: float
    half_width: float
    num_values: int

    def __str__(self) -> str:
        return self.format(3)

    def format(self, digits: int) -> str:
        shown = f"{self.mean:.{digits}f}"
        has_spread = math.isfinite(self.half_width) and self.half_width > 0
        return f"{shown} ± {self.half_width:.{digits}f}" if has_spread else shown


def mean_interval(values: Sequence[float]) -> Interval:
    """The interval of independent values, by Student's t."""
    count = len(values)
    if not all(map(math.isfinite, values)):
        return Interval(math.nan, math.nan, count)
    if count < 2:
        return Interval(values[0] if values else math.nan, math.nan, count)
    error = statistics.stdev(values) / math.sqrt(count)
    return Interval(statistics.fmean(values), t95(count - 1) * error, count)


def verdict(difference: Interval, digits: int = 3) -> str:
    """A difference in words, with its interval."""
    shown = f"{abs(difference.mean):.{digits}f} ± {difference.half_width:.{digits}f}"
    if not math.isfinite(difference.half_width):
        return f"{difference.mean:+.{digits}f} (one seed: no interval)"
    if difference.half_width == 0:
        return f"{difference.mean:+.{digits}f} for every seed"
    if abs(difference.mean) <= difference.half_width:
        return f"no significant difference ({difference.mean:+.{digits}f} ± {difference.half_width:.{digits}f})"
    return f"{'higher' if difference.mean > 0 else 'lower'} by {shown}"


def paired_difference(values: dict[int, float], baseline: dict[int, float]) -> Interval:
    """Mean of value - baseline over common seeds, which cancels the seed's effect on both."""
    return mean_interval([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


class RatioInterval(NamedTuple):
    """A ratio with its 95% confidence interval."""

    value: float
    low: float
    high: float

    def format(self, digits: int) -> str:
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def ratio_interval(values: Sequence[float], baseline: Sequence[float]) -> RatioInterval:
    """mean(values) / mean(baseline) of positive paired quantities; the interval by a jackknife of its logarithm.

    Tukey's pseudo-values are approximately independent, so Student's t applies to them.
    """
    count = len(values)

    def log_ratio(without: int) -> float:
        above = [value for number, value in enumerate(values) if number != without]
        below = [value for number, value in enumerate(baseline) if number != without]
        quotient = statistics.fmean(above) / statistics.fmean(below)
        return math.log(quotient) if quotient > 0 else math.nan

    whole = log_ratio(-1)
    found = mean_interval([count * whole - (count - 1) * log_ratio(number) for number in range(count)])
    return RatioInterval(
        math.exp(whole), math.exp(found.mean - found.half_width), math.exp(found.mean + found.half_width)
    )


class Moments(NamedTuple):
    """Gradient moments from n batches of B samples with gradients g_r (McCandlish et al. 2018, appendix A).

    Both are unbiased: tr V = (sum |g_r|^2 - n |mean g|^2) / (n - 1), and |G|^2 = |mean g|^2 - tr V / n.
    """

    variance: float  # tr V
    square: float  # |G|^2

    @classmethod
    def of(cls, sums: dict[str, float]) -> Moments:
        """From the sums of gradient_moments.py."""
        count = sums["count"]
        mean_square = sums["square_of_sum"] / count**2
        variance = (sums["sum_of_squares"] - count * mean_square) / (count - 1)
        return cls(variance, mean_square - variance / count)

    def noise_scale(self, batch_size: int) -> float:
        """B_simple = B tr V / |G|^2, in samples."""
        return batch_size * self.variance / self.square
