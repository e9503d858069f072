"""Packed dataset: samples of equal length from the concatenated documents, shuffled differently in each epoch.

Documents are concatenated, each ended by its end-of-document token, and the stream is split every `seq_length` tokens;
the tokens after the last full sample are not used. Sample index i >= 0 continues over epochs: epoch i // num_samples,
index i % num_samples of that epoch's permutation. So a sample depends on (files, seq_length, seed, i) alone, not on
ranks, workers or resumes.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_a2d.data.indexed_dataset import TokenFile
from megatron_a2d.data.permutation import Permutation
from megatron_a2d.utils.errors import UserError


@lru_cache(maxsize=16)
def _epoch_order(num_samples: int, seed: int, epoch: int) -> Permutation:
    return Permutation(num_samples, seed, epoch)


class PackedDataset:
    """Samples of `seq_length` tokens; with shuffle=False in the stream's order.

    With `vocab_size` (of the model's embedding) a token id outside it is a UserError; with `scan` already when the file
    is opened. The other two are those of TokenFile.
    """

    def __init__(
        self,
        prefix: str | Path,
        seq_length: int,
        seed: int = 0,
        shuffle: bool = True,
        vocab_size: int | None = None,
        scan: bool = True,
        mask_token_id: int | None = None,
        eod_token_id: int | None = None,
    ):
        self.file = TokenFile(prefix, vocab_size, scan, mask_token_id, eod_token_id)
        self.seq_length = seq_length
        self.seed = seed
        self.shuffle = shuffle
        self.num_samples = self.file.num_tokens // seq_length
        if self.num_samples == 0:
            raise UserError(
                f"{prefix}: its {self.file.num_tokens} tokens do not fill one sample of --seq-length {seq_length}; "
                "add text or shorten the samples"
            )

    @property
    def files(self) -> list[TokenFile]:
        return [self.file]

    def eod_token_id(self) -> int | None:
        """The end-of-document token; None if there is none or it is unknown."""
        return self.file.eod_token_id

    def fingerprint(self) -> str:
        """Fingerprint of the tokens and their order."""
        return self.file.fingerprint()

    @property
    def num_unused_tokens(self) -> int:
        """Tokens at the end of the stream that do not fill a sample."""
        return self.file.num_tokens - self.num_samples * self.seq_length

    def tokens(self, sample_index: int) -> np.ndarray:
        """Sample `sample_index` >= 0, [seq_length] int64."""
        return self.file.read(self._place(sample_index) * self.seq_length, self.seq_length)

    def documents(self, sample_index: int) -> np.ndarray:
        """Document number of each token of a sample, [seq_length] int64."""
        return self.file.segments(self._place(sample_index) * self.seq_length, self.seq_length)

    def epochs(self, num_samples: int) -> dict[str, float]:
        """File name -> epochs of the file in the first `num_samples` samples."""
        return {Path(self.file.prefix).name: num_samples / self.num_samples}

    def _place(self, sample_index: int) -> int:
        if sample_index < 0:
            raise IndexError(f"sample index {sample_index} is negative")
        epoch, place = divmod(sample_index, self.num_samples)
        return _epoch_order(self.num_samples, self.seed, epoch)(place) if self.shuffle else place
