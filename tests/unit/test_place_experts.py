"""checkpoints_tools.place_experts, its file, and the runs that the file does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools import place_experts
from megatron_a2d.checkpoint.directory import resolve
from megatron_a2d.checkpoint.manifest import MANIFEST, check_manifest
from megatron_a2d.checkpoint.placement_file import ExpertPlacement, find_placement, identity
from megatron_a2d.config.model_config import ModelConfig, read_model_config
from megatron_a2d.config.settings import build
from megatron_a2d.config.validate import find_problems
from megatron_a2d.evaluation import expert_loads
from megatron_a2d.utils.errors import UserError
from tests.cases import Case

ORDER = [3, 1, 2, 0, 7, 5, 6, 4]


def place(checkpoint: str | Path, case: Case, *more: str, size: int = 2) -> None:
    place_experts.main(
        ["--checkpoint", str(checkpoint), "--valid-data", case.settings["valid_data_path"],
         "--expert-model-parallel-size", str(size), "--seq-length", "32", *more]
    )  # fmt: skip


@pytest.fixture
def checkpoint(cases: dict[str, Case], tmp_path: Path) -> Path:
    """A copy of the MoE model's checkpoint, of 4 layers with 8 experts, 2 per token."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(cases["moe"].checkpoint, copy)
    return copy


def written(directory: Path, **changes: Any) -> Path:
    """A placement in an iteration's directory, with `changes` to what is right."""
    ExpertPlacement(identity(directory), 0, 2, 2, 2.0, 1.0, [ORDER] * 4).write(directory)
    path = directory / "expert_placement.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def found(directory: Path, setting: str | Path = "auto", size: int = 2) -> ExpertPlacement | None:
    config = build({"moe_expert_placement": str(setting), "expert_model_parallel_size": size})
    return find_placement(config, model_of(directory), directory)


def model_of(directory: Path) -> ModelConfig:
    return read_model_config(directory / "hf")


def test_the_command(cases: dict[str, Case], checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place(checkpoint, cases["moe"])
    directory = checkpoint / "release"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(directory / "expert_placement.json")
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in lines if line.startswith("│")}
    assert list(rows) == ["1", "2", "3", "4", "mean", "worst"]
    assert not check_manifest(directory)

    placement = found(directory)
    assert placement and placement.expert_model_parallel_size == 2 and len(placement.order) == 4
    assert rows["mean"] == f"{placement.imbalance_before:.2f} -> {placement.imbalance_after:.2f}"
    assert placement.imbalance_after < placement.imbalance_before
    place(checkpoint, cases["moe"])  # replaces its own file
    assert found(directory) == placement


def test_without_held_out_data(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By what the run recorded; an untrained checkpoint has nothing."""
    arguments = ["--checkpoint", str(checkpoint), "--expert-model-parallel-size", "4"]
    with pytest.raises(UserError, match="holds no loads of its routers"):
        place_experts.main(arguments)
    loads = torch.zeros(4, 2, 8, dtype=torch.int64)
    loads[:, 1], loads[:, 0, 1] = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0]), 4
    path = checkpoint / "release" / "common.pt"
    torch.save({**torch.load(path), "router_loads": loads.tolist()}, path)
    place_experts.main(arguments)
    placement = found(checkpoint / "release", size=4)
    assert placement and placement.imbalance_before == 17 / 8 and placement.imbalance_after == 10 / 8
    assert all(order[order.index(1) ^ 1] == 7 for order in placement.order), "the busiest with the idlest"
    assert "the step that determined the placement" in capsys.readouterr().out


def test_loads_are_those_of_the_routers(cases: dict[str, Case], checkpoint: Path) -> None:
    """Every token of every sample has two experts in each layer; masked and unmasked ones are told apart."""
    directory, prefix = checkpoint / "release", cases["moe"].settings["valid_data_path"]
    model_config, counts, tokens = model_of(directory), {}, {}
    for size in (1, 4):
        config = expert_loads.measuring_config(directory, model_config, {"seq_length": 32, "micro_batch_size": size})
        dataset = expert_loads.open_held_out(config, model_config, directory, prefix)
        try:
            counts[size] = expert_loads.measure_loads(config, model_config, directory, dataset, 8 // size)
            with expert_loads.micro_batches_of(config, model_config, dataset) as batches:
                tokens[size] = next(batches).tokens.numpy()
        finally:
            expert_loads.process_groups.finalize()
    assert counts[1].shape == (8, 4, 2, 8) and (counts[1].sum((2, 3)) == 2 * 32).all()
    assert (counts[1].reshape(2, 4, 4, 2, 8).sum(1) == counts[4]).all()
    masked = (tokens[4] == model_config.mask_token_id).sum(1)
    assert (counts[1][:4, :, 1].sum(-1) == 2 * masked[:, None]).all() and len(set(masked)) == 4


def test_a_file_of_any_name(checkpoint: Path, tmp_path: Path) -> None:
    """Named by the setting; and still by a resumed run, whose checkpoint holds it."""
    directory = checkpoint / "release"
    path = tmp_path / "mine.json"
    shutil.move(written(directory), path)
    assert found(directory) is None
    placement = found(directory, path)
    assert placement and placement.order == [ORDER] * 4

    later = tmp_path / "iter_0000003"
    shutil.copytree(directory, later)
    manifest = json.loads((later / MANIFEST).read_text())
    manifest["files"]["__0_0.distcp"]["xxh3"] = "0" * 16  # other weights
    (later / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="other weights"):
        found(later, path)
    written(later)
    held = found(later, path)
    assert held and held.checkpoint == identity(later) != placement.checkpoint
    written(later, order=[list(range(8))] * 4)
    with pytest.raises(UserError, match="other weights"):
        found(later, path)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_sizes_that_it_serves(checkpoint: Path, size: int) -> None:
    written(checkpoint / "release")
    placement = found(checkpoint / "release", size=size)
    assert placement and placement.applies_to(size) and "1.00 times the mean" in placement.describe(size)
    assert not placement.applies_to(1) and "not applied" in placement.describe(1)


def test_sizes_that_it_does_not_serve(checkpoint: Path) -> None:
    """As it is found it is left alone, with a line; asked for by name it is an error. On one rank nothing is placed."""
    path = written(checkpoint / "release", expert_model_parallel_size=8)
    placement = found(checkpoint / "release", size=3)
    assert placement and "not applied under EP 3" in placement.describe(3)
    with pytest.raises(UserError, match="size 8, neither a multiple nor a divisor of 3"):
        found(checkpoint / "release", path, size=3)
    assert found(checkpoint / "release", path, size=1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"order": [[*ORDER[:-1], 3], *[ORDER] * 3]}, "layer 1 does not hold every expert once"),
        ({"order": [*[ORDER] * 3, [*ORDER, 8]]}, "layer 4 does not hold every expert once"),
        ({"order": [*[ORDER] * 3, [str(expert) for expert in ORDER]]}, "layer 4 does not hold"),
        ({"order": [ORDER, 7, ORDER, ORDER]}, "layer 2 does not hold"),
        ({"order": []}, "first layer has 0 experts"),
        ({"order": "01234567"}, "order is '01234567'"),
        ({"expert_model_parallel_size": 3}, "expert_model_parallel_size is 3"),
        ({"expert_model_parallel_size": 0}, "expert_model_parallel_size is 0"),
        ({"imbalance_after": None}, "imbalance_after is None"),
        ({"format": 2}, "format 2, not 1"),
        ({"order": [ORDER] * 3}, "3 layers of 8 experts, 2 per token, but the model has 4 layers"),
        ({"order": [[3, 1, 2, 0]] * 4}, "4 layers of 4 experts"),
        ({"num_experts_per_tok": 1}, "1 per token, but"),
        ({"checkpoint": "0" * 16}, "other weights"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(changes: dict[str, Any], problem: str, checkpoint: Path) -> None:
    path = written(checkpoint / "release", **changes)
    for setting in ("auto", path):
        with pytest.raises(UserError, match=problem) as caught:
            found(checkpoint / "release", setting)
        (line,) = caught.value.problems
        assert line.startswith(str(path)) and "--moe-expert-placement none" in line
    assert found(checkpoint / "release", "none") is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"order": '])
def test_damaged_files(content: str, checkpoint: Path) -> None:
    (checkpoint / "release" / "expert_placement.json").write_text(content)
    with pytest.raises(UserError, match=r"expert_placement\.json"):
        found(checkpoint / "release")


def test_a_missing_file(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json"):
        found(checkpoint / "release", tmp_path / "none.json")


def test_a_dense_model(cases: dict[str, Case], checkpoint: Path, tmp_path: Path) -> None:
    dense = resolve(cases["dense"].checkpoint)
    path = written(checkpoint / "release")
    config = build({"moe_expert_placement": str(path)})
    assert any("dense and has no experts" in line for line in find_problems(config, model_of(dense), 1))
    copy = tmp_path / "dense" / "release"
    shutil.copytree(dense, copy)
    shutil.copy(path, copy)
    with pytest.raises(UserError, match="dense and has no experts"):
        found(copy)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--expert-model-parallel-size", "3"), "--expert-model-parallel-size 3: does not divide the model's 8 experts"),
        (("--expert-model-parallel-size", "1"), "--expert-model-parallel-size 1: one rank holds all experts"),
        (("--num-samples", "3"), "3 samples of --seq-length 32 are fewer than two batches of 2 ranks"),
        (("--num-samples", "0"), "--num-samples 0"),
        (("--micro-batch-size", "0"), "micro-batch-size"),
        (("--seq-length", "100000"), "--seq-length 100000"),
        (("--valid-data", "nowhere"), "nowhere"),
        (("--checkpoint", "nowhere"), "nowhere"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(
    arguments: tuple[str, str], problem: str, cases: dict[str, Case], checkpoint: Path
) -> None:
    with pytest.raises(UserError, match=problem):
        place(checkpoint, cases["moe"], *arguments)
    assert not list(checkpoint.rglob("*placement*"))


def test_the_command_on_a_dense_model(cases: dict[str, Case]) -> None:
    with pytest.raises(UserError, match="dense and has no experts"):
        place(cases["dense"].checkpoint, cases["dense"])
