"""Micro-batches of one data-parallel rank, prepared ahead by background threads.

Places of the samples of the n-th micro-batch of rank r, of R data-parallel ranks:

    start_sample + (n * R + r) * micro_batch_size + (0 .. micro_batch_size - 1)

An iteration takes as many micro-batches of each rank as its global batch needs. So all ranks together read the samples
in order, whatever the layout and the batch size, and resuming needs one integer, `start_sample`. The index of a sample
is its place, unless samples before it are skipped (config/skipped_samples.py). A sample is a pure function of its
index, and batches are returned in order: the number of workers does not change them. Preparing a batch takes far less
time than training on it, so one thread suffices; more threads help if reading a sample waits for a disk or a network.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_a2d.config.skipped_samples import NONE_SKIPPED, SkippedSamples
from megatron_a2d.diffusion.attention_masks import fully_annealed
from megatron_a2d.utils.atomic_write import new_file
from megatron_a2d.utils.errors import UserError


class Samples(Protocol):
    """A dataset of samples, such as `PackedDataset`."""

    def tokens(self, sample_index: int, /) -> np.ndarray: ...


# (tokens [s] int64, sample index) -> `diffusion.corruption.Corrupted`.
MakeSample = Callable[[np.ndarray, int], Any]


class Batch(NamedTuple):
    """One micro-batch, on the CPU. b = micro_batch_size, s = positions per sample (RunConfig.input_length)."""

    tokens: Tensor  # [b, s] int64, the model's input
    labels: Tensor  # [b, s] int64, already shifted
    weights: Tensor  # [b, s] float32, 0 where a position has no loss
    times: Tensor  # [b] float32, diffusion times
    sample_index: Tensor  # [b] int64
    num_maskable: Tensor  # [b] int64, each sample's contribution to the loss's denominator, in tokens
    documents: Tensor | None = None  # [b, s] int64: only tokens of equal number attend to one another; None: all do
    positions: Tensor | None = None  # [b, s] int64; None: 0 .. s - 1
    annealing: Tensor | None = None  # [b, 2] int64 (diffusion/attention_masks.py); None: no causal mask is left
    levels: Tensor | None = None  # [b, s] int64 (diffusion/block_diffusion.py); None: there are no blocks
    # For metrics: n noise segments per sample, each masked at one time (diffusion/corruption.py).
    noise_segments: Tensor | None = None  # [b, n, 3] float64: time, num maskable, num masked; None: nothing is masked
    segment_of_position: Tensor | None = None  # [b, s] int64; None: all 0
    masked_weights: Tensor | None = None  # [b, s] float32; None: all weights are those of masked tokens


def make_batch(
    dataset: Samples, make_sample: MakeSample, first: int, size: int, skipped: SkippedSamples = NONE_SKIPPED
) -> Batch:
    """The samples at the places first .. first + size - 1 of those that are not `skipped`, as one batch."""
    indices = [skipped.index_of(place) for place in range(first, first + size)]
    samples = [make_sample(dataset.tokens(index), index) for index in indices]
    return Batch(
        tokens=torch.from_numpy(np.stack([sample.tokens for sample in samples])),
        labels=torch.from_numpy(np.stack([sample.labels for sample in samples])),
        weights=torch.from_numpy(np.stack([sample.weights for sample in samples])),
        times=torch.tensor([sample.time for sample in samples], dtype=torch.float32),
        sample_index=torch.tensor(indices, dtype=torch.int64),
        num_maskable=torch.tensor([sample.num_maskable for sample in samples], dtype=torch.int64),
        documents=_stack([sample.documents for sample in samples], lambda length: np.zeros(length, dtype=np.int64)),
        positions=_stack([sample.positions for sample in samples], lambda length: np.arange(length, dtype=np.int64)),
        annealing=_stack([sample.annealing for sample in samples], lambda _: fully_annealed()),
        levels=_stack([sample.levels for sample in samples], lambda length: np.zeros(length, dtype=np.int64)),
        noise_segments=_stack(_padded([sample.noise_segments for sample in samples]), lambda n: np.zeros((n, 3))),
        segment_of_position=_stack(
            [sample.segment_of_position for sample in samples], lambda length: np.zeros(length, dtype=np.int64)
        ),
        masked_weights=_stack(
            [sample.masked_weights for sample in samples], lambda length: np.zeros(length, dtype=np.float32)
        ),
    )


def _stack(rows: list[np.ndarray | None], ordinary: Callable[[int], np.ndarray]) -> Tensor | None:
    """[b, s], with a default for samples that have None; None if all have."""
    length = next((len(row) for row in rows if row is not None), None)
    if length is None:
        return None
    return torch.from_numpy(np.stack([ordinary(length) if row is None else row for row in rows]))


def _padded(segments: list[np.ndarray | None]) -> list[np.ndarray | None]:
    """[n, 3] each, with segments of no tokens where a sample has fewer than another one."""
    number = max((len(row) for row in segments if row is not None), default=0)
    return [None if row is None else np.pad(row, ((0, number - len(row)), (0, 0))) for row in segments]


def write_batch(path: Path, batch: Batch) -> None:
    """Write the batch as an .npz of its fields, for numpy.load."""
    fields = {name: value.numpy() for name, value in batch._asdict().items() if value is not None}
    with new_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **fields)


class MicroBatches(Iterator[Batch]):
    """An endless iterator over this rank's micro-batches; `iteration` takes those of one global batch.

    num_workers: threads that prepare batches ahead; 0: each batch is prepared by its `next`. An error in a worker is
    raised by the `next` that would have returned its batch, and ends the iterator. `close` (or a `with` block) stops
    the threads; so does garbage collection of the iterator.
    """

    def __init__(
        self,
        dataset: Samples,
        make_sample: MakeSample,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_sample: int = 0,
        num_workers: int = 1,
        skipped: SkippedSamples = NONE_SKIPPED,
    ):
        if not 0 <= dp_rank < dp_size or min(micro_batch_size, global_batch_size) < 1 or start_sample < 0:
            raise ValueError(f"{micro_batch_size=} {global_batch_size=} {dp_rank=} {dp_size=} {start_sample=}")
        self._dataset = dataset
        self._make_sample, self._skipped = make_sample, skipped
        self._size = micro_batch_size
        self._next = start_sample + dp_rank * micro_batch_size
        self._stride = dp_size * micro_batch_size
        self.num_microbatches = self._number_of(global_batch_size)
        self._closed = False
        self._pending: deque[Future[Batch]] = deque()
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="batches") if num_workers else None
        # Two prefetched batches per worker, and at least a few for steps of several micro-batches.
        for _ in range(max(4, 2 * num_workers) if self._pool else 0):
            self._submit()

    def iteration(self, global_batch_size: int) -> list[Batch]:
        """This rank's micro-batches of the next iteration."""
        return [next(self) for _ in range(self._number_of(global_batch_size))]

    def _number_of(self, global_batch_size: int) -> int:
        """Micro-batches per rank; UserError if they do not divide the batch."""
        if global_batch_size % self._stride:
            raise UserError(
                f"--global-batch-size {global_batch_size}: not a multiple of --micro-batch-size {self._size} x "
                f"{self._stride // self._size} data-parallel ranks; change one of them"
            )
        return global_batch_size // self._stride

    def samples(self, first: int, size: int) -> Batch:
        """The samples at the places first .. first + size - 1, regardless of their rank."""
        return make_batch(self._dataset, self._make_sample, first, size, self._skipped)

    def _arguments(self) -> tuple[Samples, MakeSample, int, int, SkippedSamples]:
        first = self._next
        self._next += self._stride
        return self._dataset, self._make_sample, first, self._size, self._skipped

    def _submit(self) -> None:
        assert self._pool is not None
        # No reference to self, so that garbage collection of the iterator ends its threads.
        self._pending.append(self._pool.submit(make_batch, *self._arguments()))

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        try:
            if self._pool is None:
                return make_batch(*self._arguments())
            batch = self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        self._submit()
        return batch

    def close(self) -> None:
        """Stop the threads and drop the prefetched batches. May be called more than once."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> MicroBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
