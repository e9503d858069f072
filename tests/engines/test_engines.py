"""Exports in SDAR's form under the code of those who run it: LMDeploy, SGLang, and SDAR's own.

A2D_ENGINES names a folder (make test-engines fetches it), A2D_TRANSFORMERS4 one with transformers 4.57; a test of which
something is missing is skipped. What the engines need of an export is also held by tests/unit/test_sdar.py.

    lmdeploy/             LMDeploy and what it needs, SGLang too
    sglang/               SGLang and what only it needs
    sdar/                 a checkout of SDAR's repository
    transformers5/        for LMDeploy, besides 4.57
    transformers_sglang/  the release that SGLang asks for
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, make_canvas
from megatron_a2d.hf.load_hf_model import diffusion_classes
from megatron_a2d.inference.hf_model import load_hf_model
from tests.unit.hf_tensors import tensors_of
from tests.unit.test_sdar import MASK, PROMPTS, SERVED, exported, half_written, trained

ENGINES, TRANSFORMERS4 = os.environ.get("A2D_ENGINES", ""), os.environ.get("A2D_TRANSFORMERS4", "")
BLOCK = 8  # the engines' default is 4


def needs(*folders: str) -> pytest.MarkDecorator:
    """Skips a test of which a folder of A2D_ENGINES is missing."""
    missing = [name for name in folders if not (ENGINES and Path(ENGINES, name).is_dir())]
    lacks = f"A2D_ENGINES has no {' and no '.join(missing)}" if ENGINES else "A2D_ENGINES names no folder of engines"
    return pytest.mark.skipif(bool(missing) or not TRANSFORMERS4, reason=lacks if missing else "no A2D_TRANSFORMERS4")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in ("dense_tied", "moe"):
        root = tmp_path_factory.mktemp(kind)
        found[kind] = exported(trained(root, kind, SERVED | {"block_length": BLOCK}), root / "export", "sdar")
    return found


def run(client: str, folders: list[str], work: Path, *arguments: object) -> Any:
    """What a client writes into the file out.pt, in a process with `folders` in front of the path."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(Path(folder).resolve()) for folder in folders),
        "HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name(client)), *map(str, arguments), str(work / "out.pt")]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(work / "out.pt")


@needs("lmdeploy", "transformers5")
@pytest.mark.parametrize("line", ["4.57", "5"])
@pytest.mark.parametrize("kind", ["dense_tied", "moe"])
def test_lmdeploy_computes_our_logits(kind: str, line: str, exports: dict[str, Path], tmp_path: Path) -> None:
    tokens_BL = half_written(MASK)
    torch.save(tokens_BL, tmp_path / "tokens.pt")
    folders = [TRANSFORMERS4 if line == "4.57" else f"{ENGINES}/transformers5", f"{ENGINES}/lmdeploy"]
    facts, theirs_BLV = run("lmdeploy_client.py", folders, tmp_path, exports[kind], BLOCK, tmp_path / "tokens.pt")
    assert facts == {"mask": MASK, "paradigm": "dllm", "theta": 1e6, "unset": []}
    model = diffusion_classes()["sdar_moe" if kind == "moe" else "sdar"].from_pretrained(exports[kind]).eval()
    with torch.no_grad():
        ours_BLV = model(tokens_BL).logits
    assert (ours_BLV - theirs_BLV).abs().max() < 1e-5


def in_sglang(export: Path, work: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What SGLang makes of an export: facts of its configuration and modules, and their tensors."""
    folders = [f"{ENGINES}/{name}" for name in ("transformers_sglang", "sglang", "lmdeploy")]
    facts, tensors = run("sglang_client.py", folders, work, export)
    return facts, tensors


def merged(name: str, num_experts: int, ours: dict[str, Tensor]) -> Tensor:
    """What SGLang's tensor of this name is made of; its parts are taken out of `ours`."""
    for whole, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        if whole in name:
            return torch.cat([ours.pop(name.replace(whole, part)) for part in parts])
    for whole, parts in (("w13_weight", ("gate_proj", "up_proj")), ("w2_weight", ("down_proj",))):
        if name.endswith(whole):
            experts = (f"{name.removesuffix(whole)}{number}" for number in range(num_experts))
            return torch.stack([torch.cat([ours.pop(f"{one}.{part}.weight") for part in parts]) for one in experts])
    return ours.pop(name)


@needs("sglang", "lmdeploy", "transformers_sglang")
@pytest.mark.parametrize("kind", ["dense_tied", "moe"])
def test_sglang_loads_every_tensor(kind: str, exports: dict[str, Path], tmp_path: Path) -> None:
    """Into its own modules, bit by bit in its precision, with our rotary base and block length."""
    facts, theirs = in_sglang(exports[kind], tmp_path)
    architecture = "SDARMoeForCausalLM" if kind == "moe" else "SDARForCausalLM"
    assert facts == {"class": architecture, "mask": MASK, "block": BLOCK, "theta": {1e6}, "unset": []}
    ours = tensors_of(exports[kind])
    for name, tensor in theirs.items():
        expected = merged(name, len(tensor), ours)
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    assert not ours, "tensors that SGLang has no use for"


@needs("sglang", "lmdeploy", "transformers_sglang")
def test_a_tensor_that_sglang_misses_is_seen(exports: dict[str, Path], tmp_path: Path) -> None:
    """Control: it loads such an export without an error."""
    directory = shutil.copytree(exports["moe"], tmp_path / "export")
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.0.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    assert in_sglang(directory, tmp_path)[0]["unset"] == ["model.layers.1.mlp.experts.w13_weight"]


@needs("sdar", "lmdeploy")
def test_sdars_own_code_writes_our_text(exports: dict[str, Path], tmp_path: Path) -> None:
    """Its modelling and generation code, one token a step by confidence; dense only, as published."""
    directory = shutil.copytree(exports["dense_tied"], tmp_path / "model")
    for path in directory.glob("*.py"):
        path.unlink()
    for path in Path(ENGINES, "sdar", "training", "model", "SDAR-4B-Chat").glob("*.py"):
        shutil.copy(path, directory)
    folders = [TRANSFORMERS4, f"{ENGINES}/lmdeploy"]  # einops and triton are among what LMDeploy needs
    arguments = (directory, f"{ENGINES}/sdar", BLOCK, json.dumps(PROMPTS), 12)
    theirs = run("sdar_client.py", folders, tmp_path, *arguments)
    loaded = load_hf_model(exports["dense_tied"])
    options = SamplingOptions(
        sampler="confidence", num_steps=100, greedy=True, temperature=1.0, block_length=BLOCK, aligned_blocks=True
    )
    for prompt, text in zip(PROMPTS, theirs, strict=True):
        canvas = make_canvas([[*prompt, *[MASK] * (len(text) - len(prompt))]], MASK)
        ours = denoise(loaded.forward, canvas, MASK, options, label_shift=False).tokens[0].tolist()
        assert ours == text and len(set(text)) > 5  # no repetition of one token
