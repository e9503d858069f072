"""Studies without training: plans, the runner on a stand-in for it, facts, pages, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_a2d.checkpoint.directory import REQUIRED_FILES
from megatron_a2d.config.settings import RunConfig, build
from megatron_a2d.report.tensorboard_server import logs_of, plugins
from megatron_a2d.study.__main__ import main
from megatron_a2d.study.ablations import critical_batch_size, lr_by_role
from megatron_a2d.study.ablations.mask_sampling import ATTENTION, VARIANTS
from megatron_a2d.study.cloze_eval import CONTEXT, Facts
from megatron_a2d.study.command import STUDIES, find_study
from megatron_a2d.study.confidence import mean_interval
from megatron_a2d.study.fingerprints import hold_inputs
from megatron_a2d.study.jobs import BASE, Job, Measure, resolved, scaled_batch
from megatron_a2d.study.results_page import write_page
from megatron_a2d.study.runner import Runner
from megatron_a2d.utils.errors import UserError
from tests.tiny import write_tokens
from tests.unit.test_training import QWEN3_30B_A3B

DOCS = Path(__file__).resolve().parents[2] / "docs" / "studies"

# Stands for `python`: "trains" by writing what a run leaves, "measures" by counting. A line of calls.txt for each call.
STAND_IN = """
import json, pathlib, sys, time, yaml
module, *arguments = sys.argv[2:]
here = pathlib.Path(__file__).parent
with open(here / "calls.txt", "a") as calls:
    calls.write(module + " " + arguments[-1] + "\\n")
if (here / "broken").exists() and (here / "broken").read_text() in arguments[-1]:
    sys.exit("no such luck")
if module == "megatron_a2d.train":
    settings = yaml.safe_load(pathlib.Path(arguments[1]).read_text())
    save = pathlib.Path(settings["save"])
    time.sleep(float((here / "slow").read_text()) if (here / "slow").exists() else 0)
    (save / "log.jsonl").write_text(json.dumps({"kind": "train", "iteration": settings["train_iters"], "loss": 1.0}))
    (save / "latest_checkpointed_iteration.txt").write_text(str(settings["train_iters"]))
else:
    spec = json.loads(pathlib.Path(arguments[0]).read_text())
    found = {item["name"]: {"load": spec["settings"]["load"], **item["options"]} for item in spec["measures"]}
    pathlib.Path(spec["out"]).write_text(json.dumps(found))
"""
JOBS = [
    Job("first", {"seed": 1}, {"seed": 1}, measures=(Measure("a", "cloze"), Measure("b", "drift", {}, {"reference": BASE}))),
    Job("second", {"seed": 2}, {"seed": 2}, start="first", measures=(Measure("a", "cloze", {"seq_length": 8}),)),
    Job("third", {"seed": 3}, {}, trains=False, measures=(Measure("a", "cloze"),)),
]  # fmt: skip


def base(**settings: Any) -> RunConfig:
    return build({"load": "start", "train_iters": 10, "log_interval": 1, **settings})


def runner(tmp_path: Path, **settings: Any) -> Runner:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return Runner(tmp_path / "out", base(**settings), [sys.executable, str(tmp_path / "stand_in.py")], num_parallel=2)


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls.txt"
    return sorted(path.read_text().splitlines()) if path.exists() else []


def test_a_plan_is_run_in_order_and_once(tmp_path: Path) -> None:
    first, second, third = runner(tmp_path).run(JOBS)
    out = tmp_path / "out"
    assert first["a"] == {"load": str(out / "first")} and first["b"]["reference"] == "start"
    assert first["training"][-1]["iteration"] == 10 and "training" not in third and third["a"]["load"] == "start"
    assert json.loads((out / "second" / "settings.json").read_text())["load"] == str(out / "first")
    # One process for measurements of equal settings, another one for others.
    assert len(calls(tmp_path)) == 5
    again = runner(tmp_path).run(JOBS)
    assert again == [first, second, third] and len(calls(tmp_path)) == 5
    (out / "second" / "measured_0.json").unlink()
    runner(tmp_path).run(JOBS)
    assert len(calls(tmp_path)) == 6
    # What an earlier plan measured in another way is measured again, and nothing is trained again.
    changed = [*JOBS[:2], JOBS[2]._replace(measures=(Measure("a", "cloze", options={"more": 1}),))]
    assert not runner(tmp_path).is_done(changed[2]) and runner(tmp_path).is_done(changed[1])
    assert runner(tmp_path).run(changed)[2]["a"]["more"] == 1 and len(calls(tmp_path)) == 7


def test_what_failed_is_named_and_what_waits_for_it_is_not_begun(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("first")
    with pytest.raises(UserError, match=r"first: megatron_a2d.train ended with exit code 1 .no such luck") as error:
        runner(tmp_path).run(JOBS)
    assert "1 jobs were not started" in str(error.value) and not (tmp_path / "out" / "second").exists()
    assert (tmp_path / "out" / "third" / "measured_0.json").exists()
    (tmp_path / "broken").unlink()
    assert len(runner(tmp_path).run(JOBS)) == 3


def test_another_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner(tmp_path).run(JOBS)
    with pytest.raises(UserError, match=r"first was started with lr 0.0001, not 0.1"):
        runner(tmp_path, lr=0.1).run(JOBS)
    made = calls(tmp_path)
    runner(tmp_path, load="moved").run(JOBS)
    monkeypatch.chdir(tmp_path)
    runner(Path()).run(JOBS)  # the same --out under another name
    assert calls(tmp_path) == made


def write_start(root: Path, content: str) -> None:
    """What a study reads of a converted checkpoint before it begins."""
    (root / "release" / "hf").mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    for name in (*REQUIRED_FILES, "manifest.json"):
        (root / "release" / name).write_text(content)


def test_a_study_keeps_to_its_checkpoint_and_tokens(tmp_path: Path) -> None:
    for number, seed in enumerate((0, 1, 0)):
        write_tokens(tmp_path / f"tokens{number}", 5, 200, seed=seed)
    write_start(tmp_path / "start", "one")

    def hold(train: int, valid: int = 0) -> None:
        paths = {
            "train_data_path": str(tmp_path / f"tokens{train}"),
            "valid_data_path": str(tmp_path / f"tokens{valid}"),
        }
        hold_inputs(tmp_path / "out", base(**paths, load=str(tmp_path / "start")))

    hold(train=0)
    hold(train=2, valid=2)  # the same tokens elsewhere
    with pytest.raises(UserError, match=r"--train-data-path: \S+tokens1 differs from what the study"):
        hold(train=1)
    with pytest.raises(UserError, match="--valid-data-path"):
        hold(train=0, valid=1)
    tokens, start = str(tmp_path / "tokens0"), str(tmp_path / "start")
    with pytest.raises(UserError, match=r"--valid-data-path: the study in --out .* was started with it"):
        hold_inputs(tmp_path / "out", base(train_data_path=tokens, load=start))
    (tmp_path / "start" / "release" / "manifest.json").write_text("another")
    with pytest.raises(UserError, match="--load"):
        hold(train=0)


def test_tensorboard_opens_at_the_charts(tmp_path: Path) -> None:
    """The first tab that has something to show is the one that opens."""
    from tensorboard.program import TensorBoard
    from torch.utils.tensorboard import SummaryWriter

    from megatron_a2d.training.tensorboard_layout import LAYOUT

    with pytest.raises(UserError, match="holds no TensorBoard files"):
        main(["watch", str(tmp_path)])
    with SummaryWriter(str(tmp_path / "run" / "tensorboard")) as writer:
        writer.add_custom_scalars(LAYOUT)
        writer.add_scalar("train/loss", 1.0, 1)
    tabs = {}
    for name, order in (("ours", plugins()), ("its own", None)):
        board = TensorBoard(plugins=order)
        board.configure(argv=["", "--logdir", str(logs_of(tmp_path / "run")), "--port", "0", "--load_fast", "false"])
        server = board._make_server()
        with urllib.request.urlopen(f"{serve(server)}/data/plugins_listing") as answer:
            listing = json.load(answer)
        tabs[name] = next(tab for tab, about in listing.items() if about["enabled"])
    assert tabs["ours"] == "custom_scalars" != tabs["its own"]


def serve(server: Any) -> str:
    """The address of a server that answers in a thread until the tests end."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return str(server.get_url()).rstrip("/")


def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    runner(tmp_path)
    (tmp_path / "slow").write_text("0.7")
    code = (
        f"import sys; sys.path.insert(0, {str(Path.cwd())!r})\n"
        "from pathlib import Path\nfrom tests.unit import test_study as t\n"
        f"t.runner(Path({str(tmp_path)!r})).run(t.JOBS)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not any("first" in call for call in calls(tmp_path)):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = calls(tmp_path)
    assert not (tmp_path / "out" / "second").exists()
    assert len(runner(tmp_path).run(JOBS)) == 3
    assert len(calls(tmp_path)) > len(before)


def test_branches_differ_in_their_batch_alone() -> None:
    config = base(global_batch_size=16, micro_batch_size=8, train_iters=200, lr_warmup_iters=20, lr=1e-3, eval_iters=8)
    for factor in (0.25, 1, 4):
        changed = scaled_batch(config, factor)
        assert changed["global_batch_size"] * changed["train_iters"] == 16 * 200
        assert changed["global_batch_size"] * changed["lr_warmup_iters"] == 16 * 20
        assert changed["global_batch_size"] * changed["eval_iters"] == 16 * 8
        assert changed["lr"] == pytest.approx(1e-3 * factor**0.5)
        assert changed["global_batch_size"] % changed["micro_batch_size"] == 0
    # Counts that the factors of the study do not divide: the same tokens for all, no further off than half a factor.
    branches = [scaled_batch(config, factor, 16) for factor in critical_batch_size.FACTORS]
    for name, was in (("train_iters", 200), ("lr_warmup_iters", 20), ("eval_iters", 8)):
        [samples] = {branch["global_batch_size"] * branch[name] for branch in branches}
        assert samples > 0 and abs(samples - 16 * was) <= 16 * 8
    with pytest.raises(UserError, match="--global-batch-size 6: the study divides it by 4"):
        scaled_batch(base(global_batch_size=6, micro_batch_size=1, train_iters=8), 0.25)
    unchanged = config.to_dict()
    assert all(unchanged[name] == value for name, value in scaled_batch(config, 1).items())


@pytest.mark.parametrize("name", list(STUDIES))
def test_plans_are_valid_runs_of_any_size(name: str) -> None:
    """The same plan for a laptop's recipe and a cluster's: every job passes the checks of an ordinary run."""
    from megatron_a2d.config.cli import Parser, parse_run
    from megatron_a2d.config.validate import find_problems

    # All branches of a comparison on the same layers: torch's, where one of them has no others.
    for recipes, processes in ((["study_laptop"], 1), (["qwen3_30b_a3b", "portable"], 8)):
        arguments = [
            "--config",
            *(f"launch/recipes/{recipe}.yaml" for recipe in recipes),
            "--load",
            "x",
            "--train-data-path",
            "y",
        ]
        config, _ = parse_run(Parser(), arguments)
        jobs = find_study(name).plan(config, [1, 2], QWEN3_30B_A3B)
        names = [job.name for job in jobs]
        assert len(set(names)) == len(names)
        for number, job in enumerate(jobs):
            assert job.start in (BASE, *find_study(name).starts, *names[:number])
            save = {"save": "z"} if job.trains else {"keep_latest_k": 0, "save_retain_interval": 0}
            assert find_problems(build({**resolved(config, job), **save}), None, processes) == []
            for measure in job.measures:
                measured = {**resolved(config, job), "keep_latest_k": 0, "save_retain_interval": 0, **measure.settings}
                assert find_problems(build(measured), None, processes) == []


def test_facts_are_what_always_follows(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_a2d.data.indexed_dataset import TokenFile

    write_tokens(tmp_path / "noise", 2, 200, seed=0)
    fact, exception, loop = [1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 15, 16], [21] * 12
    builder = IndexedDatasetBuilder(str(tmp_path / "text.bin"), dtype=np.uint16)
    for number in range(20):
        tokens = [100 + number, *fact, 50, *exception, 60 + number % 2, 51, *loop]
        builder.add_document(torch.tensor(tokens, dtype=torch.int32), [len(tokens)])
    builder.finalize(str(tmp_path / "text.idx"))
    facts = Facts(TokenFile(tmp_path / "text"), end_of_document=51)
    asked = facts.asked(np.array([200, *fact, 8, *exception, 60, *loop]))
    assert len(fact) == CONTEXT + 1
    # The last token of the fact, and nothing else: not an ambiguous continuation, nor a repetition.
    assert np.flatnonzero(asked).tolist() == [7]
    assert not facts.asked(np.array([200, *fact[:-1], 9])).any() and not facts.asked(np.array([1, 2])).any()


@pytest.mark.parametrize("name", STUDIES)
def test_published_pages_begin_as_their_study(name: str) -> None:
    """Title and question are the generator's, in other line breaks."""
    study, page = find_study(name), (DOCS / f"{name}.md").read_text()
    assert page.split("<!-- results -->")[0].split() == f"# {study.title} {study.question}".split()


@pytest.mark.parametrize("column", ["NELBO at the start", *ATTENTION.values(), "accuracy"])
def test_the_page_on_masks_has_the_figures_of_its_rows(column: str) -> None:
    rows = list(map(json.loads, (DOCS / "masks.jsonl").read_text().splitlines()))
    table = [line.strip("| ").split(" | ") for line in (DOCS / "masks.md").read_text().splitlines() if line[:1] == "|"]
    place = table[0].index(column)
    for line, variant in zip(table[2:], VARIANTS, strict=False):
        values = [row[column] for row in rows if row.get("variant") == variant]
        assert line[0] == variant and line[place] == mean_interval(values).format(3)


def test_a_page_keeps_what_a_person_wrote(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    write_page(path, "Title", "Question?", "first")
    path.write_text(path.read_text() + "\n## Conclusions\n\nIt works.\n")
    write_page(path, "Other title", "?", "second \\1")
    assert "second \\1" in path.read_text() and "first" not in path.read_text() and "It works." in path.read_text()
    path.write_text("nothing")
    with pytest.raises(UserError, match="has no mark for results"):
        write_page(path, "Title", "?", "third")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer-rl"], r"layer-rl: no such study \(did you mean layer-lr\?\)"),
        (["layer-lr"], "the following arguments are required: --out"),
        (["layer-lr", "--out", "x"], "--load: is missing"),
        (["layer-lr", "--out", "x", "--load", "y", "--valid-data-path", "z", "--save", "w"], "--save w: a study's runs"),
        (["layer-lr", "--out", "x", "--load", "y", "--valid-data-path", "z", "--seeds", "0"], "--seeds 0: must be 1 to 1,000"),
    ],
)  # fmt: skip
def test_bad_input(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments)


@pytest.mark.parametrize(
    ("changes", "missing"), [({}, set()), ({"tie_word_embeddings": True}, {"head"}), ({"num_experts": 0}, {"router"})]
)
def test_roles_that_the_model_does_not_have_stay_out(changes: dict[str, Any], missing: set[str]) -> None:
    jobs = lr_by_role.plan(base(), [1], replace(QWEN3_30B_A3B, **changes))
    roles = {"mlp", "router", "norm", "embedding", "head"} - missing
    assert all(set(job.settings["lr_mult"]) == roles for job in jobs if job.trains)


def test_what_a_study_cannot_measure_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss", "--loss-weighting", "cart"]
    flags += ["--ckpt-step", "5"]
    with pytest.raises(UserError) as error:
        main(
            ["probe", "--out", str(tmp_path), "--load", "x", "--valid-data-path", "v", "--train-data-path", "t", *flags]
        )
    problems = str(error.value)
    for name in ("reset-attention-mask True", "reset-position-ids True", "eod-mask-loss True", "loss-weighting cart"):
        assert f"--{name}: a study's measurements support only" in problems, name
    assert "give the iteration's directory to --load" in problems
