"""Benchmark of the monitor's overhead: a training step with diagnostics against one without.

    python -m bench.monitoring [--rounds 25] [--out bench/results/monitoring_cpu.json]

The MoE model and batch of bench.cpu_train_step; both kinds of steps take turns in one process. A run computes its
diagnostics in one step per --log-interval, and pays that part of the difference.
"""

from __future__ import annotations

import warnings

from bench.cpu_train_step import BATCH, SEQ_LENGTH, SHAPES
from bench.paired import compare, in_process
from bench.result_file import add_arguments, write
from bench.train_step_variants import LEARNING_RATE, Batches, model_config_of
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser, rounds=25)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    from megatron_a2d.config.settings import build
    from megatron_a2d.distributed import process_groups
    from megatron_a2d.training import data_setup, initialization, train_step
    from megatron_a2d.training.training_diagnostics import Monitor

    model_config = model_config_of(SHAPES["moe"])
    sizes = dict(seq_length=SEQ_LENGTH, global_batch_size=BATCH, micro_batch_size=4)
    config = build(sizes | {"lr": LEARNING_RATE})
    process_groups.initialize(config.parallel)
    state = initialization.build_train_state(model_config, config)
    samples = Batches(4, SEQ_LENGTH, SHAPES["moe"]["mask_token_id"])
    batches = data_setup.micro_batches(config, model_config, samples, 1, 0)  # type: ignore[arg-type]
    monitor = Monitor(config, model_config, state)
    monitor.remember_start()

    def run(observer: Monitor | None) -> None:
        state.scheduler.step(1)
        iteration = [next(batches) for _ in range(batches.num_microbatches)]
        train_step.train_step(state.chunks, state.optimizer, iteration, observer)
        if observer:
            observer.read()

    sides = {"monitored": in_process(lambda: run(monitor)), "not": in_process(lambda: run(None))}
    compared = compare("a step", sides, [("monitored", "not")], rounds=options.rounds)
    write(options.out, "monitoring", [compared], settings=SHAPES["moe"] | sizes)


if __name__ == "__main__":
    entry_point(main)
