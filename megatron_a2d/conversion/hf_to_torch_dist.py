"""Conversion of an HF directory to a torch_dist checkpoint, without building a model. Memory: a few slabs per worker.

`write_release` serves other sources too (megatron_to_torch_dist.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_a2d import __version__
from megatron_a2d.checkpoint.bridge_config import write_run_config
from megatron_a2d.checkpoint.directory import HF_FILES, RELEASE, TRACKER, copy_hf_files, read_license
from megatron_a2d.checkpoint.manifest import write_manifest
from megatron_a2d.checkpoint.tensor_rows import FiniteCheck, num_bytes
from megatron_a2d.checkpoint.training_facts import read_trained
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.conversion.compare_weights import Comparison
from megatron_a2d.conversion.end_tokens import read_end_tokens
from megatron_a2d.conversion.hf_config import AuxLossCoefficient, aux_loss_coefficient
from megatron_a2d.conversion.mask_token import choose_mask_token
from megatron_a2d.conversion.read_back import Check, ReadBack, RecordedRows, only_compare
from megatron_a2d.conversion.resumable_output import describe_files, num_bytes_written, resumable_directory
from megatron_a2d.conversion.sources import Weights, as_megatron, open_checkpoint, open_hf
from megatron_a2d.conversion.torch_dist_writer import write_torch_dist
from megatron_a2d.conversion.weight_map import EMBEDDING
from megatron_a2d.conversion.workers import DEFAULT_WORKERS
from megatron_a2d.families.registry import kind_of, read_config
from megatron_a2d.terminal.console import human, progress
from megatron_a2d.utils.atomic_write import check_new_directory, write_json
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.vocabulary_files import has_vocabulary_files, tokenizer_of


class Converted(NamedTuple):
    directory: Path
    model_config: ModelConfig
    num_bytes: int
    dtypes: set[torch.dtype]
    mask_token_id: int
    comparison: Comparison | None  # of the source with the checkpoint; None without `verify`
    aux_loss_coeff: AuxLossCoefficient | None  # None without one in the source
    mask_text: str | None  # the mask token's text, if it is a token of ordinary text


class Options(NamedTuple):
    """How a checkpoint is written. `dtype` None keeps the dtypes of the source. With `verify` `check` reads the output
    back and compares it before it is renamed to its name."""

    dtype: torch.dtype | None = None
    workers: int = DEFAULT_WORKERS
    allow_nonfinite: bool = False
    verify: bool = True
    check: Check = only_compare


def convert(
    hf: Path,
    out: Path,
    mask_token_id: int | None = None,
    dtype: torch.dtype | None = None,
    origin: str | None = None,
    workers: int = DEFAULT_WORKERS,
    allow_nonfinite: bool = False,
    verify: bool = True,
    check: Check = only_compare,
) -> Converted:
    """Write the model in `hf` as the release checkpoint `out`.

    `origin`, a hub id, is recorded for model cards. Raises UserError, and leaves nothing behind, if a tensor or the
    mask token is invalid; an interrupted run is resumed by the next one.
    """
    check_new_directory(out, "--out")
    with open_hf(hf, check_values=not allow_nonfinite) as weights:
        config = read_config(hf)
        check_mask_token(hf, mask_token_id, weights.model_config.mask_token_id)
        config["mask_token_id"] = choose_mask_token(
            hf, weights.model_config.vocab_size, mask_token_id, weights.model_config.mask_token_id
        )
        if origin:
            config["_name_or_path"] = origin
        if license_name := read_license(hf):
            config["_license"] = license_name
        return write_release(weights, config, hf, out, Options(dtype, workers, allow_nonfinite, verify, check))


def write_release(
    weights: Weights, config: dict[str, Any], hf_files: Path | None, out: Path, options: Options
) -> Converted:
    """Write `weights` as the release checkpoint `out`, with `config` as its config.json.

    `hf_files`: the directory of tokenizer and generation config. Raises UserError, and leaves nothing behind, as
    `convert` does.
    """
    source, dtype, mask = weights.directory, options.dtype, config["mask_token_id"]
    _check_end(hf_files or source, config, weights.model_config.vocab_size, mask)
    checked = FiniteCheck(weights.tensors)
    recorded = RecordedRows(checked, dtype)
    tensors = as_megatron(weights._replace(tensors=recorded if options.verify else checked), dtype)
    size = num_bytes(tensors)
    check_space(out, size)
    identity = {
        "version": __version__,
        "config": config,
        "options": [str(dtype), options.allow_nonfinite],
        "source": describe_files(source),
    }
    with resumable_directory(out, "--out", identity) as work:
        work.may_keep = lambda: options.allow_nonfinite or not checked.non_finite
        release = work.directory / RELEASE
        (release / HF_FILES).mkdir(parents=True, exist_ok=True)
        with progress("converting", size, "B", work.num_bytes_done()) as advance:
            common = {"iteration": 0, "consumed_samples": 0}
            entries = write_torch_dist(work, RELEASE, tensors, weights.map, common, advance, options.workers)
        if not options.allow_nonfinite and (problems := checked.problems(source)):
            raise UserError(problems)
        if hf_files:
            copy_hf_files(hf_files, release / HF_FILES)
            if has_vocabulary_files(hf_files):
                tokenizer_of(hf_files).save(str(release / HF_FILES / "tokenizer.json"))
        write_json(release / HF_FILES / "config.json", config)
        write_run_config(release, release / HF_FILES, tensors.dtype(EMBEDDING))
        write_manifest(release, entries)
        (work.directory / TRACKER).write_text(RELEASE + "\n", encoding="utf-8")
        comparison = None
        if options.verify:
            with open_checkpoint(release, from_disk=True) as written:
                comparison = options.check(ReadBack(recorded, weights, written, options.workers))
    dtypes = {tensors.dtype(key) for key in tensors.shapes}
    coefficient = aux_loss_coefficient(config, weights.model_config)
    return Converted(out, weights.model_config, size, dtypes, mask, comparison, coefficient, _mask_text(config))


def _mask_text(config: dict[str, Any]) -> str | None:
    """The text of the mask token, if it is a token that also occurs in text."""
    diffusion = kind_of(config, "config.json").family.diffusion
    return diffusion.mask_token if diffusion else None


def check_mask_token(hf: Path, requested: int | None, configured: int | None) -> None:
    """UserError if the requested mask token differs from the one a diffusion model was trained with."""
    if read_trained(hf).is_diffusion and requested is not None and configured not in (None, requested):
        raise UserError(
            f"--mask-token-id {requested}: {hf} was trained with {configured} (its config.json); leave the flag out"
        )


def _check_end(hf: Path, config: dict[str, Any], vocab_size: int, mask: int) -> None:
    """UserError if the mask token is also an end token, as in tokenizers that declare their end token as the mask."""
    if mask in read_end_tokens(hf, vocab_size, config).ids:
        raise UserError(
            f"{hf}: its mask token, {mask}, is also an end-of-text token; give an unused id with --mask-token-id"
        )


def check_space(out: Path, size: int) -> None:
    """UserError if the disk of `out` has no space for `size` bytes, less what an interrupted run wrote."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size - num_bytes_written(out):
        raise UserError(
            f"--out {out}: needs {human(size, 'B')} and its disk has {human(free, 'B')} left; choose another disk"
        )
