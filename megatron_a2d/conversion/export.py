"""torch_dist checkpoint, in any layout -> Hugging Face directory. Memory: a few slabs."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_a2d.console import progress
from megatron_a2d.conversion.checkpoint import HF_FILES, RUN_CONFIG, copy_hf_files, iteration_of
from megatron_a2d.conversion.compare import compare_weights
from megatron_a2d.conversion.convert import check_space
from megatron_a2d.conversion.hf_config import Exported, Format, config_json, generation_json, refusals
from megatron_a2d.conversion.model_card import model_card
from megatron_a2d.conversion.rows import num_bytes
from megatron_a2d.conversion.safetensors_files import write_safetensors
from megatron_a2d.conversion.sources import EMBEDDING, as_type, open_checkpoint, open_hf
from megatron_a2d.conversion.torch_dist_reader import read_common
from megatron_a2d.errors import UserError
from megatron_a2d.files import new_directory, read_json, write_json

SUMS = "SHA256SUMS"


class Written(NamedTuple):
    directory: Path
    iteration: int
    num_parameters: int
    num_bytes: int
    verified: bool


def export(
    checkpoint: Path,
    out: Path,
    kind: Format,
    travelling: Sequence[Path] = (),
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> Written:
    """Write the latest iteration of `checkpoint` (or the one it names) as the Hugging Face directory `out`.

    `travelling` are the python files that the format's auto_map names. With `verify` what was written is
    read back and compared, before it gets its final name. Raises UserError and leaves nothing behind.
    """
    with open_checkpoint(checkpoint) as weights:
        tensors = as_type(weights, dtype)
        run = weights.directory / RUN_CONFIG
        settings = read_json(run, "the run's configuration") if run.exists() else {}
        model = Exported(
            weights.architecture,
            read_json(weights.directory / HF_FILES / "config.json", "the model's configuration"),
            _optional(weights.directory / HF_FILES / "generation_config.json"),
            str(tensors.dtype(EMBEDDING)).removeprefix("torch."),
            bool(settings.get("label_shift", True)),
        )
        if problems := refusals(kind, model):
            raise UserError(problems)
        card = model_card(kind, model, iteration_of(weights.directory), read_common(weights.directory), settings)
        size = num_bytes(tensors)
        check_space(out, size)
        with new_directory(out, "--out") as partial:
            copy_hf_files(weights.directory / HF_FILES, partial)
            for file in travelling:
                shutil.copyfile(file, partial / file.name)
            write_json(partial / "config.json", config_json(kind, model))
            if generation := generation_json(kind, model):
                write_json(partial / "generation_config.json", generation)
            (partial / "README.md").write_text(card, encoding="utf-8")
            with progress("exporting", size, "B") as advance:
                digests = write_safetensors(partial, tensors, max_shard_bytes, advance)
            _write_sums(partial, digests)
            if verify:
                with open_hf(partial) as written, progress("verifying", weights.num_bytes(), "B") as advance:
                    compare_weights(weights, written, advance)
        return Written(out, iteration_of(weights.directory), weights.architecture.num_parameters(), size, verify)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path, "the generation configuration") if path.exists() else {}


def _write_sums(directory: Path, digests: dict[str, str]) -> None:
    """A SHA256SUMS of all files, for `sha256sum -c`; `digests` are those already known."""
    lines = []
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            digest = digests.get(name) or hashlib.sha256(path.read_bytes()).hexdigest()
            lines.append(f"{digest}  {name}\n")
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")
