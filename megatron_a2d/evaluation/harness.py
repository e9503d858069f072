"""Tasks of the lm-evaluation-harness on a diffusion (or autoregressive) model.

The harness makes the requests and judges the answers; here they are answered: log-likelihoods by loglikelihood.py,
texts by the samplers. Requests are sorted by length and batched, each answer goes to the journal as soon as it is
known."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.config import task as task_config
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, kept_positions, make_canvas, row_seed
from megatron_a2d.evaluation.loglikelihood import Scored, ScoringOptions, check_lengths, score
from megatron_a2d.evaluation.response_cache import Journal
from megatron_a2d.inference.loaded_model import Opened
from megatron_a2d.utils.errors import UserError

Progress = Callable[[str, float, str], AbstractContextManager[Callable[[float], None]]]


class HarnessModel(TemplateLM):
    """What `lm_eval.simple_evaluate` asks.

    `counts` says what had to be done to requests (contexts cut at the left because they exceed the model's positions);
    `standard_errors` are those of all log-likelihoods, in nats.
    """

    def __init__(
        self,
        opened: Opened,
        scoring: ScoringOptions,
        sampling: SamplingOptions,
        max_new_tokens: int,
        batch_size: int,
        journal: Journal,
        progress: Progress,
        seed: int = 0,
    ):
        super().__init__()
        self.opened, self.scoring, self.sampling, self.journal = opened, scoring, sampling, journal
        self.max_new_tokens, self.batch_size, self.seed, self._progress = max_new_tokens, batch_size, seed, progress
        self.counts: Counter[str] = Counter()
        self.was_asked = False  # until then, what fails is the loading of tasks and their data
        self.standard_errors: list[float] = []

    @property
    def eot_token_id(self) -> int:
        # What ends the document before a text stands for "nothing before".
        if self.opened.document_token_id is None:
            raise UserError(
                f"--model {self.opened.name}: no file names a token that ends a text; write eos_token_id into "
                "config.json"
            )
        return self.opened.document_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.opened.encode(string)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.was_asked = True
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [(self._fit(context, len(continuation)), continuation) for _, context, continuation in requests]
        found = self._score(pairs, "log-likelihoods")
        return [(scored.log_likelihood, scored.is_greedy) for scored in found]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Whole texts, in windows of the model's positions that do not overlap but for one token of context."""
        self.was_asked = True
        windows = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            limit = self.opened.max_positions - 1
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, limit, 1):
                windows.append((number, make_disjoint_window(pair)))
        found = self._score([pair for _, pair in windows], "texts")
        totals = [0.0] * len(requests)
        for (number, _), scored in zip(windows, found, strict=True):
            totals[number] += scored.log_likelihood
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Completions of at most as many tokens as the task says (else --max-new-tokens), cut at its stop texts."""
        self.was_asked = True
        jobs = []
        for request in requests:
            context, arguments = request.args
            length, until, is_random = _wishes(arguments, self.max_new_tokens)
            if is_random and not self.sampling.temperature:
                self.counts["requests for random answers, answered at --temperature 0"] += 1
            jobs.append((self._fit(self.tok_encode(context) or [self.eot_token_id], length), length, until))
        keys: list[str] = []
        repeats: Counter[str] = Counter()
        for job in jobs:
            key = self.journal.key("generate", *job)
            # The repeats of one request (pass@k) are texts of their own.
            keys.append(self.journal.key("generate", *job, repeats[key]) if repeats[key] else key)
            repeats[key] += 1
        unknown = [number for number, key in enumerate(keys) if self.journal.get(key) is None]
        unknown.sort(key=lambda number: (-len(jobs[number][0]) - jobs[number][1], keys[number]))
        with self._progress("texts", len(jobs), "requests") as advance:
            advance(len(jobs) - len(unknown))
            for start in range(0, len(unknown), self.batch_size):
                batch = unknown[start : start + self.batch_size]
                texts = self._complete([jobs[number] for number in batch], [keys[number] for number in batch])
                self.journal.add({keys[number]: text for number, text in zip(batch, texts, strict=True)})
                advance(len(batch))
        return [self.journal.get(key) for key in keys]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], what: str) -> list[Scored]:
        check_lengths(self.opened, pairs)
        with self._progress(what, len(pairs), "requests") as advance:
            found = score(self.opened, pairs, self.scoring, self.journal, advance)
        self.standard_errors += [scored.standard_error for scored in found]
        return found

    def _fit(self, context: list[int], length: int) -> list[int]:
        """A context that is too long loses its beginning, as in the harness's own models; it is counted."""
        room = self.opened.max_positions - length
        if room < 1:
            raise UserError(
                f"a request asks for {length} tokens, and the model has "
                f"{self.opened.max_positions} positions; lower --max-new-tokens or take another task"
            )
        if len(context) > room:
            self.counts["contexts cut at the left"] += 1
        return context[-room:]

    def _complete(self, jobs: list[tuple[list[int], int, list[str]]], keys: list[str]) -> list[str]:
        """Of each context, the most new tokens and the stop texts: what is written before the first of those."""
        opened = self.opened
        if opened.objective == "ar":
            return [_cut(_greedy(opened, tokens, length), until) for tokens, length, until in jobs]
        canvas = make_canvas(
            [tokens + [opened.mask_token_id] * length for tokens, length, _ in jobs], opened.mask_token_id
        )
        for row, (tokens, _, _) in enumerate(jobs):
            canvas.editable[row, : len(tokens)] = False  # a mask token in a question is no hole

        def is_final(row: int, written: list[int]) -> bool:
            return _is_cut(opened.decode(written), jobs[row][2])

        sampled = denoise(
            opened.run, canvas.to(opened.device), opened.mask_token_id, self.sampling,
            label_shift=opened.label_shift, end_token_ids=opened.end_token_ids,
            is_final=is_final if opened.end_token_ids else None,
            # By the request's content: the same text in any order and batch.
            seed=[row_seed(self.seed, int(key[:8], 16)) for key in keys],
        ).tokens.tolist()  # fmt: skip
        texts = []
        for row, (tokens, length, until) in zip(sampled, jobs, strict=True):
            new = row[len(tokens) : len(tokens) + length]
            kept = kept_positions(new, [True] * length, set(opened.end_token_ids))
            texts.append(_cut(opened.decode([new[position] for position in kept]), until))
        return texts

    def error_summary(self) -> dict[str, float]:
        """Of the log-likelihoods' Monte Carlo errors, nats: their mean and largest, and the share that is exact."""
        errors = [error for error in self.standard_errors if math.isfinite(error)]
        if not errors:
            return {}
        return {
            "mean_standard_error": statistics.fmean(errors),
            "largest_standard_error": max(errors),
            "exact_share": errors.count(0.0) / len(self.standard_errors),
            # With one or two draws nothing can be said of the error.
            "unknown_share": 1 - len(errors) / len(self.standard_errors),
        }


@contextmanager
def tasks_without_a_length() -> Iterator[None]:
    """Inside, a task that does not say how long its answers are stays so when it is loaded.

    The harness (0.4.13) writes 256 tokens into every request of a task without `generation_kwargs`, where they cannot
    be told from a task's own.
    """
    defaults = task_config.default_gen_kwargs

    def without_length(*arguments: Any, **named: Any) -> dict[str, Any]:
        return {name: value for name, value in defaults(*arguments, **named).items() if name != "max_gen_toks"}

    task_config.default_gen_kwargs = without_length
    try:
        yield
    finally:
        task_config.default_gen_kwargs = defaults


def _wishes(arguments: dict[str, Any], max_new_tokens: int) -> tuple[int, list[str], bool]:
    """Of a request: its most new tokens under any of their names (else `max_new_tokens`), its stop texts, and whether
    it wants random answers. UserError for what makes no sense, which a task's file may hold."""
    try:
        given = {name: value for name, value in arguments.items() if value is not None}
        asked = normalize_gen_kwargs(given, default_max_gen_toks=max_new_tokens)
        stops = [stop for each in asked["until"] for stop in (each if isinstance(each, tuple) else [each]) if stop]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"a task's generation_kwargs {arguments} cannot be used ({error}); correct the task") from None
    if asked["max_gen_toks"] < 1 or not all(isinstance(stop, str) for stop in stops):
        what = "a length of 1 or more" if asked["max_gen_toks"] < 1 else "texts in until"
        raise UserError(f"a task's generation_kwargs {arguments} cannot be used, it takes {what}; correct the task")
    return asked["max_gen_toks"], stops, bool(asked["do_sample"])


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop text in it."""
    place = _first_stop(text, until)
    return text if place is None else text[:place]


def _is_cut(text: str, until: Sequence[str]) -> bool:
    """Whether any text that begins so is cut at the same place: no stop text can begin earlier and end behind it."""
    place = _first_stop(text, until)
    # A character whose bytes are not all there decodes to this one.
    return place is not None and len(text.rstrip("\ufffd")) >= place - 1 + max(map(len, until))


def _first_stop(text: str, until: Sequence[str]) -> int | None:
    return min((place for stop in until if stop and (place := text.find(stop)) >= 0), default=None)


@torch.no_grad()
def _greedy(opened: Opened, tokens: list[int], length: int) -> str:
    """The autoregressive baseline: greedy decoding by transformers."""
    model = getattr(opened.run, "model", None)
    if model is None:
        raise UserError(
            f"--model {opened.name}: texts of an autoregressive model are written from an export; "
            "run python -m checkpoints_tools.export_hf --format qwen3 first"
        )
    row = torch.tensor([tokens], device=opened.device)
    written = model.generate(
        row, attention_mask=torch.ones_like(row), max_new_tokens=length, do_sample=False, temperature=None, top_p=None,
        top_k=None, eos_token_id=list(opened.end_token_ids) or None,
        pad_token_id=opened.end_token_ids[0] if opened.end_token_ids else 0,
    )[0, len(tokens) :].tolist()  # fmt: skip
    kept = kept_positions(written, [True] * len(written), set(opened.end_token_ids))
    return opened.decode([written[position] for position in kept])
