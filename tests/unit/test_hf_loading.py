"""What a directory from elsewhere may decide when transformers loads it: the shape of the model, nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoints_tools import convert_hf
from megatron_a2d.conversion.torch_dist_to_hf import export
from megatron_a2d.hf import CODE_FILES
from megatron_a2d.inference.hf_model import load_hf_model
from megatron_a2d.utils.errors import UserError
from megatron_a2d.verification import logits_report
from tests import tiny

STEERING: dict[str, Any] = {
    "attn_implementation": "nobody/kernel",
    "_attn_implementation": "nobody/kernel",
    "_attn_implementation_internal": "nobody/kernel",
    "experts_implementation": "nobody/kernel",
    "use_kernels": True,
    "kernel_config": {"RMSNorm": "nobody/kernel:Norm"},
    "extra_files": ["../other.safetensors"],
    "base_model_tp_plan": {"layers.*": "colwise"},
}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One mixture of experts as the hub has it, and as exports."""
    root = tmp_path_factory.mktemp("loading")
    found = {"qwen3": tiny.write_hf(root / "qwen3", "moe", rope_scaling=YARN)}
    convert_hf.main(["--hf-model", str(found["qwen3"]), "--out", str(root / "checkpoint"), "--no-verify"])
    for form in ("a2d", "rnd1"):
        export(root / "checkpoint", root / form, form, CODE_FILES[form])
        found[form] = root / form
    return found


def opened(directory: Path) -> Any:
    return load_hf_model(directory, "ar" if directory.name.startswith("qwen3") else "mdlm")


@pytest.mark.parametrize("form", ["qwen3", "a2d", "rnd1"])
def test_kernels_that_config_json_names_are_not_fetched(
    form: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(directories[form], tmp_path / form)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | STEERING))
    if form == "qwen3":
        with pytest.raises(ImportError, match="kernels"):
            AutoModelForCausalLM.from_pretrained(directory)
    tokens = logits_report.random_tokens(tiny.VOCAB_SIZE)
    expected = logits_report.transformers_logits(directories[form], tokens, bidirectional=False)
    assert torch.equal(logits_report.transformers_logits(directory, tokens, bidirectional=False), expected)
    assert opened(directory).forward.model.config._attn_implementation == "sdpa"


def outside(directory: Path) -> None:
    shutil.move(directory / "model.safetensors", directory.parent / "elsewhere.safetensors")
    names = load_file(directory.parent / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "files outside": (outside, "is outside the directory"),
    "pickles": (pickled, r"holds neither model.safetensors .*found pytorch_model.bin"),
    "an adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "an adapter of another model"),
    "quantised": (
        lambda d: (d / "config.json").write_text(
            json.dumps(json.loads((d / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}})
        ),
        r"quantised \(gptq\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("form", ["qwen3", "a2d"])
def test_what_is_not_in_the_directory_as_safetensors_is_refused(
    form: str, case: str, directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By generate and evaluate, which open a model here, as by convert_hf."""
    directory = shutil.copytree(directories[form], tmp_path / form)
    damage, message = BAD[case]
    damage(directory)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    with pytest.raises(UserError, match=message):
        opened(directory)


ELSEWHERE = """
import sys, torch, transformers
out, place, *directories = sys.argv[1:]
assert transformers.__file__.startswith(place), transformers.__file__
tokens, results = torch.load(out), {}
for directory in directories:
    kind = transformers.AutoModelForCausalLM if "qwen3" in directory else transformers.AutoModelForMaskedLM
    model, report = kind.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        results[directory] = model.eval()(tokens).logits
torch.save(results, out)
"""


@pytest.mark.skipif("A2D_TRANSFORMERS4" not in os.environ, reason="it does not name a directory with transformers 4.57")
def test_exports_are_the_same_model_under_transformers_4(directories: dict[str, Path], tmp_path: Path) -> None:
    """YaRN, number of experts, rotary base: the keys that transformers 4 and 5 spell otherwise."""
    again = tmp_path / "qwen3"
    export(directories["qwen3"].with_name("checkpoint"), again, "qwen3")
    tokens = logits_report.random_tokens(tiny.VOCAB_SIZE)
    names = [str(path) for path in (again, directories["a2d"], directories["rnd1"])]
    torch.save(tokens, tmp_path / "tokens.pt")
    environment = {**os.environ, "PYTHONPATH": os.environ["A2D_TRANSFORMERS4"], "HF_HOME": str(tmp_path / "home")}
    command = [
        sys.executable,
        "-c",
        ELSEWHERE,
        str(tmp_path / "tokens.pt"),
        os.environ["A2D_TRANSFORMERS4"],
        *names,
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, logits in torch.load(tmp_path / "tokens.pt").items():
        expected = logits_report.transformers_logits(Path(name), tokens, bidirectional=False)
        assert (logits - expected).abs().max() <= 1e-5, name
