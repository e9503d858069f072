"""What the tests of parity and faults train on, and settings of experts that several tests name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_a2d.checkpoint.directory import RUN_CONFIG, TRACKER, resolve
from megatron_a2d.config.settings import build

# Objectives and conversions, on the MoE model; the rest of them stays as it is.
VARIANTS: dict[str, dict[str, Any]] = {
    "annealing": {"conversion": "annealing", "attention_annealing_iters": 5},
    "random": {"conversion": "random"},
    "cart": {"loss_weighting": "cart", "label_shift": False},
    "uniform": {"loss_weighting": "uniform", "reset_attention_mask": True},
    "grafting": {"conversion": "grafting", "grafting_iters": 2},
    "block": {"objective": "block", "block_length": 6},
    "block + ar": {"objective": "block", "block_length": 6, "ar_loss_weight": 0.5, "reset_attention_mask": True},
    "served blocks": {
        "objective": "block",
        "block_length": 6,
        "block_length_schedule": "2:1",
        "label_shift": False,
        "complementary_masks": True,
        "reset_block_grid": True,
        "reset_attention_mask": True,
        "reset_position_ids": True,
    },
    "frozen": {"lr_mult": {"attention": 1.0, "mlp": 0.5, "embedding": 0.0, "router": 0.0, "norm": 0.0}},
}

# Heads and layers are so that no block of 128 is cut by tensor parallelism.
WIDE: dict[str, Any] = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 2,
}  # fmt: skip

EP = {"expert_model_parallel_size": 2}
HYBRIDEP = {"bf16": True, **EP, "moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"}
FUSED_EXPERTS = {"bf16": True, "use_transformer_engine_op_fuser": True}
BUDGETED = {**HYBRIDEP, **FUSED_EXPERTS, "moe_expert_rank_capacity_factor": 1.5}


class Case(NamedTuple):
    """A model before and after conversion, and data of its vocabulary."""

    hf: Path
    checkpoint: str
    settings: dict[str, str]


def copy_of(trained: dict[str, Any], tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a copy of the run."""
    shutil.copytree(trained["settings"]["save"], tmp_path / "run")
    return {**trained["settings"], "save": str(tmp_path / "run"), **changes}


def as_trained(checkpoint: str | Path, run: Path, settings: dict[str, Any]) -> Path:
    """A run's directory with a copy of a converted checkpoint, as if it had been trained with these settings."""
    directory = run / "iter_0000010"
    shutil.copytree(resolve(checkpoint), directory)
    torch.save({"iteration": 10, "consumed_samples": 80}, directory / "common.pt")
    (directory / RUN_CONFIG).write_text(json.dumps(build(settings).to_dict()))
    (directory / "manifest.json").unlink()
    (run / TRACKER).write_text("10\n")
    return run
