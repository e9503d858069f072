"""Command for reports of a training run: a page of plots, or TensorBoard with the same charts.

python -m megatron_a2d.report RUN [--out page.png]            RUN is a --save directory
python -m megatron_a2d.report RUN --tensorboard [--port 6006] also a directory of several runs
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_a2d.config.cli import Parser
from megatron_a2d.report.plots import draw_run
from megatron_a2d.report.tensorboard_server import watch
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.printable import print_line


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m megatron_a2d.report", description="Plot a training run, or start TensorBoard.")
    parser.add_argument("run", type=Path, help="the run's --save directory")
    parser.add_argument("--out", type=Path, default=None, help="the image; default: RUN/report.png")
    parser.add_argument("--tensorboard", action="store_true", help="start TensorBoard instead")
    parser.add_argument("--port", type=int, default=6006, help="TensorBoard's port")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if options.tensorboard:
        watch(options.run, options.port)
    else:
        print_line(draw_run(options.run, options.out or options.run / "report.png"))


if __name__ == "__main__":
    entry_point(main)
