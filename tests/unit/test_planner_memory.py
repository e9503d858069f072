"""The planner's memory against what training allocates: weights, buffers and optimizer state to the byte."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from megatron_a2d.architecture import read_architecture
from megatron_a2d.config import build
from megatron_a2d.conversion.checkpoint import resolve
from megatron_a2d.conversion.qwen3 import named_architecture
from megatron_a2d.model import masked_head
from megatron_a2d.planner import memory as planned
from megatron_a2d.planner.activations import layer_activations
from megatron_a2d.planner.job import Job, job_of
from megatron_a2d.planner.memory import logit_bytes, state_bytes
from megatron_a2d.planner.parameters import stage_buffers, stage_parameters
from tests.cases import Case
from tests.parity.jobs import SETTINGS
from tests.parity.layouts import CP, DISTRIBUTED, EP, OVERLAP, PP, TP_SP, VPP
from tests.parity.pool import Pool
from tests.unit.test_masked_head import Memory, OneRank

# Of the layers' activations; routing is uneven, and the all-to-all dispatcher keeps a little of its own.
ACTIVATIONS_WITHIN = {"dense": 1e-3, "dense_tied": 1e-3, "moe": 0.05}

LAYOUTS = {
    "dense, one process": ("dense", 1, {}),
    "dense, one process, bf16": ("dense", 1, {"bf16": True}),
    "dense, TP2+SP": ("dense", 2, TP_SP),
    "tied, PP2 x DP2, distributed": ("dense_tied", 4, {**PP, **DISTRIBUTED, "bf16": True}),
    "dense, CP2 x DP2, distributed, overlap": ("dense", 4, {**CP, **OVERLAP}),
    "moe, EP2 x DP4, distributed, bf16": ("moe", 4, {**EP, **DISTRIBUTED, "bf16": True}),
    "moe, TP2+SP x DP2, EP2, distributed": ("moe", 4, {**TP_SP, **EP, **DISTRIBUTED}),
    "moe, VPP2 x DP2, EP2, distributed": ("moe", 4, {**VPP, **EP, **DISTRIBUTED, "micro_batch_size": 2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(pool: Pool, cases: dict[str, Case]) -> Any:
    """The job of a layout, and what its ranks hold."""
    found: dict[str, tuple[Job, list[dict[str, Any]]]] = {}

    def measure(name: str) -> tuple[Job, list[dict[str, Any]]]:
        if name not in found:
            kind, ranks, settings = LAYOUTS[name]
            case = cases[kind]
            settings = {**case.settings, "seq_length": 128, **settings}
            results = pool.run("measure_memory", ranks, checkpoint=case.checkpoint, settings=settings)
            architecture = read_architecture(resolve(case.checkpoint) / "hf")
            job = job_of(build(SETTINGS | settings), architecture, ranks, imbalance=1.0, transformer_impl="portable")
            found[name] = job, results
        return found[name]

    return measure


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_to_the_byte(name: str, measured: Any) -> None:
    job, ranks = measured(name)
    for rank in ranks:
        stage, (dense, expert) = rank["stage"], rank["replica"]
        for chunk, parameters in zip(stage_parameters(job, stage), rank["parameters"], strict=True):
            assert {parameter.name: [parameter.numel, parameter.copies] for parameter in chunk} == parameters
        buffers = stage_buffers(job, stage)
        assert [buffer.numel for buffer in buffers] == rank["buffers"]
        weights, gradients, optimizer = state_bytes(job, stage)
        assert gradients == rank["gradient_bytes"]
        number = 2 if job.bf16 else 4
        if job.use_distributed_optimizer:
            assert weights == sum(rank["buffers"]) * number
            # Experts and the other weights have replicas of their own.
            owned = sum(
                buffer.shard_numel(expert if buffer.buckets[0].parameters[0][0].is_expert else dense)
                for buffer in buffers
            )
            assert rank["optimizer_bytes"] == owned * (12 if job.bf16 else 8)
            assert rank["optimizer_bytes"] <= optimizer <= 1.02 * rank["optimizer_bytes"]  # a buffer's padding
        else:
            held = sum(size * count for chunk in rank["parameters"] for size, count in chunk.values())
            assert weights == held * number
            assert rank["optimizer_bytes"] == optimizer


@pytest.mark.parametrize("name", LAYOUTS)
def test_activations(name: str, measured: Any) -> None:
    """Of all layers together; the last stage's norm is measured with them."""
    job, ranks = measured(name)
    kept = expected = 0.0
    for rank in ranks:
        layers = job.layers_per_stage
        expected += layer_activations(job).total * layers
        if rank["stage"] == job.pipeline_model_parallel_size - 1:
            expected += final_norm_bytes(job)
        kept += sum(rank["layer_bytes"])
    assert kept == pytest.approx(expected, rel=ACTIVATIONS_WITHIN[LAYOUTS[name][0]])
    assert kept != pytest.approx(expected * layers / (layers + 1), rel=0.1), "a layer more or less would be seen"


@pytest.mark.parametrize("grad_reduce_in_fp32", [True, False])
@pytest.mark.parametrize("rows", [100, 128, 200, 1024])
def test_head(rows: int, grad_reduce_in_fp32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of head and loss in bf16, in one chunk, two, eight. What is one kernel on a GPU has no tensors inside."""
    vocabulary, hidden, chunk = 4096, 64, 128
    run, add = masked_head._run, masked_head._add_product

    def as_one_kernel(function: Any, *tensors: torch.Tensor) -> torch.Tensor:
        with _disable_current_modes():
            result = run(function, *tensors)
        return result if result is tensors[0] else result.clone()

    def in_place(*tensors: torch.Tensor) -> None:
        with _disable_current_modes():
            add(*tensors)

    monkeypatch.setattr(masked_head, "_run", as_one_kernel)
    monkeypatch.setattr(masked_head, "_add_product", in_place)
    monkeypatch.setattr(planned, "rows_per_chunk", lambda *_: chunk)
    hidden_rows, weight = (
        torch.randn(size, hidden, dtype=torch.bfloat16).requires_grad_() for size in (rows, vocabulary)
    )
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32 if grad_reduce_in_fp32 else torch.bfloat16)  # type: ignore[attr-defined]
    labels = torch.zeros(rows, dtype=torch.long)
    memory = Memory()
    memory._known.add(weight.untyped_storage().data_ptr())  # its transposed view is no new tensor
    with memory:
        losses, _ = masked_head._MaskedHead.apply(hidden_rows.clone(), weight, labels, OneRank, chunk)
        losses.sum().backward()
    shape = replace(named_architecture("Qwen3-8B"), vocab_size=vocabulary, hidden_size=hidden)
    job = Job(shape, 1, seq_length=rows, bf16=True, grad_reduce_in_fp32=grad_reduce_in_fp32)
    assert memory.peak == pytest.approx(logit_bytes(job), rel=0.02)
    if rows > 2 * chunk:
        assert memory.peak < 0.5 * logit_bytes(replace(job, whole_logits=True))


def final_norm_bytes(job: Job) -> float:
    return job.tokens_between_layers * (2 * job.architecture.hidden_size + 1) * 4
