"""The run that a soak disturbs: what it trains on, its starts by launch/train.sh, and what is seen of it from outside.

Nothing of the product is replaced: a start is the command line that a user types, every start is the same command, and
what is known of the run is what its user sees: the output, log.jsonl, the heartbeats, the directory --save.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from megatron_a2d.checkpoint.directory import directory_name, list_iterations
from megatron_a2d.checkpoint.manifest import check_manifest
from megatron_a2d.distributed.hang_watchdog import HEARTBEATS
from megatron_a2d.terminal.console import console

ROOT = Path(__file__).resolve().parents[2]
NUM_RANKS, BATCH, SAVE_INTERVAL = 4, 8, 4
HANG_LIMIT = 60.0  # seconds: --distributed-timeout-minutes
PATIENCE = 600.0  # seconds for anything to happen on a busy machine; a start takes about fifteen on an idle one
DISK = 128  # MB of the file system of --save
TRAIN_ITERS = 100_000  # never reached: the soak ends the run
SETTINGS: dict[str, Any] = {
    "seq_length": 32, "global_batch_size": BATCH, "micro_batch_size": 1, "train_iters": TRAIN_ITERS, "lr": 1e-3,
    "lr_warmup_iters": 100, "save_interval": SAVE_INTERVAL, "keep_latest_k": 4, "log_interval": 1,
    "eval_interval": TRAIN_ITERS, "expert_model_parallel_size": 2, "use_distributed_optimizer": True,
    "distributed_timeout_minutes": HANG_LIMIT / 60,
}  # fmt: skip


class Line(NamedTuple):
    """A line of output, and when it was seen (time.monotonic)."""

    time: float
    text: str


class Tail:
    """The lines of a file that grows."""

    def __init__(self, path: Path):
        self._path, self._offset, self.lines = path, 0, list[Line]()

    def read(self) -> list[Line]:
        """The lines that have come since the last call; one without an end is left for later."""
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            if file.seek(0, os.SEEK_END) < self._offset:
                # The fault cut it; the next start removes what is left of the last line, and may have written already.
                file.seek(0)
                self._offset = file.read().rfind(b"\n") + 1
            file.seek(self._offset)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        new = [Line(time.monotonic(), text) for text in data.decode(errors="replace").splitlines()]
        self.lines += new
        return new


class Start:
    """One start of the run: `launch/train.sh` with its ranks."""

    def __init__(self, directory: Path, flags: dict[str, Any], control: Path | None):
        directory.mkdir(parents=True)
        self.directory = directory
        path = [str(ROOT / "tests" / "fixtures" / "faults")] * (control is not None) + [str(ROOT)]
        environment = {
            **os.environ, "BIN": str(Path(sys.executable).parent), "NPROC": str(NUM_RANKS), "PREFLIGHT": "0",
            "OMP_NUM_THREADS": "1", "A2D_ATTEMPT": str(directory), "PYTHONPATH": os.pathsep.join(path),
        }  # fmt: skip
        if control:
            environment["A2D_SOAK"] = str(control)
        self._output = directory / "output.log"
        self.began = time.monotonic()
        with open(self._output, "w") as file:
            self.process = psutil.Popen(
                ["launch/train.sh", *words(flags)], cwd=ROOT, env=environment, stdout=file, stderr=file,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.output = Tail(self._output)
        self._seen: dict[int, psutil.Process] = {}  # every process of it, by its id

    def ranks(self) -> dict[int, int]:
        """The process id of each rank that has a heartbeat."""
        found = {}
        for path in (self.directory / HEARTBEATS).glob("rank_?????"):
            try:
                found[int(path.name[5:])] = int(json.loads(path.read_text())["pid"])
            except (OSError, ValueError):  # it has just ended
                continue
        return found

    def processes(self) -> list[psutil.Process]:
        """Those of this start that are alive, also if what started them is gone."""
        self._seen.setdefault(self.process.pid, self.process)
        for process in [process for process in self._seen.values() if is_alive(process)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._seen |= {child.pid: child for child in process.children(recursive=True)}
        return [process for process in self._seen.values() if is_alive(process)]

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def code(self) -> int:
        """Exit code of launch/train.sh as a shell reports it."""
        code = self.process.wait()
        return 128 - code if code < 0 else code

    def kill(self) -> None:
        """SIGKILL to every process of it, as if the machine had lost its power."""
        for process in self.processes():  # what started them comes first, and says nothing
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        wait_until(lambda: self.is_over() and not self.processes(), "the end of what was killed")

    def story(self) -> str:
        return self._output.read_text(errors="replace")[-6000:]


class Run:
    """The run in `root`, and its control from outside."""

    def __init__(self, root: Path, seed: int, disk: Path | None):
        self.root, self.random = root, random.Random(seed)
        self.save = (disk or root) / "run"
        self.disk, self.control = disk, root / "control"
        self.control.mkdir()
        self.data = make_material(root)
        self.log = Tail(self.save / "log.jsonl")
        self.starts: list[Start] = []
        self.losses: dict[int, set[float]] = {}  # by iteration, of each time that it was computed
        self.records: list[tuple[float, dict[str, Any]]] = []
        self.torn_lines = 0
        self.is_async = self.keeps_on = False
        self.clock = 0.0
        self.set("pause", 0.7)

    def set(self, name: str, number: float) -> None:
        """A number that the processes read (tests/fixtures/faults/sitecustomize.py)."""
        partial = self.control / f".{name}"
        partial.write_text(str(number))
        partial.rename(self.control / name)

    def flags(self, **others: Any) -> dict[str, Any]:
        return {
            **SETTINGS, "load": self.root / "checkpoint", "train_data_path": self.data, "save": self.save, **others,
        }  # fmt: skip

    def start(self) -> Start:
        """Start it again by the same command; of how it saves there are four kinds, which do not change what it computes."""
        self.is_async, self.keeps_on = self.random.random() < 0.5, self.random.random() < 0.5
        flags = self.flags(async_save=self.is_async, on_save_error="continue" if self.keeps_on else "stop")
        self.starts.append(Start(self.root / f"start_{len(self.starts):03d}", flags, self.control))
        return self.starts[-1]

    @property
    def current(self) -> Start:
        return self.starts[-1]

    def look(self) -> None:
        """Read what is new."""
        self.current.output.read()
        for line in self.log.read():
            try:
                record = json.loads(line.text)
            except ValueError:
                self.torn_lines += 1
                continue
            self.records.append((line.time, record))
            if record["kind"] == "train":
                self.losses.setdefault(record["iteration"], set()).add(record["loss"])

    def reached(self) -> int:
        """The last step that was taken, by log.jsonl or the output: on a full disk only one of them can be written."""
        self.look()
        steps = [record["iteration"] for _, record in self.records[-20:] if record["kind"] == "train"][-1:]
        for line in self.current.output.lines[-30:]:
            if found := re.match(r"iteration +(\d+)/", line.text):
                steps.append(int(found[1]))
        return max(steps, default=0)

    def resumed(self) -> int | None:
        """The iteration at which the current start took up the run; None if it has not yet."""
        self.look()
        begin = self.current.began
        return next((r["iteration"] for at, r in reversed(self.records) if r["kind"] == "start" and at > begin), None)

    def failed_saves(self) -> int:
        """How many there were since the newest checkpoint, in a run that continues without."""
        kinds = [record["kind"] for _, record in self.records if record["kind"] in ("checkpoint", "save_error")]
        return next((number for number, kind in enumerate(reversed(kinds)) if kind == "checkpoint"), 0)

    def intact(self) -> list[int]:
        """The iterations of the complete, undamaged checkpoints."""
        return [n for n in list_iterations(self.save) if not check_manifest(self.save / directory_name(n))]

    def wait(self, condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
        """The value of `condition` once it is true. EndedError if the start is over before."""

        def is_met() -> Any:
            self.look()
            found = condition()
            if not found and self.current.is_over():
                self.look()
                if not (found := condition()):
                    raise EndedError(f"the run ended ({self.current.code()}) while it was to reach {what}")
            return found

        return wait_until(is_met, what, patience)

    def wait_for_step(self, step: int) -> None:
        """Until the current start has taken this step, or a later one, itself."""

        def is_there() -> bool:
            resumed = self.resumed()
            return resumed is not None and self.reached() >= max(step, resumed + 1)

        self.wait(is_there, f"step {step}")

    def find(
        self,
        patterns: Sequence[tuple[str, str]],
        since: float,
        patience: float = PATIENCE,
        is_over: Callable[[], bool] | None = None,
    ) -> tuple[Line, str]:
        """The first line of the current start's output from then on that one of the patterns finds, and who said it.

        EndedError if nobody has said it when the start `is_over`: its launcher has ended, if nothing else is given.
        """
        tried = [(re.compile(pattern), by) for pattern, by in patterns]
        wanted = f'log line like "{plain(patterns[-1][0])}"'
        output = self.current.output
        seen = 0

        def found() -> tuple[Line, str] | None:
            nonlocal seen
            self.look()
            new, seen = output.lines[seen:], len(output.lines)
            for line in new:
                for pattern, by in tried:
                    if line.time >= since and pattern.search(line.text):
                        return line, by
            return None

        def found_or_over() -> Any:
            over = (is_over or self.current.is_over)()  # looked at first: what it said last is read after that
            return found() or ("over" if over else None)

        match = wait_until(found_or_over, wanted, patience)
        if match == "over":
            raise EndedError(f"no {wanted} before the run ended")
        return match

    def wait_for_end(self, patience: float = PATIENCE) -> int:
        """Exit code of the current start, when none of its processes is left."""
        wait_until(self.current.is_over, "end of the start", patience)
        wait_until(lambda: not self.current.processes(), "end of all its processes", patience)
        self.look()
        return self.current.code()

    @staticmethod
    def losses_of(save: Path) -> dict[int, set[float]]:
        records = map(json.loads, (save / "log.jsonl").read_text().splitlines())
        return {record["iteration"]: {record["loss"]} for record in records if record["kind"] == "train"}

    def partial_directories(self) -> list[str]:
        return sorted(path.name for path in self.save.glob(".iter_*"))


class EndedError(Exception):
    """The run ended, or was silent, where it should not have been."""


def wait_until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    end = time.monotonic() + patience
    while not (found := condition()):
        if time.monotonic() > end:
            raise EndedError(f"no {what} within {patience:.0f} s")
        time.sleep(0.1)
    return found


def plain(pattern: str) -> str:
    """A pattern of `find` for people: "..." is any text, and alternatives are joined by "or"."""
    text = re.sub(r" ?(?:\.|\\.|\[[^]]+\])[*+] ?", " ... ", pattern)
    return text.replace("(", "").replace(")", "").replace("|", " or ").replace("\\", "").strip()


def words(flags: dict[str, Any]) -> list[str]:
    """The settings as a command line."""
    found = []
    for name, value in flags.items():
        if value is not False:
            found += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return found


def make_material(root: Path) -> Path:
    """A tiny MoE model converted to a checkpoint, and tokens with checksums; returns the prefix of the tokens."""
    console.quiet = True
    try:
        return _make_material(root)
    finally:
        console.quiet = False


def _make_material(root: Path) -> Path:
    from checkpoints_tools import convert_hf
    from data_prep import tokenize_corpus
    from tests.tiny import write_hf

    write_hf(root / "hf", "moe", num_hidden_layers=2, max_window_layers=2)
    convert_hf.main(["--hf-model", str(root / "hf"), "--out", str(root / "checkpoint")])
    source = random.Random(0)
    with open(root / "text.jsonl", "w") as file:
        for _ in range(300):
            text = "".join(source.choices("etaoin shrdlu", k=source.randint(100, 400)))
            file.write(json.dumps({"text": text}) + "\n")
    tokenize_corpus.main([
        "--input", str(root / "text.jsonl"), "--tokenizer", str(root / "hf"), "--output-prefix", str(root / "tokens"),
        "--valid-fraction", "0", "--workers", "1",
    ])  # fmt: skip
    return root / "tokens"


def mount(size: int, directory: Path) -> Path | None:
    """A file system of so many MB for the run alone, which may fill up; None where mounting is not possible."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(directory)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return directory


def unmount(directory: Path) -> None:
    subprocess.run(["umount", "-l", str(directory)], check=True, capture_output=True)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
