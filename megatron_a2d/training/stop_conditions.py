"""Stop conditions of a run before its last iteration: signals, limits, too many skipped steps.

All ranks reach the same decision at the same iteration, although a signal may reach only one of them and clocks differ.
In each case a checkpoint is written first. Exit codes: utils/exit_codes.py.
"""

from __future__ import annotations

import math
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from megatron_a2d.config.settings import TrainingConfig
from megatron_a2d.megatron_compat.device import device
from megatron_a2d.utils.exit_codes import SIGNALLED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Requests to save and exit: SIGTERM, SIGUSR1, --exit-duration-in-mins, --exit-interval."""

    def __init__(self, config: TrainingConfig):
        self._config = config
        self._begin = time.monotonic()
        self._signal = 0
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def reason(self, iteration: int) -> tuple[str, int] | None:
        """Why the run should exit after this iteration, and the exit code; None to continue. Collective."""
        limit = self._config.exit_duration_in_mins
        is_late = limit > 0 and time.monotonic() - self._begin >= 60 * limit
        mine = torch.tensor([self._signal, int(is_late)], device=device())
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        number, late = mine.tolist()
        if number:
            return f"{signal.Signals(number).name} received", SIGNALLED
        if late:
            return f"--exit-duration-in-mins {limit:g} have passed", 0
        interval = self._config.exit_interval
        if interval and iteration % interval == 0:
            return f"--exit-interval {interval}", 0
        return None


class SkippedSteps:
    """Counter of skipped steps: those whose gradient was not finite."""

    def __init__(self, limit: int):
        self.limit, self.total, self.in_a_row = limit, 0, 0

    def add(self, grad_norm: float) -> bool:
        """Count a step; True if it was skipped."""
        skipped = not math.isfinite(grad_norm)
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        return skipped

    @property
    def too_many(self) -> bool:
        return self.in_a_row >= self.limit
