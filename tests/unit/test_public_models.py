"""Dream, LLaDA and LLaDA-MoE against logits that their public code computed (tests/fixtures/record_public_models.py).

The code itself is not part of this repository: A2D_PUBLIC_MODELS names a directory that holds it, and A2D_TRANSFORMERS4
one with transformers 4.57, and then the record is made anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_tools import convert_hf, export_hf
from megatron_a2d.checkpoint.training_facts import read_trained
from megatron_a2d.config.model_config import model_config_from_hf, read_model_config
from megatron_a2d.conversion.sources import open_hf
from megatron_a2d.diffusion.sampling.batch_state import make_canvas
from megatron_a2d.diffusion.sampling.sampler import denoise
from megatron_a2d.diffusion.sampling_options import SamplingOptions
from megatron_a2d.families.registry import kind_of
from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM
from megatron_a2d.utils.errors import UserError
from megatron_a2d.verification.reference_forward import StreamedModel
from tests.fixtures.record_public_models import (
    HERE,
    MASK_TOKEN_ID,
    MODELS,
    PROMPT,
    SAMPLED,
    TEXT_LENGTH,
    TOKENS,
    write_recorded,
)
from tests.unit.hf_tensors import assert_bitwise_equal, tensors_of
from tests.unit.model_damage import edit_config, edit_tensors

TOLERANCE = 1e-5
CODE, TRANSFORMERS4 = os.environ.get("A2D_PUBLIC_MODELS"), os.environ.get("A2D_TRANSFORMERS4")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of each model, as on the hub, with our tests' tokenizer."""
    root = tmp_path_factory.mktemp("public")
    for name in MODELS:
        write_recorded(root / name, name)
    return root


def recorded(name: str) -> dict[str, torch.Tensor]:
    return load_file(HERE / f"{name}.safetensors")


def largest_difference(name: str, logits: torch.Tensor) -> float:
    expected = recorded(name)["recorded.logits"]
    assert expected.shape == logits.shape and torch.equal(recorded(name)["recorded.tokens"], TOKENS)
    return float((expected - logits).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_the_streamed_pass_computes_what_the_public_code_does(name: str, models: Path) -> None:
    with open_hf(models / name) as weights:
        assert largest_difference(name, StreamedModel(weights).logits(TOKENS)) <= TOLERANCE
        assert largest_difference(name, StreamedModel(weights, causal=True).logits(TOKENS)) > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_in_and_out(name: str, models: Path, tmp_path: Path) -> None:
    """Converted and exported as commands; the tensors are the source's, bit by bit, under the standard names."""
    convert_hf.main(["--hf-model", str(models / name), "--out", str(tmp_path / "ckpt")])
    export_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--out", str(tmp_path / "a2d"), "--format", "a2d"])
    names = kind_of(json.loads((models / name / "config.json").read_text()), name).family.tensor_names
    with open_hf(models / name) as weights:
        standard = weights.map.hf_shapes
    table = {own: plain for plain, own in _expanded(names, weights.model_config.num_layers).items()}
    original = {table.get(key, key): value for key, value in tensors_of(models / name).items()}
    assert original.keys() == standard.keys()
    assert_bitwise_equal(tensors_of(tmp_path / "a2d"), original)
    ours = A2DForMaskedLM.from_pretrained(tmp_path / "a2d", dtype=torch.float32).eval()
    with torch.no_grad():
        assert largest_difference(name, ours(TOKENS).logits) <= TOLERANCE
    trained = read_trained(tmp_path / "a2d")
    assert (trained.objective, trained.label_shift) == ("mdlm", name == "dream")
    assert trained == read_trained(models / name) == read_trained(tmp_path / "ckpt" / "release")
    assert read_model_config(tmp_path / "a2d").mask_token_id == MASK_TOKEN_ID


def _expanded(names: Any, num_layers: int) -> dict[str, str]:
    return {plain.format(layer=i): own.format(layer=i) for plain, own in names.items() for i in range(num_layers)}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_loaded_as_it_is(name: str, models: Path) -> None:
    """By `generate` and `evaluate`: its tensors in our classes, its mask token and label shift from its family."""
    from megatron_a2d.inference.hf_model import load_hf_model

    loaded = load_hf_model(models / name)
    assert (loaded.mask_token_id, loaded.label_shift, loaded.objective) == (MASK_TOKEN_ID, name == "dream", "mdlm")
    with torch.no_grad():
        assert largest_difference(name, loaded.forward.model(TOKENS).logits) <= TOLERANCE  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="remove --objective ar"):
        load_hf_model(models / name, "ar")


@pytest.mark.parametrize("name", ["llada", "llada_moe"])
@pytest.mark.parametrize(("steps", "block_length"), SAMPLED)
def test_greedy_texts_are_those_of_the_public_sampler(name: str, steps: int, block_length: int, models: Path) -> None:
    """Token for token, under the settings that LLaDA publishes: no temperature, low-confidence remasking, in blocks."""
    from megatron_a2d.inference.hf_model import load_hf_model

    loaded = load_hf_model(models / name)
    canvas = make_canvas([PROMPT[0].tolist() + [MASK_TOKEN_ID] * TEXT_LENGTH], MASK_TOKEN_ID)
    options = SamplingOptions(sampler="confidence", num_steps=steps, block_length=block_length)
    ours = denoise(loaded.forward, canvas, MASK_TOKEN_ID, options, label_shift=loaded.label_shift).tokens
    assert torch.equal(ours, recorded(name)[f"recorded.text.{steps}.{block_length}"])
    shifted = denoise(loaded.forward, canvas, MASK_TOKEN_ID, options, label_shift=True).tokens
    assert not torch.equal(ours, shifted), "negative control: the label shift of another family"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("q_proj.weight", "attn_out.weight"),
        ("ff_proj.weight", "up_proj.weight"),
        ("attn_norm.weight", "ff_norm.weight"),
    ],
)
def test_swapped_tensors_of_llada_break_parity(first: str, second: str, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llada", tmp_path / "hf")
    one, other = (f"model.transformer.blocks.1.{name}" for name in (first, second))

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    edit_tensors(tmp_path / "hf", swap)
    with open_hf(tmp_path / "hf") as weights:
        assert largest_difference("llada", StreamedModel(weights).logits(TOKENS)) > 100 * TOLERANCE


def test_a_renormalised_router_breaks_parity(models: Path) -> None:
    from dataclasses import replace

    with open_hf(models / "llada_moe") as weights:
        wrong = weights._replace(model_config=replace(weights.model_config, norm_topk_prob=True))
        assert largest_difference("llada_moe", StreamedModel(wrong).logits(TOKENS)) > 100 * TOLERANCE


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llada", {"block_type": "sequential"}, "block_type is 'sequential', and only 'llama' is supported"),
    ("llada", {"layer_norm_type": "default"}, "layer_norm_type is 'default'"),
    ("llada", {"include_bias": True}, "include_bias is True"),
    ("llada", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ("llada", {"n_layers": 0}, "n_layers is 0, not a positive whole number"),
    ("llada", {"embedding_size": 512}, "embedding_size is 512 and vocab_size is 256"),
    ("llada", {"architectures": ["Other"]}, "model_type 'llada' is not supported"),
    ("llada", {"include_qkv_bias": True}, "config.json is LLaDA's .*biases.*tensors are LLaDA's"),
    ("llada_moe", {"shared_expert_intermediate_size": 24}, "shared_expert_intermediate_size is 24"),
    ("llada_moe", {"moe_layer_freq": [0, 1]}, "moe_layer_freq"),
    ("llada_moe", {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias is True"),
    ("llada_moe", {"qk_layernorm": False}, "config.json is LLaDA-MoE's .*no norms.*tensors are .*norms on queries"),
    ("dream", {"use_sliding_window": True}, "use_sliding_window is True.*unmodified Dream"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_is_refused(name: str, changes: dict[str, Any], message: str, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / name, tmp_path / "hf")
    edit_config(tmp_path / "hf", **changes)
    with pytest.raises(UserError, match=message) as refusal:
        convert_hf.main(["--hf-model", str(tmp_path / "hf"), "--out", str(tmp_path / "out")])
    assert len(refusal.value.problems) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_llada_without_its_keys_is_another_model(models: Path) -> None:
    """OLMo's class fills missing keys with settings that are not LLaDA's."""
    config = json.loads((models / "llada" / "config.json").read_text())
    for key in ("block_type", "rope", "activation_type", "layer_norm_type"):
        with pytest.raises(UserError, match=f"{key} is "):
            model_config_from_hf({name: value for name, value in config.items() if name != key}, "config.json")


@pytest.mark.skipif(not CODE, reason="A2D_PUBLIC_MODELS does not name a directory with the models' public code")
@pytest.mark.skipif(not TRANSFORMERS4, reason="A2D_TRANSFORMERS4 does not name a directory with transformers 4.57")
def test_the_record_is_what_the_public_code_computes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{TRANSFORMERS4}:{REPOSITORY}"}
    command = [sys.executable, "-m", "tests.fixtures.record_public_models", str(tmp_path)]
    subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, timeout=300)
    for name in MODELS:
        anew = load_file(tmp_path / f"{name}.safetensors")
        assert largest_difference(name, anew.pop("recorded.logits")) <= 1e-6
        assert_bitwise_equal(anew, {k: v for k, v in recorded(name).items() if k != "recorded.logits"})
