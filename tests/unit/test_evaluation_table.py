"""Several models in one table: every family as it is published, what each one's files say, and results of several runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_a2d import evaluate
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.evaluation import loglikelihood
from megatron_a2d.evaluation.published_scores import PUBLISHED, published_table
from megatron_a2d.evaluation.score_table import markdown
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.tokenizer import read_tokenizer
from tests import tiny
from tests.cases import as_trained
from tests.fixtures.record_public_models import MASK_TOKEN_ID, write_recorded
from tests.unit.local_evaluation import LOCAL
from tests.unit.model_damage import edit_config

LOCAL_TASKS = (
    "--include-path", str(LOCAL / "local"), "--limit", "2", "--mc-num", "4", "--max-new-tokens", "8", "--num-steps", "4",
)  # fmt: skip
BLOCK = 4

# name -> objective, label shift, mask token, block length
DIFFUSION: dict[str, tuple[str, bool, int, int]] = {
    "dream": ("mdlm", True, MASK_TOKEN_ID, 0),
    "llada": ("mdlm", False, MASK_TOKEN_ID, 0),
    "llada_moe": ("mdlm", False, MASK_TOKEN_ID, 0),
    "a2d": ("mdlm", True, tiny.MASK_TOKEN_ID, 0),
    "rnd1": ("mdlm", True, tiny.MASK_TOKEN_ID, 0),
    "sdar": ("mdlm", False, tiny.MASK_TOKEN_ID, BLOCK),
    "run": ("mdlm", False, tiny.MASK_TOKEN_ID, BLOCK),
}
BASES = ("qwen3", "qwen2", "llama")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models: of each family as on the hub, our exports' forms, and a checkpoint of a run."""
    root = tmp_path_factory.mktemp("zoo")
    for name, kind in (("qwen3", "dense"), ("qwen2", "qwen2"), ("llama", "llama")):
        tiny.write_hf(root / name, kind)
    for name in ("dream", "llada", "llada_moe"):
        write_recorded(root / name, name)
    forms: dict[str, tuple[str, dict[str, Any]]] = {
        "a2d": ("dense", {"architectures": ["A2DForMaskedLM"], "label_shift": True}),
        "rnd1": ("moe", {"architectures": ["RND1"], "label_shift": True}),
        "sdar": ("dense", {"architectures": ["SDARForCausalLM"], "block_size": BLOCK}),
    }
    for seed, (name, (kind, config)) in enumerate(forms.items(), 1):
        tiny.write_hf(root / name, kind, seed=seed)
        edit_config(root / name, model_type=name, mask_token_id=tiny.MASK_TOKEN_ID, **config)
    convert(root / "qwen3", root / "checkpoint", verify=False)
    as_trained(root / "checkpoint", root / "run", {"objective": "block", "block_length": BLOCK, "label_shift": False})
    return {name: root / name for name in (*DIFFUSION, *BASES)}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The flags of all evaluations; in blocks of other length than the block models' own."""
    path = tmp_path_factory.mktemp("recipe") / "eval.yaml"
    path.write_text("tasks: [local_choice, local_exact, local_rolling]\nnum_fewshot: 0\nblock_length: 8\n")
    return ("--config", str(path), *LOCAL_TASKS)


@pytest.fixture(scope="module")
def table(zoo: dict[str, Path], recipe: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one command over all of them leaves."""
    out = tmp_path_factory.mktemp("table")
    evaluate.main(["--model", *(f"{name}={path}" for name, path in zoo.items()), "--out", str(out), *recipe])
    return out


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def rows_of(page: str) -> list[dict[str, str]]:
    """The table of tasks: heading -> cell, for each row."""
    lines = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in page.splitlines() if "|" in line]
    heading = next(cells for cells in lines if cells[0] == "task")
    rows = [[cell.strip() for cell in cells] for cells in lines if len(cells) == len(heading)]
    return [dict(zip(heading, cells, strict=True)) for cells in rows if cells[0] not in ("task", "---")]


def test_each_model_is_evaluated_as_its_files_say(table: Path, zoo: dict[str, Path]) -> None:
    for name, (objective, label_shift, mask, block) in DIFFUSION.items():
        content = results(table / name)
        assert content["name"] == name and content["model"] == str(zoo[name]) and content["objective"] == objective
        facts = content["read_from_model"]
        assert (facts["label_shift"], facts["mask_token_id"], facts["block_length"]) == (label_shift, mask, block), name
        assert content["settings"]["sampling"]["block_length"] == (block or 8), "a model's own blocks win over a file"
    for name in BASES:
        content = results(table / name)
        assert content["objective"] == "ar" and "mask_token_id" not in content["read_from_model"]
        assert content["read_from_model"]["end_token_ids"] == [tiny.TURN_END, tiny.END_OF_TEXT]
    assert results(table / "dream")["read_from_model"]["end_token_ids"] == [0]


def test_one_table_has_all_models_and_the_published_ones(table: Path, zoo: dict[str, Path]) -> None:
    page = (table / "results.md").read_text()
    rows = rows_of(page)
    assert list(rows[0]) == ["task", "shots", "metric", *zoo, *PUBLISHED]
    measured = {(row["task"], row["metric"]): row for row in rows}
    for name in zoo:
        expected = results(table / name)["tasks"]["local_rolling"]["bits_per_byte,none"]
        assert float(measured["local_rolling", "bits_per_byte"][name]) == pytest.approx(expected, abs=1e-3)
        assert measured["local_choice", "acc"][name].endswith("%") or "±" in measured["local_choice", "acc"][name]
    assert len({row for row in measured["local_rolling", "bits_per_byte"].values()}) > len(zoo) - 2, "other models"
    assert f"- dream: {zoo['dream']}, mdlm, label shift, mask token {MASK_TOKEN_ID}, ends at 0" in page
    assert f"no label shift, mask token {tiny.MASK_TOKEN_ID}, blocks of {BLOCK}, ends at 2 or 0" in page
    assert f"- llama: {zoo['llama']}, ar, ends at 2 or 0" in page


@torch.no_grad()
def test_autoregressive_bases_are_scored_by_their_next_token(table: Path, zoo: dict[str, Path]) -> None:
    """Bits per byte of the texts, by transformers' own classes."""
    texts = [json.loads(line)["text"] for line in (LOCAL / "local" / "rolling.jsonl").read_text().splitlines()][:2]
    for name in BASES:
        model = AutoModelForCausalLM.from_pretrained(zoo[name], dtype=torch.float32)
        tokenizer = read_tokenizer(zoo[name] / "tokenizer.json", name)
        first = results(table / name)["read_from_model"]["end_token_ids"][1]  # <|endoftext|>, the empty context
        nats = 0.0
        for text in texts:
            tokens = torch.tensor([[first, *tokenizer.encode(text, add_special_tokens=False).ids]])
            scores = model(tokens).logits[0, :-1].log_softmax(-1)
            nats -= float(scores.gather(1, tokens[0, 1:, None]).sum())
        expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
        found = results(table / name)["tasks"]["local_rolling"]["bits_per_byte,none"]
        assert found == pytest.approx(expected, rel=1e-4), name


def test_a_model_of_several_gets_the_results_that_it_gets_alone(
    table: Path, zoo: dict[str, Path], recipe: tuple[str, ...], tmp_path: Path
) -> None:
    evaluate.main(["--model", str(zoo["llada"]), "--out", str(tmp_path), *recipe])
    assert results(tmp_path)["tasks"] == results(table / "llada")["tasks"]


def test_the_same_command_resumes(
    table: Path, zoo: dict[str, Path], recipe: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of all models are kept; where one's are gone, only that one's are computed."""
    before = (table / "results.md").read_text()
    models = ("dream", "qwen3")
    (table / "qwen3" / "answers.jsonl").unlink()
    scored: list[str] = []
    original = loglikelihood._score_group
    monkeypatch.setattr(
        loglikelihood, "_score_group", lambda loaded, *rest: [scored.append(loaded.name), original(loaded, *rest)][1]
    )
    evaluate.main(["--model", *(f"{name}={zoo[name]}" for name in models), "--out", str(table), *recipe])
    assert set(scored) == {str(zoo["qwen3"])}
    columns = [
        {key: cell for key, cell in row.items() if key in ("metric", *models)}
        for row in rows_of((table / "results.md").read_text())
    ]
    assert columns == [{key: row[key] for key in ("metric", *models)} for row in rows_of(before)]


def test_results_of_separate_runs_are_joined(table: Path, zoo: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    """Without a model; runs of one model over different tasks share its column."""
    held = results(table / "llada")
    for task in ("local_choice", "local_rolling"):
        (tmp_path / task).mkdir()
        content = {**held, "tasks": {task: held["tasks"][task]}, "counts": {f"of {task}": 1}}
        (tmp_path / task / "results.json").write_text(json.dumps(content))
    arguments = ["--compare-with", *(str(tmp_path / task) for task in ("local_choice", "local_rolling"))]
    evaluate.main([*arguments, str(table / "qwen3"), "--out", str(tmp_path / "joined")])
    page = (tmp_path / "joined" / "results.md").read_text()
    assert page.rstrip() in capsys.readouterr().out
    rows = rows_of(page)
    assert list(rows[0])[3:5] == ["llada", "qwen3"] and all(row["qwen3"] for row in rows)
    assert {row["task"] for row in rows if row["llada"]} == {"local_choice", "local_rolling"}
    assert "llada: 1 of local_choice." in page and "llada: 1 of local_rolling." in page
    assert not (tmp_path / "joined" / "results.json").exists()
    # Over the same task they are two columns.
    twice = markdown([held, held])
    assert "| llada (1) | llada (2) |" in twice


def test_the_page_of_the_documentation_has_the_published_figures() -> None:
    page = (LOCAL.parents[1] / "docs" / "evaluation.md").read_text()
    shown = page.partition("<!-- published scores -->\n")[2].partition("<!-- end of published scores -->")[0]
    assert shown == published_table()


BAD = {
    "no model": (["--tasks", "a"], "--model: nothing to evaluate"),
    "no model, earlier results": (["--tasks", "a", "--compare-with", "{llada}"], "--model: is missing"),
    "two of a name": (
        ["--model", "{llada}", "{llada}", "--tasks", "a"],
        "two models have the name 'llada'; give NAME=",
    ),
    "a name that is a path": (["--model", "x/y={llada}", "--tasks", "a"], "'x/y' is not a valid name"),
    "one that is not there": (["--model", "{llada}", "/nowhere", "--tasks", "a"], "--model /nowhere: no such"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, table: Path, zoo: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """Found before any model is loaded."""
    monkeypatch.setattr(evaluate, "load_model", lambda *a: pytest.fail("a model was loaded"))
    arguments, message = BAD[case]
    filled = [
        word.format(llada=table / "llada" if "compare" in " ".join(arguments) else zoo["llada"]) for word in arguments
    ]
    with pytest.raises(UserError) as refusal:
        evaluate.main([*filled, "--out", str(tmp_path / "out")])
    assert message in str(refusal.value)
