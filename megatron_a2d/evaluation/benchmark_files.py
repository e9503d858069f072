"""Files of published benchmarks as the harness's data sets, for machines without a network (--data-dir).

Tasks, prompts and metrics stay the harness's. Only where it would download a data set of the hub, the rows are read
from DATA_DIR/FOLDER: as a copy of the hub's repository, or as the authors' own release (`BENCHMARKS`).
"""

from __future__ import annotations

import ast
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_a2d.utils.atomic_write import read_json
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.parsing import ParseError, parse_json

Row = dict[str, Any]
_LFS_POINTER = b"version https://git-lfs"
# Harness's `dataset_path` of tasks whose `data_files` are local already.
_LOADERS = ("json", "csv", "parquet", "text", "arrow")


@dataclass(frozen=True)
class Form:
    """One form of a benchmark's files. In `patterns`, {name} is the data set's configuration and {split} its split."""

    patterns: tuple[str, ...]
    source: str
    """where they come from, for error messages"""
    read: Callable[[Path, str], list[Row]]
    """(file, split) -> its rows, in the file's own form"""
    to_rows: Callable[[list[Row]], list[Row]] = list
    """rows of all files -> rows as the harness's task reads them"""
    split_names: tuple[tuple[str, str], ...] = ()
    """split -> its spelling in `patterns`, if that differs"""

    def files(self, folder: Path, name: str, split: str) -> list[Path]:
        spelling = dict(self.split_names).get(split, split)
        return sorted(
            path for pattern in self.patterns for path in folder.glob(pattern.format(name=name, split=spelling))
        )

    def expected(self, folder: Path, name: str, split: str) -> str:
        spelling = dict(self.split_names).get(split, split)
        return f"{folder / self.patterns[0].format(name=name, split=spelling)} ({self.source})"


@dataclass(frozen=True)
class Benchmark:
    folder: str
    """under --data-dir"""
    splits: tuple[str, ...]
    """what the recipes of launch/eval read"""
    columns: dict[str, type | tuple[type, ...]]
    """of each row: column -> type"""
    forms: tuple[Form, ...]
    """the first that is there is read"""
    optional_splits: tuple[str, ...] = ()
    """what other numbers of shots than the recipes' read"""
    is_whole: Callable[[Row], bool] = lambda row: True
    """whether what is in a row's columns is what the harness will look for there"""


def _parquet(path: Path, split: str) -> list[Row]:
    from pyarrow import ArrowException, parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
        reason = "a Git LFS pointer, run git lfs pull" if is_pointer else " ".join(str(error).split())[:200]
        raise UserError(f"--data-dir: {path}: cannot be read as Parquet ({reason}); download it again") from None


def _json_lines(path: Path, split: str) -> list[Row]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = parse_json(line)
            except ParseError as error:
                raise UserError(f"--data-dir: {path}: line {number} is not JSON ({error}); download it again") from None
            rows.append(row if isinstance(row, dict) else {})
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data-dir: {path}: cannot be read ({error}); download it again") from None


def _mmlu_csv(path: Path, split: str) -> list[Row]:
    """Without header: question, four choices, the letter of the answer."""
    rows = list(csv.reader(io.StringIO(_text(path), newline="")))
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5].strip() not in tuple("ABCD"):
            raise UserError(
                f"--data-dir: {path}: row {number} is not a question, four choices and a letter from A to D; "
                "download it again"
            )
    return [{"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5].strip())} for row in rows]


def _arc_rows(rows: list[Row]) -> list[Row]:
    """AI2's release nests the choices in the question."""
    found = []
    for row in rows:
        asked = row.get("question")
        nested = asked if isinstance(asked, dict) else {}
        choices = nested.get("choices")
        choices = choices if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices) else []
        columns = {key: [choice.get(key) for choice in choices] for key in ("text", "label")} if choices else None
        found.append({"question": nested.get("stem"), "choices": columns, "answerKey": row.get("answerKey")})
    return found


def _bbh_json(path: Path, split: str) -> list[Row]:
    examples = read_json(path, "the examples of a task").get("examples")
    return [row if isinstance(row, dict) else {} for row in examples] if isinstance(examples, list) else []


def _race_text(path: Path, split: str) -> list[Row]:
    """One article with all its questions."""
    found = read_json(path, "an article with questions")
    columns = [found.get(key) for key in ("questions", "options", "answers")]
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):  # type: ignore[arg-type]
        raise UserError(f"--data-dir: {path}: numbers of questions, options and answers differ; download it again")
    return [
        {"article": found.get("article"), "question": question, "options": options, "answer": answer}
        for question, options, answer in zip(*columns, strict=True)  # type: ignore[arg-type]
    ]


def _race_rows(rows: list[Row]) -> list[Row]:
    """Questions with their article -> articles with their questions, as EleutherAI/race has them."""
    articles: dict[Any, list[Row]] = {}
    for row in rows:
        problem = {key: row.get(key) for key in ("question", "answer", "options")}
        articles.setdefault(row.get("article"), []).append(problem)
    return [{"article": article, "problems": repr(problems)} for article, problems in articles.items()]


def _race_problems(rows: list[Row]) -> list[Row]:
    """The harness reads the problems from a Python literal; a list is written as one."""
    return [row | {"problems": repr(row["problems"])} if isinstance(row.get("problems"), list) else row for row in rows]


def _mbpp_jsonl(path: Path, split: str) -> list[Row]:
    """The paper's splits (Austin et al. 2021): tasks 1 to 10 are for prompts, 11 to 510 the test."""
    tasks = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
    return [row for row in _json_lines(path, split) if row.get("task_id") in tasks[split]]


def _hub(repository: str, to_rows: Callable[[list[Row]], list[Row]] = list) -> Form:
    """Parquet files of the hub, of the main branch or of `refs/convert/parquet`."""
    patterns = ("{name}/{split}-*.parquet", "{name}/{split}/*.parquet")
    return Form(patterns, f"{repository} on the hub", _parquet, to_rows)


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)


def _is_mmlu(row: Row) -> bool:
    return _are_texts(row["choices"]) and len(row["choices"]) == 4 and row["answer"] in range(4)


def _is_arc(row: Row) -> bool:
    texts, labels = row["choices"].get("text"), row["choices"].get("label")
    return _are_texts(texts) and _are_texts(labels) and len(texts) == len(labels) and row["answerKey"] in labels


def _is_race(row: Row) -> bool:
    problems = ast.literal_eval(row["problems"])
    return isinstance(problems, list) and all(
        isinstance(problem, dict)
        and isinstance(problem.get("question"), str)
        and _are_texts(problem.get("options"))
        and problem.get("answer") in tuple("ABCD"[: len(problem["options"])])
        for problem in problems
    )


# `dataset_path` of the harness's task -> its files.
BENCHMARKS: dict[str, Benchmark] = {
    "openai/gsm8k": Benchmark(
        "gsm8k", ("train", "test"), {"question": str, "answer": str},
        (
            _hub("openai/gsm8k"),
            Form(("{split}.jsonl",), "github.com/openai/grade-school-math, grade_school_math/data", _json_lines),
        ),
    ),
    "cais/mmlu": Benchmark(
        "mmlu", ("dev", "test"), {"question": str, "choices": list, "answer": int},
        (
            _hub("cais/mmlu"),
            Form(("{split}/{name}_{split}.csv",), "data.tar of github.com/hendrycks/test", _mmlu_csv),
        ),
        is_whole=_is_mmlu,
    ),
    "allenai/ai2_arc": Benchmark(
        "arc", ("test",), {"question": str, "choices": dict, "answerKey": str},
        (
            _hub("allenai/ai2_arc"),
            Form(
                ("{name}/{name}-{split}.jsonl",), "ARC-V1-Feb2018-2.zip of AI2", _json_lines, _arc_rows,
                (("train", "Train"), ("validation", "Dev"), ("test", "Test")),
            ),
        ),
        optional_splits=("train", "validation"),
        is_whole=_is_arc,
    ),
    "EleutherAI/race": Benchmark(
        "race", ("test",), {"article": str, "problems": str},
        (
            Form(("race_{name}_{split}.jsonl",), "EleutherAI/race on the hub", _json_lines, _race_problems),
            _hub("ehovy/race", to_rows=_race_rows),
            Form(("{split}/{name}/*.txt",), "RACE.tar.gz of its authors", _race_text, _race_rows),
        ),
        is_whole=_is_race,
    ),
    "SaylorTwift/bbh": Benchmark(
        "bbh", ("test",), {"input": str, "target": str},
        (
            _hub("SaylorTwift/bbh"),
            Form(("{name}.json",), "github.com/suzgunmirac/BIG-Bench-Hard, bbh", _bbh_json),
        ),
    ),
    "google-research-datasets/mbpp": Benchmark(
        "mbpp", ("prompt", "test"), {"text": str, "code": str, "test_list": list, "test_setup_code": (str, type(None))},
        (
            _hub("google-research-datasets/mbpp"),
            Form(("mbpp.jsonl",), "github.com/google-research/google-research, mbpp", _mbpp_jsonl),
        ),
        is_whole=lambda row: _are_texts(row["test_list"]),
    ),
}  # fmt: skip


def read_benchmark(data_dir: Path, dataset_path: str, name: str | None) -> dict[str, list[Row]]:
    """Split -> rows of a benchmark's configuration `name`, as the harness's task reads them.

    UserError if a file is missing or has other contents.
    """
    benchmark = BENCHMARKS[dataset_path]
    folder, name = data_dir / benchmark.folder, name or ""
    found = {}
    for split in (*benchmark.splits, *benchmark.optional_splits):
        form = next((form for form in benchmark.forms if form.files(folder, name, split)), None)
        if form is None and split in benchmark.optional_splits:
            continue
        if form is None:
            expected = "; or ".join(form.expected(folder, name, split) for form in benchmark.forms)
            raise UserError(f"--data-dir {data_dir}: the {split} split of {dataset_path} is missing: give {expected}")
        files = form.files(folder, name, split)
        rows = form.to_rows([row for path in files for row in form.read(path, split)])
        where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        found[split] = [_checked(row, benchmark, where, number) for number, row in enumerate(rows, 1)]
        if not rows:
            raise UserError(
                f"--data-dir: {where}: has no row of the {split} split of {dataset_path}; download it again"
            )
    return found


def _checked(row: Row, benchmark: Benchmark, where: str, number: int) -> Row:
    """The columns of a row that the harness reads. UserError if they have other types or contents."""
    if "problems" in row:
        try:
            ast.literal_eval(row["problems"])
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise UserError(
                f"--data-dir: {where}: problems of row {number} are not a list; download it again"
            ) from None
    for column, kind in benchmark.columns.items():
        if not isinstance(row.get(column), kind):
            raise UserError(
                f"--data-dir: {where}: {column} of row {number} is {str(row.get(column))[:40]!r}, which this "
                "benchmark does not allow; download it again"
            )
    if not benchmark.is_whole(row):
        raise UserError(
            f"--data-dir: {where}: row {number} lacks the choices, answer or tests of this benchmark; download it again"
        )
    return {column: row.get(column) for column in benchmark.columns}


@contextmanager
def reading_from(data_dir: Path | None) -> Iterator[None]:
    """While tasks are loaded, read their data sets from files of `data_dir`; with None the harness downloads them."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    original = ConfigurableTask.download
    if data_dir is None:
        yield
        return

    def read(task: Any, *arguments: Any, **named: Any) -> None:
        if task.DATASET_PATH in _LOADERS or callable(task.config.custom_dataset):
            original(task, *arguments, **named)
            return
        if task.DATASET_PATH not in BENCHMARKS:
            raise UserError(
                f"--data-dir {data_dir}: task {task.config.task} reads {task.DATASET_PATH}, which this flag does not "
                f"support ({_listed(list(BENCHMARKS))} are); leave it out, or write a task for your files"
            )
        rows = read_benchmark(data_dir, task.DATASET_PATH, task.DATASET_NAME)
        task.dataset = datasets.DatasetDict({split: datasets.Dataset.from_list(rows[split]) for split in rows})

    ConfigurableTask.download = read
    try:
        yield
    finally:
        ConfigurableTask.download = original


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1]
