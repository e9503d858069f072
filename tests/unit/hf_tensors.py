"""The tensors of a Hugging Face directory: read, compared bit by bit, stored with fused experts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory, by the safetensors library."""
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_bitwise_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, types and bits: NaN equals itself, and -0 is not 0."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def fuse_experts(directory: Path) -> None:
    """Store experts as transformers 5 holds them in memory: gate_up_proj [experts, 2 * intermediate, hidden]
    and down_proj [experts, hidden, intermediate], one tensor of each a layer.
    """
    tensors = tensors_of(directory)
    for path in directory.glob("model*.safetensors*"):
        path.unlink()
    config = json.loads((directory / "config.json").read_text())
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts"
        gates, ups, downs = (
            torch.stack([tensors.pop(f"{prefix}.{e}.{name}_proj.weight") for e in range(config["num_experts"])])
            for name in ("gate", "up", "down")
        )
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([gates, ups], dim=1)
        tensors[f"{prefix}.down_proj"] = downs
    save_file(tensors, directory / "model.safetensors")
