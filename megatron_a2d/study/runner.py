"""Resumable runner of a study's jobs, each in its own directory, several in parallel.

OUT/NAME/settings.json     all settings of the run; a plan that has changed since is refused
OUT/NAME/                  an ordinary --save directory of training: checkpoints, log.jsonl, tensorboard/
OUT/NAME/measured_K.json   results of the K-th measuring process
OUT/NAME/output.txt        output of its processes

Whether a job is done is read from its files, not from a record: training has reached its last iteration, and all
measurements exist. Interrupted jobs resume when the study is started again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import yaml

from megatron_a2d.checkpoint.directory import latest_iteration
from megatron_a2d.config.renamed import modernise_record
from megatron_a2d.config.settings import RunConfig, build, settings
from megatron_a2d.report.plots import read_log
from megatron_a2d.study.jobs import BASE, Job, Measure, resolved
from megatron_a2d.terminal.console import console
from megatron_a2d.utils.atomic_write import new_file, read_json, write_json
from megatron_a2d.utils.errors import UserError

# Settings that may change when a job is resumed: paths, saving, logging and the number of workers.
_FREE = (
    "load", "save", "train_data_path", "valid_data_path", "data_mixture", "num_workers", "distributed_timeout_minutes",
    "keep_latest_k", "save_retain_interval", "async_save", "save_interval",
)  # fmt: skip

_NO_SAVES = {"keep_latest_k": 0, "save_retain_interval": 0, "async_save": False}  # they have no effect without --save


class Runner:
    """Runs the jobs of a study in `out`, `num_parallel` at a time, each as `launcher` -m MODULE ..."""

    def __init__(
        self,
        out: Path,
        base: RunConfig,
        launcher: Sequence[str],
        num_parallel: int = 1,
        starts: dict[str, str] | None = None,
    ):
        """`starts`: checkpoints besides the base's that jobs start from, by name."""
        assert base.training.load is not None
        self._out, self._base = out, base
        self._starts = {BASE: base.training.load, **(starts or {})}
        self._launcher = list(launcher) or [sys.executable]
        self._num_parallel = num_parallel
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Run all jobs, in the order of the plan except for dependencies; returns a record per job."""
        self._check(jobs)
        done = set(self._starts)
        waiting = list(jobs)
        failed: list[str] = []
        running: dict[Future[None], Job] = {}
        try:
            with ThreadPoolExecutor(self._num_parallel) as pool:
                try:
                    while waiting or running:
                        for job in [job for job in waiting if job.start in done][: self._num_parallel - len(running)]:
                            waiting.remove(job)
                            running[pool.submit(self._run_job, job)] = job
                        if not running:
                            break  # the others depend on failed jobs
                        for future in wait(running, return_when=FIRST_COMPLETED).done:
                            job = running.pop(future)
                            if error := future.exception():
                                failed.append(f"{job.name}: {error}")
                                console.print(f"{job.name}: failed")
                                continue
                            done.add(job.name)
                            left = len(waiting) + len(running)
                            console.print(f"{job.name}: done, {left} of {len(jobs)} left")
                finally:
                    self._stop()
        finally:
            self._stop()
        if failed:
            raise UserError([*failed, f"{len(waiting)} jobs were not started; fix that and run the same command again"])
        return [self.record(job) for job in jobs]

    def record(self, job: Job) -> dict[str, Any]:
        """The record of a finished job: tags, log records, measurements."""
        directory = self._out / job.name
        found: dict[str, Any] = {"name": job.name, **job.tags}
        if job.trains:
            log = read_log(directory)
            found["training"] = [record for record in log if record["kind"] == "train"]
            evals = [record for record in log if record["kind"] == "validation"]
            # Of a mixture only the first source, as in the measurements.
            found["validation"] = [record for record in evals if record.get("source") == evals[0].get("source")]
        for number in range(len(_processes(job))):
            found |= read_json(directory / f"measured_{number}.json", "the measurements", allow_nonfinite=True)
        return found

    def is_done(self, job: Job) -> bool:
        directory = self._out / job.name
        measured = all(
            self._is_measured(directory, number, measures) for number, (_, measures) in enumerate(_processes(job))
        )
        return measured and (not job.trains or self._is_trained(job))

    def _is_measured(self, directory: Path, number: int, measures: list[Measure]) -> bool:
        """Whether the measurements of this plan exist; those of an earlier plan do not count."""
        spec = directory / f"measure_{number}.json"
        if not (directory / f"measured_{number}.json").exists() or not spec.exists():
            return False
        made = read_json(spec, "the measurements made")["measures"]
        return _without_paths(made) == _without_paths(self._planned(measures))

    def _planned(self, measures: list[Measure]) -> list[dict[str, Any]]:
        return [{"name": item.name, "kind": item.kind, "options": self._options(item)} for item in measures]

    def _check(self, jobs: Sequence[Job]) -> None:
        """UserError if a job's directory holds other settings than the plan."""
        problems = []
        for job in jobs:
            path = self._out / job.name / "settings.json"
            if not path.exists():
                continue
            then, now = modernise_record(read_json(path, "the job's settings")), self._settings(job)
            for name, value in now.items():
                was = then.get(name, settings()[name].default)  # the setting may be newer than the job
                if was != value and name not in _FREE:
                    problems.append(f"--out {self._out}: {job.name} was started with {name} {was}, not {value}")
        if problems:
            raise UserError([*problems, "use the previous settings, or another --out"])

    def _settings(self, job: Job) -> dict[str, Any]:
        directory = self._out / job.name
        return {
            **resolved(self._base, job),
            "load": self._path_of(job.start),
            "save": str(directory) if job.trains else None,
        }

    def _path_of(self, start: str) -> str:
        """The checkpoint of this name: a given one, or another job's."""
        return self._starts.get(start) or str(self._out / start)

    def _is_trained(self, job: Job) -> bool:
        return latest_iteration(self._out / job.name) == build(self._settings(job)).num_iterations

    def _run_job(self, job: Job) -> None:
        """Run or resume one job."""
        directory = self._out / job.name
        values = self._settings(job)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "settings.json", values)
        if job.trains and not self._is_trained(job):
            recipe = directory / "settings.yaml"
            with new_file(recipe) as partial:
                partial.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
            self._call(directory, "megatron_a2d.train", "--config", str(recipe))
            if not self._is_trained(job):
                raise RuntimeError("stopped before its last iteration")
        checkpoint = values["save"] or values["load"]
        for number, (changes, measures) in enumerate(_processes(job)):
            if self._is_measured(directory, number, measures):
                continue
            out = directory / f"measured_{number}.json"
            out.unlink(missing_ok=True)
            spec = {
                "settings": {**values, **changes, "load": checkpoint, "save": None} | _NO_SAVES,
                "measures": self._planned(measures),
                "out": str(out),
            }
            write_json(directory / f"measure_{number}.json", spec)
            self._call(directory, "megatron_a2d.study.measure", str(directory / f"measure_{number}.json"))

    def _options(self, measure: Measure) -> dict[str, Any]:
        """The options of a measurement, with the name of its reference, if any, as a path."""
        options = dict(measure.options)
        if "reference" in options:
            options["reference"] = self._path_of(options["reference"])
        return options

    def _call(self, directory: Path, module: str, *arguments: str) -> None:
        """Run `module` with the launcher; RuntimeError with the end of its output if it fails."""
        output = directory / "output.txt"
        with open(output, "ab") as stream:
            with self._lock:
                if self._stopped:
                    raise RuntimeError("was stopped")
                process = subprocess.Popen(
                    [*self._launcher, "-m", module, *arguments],
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
                )
                self._processes.add(process)
            code = process.wait()
            with self._lock:
                self._processes.discard(process)
        if code:
            last = output.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"{module} ended with exit code {code} ({''.join(last)[:300]}); see {output}")

    def _stop(self) -> None:
        """Tell running processes to save and exit."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.send_signal(signal.SIGTERM)


def _without_paths(measures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measurements without the path of the reference, which may change."""
    return [{**item, "options": {**item["options"], "reference": None}} for item in measures]


def _processes(job: Job) -> list[tuple[dict[str, Any], list[Measure]]]:
    """The measurements of a job grouped by settings; each group is one process."""
    groups: list[tuple[dict[str, Any], list[Measure]]] = []
    for measure in job.measures:
        for changes, measures in groups:
            if changes == measure.settings:
                measures.append(measure)
                break
        else:
            groups.append((measure.settings, [measure]))
    return groups
