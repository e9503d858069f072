"""Bytes that a rank sends in a step, by kind: the counts behind the time model, compared with rehearsals."""

from __future__ import annotations

from typing import NamedTuple

from megatron_a2d.planner.parameters import stage_buffers
from megatron_a2d.planner.step_time import BF16, FP32, layer_work
from megatron_a2d.planner.workload import Job


class Traffic(NamedTuple):
    """Bytes that leave a rank in a step."""

    tensor: float  # all-gathers and reduce-scatters around attention and MLP, embedding and head
    context: float
    expert: float  # all-to-alls
    pipeline: float
    data: float  # gradient reduction and weight all-gather


def step_traffic(job: Job, stage: int) -> Traffic:
    """Traffic of a rank of this pipeline stage."""
    work = layer_work(job, nvlink_domain=job.world_size)
    passes = job.layers_per_stage * job.num_microbatches
    return Traffic(
        tensor=(work.tensor_nvlink + work.tensor_network) * passes + _tensor_bytes_of_ends(job, stage),
        context=(work.context_nvlink + work.context_network) * passes,
        expert=(work.expert_nvlink + work.expert_network) * passes,
        pipeline=_pipeline_bytes(job, stage),
        data=sum(_data_bytes(job, stage)),
    )


def _tensor_bytes_of_ends(job: Job, stage: int) -> float:
    """Tensor-parallel traffic of embedding and LM head, with a loss at every position."""
    tp, hidden = job.tensor_model_parallel_size, job.model_config.hidden_size * job.number_bytes
    sent = 0.0
    if stage == 0:  # scattered forward, gathered backward
        sent += 2 * (tp - 1) * job.tokens_between_layers * hidden
    if stage == job.pipeline_model_parallel_size - 1:
        sent += (tp - 1) * job.tokens_between_layers * hidden * job.sequence_parallel
        sent += (
            2 * (tp - 1) / tp * job.tokens * hidden
        )  # the gradient of its input, summed over the vocabulary's shards
        sent += (tp - 1) * job.tokens * 4 * FP32  # statistics of each position
    return sent * job.num_microbatches


def _pipeline_bytes(job: Job, stage: int) -> float:
    """Activations to the next stage, gradients to the one before, of every virtual stage."""
    pp, virtual = job.pipeline_model_parallel_size, job.num_virtual_stages_per_pipeline_rank
    if pp == 1:
        return 0.0
    forward = virtual - (stage == pp - 1)  # the model's last stage sends nothing on
    backward = virtual - (stage == 0)
    tensor = job.tokens_between_layers * job.model_config.hidden_size * job.number_bytes
    return tensor * (forward + backward) * job.num_microbatches


def _data_bytes(job: Job, stage: int) -> list[float]:
    gradient = FP32 if job.grad_reduce_in_fp32 else BF16
    weight = 1 if job.fp8_param_gather else job.number_bytes
    sent = []
    for buffer in stage_buffers(job, stage):
        numbers = buffer.numel * (1 - 1 / buffer.replicas)
        sent.append(numbers * (gradient + weight if job.use_distributed_optimizer else 2 * gradient))
    return sent
