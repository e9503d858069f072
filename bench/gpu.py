"""Everything that needs a GPU, most wanted first, in commands of ten minutes and one result file: `make gpu`.

    python -m bench.gpu --out bench/results/gpu_h200.json # what ten minutes hold
    python -m bench.gpu --out bench/results/gpu_h200.json # what is missing
    python -m bench.gpu --rehearse --out /tmp/rehearsal.json # the same way, tiny, on a CPU

engine_vs_local    Transformer Engine's layers against the local ones, in the cases of tests/transformer_engine
fp8_vs_emulation   FP8 products and steps against the emulation of the local layers
train_step ...     tokens/s and MFU of our step, in bf16 and FP8, and of Hugging Face's
masked_head        the chunked head against simpler ones
fp8_curve          200 steps in FP8 and in bf16
host_waits         where and how long the host waits in a step
tests              the rest of tests/gpu

Each part is a process with a time limit. The file is written again after each: a part that fails or runs too long is
there with its last lines, and what it had measured until then is kept. Parts for which no time is left are listed as
skipped. The same command again takes those first that have not run, then those that failed. A rehearsal has eight times
the time; its layers compute over a stand-in of Transformer Engine's kernels (tests/transformer_engine).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.result_tables import can_compile, machine
from bench.shapes import SHAPES
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.atomic_write import write_json
from megatron_a2d.utils.errors import UserError


class Part(NamedTuple):
    """A part of the measurement; `command` writes JSON to the file that replaces OUT in it."""

    name: str
    command: list[str]
    limit: float  # seconds


def parts(rehearse: bool) -> list[Part]:
    """All parts, in the order in which they run."""
    step = [sys.executable, "-m", "bench.train_step_vs_hf", "--out", "OUT"]
    step += ["--rehearse", "--rounds", "1"] if rehearse else ["--rounds", "5"]
    small = ["--rehearse"] if rehearse else ["--device", "cuda"]
    head = [sys.executable, "-m", "bench.chunked_head", "--out", "OUT", *small]
    waits = [sys.executable, "-m", "bench.host_waits", "--out", "OUT", *small]
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "-vv", "-rs", "--gpu-report", "OUT"]
    against, rest = "tests/gpu/test_engine_vs_local.py", "tests/gpu/test_gpu.py"
    first, second, *others = SHAPES
    return [
        Part("engine_vs_local", [*tests, against, "-k", "not fp8"], 110),
        Part("fp8_vs_emulation", [*tests, against, "-k", "fp8"], 60),
        Part(f"train_step {first}", [*step, "--shapes", first], 120),
        Part(f"train_step {second}", [*step, "--shapes", second], 130),
        Part("masked_head", head, 40),
        Part("fp8_curve", [*tests, rest, "-k", "fp8_learns"], 60),
        Part("host_waits", waits, 40),
        Part("tests", [*tests, rest, "-k", "not fp8_learns"], 120),
        Part("train_step others", [*step, "--shapes", *others], 150),
    ]


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the result file")
    parser.add_argument("--budget", type=float, default=570, help="total seconds; a part is skipped when none are left")
    parser.add_argument("--parts", nargs="+", default=None, help="names of parts, or prefixes of names; default: all")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU, to try every line")
    options = parser.parse_args()
    _check(options)
    slack = 8 if options.rehearse else 1  # times on a CPU are not meaningful
    chosen = [
        part._replace(limit=slack * part.limit)
        for part in parts(options.rehearse)
        if options.parts is None or any(part.name.startswith(name) for name in options.parts)
    ]
    begin = time.monotonic()
    result = earlier(options.out, options.rehearse)
    known = {part["name"]: part for part in result["parts"]}
    for part in missing(chosen, known):
        left = slack * options.budget - (time.monotonic() - begin)
        if left > 10:
            known[part.name] = run(part, min(part.limit, left), options.rehearse)
        elif part.name not in known:
            known[part.name] = {"name": part.name, "status": "skipped"}
        done = known[part.name]
        result["parts"] = [known[one.name] for one in parts(options.rehearse) if one.name in known]
        result["seconds"] = time.monotonic() - begin
        write_json(options.out, result)
        print(f"{part.name:28} {done['status']:8} {done.get('seconds', 0):6.1f} s", flush=True)
    failed = [part.name for part in chosen if known[part.name]["status"] != "ok"]
    print(f"{options.out}: {len(chosen) - len(failed)} of {len(chosen)} parts" + (f"; not {failed}" if failed else ""))
    if failed:
        sys.exit(1)


def earlier(out: Path, rehearse: bool) -> dict[str, Any]:
    """What the file of an earlier command holds; UserError if it is of another machine, or no such file."""
    fresh = {"machine": machine(), "rehearsal": rehearse, "compiles": can_compile(), "parts": []}
    if not out.exists():
        return fresh
    try:
        found = json.loads(out.read_text())
        same = all(found[name] == fresh[name] for name in ("machine", "rehearsal"))
        assert isinstance(found["parts"], list)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"--out {out}: holds no result of this command; name another file") from None
    if not same:
        raise UserError(f"--out {out}: was measured on another machine, or with other versions; name another file")
    return dict(found)


def missing(chosen: list[Part], known: dict[str, dict[str, Any]]) -> list[Part]:
    """Those that have not run, then those that failed or ran too long, each in their order."""
    statuses = [(part, known.get(part.name, {}).get("status", "skipped")) for part in chosen]
    new = [part for part, status in statuses if status == "skipped"]
    return new + [part for part, status in statuses if status in ("failed", "timeout")]


def _check(options: argparse.Namespace) -> None:
    names = [part.name for part in parts(options.rehearse)]
    problems = [
        f"--parts {asked}: no part has a name with this prefix; there are {', '.join(names)}"
        for asked in options.parts or []
        if not any(name.startswith(asked) for name in names)
    ]
    if not (options.rehearse or torch.cuda.is_available()):
        problems.append("bench.gpu: this machine has no CUDA device; --rehearse tries the same on a CPU")
    if not options.budget > 0:
        problems.append(f"--budget {options.budget:g}: must be above 0 seconds")
    if not options.out.absolute().parent.is_dir() or options.out.is_dir():
        problems.append(f"--out {options.out}: is not a file in an existing directory; give one")
    if problems:
        raise UserError(problems)


def run(part: Part, limit: float, rehearse: bool) -> dict[str, Any]:
    """Run a part: its status, its result, and its last lines unless it succeeded."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        out, log = Path(directory, "out.json"), Path(directory, "log.txt")
        command = [str(out) if word == "OUT" else word for word in part.command]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"A2D_REHEARSE": "1"} if rehearse else {})
        if not can_compile():
            environment["TORCHDYNAMO_DISABLE"] = "1"
        with log.open("w") as lines:
            process = subprocess.Popen(
                command, stdout=lines, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                code = None
        written = json.loads(out.read_text()) if out.exists() else None
        status = "timeout" if code is None else "failed" if code or written is None else outcome(written)
        done = {"name": part.name, "status": status, "seconds": time.monotonic() - begin, "result": written}
        if status != "ok":
            done["last_lines"] = log.read_text(errors="replace").splitlines()[-60:]
        return done


def outcome(written: dict[str, Any]) -> str:
    """The status of a part that ended well: no result are tests that all skipped themselves."""
    tests = written.get("outcomes")
    if tests is not None and "passed" not in tests.values():
        return "failed"
    return "partly" if any("error" in row for row in written.get("rows", [])) else "ok"


if __name__ == "__main__":
    entry_point(main)
