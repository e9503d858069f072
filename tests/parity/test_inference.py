"""Sampling and validation from a checkpoint on any layout, and from its export in one process: the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import export_hf
from megatron_a2d.config.settings import build
from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, make_canvas
from megatron_a2d.evaluation.heldout_nelbo import evaluate_sources, open_sources
from megatron_a2d.inference.hf_model import load_hf_model
from tests.cases import Case
from tests.parity.pool import Pool
from tests.tiny import MASK_TOKEN_ID

# -1: a hole. Rows of different lengths, one with two holes; 19 columns are no multiple of 2.
ROWS = [[5, 7, *[-1] * 17], [20, *[-1] * 6, 90, 91, *[-1] * 3], [100, 101, -1]]
OPTIONS: list[dict[str, Any]] = [
    {"num_steps": 5},
    {"sampler": "threshold", "threshold": 0.02, "block_length": 5, "temperature": 1.0, "cfg_scale": 0.5},
]
LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("dense", 1, {}),
    ("dense_tied", 2, {"pipeline_model_parallel_size": 2}),
    ("dense", 2, {"tensor_model_parallel_size": 2}),
    ("moe", 2, {"expert_model_parallel_size": 2}),
    ("moe", 4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "ranks", "layout"), LAYOUTS)
def test_every_layout_writes_the_same_text(
    kind: str, ranks: int, layout: dict[str, Any], cases: dict[str, Case], pool: Pool, tmp_path: Path
) -> None:
    export_hf.main(["--checkpoint", cases[kind].checkpoint, "--out", str(tmp_path / "export"), "--format", "a2d"])
    loaded = load_hf_model(tmp_path / "export")
    canvas = make_canvas([[MASK_TOKEN_ID if token < 0 else token for token in row] for row in ROWS], MASK_TOKEN_ID)
    for options in OPTIONS:
        alone = denoise(loaded.forward, canvas, MASK_TOKEN_ID, SamplingOptions(**options), seed=3)
        expected = {"tokens": alone.tokens.tolist(), "num_forwards": alone.num_forwards}
        assert len({tuple(row) for row in expected["tokens"]}) == len(ROWS)
        results = pool.run(
            "sample", ranks, checkpoint=cases[kind].checkpoint, layout=layout, options=options, rows=ROWS
        )
        assert results == [expected] * ranks


@pytest.mark.parametrize(
    ("kind", "layout"), [("dense", {"tensor_model_parallel_size": 2}), ("moe", {"expert_model_parallel_size": 2})]
)
def test_held_out_text_is_that_of_training(
    kind: str, layout: dict[str, Any], cases: dict[str, Case], pool: Pool, tmp_path: Path
) -> None:
    """The validation of a training run on two ranks, and `evaluate` on the export."""
    case = cases[kind]
    settings = {**case.settings, **layout, "eval_iters": 3}
    trained = pool.run("validate", 2, checkpoint=case.checkpoint, settings=settings)[0]
    export_hf.main(["--checkpoint", case.checkpoint, "--out", str(tmp_path / "export"), "--format", "a2d"])
    loaded = load_hf_model(tmp_path / "export")
    config = build({"seq_length": 32, "micro_batch_size": 5})
    sources = open_sources([case.settings["valid_data_path"]], 32, loaded.vocab_size)
    [result] = evaluate_sources(loaded, config, sources, trained["num_samples"]).values()
    assert result.to_dict() == pytest.approx(trained, abs=1e-5)
    [other] = evaluate_sources(loaded, config, sources, trained["num_samples"] - 1).values()
    assert other.nelbo.mean != pytest.approx(trained["nelbo"], abs=1e-5)
