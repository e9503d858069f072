"""Damaged and foreign Hugging Face directories: conversion ends with one clear error and leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.utils.errors import UserError
from tests import tiny
from tests.unit import model_damage
from tests.unit.model_damage import (
    NAME,
    duplicate,
    edit_config,
    edit_header,
    edit_index,
    edit_tensors,
    remove,
    truncate,
)

models = model_damage.models

DENSE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(NAME)), rf"tensor {NAME} is missing"),
    "extra tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(96)})),
        r"q_proj\.bias \[96\] is unknown",
    ),
    "wrong shape": (
        lambda d: edit_tensors(d, lambda t: t.update({NAME: t[NAME][:40].clone()})),
        r"has shape \[40, 64\], but config.json asks for \[48, 64\]",
    ),
    "quantised": (
        lambda d: edit_tensors(d, lambda t: t.update({NAME: t[NAME].to(torch.float8_e4m3fn)})),
        rf"weights are quantised \(F8_E4M3: {NAME} and 0 others\).*use the original unquantised",
    ),
    "one layer too few": (lambda d: edit_config(d, num_hidden_layers=3), r"layers\.3\.[a-z_.]+ .*is unknown"),
    "truncated values": (
        lambda d: truncate(d / "model.safetensors", (d / "model.safetensors").stat().st_size - 1000),
        "truncated or damaged",
    ),
    "truncated header": (lambda d: truncate(d / "model.safetensors", 2000), "truncated or not a safetensors"),
    "empty file": (lambda d: truncate(d / "model.safetensors", 0), "truncated or not a safetensors"),
    "overlapping tensors": (
        lambda d: edit_header(d / "model.safetensors", lambda h: h.update({NAME: h[NAME.replace("1.self", "2.self")]})),
        "starts at byte",
    ),
    "a number of 4,300 digits": (
        lambda d: edit_header(
            d / "model.safetensors", lambda h: h[NAME].update(data_offsets=[-(10**4300 - 1), 10**4300 - 1])
        ),
        "header is damaged",
    ),
    "a hundred thousand axes": (
        lambda d: edit_header(d / "model.safetensors", lambda h: h[NAME].update(shape=[2**63] * 100_000)),
        "header entry is damaged",
    ),
    "numbers that are text": (
        lambda d: edit_header(d / "model.safetensors", lambda h: h[NAME].update(shape=["48", "64"])),
        "header entry is damaged",
    ),
    "a type that is no text": (
        lambda d: edit_header(d / "model.safetensors", lambda h: h[NAME].update(dtype=["F32"])),
        "header entry is damaged",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "foreign architecture": (lambda d: edit_config(d, model_type="bert"), "model_type 'bert' is not supported"),
    "no config": (lambda d: (d / "config.json").unlink(), "configuration is missing"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    "tokenizer of another model": (
        lambda d: (d / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"999": {"content": "<x>"}}}'),
        "goes up to id 999",
    ),
    "damaged tokenizer": (
        lambda d: (d / "tokenizer.json").write_text('{"model": {"vocab": {"a": "zero"}}}'),
        "an id that is not a number",
    ),
    "no tokenizer": (
        lambda d: remove(d / "tokenizer.json", d / "tokenizer_config.json"),
        "give --mask-token-id",
    ),
}

SHARDED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda d: sorted(d.glob("*.safetensors"))[1].unlink(), "is missing, though"),
    "unlisted tensor": (
        lambda d: edit_index(d, lambda w: w.pop(NAME)),
        rf"tensor {NAME} is not listed in",
    ),
    "promised tensor": (
        lambda d: edit_index(d, lambda w: w.update({"ghost": min(w.values())})),
        "lacks tensor ghost",
    ),
    "path outside": (
        lambda d: edit_index(d, lambda w: w.update({NAME: "../dense/model.safetensors"})),
        "is outside the directory",
    ),
    "duplicate": (duplicate, "is also in model-00001"),
    "two models": (lambda d: shutil.copyfile(min(d.glob("*.safetensors")), d / "model.safetensors"), "two models"),
    "empty index": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
}


@pytest.mark.parametrize("case", [*DENSE, *SHARDED])
def test_bad_model_directories(case: str, models: Path, tmp_path: Path) -> None:
    kind, (damage, message) = ("dense", DENSE[case]) if case in DENSE else ("moe", SHARDED[case])
    shutil.copytree(models / kind, tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_all_wrong_tensors_are_listed_at_once(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "dense", tmp_path / "hf")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(4):
            del tensors[f"model.layers.{layer}.self_attn.q_norm.weight"]
            tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = torch.zeros(96)
        tensors["model.norm.weight"] = torch.zeros(65)

    edit_tensors(tmp_path / "hf", spoil)
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "hf", tmp_path / "out")
    kinds = [problem.partition(" is ")[2].partition(";")[0] for problem in caught.value.problems]
    assert len(caught.value.problems) == 9
    assert (kinds.count("missing"), kinds.count("unknown")) == (4, 4)


def test_tensors_that_are_missing_and_double_are_listed_together(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "moe", tmp_path / "hf")
    duplicate(tmp_path / "hf")
    edit_config(tmp_path / "hf", num_hidden_layers=5)
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "hf", tmp_path / "out")
    text = str(caught.value)
    assert "is also in" in text and "model.layers.4.mlp.gate.weight is missing" in text


def renamed(rename: Callable[[str], str]) -> Callable[[Path], object]:
    def edit(directory: Path) -> None:
        edit_tensors(directory, lambda t: [t.update({rename(name): t.pop(name)}) for name in list(t)])

    return edit


def with_scales(directory: Path) -> None:
    """A model that stores scales of a key-value cache alongside plain weights."""
    scales = {f"model.layers.{i}.self_attn.{kv}_scale": torch.ones(1) for i in range(12) for kv in "kv"}
    edit_tensors(directory, lambda t: t.update(scales))


def quantise(directory: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1)

    edit_tensors(directory, edit)


WHOLE: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "FP8": (quantise, 1, r"\(F8_E4M3: model.* and 27 others\)"),
    "FP8, as config.json says": (
        lambda d: (quantise(d), edit_config(d, quantization_config={"quant_method": "fp8"})),
        1, r"config\.json: its weights are quantised \(fp8\)",
    ),
    "packed in 4 bits": (
        lambda d: edit_tensors(d, lambda t: t.update({n: t[n].to(torch.uint8) for n in t if n.endswith("proj.weight")})),
        1, r"\(U8: model.* and 27 others\)",
    ),
    "another method": (lambda d: edit_config(d, quantization_config={"bits": 4}), 1, "quantised"),
    "compressed": (lambda d: edit_config(d, compression_config={"format": "pack-quantized"}), 1, "pack-quantized"),
    "of a larger model": (renamed(lambda n: f"language_model.{n}"), 1, "instead of model.embed_tokens.weight, and 46"),
    "inside another": (renamed(lambda n: n.replace("model.", "model.language_model.")), 1, "instead of model.embed_tokens"),
    "wrapped": (renamed(lambda n: f"module.base_model.model.{n}"), 1, "module.base_model.model.model.embed_tokens"),
    "wrapped inside": (renamed(lambda n: n.replace("self_attn", "_orig_mod.self_attn")), 1, "_orig_mod.self_attn"),
    "without its head": (renamed(lambda n: n.removeprefix("model.")), 1, "embed_tokens.weight instead of"),
    "scales beside": (with_scales, 2, r"\.k_scale \[1\] and 11 others of its kind are unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_what_is_wrong_with_all_tensors_is_told_once(case: str, models: Path, tmp_path: Path) -> None:
    damage, num_lines, message = WHOLE[case]
    shutil.copytree(models / "dense", tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(UserError, match=message) as refusal:
        convert(tmp_path / "hf", tmp_path / "out")
    assert len(refusal.value.problems) == num_lines, refusal.value.problems[:3]
    assert not (tmp_path / "out").exists()


def test_fused_experts_under_other_names_are_told_once(models: Path, tmp_path: Path) -> None:
    """As transformers 5 holds them in memory, and a larger model names them."""
    shutil.copytree(models / "moe", tmp_path / "hf")
    for file in tmp_path.glob("hf/model*"):
        file.unlink()
    model = tiny.hf_model("moe")
    save_file(
        {f"language_model.{n}": t.contiguous() for n, t in model.state_dict().items()},
        tmp_path / "hf" / "model.safetensors",
    )
    with pytest.raises(UserError, match=r"language_model\.model\.") as refusal:
        convert(tmp_path / "hf", tmp_path / "out")
    assert len(refusal.value.problems) == 1
