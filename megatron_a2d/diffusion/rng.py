"""Randomness as a pure function of (seed, sample index, position).

A counter-based generator (Philox, Salmon et al. 2011) is keyed by the seed and indexed by the sample's global index. No
state is carried from one sample to the next, so every worker, rank, layout and resumed run sees bit-identical noise,
and there is no RNG state to checkpoint. Only the generator's raw bits are used: numpy guarantees that their stream
never changes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_a2d.diffusion.noise_schedule import SCHEDULES, Schedule

# Multiples of the golden ratio's inverse, modulo 1, spread any run of consecutive indices evenly (the additive
# recurrence of Weyl; Kronecker sequence).
INVERSE_GOLDEN_RATIO = (5**0.5 - 1) / 2
_INVERSE_IN_64_BITS = 0x9E3779B97F4A7C15  # as a fixed-point fraction, exact for all indices
_MASK_64 = (1 << 64) - 1
_LARGEST = 1 - 2.0**-53  # of the numbers that `uniforms` draws

TIMESTEP_SAMPLINGS = ("low_discrepancy", "uniform")


class Stream(enum.IntEnum):
    """The streams of random numbers drawn by (seed, index), for the whole project.

    A Philox key is 128 bits: the seed and the stream. Stream ids are never changed and never reused, so that resumed
    runs see the same numbers. Randomly initialised weights (training/initialization.py) use other keys: hashes of the
    tensor's name.
    """

    MASK = 0  # which tokens of a sample are masked
    TIME = 1  # a sample's time; under low-discrepancy sampling, the offset of the sequence
    CUT = 2  # whether and where a training sample is split in two
    ATTENTION = 3  # the unmasked entries of a sample's attention during attention annealing
    CONTINUATION = 4  # the masks used to estimate the likelihood of a continuation
    CHOICE = 5  # the masks by which the choices of a question are compared
    STUDY_HOLE = 101  # the position of the infilling span in a study's held-out sample
    STUDY_TIME = 102  # the times of the timestep samplers that a study compares


@dataclass(frozen=True)
class Noise:
    """The settings that determine which tokens of a sample are masked, and their loss weights."""

    seed: int
    mask_token_id: int
    schedule: str = "linear"
    timestep_sampling: str = "low_discrepancy"
    min_timestep: float = 1e-3
    label_shift: bool = True
    mask_sampling: str = "bernoulli"
    loss_weighting: str = "mdlm"
    cart_p: float = 0.8
    complementary: bool = False  # samples 2 k and 2 k + 1 are one text under a mask and its complement

    def __post_init__(self) -> None:
        assert self.schedule in SCHEDULES and self.timestep_sampling in TIMESTEP_SAMPLINGS
        assert 0 < self.min_timestep < 1 and self.seed >= 0

    @property
    def functions(self) -> Schedule:
        return SCHEDULES[self.schedule]

    def time(self, sample_index: int) -> float:
        """The diffusion time of a sample, in [min_timestep, 1].

        low_discrepancy: t_i = frac(u(seed) + i / phi). The samples of a batch have consecutive indices, so their times
        are evenly spread, whatever the batch size, the layout or the iteration at which a run resumes.
        """
        if self.timestep_sampling == "uniform":
            fraction = uniforms(self.seed, Stream.TIME, sample_index, 1)[0]
        else:
            fraction = ((_first_time(self.seed) + sample_index * _INVERSE_IN_64_BITS) & _MASK_64) / 2.0**64
        return self.min_timestep + (1 - self.min_timestep) * float(fraction)

    def times(self, sample_index: int, count: int = 1, reserved: int | None = None) -> list[float]:
        """The times of a sample's `count` noise segments, numbered across samples so that consecutive ones are evenly
        spread. `reserved`: numbers that each sample takes, where samples have different counts.

        A complement's times are mirrored: uniform in [min_timestep, 1] like those of the other half of its pair.
        """
        number, is_complement = self._number(sample_index)
        first = number * (count if reserved is None else reserved)
        times = [self.time(first + number) for number in range(count)]
        return [1 + self.min_timestep - time for time in times] if is_complement else times

    def uniforms(self, sample_index: int, length: int) -> np.ndarray:
        """One number in [0, 1) for each position of a sample, [length] float64.

        A complement's are mirrored. With its mirrored time, a token is masked in both halves of a pair or in one; in
        both with a probability of at most min_timestep (linear schedule). Each half is distributed as any sample, so
        that the loss is unbiased.
        """
        number, is_complement = self._number(sample_index)
        values = uniforms(self.seed, Stream.MASK, number, length)
        return _LARGEST - values if is_complement else values

    def _number(self, sample_index: int) -> tuple[int, int]:
        """The number by which a sample draws, shared by the halves of a pair, and whether it is the complement."""
        return divmod(sample_index, 2) if self.complementary else (sample_index, 0)


@lru_cache(maxsize=64)
def _first_time(seed: int) -> int:
    """The offset of the low-discrepancy sequence, the fraction of sample 0, in units of 2**-64."""
    return int(_bits(seed, Stream.TIME, 0, 1)[0])


def attention_key(seed: int, sample_index: int) -> int:
    """The key of a sample's random attention entries (attention_masks.py), a signed 64-bit number."""
    return int(_bits(seed, Stream.ATTENTION, sample_index, 1).view(np.int64)[0])


def random_cut(seed: int, sample_index: int, length: int, probability: float) -> int | None:
    """The position at which a sample is split in two, 1 .. length - 1, or None for samples that are not split.

    LLaDA (Nie et al. 2025) gives 1% of its samples a random length, drawn uniformly. Here the rest of such a sample
    is not discarded: it becomes a second segment, isolated from the first, and all shapes stay the same.
    """
    chosen, fraction = uniforms(seed, Stream.CUT, sample_index, 2)
    return 1 + int(fraction * (length - 1)) if chosen < probability and length > 1 else None


def _bits(seed: int, stream: Stream, sample_index: int, count: int) -> np.ndarray:
    assert 0 <= seed < 1 << 64, "the upper 64 bits of the key are the stream"
    # The counter's lowest 64-bit word counts within the sample; the next one is the sample index.
    generator = np.random.Philox(key=seed + (stream << 64), counter=sample_index << 64)
    return generator.random_raw(count)


def uniforms(seed: int, stream: Stream, sample_index: int, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) with 53 random bits each; a longer draw begins with the shorter one."""
    return (_bits(seed, stream, sample_index, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
