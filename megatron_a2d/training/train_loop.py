"""The training loop, and the few lines that build what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_a2d.checkpoint.directory import HF_FILES
from megatron_a2d.config.model_config import Architecture
from megatron_a2d.config.settings import RunConfig, TrainingConfig
from megatron_a2d.config.validate import NO_DATA
from megatron_a2d.conversion.end_tokens import read_end_tokens
from megatron_a2d.data.background_scan import BackgroundScan
from megatron_a2d.data.blended_dataset import MixedDataset, read_mixture
from megatron_a2d.data.dataloader import MicroBatches, write_batch
from megatron_a2d.data.diffusion_samples import find_data_problems, make_sample
from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.data.tokenizer_fingerprint import find_foreign_tokens, vocabulary_of
from megatron_a2d.distributed import environment, process_groups
from megatron_a2d.distributed.hang_watchdog import CHECKPOINTS, mark
from megatron_a2d.model.layer_specs import notes
from megatron_a2d.training.checkpointing import SaveSchedule
from megatron_a2d.training.cuda_graphs import LayerGraphs
from megatron_a2d.training.initialization import begin
from megatron_a2d.training.interval_metrics import Meter
from megatron_a2d.training.logger import RunLog
from megatron_a2d.training.manual_gc import Garbage
from megatron_a2d.training.monitor import Monitor
from megatron_a2d.training.profiler import Profile
from megatron_a2d.training.stop_conditions import SkippedSteps, SpikeDetector, StopRequests
from megatron_a2d.training.train_state import TrainState, build_train_state
from megatron_a2d.training.train_step import train_step
from megatron_a2d.training.validation import VALIDATION_SEED, ValidationResult, validate
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.exit_codes import NOT_FINITE


def train(config: RunConfig, architecture: Architecture, start: Path, weights_only: bool) -> tuple[TrainState, int]:
    """Train from the checkpoint directory `start`; returns the state and the exit code (stop_conditions.py).
    Collective."""
    # Scanned by the first rank before the run (train.py); every token is checked again when it is read.
    train_data, valid_data = open_datasets(config, architecture, start / HF_FILES, scan=False)
    state = build_train_state(architecture, config)
    training = config.training
    monitor = Monitor(config, architecture, state) if training.monitor else None
    if monitor and not weights_only:
        monitor.remember_start_of(config)
    grafting = begin(state, config, architecture, start, weights_only)
    if monitor and weights_only:
        monitor.remember_start()
    log = RunLog(config, state.iteration, enabled=dist.get_rank() == 0)
    batches = micro_batches(config, architecture, train_data, config.data.seed, state.consumed_samples)
    saves = SaveSchedule(config, start / HF_FILES, log)
    # What has checksums is checked at every read; the rest is looked through once, while the run goes on.
    files = [*train_data.files, *(dataset.file for dataset in valid_data.values())]
    scan = BackgroundScan([file for file in files if dist.get_rank() == 0 and file.needs_scan])
    meter, spikes = Meter(config, architecture), SpikeDetector()
    requests, skipped = StopRequests(training), SkippedSteps(training.max_skipped_steps)
    profile = Profile(config, state, log)
    shape = (training.micro_batch_size, config.input_length)
    graphs, garbage = LayerGraphs(state, config), Garbage(config.performance)
    patience = 60 * config.parallel.distributed_timeout_minutes
    end: tuple[str, int] | None = None
    try:
        variables = environment.environment(config, environment.find_gpu())
        log.event("start", iteration=state.iteration, settings=config.to_dict(), environment=variables)
        if variables:
            log.say(f"environment: {environment.as_text(variables)}")
        for note in notes(config, architecture):
            log.say(note)
        log.say(f"{'starting' if weights_only else 'resuming'} at iteration {state.iteration} from {start}")
        if state.iteration >= training.train_iters:
            log.say(f"the run is complete: --train-iters {training.train_iters}; raise it to go on")
        mark("first step", state.iteration, limit=patience)
        if state.iteration == 0:
            _validate(state, config, architecture, valid_data, log)
        meter.restart()
        while state.iteration < training.train_iters and end is None:
            mark("reading samples", state.iteration + 1, limit=patience)
            scan.check()
            state.scheduler.step(1)
            graphs.before_step()
            grafts = grafting.is_active(state.iteration)
            observer = monitor if is_logged(training, state.iteration + 1) else None
            with profile.measure(state.iteration + 1), grafting.step(state):
                result = train_step(state.chunks, state.optimizer, batches, batches.num_microbatches, shape, observer)
            grafting.add_error(result.totals)
            first_sample = state.consumed_samples
            state.iteration += 1
            state.consumed_samples += training.global_batch_size
            meter.add(result, grafts)
            profile.after(state.iteration, log)
            garbage.after_step(state.iteration)
            if skipped.add(result.grad_norm):
                culprits = process_groups.union(result.not_finite)
                log.skipped(state.iteration, first_sample, state.consumed_samples, culprits, skipped)
            end = requests.reason(state.iteration)
            if skipped.too_many:
                end = f"{skipped.in_a_row} steps in a row had a gradient that is not finite", NOT_FINITE
            last = state.iteration == training.train_iters or end is not None
            if last or is_logged(training, state.iteration):
                values = meter.read(state) | (observer.read() if observer else {})
                log.train(state.iteration, values)
                if not grafts and spikes.is_spike(values["loss"]):
                    log.spike(state.iteration, values["loss"])
            if state.iteration % training.eval_interval == 0 or state.iteration == training.train_iters:
                _validate(state, config, architecture, valid_data, log)
            mark("checkpoint", limit=CHECKPOINTS)
            if training.save and (last or state.iteration % training.save_interval == 0):
                saves.save(state, last)
            else:
                saves.poll()
            meter.resume()
        if skipped.too_many:
            _keep_batch(config.training, batches, state, log)
        reason, exit_code = end or ("complete", 0)
        log.event("end", iteration=state.iteration, reason=reason, exit_code=exit_code)
        if end:
            log.say(f"ended at iteration {state.iteration}: {reason}")
    finally:
        profile.close(log)
        garbage.close()
        batches.close()
        scan.close()
        log.close()
    return state, exit_code


def is_logged(training: TrainingConfig, iteration: int) -> bool:
    """Whether the iteration ends a log interval; known before it is run."""
    return iteration == training.train_iters or iteration % training.log_interval == 0


def _keep_batch(training: TrainingConfig, batches: MicroBatches, state: TrainState, log: RunLog) -> None:
    """Keep the last global batch: the checkpoint's weights and this batch are all that its step depends on."""
    if not training.save or dist.get_rank() > 0:
        return
    size = training.global_batch_size
    path = Path(training.save) / f"not_finite_iter_{state.iteration:07d}.npz"
    try:
        write_batch(path, batches.samples(state.consumed_samples - size, size))
    except (OSError, UserError) as error:
        log.say(f"warning: {path}: its batch could not be kept ({error})")
        return
    log.say(f"its batch is in {path}: tokens, labels, weights, times and sample indices, as the model saw them")


def open_datasets(
    config: RunConfig, architecture: Architecture, hf_files: Path | None = None, scan: bool = True
) -> tuple[PackedDataset | MixedDataset, dict[str, PackedDataset]]:
    """Training data, and validation data by the name of its source, checked against the model's vocabulary and, where
    the directory of its tokenizer is given, against that."""
    data, training = config.data, config.training
    is_masked = config.diffusion.objective != "ar"
    checks: dict[str, Any] = {
        "vocab_size": architecture.vocab_size,
        "scan": scan,
        "mask_token_id": architecture.mask_token_id if is_masked else None,
        "eod_token_id": read_end_tokens(hf_files, architecture.vocab_size).document if hf_files else None,
    }
    train_data: PackedDataset | MixedDataset
    if data.data_mixture:
        sources = read_mixture(data.data_mixture)
        train_data = MixedDataset(sources, data.seq_length, seed=data.seed, **checks)
        train_data.check_epochs(training.train_iters * training.global_batch_size)
        valid_paths = {source.name: source.valid_path for source in sources if source.valid_path}
    elif data.train_data_path:
        train_data = PackedDataset(data.train_data_path, data.seq_length, seed=data.seed, **checks)
        valid_paths = {"valid": data.valid_data_path} if data.valid_data_path else {}
    else:
        raise UserError(NO_DATA)
    # One fixed order: the first samples of it stand for all documents, whatever --seed a run has.
    valid_data = {
        name: PackedDataset(path, data.seq_length, seed=VALIDATION_SEED, **checks) for name, path in valid_paths.items()
    }
    for dataset in valid_data.values():
        if dataset.num_samples < training.global_batch_size:
            raise UserError(
                f"--valid-data-path {dataset.file.prefix}: its {dataset.num_samples} samples of --seq-length "
                f"{data.seq_length} do not fill one --global-batch-size {training.global_batch_size}; hold out more"
            )
    files = [*train_data.files, *(dataset.file for dataset in valid_data.values())]
    problems = []
    if scan:
        problems += find_data_problems(config, train_data.files)
        # Held-out text of ours may be one document; of another tool's it cannot be told.
        held_out = [dataset.file for dataset in valid_data.values() if not dataset.file.is_described]
        problems += find_data_problems(config, held_out)
    if scan and data.verify_tokenizer:
        problems += find_foreign_tokens(files, vocabulary_of(hf_files) if hf_files else None)
    if problems:
        raise UserError(problems)
    if data.train_data_fingerprint not in ("", found := train_data.fingerprint()):
        raise UserError(
            f"--train-data-fingerprint {data.train_data_fingerprint}: the training tokens and their weights are "
            f"another's, {found}; restore the data, or start another run"
        )
    return train_data, valid_data


def micro_batches(
    config: RunConfig,
    architecture: Architecture,
    dataset: PackedDataset | MixedDataset,
    noise_seed: int,
    start_sample: int,
    for_training: bool = True,
) -> MicroBatches:
    """This rank's micro-batches, from the sample with the global index `start_sample` on.

    `for_training`: not for a validation (see make_sample).
    """
    return MicroBatches(
        dataset,
        make_sample(config, architecture, dataset, noise_seed, for_training),
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        start_sample=start_sample,
        num_workers=config.data.num_workers,
    )


def run_validation(
    state: TrainState, config: RunConfig, architecture: Architecture, valid_data: PackedDataset
) -> ValidationResult:
    """--eval-iters global batches, or as many as the held-out data fills."""
    batch_size = config.training.global_batch_size
    num_samples = min(config.training.eval_iters, valid_data.num_samples // batch_size) * batch_size
    shape = (config.training.micro_batch_size, config.input_length)
    state.gather_parameters()
    with micro_batches(config, architecture, valid_data, VALIDATION_SEED, 0, for_training=False) as batches:
        return validate(state.chunks, batches, num_samples, batches.num_microbatches, shape)


def _validate(
    state: TrainState,
    config: RunConfig,
    architecture: Architecture,
    valid_data: dict[str, PackedDataset],
    log: RunLog,
) -> None:
    """One validation for each source."""
    for source, dataset in valid_data.items():
        result = run_validation(state, config, architecture, dataset)
        log.validation(state.iteration, result, source if config.data.data_mixture else None)
