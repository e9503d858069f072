"""`generate --save-html`: the page, in a real browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_a2d import generate
from megatron_a2d.inference.html_replay import replay_page, replay_row
from tests.unit.tiny_exports import exports  # noqa: F401 (a fixture)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_pieces_carry_their_steps():
    row = replay_row([1, 2, 3], [0, 5, None], lambda ids: "".join(f"<{i}>" for i in ids))
    assert row == [["<1>", 0, 1], ["<2>", 5, 1], ["", 0, 1]]


def test_nothing_of_a_text_leaves_the_data():
    page = replay_page("a </script><b>", [[["</script><img src=x onerror=alert(1)>", 1, 1]]])
    # "<!--<script" would keep the script from ending.
    assert replay_page("a", [[["<!--<script>", 1, 1]]]).count("<!--") == 0
    assert page.count("</script>") == 1 and "http" not in page.replace("http-equiv", "")


def browse(page: Path, script: str, tmp_path: Path) -> str:
    """The page's DOM after `script` has run in it."""
    assert CHROMIUM
    text = page.read_text().replace("</body>", f"<script>{script}</script></body>")
    (tmp_path / "driven.html").write_text(text)
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'driven.html'}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian's package chromium)")
def test_the_slider_replays_in_chromium(exports, tmp_path, capsys):  # noqa: F811
    page = tmp_path / "replay.html"
    generate.main(
        ["--model", str(exports["a2d"]), "--prompt", "a < b & c", "--max-new-tokens", "12", "--num-steps", "4",
         "--temperature", "1", "--save-html", str(page)]
    )  # fmt: skip
    text = capsys.readouterr().out.removesuffix("\n")
    move = 'slider.value = {}; slider.dispatchEvent(new Event("input")); document.title = document.querySelector("pre").textContent + "|" + document.getElementById("state").textContent;'

    def at(step: int) -> tuple[str, str]:
        title = re.search(r"<title>(.*?)</title>", browse(page, move.format(step), tmp_path), re.DOTALL)
        assert title
        shown, _, state = title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").rpartition("|")
        return shown, state

    first, state = at(0)
    assert first == "a < b & c" + "\u2592\u2592" * int(state.split(", ")[1].split()[0]) and state.startswith(
        "step 0 of 4"
    )
    last, state = at(4)
    assert state == "step 4 of 4, 0 masked" and last.split() == text.split()
    middle, state = at(2)
    assert "\u2592" in middle and first != middle != last
