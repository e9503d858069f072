"""What other people's names and texts can do to a terminal, and to the error lines that scripts read: nothing."""

from __future__ import annotations

import ast
import errno
import io
import os
import unicodedata
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megatron_a2d.terminal.console import PlainConsole, entry_point, progress
from megatron_a2d.utils.errors import SaveError, UserError
from megatron_a2d.utils.printable import LONGEST, lines_of, one_line, print_text

ROOT = Path(__file__).resolve().parents[2]
EVIL = "a\x1b[2Jb\nerror: forged\r\u2028\u202e[red]x[/x]:smile:\x07\x9b\udcff"


def moves_a_cursor(text: str) -> bool:
    return any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter == "\u202e" for letter in text)


def test_a_line_is_one_line_of_visible_characters() -> None:
    line = one_line(EVIL)
    assert not moves_a_cursor(line) and len(line.splitlines()) == 1
    assert line == r"a\x1b[2Jb\nerror: forged\r\u2028\u202e[red]x[/x]:smile:\x07\x9b\udcff"
    assert one_line("grüße, 世界 👩‍🚀, 3 ± 1") == "grüße, 世界 👩‍🚀, 3 ± 1"
    assert one_line(one_line(EVIL)) == one_line(EVIL)
    for code in range(0x10000):
        letter = chr(code)
        assert not moves_a_cursor(one_line(letter)) and len(f"a{one_line(letter)}b".splitlines()) == 1


def test_a_text_keeps_its_lines() -> None:
    assert lines_of("a\n\tb\x1b[2J\rc") == "a\n\tb\\x1b[2J\\rc"


def test_the_middle_of_a_long_line_is_left_out() -> None:
    line = one_line("begin" + "x" * 10**6 + "remedy")
    assert len(line) < LONGEST + 20 and line.startswith("begin") and line.endswith("remedy") and " [...] " in line


def ended_by(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[object, list[str]]:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        entry_point(main)
    return end.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError(f"--load {EVIL}: wrong"), 2),
        (SaveError(f"{EVIL}: not written"), 74),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", EVIL), 2),
        (PermissionError(errno.EACCES, "Permission denied", b"dir\nerror: forged\xff"), 2),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 10**5), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 74),
    ],
)
def test_an_error_is_one_line_whatever_it_quotes(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, lines = ended_by(error, capsys)
    assert ended == code and len(lines) == 1
    assert lines[0].startswith("error: ") and not moves_a_cursor(lines[0])


def test_two_problems_are_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended_by(UserError(["a\nb", "c"]), capsys) == (2, ["error: a\\nb", "error: c"])


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error", "file"), ConnectionRefusedError(errno.ECONNREFUSED, "refused")],
)
def test_a_failing_disk_or_network_is_no_fault_of_the_user(error: OSError) -> None:
    def main() -> None:
        raise error

    with pytest.raises(OSError, match=r"Input|refused"):
        entry_point(main)


def shown(*renderables: object, width: int = 200) -> str:
    stream = io.StringIO()
    PlainConsole(file=stream, width=width, force_terminal=False).print(*renderables, soft_wrap=True)
    return stream.getvalue()


def test_the_consoles_text_is_data() -> None:
    table = Table("head", title=EVIL)
    table.add_row(EVIL)
    for output in (shown(EVIL), shown(table), shown(Text(EVIL)), shown(Panel("x", title=Text("a\x1b[2Jb")))):
        assert not moves_a_cursor(output.replace("\n", "")) and "\x1b" not in output
        assert "\\x1b[2J" in output
    assert "[red]x[/x]:smile:" in shown(EVIL) and "[red]x[/x]:smile:" in shown(table)
    assert len(shown(EVIL).splitlines()) == 1


def test_progress_takes_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("[/x]\x1b", 1.0, "B") as advance:
        advance(1.0)
    assert "[/x]\\x1b" in capsys.readouterr().err


def test_progress_ends_at_100_percent_of_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reading", 10.0, "B") as advance:
        advance(7.0)
    shown = capsys.readouterr().err
    assert "100%" in shown and "7 B" in shown


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_models_text_on_a_terminal_and_in_a_file(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "isatty", lambda descriptor: is_terminal)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    print_text("one\n\x1b]0;title\x07two")
    assert capsys.readouterr().out == ("one\n\\x1b]0;title\\x07two\n" if is_terminal else "one\n\x1b]0;title\x07two\n")


def test_nothing_is_printed_past_the_one_function() -> None:
    """`print` and rich's own Console know nothing of all this: no file of the product calls them."""
    found, files = [], 0
    for package in ("megatron_a2d", "data_prep", "checkpoints_tools", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            files += 1
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id in ("print", "Console")
                ):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert files > 100 and not found


def test_files_are_parsed_by_the_one_reader() -> None:
    """What else parses JSON, YAML or a tokenizer, and why it may."""
    known = {
        "megatron_a2d/utils/parsing.py", "megatron_a2d/utils/tokenizer.py",
        "megatron_a2d/conversion/resumable_output.py", "megatron_a2d/evaluate.py",  # what this process wrote just now
        "megatron_a2d/distributed/hang_watchdog.py", "megatron_a2d/preflight/node_checks.py",  # of our own processes
        "megatron_a2d/planner/calibration.py",  # a file of the package
        "data_prep/formats.py",  # millions of lines
    }  # fmt: skip
    found = set()
    for package in ("megatron_a2d", "data_prep", "checkpoints_tools"):
        for path in (ROOT / package).rglob("*.py"):
            if any(
                call in path.read_text()
                for call in ("json.loads(", "json.load(", "yaml.safe_load(", "yaml.load(", "r.from_file(")
            ):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == known
