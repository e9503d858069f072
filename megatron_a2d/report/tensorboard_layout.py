"""TensorBoard on a run, with the page of this project's charts in front.

TensorBoard opens the first of its tabs that has something to show, in the order in which its plugins were given; by
itself that is "Time Series". Here "Custom Scalars", whose layout training/logger.py writes, comes first.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megatron_a2d.terminal.console import console
from megatron_a2d.utils.errors import UserError

_FIRST = "custom_scalars"


def plugins() -> list[Any]:
    """TensorBoard's own and installed ones, custom scalars first."""
    from tensorboard import default
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin

    assert CustomScalarsPlugin.plugin_name == _FIRST
    others = [plugin for plugin in default.get_plugins() if plugin is not CustomScalarsPlugin]
    return [CustomScalarsPlugin, *others]


def logs_of(run: Path) -> Path:
    """The directory of a run's curves; a directory of runs shows them together."""
    logs = run / "tensorboard" if (run / "tensorboard").is_dir() else run
    if not any(logs.rglob("events.out.tfevents.*")):
        raise UserError(f"{run}: holds no curves of a run; give a --save directory, or a directory of several")
    return logs


def watch(run: Path, port: int) -> None:
    """Serve until it is interrupted."""
    from tensorboard.program import TensorBoard, TensorBoardServerException

    board = TensorBoard(plugins=plugins())
    board.configure(argv=["", "--logdir", str(logs_of(run)), "--port", str(port)])
    try:
        url = board.launch()
    except TensorBoardServerException as error:
        raise UserError(f"--port {port}: {' '.join(str(error).split())}; choose another") from None
    console.print(f"{url}    (Ctrl+C ends it)")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return
