"""Runs tests on a changed copy of the tree, each time in a fork of this process, which holds the heavy libraries already."""

from __future__ import annotations

import ast
import contextlib
import enum
import functools
import gc
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.mutants.mutate import Mutant

# Nothing of the product: a mutant has to be imported again.
_WARM = ("numpy", "torch", "megatron.core", "transformers", "safetensors.torch", "pytest", "coverage", "yaml", "rich")
# anyio comes with other packages, and takes longer to load as a plugin than most tests.
_PYTEST = ("-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:anyio")
_FAULT = 99  # exit status of a child that could not do its work
_SLACK = 15.0  # seconds of a processor for imports, beyond what the tests take
_MODULE = "<module>"


class Outcome(enum.Enum):
    KILLED = "killed"
    SURVIVED = "survived"
    EQUIVALENT = "equivalent"
    TIMEOUT = "timeout"


class Test(NamedTuple):
    node: str
    seconds: float  # set-up included


class Judge:
    """Knows which test runs which function of the targets, and tries mutants."""

    def __init__(self, root: Path, work: Path, targets: list[Path]):
        self._root, self._tree, self._kept = root, work / "tree", work / "coverage"
        self._targets = [str(path.relative_to(root)) for path in targets]
        self._output = work / "output.txt"
        self._importers = {target: _importers(root, target) for target in self._targets}
        self._measured: dict[str, list[tuple[Test, set[str]]]] = {}
        self._copy_tree()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in _WARM:
                importlib.import_module(name)
        gc.collect()
        gc.freeze()  # pytest collects garbage at its end: in a child, of what the child made

    def digest(self, mutant: Mutant) -> str:
        """Changes when a test file that judges the mutant is edited."""
        return _digest(*(_digest_of(self._tree / name) for name in self._importers[mutant.file]))

    def judge(self, mutant: Mutant) -> tuple[Outcome, str]:
        """The outcome, and what failed. Files of quick tests come first, and those that were never measured last."""
        num_tests = 0
        path = self._tree / mutant.file
        original = path.read_text()
        for name in sorted(self._importers[mutant.file], key=self._known_seconds):
            tests = self._tests(mutant, name)
            if not tests:
                continue
            num_tests += len(tests)
            limit = _SLACK + 4 * sum(test.seconds for test in tests)
            try:
                _write(path, mutant.source)
                status = self._fork(lambda tests=tests: _run(tests), limit)
            finally:
                _write(path, original)
            if status is None:
                return Outcome.TIMEOUT, f"{name}: {limit:.0f} s"
            if status:
                lines = self._output.read_text(errors="replace").splitlines()
                failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
                return Outcome.KILLED, (failed or [f"{name}: status {status}"])[0][:300]
        return Outcome.SURVIVED, f"{num_tests} tests"

    def _tests(self, mutant: Mutant, name: str) -> list[Test]:
        """The tests of a file that run the changed function; for a module-level line, those that run any of its functions."""
        function = _functions(self._tree / mutant.file).get(mutant.line, _MODULE)
        wanted = f"{mutant.file}::" if function == _MODULE else f"{mutant.file}::{function}"
        found = [
            test
            for test, functions in self._coverage(name)
            if wanted in functions or (function == _MODULE and any(item.startswith(wanted) for item in functions))
        ]
        return sorted(found, key=lambda test: test.seconds)

    def _known_seconds(self, name: str) -> float:
        kept = self._kept / f"{Path(name).stem}.json"
        if not kept.exists() or (known := json.loads(kept.read_text()))["digest"] != _digest_of(self._tree / name):
            return float("inf")
        return sum(entry["seconds"] for entry in known["tests"])

    def _coverage(self, name: str) -> list[tuple[Test, set[str]]]:
        """Which functions each test of a file runs, measured when the file has changed; tests that fail are left out."""
        if name in self._measured:
            return self._measured[name]
        digest, kept = _digest_of(self._tree / name), self._kept / f"{Path(name).stem}.json"
        if not kept.exists() or json.loads(kept.read_text())["digest"] != digest:
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(".partial")
            began = time.monotonic()
            self._fork(lambda: _measure(name, self._targets, digest, partial), limit=600)
            if not partial.exists():
                raise SystemExit(f"{name}: cannot be run; see {self._output}")
            partial.rename(kept)
            print(f"coverage of {name}: {time.monotonic() - began:.0f} s", flush=True)
        entries = json.loads(kept.read_text())["tests"]
        for entry in entries:
            if not entry["passed"]:
                print(f"left out, since it does not pass: {entry['node']}", flush=True)
        self._measured[name] = [
            (Test(entry["node"], entry["seconds"]), set(entry["functions"])) for entry in entries if entry["passed"]
        ]
        return self._measured[name]

    def _fork(self, work: Callable[[], int], limit: float) -> int | None:
        """The exit status of `work` in a child that works in the copy of the tree; None after `limit` seconds of a processor."""
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
            with self._output.open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            os.chdir(self._tree)
            os.environ["PYTHONPATH"] = str(self._tree)
            sys.path[:] = [str(self._tree), *(entry for entry in sys.path if entry not in ("", str(self._root)))]
            for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
                del sys.modules[name]
            status = _FAULT
            try:
                status = work()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        # A machine that others use too gives a fraction of a processor; a deadlock takes none.
        deadline = time.monotonic() + 60 + 10 * limit
        status = None
        while time.monotonic() < deadline:
            ended, code = os.waitpid(child, os.WNOHANG)
            if ended:
                status = None if os.WIFSIGNALED(code) and os.WTERMSIG(code) in _LIMITS else code
                break
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it started goes with it
        if status is None:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
        if status is not None and os.waitstatus_to_exitcode(status) == _FAULT:
            raise RuntimeError(self._output.read_text(errors="replace"))
        return status

    def _copy_tree(self) -> None:
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = set(
            subprocess.run(listed, cwd=self._root, check=True, capture_output=True, text=True).stdout.splitlines()
        )
        names = {name for name in names if (self._root / name).is_file()}
        shutil.rmtree(self._tree, ignore_errors=True)
        for name in names:
            (self._tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self._root / name, self._tree / name)


_LIMITS = (signal.SIGXCPU, signal.SIGKILL)


def _run(tests: list[Test]) -> int:
    """0 when all pass."""
    import pytest

    return int(pytest.main([*_PYTEST, "-x", *(test.node for test in tests)]))


def _measure(name: str, targets: list[str], digest: str, out: Path) -> int:
    """Run a test file under coverage and write which functions each of its tests ran."""
    import coverage
    import pytest

    measured = coverage.Coverage(data_file=None, include=targets, config_file=False)
    recorder = _Recorder(measured)
    measured.start()
    status = int(pytest.main([*_PYTEST, name], plugins=[recorder]))
    measured.stop()
    by_phase: dict[str, set[str]] = {}
    for target in targets:
        functions = _functions(Path(target))
        for line, phases in measured.get_data().contexts_by_lineno(str(Path(target).resolve())).items():
            for phase in phases:
                by_phase.setdefault(phase, set()).add(f"{target}::{functions.get(line, _MODULE)}")
    # A fixture that several tests share is set up in the first one alone.
    shared = {function for phase, names in by_phase.items() if phase.endswith(" setup") for function in names}
    tests = [
        {
            "node": node,
            "seconds": round(seconds, 3),
            "passed": node not in recorder.failed,
            "functions": sorted(by_phase.get(f"{node} call", set()) | shared),
        }
        for node, seconds in recorder.seconds.items()
    ]
    if status in (0, 1, 5):
        out.write_text(json.dumps({"digest": digest, "tests": tests}))
    return status


class _Recorder:
    """A plugin of pytest that tells coverage which test runs."""

    def __init__(self, measured: Any):
        self._measured = measured
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    def pytest_runtest_setup(self, item: Any) -> None:
        self._measured.switch_context(f"{item.nodeid} setup")

    def pytest_runtest_call(self, item: Any) -> None:
        self._measured.switch_context(f"{item.nodeid} call")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.skipped:
            return
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.add(report.nodeid)


def _importers(root: Path, target: str) -> list[str]:
    """The files of tests/unit that import a target, or a module of its package that reaches it."""
    path = root / target
    modules = {_module(file.relative_to(root)): file for file in path.parent.rglob("*.py")}
    reached, added = set[str](), {_module(Path(target))}
    while added:
        reached |= added
        added = {name for name, file in modules.items() if reached & _imports(file)} - reached
    files = sorted((root / "tests" / "unit").glob("test_*.py"))
    return [str(file.relative_to(root)) for file in files if reached & _imports(file)]


@functools.cache
def _imports(path: Path) -> set[str]:
    """The modules that a file names in imports, wherever they stand."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _functions(path: Path) -> dict[int, str]:
    """Line -> the function or method that it belongs to; lines of a function's head belong to the module."""
    lines: dict[int, str] = {}

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    lines.update(dict.fromkeys(range(child.body[0].lineno, (child.end_lineno or 0) + 1), name))
                walk(child, f"{name}.")
            else:
                walk(child, prefix)

    walk(ast.parse(path.read_text()), "")
    return lines


def _write(path: Path, source: str) -> None:
    """Compiled files are distinguished by size and time in seconds: two mutants may share both."""
    path.write_text(source)
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def _digest_of(path: Path) -> str:
    return _digest(path.read_text())


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
