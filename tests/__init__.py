import megatron_a2d.megatron_compat  # noqa: F401  megatron.core can be imported without triton, in every process
