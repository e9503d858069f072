"""Families other than Qwen3: names and shapes of tensors, round trips, exports that transformers runs, published sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints_tools import convert_hf, export_hf
from megatron_a2d.config.model_config import model_config_from_hf
from megatron_a2d.config.named_models import named_model_config, shape_problems
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.conversion.sources import open_hf
from megatron_a2d.conversion.torch_dist_to_hf import export
from megatron_a2d.conversion.weight_map import WeightMap
from megatron_a2d.families.registry import FAMILIES, published_config, published_names, with_layers
from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM
from megatron_a2d.utils.errors import UserError
from megatron_a2d.verification.reference_forward import StreamedModel
from tests import tiny
from tests.unit.hf_tensors import assert_bitwise_equal, tensors_of

TOLERANCE = 1e-5
TOKENS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(2))
FORMATS = {"qwen2": "qwen2", "qwen2_tied": "qwen2", "llama": "llama", "llama3": "llama"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for each kind."""
    root = tmp_path_factory.mktemp("families")
    for kind in tiny.FAMILIES:
        tiny.write_hf(root / kind, kind)
    return root


@torch.no_grad()
def hf_logits(kind: str, causal: bool = False, **overrides: Any) -> torch.Tensor:
    """Of transformers' class; bidirectional by a 4D mask in which every entry is True."""
    length = TOKENS.shape[1]
    mask = None if causal else torch.ones(len(TOKENS), 1, length, length, dtype=torch.bool)
    return tiny.hf_model(kind, **overrides)(TOKENS, attention_mask=mask, use_cache=False).logits


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    assert first.shape == second.shape
    return float((first - second).abs().max())


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_names_and_shapes_are_those_of_transformers(kind: str) -> None:
    state = {name: tuple(value.shape) for name, value in tiny.hf_model(kind).state_dict().items()}
    found = model_config_from_hf(tiny.hub_config(kind), kind)
    if found.tie_word_embeddings:
        del state["lm_head.weight"]
    table = WeightMap(found)
    assert table.hf_shapes == state
    elements = sum(torch.Size(shape).numel() for shape in table.megatron_shapes.values())
    assert elements == found.num_parameters() == found.num_active_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_round_trips_are_bitwise(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In, out in both forms, and in again from our form."""
    hf = tiny.write_hf(tmp_path / "hf", kind, dtype)
    original = tensors_of(hf)
    convert(hf, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "ar", FORMATS[kind], max_shard_bytes=150_000)
    assert_bitwise_equal(tensors_of(tmp_path / "ar"), original)
    export(tmp_path / "ckpt", tmp_path / "a2d", "a2d")
    assert_bitwise_equal(tensors_of(tmp_path / "a2d"), original)
    convert(tmp_path / "a2d", tmp_path / "again")
    export(tmp_path / "again", tmp_path / "last", FORMATS[kind], allow_objective_mismatch=True)
    assert_bitwise_equal(tensors_of(tmp_path / "last"), original)


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_exports_compute_what_the_source_does(kind: str, models: Path, tmp_path: Path) -> None:
    """As commands, whose own verification compares logits too; the autoregressive form is run by transformers' class."""
    convert_hf.main(["--hf-model", str(models / kind), "--out", str(tmp_path / "ckpt")])
    for form in (FORMATS[kind], "a2d"):
        export_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--out", str(tmp_path / form), "--format", form])
    ours = A2DForMaskedLM.from_pretrained(tmp_path / "a2d", dtype=torch.float32).eval()
    name = tiny.hub_config(kind)["architectures"][0]
    model_class = getattr(transformers, name)
    theirs, report = model_class.from_pretrained(
        tmp_path / FORMATS[kind], dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    config = json.loads((tmp_path / FORMATS[kind] / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (tiny.hub_config(kind)["model_type"], [name])
    with torch.no_grad():
        bidirectional, causal = ours(TOKENS).logits, theirs.eval()(TOKENS).logits
    assert largest_difference(bidirectional, hf_logits(kind)) <= TOLERANCE
    assert largest_difference(causal, hf_logits(kind, causal=True)) <= TOLERANCE
    assert largest_difference(bidirectional, hf_logits(kind, causal=True)) > 0.1, "the mask must matter"


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_the_streamed_pass(kind: str, models: Path) -> None:
    with open_hf(models / kind) as weights:
        for causal in (True, False):
            streamed = StreamedModel(weights, causal=causal).logits(TOKENS)
            assert largest_difference(streamed, hf_logits(kind, causal)) <= TOLERANCE


SWAPS = [("q_proj.bias", None), ("k_proj.bias", "v_proj.bias"), ("gate_proj.weight", "up_proj.weight")]


@pytest.mark.parametrize(("first", "second"), SWAPS)
def test_swapped_or_missing_values_break_parity(first: str, second: str | None, models: Path, tmp_path: Path) -> None:
    """Negative controls: two tensors of equal shape change places in the first layer, or biases are zero."""
    tiny.write_hf(tmp_path / "hf", "qwen2")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("model.layers.0.") and name.endswith(first))
    if second is None:
        tensors[name] = torch.zeros_like(tensors[name])
    else:
        other = name.replace(first, second)
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with open_hf(tmp_path / "hf") as weights:
        assert largest_difference(StreamedModel(weights).logits(TOKENS), hf_logits("qwen2")) > 100 * TOLERANCE


# As the hub counts them.
PUBLISHED = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B-Instruct": 72_706_203_648,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B-Instruct": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "Dream-org/Dream-v0-Base-7B": 7_615_616_512,
    "GSAI-ML/LLaDA-8B-Instruct": 8_015_581_184,
    "inclusionAI/LLaDA-MoE-7B-A1B-Base": 7_356_880_896,
    "Qwen/Qwen3-8B-Base": 8_190_735_360,
    "Qwen3-30B-A3B-Instruct-2507": 30_532_122_624,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name: str) -> None:
    found = named_model_config(name)
    assert found.num_parameters() == PUBLISHED[name]
    shapes = WeightMap(found).megatron_shapes.values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == PUBLISHED[name]


def test_every_published_name_is_read_and_can_be_cut() -> None:
    assert len(published_names()) == len(set(published_names())) > 10
    for name in published_names():
        found, config = named_model_config(name), published_config(name)
        assert config is not None
        assert model_config_from_hf(with_layers(config, 2), name).num_layers == 2 < found.num_layers


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-8B", "someone/Qwen2.5-7B", "qwen2", "GPT-2"])
def test_an_unknown_name_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=f"--model {name}: is neither a directory nor a known model") as refusal:
        named_model_config(name)
    assert len(refusal.value.problems) == 1


def test_a_checkpoint_of_another_family_is_not_the_named_model() -> None:
    found = model_config_from_hf(published_config("Qwen3-8B") or {}, "")
    problems = shape_problems("Qwen2.5-7B", found)
    assert any("has add_qkv_bias True, the checkpoint False" in problem for problem in problems)
    assert any("has qk_layernorm False, the checkpoint True" in problem for problem in problems)


def test_descriptions_are_consistent() -> None:
    """No model_type with one model class is claimed twice, but by an autoregressive family and a family of diffusion
    models that a mask token tells apart; a form of published models has what `export_hf` writes."""
    claimed = [
        (kind.name, kind.architecture, family.diffusion.mask_token if family.diffusion else None)
        for family in FAMILIES
        for kind in family.model_types
    ]
    assert len(claimed) == len(set(claimed))
    for family in FAMILIES:
        assert family.title and family.model_types
        assert bool(family.published) <= bool(family.owners)
        assert family.code is None or (family.published and family.export_format and family.code.auto_map)
        assert family.export_format is None or [f.export_format for f in FAMILIES].count(family.export_format) == 1
