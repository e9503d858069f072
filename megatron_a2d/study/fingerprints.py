"""Fingerprints of a study's inputs (checkpoint and tokens), so that all of its runs use the same ones.

OUT/inputs.json    fingerprints, written when the study begins

Paths are not compared: they may change when a study is resumed (moved directories, another machine).
"""

from __future__ import annotations

from pathlib import Path

from megatron_a2d.checkpoint.directory import HF_FILES, resolve
from megatron_a2d.checkpoint.manifest import MANIFEST
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.utils.atomic_write import read_json, write_json
from megatron_a2d.utils.errors import UserError

_FILE = "inputs.json"
EXTRA_START = "--load-"  # and the name of a checkpoint that some studies start from besides --load


def hold_inputs(out: Path, base: RunConfig, starts: dict[str, str] | None = None) -> None:
    """Record the inputs in `out`; UserError if it holds a study of another checkpoint or other tokens.

    `starts`: checkpoints besides --load, by flag. A study that has begun without one may be given it later.
    """
    others = {flag: (_of_checkpoint(path), path) for flag, path in (starts or {}).items()}
    found, path = _inputs(base), out / _FILE
    known = read_json(path, "the study's inputs") if path.exists() else {}
    problems = [
        f"{flag}: {now[1]} differs from what the study in --out {out} was started with; give that, or another --out"
        for flag, now in (found | others).items()
        if known.get(flag, now[0]) != now[0]
    ]
    problems += [
        f"{flag}: the study in --out {out} was started {'without' if flag in found else 'with'} it; give its tokens as "
        "they were given then, or another --out"
        for flag in (known.keys() ^ found.keys() if known else ())
        if not flag.startswith(EXTRA_START)
    ]
    if problems:
        raise UserError(problems)
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, known | {flag: fingerprint for flag, (fingerprint, _) in (found | others).items()})


def _of_checkpoint(path: str) -> str:
    """The checksum of its manifest, which has one per file; of its configuration, as the oldest have no manifest."""
    from megatron_a2d.data.checksums import checksum

    start = resolve(path)
    manifest = start / MANIFEST
    described = manifest if manifest.is_file() else start / HF_FILES / "config.json"
    return checksum(described.read_bytes())


def _inputs(base: RunConfig) -> dict[str, tuple[str, str]]:
    """(fingerprint, path) by flag."""
    from megatron_a2d.data.blended_dataset import read_mixture
    from megatron_a2d.data.checksums import checksum
    from megatron_a2d.data.indexed_dataset import TokenFile

    def tokens(prefix: str | None) -> str:
        return TokenFile(prefix, scan=False).fingerprint() if prefix else ""

    load, data = base.training.load, base.data
    assert load is not None
    found = {"--load": (_of_checkpoint(load), load)}
    if data.data_mixture:
        sources = [
            f"{item.name} {item.weight} {tokens(item.train_path)} {tokens(item.valid_path)}"
            for item in read_mixture(data.data_mixture)
        ]
        found["--data-mixture"] = (checksum("\n".join(sources).encode()), data.data_mixture)
    for flag, prefix in (("--train-data-path", data.train_data_path), ("--valid-data-path", data.valid_data_path)):
        if prefix:
            found[flag] = (tokens(prefix), prefix)
    return found
