"""Seconds of a step by part: first the work in operations and bytes, then what a GPU makes of it.

`layer_work` counts what one micro-batch asks of a layer on one rank, forward and backward. `step_time` divides each
count by a peak rate of the cluster times an efficiency (calibration.py has them, fitted to published runs) and adds
what the head, a pipeline, the gradients' reduction and the optimizer take.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from megatron_a2d.model.logits_chunks import rows_per_chunk
from megatron_a2d.planner.cluster import Cluster
from megatron_a2d.planner.memory import microbatches_in_flight, state_bytes
from megatron_a2d.planner.parameters import stage_buffers
from megatron_a2d.planner.workload import Job

# Positions of a step that reach the head: one half under a linear schedule, all of them for next-token prediction.
MASKED_FRACTION = 0.5
# Attention's backward pass computes the scores again: 2.5 forwards instead of 2 (FlashAttention, Dao 2023).
ATTENTION_BACKWARD = 2.5
# Parts of the gradients' reduction and of the weights' gathering that the overlap settings do not hide. An assumption.
EXPOSED_WITH_OVERLAP = 0.1
# Part of a MoE layer's launches that graphs of attention, router and preprocessing leave to the host. An assumption.
GRAPHS_LEAVE = 0.5


class Efficiencies(NamedTuple):
    """Parts of the peak rates that are reached, and what the host takes; calibration.py says from where."""

    matmul_bf16: float
    matmul_fp8: float  # of the FP8 rate, casts not counted
    attention: float  # of the bf16 rate
    memory: float
    nvlink: float
    network: float
    blackwell: float  # factor on the four rates above where the GPU is a Blackwell: a smaller part of a higher peak
    moe_sync: float  # seconds that a GPU waits in a MoE layer, while the host learns how many rows came
    launch_moe: float  # seconds to launch a MoE layer's kernels, forward and backward
    launch_dense: float

    def on(self, cluster: Cluster) -> Efficiencies:
        """Those of a cluster's GPUs."""
        if not cluster.is_blackwell:
            return self
        reached = {name: getattr(self, name) * self.blackwell for name in self._fields[:4]}
        return self._replace(**reached)


class Work(NamedTuple):
    """What a micro-batch asks of one layer on one rank, forward and backward; bytes are those that leave the rank."""

    matmul: float  # operations
    attention: float  # operations
    memory: float  # bytes read and written between the products
    expert_nvlink: float
    expert_network: float
    tensor_nvlink: float
    tensor_network: float
    context_nvlink: float
    context_network: float


class LayerTime(NamedTuple):
    """Seconds of one layer and micro-batch; the fields are those of `StepTime`."""

    matmul: float
    attention: float
    memory: float
    expert_nvlink: float
    expert_network: float
    tensor: float
    context: float
    host: float


class StepTime(NamedTuple):
    """Seconds of one step."""

    matmul: float
    attention: float
    memory: float  # norms, activations, permutation: bound by memory bandwidth
    head: float
    expert_nvlink: float  # all-to-all inside the NVLink domain
    expert_network: float  # and across its border
    tensor: float
    context: float
    host: float  # the GPU waits for kernel launches
    bubble: float
    pipeline: float  # activations sent from stage to stage
    data: float  # gradients reduced, weights gathered
    optimizer: float

    @property
    def total(self) -> float:
        return sum(self)


def _weight_traffic(job: Job) -> float:
    """Bytes of a layer's weights, read forward and backward, and of their gradients, read and written."""
    a = job.architecture
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    values = a.hidden_size * (2 * queries + 2 * keys) / job.tensor_model_parallel_size
    if a.is_moe:
        ranks = job.expert_model_parallel_size * job.expert_tensor_parallel_size
        values += 3 * a.hidden_size * a.moe_intermediate_size * a.num_experts / ranks
    else:
        values += 3 * a.hidden_size * a.intermediate_size / job.tensor_model_parallel_size
    weight, gradient = (2 if job.fp8_recipe == "none" else 1), (4 if job.grad_reduce_in_fp32 else 2)
    return values * (2 * weight + 2 * gradient)


@functools.lru_cache(4096)
def layer_work(job: Job, nvlink_domain: int) -> Work:
    """One layer, one micro-batch, one rank, on average over layers (those that are computed again count more)."""
    a, tp = job.architecture, job.tensor_model_parallel_size
    tokens, between = job.tokens, job.tokens_between_layers
    share = job.recomputed_layers / job.layers_per_stage
    passes = 3 + share  # forward, twice as much backward, and the recomputed forward
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    projections = a.hidden_size * (2 * queries + 2 * keys) / tp * tokens
    if a.is_moe:
        weights_met = 3 * a.hidden_size * a.moe_intermediate_size / job.expert_tensor_parallel_size
        mlp = weights_met * job.routed_rows * job.imbalance + between * a.hidden_size * a.num_experts
    else:
        mlp = 3 * a.hidden_size * a.intermediate_size / tp * tokens
    keys_met = job.seq_length / 2 if job.is_causal else job.input_length
    attention = 4 * queries / tp * keys_met * tokens * (1 + share + ATTENTION_BACKWARD)
    attention *= 1 + job.recomputes("core_attn") / (1 + ATTENTION_BACKWARD)
    mlp_passes = passes + job.recomputes("moe" if a.is_moe else "mlp")
    expert = _all_to_all(job, nvlink_domain)
    gathered = between * a.hidden_size * 2 * (tp - 1) * (4 + share * 2)  # all-gather and reduce-scatter, twice a layer
    gathered += between * a.hidden_size * 2 * (tp - 1) * 2  # and the inputs again for the weights' gradients
    if a.is_moe:
        gathered /= 2  # only attention is divided by TP
    cp = job.context_parallel_size
    exchanged = tokens * 2 * keys / tp * 2 * (cp - 1) * 3  # keys and values gathered; their gradients in fp32
    tensor_inside, context_inside = tp <= nvlink_domain, tp * cp <= nvlink_domain
    return Work(
        matmul=2 * (projections * passes + mlp * mlp_passes),
        attention=attention,
        memory=_memory_traffic(job) * (3 + share) / 3 + _weight_traffic(job),
        expert_nvlink=expert[0] * mlp_passes,
        expert_network=expert[1] * mlp_passes,
        tensor_nvlink=gathered if tensor_inside else 0.0,
        tensor_network=0.0 if tensor_inside else gathered,
        context_nvlink=exchanged if context_inside else 0.0,
        context_network=0.0 if context_inside else exchanged,
    )


def _all_to_all(job: Job, nvlink_domain: int) -> tuple[float, float]:
    """Bytes over NVLink and over the network that a rank sends in a layer's forward pass, times 2/3.

    Dispatch and combine move the same rows, forward and backward: with `passes` = 3 that makes four of them.
    """
    a, ep = job.architecture, job.expert_model_parallel_size
    ranks = ep * job.expert_tensor_parallel_size
    if not a.is_moe or ranks == 1:
        return 0.0, 0.0
    # Expert-parallel ranks are neighbours, tensor-parallel ones the nearest; a domain holds so many of them.
    inside = min(ranks, nvlink_domain)
    nodes = ranks / inside
    rows, k = job.tokens_between_layers, a.num_experts_per_tok
    row = a.hidden_size * 2 * 2 * 2 / 3
    if job.moe_token_dispatcher_type == "allgather":
        copies_inside, copies_outside = inside - 1.0, ranks - inside + 0.0
    elif job.moe_token_dispatcher_type == "flex":
        # A token travels once to each rank that wants it, and once to each domain.
        copies_inside = inside * (1 - (1 - 1 / inside) ** (k / nodes)) * (1 - 1 / inside) * nodes
        copies_outside = (nodes - 1) * (1 - (1 - 1 / nodes) ** k)
    else:
        copies_inside, copies_outside = k * (inside - 1) / ranks, k * (1 - inside / ranks)
    return rows * copies_inside * row * job.imbalance, rows * copies_outside * row * job.imbalance


def _memory_traffic(job: Job) -> float:
    """Bytes that the kernels between the products read and write in a layer, forward and backward."""
    a, tp = job.architecture, job.tensor_model_parallel_size
    tokens, between = job.tokens, job.tokens_between_layers
    queries, keys = a.num_attention_heads * a.head_dim / tp, a.num_key_value_heads * a.head_dim / tp
    # Two norms and two residual sums: read and write forward, three such passes backward.
    values = between * a.hidden_size * (2 * 2 + 2 * 3) * 2
    values += tokens * (queries + keys) * (2 * 2 + 2 * 3)  # norms and rotation of queries and keys
    values += tokens * (queries + 2 * keys) * 4  # cutting them apart, and together again
    # Casts to FP8 read two bytes and write two, by rows and by columns: products' inputs, and their outputs' gradients.
    casts = 0.0 if job.fp8_recipe == "none" or job.fused_kernels else 2.0
    values += casts * (2 * between * a.hidden_size + tokens * (2 * queries + 2 * keys))
    if not a.is_moe:
        width = a.intermediate_size / tp
        return 2 * (values + tokens * width * (3 + 5) + casts * (2 * between * a.hidden_size + 3 * tokens * width))
    values += between * a.num_experts * 2 * 10  # router, in fp32
    width = a.moe_intermediate_size / job.expert_tensor_parallel_size
    rows = job.routed_rows * job.imbalance
    # Rows are sorted for the journey and again by expert, forward and backward; fused kernels sort on the way.
    moves = 4 if job.fused_kernels or job.moe_token_dispatcher_type == "flex" else 8
    values += rows * a.hidden_size * 2 * moves
    values += 0.0 if job.fused_kernels else rows * width * (3 + 5)  # SwiGLU, forward and backward
    values += casts * rows * (2 * a.hidden_size + 3 * width)
    return 2 * values


def step_time(job: Job, cluster: Cluster, use: Efficiencies) -> StepTime:
    """A step of `job` on `cluster`, on the critical path through the pipeline."""
    use = use.on(cluster)
    layer = layer_time(job, cluster, use)
    layers, microbatches = job.layers_per_stage, job.num_microbatches
    part = {name: seconds * layers * microbatches for name, seconds in layer._asdict().items()}
    pp = job.pipeline_model_parallel_size
    # The last stage has the head on top, and the others wait for it. Where layers do not divide evenly (not in our own
    # layouts) the first and the last stage have fewer of them.
    fewer = (pp * layers - job.architecture.num_layers) / 2
    head = max(0.0, _head_time(job, cluster, use) - fewer * sum(layer))
    stage = sum(layer) * layers
    bubble = (pp - 1) / job.num_virtual_stages_per_pipeline_rank * (stage + head / pp)
    sent = job.tokens_between_layers * job.architecture.hidden_size * 2 * 2 * job.num_virtual_stages_per_pipeline_rank
    per_stage = job.world_size // pp
    bandwidth = cluster.nvlink_gb_per_s * use.nvlink
    if per_stage * pp > cluster.nvlink_domain:
        bandwidth = cluster.network_gb_per_s * use.network
    visible = EXPOSED_WITH_OVERLAP if job.overlap_p2p_comm else 1.0
    pipeline = visible * sent * microbatches / (bandwidth * 1e9) if pp > 1 else 0.0
    return StepTime(
        **part,
        head=head * microbatches,
        bubble=bubble,
        pipeline=pipeline,
        data=_data_time(job, cluster, use),
        optimizer=_optimizer_time(job, cluster, use),
    )


def layer_time(job: Job, cluster: Cluster, use: Efficiencies) -> LayerTime:
    """`use` are the efficiencies on this cluster."""
    work = layer_work(job, cluster.nvlink_domain)
    nvlink, network = cluster.nvlink_gb_per_s * 1e9 * use.nvlink, cluster.network_gb_per_s * 1e9 * use.network
    rate, efficiency = cluster.bf16_tflops, use.matmul_bf16
    if job.fp8_recipe != "none":
        rate, efficiency = cluster.fp8_tflops, use.matmul_fp8
    seconds = [
        work.matmul / (rate * 1e12 * efficiency),
        work.attention / (cluster.bf16_tflops * 1e12 * use.attention),
        work.memory / (cluster.memory_gb_per_s * 1e9 * use.memory),
        work.expert_nvlink / nvlink,
        work.expert_network / network,
        work.tensor_nvlink / nvlink + work.tensor_network / network,
        work.context_nvlink / nvlink + work.context_network / network,
    ]
    if job.tp_comm_overlap:
        seconds[5] *= EXPOSED_WITH_OVERLAP
    if job.overlap_moe_expert_parallel_comm:
        # Another micro-batch computes meanwhile: what is longer than that stays visible, and so do the forward passes
        # before the first backward pass, and as many backward passes after the last forward pass.
        computing, travelling = sum(seconds[:3]), seconds[3] + seconds[4]
        alone = min(1.0, microbatches_in_flight(job, 0) / job.num_microbatches)
        hidden = min(travelling, computing) * (1 - EXPOSED_WITH_OVERLAP) * (1 - alone)
        seconds[3:5] = [part * (1 - hidden / travelling) if travelling else 0.0 for part in seconds[3:5]]
    return LayerTime(*seconds, _host_time(job, use, sum(seconds)))  # type: ignore[call-arg]


def _host_time(job: Job, use: Efficiencies, busy: float) -> float:
    """Seconds that the GPU, `busy` in a layer for so long, waits for the host.

    A step that is one graph waits for nothing. Else the host launches ahead of the GPU, unless it is slower or must
    wait for numbers of rows. Graphs record all of a dense layer and, of a MoE layer, what precedes the experts.
    """
    if job.cuda_graph_impl == "full":
        return 0.0
    is_moe = job.architecture.is_moe
    launches = use.launch_moe if is_moe else use.launch_dense
    if job.cuda_graph_impl != "none":
        launches *= GRAPHS_LEAVE if is_moe else 0.0
    again = 1 + job.recomputed_layers / job.layers_per_stage / 3
    return max(0.0, launches * again - busy) + (use.moe_sync * again if is_moe else 0.0)


def _head_time(job: Job, cluster: Cluster, use: Efficiencies) -> float:
    """Seconds of the head and the loss for a micro-batch, in bf16, spread over the stages as a pipeline spreads it."""
    a = job.architecture
    rows = job.tokens * job.seq_length / job.input_length * (1.0 if job.is_causal else MASKED_FRACTION)
    vocabulary = a.vocab_size / job.tensor_model_parallel_size
    if job.whole_logits:
        products = 3  # forward, and the gradients of rows and weights
        # Written in bf16, read and written in fp32 by each of the loss's passes, and back.
        moved = rows * vocabulary * (2 + 4 * 8)
    else:
        products = 4  # backward makes the logits again (masked_head.py)
        # Forward they are written and read twice, for the maximum and the sum; backward written, read, and replaced by
        # their gradient, in bf16 throughout. Each chunk is added to the weight's fp32 gradient.
        chunks = math.ceil(rows / rows_per_chunk(round(vocabulary), "cuda"))
        moved = vocabulary * (rows * 2 * 6 + chunks * a.hidden_size * 2 * 4)
    operations = products * 2 * rows * vocabulary * a.hidden_size
    seconds = operations / (cluster.bf16_tflops * 1e12 * use.matmul_bf16)
    return seconds + moved / (cluster.memory_gb_per_s * 1e9 * use.memory)


def _data_time(job: Job, cluster: Cluster, use: Efficiencies) -> float:
    """Seconds to reduce the gradients and gather the weights of the first stage, ring by ring."""
    gradient, weight = (4 if job.grad_reduce_in_fp32 else 2), (1 if job.fp8_param_gather else 2 if job.bf16 else 4)
    seconds = 0.0
    for buffer in stage_buffers(job, 0):
        travelling = buffer.numel * (1 - 1 / buffer.replicas)
        # Replicas of a weight lie tp (or ep) ranks apart; those in one NVLink domain share their ways out of it.
        apart = job.world_size // job.pipeline_model_parallel_size // buffer.replicas
        bandwidth = cluster.nvlink_gb_per_s * 1e9 * use.nvlink
        if apart * buffer.replicas > cluster.nvlink_domain:
            ways_out = max(1, cluster.nvlink_domain // apart)
            bandwidth = min(bandwidth, ways_out * cluster.network_gb_per_s * 1e9 * use.network)
        exposed_reduce = EXPOSED_WITH_OVERLAP if job.overlap_grad_reduce else 1.0
        exposed_gather = EXPOSED_WITH_OVERLAP if job.overlap_param_gather else 1.0
        if job.use_distributed_optimizer:
            seconds += travelling * (gradient * exposed_reduce + weight * exposed_gather) / bandwidth
        else:
            seconds += 2 * travelling * gradient * exposed_reduce / bandwidth
    return seconds


def _optimizer_time(job: Job, cluster: Cluster, use: Efficiencies) -> float:
    """Seconds to read and write the optimizer's state once, and the gradients twice (norm, update)."""
    _, gradients, optimizer = state_bytes(job, 0)
    share = job.dense_replicas if job.use_distributed_optimizer else 1
    return (2 * optimizer + 2 * gradients / share + gradients) / (cluster.memory_gb_per_s * 1e9 * use.memory)
