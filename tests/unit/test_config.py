"""Settings, recipes and flags: precedence, and every error named with its remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_a2d import evaluate, train
from megatron_a2d.config.cli import Parser, add_settings, parse_run
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.named_models import named_model_config
from megatron_a2d.config.settings import RunConfig, build, settings
from megatron_a2d.config.validate import find_problems
from megatron_a2d.terminal.console import human
from megatron_a2d.utils.errors import UserError

MOE = ModelConfig(4, 64, 4, 2, 16, 128, 256, 4096, 1e-6, 1e6, False, 8, 2, 48, mask_token_id=250)
DENSE = replace(MOE, num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0)
RECIPES = sorted((Path(__file__).resolve().parents[2] / "launch" / "recipes").glob("*.yaml"))
OBJECTIVES = sorted((RECIPES[0].parent / "objectives").glob("*.yaml"))


def parse(*argv: str) -> RunConfig:
    return parse_run(Parser(prog="test"), list(argv))[0]


def test_precedence(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lr: 5.0e-4\nseq-length: 128\nlr_mult: {attention: 2}\n")
    config = parse("--config", str(recipe), "--lr", "1e-3", "--no-label-shift", "--bf16")
    assert config.optimization.lr == 1e-3 and config.data.seq_length == 128
    assert config.optimization.lr_mult == {"attention": 2.0}
    assert config.optimization.weight_decay == build({}).optimization.weight_decay
    assert config.training.bf16 and not config.diffusion.label_shift


def test_printed_config_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--lr-mult", "attention=1", "mlp=0.1", "--train-iters", "7", "--load", "x")
    with pytest.raises(SystemExit) as end:
        parse(*arguments, "--print-config")
    assert end.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse("--config", str(tmp_path / "printed.yaml")) == parse(*arguments)


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lrr: 1\nseq_length: many\nbf16: 3\n")
    with pytest.raises(UserError) as error:
        parse(
            "--config",
            str(recipe),
            "--objective",
            "mlm",
            "--lr",
            "fast",
            "--train-iters",
            "1.5",
            "--lr-mult",
            "mlp",
        )
    text = "\n".join(error.value.problems)
    assert len(error.value.problems) == 7
    for part in ("lrr (did you mean lr", "seq_length many", "bf16 3", "--objective mlm: must be one of mdlm, block, ar",
                 "--lr fast: must be a number", "--train-iters 1.5: must be a whole", "role=factor"):  # fmt: skip
        assert part in text


@pytest.mark.parametrize("argv", [("--lrr", "1"), ("--train-iter", "5"), ("--seed",), ("surplus",)])
def test_bad_flags(argv: tuple[str, ...]) -> None:
    with pytest.raises(UserError):
        parse(*argv)


def test_nearest_flag_is_named() -> None:
    with pytest.raises(UserError, match="did you mean --lr-decay-style"):
        parse("--lr-decay-stile", "cosine")


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "a: [1\n", None])
def test_bad_recipe_files(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="--config"):
        parse("--config", str(path))


def test_every_setting_is_documented() -> None:
    assert len(settings()) > 30
    assert all(len(item.help) > 10 for item in settings().values())


BAD = [
    ({"tensor_model_parallel_size": 3}, MOE, 4, "does not divide the 4 processes"),
    ({"pipeline_model_parallel_size": 3}, MOE, 3, "does not divide the model's 4 layers"),
    ({"expert_model_parallel_size": 4}, MOE, 2, "does not divide the 2 processes of a pipeline"),
    (
        {"expert_model_parallel_size": 3, "global_batch_size": 9},
        MOE,
        3,
        "does not divide the model's 8 experts",
    ),
    ({"expert_model_parallel_size": 2}, DENSE, 2, "the model is dense"),
    (
        {"save_retain_interval": 100, "save": "run"},
        MOE,
        1,
        "--save-retain-interval 100: has no effect without --keep-latest-k",
    ),
    ({"keep_latest_k": 2}, MOE, 1, "--keep-latest-k 2: has no effect without --save"),
    ({"keep_latest_k": -1, "save": "run"}, MOE, 1, "--keep-latest-k -1: must not be negative"),
    ({"ckpt_step": 0}, MOE, 1, "--ckpt-step 0: must be at least 1"),
    ({"tensor_model_parallel_size": 2}, MOE, 2, "MoE layers require --sequence-parallel"),
    (
        {"tensor_model_parallel_size": 4, "sequence_parallel": True},
        MOE,
        4,
        "does not divide the model's 2 key-value",
    ),
    ({"tensor_model_parallel_size": 2}, replace(DENSE, vocab_size=255), 2, "255 vocabulary rows"),
    ({"tensor_model_parallel_size": 2}, replace(DENSE, intermediate_size=127), 2, "MLP width 127"),
    ({"sequence_parallel": True}, DENSE, 1, "has no effect without --tensor"),
    (
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 33},
        DENSE,
        2,
        "multiple of 2",
    ),
    ({"global_batch_size": 6, "micro_batch_size": 4}, DENSE, 1, "use a multiple of 4"),
    ({"seq_length": 8192}, DENSE, 1, "context length is 4096"),
    ({}, replace(DENSE, mask_token_id=None), 1, "has no mask_token_id"),
    ({"lr_mult": {"router": 1.0}}, DENSE, 1, "no router"),
    ({"lr_mult": {"head": 1.0}}, replace(DENSE, tie_word_embeddings=True), 1, "tied"),
    ({"lr_mult": {"atention": 1.0}}, DENSE, 1, "there is no role 'atention'"),
    ({"lr_mult": {"mlp": -1.0}}, DENSE, 1, "not negative"),
    ({"min_lr": 1.0}, DENSE, 1, "exceeds --lr"),
    ({"lr_warmup_iters": 1000}, DENSE, 1, "warm-up does not end"),
    ({"lr_decay_style": "WSD"}, DENSE, 1, "WSD's final decay"),
    ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 1001}, DENSE, 1, "fit into --train-iters"),
    ({"lr": float("inf")}, DENSE, 1, "finite"),
    ({"lr_mult": {"mlp": float("inf")}}, DENSE, 1, "finite"),
    ({"objective": "ar", "label_shift": False}, DENSE, 1, "no effect with --objective ar"),
    ({"context_parallel_size": 3}, DENSE, 4, "does not divide the 4 processes"),
    ({"context_parallel_size": 2, "seq_length": 33}, DENSE, 2, "use a multiple of 2"),
    ({"expert_tensor_parallel_size": 5, "global_batch_size": 10}, MOE, 5, "48 rows of an expert"),
    ({"num_virtual_stages_per_pipeline_rank": 2}, DENSE, 1, "has no effect"),
    ({"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 3}, DENSE, 2, "4 layers"),
    ({"overlap_param_gather": True}, DENSE, 1, "needs --use-distributed-optimizer"),
    ({"lr_wsd_decay_iters": 5}, DENSE, 1, "has no effect with"),
    ({"min_timestep": 0.0}, DENSE, 1, "between 0 and 1"),
    ({"micro_batch_size": 0}, DENSE, 1, "at least 1"),
    ({"max_skipped_steps": 0}, DENSE, 1, "at least 1"),
    ({"exit_interval": -1}, DENSE, 1, "must not be negative"),
    ({"exit_duration_in_mins": -1.0}, DENSE, 1, "must not be negative"),
    ({"adam_beta1": 1.0}, DENSE, 1, "[0, 1)"),
]


@pytest.mark.parametrize(("values", "model_config", "world_size", "message"), BAD)
def test_bad_layouts_and_values(values: dict, model_config: ModelConfig, world_size: int, message: str) -> None:
    base = {"seq_length": 1024}
    assert not find_problems(build(base), replace(model_config, mask_token_id=250), 1)
    problems = find_problems(build(base | values), model_config, world_size)
    assert any(message in problem for problem in problems), problems
    assert all(problem.startswith("--") for problem in problems)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda path: path.stem)
@pytest.mark.parametrize("base", ["demo_cpu", "qwen3_8b"])
def test_every_objective_goes_with_a_recipe(objective: Path, base: str) -> None:
    """The later file wins; what it says is in force, whichever model it is added to."""
    recipe = [str(next(path for path in RECIPES if path.stem == base))]
    if base != "demo_cpu":
        recipe.append("launch/recipes/portable.yaml")  # some have no other layers: tests/unit/test_recipes.py
    config, alone = parse("--config", *recipe, str(objective)), parse("--config", *recipe)
    chosen = yaml.safe_load(objective.read_text())
    assert {name: config.to_dict()[name] for name in chosen} == chosen
    assert config.training == alone.training and config != alone
    model = config.training.model
    assert not find_problems(config, named_model_config(model) if model else MOE, 8 if model else 2)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(recipe: Path) -> None:
    config = parse("--config", str(recipe))
    chosen = yaml.safe_load(recipe.read_text())
    assert {name: config.to_dict()[name] for name in chosen if name != "lr_mult"} == {
        name: value for name, value in chosen.items() if name != "lr_mult"
    }
    # tests/unit/test_recipes.py dry-runs those that name a model; the others' are made on the spot.
    if not config.training.model:
        config = parse("--config", str(recipe), "--save", "run")
        assert not find_problems(config, MOE, 1 if recipe.stem.startswith("study") else 2)


def test_help_shows_a_default_only_where_there_is_one() -> None:
    parser = Parser(prog="x")
    parser.add_argument("--out", help="a directory")
    parser.add_argument("--all", action="store_true", help="all of it")
    parser.add_argument("--files", nargs="+", default=[], help="some files")
    parser.add_argument("--split", help="of the data; default: train")
    parser.add_argument("--first", type=int, default=0, help="an index")
    add_settings(parser, ("load", "lr", "bf16"))
    text = parser.format_help()
    assert "None" not in text and "False" not in text and "[]" not in text and "null" not in text
    assert text.count("default: ") == 4 and "an index (default: 0)" in text and "(default: 0.0001)" in text


def test_the_usage_of_many_flags_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for main, usage in (
        (train.main, "usage: python -m megatron_a2d.train [--config RECIPE ...] [options]"),
        (evaluate.main, "usage: python -m megatron_a2d.evaluate --out DIR [--config FILE] [options]"),
    ):
        with pytest.raises(SystemExit):
            main(["--help"])
        assert capsys.readouterr().out.splitlines()[:2] == [usage, ""]


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [(1_234_567, "", "1.23M"), (41.9e9, "", "41.9B"), (115e9, "B", "115 GB"), (5, "B", "5 B")],
)
def test_numbers_for_people(number: float, unit: str, text: str) -> None:
    """Billions of tokens and parameters are B, as everywhere in the field; of bytes they are GB."""
    assert human(number, unit) == text
