"""Training: start-up, the loop and its steps, optimizer, checkpoints, resuming, validation, metrics."""

from megatron_a2d import megatron_compat as megatron_compat  # before megatron.core is imported
