"""megatron_a2d: turns an autoregressive Qwen3 or Qwen3-MoE into a masked diffusion language model."""

__version__ = "0.1.0"
