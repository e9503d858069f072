"""Training with Transformer Engine's layers: schedules, FP8 weights, checkpoints that both kinds of layers read."""

from __future__ import annotations

import shutil
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
from tests.transformer_engine.engine_results import EngineResults
from tests.transformer_engine.pretend_gpu import BLACKWELL, HOPPER

REPOSITORY = Path(__file__).parents[2]
FP8_WEIGHTS = {**OVERLAP, **fusions("dense"), "bf16": True, "fp8_param_gather": True, "transformer_impl": "auto"}
RESUMED = {"train_iters": 4, "save_interval": 2, "log_interval": 1, "eval_interval": 4, "lr_warmup_iters": 3}
FULL = pytest.mark.full


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest relative one."""
    return max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))


DELAYED = {"delay_wgrad_compute": True}
RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": ("moe_act", "layernorm")}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("weight gradients delayed", DELAYED),
        pytest.param("at once", {}, marks=FULL),
        pytest.param("weight gradients delayed, overlap", {**OVERLAP, **DELAYED}, marks=FULL),
        pytest.param("weight gradients delayed, recompute moe_act, layernorm", {**DELAYED, **RECOMPUTED}, marks=FULL),
        *(
            pytest.param(f"weight gradients delayed, FP8 {recipe}", {**DELAYED, "fp8_recipe": recipe}, marks=FULL)
            for recipe in ("tensorwise", "blockwise", "mxfp8", "delayed")
        ),
    ],
)
def test_interleaved_micro_batches(
    name: str, settings: dict[str, Any], wide: dict[str, Any], engine_pool: EnginePool, engine_results: EngineResults
) -> None:
    """The plain schedule's losses and norms; control: another learning rate's differ."""
    sizes = {"seq_length": 64, "global_batch_size": 8, "bf16": True, "transformer_impl": "auto"}
    capability = BLACKWELL if settings.get("fp8_recipe") == "mxfp8" else HOPPER

    def steps(**more: Any) -> list[float]:
        changes = {**wide["moe"]["settings"], **sizes, **EP, **fusions("moe"), **settings, **more}
        results = engine_pool.run(
            "train_steps", 2, checkpoint=wide["moe"]["checkpoint"], settings=changes, num_steps=2, capability=capability
        )
        return [value for result in results for value in (*result["losses"], *result["grad_norms"])]

    plain = steps(delay_wgrad_compute=False)
    found = difference(steps(overlap_moe_expert_parallel_comm=True), plain)
    engine_results.add(
        "training", f"1F1B, {name}", "moe", "EP2", "1F1B without overlap", difference=found, allowed=1e-6
    )
    assert found < 1e-6 < difference(steps(overlap_moe_expert_parallel_comm=True, lr=2e-2), plain)


@pytest.mark.parametrize(
    ("recipe", "capability"),
    [
        ("mxfp8", BLACKWELL),
        *(pytest.param(name, HOPPER, marks=FULL) for name in ("tensorwise", "blockwise", "delayed")),
    ],
)
def test_fp8_weights(
    recipe: str, capability: tuple[int, int], wide: dict[str, Any], pool: Pool, engine_pool: EnginePool,
    engine_results: EngineResults, tmp_path: Path,
) -> None:  # fmt: skip
    """--fp8-param-gather on two processes: a step's weights reach the next one; a resumed run is the unbroken one, and
    the local layers resume it too."""
    settings = {
        **wide["dense"]["settings"], **FP8_WEIGHTS, **RESUMED, "fp8_recipe": recipe, "seq_length": 64,
        "global_batch_size": 4, "load": wide["dense"]["checkpoint"],
    }  # fmt: skip

    def run(name: str, ranks: int = 2, **options: Any) -> list[Any]:
        changed = {**settings, "save": str(tmp_path / name), **options.pop("more", {})}
        return engine_pool.run("run", ranks, settings=changed, capability=capability, **options)

    unbroken = run("unbroken")
    quantized = engine_pool.calls["quantize"]
    run("stopped", stop_at=2, finish_saves=True)
    shutil.copytree(tmp_path / "stopped", tmp_path / "local")
    resumed = run("stopped")
    assert [rank["start"] for rank in resumed] == [2, 2]
    local = {name: value for name, value in settings.items() if name not in (*fusions("dense"), "fp8_param_gather")}
    emulated = {**local, "transformer_impl": "local", "save": str(tmp_path / "local")}
    resumed_locally = pool.run("run", 2, settings=emulated)
    assert resumed_locally[0]["start"] == 2
    in_bf16 = run("in_bf16", more={"fp8_param_gather": False})
    assert quantized != engine_pool.calls["quantize"], "weights are quantised in the forward pass, or with the update"
    whole = unbroken[0]["losses"]
    assert difference(whole[:2], whole[2:]) > 2e-2, "control: other steps have other losses"
    # Delayed scaling begins again with scales of 1: its history is kept in no checkpoint.
    for what, losses, expected, allowed in (
        ("resumed, and unbroken", resumed[0]["losses"][-2:], whole[2:], 1e-2 if recipe == "delayed" else 1e-3),
        ("resumed by the emulation, and unbroken", resumed_locally[0]["losses"][-2:], whole[2:], 3e-3),
        ("weights kept in bf16", in_bf16[0]["losses"], whole, 2e-2),
    ):
        found = difference(losses, expected)
        labels = (f"fp8_param_gather, {recipe}", "dense", "DP2, overlap", what)
        engine_results.add("training", *labels, difference=found, allowed=allowed)
        assert found < allowed, what


@pytest.mark.parametrize(
    ("kind", "name", "layout"),
    [
        pytest.param("moe", "TP2+SP, EP2", {**TP_SP, **EP}, marks=FULL),
        pytest.param("dense_tied", "DP2, distributed optimizer", DISTRIBUTED, marks=FULL),
        pytest.param("moe", "EP2, overlap", {**EP, **OVERLAP}, marks=FULL),
        pytest.param("isolated", "one process", {}, marks=FULL),
    ],
)
def test_checkpoints_are_the_same(
    kind: str, name: str, layout: dict[str, Any], cases: dict[str, Case], pool: Pool, engine_pool: EnginePool,
    engine_results: EngineResults, tmp_path: Path,
) -> None:  # fmt: skip
    """Four steps of the local layers; two of these and two of the others, from one's checkpoint to the other's, and back."""
    case, ranks = cases[kind], 2 if layout else 1
    settings = {**case.settings, **layout, **RESUMED, "load": case.checkpoint}
    fused = {**settings, **fusions(kind)}

    def run(on: Any, wanted: dict[str, Any], folder: str, **options: Any) -> list[Any]:
        return on.run("run", ranks, settings={**wanted, "save": str(tmp_path / folder)}, **options)

    unbroken = run(pool, settings, "unbroken")
    for first, second, what in (
        ((engine_pool, fused), (pool, settings), "saved by Transformer Engine's layers, resumed by the local ones"),
        ((pool, settings), (engine_pool, fused), "saved by the local layers, resumed by Transformer Engine's"),
    ):
        folder = what.replace(" ", "_").replace("'", "")
        started = run(*first, folder, stop_at=2, finish_saves=True)
        resumed = run(*second, folder)
        assert [rank["start"] for rank in resumed] == [2] * ranks
        found = difference(started[0]["losses"] + resumed[0]["losses"], unbroken[0]["losses"])
        engine_results.add("training", what, kind, name, "local layers, unbroken", difference=found, allowed=2e-6)
        assert found < 2e-6


def test_the_spec_of_the_layers(engine_pool: EnginePool) -> None:
    """tests/unit/test_transformer_engine_spec.py, which skips itself where the package cannot be imported."""
    code = "from tests.transformer_engine.pretend_gpu import install; install()\nimport pytest, sys\nsys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", "tests/unit/test_transformer_engine_spec.py"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout + result.stderr
