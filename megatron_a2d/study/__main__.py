"""Command for ablation studies of conversion.

    python -m megatron_a2d.study NAME --out DIR --config RECIPE --load CKPT --train-data-path P --valid-data-path P
    python -m megatron_a2d.study report RUN [--out page.png]     draw a run; RUN is a --save directory
    python -m megatron_a2d.study watch RUN [--port 6006]         TensorBoard, opened at the run's charts

A study (`make study` runs one on a small model, offline) is resumable: the same command resumes it.
"""

from __future__ import annotations

import sys

from megatron_a2d.report import __main__ as report
from megatron_a2d.study.command import STUDIES, run_study, usage
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.errors import UserError, nearest
from megatron_a2d.utils.printable import print_text


def main(argv: list[str] | None = None) -> None:
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print_text(f"{__doc__}\nstudies, each with --help:\n{usage()}")
    elif name == "report":  # the older spelling of python -m megatron_a2d.report
        report.main(rest)
    elif name == "watch":
        report.main([*rest, "--tensorboard"])
    elif name in STUDIES:
        run_study(name, rest)
    else:
        known = ("report", "watch", *STUDIES)
        raise UserError(f"{name}: no such study{nearest(name, known)}; there are {', '.join(known)}")


if __name__ == "__main__":
    entry_point(main)
