"""docs/troubleshooting.md: its table of held-out losses is that of the result file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.wrong_settings import STAGES, WRONG, permute
from tests.tiny import write_tokens

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("wrong", ["none", *WRONG])
def test_losses_by_time(stage: str, wrong: str) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    found = json.loads((ROOT / "bench" / "results" / "wrong_settings_cpu.json").read_text())["wrong_settings"]
    head = next(line for line in page if line.startswith("| stage")).strip("| ").split(" | ")
    values = found[stage][wrong]
    bins = {f"{one['low']:.1f}-{one['high']:.1f}": f"{one['mean']:.2f}" for one in values["nelbo_by_time"]}
    cells = [stage, "-" if wrong == "none" else wrong]
    cells += [bins[name] for name in head[2:-2]] + [f"{values['nelbo']:.2f}", f"{values['accuracy']:.1%}"]
    assert f"| {' | '.join(cells)} |" in page


def test_permuted_tokens(tmp_path: Path) -> None:
    """Special tokens stay, and equal tokens stay equal."""
    write_tokens(tmp_path / "right", 2, 8, 0)
    (tmp_path / "right.json").write_text(json.dumps({"eod_token_id": 7}))
    permute(tmp_path / "right", tmp_path / "wrong")
    old, new = (np.fromfile(tmp_path / f"{name}.bin", np.uint16) for name in ("right", "wrong"))
    pairs = dict(zip(old.tolist(), new.tolist(), strict=True))
    assert [pairs[token] for token in old.tolist()] == new.tolist() and sorted(pairs.values()) == sorted(pairs)
    assert pairs[7] == 7 and any(pairs[token] != token for token in range(7))
    assert (tmp_path / "wrong.idx").read_bytes() == (tmp_path / "right.idx").read_bytes()
