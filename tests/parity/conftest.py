"""Tiny models, converted, and tokens to train on: made once for all layouts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from checkpoints_tools import convert_hf
from tests.parity.pool import Pool
from tests.tiny import write_hf, write_tokens


class Case(NamedTuple):
    """A model before and after conversion, and data of its vocabulary."""

    hf: Path
    checkpoint: str
    settings: dict[str, str]


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """dense, dense_tied and moe; and moe with isolated documents, and with the autoregressive objective."""
    root = tmp_path_factory.mktemp("cases")
    write_tokens(root / "train", 60, 250, seed=0)
    write_tokens(root / "valid", 20, 250, seed=1)
    settings = {"train_data_path": str(root / "train"), "valid_data_path": str(root / "valid")}
    cases = {}
    for kind in ("dense", "dense_tied", "moe"):
        write_hf(root / kind, kind)
        convert_hf.main(["--hf", str(root / kind), "--out", str(root / f"{kind}_checkpoint")])
        cases[kind] = Case(root / kind, str(root / f"{kind}_checkpoint"), settings)
    cases["isolated"] = cases["moe"]._replace(settings={**settings, "document_attention": "isolated"})
    cases["ar"] = cases["moe"]._replace(settings={**settings, "objective": "ar"})
    return cases


@pytest.fixture(scope="session")
def trained(cases: dict[str, Case], pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run on two ranks that has saved iterations 1, 2, 3 and 4, and its results."""
    root = tmp_path_factory.mktemp("faults")
    case = cases["moe"]
    settings = {
        **case.settings, "expert_model_parallel_size": 2, "use_distributed_optimizer": True, "load": case.checkpoint, "train_iters": 4, "save_interval": 1, "log_interval": 1,
        "eval_interval": 4, "save": str(root / "run"),
    }  # fmt: skip
    return {"settings": settings, "results": pool.run("run", 2, settings=settings)}


def copy_of(trained: dict[str, Any], tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a copy of the run."""
    shutil.copytree(trained["settings"]["save"], tmp_path / "run")
    return {**trained["settings"], "save": str(tmp_path / "run"), **changes}
