"""Exports in SDAR's form under the code of those who run it: LMDeploy, and SDAR's own. Skipped where they are not at hand.

A2D_ENGINES names a folder with lmdeploy/ (the package and what it needs), transformers5/ for it, and sdar/ (a checkout);
A2D_TRANSFORMERS4 one with transformers 4.57. What the two need of an export is also held by tests/unit/test_sdar.py.
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

from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, make_canvas
from megatron_a2d.hf.load_hf_model import diffusion_classes
from megatron_a2d.inference.hf_model import load_hf_model
from tests.unit.test_sdar import BLOCK, MASK, PROMPTS, SERVED, exported, half_written, trained

ENGINES, TRANSFORMERS4 = os.environ.get("A2D_ENGINES", ""), os.environ.get("A2D_TRANSFORMERS4", "")
pytestmark = pytest.mark.skipif(not (ENGINES and TRANSFORMERS4), reason="A2D_ENGINES names no folder of engines")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kind in ("dense_tied", "moe"):
        root = tmp_path_factory.mktemp(kind)
        found[kind] = exported(trained(root, kind, SERVED), root / "export", "sdar")
    return found


def run(client: str, folders: list[str], work: Path, *arguments: object) -> Any:
    """What a client writes into the file out.pt, in a process with `folders` in front of the path."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(Path(folder).resolve()) for folder in folders),
        "HF_MODULES_CACHE": str(work / "modules"),
    }
    command = [sys.executable, str(Path(__file__).with_name(client)), *map(str, arguments), str(work / "out.pt")]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(work / "out.pt")


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
        assert ours == text and len(set(text)) > 6
