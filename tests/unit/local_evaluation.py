"""Small local evaluations: the models that are evaluated, and the command that evaluates them.

A test file binds the fixture as its own (`models = local_evaluation.models`): a Qwen3 of a few layers, converted and exported
once per file.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints_tools import convert_hf, export_hf
from megatron_a2d import evaluate
from tests.tiny import write_hf, write_tokens

# Settings of the published tasks; local/ holds small tasks of every kind.
LOCAL = Path(__file__).resolve().parents[2] / "launch" / "eval"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A Qwen3 before conversion, the same as a diffusion export, and held-out tokens."""
    root = tmp_path_factory.mktemp("evaluate")
    write_hf(root / "qwen3", "dense")
    convert_hf.main(["--hf-model", str(root / "qwen3"), "--out", str(root / "checkpoint")])
    export_hf.main(["--checkpoint", str(root / "checkpoint"), "--out", str(root / "export"), "--format", "a2d"])
    write_tokens(root / "code", 30, 250, seed=1)
    write_tokens(root / "web", 20, 200, seed=2)
    return {name: root / name for name in ("qwen3", "export", "checkpoint", "code", "web")}


def run(models: dict[str, Path], out: Path, *arguments: str, model: str = "export") -> dict:
    """What `python -m megatron_a2d.evaluate` leaves in `out`/results.json.

    model: which of `models` is evaluated; arguments: the flags but for --model and --out.
    """
    evaluate.main(["--model", str(models[model]), "--out", str(out), *arguments])
    return json.loads((out / "results.json").read_text())
