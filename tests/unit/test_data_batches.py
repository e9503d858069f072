"""Micro-batches: the same bits for every number of workers and ranks, and after a restart."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_a2d.data.dataloader import Batch, MicroBatches, make_batch, write_batch
from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.diffusion.corruption import Corrupted, corrupt, next_token
from megatron_a2d.diffusion.rng import Noise
from megatron_a2d.utils.errors import UserError

NOISE = Noise(seed=11, mask_token_id=299)
GLOBAL_BATCH_SIZE = 8
NUM_SAMPLES = 37


def make_sample(tokens: np.ndarray, index: int) -> Corrupted:
    return corrupt(tokens, index, NOISE)


@pytest.fixture
def dataset(tmp_path: Path) -> PackedDataset:
    builder = IndexedDatasetBuilder(str(tmp_path / "t.bin"), dtype=np.uint16)
    tokens = np.random.default_rng(0).integers(0, 299, size=NUM_SAMPLES * 16 + 5)
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(tmp_path / "t.idx"))
    return PackedDataset(tmp_path / "t", seq_length=16, seed=2)


def take(dataset: PackedDataset, count: int, **kwargs) -> list[Batch]:
    """The first `count` micro-batches."""
    arguments = {"micro_batch_size": 2, "global_batch_size": GLOBAL_BATCH_SIZE, **kwargs}
    with MicroBatches(dataset, arguments.pop("make_sample", make_sample), **arguments) as batches:
        return list(islice(batches, count))


def assert_equal(some: list[Batch], others: list[Batch]) -> None:
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        for name in ("tokens", "labels", "weights", "times", "sample_index", "num_maskable"):
            a, b = getattr(one, name), getattr(other, name)
            assert a.dtype == b.dtype and torch.equal(a, b), name


def merged(batches: list[Batch]) -> Batch:
    columns = zip(*(batch[:6] for batch in batches), strict=True)
    return Batch(*(torch.cat(column) for column in columns))


def test_a_batch_is_its_samples(dataset):
    (batch,) = take(dataset, 1, start_sample=5)
    assert batch.tokens.shape == batch.labels.shape == batch.weights.shape == (2, 16)
    dtypes = [value.dtype for value in batch[:5]]
    assert dtypes == [torch.int64, torch.int64, torch.float32, torch.float32, torch.int64]
    assert batch.sample_index.tolist() == [5, 6]
    for row, index in enumerate((5, 6)):
        sample = make_sample(dataset.tokens(index), index)
        assert np.array_equal(batch.tokens[row], sample.tokens)
        assert np.array_equal(batch.labels[row], sample.labels)
        assert np.array_equal(batch.weights[row], sample.weights)
        assert batch.times[row] == np.float32(sample.time)
    assert batch.num_maskable.tolist() == [15, 15]
    assert (batch.tokens == NOISE.mask_token_id).any()


def test_autoregressive_samples(dataset):
    (batch,) = take(dataset, 1, make_sample=lambda tokens, index: next_token(tokens))
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.weights.sum(1).tolist() == batch.num_maskable.tolist() == [15, 15]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(dataset, num_workers):
    # 40 micro-batches are 80 samples: two wraps of the epoch.
    assert_equal(take(dataset, 40, num_workers=num_workers), take(dataset, 40, num_workers=0))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_ranks_share_the_global_batch(dataset, dp_size, micro_batch_size):
    num_microbatches = GLOBAL_BATCH_SIZE // (dp_size * micro_batch_size)
    whole = take(dataset, 12, micro_batch_size=GLOBAL_BATCH_SIZE, num_workers=0)
    ranks = []
    for dp_rank in range(dp_size):
        layout = {"micro_batch_size": micro_batch_size, "dp_rank": dp_rank, "dp_size": dp_size}
        ranks.append(take(dataset, 12 * num_microbatches, **layout))
    for iteration in range(12):
        numbers = range(iteration * num_microbatches, (iteration + 1) * num_microbatches)
        together = merged([rank[number] for number in numbers for rank in ranks])
        first = iteration * GLOBAL_BATCH_SIZE
        assert together.sample_index.tolist() == list(range(first, first + GLOBAL_BATCH_SIZE))
        assert_equal([together], [whole[iteration]])


def test_ranks_differ(dataset):
    layout = {"micro_batch_size": 2, "dp_size": 2}
    first, second = (take(dataset, 1, dp_rank=rank, **layout)[0] for rank in range(2))
    assert first.sample_index.tolist() == [0, 1] and second.sample_index.tolist() == [2, 3]
    assert not torch.equal(first.tokens, second.tokens)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_restart_continues_the_stream(dataset, num_workers):
    unbroken = take(dataset, 40, num_workers=1)
    for iteration in (1, 4, 7):
        rest = take(dataset, 40 - 4 * iteration, start_sample=iteration * GLOBAL_BATCH_SIZE, num_workers=num_workers)
        assert_equal(rest, unbroken[4 * iteration :])
    # A restart may change the layout and the batch size: samples continue where they stopped.
    other = take(dataset, 2, start_sample=24, micro_batch_size=3, global_batch_size=12)
    assert merged(other).sample_index.tolist() == list(range(24, 30))
    assert torch.equal(merged(other).tokens, merged(unbroken).tokens[24:30])


def test_the_epoch_wraps_with_a_new_order_and_new_noise(dataset):
    stream = merged(take(dataset, NUM_SAMPLES, global_batch_size=2))
    first, second = stream.labels[:NUM_SAMPLES], stream.labels[NUM_SAMPLES:]
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist()))
    assert not torch.equal(first, second)
    in_order = PackedDataset(dataset.file.prefix, 16, shuffle=False)
    stream = merged(take(in_order, NUM_SAMPLES, global_batch_size=2))
    assert torch.equal(stream.labels[:NUM_SAMPLES], stream.labels[NUM_SAMPLES:])
    assert not torch.equal(stream.tokens[:NUM_SAMPLES], stream.tokens[NUM_SAMPLES:])


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_an_error_in_a_worker_reaches_the_consumer_in_its_place(dataset, num_workers):
    def failing(tokens: np.ndarray, index: int) -> Corrupted:
        if index == 6:
            raise UserError("sample 6: broken")
        return make_sample(tokens, index)

    batches = MicroBatches(dataset, failing, micro_batch_size=2, global_batch_size=8, num_workers=num_workers)
    assert [next(batches).sample_index.tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(UserError, match="sample 6: broken"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    assert not worker_threads()


def worker_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_threads_end(dataset):
    arguments = {"micro_batch_size": 2, "global_batch_size": 8, "num_workers": 2}
    batches = MicroBatches(dataset, make_sample, **arguments)
    next(batches)
    assert worker_threads()
    batches.close()
    batches.close()
    assert not worker_threads()
    with pytest.raises(StopIteration):
        next(batches)

    dropped = MicroBatches(dataset, make_sample, **arguments)
    next(dropped)
    threads = worker_threads()
    assert threads
    del dropped
    gc.collect()
    for thread in threads:
        thread.join(timeout=300)
    assert not worker_threads()


def test_an_open_iterator_does_not_hold_the_process():
    script = """
        import numpy as np
        from megatron_a2d.data.dataloader import MicroBatches
        from megatron_a2d.diffusion.corruption import next_token

        class Dataset:
            def tokens(self, index):
                return np.arange(index, index + 16)

        def make_sample(tokens, index):
            return next_token(tokens)

        batches = MicroBatches(Dataset(), make_sample, micro_batch_size=2, global_batch_size=2, num_workers=2)
        print(next(batches).num_maskable.sum().item())
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "30", "")


def test_batches_are_made_ahead(dataset):
    made = []

    def recording(tokens: np.ndarray, index: int) -> Corrupted:
        made.append(index)
        return make_sample(tokens, index)

    with MicroBatches(dataset, recording, micro_batch_size=1, global_batch_size=4, num_workers=1) as batches:
        deadline = time.monotonic() + 300
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert made == [0, 1, 2, 3]  # before anyone asked, and no further
        next(batches)
    made.clear()
    MicroBatches(dataset, recording, micro_batch_size=1, global_batch_size=4, num_workers=0)
    assert made == []


def test_batch_sizes_that_do_not_divide(dataset):
    assert MicroBatches(dataset, make_sample, micro_batch_size=2, global_batch_size=8, dp_size=2).num_microbatches == 2
    with pytest.raises(UserError, match="--global-batch-size 8: not a multiple of --micro-batch-size 3 x 1"):
        MicroBatches(dataset, make_sample, micro_batch_size=3, global_batch_size=8)
    with pytest.raises(ValueError):
        MicroBatches(dataset, make_sample, micro_batch_size=2, global_batch_size=8, dp_rank=2, dp_size=2)


def test_what_only_some_samples_have(dataset, tmp_path):
    """An ordinary row stands in for what a sample does not have; what none has is None."""
    full = {
        "documents": np.array([3, 3, 4]), "positions": np.array([0, 1, 0]), "annealing": np.array([7, 9]), "levels": np.array([1, 3, 5]),
        "noise_segments": np.array([[0.5, 3.0, 1.0], [0.25, 2.0, 2.0]]), "segment_of_position": np.array([0, 1, 1]),
        "masked_weights": np.array([0.5, 0, 2], dtype=np.float32),
    }  # fmt: skip
    ordinary = {
        "documents": [0, 0, 0], "positions": [0, 1, 2], "annealing": [0, 1 << 53], "levels": [0, 0, 0],
        "noise_segments": [[0.0] * 3] * 2, "segment_of_position": [0, 0, 0], "masked_weights": [0.0, 0.0, 0.0],
    }  # fmt: skip

    def sample(tokens: np.ndarray, index: int) -> Corrupted:
        plain = Corrupted(tokens[:3], tokens[:3], np.ones(3, np.float32), 0.5, 2)
        return plain._replace(**full) if index == 1 else plain

    batch = make_batch(dataset, sample, 0, 3)
    for name, value in full.items():
        column = getattr(batch, name)
        assert (
            column.tolist() == [ordinary[name], value.tolist(), ordinary[name]] and column.numpy().dtype == value.dtype
        )
    plain = make_batch(dataset, sample, 2, 2)
    assert all(getattr(plain, name) is None for name in full) and plain.sample_index.tolist() == [2, 3]
    write_batch(tmp_path / "batch.npz", plain)
    with np.load(tmp_path / "batch.npz") as stored:
        assert {name: stored[name].tolist() for name in stored} == {
            name: value.tolist() for name, value in plain._asdict().items() if value is not None
        }


@pytest.mark.parametrize("wrong", [{"dp_rank": -1}, {"dp_rank": 2, "dp_size": 2}, {"micro_batch_size": 0}, {"global_batch_size": 0}, {"start_sample": -1}])  # fmt: skip
def test_layouts_that_are_none(wrong, dataset):
    with pytest.raises(ValueError, match="micro_batch_size="):
        MicroBatches(dataset, make_sample, **{"micro_batch_size": 1, "global_batch_size": 4, "num_workers": 0, **wrong})


def test_samples_out_of_turn_leave_the_stream_alone(dataset):
    with MicroBatches(dataset, make_sample, micro_batch_size=2, global_batch_size=8, num_workers=0) as batches:
        next(batches)
        assert batches.samples(30, 3).sample_index.tolist() == [30, 31, 32]
        assert next(batches).sample_index.tolist() == [2, 3]
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize(("num_workers", "ahead"), [(1, 4), (2, 4), (3, 6)])
def test_how_many_are_made_ahead(num_workers, ahead, dataset):
    with MicroBatches(
        dataset, make_sample, micro_batch_size=1, global_batch_size=4, num_workers=num_workers
    ) as batches:
        assert len(batches._pending) == ahead
        next(batches)
        assert len(batches._pending) == ahead


def test_what_waits_is_dropped_at_the_end(dataset):
    made, may_go_on = [], threading.Event()

    def waiting(tokens: np.ndarray, index: int) -> Corrupted:
        made.append(index)
        may_go_on.wait(30)
        return make_sample(tokens, index)

    batches = MicroBatches(dataset, waiting, micro_batch_size=1, global_batch_size=4, num_workers=1)
    closing = threading.Thread(target=batches.close)
    closing.start()
    while not batches._pool._shutdown:
        time.sleep(0.001)
    with batches._pool._shutdown_lock:  # held until what waits is dropped
        may_go_on.set()
    closing.join(30)
    assert made in ([], [0]), "what had begun at most"
