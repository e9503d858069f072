"""HF -> torch_dist -> HF, bit by bit: types, formats of exports, their logits, a trained checkpoint's history."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from checkpoints_tools import export_hf, verify
from megatron_a2d.checkpoint import tensor_rows
from megatron_a2d.checkpoint.directory import HF_FILES, RUN_CONFIG, TRACKER, iteration_of, resolve
from megatron_a2d.checkpoint.tensor_rows import OpenFiles
from megatron_a2d.checkpoint.torch_dist_reader import read_common
from megatron_a2d.config.model_config import model_config_from_hf, read_model_config
from megatron_a2d.conversion.hf_config import Format
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.conversion.sources import open_hf
from megatron_a2d.conversion.torch_dist_to_hf import export
from megatron_a2d.hf import CODE_FILES
from megatron_a2d.utils.errors import UserError
from megatron_a2d.verification import logits_report
from tests import tiny
from tests.unit.hf_tensors import assert_bitwise_equal, fuse_experts, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Transformer Engine and Apex")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stored", ["single", "sharded", "fused"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_round_trip_is_bitwise(kind: str, stored: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if stored == "fused" and kind != "moe":
        stored = "sharded"
    hf = tiny.write_hf(tmp_path / "hf", kind, dtype, max_shard_size="100KB" if stored == "sharded" else "5GB")
    original = tensors_of(hf)
    if stored == "fused":
        fuse_experts(hf)
    assert (len(list(hf.glob("*.safetensors"))) > 2) == (stored == "sharded")
    convert(hf, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "out", "qwen3", max_shard_bytes=150_000)
    assert_bitwise_equal(tensors_of(tmp_path / "out"), original)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(original)
    assert all((tmp_path / "out" / name).stat().st_size < 160_000 for name in index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in original.values())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_slabs_cut_anywhere_change_nothing_and_bound_memory(kind: str, tmp_path: Path, monkeypatch) -> None:
    """With a slab of 3 to 12 rows every matrix is cut, across KV groups and between gate and up."""
    slab = 3000
    monkeypatch.setattr(tensor_rows, "SLAB_BYTES", slab)
    largest = 0
    read_tensor = OpenFiles.read_tensor

    def watch(self: OpenFiles, *args: Any) -> torch.Tensor:
        nonlocal largest
        tensor = read_tensor(self, *args)
        largest = max(largest, tensor.nbytes)
        return tensor

    monkeypatch.setattr(OpenFiles, "read_tensor", watch)
    hf = tiny.write_hf(tmp_path / "hf", kind)
    convert(hf, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "out", "qwen3")
    assert_bitwise_equal(tensors_of(tmp_path / "out"), tensors_of(hf))
    assert 0 < largest <= slab


def test_converted_directory_is_complete(tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "moe")
    done = convert(hf, tmp_path / "ckpt")
    assert done.mask_token_id == tiny.MASK_TOKEN_ID
    release = resolve(tmp_path / "ckpt")
    assert release == tmp_path / "ckpt" / "release" == resolve(release)
    assert iteration_of(release) == 0
    assert (tmp_path / "ckpt" / TRACKER).read_text().strip() == "release"
    config = json.loads((release / HF_FILES / "config.json").read_text())
    assert config == tiny.hub_config("moe") | {"mask_token_id": tiny.MASK_TOKEN_ID}
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (release / HF_FILES / name).read_bytes() == (hf / name).read_bytes()
    assert read_common(release) == {"iteration": 0, "consumed_samples": 0}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_types_can_be_changed(tmp_path: Path, capsys) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "moe")
    convert(hf, tmp_path / "ckpt", dtype=torch.bfloat16)
    verify.main(["--hf-model", str(hf), "--checkpoint", str(tmp_path / "ckpt")])
    assert "largest rounding 0.0" in capsys.readouterr().out
    export(tmp_path / "ckpt", tmp_path / "out", "a2d", dtype=torch.float32)
    expected = {name: tensor.bfloat16().float() for name, tensor in tensors_of(hf).items()}
    assert_bitwise_equal(tensors_of(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_values_beyond_a_type_are_refused(tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "dense")
    tensors = tensors_of(hf)
    tensors["model.norm.weight"][7] = 1e6
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(UserError, match=r"beyond the range of torch\.float16"):
        convert(hf, tmp_path / "ckpt", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_mixed_types_need_a_choice(tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "dense", torch.bfloat16)
    tensors = tensors_of(hf)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].float()
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.*--dtype"):
        convert(hf, tmp_path / "ckpt")
    convert(hf, tmp_path / "ckpt", dtype=torch.float32)


def test_a_stored_tied_head_must_equal_the_embedding(tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "dense_tied")
    tensors = tensors_of(hf)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, hf / "model.safetensors")
    convert(hf, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "out", "a2d")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    tensors["lm_head.weight"][200, 5] += 1e-3
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(UserError, match=r"ties lm_head\.weight"):
        convert(hf, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("dense", "model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.up_proj.weight"),
        ("moe", "model.layers.0.mlp.experts.3.gate_proj.weight", "model.layers.0.mlp.experts.3.up_proj.weight"),
        ("moe", "model.layers.3.self_attn.k_proj.weight", "model.layers.3.self_attn.v_proj.weight"),
        ("dense_tied", "model.layers.1.self_attn.q_norm.weight", "model.layers.1.self_attn.k_norm.weight"),
    ],
)
def test_verify_notices_swapped_tensors(kind: str, first: str, second: str, tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", kind)
    convert(hf, tmp_path / "ckpt")
    arguments = ["--hf-model", str(hf), "--checkpoint", str(tmp_path / "ckpt")]
    verify.main(arguments)
    tensors = tensors_of(hf)
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(UserError) as caught:
        verify.main(arguments)
    assert len(caught.value.problems) == 2
    assert {problem.split("tensor ")[1].split()[0] for problem in caught.value.problems} == {first, second}


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("form", ["a2d", "qwen3", "rnd1"])
def test_exports_are_what_their_format_says(kind: str, form: str, tmp_path: Path, capsys) -> None:
    hf = tiny.write_hf(tmp_path / "hf", kind)
    convert(hf, tmp_path / "ckpt", origin="Qwen/Tiny")
    arguments = ["--checkpoint", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out"), "--format", form]
    if form == "rnd1" and kind != "moe":
        with pytest.raises(UserError, match="use --format a2d"):
            export_hf.main(arguments)
        assert not (tmp_path / "out").exists()
        return
    export_hf.main([*arguments, "--max-shard-size", "300KB"])
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    moe = kind == "moe"
    assert (
        config["architectures"]
        == {
            "a2d": ["A2DForMaskedLM"],
            "rnd1": ["RND1"],
            "qwen3": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
        }[form]
    )
    assert config["model_type"] == ("qwen3_moe" if moe else "qwen3") if form == "qwen3" else form
    # The hub's spellings: transformers 4.57 takes the others for nothing, and its own defaults without a word.
    assert config["rope_theta"] == 1e6 and config["torch_dtype"] == "float32"
    assert ("num_experts" in config) == moe and config.get("num_experts", 8) == 8
    assert not {"rope_parameters", "num_local_experts", "dtype"} & set(config)
    assert ("mask_token_id" in config) == ("auto_map" in config) == (form != "qwen3")
    assert {path.name for path in CODE_FILES.get(form, [])} == {path.name for path in out.glob("*.py")}
    for target in config.get("auto_map", {}).values():
        module, _, name = target.partition(".")
        assert f"class {name}(" in (out / f"{module}.py").read_text()
    mask = tiny.MASK_TOKEN_ID
    assert ("bos_token_id" in config) == (form != "rnd1")
    if form == "rnd1":
        assert (config["mask_token_id"], config["num_diffusion_steps"], config["moe_backend"]) == (mask, 256, "hf")
        assert not any((config["is_causal"], config["use_cache"], config["rope_scaling"], config["sliding_window"]))
        assert (config["eos_token_id"], config["pad_token_id"]) == (2, 0)
        assert config["num_experts"] == 8 and config["rope_theta"] == 1e6
        assert json.loads((out / "generation_config.json").read_text())["mask_token_id"] == mask
    if form == "a2d":
        assert config["label_shift"] is True
    lines = [line.split() for line in (out / "SHA256SUMS").read_text().splitlines()]
    sums = {name: digest for digest, name in lines}
    files = {path.name for path in out.iterdir()} - {"SHA256SUMS"}
    assert sums == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in files}
    card = (out / "README.md").read_text()
    assert "Base model: Qwen/Tiny." in card and "base_model: Qwen/Tiny\n" in card
    assert read_model_config(out) == (
        read_model_config(hf) if form == "qwen3" else read_model_config(tmp_path / "ckpt" / "release" / HF_FILES)
    )


@pytest.mark.parametrize(("kind", "form"), [("dense_tied", "a2d"), ("moe", "rnd1"), ("moe", "qwen3")])
def test_logits_of_exports_are_those_of_the_source(kind: str, form: Format, tmp_path: Path, capsys) -> None:
    hf = tiny.write_hf(tmp_path / "hf", kind)
    convert(hf, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "out", form, code_files=CODE_FILES.get(form, []))
    arguments = ["--hf-model", str(hf), "--export", str(tmp_path / "out"), "--logits"]
    verify.main(arguments)
    assert (
        f"{'causal' if form == 'qwen3' else 'bidirectional'} logits of 2 x 64 positions in fp32: largest difference"
        in capsys.readouterr().out
    )
    if form == "a2d":  # control: another model of the same shape
        other = tiny.write_hf(tmp_path / "other", kind, seed=1)
        with open_hf(other) as first, open_hf(tmp_path / "out") as second:
            with pytest.raises(UserError, match="logits differ"):
                logits_report.logits_line(first, second, asked=True)


def test_a_trained_checkpoint_is_exported_with_its_history(tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "moe")
    convert(hf, tmp_path / "ckpt")
    trained = tmp_path / "ckpt" / "iter_0000120"
    shutil.copytree(tmp_path / "ckpt" / "release", trained)
    torch.save({"iteration": 120, "consumed_samples": 960}, trained / "common.pt")
    (trained / RUN_CONFIG).write_text(json.dumps({"label_shift": False, "seq_length": 32}))
    (tmp_path / "ckpt" / TRACKER).write_text("120\n")
    done = export(tmp_path / "ckpt", tmp_path / "out", "a2d")
    assert done.iteration == iteration_of(trained) == 120
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_shift"] is False
    assert "960 samples of 32 tokens (30720 tokens seen)" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match="without the label shift"):
        export(tmp_path / "ckpt", tmp_path / "rnd1", "rnd1")
    export(tmp_path / "ckpt" / "release", tmp_path / "rnd1", "rnd1")


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("heads", [32, 64])
def test_keys_that_are_absent_are_what_transformers_takes(kind: str, heads: int) -> None:
    config = tiny.hub_config(kind, num_attention_heads=heads, hidden_size=heads * 8)
    del config["head_dim"], config["num_key_value_heads"]
    found = model_config_from_hf(config, "config.json")
    theirs = transformers.AutoConfig.for_model(**config)
    assert found.num_key_value_heads == theirs.num_key_value_heads
    assert found.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // heads)
    if kind == "dense":  # null is another thing than no key
        null = config | {"num_key_value_heads": None}
        theirs = transformers.AutoConfig.for_model(**null)
        assert model_config_from_hf(null, "config.json").num_key_value_heads == theirs.num_key_value_heads == heads
