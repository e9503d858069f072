"""What we export gives the trained model's logits, in both lines of transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints_tools import export_hf
from tests.cases import Case
from tests.parity.pool import Pool
from tests.parity.test_hf import TOKENS, largest_difference, our_logits

TRANSFORMERS4 = os.environ.get("A2D_TRANSFORMERS4", "")
LOAD = """
import sys, torch, transformers
directory, tokens, out = sys.argv[1:]
model = transformers.AutoModelForMaskedLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
assert "megatron_a2d" not in sys.modules
with torch.no_grad():
    torch.save((transformers.__version__, model(torch.load(tokens)).logits), out)
"""


@pytest.mark.parametrize("line", ["4.57", "5."])
@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("moe", "rnd1"), ("moe", "a2d"), pytest.param("dense", "a2d", marks=pytest.mark.full), ("dense_tied", "a2d"),
    ],
)  # fmt: skip
def test_export_gives_our_logits(
    line: str, kind: str, format: str, cases: dict[str, Case], pool: Pool, tmp_path: Path
) -> None:
    if line == "4.57" and not TRANSFORMERS4:
        pytest.skip("A2D_TRANSFORMERS4 names no transformers 4.57; `make test` sets it")
    export_hf.main(["--checkpoint", cases[kind].checkpoint, "--out", str(tmp_path / "export"), "--format", format])
    torch.save(TOKENS, tmp_path / "tokens.pt")
    # A process that knows nothing of this project: not in its directory, not on its path.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if line == "4.57":
        environment["PYTHONPATH"] = str(Path(TRANSFORMERS4).resolve())
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, "-c", LOAD, *(str(tmp_path / name) for name in ("export", "tokens.pt", "logits.pt"))]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    version, theirs = torch.load(tmp_path / "logits.pt")
    assert version.startswith(line)
    assert largest_difference(our_logits(pool, cases[kind], causal=False), theirs) < 1e-5
