"""Tiles of an attention mask: which keys a chunk of queries attends to, so that masked entries are never computed.

About a quarter of block diffusion's square of 2 L x 2 L is open. Queries are cut into chunks. To a chunk a key is open
(all of its queries attend to it), closed (none does) or mixed. Open keys need no mask. Those of all chunks of a range
make one tile, those of either half of them two smaller ones, and so on; tiles of equal size are one call of the kernel,
so there are few. Mixed keys are computed under a mask. A query's parts are joined afterwards (tiled_attention.py).
Shapes: F the mask's fields, K all keys in G groups, C chunks, Q the queries of a chunk in R groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_a2d.diffusion.attention_masks import are_allowed

CHUNK = 64  # queries: shorter chunks compute fewer masked entries, longer ones need fewer and larger calls
# Documents shorter than this may share a chunk; so few open keys, or closed ones between mixed ones, are mixed.
SHORT = 32
MOST = 256  # queries that a call copies

Range = tuple[int, int]  # of positions: the first, and one past the last
Ranges = tuple[Range, ...]


class Tiles(NamedTuple):
    """One call of the attention kernel: T tiles of equal sizes, each with some queries and the keys they attend to."""

    queries: tuple[Ranges, ...]
    keys: tuple[Ranges, ...]
    mask: Tensor | None  # [T, queries, keys] bool, True where attention is allowed; None: everywhere

    @property
    def num_entries(self) -> int:
        """Pairs of a query and a key that are computed."""
        return len(self.keys) * length(self.queries[0]) * length(self.keys[0])


def tiles_of(encoded_FK: Tensor, queries: slice, causal: bool) -> list[Tiles]:
    """The calls that compute the attention of some queries of one sample, counted from the slice's start."""
    chunks, opens = _chunks(encoded_FK[:, queries]), []
    mixed: dict[tuple[int, ...], list[tuple[Ranges, Ranges, Tensor]]] = defaultdict(list)
    groups_K = _groups(encoded_FK, causal)
    firsts_G = torch.searchsorted(groups_K, torch.arange(int(groups_K[-1]) + 1))
    keys_FG = encoded_FK[:, firsts_G]
    for first, end in chunks:
        groups_Q = groups_K[queries.start + first : queries.start + end]
        own = slice(int(groups_Q[0]), int(groups_Q[-1]) + 1)
        allowed_RG = are_allowed(
            keys_FG[:, own, None].unbind(), keys_FG[:, None].unbind(), firsts_G[own, None], firsts_G, causal
        )
        is_visible_K = allowed_RG.any(0)[groups_K]
        is_open_K = _open_keys(allowed_RG.all(0)[groups_K], is_visible_K)
        opens.append(is_open_K)
        if keys := _mixed_keys(is_visible_K & ~is_open_K, is_open_K):
            columns_k = torch.cat([groups_K[start:stop] for start, stop in keys])
            mask = allowed_RG[groups_Q - own.start][:, columns_k]
            mixed[tuple(mask.shape)].append((((first, end),), keys, mask))
    calls = _unmasked(chunks, torch.stack(opens))
    for parts in mixed.values():
        rows, columns, masks = zip(*parts, strict=True)
        calls.append(Tiles(rows, columns, torch.stack(masks)))
    return [piece for call in calls for piece in pieces(call, MOST)]


def pieces(call: Tiles, most: int) -> Iterator[Tiles]:
    """Calls of at most so many queries: a call copies its queries and keys, unless they are one range."""
    queries, keys, mask = call
    if mask is None and length(queries[0]) > most:
        yield from (
            Tiles(((part,),), (own,), None) for ranges, own in zip(queries, keys, strict=True) for part in ranges
        )
        return
    step = max(1, most // length(queries[0]))
    for first in range(0, len(queries), step):
        part = slice(first, first + step)
        yield Tiles(queries[part], keys[part], None if mask is None else mask[part])


def _unmasked(chunks: list[Range], is_open_CK: Tensor) -> list[Tiles]:
    """Calls for the open keys of each chunk, C of them: tiles as large as can be, equal sizes in one call."""
    queries_of: dict[Ranges, list[Range]] = defaultdict(list)

    def share(first: int, end: int, is_open_CK: Tensor) -> None:
        """Assign keys that are open to all of these chunks to them together, the others to either half, recursively."""
        is_shared_K = is_open_CK.all(0)
        if keys := _runs(is_shared_K):
            queries_of[keys].append((chunks[first][0], chunks[end - 1][1]))
        if end - first > 1:
            middle = (first + end) // 2
            upper, lower = (is_open_CK & ~is_shared_K).split((middle - first, end - middle))
            share(first, middle, upper)
            share(middle, end, lower)

    share(0, len(chunks), is_open_CK)
    same_size: dict[tuple[int, int], list[tuple[Ranges, Ranges]]] = defaultdict(list)
    for keys, queries in queries_of.items():
        same_size[length(queries), length(keys)].append((tuple(queries), keys))
    calls = (zip(*tiles, strict=True) for tiles in same_size.values())
    return [Tiles(rows, columns, mask=None) for rows, columns in calls]


def length(ranges: Iterable[Range]) -> int:
    """The number of positions in the ranges."""
    return sum(end - first for first, end in ranges)


def _groups(encoded_FK: Tensor, causal: bool) -> Tensor:
    """[K], numbers of the groups of consecutive positions that attend alike, and are attended to alike."""
    changes = encoded_FK.diff(dim=1).any(0)
    if causal or len(encoded_FK) > 2:
        changes = torch.ones_like(changes)
    return torch.nn.functional.pad(changes.cumsum(0), (1, 0))


def _chunks(encoded_FQ: Tensor) -> list[Range]:
    """Chunks of the queries. One begins where a document or a copy of it does, unless another would be too short."""
    documents, levels = encoded_FQ[:2].diff(dim=1)
    ends = [*((documents != 0) | (levels < 0)).nonzero()[:, 0] + 1, encoded_FQ.size(1)]
    chunks, first = [], 0
    for end in map(int, ends):
        while end - first >= CHUNK:
            chunks.append((first, first + CHUNK))
            first += CHUNK
        if end - first >= SHORT or (end == ends[-1] and end > first):
            chunks.append((first, end))
            first = end
    return chunks


def _open_keys(is_open_K: Tensor, is_visible_K: Tensor) -> Tensor:
    """[K] bool, of the keys that all queries attend to, whole chunks of them before mixed keys, so that chunks share
    tiles; and no short ranges."""
    is_open_K = is_open_K.clone()
    for first, end in _runs(is_open_K):
        kept = end - first
        if end < len(is_visible_K) and is_visible_K[end]:
            kept = kept // CHUNK * CHUNK
        is_open_K[first + (kept if kept >= SHORT else 0) : end] = False
    return is_open_K


def _mixed_keys(is_mixed_K: Tensor, is_open_K: Tensor) -> Ranges:
    """The ranges of mixed keys; ranges with only a few closed keys between them are joined."""
    found: list[Range] = []
    for first, end in _runs(is_mixed_K):
        if found and first - found[-1][1] < SHORT and not is_open_K[found[-1][1] : first].any():
            first, _ = found.pop()
        found.append((first, end))
    return tuple(found)


def _runs(flags_K: Tensor) -> Ranges:
    """The ranges in which the flags are set."""
    bounds = torch.nn.functional.pad(flags_K.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return tuple(zip(bounds[::2], bounds[1::2], strict=True))
