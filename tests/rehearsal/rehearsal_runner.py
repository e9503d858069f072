"""Cases rehearsed by worker processes; a result that was kept from the same code and settings is not made again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from megatron_a2d.utils.atomic_write import write_json
from tests.rehearsal.rehearsal_cases import Case

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "rehearsal"


def run_cases(cases: list[Case], num_workers: int, kept: Path | None = None) -> Iterator[dict[str, Any]]:
    """Their results, those of an earlier run first, the others as they come; `kept` is the directory of both."""
    waiting, results = Queue[Case](), Queue[dict[str, Any]]()
    for case in cases:
        if (earlier := _read(kept, case)) is not None:
            yield earlier
        else:
            waiting.put(case)
    missing = waiting.qsize()
    for _ in range(min(num_workers, missing)):
        threading.Thread(target=_feed, args=(waiting, results), daemon=True).start()
    by_name = {case.name: case for case in cases}
    for _ in range(missing):
        result = results.get()
        if kept and result["ranks"]:
            kept.mkdir(parents=True, exist_ok=True)
            code = digest_of(result["files"])
            write_json(_file(kept, by_name[result["case"]]), {"code": code, **result})
        yield result


def digest_of(files: list[str]) -> str | None:
    """Of our code and recipes that a result was made by, and of the installed packages; None if a file is gone."""
    paths = [ROOT / name for name in sorted(files)]
    if not all(path.is_file() for path in paths):
        return None
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(ROOT)} {path.read_text()}".encode())
    places = [*filter(None, [os.environ.get("A2D_TRANSFORMER_ENGINE")]), *sys.path]
    for name in ("torch", "megatron-core", "transformer-engine"):
        digest.update(f"{name} {[found.version for found in distributions(name=name, path=places)]}".encode())
    return digest.hexdigest()


def _file(kept: Path, case: Case) -> Path:
    return kept / f"{case.recipe}_{case.gpus}_{hashlib.sha256(repr(case).encode()).hexdigest()[:8]}.json"


def _read(kept: Path | None, case: Case) -> dict[str, Any] | None:
    if kept is None or not (path := _file(kept, case)).exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result.pop("code") == digest_of(result["files"]) else None


def _feed(waiting: Queue[Case], results: Queue[dict[str, Any]]) -> None:
    """Rehearse what waits, in a worker process for each cluster in turn: a process has one kind of GPU."""
    worker: subprocess.Popen[str] | None = None
    cluster = ""
    while True:
        try:
            case = waiting.get_nowait()
        except Empty:
            break
        if worker is None or case.cluster != cluster:
            _close(worker)
            worker, cluster = _start(case.cluster), case.cluster
        assert worker.stdin and worker.stdout and worker.stderr
        print(json.dumps(dataclasses.asdict(case)), file=worker.stdin, flush=True)
        if line := worker.stdout.readline():
            results.put(json.loads(line))
        else:
            error = worker.stderr.read()[-2000:]
            results.put({"case": case.name, "ranks": [], "problems": [error], "files": [], "seconds": 0.0})
            worker = None
    _close(worker)


def _start(cluster: str) -> subprocess.Popen[str]:
    engine = os.environ.get("A2D_TRANSFORMER_ENGINE", "")
    path = os.pathsep.join(filter(None, [str(ROOT), engine, os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.rehearsal.rehearsal_worker", cluster], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def _close(worker: subprocess.Popen[str] | None) -> None:
    if worker is not None:
        worker.communicate()
