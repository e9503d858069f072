"""Conversion of large models: every size and type, files of bounded size, bounded memory, strict about values."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools import convert_hf, export_hf, synthesize
from megatron_a2d.checkpoint import tensor_rows as rows
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.conversion.random_weights import write_synthetic
from megatron_a2d.conversion.safetensors_files import plan_shards
from megatron_a2d.conversion.torch_dist_to_hf import export
from megatron_a2d.families.qwen3 import SIZES, hub_config
from megatron_a2d.utils.errors import UserError
from tests import tiny
from tests.unit.hf_tensors import assert_bitwise_equal, fuse_experts, tensors_of

ROOT = Path(__file__).parents[2]
NAME = "model.layers.1.self_attn.k_proj.weight"


def reduced(size: str) -> dict[str, Any]:
    """The row of the table a sixteenth as wide and four layers deep: the same proportions of heads, groups and MLP."""
    config = hub_config(size, vocab_size=512, num_hidden_layers=4, head_dim=16, mask_token_id=511)
    config |= {"bos_token_id": 0, "eos_token_id": 1}
    for key in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        if key in config:
            config[key] //= 16
    if "num_experts" in config:
        config["num_experts"] //= 8
    return config


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stored", ["per expert", "fused"])
def test_every_qwen3_goes_in_and_out(size: str, stored: str, tmp_path: Path) -> None:
    config = reduced(size)
    if stored == "fused" and "num_experts" not in config:
        pytest.skip("a dense model has no experts")
    write_synthetic(tmp_path / "hf", config, fused=stored == "fused", max_shard_bytes=500_000)
    write_synthetic(tmp_path / "expected", config, max_shard_bytes=10**9)
    if stored == "fused":  # other names, and so other values: the rows of one expert after another
        (tmp_path / "expected" / "model.safetensors").unlink()
        save_file(split_experts(tensors_of(tmp_path / "hf")), tmp_path / "expected" / "model.safetensors")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    convert(tmp_path / "hf", tmp_path / "ckpt", workers=2)
    export(tmp_path / "ckpt", tmp_path / "out", "qwen3", max_shard_bytes=700_000, workers=2)
    assert_bitwise_equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected"))


@pytest.mark.parametrize("limit", [90, 250, 1000, 5000, 10**6])
def test_shards_are_of_about_one_size(limit: int) -> None:
    sizes = {f"t{number}": 5 + (number * 7919) % 89 for number in range(200)} | {"huge": 700, "last": 3}
    shards = plan_shards(sizes, limit)
    assert [name for shard in shards for name in shard] == list(sizes)
    filled = [sum(sizes[name] for name in shard) for shard in shards]
    assert all(size <= limit or len(shard) == 1 for size, shard in zip(filled, shards, strict=True))
    if limit >= 5000:  # filling one after the other would leave a small last shard
        assert len(shards) == math.ceil(sum(filled) / limit)
        assert max(filled) - min(filled) < 100


@pytest.mark.parametrize("refusal", ["none", "at the opening", "at the first write"])
def test_files_are_written_with_and_without_the_page_cache(refusal: str, tmp_path: Path, monkeypatch) -> None:
    calls = {"open": os.open, "write": os.write}
    direct: set[int] = set()

    def open_file(path: Path, flags: int, mode: int) -> int:
        if flags & rows._DIRECT and refusal == "at the opening":
            raise OSError(errno.EINVAL, "not here")
        descriptor = calls["open"](
            path, flags & ~rows._DIRECT, mode
        )  # what the test's disk makes of it is not the question
        direct.update({descriptor} if flags & rows._DIRECT else ())
        return descriptor

    def write(descriptor: int, data: memoryview) -> int:
        if descriptor in direct and refusal == "at the first write":
            direct.discard(descriptor)
            raise OSError(errno.EINVAL, "not aligned")
        return calls["write"](descriptor, data[: 1 + len(data) // 2])  # a short write is no error

    monkeypatch.setattr(rows, "_BLOCK_BYTES", 512)
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "write", write)
    # A flag that the file system refused is still on the descriptor; here none ever was.
    monkeypatch.setattr(rows.StreamedFile, "_use_cache", lambda self: refusal == "at the first write")
    data = bytes(random.Random(0).randbytes(5000))
    with rows.StreamedFile(tmp_path / "file") as file:
        for begin in range(0, len(data), 700):
            file.write(data[begin : begin + 700])
    assert (tmp_path / "file").read_bytes() == data
    assert not (tmp_path / "file").stat().st_mode & 0o111, "weights are no program"


def test_a_write_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"), rows.StreamedFile(Path("/dev/full")) as file:
        file.write(b"x" * 5_000_000)
    with pytest.raises(OSError, match="No space"), rows.StreamedFile(Path("/dev/full")) as file:
        file.write(b"x")


def split_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts one by one, as on the hub, by a formula that knows nothing of the table."""
    result = {}
    for name, tensor in tensors.items():
        if "gate_up_proj" in name:
            for expert, rows in enumerate(tensor):
                gate, up = rows.chunk(2)
                prefix = name.removesuffix("gate_up_proj") + f"{expert}."
                result |= {f"{prefix}gate_proj.weight": gate.clone(), f"{prefix}up_proj.weight": up.clone()}
        elif name.endswith("experts.down_proj"):
            for expert, rows in enumerate(tensor):
                result[name.removesuffix("down_proj") + f"{expert}.down_proj.weight"] = rows.clone()
        else:
            result[name] = tensor
    return result


def test_synthetic_values_are_told_apart_and_do_not_depend_on_shards(tmp_path: Path, capsys) -> None:
    arguments = ["--size", "0.6B", "--num-hidden-layers", "1", "--dtype", "fp16"]  # 330 MB
    synthesize.main([*arguments, "--out", str(tmp_path / "a")])
    synthesize.main([*arguments, "--out", str(tmp_path / "b"), "--max-shard-size", "100MB"])
    first, second = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert_bitwise_equal(first, second)
    assert first["model.embed_tokens.weight"].shape == (151936, 1024) and "lm_head.weight" not in first
    assert 0.019 < float(first["model.embed_tokens.weight"].float().std()) < 0.021
    key, value = (first[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "kv")
    assert key.dtype == torch.float16 and not torch.equal(key, value)
    with pytest.raises(UserError, match=r"--size 9B: is not a Qwen3 size"):
        synthesize.main(["--size", "9B", "--out", str(tmp_path / "c")])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_types_go_through(dtype: torch.dtype, tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "moe", dtype)
    convert(hf, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "out", "qwen3")
    assert_bitwise_equal(tensors_of(tmp_path / "out"), tensors_of(hf))


def test_layers_may_store_experts_differently(tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "moe")
    original = tensors_of(hf)
    fuse_experts(hf)
    mixed = {
        name: tensor for name, tensor in tensors_of(hf).items() if not name.startswith("model.layers.2.mlp.experts")
    }
    mixed |= {name: tensor for name, tensor in original.items() if name.startswith("model.layers.2.mlp.experts")}
    save_file(mixed, hf / "model.safetensors")
    convert(hf, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "out", "qwen3")
    assert_bitwise_equal(tensors_of(tmp_path / "out"), original)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "dense", torch.bfloat16)
    tensors = tensors_of(hf)
    bad = ["model.layers.3.mlp.up_proj.weight", NAME]
    for name in bad:
        tensors[name].view(-1)[77] = value
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(UserError) as caught:
        convert(hf, tmp_path / "out")
    assert [problem.split()[2] for problem in caught.value.problems] == [NAME, bad[0]]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    convert_hf.main(["--hf-model", str(hf), "--out", str(tmp_path / "ckpt"), "--allow-nonfinite", "--no-verify"])
    with pytest.raises(UserError, match="not finite"):
        export(tmp_path / "ckpt", tmp_path / "out", "qwen3")
    arguments = ["--checkpoint", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out"), "--format", "qwen3"]
    export_hf.main([*arguments, "--allow-nonfinite", "--no-verify"])
    assert_bitwise_equal(tensors_of(tmp_path / "out"), tensors)


def test_all_that_is_wrong_is_listed_together(tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "moe", max_shard_size="300KB")
    files = sorted(hf.glob("*.safetensors"))
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    shutil.copyfile(files[0], hf / "model-extra.safetensors")  # duplicates
    index["weight_map"]["extra"] = "model-extra.safetensors"
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load_file(files[1])
    names = list(tensors)
    tensors.pop(names[0])  # missing
    tensors[names[1]] = tensors[names[1]][:-1].clone()  # mis-shaped
    tensors[names[2]].view(-1)[0] = float("nan")
    tensors["stranger"] = torch.zeros(3)  # unknown
    save_file(tensors, files[1])
    with pytest.raises(UserError) as caught:
        convert(hf, tmp_path / "out")
    text = str(caught.value)
    for name, reason in (
        (names[0], "is missing"), (names[1], "has shape"), (names[2], "not finite"), ("stranger", "is unknown"),
        ("tensor", "is also in"),
    ):  # fmt: skip
        assert any(name in line and reason in line for line in text.splitlines()), (name, reason)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Two models, one with half a gigabyte more; the peak of a separate process that converts and exports."""
    peaks = []
    code = (
        "from pathlib import Path\n"
        "from megatron_a2d.conversion.hf_to_torch_dist import convert\nfrom megatron_a2d.conversion.torch_dist_to_hf import export\n"
        "convert(Path('hf'), Path('ckpt'), workers=2)\nexport(Path('ckpt'), Path('out'), 'qwen3', workers=2)\n"
        # Not getrusage: its peak begins with that of the process that started this one.
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    small = {"vocab_size": 8192, "mask_token_id": 8191, "bos_token_id": 0, "eos_token_id": 1}
    for layers in (1, 18):
        write_synthetic(tmp_path / "hf", hub_config("0.6B", num_hidden_layers=layers, **small))
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout) * 1024)
        for name in ("hf", "ckpt", "out"):
            shutil.rmtree(tmp_path / name)
    assert peaks[1] < peaks[0] + 100e6, peaks
    assert max(peaks) < 1.5e9
