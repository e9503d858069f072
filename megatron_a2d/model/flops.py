"""Floating-point operations per token of training with bidirectional attention.

Full attention costs twice as much as causal attention. The LM head counts only the positions that reach it. Backward is
twice forward. A multiply-add is two operations.
"""

from __future__ import annotations

from megatron_a2d.config.model_config import ModelConfig


def train_flops_per_token(
    model_config: ModelConfig, seq_length: int, causal: bool = False, head_fraction: float = 1.0
) -> float:
    """Forward and backward operations for one token of a sample of `seq_length` tokens.

    `head_fraction` is the share of positions that reach the LM head: about one half for a linear schedule.
    """
    a = model_config
    query_size, key_value_size = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    projections = a.hidden_size * (2 * query_size + 2 * key_value_size)
    keys_met = (seq_length + 1) / 2 if causal else seq_length
    scores_and_values = 2 * query_size * keys_met
    if a.is_moe:
        mlp = a.hidden_size * (3 * a.moe_intermediate_size * a.num_experts_per_tok + a.num_experts)
    else:
        mlp = 3 * a.hidden_size * a.intermediate_size
    head = a.hidden_size * a.vocab_size * head_fraction
    return 3 * 2 * (a.num_layers * (projections + scores_and_values + mlp) + head)
