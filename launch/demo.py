"""The entire pipeline on two CPU cores, without a network: `make demo`.

A corpus that every machine has (Python's own standard library), a small tokenizer, and a tiny Qwen3-MoE that is
pretrained autoregressively in place of a downloaded model; then exactly the commands that convert a real
Qwen3-30B-A3B to a diffusion language model.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from launch.held_out_holes import HOLE_LENGTH, Filled, compare, most_improved
from launch.random_model import write_untrained_model
from megatron_a2d.config.cli import Parser
from megatron_a2d.config.model_config import read_model_config
from megatron_a2d.terminal.console import console, entry_point, human
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import lines_of
from megatron_a2d.utils.tokenizer import read_tokenizer

VOCAB_SIZE = 4096
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    head_dim=32, intermediate_size=512, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=192,
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", default="demo_run", help="output directory; an earlier demo's is replaced")
    out = Path(parser.parse_args(argv).out)
    if out.exists() and any(out.iterdir()) and not (out / "demo.json").exists():
        raise UserError(f"--out {out}: holds files that are not a demo's; choose another directory")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "demo.json").write_text(json.dumps({"started": time.time()}))
    begin = time.perf_counter()

    _title("1  A corpus, a tokenizer, tokens")
    _module("data_prep.stdlib_corpus", "--out", out / "corpus.jsonl")
    tokenizer = out / "tokenizer"
    _module(
        "data_prep.train_tokenizer",
        "--input",
        out / "corpus.jsonl",
        "--vocab-size",
        VOCAB_SIZE,
        "--out",
        tokenizer,
    )
    _make(
        "data",
        INPUT=out / "corpus.jsonl",
        TOKENIZER=tokenizer,
        OUT=out / "corpus",
        ARGS="--valid-fraction 0.03",
    )
    data = ("--train-data-path", out / "corpus_train", "--valid-data-path", out / "corpus_valid")

    _title("2  Pretraining: a tiny Qwen3-MoE, autoregressively")
    write_untrained_model(out / "untrained", tokenizer, **SHAPE)
    _make("convert-hf", HF_MODEL=out / "untrained", OUT=out / "untrained_checkpoint")
    _train("launch/recipes/demo_ar.yaml", out / "untrained_checkpoint", out / "ar_run", data)
    _make("export", CHECKPOINT=out / "ar_run", OUT=out / "qwen3_tiny_moe", FORMAT="qwen3")

    _title("3  Conversion: from autoregressive to diffusion")
    _make("convert-hf", HF_MODEL=out / "qwen3_tiny_moe", OUT=out / "checkpoint")
    _train("launch/recipes/demo_cpu.yaml", out / "checkpoint", out / "run", data)
    _make("export", CHECKPOINT=out / "run", OUT=out / "exported", FORMAT="rnd1")
    plots = _start([_python(), "-m", "megatron_a2d.report", str(out / "run"), "--out", str(out / "report.png")])

    _title("4  Infilling: holes in held-out text, before and after conversion")
    holes = out / "holes"
    _module("launch.held_out_holes", "--data", out / "corpus_valid", "--tokenizer", tokenizer, "--out", holes)
    models = {"before": out / "checkpoint", "after": out / "exported"}
    fills = [_fill(model, holes / "holes.jsonl", holes / f"{name}.jsonl") for name, model in models.items()]
    _finish(plots, *fills)
    filled = compare(
        holes / "truth.jsonl",
        holes / "before.jsonl",
        holes / "after.jsonl",
        read_tokenizer(tokenizer / "tokenizer.json", "the demo's tokenizer"),
    )
    shown = most_improved(filled)
    variables = dict(PREFIX=shown.prefix, SUFFIX=shown.suffix, ARGS=f"--hole-length {HOLE_LENGTH} --greedy")
    infill = _start(_make_command("generate", MODEL=out / "exported", **variables))
    table = _closing_table(out, filled)
    _finish(infill)

    _title("5  Results")
    console.print(_hole_panel(shown, len(filled)))
    table.add_row("time", f"{(time.perf_counter() - begin) / 60:.1f} minutes")
    console.print(table)


def _title(text: str) -> None:
    console.rule(Text(text, style="bold"), align="left")


class _Job(NamedTuple):
    """A running command, and how one would type it."""

    shown: str
    process: subprocess.Popen[bytes]


def _start(command: list[str], environment: dict[str, str] | None = None, stdout: Path | None = None) -> _Job:
    """Print a command as one would type it, and start it; its output goes to `stdout` if given."""
    shown = " ".join(_quote(word) for word in command) + (f" > {stdout}" if stdout else "")
    console.print(Text("$", style="bold green"), Text(shown), soft_wrap=True)
    # The variables of the outer make must not reach the inner ones.
    outer = ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS")
    inherited = {name: value for name, value in os.environ.items() if name not in outer}
    with stdout.open("wb") if stdout else contextlib.nullcontext() as file:
        return _Job(shown, subprocess.Popen(command, env={**inherited, **(environment or {})}, stdout=file))


def _finish(*jobs: _Job) -> None:
    """Wait for commands; UserError if one of them failed."""
    try:
        codes = [job.process.wait() for job in jobs]
    finally:
        for job in jobs:
            job.process.kill()  # without effect on what has ended
    for job, code in zip(jobs, codes, strict=True):
        if code:
            raise UserError(f"`{job.shown}` failed with exit code {code}; its message is above")


def _module(name: str, *arguments: Any) -> None:
    _finish(_start([_python(), "-m", name, *map(str, arguments)]))


def _make(target: str, **variables: Any) -> None:
    _finish(_start(_make_command(target, **variables)))


def _make_command(target: str, **variables: Any) -> list[str]:
    given = (f"{key}={value}" for key, value in variables.items())
    return ["make", "--no-print-directory", "--silent", target, *given]


def _train(recipe: str, load: Path, save: Path, data: tuple[Any, ...]) -> None:
    command = [
        _python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megatron_a2d.train",
        "--config", recipe, "--load", load, "--save", save, *data,
    ]  # fmt: skip
    _finish(_start([str(word) for word in command], {"OMP_NUM_THREADS": "1"}))


def _fill(model: Path, holes: Path, out: Path) -> _Job:
    arguments = ("--model", model, "--input", holes, "--jsonl", "--greedy", "--num-steps", HOLE_LENGTH)
    # One of two that run at the same time.
    return _start([_python(), "-m", "megatron_a2d.generate", *map(str, arguments)], {"OMP_NUM_THREADS": "1"}, out)


def _python() -> str:
    """The interpreter's path, as short as one would type it."""
    return os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable


def _quote(word: str) -> str:
    """Quoted as one would type it in bash: only values with line breaks need $'...'."""
    if "\n" not in word:
        return shlex.quote(word)
    name, _, value = word.partition("=")
    return f"{name}=$'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _hole_panel(hole: Filled, num_holes: int) -> Panel:
    """The original text and both models' infills in their context; `prefix` and `suffix` are cut to a few lines."""
    before, after = hole.prefix.rsplit("\n", 4)[-4:], hole.suffix.split("\n", 3)[:3]

    def in_context(text: str, style: str) -> Text:
        return Text.assemble(("\n".join(before), "dim"), (lines_of(text), style), ("\n".join(after), "dim"))

    rows: list[RenderableType] = []
    for title, text, style in (
        ("original text", hole.truth, "bold green"),
        (f"before conversion: {hole.right_before} of {HOLE_LENGTH} tokens correct", hole.before, "bold red"),
        (f"after conversion: {hole.right_after} of {HOLE_LENGTH} tokens correct", hole.after, "bold cyan"),
    ):
        rows += [Rule(Text(title), align="left"), in_context(text, style)]
    rule = f"the most improved of {num_holes} held-out holes"
    return Panel(Group(*rows), title=Text("a hole in held-out text"), subtitle=Text(rule), title_align="left")


def _closing_table(out: Path, filled: list[Filled]) -> Table:
    from launch.unigram_baseline import unigram_entropy
    from megatron_a2d.data.indexed_dataset import TokenFile
    from megatron_a2d.report.plots import draw_nelbo_by_t, read_log

    model_config = read_model_config(out / "exported")
    entropy = unigram_entropy(
        TokenFile(out / "corpus_train"), TokenFile(out / "corpus_valid"), model_config.vocab_size, sample_length=128
    )
    records = read_log(out / "run")
    before, after = (
        next(record for record in ordering if record["kind"] == "validation")
        for ordering in (records, reversed(records))
    )
    speeds = sorted(record["tokens_per_second"] for record in records if record["kind"] == "train")
    events = next((out / "run" / "tensorboard").glob("events*"), None)

    plot = draw_nelbo_by_t(records, out / "nelbo_by_t.png")
    table = Table(show_header=False, title="megatron_a2d demo", title_justify="left")
    nats = "nats/token, held-out documents"
    rows = [
        (
            f"correct tokens in {len(filled)} held-out holes of {HOLE_LENGTH}",
            f"{_share(hole.right_after for hole in filled)} (before: {_share(hole.right_before for hole in filled)})",
        ),
        ("unigram entropy of the corpus", f"{entropy} {nats}"),
        ("NELBO before conversion training", f"{_plus_minus(before, 'nelbo')} {nats}"),
        ("NELBO after conversion training", f"{_plus_minus(after, 'nelbo')} {nats}"),
        (
            "accuracy on masked tokens",
            f"{_plus_minus(after, 'accuracy')} (before: {_plus_minus(before, 'accuracy')})",
        ),
        ("training speed", f"{human(speeds[len(speeds) // 2], 'tokens')}/s (median), 2 processes"),
        ("TensorBoard logs", str(events.parent if events else "missing")),
        ("plots", f"{plot}, {out / 'report.png'}"),
        ("exported model", f"{out / 'exported'} ({human(model_config.num_parameters())} parameters)"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _share(right: Iterable[int]) -> str:
    counts = list(right)
    return f"{sum(counts) / (HOLE_LENGTH * max(len(counts), 1)):.1%}"


def _plus_minus(record: dict[str, Any], name: str) -> str:
    return f"{record[name]:.3f} ± {record[name + '_standard_error']:.3f}"


if __name__ == "__main__":
    entry_point(main)
