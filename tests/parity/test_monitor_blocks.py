"""What monitoring says of block diffusion, CART and their layouts, against Hugging Face's model on the same samples.

A row's part in the numbers is worked out from the tokens: what is masked, in which block, at which time.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_a2d.config.settings import build
from megatron_a2d.diffusion.attention_masks import block_causal_mask
from megatron_a2d.diffusion.rng import Noise
from tests.cases import VARIANTS, Case
from tests.parity.layouts import CP, DISTRIBUTED, EP, PP, TP_SP
from tests.parity.parity_jobs import SETTINGS
from tests.parity.pool import Pool
from tests.parity.test_monitor import flat
from tests.tiny import MASK_TOKEN_ID, hf_model

MICRO_BATCH, WEIGHT = 2, 0.5
BLOCKS = {"objective": "block", "block_length": 6, "ar_loss_weight": WEIGHT}
BATCHES = SETTINGS["global_batch_size"] // MICRO_BATCH
NAMES = ("loss", "diffusion_loss", "ar_loss", "cross_entropy", "accuracy", "mask_ratio")


def expected_of_blocks(batches: list, seed: int) -> dict[str, float]:
    model, length, size = hf_model("moe"), SETTINGS["seq_length"], BLOCKS["block_length"]
    noise = Noise(seed=seed, mask_token_id=MASK_TOKEN_ID)
    blocks = -(-length // size)
    next_tokens = masked_sum = bound = maskable = masked = right = 0.0
    times = np.zeros((10, 2))
    ratios = np.zeros((10, 2))
    for batch in batches:
        mask = block_causal_mask(batch.levels, batch.levels)[:, None]
        with torch.no_grad():
            logits = model(batch.tokens, attention_mask=mask, position_ids=batch.positions, use_cache=False).logits
        for row, index in enumerate(batch.sample_index.tolist()):
            text = batch.tokens[row, length:]
            losses = {}
            for token in range(1, length):
                clean = logits[row, length + token - 1].log_softmax(-1)
                next_tokens -= float(clean[text[token]])
                seen = clean if token % size == 0 else logits[row, token - 1].log_softmax(-1)
                losses[token] = -float(seen[text[token]]), int(seen.argmax() == text[token])
            maskable += length - 1
            for number in range(blocks):
                places = [token for token in losses if token // size == number]
                hidden = [token for token in places if batch.tokens[row, token] == MASK_TOKEN_ID]
                time = noise.time(index * blocks + number)
                loss, hits = (sum(losses[token][part] for token in hidden) for part in (0, 1))
                times[int(time * 10)] += loss / time, len(places)
                ratios[min(9, int(len(hidden) / len(places) * 10))] += hits, len(hidden)
                bound, masked_sum, masked, right = (
                    bound + loss / time,
                    masked_sum + loss,
                    masked + len(hidden),
                    right + hits,
                )
    values = ((bound + WEIGHT * next_tokens) / maskable, bound / maskable, next_tokens / maskable, masked_sum / masked,
              right / masked, masked / maskable)  # fmt: skip
    found = dict(zip(NAMES, values, strict=True))
    for name, table in (("loss_by_t", times), ("accuracy_by_mask_ratio", ratios)):
        found |= {f"{name}.{place / 10:.1f}": a / b for place, (a, b) in enumerate(table) if b}
    return found


def seen(found: dict) -> dict[str, float]:
    """The numbers of an interval."""
    wanted = (*NAMES, "loss_by_t", "accuracy_by_mask_ratio")
    return {name: value for name, value in flat(found).items() if name.partition(".")[0] in wanted}


def test_blocks_by_their_own_times(cases: dict[str, Case], pool: Pool) -> None:
    case = cases["moe"]
    settings = {**case.settings, **BLOCKS, "micro_batch_size": MICRO_BATCH}
    (found,) = pool.run("monitored", 1, checkpoint=case.checkpoint, settings=settings, num_steps=1)
    (batches,) = pool.run("samples", 1, checkpoint=case.checkpoint, settings=settings, num_batches=BATCHES)
    expected = expected_of_blocks(batches, build(SETTINGS | settings).data.seed)
    assert seen(found) == pytest.approx(expected, rel=2e-5)
    # Control: at other times the loss lies elsewhere, and is another.
    other = expected_of_blocks(batches, seed=99)
    assert other["diffusion_loss"] != pytest.approx(found["diffusion_loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(2, {**CP, **EP, "micro_batch_size": 2}, id="CP2, EP2"),
        pytest.param(4, {**PP, **TP_SP, **DISTRIBUTED, "micro_batch_size": 2}, id="PP2, TP2", marks=pytest.mark.full),
    ],
)
def test_blocks_under_layouts(ranks: int, layout: dict, cases: dict[str, Case], pool: Pool) -> None:
    case = cases["moe"]
    settings = {**case.settings, **VARIANTS["block + ar"]}
    (alone,) = pool.run(
        "monitored", 1, checkpoint=case.checkpoint, settings={**settings, "micro_batch_size": 2}, num_steps=1
    )
    for found in pool.run("monitored", ranks, checkpoint=case.checkpoint, settings=settings | layout, num_steps=1):
        assert seen(found) == pytest.approx(seen(alone), rel=1e-5)
    assert len(seen(alone)) > 15 and 0 < alone["mask_ratio"] < 1


def test_the_mask_ratio_counts_tokens_without_weight(cases: dict[str, Case], pool: Pool) -> None:
    """CART at p = 1: only masked tokens next to an unmasked one have a weight."""
    case = cases["moe"]
    settings = {**case.settings, "loss_weighting": "cart", "cart_p": 1.0, "micro_batch_size": MICRO_BATCH}
    (found,) = pool.run("monitored", 1, checkpoint=case.checkpoint, settings=settings, num_steps=1)
    (batches,) = pool.run("samples", 1, checkpoint=case.checkpoint, settings=settings, num_batches=BATCHES)
    masked, judged, maskable = (
        sum(int(count(batch)) for batch in batches)
        for count in (
            lambda batch: (batch.tokens == MASK_TOKEN_ID).sum(),
            lambda batch: (batch.weights > 0).sum(),
            lambda batch: batch.num_maskable.sum(),
        )
    )
    assert masked > judged > 0 and found["mask_ratio"] == pytest.approx(masked / maskable)
