"""megatron_a2d: turns an autoregressive language model into a masked diffusion language model."""

__version__ = "0.1.0"
