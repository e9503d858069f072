"""Streaming a dataset to shards, with a local directory in the place of the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep import download
from data_prep.corpus_shards import Counts, read_documents
from megatron_a2d.data.blended_dataset import read_mixture
from megatron_a2d.utils.errors import UserError

pytest.importorskip("datasets")
pytest.importorskip("zstandard")
TEXTS = [f"document {n} {'ü' * 50}" for n in range(60)]


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    lines = [json.dumps({"text": text, "id": n}) for n, text in enumerate(TEXTS)]
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "hub"


def fetch(*arguments: object) -> None:
    download.main([str(argument) for argument in arguments])


def texts(out: Path) -> list[str]:
    return [document.text for document in read_documents([out], "text", Counts())]


def test_shards_hold_every_document(dataset, tmp_path):
    out = tmp_path / "raw"
    fetch("--dataset", dataset, "--out", out, "--shard-megabytes", 0.001)
    assert len(list(out.glob("*.jsonl.zst"))) > 2 and texts(out) == TEXTS
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    fetch("--dataset", dataset, "--out", out, "--shard-megabytes", 0.001)
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_an_interrupted_download_goes_on(dataset, tmp_path, monkeypatch):
    out, original = tmp_path / "raw", download.stream

    def broken(source, skip):
        for number, row in enumerate(original(source, skip)):
            if number == 35:
                raise UserError("the network is gone")
            yield row

    monkeypatch.setattr(download, "stream", broken)
    with pytest.raises(UserError, match="network"):
        fetch("--dataset", dataset, "--out", out, "--shard-megabytes", 0.001)
    held = texts(out)
    assert 0 < len(held) < 36 and held == TEXTS[: len(held)]
    monkeypatch.setattr(download, "stream", original)
    fetch("--dataset", dataset, "--out", out, "--shard-megabytes", 0.001)
    assert texts(out) == TEXTS


def test_bad_input(dataset, tmp_path):
    out = tmp_path / "raw"
    for arguments, words in (
        (("--dataset", dataset, "--text-key", "txt"), "no column 'txt' (did you mean text?)"),
        (("--dataset", dataset, "--text-key", "id"), "'id' holds int, not text"),
        (("--dataset", tmp_path / "none"), "cannot be read"),
        (("--dataset", dataset, "--split", "nope"), "cannot be read"),
        (("--dataset", dataset, "--max-documents", 0), "--max-documents 0"),
    ):
        with pytest.raises(UserError) as caught:
            fetch(*arguments, "--out", out)
        assert words in caught.value.problems[0] and "\n" not in caught.value.problems[0]
        assert not list(out.glob("*")) if out.exists() else True
    fetch("--dataset", dataset, "--out", out, "--max-documents", 3)
    assert texts(out) == TEXTS[:3]
    with pytest.raises(UserError, match="holds another dataset"):
        fetch("--dataset", dataset, "--out", out, "--split", "test")


@pytest.mark.parametrize("place", [3, 400])
@pytest.mark.parametrize("value", [5, 2.5, True, ["a"], {"a": 1}])
def test_what_is_no_text_is_found_wherever_it_stands(place, value, dataset, tmp_path, monkeypatch):
    """In the part of a file that decides its type, and in a later one."""
    from datasets.packaged_modules.json.json import JsonConfig

    monkeypatch.setattr(JsonConfig, "chunksize", 10_000)
    monkeypatch.setattr(
        JsonConfig.__init__,
        "__defaults__",
        tuple(10_000 if value == 10 << 20 else value for value in JsonConfig.__init__.__defaults__),
    )
    lines = [{"text": value if n == place else f"text {n} {'x' * 80}", "n": {"m": n}} for n in range(600)]
    (dataset / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=rf"row {place + 1}: 'text' holds {type(value).__name__}, not text"):
        fetch("--dataset", dataset, "--out", tmp_path / "raw", "--shard-megabytes", 0.002)
    held = texts(tmp_path / "raw") if (tmp_path / "raw" / "00000.jsonl.zst").exists() else []
    assert held == [line["text"] for line in lines[: len(held)]] and len(held) > place - 50


def test_names_of_sources_are_no_paths(tmp_path):
    def problems(name: str) -> list[str]:
        entry = "{train_path: a, weight: 1, hub: {dataset: a/b}}"
        (tmp_path / "m.yaml").write_text(f"sources:\n  {json.dumps(name)}: {entry}\n")
        try:
            sources = read_mixture(tmp_path / "m.yaml")
        except UserError as error:
            return error.problems
        assert sources[0].name == name
        return []

    for name in ("web", "web 2", "wéb-1.0", "a" * 200, "-"):
        assert problems(name) == []
    for name in ("..", ".", "", "../web", "/web", "a/b", "a\\b", ".hidden", "a\nb", "a\x1b[2J", "a" * 201):
        (line,) = problems(name)
        assert "is not a valid source name" in line and "\n" not in line


@pytest.mark.parametrize(
    "change",
    [
        {"shards": 5},
        {"shards": [{"file": "../../x"}]},
        {"shards": [5]},
        {"documents": "3"},
        {"complete": None},
        {"documents": -1},
        {"documents": 10**18},
        {"shards": [{"file": "00000.jsonl.zst", "documents": [1]}]},
    ],
)
def test_a_state_that_was_changed(change, dataset, tmp_path):
    out = tmp_path / "raw"
    fetch("--dataset", dataset, "--out", out)
    state = json.loads((out / "download.json").read_text())
    (out / "download.json").write_text(json.dumps(state | change))
    with pytest.raises(UserError, match=r"download\.json: is damaged"):
        fetch("--dataset", dataset, "--out", out)


def test_shards_of_nothing_are_refused(dataset, tmp_path):
    """They would have no end."""
    with pytest.raises(UserError, match="--shard-megabytes 1e-09"):
        fetch("--dataset", dataset, "--out", tmp_path / "raw", "--shard-megabytes", 1e-9)


def test_half_a_character_is_no_text():
    source = download.HubSource("name", None, "train", "text")
    with pytest.raises(UserError, match="row 7: 'text' holds an unpaired surrogate"):
        download._text({"text": "a\ud800"}, source, 7)


def test_the_mixture_of_rnd1_names_six_sources(tmp_path):
    path = Path(__file__).resolve().parents[2] / "launch" / "mixtures" / "rnd1.yaml"
    sources = read_mixture(path)
    assert len(sources) == 6 and sum(source.weight for source in sources) == 1 and "unpublished" in path.read_text()
    with pytest.raises(UserError, match=r"--sources flam: is not in the mixture \(did you mean flan"):
        download.main(["--data-mixture", str(path), "--sources", "flam", "--out", str(tmp_path)])
    assert all(download.HubSource(**source.hub).dataset.count("/") == 1 for source in sources)
