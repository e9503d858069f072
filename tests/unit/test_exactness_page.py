"""docs/exactness.md: its figures are the largest ones of the measured tables in tests/parity/RESULTS.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "exactness.md").read_text()
RESULTS = (ROOT / "tests" / "parity" / "RESULTS.md").read_text()
# By the rows' names on the page: what a row of the measured table, "model | layout", has to match.
FEATURES = {
    "tensor and sequence parallelism": r"(?<!E)TP2",
    "pipeline": r"(?<!V)PP",
    "interleaved pipeline (VPP)": "VPP",
    "context parallelism": "CP",
    "expert parallelism": r"\bEP[24]",
    "expert tensor parallelism": "ETP",
    "distributed optimizer, overlap": "distributed optimizer|overlap",
    "document masking": r"^isolated \|",
    "block diffusion, with and without co-loss": "^block",
    "annealing": "^annealing",
    "grafting": "^grafting",
    "loss weights `cart`, `uniform`": "^cart|^uniform",
}


def rows(section: str) -> list[list[str]]:
    """Rows of layouts in a section of the measured tables: model, layout, processes and four figures."""
    text = RESULTS.partition(f"<!-- {section} -->")[2].partition(f"<!-- end of {section} -->")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]
    return [row for row in cells if len(row) == 7 and row[2].isdigit()]


def largest(found: list[list[str]]) -> list[str]:
    return [f"{max(0.0 if row[i] == 'sharded' else float(row[i]) for row in found):.1e}" for i in range(3, 7)]


@pytest.mark.parametrize("feature", FEATURES)
def test_features_in_fp32(feature: str) -> None:
    found = [row for row in rows("layouts") if re.search(FEATURES[feature], f"{row[0]} | {row[1]}")]
    assert f"| {' | '.join([feature, str(len(found)), *largest(found)])} |" in PAGE


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("dense", "dense"),
        ("dense, tied embedding", "dense_tied"),
        ("MoE", "moe"),
        ("MoE, document masking", "isolated"),
        ("MoE, autoregressive", "ar"),
    ],
)
def test_models_in_bf16(name: str, model: str) -> None:
    found = [row for row in rows("bf16") if row[0] == model]
    figures, bound = largest(found), re.findall(rf"\| {model}, \*\*bound\*\* \| (.*) \|", RESULTS)[0].split(" | ")
    assert f"| {name} | {len(found)} | {figures[0]}, {bound[0]} | {figures[3]}, {bound[3]} |" in PAGE


def test_totals() -> None:
    measured = rows("layouts")
    assert f"{len(measured)} layouts; the largest difference of all is {max(largest(measured), key=float)}." in PAGE
    reshard = RESULTS.partition("<!-- reshard -->")[2]
    saved = re.findall(r"What the (\d+) layouts save", reshard)[0]
    content, worst = re.findall(r"absolute difference (\S+)\. Largest difference of the losses: (\S+)\.\n", reshard)[0]
    saves = f"each of {saved} layouts saves for another to load, and loads another's"
    line = f"{saves}; six dissimilar ones are tried in all\n  36 ordered pairs; losses differ by at most {worst}, "
    assert f"{line}saved tensors by {content}." in PAGE
    resumed = RESULTS.partition("<!-- resume -->")[2].partition("<!-- end of resume -->")[0]
    assert f"bitwise equal, in {resumed.count('| bitwise equal | bitwise equal |')} layouts" in PAGE
