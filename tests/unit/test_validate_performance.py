"""Settings of speed and precision: invalid combinations, and what reaches megatron.core."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_a2d import megatron_compat
from megatron_a2d.config.settings import build, settings
from megatron_a2d.config.validate import find_problems
from megatron_a2d.megatron_compat import versions
from megatron_a2d.model import transformer_config
from megatron_a2d.terminal.console import PYTHONS_GC_THRESHOLD, entry_point
from megatron_a2d.training import gradient_noise
from megatron_a2d.training.manual_gc import ManualGC
from megatron_a2d.utils.errors import UserError
from tests.cases import BUDGETED, EP, FUSED_EXPERTS, HYBRIDEP
from tests.unit.test_training import QWEN3_8B, QWEN3_30B_A3B

ROOT = Path(__file__).resolve().parents[2]
HOPPER, BLACKWELL = 9, 10  # compute capabilities, major
SHARDED = {"use_distributed_optimizer": True, "bf16": True}
OVERLAPPED = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
BLOCKS_OVER_TP = {"bf16": True, "fp8_recipe": "blockwise", "tensor_model_parallel_size": 2, "sequence_parallel": True}
EMULATED = {"bf16": True, "fp8_recipe": "mxfp8", "transformer_impl": "local"}
OVER_TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
QWEN3_8B = dataclasses.replace(QWEN3_8B, mask_token_id=1)
QWEN3_30B_A3B = dataclasses.replace(QWEN3_30B_A3B, mask_token_id=1)

# (model, settings, the beginning of the only problem, what makes it good)
PAIRS: list[tuple[Any, dict[str, Any], str, dict[str, Any]]] = [
    (QWEN3_8B, {"fp8_recipe": "auto"}, "--fp8-recipe auto: needs --bf16", {"bf16": True}),
    (QWEN3_8B, {"bf16": True, "fp8_recipe": "delayed", "first_last_layers_bf16": True}, "--first-last-layers-bf16: delayed", {"fp8_recipe": "tensorwise"}),
    (QWEN3_8B, {"first_last_layers_bf16": True}, "--first-last-layers-bf16: has no effect", {"bf16": True, "fp8_recipe": "mxfp8"}),
    (QWEN3_8B, {"bf16": True, "fp8_recipe": "auto", "num_layers_at_end_in_bf16": 2}, "--num-layers-at-end-in-bf16 2: has no effect", {"first_last_layers_bf16": True}),
    (QWEN3_8B, {"bf16": True, "fp8_recipe": "auto", "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 40}, "--num-layers-at-end-in-bf16 40: must lie", {"num_layers_at_end_in_bf16": 2}),
    (QWEN3_8B, {"fp8_param_gather": True, **OVERLAPPED}, "--fp8-param-gather: needs --fp8-recipe", {"fp8_recipe": "mxfp8"}),
    (QWEN3_8B, {"bf16": True, "fp8_recipe": "tensorwise", "fp8_param_gather": True}, "--fp8-param-gather: needs --use-dist", {"use_distributed_optimizer": True}),
    (QWEN3_8B, {**SHARDED, "fp8_recipe": "mxfp8", "fp8_param_gather": True}, "--fp8-param-gather: with --fp8-recipe mxfp8", OVERLAPPED),
    (QWEN3_8B, {**SHARDED, "fp8_recipe": "tensorwise", "fp8_param_gather": True, "use_precision_aware_optimizer": True}, "--fp8-param-gather: not with", {"fp8_param_gather": False}),
    (QWEN3_8B, {**SHARDED, "fp8_recipe": "tensorwise", "fp8_param_gather": True, "mask_token_init": "mean"}, "--fp8-param-gather: not with --mask-token-init", {"fp8_param_gather": False}),
    (QWEN3_8B, {**SHARDED, "fp8_recipe": "tensorwise", "fp8_param_gather": True, "conversion": "random"}, "--fp8-param-gather: not with --conversion", {"fp8_param_gather": False}),
    (dataclasses.replace(QWEN3_8B, head_dim=80), {**OVERLAPPED, "fp8_recipe": "mxfp8", "fp8_param_gather": True}, "--fp8-param-gather: the head size, 80", {"fp8_recipe": "tensorwise"}),
    (QWEN3_8B, {"bf16": True, "fp8_recipe": "auto", "seq_length": 4100}, "--fp8-recipe auto: the tokens of a micro-batch", {"fp8_recipe": "none"}),
    (QWEN3_8B, {**BLOCKS_OVER_TP, "seq_length": 4160}, "--fp8-recipe blockwise: the tokens of a micro-batch on a process, 2080, is not a multiple of 128; leave out --sequence-parallel", {"sequence_parallel": False}),
    (QWEN3_8B, {**BLOCKS_OVER_TP, "seq_length": 4160}, "--fp8-recipe blockwise: the tokens of a micro-batch on a process, 2080", {"seq_length": 4352}),
    (QWEN3_8B, {**BLOCKS_OVER_TP, "seq_length": 4224, "context_parallel_size": 2}, "--fp8-recipe blockwise: the tokens of a micro-batch on a process, 1056", {"context_parallel_size": 1, "micro_batch_size": 2}),
    (QWEN3_8B, {**BLOCKS_OVER_TP, "seq_length": 4160}, "--fp8-recipe blockwise: the tokens of a micro-batch on a process, 2080", {"fp8_recipe": "tensorwise"}),
    (QWEN3_8B, {**BLOCKS_OVER_TP, "seq_length": 4160}, "--fp8-recipe blockwise: the tokens of a micro-batch on a process, 2080", {"fp8_recipe": "mxfp8"}),
    (dataclasses.replace(QWEN3_8B, hidden_size=4160), BLOCKS_OVER_TP, "--fp8-recipe blockwise: the hidden size, 4160, is not a multiple of 128; leave", {"sequence_parallel": False}),
    (QWEN3_8B, {**BLOCKS_OVER_TP, "seq_length": 4112, "sequence_parallel": False, "context_parallel_size": 2}, "--fp8-recipe blockwise: the tokens of a micro-batch on a process, 2056, is not a multiple of 16; choose", {"context_parallel_size": 1}),
    (QWEN3_8B, {"bf16": True, "fp8_recipe": "auto", "transformer_impl": "local"}, "--fp8-recipe auto: is a GPU's choice", {"fp8_recipe": "mxfp8"}),
    (QWEN3_8B, {**EMULATED, "bf16": False}, "--fp8-recipe mxfp8: needs --bf16", {"bf16": True}),
    (QWEN3_8B, {**EMULATED, **OVERLAPPED, "fp8_param_gather": True}, "--fp8-param-gather: with --transformer-impl local", {"fp8_param_gather": False}),
    (QWEN3_8B, {**EMULATED, "gradient_accumulation_fusion": True}, "--gradient-accumulation-fusion: only Transformer Engine", {"gradient_accumulation_fusion": False}),
    (QWEN3_8B, {**EMULATED, "fp8_recipe": "delayed", "recompute_granularity": "full"}, "--recompute-granularity full: not where --fp8-recipe delayed", {"fp8_recipe": "tensorwise"}),
    (QWEN3_30B_A3B, {**EMULATED, "recompute_granularity": "selective", "recompute_modules": ("moe_act",)}, "--recompute-modules moe_act: has no effect where", {"recompute_modules": ("moe",)}),
    (QWEN3_8B, {**EMULATED, "seq_length": 4112}, "--fp8-recipe mxfp8: the tokens of a micro-batch", {"seq_length": 4128}),
    (QWEN3_8B, {**EMULATED, "fp8_recipe": "none", "fp8_output_proj": True}, "--fp8-output-proj: has no effect without --fp8-recipe", {"fp8_recipe": "blockwise"}),
    (QWEN3_8B, {"bf16": True, "fp8_recipe": "mxfp8", "fp8_output_proj": True}, "--fp8-output-proj: the LM head is in FP8 in emulation alone", {"transformer_impl": "local"}),
    (dataclasses.replace(QWEN3_30B_A3B, num_experts=2, num_experts_per_tok=1), {**EMULATED, "overlap_moe_expert_parallel_comm": True, **EP}, "--overlap-moe-expert-parallel-comm: with --expert-model-parallel-size 2 a pr", {"overlap_moe_expert_parallel_comm": False}),
    (QWEN3_8B, {"fp4_recipe": "nvfp4"}, "--fp4-recipe nvfp4: needs --bf16", {"bf16": True}),
    (QWEN3_8B, {"bf16": True, "fp4_recipe": "nvfp4", "fp8_recipe": "mxfp8"}, "--fp4-recipe nvfp4: not with --fp8-recipe mxfp8", {"fp8_recipe": "none"}),
    (QWEN3_8B, {**OVERLAPPED, "fp4_recipe": "nvfp4", "fp8_param_gather": True}, "--fp8-param-gather: needs --fp8-recipe", {"fp8_param_gather": False}),
    (QWEN3_8B, {"bf16": True, "fp4_recipe": "nvfp4", "transformer_impl": "local", "fp8_output_proj": True}, "--fp8-output-proj: has no effect without --fp8-recipe", {"fp8_output_proj": False}),
    (QWEN3_30B_A3B, {"bf16": True, "fp4_recipe": "nvfp4", "overlap_moe_expert_parallel_comm": True, **EP}, "--overlap-moe-expert-parallel-comm: with --fp4-recipe", {"overlap_moe_expert_parallel_comm": False}),
    (QWEN3_8B, {"bf16": True, "fp4_recipe": "nvfp4", "seq_length": 4112}, "--fp4-recipe nvfp4: the tokens of a micro-batch on a process, 4112, is not a multiple of 32", {"seq_length": 4128}),
    (QWEN3_8B, {"bf16": True, "fp4_recipe": "nvfp4", "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 40}, "--num-layers-at-end-in-bf16 40: must lie", {"num_layers_at_end_in_bf16": 4}),
    (QWEN3_8B, {"bf16": True, "apply_rope_fusion": True, "micro_batch_size": 2, "objective": "block", "block_length": 32}, "--apply-rope-fusion: with --objective block each sample", {"micro_batch_size": 1}),
    (QWEN3_8B, {"bf16": True, "apply_rope_fusion": True, "micro_batch_size": 2, "reset_attention_mask": True, "reset_position_ids": True}, "--apply-rope-fusion: with isolated documents", {"reset_position_ids": False}),
    (QWEN3_8B, {"bf16": True, "cuda_graph_impl": "transformer_engine", "objective": "block", "block_length": 32}, "--cuda-graph-scope attn: with --objective block", {"cuda_graph_scope": ("mlp",)}),
    (QWEN3_8B, {**OVERLAPPED, "fp8_recipe": "tensorwise", "fp8_param_gather": True, "conversion": "grafting", "grafting_iters": 2}, "--fp8-param-gather: not with --conversion grafting", {"fp8_param_gather": False}),
    (QWEN3_8B, {"bf16": True, "fp8_recipe": "delayed", "conversion": "grafting", "grafting_iters": 2}, "--fp8-recipe delayed: with --conversion grafting", {"fp8_recipe": "tensorwise"}),
    (QWEN3_8B, {"apply_rope_fusion": True, "transformer_impl": "local"}, "--apply-rope-fusion: only Transformer", {"transformer_impl": "auto"}),
    (QWEN3_8B, {"moe_permute_fusion": True}, "--moe-permute-fusion: the model is dense", {"moe_permute_fusion": False}),
    (QWEN3_8B, {"recompute_granularity": "selective", "recompute_modules": ("moe",)}, "--recompute-modules moe: the model is dense", {"recompute_modules": ("mlp",)}),
    (QWEN3_30B_A3B, {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}, "--recompute-modules mlp: the model has experts", {"recompute_modules": ("moe",)}),
    (QWEN3_8B, {"recompute_granularity": "selective"}, "--recompute-modules: is empty", {"recompute_modules": ("core_attn",)}),
    (QWEN3_8B, {"recompute_modules": ("core_attn",)}, "--recompute-modules core_attn: has no effect", {"recompute_granularity": "selective"}),
    (QWEN3_8B, {"recompute_num_layers": 2}, "--recompute-num-layers 2: has no effect", {"recompute_granularity": "full"}),
    (QWEN3_8B, {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 37}, "--recompute-num-layers 37: a stage has 36", {"recompute_num_layers": 36}),
    (QWEN3_30B_A3B, {"recompute_granularity": "selective", "recompute_modules": ("moe_act",), "moe_grouped_gemm": False}, "--recompute-modules moe_act: needs", {"moe_grouped_gemm": True}),
    (QWEN3_30B_A3B, {"moe_token_dispatcher_type": "flex", "bf16": True}, "--moe-token-dispatcher-type flex: needs --expert", EP),
    (QWEN3_30B_A3B, {"moe_flex_dispatcher_backend": "deepep"}, "--moe-flex-dispatcher-backend deepep: has no effect", {"moe_token_dispatcher_type": "flex", "bf16": True, **EP}),
    (QWEN3_30B_A3B, {"moe_hybridep_num_sms": 64, "bf16": True, **EP}, "--moe-hybridep-num-sms 64: has no effect", {"moe_token_dispatcher_type": "flex"}),
    (QWEN3_30B_A3B, {**HYBRIDEP, "moe_flex_dispatcher_backend": "deepep", "moe_hybridep_num_sms": 64}, "--moe-hybridep-num-sms 64: has no effect", {"moe_flex_dispatcher_backend": "auto"}),
    (QWEN3_30B_A3B, {**HYBRIDEP, "moe_flex_dispatcher_backend": "deepep", "moe_hybridep_num_sms_preprocessing": 32}, "--moe-hybridep-num-sms-preprocessing 32: has no effect", {"moe_flex_dispatcher_backend": "hybridep"}),
    (QWEN3_30B_A3B, {**HYBRIDEP, "moe_hybridep_num_sms": 0}, "--moe-hybridep-num-sms 0: must be at least 1", {"moe_hybridep_num_sms": 1}),
    (QWEN3_8B, {"use_transformer_engine_op_fuser": True, "bf16": True}, "--use-transformer-engine-op-fuser: the model is dense", {"use_transformer_engine_op_fuser": False}),
    (QWEN3_30B_A3B, {"use_transformer_engine_op_fuser": True}, "--use-transformer-engine-op-fuser: Transformer Engine's grouped", {"bf16": True}),
    (QWEN3_30B_A3B, {**FUSED_EXPERTS, "moe_grouped_gemm": False}, "--use-transformer-engine-op-fuser: not with --no-moe-grouped-gemm", {"moe_grouped_gemm": True}),
    (QWEN3_30B_A3B, {**FUSED_EXPERTS, **OVER_TP, "moe_token_dispatcher_type": "allgather", "expert_tensor_parallel_size": 2}, "--use-transformer-engine-op-fuser: not with --expert-tensor", {"expert_tensor_parallel_size": 1}),
    (QWEN3_30B_A3B, {**FUSED_EXPERTS, "transformer_impl": "local"}, "--use-transformer-engine-op-fuser: only Transformer Engine", {"transformer_impl": "auto"}),
    (QWEN3_30B_A3B, {**BUDGETED, "moe_expert_rank_capacity_factor": 0.9}, "--moe-expert-rank-capacity-factor 0.9: must be", {"moe_expert_rank_capacity_factor": 1.0}),
    (QWEN3_30B_A3B, {**BUDGETED, "moe_flex_dispatcher_backend": "auto"}, "--moe-expert-rank-capacity-factor 1.5: the buffers are HybridEP's", {"moe_flex_dispatcher_backend": "hybridep"}),
    (QWEN3_30B_A3B, {**FUSED_EXPERTS, **EP, "moe_expert_rank_capacity_factor": 1.5}, "--moe-expert-rank-capacity-factor 1.5: the buffers are HybridEP's", HYBRIDEP),
    (QWEN3_30B_A3B, {**BUDGETED, "use_transformer_engine_op_fuser": False}, "--moe-expert-rank-capacity-factor 1.5: other experts wait", {"use_transformer_engine_op_fuser": True}),
    (QWEN3_30B_A3B, {**BUDGETED, "fp8_recipe": "tensorwise"}, "--moe-expert-rank-capacity-factor 1.5: with tensorwise", {"fp8_recipe": "mxfp8"}),
    (QWEN3_30B_A3B, {**BUDGETED, "fp4_recipe": "nvfp4"}, "--moe-expert-rank-capacity-factor 1.5: with nvfp4", {"fp4_recipe": "none"}),
    (QWEN3_30B_A3B, {**BUDGETED, "cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ("attn", "moe_router", "moe_preprocess")}, "--moe-expert-rank-capacity-factor 1.5: not with --cuda-graph-scope", {"cuda_graph_scope": ("attn", "moe_router")}),
    (QWEN3_30B_A3B, {"overlap_moe_expert_parallel_comm": True, "bf16": True}, "--overlap-moe-expert-parallel-comm: has no effect without --expert", EP),
    (QWEN3_30B_A3B, {"overlap_moe_expert_parallel_comm": True, **EP}, "--overlap-moe-expert-parallel-comm: megatron.core supports it only in bf16", {"bf16": True}),
    (QWEN3_30B_A3B, {"overlap_moe_expert_parallel_comm": True, "bf16": True, **EP, "moe_token_dispatcher_type": "allgather"}, "--overlap-moe-expert-parallel-comm: not with --moe-token", {"moe_token_dispatcher_type": "alltoall"}),
    (QWEN3_30B_A3B, {"overlap_moe_expert_parallel_comm": True, "bf16": True, **EP, "recompute_granularity": "full"}, "--overlap-moe-expert-parallel-comm: not with --recompute", {"recompute_granularity": "none"}),
    (QWEN3_30B_A3B, {"overlap_moe_expert_parallel_comm": True, "bf16": True, **EP, "recompute_granularity": "selective", "recompute_modules": ("moe",)}, "--overlap-moe-expert-parallel-comm: not with --recompute-modules moe", {"recompute_modules": ("moe_act",)}),
    (QWEN3_30B_A3B, {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True, "bf16": True, **EP, "lr_mult": {"mlp": 0.0}}, "--delay-wgrad-compute: waits for gradients of mlp", {"delay_wgrad_compute": False}),
    (dataclasses.replace(QWEN3_30B_A3B, num_experts=2, num_experts_per_tok=1), {"overlap_moe_expert_parallel_comm": True, "bf16": True, **EP}, "--overlap-moe-expert-parallel-comm: with --expert-model-parallel-size 2 a process has one", {"overlap_moe_expert_parallel_comm": False}),
    (QWEN3_8B, {"bf16": True, "fp8_recipe": "auto", "first_last_layers_bf16": True, "gradient_accumulation_fusion": True, "cuda_graph_impl": "transformer_engine"}, "--first-last-layers-bf16: with --cuda-graph-impl", {"gradient_accumulation_fusion": False}),
    (QWEN3_30B_A3B, {"delay_wgrad_compute": True}, "--delay-wgrad-compute: has no effect", {"overlap_moe_expert_parallel_comm": True, "bf16": True, **EP}),
    (QWEN3_8B, {"cuda_graph_scope": ("mlp",)}, "--cuda-graph-scope mlp: has no effect", {"cuda_graph_impl": "local"}),
    (QWEN3_8B, {"cuda_graph_impl": "local", "cuda_graph_scope": ()}, "--cuda-graph-scope: is empty", {"cuda_graph_scope": ("attn",)}),
    (QWEN3_8B, {"cuda_graph_impl": "local", "recompute_granularity": "full"}, "--cuda-graph-impl local: not with --recompute", {"recompute_granularity": "none"}),
    (QWEN3_8B, {"cuda_graph_impl": "transformer_engine", "reset_attention_mask": True}, "--cuda-graph-impl transformer_engine: with intra-document attention", {"reset_attention_mask": False}),
    (QWEN3_30B_A3B, {"cuda_graph_impl": "local", "cuda_graph_scope": ("attn", "moe_preprocess")}, "--cuda-graph-scope moe_preprocess", {"cuda_graph_scope": ("attn", "moe_router", "moe_preprocess")}),
    (QWEN3_8B, {"use_precision_aware_optimizer": True, "bf16": True}, "--use-precision-aware-optimizer: needs --use-dist", {"use_distributed_optimizer": True}),
    (QWEN3_8B, {"exp_avg_dtype": "bf16"}, "--exp-avg-dtype bf16: has no effect", {"use_precision_aware_optimizer": True, **SHARDED}),
    (QWEN3_8B, {"grad_reduce_in_fp32": False}, "--no-grad-reduce-in-fp32: has no effect", {"bf16": True}),
    (QWEN3_8B, {"grad_reduce_in_fp32": False, "gradient_accumulation_fusion": True, "bf16": True}, "--gradient-accumulation-fusion: adds", {"grad_reduce_in_fp32": True}),
    (QWEN3_8B, {"manual_gc_interval": 5}, "--manual-gc-interval 5: has no effect", {"manual_gc": True}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "given", "problem", "remedy"), PAIRS)
def test_impossible_pairs(model: Any, given: dict[str, Any], problem: str, remedy: dict[str, Any]) -> None:
    common = {"global_batch_size": 16}
    (line,) = find_problems(build(common | given), model, 4)
    assert line.startswith(problem) and "\n" not in line
    assert find_problems(build(common | given | remedy), model, 4) == []


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "qwen3_8b"])
def test_recipes_are_possible(name: str) -> None:
    config = build(yaml.safe_load((ROOT / "launch" / "recipes" / f"{name}.yaml").read_text()))
    model = {"qwen3_30b_a3b": QWEN3_30B_A3B, "qwen3_8b": QWEN3_8B}[name]
    assert find_problems(config, model, 8) == []
    assert (
        config.parallel.overlap_param_gather and config.performance.apply_rope_fusion and config.performance.manual_gc
    )


def test_cuda_graphs_get_full_micro_batches() -> None:
    """Of the small batch of the noise scale: (micro-batches, samples of each)."""

    def small(num_microbatches: int, **more: Any) -> Any:
        return gradient_noise.small_batch_size(build({"micro_batch_size": 8, **more}), num_microbatches)

    assert [small(count) for count in (1, 2, 4)] == [(1, 2), (1, 2), (1, 8)]
    recorded = [small(count, cuda_graph_impl="transformer_engine") for count in (1, 2, 4)]
    assert recorded == [None, (1, 8), (1, 8)]


@pytest.fixture
def engine_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], dict[str, Any]]:
    """engine_on(major): as with Transformer Engine on a GPU of this compute capability; the fields that a later
    TransformerConfig gets."""

    def choose(major: int) -> dict[str, Any]:
        megatron_compat.install()
        monkeypatch.setattr(transformer_config, "compute_capability", lambda: (major, 0))
        monkeypatch.setattr(transformer_config, "choose_implementation", lambda config: "transformer_engine")
        seen: dict[str, Any] = {}
        recording = _recording(transformer_config.TransformerConfig, seen)
        monkeypatch.setattr(transformer_config, "TransformerConfig", recording)
        return seen

    return choose


def test_settings_reach_megatron(engine_on: Callable[[int], dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Blackwell GPU: each name is one that the installed megatron-core knows."""
    seen = engine_on(BLACKWELL)
    monkeypatch.setattr(transformer_config, "_need_dispatcher", lambda backend: None)
    given = dict(
        bf16=True, fp8_recipe="auto", first_last_layers_bf16=True, moe_permute_fusion=True, moe_router_fusion=True,
        moe_router_force_load_balancing=True, overlap_moe_expert_parallel_comm=True, delay_wgrad_compute=True,
        apply_rope_fusion=True, gradient_accumulation_fusion=True, cuda_graph_impl="transformer_engine",
        cuda_graph_scope=("attn", "moe_router"), recompute_granularity="selective", recompute_modules=("moe_act",),
        moe_token_dispatcher_type="flex", moe_hybridep_num_sms=64, **EP,
    )  # fmt: skip
    transformer_config.build_transformer_config(QWEN3_30B_A3B, build(given))
    expected = dict(
        fp8="e4m3", fp8_recipe="mxfp8", fp8_param=False, first_last_layers_bf16=True, recompute_modules=["moe_act"],
        moe_flex_dispatcher_backend="hybridep", moe_grouped_gemm=True, **versions.graphed_parts(("attn", "moe_router")),
        **versions.hybridep_sms(64),
    )  # fmt: skip
    for name in ("moe_permute_fusion", "moe_router_fusion", "moe_router_force_load_balancing", "apply_rope_fusion",
                 "overlap_moe_expert_parallel_comm", "delay_wgrad_compute", "gradient_accumulation_fusion"):  # fmt: skip
        expected[name] = True
    assert {name: seen[name] for name in expected} == expected


def test_fp4_reaches_megatron(engine_on: Callable[[int], dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Blackwell GPU; an engine without it is refused."""
    seen = engine_on(BLACKWELL)
    monkeypatch.setattr(transformer_config, "is_te_min_version", lambda version: True)
    config = build(dict(bf16=True, fp4_recipe="nvfp4", first_last_layers_bf16=True, num_layers_at_end_in_bf16=4))
    transformer_config.build_transformer_config(QWEN3_8B, config)
    assert (seen["fp4"], seen["fp4_recipe"], seen["fp8"], seen["fp8_param"]) == ("e2m1", "nvfp4", None, False)
    assert (seen["first_last_layers_bf16"], seen["num_layers_at_end_in_bf16"]) == (True, 4)
    monkeypatch.setattr(transformer_config, "is_te_min_version", lambda version: False)
    monkeypatch.setattr(transformer_config, "get_te_version", lambda: "2.6.0")
    with pytest.raises(UserError, match=r"--fp4-recipe nvfp4: needs Transformer Engine 2\.7\.0 or later, and 2\.6\.0"):
        transformer_config.build_transformer_config(QWEN3_8B, config)


@pytest.mark.parametrize("given", [{"fp8_recipe": "mxfp8"}, {"fp4_recipe": "nvfp4"}])
def test_emulation_is_no_setting_of_megatrons(given: dict[str, Any]) -> None:
    config = build({"bf16": True, "transformer_impl": "local", **given})
    fields = transformer_config._speed_fields(QWEN3_8B, config)
    assert not {"fp8", "fp4", "first_last_layers_bf16"} & fields.keys() and fields["transformer_impl"] == "local"


@pytest.mark.parametrize(("fp8", "transposes_are_kept"), [("none", False), ("tensorwise", True)])
def test_graphs_add_gradients_up(
    fp8: str, transposes_are_kept: bool, engine_on: Callable[[int], dict[str, Any]]
) -> None:
    """A layer that knows which micro-batch is a step's first is recorded as if each were."""
    engine_on(HOPPER)
    config = build(
        dict(bf16=True, fp8_recipe=fp8, cuda_graph_impl="transformer_engine", gradient_accumulation_fusion=True)
    )
    fields = transformer_config._speed_fields(QWEN3_8B, config)
    assert fields.get("disable_parameter_transpose_cache", False) == (not transposes_are_kept)
    assert hasattr(transformer_config.TransformerConfig, "disable_parameter_transpose_cache")


def _recording(original: Any, seen: dict[str, Any]) -> Any:
    """The dataclass's fields, without the checks that look for a GPU's kernels."""

    @dataclasses.dataclass
    class Recorder(original):  # type: ignore[misc]
        def __post_init__(self) -> None:
            seen.update(vars(self))

    return Recorder


def test_a_field_that_megatron_lost_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = transformer_config._speed_fields
    monkeypatch.setattr(transformer_config, "_speed_fields", lambda *a: original(*a) | {"moe_warp_drive": True})
    with pytest.raises(UserError, match="its TransformerConfig has no moe_warp_drive"):
        transformer_config.build_transformer_config(QWEN3_8B, build({}))


def test_fusions_without_transformer_engine_are_refused() -> None:
    from megatron_a2d.model.layer_specs import choose_implementation

    with pytest.raises(UserError) as refusal:
        choose_implementation(build({"apply_rope_fusion": True, "bf16": True, "fp8_recipe": "auto"}))
    assert [line.partition(":")[0] for line in refusal.value.problems] == ["--fp8-recipe", "--apply-rope-fusion"]


def test_only_training_collects_garbage_as_python_does() -> None:
    """A command's imports leave none; in training it can hold a GPU's memory."""
    try:
        entry_point(lambda: None)
        assert gc.get_threshold()[0] >= 100_000
        ManualGC(build({}).performance)
        assert gc.get_threshold() == PYTHONS_GC_THRESHOLD and PYTHONS_GC_THRESHOLD[0] < 10_000
    finally:
        gc.set_threshold(*PYTHONS_GC_THRESHOLD)


def test_garbage_is_collected_when_said() -> None:
    """Never by itself in between; and as usual when the loop has ended."""
    collections: list[str] = []

    def watch(phase: str, info: dict[str, int]) -> None:
        collections.append(phase)

    manual_gc = ManualGC(build({"manual_gc": True, "manual_gc_interval": 3}).performance)
    gc.callbacks.append(watch)
    try:
        assert not gc.isenabled()
        counts = []
        for iteration in range(1, 7):
            collections.clear()
            manual_gc.after_step(iteration)
            counts.append(len(collections))
        assert [count > 0 for count in counts] == [False, False, True, False, False, True]
    finally:
        gc.callbacks.remove(watch)
        manual_gc.close()
    assert gc.isenabled()
    ManualGC(build({}).performance)
    assert gc.isenabled()


@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
def test_missing_kernels_of_the_flex_dispatcher(backend: str) -> None:
    given = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend, "bf16": True, **EP}
    with pytest.raises(
        UserError, match=f"backend {backend}: the package deep_ep .*use --moe-token-dispatcher-type alltoall"
    ):
        transformer_config.build_transformer_config(QWEN3_30B_A3B, build(given))


def test_without_its_kernels_the_recipes_dispatcher_is_alltoall(capsys: pytest.CaptureFixture[str]) -> None:
    """And one line reports it, once for all ranks."""
    recipe = Path(__file__).parents[2] / "launch" / "recipes" / "rnd1_30b_a3b_64xb200.yaml"
    own = {**yaml.safe_load(recipe.read_text()), "gradient_accumulation_fusion": False, "apply_rope_fusion": False,
           "moe_permute_fusion": False, "moe_router_fusion": False, "moe_hybridep_num_sms_preprocessing": 32}  # fmt: skip
    assert own["moe_token_dispatcher_type"] == "flex"
    for name in ("delay_wgrad_compute", "overlap_moe_expert_parallel_comm", "cuda_graph_impl", "cuda_graph_scope"):
        del own[name]
    made = transformer_config.build_transformer_config(QWEN3_30B_A3B, build(own))
    assert made.moe_token_dispatcher_type == "alltoall"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: --moe-token-dispatcher-type flex: ") and "deep_ep" in line and "alltoall" in line


def test_what_alltoall_cannot_do_is_not_fallen_back_to(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"moe_token_dispatcher_type": "flex", "bf16": True, "overlap_moe_expert_parallel_comm": True,
             "expert_model_parallel_size": QWEN3_30B_A3B.num_experts}  # fmt: skip
    with pytest.raises(UserError, match="a process has one expert"):
        transformer_config.build_transformer_config(QWEN3_30B_A3B, build(given))


@pytest.mark.parametrize(("there", "chosen"), [(("deepep",), "deepep"), (("deepep", "hybridep"), "hybridep")])
def test_the_flex_dispatchers_kernels_are_those_that_are_there(
    there: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer.moe import fused_a2a

    for backend, name in (("deepep", "HAVE_DEEP_EP"), ("hybridep", "HAVE_HYBRIDEP")):
        monkeypatch.setattr(fused_a2a, name, backend in there, raising=False)
    assert transformer_config._flex_backend("auto") == chosen


def test_lists_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_a2d.config.cli import Parser, parse_run

    config, _ = parse_run(Parser(), ["--recompute-modules", "moe_act", "layernorm", "--cuda-graph-scope"])
    assert (
        config.performance.recompute_modules == ("moe_act", "layernorm") and config.performance.cuda_graph_scope == ()
    )
    with pytest.raises(UserError, match="'moeact' is none of core_attn"):
        parse_run(Parser(), ["--recompute-modules", "moeact"])
    with pytest.raises(SystemExit):
        parse_run(Parser(), ["--recompute-modules", "moe", "--print-config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["recompute_modules"] == ["moe"] and set(printed) == set(settings())
    assert build(printed).performance.recompute_modules == ("moe",)
