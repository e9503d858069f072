"""megatron.core's version, and mends of it that apply on every device."""

from __future__ import annotations

import megatron.core
from torch import nn

from megatron_a2d.errors import UserError

SUPPORTED = "0.16.1"


def check_version() -> None:
    """What is built here rests on the internals of one release; another one must be tested first."""
    found = megatron.core.__version__
    if found != SUPPORTED:
        raise UserError(f"megatron-core {found}: only {SUPPORTED} is supported; pip install megatron-core=={SUPPORTED}")


def apply_fixes() -> None:
    _define_te_general_gemm()


def _define_te_general_gemm() -> None:
    """Without Transformer Engine the router reads a name that its failed import never bound."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def allow_schedule_plans() -> None:
    """megatron.core's interleaved micro-batches want a GPTModel, by name; any language model with its parts will do."""
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.models.gpt import gpt_model

    gpt_model.GPTModel = LanguageModule


def mark_expert_parameters(model: nn.Module) -> None:
    """Give the experts their own gradient buffers and optimizer at every expert-parallel size.

    megatron.core does so only for sizes above 1. At TP=2, EP=1, ETP=1 that reduces expert gradients over the
    wrong group, silently; and a checkpoint written at EP>1 does not load at EP=1. To be called before
    DistributedDataParallel looks at the parameters.
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]
