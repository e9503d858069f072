"""A run's metrics in Weights & Biases (--wandb-project), in addition to log.jsonl and TensorBoard.

Every start of a run is a separate wandb run, as in Megatron-LM; those of one --save directory form a group. The
environment variables of wandb apply: WANDB_MODE=offline writes to SAVE/wandb/ alone, for a later `wandb sync`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_a2d.config.settings import RunConfig


class WandbRun:
    """The wandb run; `report` receives a line if wandb fails, and training continues without it."""

    def __init__(self, config: RunConfig, iteration: int, report: Callable[[str], None]):
        import wandb

        self._errors = (wandb.Error, OSError)
        self._report = report
        self._run: Any = None
        project, save = config.training.wandb_project, config.training.save
        name = Path(save).resolve().name if save else None
        options = {"group": name, "name": f"{name} from {iteration}"} if name else {}
        if save:
            Path(save).mkdir(parents=True, exist_ok=True)

        def start() -> None:
            # Without capture of the console, which wandb would replace with its own.
            settings = wandb.Settings(console="off")
            self._run = wandb.init(project=project, dir=save, config=config.to_dict(), settings=settings, **options)

        self._attempt(start)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Add the values at the iteration; those of one iteration may come in several calls."""
        if self._run is not None:
            self._attempt(lambda: self._run.log(dict(values), step=iteration))

    def close(self) -> None:
        if self._run is not None:
            self._attempt(self._run.finish)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except self._errors as error:
            self._run = None
            self._report(f"warning: --wandb-project: {error}; the run continues without it")
