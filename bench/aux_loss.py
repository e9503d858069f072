"""Benchmark of load balancing: a training step's CPU time with --moe-aux-loss-loads previous and current, and without.

    python -m bench.aux_loss [--rounds 15] [--out bench/results/aux_loss_cpu.json]

The MoE model and batch of bench.train_step_vs_hf; the three kinds of steps take turns in one process.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.result_tables import machine
from bench.train_step_variants import LEARNING_RATE, model_config_of
from bench.train_step_vs_hf import COMMON, CPU_BATCHES, CPU_SHAPES
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.atomic_write import write_json

GLOBAL = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 1e-3}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {}, "previous": GLOBAL, "current": {**GLOBAL, "moe_aux_loss_loads": "current"},
}  # fmt: skip


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind after one warm-up")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    from megatron_a2d.config.settings import build
    from megatron_a2d.distributed import process_groups

    shape = COMMON | CPU_SHAPES["moe"]
    sizes = dict(seq_length=CPU_BATCHES.seq_length, global_batch_size=CPU_BATCHES.micro_batch_size, micro_batch_size=4)
    process_groups.initialize(build({}).parallel)
    steps = {name: _step(shape, sizes | variant) for name, variant in VARIANTS.items()}
    times = [{name: _cpu_seconds(step) for name, step in steps.items()} for _ in range(options.rounds + 1)][1:]
    ratios = {
        name: statistics.median(seconds[name] / seconds["none"] for seconds in times)
        for name in VARIANTS
        if name != "none"
    }
    result = {"machine": machine(), "settings": shape | sizes, "ratios": ratios, "cpu_seconds": times}
    print("CPU time of a step over one without balancing: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))
    if options.out:
        write_json(options.out, result)


def _step(shape: dict[str, Any], settings: dict[str, Any]) -> Callable[[], None]:
    """A training step of a model of its own, with random weights."""
    from megatron_a2d.config.settings import build
    from megatron_a2d.training import data_setup, initialization, train_step

    config, model_config = build(settings | {"lr": LEARNING_RATE}), model_config_of(shape)
    state = initialization.build_train_state(model_config, config)
    initialization.draw_weights(state, config.data.seed, model_config.initializer_range)
    batches = data_setup.micro_batches(config, model_config, CPU_BATCHES, 1, 0)  # type: ignore[arg-type]

    def run() -> None:
        state.scheduler.step(1)
        iteration = [next(batches) for _ in range(batches.num_microbatches)]
        train_step.train_step(state.chunks, state.optimizer, iteration)

    return run


def _cpu_seconds(step: Callable[[], None]) -> float:
    begin = time.process_time()
    step()
    return time.process_time() - begin


if __name__ == "__main__":
    entry_point(main)
