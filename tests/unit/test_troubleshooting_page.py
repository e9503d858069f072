"""bench/wrong_settings.py: the table of held-out losses in docs/troubleshooting.md, and permuted tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from bench.wrong_settings import STAGES, WRONG, block, permute
from tests.tiny import write_tokens


def test_losses_by_time() -> None:
    """A row per stage and setting, of the bins that are shown."""
    bins = [{"low": low, "high": low + 0.1, "mean": 10 * low} for low in (0.0, 0.1, 0.6, 0.9)]
    values = {"nelbo_by_time": bins, "nelbo": 5.25, "accuracy": 0.137}
    stored = {"wrong_settings": {stage: {wrong: values for wrong in ("none", *WRONG)} for stage in STAGES}}
    lines = block(stored).splitlines()
    assert len(lines) == 2 + len(STAGES) * (1 + len(WRONG))
    assert lines[0] == "| stage | wrong | 0.0-0.1 | 0.6-0.7 | 0.9-1.0 | NELBO | accuracy |"
    assert lines[2] == "| before step 1 | - | 0.00 | 6.00 | 9.00 | 5.25 | 13.7% |"
    assert lines[-1] == "| after training | tokenizer | 0.00 | 6.00 | 9.00 | 5.25 | 13.7% |"


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
