"""Tokenizers of vocab.json and merges.txt, as Dream's directory has them, against transformers' Qwen2 tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints_tools import convert_hf
from megatron_a2d.inference.loaded_model import load_tokenizer
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.vocabulary_files import has_vocabulary_files, tokenizer_of
from tests import tiny
from tests.fixtures.record_public_models import MASK_TOKEN_ID, write_recorded

TEXTS = (
    "def mean(values):\n    return sum(values) / len(values)  # it's 1234.5\n\n\n",
    " I'LL  take\tthe e\u0301te\r\n\r\n and   ", "<|im_start|>user\nHi<|im_end|><|mask|> x", "", "a", "\n \n", "3.14159, don't!?",
)  # fmt: skip


def split_files(directory: Path) -> Path:
    """Replace tokenizer.json by the files that it was made of, with a mask token declared as Dream does."""
    content = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").unlink()
    vocabulary = content["model"]["vocab"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"]]
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    kinds = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokens = {**{name: i for i, name in enumerate(tiny.SPECIAL_TOKENS)}, "<|mask|>": tiny.NUM_TOKENS}
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings |= {"added_tokens_decoder": {str(i): {"content": name, **kinds} for name, i in tokens.items()}}
    settings |= {"mask_token": "<|mask|>", "tokenizer_class": "Qwen2Tokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def dream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_files(write_recorded(tmp_path_factory.mktemp("vocabulary") / "dream", "dream"))


def test_tokens_are_those_of_transformers(dream: Path) -> None:
    from transformers import Qwen2TokenizerFast

    theirs = Qwen2TokenizerFast.from_pretrained(dream)
    ours = tokenizer_of(dream)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.token_to_id("<|mask|>") == theirs.convert_tokens_to_ids("<|mask|>") == MASK_TOKEN_ID


def test_a_conversion_writes_tokenizer_json(dream: Path, tmp_path: Path) -> None:
    """For data_prep and all that follows; commands read a directory without it just so."""
    assert has_vocabulary_files(dream)
    convert_hf.main(["--hf-model", str(dream), "--out", str(tmp_path / "ckpt"), "--no-verify"])
    converted = tmp_path / "ckpt" / "release" / "hf"
    assert not has_vocabulary_files(converted)
    for text in TEXTS:
        found = [load_tokenizer(path, 256).encode(text, add_special_tokens=False).ids for path in (dream, converted)]
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "[]", "vocab.json and merges.txt cannot be read"),
        ("merges.txt", "#version: 0.2\nnot known\n", "vocab.json and merges.txt cannot be read"),
        ("tokenizer_config.json", '{"added_tokens_decoder": ["a"]}', "does not list tokens by id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"300": {"content": "<|x|>"}}}', "'<|x|>' the id 300"),
    ],
)
def test_bad_files_are_one_line(name: str, content: str, message: str, dream: Path, tmp_path: Path) -> None:
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / file).write_text(content if file == name else (dream / file).read_text())
    with pytest.raises(UserError) as refusal:
        tokenizer_of(tmp_path)
    assert len(refusal.value.problems) == 1 and message in refusal.value.problems[0]
