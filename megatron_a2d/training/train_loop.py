"""The training loop: validation, training steps, logging, checkpoints, in the order in which they happen."""

from __future__ import annotations

import gc
from pathlib import Path

import torch.distributed as dist

from megatron_a2d.checkpoint.directory import HF_FILES
from megatron_a2d.checkpoint.placement_file import ExpertPlacement
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.data.background_scan import BackgroundScan
from megatron_a2d.data.dataloader import MicroBatches, write_batch
from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.distributed import environment, process_groups
from megatron_a2d.distributed.hang_watchdog import CHECKPOINTS, mark
from megatron_a2d.distributed.step_timers import phase
from megatron_a2d.model.layer_specs import notes
from megatron_a2d.training.checkpointing import CheckpointManager
from megatron_a2d.training.cuda_graphs import CudaGraphs
from megatron_a2d.training.data_setup import micro_batches, open_datasets
from megatron_a2d.training.grafting import Grafting
from megatron_a2d.training.initialization import build_train_state, initialize_state
from megatron_a2d.training.interval_metrics import IntervalMetrics
from megatron_a2d.training.load_metrics import CrowdingDetector
from megatron_a2d.training.logger import RunLog
from megatron_a2d.training.loss_spikes import SpikeDetector
from megatron_a2d.training.manual_gc import ManualGC
from megatron_a2d.training.profiler import Profile
from megatron_a2d.training.resume import Start, with_skipped
from megatron_a2d.training.spike_rollback import Rollback, find_rollback
from megatron_a2d.training.stop_conditions import SkippedSteps, StopRequests
from megatron_a2d.training.train_state import TrainState
from megatron_a2d.training.train_step import train_step
from megatron_a2d.training.training_diagnostics import Monitor
from megatron_a2d.training.validation import run_validation
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.exit_codes import NOT_FINITE


def train(
    config: RunConfig,
    model_config: ModelConfig,
    start: Path,
    weights_only: bool,
    placement: ExpertPlacement | None = None,
) -> tuple[TrainState, int]:
    """Train from the checkpoint directory `start`; returns the final state and the exit code (utils/exit_codes.py).

    `weights_only`: begin a new run from its weights instead of resuming it. `placement`: of the experts over
    expert-parallel ranks. Collective.
    """
    requests, spikes = StopRequests(config.training), SpikeDetector()
    begin, rollback = Start(start, weights_only), None
    while True:
        state, exit_code, rollback = _train(config, model_config, begin, placement, requests, spikes, rollback)
        if rollback is None:
            return state, exit_code
        # A rollback is a resume in the same process: everything is rebuilt, after the old state has been freed.
        config, begin = rollback.applied_to(config), Start(rollback.start, weights_only=False)
        del state
        gc.collect()


def _train(
    config: RunConfig,
    model_config: ModelConfig,
    begin: Start,
    placement: ExpertPlacement | None,
    requests: StopRequests,
    spikes: SpikeDetector,
    rolled_back: Rollback | None,
) -> tuple[TrainState, int, Rollback | None]:
    """Train until the run ends or a spike requires a rollback; `rolled_back`: the rollback that led to this start."""
    # What the run consists of. Rank 0 has scanned the data files (startup_checks.py); reads check every token again.
    train_data, valid_data = open_datasets(config, model_config, begin.directory / HF_FILES, scan=False)
    config, state, grafting, monitor = _state_of(config, model_config, begin, placement)
    state.rollbacks = rolled_back.number if rolled_back else state.rollbacks
    training, batch_sizes, num_iterations = config.training, config.batch_sizes, config.num_iterations
    log = RunLog(config, state.iteration, enabled=dist.get_rank() == 0)
    batches = micro_batches(config, model_config, train_data, config.data.seed, state.consumed_samples)
    saves = CheckpointManager(state, config, begin.directory / HF_FILES, log)
    # Files with checksums are verified at every read; the others are scanned once in the background.
    files = [*train_data.files, *(dataset.file for dataset in valid_data.values())]
    scan = BackgroundScan([file for file in files if dist.get_rank() == 0 and file.needs_scan])
    interval_metrics = IntervalMetrics(config, model_config)
    crowding = CrowdingDetector(model_config.num_experts, model_config.num_experts_per_tok)
    skipped = SkippedSteps(training.max_skipped_steps)
    profile = Profile(config, state, log)
    graphs, manual_gc = CudaGraphs(state, config), ManualGC(config.performance)
    hang_timeout = 60 * config.parallel.distributed_timeout_minutes
    end: tuple[str, int] | None = None
    rollback: Rollback | None = None
    try:
        # The log's head, and the validation that later ones are compared with.
        _log_start(log, config, model_config, state, begin, placement)
        if rolled_back:  # saved at once: a restart must not run into the same samples, nor resume from after the spike
            saves.save(state, last=False)
            saves.finish(last=False)
        else:
            log.repeated(state.iteration)
        mark("first step", state.iteration, limit=hang_timeout)
        if state.iteration == 0:
            _validate(state, config, model_config, valid_data, log)
        interval_metrics.restart()
        logged = state.iteration
        while state.iteration < num_iterations and end is None:
            mark("reading samples", state.iteration + 1, limit=hang_timeout)
            scan.check()  # raises what the background scan has found

            # One step: batch size, learning rate, micro-batches, forward and backward passes, update.
            batch_size = batch_sizes.batch_size_at(state.consumed_samples)
            # megatron's scheduler has a learning rate of 0 before its first step. Stepped before the update, iteration
            # n trains at warm-up's n-th rate; skipped updates count, so the schedule depends on the iteration alone.
            state.scheduler.step(batch_size if state.counts_samples else 1)
            graphs.before_step()
            grafts = grafting.is_active(state.iteration)
            observer = monitor if is_logged(config, state.iteration + 1) else None
            with profile.measure(state.iteration + 1), grafting.step(state):
                with phase("data"):
                    step_batches = batches.iteration(batch_size)
                result = train_step(state.chunks, state.optimizer, step_batches, observer)
            interval_metrics.add(result, batch_size, grafting.take_error() if grafts else None)
            state.iteration += 1
            if state.balancing:
                state.balancing.anneal(state.iteration)
            state.consumed_samples += batch_size
            profile.after(state.iteration, log)
            manual_gc.after_step(state.iteration)

            # A gradient that is not finite: no rank has updated its weights, and too many such steps end the run.
            if skipped.add(result.grad_norm):
                culprits = process_groups.union(result.not_finite)
                log.skipped(state.iteration, state.samples_since(state.iteration - 1, batch_sizes), culprits, skipped)
            end = requests.reason(state.iteration)
            if skipped.too_many:
                end = f"{skipped.in_a_row} steps in a row had a gradient that is not finite", NOT_FINITE
            last = state.iteration == num_iterations or end is not None

            # Log, validate, save, each at its interval.
            if last or is_logged(config, state.iteration):
                values = interval_metrics.read(state) | (observer.read() if observer else {})
                log.train(state.iteration, values)
                if not grafts and spikes.is_spike(values["loss"]):
                    log.spike(state.iteration, values["loss"], state.samples_since(logged, batch_sizes))
                    if training.on_spike == "rollback":
                        mark("rollback", limit=CHECKPOINTS)
                        saves.finish(last=False)
                        rollback = find_rollback(config, state, logged, log)
                logged = state.iteration
                if rollback:
                    break
                if warning := crowding.check(values.get("moe")):
                    log.crowding(state.iteration, warning)
            if state.iteration % training.eval_interval == 0 or state.iteration == num_iterations:
                _validate(state, config, model_config, valid_data, log)
            mark("checkpoint", limit=CHECKPOINTS)
            if training.save and (last or state.iteration % training.save_interval == 0):
                saves.save(state, last)
            else:
                saves.poll()
            interval_metrics.resume()
        if rollback:
            _write_last_batch(config, batches, state, log, "spike")
            return state, 0, rollback
        if skipped.too_many:
            _write_last_batch(config, batches, state, log, "not_finite")
        reason, exit_code = end or ("complete", 0)
        log.event("end", iteration=state.iteration, reason=reason, exit_code=exit_code)
        if end:
            log.say(f"ended at iteration {state.iteration}: {reason}")
    finally:
        profile.close(log)
        manual_gc.close()
        batches.close()
        scan.close()
        saves.close()
        log.close()
    return state, exit_code, None


def _state_of(
    config: RunConfig, model_config: ModelConfig, begin: Start, placement: ExpertPlacement | None
) -> tuple[RunConfig, TrainState, Grafting, Monitor | None]:
    """The initial state from `begin`, and settings that also skip the samples that the checkpoint skipped."""
    start, weights_only = begin
    state = build_train_state(model_config, config)
    if placement:
        state.place_experts(placement)
    monitor = Monitor(config, model_config, state) if config.training.monitor else None
    # Drift is measured from the weights that the run began with. A resumed run reads those into the model first, and
    # `initialize_state` overwrites them with the checkpoint; for a new run they are what it leaves in the model.
    if monitor and not weights_only:
        monitor.remember_start_of(config)
    grafting = initialize_state(state, config, model_config, start, weights_only)
    if monitor and weights_only:
        monitor.remember_start()
    config = with_skipped(config, state.skipped, state.consumed_samples)
    state.skipped = config.skipped
    return config, state, grafting, monitor


def _log_start(
    log: RunLog,
    config: RunConfig,
    model_config: ModelConfig,
    state: TrainState,
    begin: Start,
    placement: ExpertPlacement | None,
) -> None:
    """Log the start: settings, environment, and notes about this start."""
    variables = environment.environment(config, environment.find_gpu())
    log.event("start", iteration=state.iteration, settings=config.to_dict(), environment=variables)
    if variables:
        log.say(f"environment: {environment.as_text(variables)}")
    for note in notes(config, model_config):
        log.say(note)
    if placement:
        log.say(placement.describe(config.parallel.expert_model_parallel_size))
    verb = "starting" if begin.weights_only else "resuming"
    log.say(f"{verb} at iteration {state.iteration} from {begin.directory}")
    if state.iteration >= config.num_iterations:
        log.say(f"the run is complete: {config.length}; raise it to continue")
    if ranges := state.skipped.texts():
        log.say(f"skipped samples: {' '.join(ranges)}")


def is_logged(config: RunConfig, iteration: int) -> bool:
    """Whether the iteration ends a log interval."""
    return iteration == config.num_iterations or iteration % config.training.log_interval == 0


def _write_last_batch(config: RunConfig, batches: MicroBatches, state: TrainState, log: RunLog, what: str) -> None:
    """Write the last global batch to SAVE/WHAT_iter_NNNNNNN.npz, for megatron_a2d.inspect_batch.

    With the checkpoint's weights it reproduces the step.
    """
    if not config.training.save or dist.get_rank() > 0:
        return
    first = config.batch_sizes.samples_before(state.iteration - 1)
    path = Path(config.training.save) / f"{what}_iter_{state.iteration:07d}.npz"
    try:
        write_batch(path, batches.samples(first, state.consumed_samples - first))
    except (OSError, UserError) as error:
        log.say(f"warning: {path}: the last batch could not be written ({error})")
        return
    log.say(
        f"the last batch is in {path}: tokens, labels, loss weights, times and sample indices, as the model saw them "
        f"(python -m megatron_a2d.inspect_batch {path})"
    )


def _validate(
    state: TrainState,
    config: RunConfig,
    model_config: ModelConfig,
    valid_data: dict[str, PackedDataset],
    log: RunLog,
) -> None:
    """One validation per source."""
    for source, dataset in valid_data.items():
        result = run_validation(state, config, model_config, dataset)
        log.validation(state.iteration, result, source if config.data.data_mixture else None)
