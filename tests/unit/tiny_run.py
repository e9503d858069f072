"""A tiny run's checkpoints, and an export of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from checkpoints_tools import export_hf
from megatron_a2d.config.settings import build
from megatron_a2d.conversion.hf_to_torch_dist import convert
from tests import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with iterations 10, 20 and 30: three different models, bf16; and hf_10, ... next to it."""
    root = tmp_path_factory.mktemp("run")
    settings = build(
        {"seq_length": 32, "lr": 1e-3, "lr_mult": {"mlp": 0.1}, "train_data_path": "secret_place/corpus_train"}
    )
    for number in (10, 20, 30):
        hf = tiny.write_hf(root / f"hf_{number}", "moe", torch.bfloat16, seed=number)
        (hf / "README.md").write_text("---\ntags:\n- x\nlicense: apache-2.0\n---\n# Tiny\n")
        convert(hf, root / f"ckpt_{number}", origin="Qwen/Tiny")
        directory = root / "run" / f"iter_{number:07d}"
        shutil.move(root / f"ckpt_{number}" / "release", directory)
        torch.save({"iteration": number, "consumed_samples": 8 * number}, directory / "common.pt")
        (directory / "run.json").write_text(json.dumps(settings.to_dict()))
    (root / "run" / "latest_checkpointed_iteration.txt").write_text("30\n")
    return root / "run"


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export_hf.main(["--checkpoint", str(run), "--out", str(out), "--format", "rnd1", "--max-shard-size", "400KB"])
    return out
