"""Train: from a converted checkpoint to a diffusion language model (or, with --objective ar, an AR one).

    torchrun --nproc-per-node 8 -m megatron_a2d.train --config launch/recipes/NAME.yaml --load CKPT --save RUN
    python -m megatron_a2d.train --config ... --load CKPT --dry-run --world-size 64     # check, on any machine

The loop is in training/loop.py; what is built before it, in training/setup.py; where it starts, in training/resume.py.
A process ends with 0 when the run is done, 2 when something given to it is wrong, 74 when a checkpoint could not be
written (--on-save-error), 5 when another process died (runtime/peers.py); training/stopping.py has the others.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_a2d.architecture import Architecture, read_architecture
from megatron_a2d.checks import find_problems
from megatron_a2d.cli import Parser, parse_run
from megatron_a2d.config import RunConfig
from megatron_a2d.console import entry_point, human
from megatron_a2d.conversion.checkpoint import HF_FILES
from megatron_a2d.conversion.mask_token import choose_mask_token
from megatron_a2d.conversion.sources import open_checkpoint
from megatron_a2d.conversion.torch_dist_reader import check_pickles
from megatron_a2d.errors import SaveError, UserError
from megatron_a2d.files import hold_directory

if TYPE_CHECKING:  # at run time only after warnings are silenced
    from megatron_a2d.training import resume


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="megatron_a2d.train", description="Train a masked diffusion or autoregressive Qwen3.")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the run's sizes, and end")
    parser.add_argument("--world-size", type=int, help="with --dry-run: the number of processes to check for")
    config, options = parse_run(parser, argv)
    if options.world_size is not None and not options.dry_run:
        raise UserError("--world-size: only goes with --dry-run; torchrun decides the number of processes")

    # A message for each module of megatron.core that finds no GPU library says nothing to the user.
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from megatron_a2d.runtime import environment

    environment.apply(config)  # before anything touches CUDA
    from megatron_a2d.runtime.peers import Peers
    from megatron_a2d.training import loop, parallel

    processes = parallel.world_size() if options.world_size is None else options.world_size
    if processes < 1:
        raise UserError(f"--world-size {processes}: a run needs at least 1 process")
    try:
        # The first rank alone looks into files; while it does, the others wait for it to join the process group.
        if parallel.rank() == 0 and config.training.save and not options.dry_run:
            hold_directory(config.training.save, "--save")
        first = _check(config, processes) if parallel.rank() == 0 else None
        if options.dry_run:
            if first:
                print(describe(config, first.architecture, first.start.directory, processes))
            return
        if problems := find_problems(config, None, processes):
            raise UserError(problems)
        parallel.initialize(config.parallel, replays_graphs=config.performance.cuda_graph_impl != "none")
        with Peers(60 * config.parallel.distributed_timeout_minutes):
            checked = parallel.from_first_rank(first)
            assert checked is not None
            _, exit_code = loop.train(checked.config, checked.architecture, *checked.start)
        parallel.finalize()
        if exit_code:
            sys.exit(exit_code)
    except (UserError, SaveError):
        parallel.finalize()
        if parallel.rank() > 0:
            # Rank 0 says the same, and torchrun then ends the others: one message, not one from each.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        raise


class Checked(NamedTuple):
    """What a run starts from."""

    start: resume.Start
    architecture: Architecture
    config: RunConfig  # with the fingerprint of the data


def _check(config: RunConfig, processes: int) -> Checked:
    """Everything that can be found wrong before processes meet; UserError with all of it."""
    from megatron_a2d.training import loop, resume
    from megatron_a2d.training.samples import make_sample

    start = resume.find_start(config, report=_warn)
    architecture = read_architecture(start.directory / HF_FILES)
    if problems := find_problems(config, architecture, processes):
        raise UserError(problems)
    check_pickles(start.directory)  # before megatron.core unpickles whatever it finds
    with open_checkpoint(start.directory):
        pass  # every tensor of the model is there, in its shape, and no other
    if config.diffusion.objective != "ar":
        choose_mask_token(start.directory / HF_FILES, architecture.vocab_size, None, architecture.mask_token_id)
    train_data, _ = loop.open_datasets(config, architecture)
    data = dataclasses.replace(config.data, train_data_fingerprint=train_data.fingerprint())
    config = dataclasses.replace(config, data=data)
    if not start.weights_only and (problems := resume.differences(config, start.directory)):
        raise UserError(problems)
    make_sample(config, architecture, train_data, data.seed)
    return Checked(start, architecture, config)


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


def describe(config: RunConfig, architecture: Architecture, start: Path, processes: int) -> str:
    """The sizes of a run, as --dry-run prints them, and the environment that it sets on a machine like this one."""
    from megatron_a2d.runtime import environment

    parallel, training, data = config.parallel, config.training, config.data
    tp, pp, cp, ep, etp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel_size,
    )
    dp = config.data_parallel_size(processes)
    tokens = training.global_batch_size * data.seq_length
    model = f"{'MoE' if architecture.is_moe else 'dense'}, {human(architecture.num_parameters())} parameters"
    if architecture.is_moe:
        model += f", {human(architecture.num_active_parameters())} active"
    microbatches = training.global_batch_size // (training.micro_batch_size * dp)
    state = human(state_bytes(config, architecture, processes), "B")
    lines = [
        ("start", str(start)),
        ("model", model),
        ("layout", f"{processes} processes = TP {tp} x PP {pp} x CP {cp} x DP {dp}, experts EP {ep} x ETP {etp}"),
        (
            "batch",
            f"{training.global_batch_size} samples x {data.seq_length} tokens = {human(tokens)} tokens, "
            f"{microbatches} micro-batches of {training.micro_batch_size}",
        ),
        ("run", f"{training.train_iters} iterations = {human(training.train_iters * tokens)} tokens"),
        ("state", f"{state} a process: weights, gradients, optimizer (activations come on top)"),
        ("environ", environment.as_text(environment.environment(config, environment.find_gpu()))),
    ]
    return "\n".join(f"{name:<8}{text}" for name, text in lines)


def state_bytes(config: RunConfig, architecture: Architecture, processes: int) -> float:
    """Bytes of weights, gradients and Adam state on a process, layers spread evenly over stages."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    experts = 3 * architecture.hidden_size * architecture.moe_intermediate_size * architecture.num_experts
    expert_weights = experts * architecture.num_layers / (ep * pp)
    other_weights = (architecture.num_parameters() - experts * architecture.num_layers) / (tp * pp)
    # bf16: 2 bytes weight, 4 gradient, 12 main weight and moments; fp32: 4, 4, 8.
    weight_and_gradient, optimizer = (6, 12) if config.training.bf16 else (8, 8)
    sharded = parallel.use_distributed_optimizer
    expert_replicas, replicas = (processes // (pp * ep), processes // (tp * pp)) if sharded else (1, 1)
    return expert_weights * (weight_and_gradient + optimizer / expert_replicas) + other_weights * (
        weight_and_gradient + optimizer / replicas
    )


if __name__ == "__main__":
    entry_point(main)
