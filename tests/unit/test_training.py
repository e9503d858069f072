"""Roles of parameters, sizes and operations, and the log of a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_a2d.config.fp8_recipe import Scaling
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import build
from megatron_a2d.distributed import environment, process_groups
from megatron_a2d.model.flops import train_flops_per_token
from megatron_a2d.report.plots import draw_run, read_log
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.train import main
from megatron_a2d.training import optimizer
from megatron_a2d.training.optimizer import (
    build_optimizer,
    build_scheduler,
    freeze_roles,
    frozen_roles,
    reuses_gradient_buffer,
    role_of,
)
from megatron_a2d.utils.errors import SaveError, UserError

QWEN3_30B_A3B = ModelConfig(48, 2048, 32, 4, 128, 6144, 151936, 40960, 1e-6, 1e6, False, 128, 8, 768)
QWEN3_8B = ModelConfig(36, 4096, 32, 8, 128, 12288, 151936, 40960, 1e-6, 1e6, False)

NAMES = {
    "embedding.word_embeddings.weight": "embedding",
    "decoder.layers.0.input_layernorm.weight": "norm",
    "decoder.layers.0.self_attention.linear_qkv.weight": "attention",
    "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": "norm",
    "decoder.layers.0.self_attention.q_layernorm.weight": "norm",
    "decoder.layers.3.self_attention.linear_proj.weight": "attention",
    "decoder.layers.3.mlp.router.weight": "router",
    "decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.weight": "mlp",
    "decoder.layers.3.mlp.linear_fc2.weight": "mlp",
    "decoder.final_layernorm.weight": "norm",
    "output_layer.weight": "head",
}


def test_roles() -> None:
    for name, role in NAMES.items():
        assert role_of(name) == role_of(f"module.{name}") == role
    assert role_of("output_layer.weight", tied=True) == "embedding"


def test_parameter_counts_are_the_published_ones() -> None:
    assert QWEN3_30B_A3B.num_parameters() == 30_532_122_624
    assert QWEN3_30B_A3B.num_active_parameters() == pytest.approx(3.35e9, rel=0.01)
    assert QWEN3_8B.num_parameters() == 8_190_735_360


def test_flops_of_the_30b() -> None:
    """Full attention, head on all rows: 27.9 G operations a token at 4096 and 37.6 G at 8192."""
    for length, expected in ((4096, 27.9e9), (8192, 37.6e9)):
        assert train_flops_per_token(QWEN3_30B_A3B, length) == pytest.approx(expected, rel=0.01)
    causal = train_flops_per_token(QWEN3_30B_A3B, 4096, causal=True)
    assert causal == pytest.approx(23.1e9, rel=0.01)
    half_head = train_flops_per_token(QWEN3_30B_A3B, 4096, head_fraction=0.5)
    assert train_flops_per_token(QWEN3_30B_A3B, 4096) - half_head == pytest.approx(3 * 2048 * 151936, rel=1e-9)


def test_dense_counts_do_not_change_with_experts() -> None:
    dense = replace(QWEN3_30B_A3B, num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0)
    assert dense.num_active_parameters() == dense.num_parameters() and not dense.is_moe


def test_report_of_a_resumed_run(tmp_path: Path) -> None:
    """Of an iteration that was written twice the newest record stands; a torn last line is passed over."""
    common = {"accuracy": 0.1, "grad_norm": 1.0, "lr": 1e-3, "time": 0.0}
    records = [{"kind": "train", "iteration": i, "loss": loss, **common} for i, loss in ((1, 9.0), (2, 8.0), (2, 7.0))]
    validation = {"kind": "validation", "iteration": 2, "nelbo": 7.5, "nelbo_standard_error": 0.1, "accuracy": 0.2,
                  "accuracy_standard_error": 0.01}  # fmt: skip
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [*records, validation])) + '\n{"kind": "tr')
    assert [record["loss"] for record in read_log(tmp_path) if record["kind"] == "train"] == [9.0, 7.0]
    image = draw_run(tmp_path, tmp_path / "report.png")
    assert image.read_bytes().startswith(b"\x89PNG")


def test_the_error_of_grafting_is_no_loss(tmp_path: Path) -> None:
    """Logs once held it as `loss`, in intervals of which a part or all was grafting; newer ones name it."""
    start = {"kind": "start", "iteration": 0, "settings": {"grafting_iters": 25}}
    old = [
        {"kind": "train", "iteration": i, "loss": 0.5, "accuracy": 0.0, "grad_norm": 1.0, "lr": 0.1}
        for i in (10, 20, 30, 40)
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [start, *old])))
    train = [record for record in read_log(tmp_path) if record["kind"] == "train"]
    assert [record["loss"] for record in train] == [None, None, None, 0.5] and train[0]["grad_norm"] == 1.0
    assert draw_run(tmp_path, tmp_path / "report.png").stat().st_size > 5000
    new = [{**record, "grafting_error": 0.3} for record in old[:3]]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [start, *new, old[3]])))
    train = [record for record in read_log(tmp_path) if record["kind"] == "train"]
    assert [record["loss"] for record in train] == [0.5] * 4


def test_slurm_alone_numbers_no_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("SLURM_PROCID", "1"), ("SLURM_NTASKS", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="SLURM_NTASKS 4: srun started this process 4 times without a RANK"):
        main(["--train-data-path", "x", "--load", "y"])
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    process_groups.check_launch()
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setenv("RANK", "1")
    process_groups.check_launch()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
@pytest.mark.parametrize("value", ["two", "", "-1"])
def test_torchruns_variables_are_numbers(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value}: this environment variable, which torchrun sets, is not"):
        {"WORLD_SIZE": environment.world_size, "RANK": environment.rank}[name]()


def test_report_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no log"):
        draw_run(tmp_path, tmp_path / "report.png")
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(UserError, match="no training record"):
        draw_run(tmp_path, tmp_path / "report.png")


def test_exit_code_of_a_checkpoint_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise SaveError("--save run: no room")

    with pytest.raises(SystemExit) as end:
        entry_point(main)
    assert end.value.code == 74 and capsys.readouterr().err == "error: --save run: no room\n"


class TinyModel(torch.nn.Module):
    """A parameter of each role, and a vector and a matrix that have none of their own factors."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(params_dtype=torch.bfloat16)
        self.shapes = {
            "embedding": (3, 2),
            "self_attention": (2, 2),
            "mlp": (4, 2),
            "router": (5, 2),
            "final_norm": (2,),
            "mlp_bias": (4,),
        }
        for name, shape in self.shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))


def megatron_config(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> tuple[Any, dict[str, dict[str, Any]]]:
    """megatron.core's configuration, and by parameter what the overrides say that match it."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        optimizer, "get_megatron_optimizer", lambda config, chunks, **others: asked.update(config=config, **others)
    )
    model = TinyModel()
    build_optimizer(build(settings), [model], tied=False)  # type: ignore[list-item]
    assert asked["use_gloo_process_groups"] is False
    overrides = {
        name: {
            field: value
            for key, override in asked["config_overrides"].items()
            if key.matches(parameter, name)
            for field, value in override.items()
        }
        for name, parameter in model.named_parameters()
    }
    return asked["config"], overrides


def test_each_role_has_its_learning_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends of the decay are scaled; vectors do not decay, whatever their role."""
    settings = {"lr": 0.5, "min_lr": 0.125, "lr_mult": {"attention": 4.0, "mlp": 0.5, "router": 0.0, "embedding": 1.0}}
    _, overrides = megatron_config(monkeypatch, settings)
    attention = {"max_lr": 2.0, "min_lr": 0.5, "lr_mult": 4.0}
    mlp = {"max_lr": 0.25, "min_lr": 0.0625, "lr_mult": 0.5}
    assert overrides == {
        "embedding": {}, "self_attention": attention, "mlp": mlp, "router": {}, "final_norm": {"wd_mult": 0.0}, "mlp_bias": {**mlp, "wd_mult": 0.0},
    }  # fmt: skip


def test_settings_reach_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "lr": 3e-4, "min_lr": 2e-5, "weight_decay": 0.07, "adam_beta1": 0.85, "adam_beta2": 0.93, "adam_eps": 3e-7, "clip_grad": 0.6,
        "bf16": True, "use_distributed_optimizer": True, "overlap_param_gather": True, "overlap_grad_reduce": True,
    }  # fmt: skip
    config, _ = megatron_config(monkeypatch, settings)
    names = (
        "lr",
        "min_lr",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_eps",
        "clip_grad",
        "bf16",
        "use_distributed_optimizer",
        "overlap_param_gather",
    )
    assert {name: getattr(config, name) for name in names} == {name: settings[name] for name in names}
    assert config.optimizer == "adam" and config.params_dtype == torch.bfloat16 and config.fp8_recipe is None
    assert not config.use_precision_aware_optimizer and config.main_grads_dtype == torch.float32
    assert (
        config.exp_avg_dtype == config.exp_avg_sq_dtype == torch.float32
        and not config.reuse_grad_buf_for_mxfp8_param_ag
    )


@pytest.mark.parametrize(("in_fp32", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_types_of_a_precision_aware_optimizer(
    in_fp32: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "use_precision_aware_optimizer": True,
        "use_distributed_optimizer": True,
        "grad_reduce_in_fp32": in_fp32,
        "exp_avg_dtype": "bf16",
    }
    monkeypatch.setattr(
        optimizer, "MegatronOptimizerConfig", SimpleNamespace
    )  # megatron.core's asks Transformer Engine
    config, _ = megatron_config(monkeypatch, settings)
    assert config.use_precision_aware_optimizer and config.main_grads_dtype == expected
    assert (config.exp_avg_dtype, config.exp_avg_sq_dtype) == (torch.bfloat16, torch.float32)


def test_only_mxfp8_weights_are_gathered_into_the_gradients() -> None:
    for gathers in (False, True):
        for recipe in (None, "mxfp8", "blockwise"):
            scaling = Scaling(recipe, "e4m3") if recipe else None
            assert reuses_gradient_buffer(build({"fp8_param_gather": gathers}), scaling) == (
                gathers and recipe == "mxfp8"
            )


def test_frozen_roles_ask_for_no_gradient() -> None:
    factors = {"mlp": 0.0, "norm": 0.0, "attention": 0.5}
    model = TinyModel()
    freeze_roles(model, factors, tied=False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"mlp", "mlp_bias", "final_norm"}
    assert (
        frozen_roles({"lr_mult": factors}) == {"mlp", "norm"}
        and frozen_roles({}) == frozen_roles({"lr_mult": None}) == set()
    )


def learning_rates(**settings: Any) -> list[float]:
    """Of iterations 0 .. train_iters, as the schedule sets them for a group of factor 1 and one of factor 4."""
    groups = [{"lr": 0.0, "weight_decay": 0.0}, {"lr": 0.0, "weight_decay": 0.0, "max_lr": 4.0, "min_lr": 0.4}]
    config = build({"lr": 1.0, "min_lr": 0.1, "weight_decay": 0.3, **settings})
    scheduler = build_scheduler(config, SimpleNamespace(param_groups=groups))  # type: ignore[arg-type]
    found = []
    for _ in range(config.training.train_iters + 1):
        found.append(groups[0]["lr"])
        assert groups[1]["lr"] == pytest.approx(4 * groups[0]["lr"]) and groups[0]["weight_decay"] == 0.3
        scheduler.step(1)
    return found


def test_the_schedule_of_learning_rates() -> None:
    """Linear warm-up from 0, half a cosine down to min_lr; WSD stays up and comes down in its last iterations."""
    cosine = learning_rates(train_iters=20, lr_warmup_iters=4, lr_decay_style="cosine")
    assert cosine[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert cosine[4:] == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * step / 16)) / 2 for step in range(17)])
    wsd = learning_rates(train_iters=20, lr_warmup_iters=2, lr_decay_style="WSD", lr_wsd_decay_iters=8)
    assert wsd[:13] == pytest.approx([0, 0.5, *[1.0] * 11])
    assert wsd[12:] == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)])
