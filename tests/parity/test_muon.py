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
from megatron_a2d.planner.parameters import stage_buffers
from megatron_a2d.planner.routing import Routing
from megatron_a2d.planner.workload import Job, job_of
from tests.cases import Case
from tests.parity.layouts import CP, DISTRIBUTED, EP, OVERLAP, PP, TP_SP, VPP, Layout, each
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
    Layout("dense", "DP4, distributed optimizer", 4, DISTRIBUTED),
    Layout("moe", "TP2+SP x DP2, EP2, distributed optimizer", 4, {**TP_SP, **EP, **DISTRIBUTED}),
    Layout("dense_tied", "PP2 x DP2, overlap", 4, {**PP, **OVERLAP}),
    Layout("moe", "VPP2 x DP2, overlap", 4, {**VPP, **OVERLAP}),
    Layout("moe", "VPP2 x DP2, EP2, distributed optimizer", 4, {**VPP, **EP, **DISTRIBUTED}),
    Layout("moe", "CP2 x PP2, EP2, distributed optimizer", 4, {**CP, **PP, **EP, **DISTRIBUTED}),
    Layout("moe", "EP4, distributed optimizer", 4, {"expert_model_parallel_size": 4, **DISTRIBUTED}),
    Layout("qwen2", "TP2+SP x DP2, distributed optimizer", 4, {**TP_SP, **DISTRIBUTED}),
    Layout("moe", "DP2, routers too, distributed optimizer", 2, {"muon_router": True, **DISTRIBUTED}),
    Layout("frozen", "PP2 x TP2+SP, EP2, distributed optimizer", 4, {**PP, **TP_SP, **EP, **DISTRIBUTED}),
]


@each(LAYOUTS, quick=lambda layout: layout in (*LAYOUTS[:2], *LAYOUTS[5:8]))
def test_layouts(layout: Layout, cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """Two steps against one process: gradients where a rank has them whole, their norm, and weights."""
    case, reference = cases[layout.case], str(tmp_path / "reference.pt")
    settings = {**case.settings, **MUON, "muon_router": "muon_router" in layout.settings}
    job = {"checkpoint": case.checkpoint, "num_steps": 2}
    [one] = pool.run("train_steps", 1, settings=settings, save_reference=reference, **job)
    ranks = pool.run("train_steps", layout.ranks, settings={**settings, **layout.settings}, reference=reference, **job)
    for rank in ranks:
        for name in ("parameters",) if layout.is_sharded else ("parameters", "gradients"):
            assert rank[name] < TOLERANCE, (name, ranks)
        assert rank["grad_norms"] == pytest.approx(one["grad_norms"], rel=TOLERANCE)


def run_settings(case: Case, save: Path, **settings: Any) -> dict[str, Any]:
    return {
        **case.settings, **MUON, "load": case.checkpoint, "save": str(save), "train_iters": 4, "save_interval": 2,
        "log_interval": 1, "lr_warmup_iters": 3, "eval_interval": 4, **settings,
    }  # fmt: skip


BF16 = {**EP, "bf16": True, "muon_fp32_matmul_prec": "medium"}
FROZEN = {"lr_mult": dict.fromkeys(("embedding", "head", "norm", "router"), 0.0)}  # all that is AdamW's


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, BF16), pytest.param(4, {**TP_SP, **PP, **EP}, marks=pytest.mark.full), (1, FROZEN),
        (4, {**BF16, **OVERLAP, "async_save": True}),
        pytest.param(4, {**VPP, **EP, **DISTRIBUTED, **FROZEN}, marks=pytest.mark.full),
    ],
    ids=["EP2, bf16", "TP2+SP x PP2, EP2", "Muon alone", "DP4, EP2, bf16, overlap, saved in the background", "VPP2 x DP2, EP2, Muon alone, distributed optimizer"],
)  # fmt: skip
def test_resume_is_bitwise(
    ranks: int, settings: dict[str, Any], cases: dict[str, Case], pool: Pool, tmp_path: Path
) -> None:
    case = cases["moe"]
    unbroken = pool.run("run", ranks, settings=run_settings(case, tmp_path / "unbroken", **settings))
    stopped = run_settings(case, tmp_path / "stopped", **settings)
    pool.run("run", ranks, settings=stopped, stop_at=2, finish_saves=True)
    resumed = pool.run("run", ranks, settings=stopped)
    for one, other in zip(unbroken, resumed, strict=True):
        assert other["start"] == 2 and one["weights"] == other["weights"] and one["optimizer"] == other["optimizer"]
        assert one["losses"][2:] == other["losses"][-2:]


@pytest.mark.parametrize("distributed", [{}, DISTRIBUTED], ids=["each rank has all", "distributed optimizer"])
def test_resharding(distributed: dict[str, Any], cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """Two steps on one process, two more on four; and the other way round: the weights and moments of four on one."""
    case, four = cases["moe"], {**TP_SP, **EP, **distributed}
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


def test_a_step_that_is_not_finite_is_skipped(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """One rank's loss is NaN in step 2 of 4: matrices and their moments are as in one process that skips it."""
    case, places = cases["moe"], (tmp_path / "one", tmp_path / "four")
    for save, ranks, layout in zip(places, (1, 4), ({}, {**EP, **DISTRIBUTED}), strict=True):
        pool.run("run", ranks, settings=run_settings(case, save, **layout), poison=(2,))
    expected, found = (content(save / "iter_0000004") for save in places)
    assert found.keys() == expected.keys()
    assert max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items()) < TOLERANCE


@pytest.mark.parametrize("bf16", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_monitoring(bf16: dict[str, Any], cases: dict[str, Case], pool: Pool) -> None:
    """Norms and changes of weights by role count each matrix once, on the rank that updates it."""
    case = cases["moe"]
    settings = {**case.settings, **MUON, **bf16}
    [one] = pool.run("monitored", 1, checkpoint=case.checkpoint, settings={**settings, "micro_batch_size": 2})
    for found in pool.run("monitored", 4, checkpoint=case.checkpoint, settings={**settings, **EP, **DISTRIBUTED}):
        for kind in ("grad_norm_by_role", "update_to_weight_ratio", "relative_weight_change"):
            assert found[kind] == pytest.approx(one[kind], rel=0.05 if bf16 else 2e-6), kind


def measured(case: Case, pool: Pool, ranks: int, **settings: Any) -> tuple[Job, list[dict[str, Any]]]:
    """The planner's job, and what its ranks hold."""
    settings = {**case.settings, **MUON, "seq_length": 128, **settings}
    model_config = read_model_config(resolve(case.checkpoint) / "hf")
    job = job_of(build(SETTINGS | settings), model_config, ranks, routing=Routing.of(1.0), transformer_impl="local")
    return job, pool.run("measure_memory", ranks, checkpoint=case.checkpoint, settings=settings)


def test_memory_is_the_planners(cases: dict[str, Case], pool: Pool) -> None:
    """Optimizer state to the byte."""
    job, ranks = measured(cases["moe"], pool, 2, **EP, bf16=True)
    for rank in ranks:
        assert rank["optimizer_bytes"] == state_bytes(job, rank["stage"])[2]


@pytest.mark.parametrize(
    ("kind", "ranks", "settings"),
    [
        ("moe", 4, {**EP, **OVERLAP, "bf16": True}),
        pytest.param("dense_tied", 4, {**VPP, **DISTRIBUTED}, marks=pytest.mark.full),
        pytest.param("moe", 4, {**TP_SP, **EP, **DISTRIBUTED, "bf16": True}, marks=pytest.mark.full),
        pytest.param("qwen2", 3, {**DISTRIBUTED, "global_batch_size": 6}, marks=pytest.mark.full),
    ],
    ids=["EP2 x DP4, bf16", "VPP2 x DP2", "TP2+SP x DP2, EP2, bf16", "DP3"],
)  # fmt: skip
def test_each_rank_has_its_share(
    kind: str, ranks: int, settings: dict[str, Any], cases: dict[str, Case], pool: Pool
) -> None:
    """With the distributed optimizer: buffers and state to the byte, each matrix on one data-parallel rank."""
    job, measurements = measured(cases[kind], pool, ranks, **settings)
    number = 4 if job.bf16 else 0
    for rank in measurements:
        stage, (dense, expert) = rank["stage"], rank["replica"]
        buffers = stage_buffers(job, stage)
        assert [buffer.numel for buffer in buffers] == rank["buffers"]
        held = 0
        for buffer in buffers:
            numel = buffer.shard_numel(expert if buffer.holds_experts else dense)
            held += numel * (number + (4 if buffer.has_whole_matrices else 8))
            parameters = [parameter.total for bucket in buffer.buckets for parameter, _ in bucket.parameters]
            assert sum(map(buffer.shard_numel, range(buffer.replicas))) == sum(parameters)
        assert rank["optimizer_bytes"] == held <= state_bytes(job, stage)[2]
