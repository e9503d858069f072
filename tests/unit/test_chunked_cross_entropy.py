"""Head and loss a few rows at a time: the same numbers as all at once, in less memory."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_a2d.model import chunked_cross_entropy
from megatron_a2d.model.chunked_cross_entropy import _MaskedHead, _over_ranks, _statistics, rows_per_chunk

HIDDEN, VOCABULARY, ROWS = 32, 509, 77


class OneRank:
    rank, size = staticmethod(lambda: 0), staticmethod(lambda: 1)


def make(
    rows: int = ROWS, vocabulary: int = VOCABULARY
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, HIDDEN, generator=generator).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    return hidden, weight, labels, torch.rand(rows, generator=generator)


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    losses = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    return losses, *torch.autograd.grad((losses * scale).sum(), (hidden, weight))


@pytest.mark.parametrize("chunk", [1, 10, 77, 1000])
def test_losses_and_gradients_are_exact(chunk: int) -> None:
    hidden, weight, labels, scale = make()
    losses, correct = _MaskedHead.apply(hidden, weight, labels, OneRank, chunk)
    (losses * scale).sum().backward()
    for found, expected in zip((losses, hidden.grad, weight.grad), plain(*make()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(correct, (hidden @ weight.T).argmax(1) == labels)


@pytest.mark.parametrize("rank", [0, 1])
def test_kept_logits(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if they were recomputed, on one rank and on one of two; and a second backward pass, which recomputes them."""

    def other_rank_has_larger_logits(own: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
        return own[0] + rank, own[1] + 3, own[2], own[3]

    monkeypatch.setattr(chunked_cross_entropy, "_over_ranks", other_rank_has_larger_logits)
    results = []
    for keeps in (False, True):
        hidden, weight, labels, scale = make()
        losses, _ = _MaskedHead.apply(hidden, weight, labels, OneRank, ROWS, keeps)
        for _ in range(2):
            results.append(torch.autograd.grad((losses * scale).sum(), (hidden, weight), retain_graph=True))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-5, atol=1e-6)


def test_when_logits_are_kept() -> None:
    """If they are one chunk in fp32, and there will be a backward pass."""
    hidden = torch.zeros(8, 4)
    assert chunked_cross_entropy._keeps(hidden, 8)
    assert not any(
        chunked_cross_entropy._keeps(*case) for case in ((hidden, 7), (hidden.bfloat16(), 8), (hidden[:0], 8))
    )
    with torch.no_grad():
        assert not chunked_cross_entropy._keeps(hidden, 8)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_vocabulary_over_ranks(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks' results combined: loss and argmax over the full vocabulary; the first of equal logits."""
    hidden, weight, _, _ = make(vocabulary=30 * ranks)
    logits = hidden.detach() @ weight.detach().T
    logits[:, 17] = logits[:, -3] = logits.max(1).values + 1  # equal, on different ranks
    labels = torch.arange(ROWS) * 7 % (30 * ranks)
    labels[:20] = torch.tensor([17, 30 * ranks - 3]).repeat(10)
    parts = [_statistics(part.clone(), labels - 30 * rank) for rank, part in enumerate(logits.split(30, dim=1))]

    def all_gather(found: list[torch.Tensor], own: torch.Tensor, group: Any) -> None:
        for place, part in zip(found, parts, strict=True):
            place.copy_(part)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    group = SimpleNamespace(size=lambda: ranks)
    for own in parts:
        largest, total, label, index = _over_ranks(own, 30, group)
        assert index.long().tolist() == logits.argmax(1).tolist() == [17] * ROWS
        losses = largest + total.log() - label
        torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-5, atol=2e-5)
    others = logits.clone()
    others[:, 17] = -1e9
    parts = [_statistics(part.clone(), labels) for part in others.split(30, dim=1)]
    assert _over_ranks(parts[0], 30, group)[3].long().tolist() == [30 * ranks - 3] * ROWS


def test_a_wrong_label_shows() -> None:
    """Control: the comparison above sees one label that is off by one."""
    hidden, weight, labels, _ = make()
    labels[5] = (labels[5] + 1) % VOCABULARY
    losses, _ = _MaskedHead.apply(hidden, weight, labels, OneRank, 10)
    assert (losses - plain(*make())[0]).abs().max() > 1e-2


def test_no_rows() -> None:
    hidden, weight, labels, _ = make(rows=0)
    losses, correct = _MaskedHead.apply(hidden, weight, labels, OneRank, 10)
    losses.sum().backward()
    assert len(losses) == len(correct) == 0 and weight.grad is not None and not weight.grad.any()


def test_gradients_go_to_megatrons_buffer() -> None:
    """Summed over micro-batches in fp32, and not once more by autograd."""
    hidden, weight, labels, scale = make()
    weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
    for _ in range(2):
        losses, _ = _MaskedHead.apply(hidden, weight, labels, OneRank, 10)
        (losses * scale).sum().backward()
    expected = 1 + 2 * plain(*make())[2]
    torch.testing.assert_close(weight.main_grad, expected, rtol=1e-5, atol=5e-5)  # type: ignore[attr-defined]
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]


def test_a_tied_weight_keeps_the_embeddings_gradient() -> None:
    """What autograd adds up for it is the embedding's part alone: megatron puts that into the buffer after the head's."""
    hidden, weight, labels, scale = make()
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    weight.zero_out_wgrad = True  # type: ignore[attr-defined]
    tokens = torch.arange(ROWS) % VOCABULARY
    losses, _ = _MaskedHead.apply(hidden + F.embedding(tokens, weight), weight, labels, OneRank, 10)
    (losses * scale).sum().backward()
    whole_hidden, whole_weight, _, _ = make()
    losses = F.cross_entropy(
        (whole_hidden + F.embedding(tokens, whole_weight)) @ whole_weight.T, labels, reduction="none"
    )
    (losses * scale).sum().backward()
    assert weight.grad is not None and whole_weight.grad is not None
    torch.testing.assert_close(weight.main_grad + weight.grad, whole_weight.grad, rtol=1e-5, atol=5e-5)  # type: ignore[attr-defined]
    assert weight.grad[ROWS:].abs().max() == 0 < weight.grad[:ROWS].abs().min(dim=1).values.max()


def test_bf16_sums_its_chunks_in_fp32() -> None:
    hidden, weight, labels, scale = (tensor.detach() for tensor in make(rows=512))
    expected = plain(hidden.requires_grad_(), weight.requires_grad_(), labels, scale)[2]
    weight_16 = weight.detach().bfloat16().requires_grad_()
    weight_16.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    losses, _ = _MaskedHead.apply(hidden.detach().bfloat16().requires_grad_(), weight_16, labels, OneRank, 64)
    (losses * scale).sum().backward()
    assert losses.dtype == torch.float32
    assert (weight_16.main_grad - expected).norm() / expected.norm() < 0.02  # type: ignore[attr-defined]


class Memory(TorchDispatchMode):
    """Bytes of all tensors that operations made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in self._known:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)

        def forget() -> None:
            self._known.discard(address)
            self.now -= size

        weakref.finalize(storage, forget)


def peak_bytes(chunk: int, rows: int, vocabulary: int) -> int:
    hidden, weight, labels, scale = make(rows, vocabulary)
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    with Memory() as memory:
        losses, _ = _MaskedHead.apply(hidden, weight, labels, OneRank, chunk)
        (losses * scale).sum().backward()
    return memory.peak


def test_logits_are_never_whole() -> None:
    """The peak is a few chunks and the weight's gradient, whatever the number of rows; control: one chunk of all rows."""
    rows, vocabulary = 1024, 4096
    whole = rows * vocabulary * 4
    small, more_rows = (peak_bytes(32, number, vocabulary) for number in (rows, 2 * rows))
    assert small < whole / 4 and more_rows < 1.5 * small
    assert peak_bytes(rows, rows, vocabulary) > whole


def test_size_of_a_chunk() -> None:
    for device in ("cpu", "cuda"):
        for vocabulary in (151_936, 151_936 // 8, 256):
            rows = rows_per_chunk(vocabulary, device)
            assert rows % 64 == 0 and rows >= 64
    assert rows_per_chunk(151_936, "cuda") * 151_936 * 2 < 1.1e9
    assert rows_per_chunk(10**9, "cpu") == 64
