"""The planner's results as tables for a terminal and as a plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_a2d.config.settings import RunConfig, flag
from megatron_a2d.planner.calibration import (
    FITTED,
    FITTED_TO_FP4,
    LARGEST_LEFT_OUT_ERROR,
    error,
    left_out_error,
    published_rows,
)
from megatron_a2d.planner.memory import Memory
from megatron_a2d.planner.search import Plan, Search, why_slower, why_too_large
from megatron_a2d.planner.step_time import StepTime
from megatron_a2d.planner.workload import Job
from megatron_a2d.terminal.console import human
from megatron_a2d.utils.atomic_write import new_file
from megatron_a2d.utils.errors import UserError

GIB = 2**30
LAYOUT = {
    "tensor_model_parallel_size": "TP", "pipeline_model_parallel_size": "PP",
    "num_virtual_stages_per_pipeline_rank": "VPP", "context_parallel_size": "CP", "expert_model_parallel_size": "EP",
    "expert_tensor_parallel_size": "ETP",
}  # fmt: skip
PARTS = {
    "fp8_copies": "FP8, FP4 copies", "logits": "masked logits", "dispatcher": "dispatcher, imbalance",
    "communication": "NCCL, CUDA", "matmul": "GEMMs", "memory": "norms, activations, permutation",
    "head": "LM head and loss", "expert_nvlink": "all-to-all, NVLink", "expert_network": "all-to-all, network",
    "tensor": "tensor parallelism", "context": "context parallelism", "host": "host launches and syncs",
    "bubble": "pipeline bubble", "pipeline": "pipeline transfers", "data": "data-parallel communication",
}  # fmt: skip


def layout_name(job: Job) -> str:
    """Name of a layout, as "EP 8, DP 8, MBS 4": the sizes above one, and the micro-batch size."""
    sizes = [f"{short} {getattr(job, name)}" for name, short in LAYOUT.items() if getattr(job, name) > 1]
    again = ["recompute"] if job.recomputed_layers else []
    return ", ".join([*sizes, f"DP {job.data_parallel_size}", f"MBS {job.micro_batch_size}", *again])


def layout_flags(plan: Plan, config: RunConfig) -> str:
    """Command-line flags that change `config` to this layout."""
    job, words = plan.job, []
    for name in LAYOUT:
        words += [flag(name), str(getattr(job, name))]
    words.append("--sequence-parallel" if job.sequence_parallel else "--no-sequence-parallel")
    words += ["--micro-batch-size", str(job.micro_batch_size)]
    mine, its = config.performance, plan.config.performance
    for name in ("overlap_moe_expert_parallel_comm", "delay_wgrad_compute"):
        if getattr(mine, name) and not getattr(its, name):
            words.append("--no-" + flag(name)[2:])
    for name in ("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"):
        if (value := getattr(its, name)) != getattr(mine, name):
            words += [flag(name), *(value if isinstance(value, tuple) else [str(value)])]
    return " ".join(words)


def summary(plans: dict[str, Plan]) -> Table:
    """Summary table, one line per plan."""
    table = Table()
    for name in ("", "layout"):
        table.add_column(name)
    for name in ("memory", "tokens/s/GPU", "MFU", "step", "days", "cost"):
        table.add_column(name, justify="right")
    for title, plan in plans.items():
        table.add_row(
            title,
            layout_name(plan.job),
            f"{'' if plan.fits else '[red]'}{plan.memory.total / GIB:.1f} of {plan.cluster.memory_gib:.0f} GiB",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.mfu:.1%}",
            f"{plan.time.total:.3g} s",
            f"{plan.days:.3g}",
            f"${human(plan.cost)}",
        )
    return table


def parts(plans: dict[str, Plan]) -> tuple[Table, Table]:
    """Two tables by component: memory in GiB, and time in percent of the step."""
    memory = _parts("memory, GiB/GPU", plans, {title: _scaled(plan.memory, 1 / GIB) for title, plan in plans.items()})
    shares = {title: _scaled(plan.time, 100 / plan.time.total) for title, plan in plans.items()}
    return memory, _parts("time, % of step", plans, shares)


def _scaled(values: Memory | StepTime, factor: float) -> dict[str, float]:
    return {name: value * factor for name, value in values._asdict().items()}


def _parts(heading: str, plans: Iterable[str], values: dict[str, dict[str, float]]) -> Table:
    table = Table(heading, *plans)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in next(iter(values.values())):
        row = [values[title][name] for title in plans]
        if max(row) >= 0.05:
            table.add_row(PARTS.get(name, name), *(f"{value:.1f}" for value in row))
    return table


def from_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A terminal table from the cells of a Markdown table."""
    table = Table(*head)
    for row in rows:
        table.add_row(*(cell.strip("*`") for cell in row))
    return table


def rejected_layouts(found: Search) -> Table:
    """Table of the rejected layouts: their number by reason, each with its best layout."""
    table = Table("rejected for", "layouts", "best of them")
    table.columns[1].justify = "right"
    slower: dict[str, list[Plan]] = {}
    best = found.fitting[0] if found.fitting else None
    for plan in found.fitting[3:]:
        assert best is not None
        slower.setdefault(why_slower(plan, best), []).append(plan)
    for part, plans in sorted(slower.items(), key=lambda item: item[1][0].time.total):
        assert best is not None
        behind = plans[0].time.total / best.time.total - 1
        example = f"{layout_name(plans[0].job)}: {behind:.1%} slower"
        table.add_row(f"more time for {PARTS.get(part, part)}", f"{len(plans):,}", example)
    large: dict[str, list[Plan]] = {}
    for plan in found.too_large:
        large.setdefault(why_too_large(plan), []).append(plan)
    for part, plans in sorted(large.items(), key=lambda item: -len(item[1])):
        example = f"{layout_name(plans[0].job)}: {plans[0].memory.total / GIB:.1f} GiB"
        table.add_row(f"out of memory, mostly {PARTS.get(part, part)}", f"{len(plans):,}", example)
    for problem, count in found.refusals.most_common(4):
        table.add_row("invalid, such as", f"{count:,}", problem.partition(";")[0])
    return table


def all_layouts(found: Search) -> Table:
    """Table of all valid layouts by component: memory in GiB, time in percent of the step."""
    memory, time = Memory._fields, StepTime._fields
    table = Table("layout", "GiB", *memory, "tokens/s/GPU", "MFU", *time)
    for plan in [*found.fitting, *found.too_large]:
        table.add_row(
            layout_name(plan.job),
            f"{'' if plan.fits else '[red]'}{plan.memory.total / GIB:.1f}",
            *(f"{value / GIB:.1f}" for value in plan.memory),
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.mfu:.1%}",
            *(f"{100 * value / plan.time.total:.1f}" for value in plan.time),
        )
    return table


def calibration() -> Table:
    """Table of the published runs, with the model's prediction and error for each."""
    rows = published_rows()
    table = Table(
        "published run", "source", "tokens/s/GPU", "model", "error", "LOO error", "memory",
        title=f"{len(rows)} published runs, {len(FITTED | FITTED_TO_FP4)} fitted efficiencies; LOO: leave-one-out",
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row.name, row.source, f"{row.tokens_per_second:,.0f}", f"{row.predict():,.0f}", f"{error(row):+.1%}",
            f"{left_out_error(row):+.1%}", _memory_error(row.peak_memory_gib, row.modelled_memory_gib),
        )  # fmt: skip
    return table


def _memory_error(published: float | None, modelled: float) -> str:
    return "" if published is None else f"{modelled:.1f} for {published:.1f} GiB"


def worst_errors() -> tuple[float, float]:
    """The largest error on a published run, and the largest leave-one-out error."""
    return max(abs(error(row)) for row in published_rows()), LARGEST_LEFT_OUT_ERROR


def check_plot(path: Path) -> None:
    """UserError if `draw` could not write the file; called before the search."""
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {path}: unknown image format; use .png, .pdf or .svg")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--plot {path}: its directory does not exist; create it, or choose another")
    if find_spec("matplotlib") is None:
        raise UserError(f"--plot {path}: matplotlib is not installed; in the clone, pip install --editable '.[plot]'")


def draw(path: Path, plans: dict[str, Plan], title: str) -> None:
    """Plot memory and time by component as stacked bars, one per plan."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3 + 1.2 * len(plans)), layout="constrained")
    above, below = figure.subplots(2, 1)
    labels = [f"{name}\n{layout_name(plan.job)}" for name, plan in plans.items()]
    _bars(above, labels, [_scaled(plan.memory, 1 / GIB) for plan in plans.values()])
    above.axvline(next(iter(plans.values())).cluster.memory_gib, color="black", linestyle="--")
    above.set(xlabel="GiB per GPU (dashed: available)")
    _bars(below, labels, [_scaled(plan.time, 1.0) for plan in plans.values()])
    below.set(xlabel="seconds per step")
    figure.suptitle(title)
    with new_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=150)


def _bars(axes: Any, labels: Sequence[str], values: list[dict[str, float]]) -> None:
    positions = range(len(labels))
    starts = [0.0] * len(labels)
    largest = max(sum(column.values()) for column in values)
    visible = [name for name in values[0] if max(column[name] for column in values) >= largest / 200]
    for number, name in enumerate(visible):
        row = [column[name] for column in values]
        hatch = "//" if number >= 10 else None  # matplotlib has ten colours
        axes.barh(positions, row, left=starts, label=PARTS.get(name, name), hatch=hatch)
        starts = [start + value for start, value in zip(starts, row, strict=True)]
    axes.set_yticks(list(positions), labels)
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
