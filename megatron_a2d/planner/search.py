"""Search over the valid layouts of a run on a cluster: memory and time of each, and why others were rejected.

Layouts are validated by config/validate.py alone, as for training: a size that is invalid by itself is excluded from
all combinations, which keeps their number small.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig, settings
from megatron_a2d.config.validate import find_general_problems, find_layout_problems
from megatron_a2d.model.flops import train_flops_per_token
from megatron_a2d.planner.calibration import EFFICIENCIES
from megatron_a2d.planner.cluster import Cluster
from megatron_a2d.planner.memory import Memory, memory
from megatron_a2d.planner.step_time import MASKED_FRACTION, StepTime, step_time
from megatron_a2d.planner.workload import Job, job_of

MICRO_BATCH_SIZES = (1, 2, 4, 8)
LARGEST_CONTEXT_PARALLEL = 8
SECONDS_A_DAY = 86400
# The settings that a search varies; 1 means no parallelism of that kind.
SIZES = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank",
    "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size", "micro_batch_size",
)  # fmt: skip


class Plan(NamedTuple):
    """A layout with its modelled memory and step time."""

    config: RunConfig
    job: Job
    cluster: Cluster
    memory: Memory
    time: StepTime

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.cluster.memory_bytes

    @property
    def tokens_per_second(self) -> float:
        """Tokens/s/GPU."""
        return self.job.global_batch_size * self.job.seq_length / self.job.world_size / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: fraction of the bf16 peak, recomputation not counted."""
        job = self.job
        rows = job.input_length / job.seq_length
        head = (1.0 if job.is_causal else MASKED_FRACTION) / rows
        flops = rows * train_flops_per_token(job.model_config, job.input_length, job.is_causal, head)
        return self.tokens_per_second * flops / (self.cluster.bf16_tflops * 1e12)

    @property
    def days(self) -> float:
        """Duration of the run, with as many tokens/s during a ramp of the batch size as after it."""
        return self.config.num_samples / self.job.global_batch_size * self.time.total / SECONDS_A_DAY

    @property
    def cost(self) -> float:
        return self.days * 24 * self.job.world_size * self.cluster.price_per_gpu_hour


def make_plan(config: RunConfig, model_config: ModelConfig, cluster: Cluster, world_size: int, **changes: Any) -> Plan:
    """The plan of `config`'s own layout; `changes` are fields of `Job`."""
    job = job_of(config, model_config, world_size, cluster, **changes)
    return Plan(config, job, cluster, memory(job, cluster), step_time(job, cluster, EFFICIENCIES))


class Search(NamedTuple):
    """Result of a search over layouts."""

    fitting: list[Plan]  # fastest first
    too_large: list[Plan]  # smallest first
    num_illegal: int
    refusals: Counter[str]  # one example of each kind of validation error -> number of layouts


def search(config: RunConfig, model_config: ModelConfig, cluster: Cluster, world_size: int, **changes: Any) -> Search:
    """Try every layout for the run of `config`, regardless of its own layout and micro-batch size."""
    fitting: list[Plan] = []
    too_large: list[Plan] = []
    kinds: dict[str, str] = {}  # kind of error -> its first message
    num_illegal, refusals = 0, Counter[str]()
    always = find_general_problems(config)
    apart = _without_overlap_of_experts(config)
    ways = [_without_full_recomputation(way) for way in ((config,) if apart == config else (config, apart))]
    again = _with_full_recomputation(apart)
    for layout in _layouts(apart, model_config, cluster, world_size):
        candidate, problems = _first_legal([_laid_out(way, **layout) for way in ways], model_config, world_size)
        if always or problems:
            num_illegal += 1
            refusals.update({kinds.setdefault(_without_numbers(line), line) for line in always + problems})
            continue
        plan = make_plan(candidate, model_config, cluster, world_size, **changes)
        (fitting if plan.fits else too_large).append(plan)
        if plan.fits:  # more recomputation would only be slower
            continue
        candidate, problems = _first_legal([_laid_out(again, **layout)], model_config, world_size)
        if not problems:
            plan = make_plan(candidate, model_config, cluster, world_size, **changes)
            (fitting if plan.fits else too_large).append(plan)
    fitting.sort(key=lambda plan: (plan.time.total, plan.memory.total))
    too_large.sort(key=lambda plan: plan.memory.total)
    return Search(fitting, too_large, num_illegal, refusals)


def _first_legal(
    candidates: list[RunConfig], model_config: ModelConfig, world_size: int
) -> tuple[RunConfig, list[str]]:
    """The first valid candidate with ''; if there is none, the last one and its validation error."""
    problems: list[str] = []
    for candidate in candidates:
        if not (problems := find_layout_problems(candidate, model_config, world_size)):
            break
    return candidate, problems


def _layouts(
    config: RunConfig, model_config: ModelConfig, cluster: Cluster, world_size: int
) -> Iterator[dict[str, Any]]:
    plain = _laid_out(config, **dict.fromkeys(SIZES, 1), sequence_parallel=False, global_batch_size=world_size)
    # A setting that is invalid without parallelism may be valid with it (an overlap that needs EP).
    accepted = {_without_numbers(problem) for problem in find_layout_problems(plain, model_config, 1)}

    def legal_alone(sizes: list[int], name: str, **more: Any) -> list[int]:
        """Sizes that by themselves cause no new validation error, on as many processes as they need."""
        return [
            size
            for size in sizes
            if size == 1
            or accepted.issuperset(
                map(
                    _without_numbers, find_layout_problems(_laid_out(plain, **{name: size}, **more), model_config, size)
                )
            )
        ]

    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    near = [size for size in divisors if size <= cluster.nvlink_domain]
    tensor = legal_alone(near, "tensor_model_parallel_size", sequence_parallel=True)
    expert_tensor = legal_alone(near, "expert_tensor_parallel_size")
    pipeline = legal_alone(divisors, "pipeline_model_parallel_size")
    expert = legal_alone(divisors, "expert_model_parallel_size")
    context = legal_alone([size for size in divisors if size <= LARGEST_CONTEXT_PARALLEL], "context_parallel_size")
    for tp, pp, cp in itertools.product(tensor, pipeline, context):
        if world_size % (tp * pp * cp):
            continue
        stage = model_config.num_layers // pp
        virtual = [1, *(size for size in range(2, stage + 1) if stage % size == 0)] if pp > 1 else [1]
        for virtual_size, ep, etp, micro in itertools.product(virtual, expert, expert_tensor, MICRO_BATCH_SIZES):
            sizes = (tp, pp, virtual_size, cp, ep, etp, micro)
            yield dict(zip(SIZES, sizes, strict=True), sequence_parallel=tp > 1)


def _without_overlap_of_experts(config: RunConfig) -> RunConfig:
    """Settings for layouts that do not support the overlap, such as a pipeline without virtual stages."""
    return _laid_out(config, overlap_moe_expert_parallel_comm=False, delay_wgrad_compute=False)


def _without_full_recomputation(config: RunConfig) -> RunConfig:
    """Recomputation of selected modules is kept."""
    if config.performance.recompute_granularity == "selective":
        return config
    return _laid_out(config, recompute_granularity="none", recompute_method="uniform", recompute_num_layers=1)


def _with_full_recomputation(config: RunConfig) -> RunConfig:
    return _laid_out(
        config, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1, recompute_modules=()
    )


def _laid_out(config: RunConfig, **values: Any) -> RunConfig:
    """`config` with some settings replaced, looked up in all setting groups."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        groups.setdefault(settings()[name].group, {})[name] = value
    changed = {group: dataclasses.replace(getattr(config, group), **own) for group, own in groups.items()}
    return dataclasses.replace(config, **changed)


def _without_numbers(problem: str) -> str:
    return re.sub(r"\d+", "N", problem)


def why_slower(plan: Plan, best: Plan) -> str:
    """The component of the step that costs `plan` most compared with `best`."""
    losses = {name: mine - its for name, mine, its in zip(plan.time._fields, plan.time, best.time, strict=True)}
    return max(losses, key=lambda name: losses[name])


def why_too_large(plan: Plan) -> str:
    """The largest component of the plan's memory."""
    parts = plan.memory._asdict()
    return max(parts, key=lambda name: parts[name])
