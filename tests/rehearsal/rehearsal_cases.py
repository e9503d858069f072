"""What is rehearsed: every recipe on every number of GPUs that it fits, at the first, a middle and the last rank of each
pipeline stage; and layouts that no recipe has."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_a2d.config.cli import Parser, parse_run
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.named_models import named_model_config
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.config.validate import find_problems
from megatron_a2d.planner.workload import job_of
from tests.recipe_sizes import FEWEST, GPUS, RECIPES

PLACES = ("first", "middle", "last")
CLUSTERS = ("h100", "h200", "b200")


@dataclass(frozen=True)
class Case:
    """A recipe on some GPUs; `flags` are those of train."""

    recipe: str
    gpus: int
    places: tuple[str, ...] = PLACES
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join((self.recipe, str(self.gpus), *self.flags))

    @property
    def cluster(self) -> str:
        """The first on which the recipe fits this many GPUs; it decides what the GPU says of itself."""
        fits = (name for name, fewest in zip(CLUSTERS, FEWEST[self.recipe], strict=True) if 0 < fewest <= self.gpus)
        return next(fits)

    def config(self) -> tuple[RunConfig, ModelConfig]:
        """The run with as many micro-batches as fill its pipeline: the others repeat them."""
        config, _ = parse_run(Parser(), ["--config", str(RECIPES[self.recipe]), *self.flags])
        assert config.training.model
        model_config = named_model_config(config.training.model)
        job = job_of(config, model_config, self.gpus)
        stages, virtual = job.pipeline_model_parallel_size, job.num_virtual_stages_per_pipeline_rank
        chunks = (stages - 1) * 2 + (virtual - 1) * stages + 1
        enough = max(2, -(-chunks // (virtual * stages)) * stages)
        size = min(enough, job.num_microbatches) * job.micro_batch_size * job.data_parallel_size
        training = dataclasses.replace(config.training, global_batch_size=size)
        config = dataclasses.replace(config, training=training)
        assert not (problems := find_problems(config, model_config, self.gpus)), problems
        return config, model_config

    def ranks(self, stages: int) -> dict[str, list[int]]:
        """Of each place the ranks of all stages, which exchange activations with one another."""
        per_stage = self.gpus // stages
        at = {"first": 0, "middle": per_stage // 2, "last": per_stage - 1}
        return {place: [stage * per_stage + at[place] for stage in range(stages)] for place in self.places}


EVERY = [
    Case(recipe, gpus)
    for recipe, fewest in FEWEST.items()
    if not recipe.endswith("_block")  # those in FEW
    for gpus in GPUS
    if gpus >= min(number for number in fewest if number)
]  # fmt: skip
FIRST = ("first",)
NO_OVERLAP = ("--no-overlap-moe-expert-parallel-comm", "--no-delay-wgrad-compute")
TP, PP = ("--tensor-model-parallel-size", "2", "--sequence-parallel"), ("--pipeline-model-parallel-size", "2")
NO_GRAPHS = ("--cuda-graph-impl", "none", "--cuda-graph-scope", "attn")
BALANCED = (
    "--moe-router-load-balancing-type", "global_aux_loss", "--moe-aux-loss-coeff", "0.001",
    "--moe-aux-loss-tokens", "by_kind", "--moe-z-loss-coeff", "0.001",
)  # fmt: skip
LAYOUTS = [
    Case("qwen3_0p6b", 16, FIRST, (*TP, *PP)),
    Case("qwen3_0p6b", 16, FIRST, ("--context-parallel-size", "2")),
    Case("qwen3_0p6b", 8, FIRST, (*NO_GRAPHS, "--recompute-granularity", "full")),
    Case("qwen3_0p6b", 8, FIRST, ("--objective", "ar")),
    Case("qwen3_0p6b", 8, FIRST, (*NO_GRAPHS, "--reset-attention-mask", "--reset-position-ids")),
    Case("qwen3_0p6b", 8, FIRST, ("--no-use-distributed-optimizer", "--no-overlap-param-gather")),
    Case("qwen3_0p6b", 8, FIRST, ("--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16")),
    Case("qwen3_30b_a3b", 8, FIRST, BALANCED),
    Case("qwen3_30b_a3b", 64, FIRST, (*PP, "--num-virtual-stages-per-pipeline-rank", "2")),
    Case(
        "qwen3_30b_a3b", 64, FIRST,
        (*TP, "--expert-tensor-parallel-size", "2", *NO_OVERLAP),
    ),
    Case("qwen3_30b_a3b", 64, FIRST, ("--moe-token-dispatcher-type", "allgather", *NO_OVERLAP)),
]  # fmt: skip
# In `make test`.
FEW = [Case("qwen3_0p6b", 16, FIRST, (*TP, *PP)), Case("qwen3_8b_block", 8, FIRST)]
