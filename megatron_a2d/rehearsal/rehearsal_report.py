"""A rehearsal as text: memory and traffic compared with the planner's, host synchronisations, pipeline pairing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

from rich.table import Table

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.planner.cluster import Cluster
from megatron_a2d.planner.memory import stage_memory
from megatron_a2d.planner.routing import Routing
from megatron_a2d.planner.traffic import step_traffic
from megatron_a2d.planner.workload import Job, job_of
from megatron_a2d.rehearsal.pipeline_pairing import Pairing
from megatron_a2d.rehearsal.rank_rehearsal import RankRehearsal
from megatron_a2d.rehearsal.step_trace import Event, Wait
from megatron_a2d.terminal.console import PlainConsole

GIB = 2**30
# megatron.core's groups -> the planner's kind of traffic.
_KINDS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "CONTEXT_PARALLEL_GROUP": "context",
    "EXPERT_MODEL_PARALLEL_GROUP": "expert",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "expert",
    "DATA_PARALLEL_GROUP_WITH_CP": "data",
    "DATA_PARALLEL_GROUP": "data",
    "EXPERT_DATA_PARALLEL_GROUP": "data",
}


class Comparison(NamedTuple):
    """A counted figure and the planner's, bytes."""

    name: str
    counted: float
    planned: float

    @property
    def off(self) -> float:
        """Relative error of the planner's figure."""
        return self.planned / self.counted - 1 if self.counted else float(self.planned > 0)


def job_rehearsed(config: Any, model_config: ModelConfig, processes: int, implementation: str) -> Job:
    """The planner's job with the layers that were rehearsed and balanced routing."""
    job = job_of(config, model_config, processes, routing=Routing.of(1.0), transformer_impl=implementation)
    # Without deep_ep's kernels the run takes all-to-all, and so does the rehearsal.
    return replace(job, moe_token_dispatcher_type=job.moe_token_dispatcher_type.replace("flex", "alltoall"))


def compare_memory(done: RankRehearsal, job: Job) -> list[Comparison]:
    """A rank's memory by use; memory outside of tensors (NCCL, CUDA) is in neither figure."""
    planned = stage_memory(job, done.stage)
    activations = planned.activations + planned.logits + planned.dispatcher
    return [
        Comparison("weights", done.weights, planned.weights),
        Comparison("gradients", done.gradients, planned.gradients),
        Comparison("optimizer state", done.optimizer, planned.optimizer),
        Comparison("activations, logits", done.activations, activations),
        Comparison("peak", done.peak, planned.weights + planned.gradients + planned.optimizer + activations),
    ]


def compare_traffic(done: RankRehearsal, job: Job) -> list[Comparison]:
    """Bytes that a rank sends in a step, by kind."""
    counted: Counter[str] = Counter()
    for event in done.events:
        counted[kind_of(event)] += event.sent_bytes  # type: ignore[assignment]
    planned = step_traffic(job, done.stage)
    return [
        Comparison(kind, counted[kind], getattr(planned, kind))
        for kind in planned._fields
        if counted[kind] or getattr(planned, kind)
    ]


def kind_of(event: Event) -> str:
    """The planner's kind of traffic: tensor, context, expert, data or pipeline; else other."""
    return _KINDS.get(event.group, "other" if event.peer is None else "pipeline")


def show(
    output: PlainConsole, layers: Any, model_config: ModelConfig, processes: int, done: list[RankRehearsal],
    pairing: Pairing | None, cluster: Cluster | None,
) -> None:  # fmt: skip
    """Print notes and tables."""
    job = job_rehearsed(layers.config, model_config, processes, layers.implementation)
    names = {"transformer_engine": "Transformer Engine's", "local": "local"}
    output.print(
        f"rehearsed {len(done)} of {processes} ranks: one step of {done[0].num_microbatches} micro-batches, "
        f"{names[layers.implementation]} layers, a loss at every position, balanced routing"
    )
    for note in layers.notes:
        output.print(f"note: {note}", style="yellow")
    output.print(_memory_table(done, job, cluster))
    if any(event.sent_bytes for item in done for event in item.events):
        output.print(_traffic_table(done, job))
        output.print(_collectives_table(done[0]))
    output.print(_waits_table(done))
    if pairing:
        output.print(
            f"pipeline: {pairing.num_pairs} sends ({pairing.num_bytes / GIB:.3g} GiB) and receives of {len(done)} "
            f"stages, which {'do not pair up' if pairing.problems else 'pair up; nothing hangs'}"
        )


def _compared(title: str, done: list[RankRehearsal]) -> Table:
    """An empty table with three columns per rank: counted, planned, and the planner's error."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for item in done:
        for text in (f"rank {item.rank}", "planned", "error"):
            table.add_column(text, justify="right")
    return table


def _memory_table(done: list[RankRehearsal], job: Job, cluster: Cluster | None) -> Table:
    table = _compared(f"memory, GiB{f', of {cluster.memory_gib}' if cluster else ''}", done)
    for row in zip(*(compare_memory(item, job) for item in done), strict=True):
        table.add_row(row[0].name, *(text for part in row for text in _figures(part, GIB)))
    for name in ("building", "left"):
        shown = {"building": "peak during construction", "left": "remaining after the step"}[name]
        table.add_row(shown, *(text for item in done for text in (f"{getattr(item, name) / GIB:.2f}", "", "")))
    return table


def _traffic_table(done: list[RankRehearsal], job: Job) -> Table:
    table = _compared("sent per step, GiB", done)
    kinds = {part.name: None for item in done for part in compare_traffic(item, job)}
    found = [{part.name: part for part in compare_traffic(item, job)} for item in done]
    for kind in kinds:
        parts = [parts.get(kind, Comparison(kind, 0, 0)) for parts in found]
        table.add_row(kind, *(text for part in parts for text in _figures(part, GIB)))
    return table


def _figures(part: Comparison, unit: float) -> tuple[str, str, str]:
    return f"{part.counted / unit:.2f}", f"{part.planned / unit:.2f}", f"{part.off:+.1%}" if part.counted else ""


def collectives(done: RankRehearsal) -> Counter[tuple[str, str, int, int]]:
    """(operation, group, ranks in it, bytes of the message) -> how often in a step, in the order of first use."""
    events = (event for event in done.events if len(event.ranks) > 1 and event.operation != "wait")
    return Counter((event.operation, _group_name(event), len(event.ranks), event.num_bytes) for event in events)


def _group_name(event: Event) -> str:
    return event.group.lower().removesuffix("_group").replace("_", " ").replace("default pg", "all")


def _collectives_table(done: RankRehearsal) -> Table:
    sums: dict[tuple[str, str, int], list[int]] = {}
    for (operation, group, ranks, size), number in collectives(done).items():
        found = sums.setdefault((operation, group, ranks), [0, 0])
        found[0] += number
        found[1] += number * size
    table = Table(title=f"communication of rank {done.rank}, in the order of first use", title_justify="left")
    for text in ("operation", "group", "ranks", "calls", "GiB"):
        table.add_column(text, justify="left" if text in ("operation", "group") else "right")
    for (operation, group, ranks), (number, size) in sums.items():
        table.add_row(operation, group, str(ranks), str(number), f"{size / GIB:.3g}")
    return table


def _waits_table(done: list[RankRehearsal]) -> Table:
    table = Table(title="host syncs (the host waits for the GPU), per step", title_justify="left")
    for text in ("place", "by", *(f"rank {item.rank}" for item in done)):
        table.add_column(text, justify="right" if text.startswith("rank") else "left")
    places: dict[Wait, None] = {}
    for item in done:
        places |= {wait: None for wait in item.waits if wait.phase != "build"}
    for wait in places:
        table.add_row(wait.place, wait.operation, *(str(item.waits[wait]) for item in done))
    return table
