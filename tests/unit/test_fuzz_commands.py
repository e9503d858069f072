"""A slice of `make fuzz` (tests/fuzz/commands.py): every command with odd arguments and odd files, no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_a2d.utils.errors import UserError
from tests.fuzz import commands
from tests.fuzz.commands import COMMANDS, make_inputs, run_case

CASES_OF_EACH = 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", COMMANDS)
def test_no_traceback(name: str, inputs: dict[str, Path]) -> None:
    for number in range(CASES_OF_EACH):
        outcome = run_case(f"slice {number}", inputs, [name])
        assert not outcome.trace, f"{outcome.words}, {outcome.change}: {outcome.trace}"


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (lambda words: {}["key"], "KeyError"),
        (lambda words: print("error: b"), None),
        (lambda words: (_ for _ in ()).throw(RuntimeError("x")), "RuntimeError"),
        (lambda words: exit(77), "exit code 77"),
        (lambda words: exit(2), "without an error line"),
        (lambda words: print("\x1b[2J"), "control character"),
    ],
)
def test_what_the_fuzz_looks_for_is_seen(
    fault: object, seen: str | None, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpoints_tools.inspect.main", fault)
    trace = run_case("0", inputs, ["inspect"]).trace
    assert seen in trace if seen else not trace


def test_a_command_without_end_and_a_forged_line_are_seen(
    inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "LONGEST", 1)

    def forever(words: list[str]) -> None:
        while True:
            pass

    monkeypatch.setattr("checkpoints_tools.inspect.main", forever)
    assert "more than 1 s" in run_case("0", inputs, ["inspect"]).trace

    def forged(words: list[str]) -> None:
        error = UserError("x")
        error.problems = ["x"]
        monkeypatch.setattr(
            "megatron_a2d.terminal.console.print_line", lambda text, file: file.write(f"{text}\nerror: b\n")
        )
        raise error

    monkeypatch.setattr("checkpoints_tools.inspect.main", forged)
    assert "forged" in run_case("0", inputs, ["inspect"]).trace


def test_a_case_is_a_function_of_its_seed(inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoints_tools.publish.main", lambda words: None)
    first, second = (run_case("7", inputs, ["publish"]) for _ in range(2))
    assert first.change == second.change and len(first.words) == len(second.words)
    assert len({run_case(f"{n}", inputs, ["publish"]).change for n in range(20)}) > 8


def test_honest_inputs_pass(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every case would end at the same first check, and nothing behind it would be tried."""
    monkeypatch.setattr(commands, "damage", lambda path, rng: "nothing")
    ended = {}
    for name in (
        "train",
        "report",
        "inspect",
        "publish",
        "plan",
        "tokenize_corpus",
        "inspect_dataset",
        "train_tokenizer",
    ):
        monkeypatch.setitem(COMMANDS, name, COMMANDS[name]._replace(extra=()))
        seeds = (f"honest {number}" for number in range(20))
        outcome = next(found for seed in seeds if (found := run_case(seed, inputs, [name])).change == "nothing")
        ended[name] = (outcome.code, outcome.stderr if outcome.code else "")
    assert ended == dict.fromkeys(ended, (0, "")), json.dumps(ended)
