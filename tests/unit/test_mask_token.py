"""The mask token of an export: its tokenizer and its config.json name the same one, under both lines of transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.conversion.mask_token_registration import register_mask_token
from megatron_a2d.conversion.torch_dist_to_hf import export
from megatron_a2d.inference.hf_model import check_mask_token
from megatron_a2d.utils.errors import UserError
from tests import tiny
from tests.unit.test_hf_export_model import TRANSFORMERS4

TEXT = "the rat <|im_end|> and\n(more)"


def split_specials(directory: Path) -> None:
    """As in Qwen3's tokenizer.json: special tokens follow the model's vocabulary and are not in it."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    specials = [item["content"] for item in content["added_tokens"]]
    words = [word for word in content["model"]["vocab"] if word not in specials]
    content["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    for number, item in enumerate(content["added_tokens"]):
        item["id"] = len(words) + number
    path.write_text(json.dumps(content))


def declare(directory: Path, token: Any, added: str = "") -> None:
    """mask_token of tokenizer_config.json, and a token more in tokenizer.json."""
    if added:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.add_special_tokens(["<|unused|>", added])
        tokenizer.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ({"mask_token": token} if token else {})))


def declare_with_a_gap(directory: Path) -> None:
    """In tokenizer.json under an id that the library does not heed: it gives the next one, 250."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 253, "content": "[MSK]"})
    path.write_text(json.dumps(content))
    declare(directory, "[MSK]")


def declare_beside(directory: Path) -> None:
    """In tokenizer_config.json alone, with an id that is not the next one."""
    declare(directory, "[MSK]")
    path = directory / "tokenizer_config.json"
    names = {**dict(enumerate(tiny.SPECIAL_TOKENS)), 252: "[MSK]"}
    decoder = {str(i): {"content": name, "special": True} for i, name in names.items()}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": decoder}))


def fill(directory: Path, name: str) -> None:
    """As in Llama 3, no id is left; the first token beyond the text's is not reserved."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    kind = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    names = ["<|finetune|>", *(name.format(i) for i in range(1, tiny.VOCAB_SIZE - tiny.NUM_TOKENS))]
    content["added_tokens"] += [{"id": tiny.NUM_TOKENS + i, "content": token, **kind} for i, token in enumerate(names)]
    path.write_text(json.dumps(content))


def fill_with_an_unknown(directory: Path) -> None:
    """As in Llama 2."""
    fill(directory, "<word {}>")
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][-4]["content"] = "<unk>"
    content["model"] |= {"byte_fallback": True, "unk_token": "<unk>"}
    path.write_text(json.dumps(content))


# What is done to the tokenizer before conversion, --mask-token-id, and the id and name that are right.
CASES: dict[str, tuple[Any, int | None, int, str]] = {
    "none": (lambda d: None, None, 250, "<|mask|>"),
    "as in Qwen3": (split_specials, None, 250, "<|mask|>"),
    "beyond the next id": (lambda d: None, 255, 255, "<|mask|>"),
    "as in Qwen3, beyond the next id": (split_specials, 253, 253, "<|mask|>"),
    "declared": (lambda d: declare(d, "[MSK]", "[MSK]"), None, 251, "[MSK]"),
    "declared as an object": (lambda d: declare(d, {"content": "[MSK]"}, "[MSK]"), None, 251, "[MSK]"),
    "by name": (lambda d: declare(d, None, "<|mask|>"), None, 251, "<|mask|>"),
    "another than the tokenizer's": (lambda d: declare(d, None, "<|mask|>"), 254, 254, "<|mask:254|>"),
    "declared with a gap": (declare_with_a_gap, None, 250, "[MSK]"),
    "another beside a gap": (declare_with_a_gap, 254, 254, "<|mask|>"),
    "declared beside": (declare_beside, None, 252, "[MSK]"),
    "declared without an id": (lambda d: declare(d, "[MASK]"), None, 250, "<|mask|>"),
    "every id is used, some are reserved": (lambda d: fill(d, "<|reserved_special_token_{}|>"), None, 251, "<|reserved_special_token_1|>"),
    "a reserved one by id": (lambda d: fill(d, "<|reserved_special_token_{}|>"), 253, 253, "<|reserved_special_token_3|>"),
    "every id is used, unknown characters are bytes": (fill_with_an_unknown, None, 252, "<unk>"),
}  # fmt: skip


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("masks")
    done = {}
    for number, (name, (change, requested, _, _)) in enumerate(CASES.items()):
        hf = tiny.write_hf(root / f"hf_{number}", "moe", num_hidden_layers=1)
        change(hf)
        convert(hf, root / f"ckpt_{number}", requested, verify=False)
        form: Any = "rnd1" if number % 2 else "a2d"
        export(root / f"ckpt_{number}", root / f"out_{number}", form, verify=False)
        done[name] = root / f"out_{number}"
    return done


@pytest.mark.parametrize("case", CASES)
def test_the_tokenizer_names_the_id_of_the_configuration(case: str, exports: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    _, _, mask, name = CASES[case]
    out = exports[case]
    source = out.with_name(out.name.replace("out", "hf"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    assert (tokenizer.mask_token_id, tokenizer.mask_token, config["mask_token_id"]) == (mask, name, mask)
    # All else is as it was, and the token is one token of a text and none of what is shown.
    before = Tokenizer.from_file(str(source / "tokenizer.json"))
    after = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert after.get_vocab() == before.get_vocab() | {name: mask}
    assert after.encode(TEXT).ids == before.encode(TEXT).ids
    assert after.encode(f"a{name}b").ids[1:-1] == [mask]
    assert after.decode([mask, 5]) == before.decode([5])
    check_mask_token(out, mask, tiny.VOCAB_SIZE)


@pytest.mark.skipif(not TRANSFORMERS4, reason="A2D_TRANSFORMERS4 does not name a directory with transformers 4.57")
def test_so_does_the_older_transformers(exports: dict[str, Path]) -> None:
    script = (
        "import sys, transformers\nassert transformers.__version__.startswith('4.57')\n"
        "for path in sys.argv[1:]:\n    t = transformers.AutoTokenizer.from_pretrained(path)\n"
        "    print(t.mask_token_id, t.mask_token)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(TRANSFORMERS4)}
    shown = subprocess.run(
        [sys.executable, "-c", script, *map(str, exports.values())],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout.split("\n")  # fmt: skip
    assert shown[:-1] == [f"{mask} {name}" for _, _, mask, name in CASES.values()]


@pytest.mark.parametrize("requested", [None, 0])
def test_an_end_token_is_no_mask(requested: int | None, tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "dense", num_hidden_layers=1)
    declare(hf, "<|endoftext|>")
    with pytest.raises(UserError, match=r"its mask token, 0, is also an end-of-text token; .* --mask-token-id"):
        convert(hf, tmp_path / "out", requested)
    assert convert(hf, tmp_path / "out", 250, verify=False).mask_token_id == 250


def test_an_export_is_converted_with_the_same_mask(exports: dict[str, Path], tmp_path: Path) -> None:
    out = exports["another than the tokenizer's"]
    assert convert(out, tmp_path / "again", verify=False).mask_token_id == 254
    assert convert(out, tmp_path / "same", 254, verify=False).mask_token_id == 254
    config = json.loads((out / "config.json").read_text())
    del config["objective"]  # of a trained model
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"--mask-token-id 252: .* was trained with 254"):
        convert(out, tmp_path / "other", 252)


def test_the_files_beside_the_tokenizer_follow(tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    files: dict[str, Any] = {
        "tokenizer_config.json": {"added_tokens_decoder": {"0": {"content": "<|endoftext|>"}}},
        "special_tokens_map.json": {"pad_token": "<|endoftext|>"}, "added_tokens.json": {"<|endoftext|>": 0},
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    register_mask_token(tmp_path, 250)
    settings, special, added = (json.loads((tmp_path / name).read_text()) for name in files)
    assert settings["mask_token"] == special["mask_token"] == "<|mask|>"
    assert settings["added_tokens_decoder"].keys() == {"0", "250"} and added == {"<|endoftext|>": 0, "<|mask|>": 250}
    written = {path: path.read_bytes() for path in tmp_path.iterdir()}
    register_mask_token(tmp_path, 250)  # again: nothing changes
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == written


def test_a_tokenizer_that_cannot_say_the_id(tmp_path: Path) -> None:
    from tokenizers import models

    Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], unk_id=0)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"a mask token of id 7 cannot be added .* --mask-token-id 2"):
        register_mask_token(tmp_path, 7)
