"""Roles of parameters, sizes and operations, and the log of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_a2d.architecture import Architecture
from megatron_a2d.console import entry_point
from megatron_a2d.errors import SaveError, UserError
from megatron_a2d.model.flops import train_flops_per_token
from megatron_a2d.study.report import draw_run, read_log
from megatron_a2d.train import main
from megatron_a2d.training import parallel
from megatron_a2d.training.optimizer import role_of

QWEN3_30B_A3B = Architecture(48, 2048, 32, 4, 128, 6144, 151936, 40960, 1e-6, 1e6, False, 128, 8, 768)
QWEN3_8B = Architecture(36, 4096, 32, 8, 128, 12288, 151936, 40960, 1e-6, 1e6, False)

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
    start = {"kind": "start", "iteration": 0, "settings": {"grafting_steps": 25}}
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
    parallel.check_launch()
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setenv("RANK", "1")
    parallel.check_launch()


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
