"""A blend of token files as one stream of samples, interleaved by weight, without an index.

    sources:
      web:   {train_path: data/web_train, valid_path: data/web_valid, weight: 0.7}
      math:  {train_path: data/math_train, weight: 0.3, max_epochs: 4}

Samples are equally long, so a source's share of the samples is its share of the tokens. Which source sample i
belongs to, and how many samples of that source come before it, is computed from i alone:

1. Blocks of 1,024 consecutive samples are shuffled, each with a key of its own. Otherwise the regular pattern of 2.
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
    """One line of a mixture."""

    name: str
    train_path: str
    valid_path: str | None
    weight: Fraction  # of all tokens; the weights of a mixture sum to 1
    max_epochs: float | None  # None: as many as the run needs
    hub: dict[str, Any]  # what data_prep.download takes


def read_mixture(path: str | Path) -> list[Source]:
    """The sources of a mixture file; UserError with everything that is wrong with it."""
    where = f"--data-mixture {path}"
    content = read_yaml(path, where)
    entries = content.get("sources")
    if not isinstance(entries, dict) or not entries or len(content) > 1:
        raise UserError(f"{where}: must hold `sources:` and nothing else, with an entry for each source; correct it")
    problems = [
        f"{where}: {name!r}: is no name for a source, which becomes a directory's and a chart's; leave out slashes, a "
        "leading dot and control characters"
        for name in entries
        if not is_name(str(name))
    ]
    problems += [line for name, entry in entries.items() for line in _entry_problems(f"{where}: {name}", entry)]
    if problems:
        raise UserError(problems)
    # As written in the file: 0.1 is a tenth, not the nearest binary number.
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
        problems.append(
            f"{where}: weight {weight}: must be a positive number; leave the source out to weigh it nothing"
        )
    if epochs is not None and not _is_positive(epochs):
        problems.append(f"{where}: max_epochs {epochs}: must be a positive number; leave it out for no cap")
    if not isinstance(entry.get("hub") or {}, dict):
        problems.append(f"{where}: hub {entry['hub']}: must be settings of data_prep.download")
    return problems


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-3, without a point, for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


class Place(NamedTuple):
    """Where a sample comes from."""

    source: int
    number: int  # of the samples of that source


class SourceChoice:
    """`SourceChoice(weights, seed)(i)` is the Place of sample i; any i >= 0, no memory that grows."""

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
        """How many of the first samples each source gives."""
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
    return Permutation(_BLOCK, seed, block, 0)  # three integers: a key that no source's own order has


class MixedDataset:
    """The samples of a mixture, by one index; what `PackedDataset` is for one file."""

    def __init__(self, sources: Sequence[Source], seq_length: int, seed: int = 0, **checks: Any):
        self.sources = list(sources)
        # Keys of their own: equally long sources would otherwise be shuffled alike.
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
        """The number, in its own file, of the document that each token belongs to, [seq_length] int64."""
        source, number = self.choice(sample_index)
        return self.datasets[source].documents(number)

    def eod_token_id(self) -> int | None:
        """The token that closes documents; UserError where the sources disagree."""
        ids = {file.eod_token_id for file in self.files}
        if len(ids) > 1:
            raise UserError(f"--data-mixture: its sources end documents with different tokens ({ids}); tokenise alike")
        return ids.pop()

    def fingerprint(self) -> str:
        """Stands for the tokens, their order and the weights."""
        parts = [f"{source.weight} {file.fingerprint()}" for source, file in zip(self.sources, self.files, strict=True)]
        return checksum(" ".join(parts).encode())

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often the first `num_samples` samples go through each source."""
        counts = self.choice.counts(num_samples)
        return {
            source.name: counts[number] / self.datasets[number].num_samples
            for number, source in enumerate(self.sources)
        }

    def check_epochs(self, num_samples: int) -> None:
        """UserError with every source that a run of so many samples would repeat more often than its cap allows."""
        epochs = self.epochs(num_samples)
        problems = [
            f"--data-mixture: {source.name} would be repeated {epochs[source.name]:.2f} times in {num_samples} "
            f"samples, and its max_epochs is {source.max_epochs}; give it less weight, more text or a higher cap, or "
            "train less"
            for source in self.sources
            if source.max_epochs is not None and epochs[source.name] > source.max_epochs
        ]
        if problems:
            raise UserError(problems)
