"""Benchmarks from local files (--data-dir): all forms give the same questions, the six recipes run, what is wrong is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_a2d import evaluate
from megatron_a2d.evaluation import code_execution, harness_tasks
from megatron_a2d.evaluation.benchmark_files import BENCHMARKS, read_benchmark
from megatron_a2d.evaluation.harness import HarnessModel
from megatron_a2d.utils.errors import UserError
from tests import tiny
from tests.unit import benchmark_data as data
from tests.unit.local_evaluation import LOCAL
from tests.unit.model_damage import edit_config
from tests.unit.test_code_execution import can_cut_network

NAMES = {
    "openai/gsm8k": "main",
    "cais/mmlu": "anatomy",
    "allenai/ai2_arc": "ARC-Challenge",
    "EleutherAI/race": "high",
    "SaylorTwift/bbh": "navigate",
    "google-research-datasets/mbpp": "full",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.write_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.write_released(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusion model with positions enough for BBH's answers of 1,024 tokens."""
    directory = tiny.write_hf(
        tmp_path_factory.mktemp("model"), "dense", num_hidden_layers=2, max_position_embeddings=1100
    )
    edit_config(
        directory,
        model_type="a2d",
        architectures=["A2DForMaskedLM"],
        mask_token_id=tiny.MASK_TOKEN_ID,
        label_shift=True,
    )
    return directory


@pytest.mark.parametrize("dataset_path", BENCHMARKS)
def test_all_forms_give_the_same_rows(dataset_path: str, hub: Path, released: Path) -> None:
    found = read_benchmark(hub, dataset_path, NAMES[dataset_path])
    assert found == read_benchmark(released, dataset_path, NAMES[dataset_path])
    benchmark = BENCHMARKS[dataset_path]
    assert list(found) == [*benchmark.splits, *benchmark.optional_splits]
    assert all(rows and all(row.keys() == benchmark.columns.keys() for row in rows) for rows in found.values())


def test_the_rows_are_those_of_the_hub(hub: Path) -> None:
    assert read_benchmark(hub, "openai/gsm8k", "main")["train"] == data.gsm8k("train")
    assert read_benchmark(hub, "cais/mmlu", "virology")["dev"] == data.mmlu("virology", "dev")
    assert read_benchmark(hub, "google-research-datasets/mbpp", "full")["prompt"][0]["text"] == data.mbpp()[0]["text"]
    arc = read_benchmark(hub, "allenai/ai2_arc", "ARC-Challenge")["test"]
    assert arc == [{key: row[key] for key in ("question", "choices", "answerKey")} for row in data.arc("test")]


def test_race_of_the_harness_itself(hub: Path, tmp_path: Path) -> None:
    """EleutherAI/race, an article with its problems on each line, as a Python literal or as a list."""
    rows = read_benchmark(hub, "EleutherAI/race", "high")["test"]
    assert len(rows) == data.COUNT and rows[0]["problems"].count("question") == 2
    for problems in (str, eval):
        lines = [json.dumps(row | {"problems": problems(row["problems"])}) for row in rows]
        (tmp_path / "race").mkdir(exist_ok=True)
        (tmp_path / "race" / "race_high_test.jsonl").write_text("\n".join(lines))
        assert read_benchmark(tmp_path, "EleutherAI/race", "high")["test"] == rows


# recipe -> task, metric, words of the data that a prompt must have (of the shots and of the question), flags
RECIPES: dict[str, tuple[str, str, list[str], list[str]]] = {
    "gsm8k": ("gsm8k", "exact_match,strict-match", ["+ 1, train?", "Question: What is 0 + 1, test?"], ["--num-steps", "8"]),
    "mmlu": ("mmlu", "acc,none", ['Of "virology", dev, 4?', "B. two, or so", 'Of "virology", test, 0?'], []),
    "arc_challenge": ("arc_challenge", "acc_norm,none", ["Question: Which is 0, test?\nAnswer:"], ["--mc-num", "4"]),
    "race": ("race", "acc,none", ["Article: Story 0 of test.", "Question: What of 0? _ .\nAnswer: w 0 0\nWhat of 0? _ ."], ["--mc-num", "4"]),
    "bbh": (
        "bbh_cot_fewshot", "exact_match,get-answer", ["navigate 0: is it true?"],
        ["--num-steps", "2", "--block-length", "0", "--max-new-tokens", "8"],
    ),
    "mbpp": (
        "mbpp_in_subprocess", "pass_at_1,none", ["function to add 4.", "[DONE]", "function to add 11."],
        ["--num-steps", "8", "--include-path", str(LOCAL / "tasks"), "--allow-code-execution"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_run_from_local_files(
    recipe: str, hub: Path, released: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tiny random model, as commands; no part of it may reach for the hub."""
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("a download was asked for"))
    for switch in (code_execution.SWITCH, code_execution.NETWORK_SWITCH):
        monkeypatch.setenv(switch, "0")  # what evaluate sets is undone after the test
    asked: list[str] = []
    for name in ("generate_until", "loglikelihood"):
        monkeypatch.setattr(HarnessModel, name, _recorded(getattr(HarnessModel, name), asked))
    task, metric, words, flags = RECIPES[recipe]
    if recipe == "mbpp" and not can_cut_network():
        flags = [*flags, "--allow-code-network"]
    monkeypatch.setattr(harness_tasks, "task_manager", _only_own_folders(harness_tasks.task_manager))
    evaluate.main(
        ["--model", str(model), "--out", str(tmp_path), "--config", str(LOCAL / f"{recipe}.yaml"), "--limit", "1",
         "--data-dir", str(released if recipe in ("gsm8k", "bbh") else hub), *flags]
    )  # fmt: skip
    content = json.loads((tmp_path / "results.json").read_text())
    assert 0 <= content["tasks"][task][metric] <= 1
    assert any(all(word in prompt for word in words) for prompt in asked)
    expected = {"mmlu": 4 * len(data.SUBJECTS), "bbh": len(data.BBH), "arc_challenge": 4, "race": 4}.get(recipe, 1)
    assert len(asked) == expected
    page = (tmp_path / "results.md").read_text()
    assert recipe == "race" or ("% |" in page and "arXiv 2505.09388" in page)


RIGHT = {
    "gsm8k": "It is 0+1.\n#### 1",
    "bbh": "We look. So the answer is True.",
    "mbpp": "def add(x):\n    return x + 11\n[DONE]",
}


@pytest.mark.parametrize("recipe", RIGHT)
def test_right_answers_to_local_questions_count(
    recipe: str, released: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And wrong ones do not: scored by the harness's filters, and programs by running them."""
    for switch in (code_execution.SWITCH, code_execution.NETWORK_SWITCH):
        monkeypatch.setenv(switch, "0")
    task, metric, _, flags = RECIPES[recipe]
    if recipe == "mbpp" and not can_cut_network():
        flags = [*flags, "--allow-code-network"]
    scores = []
    for answer in (RIGHT[recipe], RIGHT[recipe].replace("1", "2").replace("True", "False")):
        monkeypatch.setattr(
            HarnessModel, "generate_until", lambda model, requests, answer=answer: [answer for _ in requests]
        )
        arguments = ["--config", str(LOCAL / f"{recipe}.yaml"), "--limit", "1", "--data-dir", str(released), *flags]
        evaluate.main(["--model", str(model), "--out", str(tmp_path), *arguments])
        scores.append(json.loads((tmp_path / "results.json").read_text())["tasks"][task][metric])
    assert scores == [1, 0]


def test_all_models_get_the_same_questions_and_shots(
    released: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks are loaded once; shots are drawn at random, for each model as for a first one."""
    asked: list[list[str]] = []
    monkeypatch.setattr(
        HarnessModel,
        "generate_until",
        lambda model, requests: [asked.append([r.args[0] for r in requests]), ["#### 1"] * len(requests)][1],
    )
    arguments = ["--config", str(LOCAL / "gsm8k.yaml"), "--data-dir", str(released), "--out", str(tmp_path)]
    evaluate.main(["--model", f"a={model}", f"b={model}", *arguments])
    assert len(asked) == 2 and asked[0] == asked[1] and len(set(asked[0])) == data.COUNT
    shots = [re.findall(r"What is (\d) \+ 1, train", prompt) for prompt in asked[0]]
    assert all(len(set(drawn)) == 8 for drawn in shots) and shots[0] != shots[1]


def _recorded(method: Any, asked: list[str]) -> Any:
    def record(model: Any, requests: Any, *arguments: Any, **named: Any) -> Any:
        asked.extend(request.args[0] + (" " if method.__name__ == "loglikelihood" else "") for request in requests)
        return method(model, requests, *arguments, **named)

    return record


def _only_own_folders(original: Any) -> Any:
    """Without the harness's list of all tasks, which takes seconds: the recipes must not need it."""

    def manager(options: Any, manager_class: Any) -> Any:
        def limited(include_path: Any, include_defaults: bool = True) -> Any:
            assert not include_defaults, "a recipe's tasks were not found in their folder"
            return manager_class(include_path=include_path, include_defaults=False)

        return original(options, limited)

    return manager


WRONG: dict[str, tuple[str, str, Any, str]] = {
    "a missing split": (
        "openai/gsm8k", "gsm8k/train.jsonl", None,
        "the train split of openai/gsm8k is missing: give {0}/gsm8k/main/train-*.parquet (openai/gsm8k on the hub); or "
        "{0}/gsm8k/train.jsonl (github.com/openai/grade-school-math, grade_school_math/data)",
    ),
    "a line that is no JSON": ("openai/gsm8k", "gsm8k/test.jsonl", '{"question"', "test.jsonl: line 1 is not JSON"),
    "a column of another type": (
        "openai/gsm8k", "gsm8k/test.jsonl", '{"question": "a", "answer": 1}', "test.jsonl: answer of row 1 is '1'",
    ),
    "no row": ("openai/gsm8k", "gsm8k/test.jsonl", "", "has no row of the test split of openai/gsm8k"),
    "a list in place of a row": ("openai/gsm8k", "gsm8k/test.jsonl", "[1]", "question of row 1 is 'None'"),
    "no tests in the release": ("google-research-datasets/mbpp", "mbpp/mbpp.jsonl", '{"task_id": 3}', "text of row 1"),
    "a fifth choice": ("cais/mmlu", "mmlu/test/anatomy_test.csv", "q,a,b,c,d,e,A", "row 1 is not a question, four choices"),
    "an answer that is no letter": ("cais/mmlu", "mmlu/test/anatomy_test.csv", "q,a,b,c,d,E", "a letter from A to D"),
    "choices that are not nested": (
        "allenai/ai2_arc", "arc/ARC-Challenge/ARC-Challenge-Test.jsonl", '{"question": "a", "answerKey": "A"}',
        "question of row 1 is 'None'",
    ),
    "no choices": (
        "allenai/ai2_arc", "arc/ARC-Challenge/ARC-Challenge-Test.jsonl", '{"question": {"stem": "a"}, "answerKey": "A"}',
        "choices of row 1 is 'None'",
    ),
    "fewer answers than questions": (
        "EleutherAI/race", "race/test/high/0.txt", '{"article": "a", "questions": ["b"], "options": [["c"]], "answers": []}',
        "numbers of questions, options and answers differ",
    ),
    "problems that are no literal": (
        "EleutherAI/race", "race/race_high_test.jsonl", '{"article": "a", "problems": "open(1)"}', "problems of row 1 are no",
    ),
    "an answer that is no choice": (
        "allenai/ai2_arc", "arc/ARC-Challenge/ARC-Challenge-Test.jsonl",
        '{"question": {"stem": "a", "choices": [{"text": "b", "label": "A"}]}, "answerKey": "B"}', "row 1 lacks the choices",
    ),
    "an answer beyond the options": (
        "EleutherAI/race", "race/test/high/0.txt",
        '{"article": "a", "questions": ["b"], "options": [["c", "d"]], "answers": ["C"]}', "row 1 lacks the choices",
    ),
    "tests that are no programs": (
        "google-research-datasets/mbpp", "mbpp/mbpp.jsonl",
        '{"task_id": 3, "text": "a", "code": "b", "test_list": [1], "test_setup_code": ""}', "row 1 lacks the choices",
    ),
    "no examples": ("SaylorTwift/bbh", "bbh/navigate.json", '{"examples": {}}', "has no row of the test split of SaylorTwift/bbh"),
    "an example that is none": (
        "SaylorTwift/bbh", "bbh/navigate.json", '{"examples": [{"input": "a", "target": "b"}, 1]}', "input of row 2 is 'None'",
    ),
    "a Git LFS pointer": (
        "openai/gsm8k", "gsm8k/main/test-0.parquet", "version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer",
    ),
    "no Parquet": ("openai/gsm8k", "gsm8k/main/test-0.parquet", "PAR1", "cannot be read as Parquet"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(case: str, tmp_path: Path) -> None:
    dataset_path, name, content, message = WRONG[case]
    data.write_released(tmp_path, subjects=["anatomy"], tasks=["navigate"])
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as refusal:
        read_benchmark(tmp_path, dataset_path, NAMES[dataset_path])
    assert len(refusal.value.problems) == 1 and message.format(tmp_path) in str(refusal.value)


def test_it_is_said_before_a_model_is_loaded(model: Path, released: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(evaluate, "load_model", lambda *a: pytest.fail("a model was loaded"))
    common = ["--model", str(model), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="the train split of openai/gsm8k is missing"):
        evaluate.main([*common, "--config", str(LOCAL / "gsm8k.yaml"), "--data-dir", str(tmp_path)])
    with pytest.raises(UserError, match="--data-dir /nowhere: there is no such directory"):
        evaluate.main([*common, "--tasks", "gsm8k", "--data-dir", "/nowhere"])
    (tmp_path / "other.yaml").write_text(
        "task: other\ndataset_path: someone/else\noutput_type: generate_until\ntest_split: test\ndoc_to_text: a\n"
        "doc_to_target: b\n"
    )
    arguments = ["--tasks", "other", "--include-path", str(tmp_path), "--data-dir", str(released)]
    with pytest.raises(UserError, match="task other reads someone/else, which this flag does not support"):
        evaluate.main([*common, *arguments])
    assert not (tmp_path / "out" / "results.json").exists()
