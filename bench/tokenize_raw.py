"""gigatoken by itself; part of bench/tokenize.py.

    python -m bench.tokenize_raw encode corpus.jsonl tokenizer THREADS
    python -m bench.tokenize_raw files corpus.jsonl tokenizer THREADS OUT

encode  prints the seconds (wall, CPU) of `encode_batch` for the documents in memory
files   the library's own way from the same file to tokens on the disk: its reader of JSON Lines and `encode_files`,
        then the ids in the width of the token file, and the lengths, written and flushed
"""

from __future__ import annotations

import json
import os
import sys
import time


def encode(corpus: str, tokenizer: str, threads: str) -> None:
    import gigatoken

    with open(corpus, "rb") as stream:
        documents = [json.loads(line)["text"].encode() for line in stream]
    encoder = gigatoken.Tokenizer(f"{tokenizer}/tokenizer.json")
    wall, cpu = time.perf_counter(), time.process_time()
    encoder.encode_batch(documents, parallel=int(threads) > 1)
    print(time.perf_counter() - wall, time.process_time() - cpu)


def files(corpus: str, tokenizer: str, threads: str, out: str) -> None:
    import awkward
    import gigatoken
    import numpy as np

    encoder = gigatoken.Tokenizer(f"{tokenizer}/tokenizer.json")
    source = gigatoken.JsonlFileSource([corpus])
    encoded = encoder.encode_files(source, parallel=int(threads) > 1)
    lengths = awkward.to_numpy(awkward.num(encoded))
    ids = awkward.to_numpy(awkward.flatten(encoded))
    narrow = np.uint16 if encoder.vocab_size < 65500 else np.int32
    with open(f"{out}.bin", "wb") as tokens, open(f"{out}.idx", "wb") as index:
        ids.astype(narrow).tofile(tokens)
        lengths.astype(np.int32).tofile(index)
        for stream in (tokens, index):
            os.fsync(stream.fileno())


if __name__ == "__main__":
    if sys.argv[1] == "encode":
        encode(*sys.argv[2:])
    else:
        files(*sys.argv[2:])
