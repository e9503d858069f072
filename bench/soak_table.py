"""The documents' table of a soak (`make soak OUT=bench/results/soak_cpu.json`): a row per kind, the targets."""

from __future__ import annotations

import statistics
from typing import Any

from megatron_a2d.study.results_page import markdown_table

HEAD = ["fault", "times", "found after", "by", "samples again", "time lost"]


def block(stored: dict[str, Any]) -> str:
    """The table and its caption, from the soak's result file."""
    rows, targets, machine = stored["rows"], stored["targets"], stored["machine"]
    kinds = dict.fromkeys(sorted(row["kind"] for row in rows))
    missed = [target for target in targets if not target["is_met"]]
    verdict = "All targets are met"
    if missed:
        verdict = f"Missed: {'; '.join(_target(target) for target in missed)}. Met"
    met = ", ".join(f"{target['name']} {target['found']}" for target in targets if target["is_met"])
    where = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}"
    return "\n".join([
        markdown_table(HEAD, [_row(kind, [row for row in rows if row["kind"] == kind]) for kind in kinds]),
        f"{verdict}: {met}. Found after and time lost: the median and the longest; samples: the most. "
        f"{stored['steps']:,} steps in {stored['minutes_taken']:.0f} minutes, {where}; "
        f"`{stored['command']}` at {stored['commit']}.\n",
    ])  # fmt: skip


def _row(kind: str, rows: list[dict[str, Any]]) -> list[str]:
    found = [row["found_after"] for row in rows if row["found_after"] is not None]
    lost = [row["seconds_lost"] for row in rows]
    by = ", ".join(sorted({row["by"] for row in rows if row["by"]}))
    return [
        kind,
        str(len(rows)),
        _spread(found),
        by or "-",
        str(max(row["samples_again"] for row in rows)),
        _spread(lost),
    ]


def _spread(seconds: list[float]) -> str:
    if not seconds or not max(seconds):
        return "-"
    return f"{statistics.median(seconds):.1f} s, {max(seconds):.1f} s"


def _target(target: dict[str, Any]) -> str:
    return f"{target['name']} {target['found']} ({target['wanted']} wanted)"
