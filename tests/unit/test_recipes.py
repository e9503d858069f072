"""Every shipped recipe is dry-run on every kind of GPU, from the fewest that it fits on to 512."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megatron_a2d import plan, train
from megatron_a2d.checkpoint.training_facts import Trained
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.conversion.end_tokens import EndTokens
from megatron_a2d.conversion.hf_config import Exported, refusals
from megatron_a2d.planner.cluster import cluster_names, read_cluster
from megatron_a2d.utils.errors import UserError
from tests.recipe_sizes import FEWEST, GPUS, RECIPES

ROOT = Path(__file__).resolve().parents[2]


def dry_run(recipe: str, gpus: int, cluster: str, *flags: str) -> None:
    train.main(
        ["--config", str(RECIPES[recipe]), "--dry-run", "--settings-only", "--world-size", str(gpus), "--cluster", cluster,
         *flags]
    )  # fmt: skip


def test_every_recipe_and_cluster_is_here() -> None:
    assert set(RECIPES) == set(FEWEST)
    assert {"h100", "h200", "b200"} <= set(cluster_names())
    assert all(read_cluster(name).gpu.lower() == name for name in cluster_names())


def test_the_docs_have_the_fewest_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--requirements", *map(str, RECIPES.values())])
    printed = _rows(capsys.readouterr().out)
    assert {name: [cell.partition(" (")[0] for cell in cells] for name, cells in printed.items()} == {
        name: [str(gpus or "-") for gpus in fewest] for name, fewest in FEWEST.items()
    }
    page = (ROOT / "docs" / "planning.md").read_text()
    assert printed == _rows(page.partition("## Hardware requirements")[2].partition("\n## ")[0])
    readme = _rows((ROOT / "README.md").read_text().partition("(days)")[2].partition("\n\n")[0])
    assert {name: [cells[0], cells[2]] for name, cells in printed.items()} == {
        name.partition("` ")[0]: cells[1:] for name, cells in readme.items()
    }
    # Routing that is twice as uneven needs other machines.
    plan.main(["--imbalance", "2", "--requirements", str(RECIPES["qwen3_30b_a3b"])])
    assert _rows(capsys.readouterr().out)["qwen3_30b_a3b"] != printed["qwen3_30b_a3b"]


def _rows(text: str) -> dict[str, list[str]]:
    """Cells by recipe; a row may be of several recipes."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {recipe.strip("`"): cells for names, *cells in rows for recipe in names.split(", ")}


@pytest.mark.parametrize("recipe", FEWEST)
def test_dry_run(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for cluster, fewest in zip(("h100", "h200", "b200"), FEWEST[recipe], strict=True):
        for gpus in GPUS:
            if fewest and gpus >= fewest:
                dry_run(recipe, gpus, cluster)
                assert f"{gpus} processes = TP" in capsys.readouterr().out
            else:
                with pytest.raises(UserError, match=r"GiB, the run needs|does not divide"):
                    dry_run(recipe, gpus, cluster)


@pytest.mark.parametrize("recipe", ["qwen3_0p6b", "qwen3_8b", "qwen3_30b_a3b", "qwen3_235b_a22b"])
def test_objectives_on_top(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each goes with each model; attention that is not Transformer Engine's only without its graphs."""
    own = RECIPES[recipe].parent
    for objective in sorted((own / "objectives").glob("*.yaml")):
        lines = [
            "--dry-run",
            "--settings-only",
            "--world-size",
            "128",
            "--config",
            str(RECIPES[recipe]),
            str(objective),
        ]
        values = yaml.safe_load(RECIPES[recipe].read_text())
        if objective.stem in ("annealing", "block", "block_ar", "grafting") and "cuda_graph_impl" in values:
            with pytest.raises(UserError, match="--cuda-graph-scope attn: with --"):
                train.main(lines)
            train.main(["--cuda-graph-scope", "mlp", "--no-apply-rope-fusion", *lines])
        else:
            train.main(lines)
        train.main([*lines, str(own / "portable.yaml")])
    assert "128 processes = TP" in capsys.readouterr().out


def test_speed_flags_are_set() -> None:
    """docs/performance.md says which, and why the others are not."""
    for name, path in RECIPES.items():
        values = yaml.safe_load(path.read_text())
        needed = ["overlap_grad_reduce", "overlap_param_gather", "manual_gc"]
        if values.get("transformer_impl") == "local":  # the others need Transformer Engine
            assert all(values.get(flag) is True for flag in needed), name
            continue
        needed += ["apply_rope_fusion", "gradient_accumulation_fusion"]
        if "_a" in name:
            needed += ["moe_permute_fusion", "moe_router_fusion"]
        if "30b_a3b" in name:
            needed += ["overlap_moe_expert_parallel_comm", "delay_wgrad_compute"]
        assert all(values.get(flag) is True for flag in needed), name


@pytest.mark.parametrize("recipe", ["qwen3_8b_block", "qwen3_30b_a3b_block"])
def test_block_recipes_train_what_engines_serve(recipe: str) -> None:
    """What `export_hf --format sdar` asks for, and the block grid and positions of a request."""
    values = yaml.safe_load(RECIPES[recipe].read_text())
    config = ModelConfig(4, 64, 4, 2, 16, 128, 151936, 40960, 1e-6, 1e6, False, mask_token_id=151669)
    trained = Trained(**{name: values[name] for name in Trained._fields if name in values})
    exported = Exported(config, {}, {}, "bfloat16", trained, EndTokens((), None))
    assert trained.block_length == 32 and not refusals("sdar", exported)
    assert refusals("sdar", exported._replace(trained=trained._replace(label_shift=True)))
    assert values["reset_block_grid"] and values["reset_position_ids"] and values["reset_attention_mask"]


def test_rnd1s_own_run(capsys: pytest.CaptureFixture[str]) -> None:
    """500B tokens, in batches of 8M."""
    dry_run("rnd1_30b_a3b_64xb200", 64, "b200")
    shown = capsys.readouterr().out
    assert "59605 iterations = 500B tokens" in shown and "2048 samples x 4096 tokens = 8.39M tokens" in shown


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"a H100 has 79.1 GiB, the run needs [\d.]+ \(activations .*megatron_a2d.plan"):
        dry_run("qwen3_8b", 8, "h100", "--micro-batch-size", "8")


def test_settings_only_needs_a_model_and_a_dry_run() -> None:
    with pytest.raises(UserError, match="need --model"):
        train.main(["--dry-run", "--settings-only"])
    with pytest.raises(UserError, match="is only valid with --dry-run"):
        train.main(["--settings-only", "--model", "Qwen/Qwen3-8B"])
    with pytest.raises(UserError, match=r"--model Qwen/Qwen3-7B: is neither .*did you mean Qwen/Qwen3-"):
        train.main(["--dry-run", "--settings-only", "--model", "Qwen/Qwen3-7B"])


def test_the_documented_runs_fit_their_machines() -> None:
    """The commands as they stand in README and quickstart, with the GPUs that they name."""
    text, quickstart = (ROOT / "README.md").read_text(), (ROOT / "docs" / "quickstart.md").read_text()
    train = r"NPROC=(\d+) launch/train.sh --config launch/recipes/(\w+).yaml --load checkpoints/([\w-]+)"
    many = re.search(
        r"## (\d+) (\w+) under Slurm.*?sbatch --nodes (\d+) --gpus-per-node (\d+) .*?launch/recipes/(\w+).yaml",
        quickstart, re.DOTALL,
    )  # fmt: skip
    plan = re.search(r"make plan RECIPE=launch/recipes/(\w+).yaml\s+CLUSTER=(\w+) GPUS=(\d+)", text)
    assert many and plan and int(many[1]) == int(many[3]) * int(many[4])
    dry_run(many[5], int(many[1]), many[2].lower())
    dry_run(plan[1], int(plan[3]), plan[2])
    assert re.search(r"Eight H100", text) and re.search(r"## 8 H100", quickstart)
    for page, convert in ((text, "make convert-hf HF_MODEL={} OUT={}"), (quickstart, "--hf-model {} --out {}")):
        one = re.search(train, page)
        assert one and one[1] == "8"
        dry_run(one[2], 8, "h100")
        model = yaml.safe_load(RECIPES[one[2]].read_text())["model"]
        assert convert.format(model, f"checkpoints/{one[3]}") in page, "of the recipe's own model"


@pytest.mark.parametrize(("recipe", "cluster"), [("qwen3_8b", "h100"), ("qwen3_30b_a3b", "b200")])
def test_the_readmes_days_are_the_planners(recipe: str, cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    cell = r"(\d+) \(([\d.]+)\)"
    row = re.search(rf"\| `{recipe}` \| \w+ \| {cell} \| {cell} \|", (ROOT / "README.md").read_text())
    assert row
    gpus, days = row.group(1, 2) if cluster == "h100" else row.group(3, 4)
    plan.main(["--config", str(RECIPES[recipe]), "--cluster", cluster, "--gpus", gpus])
    line = next(line for line in capsys.readouterr().out.splitlines() if "the recipe's" in line and "days" not in line)
    shown = re.search(r"([\d.]+)\D+\$", line.replace(",", ""))
    assert shown and float(shown[1]) == pytest.approx(float(days), abs=0.06)
