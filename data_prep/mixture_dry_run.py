"""Dry run of training over a mixture: epochs, tokens and disk of each source, and the time, before anything starts.

    python -m data_prep.mixture_dry_run --config launch/recipes/rnd1_30b_a3b_64xb200.yaml \\
        --data-mixture launch/mixtures/rnd1.yaml --tokens-per-second runs/first

It takes the settings of training (--train-tokens, --train-samples, --train-iters, --seq-length, batch schedules), and
counts the samples of each source as training does. A source whose files are not there yet is shown with the tokens that
the run reads of it. `--tokens-per-second` is that of the whole job: a number, or a run whose log has it.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from data_prep.indexed_dataset_writer import SUFFIXES
from megatron_a2d.config.cli import Parser, parse_run
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.config.validate import find_general_problems
from megatron_a2d.data.blended_dataset import Source, SourceChoice, read_mixture
from megatron_a2d.report.plots import read_log
from megatron_a2d.terminal.console import PlainConsole, entry_point, human
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_line

# Up to four epochs of repeated text were nearly as good as new text (Muennighoff et al. 2023, arXiv 2305.16264), for
# autoregressive models; diffusion models profit from more (Prabhudesai et al. 2025, arXiv 2507.15857).
MAX_EPOCHS = 4.0
SECONDS_A_DAY = 86400


class Use(NamedTuple):
    """What a run does with a source."""

    source: Source
    read: int  # tokens that the run reads
    there: int | None  # tokens of its samples in an epoch; None: its files are missing
    disk: int  # bytes of its files, held-out ones included
    limit: float  # epochs

    @property
    def epochs(self) -> float | None:
        return None if self.there is None else self.read / self.there


def uses(config: RunConfig, max_epochs: float) -> list[Use]:
    """How the run uses each source of its mixture. UserError with the problems of files that are there."""
    from megatron_a2d.data.packed_dataset import PackedDataset

    sources, length = read_mixture(str(config.data.data_mixture)), config.data.seq_length
    counts = SourceChoice([source.weight for source in sources], config.data.seed).counts(config.num_texts)
    found, problems = [], []
    for source, count in zip(sources, counts, strict=True):
        there = None
        if os.path.exists(f"{source.train_path}.bin") or os.path.exists(f"{source.train_path}.idx"):
            try:
                there = PackedDataset(source.train_path, length, scan=False).num_samples * length
            except UserError as error:
                problems += error.problems
        disk = sum(
            os.path.getsize(prefix + suffix)
            for prefix in (source.train_path, source.valid_path)
            for suffix in SUFFIXES
            if prefix and os.path.exists(prefix + suffix)
        )
        found.append(Use(source, count * length, there, disk, source.max_epochs or max_epochs))
    if problems:
        raise UserError(problems)
    return found


def warning(use: Use, total: int, trained: int) -> str:
    """What to do about a source that is missing, or read more often than its limit; '' if nothing.

    `total`: tokens that the run reads of all sources; `trained`: that it trains on, twice as many with
    --complementary-masks.
    """
    name, limit, there = use.source.name, use.limit, use.there
    if there is None:
        least = use.read / limit
        return (
            f"{name}: {use.source.train_path} is not tokenised yet; the run reads {human(use.read)} tokens of it and "
            f"needs {human(least)} or more for at most {limit:g} {'epoch' if limit == 1 else 'epochs'}: "
            f"{human(4 * least, 'B')} at 4 bytes per token (2 with a vocabulary below 65,500)"
        )
    epochs = use.read / there
    if epochs <= limit:
        return ""
    refused = ", and training refuses to start" if use.source.max_epochs is not None else ""
    share = limit * there / total
    return (
        f"{name}: {epochs:.3g} epochs, more than {limit:g}{refused}: lower its share of the tokens from "
        f"{use.read / total:.3g} to {share:.3g}, add {human(use.read / limit - there)} tokens, train on at most "
        f"{human(trained * limit / epochs)} tokens, or raise {_setting(use)}"
    )


def _setting(use: Use) -> str:
    return "its max_epochs" if use.source.max_epochs is not None else "--max-epochs"


def show(found: list[Use]) -> Table:
    """A row per source, and their sum."""
    table = Table("source", "share", "tokens there", "tokens read", "epochs", "max epochs", "disk")
    for column in table.columns[1:]:
        column.justify = "right"
    for use in found:
        epochs, there = use.epochs, use.there
        table.add_row(
            use.source.name,
            f"{float(use.source.weight):.3g}",
            "-" if there is None else human(there),
            human(use.read),
            "-" if epochs is None else f"{epochs:.3g}",
            f"{use.limit:g}",
            human(use.disk, "B"),
        )
    there, read, disk = (sum(column) for column in zip(*((u.there or 0, u.read, u.disk) for u in found), strict=True))
    table.add_row("all", "1", human(there), human(read), "", "", human(disk, "B"))
    return table


def speed(given: str) -> tuple[float, str]:
    """--tokens-per-second: (tokens per second, where they are from): a number, or the median of a run's log."""
    try:
        value, origin = float(given), "as given"
    except ValueError:
        run = Path(given)
        if not run.exists():
            raise UserError(
                f"--tokens-per-second {given}: is neither a number nor an existing run; give either"
            ) from None
        records = read_log(run.parent if run.name == "log.jsonl" else run)
        speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
        if not speeds:
            raise UserError(
                f"--tokens-per-second {given}: its log has no training interval yet; give a number"
            ) from None
        value, origin = statistics.median(speeds), f"the median of {len(speeds):,} log intervals of {given}"
    if not 0 < value < math.inf:
        raise UserError(f"--tokens-per-second {given}: must be positive and finite; give a number of tokens")
    return value, origin


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m data_prep.mixture_dry_run",
        description="Show what a run would do with its mixture: epochs, tokens, disk, time.",
    )
    parser.add_argument(
        "--tokens-per-second", metavar="NUMBER|RUN", help="speed of the whole job, or a run whose log has it"
    )
    parser.add_argument(
        "--max-epochs", type=float, default=MAX_EPOCHS, metavar="N",
        help="warn of sources without max_epochs that the run repeats more often",
    )  # fmt: skip
    config, options = parse_run(parser, argv)
    if not config.data.data_mixture:
        raise UserError("--data-mixture: is missing; name a mixture file, such as launch/mixtures/rnd1.yaml")
    if problems := find_general_problems(config):
        raise UserError(problems)
    if not options.max_epochs > 0:
        raise UserError(f"--max-epochs {options.max_epochs:g}: must be positive; {MAX_EPOCHS:g} is usual")
    rate = speed(options.tokens_per_second) if options.tokens_per_second is not None else None
    found = uses(config, options.max_epochs)
    console = PlainConsole(width=None if sys.stdout.isatty() else 120)
    console.print(show(found))
    total = sum(use.read for use in found)
    trained = config.num_samples * config.data.seq_length
    console.print(
        f"{human(trained)} tokens in {config.num_samples:,} samples and {config.num_iterations:,} iterations"
        + (f": {trained / rate[0] / SECONDS_A_DAY:.3g} days at {human(rate[0])} tokens/s ({rate[1]})" if rate else ""),
        soft_wrap=True,
    )
    for use in found:
        if words := warning(use, total, trained):
            print_line(f"warning: {words}", sys.stderr)


if __name__ == "__main__":
    entry_point(main)
