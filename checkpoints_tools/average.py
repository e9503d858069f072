"""Command that averages checkpoints of a run, uniformly or as an exponential moving average (EMA).

    python -m checkpoints_tools.average --checkpoints runs/rnd1/iter_00{08,09,10}000 --out checkpoints/mean
    python -m checkpoints_tools.average --checkpoints runs/rnd1/iter_* --ema-decay 0.9 --out checkpoints/ema

The result holds weights only: train from it with --finetune, or export it.
"""

from __future__ import annotations

from pathlib import Path

from checkpoints_tools.options import add_workers, check_streaming_options
from megatron_a2d.checkpoint.directory import resolve
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.atomic_write import check_new_directory
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_line


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m checkpoints_tools.average", description="Average iterations of a run into one checkpoint."
    )
    parser.add_argument(
        "--checkpoints", required=True, nargs="+", type=Path, metavar="DIR", help="iterations of a run, two or more"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the checkpoint to write; must be new")
    parser.add_argument(
        "--ema-decay",
        type=float,
        metavar="D",
        help="exponential moving average, from the oldest on: mean <- D mean + (1 - D) next; default: uniform mean",
    )
    add_workers(parser)
    options = parser.parse_args(argv)
    check_streaming_options(options)
    if options.ema_decay is not None and not 0 < options.ema_decay < 1:
        raise UserError(f"--ema-decay {options.ema_decay}: must be above 0 and below 1")
    # Before torch's import, which takes seconds.
    for checkpoint in options.checkpoints:
        resolve(checkpoint, "--checkpoints")
    check_new_directory(options.out, "--out")

    from megatron_a2d.conversion.weight_averaging import average

    done = average(
        options.checkpoints, options.out, options.ema_decay, options.workers, allow_nonfinite=options.allow_nonfinite
    )
    parts = ", ".join(f"{factor:.4g} of {number}" for number, factor in zip(done.iterations, done.factors, strict=True))
    print_line(f"{done.directory}: {parts}")


if __name__ == "__main__":
    entry_point(main)
