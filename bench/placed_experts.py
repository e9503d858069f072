"""Benchmark of placed experts: a training step under expert parallelism with a placement against one without.

    make demo
    python -m checkpoints_tools.place_experts --checkpoint demo_run/run --valid-data demo_run/corpus_valid \\
        --expert-model-parallel-size 2
    torchrun --nproc-per-node 2 -m bench.placed_experts --demo demo_run [--rounds 20] [--out FILE]

The demo's converted model on its training data, routed as it routes: experts over all processes, both kinds of steps in
turns, a learning rate of 0 so that all steps route alike. Measured is CPU time, in which a process that waits for
another does nothing: that of the slower rank, of a step and of its experts (forward and backward) alone; and that of
the slower rank of each layer, summed over layers, since ranks wait for one another in every layer.
"""

from __future__ import annotations

import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.result_tables import machine
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.atomic_write import write_json
from megatron_a2d.utils.errors import UserError


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("demo_run"), help="output directory of make demo")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of steps after one warm-up")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    from megatron_a2d.checkpoint.directory import HF_FILES, resolve
    from megatron_a2d.checkpoint.placement_file import find_placement
    from megatron_a2d.config.model_config import read_model_config
    from megatron_a2d.config.settings import build
    from megatron_a2d.distributed import process_groups
    from megatron_a2d.training import data_setup, initialization, train_step

    directory, ranks = resolve(options.demo / "run"), process_groups.world_size()
    config = build(
        dict(seq_length=128, micro_batch_size=8, global_batch_size=8 * ranks, lr=0.0, weight_decay=0.0, num_workers=0,
             train_data_path=str(options.demo / "corpus_train"), expert_model_parallel_size=ranks,
             use_distributed_optimizer=True)
    )  # fmt: skip
    model_config = read_model_config(directory / HF_FILES)
    placement = find_placement(config, model_config, directory)
    if not placement or not placement.applies_to(ranks):
        raise UserError(f"--demo {options.demo}: has no placement for {ranks} processes; run place_experts first")
    process_groups.initialize(config.parallel)
    data, _ = data_setup.open_datasets(config, model_config)

    def prepared(place: bool) -> Any:
        state = initialization.build_train_state(model_config, config)
        if place:
            state.place_experts(placement)
        initialization.load_checkpoint(state, directory, weights_only=True)
        return state, ExpertTime(state.models[0]), data_setup.micro_batches(config, model_config, data, 1, 0)

    def step(state: Any, experts: ExpertTime, batches: Any) -> tuple[float, ...]:
        """CPU seconds of the slower rank: of the step, of its experts, and of each layer's experts."""
        iteration = [next(batches) for _ in range(batches.num_microbatches)]
        state.scheduler.step(1)
        experts.seconds, begin = [0.0] * model_config.num_layers, time.process_time()
        train_step.train_step(state.chunks, state.optimizer, iteration)
        taken = torch.tensor([time.process_time() - begin, sum(experts.seconds), *experts.seconds])
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return float(taken[0]), float(taken[1]), float(taken[2:].sum())

    kinds = [prepared(False), prepared(True)]
    times = [[step(*kind) for kind in kinds] for _ in range(options.rounds + 1)][1:]
    names = ("step", "experts", "experts layer by layer")
    medians = {
        name: [statistics.median(pair[kind][number] for pair in times) for kind in (0, 1)]
        for number, name in enumerate(names)
    }
    ratios = {
        name: statistics.median(without[number] / placed[number] for without, placed in times)
        for number, name in enumerate(names)
    }
    if dist.get_rank() == 0:
        for name in names:
            before, after = medians[name]
            print(f"EP {ranks}, {name}: {before:.3f} -> {after:.3f} CPU s of the slower rank, {ratios[name]:.2f}x")
        if options.out:
            write_json(
                options.out,
                {"machine": machine(), "expert_model_parallel_size": ranks, "placement": placement.describe(ranks),
                 "ratios": ratios, "median_seconds": medians, "seconds": times},
            )  # fmt: skip
    process_groups.finalize()


class ExpertTime:
    """CPU seconds that a model's experts take, forward and backward."""

    def __init__(self, model: Any):
        self.seconds: list[float] = []  # by layer
        for number, layer in enumerate(model.decoder.layers):
            experts, end = layer.mlp.experts, partial(self._end, number)
            experts.register_forward_pre_hook(self._begin)
            experts.register_forward_hook(end)
            experts.register_full_backward_pre_hook(self._begin)
            experts.register_full_backward_hook(end)

    def _begin(self, *_: Any) -> None:
        self._started = time.process_time()

    def _end(self, number: int, *_: Any) -> None:
        self.seconds[number] += time.process_time() - self._started


if __name__ == "__main__":
    entry_point(main)
