"""bench/report.py: every block of measurements in the documents is what the result files give."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as batch
from bench import report, result_file
from bench.paired import Comparison, Usage
from bench.result_file import Figure, Result
from megatron_a2d.utils.errors import UserError

FILES = sorted(result_file.RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", report.documents(), ids=lambda path: path.name)
def test_documents_have_what_was_measured(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert report.rewritten(page) == page, "run make bench-report"


def test_every_result_is_shown() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in report.documents())
    shown = {name.partition(", ")[0] for _, name, _ in report.BLOCK.findall(pages)}
    assert {path.stem for path in FILES} - {"gpu"} <= shown


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_stored_ratios_follow_from_the_stored_seconds(path: Path) -> None:
    stored = json.loads(path.read_text())
    for item in stored.get("comparisons", ()):
        assert Comparison.from_json(item).to_json() == item
    assert not re.search(r'"/[a-z]', path.read_text()), "an absolute path"


def written(folder: Path, **changes: Any) -> None:
    """A result file as a benchmark writes it."""
    runs = {"ours": [Usage(2.0, 2.0), Usage(2.0, 4.0), Usage(2.0, 8.0)], "theirs": [Usage(3.0, 3.0)] * 3}
    compared = Comparison("moe", runs, [("theirs", "ours")], figures={"forwards": 3})
    about = {
        "benchmark": "x", "command": "python -m bench.x", "commit": "abc",
        "machine": {"cpu": "C", "cores": 2, "threads": 1, "torch": "2"},
        "comparisons": [compared.to_json()],
        "figures": [Figure("peak, moe", "bytes", [123e6])._asdict()],
    }  # fmt: skip
    (folder / "x_cpu.json").write_text(json.dumps(about | changes))


TABLE = """\
|  | ratio | CPU time | wall time | CPU s | wall s | forwards |
| --- | --- | --- | --- | --- | --- | --- |
| moe | theirs / ours | noisy | 1.50 (1.50 to 1.50) | noisy | 3 / 2 | 3 |

|  | measured |
| --- | --- |
| peak, moe | 123 MB |

Medians (smallest to largest) of 3 rounds in turns. C, 2 cores, 1 thread, torch 2; `python -m bench.x` at abc.
"""


def test_a_block_shows_what_is_steady_and_says_what_is_not(tmp_path: Path) -> None:
    written(tmp_path)
    page = "before\n<!-- bench: x_cpu, moe -->\n1.07x\n<!-- end of bench: x_cpu, moe -->\nafter\n"
    wanted = page.replace("1.07x\n", TABLE)
    assert report.rewritten(page, tmp_path) == wanted == report.rewritten(wanted, tmp_path)
    with pytest.raises(UserError, match=r"x_cpu\.json has nothing of that name"):
        report.block("x_cpu, dense", tmp_path)


@pytest.mark.parametrize("old", [None, {"machine": {}, "ratio": 1.07}])
def test_what_is_not_measured_in_this_form_has_no_figure(old: Any, tmp_path: Path) -> None:
    if old:
        (tmp_path / "x_cpu.json").write_text(json.dumps(old))
    assert report.block("x_cpu", tmp_path) == "*Not measured yet in this form.*\n"


def test_a_block_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match="has no end"):
        report.rewritten("<!-- bench: x -->\n")


def test_check_tells_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- bench: nothing -->\n1.07x\n<!-- end of bench: nothing -->\n")
    monkeypatch.setattr(report, "documents", lambda: [page])
    monkeypatch.setattr(report, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        report.main(["--check"])
    assert "1.07x" in page.read_text() and "page.md: differs from its results" in capsys.readouterr().err
    report.main([])
    assert "1.07x" not in page.read_text()
    report.main(["--check"])


def test_a_result_file_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command without folders of this machine; read again as it was written."""
    words = ["/a/b/bench/convert.py", "--work", "/scratch/disk", "--out", "x.json", "--rounds", "3"]
    monkeypatch.setattr("sys.argv", words)
    compared = Comparison("convert", {"a": [Usage(1.0, 2.0)], "b": [Usage(1.0, 1.0)]}, [("a", "b")], "cold")
    figure = Figure("peak", "bytes", [5.0])
    result_file.write(tmp_path / "x.json", "convert", [compared], [figure], {"bytes": 7})
    found = result_file.read("x", tmp_path)
    assert isinstance(found, Result) and found.comparisons == [compared] and found.figures == [figure]
    assert found.noisy  # of one round
    assert found.about["command"] == "python -m bench.convert --work disk --rounds 3"
    assert found.about["settings"] == {"bytes": 7} and found.about["sources"] == result_file.sources()


def test_what_is_noisy_throughout_is_named_below_the_table(tmp_path: Path) -> None:
    unsteady = [Usage(value, value) for value in (1.0, 2.0, 3.0)]
    compared = Comparison("dense", {"ours": unsteady, "theirs": [Usage(1.0, 1.0)] * 3}, [("theirs", "ours")], "warm")
    figures = [Figure("pause", "s", [1.0, 2.0, 3.0])._asdict(), Figure("peak", "bytes", [123e6])._asdict()]
    written(tmp_path, comparisons=[compared.to_json()], figures=figures)
    shown = report.block("x_cpu", tmp_path)
    assert "ratio" not in shown and "| peak | 123 MB |" in shown
    assert "Too noisy to show: dense, theirs / ours, warm; pause.\n" in shown


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure("x", "bytes", [1.43e9]), "1.43 GB"),
        (Figure("x", "bytes", [1.2e7]), "12 MB"),
        (Figure("x", "", [0.0123]), "0.0123"),
        (Figure("x", "tokens/s", [1e6, 1.01e6, 1.02e6]), "1,010,000 (1,000,000 to 1,020,000) tokens/s"),
        (Figure("x", "ms", [1.0, 2.0, 3.0]), "noisy"),
        (Figure("x", "", [2.5e-7]), "2.5e-07"),
    ],
)
def test_text_of_figures(figure: Figure, text: str) -> None:
    assert figure.text() == text


def test_all_benchmarks_are_there_and_what_is_up_to_date_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Of other code, and noisy, ones are; the order is that of the list."""
    assert all(find_spec(f"bench.{benchmark.module}") for benchmark in batch.BENCHMARKS.values())
    ran: list[str] = []
    monkeypatch.setattr(batch, "run", lambda name, demo, against: ran.append(name))
    monkeypatch.setattr(batch.report, "main", lambda argv: ran.append("report"))
    steady = Comparison("x", {"a": [Usage(1.0, 1.0)] * 3, "b": [Usage(1.0, 1.0)] * 3}, [("a", "b")])
    noisy = Comparison("x", {"a": [Usage(n, n) for n in (1.0, 2.0, 3.0)], "b": [Usage(1.0, 1.0)] * 3}, [("a", "b")])
    about = {"sources": result_file.sources()}
    results = {name: Result(name, [steady], [], about) for name in batch.BENCHMARKS}
    results["convert_cpu"] = Result("convert", [noisy], [], about)
    results["loader_cpu"] = Result("loader", [steady], [], {"sources": "older"})
    results.pop("train_step_cpu")
    monkeypatch.setattr(batch, "read", results.get)
    (tmp_path / "exported").mkdir()
    batch.main(["--demo", str(tmp_path)])
    assert ran == ["train_step_cpu", "convert_cpu", "loader_cpu", "report"]
    assert "noisy in part: convert_cpu" in capsys.readouterr().err
    ran.clear()
    batch.main(["loader_cpu", "aux_loss_cpu"])
    assert ran == ["loader_cpu", "aux_loss_cpu", "report"]
    with pytest.raises(UserError, match="bench nothing: there are train_step_cpu"):
        batch.main(["nothing"])
    ran.clear()
    for words, message in (
        (["--demo", str(tmp_path / "none"), "--all"], "run make demo"),
        (["--demo", str(tmp_path / "exported"), "--all"], "not the directory of a finished demo"),
        (["loader_cpu", "train_step_cpu", "--against", str(tmp_path)], "holds no megatron_a2d"),
        (["loader_cpu", "--against", str(result_file.ROOT)], "only train_step_cpu, start_cpu, .* compare builds"),
    ):
        with pytest.raises(UserError, match=message):
            batch.main(words)
    assert not ran, "refused before anything is measured"


def test_another_build_has_its_commit_or_else_its_folder_as_name(tmp_path: Path) -> None:
    assert result_file.build_name(result_file.ROOT) == f"build {result_file.commit()}"
    (tmp_path / "older" / "megatron_a2d").mkdir(parents=True)
    assert result_file.build_name(tmp_path / "older") == "build older"
