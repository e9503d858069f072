"""Samplers other than `rnd1`: unmasking order, blocks, guidance, early stop, and the published entropy-bounded sampler."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_a2d.diffusion.model_interface import Request, from_logits
from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, kept_positions, make_canvas
from megatron_a2d.diffusion.sampling.early_stop import after_eos
from megatron_a2d.diffusion.sampling.sampler import entropy_bounded
from megatron_a2d.diffusion.sampling.token_scores import Scores, _draw, _filter, scorer
from megatron_a2d.diffusion.sampling.unmask_schedule import blocks_of, counts_left, plan_steps, sizes_of
from tests.unit.test_sampling import MASK, VOCAB, fill, hashed_logits, row_by_row, without_mask

# (prefix, holes, suffix, steps, gamma) -> what the published package makes of `without_mask` (greedy, temperature 1,
# eb_gamma), its reserved last token included.
PUBLISHED_EB = [
    (([4, 9], 12, [], 12, 0.5), [4, 9, 26, 26, 29, 7, 0, 25, 11, 4, 14, 0, 26, 12, 0]),
    (
        ([4, 9, 1], 24, [7, 7], 9, 0.1),
        [4, 9, 1, 0, 16, 7, 0, 29, 11, 29, 14, 0, 26, 13, 20, 15, 12, 2, 29, 16, 4, 1, 24, 27, 11, 14, 24, 7, 7, 0],
    ),
    (([11], 16, [3], 64, 2.0), [11, 28, 6, 18, 3, 7, 0, 25, 11, 4, 14, 0, 26, 12, 22, 20, 12, 3, 0]),
]


@pytest.mark.parametrize("case, expected", PUBLISHED_EB)
def test_equals_the_published_entropy_bounded_sampler(case, expected):
    prefix, holes, suffix, steps, gamma = case
    canvas = make_canvas([prefix + [MASK] * holes + suffix + [0]], MASK)
    assert fill(without_mask, canvas, steps, sampler="eb", gamma=gamma)[0].tolist() == expected
    assert fill(without_mask, canvas, steps, sampler="eb", gamma=50.0)[0].tolist() != expected


def plain_low_confidence(row: list[int], steps: int) -> list[int]:
    """LLaDA's low-confidence remasking for one row: predict all, keep the surest of them, mask the others again."""
    tokens = list(row)
    holes = row.count(MASK)
    for step in range(steps):
        probabilities = torch.softmax(without_mask(torch.tensor([tokens]))[0].float(), -1)
        count = holes // steps + (step < holes % steps)
        masked = [position for position, token in enumerate(tokens) if token == MASK]
        masked.sort(key=lambda position: -float(probabilities[position - 1].max()))
        for position in masked[:count]:
            tokens[position] = int(probabilities[position - 1].argmax())
    return tokens


@pytest.mark.parametrize("steps", [1, 3, 7, 20])
def test_confidence_equals_a_plain_loop(steps):
    row = [3, *[MASK] * 11, 5, 6, *[MASK] * 9, 2]
    assert fill(without_mask, make_canvas([row], MASK), steps, sampler="confidence")[0].tolist() == (
        plain_low_confidence(row, steps)
    )


def sharp(levels: list[float]) -> torch.Tensor:
    """Row i says token 10 with this probability."""
    probabilities = torch.zeros(len(levels), VOCAB)
    for row, level in enumerate(levels):
        probabilities[row] = (1 - level) / (VOCAB - 2)
        probabilities[row, 10], probabilities[row, MASK] = level, 0
    return probabilities.log()


def order_of(logits_LV: torch.Tensor, **options) -> list[list[int]]:
    canvas = make_canvas([[1] + [MASK] * (len(logits_LV) - 1)], MASK)
    seen = []
    fill(
        lambda tokens: logits_LV.expand(len(tokens), -1, -1), canvas,
        on_step=lambda step, tokens, decided: seen.append(decided[0].nonzero()[:, 0].tolist()), **options,
    )  # fmt: skip
    return seen


def test_threshold():
    levels = [0.95, 0.5, 0.91, 0.7, 0.99, 0.6]  # of positions 1 to 6; the last row predicts nothing
    logits = sharp([*levels, 0.5])
    assert order_of(logits, sampler="threshold", threshold=0.9) == [[1, 3, 5], [4], [6], [2]]
    assert order_of(logits, sampler="threshold", threshold=0.4) == [[1, 2, 3, 4, 5, 6]]
    assert order_of(logits, sampler="threshold", threshold=0.9, num_steps=2) == [[1, 3, 5], [2, 4, 6]]


def test_blocks_go_from_left_to_right():
    logits = sharp([0.5, 0.9, 0.6, 0.8, 0.99, 0.7, 0.5])
    assert order_of(logits, sampler="confidence", block_length=2) == [[2], [1], [4], [3], [5], [6]]
    assert order_of(logits, sampler="rnd1", block_length=4, num_steps=3) == [[2, 4], [1, 3], [5, 6]]
    assert order_of(logits, sampler="threshold", threshold=0.75, block_length=5) == [[2, 4, 5], [3], [1], [6]]


def test_blocks_count_holes_over_gaps():
    row = [1, MASK, MASK, 4, MASK, MASK, MASK, 5]
    seen = []
    fill(
        hashed_logits, make_canvas([row], MASK), block_length=3, sampler="confidence",
        on_step=lambda step, tokens, decided: seen.extend(decided[0].nonzero()[:, 0].tolist()),
    )  # fmt: skip
    assert sorted(seen[:3]) == [1, 2, 4] and sorted(seen[3:]) == [5, 6]


def test_one_block_of_all_holes_is_no_block():
    canvas = make_canvas([[1, *[MASK] * 14, 3]], MASK)
    for sampler in ("rnd1", "confidence", "eb", "threshold"):
        plain, blocked = (fill(hashed_logits, canvas, 6, sampler=sampler, block_length=n) for n in (0, 14))
        assert torch.equal(plain, blocked)
        assert not torch.equal(plain, fill(hashed_logits, canvas, 6, sampler=sampler, block_length=2))


@pytest.mark.parametrize("holes", [1, 2, 7, 30])
@pytest.mark.parametrize("steps", [1, 4, 30, 256])
@pytest.mark.parametrize("block_length", [0, 1, 4])
def test_plans(holes, steps, block_length):
    for sampler in ("rnd1", "confidence", "eb", "threshold"):
        (sizes,) = sizes_of(blocks_of(torch.ones(1, holes, dtype=torch.bool), block_length))
        plan = plan_steps(sizes, sampler, steps)
        num_blocks = -(-holes // block_length) if block_length else 1
        assert {turn.block for turn in plan} == set(range(num_blocks))
        assert len(plan) <= max(min(holes, steps), num_blocks)
        assert all(a.block < b.block or a.num_left > b.num_left for a, b in itertools.pairwise(plan))
        assert [turn.num_left for turn in plan if turn.num_left == 0] == [0] * num_blocks
    assert counts_left(0, "rnd1", 5) == []


def test_endless_steps_decide_one_position_each():
    for sampler in ("rnd1", "confidence", "eb", "threshold"):
        assert counts_left(49, sampler, 10**12) == list(range(48, -1, -1))
    assert counts_left(49, "rnd1", 49) != list(range(48, -1, -1)), "the published rounding is kept"


def test_greedy_with_a_temperature_orders_by_the_tempered_entropy():
    """Entropies of two rows that change places when the distribution is sharpened, as the published package does."""
    logits = torch.full((3, VOCAB), -30.0)
    logits[0, 5:7] = torch.tensor([0.0, -0.7])  # two tokens
    logits[1, 5] = 0.0  # one token and a broad tail
    logits[1, 7:28] = -4.2
    first = {t: order_of(logits, num_steps=2, temperature=t, greedy=True)[0] for t in (1.0, 0.2, 6.0)}
    assert first == {1.0: [1], 0.2: [2], 6.0: [1]}


def test_guidance():
    """The given text masked, the difference scaled; a model that ignores the text is not changed by it."""
    canvas = make_canvas([[4, 9, MASK, MASK, MASK, 7], [5, MASK, MASK, 3, 2, 2]], MASK)
    seen = []

    def model(request: Request, reduce):
        seen.append(request.tokens)
        return from_logits(hashed_logits)(request, reduce)

    result = denoise(model, canvas, MASK, SamplingOptions(num_steps=1, cfg_scale=1.5)).tokens
    assert seen[0].tolist() == [*canvas.tokens.tolist(), [MASK] * 6, [MASK] * 6]
    given, masked = hashed_logits(canvas.tokens), hashed_logits(torch.full_like(canvas.tokens, MASK))
    guided = given + 1.5 * (given - masked)
    guided[..., MASK] = -torch.inf
    assert result[0, 2:5].tolist() == guided[0, 1:4].argmax(-1).tolist()
    assert result[1, 1:3].tolist() == guided[1, 0:2].argmax(-1).tolist()
    assert not torch.equal(result, fill(hashed_logits, canvas, 1))

    fixed = sharp([0.5, 0.9, 0.6, 0.8, 0.99, 0.7])
    plain, same = (fill(lambda t: fixed.expand(len(t), -1, -1), canvas, 3, cfg_scale=w) for w in (0.0, 2.0))
    assert torch.equal(plain, same)


def test_guidance_is_the_written_formula() -> None:
    """l + w (l - u), in all that a sampler reads of it: token, confidence and entropy; the mask token has no part."""
    generator = torch.Generator().manual_seed(2)
    given, masked = torch.randn(2, 5, VOCAB, generator=generator)
    for w in (0.5, 1.0, 3.0):
        reduce = scorer(SamplingOptions(cfg_scale=w), MASK, None)
        found = Scores(*reduce(torch.cat([given, masked]), lambda logits: logits.clone()))
        guided = given + w * (given - masked)
        guided[:, MASK] = -torch.inf
        probabilities = guided.softmax(-1)
        assert found.tokens.tolist() == guided.argmax(-1).tolist()
        torch.testing.assert_close(found.log_confidence, probabilities.max(-1).values.log())
        entropy = -torch.special.xlogy(probabilities, probabilities).sum(-1)
        torch.testing.assert_close(found.entropy, entropy)


def test_the_entropy_bound_is_written_out() -> None:
    """By cost, the sum of entropies less the largest of them: 0, 1/8, 3/8, 5/8, 7/8. The bound itself is within."""
    costs = torch.tensor([[0.5, 0.1, 0.4, 0.2, 0.3]])
    entropies = torch.tensor([[0.25, 0.125, 0.25, 0.5, 0.25]])
    everything = torch.ones(1, 5, dtype=torch.bool)
    for gamma, places in (
        (0.0, [1]), (0.124, [1]), (0.125, [1, 3]), (0.374, [1, 3]), (0.375, [1, 3, 4]), (0.625, [1, 2, 3, 4]),
        (0.875, [0, 1, 2, 3, 4]),
    ):  # fmt: skip
        assert entropy_bounded(costs, entropies, everything, gamma)[0].nonzero()[:, 0].tolist() == places
    some = torch.tensor([[True, False, True, True, True]])  # the first one counts from among these
    assert entropy_bounded(costs, entropies, some, 0.25)[0].nonzero()[:, 0].tolist() == [3, 4]


def test_bounds_are_inclusive() -> None:
    """Probabilities of exactly the threshold are taken; a token whose likelier ones reach top-p is not."""
    certain = torch.full((5, VOCAB), -1e9)
    certain[:, 4] = 0.0
    assert order_of(certain, sampler="threshold", threshold=1.0) == [[1, 2, 3, 4]]
    four = torch.full((1, VOCAB), -torch.inf)
    four[0, 5:9] = 1.0  # a quarter each
    for top_p, kept in ((0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4)):
        assert int(_filter(four, 0, top_p).isfinite().sum()) == kept
    assert [int(_filter(four, top_k, 1.0).isfinite().sum()) for top_k in (0, 1, 3, 4, 40)] == [4, 1, 3, 4, 4]


def test_draws_at_the_ends_of_the_distribution() -> None:
    """Impossible tokens are not drawn, whatever the number; each token's part begins with its lower end."""
    weights = torch.tensor([[0.0, 1.0, 0.0, 2.0, 1.0, 0.0]])
    for uniform, token in ((0.0, 1), (0.249, 1), (0.25, 3), (0.749, 3), (0.75, 4), (1 - 2**-53, 4), (1.0, 4)):
        assert _draw(weights, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


END = 9


def ending_logits(tokens_BL: torch.Tensor) -> torch.Tensor:
    """Every position wants its own number, but position 4 and those after 6 want the end; early ones are surer."""
    length = tokens_BL.shape[1]
    logits = torch.zeros(length, VOCAB)
    for position in range(1, length):
        logits[position - 1, END if position == 4 or position > 6 else 10 + position] = 20.0 - position
    return logits.expand(len(tokens_BL), -1, -1)


def test_an_ended_text_is_left():
    canvas = make_canvas([[1] + [MASK] * 20, [1] + [MASK] * 3 + [2] * 17], MASK)
    options = SamplingOptions(num_steps=20, sampler="confidence")
    result = denoise(from_logits(ending_logits), canvas, MASK, options, end_token_ids=[END])
    whole = denoise(from_logits(ending_logits), canvas, MASK, options)
    assert result.num_forwards == [4, 3] and whole.num_forwards == [20, 3]
    assert not (result.tokens == MASK).any() and (result.tokens[0, 5:] == END).all()
    kept = [kept_positions(r.tokens[0].tolist(), canvas.editable[0].tolist(), {END}) for r in (result, whole)]
    assert kept[0] == kept[1] == [0, 1, 2, 3]


def test_an_end_behind_a_mask_is_not_the_end():
    tokens = torch.tensor([[1, 3, END, MASK, MASK, 2, MASK, END, MASK]])
    masked = tokens == MASK
    editable = torch.tensor([[False, True, True, True, True, False, True, True, True]])
    assert after_eos(tokens, masked, editable, [END])[0].nonzero()[:, 0].tolist() == [3, 4]
    assert not after_eos(tokens, masked, editable, [2]).any(), "a given token does not end a hole"
    assert not after_eos(tokens, masked, editable, []).any()


def test_finished_rows_leave_the_batch():
    canvas = make_canvas([[1] + [MASK] * 12, [1, MASK], [2, 3, MASK, MASK, 4]], MASK)
    sizes = []

    def model(request: Request, reduce):
        sizes.append(len(request.tokens))
        return row_by_row(request, reduce)

    result = denoise(model, canvas, MASK, SamplingOptions(num_steps=6))
    assert sizes == [3, 2, 1, 1, 1, 1] and result.num_forwards == [6, 1, 2]


def test_a_final_row_is_left_with_what_it_has():
    canvas = make_canvas([[1, *[MASK] * 24], [5, 2, *[MASK] * 22]], MASK)
    options = SamplingOptions(num_steps=24, block_length=4)
    whole = denoise(row_by_row, canvas, MASK, options, end_token_ids=[25])
    seen: list[tuple[int, list[int]]] = []

    def is_final(row: int, written: list[int]) -> bool:
        seen.append((row, written))
        return row == 0 and len(written) >= 8

    cut = denoise(row_by_row, canvas, MASK, options, end_token_ids=[25], is_final=is_final)
    assert cut.tokens[1].tolist() == whole.tokens[1].tolist() and cut.num_forwards[1] == whole.num_forwards[1]
    asked = [written for row, written in seen if row == 0]
    written = asked[-1]
    assert 8 <= len(written) < 24 and cut.num_forwards[0] < whole.num_forwards[0]
    assert cut.tokens[0].tolist() == [1, *written, *cut.tokens[0].tolist()[1 + len(written) :]]
    assert cut.tokens[0].tolist()[1 : 1 + len(written)] == whole.tokens[0].tolist()[1 : 1 + len(written)]
    assert cut.tokens[0, -1] == 25 and MASK not in cut.tokens
    assert all(len(a) < len(b) for a, b in itertools.pairwise(asked))
    with pytest.raises(ValueError, match="is_final needs end_token_ids"):
        denoise(row_by_row, canvas, MASK, options, is_final=is_final)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "best"}, "sampler best"),
        ({"cache": "dual"}, "cache dual: has no effect without blocks"),
        ({"threshold": 0.0}, "threshold 0.0"),
        ({"gamma": -1.0}, "gamma -1"),
        ({"gamma": float("nan")}, "gamma nan"),
        ({"block_length": -2}, "block_length -2"),
        ({"cfg_scale": -0.5}, "cfg_scale -0.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)
