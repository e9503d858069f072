"""Feistel shuffle: a keyed permutation of {0, ..., size - 1}, computed one index at a time without a table.

A Feistel network (Luby and Rackoff 1988) over pairs (left, right) with left < a, right < b and a * b just
above `size`: each round adds a hash of one half to the other, modulo its range, which is invertible
whatever the hash. An index that lands at or beyond `size` is permuted again until it is below `size`
("cycle walking", Black and Rogaway 2002); with a * b - size < a that is rare.
This shuffles samples; noise has its own generator in `diffusion/`.
"""

from __future__ import annotations

import hashlib
import math

_NUM_ROUNDS = 8
_MASK_64 = (1 << 64) - 1


def _mix(value: int) -> int:
    """A 64-bit hash of a 64-bit integer (the finaliser of splitmix64, Steele et al. 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK_64
    return value ^ (value >> 31)


class Permutation:
    """`Permutation(size, *key)(i)` is the image of index i; the integers of `key` choose the order."""

    def __init__(self, size: int, *key: int):
        if size < 1:
            raise ValueError(f"a permutation of {size} elements: size must be 1 or more")
        self.size = size
        self._left = math.isqrt(size - 1) + 1
        self._right = -(-size // self._left)
        digest = hashlib.shake_256(repr(tuple(map(int, key))).encode()).digest(8 * _NUM_ROUNDS)
        keys = [int.from_bytes(digest[8 * n : 8 * n + 8], "little") for n in range(_NUM_ROUNDS)]
        self._round_keys = list(zip(keys[::2], keys[1::2], strict=True))

    def __call__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside 0..{self.size - 1}")
        while True:
            left, right = divmod(index, self._right)
            for left_key, right_key in self._round_keys:
                left = (left + _mix(right ^ left_key)) % self._left
                right = (right + _mix(left ^ right_key)) % self._right
            index = left * self._right + right
            if index < self.size:
                return index
