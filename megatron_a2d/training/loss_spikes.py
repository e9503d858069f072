"""Loss spikes: a logged loss far above the recent ones is reported; the run continues.

The threshold is robust: the median and the median absolute deviation of the last losses, which a spike among them
hardly moves. A loss that is not finite is always a spike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque


class SpikeDetector:
    """Detector of losses far above the recent ones: more than `factor` median absolute deviations over their median."""

    def __init__(self, window: int = 50, factor: float = 8.0, warm_up: int = 10):
        self._recent: deque[float] = deque(maxlen=window)
        self._factor, self._warm_up = factor, warm_up

    def is_spike(self, loss: float) -> bool:
        """Compare a loss with the recent ones, and add it to them."""
        recent = list(self._recent)
        if not math.isfinite(loss):
            return True
        self._recent.append(loss)
        if len(recent) < self._warm_up:
            return False
        median = statistics.median(recent)
        # A floor of one percent: otherwise the noise of a flat loss curve would count as spikes.
        deviation = max(statistics.median(abs(value - median) for value in recent), 0.01 * abs(median))
        return loss > median + self._factor * deviation
