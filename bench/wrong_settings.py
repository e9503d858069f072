"""Held-out loss by diffusion time of the demo's model with its right settings, and with one wrong setting each.

    make demo && python -m bench.wrong_settings [--demo demo_run] [--out bench/results/wrong_settings_cpu.json]

Before conversion training and after it. Wrong are the label shift or the mask token (another unused embedding) in the
export's config.json, or the token ids, permuted as if by another tokenizer. Samples and masks are those of the demo's
validation; each evaluation is a call of `python -m megatron_a2d.evaluate`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from bench.result_tables import machine
from checkpoints_tools import export_hf
from megatron_a2d import evaluate
from megatron_a2d.config.cli import Parser
from megatron_a2d.data.indexed_dataset import TokenFile
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.terminal.console import console, entry_point
from megatron_a2d.utils.atomic_write import write_json

STAGES = ("before step 1", "after training")
WRONG: dict[str, dict[str, Any]] = {
    "label shift": {"label_shift": False},
    "mask token": {"mask_token_id": 4089},  # the demo's is 4088, and no token uses either
    "tokenizer": {},
}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="bench.wrong_settings", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("demo_run"), help="directory that make demo wrote")
    parser.add_argument("--seq-length", type=int, default=128, help="tokens per sample, as in the demo")
    parser.add_argument("--num-samples", type=int, default=512, help="samples, as in the demo")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench_wrong_settings") as name:
        scratch = Path(name)
        before = scratch / "before"
        export = ["--checkpoint", options.demo / "checkpoint", "--out", before, "--format", "rnd1"]
        export_hf.main([*map(str, export), "--allow-objective-mismatch", "--no-verify"])
        right = options.demo / "corpus_valid"
        permuted = permute(right, scratch / "permuted")
        for stage, model in zip(STAGES, (before, options.demo / "exported"), strict=True):
            results[stage] = {}
            for wrong in ("none", *WRONG):
                changed = with_config(model, scratch / f"{stage} {wrong}", WRONG.get(wrong, {}))
                data = permuted if wrong == "tokenizer" else right
                out = scratch / f"{stage} {wrong} results"
                words = ["--model", changed, "--valid-data-path", f"text={data}", "--seq-length", options.seq_length]
                words += ["--num-samples", options.num_samples, "--no-verify-tokenizer", "--out", out]
                evaluate.main(list(map(str, words)))
                results[stage][wrong] = json.loads((out / "results.json").read_text())["held_out"]["text"]
    for stage, found in results.items():
        for wrong, values in found.items():
            console.print(f"{stage}, wrong: {wrong}: NELBO {values['nelbo']:.3f} nats/token")
    if options.out:
        write_json(options.out, {"machine": machine(), "wrong_settings": results})


SHOWN = ("0.0-0.1", "0.6-0.7", "0.9-1.0")  # of the bins of time


def block(stored: dict[str, Any]) -> str:
    """The documents' table, from a result file."""
    rows = []
    for stage in STAGES:
        for wrong in ("none", *WRONG):
            values = stored["wrong_settings"][stage][wrong]
            bins = {f"{one['low']:.1f}-{one['high']:.1f}": f"{one['mean']:.2f}" for one in values["nelbo_by_time"]}
            figures = [f"{values['nelbo']:.2f}", f"{values['accuracy']:.1%}"]
            rows.append([stage, "-" if wrong == "none" else wrong, *(bins[name] for name in SHOWN), *figures])
    return markdown_table(["stage", "wrong", *SHOWN, "NELBO", "accuracy"], rows)


def with_config(model: Path, copy: Path, changes: dict[str, Any]) -> Path:
    """A copy of an exported model with other values in its config.json."""
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def permute(prefix: Path, out: Path) -> Path:
    """The same .bin/.idx files with all token ids below the special ones permuted."""
    special = json.loads(Path(f"{prefix}.json").read_text())["eod_token_id"]
    ids = np.arange(special + 1)
    ids[:special] = np.random.default_rng(0).permutation(special)
    dtype = TokenFile(prefix).dtype
    ids[np.fromfile(f"{prefix}.bin", dtype=dtype)].astype(dtype).tofile(f"{out}.bin")
    shutil.copy(f"{prefix}.idx", f"{out}.idx")
    return out


if __name__ == "__main__":
    entry_point(main)
