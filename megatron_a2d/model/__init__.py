"""The model: Qwen3 and Qwen3-MoE on megatron.core's parallel blocks."""

from megatron_a2d import runtime as runtime  # before megatron.core is imported
