"""Activation memory of a layer: the tensors kept for the backward pass, per micro-batch and rank.

Counted as in Korthikanti et al. (2022). There are two lists: the local layers', in which each tensor was measured on a
CPU, and Transformer Engine's, whose norms and rotary embeddings keep less and whose GEMMs may keep FP8 inputs.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_a2d.planner.workload import Job

INDEX = 8  # bytes
FLOAT = 4


class LayerActivations(NamedTuple):
    """Bytes by name of the tensor."""

    attention: dict[str, float]
    mlp: dict[str, float]  # a dense MLP, or the router and the token permutation of a MoE layer
    experts: dict[str, float]  # tensors of the tokens routed to the rank's experts, with balanced routing

    @property
    def total(self) -> float:
        return sum(sum(part.values()) for part in self)

    @property
    def of_experts(self) -> float:
        return sum(self.experts.values())


def layer_activations(job: Job, on_cpu: bool = False) -> LayerActivations:
    """Activations of the layers that --transformer-impl selects on a GPU; `on_cpu`: of the local layers there."""
    if job.transformer_impl != "local":
        # A norm before a linear layer is part of it, and not recomputed; a router's is a separate module.
        norm = _norm(job, "pre_mlp_layernorm", recomputed=job.model_config.is_moe and job.recomputes("layernorm"))
        return LayerActivations(_attention(job), norm | _mlp(job), _experts(job))
    norm = _norm(job, "pre_mlp_layernorm", recomputed=job.recomputes("layernorm"))
    return LayerActivations(_local_attention(job, on_cpu), norm | _mlp(job), _experts(job))


def _heads(job: Job) -> tuple[float, float]:
    """Numbers per token in the queries, and in the keys, on one rank."""
    a, tp = job.model_config, job.tensor_model_parallel_size
    return a.num_attention_heads * a.head_dim / tp, a.num_key_value_heads * a.head_dim / tp


def _copies_queries(job: Job) -> bool:
    """Whether queries are copied out of the QKV tensor, which interleaves the groups; a single group needs no copy."""
    return job.model_config.num_key_value_heads > job.tensor_model_parallel_size


def _norm(job: Job, name: str, recomputed: bool = False) -> dict[str, float]:
    """A fused norm's input, and its output, which is the saved input of the next GEMM."""
    values = job.tokens_between_layers * job.model_config.hidden_size
    kept = {f"{name}, input": values * job.number_bytes, f"{name}, scale": job.tokens_between_layers * FLOAT}
    return kept if recomputed else kept | {f"{name}, output": values * job.operand_bytes}


def _attention(job: Job) -> dict[str, float]:
    queries, keys = _heads(job)
    rows, number, normed = job.tokens, job.number_bytes, job.model_config.qk_layernorm
    kept = _norm(job, "input_layernorm") | {
        # Each is a copy out of the QKV tensor, which is freed; only norms keep the queries and keys that they read.
        "queries, keys, values": rows * ((queries + keys) * normed + keys) * number,
        "queries and keys, scale": rows * (queries + keys) / job.model_config.head_dim * FLOAT * normed,
        "queries, normed and rotated": rows * queries * number,
        "keys, normed and rotated": rows * keys * number,
        "attention, log-sum-exp": rows * queries / job.model_config.head_dim * FLOAT,
        "attention, output": rows * queries * number,
    }
    return kept | {"attention, output quantised": rows * queries * job.operand_bytes} if job.quantizes else kept


def _local_attention(job: Job, on_cpu: bool) -> dict[str, float]:
    """Local layers' attention, with fused norms and flash attention; on a CPU norms and rotation are one function."""
    queries, keys = _heads(job)
    rows, number, cp = job.tokens, job.number_bytes, job.context_parallel_size
    normed = job.model_config.qk_layernorm
    kept = _norm(job, "input_layernorm", recomputed=job.recomputes("layernorm")) | {
        "queries, keys, values": rows * (queries + 2 * keys) * number,  # keys and values are views of it
        "queries, copied": rows * queries * number if _copies_queries(job) and normed and not on_cpu else 0.0,
        "queries and keys, scale": rows * (queries + keys) / job.model_config.head_dim * FLOAT * normed,
        "sines and cosines": _rotation_bytes(job) / (2 if on_cpu else 1),
        "queries, rotated": rows * queries * number,
        "keys, rotated and gathered": rows * keys * number * cp,
        "attention, log-sum-exp": rows * queries / job.model_config.head_dim * FLOAT,
        "attention, output": rows * queries * number,
    }
    return kept | ({"values, gathered": rows * keys * number * cp} if cp > 1 else {})


def _rotation_bytes(job: Job) -> float:
    """Sine and cosine, each saved for queries and for keys; the same angles for all samples."""
    return 4 * job.tokens / job.micro_batch_size * job.model_config.head_dim * job.number_bytes


def _mlp(job: Job) -> dict[str, float]:
    a = job.model_config
    if a.is_moe:
        rows, chosen = job.tokens_between_layers, a.num_experts_per_tok
        if job.transformer_impl != "local":  # its fused router and permutation
            kept = {
                "router, map, probabilities and scores": rows * a.num_experts * (1 + FLOAT + FLOAT),
                "router, places of rows": rows * (2 * a.num_experts + 1) * FLOAT,
            }
            sent = rows * chosen * (a.hidden_size * job.number_bytes + FLOAT)
            return kept | ({"sent tokens and probabilities": sent} if job.keeps_sent_rows else {})
        return {
            "router, chosen experts": rows * chosen * (INDEX + FLOAT),
            "router, map and probabilities": rows * a.num_experts * (1 + FLOAT),
            "router, permutation": rows * chosen * INDEX,
        }
    if job.recomputes("mlp"):
        return {}
    width = job.tokens * a.intermediate_size / job.tensor_model_parallel_size
    return {"linear_fc1, output": width * 2 * job.number_bytes, "linear_fc2, input": width * job.operand_bytes}


def _experts(job: Job) -> dict[str, float]:
    a = job.model_config
    if not a.is_moe or job.recomputes("moe"):
        return {}
    rows, width = job.routed_rows, a.moe_intermediate_size / job.expert_tensor_parallel_size
    kept = {
        "experts, input": rows * a.hidden_size * job.operand_bytes,
        "experts, probabilities": rows * FLOAT,
        "experts, linear_fc1's output": rows * 2 * width * job.number_bytes,
    }
    if job.recomputes("moe_act"):
        return kept
    return kept | {"experts, linear_fc2's input": rows * width * job.operand_bytes}
