"""Log-likelihoods of continuations: against enumeration on tiny vocabularies, unbiased, with honest errors."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_a2d.diffusion import model_interface
from megatron_a2d.diffusion.conditional_likelihood import (
    MaskSamples,
    likelihood_samples,
    log_likelihood,
    pseudo_likelihood_samples,
)
from megatron_a2d.diffusion.model_interface import from_logits
from megatron_a2d.diffusion.rng import Stream, uniforms
from megatron_a2d.evaluation.loglikelihood import ScoringOptions, check_lengths, label_losses, score
from megatron_a2d.evaluation.response_cache import ResponseCache
from megatron_a2d.utils.errors import UserError

VOCAB, MASK = 6, 5


def logits_fn(tokens_BL: torch.Tensor) -> torch.Tensor:
    """Row i depends on every token of its row of the batch, smoothly, and on nothing else."""
    length = tokens_BL.shape[1]
    place = torch.arange(1, length + 1, dtype=torch.float64)
    summary = (torch.sin(tokens_BL.double() * 1.7 + place) * (tokens_BL != 0)).sum(1)[:, None, None]
    return torch.sin(summary * (place[:, None] + 0.3) + 2.1 * torch.arange(VOCAB)) * 2


def model_of(label_shift: bool, objective: str = "mdlm", seen: list | None = None) -> SimpleNamespace:
    """What `score` reads of a `LoadedModel`."""

    def run(request, reduce):
        if seen is not None:
            seen.append(tuple(request.tokens.shape))
        # Padding counts nothing because it is not visible; where it is, it is a token like the others.
        tokens = torch.where(request.visible, request.tokens.where(request.tokens != 0, 4), 0)
        return from_logits(logits_fn)(request._replace(tokens=tokens), reduce)

    return SimpleNamespace(
        forward=run, objective=objective, label_shift=label_shift, mask_token_id=MASK, device=torch.device("cpu"),
        max_positions=100,
    )  # fmt: skip


def any_order(context: list[int], continuation: list[int], shift: int) -> float:
    """The bound as the mean over all orders in which the continuation could be written, one token at a time."""
    orders = list(itertools.permutations(range(len(continuation))))
    total = 0.0
    for order in orders:
        tokens = context + [MASK] * len(continuation)
        for place in order:
            position = len(context) + place
            logprobs = logits_fn(torch.tensor([tokens]))[0, position - shift].log_softmax(-1)
            total += float(logprobs[continuation[place]])
            tokens[position] = continuation[place]
    return total / len(orders)


CONTEXT, CONTINUATION = [1, 3, 2], [4, 1, 1, 3]


@pytest.mark.parametrize("label_shift", [True, False])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_equals_enumeration(label_shift: bool, length: int) -> None:
    [scored] = score(model_of(label_shift), [(CONTEXT, CONTINUATION[:length])], ScoringOptions(mc_num=15))
    expected = any_order(CONTEXT, CONTINUATION[:length], int(label_shift))
    assert scored.standard_error == 0
    assert scored.log_likelihood == pytest.approx(expected, abs=1e-6)
    if length > 1:  # negative control: a sum of independent predictions is another number
        [pseudo] = score(model_of(label_shift), [(CONTEXT, CONTINUATION[:length])], ScoringOptions("pseudo"))
        assert abs(pseudo.log_likelihood - expected) > 0.01


def exact_and_estimates(mc_num: int, num_seeds: int) -> tuple[float, np.ndarray, np.ndarray]:
    """A continuation of 7 tokens: the exact bound, and estimates with their errors for many seeds."""
    random = np.random.default_rng(0)
    continuation = random.integers(1, 5, 7).tolist()
    [exact] = score(model_of(True), [(CONTEXT, continuation)], ScoringOptions(mc_num=127))
    assert exact.standard_error == 0
    scored = [
        score(model_of(True), [(CONTEXT, continuation)], ScoringOptions(mc_num=mc_num, seed=s))[0]
        for s in range(num_seeds)
    ]
    return (
        exact.log_likelihood,
        np.array([s.log_likelihood for s in scored]),
        np.array([s.standard_error for s in scored]),
    )


@pytest.mark.parametrize("mc_num", [9, 36])
def test_monte_carlo_is_unbiased_and_its_errors_are_honest(mc_num: int) -> None:
    exact, values, errors = exact_and_estimates(mc_num, 120)
    spread = values.std(ddof=1)
    assert abs(values.mean() - exact) < 4 * spread / math.sqrt(len(values))
    assert spread > 0.01
    # The errors are estimates from few replicates; on average they say what the spread is.
    assert 0.7 < math.sqrt((errors**2).mean()) / spread < 1.4


def test_one_draw_has_no_error() -> None:
    """Whichever size it has: all tokens at once have the weight 1, and are not exact for that."""
    for seed in range(20):
        assert math.isnan(log_likelihood(likelihood_samples(3, 1, seed), np.ones(1)).standard_error)
    assert log_likelihood(likelihood_samples(1, 1), np.ones(1)).standard_error == 0


def test_low_discrepancy_beats_independent_draws() -> None:
    """Tokens of different difficulty that are the harder the more is masked, as those of texts are."""
    n, mc_num = 12, 64
    random = np.random.default_rng(1)
    difficulty = random.gamma(1.0, 2.0, n)

    def losses(masks: np.ndarray) -> np.ndarray:
        return (masks * difficulty).sum(1) * (0.3 + masks.sum(1) / n)

    structured, independent = [], []
    for seed in range(200):
        draws = likelihood_samples(n, mc_num, seed)
        structured.append(log_likelihood(draws, losses(draws.masks)).mean)
        sizes = random.integers(1, n + 1, mc_num)
        masks = np.array([random.permutation(n) < size for size in sizes])
        independent.append(-(n / sizes * losses(masks)).mean())
    exact = log_likelihood(likelihood_samples(n, 2**n), losses(likelihood_samples(n, 2**n).masks)).mean
    assert abs(np.mean(structured) - exact) < 4 * np.std(structured) / math.sqrt(200)
    assert np.std(structured) < 0.5 * np.std(independent)


def test_draws_cover_counts_and_tokens_evenly() -> None:
    draws = likelihood_samples(20, 128)
    sizes = draws.masks.sum(1)
    assert len(draws.masks) == draws.num_replicates * (128 // draws.num_replicates) <= 128
    for replicate in range(draws.num_replicates):
        mine = sizes[draws.replicates == replicate]
        assert (np.diff(mine) >= 0).all() and mine[0] <= 2 and mine[-1] >= 19
        covered = draws.masks[draws.replicates == replicate].sum(0)
        assert covered.max() - covered.min() <= 1
    with pytest.raises(ValueError, match="at least one"):
        likelihood_samples(0, 4)


def test_pseudo_likelihood() -> None:
    losses = np.array([1.0, 2.0, 4.0])
    assert log_likelihood(pseudo_likelihood_samples(3), losses) == (-7.0, 0.0)


def test_autoregressive_models_take_one_pass() -> None:
    """With a model that ignores what comes later, the sum over rows is the chain rule."""
    seen: list = []
    [scored] = score(model_of(True, "ar", seen), [(CONTEXT, CONTINUATION)], ScoringOptions())
    logprobs = logits_fn(torch.tensor([CONTEXT + CONTINUATION]))[0, 2:-1].log_softmax(-1)
    assert scored.log_likelihood == pytest.approx(sum(float(logprobs[i, t]) for i, t in enumerate(CONTINUATION)))
    assert scored.standard_error == 0 and seen == [(1, 7)]


def test_autoregressive_rows_are_shifted_whatever_the_config_says() -> None:
    """A config.json that names no label shift does not change what a causal model's rows predict."""
    found = [score(model_of(shift, "ar"), [(CONTEXT, CONTINUATION)], ScoringOptions())[0] for shift in (True, False)]
    assert found[0] == found[1]


def test_greedy_is_all_of_the_continuation() -> None:
    """Right in every token while all of it is masked; one wrong token is enough."""
    masked = torch.tensor([[*CONTEXT, MASK, MASK, MASK]])
    best = logits_fn(masked)[0, 2:5].argmax(-1).tolist()
    others = [
        [(token + 1) % VOCAB if place == wrong else token for place, token in enumerate(best)] for wrong in range(3)
    ]
    found = score(model_of(True), [(CONTEXT, answer) for answer in (best, *others)], ScoringOptions(mc_num=2))
    assert [scored.is_greedy for scored in found] == [True, False, False, False]


REQUESTS = [([1, 2], [3]), ([4], [1, 2, 3]), ([2, 2, 2, 2], [1, 4]), ([3, 1], [2] * 9)]


def test_batching_and_order_change_nothing() -> None:
    one = [score(model_of(True), [request], ScoringOptions(mc_num=20, batch_tokens=1))[0] for request in REQUESTS]
    for batch_tokens in (1, 40, 100_000):
        for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
            found = score(
                model_of(True), [REQUESTS[i] for i in order], ScoringOptions(mc_num=20, batch_tokens=batch_tokens)
            )
            assert [found[order.index(i)].is_greedy for i in range(4)] == [scored.is_greedy for scored in one]
            np.testing.assert_allclose([found[order.index(i)][:2] for i in range(4)], [s[:2] for s in one], atol=1e-5)


def test_equal_sequences_are_run_once() -> None:
    """The letters that may answer a question, and longer answers of equal length where all of them is masked."""
    seen: list = []
    letters = [([1, 3, 2, 2], [letter]) for letter in (1, 2, 3, 4)]
    found = score(model_of(True, seen=seen), letters, ScoringOptions(mc_num=8))
    assert seen == [(1, 5)]
    logprobs = logits_fn(torch.tensor([[1, 3, 2, 2, MASK]]))[0, 3].log_softmax(-1)
    assert [scored.log_likelihood for scored in found] == pytest.approx(logprobs[1:5].tolist())
    assert [scored.is_greedy for scored in found] == [bool(logprobs.argmax() == letter) for letter in (1, 2, 3, 4)]
    seen.clear()
    score(model_of(True, seen=seen), [([1, 3], [2, 4]), ([1, 3], [2, 3])], ScoringOptions(mc_num=3))
    assert seen == [(4, 4)], "of 2 x 3 sequences, two are equal twice"


def test_batches_stay_within_their_size() -> None:
    seen: list = []
    score(model_of(True, seen=seen), REQUESTS * 3, ScoringOptions(mc_num=20, batch_tokens=44))
    assert max(rows * length for rows, length in seen) <= 44 and max(rows for rows, _ in seen) > 5


def test_an_interrupted_run_goes_on(tmp_path) -> None:
    path, settings = tmp_path / "answers.jsonl", {"mc_num": 20}
    whole = score(model_of(True), REQUESTS, ScoringOptions(mc_num=20))
    first = ResponseCache(path, settings)
    score(model_of(True), REQUESTS[:3], ScoringOptions(mc_num=20), first)
    first.close()
    path.write_text(path.read_text() + '{"key": "cut sho')
    seen: list = []
    second = ResponseCache(path, settings)
    assert score(model_of(True, seen=seen), REQUESTS, ScoringOptions(mc_num=20), second) == whole
    second.close()
    assert {length for _, length in seen} == {11}, "only the new request was run"
    third, seen = ResponseCache(path, settings), []
    assert score(model_of(True, seen=seen), REQUESTS, ScoringOptions(mc_num=20), third) == whole and not seen
    third.close()
    other = ResponseCache(path, {"mc_num": 21})
    score(model_of(True, seen=seen), REQUESTS[:1], ScoringOptions(mc_num=20), other)
    assert seen, "answers under other settings do not count"
    other.close()


def test_requests_that_cannot_be_scored() -> None:
    def problem(context: list[int], continuation: list[int], **changes: Any) -> str | None:
        opened = SimpleNamespace(**{"max_positions": 5, "label_shift": True, "objective": "mdlm", **changes})
        try:
            check_lengths(opened, [([1], [2]), (context, continuation)])
        except UserError as error:
            return str(error)
        return None

    assert problem([1, 2], [3, 4, 1]) is None
    assert "has 6 tokens, and the model has 5 positions" in str(problem([1, 2, 3], [3, 4, 1]))
    assert "empty continuation" in str(problem([1], []))
    assert "empty context" in str(problem([], [1])) and "empty context" in str(
        problem([], [1], label_shift=False, objective="ar")
    )
    assert problem([], [1], label_shift=False) is None


def test_losses_of_labels_over_parts_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(70, VOCAB, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, VOCAB, (70, 3), generator=torch.Generator().manual_seed(1))
    monkeypatch.setitem(model_interface._CHUNK_BYTES, "cpu", 4 * VOCAB * 2)
    losses, correct = label_losses(logits, lambda rows: rows.clone(), labels)
    for column in range(3):
        expected = torch.nn.functional.cross_entropy(logits, labels[:, column], reduction="none")
        torch.testing.assert_close(losses[:, column], expected)
        assert torch.equal(correct[:, column], logits.argmax(-1) == labels[:, column])


@pytest.mark.parametrize(("batch_tokens", "groups"), [(4, [2, 2]), (5, [3, 1])])
def test_requests_are_run_long_ones_first_in_groups(batch_tokens: int, groups: list[int]) -> None:
    """A group is full with sixteen batches: four draws of a request and its all-masked sequence take 40, 30 and 30 tokens."""
    seen: list = []
    done: list[float] = []
    requests = [([1], [2, 3, 1, 4, 2]), ([1, 2, 3], [3, 4, 1, 2, 2]), ([3], [1, 2, 2, 2, 2]), ([2], [2])]
    options = ScoringOptions(mc_num=4, batch_tokens=batch_tokens)
    found = score(model_of(True, seen=seen), requests, options, on_progress=done.append)
    assert done == [0, *groups] and [length for _, length in seen] == sorted(
        (length for _, length in seen), reverse=True
    )
    assert [scored.log_likelihood for scored in found] == pytest.approx(
        [score(model_of(True), [request], options)[0].log_likelihood for request in requests], abs=1e-6
    )  # fmt: skip


def test_draws_by_their_formula() -> None:
    """5 tokens, 9 passes: 3 replicates of 3, counts stratified by one number, arcs of one order, weights n / (k J)."""
    draws = likelihood_samples(5, 9, seed=4)
    assert draws.num_replicates == 3 and draws.replicates.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for replicate in range(3):
        numbers = uniforms(4, Stream.CONTINUATION, replicate, 6)
        order, start = np.argsort(numbers[1:]), 0
        for draw in range(3):
            size = 1 + math.floor(5 * (draw + numbers[0]) / 3)
            mask = np.isin(np.arange(5), [order[(start + step) % 5] for step in range(size)])
            assert draws.masks[3 * replicate + draw].tolist() == mask.tolist()
            assert draws.weights[3 * replicate + draw] == pytest.approx(5 / size / 3)
            start += size
    exact = likelihood_samples(3, 7)
    assert len(exact.masks) == 7 and exact.num_replicates == 1 and not exact.replicates.any()
    assert exact.weights.tolist() == pytest.approx([1 / (k * math.comb(3, k)) for k in exact.masks.sum(1)])
    assert len(likelihood_samples(3, 6).masks) == 6, "not enough passes for all subsets"
    assert [len(likelihood_samples(3, number).masks) for number in (1, 2, 3, 4, 5)] == [1, 2, 2, 4, 4]
    for arguments in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="need at least one token and one draw"):
            likelihood_samples(*arguments)


def test_estimates_from_replicates() -> None:
    """Each replicate adds up its own draws; the mean over them, and the error of that mean."""
    draws = MaskSamples(np.ones((4, 2), bool), np.array([0.5, 1.0, 2.0, 1.0]), np.array([0, 0, 1, 1]), 2)
    mean, error = log_likelihood(draws, np.array([2.0, 3.0, 1.0, 4.0]))
    assert mean == -5.0 and error == pytest.approx(math.sqrt(2 / 2))  # replicates of 4 and 6
    one = MaskSamples(np.array([[True, False, True]]), np.array([1.5]), np.zeros(1, np.int64), 1)
    assert log_likelihood(one, np.array([2.0])).mean == -3.0 and math.isnan(
        log_likelihood(one, np.array([2.0])).standard_error
    )
