"""Plot of a run's held-out NELBO by diffusion time t: its first validation against its last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_a2d.report.figures import figure
from megatron_a2d.utils.errors import UserError


def draw_nelbo_by_t(records: list[dict[str, Any]], path: Path) -> Path:
    """Write the PNG `path` from a run's log records; error bars are one standard error."""
    validations = [record for record in records if record["kind"] == "validation" and record.get("nelbo_by_time")]
    if not validations:
        raise UserError("log.jsonl: holds no validation by t; give the run --valid-data-path")
    with figure(path, columns=1, size=(7.0, 3.2)) as (axis,):
        for record, colour in zip((validations[0], validations[-1]), ("tab:gray", "tab:blue"), strict=True):
            rows = record["nelbo_by_time"]
            total = f"NELBO {record['nelbo']:.2f} ± {record['nelbo_standard_error']:.2f} nats/token"
            axis.errorbar(
                [(row["low"] + row["high"]) / 2 for row in rows],
                [row["mean"] for row in rows],
                [row["standard_error"] for row in rows],
                fmt="o-", capsize=3, color=colour, label=f"iteration {record['iteration']}: {total}",
            )  # fmt: skip
        axis.set_xlabel("t (share of tokens that are masked)")
        axis.set_ylabel("held-out loss, nats/token")
        axis.legend(fontsize=8)
    return path
