"""The sampler: its schedule, the published sampler's output, and that rows do not influence one another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_a2d.diffusion.model_interface import Request, from_logits
from megatron_a2d.diffusion.sampling import Canvas, SamplingOptions, denoise, make_canvas, row_seed

VOCAB = 31
MASK = VOCAB - 1


def hashed_logits(tokens_BL: torch.Tensor) -> torch.Tensor:
    """Logits that depend on a token, its neighbours and its position by whole-number arithmetic only."""
    left, right = tokens_BL.roll(1, 1)[..., None], tokens_BL.roll(-1, 1)[..., None]
    token, v = tokens_BL[..., None], torch.arange(VOCAB)
    i = torch.arange(tokens_BL.shape[1])[:, None]
    value = (token + 3) * (v + 1) * 7919 + (left + 5) * (v + 2) * 10473 + (right + 7) * (v + 3) * 4099 + i * v * 12553
    scale = 1 + (token * 31 + left * 17 + right * 13 + i * 7) % 11
    return (value % 1009).double() / 1009 * scale.double()


def without_mask(tokens_BL: torch.Tensor) -> torch.Tensor:
    logits = hashed_logits(tokens_BL)
    logits[..., MASK] = -1e30
    return logits


def row_by_row(request: Request, reduce) -> tuple[torch.Tensor, ...]:
    """A model that computes `hashed_logits` of each row's real length only: padding and other rows cannot matter."""
    out = torch.zeros(*request.tokens.shape, VOCAB, dtype=torch.float64)
    for row, length in enumerate(request.visible.sum(1).tolist()):
        out[row, :length] = hashed_logits(request.tokens[row : row + 1, :length])[0]
    return reduce(out[request.needed], lambda logits: logits)


def fill(
    logits_fn, canvas: Canvas, num_steps: int = 256, *, seed=0, label_shift=True, ends=(), on_step=None, **options
):
    """The tokens that `denoise` gives, [B, L]."""
    return denoise(
        from_logits(logits_fn), canvas, MASK, SamplingOptions(num_steps=num_steps, **options),
        label_shift=label_shift, seed=seed, end_token_ids=ends, on_step=on_step,
    ).tokens  # fmt: skip


def fixed_logits(probabilities_LV: torch.Tensor):
    return lambda tokens_BL: probabilities_LV.log().expand(len(tokens_BL), -1, -1)


# (prefix, holes, suffix, steps) -> what the published package's sampler (greedy, temperature 1, no filters)
# makes of `without_mask`, its reserved last token included.
PUBLISHED = [
    (([4, 9], 12, [], 12), [4, 9, 26, 26, 29, 7, 0, 25, 11, 4, 14, 0, 26, 12, 0]),
    (
        ([4, 9, 1], 24, [7, 7], 9),
        [
            4,
            9,
            1,
            0,
            16,
            7,
            0,
            25,
            11,
            29,
            14,
            0,
            26,
            12,
            20,
            17,
            12,
            2,
            29,
            16,
            28,
            1,
            24,
            3,
            11,
            10,
            22,
            7,
            7,
            0,
        ],
    ),
    (
        ([4, 9, 1], 24, [7, 7], 4),
        [
            4,
            9,
            1,
            0,
            16,
            7,
            0,
            25,
            11,
            29,
            14,
            0,
            26,
            16,
            20,
            7,
            12,
            2,
            29,
            16,
            4,
            1,
            24,
            27,
            11,
            14,
            3,
            7,
            7,
            0,
        ],
    ),
    (([11], 10, [3], 64), [11, 28, 6, 18, 3, 7, 0, 25, 11, 4, 14, 3, 0]),
]


@pytest.mark.parametrize("case, expected", PUBLISHED)
def test_equals_the_published_sampler(case, expected):
    prefix, holes, suffix, steps = case
    canvas = make_canvas([prefix + [MASK] * holes + suffix + [0]], MASK)
    assert fill(without_mask, canvas, steps)[0].tolist() == expected
    other = fill(without_mask, canvas, 1)[0].tolist()
    assert other != expected, "the case does not depend on the schedule"


def plain_loop(row: list[int], steps: int) -> list[int]:
    """The published schedule for one row, written down without any batching."""
    tokens = list(row)
    holes = row.count(MASK)
    for step in range(steps - 1, -1, -1):
        logp = torch.log_softmax(without_mask(torch.tensor([tokens]))[0].float(), -1)
        entropy = -(logp.exp() * logp).sum(-1)
        masked = [position for position, token in enumerate(tokens) if token == MASK]
        keep = int(np.float32(holes) * np.float32(step / steps))
        masked.sort(key=lambda position: float(entropy[position - 1]))
        for position in masked[: max(len(masked) - keep, 0)]:
            tokens[position] = int(logp[position - 1].argmax())
    return tokens


def test_equals_a_plain_loop_with_several_holes():
    generator = np.random.default_rng(0)
    for steps in (1, 3, 7, 24, 40):
        row = generator.integers(0, MASK, 50)
        row[1:][generator.random(49) < 0.5] = MASK
        canvas = make_canvas([row.tolist()], MASK)
        result = fill(without_mask, canvas, steps)[0].tolist()
        assert result == plain_loop(row.tolist(), steps)
        assert all(new == old for new, old in zip(result, row, strict=True) if old != MASK)


@pytest.mark.parametrize("label_shift", [True, False])
def test_lowest_entropy_first(label_shift):
    length = 9
    sharpness = torch.tensor([3.0, 1.0, 8.0, 2.0, 6.0, 4.0, 7.0, 5.0, 9.0])
    logits = torch.zeros(length, VOCAB)
    logits[torch.arange(length), torch.arange(length) + 10] = sharpness  # row i says token i + 10, surely if sharp
    canvas = make_canvas([[1] + [MASK] * (length - 1)], MASK)
    seen = []
    result = fill(
        lambda tokens: logits.expand(len(tokens), -1, -1),
        canvas,
        num_steps=length - 1,
        label_shift=label_shift,
        on_step=lambda step, tokens, decided: seen.append((step, decided[0].nonzero()[:, 0].tolist())),
    )
    shift = int(label_shift)
    order = sorted(range(1, length), key=lambda position: -float(sharpness[position - shift]))
    assert seen == [(step, [position]) for step, position in enumerate(order, start=1)]
    assert result[0, 1:].tolist() == [position - shift + 10 for position in range(1, length)]


@pytest.mark.parametrize("holes, steps", [(16, 4), (16, 16), (3, 12), (5, 256), (12, 1), (22, 22)])
def test_schedule_and_number_of_forwards(holes, steps):
    canvas = make_canvas([[1] + [MASK] * holes], MASK)
    forwards, masked_after = [], {}

    def logits_fn(tokens: torch.Tensor) -> torch.Tensor:
        forwards.append(int((tokens == MASK).sum()))
        return hashed_logits(tokens)

    def on_step(step: int, tokens: torch.Tensor, decided: torch.Tensor) -> None:
        masked_after[step] = int((tokens == MASK).sum())

    fill(logits_fn, canvas, steps, on_step=on_step)
    # In fp32, as published; for 22 holes in 22 steps that is not the whole-number quotient everywhere.
    expected = [int(np.float32(holes) * np.float32((steps - step) / steps)) for step in range(1, steps + 1)]
    assert list(masked_after.values()) == sorted(set(expected) - {holes}, reverse=True)
    assert list(masked_after) == list(range(1, len(masked_after) + 1))
    assert len(forwards) == len(masked_after) <= min(holes, steps), "a forward that decided nothing"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_never_predicts_the_mask_token(temperature):
    probabilities = torch.full((20, VOCAB), 0.001 / (VOCAB - 1))
    probabilities[:, MASK] = 0.999
    canvas = make_canvas([[1] + [MASK] * 19] * 8, MASK)
    result = fill(fixed_logits(probabilities), canvas, 7, temperature=temperature)
    assert not (result == MASK).any()


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.5}, {"top_k": 1}])
def test_filters_keep_the_entropy_order(options):
    """Rows of rising entropy stay in order when filters make most tokens impossible."""
    length = 8
    logits = torch.zeros(length, VOCAB)
    for row in range(length):
        logits[row, 2:7] = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2]) * (length - row) + 5
    canvas = make_canvas([[1] + [MASK] * (length - 1)], MASK)
    order: list[int] = []
    result = fill(
        lambda tokens: logits.expand(len(tokens), -1, -1),
        canvas,
        num_steps=length - 1,
        temperature=1.0,
        on_step=lambda step, tokens, decided: order.extend(decided[0].nonzero()[:, 0].tolist()),
        **options,
    )
    assert order == list(range(1, length))
    assert set(result[0, 1:].tolist()) <= set(range(2, 2 + options.get("top_k", 5)))


def frequencies(probabilities: torch.Tensor, **options) -> torch.Tensor:
    draws = 4000
    canvas = make_canvas([[1, MASK]] * draws, MASK)
    result = fill(fixed_logits(probabilities.expand(2, -1)), canvas, 1, **options)
    return torch.bincount(result[:, 1], minlength=VOCAB) / draws


def test_draws_follow_the_distribution():
    probabilities = torch.full((VOCAB,), 1e-9)
    probabilities[:4] = torch.tensor([0.5, 0.25, 0.15, 0.1])
    expected = {
        (1.0, 0, 1.0): [0.5, 0.25, 0.15, 0.1],
        (0.5, 0, 1.0): [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345],
        (1.0, 2, 1.0): [2 / 3, 1 / 3, 0, 0],
        (1.0, 0, 0.7): [2 / 3, 1 / 3, 0, 0],
        (1.0, 0, 0.8): [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0],
        (1.0, 3, 0.6): [2 / 3, 1 / 3, 0, 0],
        (0.0, 0, 1.0): [1, 0, 0, 0],
    }
    for (temperature, top_k, top_p), shares in expected.items():
        found = frequencies(probabilities, temperature=temperature, top_k=top_k, top_p=top_p)[:4]
        error = (found - torch.tensor(shares)).abs()
        # Five standard errors of a share of 0.5 in 4000 draws; a share of 0 is never drawn.
        assert float(error.max()) < 0.04, (temperature, top_k, top_p, found)
        assert not found[torch.tensor(shares) == 0].any()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampler": "eb", "gamma": 0.5},
        {"sampler": "confidence", "block_length": 3},
        {"sampler": "threshold", "threshold": 0.5, "block_length": 4, "num_steps": 40},
        {"cfg_scale": 0.5},
    ],
)
def test_same_text_on_any_batch_split(changes):
    generator = np.random.default_rng(1)
    rows = []
    for length in (12, 30, 7, 21):
        row = generator.integers(0, MASK, length)
        row[1:][generator.random(length - 1) < 0.6] = MASK
        rows.append(row.tolist())
    canvas = make_canvas(rows, MASK)
    options = SamplingOptions(**{"num_steps": 9, "temperature": 1.0, "top_p": 0.9, **changes})
    together = denoise(row_by_row, canvas, MASK, options, seed=5).tokens
    for index, row in enumerate(rows):
        single = make_canvas([row], MASK)
        for seed, is_equal in ((row_seed(5, index), True), (row_seed(6, index), False)):
            alone = denoise(row_by_row, single, MASK, options, seed=[seed]).tokens
            assert torch.equal(alone[0], together[index, : len(row)]) == is_equal
        assert not together[index, len(row) :].any(), "padding changed"


def test_seeds():
    canvas = make_canvas([[1] + [MASK] * 20] * 3, MASK)

    def run(seed) -> torch.Tensor:
        return fill(hashed_logits, canvas, 5, temperature=1.0, seed=seed)

    assert torch.equal(run(0), run(0))
    rows = {tuple(row) for seed in (0, 1, 2) for row in run(seed).tolist()}
    assert len(rows) == 9, "seeds and rows must all draw differently"
    seeds = {row_seed(seed, row) for seed in range(50) for row in range(50)}
    assert len(seeds) == 2500 and max(seeds) < 2**32
    with pytest.raises(ValueError, match="2 seeds for 3 sequences"):
        run([1, 2])


def test_make_canvas():
    canvas = make_canvas([[5, MASK, 6], [7]], MASK, pad_token_id=9)
    assert canvas.tokens.tolist() == [[5, MASK, 6], [7, 9, 9]]
    assert canvas.editable.tolist() == [[False, True, False], [False, False, False]]
    assert canvas.visible.tolist() == [[True, True, True], [True, False, False]]
    # Padding with the mask token itself makes no holes.
    assert not make_canvas([[5, 6], [7]], MASK, pad_token_id=MASK).editable.any()


@pytest.mark.parametrize(
    "row, options, message",
    [
        ([MASK, 1], {}, "position 0"),
        ([1, MASK], {"num_steps": 0}, "num_steps"),
        ([1, MASK], {"temperature": -1.0}, "temperature"),
        ([1, MASK], {"top_p": 0.0}, "top_p"),
        ([1, MASK], {"top_k": -1}, "top_k"),
    ],
)
def test_bad_arguments(row, options, message):
    canvas = make_canvas([row], MASK)
    with pytest.raises(ValueError, match=message):
        fill(hashed_logits, canvas, **{"num_steps": 4, **options})


def test_without_label_shift_position_0_may_be_a_hole():
    canvas = make_canvas([[MASK, 1]], MASK)
    result = fill(hashed_logits, canvas, 1, label_shift=False)
    logits = hashed_logits(canvas.tokens)
    logits[..., MASK] = -torch.inf
    assert int(result[0, 0]) == int(logits[0, 0].argmax())
