"""The model that lm-evaluation-harness asks: log-likelihoods, generated answers, stop texts, and what a request may hold."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_a2d import evaluate
from megatron_a2d.evaluation import loglikelihood
from megatron_a2d.utils.errors import UserError
from tests.unit import local_evaluation
from tests.unit.local_evaluation import run

models = local_evaluation.models


def test_a_context_that_is_too_long_loses_its_beginning():
    from megatron_a2d.evaluation.harness import HarnessModel

    model = SimpleNamespace(loaded=SimpleNamespace(max_positions=10), counts=Counter())
    assert HarnessModel._fit(model, list(range(20)), 3) == [13, 14, 15, 16, 17, 18, 19]
    assert HarnessModel._fit(model, list(range(8)), 3) == [1, 2, 3, 4, 5, 6, 7]
    assert model.counts == {"contexts truncated on the left": 2}
    assert HarnessModel._fit(model, list(range(7)), 3) == [0, 1, 2, 3, 4, 5, 6]
    assert HarnessModel._fit(model, [5, 6], 9) == [6] and model.counts.total() == 3
    with pytest.raises(UserError, match="a request asks for 10 tokens, and the model has 10 positions"):
        HarnessModel._fit(model, [5], 10)


def test_the_harness_model_against_plain_logits(models):
    """A single-token continuation is one row of logits; a rolled text is split into windows that cover it once."""
    from lm_eval.api.instance import Instance

    from megatron_a2d.evaluation.harness import HarnessModel
    from megatron_a2d.evaluation.response_cache import ResponseCache
    from megatron_a2d.inference.hf_model import load_hf_model

    loaded = load_hf_model(models["export"])
    harness = HarnessModel(
        loaded, loglikelihood.ScoringOptions(mc_num=4), None, 8, 2, ResponseCache(None, None),
        lambda what, total, unit: evaluate._progress(loaded, what, total, unit),
    )  # fmt: skip
    context, word = "for i in ", "r"
    [(value, _)] = harness.loglikelihood([Instance("loglikelihood", {}, (context, word), 0)])
    tokens, [label] = harness._encode_pair(context, word)[0], harness._encode_pair(context, word)[1][-1:]
    continuation = harness._encode_pair(context, word)[1]
    if len(continuation) == 1:
        logits = loaded.forward.model(torch.tensor([[*tokens, loaded.mask_token_id]])).logits[0, len(tokens) - 1]
        assert value == pytest.approx(float(logits.log_softmax(-1)[label]), abs=1e-4)
    assert value < 0

    long = "def f(x): return x\n" * 120
    windows = []
    original = harness._score
    harness._score = lambda pairs, what: windows.extend(pairs) or original(pairs, what)
    [total] = harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (long,), 0)])
    assert [token for _, part in windows for token in part] == loaded.encode(long) and len(windows) > 1
    assert all(len(a) + len(b) <= loaded.max_positions for a, b in windows) and math.isfinite(total)


CHOICES = """task: lines
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
{more}
"""


def test_choices_are_drawn_until_the_best_is_certain(models, tmp_path, monkeypatch):
    """The same accuracies in a fraction of the passes; all passes with --decision-error 0, or if values are read."""
    lines = ["return self.count", "x", "for item in sorted(items, key=len): yield item", "raise ValueError(name)"]
    with open(tmp_path / "lines.jsonl", "w") as file:
        for number in range(4):
            choices = lines[number:] + lines[:number]
            print(json.dumps({"question": f"def f{number}(x):\n    ", "choices": choices, "answer": 0}), file=file)
    passes: list[int] = []
    original = loglikelihood._losses
    monkeypatch.setattr(
        loglikelihood, "_losses", lambda loaded, batch: (passes.append(len(batch)), original(loaded, batch))[1]
    )

    def evaluated(name: str, *arguments: str, more: str = "") -> tuple[dict, int]:
        directory = tmp_path / f"tasks_{name}"
        directory.mkdir()
        (directory / "lines.yaml").write_text(CHOICES.format(data=tmp_path / "lines.jsonl", more=more))
        passes.clear()
        arguments = ("--include-path", str(directory), "--tasks", "lines", "--mc-num", "64", *arguments)
        return run(models, tmp_path / name, *arguments)["tasks"]["lines"], sum(passes)

    early, few = evaluated("early")
    every, all_passes = evaluated("all", "--decision-error", "0")
    assert early == every and 3 * few < all_passes
    values = "  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}"
    assert evaluated("values", more=values)[1] == all_passes
    with pytest.raises(UserError, match=r"--decision-error 0\.5: must be a probability"):
        evaluated("wrong", "--decision-error", "0.5")


def test_repeats_of_a_request_are_texts_of_their_own(models, tmp_path):
    """pass@k asks the same k times; the answers are the same in another run, and in one that resumes."""
    from lm_eval.api.instance import Instance

    from megatron_a2d.diffusion.sampling import SamplingOptions
    from megatron_a2d.evaluation import harness as module
    from megatron_a2d.evaluation.response_cache import ResponseCache
    from megatron_a2d.inference.hf_model import load_hf_model

    loaded = load_hf_model(models["export"])

    def answers(count: int, path: Path | None) -> list[str]:
        model = module.HarnessModel(
            loaded, loglikelihood.ScoringOptions(mc_num=4), SamplingOptions(num_steps=4, temperature=1.0), 8, 2,
            ResponseCache(path, None), lambda what, total, unit: evaluate._progress(loaded, what, total, unit),
        )  # fmt: skip
        return model.generate_until([Instance("g", {}, ("for i in ", {"until": []}), 0) for _ in range(count)])

    whole = answers(4, None)
    assert len(set(whole)) == 4
    assert answers(2, tmp_path / "answers.jsonl") == whole[:2]
    assert answers(4, tmp_path / "answers.jsonl") == whole


def test_stop_texts_end_the_writing_and_change_no_answer(models, monkeypatch):
    """Answers are those of texts written to their end and cut afterwards, in fewer forward passes."""
    from lm_eval.api.instance import Instance

    from megatron_a2d.diffusion.sampling import SamplingOptions, denoise
    from megatron_a2d.evaluation import harness as module
    from megatron_a2d.evaluation.response_cache import ResponseCache
    from megatron_a2d.inference.hf_model import load_hf_model

    loaded = load_hf_model(models["export"])
    forwards: list[int] = []

    def answers(stops: list[str], early: bool) -> list[str]:
        def counted(*arguments, is_final, **options):
            sampled = denoise(*arguments, is_final=is_final if early else None, **options)
            forwards.append(sum(sampled.num_forwards))
            return sampled

        monkeypatch.setattr(module, "denoise", counted)
        model = module.HarnessModel(
            loaded, loglikelihood.ScoringOptions(mc_num=4), SamplingOptions(num_steps=48, block_length=8), 48, 2,
            ResponseCache(None, None), lambda what, total, unit: evaluate._progress(loaded, what, total, unit),
        )  # fmt: skip
        requests = [Instance("g", {}, (f"for {c} in ", {"until": stops}), 0) for c in "abc"]
        return model.generate_until(requests)

    [text, *_] = answers([], early=True)
    stop = text[len(text) // 4 :][:3]  # three characters that the first text has in its second quarter
    assert answers([stop, "not in any text"], early=False) == answers([stop, "not in any text"], early=True)
    plain, early = sum(forwards[2:4]), sum(forwards[4:6])
    assert early < plain


@pytest.mark.parametrize(
    "text, until, place, final",
    [
        ("a = 1\n", ["\n"], 5, True),
        ("a = 1", ["\n"], None, False),
        ("a = 1", [], None, False),
        ("a\n\n", ["\n\n", "a\n\nQ"], 1, False),  # the longer one may turn out to begin earlier
        ("a\n\nb", ["\n\n", "a\n\nQ"], 1, True),
        ("a\n\n\ufffd", ["\n\n", "a\n\nQ"], 1, False),
    ],
)
def test_where_a_stop_text_cuts(text, until, place, final):
    from megatron_a2d.evaluation.harness import _cut, _is_cut

    assert _cut(text, until) == (text if place is None else text[:place])
    assert _is_cut(text, until) is final


TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: launch/eval/local/exact.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_the_length_of_an_answer_is_the_tasks_own_or_the_flag(models, tmp_path, monkeypatch):
    """The harness writes 256 into requests of tasks that say nothing, where a task's own 256 would look the same."""
    from megatron_a2d.evaluation.harness import HarnessModel

    tasks = {
        "silent": ("", 3, ["\n\n"]),
        "says_256": ('generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 256, do_sample: false, temperature: 0.0}', 256,
                     ["\n\n"]),
        "text": ('generation_kwargs: {until: "stop"}', 3, ["stop"]),
        "other_name": ('generation_kwargs: {until: [], max_new_tokens: 5}', 5, []),
    }  # fmt: skip
    for name, (more, _, _) in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, more=more))
    seen = {}

    def complete(self, jobs, keys):
        seen[jobs[0][1:][0], tuple(jobs[0][2])] = True
        return ["" for _ in jobs]

    monkeypatch.setattr(HarnessModel, "_complete", complete)
    run(
        models, tmp_path / "out", "--include-path", str(tmp_path), "--tasks", *tasks, "--limit", "1",
        "--max-new-tokens", "3", "--batch-size", "1",
    )  # fmt: skip
    assert seen.keys() == {(length, tuple(until)) for _, length, until in tasks.values()}


def test_what_requests_may_hold():
    from megatron_a2d.evaluation.harness import _generation_arguments

    assert (
        _generation_arguments({}, 8)
        == _generation_arguments({"until": None, "max_gen_toks": None, "temperature": None}, 8)
        == (8, [], False)
    )
    assert _generation_arguments({"until": ("a", ""), "max_tokens": "5"}, 8) == (5, ["a"], False)
    assert _generation_arguments({"until": "a", "do_sample": True, "temperature": 0.8}, 8) == (8, ["a"], True)
    assert _generation_arguments({"do_sample": False, "temperature": 0.8}, 8) == (8, [], False)
    for arguments in ({"max_gen_toks": 0}, {"max_gen_toks": "many"}, {"max_gen_toks": float("inf")}, {"until": [5]}):
        with pytest.raises(UserError, match=r"a task's generation_kwargs .* cannot be used"):
            _generation_arguments(arguments, 8)


def test_requests_that_do_not_fit(models):
    from megatron_a2d.inference.hf_model import load_hf_model

    loaded = load_hf_model(models["export"])
    for request, message in (
        (([1] * 510, [2] * 3), "512 positions"),
        (([1], []), "empty continuation"),
        (([], [1]), "empty context"),
    ):
        with pytest.raises(UserError, match=message):
            loglikelihood.check_lengths(loaded, [request])


def test_the_share_of_exact_likelihoods_counts_unknown_errors():
    from megatron_a2d.evaluation.harness import HarnessModel

    model = SimpleNamespace(standard_errors=[0.0, math.nan, math.nan, 2.0])
    assert HarnessModel.error_summary(model) == {
        "mean_standard_error": 1.0, "largest_standard_error": 2.0, "exact_share": 0.25, "unknown_share": 0.5,
    }  # fmt: skip
