import typing

import typing_extensions

# All that emerging-optimizers 0.3.0 uses of Python 3.12; `make test-latest-cpu` has it on 3.11.
if not hasattr(typing, "override"):
    typing.override = typing_extensions.override  # type: ignore[attr-defined]

import megatron_a2d.megatron_compat  # noqa: F401  megatron.core can be imported without triton, in every process
