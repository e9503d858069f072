"""lm-evaluation-harness adapter for diffusion (and autoregressive) models.

The harness makes the requests and scores the responses; this model answers them: log-likelihoods by loglikelihood.py,
generation by the samplers. Requests are sorted by length and batched, and responses are cached on disk as they are
computed.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.config import task as task_config
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_a2d.conversion.hf_config import autoregressive_format
from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, kept_positions, make_canvas, row_seed
from megatron_a2d.evaluation.harness_questions import questions_of
from megatron_a2d.evaluation.loglikelihood import Pair, Scored, ScoringOptions, check_lengths, score
from megatron_a2d.evaluation.multiple_choice import Question, score_questions
from megatron_a2d.evaluation.response_cache import ResponseCache
from megatron_a2d.inference.loaded_model import LoadedModel
from megatron_a2d.utils.errors import UserError

Progress = Callable[[str, float, str], AbstractContextManager[Callable[[float], None]]]


class HarnessModel(TemplateLM):
    """The model that `lm_eval.simple_evaluate` evaluates.

    `counts`: changes to requests by kind (contexts truncated on the left to fit the model's positions).
    `standard_errors`: Monte Carlo standard errors of all log-likelihoods, in nats.
    `decision_error`: for multiple choice, the probability at which draws stop early (evaluation/multiple_choice.py).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        scoring: ScoringOptions,
        sampling: SamplingOptions,
        max_new_tokens: int,
        batch_size: int,
        cache: ResponseCache,
        progress: Progress,
        seed: int = 0,
        decision_error: float = 0.0,
    ):
        super().__init__()
        self.loaded, self.scoring, self.sampling, self.cache = loaded, scoring, sampling, cache
        self.max_new_tokens, self.batch_size, self.seed, self._progress = max_new_tokens, batch_size, seed, progress
        self.counts: Counter[str] = Counter()
        self.got_requests = False  # until then, errors come from loading tasks and their data
        self.standard_errors: list[float] = []
        self._tasks: dict[str, Any] = {}
        self._instances: Sequence[Any] = ()
        self._decision_error = decision_error

    def keep_tasks(self, manager: Any) -> None:
        """Keep the tasks that this lm-eval `TaskManager` will load, to know what becomes of their log-likelihoods."""
        load = manager.load

        def load_and_keep(names: Any) -> Any:
            loaded = load(names)
            self._tasks = {task.config.task: task for task in loaded["tasks"].values()}
            return loaded

        manager.load = load_and_keep

    @property
    def eot_token_id(self) -> int:
        # The document separator is the empty context.
        if self.loaded.document_token_id is None:
            raise UserError(
                f"--model {self.loaded.name}: no file lists an end-of-text token; write eos_token_id into config.json"
            )
        return self.loaded.document_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.loaded.encode(string)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.got_requests, self._instances = True, requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [(self._fit(context, len(continuation)), continuation) for _, context, continuation in requests]
        found = self._score(pairs, "log-likelihoods", self._questions(pairs))
        return [(scored.log_likelihood, scored.is_greedy) for scored in found]

    def _questions(self, pairs: Sequence[Pair]) -> dict[tuple[int, ...], Question]:
        """The requests of which only the best of a question's choices matters."""
        if not self._decision_error or self.loaded.objective == "ar" or self.scoring.likelihood != "monte_carlo":
            return {}
        return questions_of(self._instances, self._tasks, pairs, self.scoring.mc_num)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of complete texts, in windows of the model's length that overlap by one token of context."""
        self.got_requests = True
        windows = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            limit = self.loaded.max_positions - 1
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, limit, 1):
                windows.append((number, make_disjoint_window(pair)))
        found = self._score([pair for _, pair in windows], "texts")
        totals = [0.0] * len(requests)
        for (number, _), scored in zip(windows, found, strict=True):
            totals[number] += scored.log_likelihood
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Completions, at most as long as the task says (else --max-new-tokens), truncated at its stop strings."""
        self.got_requests = True
        jobs = []
        for request in requests:
            context, arguments = request.args
            length, until, is_random = _generation_arguments(arguments, self.max_new_tokens)
            if is_random and not self.sampling.temperature:
                self.counts["requests with do_sample, answered at --temperature 0"] += 1
            jobs.append((self._fit(self.tok_encode(context) or [self.eot_token_id], length), length, until))
        keys: list[str] = []
        repeats: Counter[str] = Counter()
        for job in jobs:
            key = self.cache.key("generate", *job)
            # Repeats of one request (pass@k) are separate texts.
            keys.append(self.cache.key("generate", *job, repeats[key]) if repeats[key] else key)
            repeats[key] += 1
        unknown = [number for number, key in enumerate(keys) if self.cache.get(key) is None]
        unknown.sort(key=lambda number: (-len(jobs[number][0]) - jobs[number][1], keys[number]))
        with self._progress("texts", len(jobs), "requests") as advance:
            advance(len(jobs) - len(unknown))
            for start in range(0, len(unknown), self.batch_size):
                batch = unknown[start : start + self.batch_size]
                texts = self._complete([jobs[number] for number in batch], [keys[number] for number in batch])
                self.cache.add({keys[number]: text for number, text in zip(batch, texts, strict=True)})
                advance(len(batch))
        return [self.cache.get(key) for key in keys]

    def _score(
        self, pairs: Sequence[Pair], what: str, questions: Mapping[tuple[int, ...], Question] = MappingProxyType({})
    ) -> list[Scored]:
        """Log-likelihoods of all pairs; those of `questions`, by their numbers, only until the best is certain."""
        check_lengths(self.loaded, pairs)
        asked = [number for numbers in questions for number in numbers]
        others = sorted(set(range(len(pairs))) - set(asked))
        with self._progress(what, len(pairs), "requests") as advance:
            found = dict(
                zip(
                    others,
                    score(self.loaded, [pairs[n] for n in others], self.scoring, self.cache, advance),
                    strict=True,
                )
            )
            decided = score_questions(
                self.loaded, list(questions.values()), self.scoring, self._decision_error, self.cache, advance
            )
        found |= zip(asked, chain.from_iterable(decided), strict=True)
        self.standard_errors += [found[number].standard_error for number in range(len(pairs))]
        return [found[number] for number in range(len(pairs))]

    def _fit(self, context: list[int], length: int) -> list[int]:
        """Truncate a context that is too long on the left, as the harness's own models do, and count it."""
        longest = self.loaded.max_positions - length
        if longest < 1:
            raise UserError(
                f"a request asks for {length} tokens, and the model has "
                f"{self.loaded.max_positions} positions; lower --max-new-tokens or choose another task"
            )
        if len(context) > longest:
            self.counts["contexts truncated on the left"] += 1
        return context[-longest:]

    def _complete(self, jobs: list[tuple[list[int], int, list[str]]], keys: list[str]) -> list[str]:
        """Complete (context, maximum new tokens, stop strings) jobs; texts end before the first stop string."""
        loaded = self.loaded
        if loaded.objective == "ar":
            return [_cut(_greedy(loaded, tokens, length), until) for tokens, length, until in jobs]
        canvas = make_canvas(
            [tokens + [loaded.mask_token_id] * length for tokens, length, _ in jobs], loaded.mask_token_id
        )
        for row, (tokens, _, _) in enumerate(jobs):
            canvas.editable[row, : len(tokens)] = False  # a mask token in the context is not a hole

        def is_final(row: int, written: list[int]) -> bool:
            return _is_cut(loaded.decode(written), jobs[row][2])

        sampled = denoise(
            loaded.forward, canvas.to(loaded.device), loaded.mask_token_id, self.sampling,
            label_shift=loaded.label_shift, end_token_ids=loaded.end_token_ids,
            is_final=is_final if loaded.end_token_ids else None,
            # Seeded by the request's content: the same text in any order and batch.
            seed=[row_seed(self.seed, int(key[:8], 16)) for key in keys],
        ).tokens.tolist()  # fmt: skip
        texts = []
        for row, (tokens, length, until) in zip(sampled, jobs, strict=True):
            new = row[len(tokens) : len(tokens) + length]
            kept = kept_positions(new, [True] * length, set(loaded.end_token_ids))
            texts.append(_cut(loaded.decode([new[position] for position in kept]), until))
        return texts

    def error_summary(self) -> dict[str, float]:
        """Mean and largest Monte Carlo standard error of the log-likelihoods in nats, and the share that is exact."""
        errors = [error for error in self.standard_errors if math.isfinite(error)]
        if not errors:
            return {}
        return {
            "mean_standard_error": statistics.fmean(errors),
            "largest_standard_error": max(errors),
            "exact_share": errors.count(0.0) / len(self.standard_errors),
            # With one or two draws the error cannot be estimated.
            "unknown_share": 1 - len(errors) / len(self.standard_errors),
        }


@contextmanager
def tasks_without_a_length() -> Iterator[None]:
    """Load tasks without the harness's default answer length, so that --max-new-tokens applies to them.

    The harness (0.4.13) adds 256 tokens to every request of a task without `generation_kwargs`, which cannot be
    distinguished from a task's own limit.
    """
    defaults = task_config.default_gen_kwargs

    def without_length(*arguments: Any, **named: Any) -> dict[str, Any]:
        return {name: value for name, value in defaults(*arguments, **named).items() if name != "max_gen_toks"}

    task_config.default_gen_kwargs = without_length
    try:
        yield
    finally:
        task_config.default_gen_kwargs = defaults


def _generation_arguments(arguments: dict[str, Any], max_new_tokens: int) -> tuple[int, list[str], bool]:
    """(maximum new tokens, stop strings, whether to sample) from a request's arguments, under any of their names; the
    length defaults to `max_new_tokens`. UserError for invalid ones, which a task file may contain."""
    try:
        given = {name: value for name, value in arguments.items() if value is not None}
        asked = normalize_gen_kwargs(given, default_max_gen_toks=max_new_tokens)
        stops = [stop for each in asked["until"] for stop in (each if isinstance(each, tuple) else [each]) if stop]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"a task's generation_kwargs {arguments} cannot be used ({error}); correct the task") from None
    if asked["max_gen_toks"] < 1 or not all(isinstance(stop, str) for stop in stops):
        what = "a length of 1 or more" if asked["max_gen_toks"] < 1 else "strings in until"
        raise UserError(f"a task's generation_kwargs {arguments} cannot be used, needs {what}; correct the task")
    return asked["max_gen_toks"], stops, bool(asked["do_sample"])


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before its first stop string."""
    index = _first_stop(text, until)
    return text if index is None else text[:index]


def _is_cut(text: str, until: Sequence[str]) -> bool:
    """Whether every continuation of `text` is truncated at the same index: no stop string can still start earlier."""
    index = _first_stop(text, until)
    # An incomplete UTF-8 sequence decodes to this character.
    return index is not None and len(text.rstrip("\ufffd")) >= index - 1 + max(map(len, until))


def _first_stop(text: str, until: Sequence[str]) -> int | None:
    return min((index for stop in until if stop and (index := text.find(stop)) >= 0), default=None)


@torch.no_grad()
def _greedy(loaded: LoadedModel, tokens: list[int], length: int) -> str:
    """Greedy decoding by transformers, for the autoregressive baseline."""
    model = getattr(loaded.forward, "model", None)
    if model is None or not hasattr(model, "generate"):  # a checkpoint's has none
        form = autoregressive_format(loaded.model_config) or "qwen3"
        raise UserError(
            f"--model {loaded.name}: generation with an autoregressive model needs an HF model; "
            f"run python -m checkpoints_tools.export_hf --format {form} first"
        )
    row = torch.tensor([tokens], device=loaded.device)
    written = model.generate(
        row, attention_mask=torch.ones_like(row), max_new_tokens=length, do_sample=False, temperature=None, top_p=None,
        top_k=None, eos_token_id=list(loaded.end_token_ids) or None,
        pad_token_id=loaded.end_token_ids[0] if loaded.end_token_ids else 0,
    )[0, len(tokens) :].tolist()  # fmt: skip
    kept = kept_positions(written, [True] * len(written), set(loaded.end_token_ids))
    return loaded.decode([written[position] for position in kept])
