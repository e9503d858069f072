"""The model: all families (families/) on megatron.core's parallel blocks."""

from megatron_a2d import megatron_compat as megatron_compat  # before megatron.core is imported
