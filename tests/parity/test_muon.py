"""Muon: its update from the formulas, its parameters, layouts, resume and resharding; under the newest megatron-core."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_a2d.checkpoint.directory import resolve
from megatron_a2d.config.installed_versions import find_version_problems
from megatron_a2d.config.model_config import read_model_config
from megatron_a2d.config.settings import build
from megatron_a2d.planner.memory import state_bytes
from megatron_a2d.planner.routing import Routing
from megatron_a2d.planner.workload import job_of
from tests.cases import Case
from tests.parity.layouts import CP, EP, PP, TP_SP, VPP, Layout, each
from tests.parity.parity_jobs import SETTINGS
from tests.parity.pool import Pool
from tests.parity.test_reshard import content

MISSING = find_version_problems(build({"optimizer": "muon", "train_iters": 1}))
pytestmark = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING) or "nothing is missing")

TOLERANCE = 1e-6
MUON: dict[str, Any] = {"optimizer": "muon", "muon_fp32_matmul_prec": "highest"}
PLAIN = {**MUON, "clip_grad": 0.0, "lr_decay_style": "constant", "weight_decay": 0.3}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("dense_tied", {}),
        ("qwen2", {"muon_scale_mode": "shape_scaling", "muon_momentum": 0.5, "muon_extra_scale_factor": 0.7}),
        ("moe", {"muon_router": True, "muon_scale_mode": "unit_rms_norm", "muon_num_ns_steps": 3, "muon_use_nesterov": False}),
    ],
)  # fmt: skip
def test_updates_are_those_of_the_formulas(
    kind: str, settings: dict[str, Any], cases: dict[str, Case], pool: Pool
) -> None:
    """Three steps. Learning rates by role, weight decay, and AdamW for what is not Muon's; biases are no matrices."""
    case = cases[kind]
    job = {"checkpoint": case.checkpoint, "settings": {**case.settings, **PLAIN, **settings}, "num_steps": 3}
    [found] = pool.run("muon_against_formulas", 1, **job)
    muon = {"attention", "mlp", *(["router"] if "muon_router" in settings else [])}
    adam = {
        "norm",
        "embedding",
        *([] if kind == "dense_tied" else ["head"]),
        *(["attention"] if kind == "qwen2" else []),
    }
    assert set(found) == {f"{role}, Muon" for role in muon} | {f"{role}, AdamW" for role in adam}
    for key, (error, change) in found.items():
        assert error < 1e-3 * change and change > 0.05, (key, error, change)


def test_where_megatron_would_use_adam(cases: dict[str, Case], pool: Pool) -> None:
    case = cases["moe"]
    every, experts = pool.run("silent_adam", 1, checkpoint=case.checkpoint, settings={**case.settings, **MUON})[0]
    assert "--optimizer muon: megatron-core would update" in every and "linear_" in every and "with AdamW" in every
    assert ".experts." in experts and "with AdamW" in experts


LAYOUTS = [
    Layout("dense", "TP2+SP x PP2", 4, {**TP_SP, **PP}),
    Layout("moe", "TP2+SP x DP2, EP2", 4, {**TP_SP, **EP}),
    Layout("moe", "VPP2 x DP2, EP2", 4, {**VPP, **EP}),
    Layout("moe", "CP2 x PP2, EP2", 4, {**CP, **PP, **EP}),
    Layout("qwen2", "TP2+SP x DP2", 4, TP_SP),
]


@each(LAYOUTS, quick=lambda layout: layout in LAYOUTS[:2])
def test_layouts(layout: Layout, cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """Two steps against one process, gradients and weights."""
    case, reference = cases[layout.case], str(tmp_path / "reference.pt")
    job = {"checkpoint": case.checkpoint, "num_steps": 2}
    pool.run("train_steps", 1, settings={**case.settings, **MUON}, save_reference=reference, **job)
    ranks = pool.run("train_steps", layout.ranks, settings={**case.settings, **MUON, **layout.settings}, reference=reference, **job)  # fmt: skip
    for rank in ranks:
        assert max(rank["gradients"], rank["parameters"]) < TOLERANCE, ranks


def run_settings(case: Case, save: Path, **settings: Any) -> dict[str, Any]:
    return {
        **case.settings, **MUON, "load": case.checkpoint, "save": str(save), "train_iters": 4, "save_interval": 2,
        "log_interval": 1, "lr_warmup_iters": 3, "eval_interval": 4, **settings,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(2, {**EP, "bf16": True, "muon_fp32_matmul_prec": "medium"}), pytest.param(4, {**TP_SP, **PP, **EP}, marks=pytest.mark.full)],
    ids=["EP2, bf16", "TP2+SP x PP2, EP2"],
)  # fmt: skip
def test_resume_is_bitwise(
    ranks: int, settings: dict[str, Any], cases: dict[str, Case], pool: Pool, tmp_path: Path
) -> None:
    case = cases["moe"]
    unbroken = pool.run("run", ranks, settings=run_settings(case, tmp_path / "unbroken", **settings))
    stopped = run_settings(case, tmp_path / "stopped", **settings)
    pool.run("run", ranks, settings=stopped, stop_at=2)
    resumed = pool.run("run", ranks, settings=stopped)
    for one, other in zip(unbroken, resumed, strict=True):
        assert other["start"] == 2 and one["weights"] == other["weights"] and one["optimizer"] == other["optimizer"]
        assert one["losses"][2:] == other["losses"][-2:]


def test_resharding(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """Two steps on one process, two more on four; and the other way round: the weights and moments of four on one."""
    case, four = cases["moe"], {**TP_SP, **EP}
    one, other = tmp_path / "one", tmp_path / "other"
    pool.run("run", 1, settings=run_settings(case, one))
    pool.run("run", 4, settings=run_settings(case, other, **four), stop_at=2)
    shutil.copytree(one, tmp_path / "more")
    shutil.rmtree(tmp_path / "more" / "iter_0000004")
    (tmp_path / "more" / "latest_checkpointed_iteration.txt").write_text("2")
    pool.run("run", 4, settings=run_settings(case, tmp_path / "more", **four))
    pool.run("run", 1, settings=run_settings(case, other))
    expected = content(one / "iter_0000004")
    moments = {name.split(".")[2] for name in expected if name.startswith("optimizer.state.")}
    assert moments == {"momentum_buffer", "exp_avg", "exp_avg_sq"}
    by_muon = [name for name in expected if ".momentum_buffer." in name]
    assert all("linear_" in name for name in by_muon) and any("experts" in name for name in by_muon)
    for directory in (tmp_path / "more", other):
        found = content(directory / "iter_0000004")
        assert found.keys() == expected.keys()
        difference = max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())
        assert difference < TOLERANCE


def test_memory_is_the_planners(cases: dict[str, Case], pool: Pool) -> None:
    """Optimizer state to the byte."""
    case = cases["moe"]
    settings = {**case.settings, **MUON, **EP, "bf16": True, "seq_length": 128}
    model_config = read_model_config(resolve(case.checkpoint) / "hf")
    job = job_of(build(SETTINGS | settings), model_config, 2, routing=Routing.of(1.0), transformer_impl="local")
    for rank in pool.run("measure_memory", 2, checkpoint=case.checkpoint, settings=settings):
        assert rank["optimizer_bytes"] == state_bytes(job, rank["stage"])[2]
