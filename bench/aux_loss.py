"""Benchmark of load balancing: a training step with --moe-aux-loss-loads previous and current, against one without.

    python -m bench.aux_loss [--rounds 25] [--out bench/results/aux_loss_cpu.json]

The MoE model and batch of bench.cpu_train_step; the three kinds of steps take turns in one process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from bench.cpu_train_step import BATCH, SEQ_LENGTH, SHAPES
from bench.paired import compare, in_process
from bench.result_file import add_arguments, write
from bench.train_step_variants import LEARNING_RATE, Batches, model_config_of
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point

GLOBAL = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 1e-3}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {}, "previous": GLOBAL, "current": {**GLOBAL, "moe_aux_loss_loads": "current"},
}  # fmt: skip


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser, rounds=25)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    from megatron_a2d.config.settings import build
    from megatron_a2d.distributed import process_groups

    sizes = dict(seq_length=SEQ_LENGTH, global_batch_size=BATCH, micro_batch_size=4)
    process_groups.initialize(build({}).parallel)
    sides = {name: in_process(training_step(SHAPES["moe"], sizes | variant)) for name, variant in VARIANTS.items()}
    pairs = [(name, "none") for name in VARIANTS if name != "none"]
    compared = compare("load balancing", sides, pairs, rounds=options.rounds)
    write(options.out, "aux_loss", [compared], settings=SHAPES["moe"] | sizes)


def training_step(shape: dict[str, Any], settings: dict[str, Any]) -> Callable[[], None]:
    """A training step of a separate model with random weights."""
    from megatron_a2d.config.settings import build
    from megatron_a2d.training import data_setup, initialization, train_step

    config, model_config = build(settings | {"lr": LEARNING_RATE}), model_config_of(shape)
    batches = Batches(settings["micro_batch_size"], SEQ_LENGTH, shape["mask_token_id"])
    state = initialization.build_train_state(model_config, config)
    initialization.draw_weights(state, config.data.seed, model_config.initializer_range)
    samples = data_setup.micro_batches(config, model_config, batches, 1, 0)  # type: ignore[arg-type]

    def run() -> None:
        state.scheduler.step(1)
        iteration = [next(samples) for _ in range(samples.num_microbatches)]
        train_step.train_step(state.chunks, state.optimizer, iteration)

    return run


if __name__ == "__main__":
    entry_point(main)
