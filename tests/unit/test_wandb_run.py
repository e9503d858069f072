"""--wandb-project: what a run sends to wandb, and that no failure of wandb ends it. A stand-in has its interface."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_a2d.config import installed_versions
from megatron_a2d.config.settings import build
from megatron_a2d.training.logger import RunLog

VALUES: dict[str, Any] = {
    "loss": 5.5, "accuracy": 0.25, "grad_norm": 1.5, "lr": 1e-4, "tokens_per_second": 1000.0, "consumed_tokens": 4096,
    "moe": {"num_dead_experts": 3, "rank_imbalance": {"ep2": 1.25}, "loads": [1, 2]}, "grad_noise_scale": float("nan"),
}  # fmt: skip


class Stand:
    """The module wandb: `init` returns the run, which is this object too."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.broken = ""

    def Settings(self, **options: Any) -> Any:
        return SimpleNamespace(**options)

    def init(self, **options: Any) -> Any:
        self._note("init", options)
        return SimpleNamespace(
            log=lambda values, step: self._note("log", (step, values)), finish=lambda: self._note("finish", None)
        )

    def _note(self, name: str, value: Any) -> None:
        if self.broken == name:
            raise self.Error(f"{name} failed")
        self.calls.append((name, value))


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    stand = Stand()
    monkeypatch.setitem(sys.modules, "wandb", stand)  # type: ignore[arg-type]
    return stand


def logged(tmp_path: Path, **settings: Any) -> None:
    """A run that logs twice, from iteration 3 on."""
    config = build({"save": str(tmp_path / "run"), "wandb_project": "conversion", "train_iters": 9} | settings)
    log = RunLog(config, 3, enabled=True)
    for iteration in (4, 5):
        log.train(iteration, VALUES)
    log.close()


def test_what_wandb_gets(stand: Stand, tmp_path: Path) -> None:
    """The project, the settings, the directory; and the curves of TensorBoard under the same names."""
    logged(tmp_path)
    (name, options), *rest = stand.calls
    assert name == "init" and options["project"] == "conversion" and options["dir"] == str(tmp_path / "run")
    assert (options["group"], options["name"]) == ("run", "run from 3") and options["settings"].console == "off"
    assert (
        options["config"]
        == build({"save": str(tmp_path / "run"), "wandb_project": "conversion", "train_iters": 9}).to_dict()
    )
    assert [call[0] for call in rest] == ["log", "log", "finish"] and [rest[0][1][0], rest[1][1][0]] == [4, 5]
    curves = rest[0][1][1]
    plain = {f"train/{name}": value for name, value in VALUES.items() if name not in ("moe", "grad_noise_scale")}
    assert curves == plain | {"train/moe/num_dead_experts": 3, "train/moe/rank_imbalance/ep2": 1.25}


@pytest.mark.parametrize(("broken", "calls"), [("init", []), ("log", ["init"]), ("finish", ["init", "log", "log"])])
def test_a_failure_of_wandb_is_one_warning(
    broken: str, calls: list[str], stand: Stand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand.broken = broken
    logged(tmp_path)
    assert [call[0] for call in stand.calls] == calls
    told = capsys.readouterr().err
    assert told.count(f"warning: --wandb-project: {broken} failed; the run continues without it") == 1
    assert (tmp_path / "run" / "log.jsonl").read_text().count('"kind": "train"') == 2


def test_without_a_project_wandb_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # its import raises
    logged(tmp_path, wandb_project=None)


def test_a_missing_package_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build({"wandb_project": "conversion"})
    monkeypatch.setattr(installed_versions, "find_spec", lambda name: None)
    (line,) = installed_versions.find_version_problems(config)
    assert line.startswith("--wandb-project conversion: needs the package wandb, which is not installed")
    monkeypatch.setattr(installed_versions, "find_spec", lambda name: object())
    assert installed_versions.find_version_problems(config) == []
