"""Worker of bench.cpu_train_step: takes a training step for each line on stdin, and answers with its times as JSON.

Runs in the packages of any build of this project, on PYTHONPATH: of the build's own bench/ it takes `our_step` or
`hugging_face_step` and `Batches`, which have kept their arguments. Imports no other module of these benchmarks.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

MODULES = ("bench.train_step_variants", "bench.steps")  # the newer builds' and the older ones' name


def main(job: dict[str, Any]) -> None:
    warnings.filterwarnings("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not an answer
    step = prepared(job)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        used = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(used), file=answers, flush=True)


def prepared(job: dict[str, Any]) -> Callable[[], None]:
    """The step to time."""
    import torch

    variants = import_module(next(name for name in MODULES if find_spec(name)))
    size = job["micro_batch_size"]
    batches = variants.Batches(size, job["seq_length"], job["model"]["mask_token_id"], job["batch"] // size)
    run: Callable[[], None]
    if job["kind"] == "hugging_face":
        run = variants.hugging_face_step(job["model"], batches, torch.device("cpu"), bf16=job["bf16"]).run
    else:
        make = variants.our_products if job["kind"] == "products" else variants.our_step
        run = make(job["model"], batches, {"bf16": True} if job["bf16"] else {}).run
    return run


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
