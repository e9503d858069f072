"""Forecast of a long run: days with failures, the best checkpoint interval, hours lost, disk space.

Failures are a Poisson process over all nodes, as in Young (1974, "A first order approximation to the optimum checkpoint
interval", CACM 17(9)) and Daly (2006, "A higher order estimate of the optimum checkpoint interval for restart dumps",
FGCS 22(3)). The step is the planner's, a checkpoint its bytes over the storage's bandwidth; while it is written,
training waits: --async-save waits less, and loses up to two intervals instead of one in a failure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_a2d.config.cli import Parser, parse_run
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.named_models import named_model_config
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.planner.cluster import read_cluster
from megatron_a2d.planner.plan_table import layout_name
from megatron_a2d.planner.search import SECONDS_A_DAY, Plan, make_plan
from megatron_a2d.terminal.console import human
from megatron_a2d.utils.errors import UserError

HOUR = 3600.0
# Llama 3 405B (Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days of
# 16,384 H100, 8 per node. The hardware was H100's; of B200 no such figure is published.
NODE_MTBF_HOURS = 54 * 24 * (16_384 / 8) / 419
# MegaScale (Jiang et al. 2024, arXiv 2402.15627), more than 10,000 GPUs: detecting a failure and diagnosing it takes
# less than 10 minutes on average. Loading the checkpoint comes on top.
RESTART_MINUTES = 10.0
# Llama 3's storage sustains 2 TB/s for as many nodes as above (section 3.3.1).
STORAGE_GB_PER_S = 2000 / (16_384 / 8)


# The runs that `plan --run` shows by default: recipe, cluster, GPUs.
RUNS = (
    ("rnd1_30b_a3b_64xb200", "b200", 64), ("qwen3_30b_a3b", "h100", 512), ("qwen3_235b_a22b", "b200", 64),
    ("qwen3_235b_a22b", "h100", 512),
)  # fmt: skip
TOKENS = 500e9  # of RND1 (Radical Numerics 2025)
KEPT = 2  # checkpoints, besides one that is being written
RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"


class Failures(NamedTuple):
    """How often nodes fail and what a restart and a checkpoint take; the defaults are other projects' measurements."""

    node_mtbf_hours: float = NODE_MTBF_HOURS
    restart_minutes: float = RESTART_MINUTES  # from a failure to the start of loading
    storage_gb_per_s: float | None = None  # of a node, writing and reading; None: the cluster's, or STORAGE_GB_PER_S


class Forecast(NamedTuple):
    """A run with failures. Times in seconds, sizes in bytes."""

    work: float  # of all steps, without failures and checkpoints
    mtbf: float  # of all nodes together
    save: float  # of a checkpoint
    restart: float  # until training continues, loading included
    interval: float  # of training between two checkpoints, in whole steps
    save_interval: int  # the same in iterations
    checkpoint_bytes: float
    num_saves: int
    data_bytes: float

    @property
    def wall(self) -> float:
        return wall_time(self.work, self.interval, self.save, self.mtbf, self.restart)

    @property
    def failures(self) -> float:
        return self.wall / self.mtbf

    @property
    def saving(self) -> float:
        return self.work / self.interval * self.save

    @property
    def restarting(self) -> float:
        return self.failures * self.restart

    @property
    def repeated(self) -> float:
        """Computed or saved again after failures, and restarts that failed as well."""
        return self.wall - self.work - self.saving - self.restarting

    @property
    def lost(self) -> float:
        return self.wall - self.work


def young_interval(save: float, mtbf: float) -> float:
    """Young's interval of training between checkpoints: sqrt(2 save mtbf), all in seconds; for save << mtbf."""
    return math.sqrt(2 * save * mtbf)


def daly_interval(save: float, mtbf: float) -> float:
    """Daly's higher-order estimate of the interval of training, in seconds, that minimises `wall_time`."""
    if save >= 2 * mtbf:
        return mtbf
    ratio = save / (2 * mtbf)
    return young_interval(save, mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def wall_time(work: float, interval: float, save: float, mtbf: float, restart: float) -> float:
    """Expected seconds of a run, by Daly's complete model: failures also interrupt checkpoints and restarts.

    Infinite where the interval is so many times `mtbf` that no float holds them.
    """
    try:
        return mtbf * math.exp(restart / mtbf) * math.expm1((interval + save) / mtbf) * work / interval
    except OverflowError:
        return math.inf


def checkpoint_bytes(config: RunConfig, model_config: ModelConfig) -> float:
    """Size of a run's checkpoint: weights in the training dtype, main weights and Adam's moments in fp32.

    Muon has one moment instead of two: less than this.
    """
    return (14 if config.training.bf16 else 12) * model_config.num_parameters()


def forecast(plan: Plan, failures: Failures, save_interval: int | None = None) -> Forecast:
    """The run of a plan, saved every `save_interval` iterations; None: as often as is best.

    UserError if the nodes fail so often that the run hardly advances.
    """
    config, job = plan.config, plan.job
    bandwidth = failures.storage_gb_per_s or plan.cluster.storage_gb_per_s or STORAGE_GB_PER_S
    nodes = -(-job.world_size // plan.cluster.gpus_per_node)
    size = checkpoint_bytes(config, job.model_config)
    mtbf = failures.node_mtbf_hours * HOUR / nodes
    save = size / (bandwidth * 1e9 * nodes)
    restart = failures.restart_minutes * 60 + save  # reads what was written, at the same speed
    step = plan.time.total
    if mtbf <= save + restart + step:
        raise UserError(
            f"--node-mtbf-hours {failures.node_mtbf_hours:g}: {nodes} nodes fail every {mtbf / 60:.3g} minutes, and a "
            f"restart ({restart / 60:.3g} minutes), a step and a checkpoint ({save / 60:.3g}) take longer: the run "
            "would not advance; use fewer nodes or faster storage, or restart faster"
        )
    best = max(1, round(daly_interval(save, mtbf) / step))
    every = min(save_interval or best, config.num_iterations)
    tokens = config.num_samples * config.data.seq_length
    return Forecast(
        work=plan.days * SECONDS_A_DAY,
        mtbf=mtbf,
        save=save,
        restart=restart,
        interval=every * step,
        save_interval=every,
        checkpoint_bytes=size,
        num_saves=-(-config.num_iterations // every),
        data_bytes=tokens * (2 if job.model_config.vocab_size < 65500 else 4),
    )


def standard_plans() -> list[Plan]:
    """RND1's number of tokens on `RUNS`, in the recipes' own layouts."""
    plans = []
    for recipe, cluster, gpus in RUNS:
        config, _ = parse_run(Parser(), ["--config", str(RECIPES / f"{recipe}.yaml")])
        model = named_model_config(str(config.training.model))
        iterations = round(TOKENS / (config.training.global_batch_size * config.data.seq_length))
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, train_iters=iterations))
        plans.append(make_plan(config, model, read_cluster(cluster), gpus))
    return plans


def table(plans: Sequence[Plan], failures: Failures) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with a column per run."""
    columns = []
    for plan in plans:
        config, best = plan.config, forecast(plan, failures)
        own = forecast(plan, failures, config.training.save_interval)
        young = young_interval(best.save, best.mtbf)
        columns.append({
            "tokens, iterations": f"{human(config.num_samples * config.data.seq_length)}, {config.num_iterations:,}",
            "layout": layout_name(plan.job),
            "step": f"{plan.time.total:.3g} s",
            "days without failures": f"{plan.days:.3g}",
            "a failure every": f"{best.mtbf / SECONDS_A_DAY:.3g} days",
            "restarts expected": f"{best.failures:.2g}",
            "checkpoint, written in": f"{human(best.checkpoint_bytes, 'B')}, {best.save:.3g} s",
            "best interval (Daly; Young)": f"{best.interval / 60:.3g} min; {young / 60:.3g} min",
            "as `--save-interval`": f"{best.save_interval:,}",
            "hours lost": f"{best.lost / HOUR:.2g}",
            "of them saving, repeated, restarting": ", ".join(
                f"{seconds / HOUR:.2g}" for seconds in (best.saving, best.repeated, best.restarting)
            ),
            f"hours lost, saved every {config.training.save_interval}": f"{own.lost / HOUR:.2g}",
            "**days**": f"**{best.wall / SECONDS_A_DAY:.3g}**",
            "disk: tokens": human(best.data_bytes, "B"),
            "disk: all checkpoints": f"{human(best.num_saves * best.checkpoint_bytes, 'B')} ({best.num_saves})",
            f"disk: `--keep-latest-k {KEPT}`": human(min(best.num_saves, KEPT + 1) * best.checkpoint_bytes, "B"),
        })  # fmt: skip
    head = [f"{_name(plan.config)}, {plan.job.world_size} {plan.cluster.gpu}" for plan in plans]
    return ["", *head], [[name, *(column[name] for column in columns)] for name in columns[0]]


def _name(config: RunConfig) -> str:
    return str(config.training.model or config.training.load).rpartition("/")[2].removesuffix("-Base")
