"""The commands convert_hf, export_hf and verify: mask token, output, disk space, Hub ids, sizes, exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from checkpoints_tools import convert_hf, export_hf, options, verify
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.conversion.mask_token import choose_mask_token
from megatron_a2d.utils.errors import UserError
from tests import tiny
from tests.unit import model_damage
from tests.unit.model_damage import NAME, edit_tensors

models = model_damage.models


def test_mask_token_choices(models: Path, tmp_path: Path) -> None:
    directory = models / "dense"
    assert choose_mask_token(directory, 256, None, None) == tiny.MASK_TOKEN_ID
    assert choose_mask_token(directory, 256, None, 255) == 255
    assert choose_mask_token(directory, 256, 252, 255) == 252
    with pytest.raises(UserError, match=r"--mask-token-id 17: is the token .* such as 250"):
        choose_mask_token(directory, 256, 17, None)
    with pytest.raises(UserError, match=r"config.json: mask_token_id 17: is the token"):
        choose_mask_token(directory, 256, None, 17)
    for outside in (256, -1):
        with pytest.raises(UserError, match="outside the embedding"):
            choose_mask_token(directory, 256, outside, None)
    with pytest.raises(UserError, match="uses all 250 ids"):
        choose_mask_token(directory, 250, None, None)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 250, "content": "<|mask|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert choose_mask_token(tmp_path, 256, 250, None) == 250
    assert choose_mask_token(tmp_path, 256, None, None) == 250  # the tokenizer's own, not the first free row
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "<|im_start|>"}}))
    assert choose_mask_token(tmp_path, 256, None, None) == tiny.TURN_START  # the declared one before a mere name
    assert choose_mask_token(tmp_path, 256, None, 255) == 255  # what the model was trained with before both
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": "[MASK]"}))  # without an id
    assert choose_mask_token(tmp_path, 251, None, None) == 250


def test_an_existing_output_is_never_touched(models: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    for command in (
        lambda: convert_hf.main(["--hf-model", str(models / "dense"), "--out", str(tmp_path / "out")]),
        lambda: export_hf.main(["--checkpoint", str(models / "ckpt"), "--out", str(tmp_path / "out")]),
    ):
        with pytest.raises(UserError, match="already exists"):
            command()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_noticed_before_writing(models: Path, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="its disk has 1 kB left"):
        convert(models / "dense", tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_hub_ids(models: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "*.safetensors" in allow_patterns and "tokenizer*.json" in allow_patterns
        if name == "Qwen/Tiny":
            return str(models / "dense")
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    convert_hf.main(["--hf-model", "Qwen/Tiny", "--out", str(tmp_path / "out")])
    assert "mask token 250" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "release" / "hf" / "config.json").read_text())
    assert config["_name_or_path"] == "Qwen/Tiny"
    with pytest.raises(UserError, match=r"Qwen/Absent: no such directory.*no network.*connection"):
        convert_hf.main(["--hf-model", "Qwen/Absent", "--out", str(tmp_path / "other")])
    for path in ("./absent", "/absent", "absent", "a/b/c"):
        with pytest.raises(UserError, match="check the path"):
            convert_hf.main(["--hf-model", path, "--out", str(tmp_path / "other")])
    assert asked == ["Qwen/Tiny", "Qwen/Absent"]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("text", ["5GB", "1.5 gb", "300KB", "1000", "0", "five", "-3GB", "5GiB", ""])
def test_sizes(text: str) -> None:
    expected = {"5GB": 5 * 10**9, "1.5 gb": 1_500_000_000, "300KB": 300_000, "1000": 1000}
    if text in expected:
        assert options.parse_size("--max-shard-size", text) == expected[text]
    else:
        with pytest.raises(UserError, match="--max-shard-size"):
            options.parse_size("--max-shard-size", text)


def test_verify_wants_two_things(models: Path) -> None:
    with pytest.raises(UserError, match="exactly two"):
        verify.main(["--hf-model", str(models / "dense")])
    verify.main(["--hf-model", str(models / "moe"), "--checkpoint", str(models / "ckpt"), "--logits"])
    with pytest.raises(UserError, match="not the same model"):
        verify.main(["--hf-model", str(models / "dense"), "--checkpoint", str(models / "ckpt")])


def test_the_command_ends_with_code_2_and_one_line(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "dense", tmp_path / "hf")
    edit_tensors(tmp_path / "hf", lambda tensors: tensors.pop(NAME))
    command = [sys.executable, "-m", "checkpoints_tools.convert_hf", "--hf-model", "hf", "--out", "out"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1]
        == f"error: hf: tensor {NAME} is missing; fetch or write the model again, completely"
    )
    assert done.stderr.count("error:") == 1 and done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_the_auxiliary_loss_coefficient_is_translated(kind: str, models: Path, tmp_path: Path, capsys) -> None:
    """2 experts a token over 4 layers: half; nothing for a dense model."""
    convert_hf.main(["--hf-model", str(models / kind), "--out", str(tmp_path / "out"), "--no-verify"])
    told = (
        "router_aux_loss_coef 0.001 of its config.json equals --moe-aux-loss-coeff 0.0005 " in capsys.readouterr().out
    )
    assert told == (kind == "moe")
