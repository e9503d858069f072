"""The command `python -m megatron_a2d.study NAME`: plan a study, run its jobs, write its results."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

from megatron_a2d.checkpoint.directory import HF_FILES, resolve
from megatron_a2d.checkpoint.training_facts import inherited
from megatron_a2d.config.cli import Parser, parse_run
from megatron_a2d.config.model_config import read_model_config
from megatron_a2d.config.settings import RunConfig, flag, settings
from megatron_a2d.report.plot_style import import_pyplot
from megatron_a2d.study.fingerprints import EXTRA_START, hold_inputs
from megatron_a2d.study.results_page import write_lines, write_page
from megatron_a2d.study.runner import Runner
from megatron_a2d.study.study_base import Study, seeds_of
from megatron_a2d.terminal.console import console
from megatron_a2d.utils.atomic_write import hold_directory
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_line

STUDIES = {
    "probe": "conversion_method",
    "layer-lr": "lr_by_role",
    "critical-batch": "critical_batch_size",
    "batch-ramp": "batch_ramp",
    "time-sampling": "timestep_sampling",
    "masks": "mask_sampling",
    "precision": "low_precision",
    "routers": "routers",
    "block": "block_lengths",
}


# Measurements create their own samples (holes, facts, other timesteps), to which these settings do not apply.
_NOT_MEASURED = (
    "reset_attention_mask", "reset_position_ids", "random_length_prob", "eod_mask_loss", "loss_weighting",
    "mask_sampling",
)  # fmt: skip

MOST_RUNS = 1000  # limit of --seeds and --jobs


def find_study(name: str) -> Study:
    study: Study = importlib.import_module(f"megatron_a2d.study.ablations.{STUDIES[name]}").STUDY
    assert study.name == name
    return study


def run_study(name: str, argv: list[str]) -> None:
    """Run the unfinished jobs of a study, then write its table, plots and page."""
    study = find_study(name)
    parser = Parser(prog=f"python -m megatron_a2d.study {name}", description=" ".join(study.question.split()))
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory for runs and results")
    parser.add_argument("--seeds", type=int, default=study.num_seeds, help="seeds per variant")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs")
    parser.add_argument(
        "--launcher", default="", metavar="WORDS",
        help="command in front of `-m megatron_a2d.train`, such as 'torchrun --nproc-per-node 8' or, under Slurm, "
        "'srun --ntasks-per-node 1 launch/node.sh'; default: this Python, one process",
    )  # fmt: skip
    for start, about in study.starts.items():
        parser.add_argument(f"{EXTRA_START}{start}", metavar="CKPT", help=about)
    parser.add_argument("--page", type=Path, metavar="DIR", help="directory for table, plots and page; default: --out")
    parser.add_argument("--plan", action="store_true", help="list the jobs and whether they are done, and exit")
    base, options = parse_run(parser, argv, inherited)
    _check(base, options.seeds, options.jobs)
    assert base.training.load is not None
    model_config = read_model_config(resolve(base.training.load) / HF_FILES)
    starts = {name: path for name in study.starts if (path := getattr(options, f"load_{name}"))}
    jobs = study.plan(base, seeds_of(options.seeds), model_config)
    jobs = [job for job in jobs if job.start not in study.starts or job.start in starts]
    runner = Runner(options.out, base, shlex.split(options.launcher), options.jobs, starts)
    if options.plan:
        for job in jobs:
            print_line(f"{'done' if runner.is_done(job) else 'to do':6}{job.name}")
        return
    hold_directory(options.out, "--out")
    hold_inputs(options.out, base, {f"{EXTRA_START}{name}": path for name, path in starts.items()})
    import_pyplot()  # fail now, not after the last run
    records = runner.run(jobs)
    page = options.page or options.out
    page.mkdir(parents=True, exist_ok=True)
    report = study.report(records, page)
    write_lines(page / f"{name}.jsonl", report.rows)
    words = _without(argv, "--page", "--jobs", "--out", "--launcher")
    command = f"python -m megatron_a2d.study {name} {' '.join(map(_shown, words))}"
    text = f"`{command} --out DIR`, seeds {seeds_of(options.seeds)}, {len(jobs)} jobs.\n\n{report.text}"
    write_page(page / f"{name}.md", study.title, study.question, text)
    console.print(f"{page / f'{name}.md'}")


def _shown(word: str) -> str:
    """A word of the command line; of absolute paths, which are specific to this machine, the last two parts."""
    flag, equals, value = word.rpartition("=")
    path = Path(value)
    return shlex.quote(flag + equals + (".../" + "/".join(path.parts[-2:]) if path.is_absolute() else value))


def _without(argv: list[str], *flags: str) -> list[str]:
    """`argv` without these flags and their values."""
    words, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word in flags:
            skip = True
        elif word.partition("=")[0] not in flags:
            words.append(word)
    return words


def _check(base: RunConfig, seeds: int, jobs: int) -> None:
    problems = []
    if base.training.save:
        problems.append(f"--save {base.training.save}: a study's runs are saved in --out; remove it")
    if not base.training.load:
        problems.append("--load: is missing; give the autoregressive checkpoint that the study starts from")
    if not (base.data.valid_data_path or base.data.data_mixture):
        problems.append("--valid-data-path: is missing; a study evaluates its runs on held-out data")
    if base.training.ckpt_step is not None:
        problems.append(
            f"--ckpt-step {base.training.ckpt_step}: a study begins with one checkpoint and its runs resume "
            "with their own; give the iteration's directory to --load"
        )
    for name in _NOT_MEASURED:
        value, usual = base.to_dict()[name], settings()[name].default
        if value != usual:
            problems.append(f"{flag(name)} {value}: a study's measurements support only {usual}; remove it")
    if base.diffusion.objective != "mdlm":
        problems.append(f"--objective {base.diffusion.objective}: a study sets the objectives of its runs; remove it")
    for name, value in (("--seeds", seeds), ("--jobs", jobs)):
        if not 1 <= value <= MOST_RUNS:
            problems.append(f"{name} {value}: must be 1 to {MOST_RUNS:,}")
    if problems:
        raise UserError(problems)


def usage() -> str:
    return "\n".join(f"  {name:16}{find_study(name).title}" for name in STUDIES)
