"""A few made-up questions of each published benchmark, written in every form that --data-dir reads."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pyarrow
import yaml
from pyarrow import parquet

TASKS = Path(lm_eval.tasks.__path__[0])
SUBJECTS = sorted(
    yaml.safe_load(path.read_text())["dataset_name"] for path in (TASKS / "mmlu" / "default").glob("mmlu_*.yaml")
)
BBH = sorted(
    path.stem for path in (TASKS / "bbh" / "cot_fewshot").glob("*.yaml") if not path.name.startswith("_")
)  # fmt: skip
COUNT = 2  # questions of a split

Row = dict[str, Any]


def gsm8k(split: str) -> list[Row]:
    return [
        {"question": f"What is {n} + 1, {split}?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"}
        for n in range(9 if split == "train" else COUNT)
    ]


def mmlu(subject: str, split: str) -> list[Row]:
    return [
        {
            "question": f'Of "{subject}", {split}, {n}?',
            "choices": ["one", "two, or so", "3\u2028x", "four"],
            "answer": n % 4,
        }
        for n in range(5 if split == "dev" else COUNT)
    ]


def arc(split: str) -> list[Row]:
    labels = ["A", "B", "C", "D"]
    return [
        {"id": f"Mercury_{n}", "question": f"Which is {n}, {split}?", "answerKey": labels[n % 4],
         "choices": {"text": [str(n + k) for k in range(4)], "label": labels}}
        for n in range(COUNT)
    ]  # fmt: skip


def race(split: str) -> list[Row]:
    """Questions, two of each article."""
    return [
        {"example_id": f"high{n}.txt", "article": f"Story {n} of {split}.", "answer": "ABCD"[(n + k) % 4],
         "question": f"What of {n}? _ .", "options": [f"{letter} {n} {k}" for letter in "wxyz"]}
        for n in range(COUNT) for k in range(2)
    ]  # fmt: skip


def bbh(task: str) -> list[Row]:
    return [{"input": f"{task} {n}: is it true?", "target": "True"} for n in range(COUNT)]


def mbpp() -> list[Row]:
    return [
        {"task_id": n, "text": f"Write a function to add {n}.", "code": f"def add(x):\r\n  return x + {n}",
         "test_list": [f"assert add({k}) == {n + k}" for k in range(3)], "test_setup_code": "", "challenge_test_list": []}
        for n in (*range(1, 11), 11, 12, 511, 601)
    ]  # fmt: skip


def mbpp_split(split: str) -> list[Row]:
    tasks = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
    return [row for row in mbpp() if row["task_id"] in tasks[split]]


def _write_parquet(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def _write_lines(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_hub(root: Path, subjects: Sequence[str] = SUBJECTS, tasks: Sequence[str] = BBH) -> Path:
    """As the hub's repositories hold them."""
    shard = "00000-of-00001.parquet"
    for split in ("train", "test"):
        _write_parquet(root / "gsm8k" / "main" / f"{split}-{shard}", gsm8k(split))
    for subject in subjects:
        for split in ("dev", "test"):
            _write_parquet(root / "mmlu" / subject / f"{split}-{shard}", mmlu(subject, split))
    for split in ("train", "validation", "test"):
        _write_parquet(root / "arc" / "ARC-Challenge" / f"{split}-{shard}", arc(split))
    _write_parquet(root / "race" / "high" / f"test-{shard}", race("test"))
    for task in tasks:
        _write_parquet(root / "bbh" / task / "test" / "0000.parquet", bbh(task))  # as in refs/convert/parquet
    for split in ("train", "validation", "test", "prompt"):
        _write_parquet(root / "mbpp" / "full" / f"{split}-{shard}", mbpp_split(split))
    return root


def write_released(root: Path, subjects: Sequence[str] = SUBJECTS, tasks: Sequence[str] = BBH) -> Path:
    """As their authors released them."""
    for split in ("train", "test"):
        _write_lines(root / "gsm8k" / f"{split}.jsonl", gsm8k(split))
    for subject in subjects:
        for split in ("dev", "test"):
            path = root / "mmlu" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                csv.writer(file).writerows(
                    [row["question"], *row["choices"], "ABCD"[row["answer"]]] for row in mmlu(subject, split)
                )
    for split, name in (("train", "Train"), ("validation", "Dev"), ("test", "Test")):
        _write_lines(root / "arc" / "ARC-Challenge" / f"ARC-Challenge-{name}.jsonl", map(_nested, arc(split)))
    for n in range(COUNT):
        own = [row for row in race("test") if row["example_id"] == f"high{n}.txt"]
        article = {"article": own[0]["article"], "id": f"high{n}.txt", "answers": [row["answer"] for row in own]}
        article |= {"questions": [row["question"] for row in own], "options": [row["options"] for row in own]}
        path = root / "race" / "test" / "high" / f"{n}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(article))
    (root / "bbh").mkdir()
    for task in tasks:
        (root / "bbh" / f"{task}.json").write_text(json.dumps({"canary": "...", "examples": bbh(task)}))
    _write_lines(root / "mbpp" / "mbpp.jsonl", mbpp())
    return root


def _nested(row: Row) -> Row:
    choices = [
        {"text": text, "label": label}
        for text, label in zip(*(row["choices"][key] for key in ("text", "label")), strict=True)
    ]
    return {"id": row["id"], "question": {"stem": row["question"], "choices": choices}, "answerKey": row["answerKey"]}
