"""zero_grad and forced parameter all-gather for --overlap-param-gather and MXFP8's shared gradient/parameter buffer.

With --overlap-param-gather the next forward pass gathers what other ranks updated. MXFP8 weights (--fp8-param-gather)
have no communication buffer of their own: they are gathered in bf16 through the gradient buffer, and megatron.core's
optimizer leaves it to the training loop to copy the main weights there, after the gradients have been zeroed and before
each forward pass that gathers. Without that the forward pass would gather gradients.
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from megatron_a2d.megatron_compat.optimizer_chain import members


def zero_gradients(chunks: list[Any], optimizer: MegatronOptimizer) -> None:
    """zero_grad, to be called before every forward pass that is followed by a backward pass."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    if _shares_buffer(chunks):
        _copy_main_weights(chunks, optimizer)


def gather_weights(chunks: list[Any], optimizer: MegatronOptimizer) -> None:
    """All-gather the weights of the last step now; gradients may be lost. Collective."""
    if _shares_buffer(chunks):
        _copy_main_weights(chunks, optimizer)
        for group in _bucket_groups(chunks):
            # (start_param_sync(force_sync=True) would gather them and leave them in the buffer.)
            group.finish_param_sync(skip_next_bucket_dispatch=True)
        return
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _shares_buffer(chunks: list[Any]) -> bool:
    return any(chunk.ddp_config.reuse_grad_buf_for_mxfp8_param_ag for chunk in chunks)


def _copy_main_weights(chunks: list[Any], optimizer: Any) -> None:
    for part in members(optimizer):
        if not part.is_stub_optimizer:
            assert not any(part.model_fp32_groups), "megatron.core copies the main weights of bf16 parameters only"
            part._copy_main_params_to_param_buffer()
    for group in _bucket_groups(chunks):
        # A forward pass since the last step (a validation) has gathered; the next one must gather again.
        group.param_gather_dispatched = False


def _bucket_groups(chunks: list[Any]) -> list[Any]:
    return [group for chunk in chunks for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)]
