"""Models that conversion tests copy, and ways to damage the files of a copy.

A test file binds the fixture as its own (`models = model_damage.models`).
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_a2d.conversion.hf_to_torch_dist import convert
from tests import tiny

NAME = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """moe/ (sharded), dense/ (a single file) and the checkpoint of moe, ckpt/; tests copy them."""
    directory = tmp_path_factory.mktemp("models")
    tiny.write_hf(directory / "moe", "moe", max_shard_size="300KB")
    tiny.write_hf(directory / "dense", "dense")
    convert(directory / "moe", directory / "ckpt")
    return directory


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def edit_index(directory: Path, edit: Callable[[dict[str, str]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def remove(*paths: Path) -> None:
    for path in paths:
        path.unlink()


def edit_header(path: Path, edit: Callable[[dict], object]) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def duplicate(directory: Path) -> None:
    """The first shard's tensors once more, in a second file."""
    files = sorted(directory.glob("model-*.safetensors"))
    edit_index(directory, lambda weight_map: weight_map.update(extra="model-extra.safetensors"))
    shutil.copyfile(files[0], directory / "model-extra.safetensors")
