"""A blend of token files as one stream of samples, interleaved by weight, without an index.

    sources:
      web:   {train_path: data/web_train, valid_path: data/web_valid, weight: 0.7}
      math:  {train_path: data/math_train, weight: 0.3, max_epochs: 4}

Samples are equally long, so a source's share of the samples is its share of the tokens. Which source sample i
belongs to, and how many samples of that source come before it, is computed from i alone:

1. Blocks of 1,024 consecutive samples are shuffled, each with its own key. Otherwise the regular pattern of 2.
   could correlate with the samples' diffusion times, which also follow the index, and with the ranks.
2. A binary tree over the sources sends number j to the left if floor((j + 1) p) > floor(j p), where p is the left
share:
   low-discrepancy interleaving, like Megatron's blending index but stateless and O(log sources). Of the first j numbers
   floor(j p) went left, which is the index within the left branch. So the realised share is never further from p than
   one sample per level.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_a2d.data.checksums import checksum
from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.data.permutation import Permutation
from megatron_a2d.utils.atomic_write import read_yaml
from megatron_a2d.utils.errors import UserError, nearest
from megatron_a2d.utils.printable import is_name

_BLOCK = 1024
_KEYS = ("train_path", "valid_path", "weight", "max_epochs", "hub")


class Source(NamedTuple):
    """One source of a mixture."""

    name: str
    train_path: str
    valid_path: str | None
    weight: Fraction  # fraction of all tokens; the weights of a mixture sum to 1
    max_epochs: float | None  # None: as many as the run needs
    hub: dict[str, Any]  # arguments of data_prep.download


def read_mixture(path: str | Path) -> list[Source]:
    """The sources of a mixture file; UserError with all of its problems."""
    where = f"--data-mixture {path}"
    content = read_yaml(path, where)
    entries = content.get("sources")
    if not isinstance(entries, dict) or not entries or len(content) > 1:
        raise UserError(f"{where}: must have the single key `sources:`, with an entry per source; correct it")
    problems = [
        f"{where}: {name!r}: is not a valid source name, which is also used for directories and plots; remove slashes, "
        "leading dots and control characters"
        for name in entries
        if not is_name(str(name))
    ]
    problems += [line for name, entry in entries.items() for line in _entry_problems(f"{where}: {name}", entry)]
    if problems:
        raise UserError(problems)
    # The decimal value in the file: 0.1 is exactly a tenth.
    weights = {name: Fraction(str(entry["weight"])) for name, entry in entries.items()}
    total = sum(weights.values())
    return [
        Source(
            str(name), entry["train_path"], entry.get("valid_path"), weights[name] / total,
            _number(entry.get("max_epochs")), entry.get("hub") or {},
        )
        for name, entry in entries.items()
    ]  # fmt: skip


def _entry_problems(where: str, entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return [f"{where}: holds no settings; give it {', '.join(_KEYS)}"]
    problems = [f"{where}: unknown key {key}{nearest(str(key), _KEYS)}" for key in entry if key not in _KEYS]
    for key in ("train_path", "valid_path"):
        value = entry.get(key)
        if not (isinstance(value, str) and "\0" not in value) and (key == "train_path" or value is not None):
            problems.append(f"{where}: {key} {value}: must be the prefix of a .bin/.idx pair")
    weight, epochs = _number(entry.get("weight")), _number(entry.get("max_epochs"))
    if not _is_positive(weight):
        problems.append(f"{where}: weight {weight}: must be a positive number; remove the source for weight 0")
    if epochs is not None and not _is_positive(epochs):
        problems.append(f"{where}: max_epochs {epochs}: must be a positive number; leave it out for no cap")
    if not isinstance(entry.get("hub") or {}, dict):
        problems.append(f"{where}: hub {entry['hub']}: must be settings of data_prep.download")
    return problems


def _number(value: Any) -> Any:
    """Convert numbers that YAML 1.1 reads as strings, such as 1e-3 without a decimal point."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


class Place(NamedTuple):
    """Source of a sample, and its index there."""

    source: int
    number: int  # sample index within the source


class SourceChoice:
    """`SourceChoice(weights, seed)(i)` is the Place of sample i, for any i >= 0, in constant memory."""

    def __init__(self, weights: Sequence[Fraction], seed: int):
        self._tree = _build(list(enumerate(weights)))
        self._num_sources = len(weights)
        self._seed = seed

    def __call__(self, index: int) -> Place:
        if index < 0:
            raise IndexError(f"sample index {index} is negative")
        block, within = divmod(index, _BLOCK)
        number = block * _BLOCK + _block_order(self._seed, block)(within)
        node = self._tree
        while not isinstance(node, int):
            numerator, denominator, left, right = node
            before = number * numerator // denominator
            goes_left = (number + 1) * numerator // denominator > before
            node, number = (left, before) if goes_left else (right, number - before)
        return Place(node, number)

    def counts(self, num_samples: int) -> list[int]:
        """Number of samples from each source among the first `num_samples`."""
        counts = [0] * self._num_sources

        def descend(node: Any, number: int) -> None:
            if isinstance(node, int):
                counts[node] = number
                return
            numerator, denominator, left, right = node
            descend(left, number * numerator // denominator)
            descend(right, number - number * numerator // denominator)

        whole = num_samples - num_samples % _BLOCK
        descend(self._tree, whole)
        for index in range(whole, num_samples):
            counts[self(index).source] += 1
        return counts


def _build(leaves: list[tuple[int, Fraction]]) -> Any:
    """A source's number, or (numerator, denominator, left branch, right branch) with the left share."""
    if len(leaves) == 1:
        return leaves[0][0]
    middle = len(leaves) // 2
    left = sum((weight for _, weight in leaves[:middle]), Fraction(0))
    share = left / sum((weight for _, weight in leaves), Fraction(0))
    return share.numerator, share.denominator, _build(leaves[:middle]), _build(leaves[middle:])


@lru_cache(maxsize=64)
def _block_order(seed: int, block: int) -> Permutation:
    return Permutation(_BLOCK, seed, block, 0)  # three integers, unlike the key of a source's own order


class MixedDataset:
    """Dataset of a mixture's samples, with one index; the counterpart of `PackedDataset` for several files."""

    def __init__(self, sources: Sequence[Source], seq_length: int, seed: int = 0, **checks: Any):
        self.sources = list(sources)
        # A separate key per source: equally long sources would otherwise have the same order.
        self.datasets: list[PackedDataset] = []
        problems: list[str] = []
        for number, source in enumerate(sources):
            try:
                self.datasets.append(PackedDataset(source.train_path, seq_length, seed=seed + (number << 64), **checks))
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        self.choice = SourceChoice([source.weight for source in sources], seed)

    @property
    def files(self) -> list[Any]:
        return [dataset.file for dataset in self.datasets]

    def place(self, sample_index: int) -> Place:
        return self.choice(sample_index)

    def tokens(self, sample_index: int) -> np.ndarray:
        """Sample `sample_index` >= 0, [seq_length] int64."""
        source, number = self.choice(sample_index)
        return self.datasets[source].tokens(number)

    def documents(self, sample_index: int) -> np.ndarray:
        """Document number (within its file) of each token, [seq_length] int64."""
        source, number = self.choice(sample_index)
        return self.datasets[source].documents(number)

    def eod_token_id(self) -> int | None:
        """The end-of-document token; UserError if the sources differ."""
        ids = {file.eod_token_id for file in self.files}
        if len(ids) > 1:
            raise UserError(
                f"--data-mixture: its sources end documents with different tokens ({ids}); tokenise with the same one"
            )
        return ids.pop()

    def fingerprint(self) -> str:
        """Fingerprint of the tokens, their order and the weights."""
        parts = [f"{source.weight} {file.fingerprint()}" for source, file in zip(self.sources, self.files, strict=True)]
        return checksum(" ".join(parts).encode())

    def epochs(self, num_samples: int) -> dict[str, float]:
        """Epochs of each source in the first `num_samples` samples."""
        counts = self.choice.counts(num_samples)
        return {
            source.name: counts[number] / self.datasets[number].num_samples
            for number, source in enumerate(self.sources)
        }

    def check_epochs(self, num_samples: int) -> None:
        """UserError for every source that `num_samples` samples would repeat more often than its max_epochs."""
        epochs = self.epochs(num_samples)
        problems = [
            f"--data-mixture: {source.name} would be repeated {epochs[source.name]:.2f} times in {num_samples} "
            f"samples, above its max_epochs {source.max_epochs}; lower its weight, add text, raise the limit, or "
            "train less"
            for source in self.sources
            if source.max_epochs is not None and epochs[source.name] > source.max_epochs
        ]
        if problems:
            raise UserError(problems)
