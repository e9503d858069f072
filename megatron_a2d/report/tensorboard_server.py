"""TensorBoard for a run, opened at this project's charts.

TensorBoard opens the first tab with data, in the order of its plugins; by default that is "Time Series". Here it is
"Custom Scalars", whose layout training/tensorboard_layout.py defines.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megatron_a2d.terminal.console import console
from megatron_a2d.utils.errors import UserError

_FIRST = "custom_scalars"


def plugins() -> list[Any]:
    """TensorBoard's plugins, built in and installed, with custom scalars first."""
    from tensorboard import default
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin

    assert CustomScalarsPlugin.plugin_name == _FIRST
    others = [plugin for plugin in default.get_plugins() if plugin is not CustomScalarsPlugin]
    return [CustomScalarsPlugin, *others]


def logs_of(run: Path) -> Path:
    """The directory of event files of a run, or of several runs, which are shown together."""
    logs = run / "tensorboard" if (run / "tensorboard").is_dir() else run
    if not any(logs.rglob("events.out.tfevents.*")):
        raise UserError(f"{run}: holds no TensorBoard files; give a --save directory, or a directory of several")
    return logs


def watch(run: Path, port: int) -> None:
    """Run TensorBoard until interrupted."""
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
