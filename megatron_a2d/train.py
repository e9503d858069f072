"""Train: from a converted checkpoint to a diffusion language model (or, with --objective ar, an AR one).

    torchrun --nproc-per-node 8 -m megatron_a2d.train --config launch/recipes/NAME.yaml --load CKPT --save RUN
    python -m megatron_a2d.train --config ... --load CKPT --dry-run --world-size 64     # check, on any machine

The loop is in training/loop.py; what is built before it, in training/setup.py; where it starts, in training/resume.py.
What its exit codes mean: exit_codes.py.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
import warnings
from pathlib import Path

from megatron_a2d.architecture import Architecture
from megatron_a2d.checks import find_problems
from megatron_a2d.cli import Parser, parse_run
from megatron_a2d.config import RunConfig
from megatron_a2d.console import entry_point, human
from megatron_a2d.errors import SaveError, UserError
from megatron_a2d.files import hold_directory


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
    from megatron_a2d.runtime.heartbeat import Heartbeat
    from megatron_a2d.runtime.peers import Peers
    from megatron_a2d.training import loop, parallel
    from megatron_a2d.training.checked import check_run

    processes = parallel.world_size() if options.world_size is None else options.world_size
    if processes < 1:
        raise UserError(f"--world-size {processes}: a run needs at least 1 process")
    try:
        # The first rank alone looks into files; while it does, the others wait for it to join the process group.
        if parallel.rank() == 0 and config.training.save and not options.dry_run:
            hold_directory(config.training.save, "--save")
        first = check_run(config, processes) if parallel.rank() == 0 else None
        if first:
            print(describe(config, first.architecture, first.start.directory, processes), flush=True)
        if options.dry_run:
            return
        if problems := find_problems(config, None, processes):
            raise UserError(problems)
        parallel.initialize(config.parallel, replays_graphs=config.performance.cuda_graph_impl != "none")
        with Heartbeat(parallel.rank()), Peers(60 * config.parallel.distributed_timeout_minutes):
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


def describe(config: RunConfig, architecture: Architecture, start: Path, processes: int) -> str:
    """The sizes of a run, and the environment that it sets here, as it and --dry-run print them."""
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
