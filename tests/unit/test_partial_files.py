"""Unfinished files and locks: whose they are, when they go, and that no planted link is followed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from checkpoints_tools.publish import check_export
from data_prep import tokenize_shards
from megatron_a2d.conversion.resumable_output import JOURNAL, resumable_directory
from megatron_a2d.evaluation.response_cache import ResponseCache
from megatron_a2d.study.results_page import write_page
from megatron_a2d.training.checkpointing import _make_room
from megatron_a2d.utils.atomic_write import hold_directory, new_file
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.partial_files import YOUNG, _host, open_log, partial_path, remove_abandoned

DEAD = 2**22 + 1  # beyond the largest process number of Linux


def leave(root: Path, name: str, age: float = 0.0) -> Path:
    directory = root / name
    directory.mkdir(parents=True)
    (directory / "__0_0.distcp").write_bytes(b"half")
    for path in (directory / "__0_0.distcp", directory):
        os.utime(path, (time.time() - age,) * 2)
    return directory


@pytest.mark.parametrize(
    ("name", "age", "stays"),
    [
        (f".iter_0000004.ab12.partial-{_host()}-{DEAD}", 0, False),
        pytest.param(f".iter_0000004.ab12.partial-{_host()}-{os.getpid()}", 0, False, id="of this process"),
        (f".iter_0000004.ab12.partial-{_host()}-1", 0, True),
        (f".iter_0000004.ab12.partial-{_host()}-1", 2 * YOUNG, False),  # another process has the number now
        (".iter_0000004.ab12.partial-node-17-1", 0, True),
        (f".iter_0000004.ab12.partial-node-17-{DEAD}", YOUNG / 2, True),
        (".iter_0000004.ab12.partial-node-17-1", 2 * YOUNG, False),
        (".iter_0000004.ab12.partial", 0, False),  # of version 0.1.0, which names no host
        (".iter_0000004.ab12.partial", 2 * YOUNG, False),
        (".iter_0000002.partial", 2 * YOUNG, False),
    ],
)
def test_what_a_save_finds(
    name: str, age: float, stays: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A killed save of this host goes at once, another host's when nothing in it has changed for an hour."""
    left, own = leave(tmp_path, name, age), partial_path(tmp_path / "iter_0000006.cd34")
    whole = leave(tmp_path, "iter_0000002", age=2 * YOUNG)
    _make_room(tmp_path, own)
    assert left.exists() == stays and whole.exists() and own.is_dir()
    said = capsys.readouterr().err
    assert (name in said) == stays and said.count("\n") == stays
    if "node-17" in name and stays:
        assert "on node-17 is writing it, or was less than an hour ago" in said
    _make_room(tmp_path, partial_path(tmp_path / "iter_0000008.ef56"))
    assert capsys.readouterr().err == ""  # said once


def test_a_change_anywhere_in_it_keeps_it_young(tmp_path: Path) -> None:
    left = leave(tmp_path, ".iter_0000004.ab12.partial-elsewhere-9", age=2 * YOUNG)
    (left / "hf").mkdir()
    os.utime(left, (0, 0))
    assert len(remove_abandoned(tmp_path, ".iter_*.partial*")) == 1 and left.exists()


def test_a_planted_partial_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    private = leave(tmp_path, "private")
    (tmp_path / f".iter_0000004.partial-{_host()}-{DEAD}").symlink_to(private)
    remove_abandoned(tmp_path, ".iter_*.partial*")
    assert [path.name for path in tmp_path.iterdir()] == ["private"] and (private / "__0_0.distcp").exists()


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "directory"])
@pytest.mark.parametrize("lock", ["run", "pieces", "conversion"])
def test_a_lock_is_a_file_of_its_own(lock: str, kind: str, tmp_path: Path) -> None:
    """A link is neither emptied nor made, a pipe does not block."""
    (tmp_path / "private").write_text("secret")
    names = {"run": "out/.lock", "pieces": "out/.lock", "conversion": f".out.partial/{JOURNAL}"}
    path = tmp_path / names[lock]
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / ("private" if kind == "link" else "nothing"))
    with pytest.raises(UserError, match="a lock must be"):
        if lock == "run":
            hold_directory(tmp_path / "out", "--save")
        elif lock == "pieces":
            with tokenize_shards.hold(tmp_path / "out"):
                pass
        else:
            with resumable_directory(tmp_path / "out", "--out", {}):
                pass
    assert (tmp_path / "private").read_text() == "secret" and not (tmp_path / "nothing").exists()


def test_a_new_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    partial_path(tmp_path / "run.json").symlink_to(tmp_path / "private")
    with new_file(tmp_path / "run.json") as partial:
        partial.write_text("{}")
    assert (tmp_path / "private").read_text() == "secret"
    assert (tmp_path / "run.json").read_text() == "{}" and not (tmp_path / "run.json").is_symlink()


def test_a_conversion_is_not_written_into_a_link(tmp_path: Path) -> None:
    private = leave(tmp_path, "private")
    (tmp_path / ".out.partial").symlink_to(private)
    with (
        pytest.raises(UserError, match="not a directory of its own"),
        resumable_directory(tmp_path / "out", "--out", {}),
    ):
        pass
    assert (private / "__0_0.distcp").read_bytes() == b"half"


def test_links_in_an_interrupted_conversion_are_removed(tmp_path: Path) -> None:
    """Nor does a journal vouch for a file that lies elsewhere."""
    private = leave(tmp_path, "private")
    partial = leave(tmp_path, ".out.partial")
    (partial / "file").symlink_to(private / "__0_0.distcp")
    (partial / "directory").symlink_to(private)
    facts = '"facts": {"crc32": "fb5a4121"}'
    (partial / JOURNAL).write_text(
        '{"identity": {}}\n'
        + "".join(
            f'{{"file": "{name}", {facts}}}\n'
            for name in ("file", "../private/__0_0.distcp", str(private / "__0_0.distcp"), "x" * 300)
        )
    )
    with resumable_directory(tmp_path / "out", "--out", {}) as work:
        assert work.done == {}
        (work.directory / "file").write_text("new")
    assert (private / "__0_0.distcp").read_bytes() == b"half" and (tmp_path / "out" / "file").read_text() == "new"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["file"]


def test_an_odd_journal_is_as_good_as_none(tmp_path: Path) -> None:
    partial = leave(tmp_path, ".out.partial")
    lines = b'{"identity": {}}\n\xff\xfe\n{"file": "__0_0.distcp", "facts": {}}\n[5]\n'
    (partial / JOURNAL).write_bytes(lines)
    with resumable_directory(tmp_path / "out", "--out", {}) as work:
        assert work.done == {}
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["answers", "log"])
def test_what_is_added_to_is_no_link_and_no_pipe(name: str, tmp_path: Path) -> None:
    private, path = tmp_path / "private", tmp_path / name
    private.write_text("half")
    path.symlink_to(private)
    write = {"answers": lambda: ResponseCache(path, {}), "log": lambda: open_log(path)}[name]
    with pytest.raises(UserError, match="is a symbolic link"):
        write()
    assert private.read_text() == "half"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"cannot be opened|is not a regular file"):
        write()
    path.unlink()
    write().close()
    assert path.is_file()


def test_lists_and_pages_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="the list of checksums is not UTF-8"):
        check_export(tmp_path)
    (tmp_path / "page.md").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="the page is not UTF-8"):
        write_page(tmp_path / "page.md", "", "", "")


@pytest.mark.parametrize("kind", ["pipe", "stream", "directory"])
def test_only_a_file_is_replaced_by_a_file(kind: str, tmp_path: Path) -> None:
    """Root may replace /dev/null, and the whole machine would miss it."""
    path = tmp_path / kind
    {"pipe": lambda: os.mkfifo(path), "stream": lambda: path.symlink_to("/proc/self/fd/1"), "directory": path.mkdir}[
        kind
    ]()
    before = path.lstat().st_mode
    with pytest.raises(UserError, match="which a file must not replace; name a file"), new_file(path):
        pass
    assert path.lstat().st_mode == before and list(tmp_path.iterdir()) == [path]
