"""Evaluation results as JSON, and as Markdown tables with published scores for comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_a2d.evaluation.published_scores import BENCHMARKS, PUBLISHED, sources
from megatron_a2d.utils.atomic_write import read_json
from megatron_a2d.utils.errors import UserError

# The keys of a results.json that are read.
_TABLES = ("held_out", "tasks", "num_fewshot", "log_likelihoods", "counts", "read_from_model")
_ERRORS = ("mean_standard_error", "largest_standard_error", "exact_share")
_FACTS = ("label_shift", "mask_token_id", "block_length", "end_token_ids")
_HELD_OUT = ("nelbo", "nelbo_standard_error", "accuracy", "accuracy_standard_error", "num_samples")
_BUCKETS = ("nelbo_by_time", "accuracy_by_mask_ratio")  # of a source of held-out data
_ROWS = ("held_out", "tasks")  # tables with a row of results for each key
# Metrics shown as numbers and not as percent, though their values may lie between 0 and 1.
_NO_SHARES = ("perplexity", "bits", "likelihood")


def plain(value: Any) -> Any:
    """`value` as JSON types; infinities and NaNs become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int | str | bool) or value is None else str(value)


def read_results(directory: Path) -> dict[str, Any]:
    """The results.json of an earlier evaluation; UserError if `markdown` cannot use it."""
    results = read_json(directory / "results.json", "the earlier results", allow_nonfinite=True)
    tables = {name: results.get(name, {}) for name in _TABLES}
    wrong = [name for name in ("model", "objective") if not isinstance(results.get(name), str)]
    wrong += ["name"] if not isinstance(results.get("name", ""), str) else []
    wrong += [name for name, table in tables.items() if not _is_table(name, table)]
    if wrong:
        raise UserError(
            f"--compare-with {directory}: results.json was not written by this command (no usable {', '.join(wrong)}); "
            "give the --out of an earlier evaluation"
        )
    return results


def _is_table(name: str, table: Any) -> bool:
    if not isinstance(table, dict):
        return False
    if name == "held_out":
        return all(_has_numbers(row, _HELD_OUT, or_none=True) and _has_buckets(row) for row in table.values())
    if name == "tasks":
        return all(isinstance(metrics, dict) for metrics in table.values())
    return (
        name != "log_likelihoods" or not table or _has_numbers(table, (*_ERRORS, *({"unknown_share"} & table.keys())))
    )


def _has_buckets(row: Mapping[str, Any]) -> bool:
    return all(
        isinstance(row.get(name, []), list)
        and all(_has_numbers(bucket, ("low", "num_samples")) for bucket in row.get(name, []))
        and all(_has_numbers(bucket, ("mean", "standard_error"), or_none=True) for bucket in row.get(name, []))
        for name in _BUCKETS
    )


def _has_numbers(row: Any, names: Sequence[str], or_none: bool = False) -> bool:
    return isinstance(row, dict) and all(
        name in row and ((or_none and row[name] is None) or type(row[name]) in (int, float)) for name in names
    )


def task_rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, float, float | None]]:
    """(task, metric, value, standard error) of each number in the harness's results."""
    rows = []
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, filter_name = name.partition(",")
            if isinstance(value, bool) or not isinstance(value, int | float) or metric.endswith("_stderr"):
                continue
            if metric in ("alias", "sample_len", "name"):
                continue
            error = metrics.get(f"{metric}_stderr,{filter_name}")
            shown = metric if filter_name in ("none", "") else f"{metric} ({filter_name})"
            rows.append((task, shown, float(value), float(error) if isinstance(error, int | float) else None))
    return rows


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown page of one or more runs side by side; each is the content of a results.json, the newest first.

    Runs of one model over different tasks and data share a column.
    """
    groups = _by_model(runs)
    names = _names([group[0] for group in groups])
    lines = [
        "# Evaluation",
        "",
        *(f"- {name}: {_described(group[0])}" for name, group in zip(names, groups, strict=True)),
        "",
    ]
    columns = [_merged(group) for group in groups]
    lines += _held_out(columns, names) + _tasks(columns, names)
    lines += [line for name, group in zip(names, groups, strict=True) for run in group for line in _notes(name, run)]
    return "\n".join(lines).rstrip() + "\n"


def _by_model(runs: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    groups: list[list[Mapping[str, Any]]] = []
    for run in runs:
        for group in groups:
            is_same = all(run.get(key) == group[0].get(key) for key in ("name", "model", "objective"))
            if is_same and not any(
                run.get(table, {}).keys() & other.get(table, {}).keys() for other in group for table in _ROWS
            ):
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def _merged(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The objective and the tables of one model's runs."""
    tables = {
        table: {key: row for run in group for key, row in run.get(table, {}).items()}
        for table in (*_ROWS, "num_fewshot")
    }
    return {"objective": group[0]["objective"], **tables}


def _described(run: Mapping[str, Any]) -> str:
    """The model, and what its files say of it."""
    facts = run.get("read_from_model", {})
    shift, mask, block, ends = (facts.get(name) for name in _FACTS)
    words = [str(run["model"]), str(run["objective"])]
    if shift is not None:
        words += ["label shift" if shift else "no label shift", f"mask token {mask}"]
    words += [f"blocks of {block}"] if block else []
    words += [f"ends at {' or '.join(map(str, ends))}"] if isinstance(ends, list) and ends else []
    return ", ".join(words)


def _names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The models' names, or the last parts of their paths, numbered if they are not unique."""
    names = [run.get("name") or str(run["model"]).rstrip("/").rpartition("/")[2] for run in runs]
    return names if len(set(names)) == len(names) else [f"{name} ({number})" for number, name in enumerate(names, 1)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _header(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "| " + " | ".join(["---"] * len(cells)) + " |"]


def _figure(value: float | None, error: float | None, percent: bool) -> str:
    if value is None:
        return "n/a"
    shown = f"{value:.1%}" if percent else f"{value:.3f}"
    return shown if error is None else f"{shown} ± {error:.1%}" if percent else f"{shown} ± {error:.3f}"


def _held_out(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    sources = list(dict.fromkeys(source for run in runs for source in run.get("held_out", {})))
    if not sources:
        return []
    lines = [
        "## Held-out data",
        "",
        "NELBO (diffusion) or NLL (autoregressive) in nats/token; top-1 accuracy.",
        "",
    ]
    lines += _header(["source", *(f"{name}: {what}" for name in names for what in ("nats", "accuracy", "samples"))])
    for source in sources:
        cells = [source]
        for run in runs:
            result = run.get("held_out", {}).get(source)
            if result is None:
                cells += [""] * 3
                continue
            for name, percent in (("nelbo", False), ("accuracy", True)):
                cells.append(_figure(result[name], result[f"{name}_standard_error"], percent))
            cells.append(str(result["num_samples"]))
        lines.append(_row(cells))
    if runs[0]["objective"] != "ar":
        for source, result in runs[0].get("held_out", {}).items():
            if not all(name in result for name in _BUCKETS):
                continue
            lines += ["", f"{names[0]}, {source}: NELBO by time t, accuracy by mask ratio", ""]
            lines += _buckets(result)
    return [*lines, ""]


def _buckets(result: Mapping[str, Any]) -> list[str]:
    lines = _header(["t or mask ratio", "NELBO", "samples", "accuracy", "samples"])
    tables = [{bucket["low"]: bucket for bucket in result[name]} for name in _BUCKETS]
    for low in sorted(tables[0] | tables[1]):
        cells = [f"{low:.1f} to {low + 0.1:.1f}"]
        for table, percent in zip(tables, (False, True), strict=True):
            bucket = table.get(low)
            cells += (
                [_figure(bucket["mean"], bucket["standard_error"], percent), str(bucket["num_samples"])]
                if bucket
                else ["", ""]
            )
        lines.append(_row(cells))
    return lines


def _is_share(metric: str, value: float) -> bool:
    return 0 <= value <= 1 and not any(word in metric for word in _NO_SHARES)


def _tasks(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    found = [
        {(task, metric): (value, error) for task, metric, value, error in task_rows(run.get("tasks", {}))}
        for run in runs
    ]
    keys = list(dict.fromkeys(key for rows in found for key in rows))
    if not keys:
        return []
    shots = {task: number for run in reversed(runs) for task, number in run.get("num_fewshot", {}).items()}
    lines = ["## Tasks", "", *_header(["task", "shots", "metric", *names, *PUBLISHED])]
    compared: set[str] = set()
    for task, metric in keys:
        benchmark = BENCHMARKS.get(task, "")
        # Published scores are shown next to the first metric of a benchmark only.
        scores = [published.scores.get(benchmark) if task not in compared else None for published in PUBLISHED.values()]
        compared.add(task)
        cells = [benchmark or task, str(shots.get(task, "")), metric]
        for rows in found:
            value, error = rows.get((task, metric), (None, None))
            cells.append("" if value is None else _figure(value, error, percent=_is_share(metric, value)))
        lines.append(_row([*cells, *("" if score is None else f"{score:.1f}%" for score in scores)]))
    if any(task in BENCHMARKS for task, _ in keys):
        lines += ["", f"Published scores, measured with other harnesses and prompts: {sources()}."]
    return lines


def _notes(name: str, run: Mapping[str, Any]) -> list[str]:
    """Lines about a run's log-likelihoods and requests."""
    lines = []
    if errors := run.get("log_likelihoods"):
        lines += [
            "",
            f"{name}: Monte Carlo error of a log-likelihood {errors['mean_standard_error']:.3f} nats on average, "
            f"{errors['largest_standard_error']:.3f} at most; {errors['exact_share']:.0%} are exact"
            + (f", {unknown:.0%} of unknown error." if (unknown := errors.get("unknown_share")) else "."),
        ]
    return lines + [line for what, count in run.get("counts", {}).items() for line in ("", f"{name}: {count} {what}.")]
