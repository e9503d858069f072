"""Command that places a checkpoint's experts on expert-parallel ranks so that held-out data loads the ranks evenly.

    python -m checkpoints_tools.place_experts --checkpoint RUN --valid-data data/valid --expert-model-parallel-size 8
    torchrun --nproc-per-node 8 -m checkpoints_tools.place_experts ...      # a model too large for one GPU

It counts each router's choices on the held-out data, masked as in validation, places the experts by every other batch
and prints what the remaining batches say of it. The result is expert_placement.json in the checkpoint, which training
applies when it starts there (docs/performance.md). Nothing that is computed changes, and no other file.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from megatron_a2d.config.cli import Parser, add_settings, given_settings
from megatron_a2d.distributed.environment import rank
from megatron_a2d.terminal.console import PlainConsole, entry_point, hide_noise, progress
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_line

if TYPE_CHECKING:
    from megatron_a2d.planner.expert_partition import Placed

_SETTINGS = ("seq_length", "micro_batch_size", "bf16")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m checkpoints_tools.place_experts",
        description="Place a checkpoint's experts on expert-parallel ranks for an even load.",
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="a checkpoint or an iteration of one"
    )
    parser.add_argument("--valid-data", required=True, metavar="PREFIX", help="prefix of a held-out token file")
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
    hide_noise()

    from megatron_a2d.checkpoint.directory import HF_FILES, iteration_of, resolve
    from megatron_a2d.checkpoint.placement_file import ExpertPlacement, identity
    from megatron_a2d.config.model_config import read_model_config
    from megatron_a2d.distributed import process_groups
    from megatron_a2d.evaluation import expert_loads
    from megatron_a2d.planner.expert_partition import place_layers

    directory = resolve(options.checkpoint)
    model_config = read_model_config(directory / HF_FILES)
    if not model_config.is_moe:
        raise UserError(f"--checkpoint {options.checkpoint}: the model is dense and has no experts to place")
    if model_config.num_experts % size:
        raise UserError(
            f"--expert-model-parallel-size {size}: does not divide the model's {model_config.num_experts} experts; "
            "choose a divisor"
        )
    config = expert_loads.measuring_config(directory, model_config, given)
    dataset = expert_loads.open_held_out(config, model_config, directory, options.valid_data)
    batch_size = size * config.training.micro_batch_size  # samples that expert-parallel ranks exchange at a time
    num_samples = min(options.num_samples, dataset.num_samples)
    if num_samples < 2 * batch_size:
        raise UserError(
            f"--valid-data {options.valid_data}: {num_samples} samples of --seq-length {config.data.seq_length} are "
            f"fewer than two batches of {size} ranks x {config.training.micro_batch_size}, one to place by and one to "
            "report; hold out more, or give fewer samples a --micro-batch-size or more --num-samples"
        )
    count = num_samples // (process_groups.world_size() * config.training.micro_batch_size)
    try:
        with (
            progress("held-out data", num_samples, "samples") if rank() == 0 else nullcontext(lambda _: None) as advance
        ):
            loads = expert_loads.measure_loads(config, model_config, directory, dataset, count, advance)
        if rank() > 0:
            return
        placed = place_layers(loads, size)
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
    print_line(str(path))


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
