"""Training: where model and data meet."""

from megatron_a2d import megatron_compat as megatron_compat  # before megatron.core is imported
