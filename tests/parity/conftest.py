"""Tiny models, converted, and tokens to train on: made once for all layouts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from checkpoints_tools import convert_hf
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
