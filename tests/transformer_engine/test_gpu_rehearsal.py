"""`make gpu`, whole, without a GPU: every part's command runs to its end over the stand-in, and writes what it should.

So on the day a card is there, nothing is new but the card. `.ci/run` has it, `make test-integration` alone has not: five minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu
from bench.shapes import SHAPES
from tests.transformer_engine.pretend_gpu import DIRECTORY

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.full
def test_all_parts(tmp_path: Path) -> None:
    if not DIRECTORY:
        pytest.skip("A2D_TRANSFORMER_ENGINE names no directory with Transformer Engine; `make test-te` sets it")
    out = tmp_path / "result.json"
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # may name the newest megatron-core
    command = [sys.executable, "-m", "bench.gpu", "--rehearse", "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}, capture_output=True, text=True
    )
    result = json.loads(out.read_text())
    parts = {part["name"]: part for part in result["parts"]}
    assert (
        not {name: part["last_lines"] for name, part in parts.items() if part["status"] != "ok"}
        and done.returncode == 0
    ), done.stdout
    assert list(parts) == [part.name for part in gpu.parts(rehearse=True)] and result["rehearsal"]
    for name in ("engine_vs_local", "fp8_vs_emulation", "fp8_curve", "tests"):
        outcomes = parts[name]["result"]["outcomes"]
        assert list(outcomes.values()).count("passed") >= 2 and "failed" not in outcomes.values(), outcomes
    rows = [row for name, part in parts.items() if name.startswith("train_step") for row in part["result"]["rows"]]
    assert {row["shape"] for row in rows} == set(SHAPES)
    for shape in SHAPES:
        measured = {row["variant"] for row in rows if row["shape"] == shape}
        assert {"bf16", "fp8", "bf16, portable"} <= measured
        assert any(variant.startswith("hugging_face") for variant in measured)
    waits = parts["host_waits"]["result"]["rows"]
    assert all(row["places"] and row["settings"]["transformer_impl"] == "transformer_engine" for row in waits)
