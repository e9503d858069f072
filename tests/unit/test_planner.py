"""The planner: published runs, facts of memory, legality, and what makes a layout slower or larger."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_a2d import plan
from megatron_a2d.config.cli import Parser, parse_run
from megatron_a2d.config.gpus import rates_of
from megatron_a2d.config.named_models import named_model_config
from megatron_a2d.config.settings import build
from megatron_a2d.config.validate import find_problems
from megatron_a2d.model.flops import train_flops_per_token
from megatron_a2d.planner import search as searching
from megatron_a2d.planner.calibration import (
    EFFICIENCIES,
    FITTED,
    FITTED_TO_FP4,
    LARGEST_LEFT_OUT_ERROR,
    error,
    fit,
    left_out_error,
    published_rows,
)  # fmt: skip
from megatron_a2d.planner.cluster import read_cluster
from megatron_a2d.planner.memory import memory
from megatron_a2d.planner.plan_table import layout_flags
from megatron_a2d.planner.routing import EVEN, Routing
from megatron_a2d.planner.search import make_plan, search
from megatron_a2d.planner.workload import Job, job_of
from megatron_a2d.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MOE, DENSE = named_model_config("Qwen/Qwen3-30B-A3B-Base"), named_model_config("Qwen3-8B")
B200, H100 = read_cluster("b200"), read_cluster("h100")
GPU_RUN = {
    "bf16": True, "use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True,
    "global_batch_size": 2048, "seq_length": 4096,
}  # fmt: skip
JOB = Job(
    MOE,
    64,
    expert_model_parallel_size=8,
    bf16=True,
    use_distributed_optimizer=True,
    global_batch_size=2048,
    imbalance=EVEN,
)


@pytest.mark.parametrize("row", published_rows(), ids=lambda row: row.name)
def test_published_runs(row: Any) -> None:
    assert abs(error(row)) < 0.15


def test_efficiencies_are_the_fit_and_few() -> None:
    """Eight numbers for twenty runs; a run that they were not fitted to is at most 30% off."""
    rows = published_rows()
    assert len(rows) >= 20 and len(FITTED) == 7 and len(FITTED_TO_FP4) == 1
    again = fit(rows)
    for name in FITTED | FITTED_TO_FP4:
        assert getattr(again, name) == pytest.approx(getattr(EFFICIENCIES, name), rel=0.02), name
    largest = max(abs(left_out_error(row)) for row in rows)
    assert largest < 0.3 and largest == pytest.approx(LARGEST_LEFT_OUT_ERROR, abs=0.01)


def test_published_runs_need_all_of_it() -> None:
    """No efficiency is idle: without its part of the model some run is far off."""
    for name in FITTED | FITTED_TO_FP4:
        changed = EFFICIENCIES._replace(**{name: getattr(EFFICIENCIES, name) * (3.0 if name == "moe_sync" else 0.5)})
        assert max(abs(error(row, changed)) for row in published_rows()) > 0.15, name


def test_memory_of_published_runs() -> None:
    """Peak memory that was measured on GPUs, and that runs of megatron's distributed optimizer fitted where they ran."""
    (measured,) = (row for row in published_rows() if row.peak_memory_gib)
    assert measured.modelled_memory_gib == pytest.approx(measured.peak_memory_gib, rel=0.05)
    for row in published_rows():
        if row.job.recompute_granularity == "none":  # the others shard their weights
            assert memory(row.job).total < row.cluster.memory_bytes, row.name


@pytest.mark.parametrize(
    ("gpus", "grad_reduce_in_fp32", "expected"),
    [(64, True, 36.7e9), (8, True, 76.8e9), (64, False, 26.4e9), (8, False, 66.5e9)],
)
def test_state_of_the_30b(gpus: int, grad_reduce_in_fp32: bool, expected: float) -> None:
    job = replace(JOB, world_size=gpus, grad_reduce_in_fp32=grad_reduce_in_fp32)
    assert memory(job).state == pytest.approx(expected, rel=0.03)


def test_search_finds_every_legal_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all combinations of sizes, with recomputation where it is needed, each asked of validate.py."""
    monkeypatch.setattr(searching, "MICRO_BATCH_SIZES", (1, 2))
    config, gpus, model = build(GPU_RUN | {"global_batch_size": 8}), 4, replace(MOE, num_layers=8)
    found = search(config, model, H100, gpus)
    jobs = {plan.job for plan in (*found.fitting, *found.too_large)}
    sizes = (1, 2, 4)
    legal = 0
    for tp, pp, cp, ep, etp, micro in itertools.product(sizes, sizes, sizes, sizes, sizes, (1, 2)):
        for virtual in range(1, model.num_layers // pp + 1) if pp > 1 else (1,):
            values = GPU_RUN | {
                "global_batch_size": 8, "tensor_model_parallel_size": tp, "sequence_parallel": tp > 1,
                "pipeline_model_parallel_size": pp, "num_virtual_stages_per_pipeline_rank": virtual,
                "context_parallel_size": cp, "expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp,
                "micro_batch_size": micro,
            }  # fmt: skip
            for granularity in ("none", "full"):
                laid_out = build(values | {"recompute_granularity": granularity})
                if find_problems(laid_out, model, gpus):
                    continue
                legal += 1
                planned = make_plan(laid_out, model, H100, gpus)
                assert planned.job in jobs
                if planned.fits:  # computed again is only what does not fit otherwise
                    assert replace(planned.job, recompute_granularity="full") not in jobs
                    break
    assert legal == len(jobs) == len(found.fitting) + len(found.too_large) > 100
    assert all(plan.fits for plan in found.fitting) and not any(plan.fits for plan in found.too_large)
    assert found.fitting == sorted(found.fitting, key=lambda plan: plan.time.total)


def test_a_recipes_overlap_of_experts_hides_no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts that cannot have it are tried without, and their flags say so; the others keep it."""
    monkeypatch.setattr(searching, "MICRO_BATCH_SIZES", (1,))
    overlap = {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True}
    small, settings = replace(MOE, num_layers=8), GPU_RUN | {"global_batch_size": 8}
    plain, config = search(build(settings), small, B200, 4), build(settings | overlap)
    found = search(config, small, B200, 4)
    assert len(found.fitting) == len(plain.fitting) and found.num_illegal == plain.num_illegal
    kept = {
        overlaps: [plan for plan in found.fitting if plan.job.overlap_moe_expert_parallel_comm == overlaps]
        for overlaps in (True, False)
    }
    for plan_ in kept[True]:
        job = plan_.job
        assert job.expert_model_parallel_size > 1
        assert job.pipeline_model_parallel_size == 1 or job.num_virtual_stages_per_pipeline_rank > 1
    assert {plan_.job.pipeline_model_parallel_size for plan_ in kept[False]} == {1, 2, 4}
    off = "--no-overlap-moe-expert-parallel-comm --no-delay-wgrad-compute"
    assert layout_flags(kept[False][0], config).endswith(off) and off not in layout_flags(kept[True][0], config)


def test_a_search_keeps_what_is_computed_again_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "MICRO_BATCH_SIZES", (1, 8))
    config = build(GPU_RUN | {"recompute_granularity": "selective", "recompute_modules": ("layernorm", "moe_act")})
    found = search(config, MOE, H100, 32)
    assert {plan.job.recompute_granularity for plan in found.fitting} == {"selective", "full"}
    whole = next(plan for plan in found.fitting if plan.job.recomputed_layers)
    assert layout_flags(whole, config).endswith("--recompute-granularity full --recompute-modules")


def test_the_best_layout_on_b200_is_the_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts inside the NVLink domain, four samples a micro-batch, nothing else divided. (EP 4 would leave 0.4 GiB.)

    Published runs force a balance of the means; a quarter more in the worst layer is room for real routing.
    """
    monkeypatch.setattr(searching, "MICRO_BATCH_SIZES", (2, 4))
    roomy = [
        plan
        for plan in search(build(GPU_RUN), MOE, B200, 32, routing=Routing.of(1.0, peak=1.25)).fitting
        if plan.memory.total < 0.95 * B200.memory_bytes
    ]
    best = roomy[0].job
    assert best.expert_model_parallel_size == 8 and best.micro_batch_size == 4
    assert best.tensor_model_parallel_size == best.pipeline_model_parallel_size == best.context_parallel_size == 1


def test_mfu_is_by_the_bidirectional_formula() -> None:
    found = make_plan(build(GPU_RUN | {"expert_model_parallel_size": 8, "train_iters": 100}), MOE, B200, 64)
    flops = train_flops_per_token(MOE, 4096, head_fraction=0.5)
    assert found.mfu == pytest.approx(found.tokens_per_second * flops / 2250e12)
    assert found.days * 86400 == pytest.approx(100 * found.time.total)
    assert found.cost == pytest.approx(found.days * 24 * 64 * B200.price_per_gpu_hour)
    autoregressive = make_plan(build(GPU_RUN | {"expert_model_parallel_size": 8, "objective": "ar"}), MOE, B200, 64)
    assert autoregressive.time.attention == pytest.approx(found.time.attention / 2)
    block = make_plan(
        build(GPU_RUN | {"expert_model_parallel_size": 8, "objective": "block", "block_length": 32}), MOE, B200, 64
    )
    assert block.time.attention == pytest.approx(4 * found.time.attention), "twice the rows, of twice the keys"
    assert (
        block.time.head == pytest.approx(found.time.head) and block.memory.activations == 2 * found.memory.activations
    )


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "200")
    recipe = ROOT / "launch" / "recipes" / "qwen3_8b.yaml"
    image = tmp_path / "plan.png"
    plan.main(
        ["--config", str(recipe), "--cluster", "h100", "--gpus", "8", "--price", "2", "--all", "--plot", str(image)]
    )
    shown = capsys.readouterr().out
    for part in ("1.", "the recipe's", "optimizer", "GEMMs", "more time for", "out of memory",
                 "--tensor-model-parallel-size", "$2 per hour", "leave-one-out"):  # fmt: skip
        assert part in shown, part
    assert image.read_bytes().startswith(b"\x89PNG")


def test_calibration_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plan.main(["--calibration"])
    shown = capsys.readouterr().out
    assert "20 published runs, 8 fitted efficiencies" in shown
    assert all(row.name in shown for row in published_rows())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "Qwen3-8B"], "--cluster: is missing"),
        (["--model", "Qwen3-8B", "--cluster", "h1000", "--gpus", "8"], "did you mean h100"),
        (["--model", "Qwen3-8B", "--cluster", "none.yaml", "--gpus", "8"], "is missing"),
        (["--cluster", "h100", "--gpus", "8"], "--model: is missing"),
        (["--model", "Qwen3-8B", "--cluster", "h100", "--gpus", "0"], "--gpus 0"),
        (["--model", "Qwen3-8B", "--cluster", "h100", "--gpus", "8", "--imbalance", "0.5"], "--imbalance 0.5"),
        (["--model", "Qwen3-8B", "--cluster", "h100", "--gpus", "8", "--imbalance", "nan"], "--imbalance nan"),
        (
            ["--model", "Qwen3-8B", "--cluster", "h100", "--gpus", "8", "--imbalance", "a_run"],
            "--imbalance a_run: is neither",
        ),
        (["--model", "Qwen3-8B", "--cluster", "h100", "--gpus", "8", "--lr", "-1"], "--lr -1.0"),
        (["--model", "Qwen/Qwen3-32B", "--cluster", "h100", "--gpus", "2"], "no layout fits into the 79.1 GiB of H100"),
    ],
)
def test_bad_input(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as end:
        plan.main(argv)
    assert message in "\n".join(end.value.problems)


def test_what_the_gpus_cannot_compute_is_refused() -> None:
    """As a run on them does; a GPU's name is not asked for twice."""
    recipe = ["--config", str(ROOT / "launch" / "recipes" / "qwen3_8b.yaml"), "--gpus", "8"]
    with pytest.raises(
        UserError, match=r"--fp8-recipe mxfp8: a GPU of compute capability 9\.0 has no mxfp8, which needs 10\.0"
    ):
        plan.main([*recipe, "--cluster", "h100", "--fp8-recipe", "mxfp8"])
    config, _ = parse_run(Parser(), [*recipe[:2], "--fp8-recipe", "auto"])
    kinds = [job_of(config, DENSE, 8, read_cluster(name)).fp8_recipe for name in ("h100", "h200", "b200", "gb200")]
    assert kinds == ["tensorwise", "tensorwise", "mxfp8", "mxfp8"]


def test_a_plot_that_cannot_be_drawn_is_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "search", lambda *_, **__: pytest.fail("it searches"))
    for name, words in (("x.gif", "unknown image format"), ("nowhere/x.png", "its directory does not exist")):
        with pytest.raises(UserError, match=words):
            plan.main(
                ["--model", "Qwen/Qwen3-8B-Base", "--cluster", "h100", "--gpus", "8", "--plot", str(tmp_path / name)]
            )


def test_bad_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("gpu: X\ngpus_per_node: 8.5\nmemory_gb: 80\nprice_per_gpu_hour: -1\n")
    with pytest.raises(UserError) as end:
        read_cluster(str(path))
    text = "\n".join(end.value.problems)
    assert "unknown value memory_gb (did you mean memory_gib?)" in text and "memory_gib is missing" in text
    assert "gpus_per_node is 8.5, not a positive whole number" in text and "price_per_gpu_hour is -1" in text


def test_matrix_rates_have_one_source(tmp_path: Path) -> None:
    """Clusters take those of their GPU by its name, as a run does for MFU, unless their file gives others."""
    for name, gpu in (("h100", "NVIDIA H100 80GB HBM3"), ("b200", "NVIDIA B200"), ("gb200", "NVIDIA GB200")):
        cluster, rates = read_cluster(name), rates_of(gpu)
        assert rates is not None and (
            cluster.bf16_tflops, cluster.fp8_tflops, cluster.fp4_tflops, cluster.compute_capability
        ) == rates  # fmt: skip
    assert rates_of("Tesla T4") is None and rates_of("NVIDIA GB200") != rates_of("NVIDIA B200")
    path = tmp_path / "mine.yaml"
    path.write_text((ROOT / "launch" / "clusters" / "h100.yaml").read_text() + "bf16_tflops: 756\n")
    assert read_cluster(str(path)).bf16_tflops == 756 != read_cluster("h100").bf16_tflops
    path.write_text(path.read_text().replace("gpu: H100", "gpu: MI300"))
    with pytest.raises(UserError, match="fp8_tflops is missing"):
        read_cluster(str(path))
