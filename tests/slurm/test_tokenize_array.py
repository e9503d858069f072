"""launch/tokenize.sbatch on a real Slurm of two nodes: an array of shards, and a merge that waits for all of them.

    make test-slurm ARGS='-k tokenize'

The files are the same bytes as one machine's.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from data_prep import tokenize_corpus, train_tokenizer
from tests.slurm.slurm_cluster import Cluster
from tests.unit.corpus_kinds import TEXTS, write_jsonl

pytestmark = pytest.mark.full
PATIENCE = 240.0  # seconds for all jobs
OVER = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
SUFFIXES = (".bin", ".idx", ".json", ".sums")


class Array:
    """A corpus of several pieces, and jobs of launch/tokenize.sbatch on it."""

    def __init__(self, cluster: Cluster, root: Path):
        self.cluster, self.root = cluster, root
        # 80 MB: two pieces of a large file and one of small ones.
        long = [f"{text}{number} " * 40 for number in range(60) for text in TEXTS]
        write_jsonl(root / "large.jsonl", long)
        write_jsonl(root / "small.jsonl", TEXTS)
        train_tokenizer.main(
            ["--input", str(root / "small.jsonl"), "--vocab-size", "310", "--out", str(root / "tokenizer")]
        )
        cluster.wait_idle()
        cluster.environment |= {"BIN": str(Path(sys.executable).parent)}
        cluster.environment.pop("SHARDS", None)

    def words(self, prefix: Path) -> list[str]:
        return [
            "--input", str(self.root / "large.jsonl"), str(self.root / "small.jsonl"), "--workers", "1",
            "--tokenizer", str(self.root / "tokenizer"), "--output-prefix", str(prefix), "--valid-fraction", "0.1",
        ]  # fmt: skip

    def submit(self, prefix: Path, *more: str, options: tuple[str, ...] = ()) -> str:
        log = f"--output={self.root}/%x-%A_%a.log"
        return self.cluster.run(
            "sbatch", "--parsable", log, *options, "launch/tokenize.sbatch", *self.words(prefix), *more
        )

    def states(self, job: str) -> dict[str, str]:
        """Task, or job id without an array -> Slurm's word for its state, and the node that it ran on."""
        found = {}
        for record in self.cluster.run("scontrol", "show", "job", "--oneliner", job).splitlines():
            facts = dict(word.partition("=")[::2] for word in record.split())
            found[facts.get("ArrayTaskId", job)] = f"{facts['JobState']} {facts.get('NodeList', '')}"
        return found

    def wait_until_over(self, job: str) -> dict[str, str]:
        end = time.monotonic() + PATIENCE
        while True:
            states = self.states(job)
            if all(state.startswith(OVER) for state in states.values()):
                return states
            if time.monotonic() > end:
                raise AssertionError(f"not over within {PATIENCE:.0f} s: {states}\n{self.story()}")
            time.sleep(0.3)

    def story(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.root.glob("*.log")))


@pytest.fixture(scope="module")
def array(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Array:
    return Array(cluster, tmp_path_factory.mktemp("array"))


def test_the_merge_waits_for_all_shards_and_gives_one_machines_bytes(array: Array, tmp_path: Path) -> None:
    shards = array.submit(tmp_path / "c", options=("--array=1-3",))
    merge = array.submit(tmp_path / "c", "--merge-shards", options=(f"--dependency=afterok:{shards}",))
    assert array.wait_until_over(merge)[merge].startswith("COMPLETED"), array.story()
    states = array.states(shards)
    assert len(states) == 3 and all(state.startswith("COMPLETED") for state in states.values()), array.story()
    assert {state.split()[-1] for state in states.values()} == {"n1", "n2"}  # three tasks for two nodes
    logs = [(array.root / f"tokenize-{shards}_{number}.log").read_text() for number in (1, 2, 3)]
    for number, log in enumerate(logs, 1):
        assert f"shard {number}/3: 1 of 3 pieces are done" in log, array.story()

    tokenize_corpus.main(array.words(tmp_path / "one"))
    for part in ("_train", "_valid"):
        for suffix in SUFFIXES:
            mine, one = (Path(f"{tmp_path / name}{part}{suffix}").read_bytes() for name in ("c", "one"))
            assert mine == one, suffix
    assert not (tmp_path / "c.parts").exists()


def test_a_failed_shard_keeps_the_merge_from_starting_and_can_be_done_alone(
    array: Array, tmp_path: Path, cluster: Cluster
) -> None:
    prefix = tmp_path / "c"
    prefix.with_suffix(".parts").mkdir()
    (tmp_path / "c.parts" / ".lock_2_of_3").symlink_to("/dev/null")  # a lock must be a regular file
    shards = array.submit(prefix, options=("--array=1-3",))
    merge = array.submit(
        prefix, "--merge-shards", options=(f"--dependency=afterok:{shards}", "--kill-on-invalid-dep=yes")
    )
    states = array.wait_until_over(shards)
    assert [states[number].split()[0] for number in "123"] == ["COMPLETED", "FAILED", "COMPLETED"], array.story()
    assert array.wait_until_over(merge)[merge].startswith("CANCELLED")
    refused = array.submit(prefix, "--merge-shards")
    assert array.wait_until_over(refused)[refused].startswith("FAILED")
    assert "run --shard 2/3 again, with the other arguments as here" in array.story()
    (tmp_path / "c.parts" / ".lock_2_of_3").unlink()
    gap = array.submit(prefix, options=("--array=2",))
    assert array.wait_until_over(gap)["2"].startswith("FAILED") and "set SHARDS to the number" in array.story()
    cluster.environment["SHARDS"] = "3"
    again = array.submit(prefix, options=("--array=2",))
    del cluster.environment["SHARDS"]
    merge = array.submit(prefix, "--merge-shards", options=(f"--dependency=afterok:{again}",))
    assert array.wait_until_over(merge)[merge].startswith("COMPLETED"), array.story()
    assert Path(f"{prefix}_train.idx").exists()


def test_neither_array_nor_merge_is_refused(array: Array, tmp_path: Path) -> None:
    job = array.submit(tmp_path / "c")
    assert array.wait_until_over(job)[job].startswith("FAILED") and "is no array; add --array 1-N" in array.story()
