"""Gradient noise scale (McCandlish et al. 2018, appendix A), from the gradients of two batch sizes.

With |g_b|^2 of a small batch and |g_B|^2 of the full one,

    tr S  = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)     |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b)     B_noise = tr S / |G|^2

For independent samples both estimates are unbiased but noisy, so B_noise is the ratio of their moving averages (both
start at 0, a bias that cancels in the ratio). Low-discrepancy times are spread evenly over a batch, whose samples are
then not independent: the scale comes out somewhat low. The small batch is part of the same samples; its extra forward
and backward pass before the step costs at most a quarter of a step per log interval.
"""

from __future__ import annotations

import math

from megatron.core import parallel_state

from megatron_a2d.config.settings import RunConfig
from megatron_a2d.data.dataloader import Batch

_EMA_DECAY = 0.9  # per log interval


class GradientNoiseScale:
    """Moving averages of tr S and |G|^2, and the small batch that they need in addition to the full one."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._sizes: tuple[int, int] | None = None  # of the last small batch and of the full one, in samples
        self._noise, self._signal = 0.0, 0.0

    def small_batch(self, micro_batches: list[Batch]) -> list[Batch] | None:
        """This rank's part of the small batch; None if a step cannot be divided."""
        found = small_batch_size(self._config, len(micro_batches))
        if found is None:
            return None
        count, size = found
        ranks = parallel_state.get_data_parallel_world_size()
        full = len(micro_batches) * self._config.training.micro_batch_size
        self._sizes = count * size * ranks, full * ranks
        return [
            Batch._make(None if tensor is None else tensor[:size] for tensor in batch)
            for batch in micro_batches[:count]
        ]

    def estimate(self, small: float, large: float) -> dict[str, float]:
        """Metrics by name, from the squared gradient norms of the small and of the full batch."""
        assert self._sizes is not None
        b, B = self._sizes
        noise, signal = (small - large) / (1 / b - 1 / B), (B * large - b * small) / (B - b)
        if math.isfinite(noise):
            self._noise = _EMA_DECAY * self._noise + (1 - _EMA_DECAY) * noise
            self._signal = _EMA_DECAY * self._signal + (1 - _EMA_DECAY) * signal
        scale = self._noise / self._signal if self._signal > 0 and self._noise > 0 else math.nan
        return {"tr_sigma": noise, "grad_norm_sq": signal, "grad_noise_scale": scale}


def small_batch_size(config: RunConfig, num_microbatches: int) -> tuple[int, int] | None:
    """(micro-batches, samples per micro-batch) of a rank's small batch; None if a step cannot be divided.

    `num_microbatches`: of the full batch, on each rank.
    """
    training = config.training
    least = config.parallel.pipeline_model_parallel_size if config.parallel.virtual_pipeline_size else 1
    if num_microbatches >= 4 * least:
        return least, training.micro_batch_size
    if training.micro_batch_size > 1 and config.performance.cuda_graph_impl == "none":
        return least, max(1, training.micro_batch_size // 4)
    # CUDA graphs replay with the micro-batch size that they were captured with.
    return (least, training.micro_batch_size) if num_microbatches > least else None
