"""No setting is dropped, and none is taken for another, on its way to what megatron.core builds.

Every number below is used once, so that one in another's place shows.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

import megatron_a2d
from megatron_a2d import megatron_compat
from megatron_a2d.config.fp8_recipe import Scaling
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import OptimizationConfig, ParallelConfig, build, settings
from megatron_a2d.diffusion.sampling import SamplingOptions
from megatron_a2d.distributed import process_groups
from megatron_a2d.inference.arguments import SAMPLING
from megatron_a2d.megatron_compat.device import has_cuda
from megatron_a2d.model import transformer_config
from megatron_a2d.planner.workload import Job, job_of
from megatron_a2d.training import initialization, optimizer
from megatron_a2d.training.muon import muon_options
from tests.unit.test_validate_performance import _recording

megatron_compat.install()

MOE = ModelConfig(6, 96, 12, 3, 20, 170, 264, 512, 1e-5, 5e5, False, 8, 2, 44, mask_token_id=250)
DENSE = dataclasses.replace(MOE, num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0)
OPTIMIZATION: dict[str, Any] = dict(
    lr=0.5, min_lr=0.125, lr_mult={"mlp": 0.75}, lr_warmup_iters=3, lr_decay_style="WSD", lr_wsd_decay_iters=7,
    weight_decay=0.0625, adam_beta1=0.85, adam_beta2=0.9375, adam_eps=1e-5, clip_grad=2.5,
)  # fmt: skip
BY_SAMPLES: dict[str, Any] = dict(lr_warmup_samples=5, lr_wsd_decay_samples=9)
MUON: dict[str, Any] = dict(
    optimizer="muon", muon_momentum=0.375, muon_use_nesterov=False, muon_num_ns_steps=13, muon_scale_mode="shape_scaling",
    muon_extra_scale_factor=0.1875, muon_fp32_matmul_prec="high", muon_router=True,
)  # fmt: skip
LAYOUT: dict[str, Any] = dict(
    tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=3, context_parallel_size=5,
    num_virtual_stages_per_pipeline_rank=4, expert_model_parallel_size=7, expert_tensor_parallel_size=11,
)  # fmt: skip


def test_these_are_all_settings_of_the_optimizer() -> None:
    assert {*OPTIMIZATION, *BY_SAMPLES, *MUON} == {item.name for item in dataclasses.fields(OptimizationConfig)}


def test_muon() -> None:
    """`muon_router` is a mark on parameters (tests/parity/test_muon.py)."""
    assert muon_options(build({**MUON, "train_iters": 1})) == dict(
        use_layer_wise_distributed_optimizer=False, muon_momentum=0.375, muon_nesterov=False, muon_num_ns_steps=13, muon_scale_mode="shape_scaling",
        muon_extra_scale_factor=0.1875, muon_fp32_matmul_prec="high", muon_tp_mode="duplicated",
    )  # fmt: skip
    divided = muon_options(build({**MUON, "train_iters": 1, "use_distributed_optimizer": True}))
    assert divided["use_layer_wise_distributed_optimizer"]
    assert muon_options(build({"train_iters": 1, "use_distributed_optimizer": True})) == {}


@pytest.mark.parametrize("distributed", [False, True])
def test_the_optimizer(distributed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(config: Any, chunks: Any, **rest: Any) -> None:
        seen.update(vars(config), overrides=rest["config_overrides"])

    monkeypatch.setattr(optimizer, "get_megatron_optimizer", record)
    monkeypatch.setattr(optimizer, "MegatronOptimizerConfig", lambda **fields: SimpleNamespace(**fields))
    monkeypatch.setattr(
        optimizer,
        "engine_scaling",
        lambda config, *_: Scaling("mxfp8", "e4m3") if config.performance.fp8_recipe != "none" else None,
    )
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    chunk: Any = SimpleNamespace(
        config=SimpleNamespace(params_dtype=torch.bfloat16), named_parameters={"decoder.mlp.w": weight}.items
    )
    performance = dict(
        use_precision_aware_optimizer=True, exp_avg_dtype="bf16", fp8_recipe="mxfp8", fp8_param_gather=True
    )
    values = OPTIMIZATION | {"bf16": True, "train_iters": 40, "use_distributed_optimizer": distributed} | performance
    optimizer.build_optimizer(build(values | {"overlap_param_gather": distributed}), [chunk], tied=False)
    overrides = seen.pop("overrides")
    assert seen == dict(
        optimizer="adam", lr=0.5, min_lr=0.125, weight_decay=0.0625, adam_beta1=0.85, adam_beta2=0.9375, adam_eps=1e-5,
        clip_grad=2.5, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=distributed,
        overlap_param_gather=distributed, fp8_recipe="mxfp8", reuse_grad_buf_for_mxfp8_param_ag=True,
        use_precision_aware_optimizer=True, main_grads_dtype=torch.float32, exp_avg_dtype=torch.bfloat16,
        exp_avg_sq_dtype=torch.float32,
    )  # fmt: skip
    assert [dict(value) for value in overrides.values()] == [
        {"wd_mult": 0.0}, {"max_lr": 0.375, "min_lr": 0.09375, "lr_mult": 0.75},
    ]  # fmt: skip
    optimizer.build_optimizer(build(values | {"grad_reduce_in_fp32": False}), [chunk], tied=False)
    assert seen["main_grads_dtype"] == torch.bfloat16
    optimizer.build_optimizer(build({}), [chunk], tied=False)
    assert (seen["fp8_recipe"], seen["bf16"], seen["exp_avg_dtype"]) == (None, False, torch.float32)
    assert seen["reuse_grad_buf_for_mxfp8_param_ag"] is seen["use_precision_aware_optimizer"] is False

    monkeypatch.setattr(optimizer, "OptimizerParamScheduler", lambda _, **fields: fields)
    fields: Any = optimizer.build_scheduler(build(values), SimpleNamespace())  # type: ignore[arg-type]
    assert fields == dict(
        init_lr=0.0, max_lr=0.5, min_lr=0.125, lr_warmup_steps=3, lr_decay_steps=40, lr_decay_style="WSD",
        start_wd=0.0625, end_wd=0.0625, wd_incr_steps=40, wd_incr_style="constant", wsd_decay_steps=7,
        lr_wsd_decay_style="cosine", use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=True,
    )  # fmt: skip
    by_samples = build({**values, **BY_SAMPLES, "train_iters": None, "train_samples": 50, "global_batch_size": 4})
    of_samples: Any = optimizer.build_scheduler(by_samples, SimpleNamespace())  # type: ignore[arg-type]
    lengths = {"lr_warmup_steps": 5, "lr_decay_steps": 50, "wd_incr_steps": 50, "wsd_decay_steps": 9}
    assert of_samples == fields | lengths


def fields_of(model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch, **values: Any) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    with monkeypatch.context() as patched:
        patched.setattr(transformer_config, "TransformerConfig", _recording(transformer_config.TransformerConfig, seen))
        transformer_config.build_transformer_config(model_config, build(values))
    return seen


def test_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, layout and what makes a Qwen3 of megatron's layer."""
    seen = fields_of(MOE, monkeypatch, **LAYOUT, bf16=True, moe_token_dispatcher_type="allgather")
    expected: dict[str, Any] = dict(
        num_layers=6, hidden_size=96, num_attention_heads=12, num_query_groups=3, kv_channels=20, ffn_hidden_size=170,
        normalization="RMSNorm", layernorm_epsilon=1e-5, qk_layernorm=True, gated_linear_unit=True,
        add_bias_linear=False, add_qkv_bias=False, hidden_dropout=0.0, attention_dropout=0.0,
        tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=3, context_parallel_size=5,
        virtual_pipeline_model_parallel_size=4, expert_model_parallel_size=7, expert_tensor_parallel_size=11,
        bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, calculate_per_token_loss=True,
        num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=44, moe_router_score_function="softmax",
        moe_router_pre_softmax=False, moe_router_dtype="fp32", moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0, moe_token_dispatcher_type="allgather", deallocate_pipeline_outputs=False,
        overlap_p2p_comm=True, attention_softmax_in_fp32=True, transformer_impl="local",
    )  # fmt: skip
    assert {name: seen[name] for name in expected} == expected
    assert seen["activation_func"] is torch.nn.functional.silu
    plain = fields_of(dataclasses.replace(MOE, norm_topk_prob=False), monkeypatch)
    assert plain["moe_router_pre_softmax"] is True and plain["params_dtype"] == torch.float32
    assert plain["deallocate_pipeline_outputs"] is True and plain["virtual_pipeline_model_parallel_size"] is None
    assert fields_of(DENSE, monkeypatch)["num_moe_experts"] is None
    qwen2 = fields_of(dataclasses.replace(DENSE, add_qkv_bias=True, qk_layernorm=False), monkeypatch)
    assert (qwen2["add_qkv_bias"], qwen2["qk_layernorm"], qwen2["add_bias_linear"]) == (True, False, False)


def test_the_process_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(process_groups.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel_state, "destroy_model_parallel", lambda: None)
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", lambda **sizes: seen.update(sizes))
    monkeypatch.setattr(process_groups, "model_parallel_cuda_manual_seed", lambda *_, **__: None)
    process_groups.initialize(ParallelConfig(**LAYOUT, distributed_timeout_minutes=13.0))
    expected = {name: size for name, size in LAYOUT.items() if name.endswith("parallel_size")}
    assert seen == expected | dict(
        virtual_pipeline_model_parallel_size=4, create_gloo_process_groups=not has_cuda(),
        distributed_timeout_minutes=14.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather", "delay_wgrad_compute",
             "grad_reduce_in_fp32", "fp8_param_gather"],
)  # fmt: skip
def test_data_parallelism(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One switch at a time."""
    seen: dict[str, Any] = {}

    class SeenError(Exception):
        pass

    def record(**fields: Any) -> None:
        seen.update(fields)
        raise SeenError

    monkeypatch.setattr(initialization, "build_model", lambda *_: None)
    monkeypatch.setattr(initialization, "DistributedDataParallelConfig", record)
    found = []
    for value in (False, True):
        with pytest.raises(SeenError):
            initialization.build_train_state(MOE, build({name: value}))
        found.append(dict(seen))
    assert {key for key in seen if found[0][key] != found[1][key]} == {name} and found[1][name] is True
    assert seen["average_in_collective"] is False


def test_a_planned_job_has_all_settings_that_it_names() -> None:
    names = {item.name for item in dataclasses.fields(Job)} & set(settings())
    values = {name: other(name) for name in names}
    job = job_of(build(values), MOE, 8)
    assert {name: getattr(job, name) for name in names} == values | {
        "fp8_recipe": job.fp8_recipe
    } and job.fp8_recipe != "none"
    assert len(names) > 25


def other(name: str) -> Any:
    setting = settings()[name]
    if isinstance(setting.kind, tuple):
        return next(choice for choice in setting.kind if choice != setting.default)
    return {bool: not setting.default, list: setting.choices[-1:]}.get(setting.kind, setting.default) or 3


def test_every_way_of_sampling_is_a_flag() -> None:
    """All but what the model decides."""
    assert set(SAMPLING) == set(inspect.signature(SamplingOptions).parameters) - {"aligned_blocks"}


def test_every_setting_is_read() -> None:
    """By the code that builds or runs, not only where settings are checked or planned with."""
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in JUDGES]
    files.append(PACKAGE / "config" / "fp8_recipe.py")  # chooses, and does not judge
    read = {
        node.attr
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # Read where they are written, as ParallelConfig.virtual_pipeline_size and properties of RunConfig.
    properties = {
        "virtual_pipeline_size": {"num_virtual_stages_per_pipeline_rank"},
        "num_iterations": {"train_iters", "train_tokens"},
        "batch_sizes": {"rampup_batch_size", "batch_schedule"},
        "grafting_iters": {"grafting_samples"},
        "lr_schedule": {"lr_warmup_iters", "lr_warmup_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples"},
    }
    unread = set(settings()) - read
    assert unread <= set().union(*properties.values()) and properties.keys() <= read
    assert {"num_virtual_stages_per_pipeline_rank", "train_tokens", "batch_schedule"} <= unread


PACKAGE = Path(megatron_a2d.__file__).parent
JUDGES = ("config", "planner", "plan.py")
