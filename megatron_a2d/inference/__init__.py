"""Trained models, opened for sampling and evaluation: from an export, or sharded from a training checkpoint."""

from megatron_a2d import megatron_compat as megatron_compat  # before megatron.core is imported
