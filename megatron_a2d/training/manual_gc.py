"""Python's garbage collection during training; with --manual-gc all ranks collect after the same iterations.

An automatic collection stops one rank at a time, and all others wait for it.
"""

from __future__ import annotations

import gc

from megatron_a2d.config.performance_config import PerformanceConfig
from megatron_a2d.terminal.console import PYTHONS_GC_THRESHOLD


class ManualGC:
    """Garbage collection every --manual-gc-interval iterations; Python's automatic one without --manual-gc."""

    def __init__(self, settings: PerformanceConfig):
        gc.set_threshold(*PYTHONS_GC_THRESHOLD)  # garbage can hold a GPU's memory
        self._interval = settings.manual_gc_interval if settings.manual_gc else 0
        if self._interval:
            gc.disable()
            gc.collect()

    def after_step(self, iteration: int) -> None:
        if self._interval and iteration % self._interval == 0:
            gc.collect()

    def close(self) -> None:
        if self._interval:
            gc.enable()
