"""Checkpoints, recipes, logs and exports of an earlier version still work: tests/fixtures/written_by_0_1_0."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.parity.pool import Pool

OLDER = Path(__file__).resolve().parents[1] / "fixtures" / "written_by_0_1_0"


@pytest.fixture(scope="module")
def resumed(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The older run, resumed from its checkpoint of iteration 2 by its own recipe."""
    root = tmp_path_factory.mktemp("older")
    shutil.copytree(OLDER / "run", root / "run")
    (root / "run" / "log.jsonl").unlink()
    data = str(OLDER / "tokens")
    arguments = ["--config", str(OLDER / "recipe.yaml"), "--load", str(root / "run"), "--save", str(root / "run")]
    arguments += ["--train-data-path", data, "--valid-data-path", data]
    pool.run("command", 1, module="megatron_a2d.train", arguments=arguments)
    return root / "run"


def records(log: Path, kind: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in log.read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_a_run_resumes_where_it_was(resumed: Path) -> None:
    """Iterations 3 and 4 have the losses, gradients and learning rates that the older version gave them."""
    before = records(OLDER / "run" / "log.jsonl", "train")[2:]
    after = records(resumed / "log.jsonl", "train")
    assert [line["iteration"] for line in after] == [3, 4]
    for old, new in zip(before, after, strict=True):
        for name in ("loss", "cross_entropy", "grad_norm", "lr", "mask_ratio"):
            assert new[name] == pytest.approx(old[name], rel=1e-5), name


@pytest.mark.parametrize("form", ["a2d", "rnd1"])
def test_it_exports_the_older_weights(form: str, resumed: Path, tmp_path: Path) -> None:
    from checkpoints_tools import export_hf

    export_hf.main(["--checkpoint", str(resumed), "--out", str(tmp_path / form), "--format", form])
    old, new = (load_file(path / form_file) for path, form_file in ((OLDER / f"export_{form}", "model.safetensors"),
                                                                    (tmp_path / form, "model.safetensors")))  # fmt: skip
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        # Adam divides by the root of tiny second moments: what rounds otherwise on another processor grows there.
        assert (tensor - new[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("source", ["export_a2d", "export_rnd1", "run"])
def test_text_from_older_files(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_a2d import generate

    arguments = ["--model", str(OLDER / source), "--prompt", "the", "--max-new-tokens", "6", "--num-steps", "3"]
    generate.main([*arguments, "--seed", "4", "--no-live"])
    assert capsys.readouterr().out == "theluluen#lulu\n"  # as 0.1.0 wrote it


def test_an_older_log_is_reported(tmp_path: Path) -> None:
    from megatron_a2d.study import __main__ as study

    shutil.copytree(OLDER / "run", tmp_path / "run")
    study.main(["report", str(tmp_path / "run")])
    assert list((tmp_path / "run").rglob("*.png"))
