"""The model against Hugging Face's: logits position by position, and weights that come back bitwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_tools import convert_hf, export_hf
from tests.cases import Case
from tests.parity.pool import Pool
from tests.tiny import hf_model, write_hf

KINDS = ("dense", "dense_tied", "moe")
TOLERANCE = 1e-5
TOKENS = torch.randint(0, 250, (3, 48), generator=torch.Generator().manual_seed(0))


def hf_logits(kind: str, causal: bool) -> torch.Tensor:
    """transformers' logits; bidirectional by a 4D mask in which every entry is True."""
    mask = None if causal else torch.ones(3, 1, 48, 48, dtype=torch.bool)
    with torch.no_grad():
        return hf_model(kind)(TOKENS, attention_mask=mask, use_cache=False).logits


def our_logits(pool: Pool, case: Case, causal: bool, checkpoint: str | None = None) -> torch.Tensor:
    settings = {**case.settings, "objective": "ar" if causal else "mdlm"}
    return pool.run("logits", 1, checkpoint=checkpoint or case.checkpoint, settings=settings, tokens=TOKENS)[0]


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Over all positions and the whole vocabulary: never a mean."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_logits_equal_hugging_face(kind: str, causal: bool, cases: dict[str, Case], pool: Pool) -> None:
    assert largest_difference(our_logits(pool, cases[kind], causal), hf_logits(kind, causal)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_matters(kind: str, cases: dict[str, Case], pool: Pool) -> None:
    """Negative control: causal against bidirectional."""
    assert largest_difference(our_logits(pool, cases[kind], causal=True), hf_logits(kind, causal=False)) > 0.1


def test_unnormalised_top_k(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """norm_topk_prob false is a different model; treated as true it would fail."""
    write_hf(tmp_path / "hf", "moe", norm_topk_prob=False)
    convert_hf.main(["--hf-model", str(tmp_path / "hf"), "--out", str(tmp_path / "checkpoint")])
    ours = our_logits(pool, cases["moe"], causal=True, checkpoint=str(tmp_path / "checkpoint"))
    with torch.no_grad():
        theirs = hf_model("moe", norm_topk_prob=False)(TOKENS, use_cache=False).logits
    assert largest_difference(ours, theirs) < TOLERANCE
    assert largest_difference(ours, hf_logits("moe", causal=True)) > 0.01


@pytest.mark.parametrize("first, second", [("gate_proj", "up_proj"), ("k_proj", "v_proj"), ("q_norm", "k_norm")])
def test_swapped_weights_break_parity(
    first: str, second: str, cases: dict[str, Case], pool: Pool, tmp_path: Path
) -> None:
    """Negative controls of the comparison: two tensors of equal shape change places in one layer."""
    from safetensors.torch import save_file

    write_hf(tmp_path / "hf", "moe")
    path = tmp_path / "hf" / "model.safetensors"
    weights = load_file(path)
    for name in [name for name in weights if f".{first}." in name and name.startswith("model.layers.0.")]:
        other = name.replace(first, second)
        weights[name], weights[other] = weights[other].clone(), weights[name].clone()
    save_file(weights, path, metadata={"format": "pt"})
    convert_hf.main(["--hf-model", str(tmp_path / "hf"), "--out", str(tmp_path / "checkpoint")])
    ours = our_logits(pool, cases["moe"], causal=False, checkpoint=str(tmp_path / "checkpoint"))
    assert largest_difference(ours, hf_logits("moe", causal=False)) > 100 * TOLERANCE


ROUND_TRIPS: list[tuple[str, int, dict[str, Any]]] = [
    ("dense", 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    ("dense", 2, {"pipeline_model_parallel_size": 2}),
    ("dense_tied", 2, {"tensor_model_parallel_size": 2}),
    ("dense_tied", 2, {"pipeline_model_parallel_size": 2}),
    ("moe", 2, {"expert_model_parallel_size": 2, "use_distributed_optimizer": True}),
    ("moe", 4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 4}),
    ("moe", 4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
]


@pytest.mark.parametrize(("kind", "ranks", "layout"), ROUND_TRIPS)
def test_round_trip_is_bitwise(
    kind: str, ranks: int, layout: dict[str, Any], cases: dict[str, Case], pool: Pool, tmp_path: Path
) -> None:
    """HF -> torch_dist -> loaded and saved under a layout, optimizer included -> HF: every tensor bitwise equal."""
    case = cases[kind]
    pool.run(
        "convert_layout", ranks, checkpoint=case.checkpoint,
        settings={**case.settings, **layout, "save": str(tmp_path / "saved")},
    )  # fmt: skip
    arguments = ["--checkpoint", str(tmp_path / "saved"), "--out", str(tmp_path / "hf"), "--format", "qwen3"]
    export_hf.main([*arguments, "--allow-objective-mismatch"])  # the run's objective is diffusion
    before, after = ({**load_file(next(path.glob("*.safetensors")))} for path in (case.hf, tmp_path / "hf"))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
