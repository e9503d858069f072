"""The study of block lengths without training: what a model generates, the quality at a speed, the plan, the page."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_a2d.config.block_schedule import block_length_at
from megatron_a2d.config.settings import build
from megatron_a2d.diffusion.attention_masks import block_causal_mask
from megatron_a2d.diffusion.model_interface import Model, Reduce, Request, from_logits
from megatron_a2d.study.ablations.block_lengths import (
    CO_LOSS,
    LENGTHENED,
    LONG,
    SCP,
    SHORT,
    Point,
    fastest,
    lengthening,
    plan,
    report,
    speeds,
    variants,
)
from megatron_a2d.study.generation_eval import Generator, causal_loss, token_entropy
from tests.unit.test_training import QWEN3_30B_A3B

VOCAB, MASK, LENGTH = 8, 7, 32
# Texts that count up modulo 7 from different tokens.
TEXTS_BL = (np.arange(LENGTH) + np.arange(3)[:, None]) % 7


def counting(step: int, certainty: float = 20.0) -> Model:
    """A model whose output at a position is where the count is, `step` further on; the mask token counts nothing."""

    def logits(tokens_BL: Tensor) -> Tensor:
        first_B = tokens_BL[:, 0]  # the holes leave it
        places_L = torch.arange(tokens_BL.size(1))
        return certainty * torch.nn.functional.one_hot((first_B[:, None] + places_L + step) % 7, VOCAB).float()

    return from_logits(logits)


def generator(**changes: Any) -> Generator:
    return replace(Generator(counting(1), MASK, label_shift=True, block_length=4), **changes)


def test_infilling_is_the_share_of_restored_tokens() -> None:
    masked_BL = np.zeros_like(TEXTS_BL, dtype=bool)
    masked_BL[:, 5:15] = True
    assert generator().infilling_accuracy(TEXTS_BL, masked_BL) == 1
    assert generator(block_length=LENGTH).infilling_accuracy(TEXTS_BL, masked_BL) == 1
    assert generator(label_shift=False).infilling_accuracy(TEXTS_BL, masked_BL) == 0
    assert generator(model=counting(0), label_shift=False).infilling_accuracy(TEXTS_BL, masked_BL) == 1


@pytest.mark.parametrize(("block_length", "speeds"), [(4, [1, 2, 4, 4]), (8, [1, 2, 4, 8]), (LENGTH, [1, 2, 4, 8])])
def test_continuations_at_each_speed(block_length: int, speeds: list[float]) -> None:
    """Drawn, from the first half of the text, in no fewer forward passes than there are blocks."""
    made = generator(block_length=block_length).continuations(TEXTS_BL, (1, 2, 4, 8))
    assert [speed for speed, _ in made] == pytest.approx(speeds)
    assert all(np.array_equal(text_BL, TEXTS_BL) for _, text_BL in made), "certain draws continue the count"
    uncertain = generator(block_length=block_length, model=counting(1, certainty=0.0))
    (_, drawn_BL), *_ = uncertain.continuations(TEXTS_BL, (1,))
    half = LENGTH // 2
    assert np.array_equal(drawn_BL[:, :half], TEXTS_BL[:, :half])
    assert len(drawn_BL[:, half:].unique()) == 7, "every token but the mask is drawn"


def test_the_judge_reads_causally() -> None:
    """The second half's tokens, each predicted from those before it alone."""
    seen: list[Tensor] = []

    def model(request: Request, reduce: Reduce) -> tuple[Tensor, ...]:
        assert request.levels is not None and request.window is None
        seen.append(block_causal_mask(request.levels, request.levels))
        return counting(1, certainty=2.0)(request, reduce)

    loss = causal_loss(model, torch.from_numpy(TEXTS_BL))
    assert loss == pytest.approx(math.log(math.exp(2) + VOCAB - 1) - 2, abs=1e-6)
    assert torch.equal(seen[0], torch.ones(LENGTH, LENGTH).tril().bool().expand(3, -1, -1))
    wrong_BL = TEXTS_BL.copy()
    wrong_BL[:, -1] = (wrong_BL[:, -1] + 1) % 7  # one of 16 is another
    assert causal_loss(model, torch.from_numpy(wrong_BL)) == pytest.approx(loss + 2 / (LENGTH // 2), abs=1e-6)


def test_repetitive_text_has_little_entropy() -> None:
    assert token_entropy(torch.tensor([[5, 1, 2, 3, 3, 3]])) == 0
    assert token_entropy(torch.tensor([[0, 0, 1, 2], [0, 0, 3, 3]])) == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize(
    ("nll", "speed"), [(3.0, 1.0), (3.1, math.sqrt(2)), (3.2, 2.0), (3.7, 2 * 2**1.25), (9.0, 8.0), (2.9, math.nan)]
)
def test_speed_at_equal_quality(nll: float, speed: float) -> None:
    """Between two measured speeds by the logarithm; at the last point that is good enough."""
    points = [Point(1, 3.0, 5.0), Point(2, 3.2, 5.0), Point(8, 4.0, 5.0)]
    assert fastest(points, nll) == pytest.approx(speed, nan_ok=True)
    # A dip is no end: the text at 4 tokens is good enough, whatever it is at 2.
    assert fastest([Point(1, 3.0, 5.0), Point(2, 3.3, 5.0), Point(4, 3.1, 5.0)], 3.2) == 4


def test_the_lengthened_block() -> None:
    lengths = [block_length_at(iteration, lengthening(200), 32) for iteration in range(200)]
    assert [lengths.count(length) for length in (1, 2, 4, 8, 16, 32)] == [20, 20, 20, 20, 20, 100]
    assert lengths == sorted(lengths)
    assert [lengthening(iterations) for iterations in (1, 2, 4)] == ["", "1:1", "1:1,2:1,4:1"]


def test_variants_differ_in_their_blocks_alone() -> None:
    base = build({"load": "x", "train_iters": 200, "seq_length": 128})
    found = variants(base)
    names = [SHORT, LONG, LENGTHENED]
    assert list(found) == [SCP, *names, *(name + CO_LOSS for name in names)] and found[SCP].changes == {}
    for name in names:
        plain, with_loss = found[name].changes, found[name + CO_LOSS].changes
        assert plain | {"ar_loss_weight": 1.0} == with_loss and plain["ar_loss_weight"] == 0
    assert found[LENGTHENED].changes == found[LONG].changes | {"block_length_schedule": lengthening(200)}
    before, *jobs = plan(base, [1, 2], QWEN3_30B_A3B)
    assert not before.trains and len(jobs) == 14 and len({job.name for job in jobs}) == 14
    for job in jobs:
        of = {measure.name: measure for measure in job.measures}
        own = job.settings.get("block_length", 128)
        assert of["generation"].settings["block_length"] == own and of["ar"].settings["objective"] == "ar"
        assert [of[f"block {length}"].options for length in (4, 32)] == [{"block_length": 4}, {"block_length": 32}]
        causal = {of[name].settings["ar_loss_weight"] for name in ("generation", "block 4", "infill")}
        assert causal == {job.settings.get("ar_loss_weight", 0.0)}


def record(name: str, seed: int, nelbo: float, nlls: list[float]) -> dict[str, Any]:
    courses = [{"tokens_per_pass": 2.0**place, "nll": nll, "entropy": 4.0} for place, nll in enumerate(nlls)]
    return {
        "variant": name, "seed": seed, "validation": [{"nelbo": 9.0}, {"nelbo": nelbo}], "ar": {"nelbo": 1.0 + seed},
        "block 4": {"nelbo": nelbo + 0.1}, "block 32": {"nelbo": nelbo + 0.2}, "infill": {"accuracy": 0.5},
        "generation": {"infill_accuracy": 0.25, "text": {"nll": 2.5, "entropy": 4.5}, "courses": courses},
    }  # fmt: skip


def test_the_page(tmp_path: Path) -> None:
    records = [record("", 1, 0.0, [2.0])]
    for seed in (1, 2, 3):
        records.append(record(SCP, seed, 4.0 + seed / 64, [4.0, 4.5, 5.0]))
        for number, name in enumerate((SHORT, LONG, LENGTHENED)):
            for co_loss in ("", CO_LOSS):
                # Half a nat better than SCP at one token: as good as that at 2 tokens.
                records.append(record(name + co_loss, seed, 3.0 + number + seed / 64, [3.5, 4.0, 4.5]))
    page, rows = report(records, tmp_path)
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in page.splitlines() if line[:1] == "|"]
    assert table[2][:2] == ["before conversion", ""] and table[2][5] == f"{math.exp(2):.3f}"
    by_name = {line[0]: line for line in table[3:10]}
    assert by_name[SCP][1:5] == ["3", "4.031 ± 0.039", "4.131 ± 0.039", "4.231 ± 0.039"]
    assert by_name[SCP][-1] == "1.000" and by_name[LONG][-1] == "2.000"
    assert "3.500, 4.000" in page and "Held-out text itself: 2.500, 4.500" in page
    assert f"- NELBO, own attention, against {LONG}: {SHORT} -1.000 for every seed; {LENGTHENED} +1.000" in page
    assert len(rows) == 22 and rows[1]["tokens per forward pass"] == 1 and rows[0]["held out"]["nll"] == 2.5
    assert (tmp_path / "block.png").stat().st_size > 5000
    assert speeds({"a": {1: records[1]}, "b": {1: records[2]}}) == {"a": {1: 1.0}, "b": {1: 2.0}}
