"""`python -m megatron_a2d.evaluate`: the whole way on small local tasks, held-out text, interruption, results, bad input."""

from __future__ import annotations

import json
import os
import re
from types import SimpleNamespace

import pytest

from megatron_a2d import evaluate
from megatron_a2d.evaluation import code_execution, harness_tasks, loglikelihood
from megatron_a2d.evaluation.evaluation_options import read_config
from megatron_a2d.evaluation.harness import HarnessModel
from megatron_a2d.evaluation.published_scores import PUBLISHED
from megatron_a2d.evaluation.score_table import markdown, read_results
from megatron_a2d.utils.errors import UserError
from tests.unit import local_evaluation
from tests.unit.local_evaluation import LOCAL, run

models = local_evaluation.models


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


ROLLING = ("--include-path", str(LOCAL / "local"), "--tasks", "local_rolling", "--limit", "1")

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

    assert harness_tasks.task_manager(options("local_choice"), Manager).all_tasks == ["local_choice"]
    assert "gsm8k" in harness_tasks.task_manager(options("local_choice", "gsm8k"), Manager).all_tasks
    with pytest.raises(UserError) as error:
        harness_tasks.task_manager(options("local_choise", "mmul"), Manager)
    assert error.value.problems == [
        "--tasks local_choise: unknown task (did you mean local_choice?)",
        "--tasks mmul: unknown task (did you mean mmlu?)",
    ]


def test_models_that_are_not_ours(models, tmp_path):
    with pytest.raises(UserError, match="give --objective ar"):
        run(models, tmp_path, *ROLLING, "--objective", "mdlm", model="qwen3")
    with pytest.raises(UserError, match="not an autoregressive model of a supported family"):
        run(models, tmp_path, *ROLLING, "--objective", "ar")


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
    monkeypatch.setattr(evaluate, "markdown", lambda runs: pytest.fail("a fault of ours"))
    with pytest.raises(pytest.fail.Exception):
        evaluate._write(tmp_path, {"model": "m"}, [])
    assert json.loads((tmp_path / "results.json").read_text()) == {"model": "m"}


def test_a_place_that_takes_no_results_is_found_first(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda *a: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^--out {tmp_path / 'file' / 'out'}: cannot be written"):
        evaluate.main(["--model", "m", "--out", str(tmp_path / "file" / "out"), "--valid-data-path", "x"])


def test_a_wrong_model_leaves_no_results_directory(tmp_path):
    for model in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=f"^--model {model}: "):
            evaluate.main(["--model", str(model), "--out", str(tmp_path / "new" / "out"), "--valid-data-path", "x"])
    assert not list(tmp_path.iterdir())


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
    assert not read_config(str(tmp_path / "eval.yaml"), problems := []).get("include_path") and not problems


def test_every_file_of_launch_eval_is_read():
    """Few-shot counts as published: MMLU 5, ARC-C 0, RACE 0, BBH 3, GSM8K 8, MBPP 4."""
    shots = {}
    for path in sorted(LOCAL.glob("*.yaml")):
        problems: list[str] = []
        values = read_config(str(path), problems)
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
    assert "| GSM8K | 8 | exact_match (strict-match) | 50.0% ± 1.0% | 80.0% | 77.2% | 70.9% | 66.4% | 91.8% |" in page
    assert all(published.source in page for published in PUBLISHED.values())
    run["tasks"] = {"local_rolling": {"bits_per_byte,none": 0.75}}
    assert "| bits_per_byte | 0.750 |" in markdown([run])


def test_a_models_fingerprint_is_not_changed_by_its_own_evaluation(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = evaluate._fingerprint(tmp_path)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "answers.jsonl").write_text("{}")
    assert evaluate._fingerprint(tmp_path) == before
    (tmp_path / "weights").write_text("x")
    assert evaluate._fingerprint(tmp_path) != before


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


def test_offline_task_file_of_the_docs(models, tmp_path, monkeypatch):
    """The task file that docs/evaluation.md shows, on a few questions in the published format."""
    page = (LOCAL.parents[1] / "docs" / "evaluation.md").read_text()
    ((name, text),) = re.findall(r"```yaml\n# tasks/(\S+)\n(.*?)```", page, re.DOTALL)
    gsm8k = tmp_path / "data" / "gsm8k"
    for directory in (tmp_path / "tasks", gsm8k):
        directory.mkdir(parents=True)
    (tmp_path / "tasks" / name).write_text(text)
    for split in ("train", "test"):
        line = json.dumps({"question": f"1 + 1 in {split}?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"})
        (gsm8k / f"{split}.jsonl").write_text(f"{line}\n" * 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    asked: list[str] = []
    monkeypatch.setattr(
        HarnessModel,
        "generate_until",
        lambda model, requests: [[asked.append(request.args[0]), "so 2\n#### 2"][1] for request in requests],
    )
    content = run(models, tmp_path / "out", "--include-path", "tasks", "--tasks", "gsm8k_local", "--num-fewshot", "1")
    assert content["tasks"]["gsm8k_local"]["exact_match,strict-match"] == 1
    assert "in train?" in asked[0] and asked[0].endswith("in test?\nAnswer:")
