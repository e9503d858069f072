"""A step whose tokens exceed a rank's budget is repeated without it; settings that the installed versions lack.

HybridEP and its kernels need GPUs: here its manager's two attributes stand for it, which is all that the step asks of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import nn

from megatron_a2d.config import installed_versions
from megatron_a2d.config.installed_versions import find_version_problems, installed
from megatron_a2d.config.settings import build
from megatron_a2d.megatron_compat import versions
from megatron_a2d.model import transformer_config
from megatron_a2d.planner.calibration import EFFICIENCIES
from megatron_a2d.planner.cluster import read_cluster
from megatron_a2d.planner.memory import memory
from megatron_a2d.planner.routing import Routing
from megatron_a2d.planner.step_time import step_time
from megatron_a2d.planner.workload import job_of
from megatron_a2d.training import expert_budget, train_step
from megatron_a2d.training.startup_checks import check_early
from megatron_a2d.utils.errors import UserError
from tests.cases import BUDGETED, HYBRIDEP
from tests.unit.test_validate_performance import QWEN3_30B_A3B

BUDGET = 1.5


class Layer(MoELayer):
    """A MoE layer of megatron's class with nothing in it but HybridEP's flag and budget."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        manager = SimpleNamespace(moe_expert_rank_capacity_factor=BUDGET, over_budget=torch.zeros(1, dtype=torch.bool))
        self.token_dispatcher: Any = SimpleNamespace(_comm_manager=manager)

    @property
    def manager(self) -> Any:
        return self.token_dispatcher._comm_manager


@pytest.fixture
def chunk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(expert_budget.dist, "all_reduce", lambda *_, **__: None)
    chunk = nn.Module()
    chunk.layers = nn.ModuleList([Layer(), Layer()])
    chunk.config = SimpleNamespace(moe_expert_rank_capacity_factor=BUDGET)
    yield chunk


def test_the_flag_is_read_once(chunk: Any) -> None:
    assert not expert_budget.exceeded_budget([chunk])
    chunk.layers[1].manager.over_budget.fill_(True)
    assert expert_budget.exceeded_budget([chunk])
    assert not expert_budget.exceeded_budget([chunk])


def test_another_ranks_flag_counts(chunk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_budget.dist, "all_reduce", lambda flag, **_: flag.fill_(1))
    assert expert_budget.exceeded_budget([chunk])


def test_the_budget_returns_after_a_pass_that_fails(chunk: Any) -> None:
    managers = [layer.manager for layer in chunk.layers]
    with pytest.raises(RuntimeError), expert_budget.without_budget([chunk]):
        assert [manager.moe_expert_rank_capacity_factor for manager in managers] == [None, None]
        raise RuntimeError
    assert [manager.moe_expert_rank_capacity_factor for manager in managers] == [BUDGET, BUDGET]


def test_a_model_without_a_budget_is_not_asked(chunk: Any) -> None:
    chunk.config.moe_expert_rank_capacity_factor = None
    chunk.layers[0].token_dispatcher = None  # of any other kind
    assert not expert_budget.exceeded_budget([chunk])
    with expert_budget.without_budget([chunk]):
        pass


@pytest.mark.parametrize("exceeds", [False, True])
def test_a_step_is_repeated(exceeds: bool, chunk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients are zeroed in between, and what it returns is of the second passes, in which nothing is dropped."""
    order: list[str] = []

    def schedule(**_: Any) -> list[Any]:
        budgets = {layer.manager.moe_expert_rank_capacity_factor for layer in chunk.layers}
        order.append(f"passes within {budgets.pop()}")
        chunk.layers[0].manager.over_budget |= exceeds and "within 1.5" in order[-1]
        return [order[-1]]

    monkeypatch.setattr(train_step, "get_forward_backward_func", lambda: schedule)
    monkeypatch.setattr(train_step, "zero_gradients", lambda *_: order.append("zero"))
    monkeypatch.setattr(train_step, "update_parameters", lambda *_: order.append("update") or 1.0)
    monkeypatch.setattr(train_step, "loss_totals", lambda losses: losses)
    batch: Any = SimpleNamespace(tokens=torch.zeros(1, 4))
    result = train_step.train_step([chunk], None, [batch])  # type: ignore[arg-type]
    again = ["zero", "passes within None"] if exceeds else []
    assert order == ["zero", "passes within 1.5", *again, "update"]
    assert result.losses == [order[-2]] and result.repeated == exceeds
    train_step.forward_backward([chunk], [batch], forward_only=True)  # a validation
    assert order[-1] == "passes within None"


@pytest.mark.parametrize(
    ("changes", "releases", "problem"),
    [
        ({"moe_hybridep_num_sms_preprocessing": 32}, {"megatron-core": (0, 16, 1)}, "--moe-hybridep-num-sms-preprocessing 32: needs megatron-core 0.19, and 0.16.1 is"),
        ({"moe_hybridep_num_sms_preprocessing": 32}, {"megatron-core": (0, 19, 2)}, None),
        ({"moe_hybridep_num_sms": 64}, {"megatron-core": (0, 16, 1)}, None),
        ({"use_transformer_engine_op_fuser": True}, {"megatron-core": (0, 16, 1)}, "--use-transformer-engine-op-fuser: needs megatron-core 0.19"),
        ({"use_transformer_engine_op_fuser": True}, {"megatron-core": (0, 19, 2), "transformer-engine": (2, 12)}, "--use-transformer-engine-op-fuser: needs transformer-engine 2.14, and 2.12 is"),
        ({"use_transformer_engine_op_fuser": True}, {"megatron-core": (0, 19, 2), "transformer-engine": (2, 14)}, None),
        ({"use_transformer_engine_op_fuser": True}, {"megatron-core": (0, 19, 2)}, None),  # the start says that it is missing
        ({"moe_expert_rank_capacity_factor": 1.5}, {"megatron-core": (0, 16, 1)}, "--moe-expert-rank-capacity-factor 1.5: needs megatron-core 0.19"),
        ({"delay_wgrad_compute": True, "cuda_graph_impl": "transformer_engine"}, {"transformer-engine": (2, 9)}, "--delay-wgrad-compute with --cuda-graph-impl transformer_engine: needs transformer-engine 2.10"),
        ({"delay_wgrad_compute": True, "cuda_graph_impl": "transformer_engine"}, {"transformer-engine": (2, 10)}, None),
        ({"delay_wgrad_compute": True}, {"transformer-engine": (2, 9)}, None),
    ],
)  # fmt: skip
def test_what_a_version_lacks(
    changes: dict[str, Any], releases: dict[str, Any], problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed_versions, "installed", releases.get)
    found = find_version_problems(build(changes))
    assert found == [] if problem is None else (len(found) == 1 and found[0].startswith(problem))


def test_a_run_does_not_start_with_what_its_version_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(installed_versions, "installed", {"megatron-core": (0, 16, 1)}.get)
    given = build({**BUDGETED, "load": str(tmp_path), "train_data_path": str(tmp_path / "no")})
    with pytest.raises(UserError) as refusal:
        check_early(given, 8)
    lines = [line for line in refusal.value.problems if "needs megatron-core 0.19" in line]
    assert [line.split()[0] for line in lines] == [
        "--use-transformer-engine-op-fuser:", "--moe-expert-rank-capacity-factor",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "release"),
    [("0.16.1", (0, 16, 1)), ("0.19.2+c26157c", (0, 19, 2)), ("2.14.0rc1", (2, 14, 0)), ("x", None)],
)
def test_installed(text: str, release: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed_versions, "version", lambda _: text)
    assert installed("transformer-engine") == release


def test_the_installed_megatron_core_is_known() -> None:
    assert installed("megatron-core") == tuple(map(int, versions.release().split(".")))
    assert installed("no-such-package") is None


@pytest.mark.parametrize("backend", ["hybridep", "deepep"])
def test_hybridep_fields(backend: str) -> None:
    """Under the names that this megatron-core has; nothing of it where another backend was found."""
    given = build({**BUDGETED, "moe_hybridep_num_sms": 64, "moe_hybridep_num_sms_preprocessing": 32}).performance
    fields = transformer_config._hybridep_fields(given, backend)
    old = versions.is_before(0, 17)
    expected = {"moe_hybridep_num_sms" if old else "moe_flex_dispatcher_num_sms": 64}
    expected |= {"moe_hybridep_num_sms_preprocessing": 32, "moe_expert_rank_capacity_factor": 1.5}  # type: ignore[dict-item]
    assert fields == (expected if backend == "hybridep" else {})
    known = {item.name for item in dataclasses.fields(transformer_config.TransformerConfig)}
    assert old or set(fields) <= known
    assert set(versions.hybridep_sms(1)) <= known


def test_the_plan_without_the_wait() -> None:
    """The wait for group sizes goes, and buffers for the budget come."""
    cluster, routing = read_cluster("b200"), Routing.of(1.25)  # less than the budget
    layout = HYBRIDEP | {
        "expert_model_parallel_size": 8, "micro_batch_size": 4, "global_batch_size": 2048, "seq_length": 4096,
        "use_distributed_optimizer": True,
    }  # fmt: skip
    waits = job_of(build(layout), QWEN3_30B_A3B, 64, cluster, routing)
    fused = job_of(build(layout | {"use_transformer_engine_op_fuser": True}), QWEN3_30B_A3B, 64, cluster, routing)
    fixed = job_of(build(layout | BUDGETED | {"expert_model_parallel_size": 8}), QWEN3_30B_A3B, 64, cluster, routing)
    times = [step_time(job, cluster, EFFICIENCIES) for job in (waits, fused, fixed)]
    layers = waits.model_config.num_layers * waits.num_microbatches
    # HybridEP waits for the size of its buffers, whatever the experts are.
    assert times[0].host == times[1].host == pytest.approx(layers * EFFICIENCIES.moe_sync)
    assert times[2].host == 0 and times[0].total - times[2].total == pytest.approx(times[0].host)
    assert memory(fixed).dispatcher > memory(waits).dispatcher
    assert memory(fixed)._replace(dispatcher=0, headroom=0) == memory(waits)._replace(dispatcher=0, headroom=0)
