"""The tolerance of `verify`: two orders of the same sums lie within it, a small error of one tensor does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file

from megatron_a2d.conversion.sources import open_hf
from megatron_a2d.utils.errors import UserError
from megatron_a2d.verification.fp32_rounding import rounding_tolerance
from megatron_a2d.verification.logits_report import logits_line, random_tokens, transformers_logits
from megatron_a2d.verification.reference_forward import StreamedModel
from tests import tiny
from tests.gpu.gpu_train import MODELS

# Those of tests/gpu, whose MoE model magnifies rounding most, and one with many layers.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    **MODELS,
    "deep": ("dense", {"num_hidden_layers": 24}),
    "routed": ("moe", {}),
}

_ONE_OF_EACH_KIND = {
    "lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight",
    "model.layers.3.self_attn.v_proj.weight", "model.layers.3.self_attn.k_norm.weight",
    "model.layers.3.mlp.down_proj.weight", "model.layers.3.mlp.gate.weight",
    "model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.3.mlp.experts.7.down_proj.weight",
}  # fmt: skip


class Measured(NamedTuple):
    difference: float
    tolerance: float
    largest_logit: float


def measure(directory: Path, causal: bool = True) -> Measured:
    """transformers against the streamed pass: the same sums in another order."""
    with open_hf(directory) as weights:
        tokens_BL = random_tokens(weights.model_config.vocab_size)
        expected_BLV = transformers_logits(directory, tokens_BL, bidirectional=not causal)
        model = StreamedModel(weights, causal)
        logits_BLV = model.logits(tokens_BL)
        tolerance = rounding_tolerance(weights, tokens_BL, model, logits_BLV)
    return Measured(float((expected_BLV - logits_BLV).abs().max()), tolerance, float(logits_BLV.abs().max()))


@pytest.mark.parametrize("name", SIZES)
def test_other_orders_of_the_same_sums(name: str, tmp_path: Path) -> None:
    """Within the tolerance, which stays far below what a wrong model shows."""
    kind, sizes = SIZES[name]
    measured = measure(tiny.write_hf(tmp_path / "hf", kind, **sizes), causal=name != "deep")
    assert measured.difference < measured.tolerance < 2e-4 * measured.largest_logit


def test_the_tolerance_grows_with_what_magnifies_rounding(tmp_path: Path) -> None:
    """More terms in each sum, and a router whose logits are large."""
    tolerances = [
        measure(tiny.write_hf(tmp_path / str(number), kind, **sizes)).tolerance
        for number, (kind, sizes) in enumerate(
            [("dense", {}), ("dense", {"hidden_size": 256}), ("moe", {"hidden_size": 256})]
        )
    ]
    assert tolerances[0] < tolerances[1] < tolerances[2]


@pytest.mark.parametrize("name", ["moe", "dense_tied"])
def test_one_tensor_with_a_small_error(name: str, tmp_path: Path) -> None:
    """A tensor of each kind in turn rounded to bf16, one part in a few hundred: the logits are refused."""
    kind, sizes = SIZES[name]
    right, wrong = (tiny.write_hf(tmp_path / which, kind, **sizes) for which in ("right", "wrong"))
    (file,) = wrong.glob("*.safetensors")
    tensors = load_file(file)
    for changed in _ONE_OF_EACH_KIND & tensors.keys():
        rounded = tensors[changed].bfloat16().float()
        save_file({**tensors, changed: rounded}, file, metadata={"format": "pt"})
        with open_hf(right) as first, open_hf(wrong) as second:
            with pytest.raises(UserError, match="rounding in fp32 explains"):
                pytest.fail(f"{changed}: {logits_line(first, second)}")
    save_file(tensors, file, metadata={"format": "pt"})
    with open_hf(right) as first, open_hf(wrong) as second:
        assert "largest difference" in logits_line(first, second)


def test_equal_logits_need_no_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides streamed: nothing is read a second time."""
    from megatron_a2d.verification import logits_report

    monkeypatch.setattr(logits_report, "DEFAULT_MAX_BYTES", 1000)
    monkeypatch.setattr(logits_report, "rounding_tolerance", lambda *_: pytest.fail("was asked"))
    hf = tiny.write_hf(tmp_path / "hf", "moe")
    with open_hf(hf) as first, open_hf(hf) as second:
        assert "largest difference 0" in logits_line(first, second)
