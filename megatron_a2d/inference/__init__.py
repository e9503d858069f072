"""Trained models, opened for sampling and evaluation: from an export, or sharded from a training checkpoint."""

from megatron_a2d import runtime as runtime  # before megatron.core is imported
