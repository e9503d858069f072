"""`python -m megatron_a2d.evaluate`: the whole way on small local tasks, interruption, bad input, and programs that are run."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
import torch
from pyarrow import parquet

from checkpoints_tools import convert_hf, export_hf
from megatron_a2d import evaluate
from megatron_a2d.evaluation import code_execution, loglikelihood, sandbox
from megatron_a2d.evaluation.harness import HarnessModel
from megatron_a2d.evaluation.score_table import markdown, read_results
from megatron_a2d.utils.errors import UserError
from tests.tiny import write_hf, write_tokens

LOCAL = Path(__file__).resolve().parents[2] / "launch" / "eval"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A Qwen3 before conversion, the same as a diffusion export, and held-out tokens."""
    root = tmp_path_factory.mktemp("evaluate")
    write_hf(root / "qwen3", "dense")
    convert_hf.main(["--hf-model", str(root / "qwen3"), "--out", str(root / "checkpoint")])
    export_hf.main(["--checkpoint", str(root / "checkpoint"), "--out", str(root / "export"), "--format", "a2d"])
    write_tokens(root / "code", 30, 250, seed=1)
    write_tokens(root / "web", 20, 200, seed=2)
    return {name: root / name for name in ("qwen3", "export", "checkpoint", "code", "web")}


def run(models: dict[str, Path], out: Path, *arguments: str, model: str = "export") -> dict:
    evaluate.main(["--model", str(models[model]), "--out", str(out), *arguments])
    return json.loads((out / "results.json").read_text())


def test_local_tasks_of_all_kinds(models, tmp_path, capsys):
    local = ("--config", str(LOCAL / "local.yaml"), "--include-path", str(LOCAL / "local"))
    content = run(models, tmp_path / "out", *local)
    capsys.readouterr()
    tasks = content["tasks"]
    assert 0 <= tasks["local_choice"]["acc,none"] <= 1 and tasks["local_choice"]["acc_stderr,none"] > 0
    assert tasks["local_exact"]["exact_match,none"] == 0 and tasks["local_rolling"]["bits_per_byte,none"] > 2
    assert content["settings"]["mc_num"] == 32 and content["num_fewshot"]["local_choice"] == 0
    errors = content["log_likelihoods"]
    assert 0 < errors["exact_share"] < 1 and 0 < errors["mean_standard_error"] < 10

    # Interrupted: half of the answers are known, and only the others are computed.
    answers = (tmp_path / "out" / "answers.jsonl").read_text().splitlines(keepends=True)
    again = tmp_path / "again"
    again.mkdir()
    (again / "answers.jsonl").write_text("".join(answers[: len(answers) // 2]))
    assert run(models, again, *local)["tasks"] == tasks
    assert len((again / "answers.jsonl").read_text().split("\n{")) == len(
        (tmp_path / "out" / "answers.jsonl").read_text().split("\n{")
    )

    # One table with the model before conversion.
    before = run(models, tmp_path / "before", *local, "--objective", "ar", model="qwen3")
    assert (
        before["tasks"]["local_choice"] != tasks["local_choice"]
        or before["tasks"]["local_rolling"] != tasks["local_rolling"]
    )
    run(models, tmp_path / "both", *local, "--compare-with", str(tmp_path / "before"))
    page = (tmp_path / "both" / "results.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| local_rolling | 0 | bits_per_byte"))
    cells = [cell.strip() for cell in row.split("|")]
    expected = [
        content["tasks"]["local_rolling"]["bits_per_byte,none"],
        before["tasks"]["local_rolling"]["bits_per_byte,none"],
    ]
    assert [float(cell) for cell in cells[4:6]] == pytest.approx(expected, abs=1e-3)


def test_answers_are_of_the_settings_that_gave_them(models, tmp_path, monkeypatch):
    arguments = ("--include-path", str(LOCAL / "local"), "--tasks", "local_rolling", "--limit", "1")
    first = run(models, tmp_path, *arguments, "--mc-num", "8")
    calls = []
    original = loglikelihood._score_group
    monkeypatch.setattr(loglikelihood, "_score_group", lambda *a: calls.append(1) or original(*a))
    assert run(models, tmp_path, *arguments, "--mc-num", "8")["tasks"] == first["tasks"] and not calls
    assert run(models, tmp_path, *arguments, "--mc-num", "9")["tasks"] != first["tasks"] and calls


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


def test_held_out_text_by_source(models, tmp_path):
    content = run(
        models, tmp_path, "--valid-data-path", f"code={models['code']}", str(models["web"]), "--seq-length", "32",
        "--num-samples", "40", "--micro-batch-size", "16",
    )  # fmt: skip
    held_out = content["held_out"]
    assert list(held_out) == ["code", "web", "all"]
    assert held_out["all"]["num_samples"] == held_out["code"]["num_samples"] + held_out["web"]["num_samples"] == 80
    for name in ("nelbo_by_time", "accuracy_by_mask_ratio"):
        assert sum(bucket["num_samples"] for bucket in held_out["code"][name]) == 40
        assert len(held_out["code"][name]) == 10
    page = (tmp_path / "results.md").read_text()
    assert "| code |" in page and "0.9 to 1.0" in page
    # Common random numbers: cut into other batches, the same samples and masks.
    other = run(
        models, tmp_path / "other", "--valid-data-path", f"code={models['code']}", "--seq-length", "32",
        "--num-samples", "40", "--micro-batch-size", "7",
    )  # fmt: skip
    assert other["held_out"]["code"]["nelbo"] == pytest.approx(held_out["code"]["nelbo"], abs=1e-5)


BAD = {
    "a time beyond 1": (["--min-timestep", "5"], "--min-timestep 5.0: must lie between"),
    "nothing": ([], "nothing to evaluate"),
    "no directory of tasks": (["--tasks", "a", "--include-path", "/nowhere"], "--include-path /nowhere"),
    "code": (["--tasks", "local_code", "--include-path", str(LOCAL / "local")], "--allow-code-execution"),
    "no file": (["--config", "/nowhere.yaml"], "--config /nowhere.yaml: is missing"),
    "samples too long": (["--valid-data-path", "x", "--seq-length", "9999"], "512 positions"),
    "no data": (["--valid-data-path", "/nowhere/x", "--seq-length", "16"], "/nowhere/x"),
    "no draws": (["--tasks", "a", "--mc-num", "0"], "--mc-num 0"),
    "no earlier results": (["--tasks", "a", "--compare-with", "/nowhere"], "/nowhere/results.json"),
    "noise for ar": (["--tasks", "a", "--objective", "ar", "--min-timestep", "0.1"], "no effect with --objective ar"),
    "unknown flag": (["--task", "a"], "did you mean --tasks"),
    "layout of an export": (["--tasks", "a", "--bf16"], "--bf16: needs a checkpoint"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, models, tmp_path):
    arguments, message = BAD[case]
    with pytest.raises(UserError) as error:
        run(models, tmp_path / "out", *arguments)
    assert message in str(error.value)
    assert not (tmp_path / "out" / "results.json").exists()


def test_unknown_tasks(monkeypatch):
    """Those of --include-path are looked at first, the harness's own (seconds) only for others."""

    class Manager:
        def __init__(self, include_path, include_defaults=True):
            self.all_tasks = ["local_choice"] + ["gsm8k", "mmlu"] * include_defaults

    def options(*tasks: str) -> SimpleNamespace:
        return SimpleNamespace(include_path=str(LOCAL / "local"), tasks=tasks)

    assert evaluate._task_manager(options("local_choice"), Manager).all_tasks == ["local_choice"]
    assert "gsm8k" in evaluate._task_manager(options("local_choice", "gsm8k"), Manager).all_tasks
    with pytest.raises(UserError) as error:
        evaluate._task_manager(options("local_choise", "mmul"), Manager)
    assert error.value.problems == [
        "--tasks local_choise: unknown task (did you mean local_choice?)",
        "--tasks mmul: unknown task (did you mean mmlu?)",
    ]


def test_models_that_are_not_ours(models, tmp_path):
    with pytest.raises(UserError, match="give --objective ar"):
        run(models, tmp_path, "--tasks", "a", model="qwen3")
    with pytest.raises(UserError, match="not an autoregressive Qwen3"):
        run(models, tmp_path, "--tasks", "a", "--objective", "ar")


def test_bad_config_files(models, tmp_path):
    (tmp_path / "bad.yaml").write_text(
        "tasks: [a]\nmc_nun: 3\nmc_num: many\nlikelihood: best\nnum_steps: few\ngreedy: 1\n"
    )
    with pytest.raises(UserError) as error:
        run(models, tmp_path / "out", "--config", str(tmp_path / "bad.yaml"))
    assert len(error.value.problems) == 5 and "did you mean mc_num?" in str(error.value)


def test_earlier_results_of_another_kind(models, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="not written by this command"):
        run(models, tmp_path / "out", "--tasks", "a", "--compare-with", str(tmp_path))


EARLIER = {
    "model": "m", "objective": "mdlm", "tasks": {"a": {"acc,none": 0.5}}, "num_fewshot": {"a": 0}, "counts": {"cut": 1},
    "held_out": {"web": {"nelbo": 1.0, "nelbo_standard_error": None, "accuracy": 0.5, "accuracy_standard_error": 0.1,
                         "num_samples": 2}},
    "log_likelihoods": {"mean_standard_error": 0.1, "largest_standard_error": 0.2, "exact_share": 1.0},
}  # fmt: skip
MALFORMED = [
    {"model": 1}, {"objective": None}, {"tasks": []}, {"tasks": {"a": 1}}, {"num_fewshot": 5}, {"counts": [1]},
    {"held_out": "x"}, {"held_out": {"web": None}}, {"held_out": {"web": {"nelbo": 1.0}}},
    {"held_out": {"web": EARLIER["held_out"]["web"] | {"accuracy": "half"}}},  # type: ignore[index]
    {"log_likelihoods": {"exact_share": 1.0}}, {"log_likelihoods": 3},
    {"log_likelihoods": EARLIER["log_likelihoods"] | {"mean_standard_error": None}},  # type: ignore[operator]
    {"log_likelihoods": EARLIER["log_likelihoods"] | {"unknown_share": "all"}},  # type: ignore[operator]
]  # fmt: skip


@pytest.mark.parametrize("change", MALFORMED, ids=str)
def test_malformed_earlier_results_are_found_first(change, tmp_path, monkeypatch):
    """Checked before any model is loaded; valid results can be compared."""
    monkeypatch.setattr(evaluate, "load_model", lambda *a: pytest.fail("the model was loaded"))
    (tmp_path / "results.json").write_text(json.dumps(EARLIER | change))
    with pytest.raises(UserError, match=f"no usable {next(iter(change))}"):
        evaluate.main(["--model", "m", "--out", str(tmp_path / "out"), "--tasks", "a", "--compare-with", str(tmp_path)])
    (tmp_path / "results.json").write_text(json.dumps(EARLIER))
    assert "| a | 0 | acc | 50.0% | 50.0% |" in markdown([EARLIER | {"held_out": {}}, read_results(tmp_path)])


def test_results_are_written_before_they_are_compared(tmp_path, monkeypatch):
    from megatron_a2d.evaluation import score_table

    monkeypatch.setattr(score_table, "markdown", lambda runs: pytest.fail("a fault of ours"))
    with pytest.raises(pytest.fail.Exception):
        evaluate._write(tmp_path, {"model": "m"}, [])
    assert json.loads((tmp_path / "results.json").read_text()) == {"model": "m"}


def test_a_place_that_takes_no_results_is_found_first(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda *a: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        evaluate.main(["--model", "m", "--out", str(tmp_path / "file" / "out"), "--valid-data-path", "x"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("include_path: tasks", "--include-path {}/tasks on the command line"),
        ("include-path: /abs/tasks", "--include-path /abs/tasks on the command line"),
        ("include_path: [tasks]", "--include-path on the command line"),
        ("allow_code_execution: true", "--allow-code-execution on the command line"),
        ("allow-code-execution: 'yes'", "--allow-code-execution on the command line"),
        ("allow_code_network: true", "--allow-code-network on the command line"),
    ],
)
def test_consent_comes_from_the_command_line_alone(line, message, tmp_path, monkeypatch):
    """A file of settings runs nothing: neither programs nor the tasks of a directory, and no flag permits it."""
    monkeypatch.setattr(evaluate, "load_model", lambda *a: pytest.fail("the model was loaded"))
    (tmp_path / "eval.yaml").write_text(f"tasks: [t]\n{line}\n")
    common = ["--model", "m", "--out", str(tmp_path / "out"), "--config", str(tmp_path / "eval.yaml")]
    for flags in ([], ["--allow-code-execution"]):
        with pytest.raises(UserError, match=re.escape(message.format(tmp_path))):
            evaluate.main([*common, *flags])
    (tmp_path / "eval.yaml").write_text("tasks: [t]\nallow_code_execution: false\n")
    assert not evaluate._read_config(str(tmp_path / "eval.yaml"), problems := []).get("include_path") and not problems


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


def test_every_file_of_launch_eval_is_read():
    """Few-shot counts as published: MMLU 5, ARC-C 0, RACE 0, BBH 3, GSM8K 8, MBPP 4."""
    shots = {}
    for path in sorted(LOCAL.glob("*.yaml")):
        problems: list[str] = []
        values = evaluate._read_config(str(path), problems)
        assert not problems, problems
        shots[path.stem] = values["num_fewshot"]
    assert shots == {"mmlu": 5, "arc_challenge": 0, "race": 0, "bbh": 3, "gsm8k": 8, "mbpp": 4, "local": 0}


def test_published_figures_stand_beside_our_own():
    run = {
        "model": "x/ours",
        "objective": "mdlm",
        "tasks": {"gsm8k": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.01}},
        "num_fewshot": {"gsm8k": 8},
    }
    page = markdown([run])
    assert "| GSM8K | 8 | exact_match (strict-match) | 50.0% ± 1.0% | 80.0% | 77.2% | 70.9% |" in page
    assert "radicalnumerics.ai" in page
    run["tasks"] = {"local_rolling": {"bits_per_byte,none": 0.75}}
    assert "| bits_per_byte | 0.750 |" in markdown([run])


def test_the_share_of_exact_likelihoods_counts_unknown_errors():
    from megatron_a2d.evaluation.harness import HarnessModel

    model = SimpleNamespace(standard_errors=[0.0, math.nan, math.nan, 2.0])
    assert HarnessModel.error_summary(model) == {
        "mean_standard_error": 1.0, "largest_standard_error": 2.0, "exact_share": 0.25, "unknown_share": 0.5,
    }  # fmt: skip


def test_a_models_fingerprint_is_not_changed_by_its_own_evaluation(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = evaluate._fingerprint(tmp_path)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "answers.jsonl").write_text("{}")
    assert evaluate._fingerprint(tmp_path) == before
    (tmp_path / "weights").write_text("x")
    assert evaluate._fingerprint(tmp_path) != before


@pytest.fixture
def allowed(monkeypatch):
    monkeypatch.setenv(code_execution.SWITCH, "1")
    monkeypatch.setenv(code_execution.NETWORK_SWITCH, "1")  # the tests run where no namespaces are granted, too


def test_programs_are_judged(allowed):
    assert code_execution.passes("def f(x):\n    return x + 1", "assert f(1) == 2")
    assert not code_execution.passes("def f(x):\n    return x", "assert f(1) == 2")
    assert not code_execution.passes("def f(x:", "assert f(1) == 2")
    assert not code_execution.passes("import sys; sys.exit(0)", "assert False"), "an early end is no success"
    assert not code_execution.passes("raise SystemExit", "")


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "x = bytearray(2 << 30)",
        "open('big', 'wb').write(bytes(2 << 20))",
        "import os, time\nif os.fork() == 0: time.sleep(60)\ntime.sleep(60)",
        "while True: print('x' * 10**6)",
    ],
)
def test_programs_have_limits(program, allowed):
    begin = time.monotonic()
    assert not code_execution.passes(program, "pass", seconds=1)
    assert time.monotonic() - begin < 50  # its own end would come after 60 s, or never
    assert not Path("big").exists()


# Any flag that unshare does not know is refused, as on a system that grants no namespaces.
NO_NAMESPACES = (1,)
# The words of a process that has left session, parent and environment behind; no other process has them.
ORPHAN = "import time; time.sleep(61.7)"
LEAVE = f"""import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execve({sys.executable!r}, ["python", "-I", "-S", "-c", {ORPHAN!r}], {{}})
    os._exit(0)
time.sleep(0.3)
"""


def orphans() -> list[Path]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # gone, or of another user
            if ORPHAN.encode() in path.read_bytes().split(b"\0"):
                found.append(path)
    return found


@pytest.mark.parametrize("namespaces", [code_execution._NAMESPACES, NO_NAMESPACES], ids=["namespaces", "none"])
@pytest.mark.parametrize("end", ["pass", "while True: pass"])
def test_programs_leave_no_process(namespaces, end, allowed, monkeypatch):
    """Nor one in a separate session without its environment; where the kernel allows no namespaces, the program fails."""
    monkeypatch.setattr(code_execution, "_NAMESPACES", namespaces)
    started = code_execution.passes(LEAVE, end, seconds=2)
    assert started or end != "pass" or os.getuid() != 0
    assert not orphans()


def test_an_orphan_would_be_seen():
    """The control of the test above."""
    process = subprocess.Popen([sys.executable, "-c", LEAVE], start_new_session=True)
    process.wait()
    found = orphans()
    for path in found:
        os.kill(int(path.parent.name), signal.SIGKILL)
    assert found


def can_cut_network() -> bool:
    return subprocess.run(code_execution._command(1), input=b"").returncode != sandbox.UNISOLATED


def test_programs_have_no_network(allowed, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        monkeypatch.setattr(code_execution, "_NAMESPACES", NO_NAMESPACES)
        assert code_execution.passes(connect, "pass")  # the control: it would have one
        monkeypatch.undo()
        monkeypatch.setenv(code_execution.SWITCH, "1")
        monkeypatch.delenv(code_execution.NETWORK_SWITCH, raising=False)
        if not can_cut_network():
            pytest.skip("this system permits no network namespace")
        assert code_execution.passes("", "pass") and not code_execution.passes(connect, "pass")


def test_a_network_is_refused_unless_it_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(code_execution, "_NAMESPACES", NO_NAMESPACES)
    monkeypatch.setattr(evaluate, "load_model", lambda *a: pytest.fail("the model was loaded"))
    monkeypatch.setattr(evaluate, "check_model", lambda *a: None)  # there is no directory m
    monkeypatch.setenv(code_execution.SWITCH, "0")  # what evaluate sets is undone after the test
    monkeypatch.setenv(code_execution.NETWORK_SWITCH, "1")  # an environment is no consent either
    common = ["--model", "m", "--out", str(tmp_path), "--tasks", "a"]
    with pytest.raises(UserError, match=r"permits no network namespace.*--allow-code-network"):
        evaluate.main([*common, "--allow-code-execution"])
    with pytest.raises(RuntimeError, match="permits no network namespace"):
        code_execution.passes("", "")
    with pytest.raises(pytest.fail.Exception):
        evaluate.main([*common, "--allow-code-execution", "--allow-code-network"])
    with pytest.raises(UserError, match="--allow-code-network: has no effect"):
        evaluate.main([*common, "--allow-code-network"])


def test_programs_see_no_environment(allowed, monkeypatch):
    monkeypatch.setenv("A_SECRET", "1")
    assert code_execution.passes("import os", "assert 'A_SECRET' not in os.environ and os.listdir('.') == []")


def test_programs_are_not_run_by_default(monkeypatch):
    monkeypatch.delenv(code_execution.SWITCH, raising=False)
    with pytest.raises(RuntimeError, match="code execution is off"):
        code_execution.passes("", "")


def test_code_tasks_run_when_allowed(models, tmp_path, monkeypatch):
    from megatron_a2d.evaluation.harness import HarnessModel

    right = "def double(x):\n    return 2 * x\n[DONE]"
    monkeypatch.setattr(HarnessModel, "generate_until", lambda self, requests: [right for _ in requests])
    content = run(
        models,
        tmp_path,
        "--tasks",
        "local_code",
        "--include-path",
        str(LOCAL / "local"),
        "--allow-code-execution",
        "--allow-code-network",
    )
    assert content["tasks"]["local_code"]["pass_at_1,none"] == 0.5
    for name in (code_execution.SWITCH, code_execution.NETWORK_SWITCH):
        os.environ.pop(name, None)


def test_programs_in_answers():
    assert code_execution.extract_program("Sure:\n```python\nx = 1\n```\nDone") == "x = 1"
    assert code_execution.extract_program("\nx = 1\n[DONE] more") == "x = 1"
    assert code_execution.extract_program("    indented") == "    indented"


def test_offline_task_files_of_the_docs(models, tmp_path, monkeypatch):
    """The two task files that docs/evaluation.md shows, on a few questions in the published formats."""
    page = (LOCAL.parents[1] / "docs" / "evaluation.md").read_text()
    files = re.findall(r"```yaml\n# tasks/(\S+)\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in files] == ["gsm8k_local.yaml", "mmlu_anatomy_local.yaml"]
    gsm8k, mmlu = tmp_path / "data" / "gsm8k", tmp_path / "data" / "mmlu" / "anatomy"
    for directory in (tmp_path / "tasks", gsm8k, mmlu):
        directory.mkdir(parents=True)
    for name, text in files:
        (tmp_path / "tasks" / name).write_text(text)
    for split in ("train", "test"):
        line = json.dumps({"question": f"1 + 1 in {split}?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"})
        (gsm8k / f"{split}.jsonl").write_text(f"{line}\n" * 2)
    question = {"question": "Where?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 1}
    for split in ("dev", "test"):
        parquet.write_table(pyarrow.Table.from_pylist([question] * 2), mmlu / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    asked: list[str] = []
    monkeypatch.setattr(HarnessModel, "generate_until", lambda model, requests: ["so 2\n#### 2" for _ in requests])
    scored = HarnessModel.loglikelihood
    monkeypatch.setattr(
        HarnessModel,
        "loglikelihood",
        lambda model, requests: [asked.extend(request.args[0] for request in requests), scored(model, requests)][1],
    )
    content = run(models, tmp_path / "out", "--include-path", "tasks", "--tasks", "gsm8k_local", "mmlu_local",
                  "--num-fewshot", "1")  # fmt: skip
    assert content["tasks"]["gsm8k_local"]["exact_match,strict-match"] == 1
    assert content["tasks"]["mmlu_anatomy_local"]["acc,none"] in (0, 1)
    assert asked[0].startswith("The following are") and asked[0].endswith("Answer:") and "Answer: B\n" in asked[0]
