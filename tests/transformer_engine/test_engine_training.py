"""Training with Transformer Engine's layers: schedules, FP8 weights, checkpoints that both kinds of layers read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cases import Case
from tests.parity.layouts import DISTRIBUTED, EP, OVERLAP, TP_SP
from tests.parity.pool import Pool
from tests.transformer_engine.engine_cases import fusions
from tests.transformer_engine.engine_pool import EnginePool
from tests.transformer_engine.pretend_gpu import BLACKWELL, HOPPER

REPOSITORY = Path(__file__).parents[2]
FP8_WEIGHTS = {**OVERLAP, **fusions("dense"), "bf16": True, "fp8_param_gather": True, "transformer_impl": "auto"}
RESUMED = {"train_iters": 4, "save_interval": 2, "log_interval": 1, "eval_interval": 4, "lr_warmup_iters": 3}
FULL = pytest.mark.full


@pytest.mark.parametrize(
    "settings",
    [
        {"delay_wgrad_compute": True},
        pytest.param({}, marks=FULL),
        pytest.param({**OVERLAP, "delay_wgrad_compute": True}, marks=FULL),
        pytest.param({"delay_wgrad_compute": True, "recompute_granularity": "selective", "recompute_modules": ("moe_act", "layernorm")}, marks=FULL),
    ],
)  # fmt: skip
def test_interleaved_micro_batches(settings: dict[str, Any], cases: dict[str, Case], engine_pool: EnginePool) -> None:
    """The plain schedule's losses and norms; control: another learning rate's differ."""

    def steps(**more: Any) -> list[float]:
        changes = {**cases["moe"].settings, **EP, **fusions("moe"), "bf16": True, **settings, **more}
        results = engine_pool.run("train_steps", 2, checkpoint=cases["moe"].checkpoint, settings=changes, num_steps=2)
        return [value for result in results for value in (*result["losses"], *result["grad_norms"])]

    plain = steps(delay_wgrad_compute=False)
    assert steps(overlap_moe_expert_parallel_comm=True) == pytest.approx(plain, rel=1e-6)
    assert steps(overlap_moe_expert_parallel_comm=True, lr=2e-2) != pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(
    ("recipe", "capability"),
    [
        ("mxfp8", BLACKWELL),
        *(pytest.param(name, HOPPER, marks=FULL) for name in ("tensorwise", "blockwise", "delayed")),
    ],
)
def test_fp8_weights(
    recipe: str, capability: tuple[int, int], wide: dict[str, Any], engine_pool: EnginePool, tmp_path: Path
) -> None:
    """--fp8-param-gather on two processes: a step's weights reach the next one, and a resumed run is the unbroken one."""
    settings = {
        **wide["dense"]["settings"], **FP8_WEIGHTS, **RESUMED, "fp8_recipe": recipe, "seq_length": 64,
        "global_batch_size": 4, "load": wide["dense"]["checkpoint"],
    }  # fmt: skip

    def run(name: str, ranks: int = 2, **options: Any) -> list[Any]:
        changed = {**settings, "save": str(tmp_path / name), **options.pop("more", {})}
        return engine_pool.run("run", ranks, settings=changed, capability=capability, **options)

    unbroken = run("unbroken")
    run("stopped", stop_at=2, finish_saves=True)
    resumed = run("stopped")
    assert [rank["start"] for rank in resumed] == [2, 2]
    # Delayed scaling begins again with scales of 1: its history is kept in no checkpoint.
    tolerance = 1e-2 if recipe == "delayed" else 1e-3
    assert resumed[0]["losses"][-2:] == pytest.approx(unbroken[0]["losses"][2:], rel=tolerance)
    in_bf16 = run("in_bf16", more={"fp8_param_gather": False})
    assert unbroken[0]["losses"] == pytest.approx(in_bf16[0]["losses"], rel=2e-2)


@pytest.mark.parametrize(
    ("kind", "ranks", "layout"),
    [
        pytest.param("moe", 2, {**TP_SP, **EP}, marks=FULL),
        pytest.param("dense_tied", 2, DISTRIBUTED, marks=FULL),
        pytest.param("moe", 2, {**EP, **OVERLAP}, marks=FULL),
        pytest.param("isolated", 1, {}, marks=FULL),
    ],
)
def test_checkpoints_are_the_same(
    kind: str, ranks: int, layout: dict[str, Any], cases: dict[str, Case], pool: Pool, engine_pool: EnginePool,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Four steps of the local layers; two of these and two of the others, from one's checkpoint to the other's, and back."""
    case = cases[kind]
    settings = {**case.settings, **layout, **RESUMED, "load": case.checkpoint}
    fused = {**settings, **fusions(kind)}

    def run(on: Any, wanted: dict[str, Any], name: str, **options: Any) -> list[Any]:
        return on.run("run", ranks, settings={**wanted, "save": str(tmp_path / name)}, **options)

    unbroken = run(pool, settings, "unbroken")
    for first, second, name in (
        ((engine_pool, fused), (pool, settings), "there"),
        ((pool, settings), (engine_pool, fused), "back"),
    ):
        started = run(*first, name, stop_at=2, finish_saves=True)
        resumed = run(*second, name)
        assert [rank["start"] for rank in resumed] == [2] * ranks
        losses = started[0]["losses"] + resumed[0]["losses"]
        assert losses == pytest.approx(unbroken[0]["losses"], rel=2e-6)


def test_the_spec_of_the_layers(engine_pool: EnginePool) -> None:
    """tests/unit/test_transformer_engine_spec.py, which skips itself where the package cannot be imported."""
    code = "from tests.transformer_engine.pretend_gpu import install; install()\nimport pytest, sys\nsys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", "tests/unit/test_transformer_engine_spec.py"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout + result.stderr
