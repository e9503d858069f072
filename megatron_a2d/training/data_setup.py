"""Datasets and micro-batches of a training run, built from its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.config.skipped_samples import NONE_SKIPPED
from megatron_a2d.config.validate import NO_DATA
from megatron_a2d.conversion.end_tokens import read_end_tokens
from megatron_a2d.data.blended_dataset import MixedDataset, read_mixture
from megatron_a2d.data.dataloader import MicroBatches
from megatron_a2d.data.diffusion_samples import TextPairs, Texts, find_data_problems, make_sample
from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.data.tokenizer_fingerprint import find_foreign_tokens, vocabulary_of
from megatron_a2d.utils.errors import UserError

# Seed of validation's masks and sample order, independent of --seed: every validation uses the same samples.
VALIDATION_SEED = 0


def open_datasets(
    config: RunConfig, model_config: ModelConfig, hf_files: Path | None = None, scan: bool = True
) -> tuple[PackedDataset | MixedDataset, dict[str, PackedDataset]]:
    """Training data, and validation data by source name.

    Tokens are checked against the model's vocabulary and, with `hf_files`, against the tokenizer in that directory;
    `scan=False` skips the checks that read the files. UserError lists every problem.
    """
    data, training = config.data, config.training
    is_masked = config.diffusion.objective != "ar"
    checks: dict[str, Any] = {
        "vocab_size": model_config.vocab_size,
        "scan": scan,
        "mask_token_id": model_config.mask_token_id if is_masked else None,
        "eod_token_id": read_end_tokens(hf_files, model_config.vocab_size).document if hf_files else None,
    }
    train_data: PackedDataset | MixedDataset
    if data.data_mixture:
        sources = read_mixture(data.data_mixture)
        train_data = MixedDataset(sources, data.seq_length, seed=data.seed, **checks)
        train_data.check_epochs(config.num_texts)
        valid_paths = {source.name: source.valid_path for source in sources if source.valid_path}
    elif data.train_data_path:
        train_data = PackedDataset(data.train_data_path, data.seq_length, seed=data.seed, **checks)
        valid_paths = {"valid": data.valid_data_path} if data.valid_data_path else {}
    else:
        raise UserError(NO_DATA)
    # Shuffled with a fixed seed: the first samples are a sample of all documents, the same in every run.
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
    problems: list[str] = []
    if scan:
        problems += find_data_problems(config, train_data.files)
        # Held-out text that this project wrote may be one document; for another tool's files that is unknown.
        held_out = [dataset.file for dataset in valid_data.values() if not dataset.file.is_described]
        problems += find_data_problems(config, held_out)
    if scan and data.verify_tokenizer:
        problems += find_foreign_tokens(files, vocabulary_of(hf_files) if hf_files else None)
    if problems:
        raise UserError(problems)
    if data.train_data_fingerprint not in ("", found := train_data.fingerprint()):
        raise UserError(
            f"--train-data-fingerprint {data.train_data_fingerprint}: the training tokens and their weights have the "
            f"fingerprint {found}; restore the data, or start another run"
        )
    return train_data, valid_data


def micro_batches(
    config: RunConfig,
    model_config: ModelConfig,
    dataset: Texts,
    noise_seed: int,
    start_sample: int,
    for_training: bool = True,
) -> MicroBatches:
    """This rank's micro-batches, starting after `start_sample` samples.

    `for_training=False` makes validation samples (see make_sample), of which none is skipped.
    """
    if for_training and config.diffusion.complementary_masks:
        dataset = TextPairs(dataset)
    return MicroBatches(
        dataset,
        make_sample(config, model_config, dataset, noise_seed, for_training),
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        start_sample=start_sample,
        num_workers=config.data.num_workers,
        skipped=config.skipped if for_training else NONE_SKIPPED,
    )
