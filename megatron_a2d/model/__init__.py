"""The model: Qwen3 and Qwen3-MoE on megatron.core's parallel blocks."""
