"""The fewest GPUs of each cluster on which an unmodified recipe fits, by modelled memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_a2d.config.cli import Parser, parse_run
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.named_models import named_model_config
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.config.validate import find_problems
from megatron_a2d.planner.cluster import Cluster, read_cluster
from megatron_a2d.planner.routing import Routing
from megatron_a2d.planner.search import Plan, make_plan
from megatron_a2d.utils.errors import UserError

GPUS = (8, 16, 32, 64, 128, 256, 512)
CLUSTERS = ("h100", "h200", "b200")


def requirements(recipes: Sequence[Path], routing: Routing | None) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table by recipe and cluster: GPUs, and days of the run; "-" where it fits on none of `GPUS`.

    UserError for a recipe without a model.
    """
    clusters = [read_cluster(name) for name in CLUSTERS]
    rows = []
    for recipe in recipes:
        config, _ = parse_run(Parser(), ["--config", str(recipe)])
        if config.training.model is None:
            raise UserError(f"{recipe}: names no model; give recipes with the setting model")
        model_config = named_model_config(config.training.model)
        plans = [smallest_plan(config, model_config, cluster, routing) for cluster in clusters]
        cells = [f"{plan.job.world_size} ({plan.days:.2g})" if plan else "-" for plan in plans]
        rows.append([f"`{recipe.stem}`", *cells])
    return ["recipe", *(cluster.gpu for cluster in clusters)], rows


def smallest_plan(
    config: RunConfig, model_config: ModelConfig, cluster: Cluster, routing: Routing | None
) -> Plan | None:
    """The plan for the smallest of `GPUS` that the run's own settings allow and whose memory suffices."""
    for gpus in GPUS:
        if not find_problems(config, model_config, gpus):
            plan = make_plan(config, model_config, cluster, gpus, routing=routing)
            if plan.fits:
                return plan
    return None
