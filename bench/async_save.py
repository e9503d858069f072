"""Benchmark of --async-save: a training step while a checkpoint is being written, against one while none is.

    python -m bench.async_save [--work DIR] [--rounds 15] [--out bench/results/async_save_cpu.json]

One process, a dense model whose checkpoint takes longer to write than a step to compute. Before each step a save is
started (the pause of training that this takes is given as well), after it the save is completed; how many steps outlast
the writer is given too, as they are less disturbed. The step has threads for all cores, so the writer competes with it;
CPU time is that of the training process alone.
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.cpu_train_step import COMMON
from bench.paired import Usage, compare, in_process
from bench.result_file import Figure, add_arguments, write
from bench.train_step_variants import LEARNING_RATE, Batches, model_config_of
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.errors import UserError

MODEL = COMMON | dict(model_type="qwen3", intermediate_size=768, vocab_size=32_768, mask_token_id=32_767)
BATCH, SEQ_LENGTH = 2, 256
WRITING, OTHERWISE = "while writing", "otherwise"


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=None, metavar="DIR", help="a folder on the disk to write to")
    add_arguments(parser, rounds=15)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(prefix="bench_async_save", dir=options.work) as name:
        step, save = prepared(Path(name))
        pauses: list[float] = []
        outlasted: list[bool] = []

        def while_writing() -> Usage:
            begin = time.perf_counter()
            writer = save()
            pauses.append(time.perf_counter() - begin)
            usage = timed()
            outlasted.append(writer.is_written())
            writer.finish()
            return usage

        timed = in_process(step)
        sides = {WRITING: while_writing, OTHERWISE: timed}
        step()  # the optimizer has its state from here on
        compared = compare("a step", sides, [(WRITING, OTHERWISE)], rounds=options.rounds)
    if sum(outlasted) > len(outlasted) / 2:
        raise UserError("bench.async_save: the disk writes a checkpoint in less than a step; give another --work")
    figures = [
        Figure("pause of training at the start of a save", "s", pauses),
        Figure("steps that outlasted the writer", "%", [100 * sum(outlasted) / len(outlasted)]),
    ]
    write(options.out, "async_save", [compared], figures, MODEL | {"seq_length": SEQ_LENGTH, "batch": BATCH})


def prepared(folder: Path) -> tuple[Callable[[], None], Callable[[], Any]]:
    """A training step, and a function that starts a save and returns its writer."""
    from megatron_a2d.checkpoint.async_writer import BackgroundWriter
    from megatron_a2d.config.settings import build
    from megatron_a2d.distributed import environment, process_groups
    from megatron_a2d.training import checkpointing, data_setup, initialization, train_step

    files = folder / "hf"
    files.mkdir()
    (files / "config.json").write_text(json.dumps(MODEL))
    model_config = model_config_of(MODEL)
    sizes = dict(seq_length=SEQ_LENGTH, global_batch_size=BATCH, micro_batch_size=BATCH)
    config = build(sizes | {"lr": LEARNING_RATE, "save": str(folder / "run"), "async_save": True})
    environment.apply(config)
    process_groups.initialize(config.parallel)
    state = initialization.build_train_state(model_config, config)
    initialization.draw_weights(state, config.data.seed, model_config.initializer_range)
    samples = Batches(BATCH, SEQ_LENGTH, MODEL["mask_token_id"])
    batches = data_setup.micro_batches(config, model_config, samples, 1, 0)  # type: ignore[arg-type]

    background = BackgroundWriter(state.tensors)

    def step() -> None:
        state.scheduler.step(1)
        iteration = [next(batches) for _ in range(batches.num_microbatches)]
        train_step.train_step(state.chunks, state.optimizer, iteration)

    def save() -> Any:
        state.iteration = 1
        return checkpointing.CheckpointWriter(state, config, files, background)

    return step, save


if __name__ == "__main__":
    entry_point(main)
