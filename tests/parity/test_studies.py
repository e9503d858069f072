"""Whole studies on a tiny model, from the plan to the page: every job is the real one, in a process of the pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_a2d.checkpoint.directory import HF_FILES, resolve
from megatron_a2d.config.model_config import read_model_config
from megatron_a2d.config.settings import build
from megatron_a2d.study import command
from megatron_a2d.study.ablations import (
    batch_ramp,
    block_lengths,
    critical_batch_size,
    low_precision,
    lr_by_role,
    mask_sampling,
    timestep_sampling,
)
from megatron_a2d.study.command import STUDIES, find_study, run_study
from megatron_a2d.study.runner import Runner
from tests.cases import Case
from tests.parity.pool import Pool

# Of each plan as much as shows all of its parts.
SMALL = (
    (lr_by_role, "RATIOS", (1.0, 0.0)), (lr_by_role, "ATTENTION_LR", (1.0,)), (critical_batch_size, "FACTORS", (0.5, 1.0)), (batch_ramp, "RAMP", (0.5, 1.0)),
    (critical_batch_size, "NUM_GROUPS", 2), (critical_batch_size, "BATCHES_PER_GROUP", 2), (timestep_sampling, "NUM_GROUPS", 2),
    (timestep_sampling, "BATCHES_PER_GROUP", 2), (low_precision, "NUM_BATCHES", 1), (mask_sampling, "NUM_GROUPS", 2), (mask_sampling, "BATCHES_PER_GROUP", 2),
    (block_lengths, "NUM_TEXTS", 4), (block_lengths, "NUM_HOLES", 4), (block_lengths, "TOKENS_PER_PASS", (1, 8)),
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "layer-lr" else pytest.mark.full) for name in STUDIES]
)
def test_a_whole_study(
    name: str, cases: dict[str, Case], pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, constant, value in SMALL:
        monkeypatch.setattr(module, constant, value)
    started: list[str] = []

    def call(self: Runner, directory: Path, module: str, *arguments: str) -> None:
        started.append(f"{module} {directory.name}")
        pool.run("command", 1, module=module, arguments=list(arguments))

    monkeypatch.setattr(Runner, "_call", call)
    monkeypatch.setattr(command, "hold_directory", lambda path, flag: None)  # this process outlives its first study
    case = cases["dense" if name == "precision" else "moe"]  # the experts' 40 rows are no multiple of 32
    settings: dict[str, Any] = {
        **case.settings, "load": case.checkpoint, "seq_length": 32, "global_batch_size": 8, "micro_batch_size": 4,
        "train_iters": 4, "eval_iters": 1, "eval_interval": 100, "save_interval": 2, "log_interval": 2, "num_workers": 0,
        "lr": 1e-2,
    }  # fmt: skip
    arguments = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    arguments += ["--out", str(tmp_path / "out"), "--seeds", "2" if name == "masks" else "1"]
    run_study(name, arguments)
    page = (tmp_path / "out" / f"{name}.md").read_text()
    assert page.startswith(f"# {find_study(name).title}") and f"![results]({name}.png)" in page
    assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000
    rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
    count = len(started)
    model_config = read_model_config(resolve(case.checkpoint) / HF_FILES)
    assert count >= len(find_study(name).plan(build(settings), [1000], model_config)) and rows
    run_study(name, arguments)
    assert len(started) == count
    if name == "layer-lr":
        before, together, attention = rows
        assert set(attention["drift"].values()) - {attention["drift"]["attention"]} == {0.0}
        assert min(together["drift"].values()) > 0 and before["AR perplexity"] != together["AR perplexity"]
    if name == "block":
        before, *rows = rows
        for row in rows:
            own, short, long = (row[column] for column in ("NELBO, own attention", "block NELBO, 4", "block NELBO, 32"))
            if row["variant"] != "SCP":
                assert own == (short if row["variant"].startswith("block 4") else long), "one model, blocks, and masks"
            assert short != long and 0 <= row["infilling as sampled"] <= 1
            assert row["text"][0]["tokens_per_pass"] == pytest.approx(1, rel=0.1)
        assert (
            len({row["AR perplexity"] for row in rows}) == 7 and before["text"][0]["nll"] != before["held out"]["nll"]
        )
        assert min(row["tokens per forward pass"] for row in rows) >= 1
    if name == "precision":
        errors = {row["variant"]: [at["relative_error"] for at in row["gradient"]] for row in rows}
        for plain, mxfp8, nvfp4 in zip(errors["bf16"], errors["mxfp8"], errors["nvfp4"], strict=True):
            assert 1e-4 < plain < mxfp8 / 2 < nvfp4 / 4, "each format is coarser than the one before"
        assert errors["mxfp8"] != errors["mxfp8 with the head"] != errors["mxfp8, first and last layers in bf16"]
