"""Memory per rank in bytes by component, for the pipeline stage that needs most.

Weights, gradients and optimizer state are exact, including the buffers' padding (parameters.py). Activations are those
of activations.py, times the number of micro-batches in flight. The rest are assumptions, stated below.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.model.logits_chunks import rows_per_chunk
from megatron_a2d.planner.activations import LayerActivations, layer_activations
from megatron_a2d.planner.cluster import Cluster
from megatron_a2d.planner.parameters import stage_values
from megatron_a2d.planner.workload import Job, job_of
from megatron_a2d.utils.errors import UserError

# Memory of a process before training: CUDA context, workspaces of cuBLAS and Transformer Engine. An assumption.
CONTEXT_BYTES = 2.0 * 2**30
# NCCL's buffers and channels, per communicator. An assumption.
COMMUNICATOR_BYTES = 0.25 * 2**30
# Fraction of a GPU's memory left free for the allocator's fragmentation. An assumption.
HEADROOM = 0.04
# Bytes per logit when all are materialised: fp32, in which the loss is computed in place, and its gradient in bf16.
WHOLE_LOGIT_BYTES = 6


class Memory(NamedTuple):
    """Bytes on one rank, by component."""

    weights: float
    fp8_copies: float
    gradients: float
    optimizer: float
    activations: float
    logits: float  # of one chunk, with the loss positions' hidden states and the LM head's gradient
    dispatcher: float  # tokens in flight to and from experts, and the busiest rank's excess over the mean
    communication: float  # NCCL, CUDA's context, workspaces
    headroom: float

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def state(self) -> float:
        """Components that do not depend on the batch."""
        return self.weights + self.fp8_copies + self.gradients + self.optimizer


def memory(job: Job, cluster: Cluster | None = None) -> Memory:
    """Memory of the pipeline stage that needs most; without a cluster no headroom is counted."""
    # The first stage has the embedding and the most micro-batches in flight, the last the LM head; others need less.
    stages = {0, job.pipeline_model_parallel_size - 1}
    headroom = HEADROOM * cluster.memory_bytes if cluster else 0.0
    kept = layer_activations(job)
    return max((_stage_memory(job, stage, kept, headroom) for stage in stages), key=lambda parts: parts.total)


def stage_memory(job: Job, stage: int) -> Memory:
    """The parts of one pipeline stage, without headroom."""
    return _stage_memory(job, stage, layer_activations(job), 0.0)


def _stage_memory(job: Job, stage: int, kept: LayerActivations, headroom: float) -> Memory:
    weights, gradients, optimizer = state_bytes(job, stage)
    in_flight = microbatches_in_flight(job, stage)
    parameter_bytes = job.number_bytes
    per_microbatch = kept.total * (job.layers_per_stage - job.recomputed_layers)
    per_microbatch += job.tokens_between_layers * job.model_config.hidden_size * parameter_bytes * job.recomputed_layers
    # A recomputed layer holds all its activations while its own backward pass runs.
    recomputed = kept.total if job.recomputed_layers else 0.0
    is_last = stage == job.pipeline_model_parallel_size - 1
    return Memory(
        weights=weights,
        fp8_copies=fp8_copy_bytes(job),
        gradients=gradients,
        optimizer=optimizer,
        activations=per_microbatch * in_flight + recomputed,
        logits=max(0.0, logit_bytes(job) - recomputed) if is_last else 0.0,  # held at another time than that layer's
        dispatcher=_dispatcher_bytes(job, kept.of_experts, in_flight),
        communication=CONTEXT_BYTES + COMMUNICATOR_BYTES * _num_communicators(job),
        headroom=headroom,
    )


def state_bytes(job: Job, stage: int) -> tuple[float, float, float]:
    """Weights, gradients and optimizer state of a rank.

    Its shard of a buffer is counted with the padding, for which the optimizer has no state: `Buffer.shard_numel` is
    the exact number of a given rank, this is an upper bound for all ranks.
    """
    number = job.number_bytes
    values = stage_values(job, stage)
    gradients = values.in_buffers * (4 if job.grad_reduce_in_fp32 else number)
    # With the distributed optimizer the weights are views into the padded buffer.
    weights, owned = (
        (values.in_buffers, values.in_shards) if job.use_distributed_optimizer else (values.of_parameters,) * 2
    )
    moments = sum({"fp32": 4, "bf16": 2}[kind] for kind in (job.exp_avg_dtype, job.exp_avg_sq_dtype))
    optimizer = owned * (moments + (_main_weight_bytes(job) if job.bf16 else 0))
    if job.optimizer == "muon":  # one moment, in fp32; routers count as AdamW's
        optimizer -= 4 * (values.in_matrix_shards if job.use_distributed_optimizer else values.of_matrices)
    return weights * number, gradients, optimizer


def _main_weight_bytes(job: Job) -> int:
    """Bytes of a main weight. Transformer Engine's precision-aware Adam keeps only the 16 bits that bf16 lacks; under
    FP8 other than delayed, megatron.core keeps it whole (`use_precision_aware_optimizer_no_fp8_or_ds_fp8`)."""
    return 2 if job.use_precision_aware_optimizer and job.fp8_recipe in ("none", "delayed") else 4


def microbatches_in_flight(job: Job, stage: int) -> float:
    """Micro-batches in flight, whose activations a stage holds: 1F1B, or interleaved (Narayanan et al. 2021)."""
    pp, virtual = job.pipeline_model_parallel_size, job.num_virtual_stages_per_pipeline_rank
    if virtual == 1:
        return min(job.num_microbatches, pp - stage)
    chunks = (pp - stage - 1) * 2 + (virtual - 1) * pp + 1
    return min(job.num_microbatches * virtual, chunks) / virtual


def logit_bytes(job: Job) -> float:
    """Peak memory of LM head and loss for a micro-batch with every position masked, as for t near 1.

    Follows model/chunked_cross_entropy.py, tensor by tensor. The hidden states are saved for the backward pass and get
    a gradient. A chunk's logits are overwritten by their gradient, and their memory is reused by the next chunk. The
    weight's gradient is accumulated in megatron's buffer if that is fp32, otherwise in a separate one that is returned
    to autograd after the last chunk.
    """
    a, rows, number = job.model_config, job.tokens, job.number_bytes
    vocabulary = a.vocab_size // job.tensor_model_parallel_size
    if job.whole_logits:
        return rows * (vocabulary * WHOLE_LOGIT_BYTES + a.hidden_size * number)
    chunk = rows_per_chunk(vocabulary, "cuda")
    weight = vocabulary * a.hidden_size
    summed_apart = 0 if job.grad_reduce_in_fp32 or not job.bf16 else 4 * weight
    of_a_chunk = min(rows, chunk) * vocabulary * number
    return 2 * rows * a.hidden_size * number + summed_apart + max(of_a_chunk, weight * number)


def fp8_copy_bytes(job: Job) -> float:
    """FP8 or FP4 copies of the layers' weights, row- and column-wise, kept with the bf16 ones for all micro-batches."""
    if not job.quantizes:
        return 0.0
    # With FP8 parameters the copies are the weights: there are no bf16 ones.
    return stage_values(job, 0).of_matrices * (
        2 * job.operand_bytes - (job.number_bytes if job.fp8_param_gather else 0)
    )


def _dispatcher_bytes(job: Job, expert_activations: float, in_flight: float) -> float:
    a = job.model_config
    if not a.is_moe:
        return 0.0
    row = a.hidden_size * job.number_bytes
    sent, received = job.routed_rows, job.received_rows
    moving = 2 * (sent + received) * row  # tokens and their gradient, sent and received
    if job.overlap_moe_expert_parallel_comm:
        moving *= 2  # those of another micro-batch at the same time
    layers = job.layers_per_stage - job.recomputed_layers
    return moving + (received / sent - 1) * expert_activations * max(1, layers) * in_flight


def _num_communicators(job: Job) -> int:
    sizes = (
        job.world_size, job.tensor_model_parallel_size, job.pipeline_model_parallel_size, job.context_parallel_size,
        job.expert_model_parallel_size, job.expert_tensor_parallel_size, job.dense_replicas, job.expert_replicas,
    )  # fmt: skip
    return sum(size > 1 for size in sizes)


def check_memory(config: RunConfig, model_config: ModelConfig, processes: int, cluster: Cluster | None) -> None:
    """UserError if the modelled memory exceeds that of the cluster's GPUs, before a job is queued."""
    if cluster is None:
        return
    need = memory(job_of(config, model_config, processes, cluster), cluster)
    if need.total > cluster.memory_bytes:
        largest = sorted(need._asdict().items(), key=lambda part: -part[1])[:3]
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in largest)
        raise UserError(
            f"--cluster: a {cluster.gpu} has {cluster.memory_gib:.1f} GiB, the run needs {need.total / 2**30:.1f} "
            f"({parts}, ...); python -m megatron_a2d.plan finds layouts that fit"
        )
