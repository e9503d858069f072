"""The weights that a resumed run's drift is measured from: found, or their absence is reported."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_a2d.config.model_config import read_model_config
from megatron_a2d.training.weight_drift import find_reference

RUN = Path(__file__).resolve().parents[1] / "fixtures" / "written_by_0_1_0" / "run"


def append(directory: Path) -> None:
    with open(directory / "run.json", "a") as file:
        file.write(" ")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (None, None),
        (lambda directory: shutil.rmtree(directory.parent), "no such directory"),
        (append, "run.json: has "),
        (lambda directory: (directory / "hf" / "config.json").write_text("{}"), "config.json"),
    ],
)
def test_a_reference_that_cannot_be_read_is_reported(
    damage: Callable[[Path], None] | None, reason: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(RUN, tmp_path / "run")
    directory = tmp_path / "run" / "iter_0000002"
    model = read_model_config(directory / "hf")
    if damage:
        damage(directory)
    found, lines = find_reference(str(tmp_path / "run"), model), capsys.readouterr().err.splitlines()
    if reason is None:
        assert found == directory and not lines
    else:
        assert found is None and len(lines) == 1 and reason in lines[0]
        assert lines[0].startswith(
            "warning: relative_weight_change is not logged; it needs the checkpoint that the run began with"
        )


@pytest.mark.parametrize(("load", "reason"), [(None, "--load: is missing"), (str(RUN), "is another model")])
def test_no_reference_and_that_of_another_model(
    load: str | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = read_model_config(RUN / "iter_0000002" / "hf")
    assert find_reference(load, dataclasses.replace(model, num_layers=model.num_layers + 1)) is None
    assert f"(--load): {reason}" in capsys.readouterr().err.replace(f"{RUN / 'iter_0000002'}: ", "")
