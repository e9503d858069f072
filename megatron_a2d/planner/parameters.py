"""Sizes of the tensors on a rank: weights by name, megatron.core's gradient buffers, and the optimizer's shards.

The layout of a buffer is that of megatron.core's `_ParamAndGradBuffer`: parameters in reverse order, and with the
distributed optimizer each parameter aligned to 64 elements and each bucket padded to a multiple of lcm(replicas, 128).
Matrices that Muon updates are then in buffers of their own, where each is in one rank's shard (0.19.2's
`LayerWiseDistributedOptimizer`): the largest first, each to the shard that has least.
tests/unit/test_planner_memory.py compares every number with what the training code allocates.
"""

from __future__ import annotations

import functools
import heapq
import math
from typing import NamedTuple

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.planner.workload import Job


class Parameter(NamedTuple):
    """A weight on one rank: its name in the model chunk, its number of elements, and whether it belongs to an expert.

    The experts of a layer have one entry per matrix (two): `local_experts.*` in `copies`, or a stacked tensor.
    """

    name: str
    numel: int
    is_expert: bool = False
    is_shared_embedding: bool = False
    copies: int = 1

    @property
    def total(self) -> int:
        return self.numel * self.copies


class Bucket(NamedTuple):
    """A part of a buffer that is reduced in one collective; offsets count elements from the buffer's start."""

    start: int
    end: int
    parameters: tuple[tuple[Parameter, int], ...]  # with their offsets


class _Sizes(NamedTuple):
    """Settings that determine the tensors of a rank; hashable, so that they can be cached."""

    model_config: ModelConfig
    tensor: int
    pipeline: int
    virtual: int
    expert: int
    expert_tensor: int
    stacked_experts: bool  # local layers hold a layer's experts as two stacked tensors if they use one batched GEMM


def stage_parameters(job: Job, stage: int) -> tuple[tuple[Parameter, ...], ...]:
    """The parameters of each model chunk of a pipeline stage, in the order of megatron's modules."""
    sizes = _sizes(job)
    return tuple(_chunk_parameters(sizes, *_ends(sizes, stage, chunk)) for chunk in range(sizes.virtual))


def _sizes(job: Job) -> _Sizes:
    return _Sizes(
        job.model_config,
        job.tensor_model_parallel_size,
        job.pipeline_model_parallel_size,
        job.num_virtual_stages_per_pipeline_rank,
        job.expert_model_parallel_size,
        job.expert_tensor_parallel_size,
        job.transformer_impl == "local" and job.moe_grouped_gemm and job.optimizer != "muon",
    )


def _ends(sizes: _Sizes, stage: int, chunk: int) -> tuple[bool, bool]:
    """Whether a chunk is the model's first, and whether it is its last."""
    return stage == chunk == 0, stage == sizes.pipeline - 1 and chunk == sizes.virtual - 1


@functools.lru_cache(1024)
def _chunk_parameters(sizes: _Sizes, is_first: bool, is_last: bool) -> tuple[Parameter, ...]:
    a = sizes.model_config
    embedding = a.vocab_size // sizes.tensor * a.hidden_size
    tied = a.tie_word_embeddings
    found = []
    if is_first:
        found.append(Parameter("embedding.word_embeddings.weight", embedding, False, tied and sizes.pipeline > 1))
    for layer in range(a.num_layers // (sizes.pipeline * sizes.virtual)):
        found += _layer_parameters(sizes, f"decoder.layers.{layer}")
    if is_last:
        found.append(Parameter("decoder.final_layernorm.weight", a.hidden_size))
    if is_last and not (tied and is_first):  # the last stage of a model with tied embeddings has its own copy
        found.append(Parameter("output_layer.weight", embedding, False, tied))
    return tuple(found)


def _layer_parameters(sizes: _Sizes, prefix: str) -> list[Parameter]:
    a = sizes.model_config
    heads, groups = (
        a.num_attention_heads * a.head_dim // sizes.tensor,
        a.num_key_value_heads * a.head_dim // sizes.tensor,
    )
    found = [
        Parameter(f"{prefix}.input_layernorm.weight", a.hidden_size),
        Parameter(f"{prefix}.self_attention.linear_proj.weight", a.hidden_size * heads),
        Parameter(f"{prefix}.self_attention.linear_qkv.weight", a.hidden_size * (heads + 2 * groups)),
    ]
    if a.add_qkv_bias:
        found.append(Parameter(f"{prefix}.self_attention.linear_qkv.bias", heads + 2 * groups))
    if a.qk_layernorm:
        found.append(Parameter(f"{prefix}.self_attention.q_layernorm.weight", a.head_dim))
        found.append(Parameter(f"{prefix}.self_attention.k_layernorm.weight", a.head_dim))
    found.append(Parameter(f"{prefix}.pre_mlp_layernorm.weight", a.hidden_size))
    if not a.is_moe:
        width = a.intermediate_size // sizes.tensor
        return [
            *found,
            Parameter(f"{prefix}.mlp.linear_fc1.weight", 2 * width * a.hidden_size),
            Parameter(f"{prefix}.mlp.linear_fc2.weight", width * a.hidden_size),
        ]
    width = a.moe_intermediate_size // sizes.expert_tensor
    found.append(Parameter(f"{prefix}.mlp.router.weight", a.num_experts * a.hidden_size))
    copies = a.num_experts // sizes.expert
    if sizes.stacked_experts:
        name = f"{prefix}.mlp.experts"
        found.append(Parameter(f"{name}.weight1", copies * 2 * width * a.hidden_size, True))
        found.append(Parameter(f"{name}.weight2", copies * width * a.hidden_size, True))
        return found
    name = f"{prefix}.mlp.experts.local_experts.*"
    found.append(Parameter(f"{name}.linear_fc1.weight", 2 * width * a.hidden_size, True, copies=copies))
    found.append(Parameter(f"{name}.linear_fc2.weight", width * a.hidden_size, True, copies=copies))
    return found


class Buffer(NamedTuple):
    """A contiguous buffer of gradients and, with the distributed optimizer, of weights."""

    buckets: tuple[Bucket, ...]
    replicas: int  # ranks over which it is reduced
    has_whole_matrices: bool = False  # no parameter is in two ranks' shards; for Muon

    @property
    def numel(self) -> int:
        return self.buckets[-1].end

    @property
    def holds_experts(self) -> bool:
        return self.buckets[0].parameters[0][0].is_expert

    def shard_numel(self, rank: int) -> int:
        """Parameter elements in the shard that replica `rank` updates, without padding."""
        total = 0
        for bucket in self.buckets:
            size = (bucket.end - bucket.start) // self.replicas
            first, last = bucket.start + rank * size, bucket.start + (rank + 1) * size
            for parameter, offset in bucket.parameters:
                if offset >= last:
                    break
                total += max(0, min(last, offset + parameter.total) - max(first, offset))
        return total


class Values(NamedTuple):
    """Numbers of elements that a rank of a stage holds."""

    of_parameters: int
    of_matrices: int  # the layers' linear weights, of which FP8 keeps copies, and which Muon updates
    in_buffers: int  # including padding
    in_shards: int  # of the buffers, updated by this rank with the distributed optimizer
    in_matrix_shards: int  # of those in_shards that Muon updates


def stage_buffers(job: Job, stage: int) -> tuple[Buffer, ...]:
    """The buffers of a stage: one for the dense weights of each chunk, and one for its experts; another for its dense
    matrices with Muon and the distributed optimizer."""
    return tuple(buffer for key in _chunk_keys(job, stage) for buffer in _chunk_buffers(key))


def stage_values(job: Job, stage: int) -> Values:
    """Sums over a stage's parameters and buffers."""
    chunks = [_chunk_values(key) for key in _chunk_keys(job, stage)]
    return Values(*map(sum, zip(*chunks, strict=True)))


class _ChunkKey(NamedTuple):
    """Cache key: the settings that determine the buffers of a chunk, shared by jobs and stages that agree on them."""

    sizes: _Sizes
    is_first: bool
    is_last: bool
    replicas: tuple[int, int]  # of dense weights, of experts
    distributed: bool
    whole_matrices: bool
    limit: int | None  # elements after which a bucket is full


def _chunk_keys(job: Job, stage: int) -> list[_ChunkKey]:
    sizes, replicas = _sizes(job), (job.dense_replicas, job.expert_replicas)
    # megatron.core uses the dense group's size for both kinds, and one bucket on all stages and chunks but the first.
    limit = max(40_000_000, 1_000_000 * replicas[0]) if job.overlap_grad_reduce and stage == 0 else None
    distributed = job.use_distributed_optimizer
    divided = distributed, distributed and job.optimizer == "muon"
    return [
        _ChunkKey(sizes, *_ends(sizes, stage, chunk), replicas, *divided, None if chunk else limit)
        for chunk in range(sizes.virtual)
    ]


@functools.lru_cache(1024)
def _chunk_values(key: _ChunkKey) -> Values:
    parameters, buffers = _chunk_parameters(key.sizes, key.is_first, key.is_last), _chunk_buffers(key)
    return Values(
        of_parameters=sum(parameter.total for parameter in parameters),
        of_matrices=sum(parameter.total for parameter in parameters if _is_matrix(parameter)),
        in_buffers=sum(buffer.numel for buffer in buffers),
        in_shards=sum(buffer.numel // buffer.replicas for buffer in buffers),
        in_matrix_shards=sum(buffer.numel // buffer.replicas for buffer in buffers if buffer.has_whole_matrices),
    )


def _is_matrix(parameter: Parameter) -> bool:
    return ".linear_" in parameter.name and not parameter.name.endswith(".bias")


@functools.lru_cache(1024)
def _chunk_buffers(key: _ChunkKey) -> tuple[Buffer, ...]:
    buffers = []
    parameters = _chunk_parameters(key.sizes, key.is_first, key.is_last)
    for is_expert, whole in ((False, False), (False, True), (True, False), (True, True)):
        own = [
            parameter
            for parameter in parameters
            if parameter.is_expert == is_expert and (key.whole_matrices and _is_matrix(parameter)) == whole
        ]
        if own:
            replicas = key.replicas[is_expert]
            buffers.append(
                _matrix_buffer(own, replicas, key.limit)
                if whole
                else _buffer(own, replicas, key.distributed, key.limit)
            )
    return tuple(buffers)


def _matrix_buffer(parameters: list[Parameter], replicas: int, limit: int | None) -> Buffer:
    """A buffer of whole matrices: each bucket is divided into equal shards, as large as the fullest one."""
    divisor = math.lcm(64, math.lcm(replicas, 128) // replicas)
    buckets: list[Bucket] = []
    pending: list[Parameter] = []
    start = size = largest = 0

    def close() -> None:
        nonlocal start, size, largest, pending
        shards = [(0, rank) for rank in range(replicas)]  # a heap: end of what it has, rank
        placed = []
        for parameter in sorted(pending, key=lambda parameter: -parameter.numel):
            end, rank = heapq.heappop(shards)
            offset = _pad(end, 64)
            placed.append((rank, offset, parameter))
            heapq.heappush(shards, (offset + parameter.numel, rank))
        shard = _pad(max(shards)[0], divisor)
        offsets = sorted((start + rank * shard + offset, number) for number, (rank, offset, _) in enumerate(placed))
        found = tuple((placed[number][2], offset) for offset, number in offsets)
        buckets.append(Bucket(start, start + replicas * shard, found))
        start, size, largest, pending = start + replicas * shard, 0, 0, []

    for parameter in reversed(parameters):
        for _ in range(parameter.copies):
            pending.append(parameter._replace(copies=1))
            size, largest = size + parameter.numel, max(largest, parameter.numel)
            # A shard holds the largest matrix, so that a bucket with few of them would be padding for the most part.
            if limit is not None and size >= max(limit, int(0.9 * replicas * largest)):
                close()
    if pending:
        close()
    return Buffer(tuple(buckets), replicas, has_whole_matrices=True)


def _buffer(parameters: list[Parameter], replicas: int, distributed: bool, limit: int | None) -> Buffer:
    buckets: list[Bucket] = []
    pending: list[tuple[Parameter, int]] = []
    start = end = 0

    def close() -> None:
        nonlocal start, end, pending
        end = _pad(end, math.lcm(replicas, 128)) if distributed else end
        buckets.append(Bucket(start, end, tuple(pending)))
        start, pending = end, []

    for parameter in reversed(parameters):
        end = _pad(end, 64) if distributed else end
        alone = parameter.is_shared_embedding and distributed
        if alone and pending:
            close()
        pending.append((parameter, end))
        end += (
            parameter.total if not distributed else _pad(parameter.numel, 64) * (parameter.copies - 1) + parameter.numel
        )
        if alone or (limit is not None and end - start >= limit):
            close()
    if pending:
        close()
    return Buffer(tuple(buckets), replicas)


def _pad(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor
