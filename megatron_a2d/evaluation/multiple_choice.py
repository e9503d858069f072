"""Log-likelihoods of a question's choices, drawn only until the best one is certain.

Every choice starts with its control masks and a few draws (diffusion/choice_decision.py). After each look at the
estimates, the choices that may still be the best draw again, up to `mc_num` passes each. A choice of few tokens is
exact as soon as all of its masks take no more passes than the next draws. Questions are independent of one another:
they only share batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from megatron_a2d.diffusion.choice_decision import (
    ChoiceEstimate,
    Control,
    WeightedMasks,
    all_masks,
    contenders,
    control_masks,
    draws,
    looks,
)
from megatron_a2d.diffusion.rng import Stream
from megatron_a2d.evaluation.loglikelihood import Pair, Scored, ScoringOptions, masked_request, token_losses
from megatron_a2d.evaluation.response_cache import ResponseCache
from megatron_a2d.inference.loaded_model import LoadedModel

# Questions are taken up while fewer batches than this are waiting.
_BATCHES_PER_ROUND = 16


class Question(NamedTuple):
    """Choices of which only the best one matters, by one score or by several.

    scales: for each score the factors of the choices' log-likelihoods, such as 1 / length.
    """

    choices: tuple[Pair, ...]
    scales: tuple[tuple[float, ...], ...]


def score_questions(
    loaded: LoadedModel,
    questions: Sequence[Question],
    options: ScoringOptions,
    error: float,
    cache: ResponseCache | None = None,
    on_progress: Callable[[float], None] = lambda num_requests: None,
) -> list[list[Scored]]:
    """The log-likelihoods of each question's choices, the best of which is the best one after all draws.

    error: the probability that it is not, for each question and score; with 0, all draws are made. `on_progress` is
    called with numbers of finished choices. Questions in the cache are not run again.
    """
    cache = cache or ResponseCache(None, None)
    keys = [cache.key("question", int(Stream.CHOICE), error, *question) for question in questions]
    pending = [number for number, key in enumerate(keys) if cache.get(key) is None]
    on_progress(sum(len(question.choices) for question, key in zip(questions, keys, strict=True) if cache.get(key)))
    # Longest first: running out of memory shows at once, and the estimated time left is conservative.
    pending.sort(key=lambda n: (max(map(_length, questions[n].choices)), keys[n]))
    active: dict[int, _Race] = {}
    while pending or active:
        waiting = sum(race.num_tokens() for race in active.values())
        while pending and waiting < _BATCHES_PER_ROUND * options.batch_tokens:
            number = pending.pop()
            active[number] = _Race(questions[number], options, error)
            waiting += active[number].num_tokens()
        _run(loaded, list(chain.from_iterable(race.drawing for race in active.values())), options.batch_tokens)
        decided = [number for number, race in active.items() if race.is_decided()]
        cache.add({keys[number]: [list(choice.scored()) for choice in active[number].choices] for number in decided})
        for number in decided:
            on_progress(len(active.pop(number).choices))
    return [[Scored(*scored) for scored in cache.get(key)] for key in keys]


class _Choice:
    """A choice, the masks that it needs so far, and what the model said under them."""

    def __init__(self, pair: Pair, options: ScoringOptions):
        self.pair, self._options = pair, options
        self.look = 0  # index into `looks`
        self._looks = looks(options.mc_num)
        self._control = control_masks(len(pair[1]), options.seed)
        num_masks = 2 ** len(pair[1]) - 1
        self._num_masks = num_masks if num_masks <= options.mc_num else None
        self._losses: dict[bytes, np.ndarray] = {}  # of the masked tokens, by mask
        self._is_greedy = False

    @property
    def is_exact(self) -> bool:
        is_last = self.look + 1 == len(self._looks)
        passes = self._options.mc_num if is_last else len(self._control) + self._looks[self.look]
        return self._num_masks is not None and self._num_masks <= passes

    @property
    def is_finished(self) -> bool:
        return self.is_exact or self.look + 1 == len(self._looks)

    def _masks(self) -> WeightedMasks:
        n = len(self.pair[1])
        return all_masks(n) if self.is_exact else draws(n, self._looks[self.look], self._options.seed)

    def wanted(self) -> list[np.ndarray]:
        """The masks that are not run yet, each once."""
        masks = {mask.tobytes(): mask for mask in (*self._control, *self._masks().masks)}
        return [mask for key, mask in masks.items() if key not in self._losses]

    def record(self, mask: np.ndarray, losses_n: np.ndarray, is_greedy: bool) -> None:
        self._losses[mask.tobytes()] = losses_n
        if mask.all():
            self._is_greedy = is_greedy

    def estimate(self) -> ChoiceEstimate:
        masks, weights = self._masks()
        losses = np.array([self._losses[mask.tobytes()].sum() for mask in masks])
        if self.is_exact:
            return ChoiceEstimate(-np.array([weights @ losses]), True, None)
        few = np.zeros(len(self.pair[1]))
        for mask in self._control[1:]:
            few[mask] = self._losses[mask.tobytes()]
        control = Control(self._losses[self._control[0].tobytes()], few)
        values = -control.total + weights * (control.losses(masks) - losses)
        return ChoiceEstimate(values, False, None if self._num_masks else self._looks[-1])

    def scored(self) -> Scored:
        values, is_exact, _ = self.estimate()
        error = 0.0 if is_exact else float(values.std(ddof=1) / np.sqrt(len(values)))
        return Scored(float(values.mean()), error, self._is_greedy)


class _Race:
    """A question while it is undecided; `drawing` are the choices that need passes."""

    def __init__(self, question: Question, options: ScoringOptions, error: float):
        self.choices = [_Choice(pair, options) for pair in question.choices]
        self.drawing = list(self.choices)
        self._scales = [np.array(scale) for scale in question.scales]
        # Bonferroni: the test is made at every look.
        self._error = error / len(looks(options.mc_num))

    def num_tokens(self) -> int:
        """Tokens of the passes that are wanted, those that choices share counted once for each."""
        return sum(_length(choice.pair) * len(choice.wanted()) for choice in self.drawing)

    def is_decided(self) -> bool:
        """Whether the leader by every score is certain; otherwise the choices that may lead are to draw on."""
        estimates = [choice.estimate() for choice in self.choices]
        still = {number for scale in self._scales for number in contenders(estimates, scale, self._error)}
        self.drawing = [self.choices[number] for number in sorted(still) if not self.choices[number].is_finished]
        look = 1 + max((choice.look for choice in self.drawing), default=0)
        for choice in self.drawing:
            choice.look = look
        return not self.drawing


def _length(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1])


def _run(loaded: LoadedModel, choices: list[_Choice], batch_tokens: int) -> None:
    """Run the masks that these choices want."""
    wanted = [choice.wanted() for choice in choices]
    requests = (
        masked_request(loaded, choice.pair, mask, number, index)
        for number, choice in enumerate(choices)
        for index, mask in enumerate(wanted[number])
    )
    for masked, losses_n, is_correct in token_losses(loaded, requests, batch_tokens):
        choices[masked.request].record(wanted[masked.request][masked.mask], losses_n, is_correct)
