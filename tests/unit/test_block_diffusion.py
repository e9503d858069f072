"""Block diffusion as data: rows, labels, weights and levels; and what is visible when a text is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_a2d.checkpoint.training_facts import Trained
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.conversion.end_tokens import EndTokens
from megatron_a2d.conversion.hf_config import Exported, refusals
from megatron_a2d.diffusion.attention_masks import block_causal_mask
from megatron_a2d.diffusion.block_diffusion import BlockModel, corrupt_blocks
from megatron_a2d.diffusion.corruption import corrupt, next_token
from megatron_a2d.diffusion.model_interface import Request, from_logits
from megatron_a2d.diffusion.rng import Noise
from megatron_a2d.diffusion.sampling.unmask_schedule import blocks_of, sizes_of

MASK, LENGTH, BLOCK = 99, 22, 5
TOKENS = np.arange(LENGTH)
NOISE = Noise(seed=7, mask_token_id=MASK)


def visible(levels: np.ndarray | torch.Tensor) -> torch.Tensor:
    levels_1L = torch.as_tensor(levels)[None]
    return block_causal_mask(levels_1L, levels_1L)[0]


@pytest.mark.parametrize("causal", [False, True])
def test_who_sees_whom(causal: bool) -> None:
    """The mask written out, token by token: BD3LM's block diagonal, offset block causal and block causal parts."""
    see = visible(corrupt_blocks(TOKENS, 0, NOISE, BLOCK, causal_context=causal).levels)
    for query in range(2 * LENGTH):
        for key in range(2 * LENGTH):
            (q, q_noised), (k, k_noised) = ((row % LENGTH, row < LENGTH) for row in (query, key))
            if q_noised:
                expected = q // BLOCK == k // BLOCK if k_noised else k // BLOCK < q // BLOCK
            else:
                expected = not k_noised and (k <= q if causal else k // BLOCK <= q // BLOCK)
            assert bool(see[query, key]) == expected, (query, key)


@pytest.mark.parametrize("shift", [True, False])
def test_every_masked_token_is_judged_once(shift: bool) -> None:
    """By a row that sees its block's context and not the token itself."""
    noise = Noise(seed=7, mask_token_id=MASK, label_shift=shift)
    for index in range(40):
        sample = corrupt_blocks(TOKENS, index, noise, BLOCK)
        masked = sample.tokens[:LENGTH] == MASK
        assert not (shift and masked[0]) and np.array_equal(sample.tokens[LENGTH:], TOKENS)
        rows = np.flatnonzero(sample.weights)
        assert sorted(sample.labels[rows]) == sorted(TOKENS[masked])
        see = visible(sample.levels)
        for row in rows:
            token = int(sample.labels[row])
            start = token // BLOCK * BLOCK
            assert all(see[row, LENGTH + place] for place in range(start)), "the blocks before are the context"
            assert not any(see[row, LENGTH + place] for place in range(start, LENGTH)), "the answer is not seen"
            is_first = shift and token == start
            assert (row >= LENGTH) == is_first and row % LENGTH == token - shift
        assert sample.num_maskable == LENGTH - shift


def test_blocks_have_their_own_times_evenly_spread() -> None:
    samples = [corrupt_blocks(np.zeros(4000, dtype=np.int64), index, NOISE, 1000) for index in range(16)]
    ratios = np.array([(sample.tokens[:4000] == MASK).reshape(4, 1000).mean(1) for sample in samples])
    gaps = np.diff(np.concatenate([[0], np.sort(ratios.flatten()), [1]]))
    assert gaps.max() < 3.5 / 64 and ratios.std(1).min() > 0.1
    weights = samples[0].weights[:4000].reshape(4, 1000)
    assert [len(set(part[part > 0])) for part in weights] == [1] * 4


@pytest.mark.parametrize("shift", [True, False])
def test_a_block_is_a_span_of_its_own(shift: bool) -> None:
    """Its time, its tokens and its part of the loss: what monitoring sorts by. The co-loss is kept apart."""
    noise = Noise(seed=7, mask_token_id=MASK, label_shift=shift)
    for index in range(20):
        sample = corrupt_blocks(TOKENS, index, noise, BLOCK, causal_context=True, ar_loss_weight=0.5)
        plain = corrupt_blocks(TOKENS, index, noise, BLOCK, causal_context=True)
        assert plain.masked_weights is None and np.array_equal(sample.masked_weights, plain.weights)
        assert (sample.weights - sample.masked_weights > 0).sum() == LENGTH - 1
        masked = sample.tokens[:LENGTH] == MASK
        for number, (time, num_maskable, num_masked) in enumerate(sample.noise_segments):
            block = slice(number * BLOCK, (number + 1) * BLOCK)
            assert time == noise.time(index * 5 + number) and num_masked == masked[block].sum()
            assert num_maskable == len(TOKENS[block]) - (shift and number == 0)
            rows = np.flatnonzero((sample.masked_weights > 0) & (sample.segment_of_position == number))
            assert sorted(sample.labels[rows]) == sorted(TOKENS[block][masked[block]])
            assert sample.masked_weights[rows] == pytest.approx(np.full(len(rows), 1 / time), rel=1e-6)
        assert len(sample.noise_segments) == 5


def test_one_block_is_masked_diffusion() -> None:
    """The noised half of one block is the sample of the objective mdlm, bit for bit."""
    for index in range(10):
        block, plain = corrupt_blocks(TOKENS, index, NOISE, LENGTH), corrupt(TOKENS, index, NOISE)
        for name in ("tokens", "labels", "weights"):
            assert np.array_equal(getattr(block, name)[:LENGTH], getattr(plain, name))
        assert block.weights[LENGTH:].max() == 0 and block.time == plain.time


def test_blocks_of_one_token_are_autoregressive_on_average() -> None:
    """Each token is judged by the clean row before it, and weighs one in expectation: the next-token loss."""
    total = sum(corrupt_blocks(TOKENS, index, NOISE, 1).weights for index in range(20_000)) / 20_000
    assert np.abs(total[LENGTH:-1] - 1).max() < 0.15 and total[:LENGTH].max() == 0


def test_autoregressive_part() -> None:
    plain, joint = (corrupt_blocks(TOKENS, 3, NOISE, BLOCK, ar_loss_weight=weight) for weight in (0.0, 0.25))
    added = joint.weights - plain.weights
    assert not added[:LENGTH].any() and np.allclose(added[LENGTH:], 0.25 * next_token(TOKENS).weights)
    assert np.array_equal(joint.labels[LENGTH:], next_token(TOKENS).labels)
    assert joint.num_maskable == plain.num_maskable


@pytest.mark.parametrize("shift", [True, False])
def test_a_grid_of_each_document(shift: bool) -> None:
    """With isolated documents a position sees what it would see if its document were the whole sample; labels, weights
    and counts are those of the documents."""
    sizes, noise = [9, 1, 12], Noise(seed=7, mask_token_id=MASK, label_shift=shift)
    documents, grid = np.repeat([0, 1, 2], sizes), np.concatenate([np.arange(size) for size in sizes])
    for index in range(20):
        sample = corrupt_blocks(TOKENS, index, noise, BLOCK, documents, grid_positions_L=grid)
        isolated = torch.from_numpy(np.equal.outer(np.tile(documents, 2), np.tile(documents, 2)))
        found, starts = visible(sample.levels) & isolated, np.cumsum([0, *sizes])
        assert sample.noise_segments is not None and sample.segment_of_position is not None
        assert sample.noise_segments[:, 1].tolist() == [4 + (not shift), 4, not shift, 4 + (not shift), 5, 2]
        for start, size in zip(starts, sizes, strict=False):
            alone = visible(corrupt_blocks(TOKENS[:size], index, noise, BLOCK).levels)
            rows = np.concatenate([np.arange(start, start + size), LENGTH + np.arange(start, start + size)])
            assert torch.equal(found[rows][:, rows], alone) and found[rows].sum() == alone.sum()
        for row in np.flatnonzero(sample.weights):
            token = int(sample.labels[row])
            time, start = sample.noise_segments[sample.segment_of_position[row], 0], token - grid[token] % BLOCK
            assert sample.tokens[token] == MASK and sample.weights[row] == pytest.approx(1 / time, rel=1e-6)
            assert not any(found[row, LENGTH + place] for place in range(start, LENGTH)), "the answer is not seen"
            assert (row >= LENGTH) == (shift and token == start), (
                "the first token of a block is judged by the clean copy"
            )
        assert (sample.tokens[:LENGTH] == MASK).sum() == np.count_nonzero(sample.weights)


def test_isolated_documents_begin_unmasked() -> None:
    documents = np.repeat([0, 1], [9, 13])
    for index in range(40):
        sample = corrupt_blocks(TOKENS, index, NOISE, BLOCK, documents)
        assert sample.tokens[0] != MASK and sample.tokens[9] != MASK
        assert np.array_equal(sample.documents, np.tile(documents, 2))


@pytest.mark.parametrize("causal", [False, True])
def test_writing_sees_what_training_saw(causal: bool) -> None:
    """The rows of the block that is filled, and the row before it, see the tokens that they saw in training."""
    seen: list[torch.Tensor] = []
    model = BlockModel(lambda request, reduce: seen.append(request.levels) or (), MASK, BLOCK, causal)
    training = visible(corrupt_blocks(TOKENS, 0, NOISE, BLOCK, causal_context=causal).levels)
    for start in range(0, LENGTH, BLOCK):
        tokens = torch.from_numpy(np.where(np.arange(LENGTH) < start + 1, TOKENS, MASK))[None]
        model(Request(tokens, tokens >= 0, tokens == MASK), lambda hidden, head: ())
        see = visible(seen[-1][0])
        for query in range(max(start - 1, 0), min(start + BLOCK, LENGTH)):
            row = query + LENGTH * (query < start)  # the row before the block is a clean one
            for key in range(LENGTH):
                in_block = start <= key < start + BLOCK and query >= start
                assert bool(see[query, key]) == bool(training[row, key if in_block else LENGTH + key]), (query, key)


@pytest.mark.parametrize("causal", [False, True])
def test_a_text_without_masks_is_finished(causal: bool) -> None:
    """Its short last block too: everything sees what the clean copy saw in training."""
    model = BlockModel(from_logits(lambda tokens: tokens), MASK, BLOCK, causal)
    training = visible(corrupt_blocks(TOKENS, 0, NOISE, BLOCK, causal_context=causal).levels)
    assert torch.equal(visible(model.levels(torch.from_numpy(TOKENS)[None])[0]), training[LENGTH:, LENGTH:])


def test_aligned_blocks_are_pieces_of_the_text() -> None:
    editable = torch.zeros(2, 12, dtype=torch.bool)
    editable[0, 3:] = True
    editable[1, [2, 9, 10]] = True
    blocks = blocks_of(editable, 4, aligned=True)
    assert blocks[0].tolist() == [-1, -1, -1, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert blocks[1].tolist() == [-1, -1, 0, -1, -1, -1, -1, -1, -1, 1, 1, -1]
    assert sizes_of(blocks) == [[1, 4, 4], [1, 2]]
    assert sizes_of(blocks_of(editable, 4)) == [[4, 4, 1], [3]]


def test_exports_do_not_pass_for_what_they_are_not() -> None:
    model_config = ModelConfig(4, 64, 4, 2, 16, 128, 256, 4096, 1e-6, 1e6, False, 8, 2, 48, mask_token_id=250)
    blocks, plain = (
        Exported(model_config, {}, {}, "float32", Trained(objective, block_length=length), EndTokens((), None))
        for objective, length in (("block", 4), ("mdlm", 0))
    )
    assert any("blocks of 4" in line for line in refusals("rnd1", blocks)) and not refusals("rnd1", plain)
    assert not refusals("a2d", blocks) and not refusals("a2d", plain)
    assert refusals("qwen3", blocks) and not refusals("qwen3", blocks, allow_objective_mismatch=True)
