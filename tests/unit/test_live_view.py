"""The live view of generation: tokens where they are decided, control characters, the text left in the terminal."""

from __future__ import annotations

import io
import re

from rich.console import Console

from megatron_a2d import generate
from megatron_a2d.terminal.live_view import MASK_BLOCK, LiveView
from tests.unit import tiny_exports
from tests.unit.tiny_exports import byte_tokenizer

exports = tiny_exports.exports


def terminal(width: int = 60, height: int = 12) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        width=width,
        height=height,
        legacy_windows=False,
    )


def test_live_view_shows_tokens_where_they_are_decided():
    console = terminal()
    tokenizer = byte_tokenizer()
    prompt, hole = (
        tokenizer.encode("a = ").ids,
        tokenizer.encode("1\u20ac2").ids,
    )  # the euro sign has three bytes
    editable = [[False] * len(prompt) + [True] * len(hole)]
    start = len(prompt)
    with LiveView([prompt + [0] * len(hole)], editable, 3, tokenizer.decode, console) as view:
        assert view.text(0).plain == "a = " + MASK_BLOCK * len(hole)
        row, decided = prompt + [0] * len(hole), [False] * (start + len(hole))
        row[start + len(hole) - 1], decided[start + len(hole) - 1] = hole[-1], True
        view.update(1, [row], [decided])
        assert view.text(0).plain == "a = " + MASK_BLOCK * (len(hole) - 1) + "2"
        view.update(
            3,
            [prompt + hole],
            [[hole and not early for hole, early in zip(editable[0], decided, strict=True)]],
        )
        text = view.text(0)
    assert text.plain == "a = 1\u20ac2"
    colours = {text.plain[span.start : span.end]: span.style.color for span in text.spans if span.style.color}
    early, late = colours["2"].triplet, colours["1"].triplet
    assert early.blue > early.red and late.red > late.blue, "early is cool, late is warm"
    assert colours["\u20ac"] == colours["1"]
    written = console.file.getvalue()
    assert MASK_BLOCK in written and "1/3" in written and "0 masked" in written


def test_live_view_keeps_the_end_of_a_long_text_and_no_control_characters():
    console = terminal(width=20, height=8)
    row = [*range(30), 99]
    view = LiveView([row], [[False] * 30 + [True]], 2, lambda ids: "".join(f"line {i}\n" for i in ids), console)
    with view:
        written = console.file.getvalue()
    assert MASK_BLOCK in written and "line 29" in written and "line 3\n" not in written
    view = LiveView([[0]], [[False]], 2, lambda ids: "a\x1b[31mb\a\n", console)
    assert view.text(0).plain == "a\\x1b[31mb\\x07\n"


def test_live_view_in_a_terminal_ends_with_the_whole_text(exports, monkeypatch, capsys):
    arguments = [
        "--model",
        str(exports["a2d"]),
        "--prompt",
        "x = ",
        "--max-new-tokens",
        "10",
        "--temperature",
        "1",
    ]
    generate.main([*arguments, "--no-live"])
    plain = capsys.readouterr().out
    console = terminal(width=200, height=50)
    monkeypatch.setattr(generate, "PlainConsole", lambda **options: console)
    generate.main([*arguments, "--no-live"])
    assert capsys.readouterr().out == plain and console.file.getvalue() == ""
    generate.main(arguments)
    written = console.file.getvalue()
    assert MASK_BLOCK in written and "step 8/8, 0 masked" in written
    assert capsys.readouterr().out == "" and written.count("step") >= 8

    def letters(text: str) -> str:
        return re.sub(r"[^!-~]", "", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text))

    assert len(letters(plain)) > len("x=") and letters(written).endswith(letters(plain))
