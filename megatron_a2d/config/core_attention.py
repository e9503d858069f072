"""Choice of core attention in Transformer Engine's layers: its own, or ours for masks that it cannot express."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_a2d.config.settings import RunConfig


def isolates_documents(config: RunConfig) -> bool:
    """Whether there are samples with intra-document attention."""
    return config.data.reset_attention_mask or config.data.random_length_prob > 0


def own_attention_reason(config: RunConfig) -> str | None:
    """The settings, if any, for which Transformer Engine's layers have our core attention instead of theirs.

    Theirs takes no dense mask: documents are packed sequences, one sample at a time. Its context parallelism shards
    causal sequences differently from ours, and it restarts positions in each document.
    """
    isolated, parallel = isolates_documents(config), config.parallel
    reasons = (
        (
            "isolated documents (--reset-attention-mask, --random-length-prob) and --micro-batch-size above 1",
            isolated and config.training.micro_batch_size > 1,
        ),
        (
            "isolated documents (--reset-attention-mask, --random-length-prob) and --context-parallel-size above 1",
            isolated and parallel.context_parallel_size > 1,
        ),
        (
            "--reset-position-ids without --reset-attention-mask",
            config.data.reset_position_ids and not config.data.reset_attention_mask,
        ),
        ("--conversion annealing", config.diffusion.conversion == "annealing"),
        ("--conversion grafting", config.diffusion.conversion == "grafting"),
        ("--objective block", config.diffusion.objective == "block"),
        (
            "--objective ar with --context-parallel-size above 1",
            config.diffusion.objective == "ar" and parallel.context_parallel_size > 1,
        ),
    )
    return next((what for what, chosen in reasons if chosen), None)


def own_attention_problems(config: RunConfig) -> Iterator[str]:
    """Settings that our core attention in Transformer Engine's layers does not support."""
    performance, reason = config.performance, own_attention_reason(config)
    if reason is None:
        return
    has_own_positions = config.diffusion.objective == "block" or config.data.reset_position_ids
    if performance.apply_rope_fusion and has_own_positions and config.training.micro_batch_size > 1:
        yield (
            f"--apply-rope-fusion: with {reason} each sample has its own positions, but the kernel takes those of "
            "one; use --micro-batch-size 1, or --no-apply-rope-fusion"
        )
    if performance.cuda_graph_impl != "none" and "attn" in performance.cuda_graph_scope:
        yield (
            f"--cuda-graph-scope attn: with {reason} attention is not Transformer Engine's, and its kernel is compiled "
            "while training; leave it out of the scope, or use --cuda-graph-impl none"
        )
    if config.diffusion.conversion != "grafting":
        return
    if performance.fp8_param_gather:
        yield (
            "--fp8-param-gather: not with --conversion grafting, which swaps attention's weights; use "
            "--no-fp8-param-gather until it is over"
        )
    if performance.fp8_recipe == "delayed":
        yield (
            "--fp8-recipe delayed: with --conversion grafting the old and the new attention would share their scales, "
            "which are those of earlier values; use another recipe until it is over"
        )
