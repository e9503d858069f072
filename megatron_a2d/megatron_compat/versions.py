"""Differences between the supported versions of megatron.core, and fixes that apply on every device.

Differences between 0.16.1 and 0.19.2 that matter here:

- `import megatron.core` needs triton (`make_triton_optional` in __init__.py).
- Its version has a git commit appended if it is installed inside a checkout: that checkout's commit (`release`).
- A checkpoint has no common.pt, strategies are not registered by name, and saves are planned by another package unless
  one asks for megatron.core's own (save.py, `async_save_options`). Ours have one form under both: common.pt is read.
- Checkpoint readers are constructed differently, and cache metadata by path (checkpoint/load.py).
- Adam takes `capturable` (fused_adam.py).
- The parts of a layer that CUDA graphs replay have another name (`graphed_parts`), and so are the streaming
  multiprocessors of the flex dispatcher (`hybridep_sms`).
- Experts can be fusible operations of Transformer Engine, with a budget of tokens (config/installed_versions.py).
- Modules receive their names when they are built (model/experts.py accepts and ignores it).
- Process groups that are not passed are taken from the global state, as before, with a DeprecationWarning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import megatron.core
import torch
from torch import Tensor, nn

from megatron_a2d.utils.errors import UserError

# The last release for Python 3.11, and the newest, which needs 3.12: the tests pass with these two.
SUPPORTED = ("0.16.1", "0.19.2")


def check_version() -> None:
    """UserError for an untested release: this project uses internals of megatron.core."""
    found = release()
    if found not in SUPPORTED:
        raise UserError(
            f"megatron-core {found}: only {' and '.join(SUPPORTED)} are supported; "
            f"pip install megatron-core=={SUPPORTED[0]} (Python 3.10 to 3.12) or {SUPPORTED[1]} (from 3.12 on)"
        )


def release() -> str:
    """megatron.core's version, such as 0.19.2, without the commit that it adds inside a git checkout."""
    return str(megatron.core.__version__).partition("+")[0]


def is_before(major: int, minor: int) -> bool:
    """Whether megatron.core is older than this series."""
    first, second = release().split(".")[:2]
    return (int(first), int(second)) < (major, minor)


def async_save_options() -> dict[str, str]:
    """Arguments of TorchDistSaveShardedStrategy.async_save: newer versions use a separate package by default."""
    return {} if is_before(0, 17) else {"async_strategy": "mcore"}


def graphed_parts(parts: Sequence[str]) -> dict[str, list[str]]:
    """TransformerConfig's field for the parts of a layer that CUDA graphs capture."""
    return {"cuda_graph_scope" if is_before(0, 17) else "cuda_graph_modules": list(parts)}


def hybridep_sms(number: int) -> dict[str, int]:
    """TransformerConfig's field for the streaming multiprocessors of HybridEP's dispatch and combine kernels."""
    return {"moe_hybridep_num_sms" if is_before(0, 17) else "moe_flex_dispatcher_num_sms": number}


def apply_fixes() -> None:
    _define_te_general_gemm()
    _recompute_norms_without_te()
    _recompute_without_compiling()
    _permute_no_tokens_unfused()


def _define_te_general_gemm() -> None:
    """Without Transformer Engine the router uses a name that its failed import never bound."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _recompute_norms_without_te() -> None:
    """--recompute-modules layernorm queries Transformer Engine's FP8 state even if it is not installed."""
    from megatron.core.tensor_parallel import random

    if random.HAVE_TE:
        return
    initialize = random.CheckpointWithoutOutput.__init__

    def without_fp8(self: Any, *arguments: Any, **options: Any) -> None:
        initialize(self, *arguments, **options)
        self.fp8 = False

    random.CheckpointWithoutOutput.__init__ = without_fp8


def _recompute_without_compiling() -> None:
    """From 0.17 on, --recompute-modules layernorm and moe_act compile C++ in the first backward pass, on every process
    at once, in one cache; with a missing compiler the run fails, with a stale lock it hangs. The recomputed values are
    copied instead, as in 0.16."""
    from megatron.core.tensor_parallel import random

    if hasattr(random, "_get_share_storage"):
        random._get_share_storage = lambda: _copy_storage


def _copy_storage(target: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        target.untyped_storage().resize_(source.untyped_storage().nbytes())
        target.untyped_storage().copy_(source.untyped_storage())


def _permute_no_tokens_unfused() -> None:
    """--moe-permute-fusion where no token of a step goes to a process's experts, which the allgather dispatcher allows.

    Transformer Engine (2.12) returns no rows instead of one zero row per token, and its backward pass reads a
    tensor that it has not saved: the run fails in the step's next collective.
    """
    from megatron.core.transformer.moe import token_dispatcher

    permute, unpermute = token_dispatcher.permute, token_dispatcher.unpermute

    def permute_some(
        tokens: Tensor, *arguments: Any, num_out_tokens: Any = None, fused: bool = False, **more: Any
    ) -> Any:
        on_device = torch.is_tensor(num_out_tokens) and not num_out_tokens.is_cpu  # the other dispatchers', never 0
        some = on_device or num_out_tokens != 0
        return permute(tokens, *arguments, num_out_tokens=num_out_tokens, fused=fused and bool(some), **more)

    def unpermute_some(rows: Tensor, *arguments: Any, fused: bool = False, **more: Any) -> Any:
        return unpermute(rows, *arguments, fused=fused and rows.size(0) > 0, **more)

    token_dispatcher.permute, token_dispatcher.unpermute = permute_some, unpermute_some


def missing_router_product() -> str | None:
    """A log line if the routers use torch's GEMM although Transformer Engine is in use, else None.

    megatron-core 0.16.1 imports a name (get_workspace) that Transformer Engine 2.12 no longer has, silently.
    """
    from megatron.core.transformer.moe import moe_utils

    if moe_utils.te_general_gemm is not None:
        return None
    return (
        f"routers: torch's GEMM instead of Transformer Engine's, which megatron-core {release()} "
        "does not find in this version; the results are the same, a little slower"
    )


def mark_expert_parameters(model: nn.Module) -> None:
    """Give the experts their own gradient buffers and optimizer at every expert-parallel size.

    megatron.core does so only for sizes above 1. At TP=2, EP=1, ETP=1 that reduces expert gradients over the
    wrong group, silently; and a checkpoint written at EP>1 does not load at EP=1. Call it before
    DistributedDataParallel is constructed.
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def is_recomputed() -> bool:
    """Whether a layer's second forward pass is running (activation recomputation), which hooks that count must skip.

    The test that torch.utils.checkpoint itself uses.
    """
    return torch._C._current_graph_task_id() != -1
