"""Hugging Face directory -> torch_dist checkpoint, without building the model. Memory: a few slabs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_a2d.architecture import Architecture
from megatron_a2d.console import human, progress
from megatron_a2d.conversion.checkpoint import HF_FILES, RELEASE, TRACKER, copy_hf_files
from megatron_a2d.conversion.manifest import write_manifest
from megatron_a2d.conversion.mask_token import choose_mask_token
from megatron_a2d.conversion.rows import num_bytes
from megatron_a2d.conversion.sources import as_megatron, open_hf
from megatron_a2d.conversion.torch_dist import write_torch_dist
from megatron_a2d.errors import UserError
from megatron_a2d.files import new_directory, read_json, write_json


class Converted(NamedTuple):
    directory: Path
    architecture: Architecture
    num_bytes: int
    dtypes: set[torch.dtype]
    mask_token_id: int


def convert(
    hf: Path,
    out: Path,
    mask_token_id: int | None = None,
    dtype: torch.dtype | None = None,
    origin: str | None = None,
) -> Converted:
    """Write the model in `hf` as the release checkpoint `out`.

    `dtype` None keeps the types of the files. `origin`, a hub id, is remembered for model cards.
    Raises UserError, and leaves nothing behind, when a tensor or the mask token is not as it must be.
    """
    with open_hf(hf) as weights:
        config = read_json(hf / "config.json", "the model's configuration")
        config["mask_token_id"] = choose_mask_token(
            hf, weights.architecture.vocab_size, mask_token_id, weights.architecture.mask_token_id
        )
        if origin:
            config["_name_or_path"] = origin
        tensors = as_megatron(weights, dtype)
        size = num_bytes(tensors)
        check_space(out, size)
        with new_directory(out, "--out") as partial:
            (partial / RELEASE / HF_FILES).mkdir(parents=True)
            copy_hf_files(hf, partial / RELEASE / HF_FILES)
            write_json(partial / RELEASE / HF_FILES / "config.json", config)
            with progress("converting", size, "B") as advance:
                common = {"iteration": 0, "consumed_samples": 0}
                write_torch_dist(partial / RELEASE, tensors, weights.map, common, advance)
            write_manifest(partial / RELEASE)
            (partial / TRACKER).write_text(RELEASE + "\n", encoding="utf-8")
        dtypes = {tensors.dtype(key) for key in tensors.shapes}
        return Converted(out, weights.architecture, size, dtypes, config["mask_token_id"])


def check_space(out: Path, size: int) -> None:
    """UserError when the disk of the directory `out` cannot take `size` bytes."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(
            f"--out {out}: needs {human(size, 'B')} and its disk has {human(free, 'B')} left; choose another disk"
        )
