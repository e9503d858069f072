"""Names of version 0.1: flags and recipes are still understood, with a warning; records are read in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_a2d.config.cli import Parser, parse_run
from megatron_a2d.config.renamed import (
    FLAGS,
    METRICS,
    MOE_METRICS,
    SETTINGS,
    modernise_flags,
    modernise_record,
    recorded_settings,
)
from megatron_a2d.config.settings import settings
from megatron_a2d.evaluation.evaluation_options import read_config
from megatron_a2d.report.plots import read_log
from megatron_a2d.utils.errors import UserError

# An old setting with its value, the flags that gave it, and the new one.
OLD: list[tuple[str, Any, list[str], str, Any]] = [
    ("document_attention", "isolated", ["--document-attention", "isolated"], "reset_attention_mask", True),
    ("document_attention", "open", ["--document-attention=open"], "reset_attention_mask", False),
    ("eod_maskable", True, ["--eod-maskable"], "eod_mask_loss", False),
    ("eod_maskable", False, ["--no-eod-maskable"], "eod_mask_loss", True),
    ("load_iteration", 7, ["--load-iteration", "7"], "ckpt_step", 7),
    ("keep_last", 3, ["--keep-last=3"], "keep_latest_k", 3),
    ("keep_every", 50, ["--keep-every", "50"], "save_retain_interval", 50),
    ("fp8", "mxfp8", ["--fp8", "mxfp8"], "fp8_recipe", "mxfp8"),
    ("fp4", "nvfp4", ["--fp4", "nvfp4"], "fp4_recipe", "nvfp4"),
    ("transformer_impl", "portable", ["--transformer-impl", "portable"], "transformer_impl", "local"),
    ("attention_annealing_steps", 9, ["--attention-annealing-steps", "9"], "attention_annealing_iters", 9),
    ("grafting_steps", 9, ["--grafting-steps", "9"], "grafting_iters", 9),
    ("time_sampling", "uniform", ["--time-sampling", "uniform"], "timestep_sampling", "uniform"),
    ("min_time", 0.25, ["--min-time", "0.25"], "min_timestep", 0.25),
    ("loss_weights", "cart", ["--loss-weights", "cart"], "loss_weighting", "cart"),
    ("mask_embedding", "as_is", ["--mask-embedding", "as_is"], "mask_token_init", "pretrained"),
    ("mask_embedding", "mean", ["--mask-embedding=mean"], "mask_token_init", "mean"),
]


@pytest.mark.parametrize(("old", "value", "words", "new", "expected"), OLD, ids=[" ".join(row[2]) for row in OLD])
def test_old_names(
    old: str, value: Any, words: list[str], new: str, expected: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a flag, in a recipe (with either dash) and in a record; the first two warn once."""
    recipe = tmp_path / "recipe.yaml"
    for key in (old, old.replace("_", "-")):
        recipe.write_text(yaml.safe_dump({key: value}))
        for arguments in (["--config", str(recipe)], words):
            config, _ = parse_run(Parser(), arguments)
            assert config.to_dict()[new] == expected
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1 and lines[0].startswith("warning: ") and "is now " in lines[0]
            assert (new in lines[0]) or f"{new.replace('_', '-')}" in lines[0]
    assert recorded_settings({old: value, "lr": 0.5}) == ({new: expected, "lr": 0.5}, [])
    assert capsys.readouterr().err == ""


def test_every_old_name_is_tried_and_gone() -> None:
    assert {row[0] for row in OLD} == SETTINGS.keys()
    assert {renamed.name for renamed in SETTINGS.values()} <= settings().keys()
    assert SETTINGS.keys() & settings().keys() == {"transformer_impl"}


def test_new_names_are_not_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--reset-attention-mask", "--no-eod-mask-loss", "--transformer-impl=local", "--transformer-impl", "auto"]
    assert parse_run(Parser(), words)[0].data.reset_attention_mask
    assert capsys.readouterr().err == ""


def test_what_cannot_be_translated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--document-attention opne: must be one of open, isolated"):
        parse_run(Parser(), ["--document-attention", "opne"])
    with pytest.raises(UserError, match="unknown argument"):
        parse_run(Parser(), ["--no-keep-last"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("keep_last: 3\nkeep_latest_k: 4\n")
    with pytest.raises(UserError, match="keep_latest_k is given twice"):
        parse_run(Parser(), ["--config", str(recipe)])
    recipe.write_text("document_attention: [open]\n")
    with pytest.raises(UserError, match="document_attention"):
        parse_run(Parser(), ["--config", str(recipe)])


def test_a_record_with_both_names() -> None:
    """A run of today that was resumed: the new name counts, in either order."""
    both = {"keep_last": 1, "keep_latest_k": 2}
    assert modernise_record(both) == modernise_record(dict(reversed(both.items()))) == {"keep_latest_k": 2}


def test_flags_of_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for old, new in FLAGS.items():
        assert modernise_flags([old, "x", f"{old}=y"], {new}) == [new, "x", f"{new}=y"]
        assert capsys.readouterr().err.count(f"warning: {old} is now {new};") == 2
        assert modernise_flags([old], {new, old}) == modernise_flags([old], set()) == [old]
        assert modernise_flags(["--", old], {new}) == ["--", old]
    assert capsys.readouterr().err == ""


def test_a_recipe_of_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "eval.yaml"
    recipe.write_text("guidance: 0.5\n")
    assert read_config(str(recipe), []) == {"cfg_scale": 0.5}
    assert "guidance is now cfg_scale" in capsys.readouterr().err


def test_metrics_of_older_logs(tmp_path: Path) -> None:
    old = {
        "loss": 1.0,
        "noise_scale": 2.0,
        "drift_by_role": {"mlp": 0.1},
        "router": {"load_visible": 3.0, "dropped": 0},
    }
    new = {"loss": 1.0, "grad_noise_scale": 2.0, "relative_weight_change": {"mlp": 0.1}}
    new["moe"] = {"load_imbalance_unmasked": 3.0, "dropped_token_frac": 0}
    for number, record in enumerate((old, new)):
        run = tmp_path / str(number)
        run.mkdir()
        (run / "log.jsonl").write_text(json.dumps({"kind": "train", "iteration": 1, **record}) + "\n")
        assert read_log(run) == [{"kind": "train", "iteration": 1, **new}]


@pytest.mark.parametrize("names", [METRICS, MOE_METRICS])
def test_a_metric_has_one_new_name(names: dict[str, str]) -> None:
    assert len(set(names.values())) == len(names) and not names.keys() & set(names.values())
