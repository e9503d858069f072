"""Command that plans training on a cluster: the best parallel layouts, their time and cost. Needs no GPU.

    python -m megatron_a2d.plan --config launch/recipes/qwen3_30b_a3b.yaml --cluster b200 --gpus 64
    python -m megatron_a2d.plan --model Qwen/Qwen3-8B-Base --global-batch-size 1024 --cluster h100 --gpus 16
    python -m megatron_a2d.plan --requirements launch/recipes/qwen3_*.yaml  # the fewest GPUs that each fits on
    python -m megatron_a2d.plan --calibration       # error of the model on published runs
    python -m megatron_a2d.plan --run               # 500B tokens with failures: days, checkpoints, disk

Every valid layout is tried; the recipe's layout is shown next to the best three. Method: docs/planning.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path

from rich.console import Console

from megatron_a2d.checkpoint.directory import HF_FILES, resolve
from megatron_a2d.checkpoint.training_facts import inherited
from megatron_a2d.config.cli import Parser, parse_run
from megatron_a2d.config.model_config import ModelConfig, read_model_config
from megatron_a2d.config.named_models import named_model_config
from megatron_a2d.config.settings import RunConfig, flag, settings
from megatron_a2d.config.validate import MOST_PROCESSES, find_problems
from megatron_a2d.planner import plan_table, run_forecast
from megatron_a2d.planner.cluster import Cluster, read_cluster
from megatron_a2d.planner.requirements import requirements
from megatron_a2d.planner.routing import Routing, measured
from megatron_a2d.planner.run_forecast import NODE_MTBF_HOURS, RESTART_MINUTES, Failures
from megatron_a2d.planner.search import Plan, Search, make_plan, search
from megatron_a2d.report.plots import read_log
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.terminal.console import PlainConsole, entry_point, human
from megatron_a2d.terminal.console import console as progress_console
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_text

LARGEST = 1e9  # hours, minutes, dollars or GB/s that a flag may name
# Settings of all GPU recipes, for a plan without a recipe.
WITHOUT_RECIPE = {
    "training": {"bf16": True},
    "parallel": {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
}


def main(argv: list[str] | None = None) -> None:
    config, options = parse_run(_parser(), argv, inherited)
    failures = _failures(options)
    console = PlainConsole(width=None if sys.stdout.isatty() else 120)
    if options.calibration:
        console.print(plan_table.calibration())
        return
    routing = _routing(options.imbalance)
    if options.requirements:
        print_text(markdown_table(*requirements(options.requirements, routing)).rstrip())
        return
    if options.run and not _names_a_run(options):
        print_text(markdown_table(*run_forecast.table(run_forecast.standard_plans(), failures)).rstrip())
        return
    cluster = _cluster(options)
    if options.plot:
        plan_table.check_plot(options.plot)
    if not options.config:
        config = _with_gpu_defaults(config, options)
    model_config = _model_config(config)
    with progress_console.status("trying layouts"):
        found = search(config, model_config, cluster, options.gpus, routing=routing)
    shown = {f"{rank}.": plan for rank, plan in enumerate(found.fitting[:3], 1)}
    _need_legal(found)
    own, problems = _own_plan(config, model_config, cluster, options, routing) if options.config else (None, [])
    if own:
        shown = {f"{rank} the recipe's" if plan.job == own.job else rank: plan for rank, plan in shown.items()}
        if own.job not in [plan.job for plan in shown.values()]:
            shown["the recipe's"] = own
    _print(console, config, model_config, cluster, options)
    if shown:
        console.print(plan_table.summary(shown))
        for table in plan_table.parts(shown):
            console.print(table)
    for problem in problems:
        console.print(f"the recipe's own layout: {problem}", style="yellow")
    if options.run and found.fitting:
        chosen = own if own and own.fits else found.fitting[0]
        console.print(plan_table.from_rows(*run_forecast.table([chosen], failures)))
    console.print(plan_table.rejected_layouts(found))
    if options.all:
        wide = PlainConsole(width=max(console.width, 400))
        wide.print(plan_table.all_layouts(found))
    if options.plot:
        plan_table.draw(
            options.plot, shown, f"{config.training.model or config.training.load} on {options.gpus} {cluster.gpu}"
        )
    if not found.fitting:
        need = f"the smallest needs {found.too_large[0].memory.total / plan_table.GIB:.1f} GiB"
        raise UserError(
            f"--gpus {options.gpus}: no layout fits into the {cluster.memory_gib:.1f} GiB of {cluster.gpu} ({need}); "
            "use more GPUs or another batch"
        )
    console.print(f"flags of the best: {plan_table.layout_flags(found.fitting[0], config)}", soft_wrap=True)
    known, unknown = plan_table.worst_errors()
    console.print(
        f"Modelled times: largest error {known:.0%} on published runs, {unknown:.0%} leave-one-out (--calibration).",
        style="dim",
    )


def _parser() -> Parser:
    parser = Parser(
        prog="python -m megatron_a2d.plan",
        description="Find the fastest parallel layouts of a model on a cluster, by a model of memory and time.",
    )
    parser.add_argument("--cluster", metavar="NAME", help="a name in launch/clusters, or a path")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs to train on")
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="price per GPU-hour; default: an assumed one")
    parser.add_argument(
        "--imbalance", metavar="FACTOR|RUN",
        help="tokens of the busiest expert-parallel rank over the mean, 1 if balanced; or a run's directory, whose log "
        "has it by layer and step; default: as measured in the study on routers",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="show every valid layout with all components")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot memory and time to a .png, .pdf or .svg")
    parser.add_argument("--calibration", action="store_true", help="compare the model with published runs and exit")
    parser.add_argument(
        "--requirements", nargs="+", type=Path, metavar="RECIPE",
        help="print the fewest GPUs of each kind on which unmodified recipes fit, and exit",
    )  # fmt: skip
    parser.add_argument(
        "--run", action="store_true",
        help="forecast the run with failures: days, restarts, the best checkpoint interval, hours lost, disk; without "
        "other settings: 500B tokens of Qwen3-30B-A3B and 235B-A22B on 64 B200 and 512 H100",
    )  # fmt: skip
    for name, default, text in (
        ("--node-mtbf-hours", NODE_MTBF_HOURS, "with --run: mean time between failures of a node"),
        ("--restart-minutes", RESTART_MINUTES, "with --run: from a failure until loading the checkpoint begins"),
        (
            "--storage-gb-per-s",
            None,
            "with --run: bandwidth of a node to checkpoints; default: the cluster's, or 0.98",
        ),
    ):
        parser.add_argument(name, type=float, default=default, metavar="NUMBER", help=text)
    return parser


def _cluster(options: argparse.Namespace) -> Cluster:
    missing = [f"--{name}: is missing; see --help" for name in ("cluster", "gpus") if getattr(options, name) is None]
    if missing:
        raise UserError(missing)
    if not 1 <= options.gpus <= MOST_PROCESSES:
        raise UserError(f"--gpus {options.gpus}: a run needs at least 1, and at most {MOST_PROCESSES:,} are supported")
    if options.price is not None and not 0 < options.price <= LARGEST:
        raise UserError(f"--price {options.price:g}: must be above 0 to {LARGEST:g} dollars; correct it")
    cluster = read_cluster(options.cluster)
    return dataclasses.replace(cluster, price_per_gpu_hour=options.price) if options.price else cluster


def _names_a_run(options: argparse.Namespace) -> bool:
    """Whether anything is given that belongs to one run, so that a plan of it is meant."""
    given = [options.cluster, options.gpus, options.price, options.imbalance, options.plot]
    return (
        bool(options.config or options.all)
        or any(value is not None for value in given)
        or any(hasattr(options, name) for name in settings())
    )


def _failures(options: argparse.Namespace) -> Failures:
    given = Failures(options.node_mtbf_hours, options.restart_minutes, options.storage_gb_per_s)
    for name, value in given._asdict().items():
        may_be_0 = name == "restart_minutes"
        if value is not None and not (0 < value <= LARGEST or (may_be_0 and value == 0)):
            raise UserError(
                f"{flag(name)} {value:g}: must be {'0' if may_be_0 else 'above 0'} to {LARGEST:g}; correct it"
            )
    if not options.run and given != Failures():
        raise UserError("--node-mtbf-hours, --restart-minutes, --storage-gb-per-s: are only valid with --run; add it")
    return given


def _routing(given: str | None) -> Routing | None:
    """--imbalance: a factor, or a run that has measured it; None: assumed of the run."""
    if given is None:
        return None
    try:
        factor = float(given)
    except ValueError:
        return _measured(Path(given))
    if not 1 <= factor < math.inf:
        raise UserError(f"--imbalance {given}: the busiest rank has at least the mean; give 1 or more")
    return Routing.of(factor)


def _measured(run: Path) -> Routing:
    if not run.exists():
        raise UserError(
            f"--imbalance {run}: is neither a number nor an existing run; give a factor, or a run's directory"
        )
    found = measured(read_log(run.parent if run.name == "log.jsonl" else run))
    if found is None:
        raise UserError(
            f"--imbalance {run}: its log has no loads of expert-parallel ranks (a dense model, --no-monitor, or an "
            "older version); give another run, or a factor"
        )
    return found


def _with_gpu_defaults(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """Without a recipe: the settings of all GPU recipes, unless set by a flag."""
    for group, values in WITHOUT_RECIPE.items():
        chosen = {name: value for name, value in values.items() if not hasattr(options, name)}
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **chosen)})
    return config


def _model_config(config: RunConfig) -> ModelConfig:
    if config.training.load:
        return read_model_config(resolve(config.training.load) / HF_FILES)
    if config.training.model:
        return named_model_config(config.training.model)
    raise UserError("--model: is missing; name the model, such as Qwen/Qwen3-8B-Base, or give a checkpoint by --load")


def _need_legal(found: Search) -> None:
    """UserError with the problems of every layout, if no layout is legal."""
    if not found.fitting and not found.too_large:
        always = [problem for problem, count in found.refusals.items() if count == found.num_illegal]
        raise UserError(always or [problem for problem, _ in found.refusals.most_common(3)])


def _own_plan(
    config: RunConfig, model_config: ModelConfig, cluster: Cluster, options: argparse.Namespace, routing: Routing | None
) -> tuple[Plan | None, list[str]]:
    """The plan for the layout of recipe and flags, or its problems."""
    if problems := find_problems(config, model_config, options.gpus):
        return None, problems
    return make_plan(config, model_config, cluster, options.gpus, routing=routing), []


def _print(
    console: Console, config: RunConfig, model_config: ModelConfig, cluster: Cluster, options: argparse.Namespace
) -> None:
    tokens = config.training.global_batch_size * config.data.seq_length
    active = f", {human(model_config.num_active_parameters())} active" if model_config.is_moe else ""
    price = f"${cluster.price_per_gpu_hour:g} per hour{'' if options.price else ' (assumed)'}"
    console.print(
        f"{config.training.model or config.training.load}: {human(model_config.num_parameters())} parameters{active}; "
        f"{options.gpus} {cluster.gpu}, {price}; "
        f"{human(tokens)} tokens/step, {human(config.num_samples * config.data.seq_length)} in total"
    )


if __name__ == "__main__":
    entry_point(main)
