"""Benchmark of expert balance: the demo's conversion with and without balancing, its experts placed or in their order.

    python -m bench.expert_balance --demo demo_run --runs balance_runs [--out bench/results/expert_balance_cpu.json]

After `make demo`. Two conversions of the demo's converted checkpoint, by one process, that differ in balancing alone;
finished ones in --runs are kept. Of each: NELBO, dead experts, and the load of the busiest expert-parallel rank over
the mean (mean over layers) on held-out batches that the placement was not made with. The last lines are the targets.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import demo_runs
from bench.result_tables import machine
from megatron_a2d.checkpoint.directory import HF_FILES, resolve
from megatron_a2d.config.cli import Parser
from megatron_a2d.config.model_config import read_model_config
from megatron_a2d.report.plots import read_log
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.atomic_write import write_json
from megatron_a2d.utils.printable import print_text

WITHOUT, WITH = "without balancing", "with balancing"
# Without, and as the recipe balances them.
VARIANTS = {WITHOUT: ("--moe-router-load-balancing-type", "none", "--moe-aux-loss-coeff", "0"), WITH: ()}
TARGETS = {2: 1.05, 4: 1.20, 8: 1.40}  # busiest rank over the mean, with balancing and placement
NUM_BATCHES = 128  # of 8 samples


class Result(NamedTuple):
    """A conversion's figures."""

    nelbo: float
    interval: float  # half of its 95% interval over held-out samples
    num_dead: int
    in_order: dict[int, float]  # busiest rank over the mean by the number of ranks
    placed: dict[int, float]
    worst_layer: dict[int, float]  # of the placed ones


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    demo_runs.add_arguments(parser)
    options = parser.parse_args(argv)
    demo_runs.check(options.demo)
    results = {}
    for name, flags in VARIANTS.items():
        run = options.runs / name.replace(" ", "_")
        demo_runs.train(options.demo, run, flags)
        results[name] = _measure(options.demo, run)
    print_text(table(results))
    print_text("\n".join(verdicts(results)))
    if options.out:
        write_json(options.out, {"machine": machine(), **{name: found._asdict() for name, found in results.items()}})


def _measure(demo: Path, run: Path) -> Result:
    from megatron_a2d.distributed import process_groups
    from megatron_a2d.evaluation.expert_loads import measure_loads, measuring_config, open_held_out

    directory = resolve(run)
    model_config = read_model_config(directory / HF_FILES)
    config = measuring_config(directory, model_config, {})
    dataset = open_held_out(config, model_config, directory, str(demo / "corpus_valid"))
    try:
        loads_BL2E = measure_loads(config, model_config, directory, dataset, NUM_BATCHES)
    finally:
        process_groups.finalize()
    validation = [record for record in read_log(run) if record["kind"] == "validation"][-1]
    return figures(loads_BL2E, validation["nelbo"], validation["nelbo_standard_error"])


def figures(loads_BL2E: np.ndarray, nelbo: float, standard_error: float) -> Result:
    """Loads of every other batch, with experts placed by those between them."""
    from megatron_a2d.planner.expert_partition import place_layers

    changes = {size: place_layers(loads_BL2E[0::2], loads_BL2E[1::2], size) for size in TARGETS}
    return Result(
        nelbo, 1.96 * standard_error, int((loads_BL2E.sum((0, 2)) == 0).sum()),
        {size: change.mean.before.together for size, change in changes.items()},
        {size: change.mean.after.together for size, change in changes.items()},
        {size: change.worst.after.together for size, change in changes.items()},
    )  # fmt: skip


def table(results: dict[str, Result]) -> str:
    head = [
        "",
        "NELBO",
        "dead experts",
        *(f"EP {size}, {how}" for size in TARGETS for how in ("in order", "placed (worst layer)")),
    ]
    rows: list[list[Any]] = [
        [name, f"{found.nelbo:.3f} ± {found.interval:.3f}", found.num_dead]
        + [
            cell
            for size in TARGETS
            for cell in (f"{found.in_order[size]:.2f}", f"{found.placed[size]:.2f} ({found.worst_layer[size]:.2f})")
        ]
        for name, found in results.items()
    ]
    return markdown_table(head, rows)


def block(stored: dict[str, Any]) -> str:
    """The documents' table, from a result file."""

    def result(fields: dict[str, Any]) -> Result:
        by_size: dict[str, Any] = {
            name: {int(size): value for size, value in field.items()} if isinstance(field, dict) else field
            for name, field in fields.items()
        }
        return Result(**by_size)

    return table({name: result(stored[name]) for name in VARIANTS})


def verdicts(results: dict[str, Result]) -> list[str]:
    """A line per target of a conversion with balancing and placement."""
    before, after = results[WITHOUT], results[WITH]
    lines = [
        (f"EP {size}: {after.placed[size]:.2f}, target <= {target:.2f}", after.placed[size] <= target)
        for size, target in TARGETS.items()
    ]
    lines.append((f"dead experts: {after.num_dead}, target 0", after.num_dead == 0))
    worse = after.nelbo - before.nelbo
    lines.append((f"NELBO: {worse:+.3f}, target <= {before.interval:.3f}", worse <= before.interval))
    assert all(map(math.isfinite, (after.nelbo, before.nelbo)))
    return [f"{text}: {'met' if is_met else 'missed'}" for text, is_met in lines]


if __name__ == "__main__":
    entry_point(main)
