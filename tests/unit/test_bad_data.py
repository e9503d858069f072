"""Damaged token files: a line that names the file, never a traceback, a hang, or other tokens than were written."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from checkpoints_tools import convert_hf
from data_prep import inspect_dataset
from data_prep.indexed_dataset_writer import open_writers
from megatron_a2d import train
from megatron_a2d.checkpoint.directory import RUN_CONFIG
from megatron_a2d.data.background_scan import BackgroundScan
from megatron_a2d.data.blended_dataset import MixedDataset, read_mixture
from megatron_a2d.data.indexed_dataset import TokenFile
from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.utils.errors import UserError
from tests.tiny import write_hf

VOCAB, EOD = 250, 7
SUFFIXES = (".bin", ".idx", ".json", ".sums")
random_tokens = np.random.default_rng(0)
DOCUMENTS = [np.append(random_tokens.integers(8, VOCAB, size), EOD).astype(np.uint16) for size in range(1, 300)]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Token files with description and checksums, of several blocks, written as tokenize_corpus writes them."""
    prefix = tmp_path_factory.mktemp("good") / "t"
    with open_writers([str(prefix)], VOCAB, {"tokenizer": "none", "eod_token_id": EOD}) as (writer,):
        for some in (DOCUMENTS[:3], DOCUMENTS[3:200], DOCUMENTS[200:]):
            writer.add(np.concatenate(some), np.array([len(document) for document in some]))
    return prefix


def copy(good: Path, to: Path) -> Path:
    for suffix in SUFFIXES:
        shutil.copy(f"{good}{suffix}", f"{to}{suffix}")
    return to


def read_all(prefix: Path) -> list[np.ndarray]:
    """What a run would come to see: opening, every sample with its documents, and every document."""
    data = PackedDataset(prefix, seq_length=64, seed=1, vocab_size=VOCAB)
    for index in range(data.num_samples):
        data.tokens(index)
        data.documents(index)
    data.fingerprint()
    return [data.file.document(number) for number in range(data.file.num_documents)]


def test_what_was_written_is_read(good):
    assert all(np.array_equal(one, other) for one, other in zip(read_all(good), DOCUMENTS, strict=True))


@pytest.fixture
def alarm():
    """A hang is an error."""
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def damage(data: bytes, how: str, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    if how == "flip":
        return data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]
    if how == "truncate":
        return data[:place]
    if how == "grow":
        return data + chance.randbytes(chance.randrange(1, 40))
    if how == "zero":
        return data[:place] + bytes(min(64, len(data) - place)) + data[place + 64 :]
    return chance.randbytes(len(data))  # foreign


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("how", ["flip", "truncate", "grow", "zero", "foreign"])
def test_no_damage_passes(suffix, how, good, tmp_path, alarm):
    """20 ways and places a kind: 400 damaged files in all, 120 more below."""
    chance = random.Random(f"{suffix} {how}")
    prefix = copy(good, tmp_path / "t")
    whole = Path(f"{good}{suffix}").read_bytes()
    harmless = 0
    for _ in range(20):
        data = damage(whole, how, chance)
        if data == whole:
            continue
        Path(f"{prefix}{suffix}").write_bytes(data)
        signal.alarm(20)
        try:
            documents = read_all(prefix)
        except UserError as error:
            (line,) = error.problems
            assert "\n" not in line and str(prefix) in line
        else:
            # Only what changes no value may pass: white space of the description.
            assert suffix == ".json" and json.loads(data) == json.loads(whole)
            assert all(np.array_equal(one, other) for one, other in zip(documents, DOCUMENTS, strict=True))
            harmless += 1
    assert harmless <= 2


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("how", ["flip", "truncate", "zero"])
def test_foreign_files_without_checksums_never_crash(suffix, how, good, tmp_path, alarm):
    """Without a checksum a flipped token may pass; a traceback, a hang or a token beyond the vocabulary may not."""
    chance = random.Random(f"plain {suffix} {how}")
    prefix = tmp_path / "t"
    for end in (".bin", ".idx"):
        shutil.copy(f"{good}{end}", f"{prefix}{end}")
    whole, refused = Path(f"{good}{suffix}").read_bytes(), 0
    for _ in range(20):
        Path(f"{prefix}{suffix}").write_bytes(damage(whole, how, chance))
        signal.alarm(20)
        try:
            documents = read_all(prefix)
        except UserError as error:
            assert all(str(prefix) in line and "\n" not in line for line in error.problems)
            refused += 1
        else:
            assert max(int(document.max(initial=0)) for document in documents) < VOCAB
    assert refused == 20 if suffix == ".idx" or how == "truncate" else refused >= 0


def test_the_fuzz_can_fail(good, tmp_path):
    """Without the checksums a flipped bit does pass: the test above would see it."""
    for end in (".bin", ".idx"):
        shutil.copy(f"{good}{end}", f"{tmp_path / 't'}{end}")
    data = bytearray(Path(f"{good}.bin").read_bytes())
    data[1000] ^= 1
    (tmp_path / "t.bin").write_bytes(data)
    assert not all(np.array_equal(one, other) for one, other in zip(read_all(tmp_path / "t"), DOCUMENTS, strict=True))


@pytest.mark.parametrize("count", range(40))
def test_damaged_mixtures(count, good, tmp_path):
    """A mixture file with a few bytes changed is read as YAML says, or refused with lines that name it."""
    chance = random.Random(count)
    text = bytearray(f"sources:\n  a: {{train_path: {good}, weight: 0.7, max_epochs: 3}}\n  b: {{train_path: {good}, weight: 0.3}}\n".encode())  # fmt: skip
    for _ in range(1 + count % 4):
        place = chance.randrange(len(text))
        text[place] = chance.randrange(256)
    (tmp_path / "m.yaml").write_bytes(bytes(text[: chance.choice([len(text), chance.randrange(1, len(text))])]))
    try:
        MixedDataset(read_mixture(tmp_path / "m.yaml"), 64, vocab_size=VOCAB)
    except UserError as error:
        assert error.problems and all("\n" not in line for line in error.problems)
    else:
        assert isinstance(yaml.safe_load((tmp_path / "m.yaml").read_bytes()), dict)


# ---- files that change under a run


def test_a_file_that_changes_is_an_error_not_other_tokens(good, tmp_path):
    prefix = copy(good, tmp_path / "t")

    def fresh() -> PackedDataset:
        copy(good, prefix)
        data = PackedDataset(prefix, seq_length=64, vocab_size=VOCAB)
        data.tokens(0)
        return data

    def rewrite(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))

    whole = Path(f"{good}.bin").read_bytes()
    changes = {
        "cut short": lambda: os.truncate(f"{prefix}.bin", 100),
        "longer": lambda: rewrite(tmp_path / "t.bin", whole + b"\0\0"),
        "as long": lambda: rewrite(tmp_path / "t.bin", whole[::-1]),
        "replaced": lambda: os.replace(shutil.copy(f"{good}.bin", tmp_path / "other"), tmp_path / "t.bin"),
        "removed": lambda: os.unlink(f"{prefix}.bin"),
    }
    for change in changes.values():
        data = fresh()
        change()
        with pytest.raises(UserError, match=r"t\.bin: has changed since it was opened"):
            data.tokens(1)
    data = fresh()
    rewrite(tmp_path / "t.idx", Path(f"{good}.idx").read_bytes())
    with pytest.raises(UserError, match=r"t\.idx: has changed"):
        data.documents(0)


def test_a_change_that_leaves_size_and_time_alone_meets_the_checksum(good, tmp_path):
    prefix = copy(good, tmp_path / "t")
    data = PackedDataset(prefix, seq_length=64, vocab_size=VOCAB, shuffle=False)
    status = os.stat(f"{prefix}.bin")
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.seek(20_000)
        stream.write(b"\x09\x00")
    os.utime(f"{prefix}.bin", ns=(status.st_atime_ns, status.st_mtime_ns))
    data.tokens(0)
    with pytest.raises(UserError, match=r"checksum mismatch from byte 16384 on \(document \d+\)"):
        data.tokens(20_000 // 2 // 64)


# ---- ids beyond the vocabulary


def test_the_description_tells_of_foreign_ids_at_once(good):
    with pytest.raises(UserError, match=r"document \d+ holds token id 249, but the model's vocabulary has 200"):
        TokenFile(good, vocab_size=200, scan=False)


def test_the_scan_in_the_background(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "t.bin"), dtype=np.int32)
    for number in range(100):
        builder.add_document(np.full(50, 9 if number < 77 else 300), [50])
    builder.finalize(str(tmp_path / "t.idx"))
    scan = BackgroundScan([TokenFile(tmp_path / "t", VOCAB, scan=False)])
    with pytest.raises(UserError, match="document 77 holds token id 300"):
        scan.wait(30)
    scan.close()
    calm = BackgroundScan([TokenFile(tmp_path / "t", 400, scan=False)])
    calm.wait(30)
    assert calm.finished


# ---- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("model")
    write_hf(root / "hf", "dense")
    convert_hf.main(["--hf-model", str(root / "hf"), "--out", str(root / "checkpoint")])
    return root / "checkpoint"


def dry_run(checkpoint: Path, **settings: Any) -> list[str]:
    values = {"load": checkpoint, "seq-length": 32, "global-batch-size": 8, "train-iters": 10, **settings}
    flags = [word for key, value in values.items() for word in (f"--{key}".replace("_", "-"), str(value))]
    try:
        train.main([*flags, "--dry-run"])
    except UserError as error:
        return error.problems
    return []


def test_runs_refuse_bad_data(good, checkpoint, tmp_path):
    prefix = copy(good, tmp_path / "t")
    assert dry_run(checkpoint, train_data_path=prefix) == []

    def mixture(text: str) -> Path:
        (tmp_path / "m.yaml").write_text(text)
        return tmp_path / "m.yaml"

    fine = f"sources:\n  a: {{train_path: {prefix}, valid_path: {prefix}, weight: 1}}\n"
    assert dry_run(checkpoint, data_mixture=mixture(fine)) == []
    (line,) = dry_run(checkpoint, data_mixture=mixture(fine.replace("weight: 1", "weight: 0")))
    assert "a: weight 0" in line
    (line,) = dry_run(
        checkpoint, data_mixture=mixture(fine.replace("weight: 1", "weight: 1, max_epochs: 1")), train_iters=5000
    )
    assert "a would be repeated" in line and "above its max_epochs 1" in line
    (line,) = dry_run(checkpoint, data_mixture=mixture(fine), train_data_path=prefix)
    assert "--train-data-path" in line and "cannot be combined with --data-mixture" in line
    (line,) = dry_run(checkpoint, train_data_path=prefix, random_length_prob=2)
    assert "--random-length-prob 2.0: must lie in [0, 1]" in line
    (line,) = dry_run(checkpoint, train_data_path=prefix, train_data_fingerprint="0" * 16)
    assert "have the fingerprint" in line
    Path(f"{prefix}.bin").write_bytes(Path(f"{prefix}.bin").read_bytes()[::-1])
    (line,) = dry_run(checkpoint, train_data_path=prefix)
    assert "checksum mismatch" in line
    with open_writers([str(tmp_path / "none")], VOCAB, {"tokenizer": "", "eod_token_id": None}):
        pass
    (line,) = dry_run(checkpoint, train_data_path=tmp_path / "none")
    assert "holds no tokens" in line


def test_a_resumed_run_wants_its_tokens(good, tmp_path):
    from megatron_a2d.config.settings import build
    from megatron_a2d.training.resume import differences

    first, other = PackedDataset(good, 64).fingerprint(), "f" * 16
    settings = {"train_data_path": "somewhere", "train_data_fingerprint": first}
    (tmp_path / RUN_CONFIG).write_text(json.dumps(build(settings).to_dict()))
    assert differences(build({**settings, "train_data_path": "moved"}), tmp_path) == []
    assert differences(build({"train_data_path": "moved"}), tmp_path) == []
    (line,) = differences(build({**settings, "train_data_fingerprint": other}), tmp_path)
    assert "--train-data-path somewhere: holds other tokens, other weights" in line
    mixed = {"data_mixture": "m.yaml", "train_data_fingerprint": other}
    assert any("--data-mixture m.yaml: holds other" in line for line in differences(build(mixed), tmp_path))


def test_a_wild_id_does_not_take_the_memory(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "t.bin"), dtype=np.int32)
    for number in range(100):
        builder.add_document(np.full(50, 9 if number != 77 else 0x7F000009), [50])
    builder.finalize(str(tmp_path / "t.idx"))
    with pytest.raises(UserError, match="document 77 holds token id 2130706441, larger than any vocabulary"):
        inspect_dataset.read_contents(TokenFile(tmp_path / "t"))


def test_fingerprints_tell_files_apart(good, tmp_path):
    one = PackedDataset(good, 64).fingerprint()
    assert PackedDataset(copy(good, tmp_path / "t"), 32, seed=5).fingerprint() == one
    for name, documents in (("same", DOCUMENTS), ("less", DOCUMENTS[:-1]), ("turned", DOCUMENTS[::-1])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        for document in documents:
            builder.add_document(document, [len(document)])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    prints = {name: PackedDataset(tmp_path / name, 64).fingerprint() for name in ("same", "less", "turned")}
    assert len({one, *prints.values()}) == 4
    builder = IndexedDatasetBuilder(str(tmp_path / "borders.bin"), dtype=np.uint16)
    for document in (np.concatenate(DOCUMENTS[:2]), *DOCUMENTS[2:-1], DOCUMENTS[-1][:5], DOCUMENTS[-1][5:]):
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "borders.idx"))
    assert Path(tmp_path / "borders.bin").read_bytes() == Path(tmp_path / "same.bin").read_bytes()
    assert PackedDataset(tmp_path / "borders", 64).fingerprint() not in {one, *prints.values()}
    assert PackedDataset(tmp_path / "same", 64).fingerprint() == prints["same"]
