"""Refusals of models that are not supported, or only in part, and of a config.json that contradicts its tensors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools import convert_hf
from megatron_a2d.config.model_config import model_config_from_hf
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.errors import UserError
from tests import tiny
from tests.unit.model_damage import edit_config, edit_tensors

# model_type, further keys, and what the line says is not supported
UNSUPPORTED: list[tuple[Any, dict[str, Any], str]] = [
    ("qwen2_vl", {}, "vision tower"),
    ("qwen2_5_vl", {}, "vision tower"),
    ("qwen3_vl_moe", {}, "vision tower"),
    ("qwen3_next", {}, "linear attention"),
    ("qwen2_moe", {}, "shared expert"),
    ("gpt_oss", {}, "attention has sinks"),
    ("deepseek_v3", {}, "multi-head latent attention"),
    ("gemma3_text", {}, "1 \\+ weight"),
    ("mixtral", {}, "experts have other tensor names"),
    ("mistral", {"sliding_window": 4096}, "sliding window \\(sliding_window 4096\\)"),
    (
        "mistral",
        {"sliding_window": None},
        "it is a Llama: set model_type to llama and architectures to LlamaForCausalLM",
    ),
    ("gemma", {}, "1 \\+ weight and its MLP is a GeGLU; give"),
    ("gemma2", {}, "norms before and after each block, every other layer has a sliding window"),
    ("llama4_text", {}, "layers without rotary positions, chunked attention"),
    ("phi3", {}, "stored as one tensor each"),
    ("glm4_moe", {}, "its router picks groups by sigmoid scores"),
    ("gpt2", {}, "positions are learned"),
    ("olmo3", {}, "norms follow the blocks"),
    ("qwen3", {"architectures": ["Qwen3ForSequenceClassification"]}, "has no language model head"),
    ("qwen3", {"vision_config": {"depth": 2}}, "vision_config: it is not only a language model"),
    ("bert", {}, "model_type 'bert' is not supported: it is an encoder"),
    ("unheard_of", {}, "model_type 'unheard_of' is not supported; give one of qwen3, "),
    (None, {}, "model_type None is not supported"),
    (["qwen3"], {}, "is not supported"),
]


@pytest.mark.parametrize(("model_type", "more", "message"), UNSUPPORTED)
def test_what_is_not_supported_is_said(model_type: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        model_config_from_hf(tiny.hub_config("dense") | {"model_type": model_type} | more, "config.json")
    assert len(refusal.value.problems) == 1 and "give one of qwen3, qwen3_moe, qwen2" in refusal.value.problems[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for kind in ("dense", "qwen2"):
        tiny.write_hf(root / kind, kind)
    return root


def add_biases(directory: Path) -> None:
    sizes = {"q": 96, "k": 48, "v": 48}
    edit_tensors(
        directory,
        lambda tensors: tensors.update(
            {
                f"model.layers.{i}.self_attn.{n}_proj.bias": torch.ones(size)
                for i in range(4)
                for n, size in sizes.items()
            }
        ),
    )


CONTRADICTIONS: list[tuple[str, Callable[[Path], object], str]] = [
    ("dense", lambda d: edit_config(d, model_type="qwen2"), "config.json is Qwen2.5's .*tensors are Qwen3's "),
    ("qwen2", lambda d: edit_config(d, model_type="qwen3"), "config.json is Qwen3's .*tensors are Qwen2.5's "),
    # Layers of no published model, which an a2d export may have.
    ("dense", add_biases, "no biases of queries.*tensors are A2D's \\(biases of queries, keys and values, norms"),
]


@pytest.mark.parametrize(("kind", "change", "message"), CONTRADICTIONS)
def test_a_config_of_other_layers_is_one_line(
    kind: str, change: Callable[[Path], object], message: str, models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / kind, tmp_path / "hf")
    change(tmp_path / "hf")
    with pytest.raises(UserError, match=message) as refusal:
        convert(tmp_path / "hf", tmp_path / "out")
    assert len(refusal.value.problems) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_missing_bias_is_named(models: Path, tmp_path: Path) -> None:
    """One tensor less is no other model."""
    shutil.copytree(models / "qwen2", tmp_path / "hf")
    name = "model.layers.1.self_attn.k_proj.bias"
    edit_tensors(tmp_path / "hf", lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"tensor {name} is missing") as refusal:
        convert(tmp_path / "hf", tmp_path / "out")
    assert len(refusal.value.problems) == 1


def test_the_exit_code_is_2(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(models / "dense", tmp_path / "hf")
    edit_config(tmp_path / "hf", model_type="gpt_oss")
    arguments = ["--hf-model", str(tmp_path / "hf"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        entry_point(lambda: convert_hf.main(arguments))
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True.*unmodified Qwen2.5"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias is True.*unmodified Llama"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("qwen2", {"rope_theta": None}, "rope_theta is missing"),
        ("qwen2", {"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ("qwen2", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "layer_types"),
    ],
)
def test_unsupported_settings_of_a_family(kind: str, changes: dict[str, Any], message: str) -> None:
    config = tiny.hub_config(kind) | changes
    with pytest.raises(UserError, match=message) as refusal:
        model_config_from_hf({key: value for key, value in config.items() if value is not None}, "config.json")
    assert len(refusal.value.problems) == 1
