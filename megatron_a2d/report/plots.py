"""Plots of a run's log.jsonl on one page, one panel per metric that the run has logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_a2d.config.renamed import modernise_metrics, modernise_record
from megatron_a2d.report.plot_style import figure, plain_label
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.parsing import ParseError, parse_json

Record = dict[str, Any]


class Panel(NamedTuple):
    """Curves of training records by dotted key (`moe.entropy_masked`); a dictionary gives a curve per entry."""

    title: str
    keys: tuple[str, ...]
    validation: str = ""  # the validation metric in the same panel, with its standard error
    logarithmic: bool = False


PANELS = (
    Panel("loss, nats/token", ("loss",), "nelbo"),
    Panel("weighted and unweighted loss", ("loss", "cross_entropy")),
    Panel("diffusion and next-token loss", ("diffusion_loss", "ar_loss")),
    Panel("grafting error", ("grafting_error",)),
    Panel("loss by t", ("loss_by_t",)),
    Panel("accuracy at loss positions", ("accuracy",), "accuracy"),
    Panel("accuracy by mask ratio", ("accuracy_by_mask_ratio",)),
    Panel("gradient norm", ("grad_norm",)),
    Panel("gradient norm by role", ("grad_norm_by_role",), logarithmic=True),
    Panel("update-to-weight ratio by role", ("update_to_weight_ratio",), logarithmic=True),
    Panel("relative weight change by role", ("relative_weight_change",)),
    Panel("gradient noise scale, samples", ("grad_noise_scale",), logarithmic=True),
    Panel("learning rate", ("lr",)),
    Panel("expert load imbalance, max / mean", ("moe.load_imbalance_masked", "moe.load_imbalance_unmasked")),
    Panel("busiest expert-parallel rank / mean, by ranks", ("moe.rank_imbalance",)),
    Panel("dead experts", ("moe.num_dead_experts",)),
    Panel("routing entropy per token, nats", ("moe.entropy_masked", "moe.entropy_unmasked")),
    Panel("distance between loads of masked and unmasked tokens", ("moe.load_tv_distance",)),
    Panel("share dropped, and above the mean load", ("moe.dropped_token_frac", "moe.over_mean_load_frac")),
    Panel("tokens/s", ("tokens_per_second",)),
)


def read_log(run: Path) -> list[Record]:
    """The records of a run; of iterations repeated after a resume, the newest record."""
    path = run / "log.jsonl"
    if not path.is_file():
        raise UserError(f"{run}: has no log.jsonl; give the --save directory of a run")
    newest: dict[tuple[Any, ...], Record] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            newest[(record["kind"], record["iteration"], record.get("source"))] = modernise_metrics(record)
        elif number < len(lines):  # the last line may be truncated, if the run was killed
            raise UserError(f"{path}: line {number} is not a log record; remove it")
    records = list(newest.values())
    _cut_grafting(records)
    return records


def _record(line: str) -> Record | None:
    """The log record in a line; None if it holds none."""
    try:
        record = parse_json(line, allow_nonfinite=True)
    except ParseError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    iteration, source = record.get("iteration"), record.get("source")
    is_good = isinstance(iteration, int) and abs(iteration) < 2**53 and isinstance(source, str | None)
    return record if is_good else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cut_grafting(records: list[Record]) -> None:
    """Remove values of older logs, which had the grafting error as `loss`, and a missing accuracy as 0."""
    starts = [record for record in records if record["kind"] == "start"]
    settings = starts[-1].get("settings") if starts else None
    steps = modernise_record(settings).get("grafting_iters", 0) if isinstance(settings, dict) else 0
    steps = steps if isinstance(steps, int) else 0
    train = sorted((record for record in records if record["kind"] == "train"), key=lambda record: record["iteration"])
    for before, record in zip([None, *train], train, strict=False):
        if (before["iteration"] if before else 0) < steps and "grafting_error" not in record:
            record |= dict.fromkeys(("loss", "cross_entropy", "accuracy", "mask_ratio"))


def draw_run(run: Path, image: Path) -> Path:
    """Draw all panels for which the run has values, over iterations; returns `image`."""
    records = read_log(run)
    train = sorted((r for r in records if r["kind"] == "train"), key=lambda r: r["iteration"])
    valid = sorted((r for r in records if r["kind"] == "validation"), key=lambda r: r["iteration"])
    if not train:
        raise UserError(f"{run}/log.jsonl: holds no training record yet; wait for the first --log-interval")
    panels = [(panel, found) for panel in PANELS if (found := _curves(panel, train))]
    columns = min(4, math.ceil(math.sqrt(len(panels))))
    rows = math.ceil(len(panels) / columns)
    with figure(image, columns, rows, size=(4.6, 3.3), title=plain_label(run.resolve().name)) as axes:
        for axis, (panel, found) in zip(axes, panels, strict=False):
            _draw(axis, panel, found, valid)
        for axis in axes[len(panels) :]:
            axis.remove()
    return image


Curves = dict[str, tuple[list[int], list[float]]]


def _curves(panel: Panel, train: Sequence[Record]) -> Curves:
    """Iterations and values of each curve of a panel."""
    found: Curves = {}
    for record in train:
        for key in panel.keys:
            value: Any = record
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            named = value if isinstance(value, dict) else {key.rpartition(".")[2]: value}
            for name, number in named.items():
                if _is_number(number) and (number > 0 or not panel.logarithmic):
                    iterations, values = found.setdefault(name, ([], []))
                    iterations.append(record["iteration"])
                    values.append(number)
    return found


def _draw(axis: Any, panel: Panel, found: Curves, valid: Sequence[Record]) -> None:
    shade = _shades(found)
    for name in sorted(found) if shade else found:
        iterations, values = found[name]
        options = {"color": shade(float(name))} if shade else {}
        label = "training" if panel.validation else plain_label(name.replace("_", " "))
        axis.plot(iterations, values, label=label, linewidth=1, marker="." if len(values) == 1 else None, **options)
    sources = list(dict.fromkeys(record.get("source") for record in valid)) if panel.validation else []
    for number, source in enumerate(sources):
        error = f"{panel.validation}_standard_error"
        of_source = [
            record for record in valid
            if record.get("source") == source and _is_number(record.get(panel.validation)) and
            _is_number(record.get(error)) and record[error] >= 0
        ]  # fmt: skip
        axis.errorbar(
            [r["iteration"] for r in of_source],
            [r[panel.validation] for r in of_source],
            [r[error] for r in of_source],
            fmt="o", capsize=3, color=f"C{3 + number}",
            label=f"held out{f', {plain_label(source)}' if source else ''} (± standard error)",
        )  # fmt: skip
    if panel.logarithmic:
        axis.set_yscale("log")
    if len(found) > 1 or sources:
        axis.legend(fontsize=6, ncols=2 if len(found) > 5 else 1)
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel("iteration", fontsize=8)


def _shades(found: Curves) -> Callable[[float], Any] | None:
    """Colours by value if all curves are named by numbers, the lower ends of buckets; else None."""
    if not all(name.replace(".", "", 1).isdecimal() for name in found):
        return None
    from matplotlib import colormaps

    return lambda value: colormaps["viridis"](value)


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
