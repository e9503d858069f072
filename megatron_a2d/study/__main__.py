"""Studies of conversion, and reports of runs.

    python -m megatron_a2d.study NAME --out DIR --config RECIPE --load CKPT --train-data-path P --valid-data-path P
    python -m megatron_a2d.study report RUN [--out page.png]     draw a run; RUN is a --save directory
    python -m megatron_a2d.study watch RUN [--port 6006]         TensorBoard, opened at the run's charts

A study (`make study` runs one on a small model, offline) is resumable: the same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_a2d.config.cli import Parser
from megatron_a2d.report.plots import draw_run
from megatron_a2d.report.tensorboard_layout import watch
from megatron_a2d.study.command import STUDIES, run_study, usage
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.errors import UserError, nearest
from megatron_a2d.utils.printable import print_line, print_text


def main(argv: list[str] | None = None) -> None:
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print_text(f"{__doc__}\nstudies, each with --help:\n{usage()}")
    elif name == "report":
        parser = Parser(prog="python -m megatron_a2d.study report", description="Draw what a run did, as one PNG.")
        parser.add_argument("run", type=Path, help="the run's --save directory")
        parser.add_argument("--out", type=Path, default=None, help="the image; default: RUN/report.png")
        options = parser.parse_args(rest)
        print_line(draw_run(options.run, options.out or options.run / "report.png"))
    elif name == "watch":
        parser = Parser(prog="python -m megatron_a2d.study watch", description="TensorBoard, opened at a run's charts.")
        parser.add_argument("run", type=Path, help="the run's --save directory, or a directory of several runs")
        parser.add_argument("--port", type=int, default=6006, help="of this machine")
        options = parser.parse_args(rest)
        watch(options.run, options.port)
    elif name in STUDIES:
        run_study(name, rest)
    else:
        known = ("report", "watch", *STUDIES)
        raise UserError(f"{name}: no such study{nearest(name, known)}; there are {', '.join(known)}")


if __name__ == "__main__":
    entry_point(main)
