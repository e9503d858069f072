"""What became of each mutant: results of a sample as they come, and the committed verdicts on those that survived."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.mutants.mutant_runner import Outcome
from tests.mutants.mutate import Mutant

VERDICTS = Path(__file__).with_name("survivors.yaml")


def entries() -> list[dict[str, str]]:
    """Survivors of samples: file, was, now, and either `equivalent`, with the reason, or the `test` that was added."""
    return yaml.safe_load(VERDICTS.read_text())


def equivalents() -> set[tuple[str, str, str]]:
    """(file, was, now) of the mutants that no test can notice."""
    return {(entry["file"], entry["was"], entry["now"]) for entry in entries() if "equivalent" in entry}


class Results:
    """A line of JSON per judged mutant; a survivor is judged again when its tests have changed."""

    def __init__(self, path: Path):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[tuple[str, int, str, str], tuple[Outcome, str]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                key = (entry["file"], entry["line"], entry["was"], entry["now"])
                self._known[key] = (Outcome(entry["outcome"]), entry["digest"])

    def known(self, mutant: Mutant, digest: str) -> Outcome | None:
        outcome, tests = self._known.get((mutant.file, mutant.line, mutant.was, mutant.now), (None, ""))
        return None if outcome is Outcome.SURVIVED and tests != digest else outcome

    def add(self, mutant: Mutant, digest: str, outcome: Outcome, detail: str) -> None:
        entry = {**mutant._asdict(), "outcome": outcome.value, "detail": detail, "digest": digest}
        del entry["source"]
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
