"""megatron.core's combined 1F1B schedule (--overlap-moe-expert-parallel-comm), for our model and without its leaks.

The schedule cuts the graph of a layer into nodes with detached inputs. Two references outlive a micro-batch's backward
pass: to its plan (megatron-core 0.16.1; 0.19.2 drops it) and to each layer's graph (both).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_a2d.megatron_compat.versions import is_before


@functools.cache
def install() -> None:
    """Prepare megatron.core before a model is built that uses the schedule. Idempotent."""
    _accept_any_language_module()
    if is_before(0, 17):
        _free_plans()
    _free_router_graphs()


def _accept_any_language_module() -> None:
    """The schedule checks for GPTModel by class."""
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.models.gpt import gpt_model

    gpt_model.GPTModel = LanguageModule


def _free_plans() -> None:
    """A node refers to itself through a bound method, `default_backward_func`, which does not use it.

    Other nodes drop the reference in their backward pass; the loss's has none. It keeps the loss function, and that the
    plan of the micro-batch with the embedding's output, until garbage is collected, which --manual-gc puts off.
    """
    from megatron.core.pipeline_parallel.utils import ScheduleNode

    method = ScheduleNode.default_backward_func

    def default_backward_func(outputs: tuple[Tensor, ...], output_grad: tuple[Tensor | None, ...]) -> Any:
        return method(None, outputs, output_grad)

    ScheduleNode.default_backward_func = staticmethod(default_backward_func)


def _free_router_graphs() -> None:
    """The all-to-all dispatcher keeps the router's probabilities until the next forward pass; it only needs their type.

    Their graph ends at the layer's detached input, and keeps that and its gradient, in every layer.
    """
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    preprocess: Callable[..., Any] = MoEAlltoAllTokenDispatcher.dispatch_preprocess

    @functools.wraps(preprocess)
    def preprocess_and_detach(self: Any, *arguments: Any, **options: Any) -> Any:
        result = preprocess(self, *arguments, **options)
        self.probs = self.probs.detach()
        return result

    MoEAlltoAllTokenDispatcher.dispatch_preprocess = preprocess_and_detach
