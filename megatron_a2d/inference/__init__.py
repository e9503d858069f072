"""Models loaded for sampling and evaluation, from an HF model or in parallel from a training checkpoint."""

from megatron_a2d import megatron_compat as megatron_compat  # before megatron.core is imported
