"""The planner's memory against what training allocates: weights, buffers and optimizer state to the byte."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from megatron_a2d.checkpoint.directory import resolve
from megatron_a2d.config.model_config import read_model_config
from megatron_a2d.config.named_models import named_model_config
from megatron_a2d.config.settings import build
from megatron_a2d.model import chunked_cross_entropy, matrix_products
from megatron_a2d.model.logits_chunks import rows_per_chunk
from megatron_a2d.planner import memory as planned
from megatron_a2d.planner.activations import layer_activations
from megatron_a2d.planner.memory import logit_bytes, memory, microbatches_in_flight, state_bytes
from megatron_a2d.planner.parameters import stage_buffers, stage_parameters
from megatron_a2d.planner.routing import RankImbalance, Routing
from megatron_a2d.planner.workload import Job, job_of
from tests.cases import Case
from tests.parity.layouts import CP, DISTRIBUTED, EP, OVERLAP, PP, TP_SP, VPP
from tests.parity.parity_jobs import SETTINGS
from tests.parity.pool import Pool
from tests.unit.test_chunked_cross_entropy import Memory, OneRank
from tests.unit.test_planner import B200, JOB

# Of the layers' activations; routing is uneven, and the all-to-all dispatcher keeps some tensors as well.
ACTIVATIONS_WITHIN = {"dense": 1e-3, "dense_tied": 1e-3, "moe": 0.05, "qwen2": 1e-3}

LAYOUTS = {
    "dense, one process": ("dense", 1, {}),
    "dense, one process, bf16": ("dense", 1, {"bf16": True}),
    "dense, TP2+SP": ("dense", 2, TP_SP),
    "qwen2, TP2+SP x DP2, distributed": ("qwen2", 4, {**TP_SP, **DISTRIBUTED}),
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
            model_config = read_model_config(resolve(case.checkpoint) / "hf")
            job = job_of(
                build(SETTINGS | settings), model_config, ranks, routing=Routing.of(1.0), transformer_impl="local"
            )
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
            owned = sum(buffer.shard_numel(expert if buffer.holds_experts else dense) for buffer in buffers)
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
        expected += layer_activations(job, on_cpu=True).total * layers
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
    run, add = chunked_cross_entropy._run, chunked_cross_entropy.add_product

    def as_one_kernel(function: Any, *tensors: torch.Tensor) -> torch.Tensor:
        with _disable_current_modes():
            result = run(function, *tensors)
        return result if result is tensors[0] else result.clone()

    def in_place(*tensors: torch.Tensor) -> None:
        with _disable_current_modes():
            add(*tensors)

    monkeypatch.setattr(matrix_products, "_has_bf16_products", lambda: True)
    monkeypatch.setattr(chunked_cross_entropy, "_run", as_one_kernel)
    monkeypatch.setattr(chunked_cross_entropy, "add_product", in_place)
    monkeypatch.setattr(planned, "rows_per_chunk", lambda *_: chunk)
    hidden_rows, weight = (
        torch.randn(size, hidden, dtype=torch.bfloat16).requires_grad_() for size in (rows, vocabulary)
    )
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32 if grad_reduce_in_fp32 else torch.bfloat16)  # type: ignore[attr-defined]
    labels = torch.zeros(rows, dtype=torch.long)
    seen = Memory()
    seen._known.add(weight.untyped_storage().data_ptr())  # its transposed view is no new tensor
    with seen:
        losses, _ = chunked_cross_entropy._MaskedHead.apply(hidden_rows.clone(), weight, labels, OneRank, chunk)
        losses.sum().backward()
    shape = replace(named_model_config("Qwen3-8B"), vocab_size=vocabulary, hidden_size=hidden)
    job = Job(shape, 1, seq_length=rows, bf16=True, grad_reduce_in_fp32=grad_reduce_in_fp32)
    assert seen.peak == pytest.approx(logit_bytes(job), rel=0.02)
    if rows > 2 * chunk:
        assert seen.peak < 0.5 * logit_bytes(replace(job, whole_logits=True))


def test_which_norms_are_recomputed() -> None:
    """Transformer Engine's linear layers hold the norm before them, which --recompute-modules layernorm leaves alone; a
    router's norm, and all of the local layers', are modules of their own."""
    dense = replace(JOB, model_config=named_model_config("Qwen3-8B"), expert_model_parallel_size=1)
    for job, freed in ((dense, 0), (JOB, 1), (replace(dense, transformer_impl="local"), 2)):
        again = replace(job, recompute_granularity="selective", recompute_modules=("layernorm",))
        output = job.tokens_between_layers * job.model_config.hidden_size * job.number_bytes
        assert layer_activations(job).total - layer_activations(again).total == freed * output


def test_local_layers_on_a_cpu_copy_no_queries() -> None:
    job = replace(JOB, transformer_impl="local")
    on_gpu, on_cpu = layer_activations(job), layer_activations(job, on_cpu=True)
    assert on_gpu.attention["queries, copied"] > on_cpu.attention["queries, copied"] == 0
    assert on_gpu.mlp == on_cpu.mlp and on_gpu.experts == on_cpu.experts


def final_norm_bytes(job: Job) -> float:
    """Its input, and one number per token."""
    return job.tokens_between_layers * (job.model_config.hidden_size * job.number_bytes + 4)


def test_micro_batches_in_flight() -> None:
    """1F1B holds one for each stage from itself on; interleaving as many parts of one as are warmed up, and the next."""
    for stage, expected in enumerate((4, 3, 2, 1)):
        job = replace(JOB, pipeline_model_parallel_size=4)
        assert microbatches_in_flight(job, stage) == expected
        assert microbatches_in_flight(replace(job, global_batch_size=2 * job.data_parallel_size), stage) == min(
            2, expected
        )
    # Warmed up: 2 parts for each later stage, and all other parts of p micro-batches; then one more is begun.
    for virtual, expected in ((2, (11 / 2, 9 / 2, 7 / 2, 5 / 2)), (3, (15 / 3, 13 / 3, 11 / 3, 9 / 3))):
        job = replace(JOB, pipeline_model_parallel_size=4, num_virtual_stages_per_pipeline_rank=virtual)
        assert [microbatches_in_flight(job, stage) for stage in range(4)] == pytest.approx(expected)
        few = replace(job, global_batch_size=2 * job.data_parallel_size)
        assert [microbatches_in_flight(few, stage) for stage in range(4)] == pytest.approx(
            [min(2, held) for held in expected]
        )


def test_memory_part_by_part() -> None:
    """The 30B on 64 GPUs in 4 stages, computed manually: 2 sequences of 4,096 tokens, 12 layers a stage, 16 of 128 experts each."""
    job = replace(
        JOB, pipeline_model_parallel_size=4, micro_batch_size=2, seq_length=4096, imbalance=RankImbalance(1.1, 1.25)
    )
    parts, kept = memory(job), layer_activations(job)
    assert parts.activations == pytest.approx(kept.total * 12 * 4), "the first stage holds four micro-batches"
    rows = 2 * 4096 * 8  # each token goes to 8 experts
    moved = 2 * (rows + 1.25 * rows) * 2048 * 2
    assert parts.dispatcher == pytest.approx(moved + 0.25 * kept.of_experts * 12 * 4)
    # All 64, 4 stages, 8 experts' ranks, 16 replicas of dense weights and 2 of experts.
    assert parts.communication == (2 + 5 * 0.25) * 2**30
    assert parts.headroom == 0 and memory(job, B200).headroom == pytest.approx(0.04 * B200.memory_bytes)
    assert parts.total == pytest.approx(sum(getattr(parts, name) for name in parts._fields))
    assert parts.state == parts.weights + parts.gradients + parts.optimizer

    layers = replace(job, recompute_granularity="full", recompute_method="block", recompute_num_layers=5)
    inputs = 2 * 4096 * 2048 * 2
    again = memory(layers)
    assert again.activations == pytest.approx((kept.total * 7 + inputs * 5) * 4 + kept.total)
    assert again.dispatcher == pytest.approx(moved + 0.25 * kept.of_experts * 7 * 4)
    every = memory(replace(layers, recompute_num_layers=12))
    assert every.activations == pytest.approx(inputs * 12 * 4 + kept.total)
    assert every.dispatcher == pytest.approx(moved + 0.25 * kept.of_experts * 4), "the layer that is computed again"


def test_graphs_keep_what_overlapped_experts_are_sent() -> None:
    """Eight copies of each token and their probabilities, in every layer; HybridEP sends what the router keeps anyway."""
    job = replace(JOB, micro_batch_size=4, cuda_graph_impl="transformer_engine", overlap_moe_expert_parallel_comm=True)
    graphed = replace(job, cuda_graph_scope=("attn", "moe_router", "moe_preprocess"))
    rows = 4 * 4096 * 8
    assert memory(graphed).activations - memory(job).activations == 48 * rows * (2048 * 2 + 4)
    for other in (
        replace(graphed, moe_token_dispatcher_type="flex"),
        replace(graphed, overlap_moe_expert_parallel_comm=False),
        replace(graphed, cuda_graph_impl="none"),
        replace(graphed, cuda_graph_scope=("attn", "moe_router")),
    ):
        assert memory(other).activations == memory(job).activations


def test_the_fullest_stage_counts() -> None:
    """With few micro-batches the last stage, whose logits the first has not; with many the first."""
    job = replace(JOB, pipeline_model_parallel_size=4, micro_batch_size=1, whole_logits=True)
    few = replace(job, global_batch_size=job.data_parallel_size)
    assert memory(job).logits == 0 < memory(few).logits == 4096 * (151936 * 6 + 2048 * 2)


@pytest.mark.parametrize(
    ("tensor", "bf16", "in_fp32"), [(1, True, True), (2, True, False), (4, False, True), (1, False, False)]
)
def test_logits_of_a_real_vocabulary(tensor: int, bf16: bool, in_fp32: bool) -> None:
    """Rows and their gradient; the weight's gradient or a chunk's logits, whichever is larger; and its fp32 sum next to bf16."""
    job = replace(JOB, tensor_model_parallel_size=tensor, bf16=bf16, grad_reduce_in_fp32=in_fp32, micro_batch_size=1)
    number, vocabulary = (2 if bf16 else 4), 151936 // tensor
    rows = 2 * 4096 * 2048 * number
    chunk = min(4096, rows_per_chunk(vocabulary, "cuda")) * vocabulary * number
    weight = vocabulary * 2048 * number
    summed = vocabulary * 2048 * 4 if bf16 and not in_fp32 else 0
    assert logit_bytes(job) == rows + max(chunk, weight) + summed
    short = replace(job, seq_length=64)
    assert logit_bytes(short) == 2 * 64 * 2048 * number + max(64 * vocabulary * number, weight) + summed


def test_fp8_copies() -> None:
    """By rows and by columns, a byte each; as parameters they take the bf16 weights' place."""
    job = replace(JOB, fp8_recipe="mxfp8")
    attention = 2048 * (4096 + 2 * 512) + 4096 * 2048
    experts = 128 // 8 * 3 * 768 * 2048
    assert memory(job).fp8_copies == 2 * 48 * (attention + experts)
    assert memory(replace(job, fp8_param_gather=True)).fp8_copies == 0


@pytest.mark.parametrize(
    ("average", "square", "moments"), [("fp32", "fp32", 8), ("bf16", "fp32", 6), ("bf16", "bf16", 4)]
)
def test_bytes_of_moments(average: str, square: str, moments: int) -> None:
    job = replace(JOB, use_distributed_optimizer=False, exp_avg_dtype=average, exp_avg_sq_dtype=square)
    weights, _, optimizer = state_bytes(job, 0)
    assert optimizer / (weights / 2) == moments + 4, "and the fp32 weights"
    weights, _, optimizer = state_bytes(replace(job, bf16=False), 0)
    assert optimizer / (weights / 4) == moments


@pytest.mark.parametrize(("recipe", "number"), [("none", 2), ("delayed", 2), ("mxfp8", 4), ("tensorwise", 4)])
def test_bytes_of_main_weights_under_the_precision_aware_optimizer(recipe: str, number: int) -> None:
    """Its Adam keeps the 16 bits that bf16 weights lack; the rehearsal of this flag counts them."""
    job = replace(JOB, use_distributed_optimizer=False, use_precision_aware_optimizer=True, fp8_recipe=recipe)
    weights, _, optimizer = state_bytes(job, 0)
    assert optimizer / (weights / 2) == 8 + number
