"""From token files on disk to micro-batches: indexed -> dataset (shuffle, pack) -> batches."""

from megatron_a2d import runtime as runtime  # before megatron.core is imported
