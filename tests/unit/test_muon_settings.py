"""Muon's settings: what is refused, what a resume may change, what the planner counts. The update: tests/parity/test_muon.py."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from megatron_a2d.config import installed_versions
from megatron_a2d.config.installed_versions import find_version_problems
from megatron_a2d.config.settings import build
from megatron_a2d.config.validate import find_problems
from megatron_a2d.model.layer_specs import notes
from megatron_a2d.planner.memory import state_bytes
from megatron_a2d.planner.newton_schulz import orthogonalization_operations
from megatron_a2d.planner.parameters import stage_parameters
from megatron_a2d.study.ablations import lr_by_role
from megatron_a2d.training.resume import FIXED, REPORTED
from tests.unit.test_planner import DENSE, JOB
from tests.unit.test_training import QWEN3_30B_A3B

MUON = {"optimizer": "muon", "train_iters": 1}
PRECISE = {"bf16": True, "use_distributed_optimizer": True}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"muon_momentum": 0.9, "train_iters": 1}, "--muon-momentum 0.9: has no effect without --optimizer muon"),
        ({"muon_router": True, "train_iters": 1}, "--muon-router True: has no effect without --optimizer muon"),
        ({**MUON, "muon_momentum": 1.0}, r"--muon-momentum 1.0: must lie in \[0, 1\)"),
        ({**MUON, "muon_num_ns_steps": 0}, "--muon-num-ns-steps 0: must lie between 1 and 100"),
        ({**MUON, "muon_extra_scale_factor": 0.0}, "--muon-extra-scale-factor 0.0: must be positive"),
        ({**MUON, "lr_mult": {"attention": 0.0, "mlp": 0.0}}, "--lr-mult attention=0 mlp=0: freezes all that"),
        ({**MUON, **PRECISE, "use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer: not with --optimizer muon"),
        ({**MUON, **PRECISE, "fp8_param_gather": True, "fp8_recipe": "tensorwise"}, "--fp8-param-gather: not with --optimizer muon"),
        ({**MUON, "expert_tensor_parallel_size": 2}, "--expert-tensor-parallel-size 2: divides the experts' matrices"),
    ],
)  # fmt: skip
def test_refused(settings: dict[str, Any], problem: str) -> None:
    [line] = find_problems(build(settings), None, 2 * settings.get("expert_tensor_parallel_size", 1))
    assert re.match(problem, line), line


def test_what_goes_together() -> None:
    for changes in (
        {},
        {"lr_mult": {"attention": 0.0}},
        {"muon_router": True, "lr_mult": {"attention": 0.0, "mlp": 0.0}},
        PRECISE | {"overlap_grad_reduce": True, "overlap_param_gather": True},
    ):
        assert not find_problems(build({**MUON, **changes}), None, 2)


@pytest.mark.parametrize(
    ("releases", "problems"),
    [
        ({"megatron-core": (0, 19, 2), "emerging-optimizers": (0, 3, 0)}, []),
        ({"megatron-core": (0, 16, 1)}, ["needs megatron-core 0.19.2, and 0.16.1 is installed", "needs emerging-optimizers 0.3.0, and it is not installed; pip install emerging-optimizers==0.3.0"]),
        ({"megatron-core": (0, 19, 2), "emerging-optimizers": (0, 2)}, ["needs emerging-optimizers 0.3.0, and 0.2 is installed"]),
    ],
)  # fmt: skip
def test_missing_packages(releases: dict[str, Any], problems: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed_versions, "installed", releases.get)
    found = find_version_problems(build(MUON))
    assert len(found) == len(problems) and all(
        f"--optimizer muon: {part}" in line for part, line in zip(problems, found, strict=True)
    )
    assert not find_version_problems(build({"train_iters": 1}))


def test_a_resume_keeps_what_decides_which_state_there_is() -> None:
    for name in ("optimizer", "muon_router"):
        assert name in FIXED and name not in REPORTED
    assert "muon_momentum" in REPORTED


def test_the_planner_counts_one_moment_of_the_matrices() -> None:
    job = replace(JOB, use_distributed_optimizer=False, bf16=True)
    matrices = sum(
        parameter.total for chunk in stage_parameters(job, 0) for parameter in chunk if ".linear_" in parameter.name
    )
    adam, muon = (state_bytes(replace(job, optimizer=name), 0) for name in ("adam", "muon"))
    assert muon[:2] == adam[:2] and adam[2] - muon[2] == 4 * matrices > 0
    # With the distributed optimizer of 8 ranks none has more than the eighth and one matrix.
    dense = replace(job, model_config=DENSE, use_distributed_optimizer=True, world_size=8, expert_model_parallel_size=1)
    sizes = [item.total for chunk in stage_parameters(dense, 0) for item in chunk if ".linear_" in item.name]
    adam, muon = (state_bytes(replace(dense, optimizer=name), 0)[2] for name in ("adam", "muon"))
    assert adam == pytest.approx(12 * DENSE.num_parameters() / 8, rel=1e-3)
    excess = (muon - adam + 4 * sum(sizes) / 8) / 8  # of the fullest rank's matrices over the mean
    assert 0 <= excess < max(sizes)
    # Local experts are matrices of their own.
    local = replace(job, model_config=QWEN3_30B_A3B, transformer_impl="local", optimizer="muon")
    names = {parameter.name for chunk in stage_parameters(local, 0) for parameter in chunk}
    assert any("local_experts" in name for name in names) and not any("experts.weight1" in name for name in names)


def test_operations_of_a_step() -> None:
    """Of Qwen3-30B-A3B in 4 stages of 12 layers, each rank with 16 experts, of [1536, 2048] and [2048, 768]."""
    job = replace(
        JOB, model_config=QWEN3_30B_A3B, world_size=32, pipeline_model_parallel_size=4, expert_model_parallel_size=8,
        tensor_model_parallel_size=1, optimizer="muon", use_distributed_optimizer=False, overlap_grad_reduce=False,
    )  # fmt: skip

    def products(small: int, large: int) -> int:
        return 4 * small**2 * large + 2 * small**3

    attention = 2 * products(2048, 4096) + 2 * products(512, 2048)  # Q and the output; K and V
    experts = 16 * (products(1536, 2048) + products(768, 2048))
    assert orthogonalization_operations(job) == 5 * 12 * (attention + experts)
    # Of 24 matrices 8 ranks have 2 of [5120, 2048] and 1 of [2048, 4096] at most; no other rank has the same experts.
    share = (2 * 5120 + 4096) / (12 * (5120 + 4096))
    divided = orthogonalization_operations(replace(job, use_distributed_optimizer=True))
    assert divided == pytest.approx(5 * 12 * (share * attention + experts))


def test_the_arms_of_the_study() -> None:
    """With --optimizer muon: Muon's at both rates, and AdamW's of the same ratios, whose other settings are the same."""
    base = build({"load": "x", "train_iters": 4, "optimizer": "muon", "muon_momentum": 0.9})
    jobs = lr_by_role.plan(base, [1, 2], QWEN3_30B_A3B)[1:]
    assert [len([job for job in jobs if job.tags["optimizer"] == name]) for name in ("muon", "adam")] == [15, 10]
    for job in jobs:
        twin = job._replace(tags={**job.tags, "optimizer": "muon"})
        other = next(item for item in jobs if item.tags == twin.tags)
        assert job.settings["lr_mult"] == other.settings["lr_mult"] and job.settings["lr"] == other.settings["lr"]
        if job.tags["optimizer"] == "adam":
            assert job.settings["optimizer"] == "adam" and job.settings["muon_momentum"] == 0.95
    usual = lr_by_role.plan(build({"load": "x", "train_iters": 4}), [1, 2], QWEN3_30B_A3B)[1:]
    assert {job.tags["optimizer"] for job in usual} == {"adam"} and len(usual) == 15


def test_the_log_says_that_experts_are_computed_apart() -> None:
    config = build({**MUON, "transformer_impl": "local"})
    (line,) = notes(config, QWEN3_30B_A3B)
    assert "one after another" in line
    assert notes(build({"train_iters": 1, "transformer_impl": "local"}), QWEN3_30B_A3B) == []
