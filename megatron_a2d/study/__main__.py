"""Ablation studies of conversion.

    python -m megatron_a2d.study NAME --out DIR --config RECIPE --load CKPT --train-data-path P --valid-data-path P

The same command resumes a study. `make study` runs one on a small model, offline.
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
    elif name == "report":  # `study report` and `study watch` are older names of python -m megatron_a2d.report
        report.main(rest)
    elif name == "watch":
        report.main([*rest, "--tensorboard"])
    elif name in STUDIES:
        run_study(name, rest)
    else:
        raise UserError(f"{name}: no such study{nearest(name, STUDIES)}; there are {', '.join(STUDIES)}")


if __name__ == "__main__":
    entry_point(main)
