"""The training loop: validation, training steps, logging, checkpoints, in the order in which they happen."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_a2d.checkpoint.directory import HF_FILES
from megatron_a2d.checkpoint.placement_file import ExpertPlacement
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig, TrainingConfig
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
from megatron_a2d.training.initialization import build_train_state, initialize_state
from megatron_a2d.training.interval_metrics import IntervalMetrics
from megatron_a2d.training.load_metrics import CrowdingDetector
from megatron_a2d.training.logger import RunLog
from megatron_a2d.training.loss_spikes import SpikeDetector
from megatron_a2d.training.manual_gc import ManualGC
from megatron_a2d.training.profiler import Profile
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
    # What the run consists of. Rank 0 has scanned the data files (startup_checks.py); reads check every token again.
    train_data, valid_data = open_datasets(config, model_config, start / HF_FILES, scan=False)
    state = build_train_state(model_config, config)
    if placement:
        state.place_experts(placement)
    training = config.training
    monitor = Monitor(config, model_config, state) if training.monitor else None
    # Drift is measured from the weights that the run began with. A resumed run reads those into the model first, and
    # `initialize_state` overwrites them with the checkpoint; for a new run they are what it leaves in the model.
    if monitor and not weights_only:
        monitor.remember_start_of(config)
    grafting = initialize_state(state, config, model_config, start, weights_only)
    if monitor and weights_only:
        monitor.remember_start()
    log = RunLog(config, state.iteration, enabled=dist.get_rank() == 0)
    batches = micro_batches(config, model_config, train_data, config.data.seed, state.consumed_samples)
    saves = CheckpointManager(config, start / HF_FILES, log)
    # Files with checksums are verified at every read; the others are scanned once in the background.
    files = [*train_data.files, *(dataset.file for dataset in valid_data.values())]
    scan = BackgroundScan([file for file in files if dist.get_rank() == 0 and file.needs_scan])
    interval_metrics, spikes = IntervalMetrics(config, model_config), SpikeDetector()
    crowding = CrowdingDetector(model_config.num_experts, model_config.num_experts_per_tok)
    requests, skipped = StopRequests(training), SkippedSteps(training.max_skipped_steps)
    profile = Profile(config, state, log)
    graphs, manual_gc = CudaGraphs(state, config), ManualGC(config.performance)
    hang_timeout = 60 * config.parallel.distributed_timeout_minutes
    end: tuple[str, int] | None = None
    try:
        # The log's head, and the validation that later ones are compared with.
        variables = environment.environment(config, environment.find_gpu())
        log.event("start", iteration=state.iteration, settings=config.to_dict(), environment=variables)
        if variables:
            log.say(f"environment: {environment.as_text(variables)}")
        for note in notes(config, model_config):
            log.say(note)
        if placement:
            log.say(placement.describe(config.parallel.expert_model_parallel_size))
        log.say(f"{'starting' if weights_only else 'resuming'} at iteration {state.iteration} from {start}")
        if state.iteration >= training.train_iters:
            log.say(f"the run is complete: --train-iters {training.train_iters}; raise it to continue")
        mark("first step", state.iteration, limit=hang_timeout)
        if state.iteration == 0:
            _validate(state, config, model_config, valid_data, log)
        interval_metrics.restart()
        while state.iteration < training.train_iters and end is None:
            mark("reading samples", state.iteration + 1, limit=hang_timeout)
            scan.check()  # raises what the background scan has found

            # One step: learning rate, micro-batches, forward and backward passes, update.
            # megatron's scheduler has a learning rate of 0 before its first step. Stepped before the update, iteration
            # n trains at warm-up's n-th rate; skipped updates count, so the schedule depends on the iteration alone.
            state.scheduler.step(1)
            graphs.before_step()
            grafts = grafting.is_active(state.iteration)
            observer = monitor if is_logged(training, state.iteration + 1) else None
            with profile.measure(state.iteration + 1), grafting.step(state):
                with phase("data"):
                    step_batches = [next(batches) for _ in range(batches.num_microbatches)]
                result = train_step(state.chunks, state.optimizer, step_batches, observer)
            interval_metrics.add(result, grafting.take_error() if grafts else None)
            first_sample = state.consumed_samples
            state.iteration += 1
            if state.balancing:
                state.balancing.anneal(state.iteration)
            state.consumed_samples += training.global_batch_size
            profile.after(state.iteration, log)
            manual_gc.after_step(state.iteration)

            # A gradient that is not finite: no rank has updated its weights, and too many such steps end the run.
            if skipped.add(result.grad_norm):
                culprits = process_groups.union(result.not_finite)
                log.skipped(state.iteration, first_sample, state.consumed_samples, culprits, skipped)
            end = requests.reason(state.iteration)
            if skipped.too_many:
                end = f"{skipped.in_a_row} steps in a row had a gradient that is not finite", NOT_FINITE
            last = state.iteration == training.train_iters or end is not None

            # Log, validate, save, each at its interval.
            if last or is_logged(training, state.iteration):
                values = interval_metrics.read(state) | (observer.read() if observer else {})
                log.train(state.iteration, values)
                if not grafts and spikes.is_spike(values["loss"]):
                    log.spike(state.iteration, values["loss"])
                if warning := crowding.check(values.get("moe")):
                    log.crowding(state.iteration, warning)
            if state.iteration % training.eval_interval == 0 or state.iteration == training.train_iters:
                _validate(state, config, model_config, valid_data, log)
            mark("checkpoint", limit=CHECKPOINTS)
            if training.save and (last or state.iteration % training.save_interval == 0):
                saves.save(state, last)
            else:
                saves.poll()
            interval_metrics.resume()
        if skipped.too_many:
            _write_last_batch(config.training, batches, state, log)
        reason, exit_code = end or ("complete", 0)
        log.event("end", iteration=state.iteration, reason=reason, exit_code=exit_code)
        if end:
            log.say(f"ended at iteration {state.iteration}: {reason}")
    finally:
        profile.close(log)
        manual_gc.close()
        batches.close()
        scan.close()
        log.close()
    return state, exit_code


def is_logged(training: TrainingConfig, iteration: int) -> bool:
    """Whether the iteration ends a log interval."""
    return iteration == training.train_iters or iteration % training.log_interval == 0


def _write_last_batch(training: TrainingConfig, batches: MicroBatches, state: TrainState, log: RunLog) -> None:
    """Write the last global batch to SAVE/not_finite_iter_NNNNNNN.npz.

    With the checkpoint's weights it reproduces the step whose gradient was not finite.
    """
    if not training.save or dist.get_rank() > 0:
        return
    size = training.global_batch_size
    path = Path(training.save) / f"not_finite_iter_{state.iteration:07d}.npz"
    try:
        write_batch(path, batches.samples(state.consumed_samples - size, size))
    except (OSError, UserError) as error:
        log.say(f"warning: {path}: the last batch could not be written ({error})")
        return
    log.say(
        f"the last batch is in {path}: tokens, labels, loss weights, times and sample indices, as the model saw them"
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
