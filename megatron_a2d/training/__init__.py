"""Training: where model and data meet."""

from megatron_a2d import runtime as runtime  # before megatron.core is imported
