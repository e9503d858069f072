"""Samplers with `remask`: decided tokens that were uncertain are masked again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_a2d.diffusion.sampling import make_canvas
from tests.unit.test_sampling import MASK, VOCAB, fill, hashed_logits

HOLES, EARLY, LATE = 8, 10, 11
CANVAS = make_canvas([[1] + [MASK] * HOLES, [1, 2, 3] + [MASK] * (HOLES - 2)], MASK)


def wiser_later(tokens_BL: torch.Tensor) -> torch.Tensor:
    """Predicts EARLY with little certainty (least at the left), and LATE for sure once a token is decided."""
    logits_BLV = torch.zeros(*tokens_BL.shape, VOCAB)
    decided_B = HOLES - (tokens_BL == MASK).sum(1)
    logits_BLV[..., EARLY] = 1 + torch.arange(tokens_BL.shape[1]) / 10
    logits_BLV[decided_B >= 1, :, LATE] = 20.0
    return logits_BLV


def steps_of(**options: Any) -> tuple[torch.Tensor, list[int]]:
    """The sampled tokens, and how many of the first sequence were masked after each step."""
    left: list[int] = []
    tokens = fill(
        wiser_later, CANVAS, 4, on_step=lambda step, tokens, decided: left.append(int((tokens[0] == MASK).sum())), **options
    )  # fmt: skip
    return tokens, left


def test_early_mistakes_are_mended() -> None:
    plain, left = steps_of(sampler="confidence")
    assert left == [6, 4, 2, 0] and (plain[0] == EARLY).sum() == 2
    mended, left = steps_of(sampler="confidence", remask=0.5)
    assert left == [6, 4, 2, 0], "the schedule is the same"
    assert (mended[0] == EARLY).sum() == 0 and torch.equal(mended[1, :3], torch.tensor([1, 2, 3]))


def test_the_least_certain_are_masked_first() -> None:
    """One of the two that step 1 decided, at the right end: that at the left of them, and it is decided anew."""
    seen: list[torch.Tensor] = []

    def model(tokens_BL: torch.Tensor) -> torch.Tensor:
        seen.append(tokens_BL[0].clone())
        return wiser_later(tokens_BL)

    fill(model, CANVAS, 4, sampler="confidence", remask=0.5)
    assert seen[1].tolist() == [1] + [MASK] * 7 + [EARLY]


@pytest.mark.parametrize("sampler", ["rnd1", "confidence", "eb", "threshold"])
@pytest.mark.parametrize("block_length", [0, 3])
def test_every_sampler_ends(sampler: str, block_length: int) -> None:
    for remask in (0.3, 0.99):
        tokens = fill(hashed_logits, CANVAS, 6, sampler=sampler, block_length=block_length, remask=remask)
        assert not (tokens == MASK).any() and torch.equal(tokens[:, 0], CANVAS.tokens[:, 0])
    assert torch.equal(
        fill(hashed_logits, CANVAS, 6, sampler=sampler, remask=0.1),  # of at most 8 tokens: none
        fill(hashed_logits, CANVAS, 6, sampler=sampler),
    )


def test_a_token_that_is_masked_again_is_drawn_anew() -> None:
    def flat(tokens_BL: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens_BL.shape, VOCAB)

    draws: list[int] = []
    fill(
        flat, CANVAS, 4, sampler="confidence", temperature=1.0, remask=0.5,
        on_step=lambda step, tokens, decided: draws.append(int(tokens[0, 1])),
    )  # fmt: skip
    assert draws[0] != MASK and len(set(draws) - {MASK}) > 1
