"""Moments of loss and gradient over independent batches: their variance, and the gradient noise scale.

The statistics of these sums are in confidence.py. Batches come in groups, so that the spread over groups gives the
uncertainty. Every scheme sees the same tokens and the same uniform numbers for its masks; only timesteps differ. With
complementary masks a batch has half of the texts, each twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_a2d.data.dataloader import MakeSample, MicroBatches, Samples
from megatron_a2d.data.diffusion_samples import TextPairs
from megatron_a2d.diffusion.corruption import Corrupted, corrupt, next_token
from megatron_a2d.diffusion.rng import Noise, Stream, uniforms
from megatron_a2d.megatron_compat.device import device
from megatron_a2d.study.load_run import LoadedRun
from megatron_a2d.terminal.console import progress
from megatron_a2d.training.param_shards import ParamShard, over_ranks, owned_shards, squares_by_role
from megatron_a2d.training.train_step import forward_backward, loss_totals


@dataclass(frozen=True)
class BatchTimes(Noise):
    """Noise whose timesteps depend on a sample's index in its batch of `batch_size`: the schemes compared with ours.

    iid: independent. antithetic: in pairs, t and 1 - t. stratified: frac(u + index / batch_size), one u per batch
    (MDLM's low-discrepancy sampler). by_index: as in training, independent of the batch. complementary: by_index for
    pairs of samples, the second with the first one's complement as its mask (--complementary-masks).
    """

    scheme: str = "by_index"
    batch_size: int = 1

    def time(self, sample_index: int) -> float:
        if self.scheme in ("by_index", "complementary"):
            return super().time(sample_index)
        batch, place = divmod(sample_index, self.batch_size)
        if self.scheme == "iid":
            fraction = uniforms(self.seed, Stream.STUDY_TIME, sample_index, 1)[0]
        elif self.scheme == "antithetic":
            fraction = uniforms(self.seed, Stream.STUDY_TIME, sample_index // 2, 1)[0]
            fraction = 1 - fraction if place % 2 else fraction
        else:
            assert self.scheme == "stratified", self.scheme
            fraction = (uniforms(self.seed, Stream.STUDY_TIME, batch, 1)[0] + place / self.batch_size) % 1.0
        return self.min_timestep + (1 - self.min_timestep) * float(fraction)


class _Sums:
    """Over a group of batches: the sum of gradients, the sum of their squares, the number of batches."""

    def __init__(self, shards: list[ParamShard]):
        self._shards = shards
        self._sum = [torch.zeros(shard.stop - shard.start, device=shard.gradient().device) for shard in shards]
        self._squares = torch.zeros((), dtype=torch.float64, device=device())
        self._count = 0

    def add(self) -> None:
        for total, shard in zip(self._sum, self._shards, strict=True):
            total += shard.gradient()
        self._squares += squares_by_role(self._shards, lambda number, shard: shard.gradient()).sum()
        self._count += 1

    def read(self) -> dict[str, float]:
        square = squares_by_role(self._shards, lambda number, shard: self._sum[number]).sum()
        squares, square_of_sum = over_ranks(torch.stack([self._squares, square])).tolist()
        return {"count": self._count, "sum_of_squares": squares, "square_of_sum": square_of_sum}


def gradient_moments(
    loaded: LoadedRun,
    batch_size: int,
    num_groups: int,
    batches_per_group: int,
    scheme: str = "by_index",
    same_tokens: bool = False,
    mask_sampling: str = "bernoulli",
) -> dict[str, Any]:
    """Moments over num_groups x batches_per_group batches; collective. same_tokens: only the noise differs.

    Returns {"groups": [moments], "all": moments, "losses": [one per batch], "batch_size"}.
    """
    shards = owned_shards(loaded.state)
    texts = TextPairs(loaded.train_data) if scheme == "complementary" else loaded.train_data
    total = _Sums(shards)
    groups, losses = [], []
    with progress(f"gradients, {scheme}", num_groups * batches_per_group, "batches") as advance:
        for group in range(num_groups):
            sums = _Sums(shards)
            for number in range(batches_per_group):
                replicate = group * batches_per_group + number
                make = _make(loaded, replicate, batch_size, scheme, mask_sampling)
                first = 0 if same_tokens else replicate * batch_size
                losses.append(one_batch(loaded, texts, _relocated(make, first), batch_size, first))
                sums.add()
                total.add()
                advance(1)
            groups.append(sums.read())
    return {"batch_size": batch_size, "groups": groups, "all": total.read(), "losses": losses}


def _make(loaded: LoadedRun, replicate: int, batch_size: int, scheme: str, mask_sampling: str) -> MakeSample:
    """The sample function of the objective, with the replicate's own noise."""
    diffusion = loaded.config.diffusion
    if diffusion.objective == "ar":
        return lambda tokens, index: next_token(tokens)
    assert loaded.model_config.mask_token_id is not None
    noise = BatchTimes(
        seed=loaded.config.data.seed + replicate,
        mask_token_id=loaded.model_config.mask_token_id,
        schedule=diffusion.noise_schedule,
        min_timestep=diffusion.min_timestep,
        label_shift=diffusion.label_shift,
        scheme=scheme,
        batch_size=batch_size,
        mask_sampling=mask_sampling,
        complementary=scheme == "complementary",
    )
    return lambda tokens, index: corrupt(tokens, index, noise)


def _relocated(make: MakeSample, first: int) -> MakeSample:
    """Noise by index in the batch; replicates differ by seed."""

    def made(tokens: np.ndarray, index: int) -> Corrupted:
        return make(tokens, index - first)

    return made


def one_batch(
    loaded: LoadedRun, texts: Samples, make: Callable[[np.ndarray, int], Corrupted], batch_size: int, first: int
) -> float:
    """Run one batch of `texts`, leaving its gradient in the parameter shards; returns its loss."""
    chunks = loaded.state.chunks
    batches = MicroBatches(
        texts, make, micro_batch_size=loaded.config.training.micro_batch_size, global_batch_size=batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(), dp_size=parallel_state.get_data_parallel_world_size(),
        start_sample=first, num_workers=0,
    )  # fmt: skip
    for chunk in chunks:
        chunk.zero_grad_buffer()
    loaded.state.optimizer.zero_grad()
    iteration = [next(batches) for _ in range(batches.num_microbatches)]
    totals: Tensor = loss_totals(forward_backward(list(chunks), iteration, forward_only=False))
    dist.all_reduce(totals)
    return float(totals[0] / totals[4])
