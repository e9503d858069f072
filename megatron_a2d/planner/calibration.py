"""Calibration of the time model: efficiencies fitted to published runs, and the error for each run.

`python -m megatron_a2d.plan --calibration` prints the table. All runs have equal weight; the fit minimises the
sum of squared logarithms of (predicted / published). A leave-one-out error is that of a run after a fit to the others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_a2d.config.model_config import ModelConfig, model_config_from_hf
from megatron_a2d.families.qwen3 import hub_config
from megatron_a2d.model.flops import train_flops_per_token
from megatron_a2d.planner.cluster import Cluster, read_cluster
from megatron_a2d.planner.memory import memory
from megatron_a2d.planner.routing import EVEN
from megatron_a2d.planner.step_time import Efficiencies, step_time
from megatron_a2d.planner.workload import Job

ROWS = Path(__file__).with_name("published_throughput.yaml")

EFFICIENCIES = Efficiencies(
    matmul_bf16=0.804,
    matmul_fp8=0.706,
    matmul_fp4=0.813,
    attention=0.55,
    memory=0.473,
    nvlink=0.85,
    network=0.846,
    blackwell=0.841,
    moe_sync=1.68e-3,
    launch_moe=4e-3,
    launch_dense=1.5e-3,
)
# The largest leave-one-out error. (--calibration recomputes it, which takes a while.)
LARGEST_LEFT_OUT_ERROR = 0.251
# The other efficiencies are assumed: too few runs depend on them. The bounds are what is physically plausible.
FITTED = {
    "matmul_bf16": 0.85, "matmul_fp8": 0.85, "memory": 0.9, "nvlink": 0.85, "network": 0.9, "blackwell": 1.0,
    "moe_sync": 1e-2,
}  # fmt: skip
# Fitted last and alone, to the runs in NVFP4: two dense ones, which are to say nothing about the other efficiencies.
FITTED_TO_FP4 = {"matmul_fp4": 0.85}


class Row(NamedTuple):
    """Throughput of a published run."""

    name: str
    source: str
    cluster: Cluster
    job: Job
    tokens_per_second: float  # per GPU
    peak_memory_gib: float | None  # if it was published

    def predict(self, efficiency: Efficiencies = EFFICIENCIES) -> float:
        """Modelled tokens/s/GPU."""
        tokens = self.job.global_batch_size * self.job.seq_length
        return tokens / self.job.world_size / step_time(self.job, self.cluster, efficiency).total

    @property
    def modelled_memory_gib(self) -> float:
        """Modelled memory allocated by PyTorch, without that of NCCL and CUDA."""
        parts = memory(self.job)
        return (parts.total - parts.communication) / 2**30


@functools.cache
def published_rows() -> tuple[Row, ...]:
    """All runs of published_throughput.yaml."""
    content = yaml.safe_load(ROWS.read_text(encoding="utf-8"))
    return tuple(_row(row) for row in content["rows"])


def _row(row: dict[str, Any]) -> Row:
    model_config = _shape(row["model"])
    # Common to all runs: Megatron's distributed optimizer with its overlaps, bf16 gradients, unchunked logits,
    # balanced routing.
    common = {
        "objective": "ar", "bf16": True, "use_distributed_optimizer": True, "overlap_grad_reduce": True,
        "overlap_param_gather": True, "grad_reduce_in_fp32": False, "imbalance": EVEN, "overlap_p2p_comm": True,
        "tp_comm_overlap": True, "whole_logits": True,
    }  # fmt: skip
    job = Job(model_config=model_config, **(common | row["settings"]))
    tokens = row.get("tokens_per_second")
    if tokens is None:
        tokens = row["tflops"] * 1e12 / train_flops_per_token(model_config, job.seq_length, causal=True)
    cluster = read_cluster(row["cluster"])
    return Row(row["name"], row["source"], cluster, job, float(tokens), row.get("peak_memory_gib"))


def _shape(model: Any) -> ModelConfig:
    if isinstance(model, str):
        return model_config_from_hf(hub_config(model), model)
    return ModelConfig(
        head_dim=128, vocab_size=128256, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=5e5,
        tie_word_embeddings=False, **model,
    )  # fmt: skip


def error(row: Row, efficiency: Efficiencies = EFFICIENCIES) -> float:
    """(predicted - published) / published."""
    return row.predict(efficiency) / row.tokens_per_second - 1


def left_out_error(row: Row) -> float:
    """The run's error after a fit to all others."""
    return error(row, fit([other for other in published_rows() if other != row]))


def fit(rows: Sequence[Row], start: Efficiencies = EFFICIENCIES) -> Efficiencies:
    """The efficiencies that best fit `rows`."""
    in_fp4 = [row for row in rows if row.job.fp4_recipe != "none"]
    found = _search([row for row in rows if row not in in_fp4], start, FITTED)
    return _search(in_fp4, found, FITTED_TO_FP4)


def _search(rows: Sequence[Row], start: Efficiencies, limits: dict[str, float], step: float = 0.1) -> Efficiencies:
    """A pattern search over the logarithms of the efficiencies in `limits`."""

    def cost(efficiency: Efficiencies) -> float:
        return sum(math.log(row.predict(efficiency) / row.tokens_per_second) ** 2 for row in rows)

    best, lowest = start, cost(start)
    while step > 2e-3:
        improved = False
        for name, limit in limits.items():
            for factor in (1 + step, 1 / (1 + step)):
                tried = best._replace(**{name: min(limit, getattr(best, name) * factor)})
                if (found := cost(tried)) < lowest - 1e-9:
                    best, lowest, improved = tried, found, True
        step = step if improved else step / 2
    return best
