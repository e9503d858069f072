"""Each recipe trains: its own settings in the training loop, a tiny model, as much of its layout as four processes have.

What needs a GPU is turned off by portable.yaml, and there is no package deep_ep here; all the rest is the recipe's.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cases import Case
from tests.parity.pool import Pool

RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if "\nmodel:" in path.read_text())
QUICK = ("qwen3_235b_a22b", "rnd1_30b_a3b_64xb200")
SMALL: dict[str, Any] = dict(
    model="", seq_length=32, global_batch_size=16, train_iters=4, lr_warmup_iters=1, lr_wsd_decay_iters=1, eval_iters=1,
    log_interval=2, save_interval=2, eval_interval=2, moe_token_dispatcher_type="alltoall",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in NAMES]
)
def test_it_trains(name: str, cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    recipe, portable = (yaml.safe_load((RECIPES / f"{file}.yaml").read_text()) for file in (name, "portable"))
    axes = (
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
        "num_virtual_stages_per_pipeline_rank",
    )  # fmt: skip
    layout = {axis: min(2, recipe.get(axis, 1)) for axis in axes}
    kind = "moe" if layout["expert_model_parallel_size"] > 1 else "dense"
    start = {**cases[kind].settings, "load": cases[kind].checkpoint, "save": str(tmp_path / "run")}
    ranks = 4 if layout["pipeline_model_parallel_size"] > 1 else 2
    results = pool.run("run", ranks, settings=recipe | portable | SMALL | layout | start)
    assert all(result["exit_code"] == 0 and result["iteration"] == 4 for result in results)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "grad_norm_by_role" in line]
    assert [line["iteration"] for line in logged] == [2, 4]
    assert all(math.isfinite(line["loss"]) and ("moe" in line) == (kind == "moe") for line in logged)
