"""Tokens that are not the model's, and settings that the data leaves without effect: said before a run, not after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer

from checkpoints_tools import convert_hf
from data_prep import tokenize_corpus
from data_prep.indexed_dataset_writer import open_writers
from megatron_a2d import train
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import build
from megatron_a2d.data.background_scan import BackgroundScan
from megatron_a2d.data.dataloader import MicroBatches
from megatron_a2d.data.diffusion_samples import make_sample
from megatron_a2d.data.indexed_dataset import TokenFile
from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.data.tokenizer_fingerprint import recorded_vocabulary, vocabulary_in, vocabulary_of
from megatron_a2d.utils.errors import UserError
from tests.tiny import END_OF_TEXT, MASK_TOKEN_ID, NUM_TOKENS, TURN_END, write_hf

DOCUMENTS = [[*range(3, 20), END_OF_TEXT], [*range(30, 61), END_OF_TEXT], [*range(70, 85), END_OF_TEXT]] * 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("model")
    write_hf(root / "hf", "dense")
    convert_hf.main(["--hf-model", str(root / "hf"), "--out", str(root / "checkpoint"), "--no-verify"])
    return root


def ours(prefix: Path, tokenizer: Path | None, eod: int | None = END_OF_TEXT, documents: Any = DOCUMENTS) -> Path:
    """As tokenize_corpus writes; without a tokenizer, as it wrote before it recorded vocabularies."""
    vocabulary = vocabulary_of(tokenizer) if tokenizer else None
    description = {"tokenizer": "made/by/this", "eod_token_id": eod, **(vocabulary.description() if vocabulary else {})}
    with open_writers([str(prefix)], NUM_TOKENS, description) as (writer,):
        writer.add(np.concatenate(documents).astype(np.uint16), np.array([len(document) for document in documents]))
    return prefix


def foreign(prefix: Path, tokens: Any, num_marks: int = 1) -> Path:
    """As other tools write: no description."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for part in np.array_split(np.asarray(tokens), num_marks):
        builder.add_document(part, [len(part)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def dry_run(checkpoint: Path, *words: str, **settings: Any) -> list[str]:
    values = {
        "load": checkpoint / "checkpoint",
        "seq-length": 32,
        "global-batch-size": 8,
        "train-iters": 10,
        **settings,
    }
    flags = [word for key, value in values.items() for word in (f"--{key}".replace("_", "-"), str(value))]
    try:
        train.main([*flags, *words, "--dry-run"])
    except UserError as error:
        return error.problems
    return []


def mixture(path: Path, *prefixes: Path, valid: Path | None = None) -> Path:
    held_out = f", valid_path: {valid}" if valid else ""
    lines = [f"  {prefix.name}: {{train_path: {prefix}, weight: 1{held_out}}}\n" for prefix in prefixes]
    path.write_text("sources:\n" + "".join(lines))
    return path


def changed_tokenizer(source: Path, to: Path, change: Any) -> Path:
    shutil.copytree(source, to, dirs_exist_ok=True)
    content = json.loads((to / "tokenizer.json").read_text())
    change(content)
    (to / "tokenizer.json").write_text(json.dumps(content, indent=4))
    return to


def swap(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[100:102]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def rename_added(content: dict[str, Any]) -> None:
    content["added_tokens"][1]["content"] = "<|other|>"


# ---- whose tokens


def test_vocabularies(checkpoint, tmp_path):
    hf = checkpoint / "hf"
    mine = vocabulary_of(hf)
    assert mine and len(mine.fingerprint) == 16 and mine.added[END_OF_TEXT] == "<|endoftext|>"
    assert vocabulary_of(hf / "tokenizer.json") == mine
    again = vocabulary_of(changed_tokenizer(hf, tmp_path / "spaces", lambda content: None))
    more = vocabulary_of(
        changed_tokenizer(hf, tmp_path / "m", lambda c: c["added_tokens"].append({"id": 252, "content": "<|x|>"}))
    )
    other = vocabulary_of(changed_tokenizer(hf, tmp_path / "swapped", swap))

    def add_to_both(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["<|mask|>"] = MASK_TOKEN_ID
        content["added_tokens"].append({"id": MASK_TOKEN_ID, "content": "<|mask|>"})

    both = vocabulary_of(changed_tokenizer(hf, tmp_path / "both", add_to_both))
    assert both and both.fingerprint == mine.fingerprint
    assert again == mine and more and other and more.fingerprint == mine.fingerprint != other.fingerprint
    assert vocabulary_of(tmp_path / "none") is None


def test_tokens_of_another_tokenizer_are_refused(checkpoint, tmp_path):
    hf = checkpoint / "hf"
    good = ours(tmp_path / "good", hf)
    assert dry_run(checkpoint, train_data_path=good, valid_data_path=good) == []
    other = ours(tmp_path / "other", changed_tokenizer(hf, tmp_path / "swapped", swap))
    (line,) = dry_run(checkpoint, train_data_path=other)
    assert line.startswith(
        f"{other}, made by made/by/this: its tokens come from another vocabulary than the checkpoint"
    )
    assert "--no-verify-tokenizer" in line
    assert dry_run(checkpoint, "--no-verify-tokenizer", train_data_path=other) == []
    (line,) = dry_run(checkpoint, train_data_path=good, valid_data_path=other)
    assert line.startswith(str(other))
    added = ours(tmp_path / "added", changed_tokenizer(hf, tmp_path / "renamed", rename_added))
    (line,) = dry_run(checkpoint, train_data_path=added)
    assert "token 1 is '<|other|>', and '<|im_start|>' in the checkpoint's tokenizer" in line
    assert dry_run(checkpoint, train_data_path=foreign(tmp_path / "foreign", np.arange(3000) % 200)) == []


def test_sources_of_a_mixture_agree(checkpoint, tmp_path):
    hf = checkpoint / "hf"
    good, ends = ours(tmp_path / "good", hf), ours(tmp_path / "ends", hf, TURN_END)
    other = ours(tmp_path / "other", changed_tokenizer(hf, tmp_path / "swapped", swap))
    old = ours(tmp_path / "old", None)
    assert dry_run(checkpoint, data_mixture=mixture(tmp_path / "m.yaml", good, old)) == []
    (line,) = dry_run(checkpoint, data_mixture=mixture(tmp_path / "m.yaml", good, other))
    assert line.startswith(str(other))
    bad = mixture(tmp_path / "m.yaml", good, ends)
    (line,) = dry_run(checkpoint, data_mixture=bad)
    assert f"its documents end with token 2, those of {good} with token 0" in line
    assert dry_run(checkpoint, "--no-verify-tokenizer", data_mixture=bad) == []
    none = ours(tmp_path / "none", hf, None)
    assert "end with no token" in dry_run(checkpoint, data_mixture=mixture(tmp_path / "m.yaml", good, none))[0]


def test_a_description_that_only_names_the_tokenizer(checkpoint, tmp_path):
    tokenizer = changed_tokenizer(checkpoint / "hf", tmp_path / "swapped", swap)
    prefix = tmp_path / "named"
    with open_writers([str(prefix)], NUM_TOKENS, {"tokenizer": str(tokenizer), "eod_token_id": END_OF_TEXT}) as (
        writer,
    ):
        writer.add(np.arange(3, 240).astype(np.uint16).repeat(2), np.array([474]))
    assert "another vocabulary" in dry_run(checkpoint, train_data_path=prefix)[0]
    shutil.rmtree(tokenizer)
    assert dry_run(checkpoint, train_data_path=prefix) == []


def test_tokenize_corpus_records_the_vocabulary(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    words = ["--input", tmp_path / "a.txt", "--tokenizer", checkpoint / "hf", "--output-prefix", tmp_path / "t"]
    tokenize_corpus.main([*map(str, words), "--valid-fraction", "0", "--workers", "1"])
    mine = vocabulary_of(checkpoint / "hf")
    metadata = TokenFile(tmp_path / "t").metadata
    assert mine and metadata["vocabulary"] == mine.fingerprint and metadata["added_tokens"]["0"] == "<|endoftext|>"


def test_held_out_data_of_another_tokenizer(checkpoint, tmp_path):
    from megatron_a2d.evaluation.heldout_nelbo import open_sources

    hf = checkpoint / "hf"
    mine = vocabulary_in(json.loads(Tokenizer.from_file(str(hf / "tokenizer.json")).to_str()))
    assert mine == vocabulary_of(hf)
    good, other = (
        ours(tmp_path / "good", hf),
        ours(tmp_path / "other", changed_tokenizer(hf, tmp_path / "swapped", swap)),
    )
    words = [str(good), f"named={other}"]
    with pytest.raises(UserError, match=rf"^{other}, made by .* another vocabulary"):
        open_sources(words, 32, NUM_TOKENS, vocabulary=mine)
    assert [source.name for source in open_sources(words, 32, NUM_TOKENS)] == ["good", "named"]
    with pytest.raises(UserError, match="contains the mask token 70"):
        open_sources(words, 32, NUM_TOKENS, 70)
    with pytest.raises(UserError, match="is not a valid name"):
        open_sources([f"../x={good}"], 32, NUM_TOKENS)


# ---- the mask token in the text


def test_a_mask_token_in_the_text_is_found_before_training(checkpoint, tmp_path):
    text = np.concatenate(DOCUMENTS * 4)
    text[700] = MASK_TOKEN_ID
    for prefix in (foreign(tmp_path / "foreign", text, 9), ours(tmp_path / "ours", checkpoint / "hf", 0, [text, text])):
        (line,) = dry_run(checkpoint, train_data_path=prefix)
        assert (
            f"{prefix}: document" in line and f"contains the mask token {MASK_TOKEN_ID}, which is not allowed" in line
        )
        assert dry_run(checkpoint, train_data_path=prefix, objective="ar") == []


def test_the_scan_looks_for_masks_where_the_largest_id_does_not_tell(checkpoint, tmp_path):
    prefix = ours(tmp_path / "t", checkpoint / "hf", documents=[[5, 200, 7], [9, 9]])
    assert not TokenFile(prefix, 256, mask_token_id=201).needs_scan
    assert not TokenFile(prefix, 256).needs_scan
    file = TokenFile(prefix, 256, scan=False, mask_token_id=7)
    assert file.needs_scan
    with pytest.raises(UserError, match="document 0 contains the mask token 7"):
        BackgroundScan([file]).wait(30)
    with pytest.raises(UserError, match="document 0 contains the mask token 7"):
        file.read(0, 3)
    assert file.read(3, 2).tolist() == [9, 9]


# ---- settings that need documents


def packed(tmp_path: Path, eod: int | None) -> PackedDataset:
    return PackedDataset(
        foreign(tmp_path / f"one{eod}", np.concatenate(DOCUMENTS)), 32, shuffle=False, eod_token_id=eod
    )


def test_documents_of_an_index_with_one_mark(tmp_path):
    """As Megatron finds them: an end-of-document token closes its document."""
    data, lengths = packed(tmp_path, END_OF_TEXT), [len(document) for document in DOCUMENTS]
    expected = np.repeat(np.arange(len(DOCUMENTS)), lengths)
    for i in range(data.num_samples):
        found, true = data.documents(i), expected[32 * i : 32 * (i + 1)]
        assert (np.diff(found) != 0).tolist() == (np.diff(true) != 0).tolist()
    assert not np.diff(packed(tmp_path, None).documents(0)).any()
    shape = ModelConfig(2, 64, 4, 2, 24, 160, 256, 512, 1e-6, 1e6, False, mask_token_id=MASK_TOKEN_ID)
    settings = {"seq_length": 32, "reset_position_ids": True, "reset_attention_mask": True}
    maker = make_sample(build(settings), shape, data, 0)
    with MicroBatches(data, maker, micro_batch_size=1, global_batch_size=1) as batches:
        batch = next(batches)
    assert batch.positions is not None and batch.documents is not None
    assert batch.positions[0].tolist() == [*range(18), *range(14)] and len(set(batch.documents[0].tolist())) == 2


def test_described_files_keep_the_documents_of_their_index(checkpoint, tmp_path):
    """A text may spell the end-of-document token."""
    prefix = ours(tmp_path / "t", checkpoint / "hf", documents=[[5, END_OF_TEXT, 6, END_OF_TEXT], [7, END_OF_TEXT]])
    assert TokenFile(prefix, eod_token_id=END_OF_TEXT).segments(0, 6).tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("words", [["--reset-attention-mask"], ["--reset-position-ids"], ["--eod-mask-loss"]])
def test_settings_without_effect_on_the_data(words, checkpoint, tmp_path):
    text = np.concatenate(DOCUMENTS)
    assert dry_run(checkpoint, *words, train_data_path=foreign(tmp_path / "packed", text)) == []
    bare = foreign(tmp_path / "bare", text[text != END_OF_TEXT])
    (line,) = dry_run(checkpoint, *words, train_data_path=bare)
    assert (
        line.startswith(" ".join(words)) and f"without effect on {bare}" in line and "end-of-document token 0" in line
    )
    (line,) = dry_run(checkpoint, *words, data_mixture=mixture(tmp_path / "m.yaml", tmp_path / "packed", bare))
    assert f"without effect on {bare}" in line
    marked = foreign(tmp_path / "marked", text[text != END_OF_TEXT], num_marks=7)
    assert bool(dry_run(checkpoint, *words, train_data_path=marked)) == (words == ["--eod-mask-loss"])
    (line,) = dry_run(checkpoint, *words, train_data_path=tmp_path / "packed", valid_data_path=bare)
    assert f"without effect on {bare}" in line
    assert dry_run(checkpoint, train_data_path=bare) == []


# ---- epochs, workers


def test_epochs_are_shown_at_the_start(checkpoint, tmp_path, capsys):
    good, other = ours(tmp_path / "good", checkpoint / "hf"), ours(tmp_path / "other", checkpoint / "hf")
    samples = sum(map(len, DOCUMENTS)) // 32
    assert dry_run(checkpoint, train_data_path=good, train_iters=100) == []
    assert f"data    {800 / samples:.3g} epochs of good\n" in capsys.readouterr().out
    assert dry_run(checkpoint, data_mixture=mixture(tmp_path / "m.yaml", good, other), train_iters=1024) == []
    share = 8 * 512 / samples
    assert f"data    {share:.3g} epochs of good, {share:.3g} epochs of other\n" in capsys.readouterr().out


def test_workers_have_a_bound(checkpoint, tmp_path):
    good = ours(tmp_path / "good", checkpoint / "hf")
    (line,) = dry_run(checkpoint, train_data_path=good, num_workers=10**9)
    assert "--num-workers 1000000000: must be at most 1024" in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"added_tokens": [5]}),
        ("tokenizer.json", {"added_tokens": {"id": 1}}),
        ("tokenizer.json", {"added_tokens": [{"id": [1], "content": "a"}]}),
        ("tokenizer.json", {"model": {"vocab": 7}}),
        ("tokenizer.json", {"model": {"vocab": [[]]}}),
        ("tokenizer.json", {"model": {"vocab": {"a": 1, "b": "2"}}}),
        ("vocab.json", {"a": 1, "b": None}),
    ],
)
def test_a_tokenizer_without_a_vocabulary_is_one_line(name: str, content: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{name}: the tokenizer holds no vocabulary"):
        vocabulary_of(tmp_path)


@pytest.mark.parametrize("added", [[1], {"x": "a"}, 7, {"1e400": "a"}], ids=str)
def test_odd_added_tokens_of_a_description(added: Any) -> None:
    described = SimpleNamespace(prefix="x", metadata={"vocabulary": "0", "added_tokens": added})
    with pytest.raises(UserError, match=r"x\.json: its added_tokens are damaged"):
        recorded_vocabulary(described)


@pytest.mark.parametrize("named", ["x" * 5000, "a\0b", "/dev/null", ""], ids=["long", "NUL", "device", "empty"])
def test_an_odd_path_of_a_tokenizer_names_none(named: str) -> None:
    assert recorded_vocabulary(SimpleNamespace(prefix="x", metadata={"tokenizer": named})) is None
