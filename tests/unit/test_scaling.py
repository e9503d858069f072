"""bench/scaling.py: exponents, what is measured again, the table, and the data that stands in for huge corpora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import scaling
from bench.scaling_jobs import JOBS, SAMPLE_LENGTH, sparse_tokens
from megatron_a2d.data.indexed_dataset import TokenFile
from megatron_a2d.data.packed_dataset import PackedDataset

LINEAR = {str(size): [3.0 * size] * 3 for size in (1, 10, 100, 1000)}


def test_exponents_of_known_curves() -> None:
    assert scaling.exponents(LINEAR) == "1.00, 1.00"
    late = {str(size): [100.0 + size**2] * 3 for size in (1, 10, 100, 1000)}  # a constant hides the square
    whole, upper = map(float, scaling.exponents(late).split(", "))
    assert whole < 1.6 and upper == pytest.approx(2.0, abs=0.01)
    assert scaling.exponents({"8": [1.0]}) == "-"
    assert scaling.exponents(LINEAR | {"10": [20.0, 30.0, 40.0]}) == "noisy"


def test_every_curve_has_a_job_and_a_point_for_each_size() -> None:
    assert set(scaling.CURVES) == set(JOBS)
    assert all(list(curve.sizes) == sorted(set(curve.sizes)) for curve in scaling.CURVES.values())


def test_points_of_the_same_code_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted command measures what is missing, and noisy points; other code or another machine, everything."""
    out, asked = tmp_path / "scaling_cpu.json", []

    def measure(name: str, size: int, rounds: int, work: Path | None) -> list[float]:
        asked.append(size)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [float(size)] * rounds

    monkeypatch.setattr(scaling, "measure", measure)
    command = ["--curves", "gpus", "--out", str(out), "--rounds", "3"]
    with pytest.raises(KeyboardInterrupt):
        scaling.main(command)
    scaling.main(command)
    sizes = list(scaling.CURVES["gpus"].sizes)
    assert asked == [*sizes[:3], *sizes[2:]]
    stored = json.loads(out.read_text())
    assert stored["points"]["gpus"] == {str(size): [float(size)] * 3 for size in sizes}
    assert scaling.exponents(stored["points"]["gpus"]) == "1.00, 1.00"
    noisy = {**stored["points"]["gpus"], str(sizes[1]): [1.0, 2.0, 3.0]}
    for changes, wanted in (
        ({"sources": "older"}, sizes),
        ({"machine": {**stored["machine"], "cores": 1000}}, sizes),
        ({"points": {"gpus": noisy}}, sizes[1:2]),
        ({}, []),
    ):
        out.write_text(json.dumps(stored | changes))
        asked[:] = [0, 0, 0]
        scaling.main(command)
        assert asked[3:] == wanted


def test_the_table_shows_no_noisy_value() -> None:
    stored: dict[str, Any] = {
        "machine": {"cpu": "C", "cores": 2, "torch": "2"}, "commit": "abc",
        "points": {"gpus": LINEAR, "tensors": {"1": [1.0, 2.0, 3.0], "10": [4e8]}},
    }  # fmt: skip
    lines = scaling.block(stored).splitlines()
    assert lines[2] == "| conversion: number of tensors | 1 to 10 | noisy to 400M peak bytes | noisy |"
    assert lines[3] == "| planner's search: GPUs | 1 to 1,000 | 3 to 3e+03 CPU s | 1.00, 1.00 |"


def test_all_curves_are_drawn(tmp_path: Path) -> None:
    scaling.plot(dict.fromkeys(scaling.CURVES, LINEAR), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_a_token_file_without_bytes(tmp_path: Path) -> None:
    """Read as any other, and as large, but for the space that it takes."""
    sparse_tokens(tmp_path / "x", 1000, 1 << 20)
    file = TokenFile(tmp_path / "x", scan=False)
    assert (file.num_tokens, file.num_documents) == (1000 << 20, 1000)
    assert (tmp_path / "x.bin").stat().st_blocks * 512 < 1_000_000
    dataset = PackedDataset(tmp_path / "x", SAMPLE_LENGTH, scan=False)
    assert not np.any(dataset.tokens((1000 << 20) // SAMPLE_LENGTH - 1))
