"""Seconds of a training step by component, from counts of operations and bytes and a cluster's peak rates.

`layer_work` counts the work of one micro-batch in one layer on one rank, forward and backward. `step_time` divides each
count by a peak rate of the cluster times an efficiency (fitted to published runs: calibration.py) and adds the LM head,
the pipeline, the data-parallel communication and the optimizer.

    term       formula                                                          source
    matmul     2 x multiply-adds x passes / FLOP/s                              passes: 1 forward, 2 backward, recompute
    attention  4 x tokens x keys x head sizes x (1 + 2.5 backward) / FLOP/s     FlashAttention, Dao 2023
    memory     bytes of norms, activations, casts, weights / memory bandwidth   counted per kernel below
    head       3 or 4 products of tokens x hidden x vocabulary                  model/chunked_cross_entropy.py
    expert_*   4 all-to-alls (dispatch, combine; forward, backward)             megatron.core token dispatchers
    tensor     all-gather and reduce-scatter around each block                  Korthikanti et al. 2022
    context    keys and values all-gathered, gradients reduced in fp32          model/local_layers.py
    host       kernel launches longer than the GPU's work, and MoE syncs        calibration.py
    bubble     (pp - 1) / virtual stages x time of one micro-batch              interleaved 1F1B, Narayanan et al. 2021
    pipeline   activations and their gradients between stages / bandwidth
    data       ring reduce-scatter and all-gather: bytes x (1 - 1 / replicas)   megatron.core distributed optimizer
    optimizer  state read and written, gradients read twice / memory bandwidth; Muon's Newton-Schulz products / FLOP/s
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from megatron_a2d.model.logits_chunks import rows_per_chunk
from megatron_a2d.planner.cluster import Cluster
from megatron_a2d.planner.memory import microbatches_in_flight, state_bytes
from megatron_a2d.planner.newton_schulz import orthogonalization_operations
from megatron_a2d.planner.parameters import stage_buffers
from megatron_a2d.planner.workload import Job

BF16 = 2  # bytes per number
FP32 = 4
# A layer's forward pass counts as one pass, its backward pass as two (gradients of inputs and of weights).
PASSES = 3
ALL_TO_ALLS = 4  # dispatch and combine, forward and backward
# Numbers that a normalisation or a residual sum reads and writes: 2 forward, 3 backward.
ELEMENTWISE = 2 + 3
SWIGLU = 3 + 5  # numbers that SwiGLU reads and writes per output: forward, backward
LOSS_PASSES = 8  # reads and writes of unchunked logits in fp32, forward and backward. An assumption.
# Share of positions that reach the head: one half under a linear schedule, all of them for next-token prediction.
MASKED_FRACTION = 0.5
# Attention's backward pass recomputes the scores: 2.5 forward passes instead of 2 (FlashAttention, Dao 2023).
ATTENTION_BACKWARD = 2.5
# Share of communication that remains exposed with the overlap settings. An assumption.
EXPOSED_WITH_OVERLAP = 0.1
# Share of a MoE layer's launches outside the CUDA graphs of attention, router and preprocessing. An assumption.
LAUNCHES_OUTSIDE_GRAPHS = 0.5


class Efficiencies(NamedTuple):
    """Achieved shares of the peak rates, and host times; fitted in calibration.py."""

    matmul_bf16: float
    matmul_fp8: float  # share of the FP8 rate, casts not counted
    matmul_fp4: float  # share of the FP4 rate, casts not counted
    attention: float  # share of the bf16 rate
    memory: float
    nvlink: float
    network: float
    blackwell: float  # factor on the first five for Blackwell GPUs: a smaller share of a higher peak
    moe_sync: float  # seconds per MoE layer that the GPU waits for the device-to-host sync of tokens per expert
    launch_moe: float  # seconds to launch a MoE layer's kernels, forward and backward
    launch_dense: float

    def on(self, cluster: Cluster) -> Efficiencies:
        """The efficiencies on a cluster's GPUs."""
        if not cluster.is_blackwell:
            return self
        reached = {name: getattr(self, name) * self.blackwell for name in self._fields[:5]}
        return self._replace(**reached)


class Work(NamedTuple):
    """Work of one micro-batch in one layer on one rank, forward and backward; the last six are bytes sent."""

    matmul: float  # operations
    attention: float  # operations
    memory: float  # bytes read and written between the matrix products
    expert_nvlink: float
    expert_network: float
    tensor_nvlink: float
    tensor_network: float
    context_nvlink: float
    context_network: float


class LayerTime(NamedTuple):
    """Seconds of one layer and micro-batch; see `StepTime` for the fields."""

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
    memory: float  # norms, activations, token permutation: bound by memory bandwidth
    head: float
    expert_nvlink: float  # all-to-all inside the NVLink domain
    expert_network: float  # all-to-all between NVLink domains
    tensor: float
    context: float
    host: float  # the GPU waits for kernel launches and syncs
    bubble: float
    pipeline: float  # activations sent between stages
    data: float  # gradient reduction and weight all-gather
    optimizer: float

    @property
    def total(self) -> float:
        return sum(self)


def _weight_traffic(job: Job) -> float:
    """Bytes of a layer's weights, read forward and backward, and of their gradients, read and written once."""
    a = job.model_config
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    values = a.hidden_size * (2 * queries + 2 * keys) / job.tensor_model_parallel_size
    if a.is_moe:
        ranks = job.expert_model_parallel_size * job.expert_tensor_parallel_size
        values += 3 * a.hidden_size * a.moe_intermediate_size * a.num_experts / ranks
    else:
        values += 3 * a.hidden_size * a.intermediate_size / job.tensor_model_parallel_size
    weight, gradient = (job.operand_bytes if job.quantizes else BF16), (FP32 if job.grad_reduce_in_fp32 else BF16)
    return values * (2 * weight + 2 * gradient)


def _cast_bytes(job: Job) -> float:
    """Bytes that a cast of an input or output gradient moves per number: bf16 is read, two copies are written, row- and
    column-wise. NVFP4 reads twice: the amax of the tensor comes first (Transformer Engine, nvfp4_tensor.py)."""
    reads = 2 if job.fp4_recipe != "none" else 1
    return reads * BF16 + 2 * job.operand_bytes


@functools.lru_cache(4096)
def layer_work(job: Job, nvlink_domain: int) -> Work:
    """Work of one layer, averaged over layers (recomputed ones count more), and of the pass that counts loads."""
    a, tp = job.model_config, job.tensor_model_parallel_size
    tokens, between = job.tokens, job.tokens_between_layers
    again = job.recomputed_layers / job.layers_per_stage + job.counting_passes
    passes = PASSES + again
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    projections = a.hidden_size * (2 * queries + 2 * keys) / tp * tokens
    if a.is_moe:
        weights_per_token = 3 * a.hidden_size * a.moe_intermediate_size / job.expert_tensor_parallel_size
        mlp = weights_per_token * job.routed_rows * job.imbalance.mean + between * a.hidden_size * a.num_experts
    else:
        mlp = 3 * a.hidden_size * a.intermediate_size / tp * tokens
    keys_per_query = job.seq_length / 2 if job.is_causal else job.input_length
    attention = 4 * queries / tp * keys_per_query * tokens * (1 + again + ATTENTION_BACKWARD)
    attention *= 1 + job.recomputes("core_attn") / (1 + ATTENTION_BACKWARD)
    mlp_passes = passes + job.recomputes("moe" if a.is_moe else "mlp")
    expert = _all_to_all(job, nvlink_domain)
    # Around attention and MLP: an all-gather and a reduce-scatter each, forward and backward, and the inputs gathered
    # again for the weight gradients.
    gathered = between * a.hidden_size * BF16 * (tp - 1) * (4 + 4 + 2 + again * 4)
    if a.is_moe:
        gathered /= 2  # TP divides only the attention
    cp = job.context_parallel_size
    # Keys and values are exchanged in bf16, their gradients in fp32.
    exchanged = tokens * 2 * keys / tp * BF16 * (cp - 1) * (3 + job.counting_passes)
    tensor_inside, context_inside = tp <= nvlink_domain, tp * cp <= nvlink_domain
    return Work(
        matmul=2 * (projections * passes + mlp * mlp_passes),
        attention=attention,
        memory=_memory_traffic(job) * passes / PASSES + _weight_traffic(job),
        expert_nvlink=expert[0] * mlp_passes,
        expert_network=expert[1] * mlp_passes,
        tensor_nvlink=gathered if tensor_inside else 0.0,
        tensor_network=0.0 if tensor_inside else gathered,
        context_nvlink=exchanged if context_inside else 0.0,
        context_network=0.0 if context_inside else exchanged,
    )


def _all_to_all(job: Job, nvlink_domain: int) -> tuple[float, float]:
    """Bytes that a rank sends over NVLink and over the network to and from a layer's experts, per pass.

    The four exchanges move the same tokens; `layer_work` multiplies by its passes, `PASSES` without recomputation.
    """
    a, ep, etp = job.model_config, job.expert_model_parallel_size, job.expert_tensor_parallel_size
    ranks = ep * etp
    if not a.is_moe or ranks == 1:
        return 0.0, 0.0
    # Expert-parallel ranks are adjacent, tensor-parallel ones innermost; `inside` of them share an NVLink domain.
    inside = min(ranks, nvlink_domain)
    nodes = ranks / inside
    tokens, k = job.tokens_between_layers, a.num_experts_per_tok
    token_bytes = a.hidden_size * BF16 * ALL_TO_ALLS / PASSES
    # Of an all-gather in bf16 and a reduce-scatter in the router's fp32 (token_dispatcher.py), and their gradients.
    summed_bytes = a.hidden_size * (BF16 + FP32) * (ALL_TO_ALLS / 2) / PASSES
    if job.moe_token_dispatcher_type == "allgather":
        # The router's choice and probabilities of all experts too; these have a gradient.
        with_router = summed_bytes + a.num_experts * (1 + 2 * FP32) / PASSES
        sent_inside, sent_outside = (inside - 1.0) * with_router, (ranks - inside) * with_router
    elif job.moe_token_dispatcher_type == "flex":
        # A token is sent once to each rank that has one of its experts, and once to each NVLink domain.
        copies = inside * (1 - (1 - 1 / inside) ** (k / nodes)) * (1 - 1 / inside) * nodes
        sent_inside, sent_outside = copies * token_bytes, (nodes - 1) * (1 - (1 - 1 / nodes) ** k) * token_bytes
    else:
        # All-to-all among the ranks with the same slice of the experts, then an all-gather among the slices.
        near = max(1.0, inside / etp)
        sent_inside = k * ((near - 1) / ep * token_bytes + (etp - 1) * summed_bytes)
        sent_outside = k * (1 - near / ep) * token_bytes
    return tokens * sent_inside * job.imbalance.mean, tokens * sent_outside * job.imbalance.mean


def _memory_traffic(job: Job) -> float:
    """Bytes that the kernels between the matrix products read and write in a layer, forward and backward, in bf16."""
    a, tp = job.model_config, job.tensor_model_parallel_size
    tokens, between = job.tokens, job.tokens_between_layers
    queries, keys = a.num_attention_heads * a.head_dim / tp, a.num_key_value_heads * a.head_dim / tp
    values = between * a.hidden_size * 2 * ELEMENTWISE * 2  # two norms and two residual sums
    # Norms, where the model has them, and rotary embedding of queries and keys.
    values += tokens * (queries + keys) * (2 if a.qk_layernorm else 1) * ELEMENTWISE
    values += tokens * (queries + 2 * keys) * 4  # split of the QKV tensor forward, concatenation backward
    casts = 0.0 if not job.quantizes or job.fused_kernels else _cast_bytes(job) / BF16
    values += casts * (2 * between * a.hidden_size + tokens * (2 * queries + 2 * keys))
    if not a.is_moe:
        width = a.intermediate_size / tp
        return BF16 * (values + tokens * width * SWIGLU + casts * (2 * between * a.hidden_size + 3 * tokens * width))
    values += between * a.num_experts * 2 * 10  # the router's logits: fp32 counts twice, ten reads and writes
    width = a.moe_intermediate_size / job.expert_tensor_parallel_size
    rows = job.routed_rows * job.imbalance.mean
    # Tokens are permuted before the all-to-all and again by expert, forward and backward; fused dispatchers do it
    # within.
    moves = 4 if job.fused_kernels or job.moe_token_dispatcher_type == "flex" else 8
    values += rows * a.hidden_size * 2 * moves
    values += 0.0 if job.fused_kernels else rows * width * SWIGLU
    values += casts * rows * (2 * a.hidden_size + 3 * width)
    return BF16 * values


def step_time(job: Job, cluster: Cluster, efficiency: Efficiencies) -> StepTime:
    """The time of one step on the critical path through the pipeline."""
    efficiency = efficiency.on(cluster)
    layer = layer_time(job, cluster, efficiency)
    layers, microbatches = job.layers_per_stage, job.num_microbatches
    layer_terms = {name: seconds * layers * microbatches for name, seconds in layer._asdict().items()}
    pp = job.pipeline_model_parallel_size
    # The last stage also has the head, and the others wait for it. Where layers do not divide evenly (only in published
    # runs) the first and the last stage have fewer of them.
    fewer = (pp * layers - job.model_config.num_layers) / 2
    head = max(0.0, _head_time(job, cluster, efficiency) - fewer * sum(layer))
    stage = sum(layer) * layers
    bubble = (pp - 1) / job.num_virtual_stages_per_pipeline_rank * (stage + head / pp)
    sent = (
        job.tokens_between_layers * job.model_config.hidden_size * BF16 * 2 * job.num_virtual_stages_per_pipeline_rank
    )
    per_stage = job.world_size // pp
    bandwidth = cluster.nvlink_gb_per_s * efficiency.nvlink
    if per_stage * pp > cluster.nvlink_domain:
        bandwidth = cluster.network_gb_per_s * efficiency.network
    exposed = EXPOSED_WITH_OVERLAP if job.overlap_p2p_comm else 1.0
    pipeline = exposed * sent * microbatches / (bandwidth * 1e9) if pp > 1 else 0.0
    return StepTime(
        **layer_terms,
        head=head * microbatches,
        bubble=bubble,
        pipeline=pipeline,
        data=_data_time(job, cluster, efficiency),
        optimizer=_optimizer_time(job, cluster, efficiency),
    )


def layer_time(job: Job, cluster: Cluster, efficiency: Efficiencies) -> LayerTime:
    """Seconds of one layer and micro-batch; `efficiency` is already that of this cluster (`Efficiencies.on`)."""
    work = layer_work(job, cluster.nvlink_domain)
    nvlink, network = (
        cluster.nvlink_gb_per_s * 1e9 * efficiency.nvlink,
        cluster.network_gb_per_s * 1e9 * efficiency.network,
    )
    rate, matmul_efficiency = cluster.bf16_tflops, efficiency.matmul_bf16
    if job.fp4_recipe != "none":
        assert cluster.fp4_tflops is not None  # job_of
        rate, matmul_efficiency = cluster.fp4_tflops, efficiency.matmul_fp4
    elif job.fp8_recipe != "none":
        rate, matmul_efficiency = cluster.fp8_tflops, efficiency.matmul_fp8
    layer = LayerTime(
        matmul=work.matmul / (rate * 1e12 * matmul_efficiency),
        attention=work.attention / (cluster.bf16_tflops * 1e12 * efficiency.attention),
        memory=work.memory / (cluster.memory_gb_per_s * 1e9 * efficiency.memory),
        expert_nvlink=work.expert_nvlink / nvlink,
        expert_network=work.expert_network / network,
        tensor=work.tensor_nvlink / nvlink + work.tensor_network / network,
        context=work.context_nvlink / nvlink + work.context_network / network,
        host=0.0,
    )
    if job.tp_comm_overlap:
        layer = layer._replace(tensor=layer.tensor * EXPOSED_WITH_OVERLAP)
    if job.overlap_moe_expert_parallel_comm:
        # The all-to-alls overlap with another micro-batch's computation. Exposed are what exceeds that computation, the
        # forward passes before the first backward pass, and as many backward passes after the last forward pass.
        computation = layer.matmul + layer.attention + layer.memory
        all_to_all = layer.expert_nvlink + layer.expert_network
        alone = min(1.0, microbatches_in_flight(job, 0) / job.num_microbatches)
        overlapped = min(all_to_all, computation) * (1 - EXPOSED_WITH_OVERLAP) * (1 - alone)
        exposed = 1 - overlapped / all_to_all if all_to_all else 0.0
        layer = layer._replace(
            expert_nvlink=layer.expert_nvlink * exposed, expert_network=layer.expert_network * exposed
        )
    return layer._replace(host=_host_time(job, efficiency, sum(layer)))


def _host_time(job: Job, efficiency: Efficiencies, busy: float) -> float:
    """Seconds per layer that the GPU, busy for `busy` seconds, waits for the host.

    Nothing if the whole step is one CUDA graph. Otherwise the host launches ahead of the GPU unless it is slower, and
    MoE layers wait for the sync of tokens per expert, unless nothing on the host depends on it. Per-layer graphs cover
    a dense layer entirely, and a MoE layer up to the experts.
    """
    if job.cuda_graph_impl == "full":
        return 0.0
    is_moe = job.model_config.is_moe
    launches = efficiency.launch_moe if is_moe else efficiency.launch_dense
    if job.cuda_graph_impl != "none":
        launches *= LAUNCHES_OUTSIDE_GRAPHS if is_moe else 0.0
    again = 1 + (job.recomputed_layers / job.layers_per_stage + job.counting_passes) / PASSES
    sync = efficiency.moe_sync * again if job.waits_for_group_sizes else 0.0
    return max(0.0, launches * again - busy) + sync


def _head_time(job: Job, cluster: Cluster, efficiency: Efficiencies) -> float:
    """Seconds of the LM head and the loss for a micro-batch, in bf16."""
    a = job.model_config
    rows = job.tokens * job.seq_length / job.input_length * (1.0 if job.is_causal else MASKED_FRACTION)
    vocabulary = a.vocab_size / job.tensor_model_parallel_size
    if job.whole_logits:
        products = 3  # forward, and the gradients of inputs and weights
        moved = rows * vocabulary * (BF16 + FP32 * LOSS_PASSES)
    else:
        products = 4  # backward recomputes the logits (model/chunked_cross_entropy.py)
        # Logits are written and read twice forward (maximum, sum); written, read, and replaced by their gradient
        # backward; all in bf16. Each chunk reads and writes the weight's fp32 gradient.
        chunks = math.ceil(rows / rows_per_chunk(round(vocabulary), "cuda"))
        moved = vocabulary * (rows * BF16 * 6 + chunks * a.hidden_size * 2 * FP32)
    operations = products * 2 * rows * vocabulary * a.hidden_size
    seconds = operations / (cluster.bf16_tflops * 1e12 * efficiency.matmul_bf16)
    return seconds + moved / (cluster.memory_gb_per_s * 1e9 * efficiency.memory)


def _data_time(job: Job, cluster: Cluster, efficiency: Efficiencies) -> float:
    """Seconds to reduce the gradients and all-gather the weights of the first stage, in rings."""
    gradient = FP32 if job.grad_reduce_in_fp32 else BF16
    weight = 1 if job.fp8_param_gather else BF16 if job.bf16 else FP32
    seconds = 0.0
    for buffer in stage_buffers(job, 0):
        numbers_sent = buffer.numel * (1 - 1 / buffer.replicas)
        # Replicas of a weight are tp (or ep) ranks apart; those in one NVLink domain share its network links.
        apart = job.world_size // job.pipeline_model_parallel_size // buffer.replicas
        bandwidth = cluster.nvlink_gb_per_s * 1e9 * efficiency.nvlink
        if apart * buffer.replicas > cluster.nvlink_domain:
            links = max(1, cluster.nvlink_domain // apart)
            bandwidth = min(bandwidth, links * cluster.network_gb_per_s * 1e9 * efficiency.network)
        exposed_reduce = EXPOSED_WITH_OVERLAP if job.overlap_grad_reduce else 1.0
        exposed_gather = EXPOSED_WITH_OVERLAP if job.overlap_param_gather else 1.0
        if job.use_distributed_optimizer:
            seconds += numbers_sent * (gradient * exposed_reduce + weight * exposed_gather) / bandwidth
        else:
            seconds += 2 * numbers_sent * gradient * exposed_reduce / bandwidth
    return seconds


def _optimizer_time(job: Job, cluster: Cluster, efficiency: Efficiencies) -> float:
    """Seconds to read and write the optimizer's state once, and the gradients twice (norm, update)."""
    _, gradients, optimizer = state_bytes(job, 0)
    share = job.dense_replicas if job.use_distributed_optimizer else 1
    seconds = (2 * optimizer + 2 * gradients / share + gradients) / (cluster.memory_gb_per_s * 1e9 * efficiency.memory)
    if job.optimizer == "muon":
        seconds += orthogonalization_operations(job) / (cluster.bf16_tflops * 1e12 * efficiency.matmul_bf16)
    return seconds
