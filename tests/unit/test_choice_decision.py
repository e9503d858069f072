"""The best of a question's choices: unbiased draws, a test that keeps its error, and as few forward passes as it needs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.choice_decisions import block, llada, measure
from megatron_a2d.diffusion.choice_decision import (
    ChoiceEstimate,
    Control,
    all_masks,
    contenders,
    control_masks,
    draws,
    looks,
    student_tail,
)
from megatron_a2d.evaluation.loglikelihood import Pair, ScoringOptions, score
from megatron_a2d.evaluation.multiple_choice import Question, score_questions
from megatron_a2d.evaluation.response_cache import ResponseCache
from tests.unit import test_conditional_likelihood
from tests.unit.test_conditional_likelihood import any_order, model_of

CONTEXT = [1, 3, 2]
EASY = ((CONTEXT, [4, 1, 1, 3, 2, 2, 4, 1]), (CONTEXT, [1, 1, 1, 2, 3, 1, 1, 4, 2, 1, 2]), (CONTEXT, [2, 4]))


def question(choices: tuple[Pair, ...] = EASY) -> Question:
    lengths = tuple(1 / len(tokens) for _, tokens in choices)
    return Question(choices, ((1.0,) * len(choices), lengths))


def best(scored: list, scales: tuple[tuple[float, ...], ...]) -> list[int]:
    return [
        int(np.argmax([item.log_likelihood * s for item, s in zip(scored, scale, strict=True)])) for scale in scales
    ]


@pytest.mark.parametrize("length", [1, 2, 4])
def test_all_masks_give_the_exact_likelihood(length: int) -> None:
    """All masks together are the bound, the mean over all orders in which the tokens could be written."""
    choices = ((CONTEXT, [4, 1, 1, 3][:length]), (CONTEXT, [2, 1, 4, 2][:length]))
    [found] = score_questions(model_of(True), [question(choices)], ScoringOptions(mc_num=15), error=0)
    for (context, tokens), scored in zip(choices, found, strict=True):
        assert scored.log_likelihood == pytest.approx(any_order(context, tokens, 1), abs=1e-6)
        assert scored.standard_error == 0
    assert [item.is_greedy for item in found] == [
        item.is_greedy for item in score(model_of(True), choices, ScoringOptions(mc_num=15))
    ]


@pytest.mark.parametrize("num_tokens", [6, 11])
def test_draws_are_unbiased_and_begin_with_the_fewer(num_tokens: int) -> None:
    """Whatever the control masks are worth: losses that grow with the masked tokens, but far from linearly."""
    difficulty = np.random.default_rng(0).gamma(1.0, 2.0, num_tokens)

    def token_losses(masks: np.ndarray) -> np.ndarray:
        return masks * difficulty * (masks.sum(1, keepdims=True) / num_tokens) ** 3

    exact = all_masks(num_tokens)
    expected = exact.weights @ token_losses(exact.masks).sum(1)
    estimates = []
    for seed in range(300):
        full, *parts = token_losses(control_masks(num_tokens, seed))
        control = Control(full, np.sum(parts, axis=0))
        masks, weights = draws(num_tokens, 12, seed)
        assert masks.sum(1).min() >= 1 and masks.sum(1).max() < num_tokens
        losses = token_losses(masks).sum(1)
        estimates.append(control.total + (weights * (losses - control.losses(masks))).mean())
    assert np.mean(estimates) == pytest.approx(expected, abs=4 * np.std(estimates) / math.sqrt(300))
    assert np.std(estimates) < 0.12 * expected
    assert (draws(num_tokens, 40, 3).masks[:12] == draws(num_tokens, 12, 3).masks).all()


@pytest.mark.parametrize("num_tokens", [1, 5, 8, 9, 20])
def test_control_masks_mask_everything_once_and_all_at_once(num_tokens: int) -> None:
    full, *parts = control_masks(num_tokens)
    assert full.all() and len(parts) <= 8 and (np.sum(parts, axis=0) == 1).all()
    assert {int(part.sum()) for part in parts} <= {1, -(-num_tokens // 8), num_tokens % -(-num_tokens // 8)}


def test_control_that_is_right_leaves_nothing() -> None:
    """Losses linear in the number of masked tokens are known without a draw."""
    low, high = np.random.default_rng(0).uniform(0, 3, (2, 7))
    sizes = all_masks(7).masks.sum(1, keepdims=True)
    losses = (all_masks(7).masks * (low + (high - low) * (sizes - 1) / 6)).sum(1)
    control = Control(high, low)
    np.testing.assert_allclose(control.losses(all_masks(7).masks), losses)
    assert control.total == pytest.approx(all_masks(7).weights @ losses)


def test_looks_end_with_all_passes() -> None:
    assert looks(128) == [4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 119]
    assert looks(17) == [4, 6, 8] and looks(13) == [4] and looks(1) == [1]


def test_students_tail() -> None:
    """Critical values of printed tables."""
    for degrees, t, tail in (
        (1, 12.706, 0.025),
        (2, 9.925, 0.005),
        (3, 5.841, 0.005),
        (10, 3.169, 0.005),
        (60, 2.000, 0.025),
    ):
        assert student_tail(t, degrees) == pytest.approx(tail, rel=2e-3)
    assert student_tail(0.0, 5) == 0.5 and student_tail(math.inf, 4) == 0


def test_contenders_by_hand() -> None:
    def sampled(*values: float) -> ChoiceEstimate:
        return ChoiceEstimate(np.array(values), False, 100)

    def exact(value: float) -> ChoiceEstimate:
        return ChoiceEstimate(np.array([value]), True, None)

    ones = np.ones(3)
    # Noise that all share cancels; what remains decides.
    assert contenders([sampled(-9, -1, -5, -3), sampled(-19.1, -11, -15, -13), exact(-50)], ones, 0.01) == set()
    assert contenders([sampled(-9, -1, -5, -3), sampled(-1, -9, -3, -7), exact(-50)], ones, 0.01) == {0, 1}
    assert contenders([exact(-4), exact(-3), exact(-3)], ones, 0.01) == set()
    # By another scale the shorter one leads.
    assert contenders([exact(-4), exact(-3), sampled(-4, -2, -3, -3)], np.array([0.1, 1, 0.11]), 0.01) == {0, 2}
    # A leader by its many draws that trails in the draws that both have has not won.
    assert contenders([sampled(-5, -5.1, -5, -5, 9, 9, 9, 9), sampled(-1, -1, -1, -1)], ones[:2], 0.4) == {0, 1}
    # All but the last draw are made: little can change any more.
    late = [ChoiceEstimate(np.array([3.0, 1, 2, 4, 0, 2, 3, 1]), False, end) for end in (9, None)]
    zero = ChoiceEstimate(np.zeros(1), True, None)
    even = [ChoiceEstimate(one.values - 1.4, False, one.num_draws) for one in late]
    assert contenders([even[0], zero], ones[:2], 0.01) == set() and contenders([even[1], zero], ones[:2], 0.01) == {
        0,
        1,
    }


def decide(values: np.ndarray, error: float) -> tuple[int, float]:
    """(the choice that wins, draws per choice) of draws [choices, N], looked at in turns as score_questions does."""
    schedule = looks(values.shape[1] + 9)
    taken, drawing = [0] * len(values), set(range(len(values)))
    for look in schedule:
        for number in drawing:
            taken[number] = look
        known = [ChoiceEstimate(row[:count], False, schedule[-1]) for row, count in zip(values, taken, strict=True)]
        drawing = contenders(known, np.ones(len(values)), error / len(schedule))
        if not drawing:
            break
    return int(np.argmax([one.mean for one in known])), float(np.mean(taken))


def test_the_error_is_kept_on_thousands_of_questions() -> None:
    """Skewed draws that share some of their noise, gaps from none to many: few winners differ from those of all draws."""
    random = np.random.default_rng(0)
    different, total = 0, 0.0
    for _ in range(3000):
        noise = random.normal(size=(1, 127)) * 2 + random.gamma(2.0, 1.5, (4, 127))
        values = noise + random.normal(size=(4, 1)) * random.choice([0.2, 1.0, 5.0])
        winner, mean = decide(values, 0.02)
        different += winner != values.mean(1).argmax()
        total += mean
    assert different < 0.02 * 3000
    assert total / 3000 < 0.6 * 127
    # Negative control: the same test without its correction for looking often is wrong more often than it says.
    assert sum(decide(row, 0.99)[0] != row.mean(1).argmax() for row in random.normal(size=(300, 4, 127))) > 6


def passes(error: float, questions: list[Question], **changes: object) -> tuple[list, int]:
    seen: list = []
    found = score_questions(model_of(True, seen=seen), questions, ScoringOptions(mc_num=128, **changes), error)
    return found, sum(number for number, _ in seen)


def test_fewer_passes_and_the_same_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that finds some tokens likelier than others, and the others around them matter a little."""
    preference = torch.tensor([0.0, 2.0, 0.0, -1.0, 1.0, 0.0])
    whole = test_conditional_likelihood.logits_fn
    monkeypatch.setattr(test_conditional_likelihood, "logits_fn", lambda tokens: whole(tokens) / 8 + preference)
    random = np.random.default_rng(3)
    questions = []
    for _ in range(8):
        context = random.integers(1, 5, 9).tolist()
        choices = [random.choice(tokens, random.integers(6, 14)).tolist() for tokens in ([1, 4], [1, 2, 3, 4], [2, 3])]
        questions.append(question(tuple((context, choice) for choice in choices)))
    every, all_passes = passes(0, questions)
    early, few = passes(0.005, questions)
    agree = [best(a, q.scales) == best(b, q.scales) for a, b, q in zip(every, early, questions, strict=True)]
    assert all(agree) and 4 * few < all_passes
    assert 90 * 24 < all_passes <= 128 * 24, "all draws but those that repeat a mask"


def test_control_masks_know_a_model_that_does_not_look_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses that depend on the token alone are the same under all masks: no draw adds anything."""
    preference = torch.tensor([0.0, 2.0, 0.0, -1.0, 1.0, 0.0])
    monkeypatch.setattr(
        test_conditional_likelihood, "logits_fn", lambda tokens: preference.expand(*tokens.shape, len(preference))
    )
    [found], number = passes(0.005, [question()])
    for (_, tokens), scored in zip(EASY, found, strict=True):
        assert scored.log_likelihood == pytest.approx(float(preference.log_softmax(-1)[tokens].sum()), abs=1e-4)
        assert scored.standard_error < 1e-4
    assert number <= (1 + 8 + 4) + (1 + 6 + 4) + 3, "the first look decides"


def test_a_question_is_its_own_business() -> None:
    """Results do not depend on the batches, on the other questions or on their order."""
    other = question(((CONTEXT, [2, 2, 1, 4, 3]), ([1, 1], [3, 3, 1, 2, 4, 4, 1, 2, 3])))
    together, _ = passes(0.005, [question(), other])
    for found in (passes(0.005, [other, question()], batch_tokens=16)[0][1], passes(0.005, [question()])[0][0]):
        np.testing.assert_allclose([item[:2] for item in found], [item[:2] for item in together[0]], atol=1e-5)
    assert passes(0.005, [question()], seed=1)[0][0] != together[0]


def test_questions_are_cached_and_counted(tmp_path) -> None:
    done: list[float] = []
    settings = {"mc_num": 128}
    first = ResponseCache(tmp_path / "answers.jsonl", settings)
    found = score_questions(model_of(True), [question()], ScoringOptions(), 0.005, first, done.append)
    first.close()
    assert sum(done) == 3
    again, seen = ResponseCache(tmp_path / "answers.jsonl", settings), []
    done.clear()
    assert (
        score_questions(model_of(True, seen=seen), [question()], ScoringOptions(), 0.005, again, done.append) == found
    )
    assert not seen and done[0] == 3
    score_questions(model_of(True, seen=seen), [question()], ScoringOptions(), 0.1, again)
    again.close()
    assert seen, "another error is another answer"


def test_llada_draws_of_the_benchmark_are_unbiased() -> None:
    pairs = [(CONTEXT, [4, 1, 1, 3])]
    [exact] = score(model_of(True), pairs, ScoringOptions(mc_num=15))
    found = [llada(model_of(True), pairs, 100_000, 0, run)[0] for run in range(12)]
    assert np.mean(found) == pytest.approx(exact.log_likelihood, abs=4 * np.std(found) / math.sqrt(11))
    assert 0 < np.std(found) < 1


def test_the_benchmark_counts_sequences_of_all_methods_alike() -> None:
    """Equal ones once: of two tokens there are three masks, however many LLaDA draws."""
    short = Question(((CONTEXT, [4, 1]), ([1, 1], [3, 3])), ((1.0, 1.0),))
    row = measure("short", model_of(True), [short])
    assert (row["few"], row["all"], row["llada_distinct"]) == (3, 3, 3)
    stored = {"rows": [{"model": "m", "choices": "c"} | row], "command": "x", "commit": "y"}
    head, _, cells = block(stored).splitlines()[:3]
    shown = dict(zip(head.split(" | "), cells.split(" | "), strict=True))
    assert (shown["LLaDA's, equal ones once"], shown["LLaDA's 128 / few"]) == ("3.0", "42.7x")


def task(metrics: tuple[str, ...] = ("acc", "acc_norm"), **changes: object) -> SimpleNamespace:
    config = SimpleNamespace(process_results=changes.pop("process_results", None))
    return SimpleNamespace(
        _metric_fn_list=dict.fromkeys(metrics), OUTPUT_TYPE="multiple_choice", config=config,
        doc_to_choice=lambda doc: doc["choices"], **changes,
    )  # fmt: skip


def test_which_requests_are_questions() -> None:
    """Those of a document of which only the best choice counts, by its task's metrics; the others take all draws."""
    from megatron_a2d.evaluation.harness_questions import questions_of

    doc = {"choices": ["ab", "abcd", "äb"]}

    def instances(count: int = 3, doc_id: int = 0) -> list[SimpleNamespace]:
        return [SimpleNamespace(task_name="t", doc_id=doc_id, idx=idx, doc=doc) for idx in range(count)]

    def asked(own: SimpleNamespace, requests: list[SimpleNamespace], length: int = 4, mc_num: int = 128) -> dict:
        return questions_of(requests, {"t": own}, [([7], [1] * length)] * len(requests), mc_num)

    [(numbers, found)] = asked(task(), instances()).items()
    assert numbers == (0, 1, 2) and found.scales == ((1, 1, 1), (1 / 2, 1 / 4, 1 / 2))
    assert asked(task(("acc_bytes",)), instances())[0, 1, 2].scales == ((1 / 2, 1 / 4, 1 / 3),)
    interleaved = [item for both in zip(instances(), instances(doc_id=1), strict=True) for item in both]
    assert list(asked(task(), interleaved)) == [(0, 2, 4), (1, 3, 5)]
    values = [task(("acc", "brier_score")), task(process_results=lambda doc, results: {}), task(("acc_mutual_info",))]
    assert not any(asked(own, instances()) for own in values)
    assert not asked(task(), instances(), length=3), "exact at once"
    assert not asked(task(), instances(), mc_num=13) and not asked(task(), instances() * 2)
    assert not questions_of(instances(), {}, [([7], [1] * 4)] * 3, 128)
