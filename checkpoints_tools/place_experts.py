"""Command that places a checkpoint's experts on expert-parallel ranks so that held-out data loads the ranks evenly.

    python -m checkpoints_tools.place_experts --checkpoint RUN --valid-data data/valid --expert-model-parallel-size 8
    torchrun --nproc-per-node 8 -m checkpoints_tools.place_experts ...      # a model too large for one GPU

It counts each router's choices on the held-out data, masked as in validation, places the experts by every other batch
and prints what the remaining batches say of it. Without --valid-data it takes those in the last step of a run that
balances its routers. The result is expert_placement.json in the checkpoint, which training applies when it starts there
(docs/performance.md). Nothing that is computed changes, and no other file.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from megatron_a2d.checkpoint.directory import HF_FILES, iteration_of, resolve
from megatron_a2d.config.cli import Parser, add_settings, given_settings
from megatron_a2d.config.model_config import read_model_config
from megatron_a2d.distributed.environment import rank
from megatron_a2d.terminal.console import PlainConsole, entry_point, hide_noise, progress
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_line

if TYPE_CHECKING:
    import numpy as np

    from megatron_a2d.config.model_config import ModelConfig
    from megatron_a2d.planner.expert_partition import Placed

_SETTINGS = ("seq_length", "micro_batch_size", "bf16")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m checkpoints_tools.place_experts",
        description="Place a checkpoint's experts on expert-parallel ranks for an even load. --seq-length, "
        "--micro-batch-size and --bf16 are by default those of the run that wrote the checkpoint, if a run did.",
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="a checkpoint or an iteration of one"
    )
    parser.add_argument(
        "--valid-data",
        metavar="PREFIX",
        help="prefix of a held-out token file (default: the choices that a balancing run recorded)",
    )
    parser.add_argument(
        "--expert-model-parallel-size", required=True, type=int, metavar="N", help="ranks to place the experts on"
    )
    parser.add_argument("--num-samples", type=int, default=1024, metavar="N", help="held-out samples (default: 1024)")
    add_settings(parser, _SETTINGS)
    options = parser.parse_args(argv)
    problems: list[str] = []
    given = given_settings(options, _SETTINGS, problems)
    size = options.expert_model_parallel_size
    if size < 2:
        problems.append(f"--expert-model-parallel-size {size}: one rank holds all experts; give 2 or more")
    if options.num_samples < 1:
        problems.append(f"--num-samples {options.num_samples}: must be at least 1")
    if problems:
        raise UserError(problems)
    # Before torch's import, which takes seconds.
    directory = resolve(options.checkpoint, "--checkpoint")
    model_config = read_model_config(directory / HF_FILES)
    if not model_config.is_moe:
        raise UserError(f"--checkpoint {options.checkpoint}: the model is dense and has no experts to place")
    if model_config.num_experts % size:
        raise UserError(
            f"--expert-model-parallel-size {size}: does not divide the model's {model_config.num_experts} experts; "
            "choose a divisor"
        )
    hide_noise()

    from megatron_a2d.checkpoint.placement_file import ExpertPlacement, identity
    from megatron_a2d.distributed import process_groups
    from megatron_a2d.evaluation.expert_loads import recorded_loads
    from megatron_a2d.planner.expert_partition import place_layers

    try:
        if options.valid_data is None:
            used = held_out = recorded_loads(directory, model_config)
        else:
            batches = _measure(options, given, directory, model_config)
            used, held_out = batches[0::2], batches[1::2]
        if rank() > 0:
            return
        placed = place_layers(used, held_out, size)
        placement = ExpertPlacement(
            checkpoint=identity(directory),
            measured_at_iteration=iteration_of(directory),
            expert_model_parallel_size=size,
            num_experts_per_tok=model_config.num_experts_per_tok,
            imbalance_before=placed.mean.before.all,
            imbalance_after=placed.mean.after.all,
            order=placed.order,
        )
        path = placement.write(directory)
    finally:
        process_groups.finalize()
    PlainConsole(width=100).print(_table(placed, size))
    if options.valid_data is None:
        print_line("measured on the step that determined the placement; --valid-data gives held-out figures")
    print_line(str(path))


def _measure(
    options: argparse.Namespace, given: dict[str, Any], directory: Path, model_config: ModelConfig
) -> np.ndarray:
    """Choices in the held-out batches of the ranks that are placed on (expert_partition.py)."""
    from megatron_a2d.distributed import process_groups
    from megatron_a2d.evaluation import expert_loads
    from megatron_a2d.planner.expert_partition import batches_of_ranks

    config, size = expert_loads.measuring_config(directory, model_config, given), options.expert_model_parallel_size
    dataset = expert_loads.open_held_out(config, model_config, directory, options.valid_data)
    num_samples = min(options.num_samples, dataset.num_samples)
    processes, micro_batch_size = process_groups.world_size(), config.training.micro_batch_size
    count = num_samples // (processes * micro_batch_size)  # micro-batches of a process
    if count * processes < 2 * size:
        raise UserError(
            f"--valid-data {options.valid_data}: {num_samples} samples of --seq-length {config.data.seq_length} are "
            f"fewer than two batches of {size} ranks x {micro_batch_size}, one to place by and one to report; hold out "
            "more, or give a smaller --micro-batch-size or more --num-samples"
        )
    total = count * processes * micro_batch_size
    with progress("held-out data", total, "samples") if rank() == 0 else nullcontext(lambda _: None) as advance:
        choices = expert_loads.measure_loads(config, model_config, directory, dataset, count, advance)
    return batches_of_ranks(choices, size)


def _table(placed: Placed, size: int) -> Table:
    """Imbalance by layer, before and after."""
    table = Table(title=f"tokens of the busiest of {size} ranks over the mean, before and after")
    for name in ("layer", "all tokens", "masked", "unmasked", "all batches as one"):
        table.add_column(name, justify="right")
    rows = [*((str(number), layer) for number, layer in enumerate(placed.layers, 1)), ("mean", placed.mean)]
    for name, layer in [*rows, ("worst", placed.worst)]:
        table.add_row(name, *(f"{a:.2f} -> {b:.2f}" for a, b in zip(layer.before, layer.after, strict=True)))
    return table


if __name__ == "__main__":
    entry_point(main)
