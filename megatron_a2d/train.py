"""Train: from a converted checkpoint to a diffusion language model (or, with --objective ar, an AR one).

    torchrun --nproc-per-node 8 -m megatron_a2d.train --config launch/recipes/NAME.yaml --load CKPT --save RUN
    python -m megatron_a2d.train --config ... --load CKPT --dry-run --world-size 64     # check, on any machine
    python -m megatron_a2d.train --config ... --dry-run --settings-only --world-size 64 --cluster h100    # no weights
    python -m megatron_a2d.train --config ... --rehearse --world-size 512       # a step of real ranks, without GPUs

How a run starts, in reading order: this file; training/startup_checks.py; training/resume.py, which finds the
checkpoint; training/initialization.py, which builds and loads model and optimizer. Then training/train_loop.py. Exit
codes: utils/exit_codes.py.
"""

from __future__ import annotations

import gc
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

from megatron_a2d.checkpoint.training_facts import inherited
from megatron_a2d.config.cli import Parser, parse_run
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.named_models import named_model_config
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.config.validate import MOST_PROCESSES, find_problems
from megatron_a2d.distributed import environment
from megatron_a2d.distributed.environment import check_launch, rank, world_size
from megatron_a2d.planner.cluster import Cluster, add_cluster, read_cluster
from megatron_a2d.planner.memory import check_memory, memory
from megatron_a2d.planner.workload import job_of
from megatron_a2d.terminal.console import entry_point, hide_noise, human
from megatron_a2d.training.startup_checks import check_early
from megatron_a2d.utils.atomic_write import hold_directory
from megatron_a2d.utils.errors import SaveError, UserError
from megatron_a2d.utils.printable import one_line, print_text


class Options(NamedTuple):
    """Options besides the settings."""

    dry_run: bool
    settings_only: bool
    rehearse: bool
    rank: int | None
    rehearse_trace: Path | None
    processes: int
    cluster: Cluster | None


def main(argv: list[str] | None = None) -> None:
    try:
        _run(*_parse(argv))
    except (UserError, SaveError):
        if "megatron_a2d.distributed.process_groups" in sys.modules:
            sys.modules["megatron_a2d.distributed.process_groups"].finalize()
        if rank() > 0:
            # Rank 0 reports the same error, and torchrun then ends the others: one message instead of one per rank.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)
        raise


def _parse(argv: list[str] | None) -> tuple[RunConfig, Options]:
    """Settings and options. UserError with every problem that shows before torch is imported."""
    parser = Parser(
        prog="python -m megatron_a2d.train",
        description="Train a masked diffusion or autoregressive language model. On several GPUs: launch/train.sh.",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the run's sizes, and exit")
    parser.add_argument("--world-size", type=int, help="with --dry-run, --rehearse: the number of processes")
    parser.add_argument(
        "--settings-only",
        action="store_true",
        help="with --dry-run: check the settings only, for the architecture of --model",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run a step of each pipeline stage's first rank without GPUs, and exit"
    )
    parser.add_argument("--rank", type=int, help="with --rehearse: the rank to rehearse")
    parser.add_argument(
        "--rehearse-trace",
        type=Path,
        metavar="FILE",
        help="with --rehearse: write every collective, send and receive to FILE, in order",
    )
    add_cluster(parser)
    config, given = parse_run(parser, argv, inherited)
    if given.world_size is not None and not (given.dry_run or given.rehearse):
        raise UserError(
            "--world-size: is only valid with --dry-run and --rehearse; torchrun decides the number of processes"
        )
    if given.rank is not None and not given.rehearse:
        raise UserError("--rank: is only valid with --rehearse; torchrun numbers the processes of a run")
    if given.rehearse_trace is not None and not given.rehearse:
        raise UserError("--rehearse-trace: is only valid with --rehearse; --profile traces a run")
    if given.dry_run and given.rehearse:
        raise UserError("--dry-run, --rehearse: choose one; a rehearsal makes the same checks of the settings")
    if given.settings_only and not given.dry_run:
        raise UserError("--settings-only: is only valid with --dry-run; a run needs weights and data")
    processes = world_size() if given.world_size is None else given.world_size
    if not 1 <= processes <= MOST_PROCESSES:
        raise UserError(f"--world-size {processes}: a run needs at least 1 process, and at most {MOST_PROCESSES:,}")
    if not (given.dry_run or given.rehearse):
        check_launch()
    cluster = read_cluster(given.cluster) if given.cluster else None
    if not (given.settings_only or given.rehearse):
        check_early(config, processes)
    return config, Options(
        given.dry_run, given.settings_only, given.rehearse, given.rank, given.rehearse_trace, processes, cluster
    )


def _run(config: RunConfig, options: Options) -> None:
    processes, cluster = options.processes, options.cluster
    if options.rehearse:
        hide_noise()
        from megatron_a2d.rehearsal.rehearse import rehearse

        model_config = _check_settings(config, processes, cluster)
        rehearse(config, model_config, processes, options.rank, cluster, options.rehearse_trace)
        return
    if options.settings_only:
        model_config = _check_settings(config, processes, cluster)
        print_text(describe(config, model_config, f"{config.training.model} (shape only)", processes, cluster))
        return
    # Only the first rank reads files; meanwhile the others wait for it to join the process group.
    if rank() == 0 and config.training.save and not options.dry_run:
        hold_directory(config.training.save, "--save")  # a second job fails at once
    environment.apply(config)  # before anything touches CUDA
    hide_noise()
    from megatron_a2d.distributed import process_groups as parallel
    from megatron_a2d.distributed.hang_watchdog import Heartbeat
    from megatron_a2d.distributed.rank_failure import PeerMonitor
    from megatron_a2d.training import train_loop
    from megatron_a2d.training.startup_checks import check_run

    gc.freeze()  # the run's garbage collections skip the objects that imports created
    first = check_run(config, processes, cluster) if rank() == 0 else None
    if first:
        start = str(first.start.directory)
        print_text(describe(config, first.model_config, start, processes, cluster, first.epochs))
    if options.dry_run:
        return
    parallel.initialize(config.parallel, replays_graphs=config.performance.cuda_graph_impl != "none")
    with Heartbeat(rank()), PeerMonitor(60 * config.parallel.distributed_timeout_minutes):
        checked = parallel.from_first_rank(first)
        assert checked is not None
        _, exit_code = train_loop.train(checked.config, checked.model_config, *checked.start, checked.placement)
    parallel.finalize()
    if exit_code:
        sys.exit(exit_code)


def _check_settings(config: RunConfig, processes: int, cluster: Cluster | None) -> ModelConfig:
    """Check the settings alone; returns the shape of --model. UserError with all problems."""
    if not config.training.model:
        raise UserError("--settings-only, --rehearse: need --model, to check the settings against its shape; add it")
    model_config = named_model_config(config.training.model)
    if problems := find_problems(config, model_config, processes):
        raise UserError(problems)
    check_memory(config, model_config, processes, cluster)
    return model_config


def describe(
    config: RunConfig,
    model_config: ModelConfig,
    start: str,
    processes: int,
    cluster: Cluster | None = None,
    epochs: dict[str, float] | None = None,
) -> str:
    """The sizes of a run and the environment variables that it sets, as printed at its start and by --dry-run."""
    parallel, data = config.parallel, config.data
    tp, pp, cp, ep, etp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel_size,
    )
    dp = config.data_parallel_size(processes)
    model = f"{'MoE' if model_config.is_moe else 'dense'}, {human(model_config.num_parameters())} parameters"
    if model_config.is_moe:
        model += f", {human(model_config.num_active_parameters())} active"
    need = memory(job_of(config, model_config, processes, cluster), cluster)
    parts = ", ".join(f"{name} {size / 2**30:.3g}" for name, size in need._asdict().items() if size)
    lines = [
        ("start", start),
        ("model", model),
        ("layout", f"{processes} processes = TP {tp} x PP {pp} x CP {cp} x DP {dp}, experts EP {ep} x ETP {etp}"),
        ("batch", _describe_batch(config, dp)),
        ("run", f"{config.num_iterations} iterations = {human(config.num_samples * data.seq_length)} tokens"),
        ("data", ", ".join(f"{count:.3g} epochs of {name}" for name, count in (epochs or {}).items())),
        (
            "memory",
            f"{need.total / 2**30:.3g} GiB/GPU{f' of {cluster.memory_gib}' if cluster else ''}: {parts}",
        ),
        ("env", environment.as_text(environment.environment(config, environment.find_gpu()))),
    ]
    return "\n".join(one_line(f"{name:<8}{text}") for name, text in lines if text)


def _describe_batch(config: RunConfig, dp: int) -> str:
    """The global batch and its micro-batches; with a schedule their ranges."""
    training, length, spans = config.training, config.data.seq_length, config.batch_sizes.spans
    smallest, largest = (choose(span.batch_size for span in spans) for choose in (min, max))
    share = training.micro_batch_size * dp
    if smallest == largest:
        count = largest // share
        return (
            f"{largest} samples x {length} tokens = {human(largest * length)} tokens, "
            f"{count} micro-batch{'es' if count > 1 else ''} of {training.micro_batch_size}"
        )
    return (
        f"{smallest} to {largest} samples x {length} tokens = {human(smallest * length)} to {human(largest * length)} "
        f"tokens, {smallest // share} to {largest // share} micro-batches of {training.micro_batch_size}; "
        f"{spans[-1].batch_size} samples from sample {spans[-1].sample} (iteration {spans[-1].iteration}) on"
    )


if __name__ == "__main__":
    entry_point(main)
