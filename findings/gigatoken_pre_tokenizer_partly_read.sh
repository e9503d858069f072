#!/bin/bash
# Guess before running: gigatoken refuses a tokenizer.json whose pre-tokenizer it does not implement, as it refuses
# normalizers and patterns that it does not know.
#
# Seen with gigatoken 0.10.0 (numpy 2.4.6) against tokenizers 0.23.3: it looks for a ByteLevel, or for a Split with a
# pattern that it knows, and leaves the rest aside without an error or a warning. Tokens of "a b" and of "a_b" by a
# vocabulary of bytes and of "a b", which only a pre-tokenizer that does not cut at spaces can give:
#   pre-tokenizer                            tokenizers               gigatoken
#   ByteLevel                                a|Ġ|b    a|_|b           the same
#   ByteLevel, use_regex false               aĠb      a|_|b           a|Ġ|b    a|_|b
#   Split, ByteLevel                         a|Ġ|b    a|_|b           the same
#   WhitespaceSplit, Split, ByteLevel        a|b      a|_|b           a|Ġ|b    a|_|b
#   CharDelimiterSplit "_", Split, ByteLevel a|Ġ|b    a|b             a|Ġ|b    a|_|b
#   Split, ByteLevel with add_prefix_space   Ġ|a|Ġ|b  Ġ|a|Ġ|_|b       Ġ|a|Ġ|b  Ġ|a|_|b
#   Digits, ByteLevel                        a|Ġ|b    a|_|b           refused
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gigatoken==0.10.0 numpy==2.4.6 awkward==2.14.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import pathlib
import sys

import gigatoken
from tokenizers import Regex, Tokenizer, models
from tokenizers import pre_tokenizers as pre

PATTERN = (  # Qwen's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
path = pathlib.Path(sys.argv[1]) / "tokenizer.json"
names = sorted(pre.ByteLevel.alphabet()) + ["aĠ", "aĠb"]
merges = [("a", "Ġ"), ("aĠ", "b")]


def split():
    return pre.Split(Regex(PATTERN), "isolated")


def byte_level(prefix=False, regex=False):
    return pre.ByteLevel(add_prefix_space=prefix, use_regex=regex)


def tokens(pre_tokenizer):
    reference = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges))
    reference.pre_tokenizer = pre_tokenizer
    reference.save(str(path))
    try:
        fast = gigatoken.Tokenizer(str(path))
    except Exception:  # of its own kind
        fast = None
    encoders = [lambda text: reference.encode(text).ids]
    if fast is not None:
        encoders.append(fast.encode)
    return ["  ".join("|".join(names[i] for i in encode(text)) for text in ("a b", "a_b")) for encode in encoders]


plain = "a|Ġ|b  a|_|b"
cases = {
    "ByteLevel": (byte_level(regex=True), [plain, plain]),
    "ByteLevel, use_regex false": (byte_level(), ["aĠb  a|_|b", plain]),
    "Split, ByteLevel": (pre.Sequence([split(), byte_level()]), [plain, plain]),
    "WhitespaceSplit, Split, ByteLevel": (
        pre.Sequence([pre.WhitespaceSplit(), split(), byte_level()]),
        ["a|b  a|_|b", plain],
    ),
    "CharDelimiterSplit, Split, ByteLevel": (
        pre.Sequence([pre.CharDelimiterSplit("_"), split(), byte_level()]),
        ["a|Ġ|b  a|b", plain],
    ),
    "Split, ByteLevel with add_prefix_space": (
        pre.Sequence([split(), byte_level(prefix=True)]),
        ["Ġ|a|Ġ|b  Ġ|a|Ġ|_|b", "Ġ|a|Ġ|b  Ġ|a|_|b"],
    ),
    "Digits, ByteLevel": (pre.Sequence([pre.Digits(), byte_level(regex=True)]), [plain]),
}
changed = False
for name, (pre_tokenizer, expected) in cases.items():
    seen = tokens(pre_tokenizer)
    print(f"{name}: {' / '.join(seen)}{'' if len(seen) == 2 else ' / refused'}")
    changed |= seen != expected
sys.exit(changed)
PYTHON
