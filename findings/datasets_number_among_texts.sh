#!/bin/bash
# Guess before running: a number among the texts of a JSON Lines file reads the same wherever it stands in the file.
#
# Seen with datasets 5.2.0 (pyarrow 26.0.1), streaming and not: the column's type follows from the first chunk alone
# (10 MB by default; 10 kB here). A number in the first chunk gives every value back as it was written. A number in a
# later chunk becomes text, and every other text of that chunk comes back inside JSON quotation marks, without a warning:
#   line 3:   {'text 10': 'text 10', 'number': 5}
#   line 400: {'text 390': '"text 390"', 'number': '5'}
# With the column declared as datasets.Json() both read as they were written.
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import pathlib
import sys

import datasets

root = pathlib.Path(sys.argv[1])


def read(place, near, **options):
    path = root / f"{place}.jsonl"
    lines = [{"text": 5 if n == place else f"text {n}", "padding": "x" * 80} for n in range(600)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = datasets.load_dataset(
        "json", data_files=str(path), split="train", streaming=True, chunksize=10_000, **options
    )
    texts = [row["text"] for row in rows]
    return {f"text {near}": texts[near], "number": texts[place]}


features = datasets.Features({"text": datasets.Json(), "padding": datasets.Value("string")})
seen = [read(3, 10), read(400, 390), read(400, 390, features=features)]
for name, values in zip(("line 3", "line 400", "line 400, declared Json()"), seen):
    print(f"{name}: {values}")
expected = [
    {"text 10": "text 10", "number": 5},
    {"text 390": '"text 390"', "number": "5"},
    {"text 390": "text 390", "number": 5},
]
sys.exit(seen != expected)
PYTHON
