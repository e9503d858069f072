"""How a model was trained: it survives every way round, is the default of a run that starts there, and is not contradicted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools import export_hf
from megatron_a2d.checkpoint.directory import RELEASE, RUN_CONFIG, TRACKER
from megatron_a2d.checkpoint.training_facts import Trained, inherited, read_trained
from megatron_a2d.config.cli import Parser, parse_run
from megatron_a2d.config.settings import build
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.conversion.torch_dist_to_hf import export
from megatron_a2d.conversion.weight_averaging import average
from megatron_a2d.data.dataloader import make_batch
from megatron_a2d.data.diffusion_samples import make_sample
from megatron_a2d.evaluation.heldout_nelbo import open_sources, token_losses
from megatron_a2d.evaluation.loglikelihood import label_losses
from megatron_a2d.hf.configuration_a2d import A2DConfig
from megatron_a2d.hf.configuration_sdar import SDARConfig
from megatron_a2d.inference.arguments import close_model, load_model
from megatron_a2d.training.resume import find_start
from megatron_a2d.utils.errors import UserError
from megatron_a2d.verification.logits_report import label_shift
from tests import tiny

PLAIN = {"objective": "mdlm"}
UNSHIFTED = {"label_shift": False, "noise_schedule": "cosine", "reset_attention_mask": True}
COSINE = {"noise_schedule": "cosine", "reset_attention_mask": True}
BLOCKS = {"objective": "block", "block_length": 8, "noise_schedule": "cosine"}
BLOCKS_AR = {**BLOCKS, "ar_loss_weight": 0.5}
AR = {"objective": "ar"}
WAYS: list[tuple[dict[str, Any], str]] = [
    (UNSHIFTED, "a2d"), (COSINE, "rnd1"), (PLAIN, "a2d"), (UNSHIFTED, "qwen3"), (BLOCKS, "qwen3"), (BLOCKS_AR, "qwen3"),
    (BLOCKS, "a2d"), (BLOCKS_AR, "a2d"), ({**BLOCKS, "reset_block_grid": True, "reset_position_ids": True}, "a2d"),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted Qwen3-MoE of one layer, whose mask token is not the first free one."""
    root = tmp_path_factory.mktemp("base")
    tiny.write_hf(root / "hf", "moe", num_hidden_layers=1)
    convert(root / "hf", root / "checkpoint", 253)
    return root / "checkpoint"


def trained(base: Path, root: Path, settings: dict[str, Any], iterations: tuple[int, ...] = (10,)) -> Path:
    """What a run with these settings leaves in its --save."""
    for number in iterations:
        directory = root / f"iter_{number:07d}"
        shutil.copytree(base / RELEASE, directory)
        torch.save({"iteration": number, "consumed_samples": 8 * number}, directory / "common.pt")
        (directory / RUN_CONFIG).write_text(json.dumps(build(settings).to_dict()))
        (directory / "manifest.json").unlink()
    (root / TRACKER).write_text(f"{iterations[-1]}\n")
    return root


def start(load: Path, *flags: str, **given: Any) -> tuple[dict[str, Any], list[str]]:
    """A run's settings as train.py resolves them, and what it reports at the start."""
    arguments = ["--load", str(load), "--no-verify-checkpoint", *flags]
    config, _ = parse_run(Parser(prog="train"), arguments, inherited)
    told: list[str] = []
    find_start(config, told.append)
    return config.to_dict(), told


@pytest.mark.parametrize(("settings", "form"), WAYS)
def test_the_way_round(settings: dict[str, Any], form: Any, base: Path, tmp_path: Path) -> None:
    run = trained(base, tmp_path / "run", settings)
    expected = Trained(**{"objective": "mdlm", **settings})
    assert read_trained(run / "iter_0000010") == expected
    export(run, tmp_path / "out", form, allow_objective_mismatch=True)
    convert(tmp_path / "out", tmp_path / "again")
    # A second lap changes nothing more.
    export(tmp_path / "again", tmp_path / "out2", form, allow_objective_mismatch=True)
    for directory in (tmp_path / "out", tmp_path / "again" / RELEASE, tmp_path / "out2"):
        assert read_trained(directory) == expected, directory
    config, config2 = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "out2"))
    assert config == config2 and config["mask_token_id"] == 253
    # A run that starts from it has all of that for its defaults, and nothing to complain of.
    resolved, told = start(tmp_path / "again")
    assert Trained(**{name: resolved[name] for name in Trained._fields}) == expected and not told


def test_steps_of_denoising_go_round(base: Path, tmp_path: Path) -> None:
    export(trained(base, tmp_path / "run", PLAIN), tmp_path / "out", "a2d")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"num_diffusion_steps": 32}))
    convert(tmp_path / "out", tmp_path / "again")
    export(tmp_path / "again", tmp_path / "out2", "a2d")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out2" / name).read_text())["num_diffusion_steps"] == 32


def test_what_was_never_trained_stays_so(base: Path, tmp_path: Path) -> None:
    """An export of a converted Qwen3 is no trained diffusion model, and a causal one says nothing of diffusion."""
    assert read_trained(base / RELEASE) == Trained()
    export(base, tmp_path / "out", "a2d")
    convert(tmp_path / "out", tmp_path / "again")
    assert read_trained(tmp_path / "again" / RELEASE) == Trained()
    export(tmp_path / "again", tmp_path / "qwen3", "qwen3")
    export(trained(base, tmp_path / "run", AR), tmp_path / "ar", "qwen3")
    for name in ("qwen3", "ar"):
        assert (
            not {*Trained._fields, "mask_token_id"} & json.loads((tmp_path / name / "config.json").read_text()).keys()
        )


def test_exports_written_before_are_diffusion_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "a2d", "label_shift": False}))
    assert read_trained(tmp_path) == Trained("mdlm", label_shift=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rnd1"}))
    assert read_trained(tmp_path) == Trained("mdlm")


@pytest.mark.parametrize(
    ("key", "value"),
    [("label_shift", "no"), ("label_shift", 0), ("block_length", "8"), ("block_length", True), ("noise_schedule", "x"),
     ("document_attention", ["open"]), ("objective", "other"), ("ar_loss_weight", "1")],
)  # fmt: skip
def test_senseless_values_are_one_line(key: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "a2d", key: value}))
    with pytest.raises(UserError, match=f"config.json: has no usable {key}; write what the model was trained with"):
        read_trained(tmp_path)


def test_a_run_resumes_as_it_was(base: Path, tmp_path: Path) -> None:
    """Started from an unshifted checkpoint without a flag, the same command resumes; --load is not asked again."""
    run = trained(base, tmp_path / "run", UNSHIFTED, (10, 20))
    resolved, told = start(base, "--save", str(run))
    assert {name: resolved[name] for name in UNSHIFTED} == UNSHIFTED and not told
    with pytest.raises(UserError, match=r"--label-shift true: .*iter_0000020 was trained with false"):
        start(base, "--save", str(run), "--label-shift")


def test_what_is_given_wins_and_is_told(base: Path, tmp_path: Path) -> None:
    run = trained(base, tmp_path / "run", UNSHIFTED)
    with pytest.raises(UserError, match=r"--label-shift true: .* was trained with false; leave the flag out"):
        convert_and_start(run, tmp_path / "first", "--label-shift")
    resolved, told = start(run, "--finetune", "--label-shift")
    assert resolved["label_shift"] and len(told) == 1 and "--label-shift true" in told[0]
    resolved, told = start(run, "--finetune", "--noise-schedule", "linear", "--no-reset-attention-mask")
    assert [line.split()[0] for line in told] == ["--noise-schedule", "--reset-attention-mask"]
    assert not resolved["label_shift"]
    # Another objective: what does not concern it is neither inherited nor reported.
    resolved, told = start(run, "--finetune", "--objective", "ar")
    assert resolved["label_shift"] and [line.split()[0] for line in told] == ["--objective"]


def convert_and_start(run: Path, root: Path, *flags: str) -> Any:
    export(run, root / "out", "a2d")
    convert(root / "out", root / "again")
    return start(root / "again", *flags)


def test_blocks_are_inherited_with_their_objective_alone(base: Path, tmp_path: Path) -> None:
    run = trained(base, tmp_path / "run", BLOCKS_AR)
    resolved, told = start(run, "--finetune", "--objective", "mdlm")
    assert (resolved["block_length"], resolved["ar_loss_weight"], resolved["noise_schedule"]) == (0, 0.0, "cosine")
    assert [line.split()[0] for line in told] == ["--objective"]
    _, told = start(run, "--finetune", "--block-length", "4")
    assert [line.split()[0] for line in told] == ["--block-length"]


def test_random_weights_inherit_nothing(base: Path, tmp_path: Path) -> None:
    run = trained(base, tmp_path / "run", UNSHIFTED)
    resolved, told = start(run, "--conversion", "random")
    assert resolved["label_shift"] and not told


def test_an_autoregressive_model_may_become_anything(base: Path, tmp_path: Path) -> None:
    for load in (base, trained(base, tmp_path / "run", AR)):
        resolved, told = start(load, "--finetune", "--no-label-shift", "--noise-schedule", "cosine")
        assert (resolved["objective"], told) == ("mdlm", [])


def test_the_mean_is_of_one_kind(base: Path, tmp_path: Path) -> None:
    run = trained(base, tmp_path / "run", UNSHIFTED, (10, 20))
    average([run / "iter_0000010", run / "iter_0000020"], tmp_path / "mean")
    assert read_trained(tmp_path / "mean" / "iter_0000020") == Trained("mdlm", **UNSHIFTED)
    other = trained(base, tmp_path / "other", PLAIN)
    with pytest.raises(UserError, match="objectives or schedules differ"):
        average([run / "iter_0000020", other / "iter_0000010"], tmp_path / "mixed")


@pytest.mark.parametrize(
    ("settings", "form"), [(PLAIN, "qwen3"), (BLOCKS, "qwen3"), (UNSHIFTED, "qwen3"), (AR, "a2d"), (AR, "rnd1")]
)
def test_a_form_that_was_not_trained_is_refused(
    settings: dict[str, Any], form: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(base, tmp_path / "run", settings)
    arguments = ["--checkpoint", str(run), "--out", str(tmp_path / "out"), "--format", form, "--no-verify"]
    with pytest.raises(UserError, match=f"--format {form}: the model was trained .*--allow-objective-mismatch"):
        export_hf.main(arguments)
    assert not (tmp_path / "out").exists()
    export_hf.main([*arguments, "--allow-objective-mismatch"])
    assert "**Not what it was trained for**: the model was trained" in (tmp_path / "out" / "README.md").read_text()
    if form == "qwen3":  # so it is where the export is converted and exported once more
        convert(tmp_path / "out", tmp_path / "again")
        with pytest.raises(UserError, match="--allow-objective-mismatch"):
            export(tmp_path / "again", tmp_path / "out2", "qwen3")


@pytest.mark.parametrize(("settings", "form"), [(PLAIN, "a2d"), (COSINE, "rnd1"), (AR, "qwen3"), (BLOCKS_AR, "qwen3")])
def test_a_form_that_was_trained_is_not(settings: dict[str, Any], form: Any, base: Path, tmp_path: Path) -> None:
    export(trained(base, tmp_path / "run", settings), tmp_path / "out", form)
    assert "Not what it was trained for" not in (tmp_path / "out" / "README.md").read_text()


def test_the_exported_code_reads_them() -> None:
    assert A2DConfig(block_length=8, ar_loss_weight=0.5).ar_loss_weight == 0.5
    assert SDARConfig(block_size=8, label_shift=False).block_length == 8
    with pytest.raises(ValueError, match="block_length and block_size"):
        SDARConfig(block_size=8, block_length=4)
    with pytest.raises(ValueError, match="label_shift"):
        SDARConfig(block_size=8, label_shift=True)
    assert A2DConfig(block_length=0, objective="mdlm", noise_schedule="cosine").noise_schedule == "cosine"


def test_verify_reads_it_too(base: Path, tmp_path: Path) -> None:
    from megatron_a2d.conversion.sources import open_checkpoint

    export(trained(base, tmp_path / "run", UNSHIFTED), tmp_path / "out", "a2d")
    convert(tmp_path / "out", tmp_path / "again")
    with open_checkpoint(tmp_path / "again") as weights:
        assert label_shift(weights) is False


@pytest.mark.parametrize("settings", [PLAIN, BLOCKS, BLOCKS_AR, AR])
def test_held_out_documents_are_seen_as_in_training(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """Documents in rows of their own give what one row with training's mask gives, for checkpoints and exports."""
    run = trained(base, tmp_path / "run", {**settings, "reset_attention_mask": True})
    tiny.write_tokens(tmp_path / "text", 30, 240, seed=3)
    objective = settings["objective"]
    models = [(run, "ar" if objective == "ar" else "mdlm")]
    if settings is PLAIN:
        export(run, tmp_path / "out", "a2d", verify=False)
        models.append((tmp_path / "out", "mdlm"))
    expected = None
    for path, kind in models:
        opened = load_model(str(path), {}, kind)
        try:
            assert opened.reset_attention_mask is True
            dataset = open_sources([str(tmp_path / "text")], 128, opened.vocab_size)[0].dataset
            known = {name: getattr(opened, name) for name in ("objective", "label_shift", "block_length")}
            config = build({**known, "seq_length": 128, "reset_attention_mask": opened.reset_attention_mask})
            batch = make_batch(dataset, make_sample(config, opened.model_config, dataset, 0), 0, 4)
            needed = batch.weights > 0
            losses, correct = token_losses(opened, batch, needed)
            assert batch.documents is not None and len(losses) == len(correct) == int(needed.sum()) > 50
            if expected is None:
                expected = whole_rows(opened, batch, needed)
            torch.testing.assert_close(losses, expected, rtol=2e-4, atol=2e-4)
            assert (token_losses(opened, batch._replace(documents=None), needed)[0] - expected).abs().max() > 0.01
        finally:
            close_model()


def whole_rows(opened: Any, batch: Any, needed: torch.Tensor) -> torch.Tensor:
    model = getattr(opened.forward, "_model", opened.forward).model
    rows = needed.flatten().nonzero()[:, 0]
    with torch.no_grad():
        hidden = model.hidden_states(
            batch.tokens, indices_N=rows, documents=batch.documents, positions=batch.positions, levels=batch.levels
        )
        return label_losses(hidden, model.head, batch.labels[needed][:, None])[0][:, 0]
