"""The benchmark's side that repeats only the matrix products and the attention of a step."""

from __future__ import annotations

import json
import os
import subprocess

import torch
import torch.nn.functional as F

from bench.cpu_train_step import SHAPES, words
from bench.result_file import ROOT
from bench.train_step_variants import ProductRecorder


def test_products_and_attention_are_recorded_and_nothing_else() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    heads = torch.randn(1, 2, 4, 8, requires_grad=True)
    with ProductRecorder() as recorder:
        (F.silu(x @ weight.T) * 2).sum().backward()
        F.scaled_dot_product_attention(heads, heads, heads).sum().backward()
    names = [call.func.overloadpacket.__name__ for call in recorder.calls]
    assert names[:3] == ["mm"] * 3  # forward, and the gradients of both
    assert len(names) == 5 and all("attention" in name for name in names[3:])


def test_a_worker_repeats_them() -> None:
    model = SHAPES["moe"] | {"num_hidden_layers": 1}
    job = {"model": model, "micro_batch_size": 1, "batch": 1, "seq_length": 16, "bf16": False, "kind": "products"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words(job), input="run\n", capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    ready, used = map(json.loads, done.stdout.splitlines())
    assert ready == {"ready": True} and used["cpu"] > 0
