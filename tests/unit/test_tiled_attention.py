"""Attention that skips masked entries: equal to attention under the dense mask, and its work follows the open entries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_a2d.diffusion.attention_masks import allowed_entries, annealing_key_and_threshold, encoded_mask
from megatron_a2d.model import attention_tiles, masked_attention
from megatron_a2d.model.masked_attention import Mask, dense_mask, sparse_attention

LENGTH = 150
KEYS = 2 * LENGTH


def levels(length: int = LENGTH, block: int = 32, causal: bool = False) -> Tensor:
    """Block diffusion's: a noised copy and a clean one."""
    places = torch.arange(length)
    starts = places // block * block
    return torch.cat([2 * starts, 2 * (places if causal else starts) + 1])[None]


def encoded_levels(length: int) -> Tensor:
    encoded = encoded_mask(None, None, levels(length), 2 * length)
    assert encoded is not None
    return encoded


def documents(*lengths: int, copies: int = 1) -> Tensor:
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return numbers.repeat(copies)[None]


def annealing(share: int) -> Tensor:
    return torch.from_numpy(annealing_key_and_threshold(1, 2, share, 1000))[None]


PACKED = documents(90, 3, 40, 17, copies=2)
ENCODED: dict[str, Tensor | None] = {
    "block": encoded_mask(None, None, levels(), KEYS),
    "blocks of 6": encoded_mask(None, None, levels(block=6), KEYS),
    "blocks of 100": encoded_mask(None, None, levels(block=100), KEYS),
    "block + ar": encoded_mask(None, None, levels(causal=True), KEYS),
    "block in documents": encoded_mask(PACKED, None, levels(), KEYS),
    "documents": encoded_mask(documents(1, 130, 5, 3, 64, 97), None, None, KEYS),
    "short documents": encoded_mask(documents(*[7] * 42, 6), None, None, KEYS),
    "annealing": encoded_mask(None, annealing(400), None, KEYS),
    "annealing's end in documents": encoded_mask(PACKED, annealing(980), None, KEYS),
    "annealing's beginning": encoded_mask(None, annealing(3), None, KEYS),
    "several samples": encoded_mask(torch.cat([PACKED, PACKED, documents(KEYS)]), None, levels().repeat(3, 1), KEYS),
    "no mask": masked_attention.no_mask(KEYS, torch.device("cpu")),
}
MASKS = {name: encoded for name, encoded in ENCODED.items() if encoded is not None}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention_tiles, "CHUNK", 16)
    monkeypatch.setattr(attention_tiles, "SHORT", 8)
    monkeypatch.setattr(attention_tiles, "MOST", 32)
    monkeypatch.setattr(masked_attention, "SHORTEST", 0)
    monkeypatch.setattr(masked_attention, "_LARGEST_SHARE", 2.0)
    masked_attention._tiles_of_fields.cache_clear()
    yield
    masked_attention._tiles_of_fields.cache_clear()


def inputs(mask: Mask, dtype: torch.dtype = torch.float32, heads: int = 4, groups: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((mask.queries.stop - mask.queries.start, heads), (mask.encoded.size(2), groups))
    return [
        torch.randn(length, max(2, len(mask.encoded)), n, 16, generator=generator).to(dtype).requires_grad_()
        for length, n in (sizes[0], sizes[1], sizes[1])
    ]


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float | None) -> Tensor:
    output = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)), attn_mask=dense_mask(mask), scale=scale,
        enable_gqa=True,
    )  # fmt: skip
    return output.permute(2, 0, 1, 3)


def with_gradients(attention: Any, tensors: list[Tensor], mask: Mask, scale: float | None = None) -> list[Tensor]:
    output = attention(*tensors, mask, scale)
    assert output is not None
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, tensors, gradient)]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, relative to the largest value of each tensor."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_equal_to_a_dense_mask(name: str, causal: bool) -> None:
    """Output and gradients of all queries, and of each context-parallel rank's; shared heads, and a scale."""
    encoded = MASKS[name]
    for first, end in ((0, KEYS), (0, 75), (75, 150), (150, 225), (225, 300)):
        mask = Mask(encoded, slice(first, end), causal)
        tensors = inputs(mask)
        expected = with_gradients(dense, tensors, mask, 0.3)
        assert distance(with_gradients(sparse_attention, tensors, mask, 0.3), expected) < 1e-6, (first, end)


@pytest.mark.parametrize("name", ["block + ar", "several samples"])
def test_precision(name: str) -> None:
    """fp64 to 1e-14; bf16 as far from fp64 as a dense mask is; and the same bits every time."""
    mask = Mask(MASKS[name], slice(0, KEYS), False)
    tensors = [tensor.detach().double().requires_grad_() for tensor in inputs(mask, torch.bfloat16)]
    exact = with_gradients(dense, tensors, mask)
    assert distance(with_gradients(sparse_attention, tensors, mask), exact) < 1e-14
    tensors = inputs(mask, torch.bfloat16)
    found = with_gradients(sparse_attention, tensors, mask)
    assert distance(found, exact) < 1.2 * distance(with_gradients(dense, tensors, mask), exact)
    assert all(map(torch.equal, found, with_gradients(sparse_attention, tensors, mask)))


@pytest.mark.parametrize("name", MASKS)
def test_compiled_kernel_reads_the_same_mask(name: str) -> None:
    """FlexAttention, not compiled, and its forward pass: the rest of it needs a GPU."""
    encoded = MASKS[name]
    mask = Mask(encoded, slice(75, 150), name == "no mask")
    tensors = [tensor.detach() for tensor in inputs(mask)]
    found = masked_attention.flex_attention(*tensors, mask, 0.3, compiled=lambda function: function)
    assert distance([found], [dense(*tensors, mask, 0.3)]) < 1e-6


def test_work_follows_the_open_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every open entry is computed once, and few others; calls grow with the logarithm of the length."""
    monkeypatch.undo()
    most = attention_tiles.MOST
    monkeypatch.setattr(attention_tiles, "MOST", 1 << 30)
    counts = []
    for length in (256, 512, 1024, 2048):
        encoded_FK = encoded_levels(length)[0]
        calls = attention_tiles.tiles_of(encoded_FK, slice(0, 2 * length), causal=False)
        num_open = int(allowed_entries(encoded_FK[None], slice(0, 2 * length)).sum())
        assert num_open <= sum(call.num_entries for call in calls) <= (1 + 64 / length) * num_open
        counts.append(len(calls))
        pieces = [piece for call in calls for piece in attention_tiles.pieces(call, most)]
        assert sum(piece.num_entries for piece in pieces) == sum(call.num_entries for call in calls)
        copied = [piece.queries for piece in pieces if len(piece.queries) > 1 or len(piece.queries[0]) > 1]
        assert max(sum(map(attention_tiles.length, queries)) for queries in copied) <= most
    assert counts == [counts[0] + more for more in range(4)]


@pytest.mark.parametrize("name", MASKS)
def test_every_open_entry_once(name: str) -> None:
    encoded_FK, queries = MASKS[name][0], slice(75, 225)
    computed = torch.zeros(150, KEYS, dtype=torch.int64)
    for call in attention_tiles.tiles_of(encoded_FK, queries, causal=False):
        for number, (rows, columns) in enumerate(zip(call.queries, call.keys, strict=True)):
            row_index, column_index = (torch.cat([torch.arange(*one) for one in ranges]) for ranges in (rows, columns))
            tile = torch.ones(len(row_index), len(column_index), dtype=torch.bool)
            computed[row_index[:, None], column_index] += tile if call.mask is None else call.mask[number]
    (allowed,) = allowed_entries(encoded_FK[None], queries)
    assert torch.equal(computed, allowed.long())


def test_equal_masks_share_their_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all steps without document masking; not the same fields for other queries, or under causal attention."""
    made: list[tuple[slice, bool]] = []

    def tiles_of(encoded_FK: Tensor, queries: slice, causal: bool) -> list[attention_tiles.Tiles]:
        made.append((queries, causal))
        return attention_tiles.tiles_of(encoded_FK, queries, causal)

    monkeypatch.setattr(masked_attention, "tiles_of", tiles_of)
    places = [(slice(0, 512), False), (slice(256, 512), False), (slice(0, 512), True)]
    for _ in range(2):
        for place in places:
            mask = Mask(encoded_levels(256).clone(), *place)
            found = sparse_attention(*inputs(mask), mask, None)
            assert found is not None and distance([found], [dense(*inputs(mask), mask, None)]) < 1e-6
    assert made == places


def test_dense_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences, and masks that leave most entries open."""
    monkeypatch.undo()

    def is_sparse(encoded: Tensor | None) -> bool:
        assert encoded is not None
        mask = Mask(encoded, slice(0, encoded.size(2)), False)
        return sparse_attention(*inputs(mask), mask, None) is not None

    assert is_sparse(encoded_levels(256))
    assert not is_sparse(encoded_levels(255))
    assert is_sparse(encoded_mask(documents(300, 300), None, None, 600))
    assert not is_sparse(encoded_mask(documents(580, 20), None, None, 600))
    assert not is_sparse(encoded_mask(None, annealing(400), None, 600))


def test_a_mask_is_known_by_its_content() -> None:
    """Plans are kept for all layers of a micro-batch: not for another mask in the same memory, nor other queries."""
    encoded = encoded_mask(documents(150, 150), None, None, KEYS)
    assert encoded is not None
    variants = list(itertools.product((slice(0, 75), slice(75, 150)), (False, True)))
    for lengths in ((150, 150), (30, 270)):
        encoded[:, 0] = documents(*lengths)
        for queries, causal in variants:
            mask = Mask(encoded, queries, causal)
            assert torch.equal(dense_mask(mask)[:, 0], allowed_entries(*mask))
            assert distance(*(with_gradients(f, inputs(mask), mask) for f in (sparse_attention, dense))) < 1e-6
    assert dense_mask(Mask(encoded, slice(0, 75), False)) is dense_mask(Mask(encoded.detach(), slice(0, 75), False))
