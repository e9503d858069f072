"""`train --rehearse`: rehearsal of one rank per pipeline stage, or of the rank given by --rank."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from megatron_a2d.config.installed_versions import find_version_problems
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import PerformanceConfig, RunConfig, flag, settings
from megatron_a2d.config.validate_performance import (
    needs_transformer_engine,
    without_effect,
)
from megatron_a2d.planner.cluster import Cluster
from megatron_a2d.rehearsal import dataless_gpu, engine_kernels
from megatron_a2d.terminal.console import PlainConsole, console
from megatron_a2d.utils.atomic_write import new_file
from megatron_a2d.utils.errors import UserError

ASSUMED = "H100", (9, 0)  # without --cluster


class Layers(NamedTuple):
    """The rehearsed implementation of the layers, and how it differs from the run's."""

    implementation: str
    config: RunConfig
    notes: list[str]


def prepare(cluster: Cluster | None) -> bool:
    """Give this process a GPU of the cluster that holds no data; once, before megatron.core is imported.

    Returns whether there are Transformer Engine's layers.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a real GPU is left alone
    name, capability = (cluster.gpu, cluster.capability) if cluster else ASSUMED
    dataless_gpu.install(name, capability)
    if directory := engine_kernels.find():
        engine_kernels.install(directory)
    else:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # one of another release
    return directory is not None


def choose_layers(config: RunConfig, has_engine: bool) -> Layers:
    """The layers that the run has on a GPU with Transformer Engine, as far as they can be rehearsed here."""
    requested, notes = config.training.transformer_impl, []
    performance = config.performance
    if (performance.fp8_recipe, performance.fp4_recipe) != ("none", "none"):
        notes.append("--fp8-recipe, --fp4-recipe: rehearsed in bf16")
        performance = _without(performance, [name for name in settings() if re.search("fp8|fp4|_in_bf16|_bf16", name)])
        config = dataclasses.replace(config, performance=performance)
    if performance.cuda_graph_impl != "none":
        notes.append("--cuda-graph-impl: a step before the graphs are captured")
    if config.training.load or config.data.train_data_path or config.data.data_mixture:
        notes.append("checkpoint and data are not read; --dry-run checks them")
    if requested != "local":
        if has_engine:
            return Layers("transformer_engine", config, notes)
        off = needs_transformer_engine(config)
        performance = _without(performance, off)
        options = without_effect(dataclasses.replace(config, performance=performance))
        performance = _without(performance, list(options))
        without = f", without {', '.join(map(flag, off))}" if off else ""
        notes.append(
            f"the local layers for Transformer Engine's{without}: they keep other tensors for the backward pass. "
            f"Its Python, of release {engine_kernels.RELEASE}*, is not installed (make setup installs it)"
        )
    training = dataclasses.replace(config.training, transformer_impl="local")
    return Layers("local", dataclasses.replace(config, training=training, performance=performance), notes)


def _without(performance: PerformanceConfig, names: list[str]) -> PerformanceConfig:
    """`performance` with these settings at their defaults."""
    defaults: dict[str, Any] = {name: settings()[name].default for name in names if hasattr(performance, name)}
    return dataclasses.replace(performance, **defaults)


def rehearse(
    config: RunConfig, model_config: ModelConfig, processes: int, rank: int | None, cluster: Cluster | None,
    trace: Path | None = None,
) -> None:  # fmt: skip
    """Print a step's memory, traffic and synchronisations; UserError if sends and receives do not pair up.

    `trace`: a file for the communication of every rank in order (event_listing.py).
    """
    if rank is not None and not 0 <= rank < processes:
        raise UserError(f"--rank {rank}: --world-size {processes} has the ranks 0 to {processes - 1}")
    with new_file(trace) if trace else nullcontext() as listing:  # a path that cannot be written shows at once
        layers = choose_layers(config, prepare(cluster))
        if problems := find_version_problems(layers.config):
            raise UserError(problems)
        from megatron_a2d.rehearsal.event_listing import text_of
        from megatron_a2d.rehearsal.rank_rehearsal import rehearse_rank

        ranks = ranks_of_stages(config, processes) if rank is None else [rank]
        with console.status("") as status:
            done = [rehearse_rank(layers.config, model_config, number, processes, status.update) for number in ranks]
        if listing:
            listing.write_text(text_of(done))
    from megatron_a2d.rehearsal import rehearsal_report
    from megatron_a2d.rehearsal.pipeline_pairing import pair

    pairing = pair({item.rank: item.events for item in done}) if len(done) > 1 else None
    output = PlainConsole(width=None if sys.stdout.isatty() else 120)
    rehearsal_report.show(output, layers, model_config, processes, done, pairing, cluster)
    if pairing and pairing.problems:
        raise UserError([f"--rehearse: {problem}" for problem in pairing.problems])


def ranks_of_stages(config: RunConfig, processes: int, offset: int = 0) -> list[int]:
    """The rank at this offset in every pipeline stage; they exchange activations with one another."""
    stages = config.parallel.pipeline_model_parallel_size
    per_stage = processes // stages
    return [stage * per_stage + offset for stage in range(stages)]
