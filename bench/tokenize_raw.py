"""Seconds (wall, CPU) that gigatoken takes for the documents of a .jsonl file in memory; part of bench/tokenize.py.

python -m bench.tokenize_raw corpus.jsonl tokenizer THREADS
"""

from __future__ import annotations

import json
import sys
import time


def main(corpus: str, tokenizer: str, threads: str) -> None:
    import gigatoken

    with open(corpus, "rb") as stream:
        documents = [json.loads(line)["text"].encode() for line in stream]
    encoder = gigatoken.Tokenizer(f"{tokenizer}/tokenizer.json")
    wall, cpu = time.perf_counter(), time.process_time()
    encoder.encode_batch(documents, parallel=int(threads) > 1)
    print(time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    main(*sys.argv[1:])
