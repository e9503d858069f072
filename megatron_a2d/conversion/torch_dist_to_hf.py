"""Export of a torch_dist checkpoint, saved in any layout, to an HF directory. Memory: a few slabs per worker."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_a2d import __version__
from megatron_a2d.checkpoint.directory import HF_FILES, RUN_CONFIG, copy_hf_files, iteration_of
from megatron_a2d.checkpoint.tensor_rows import FiniteCheck, num_bytes
from megatron_a2d.checkpoint.torch_dist_reader import read_common
from megatron_a2d.checkpoint.training_facts import read_trained
from megatron_a2d.config.renamed import recorded_settings
from megatron_a2d.conversion.compare_weights import Comparison
from megatron_a2d.conversion.end_tokens import read_end_tokens
from megatron_a2d.conversion.hf_config import (
    SDAR_MASK_TOKEN,
    Exported,
    Format,
    config_json,
    generation_json,
    refusals,
)
from megatron_a2d.conversion.hf_to_torch_dist import check_space
from megatron_a2d.conversion.mask_token import MASK_TOKEN
from megatron_a2d.conversion.mask_token_registration import register_mask_token
from megatron_a2d.conversion.model_card import SGLANG_CONFIG, Origin, model_card, sglang_config
from megatron_a2d.conversion.public_form import leave_out_tokenizer_code, refer_to_tokenizer_code
from megatron_a2d.conversion.read_back import Check, ReadBack, RecordedRows, only_compare
from megatron_a2d.conversion.resumable_output import JOURNAL, describe_files, resumable_directory
from megatron_a2d.conversion.safetensors_files import write_safetensors
from megatron_a2d.conversion.sources import EMBEDDING, Weights, as_type, open_checkpoint, open_hf, renamed, untied
from megatron_a2d.conversion.workers import DEFAULT_WORKERS
from megatron_a2d.families.registry import family_of_format
from megatron_a2d.terminal.console import progress
from megatron_a2d.utils.atomic_write import check_new_directory, read_json, write_json
from megatron_a2d.utils.errors import UserError

SUMS = "SHA256SUMS"


class Written(NamedTuple):
    directory: Path
    iteration: int
    num_parameters: int
    num_bytes: int
    comparison: Comparison | None  # of the checkpoint with the export; None without `verify`


def export(
    checkpoint: Path,
    out: Path,
    kind: Format,
    code_files: Sequence[Path] = (),
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    workers: int = DEFAULT_WORKERS,
    allow_nonfinite: bool = False,
    evaluation: dict[str, Any] | None = None,
    allow_objective_mismatch: bool = False,
    check: Check = only_compare,
) -> Written:
    """Write the latest iteration of `checkpoint` (or the iteration it points to) as the HF directory `out`.

    `code_files` are the Python files of the format's auto_map. `evaluation` is shown in the model card.
    `allow_objective_mismatch` permits a format that the model was not trained for. With `verify` `check` reads the
    output back and compares it before it is renamed to `out`. Raises UserError and leaves nothing behind; an
    interrupted run is resumed by the next one.
    """
    check_new_directory(out, "--out")
    with open_checkpoint(checkpoint) as weights:
        if kind == "sdar":
            weights = untied(weights)
        checked = FiniteCheck(weights.tensors)
        recorded = RecordedRows(checked, dtype)
        tensors = recorded if verify else as_type(weights._replace(tensors=checked), dtype)
        model, origin = _describe(weights, str(tensors.dtype(EMBEDDING)).removeprefix("torch."))
        if problems := refusals(kind, model, allow_objective_mismatch):
            raise UserError(problems)
        family = family_of_format(kind)
        assert family is not None, kind
        tensors = renamed(tensors, weights.model_config, family.tensor_names)
        size = num_bytes(tensors)
        check_space(out, size)
        options = [kind, str(dtype), max_shard_bytes, evaluation, allow_nonfinite]
        identity = {"version": __version__, "options": options, "source": describe_files(weights.directory)}
        with resumable_directory(out, "--out", identity) as work:
            work.may_keep = lambda: allow_nonfinite or not checked.non_finite
            with progress("exporting", size, "B", work.num_bytes_done()) as advance:
                digests = write_safetensors(work, tensors, max_shard_bytes, advance, workers)
            if not allow_nonfinite and (problems := checked.problems(weights.directory)):
                raise UserError(problems)
            copy_hf_files(weights.directory / HF_FILES, work.directory)
            config = config_json(kind, model)
            if config.get("mask_token_id") is not None:
                register_mask_token(
                    work.directory, config["mask_token_id"], SDAR_MASK_TOKEN if kind == "sdar" else MASK_TOKEN
                )
            if family.code is not None:
                refer_to_tokenizer_code(work.directory, family.code)
            else:
                leave_out_tokenizer_code(work.directory)
            for file in code_files:
                shutil.copyfile(file, work.directory / file.name)
            write_json(work.directory / "config.json", config)
            if generation := generation_json(kind, model):
                write_json(work.directory / "generation_config.json", generation)
            card = model_card(kind, model, origin, evaluation)
            (work.directory / "README.md").write_text(card, encoding="utf-8")
            if kind == "sdar":
                (work.directory / SGLANG_CONFIG).write_text(sglang_config(model), encoding="utf-8")
            _write_sums(work.directory, digests)
            comparison = None
            if verify:
                with open_hf(work.directory, from_disk=True) as written:
                    comparison = check(ReadBack(recorded, weights, written, workers))
        return Written(out, origin.iteration, weights.model_config.num_parameters(), size, comparison)


def _describe(weights: Weights, dtype: str) -> tuple[Exported, Origin]:
    """The inputs of the export's config.json and model card, from the checkpoint's small files."""
    run = weights.directory / RUN_CONFIG
    settings = read_json(run, "the run's configuration") if run.exists() else {}
    if unusable := {"label_shift", "block_length"} & set(recorded_settings(settings)[1]):
        raise UserError(
            f"{run}: holds no usable {', '.join(sorted(unusable))}, which the export records; restore the file"
        )
    hf = weights.directory / HF_FILES
    model = Exported(
        weights.model_config,
        read_json(hf / "config.json", "the model's configuration"),
        _optional(hf / "generation_config.json"),
        dtype,
        read_trained(weights.directory),
        read_end_tokens(hf, weights.model_config.vocab_size),
    )
    common = read_common(weights.directory)
    averaged = common.get("averaged_iterations", ())
    return model, Origin(iteration_of(weights.directory), common.get("consumed_samples"), settings, averaged)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path, "the generation configuration") if path.exists() else {}


def _write_sums(directory: Path, digests: dict[str, str]) -> None:
    """Write SHA256SUMS of all files, for `sha256sum -c`; `digests` are the ones already computed."""
    lines = []
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != JOURNAL:
            name = path.relative_to(directory).as_posix()
            digest = digests.get(name) or hashlib.sha256(path.read_bytes()).hexdigest()
            lines.append(f"{digest}  {name}\n")
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")
