"""Operations of Muon's Newton-Schulz iterations (Jordan et al. 2024) on the rank that has most of them."""

from __future__ import annotations

from megatron_a2d.planner.parameters import stage_buffers
from megatron_a2d.planner.workload import Job


def orthogonalization_operations(job: Job) -> float:
    """Floating-point operations of Muon's Newton-Schulz iterations on a rank, in a step.

    An iteration of a matrix whose smaller size is m and larger n: X X' and B X, 2 m^2 n each, and a square, 2 m^3.
    Each tensor-parallel rank orthogonalises the whole matrices of its stage, and its own experts'. So does each
    data-parallel rank, or, with the distributed optimizer, what is in its shard: the fullest one counts.
    """
    a = job.model_config
    width, copies = (a.moe_intermediate_size, a.num_experts) if a.is_moe else (a.intermediate_size, 1)
    heads, groups = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    of_mlp = [(2 * width, a.hidden_size), (width, a.hidden_size)] * (copies // job.expert_model_parallel_size)
    of_attention = [(heads, a.hidden_size)] * 2 + [(groups, a.hidden_size)] * 2
    shares = _fullest_shares(job)
    iteration = sum(
        shares[is_expert] * (4 * min(size) ** 2 * max(size) + 2 * min(size) ** 3)
        for is_expert, matrices in ((False, of_attention), (a.is_moe, of_mlp))
        for size in matrices
    )
    return float(job.muon_num_ns_steps * iteration * job.layers_per_stage)


def _fullest_shares(job: Job) -> dict[bool, float]:
    """The part of the dense matrices' elements (False), and of the experts' (True), that is in the fullest shards."""
    shares = {False: 1.0, True: 1.0}
    buffers = [buffer for buffer in stage_buffers(job, 0) if buffer.has_whole_matrices]
    for is_expert in shares:
        own = [buffer for buffer in buffers if buffer.holds_experts == is_expert]
        if own:
            held = sum(
                parameter.numel for buffer in own for bucket in buffer.buckets for parameter, _ in bucket.parameters
            )
            shares[is_expert] = sum(buffer.numel // buffer.replicas for buffer in own) / held
    return shares
