"""The parts of a rehearsal: what it counts, which values it makes up, and what it says of sends and receives."""

from __future__ import annotations

import dataclasses
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from megatron_a2d import train
from megatron_a2d.config import installed_versions
from megatron_a2d.config.cli import Parser, parse_run
from megatron_a2d.config.named_models import named_model_config
from megatron_a2d.config.validate import find_problems
from megatron_a2d.rehearsal import rehearse
from megatron_a2d.rehearsal.event_listing import Repeated, fold, text_of
from megatron_a2d.rehearsal.pipeline_pairing import pair
from megatron_a2d.rehearsal.rank_rehearsal import RankRehearsal
from megatron_a2d.rehearsal.rehearse import choose_layers
from megatron_a2d.rehearsal.step_trace import Event
from megatron_a2d.utils.errors import UserError
from tests.recipe_sizes import RECIPES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_without_transformer_engine_the_local_layers_are_rehearsed(recipe: Path) -> None:
    """Without the flags that need it, and those that then have no effect, such as the graphs' scope."""
    config, _ = parse_run(Parser(), ["--config", str(recipe)])
    assert config.training.model
    layers = choose_layers(config, has_engine=False)
    assert layers.implementation == "local" and (layers.notes or config.training.transformer_impl == "local")
    assert not find_problems(layers.config, named_model_config(config.training.model), 64)


def test_what_a_rehearsal_leaves_out_is_said() -> None:
    config, _ = parse_run(Parser(), ["--config", str(RECIPES["qwen3_8b"])])
    assert choose_layers(config, has_engine=True).notes == []
    training = dataclasses.replace(config.training, load="runs/a")
    data = dataclasses.replace(config.data, train_data_path="data/a")
    for changed in (dataclasses.replace(config, training=training), dataclasses.replace(config, data=data)):
        (note,) = choose_layers(changed, has_engine=True).notes
        assert "--dry-run" in note


def test_data_free_tensors() -> None:
    """tests/rehearsal/data_free_tensors.py in a process of its own: others here have run training, which patches torch."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/rehearsal/data_free_tensors.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout + result.stderr


def event(operation: str, rank: int, peer: int, size: int = 8, handle: int = 1) -> Event:
    return Event(operation, "PIPELINE", (0, 1), size, peer, handle)


def exchange(rank: int, peer: int, first: str, size: int = 8) -> list[Event]:
    """Both directions with `peer`, each waited for at once."""
    second = {"send": "recv", "recv": "send"}[first]
    return [
        event(operation, rank, peer, size, handle)
        for handle, name in enumerate((first, second))
        for operation in (name, "wait")
    ]


def test_pairs() -> None:
    done = pair({0: exchange(0, 1, "send"), 1: exchange(1, 0, "recv")})
    assert done.num_pairs == 2 and done.num_bytes == 16 and not done.problems


ALL = Event("all_reduce", "all", (0, 1), 4)
PROBLEMS = {
    "both send first and wait": (
        {0: exchange(0, 1, "send"), 1: exchange(1, 0, "send")}, "rank 0 has send .* where rank 1 has send",
    ),
    "both receive first": (
        {0: exchange(0, 1, "recv"), 1: exchange(1, 0, "recv")}, "rank 0 has recv .* where rank 1 has recv",
    ),
    "another size": (
        {0: exchange(0, 1, "send"), 1: exchange(1, 0, "recv", 16)}, "send of 8 bytes .* where rank 1 has recv of 16 bytes",
    ),
    "one more": (
        {0: exchange(0, 1, "send"), 1: [*exchange(1, 0, "recv"), event("send", 1, 0, 8, 9)]}, "rank 0 has nothing where",
    ),
    "one never comes": ({0: exchange(0, 1, "send"), 1: []}, "where rank 1 has nothing"),
    "a collective before the receive that the peer waits for": (
        {0: [event("send", 0, 1), event("wait", 0, 1), ALL], 1: [ALL, event("recv", 1, 0)]},
        "rank 0 has send .* where rank 1 has nothing",
    ),
    "collectives of two groups crosswise": (
        {0: [ALL, ALL._replace(ranks=(0, 1, 2))], 1: [ALL._replace(ranks=(0, 1, 2)), ALL]},
        "rank 0 hangs at event 1 of 2: all_reduce of 4 bytes",
    ),
    "another collective": ({0: [ALL], 1: [ALL._replace(num_bytes=8)]}, "all_reduce of 4 bytes where rank 1 has"),
    "a collective that one leaves out": ({0: [ALL], 1: []}, "rank 0 hangs at event 1 of 1: all_reduce"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_does_not_pair_is_found(name: str) -> None:
    steps, words = PROBLEMS[name]
    assert re.search(words, "\n".join(pair(steps).problems)), pair(steps).problems


def test_without_waiting_nothing_hangs() -> None:
    """Posted before it waits, the order of a rank's two directions does not matter where they are in two groups."""
    other = (0, 1, 2)
    steps = {
        0: [event("send", 0, 1), event("recv", 0, 1, 8, 2)._replace(ranks=other)],
        1: [event("send", 1, 0)._replace(ranks=other), event("recv", 1, 0, 8, 2)],
    }
    steps = {rank: [*events, *(one._replace(operation="wait") for one in events)] for rank, events in steps.items()}
    assert not pair(steps).problems


def unfolded(items: Iterable[int | Repeated]) -> list[int]:
    return [one for item in items for one in ([item] if isinstance(item, int) else unfolded(item.items) * item.times)]


def test_repeated_events_are_written_once() -> None:
    layer = [1, 2, 2, 3]
    step = [0, *(layer * 3 + [4]) * 2, 5]
    assert fold(step) == (0, Repeated(2, (Repeated(3, (1, Repeated(2, (2,)), 3)), 4)), 5)
    draw = random.Random(0)
    for length in range(60):
        items = [draw.randrange(3) for _ in range(length)] * draw.randrange(1, 4)
        assert unfolded(fold(items)) == items


def test_a_listing() -> None:
    """Every event in order with its operation, group, ranks and bytes; those of one rank alone are none."""
    gather = Event("all_gather", "TENSOR_MODEL_PARALLEL_GROUP", (0, 1), 4096, phase="passes")
    send = Event("send", "PIPELINE_MODEL_PARALLEL_GROUP", (0, 8), 1024, 8, 1, "passes")
    reduce = Event("all_reduce", "WORLD", tuple(range(0, 512, 8)), 4, phase="update")
    events = [gather, send, send._replace(operation="wait"), *[gather] * 3, gather._replace(ranks=(0,)), reduce]
    zeros = dict.fromkeys(RankRehearsal._fields, 0)
    done = RankRehearsal(**{**zeros, "rank": 0, "events": events, "waits": Counter()})
    lines = [line.split() for line in text_of([done, done._replace(rank=8)]).splitlines()]
    half = [
        ["passes"],
        ["all_gather", "TENSOR_MODEL_PARALLEL_GROUP", "[0,", "1]", "4,096"],
        ["send", "to", "rank", "8", "PIPELINE_MODEL_PARALLEL_GROUP", "[0,", "8]", "1,024"],
        ["wait", "for", "rank", "8", "PIPELINE_MODEL_PARALLEL_GROUP", "[0,", "8]"],
        ["all_gather", "TENSOR_MODEL_PARALLEL_GROUP", "[0,", "1]", "4,096", "(3", "times)"],
        [],
        ["update"],
        ["all_reduce", "WORLD", "[0,", "8", "...", "504]", "4"],
    ]
    assert lines == [["rank", "0,", "7", "events"], [], *half, [], ["rank", "8,", "7", "events"], [], *half]


def rehearsed(*flags: str) -> str:
    """The command's output, in a separate process: the simulated GPU cannot be removed."""
    command = [sys.executable, "-m", "megatron_a2d.train", "--rehearse", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


RECIPE_DIRECTORY = ROOT / "launch" / "recipes"


def test_the_command(tmp_path: Path) -> None:
    """A tied model in two stages of two virtual ones: figures, order, pairs."""
    trace = tmp_path / "trace.txt"
    shown = rehearsed(
        "--config", str(RECIPE_DIRECTORY / "qwen3_0p6b.yaml"), str(RECIPE_DIRECTORY / "portable.yaml"), "--world-size", "16",
        "--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2", "--global-batch-size", "32",
        "--rehearse-trace", str(trace),
    )  # fmt: skip
    first, second = re.split(r"^rank 8, ", trace.read_text(), flags=re.MULTILINE)
    assert first.startswith("rank 0, ") and "send to rank 8" in first and "wait for rank 8" in first
    assert "recv from rank 0" in second and re.search(r"reduce_scatter +DATA_PARALLEL_GROUP_WITH_CP .*\d,\d{3}", second)
    assert re.findall(r"^\w+$", first, re.MULTILINE) == ["build", "passes", "update"]
    assert "rehearsed 2 of 16 ranks: one step of 4 micro-batches, local layers" in shown
    for part in ("weights", "gradients", "optimizer state"):
        assert re.search(rf"│ {part} +│ +[\d.]+ │ +[\d.]+ │ +[+-]0\.\d% │ +[\d.]+ │ +[\d.]+ │ +[+-]0\.\d% │", shown), (
            shown
        )
    activations = re.search(r"│ activations, logits +│((?: +[+-]?[\d.]+%? │)+)", shown)
    assert activations
    errors = [float(cell.strip(" %")) for cell in activations[1].split("│") if "%" in cell]
    assert len(errors) == 2 and all(abs(error) < 5 for error in errors), shown
    # 3 tensors a micro-batch forward, 3 back: the model's last stage sends nothing on.
    assert "pipeline: 24 sends (0.188 GiB) and receives of 2 stages, which pair up; nothing hangs" in shown
    assert re.search(r"finalize_model_grads.py:\d+ +│ .item\(\) +│ +2 │ +2 │", shown)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rehearse-trace x --dry-run", "--rehearse-trace: is only valid with --rehearse"),
        ("--rank 0 --dry-run", "--rank: is only valid with --rehearse"),
        (
            "--rehearse --model Qwen/Qwen3-8B-Base --world-size 8 --rank 8",
            "--rank 8: --world-size 8 has the ranks 0 to 7",
        ),
        ("--rehearse --dry-run --settings-only --world-size 8", "--dry-run, --rehearse: choose one"),
        ("--rehearse --world-size 8", "need --model"),
        (
            "--rehearse --model Qwen/Qwen3-8B-Base --world-size 8 --tensor-model-parallel-size 3",
            "--tensor-model-parallel-size 3: ",
        ),
        (
            f"--rehearse --config {RECIPE_DIRECTORY / 'qwen3_8b.yaml'} --world-size 8 --cluster h100 --micro-batch-size 8",
            "GiB, the run needs",
        ),
    ],
)
def test_the_errors_are_those_of_the_start(flags: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train.main(flags.split())


def test_what_an_old_package_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearse, "prepare", lambda cluster: True)
    monkeypatch.setattr(installed_versions, "installed", {"megatron-core": (0, 16, 1)}.get)
    flags = f"--rehearse --config {RECIPES['qwen3_30b_a3b']} --world-size 8 --use-transformer-engine-op-fuser"
    with pytest.raises(UserError, match=r"--use-transformer-engine-op-fuser: needs megatron-core 0\.19"):
        train.main(flags.split())
