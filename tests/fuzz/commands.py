"""Every command, with one odd argument or one odd file at a time: a line and an exit code, never a traceback.

    python -m tests.fuzz.commands --n 1000 --seed 0        (make fuzz N= SEED=)

The commands run in this process, as `python -m` would run them (console.entry_point). A case is a pure function of its
seed, so that `--only NUMBER` shows one again.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.exit_codes import ENDINGS
from tests.fuzz.odd import ODD_WORDS, copy_of, damage

LONGEST = 60  # seconds of a case on a busy machine; without odd input the slowest takes three
_CODES = {row.code for row in ENDINGS}


class Command(NamedTuple):
    """`arguments` with `{name}` where a path goes: of a file or directory in `make_inputs`, or `{out}` for a new one."""

    module: str
    arguments: str
    extra: Sequence[str] = ()  # flags with a good value, of which some are added


CONVERSION = ("--workers 1", "--dtype bf16", "--allow-nonfinite")
RUN = (
    "--lr 1e-4", "--train-iters 4", "--seed 3", "--lr-mult mlp=0.5", "--num-workers 0", "--objective block",
    "--block-length 4", "--valid-data-path {tokens}", "--config {recipe}", "--data-mixture {mixture}", "--world-size 8",
    "--tensor-model-parallel-size 2", "--micro-batch-size 2", "--ckpt-step 2", "--cluster {cluster}", "--save {run}",
    "--expert-model-parallel-size 2", "--model {hf}", "--settings-only", "--bf16", "--cuda-graph-scope attn",
    "--train-samples 64", "--train-tokens 4096", "--rampup-batch-size 4 2 16", "--batch-schedule {batches}",
    "--lr-warmup-samples 8", "--skip-samples 4-7 12-12", "--on-spike rollback",
)  # fmt: skip
COMMANDS = {
    "train": Command(
        "megatron_a2d.train",
        "--load {checkpoint} --train-data-path {tokens} --seq-length 32 --global-batch-size 8 --dry-run", RUN,
    ),
    "plan": Command(
        "megatron_a2d.plan", "--load {checkpoint} --cluster {cluster} --gpus 8 --config {recipe} --seq-length 32",
        ("--price 3.5", "--imbalance 1.5", "--all", "--plot {out}.png", "--lr 0.1", "--global-batch-size 64",
         "--run --node-mtbf-hours 100 --restart-minutes 5 --storage-gb-per-s 2"),
    ),
    "preflight": Command(
        "megatron_a2d.preflight.__main__",
        "--load {checkpoint} --train-data-path {tokens} --seq-length 32 --global-batch-size 7", ("--full", *RUN),
    ),
    "study": Command(
        "megatron_a2d.study.__main__",
        "probe --out {out} --config {recipe} --load {checkpoint} --train-data-path {tokens} --valid-data-path {tokens} "
        "--plan --seq-length 32", ("--seeds 2", "--jobs 2", "--launcher x", "--page {out}", "--lr 0.1"),
    ),
    "inspect_batch": Command("megatron_a2d.inspect_batch", "{batch} --model {export}", ("--show 1", "--ckpt-step 2")),
    "report": Command("megatron_a2d.study.__main__", "report {run} --out {out}.png"),
    "generate": Command(
        "megatron_a2d.generate", "--model {export} --prompt ab --max-new-tokens 4 --num-steps 2",
        ("--temperature 0.5", "--top-p 0.9", "--top-k 3", "--seed 1", "--jsonl", "--stats", "--save-html {out}.html",
         "--num-samples 2", "--sampler eb", "--block-length 2", "--batch-size 2", "--input {prompts}"),
    ),
    "evaluate": Command(
        "megatron_a2d.evaluate", "--model {export} --out {out} --valid-data-path {tokens} --seq-length 16 --num-batches 1",
        ("--config {evaluation_recipe}", "--compare-with {evaluated}", "--mc-num 2", "--batch-tokens 64", "--limit 1"),
    ),
    "convert_hf": Command(
        "checkpoints_tools.convert_hf", "--hf-model {hf} --out {out}", ("--mask-token-id 255", "--no-verify", *CONVERSION)
    ),
    "convert_megatron": Command(
        "checkpoints_tools.convert_megatron", "--megatron {checkpoint} --out {out} --mask-token-id 255",
        ("--hf-model {hf}", "--vocab-size 256", "--no-verify", *CONVERSION),
    ),
    "export_hf": Command(
        "checkpoints_tools.export_hf", "--checkpoint {trained} --out {out} --format a2d",
        ("--evaluation {results}", "--max-shard-size 1MB", "--no-verify", *CONVERSION),
    ),
    "verify": Command("checkpoints_tools.verify", "--hf-model {hf} --checkpoint {checkpoint}", ("--logits",)),
    "inspect": Command("checkpoints_tools.inspect", "--checkpoint {trained}", ("--no-norms",)),
    "average": Command(
        "checkpoints_tools.average", "--checkpoints {checkpoint} {checkpoint} --out {out}",
        ("--ema-decay 0.5", *CONVERSION),
    ),
    "publish": Command(
        "checkpoints_tools.publish", "--hf-model {export} --repo a/b --dry-run", ("--message x", "--private")
    ),
    "synthesize": Command(
        "checkpoints_tools.synthesize", "--size {hf} --out {out} --num-hidden-layers 1",
        ("--dtype fp16", "--fused", "--max-shard-size 1MB", "--tokenizer {hf}"),
    ),
    "tokenize_corpus": Command(
        "data_prep.tokenize_corpus", "--input {corpus} --tokenizer {hf} --output-prefix {out} --workers 1 "
        "--encoder reference --valid-fraction 0", ("--json-keys text", "--min-tokens 1", "--deduplicate",
                                 "--max-tokens 50", "--on-error skip", "--no-append-eod", "--shard 1/2", "--merge-shards"),
    ),
    "inspect_dataset": Command(
        "data_prep.inspect_dataset", "--data-path {tokens} --tokenizer {hf} --show 1 --seq-length 16",
        ("--times 0.5", "--plot {out}.png"),
    ),
    "download": Command(
        "data_prep.download", "--data-mixture {mixture} --out {out}", ("--sources a", "--shard-megabytes 1",
                                                                      "--max-documents 3"),
    ),
    "mixture_dry_run": Command(
        "data_prep.mixture_dry_run", "--data-mixture {mixture} --seq-length 16",
        ("--tokens-per-second {run}", "--tokens-per-second 1e6", "--max-epochs 2", "--train-tokens 1000", "--config {recipe}"),
    ),
    "train_tokenizer": Command(
        "data_prep.train_tokenizer", "--input {corpus} --out {out} --vocab-size 300",
        ("--json-keys text", "--reserved-tokens 2"),
    ),
}  # fmt: skip


def make_inputs(root: Path) -> dict[str, Path]:
    """Good inputs of every kind, by the name that `Command.arguments` gives them."""
    from checkpoints_tools import convert_hf, export_hf
    from megatron_a2d.checkpoint.manifest import write_manifest
    from tests.tiny import write_hf, write_tokens

    hf = write_hf(root / "hf", "moe")
    quiet = StringIO()
    with redirect_stdout(quiet), redirect_stderr(quiet):
        convert_hf.main(["--hf-model", str(hf), "--out", str(root / "checkpoint"), "--no-verify", "--workers", "1"])
        from megatron_a2d.config.settings import RunConfig

        trained = copy_of(root / "checkpoint" / "release", root / "trained" / "iter_0000002")
        (trained.parent / "latest_checkpointed_iteration.txt").write_text("2")
        settings = RunConfig().to_dict() | {"seq_length": 32, "train_data_path": "data/code"}
        (trained / "run.json").write_text(json.dumps(settings))
        write_manifest(trained)
        arguments = ["--checkpoint", str(root / "checkpoint"), "--out", str(root / "export"), "--format", "a2d"]
        export_hf.main([*arguments, "--no-verify", "--workers", "1"])
    write_tokens(root / "tokens", 40, 250, seed=0)
    run = copy_of(root / "trained", root / "run")
    records: list[dict[str, Any]] = [{"kind": "start", "iteration": 0, "settings": settings}]
    records += [{"kind": "train", "iteration": n, "loss": 5.0 - n, "loss_by_t": {"0.0": 1.0}} for n in range(1, 4)]
    records += [{"kind": "validation", "iteration": 2, "nelbo": 3.0, "nelbo_standard_error": 0.1}]
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = {
        "recipe.yaml": "lr: 1e-4\nlr_mult:\n  mlp: 0.1\nglobal_batch_size: 8\nvalid_data_path:\n",
        "mixture.yaml": json.dumps({"sources": {
            "a": {"train_path": str(root / "tokens"), "weight": 1, "hub": {"dataset": str(root / "none")}},
            "b": {"train_path": str(root / "tokens"), "weight": 2.5, "max_epochs": 3},
        }}),
        "cluster.yaml": (Path(__file__).parents[2] / "launch" / "clusters" / "h100.yaml").read_text(),
        "evaluation_recipe.yaml": "mc_num: 2\nbatch_tokens: 64\n",
        "batches.txt": "samples batch\n0 4\n16 8\n",
        "prompts.jsonl": '{"prompt": "ab"}\n{"prefix": "a", "suffix": "b", "hole_length": 2}\n',
        "corpus.jsonl": "".join(json.dumps({"text": f"text {n} of the corpus"}) + "\n" for n in range(40)),
        "results.json": json.dumps({"held_out": {"nelbo": 3.0}, "tasks": {"x": {"acc": 0.5}}}),
        "evaluated/results.json": json.dumps({
            "model": "m", "objective": "mdlm", "held_out": {"all": {"nelbo": 3.0}}, "tasks": {}, "results": {},
        }),
    }  # fmt: skip
    tokens = np.arange(16).reshape(2, 8)
    of_samples = {"times": np.ones(2, np.float32), "sample_index": np.arange(2), "num_maskable": np.full(2, 7)}
    np.savez(root / "batch.npz", tokens=tokens, labels=tokens, weights=np.ones((2, 8), np.float32), **of_samples)
    for name, text in texts.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    inputs = {Path(name).stem if "/" not in name else "evaluated": root / name for name in texts}
    inputs["evaluated"] = root / "evaluated"
    return (
        inputs
        | {name: root / name for name in ("hf", "checkpoint", "trained", "export", "tokens", "run")}
        | {"batch": root / "batch.npz"}
    )


class Outcome(NamedTuple):
    words: list[str]
    change: str
    code: int
    seconds: float
    trace: str  # '' unless it ended in a traceback or had no end
    stderr: str


def run_case(seed: str, inputs: dict[str, Path], names: Sequence[str] = tuple(COMMANDS)) -> Outcome:
    """One command with one change, both drawn by `seed`."""
    rng = random.Random(seed)
    command = COMMANDS[rng.choice(list(names))]
    words = command.arguments.split()
    for extra in rng.sample(list(command.extra), min(len(command.extra), rng.choice((0, 0, 1, 2)))):
        words += extra.split()
    with tempfile.TemporaryDirectory(prefix="a2d_fuzz_") as directory:
        place = Path(directory)
        used = sorted({word.strip("{}") for word in words if word.strip("{}") in inputs})
        paths = dict(inputs) | {"out": place / "out"}
        change = ""
        if used and rng.random() < 0.6:  # a file
            name = rng.choice(used)
            paths[name], change = _odd_input(inputs[name], place / "in", rng)
        words = [word.replace("{" + name + "}", str(path)) for word in words for name, path in [_named(word, paths)]]
        if not change:
            values = [number for number, word in enumerate(words) if not word.startswith("--")]
            place_of = rng.choice(values)
            odd = rng.choice(ODD_WORDS)
            words[place_of], change = odd, f"argument {words[place_of]} -> {odd[:40]!r}"
        return _run(command.module, words, change)


def _named(word: str, paths: dict[str, Path]) -> tuple[str, Path]:
    name = word.partition("{")[2].partition("}")[0]
    return name, paths.get(name, Path(name))


def _odd_input(source: Path, target: Path, rng: random.Random) -> tuple[Path, str]:
    """A changed copy of an input: of one of its files, of its name."""
    if source.is_dir() or source.is_file():
        copy = copy_of(source, target / rng.choice(("in", "in", "in [", "in\nerror: b")) / source.name)
        files = [copy] if copy.is_file() else sorted(path for path in copy.rglob("*") if path.is_file())
        chosen = rng.choice(files)
        done = damage(chosen, rng)
        # A manifest that fits, so that the change is read and not only found.
        manifest = chosen.parent / "manifest.json"
        if manifest.is_file() and chosen != manifest and rng.random() < 0.7:
            from megatron_a2d.checkpoint.manifest import write_manifest

            write_manifest(chosen.parent)
        return copy, done
    target.mkdir(parents=True)
    for suffix in (".bin", ".idx", ".json", ".sums"):  # a prefix
        if Path(f"{source}{suffix}").exists():
            shutil.copyfile(f"{source}{suffix}", target / f"{source.name}{suffix}")
    return target / source.name, damage(rng.choice(sorted(target.iterdir())), rng)


def _run(module: str, words: list[str], change: str) -> Outcome:
    main: Callable[[list[str]], None] = importlib.import_module(module).main
    out, err, begin = StringIO(), StringIO(), time.monotonic()
    code, trace = 0, ""
    try:
        with _limit(LONGEST), _environment(), redirect_stdout(out), redirect_stderr(err):
            entry_point(lambda: main(words))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        trace = traceback.format_exc()
        if sys.exc_info()[0] is KeyboardInterrupt:
            raise
    lines = err.getvalue()
    if not trace and code == 2 and not any(line.startswith("error: ") for line in lines.splitlines()):
        trace = "exit code 2 without an error line"
    if not trace and code not in _CODES:
        trace = f"exit code {code} is none of exit_codes.py"
    if not trace and "Traceback (most recent call last)" in lines:
        trace = f"a traceback on stderr: {lines}"
    if not trace and "\x1b[2J" in lines + out.getvalue():
        trace = "a control character reached the terminal"
    if not trace and any(line.startswith("error: b") for line in lines.splitlines()):
        trace = "a forged error line"
    return Outcome([module, *words], change, code, time.monotonic() - begin, trace, lines)


class _NoEndError(BaseException):
    """The case took too long."""


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def ring(number: int, frame: Any) -> None:
        faulthandler.dump_traceback(sys.__stderr__ or 2)  # of all threads: the main one may only wait for another
        raise _NoEndError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _environment() -> Iterator[None]:
    """What commands change for their process: put back afterwards. No network."""
    before, handler, folder = dict(os.environ), signal.getsignal(signal.SIGTERM), os.getcwd()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    leave, os._exit = os._exit, sys.exit  # type: ignore[assignment]
    here = Path(tempfile.mkdtemp(prefix="a2d_fuzz_"))  # where an odd word as --out leads
    deep = here / "two" / "levels"
    deep.mkdir(parents=True)
    os.chdir(deep)
    try:
        yield
    finally:
        shutil.rmtree(here, ignore_errors=True)
        os.environ.clear()
        os.environ |= before
        signal.signal(signal.SIGTERM, handler)
        os.chdir(folder)
        os._exit = leave


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, default=1000, help="cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument(
        "--only", type=int, default=None, metavar="NUMBER", help="this case alone, with what it printed"
    )
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    options = parser.parse_args()
    bad = 0
    codes: dict[int, int] = {}
    with tempfile.TemporaryDirectory(prefix="a2d_fuzz_inputs_") as directory:
        inputs = make_inputs(Path(directory))
        for number in range(options.first, options.first + options.n) if options.only is None else [options.only]:
            outcome = run_case(f"{options.seed} {number}", inputs, options.commands)
            if number % 50 == 0:
                print(f"case {number}", file=sys.stderr, flush=True)
            codes[outcome.code] = codes.get(outcome.code, 0) + 1
            if outcome.trace or options.only is not None:
                bad += bool(outcome.trace)
                print(
                    f"--- case {number}: {outcome.change!r}\n{outcome.words!r:.2000}\n{outcome.trace[-3000:]}",
                    flush=True,
                )
            if options.only is not None:
                print(outcome.code, outcome.stderr)
    print(
        f"{sum(codes.values())} cases, {bad} with a traceback, without an end or with a forged line; exit codes {codes}"
    )
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
