"""Draw what a run did.

python -m megatron_a2d.study report RUN [--out loss.png]     RUN is a --save directory
"""

from __future__ import annotations

from pathlib import Path

from megatron_a2d.cli import Parser
from megatron_a2d.console import entry_point
from megatron_a2d.study.report import draw_run


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="megatron_a2d.study", description="Draw what a run did.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report = commands.add_parser("report", help="the loss, accuracy, gradient norm and learning rate of a run as PNG")
    report.add_argument("run", type=Path, help="the run's --save directory")
    report.add_argument("--out", type=Path, default=None, help="the image; default: RUN/report.png")
    options = parser.parse_args(argv)
    print(draw_run(options.run, options.out or options.run / "report.png"))


if __name__ == "__main__":
    entry_point(main)
