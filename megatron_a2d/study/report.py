"""A run's log.jsonl as one image."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_a2d.errors import UserError
from megatron_a2d.files import new_file


def read_log(run: Path) -> list[dict[str, Any]]:
    """The records of a run. A resumed run repeats iterations: the newest record of each stands."""
    path = run / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{run}: has no log.jsonl; give the --save directory of a run")
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            newest[(record["kind"], record["iteration"], record.get("source"))] = record
        except (json.JSONDecodeError, KeyError, TypeError):
            if number < len(lines):  # the last line may be that of a run that was killed while it wrote
                raise UserError(f"{path}: line {number} is no record of a run; remove it") from None
    return list(newest.values())


def draw_run(run: Path, image: Path) -> Path:
    """Draw loss and validation, accuracy, gradient norm and learning rate over iterations; returns `image`."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib: is not installed; pip install 'megatron_a2d[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_log(run)
    train = sorted((r for r in records if r["kind"] == "train"), key=lambda r: r["iteration"])
    valid = sorted((r for r in records if r["kind"] == "validation"), key=lambda r: r["iteration"])
    if not train:
        raise UserError(f"{run}/log.jsonl: holds no training record yet; wait for the first --log-interval")
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    panels = (
        ("loss", "nelbo", "loss, nats a token"),
        ("accuracy", "accuracy", "accuracy on rows with loss"),
        ("grad_norm", None, "gradient norm"),
        ("lr", None, "learning rate"),
    )
    for axis, (key, validation_key, title) in zip(axes.flat, panels, strict=True):
        values = [math.nan if record[key] is None else record[key] for record in train]
        axis.plot([record["iteration"] for record in train], values, label="training", linewidth=1)
        sources = list(dict.fromkeys(record.get("source") for record in valid)) if validation_key else []
        for number, source in enumerate(sources):
            of_source = [record for record in valid if record.get("source") == source]
            held_out = f"held out, {source}" if source else "held out"
            axis.errorbar(
                [r["iteration"] for r in of_source],
                [r[str(validation_key)] for r in of_source],
                [r[f"{validation_key}_standard_error"] for r in of_source],
                fmt="o", capsize=3, color=f"C{3 + number}", label=f"{held_out} (± standard error)",
            )  # fmt: skip
        if sources:
            axis.legend()
        axis.set_title(title)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
    figure.suptitle(str(run))
    with new_file(image) as partial:
        figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)
    return image
