"""Shapes of the Qwen3 models from their config.json on the hub, with fewer layers where memory requires it.

Layers, embedding and LM head have their real sizes. With fewer layers LM head and embedding have a larger share than in
the full model: bench.train_step_vs_hf therefore also measures half of the layers, and reports the difference.
"""

from __future__ import annotations

from typing import Any, NamedTuple

VOCABULARY, MASK_TOKEN_ID = 151_936, 151_669


class Shape(NamedTuple):
    """A model's configuration with Hugging Face's keys, and the part that is measured on one GPU of 141 GB."""

    model: dict[str, Any]
    layers: int  # of num_hidden_layers
    micro_batch_size: int
    num_microbatches: int = 1  # per step; with too little memory, more and smaller ones
    seq_length: int = 4096

    @property
    def is_cut(self) -> bool:
        return self.layers < self.model["num_hidden_layers"]

    @property
    def is_moe(self) -> bool:
        return "num_experts" in self.model

    def config(self) -> dict[str, Any]:
        """The config.json of the measured model."""
        kind = {"model_type": "qwen3_moe", "norm_topk_prob": True} if self.is_moe else {"model_type": "qwen3"}
        return {**_COMMON, **self.model, **kind, "num_hidden_layers": self.layers}


_COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY, mask_token_id=MASK_TOKEN_ID, head_dim=128, max_position_embeddings=40960,
    rms_norm_eps=1e-6, rope_theta=1e6,
)  # fmt: skip


def _dense(hidden: int, layers: int, heads: int, intermediate: int, tied: bool) -> dict[str, Any]:
    return dict(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
        intermediate_size=intermediate, tie_word_embeddings=tied,
    )  # fmt: skip


SHAPES = {
    "qwen3_8b": Shape(_dense(4096, 36, 32, 12288, tied=False), layers=12, micro_batch_size=4, num_microbatches=2),
    "qwen3_30b_a3b": Shape(
        dict(
            hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
            intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
            tie_word_embeddings=False,
        ),
        layers=4, micro_batch_size=4, num_microbatches=8,
    ),
    "qwen3_1p7b": Shape(_dense(2048, 28, 16, 6144, tied=True), layers=28, micro_batch_size=4, num_microbatches=2),
    "qwen3_4b": Shape(_dense(2560, 36, 32, 9728, tied=True), layers=18, micro_batch_size=4, num_microbatches=2),
    "qwen3_0p6b": Shape(_dense(1024, 28, 16, 3072, tied=True), layers=28, micro_batch_size=8, num_microbatches=2),
}  # fmt: skip


def rehearsal(shape: Shape) -> Shape:
    """A tiny version with which a CPU runs every line of the measurement in a second or two."""
    small = dict(
        shape.model, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=128,
        vocab_size=512, mask_token_id=511, max_position_embeddings=256,
    )  # fmt: skip
    if shape.is_moe:
        small |= dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
    return Shape(small | {"num_hidden_layers": 4}, layers=2, micro_batch_size=2, num_microbatches=2, seq_length=64)
