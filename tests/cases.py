"""What the tests of parity and faults train on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple


class Case(NamedTuple):
    """A model before and after conversion, and data of its vocabulary."""

    hf: Path
    checkpoint: str
    settings: dict[str, str]


def copy_of(trained: dict[str, Any], tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a copy of the run."""
    shutil.copytree(trained["settings"]["save"], tmp_path / "run")
    return {**trained["settings"], "save": str(tmp_path / "run"), **changes}
