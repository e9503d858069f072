"""The planner's model of a step: what each setting costs or saves in time, and with it in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_a2d import plan
from megatron_a2d.config.settings import build
from megatron_a2d.model import chunked_cross_entropy, matrix_products, weight_gradients
from megatron_a2d.planner.calibration import EFFICIENCIES
from megatron_a2d.planner.memory import memory
from megatron_a2d.planner.routing import EVEN, UNBALANCED, RankImbalance, Routing
from megatron_a2d.planner.step_time import step_time
from megatron_a2d.planner.traffic import step_traffic
from megatron_a2d.planner.workload import Job, job_of
from megatron_a2d.utils.errors import UserError
from tests.unit.test_chunked_cross_entropy import OneRank
from tests.unit.test_planner import B200, DENSE, GPU_RUN, H100, JOB, MOE, ROOT


def seconds(job: Job, cluster: Any = B200) -> Any:
    return step_time(job, cluster, EFFICIENCIES)


@pytest.mark.parametrize(
    ("dispatcher", "expert_tensor", "per_token"),
    [
        ("alltoall", 1, 8 * 7 / 8 * 2048 * 8),
        ("alltoall", 2, 8 * (7 / 8 * 2048 * 8 + 2048 * 12)),
        ("alltoall", 4, 8 * (7 / 8 * 2048 * 8 + 3 * 2048 * 12)),
        ("allgather", 1, 7 * (2048 * 12 + 128 * 9)),
        ("allgather", 2, 15 * (2048 * 12 + 128 * 9)),
    ],
)
def test_bytes_to_and_from_experts(dispatcher: str, expert_tensor: int, per_token: float) -> None:
    """Four all-to-alls in bf16 of 8 experts' tokens, 7/8 to other ranks; slices of an expert gather in bf16 and sum in
    fp32 (2 * (2 + 4) bytes, forward and backward), and so does `allgather` with all, and 9 bytes an expert."""
    job = replace(
        JOB, world_size=64, expert_model_parallel_size=8, tensor_model_parallel_size=expert_tensor,
        sequence_parallel=expert_tensor > 1, expert_tensor_parallel_size=expert_tensor, imbalance=EVEN,
        moe_token_dispatcher_type=dispatcher, recompute_granularity="none", recompute_modules=(),
    )  # fmt: skip
    tokens = job.tokens_between_layers * job.layers_per_stage * job.num_microbatches
    assert step_traffic(job, 0).expert == pytest.approx(tokens * per_token)


def test_recomputation_trades_time_for_memory() -> None:
    full = replace(JOB, recompute_granularity="full")
    assert memory(full).activations < 0.2 * memory(JOB).activations
    assert seconds(full).matmul == pytest.approx(4 / 3 * seconds(JOB).matmul, rel=0.01)
    selective = replace(JOB, recompute_granularity="selective", recompute_modules=("moe_act", "layernorm"))
    assert memory(full).activations < memory(selective).activations < memory(JOB).activations


def test_counted_loads_are_one_more_forward_pass() -> None:
    counted = replace(JOB, moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_loads="current")
    more, plain = seconds(counted), seconds(JOB)
    assert more.matmul == pytest.approx(4 / 3 * plain.matmul) and more.head == plain.head
    assert more.expert_nvlink == pytest.approx(4 / 3 * plain.expert_nvlink) and memory(counted) == memory(JOB)
    assert seconds(replace(counted, moe_router_load_balancing_type="seq_aux_loss")) == plain
    config = build({**GPU_RUN, "moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.01})
    assert job_of(config, MOE, 64).counting_passes == 0
    current = replace(config, balancing=replace(config.balancing, moe_aux_loss_loads="current"))
    assert job_of(current, MOE, 64).counting_passes == 1


def test_the_heads_products_are_those_that_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four, as torch counts them: the logits forward and again backward, and two gradients. Control: not three."""
    rows, vocabulary, hidden = 96, 512, 64
    tensors = [torch.randn(size, hidden, dtype=torch.bfloat16).requires_grad_() for size in (rows, vocabulary)]
    monkeypatch.setattr(matrix_products, "_has_bf16_products", lambda: True)
    monkeypatch.setattr(weight_gradients, "adds_in_fp32", lambda *_: False)  # torch does not count a product in place
    with FlopCounterMode(display=False) as counter:
        losses, _ = chunked_cross_entropy._MaskedHead.apply(*tensors, torch.zeros(rows, dtype=torch.long), OneRank, 64)
        losses.sum().backward()
    assert counter.get_total_flops() == 4 * 2 * rows * vocabulary * hidden
    job = Job(
        replace(DENSE, vocab_size=vocabulary, hidden_size=hidden),
        1,
        seq_length=2 * rows,
        global_batch_size=1,
        bf16=True,
    )
    endless = replace(B200, memory_gb_per_s=1e15)
    rate = B200.bf16_tflops * 1e12 * EFFICIENCIES.on(B200).matmul_bf16
    assert seconds(job, endless).head * rate == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert seconds(replace(job, whole_logits=True), endless).head == pytest.approx(
        0.75 * seconds(job, endless).head, rel=1e-3
    )
    # At a real vocabulary they cost a product more and spare most of the passes over the logits.
    assert seconds(JOB).head < seconds(replace(JOB, whole_logits=True)).head


def test_fp8_keeps_copies_and_smaller_activations() -> None:
    fp8 = replace(JOB, fp8_recipe="mxfp8")
    assert memory(fp8).fp8_copies > 0 == memory(JOB).fp8_copies
    assert memory(fp8).activations < memory(JOB).activations
    assert seconds(fp8).matmul < seconds(JOB).matmul < 2 * seconds(fp8).matmul
    assert seconds(fp8).memory > seconds(JOB).memory, "casts"


def test_nvfp4_is_neither_bf16_nor_fp8() -> None:
    """Half the bytes of FP8 and a scale for each 16, twice its rate, and casts that read a tensor twice."""
    fp8, fp4 = replace(JOB, fp8_recipe="mxfp8"), replace(JOB, fp4_recipe="nvfp4")
    assert memory(fp4).fp8_copies == 0.5625 * memory(fp8).fp8_copies
    assert memory(fp4).activations < memory(fp8).activations
    efficiency = EFFICIENCIES.matmul_fp4 / EFFICIENCIES.matmul_fp8
    assert B200.fp4_tflops == 2 * B200.fp8_tflops
    assert seconds(fp4).matmul == pytest.approx(seconds(fp8).matmul / 2 / efficiency)
    casts = {job: seconds(job).memory - seconds(replace(job, fused_kernels=True)).memory for job in (JOB, fp8, fp4)}
    reads_and_writes = 2 * 2 + 2 * 0.5625, 2 + 2
    by_cast = (casts[fp4] - casts[JOB]) / (casts[fp8] - casts[JOB])
    assert by_cast == pytest.approx(reads_and_writes[0] / reads_and_writes[1], rel=0.02)


def test_nvfp4_needs_a_gpu_and_its_rate() -> None:
    config = build({"bf16": True, "fp4_recipe": "nvfp4"})
    assert job_of(config, DENSE, 8, B200).fp4_recipe == "nvfp4"
    with pytest.raises(UserError, match=r"--fp4-recipe nvfp4: a GPU .* has no nvfp4"):
        job_of(config, DENSE, 8, H100)
    with pytest.raises(UserError, match="the cluster's file lacks fp4_tflops"):
        job_of(config, DENSE, 8, replace(B200, fp4_tflops=None))


def test_imbalance_costs_memory_and_time() -> None:
    uneven = replace(JOB, imbalance=RankImbalance(1.5, 2.0))
    assert memory(uneven).dispatcher > 2 * memory(JOB).dispatcher
    assert seconds(uneven).expert_nvlink == pytest.approx(1.5 * seconds(JOB).expert_nvlink)
    # Time goes by the mean over layers and steps, memory by the worst of them.
    worse = replace(JOB, imbalance=RankImbalance(1.5, 3.0))
    assert memory(worse).dispatcher > memory(uneven).dispatcher and seconds(worse) == seconds(uneven)


def test_imbalance_is_that_of_the_layouts_ranks() -> None:
    """No rank is busier than another with one of them; a number of ranks that was not measured has the next larger one's."""
    routing = Routing(((2, RankImbalance(1.1, 1.4)), (8, RankImbalance(1.5, 2.5))))
    for ranks, expected in ((1, EVEN), (2, (1.1, 1.4)), (4, (1.5, 2.5)), (8, (1.5, 2.5)), (16, (1.5, 2.5))):
        config = build({**GPU_RUN, "expert_model_parallel_size": ranks})
        assert job_of(config, MOE, 64, routing=routing).imbalance == expected
        assert job_of(config, MOE, 64).imbalance == UNBALANCED.at(ranks)


def test_a_run_gives_its_imbalance_to_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(*steps: Any) -> None:
        records = [{"kind": "train", "iteration": number, "loss": 1.0, "moe": moe} for number, moe in enumerate(steps)]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def ranks(**by_ranks: Any) -> dict[str, Any]:
        return {"rank_imbalance": {}, "by_layer": {"rank_imbalance": by_ranks}}

    write(
        ranks(ep2=[1.0, 1.2], ep8=[1.5, 3.5]),
        ranks(ep2=[1.1, 1.1], ep8=[1.0, 2.0]),
        {"by_layer": None},
        None,
        ranks(ep2="x"),
    )
    expected = Routing(((2, RankImbalance(1.1, 1.2)), (8, RankImbalance(2.0, 3.5))))
    for given in (tmp_path, tmp_path / "log.jsonl"):
        found = plan._routing(str(given))
        assert [size for size, _ in found.by_ranks] == [2, 8]
        for size, value in expected.by_ranks:
            assert found.at(size) == pytest.approx(value)
    flags = ["--config", str(ROOT / "launch/recipes/qwen3_30b_a3b.yaml"), "--cluster", "h200", "--gpus", "16"]
    shown = []
    for imbalance in ("1", "2.0", str(tmp_path)):
        plan.main([*flags, "--imbalance", imbalance])
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 3
    write({"load_imbalance_masked": 3.0})
    with pytest.raises(UserError, match="its log has no loads of expert-parallel ranks"):
        plan._routing(str(tmp_path))


def test_experts_across_nodes_use_the_network() -> None:
    wide = replace(JOB, expert_model_parallel_size=16)
    assert seconds(JOB).expert_network == 0 < seconds(wide).expert_network
    assert seconds(wide).expert_network > seconds(JOB).expert_nvlink


def test_pipelines_have_bubbles_and_hold_micro_batches() -> None:
    job = Job(DENSE, 8, pipeline_model_parallel_size=4, bf16=True, global_batch_size=32)
    interleaved = replace(job, num_virtual_stages_per_pipeline_rank=3)
    assert seconds(job, H100).bubble == pytest.approx(3 * seconds(interleaved, H100).bubble)
    assert memory(interleaved).activations > memory(job).activations
    assert memory(job).activations == pytest.approx(memory(replace(job, pipeline_model_parallel_size=1)).activations)
