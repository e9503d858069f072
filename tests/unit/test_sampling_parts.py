"""The parts of a sampler, each against a plain loop: plans, choices, filters, draws, ended texts, settings."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_a2d.diffusion import model_interface
from megatron_a2d.diffusion.model_interface import Request, from_logits, logits_in_chunks
from megatron_a2d.diffusion.sampling import Canvas, SamplingOptions, denoise, kept_positions, make_canvas
from megatron_a2d.diffusion.sampling.early_stop import after_eos
from megatron_a2d.diffusion.sampling.sampler import entropy_bounded, lowest
from megatron_a2d.diffusion.sampling.token_scores import position_uniforms, row_seed, scorer
from megatron_a2d.diffusion.sampling.unmask_schedule import StepPlan, blocks_of, counts_left, plan_steps
from megatron_a2d.diffusion.sampling_options import SamplingOptionsError

VOCAB, MASK = 12, 11


@pytest.mark.parametrize(("name", "good", "bad"), [
    ("num_steps", [1, 7], [0, -1]),
    ("gamma", [0.0, 5.0], [-1e-9, math.inf, math.nan]),
    ("threshold", [1e-9, 1.0], [0.0, 1.0001]),
    ("block_length", [0, 3], [-1]),
    ("temperature", [0.0, 1e-6, 3.0], [9e-7, -1.0, math.inf, math.nan]),
    ("top_k", [0, 3], [-1]),
    ("top_p", [1e-9, 1.0], [0.0, 1.0001]),
    ("cfg_scale", [0.0, 1000.0], [-1e-9, 1000.5, math.nan]),
    ("sampler", ["rnd1", "eb", "confidence", "threshold"], ["none", "RND1"]),
    ("cache", ["none"], ["both"]),
])  # fmt: skip
def test_settings_and_their_bounds(name, good, bad):
    for value in good:
        assert getattr(SamplingOptions(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{name} {value}: must be "):
            SamplingOptions(**{name: value})


def test_settings_that_need_or_exclude_others():
    for cache in ("prefix", "dual"):
        assert SamplingOptions(cache=cache, block_length=4).cache == cache
        with pytest.raises(ValueError, match=rf"^cache {cache}: has no effect without blocks"):
            SamplingOptions(cache=cache)
    for cache in ("none", "prefix"):
        assert SamplingOptions(aligned_blocks=True, block_length=4, cache=cache).cache == cache
    for others, problem in (
        ({}, "block_length 0: block diffusion needs the length"),
        ({"block_length": 4, "cache": "dual"}, "cache dual: block diffusion attends to nothing after"),
        ({"block_length": 4, "cfg_scale": 0.5}, "cfg_scale 0.5: block diffusion is sampled without"),
    ):
        with pytest.raises(SamplingOptionsError, match=rf"^{problem}") as error:
            SamplingOptions(aligned_blocks=True, **others)
        assert len(error.value.problems) == 1
    with pytest.raises(ValueError, match=r"num_steps 0: .*; top_k -1: "):
        SamplingOptions(num_steps=0, top_k=-1)
    with pytest.raises(SamplingOptionsError) as error:
        SamplingOptions(sampler="self_speculative", remask=0.5, cache="prefix", top_p=0)
    assert error.value.lines(str.upper) == [
        "TOP_P 0: must be above 0 and at most 1 (no limit)",
        "SAMPLER self_speculative: decides tokens once and has no guidance; leave out REMASK and CFG_SCALE",
        "CACHE prefix: has no effect without blocks; set BLOCK_LENGTH",
    ]
    plain = SamplingOptions()
    assert (plain.sampler, plain.num_steps, plain.gamma, plain.threshold, plain.cache) == (
        "rnd1",
        256,
        0.1,
        0.9,
        "none",
    )
    assert (plain.temperature, plain.top_k, plain.top_p, plain.cfg_scale, plain.block_length) == (0.0, 0, 1.0, 0.0, 0)
    taken = [
        SamplingOptions(temperature=t, greedy=g).takes_likeliest
        for t, g in ((0.0, False), (0.0, True), (1.0, True), (1.0, False))
    ]
    assert taken == [True, True, True, False]


def test_steps_are_shared_by_the_blocks():
    """In proportion to their holes, from the whole: 10 steps over 3, 5, 2 holes end after 3, 8 and 10 of them."""
    plan = plan_steps([3, 5, 2], "eb", 10)
    assert plan == [
        StepPlan(0, 2),
        StepPlan(0, 1),
        StepPlan(0, 0),
        *(StepPlan(1, left) for left in (4, 3, 2, 1, 0)),
        StepPlan(2, 1),
        StepPlan(2, 0),
    ]
    assert [step.num_left for step in plan_steps([8, 8], "confidence", 6)] == [5, 2, 0, 5, 2, 0]
    assert [step.num_left for step in plan_steps([8, 8], "confidence", 5)] == [4, 0, 5, 2, 0]
    assert plan_steps([4, 4, 4], "rnd1", 2) == [StepPlan(0, 0), StepPlan(1, 0), StepPlan(2, 0)], "at least one each"
    assert plan_steps([], "rnd1", 5) == []


def test_counts_of_each_sampler():
    assert counts_left(10, "confidence", 4) == [7, 4, 2, 0]  # 3, 3, 2, 2
    assert counts_left(10, "rnd1", 4) == [7, 5, 2, 0]  # floor of 7.5, 5, 2.5, 0
    assert counts_left(10, "threshold", 4) == counts_left(10, "eb", 4) == [9, 8, 7, 0]
    assert counts_left(3, "confidence", 7) == [2, 1, 0] and counts_left(3, "rnd1", 4) == [2, 1, 0]
    assert counts_left(1, "eb", 1) == [0] and counts_left(0, "eb", 3) == []


def test_blocks_of_holes():
    editable = torch.tensor([[False, True, True, False, True, True, True], [False] * 7])
    assert blocks_of(editable, 2).tolist() == [[-1, 0, 0, -1, 1, 1, 2], [-1] * 7]
    assert blocks_of(editable, 0).tolist() == [[-1, 0, 0, -1, 0, 0, 0], [-1] * 7]
    assert blocks_of(editable, 2, aligned=True).tolist() == [[-1, 0, 1, -1, 2, 2, 3], [-1] * 7]


def test_the_lowest_costs_leftmost_first():
    costs = torch.tensor([[3.0, 1.0, 1.0, 0.0, 2.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    considered = torch.tensor([[True, True, True, False, True], [False, True, True, True, True]])
    for counts in itertools.product(range(5), repeat=2):
        expected = []
        for row, count in enumerate(counts):
            places = sorted(
                (place for place in range(5) if considered[row, place]),
                key=lambda place: (float(costs[row, place]), place),
            )
            expected.append([place in places[:count] for place in range(5)])
        assert lowest(costs, considered, torch.tensor(counts)).tolist() == expected


def test_the_bound_on_entropies():
    """In the order of costs, while the sum of entropies less the largest is within gamma; the first always."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        costs, entropies = torch.rand(2, 1, 7, generator=generator)
        considered = torch.rand(1, 7, generator=generator) < 0.7
        considered[0, trial % 7] = True
        gamma = 0.25 * (trial % 8)
        order = sorted((place for place in range(7) if considered[0, place]), key=lambda place: float(costs[0, place]))
        expected = {order[0]}
        for count in range(2, len(order) + 1):
            taken = [float(entropies[0, place]) for place in order[:count]]
            if sum(taken) - max(taken) <= gamma:
                expected.add(order[count - 1])
        found = entropy_bounded(costs, entropies, considered, gamma)
        assert set(found[0].nonzero()[:, 0].tolist()) == expected
    equal = entropy_bounded(
        torch.arange(3.0)[None], torch.tensor([[0.5, 0.5, 0.5]]), torch.ones(1, 3, dtype=torch.bool), 0.5
    )
    assert equal.tolist() == [[True, True, False]], "the bound itself is within"


def scores_of(logits: torch.Tensor, uniforms: torch.Tensor | None = None, **options) -> tuple[list, list, list]:
    reduce = scorer(SamplingOptions(**options), MASK, uniforms)
    return tuple(column.tolist() for column in reduce(logits.clone(), lambda hidden: hidden))  # type: ignore[return-value]


def plain_probabilities(row: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Mask token excluded, temperature, top-k, then top-p of the remaining."""
    values = [-math.inf if token == MASK else value / (temperature or 1.0) for token, value in enumerate(row)]
    total = sum(map(math.exp, values))
    p = {token: math.exp(value) / total for token, value in enumerate(values)}
    order = sorted(p, key=lambda token: -p[token])[: top_k or VOCAB]
    mass = sum(p[token] for token in order)
    kept, reached = [], 0.0
    for token in order:
        if reached < top_p or not kept:
            kept.append(token)
            reached += p[token] / mass
    mass = sum(p[token] for token in kept)
    return [p[token] / mass if token in kept else 0.0 for token in range(VOCAB)]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 1.0, "top_k": 4}, {"temperature": 1.3, "top_p": 0.8}, {"temperature": 2.0, "top_k": 5, "top_p": 0.7}, {"top_k": 1}, {"top_k": VOCAB}, {"top_p": 0.01}])  # fmt: skip
def test_scores_of_a_row(options):
    """Token, its log-probability and the entropy; a draw is where the cumulative distribution passes the number."""
    logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    logits[:, MASK] = 50.0
    uniforms = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1 - 1e-12, 0.42], dtype=torch.float64)
    for draws in (None, uniforms):
        tokens, confidences, entropies = scores_of(logits, draws, **options)
        for row in range(9):
            p = plain_probabilities(
                logits[row].tolist(),
                options.get("temperature", 0.0),
                options.get("top_k", 0),
                options.get("top_p", 1.0),
            )
            if draws is None:
                expected = max(range(VOCAB), key=lambda token: p[token])
            else:
                cumulative = list(itertools.accumulate(p))
                expected = next(token for token in range(VOCAB) if cumulative[token] > float(draws[row]) * (1 - 1e-12))
            assert tokens[row] == expected
            assert confidences[row] == pytest.approx(math.log(p[expected]), abs=1e-5)
            assert entropies[row] == pytest.approx(-sum(value * math.log(value) for value in p if value > 0), abs=1e-5)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_scores_do_not_depend_on_the_parts_of_the_head(cfg_scale, monkeypatch):
    """Rows beyond the first 64 come a few at a time; each has its own number, and its own row without the text."""
    generator = torch.Generator().manual_seed(2)
    logits, uniforms = (
        torch.randn(2, 150, VOCAB, generator=generator),
        torch.rand(150, dtype=torch.float64, generator=generator),
    )
    hidden = torch.cat([logits[0], logits[1]]) if cfg_scale else logits[0]
    whole = scores_of(logits[0] + cfg_scale * (logits[0] - logits[1]), uniforms, temperature=1.0)
    monkeypatch.setitem(model_interface._CHUNK_BYTES, "cpu", 4 * VOCAB * 7 + 3)
    assert scores_of(hidden, uniforms, temperature=1.0, cfg_scale=cfg_scale) == whole


def test_parts_of_the_head(monkeypatch):
    """64 rows, from which the vocabulary is known; then as many as fit, in fp32, at least one."""
    for limit, rows in ((4 * VOCAB * 7 + 3, 7), (10, 1), (4 * VOCAB * 1000, 86)):
        monkeypatch.setitem(model_interface._CHUNK_BYTES, "cpu", limit)
        hidden = torch.arange(150.0)[:, None].expand(-1, VOCAB).bfloat16()
        parts = list(logits_in_chunks(hidden, lambda part: part))
        sizes = [len(logits) for _, logits in parts]
        assert sizes[0] == 64 and set(sizes[1:-1]) <= {rows} and 0 < sizes[-1] <= rows and sum(sizes) == 150
        assert all(logits.dtype == torch.float32 for _, logits in parts)
        assert torch.equal(torch.cat([logits for _, logits in parts]), hidden.float())
        assert [place for part, _ in parts for place in range(150)[part]] == list(range(150))
    assert list(logits_in_chunks(torch.zeros(0, VOCAB), lambda part: part)) == []


def plain_hopeless(tokens: list[int], masked: list[bool], editable: list[bool], ends: set[int]) -> list[bool]:
    found, decided, ended = [], True, False
    for place, hole in enumerate(editable):
        if not hole or place == 0 or not editable[place - 1]:
            decided, ended = True, False  # a hole begins here, if any
        found.append(hole and ended and masked[place])
        decided &= not masked[place]
        ended |= hole and decided and tokens[place] in ends
    return found


def test_what_no_text_can_show():
    generator = torch.Generator().manual_seed(3)
    some = 0
    for _ in range(300):
        editable = torch.rand(1, 9, generator=generator) < 0.8
        masked = editable & (torch.rand(1, 9, generator=generator) < 0.4)
        tokens = torch.randint(0, 4, (1, 9), generator=generator)
        expected = plain_hopeless(tokens[0].tolist(), masked[0].tolist(), editable[0].tolist(), {1, 2})
        assert after_eos(tokens, masked, editable, [1, 2])[0].tolist() == expected
        some += any(expected)
    assert some > 50


def test_what_is_kept_of_a_row():
    """A given end token ends nothing; what follows a hole is kept."""
    assert kept_positions([9, 5, 9, 6, 9, 7, 9, 8], [False, True, True, True, False, True, True, True], {9}) == [
        0,
        1,
        4,
        5,
    ]
    assert kept_positions([9, 9], [False, True], set()) == [0, 1]
    assert kept_positions([3, 9, 9, 4], [True, True, False, True], {9}) == [0, 2, 3]


@pytest.mark.parametrize("sampler", ["confidence", "threshold"])
@pytest.mark.parametrize("draws", [None, torch.linspace(0, 0.99, 9, dtype=torch.float64)])
@pytest.mark.parametrize("shape", [{"temperature": 0.1}, {"temperature": 1.0, "top_k": 2}, {"top_p": 0.3}])
def test_confidence_does_not_depend_on_how_tokens_are_drawn(sampler, draws, shape):
    """LLaDA's and Fast-dLLM's code reads it from the model's own probabilities."""
    logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    tokens, confidences, entropies = scores_of(logits, draws, sampler=sampler, **shape)
    others = scores_of(logits, draws, sampler="rnd1", **shape)
    assert (tokens, entropies) == (others[0], others[2])
    for row, (token, confidence) in enumerate(zip(tokens, confidences, strict=True)):
        p = plain_probabilities(logits[row].tolist(), 1.0, 0, 1.0)
        assert confidence == pytest.approx(math.log(p[token]), abs=1e-5)
        assert abs(confidence - others[1][row]) > 1e-3, "otherwise this shows nothing"


def test_seeds_by_their_formula():
    """SplitMix64's output function of seed / phi + row + 1, its upper half; and torch's own generator for each row."""

    def plain(seed: int, row: int) -> int:
        z = (seed * 0x9E3779B97F4A7C15 + row + 1) & (2**64 - 1)
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        return (((z ^ z >> 27) * 0x94D049BB133111EB) & (2**64 - 1)) >> 32

    assert all(row_seed(seed, row) == plain(seed, row) for seed in (0, 1, 77, 2**40) for row in range(4))
    uniforms = position_uniforms(5, 2, 3)
    for row in range(2):
        assert torch.equal(
            uniforms[row], torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(plain(5, row)))
        )
    assert torch.equal(position_uniforms([plain(5, 1)], 1, 3)[0], uniforms[1])


def test_canvases_that_are_none():
    tokens, holes = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[False, True, True]])
    model, options = from_logits(lambda tokens: torch.zeros(*tokens.shape, VOCAB)), SamplingOptions(num_steps=1)
    for canvas in (
        Canvas(tokens, holes[:, :2], holes),
        Canvas(tokens[0], holes[0], holes[0]),
        Canvas(tokens, holes.long(), holes),
        Canvas(tokens, holes, holes[:, :2]),
    ):
        with pytest.raises(ValueError, match="must all be"):
            denoise(model, canvas, MASK, options)
    with pytest.raises(ValueError, match="is_final needs end_token_ids"):
        denoise(model, Canvas(tokens, holes, ~holes | holes), MASK, options, is_final=lambda row, written: True)


def test_what_is_asked_of_the_model():
    """The rows before the masked positions of the block at hand, under the label shift; else those positions."""
    row = [1, 2, MASK, MASK, 3, MASK, MASK]
    for label_shift in (True, False):
        asked: list[Request] = []

        def model(request: Request, reduce):
            asked.append(request)  # noqa: B023
            return from_logits(lambda tokens: torch.zeros(*tokens.shape, VOCAB))(request, reduce)

        denoise(
            model,
            make_canvas([row, [1, 2]], MASK),
            MASK,
            SamplingOptions(num_steps=4, block_length=2),
            label_shift=label_shift,
        )
        needed = [request.needed[0].nonzero()[:, 0].tolist() for request in asked]
        assert needed == [[place - label_shift for place in places] for places in ([2, 3], [3], [5, 6], [6])]
        assert all(len(request.tokens) == 1 and request.window is None and request.visible.all() for request in asked)
