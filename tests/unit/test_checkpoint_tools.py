"""inspect, average, verify's report, the model card."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools import average as average_command
from checkpoints_tools import convert_hf, export_hf, inspect, verify
from megatron_a2d.checkpoint.manifest import check_manifest
from megatron_a2d.checkpoint.torch_dist_reader import read_common
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.conversion.sources import open_checkpoint, open_hf
from megatron_a2d.conversion.torch_dist_to_hf import export
from megatron_a2d.conversion.weight_averaging import average, factors_of
from megatron_a2d.hf import CODE_FILES
from megatron_a2d.utils.errors import UserError
from megatron_a2d.verification import logits_report
from megatron_a2d.verification.reference_forward import StreamedModel, has_bf16_products
from tests import tiny
from tests.unit import tiny_run
from tests.unit.hf_tensors import tensors_of

run = tiny_run.run

ROOT = Path(__file__).parents[2]


# --- average ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema_decay", [None, 0.75])
def test_the_mean_is_that_of_the_tensors(ema_decay: float | None, run: Path, tmp_path: Path) -> None:
    iterations = [run / f"iter_{number:07d}" for number in (30, 10, 20)]  # in any order
    done = average(iterations, tmp_path / "mean", ema_decay)
    assert done.iterations == [10, 20, 30]
    export(tmp_path / "mean", tmp_path / "out", "qwen3", allow_objective_mismatch=True)
    tensors = [tensors_of(run.parent / f"hf_{number}") for number in (10, 20, 30)]
    found = tensors_of(tmp_path / "out")
    for name in tensors[0]:
        first, second, third = (item[name].double() for item in tensors)
        if ema_decay is None:
            expected = (first + second + third) / 3
        else:
            expected = 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third
        torch.testing.assert_close(found[name].double(), expected.bfloat16().double(), rtol=2**-7, atol=1e-6)
        assert not torch.equal(found[name], tensors[2][name])
    directory = tmp_path / "mean" / "iter_0000030"
    assert read_common(directory) == {"iteration": 30, "consumed_samples": 240, "averaged_iterations": [10, 20, 30]}
    assert not check_manifest(directory) and (directory / "run.json").exists()
    assert "mean of the iterations 10, 20, 30" in (tmp_path / "out" / "README.md").read_text()


def test_factors_add_up_to_one() -> None:
    assert factors_of(4, None) == [0.25] * 4
    assert factors_of(3, 0.5) == [0.25, 0.25, 0.5]
    assert sum(factors_of(7, 0.9)) == pytest.approx(1)


def test_what_cannot_be_averaged(run: Path, tmp_path: Path) -> None:
    one = run / "iter_0000010"
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="at least two"):
        average_command.main(["--checkpoints", str(one), *out])
    with pytest.raises(UserError, match="named twice"):
        average_command.main(["--checkpoints", str(one), str(one), *out])
    with pytest.raises(UserError, match=r"--ema-decay 1\.5"):
        average_command.main(["--checkpoints", str(one), str(run), *out, "--ema-decay", "1.5"])
    convert(tiny.write_hf(tmp_path / "hf", "moe", rms_norm_eps=1e-5), tmp_path / "other")
    with pytest.raises(UserError, match="rms_norm_eps"):
        average([one, tmp_path / "other"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- inspect ------------------------------------------------------------------------------------------------


def test_inspect_shows_both_sides(run: Path, capsys) -> None:
    inspect.main(["--checkpoint", str(run)])
    shown = capsys.readouterr().out
    for word in ("iteration", "30", "7.68k", "bfloat16", "router", "lr 0.001", "mlp': 0.1", "8 experts, 2 per token"):
        assert word in shown, word
    inspect.main(["--hf-model", str(run.parent / "hf_30")])
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    tensors = tensors_of(run.parent / "hf_30")
    head = tensors["lm_head.weight"].float()
    assert f"{float(head.norm()):.4g}" in lines["head"] and f"{float(head.abs().max()):.4g}" in lines["head"]
    routers = torch.cat([tensor.float().flatten() for name, tensor in tensors.items() if ".mlp.gate." in name])
    assert f"{float(routers.square().mean().sqrt()):.4g}" in lines["router"]
    inspect.main(["--hf-model", str(run.parent / "hf_30"), "--no-norms"])
    assert f"{float(head.norm()):.4g}" not in capsys.readouterr().out
    with pytest.raises(UserError, match="exactly one"):
        inspect.main([])


def test_inspect_counts_values_that_are_not_finite(run: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(run.parent / "hf_10", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["lm_head.weight"][3, 3] = float("nan")
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    inspect.main(["--hf-model", str(tmp_path / "hf")])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("│ head"))
    assert line.split()[-2] == "1"


# --- model card ---------------------------------------------------------------------------------------------


def test_the_card_says_what_went_in(run: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(
        json.dumps({"results": {"arc": {"acc": 0.5123, "alias": "arc"}}, "nelbo": 2})
    )
    arguments = [
        "--checkpoint",
        str(run),
        "--out",
        str(tmp_path / "out"),
        "--evaluation",
        str(tmp_path / "results.json"),
    ]
    export_hf.main(arguments)
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "license: apache-2.0", "base_model: Qwen/Tiny", "30 iterations, 240 samples of 32 tokens (7680 tokens seen)",
        "| corpus_train | all |", "| noise_schedule | linear |", "| mlp | 0.1 | 0.0001 |", "| attention | 1 | 0.001 |",
        "| results / arc / acc | 0.5123 |", "| nelbo | 2 |",
    ):  # fmt: skip
        assert line in card, line
    assert "secret_place" not in card
    convert(run.parent / "hf_10", tmp_path / "release")
    export(tmp_path / "release", tmp_path / "plain", "a2d")
    plain = (tmp_path / "plain" / "README.md").read_text()
    assert "## Recipe" not in plain and "## Evaluation" not in plain and "not recorded" in plain


# --- verify's report ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_the_streamed_pass_is_the_model(kind: str, causal: bool, tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", kind)
    tokens_BL = logits_report.random_tokens(tiny.VOCAB_SIZE)
    expected_BLV = logits_report.transformers_logits(hf, tokens_BL, bidirectional=not causal)
    with open_hf(hf) as weights:
        model = StreamedModel(weights, causal)
        assert (model.logits(tokens_BL) - expected_BLV).abs().max() < 1e-5
        assert (StreamedModel(weights, not causal).logits(tokens_BL) - expected_BLV).abs().max() > 0.1
        losses_N = model.cross_entropy(model.hidden(tokens_BL).flatten(0, 1), tokens_BL.flatten())
    expected_N = torch.nn.functional.cross_entropy(expected_BLV.flatten(0, 1), tokens_BL.flatten(), reduction="none")
    torch.testing.assert_close(losses_N, expected_N, rtol=1e-5, atol=1e-5)


def test_the_loss_by_time_is_of_masked_tokens(tmp_path: Path, capsys) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "dense")
    convert(hf, tmp_path / "ckpt")
    with open_checkpoint(tmp_path / "ckpt") as weights:
        text, losses = logits_report.loss_by_time(weights)
        assert text == "text of Python's manual"
        assert [item.time for item in losses] == list(logits_report.TIMES)
        counts = [item.num_masked for item in losses]
        assert counts == sorted(counts) and counts[0] > 0 and counts[-1] > 100
        # A model that knows the answer: another seed of the weights must change the loss.
        assert all(4 < item.loss < 8 for item in losses)
        other = logits_report.loss_by_time(weights, label_shift=False)[1]
        assert other != losses
    (tmp_path / "ckpt" / "release" / "hf" / "tokenizer.json").unlink()
    with open_checkpoint(tmp_path / "ckpt") as weights:
        assert logits_report.loss_by_time(weights)[0] == "random tokens"
    with open_hf(hf) as weights:  # an autoregressive model has no mask token
        assert logits_report.loss_lines(*logits_report.loss_by_time(weights), 256) == [
            "masked cross-entropy: not measured, because the model has no mask token"
        ]


def test_losses_in_bf16_differ_in_the_third_digit(tmp_path: Path, monkeypatch) -> None:
    """Only the products are in bf16: sums, norms and attention are not."""
    hf = tiny.write_hf(tmp_path / "hf", "moe")
    convert(hf, tmp_path / "ckpt", dtype=torch.bfloat16)
    with open_checkpoint(tmp_path / "ckpt") as weights:
        found = []
        for in_bf16 in (False, True):
            monkeypatch.setattr(logits_report, "has_bf16_products", lambda in_bf16=in_bf16: in_bf16)
            found.append([item.loss for item in logits_report.loss_by_time(weights)[1]])
    assert found[0] != found[1] and max(abs(a - b) for a, b in zip(*found, strict=True)) < 0.005


@pytest.mark.parametrize(
    "line,expected",
    [
        ("flags\t\t: fpu sse2 avx512_bf16 amx_tile\nbugs\t: bf16", True),
        ("flags : fpu avx512f", False),
        ("Features\t: fp asimd bf16", True),
        ("", False),
    ],
)
def test_processors_with_bf16_products(line: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert has_bf16_products(tmp_path / "cpuinfo") is expected
    assert not has_bf16_products(tmp_path / "absent")


def test_a_large_model_is_not_loaded_unasked(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(logits_report, "DEFAULT_MAX_BYTES", 1000)
    monkeypatch.setattr(logits_report, "transformers_logits", lambda *a, **k: pytest.fail("it was loaded"))
    verify.main(["--hf-model", str(run.parent / "hf_30"), "--checkpoint", str(run)])
    out = capsys.readouterr().out
    assert "logits of 1 x 8 positions" in out and "both streamed, transformers would take" in out


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("tool", ["convert", "export"])
def test_other_logits_leave_no_output(tool: str, size: str, run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Compared first, named afterwards: what behaves otherwise than its source never gets its name, at any size."""
    if size == "large":
        monkeypatch.setattr(logits_report, "DEFAULT_MAX_BYTES", 1000)
    name = {"convert": "--hf-model", "export": "--checkpoint"}[tool]
    main = {"convert": convert_hf.main, "export": export_hf.main}[tool]
    command = [name, str(run.parent / "hf_30" if tool == "convert" else run), "--out", str(tmp_path / "new" / "out")]
    rotate = StreamedModel._rotate
    streamed = []

    def rotate_otherwise(model: StreamedModel, x: torch.Tensor) -> torch.Tensor:
        """A fault of one side: the first one whose logits are streamed; the losses have other texts."""
        streamed.extend([model] if len(x) <= 2 else [])
        return x if streamed and model is streamed[0] else rotate(model, x)

    monkeypatch.setattr(StreamedModel, "_rotate", rotate_otherwise)
    with pytest.raises(UserError, match=r"logits (of|differ)") as refusal:
        main(command)
    assert len(refusal.value.problems) == 1 and ".partial" not in refusal.value.problems[0]
    assert not list((tmp_path / "new").iterdir())
    monkeypatch.setattr(StreamedModel, "_rotate", rotate)
    main(command)
    assert "logits of" in capsys.readouterr().out


@pytest.mark.parametrize("unasked", [logits_report.DEFAULT_MAX_BYTES, 1000])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rounded_logits_are_compared_as_strictly(dtype: str, unasked: int, tmp_path: Path, monkeypatch, capsys) -> None:
    """The source is rounded as its copy is, so that a difference of 1e-5 is seen among those of 1e-2."""
    monkeypatch.setattr(logits_report, "DEFAULT_MAX_BYTES", unasked)
    hf = tiny.write_hf(tmp_path / "hf", "moe")
    command = ["--hf-model", str(hf), "--dtype", dtype, "--out"]
    convert_hf.main([*command, str(tmp_path / "ckpt")])
    export_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out"), "--format", "rnd1"])
    verify.main(["--hf-model", str(hf), "--export", str(tmp_path / "out")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "largest difference" in line]
    assert len(lines) == 3 and all(float(line.split("largest difference ")[1].split(",")[0]) < 1e-5 for line in lines)
    norm = StreamedModel._norm  # a fault of the streamed side alone
    monkeypatch.setattr(StreamedModel, "_norm", lambda model, x, name: norm(model, x, name) * 1.001)
    if unasked > 1000:
        with pytest.raises(UserError, match="logits differ"):
            convert_hf.main([*command, str(tmp_path / "again")])


@pytest.mark.parametrize("change", ["none", "file", "pipe", "another file", "another repository"])
def test_verify_runs_no_foreign_code(change: str, run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """What a directory from elsewhere carries or names is not run; our own files, as the control, are."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "export"
    export(run, out, "rnd1", CODE_FILES["rnd1"])
    evil = f"open({str(tmp_path / 'owned')!r}, 'w')\n"
    if change == "file":
        (out / "modeling_rnd.py").write_text((out / "modeling_rnd.py").read_text() + evil)
    elif change == "pipe":
        (out / "modeling_rnd.py").unlink()
        os.mkfifo(out / "modeling_rnd.py")
    elif change == "another file":
        (out / "custom_generate").mkdir()
        (out / "custom_generate" / "generate.py").write_text(evil)
    elif change == "another repository":
        config = json.loads((out / "config.json").read_text())
        config["auto_map"] = {name: f"evil/repo--{place}" for name, place in config["auto_map"].items()}
        (out / "config.json").write_text(json.dumps(config))
    assert logits_report.carries_our_code(out) == (change == "none")
    verify.main(["--checkpoint", str(run), "--export", str(out)])
    assert ("were not run" in capsys.readouterr().out) == (change != "none")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("key", "value"), [("mask_token_id", 251), ("label_shift", False)])
def test_verify_sees_what_no_logit_shows(key: str, value: object, run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "export", "a2d", CODE_FILES["a2d"])
    path = tmp_path / "export" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"{key} is {value}, but"):
        verify.main(["--checkpoint", str(run), "--export", str(tmp_path / "export")])


def test_the_report_of_values_that_were_let_pass(tmp_path: Path, capsys) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "dense")
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.weight"][0, 0] = float("nan")
    save_file(tensors, hf / "model.safetensors")
    convert_hf.main(["--hf-model", str(hf), "--out", str(tmp_path / "ckpt"), "--allow-nonfinite"])
    assert "logits: not finite on either side" in capsys.readouterr().out
