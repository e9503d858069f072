"""Download of a Hugging Face dataset as local shards of text, for data_prep.tokenize_corpus.

    python -m data_prep.download --dataset HuggingFaceFW/fineweb-edu --name sample-10BT --out raw/fineweb_edu
    python -m data_prep.download --data-mixture launch/mixtures/rnd1.yaml --out raw [--sources flan wikipedia]

The dataset is streamed: neither memory nor a cache holds it. OUT/00000.jsonl.zst, ... hold {"text": ...} lines; each
shard is written atomically, and download.json next to them records the number of documents. The same command resumes
after the last complete shard, and does nothing once all are complete.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress, TextColumn, TimeElapsedColumn

from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import console, entry_point, human
from megatron_a2d.utils.atomic_write import new_file, read_json, write_json
from megatron_a2d.utils.errors import UserError, nearest
from megatron_a2d.utils.printable import one_line, without_passwords

STATE = "download.json"


class HubSource(NamedTuple):
    """A dataset of the Hugging Face hub to stream."""

    dataset: str
    name: str | None = None  # configuration of the dataset
    split: str = "train"
    text_key: str = "text"


def stream(source: HubSource, skip: int) -> Iterator[dict[str, Any]]:
    """The rows of the dataset, without the first `skip`. UserError with the library's message when that fails."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "--dataset: needs the package datasets; in the clone, pip install --editable '.[data]'"
        ) from None
    try:
        rows = datasets.load_dataset(source.dataset, source.name, split=source.split, streaming=True)
        yield from _as_written(datasets, rows, source).skip(skip)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:  # of the library, the hub, the network
        words = without_passwords(" ".join(str(error).split()))[:300]
        raise UserError(
            f"--dataset {source.dataset}: cannot be read ({type(error).__name__}: {words}); check its name, --name, "
            "--split and the network, and run the same command again to resume"
        ) from None


def _as_written(datasets: Any, rows: Any, source: HubSource) -> Any:
    """The rows, with strings of JSON files exactly as they are in the file.

    datasets 5.2.0 infers a column's type from the first 10 MB. If that is a string, a number in a later chunk becomes
    a string too, and all other strings of that chunk come in quotation marks. Read as JSON values they are not
    changed, and a value that is not a string is detected anywhere in the file.
    """
    json_values, features = getattr(datasets, "Json", None), rows.features
    builder = datasets.load_dataset_builder(source.dataset, source.name)
    kinds = {parent.__name__ for parent in type(builder).__mro__}
    if json_values is None or "Json" not in kinds or source.text_key not in (features or {}):
        return rows
    features = type(features)({**features, source.text_key: json_values()})
    return datasets.load_dataset(source.dataset, source.name, split=source.split, streaming=True, features=features)


def download(source: HubSource, out: Path, shard_bytes: int, max_documents: int | None) -> dict[str, Any]:
    """Write shards until the dataset ends or `max_documents` is reached; returns the state."""
    try:
        import zstandard
    except ImportError:
        raise UserError(
            "--out: shards need the package zstandard; in the clone, pip install --editable '.[data]'"
        ) from None
    state = _read_state(source, out)
    if state["complete"]:
        console.print(f"{out}: complete, {state['documents']:,} documents")
        return state
    columns = (
        TextColumn("{task.description}", markup=False), TextColumn("{task.fields[amount]}", style="cyan"),
        TimeElapsedColumn(),
    )  # fmt: skip
    rows = stream(source, state["documents"])
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(one_line(out.name), total=None, amount="")
        while not state["complete"]:
            number, documents, size, ended = len(state["shards"]), 0, 0, False
            with new_file(out / _shard(number)) as partial, open(partial, "wb") as raw:
                with zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False) as shard:
                    while size < shard_bytes:
                        if max_documents is not None and state["documents"] + documents >= max_documents:
                            ended = True
                            break
                        row = next(rows, None)
                        if row is None:
                            ended = True
                            break
                        text = _text(row, source, state["documents"] + documents + 1)
                        shard.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
                        documents, size = documents + 1, size + len(text)
                        if documents % 1000 == 0:
                            done = state["documents"] + documents
                            bar.update(task, amount=f"{done:,} documents, shard {number}: {human(size, 'characters')}")
            state["shards"].append({"file": _shard(number), "documents": documents})
            state["documents"] += documents
            state["complete"] = ended
            write_json(out / STATE, state)
    if state["documents"] == 0:
        raise UserError(f"--dataset {source.dataset}: holds no documents; check --name and --split")
    console.print(f"{out}: {state['documents']:,} documents in {len(state['shards'])} shards")
    return state


def _text(row: dict[str, Any], source: HubSource, number: int) -> str:
    """The text of row `number`, counted from 1; of a .jsonl file that is its line."""
    if source.text_key not in row:
        hint = nearest(source.text_key, row) or f"; it has {', '.join(list(row)[:8])}"
        raise UserError(f"--dataset {source.dataset}: no column {source.text_key!r}{hint}; set it with --text-key")
    text = row[source.text_key]
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"--dataset {source.dataset}: row {number}: {source.text_key!r} holds {type(text).__name__}, not text; "
            "correct the dataset, or choose the text column with --text-key"
        )
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise UserError(
            f"--dataset {source.dataset}: row {number}: {source.text_key!r} holds an unpaired surrogate, "
            "which is not valid text; correct the dataset"
        ) from None
    return text or ""


def _read_state(source: HubSource, out: Path) -> dict[str, Any]:
    wanted = source._asdict()
    if not (out / STATE).exists():
        return {"source": wanted, "shards": [], "documents": 0, "complete": False}
    state = read_json(out / STATE, "the state of the download")
    if state.get("source") != wanted:
        raise UserError(f"--out {out}: holds another dataset, {state.get('source')}; choose another directory")
    damaged = UserError(f"{out / STATE}: is damaged; remove the directory and download it again")
    shards = state.get("shards")
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        raise damaged
    files, counts = [shard.get("file") for shard in shards], [shard.get("documents") for shard in shards]
    if (
        files != [_shard(number) for number in range(len(shards))]
        or any(type(count) is not int or count < 0 for count in counts)
        or state.get("documents") != sum(counts)
        or not isinstance(state.get("complete"), bool)
    ):
        raise damaged
    missing = [file for file in files if not (out / file).exists()]
    if missing:
        raise UserError(f"--out {out}: {missing[0]} is missing; remove the directory and download it again")
    return state


def _shard(number: int) -> str:
    return f"{number:05d}.jsonl.zst"


def sources_of(arguments: argparse.Namespace) -> dict[Path, HubSource]:
    """Output directory -> dataset to download into it."""
    if not arguments.data_mixture:
        hub = HubSource(arguments.dataset, arguments.name, arguments.split, arguments.text_key)
        return {arguments.out: hub}
    from megatron_a2d.data.blended_dataset import read_mixture

    sources = {source.name: source for source in read_mixture(arguments.data_mixture)}
    wanted = arguments.sources or list(sources)
    problems = [
        f"--sources {name}: is not in the mixture{nearest(name, sources)}" for name in wanted if name not in sources
    ]
    fields = HubSource._fields
    for name in wanted:
        settings = sources[name].hub if name in sources else {"dataset": ""}
        if "dataset" not in settings or not set(settings) <= set(fields):
            others = ", ".join(fields[1:])
            problems.append(f"--data-mixture: {name}: hub must hold `dataset`, and may hold {others}")
        elif wrong := [key for key, value in settings.items() if not isinstance(value, str)]:
            problems.append(f"--data-mixture: {name}: hub: {wrong[0]} {settings[wrong[0]]}: must be a string; quote it")
    if problems:
        raise UserError(problems)
    return {arguments.out / name: HubSource(**sources[name].hub) for name in wanted}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m data_prep.download", description="Stream a dataset of the Hugging Face hub to local shards."
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--dataset", help="name on the Hugging Face hub, or a directory of data files")
    which.add_argument("--data-mixture", type=Path, help="mixture file whose sources have a `hub` entry")
    parser.add_argument("--sources", nargs="+", help="with --data-mixture: only these sources; default: all")
    parser.add_argument("--name", help="configuration of the dataset")
    parser.add_argument("--split", default="train", help="split of the dataset")
    parser.add_argument("--text-key", default="text", help="name of the text column")
    parser.add_argument(
        "--out", required=True, type=Path, help="output directory; a mixture's sources are subdirectories"
    )
    parser.add_argument("--shard-megabytes", type=float, default=256, help="text per shard, before compression")
    parser.add_argument("--max-documents", type=int, help="stop after this many documents; default: all")
    arguments = parser.parse_args(argv)
    if arguments.shard_megabytes * 1e6 < 1:  # empty shards would never end
        raise UserError(f"--shard-megabytes {arguments.shard_megabytes}: must be at least one byte")
    if arguments.max_documents is not None and arguments.max_documents < 1:
        raise UserError(f"--max-documents {arguments.max_documents}: give 1 or more")
    for out, source in sources_of(arguments).items():
        download(source, out, int(arguments.shard_megabytes * 1e6), arguments.max_documents)


if __name__ == "__main__":
    entry_point(main)
