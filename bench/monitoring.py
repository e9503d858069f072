"""Benchmark of the monitor's overhead: a training step with diagnostics against one without.

    python -m bench.monitoring [--rounds 15] [--out bench/results/monitoring_cpu.json]

The model and batch of bench.train_step_vs_hf (MoE); both kinds of steps alternate in one process. A run computes its
diagnostics in one step per --log-interval, so their overhead is divided by that.
"""

from __future__ import annotations

import statistics
import warnings
from pathlib import Path
from typing import Any

from bench.result_tables import machine
from bench.train_step_variants import LEARNING_RATE, model_config_of
from bench.train_step_vs_hf import COMMON, CPU_BATCHES, CPU_SHAPES, seconds
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.atomic_write import write_json


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="pairs of steps after one warm-up")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    from megatron_a2d.config.settings import build
    from megatron_a2d.distributed import process_groups
    from megatron_a2d.training import data_setup, initialization, train_step
    from megatron_a2d.training.training_diagnostics import Monitor

    shape = COMMON | CPU_SHAPES["moe"]
    model_config = model_config_of(shape)
    length, batch = CPU_BATCHES.seq_length, CPU_BATCHES.micro_batch_size
    config = build(dict(seq_length=length, global_batch_size=batch, micro_batch_size=4, lr=LEARNING_RATE))
    process_groups.initialize(config.parallel)
    state = initialization.build_train_state(model_config, config)
    batches = data_setup.micro_batches(config, model_config, CPU_BATCHES, 1, 0)  # type: ignore[arg-type]
    monitor = Monitor(config, model_config, state)
    monitor.remember_start()

    def run(observer: Monitor | None) -> None:
        state.scheduler.step(1)
        iteration = [next(batches) for _ in range(batches.num_microbatches)]
        train_step.train_step(state.chunks, state.optimizer, iteration, observer)
        if observer:
            observer.read()

    times = [(seconds(lambda: run(monitor)), seconds(lambda: run(None))) for _ in range(options.rounds + 1)][1:]
    ratio = statistics.median(watched / plain for watched, plain in times)
    interval = config.training.log_interval
    result: dict[str, Any] = {
        "machine": machine(),
        "settings": shape | {"seq_length": length, "batch": batch, "micro_batch": 4},
        "ratio": ratio,
        "overhead": (ratio - 1) / interval,
        "log_interval": interval,
        "seconds": times,
    }
    print(f"a step with diagnostics takes {ratio:.2f}x the time; one in {interval}: {result['overhead']:.1%} of a run")
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    entry_point(main)
