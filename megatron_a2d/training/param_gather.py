"""zero_grad and forced parameter all-gather for --overlap-param-gather and MXFP8's shared gradient/parameter buffer.

With --overlap-param-gather the next forward pass fetches what other ranks updated. MXFP8 weights (--fp8-param-gather)
have no buffer of their own on that way: they travel in bf16 through the gradients' buffer, and megatron.core's
optimizer leaves it to the training loop to put its main weights there, after the gradients have been zeroed and before
each forward pass that fetches. A forward pass without that would fetch gradients.
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import MegatronOptimizer


def zero_gradients(chunks: list[Any], optimizer: MegatronOptimizer) -> None:
    """To be called before every forward pass that a backward pass follows."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    if _shares_buffer(chunks):
        _put_main_weights(chunks, optimizer)


def gather_weights(chunks: list[Any], optimizer: MegatronOptimizer) -> None:
    """Make the model's weights those of the last step now; gradients may be lost. Collective."""
    if _shares_buffer(chunks):
        _put_main_weights(chunks, optimizer)
        for group in _bucket_groups(chunks):
            # (start_param_sync(force_sync=True) would fetch them and leave them in the buffer.)
            group.finish_param_sync(skip_next_bucket_dispatch=True)
        return
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _shares_buffer(chunks: list[Any]) -> bool:
    return any(chunk.ddp_config.reuse_grad_buf_for_mxfp8_param_ag for chunk in chunks)


def _put_main_weights(chunks: list[Any], optimizer: Any) -> None:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not part.is_stub_optimizer:
            assert not any(part.model_fp32_groups), "megatron.core copies the main weights of bf16 parameters alone"
            part._copy_main_params_to_param_buffer()
    for group in _bucket_groups(chunks):
        # A forward pass since the last step (a validation) has fetched; the next one is to fetch again.
        group.param_gather_dispatched = False


def _bucket_groups(chunks: list[Any]) -> list[Any]:
    return [group for chunk in chunks for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)]
