#!/bin/bash
# Guess before running: encode_files on JSON Lines either fails at a record without a text, or leaves out that record.
#
# Seen with gigatoken 0.10.0 (numpy 2.4.6, awkward 2.14.0): the first record whose field is missing, null or not a
# string ends its chunk (here the file), without an error or a warning; all later documents are lost. Blank lines are
# left out. Rows of five records, the third of which is
#   complete:      5
#   a blank line:  4
#   without text:  2
#   null:          2
#   a number:      2
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gigatoken==0.10.0 numpy==2.4.6 awkward==2.14.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import pathlib
import sys

import gigatoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

root = pathlib.Path(sys.argv[1])
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train_from_iterator(["some text"] * 9, trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
tokenizer.save(str(root / "tokenizer.json"))
fast = gigatoken.Tokenizer(str(root / "tokenizer.json"))

thirds = {
    "complete": {"text": "text 3"},
    "a blank line": None,
    "without text": {"title": "text 3"},
    "null": {"text": None},
    "a number": {"text": 3},
}
seen = {}
for name, third in thirds.items():
    records = [{"text": f"text {number}"} for number in (1, 2, 4, 5)]
    lines = [json.dumps(record) for record in records]
    lines.insert(2, "" if third is None else json.dumps(third))
    path = root / "corpus.jsonl"
    path.write_text("\n".join(lines) + "\n")
    seen[name] = len(fast.encode_files(gigatoken.JsonlFileSource([str(path)], field="text")))
    print(f"{name + ':':14} {seen[name]}")
expected = {"complete": 5, "a blank line": 4, "without text": 2, "null": 2, "a number": 2}
sys.exit(seen != expected)
PYTHON
