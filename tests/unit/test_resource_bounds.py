"""Small numbers in small files that would ask for much time or memory: refused before anything is built for them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_a2d import plan, train
from megatron_a2d.config.model_config import MOST, model_config_from_hf, read_model_config
from megatron_a2d.config.settings import build
from megatron_a2d.config.validate import MOST_PROCESSES, find_problems
from megatron_a2d.conversion.sources import open_hf
from megatron_a2d.study.__main__ import main as study
from megatron_a2d.utils.errors import UserError
from tests.tiny import hub_config, write_hf

LARGE = 10**9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000, more than the 10,000"),
        ({"num_experts": 10**6}, "num_experts is 1000000, more than the 65,536"),
        ({"num_hidden_layers": 9000, "num_experts": 9000}, "has 81,000,000 experts"),
        ({"vocab_size": 2**40}, "vocab_size is 1099511627776, more than"),
        ({"hidden_size": 2**63}, "hidden_size is"),
    ],
)
def test_a_model_of_no_size_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError) as end:
        model_config_from_hf(hub_config("moe") | changes, "config.json")
    assert message in str(end.value)


def test_the_largest_models_are_no_problem() -> None:
    config = hub_config("moe") | {"num_hidden_layers": 200, "num_experts": 1024}
    assert model_config_from_hf(config, "config.json").num_experts == 1024


@pytest.mark.parametrize("changes", [{"num_hidden_layers": MOST["num_hidden_layers"]}, {"num_experts": 50_000}])
def test_a_configuration_larger_than_its_files_is_refused_by_their_counts(
    changes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_hf(tmp_path / "hf", "moe")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert read_model_config(directory).num_parameters() > 0
    monkeypatch.setattr(
        "megatron_a2d.conversion.sources.WeightMap", lambda *_: pytest.fail("names were made for all of its layers")
    )
    with pytest.raises(UserError, match=r"the files hold [0-9,]+ values"), open_hf(directory):
        pass


def test_one_missing_tensor_is_still_named(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "hf", "dense")
    weights = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, directory / "model.safetensors")
    with pytest.raises(UserError, match=name), open_hf(directory):
        pass


def test_gpus_processes_and_threads_have_bounds() -> None:
    begin = time.process_time()
    with pytest.raises(UserError, match=f"--gpus {LARGE}"):
        plan.main(["--model", "Qwen3-8B", "--cluster", "h100", "--gpus", str(LARGE)])
    with pytest.raises(UserError, match=f"--world-size {LARGE}"):
        train.main(["--model", "Qwen3-8B", "--dry-run", "--settings-only", "--world-size", str(LARGE)])
    found = find_problems(build({"num_workers": LARGE}), None, 1)
    assert [line for line in found if "--num-workers" in line] == [
        f"--num-workers {LARGE}: must be at most 1024; one thread keeps ahead of most steps"
    ]
    assert not [line for line in find_problems(build({"num_workers": 64}), None, 8) if "--num-workers" in line]
    assert time.process_time() - begin < 20 and MOST_PROCESSES > 10**6


@pytest.mark.parametrize("flag", ["--seeds", "--jobs"])
def test_a_study_has_bounds(flag: str) -> None:
    with pytest.raises(UserError, match=rf"{flag} {LARGE}: must be 1 to 1,000"):
        study(["probe", "--out", "x", "--load", "y", flag, str(LARGE)])
