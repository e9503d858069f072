"""All GPU tests and benchmarks, as one command of ten minutes with one result file: `make gpu`.

    python -m bench.gpu --out bench/results/gpu_h200.json                 # tests/gpu, then the benchmarks
    python -m bench.gpu --rehearse --out /tmp/rehearsal.json              # the same code with tiny shapes on a CPU

Each part is a separate process with a time limit. The file is rewritten after each part: one that fails or
times out is listed with its last lines, and its measurements so far are kept. Parts for which no time is left
are listed as skipped. The most important parts come first. A rehearsal has four times the time.
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
    step += ["--device", "cpu", "--rehearse", "--rounds", "1"] if rehearse else ["--device", "cuda", "--rounds", "5"]
    head = [sys.executable, "-m", "bench.chunked_head", "--out", "OUT"]
    head += ["--rehearse"] if rehearse else ["--device", "cuda"]
    shapes = list(SHAPES)  # the two shapes with targets come first
    tests = [sys.executable, "-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", "-m", "gpu", "-vv"]
    return [
        Part("tests", [*tests, "--gpu-report", "OUT"], 180),
        *(Part(f"train_step {name}", [*step, "--shapes", name], 140) for name in shapes[:2]),
        Part("masked_head", head, 40),
        *(Part(f"train_step {name}", [*step, "--shapes", name], 50) for name in shapes[2:]),
    ]


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the result file")
    parser.add_argument("--budget", type=float, default=570, help="total seconds; a part is skipped when none are left")
    parser.add_argument("--parts", nargs="+", default=None, help="names of parts, or prefixes of names; default: all")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU, to try every line")
    options = parser.parse_args()
    _check(options)
    slack = 4 if options.rehearse else 1  # times on a CPU are not meaningful
    chosen = [
        part._replace(limit=slack * part.limit)
        for part in parts(options.rehearse)
        if options.parts is None or any(part.name.startswith(name) for name in options.parts)
    ]
    begin = time.monotonic()
    result: dict[str, Any] = {
        "machine": machine(),
        "rehearsal": options.rehearse,
        "compiles": can_compile(),
        "parts": [],
    }
    for part in chosen:
        left = slack * options.budget - (time.monotonic() - begin)
        done = (
            run(part, min(part.limit, left), options.rehearse)
            if left > 10
            else {"name": part.name, "status": "skipped"}
        )
        result["parts"].append(done)
        result["seconds"] = time.monotonic() - begin
        write_json(options.out, result)
        print(f"{part.name:28} {done['status']:8} {done.get('seconds', 0):6.1f} s", flush=True)
    failed = [part["name"] for part in result["parts"] if part["status"] != "ok"]
    print(f"{options.out}: {len(chosen) - len(failed)} of {len(chosen)} parts" + (f"; not {failed}" if failed else ""))
    if failed:
        sys.exit(1)


def _check(options: argparse.Namespace) -> None:
    names = [part.name for part in parts(options.rehearse)]
    problems = [
        f"--parts {asked}: no part has a name with this prefix; there are {', '.join(names)}"
        for asked in options.parts or []
        if not any(name.startswith(asked) for name in names)
    ]
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
        errors = [row for row in (written or {}).get("rows", []) if "error" in row]
        status = "timeout" if code is None else "failed" if code or written is None else "partly" if errors else "ok"
        done = {"name": part.name, "status": status, "seconds": time.monotonic() - begin, "result": written}
        if status != "ok":
            done["last_lines"] = log.read_text(errors="replace").splitlines()[-60:]
        return done


if __name__ == "__main__":
    entry_point(main)
