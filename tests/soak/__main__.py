"""A run under random faults, an hour long: `python -m tests.soak --minutes 60 --seed 1` (make soak).

A tiny MoE model trains in four processes under launch/train.sh. About once a minute something happens to it (the kinds
are in fault_kinds.py, drawn from the seed, each once before one comes again); if the run has ended, the same command
starts it again. At the end weights and optimizer must be, bit by bit, those of a run that nothing happened to. Exit
code 1 if a target of the summary is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from rich.live import Live

from bench.result_file import commit
from bench.result_tables import machine
from megatron_a2d.checkpoint.directory import directory_name, latest_iteration
from megatron_a2d.terminal.console import console, hide_noise
from megatron_a2d.utils.atomic_write import write_json
from megatron_a2d.utils.exit_codes import DONE, SIGNALLED
from tests.slurm.slurm_jobs import differences
from tests.soak.fault_kinds import KINDS, NEED_A_DISK
from tests.soak.soak_report import Row, cells, summary, table, targets, to_json
from tests.soak.soak_run import DISK, TRAIN_ITERS, EndedError, Run, Start, mount, unmount

LONGEST = 3.0  # times --minutes: on a busy machine a start takes minutes, and all kinds have to come


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="at least as many faults as minutes; default: 60")
    parser.add_argument("--seed", type=int, default=1, help="of the faults")
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR, a new one, and leave everything there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    hide_noise()
    kinds = [kind for kind in KINDS if options.only in kind]
    if not kinds:
        parser.error(f"--only {options.only}: is in the name of no kind; the kinds are: {', '.join(KINDS)}")
    with workplace(options.keep) as root, small_disk(root) as disk:
        if not disk and (left_out := sorted(NEED_A_DISK & set(kinds))):
            kinds = [kind for kind in kinds if kind not in NEED_A_DISK]
            console.print(f"left out, for mounting is not possible here: {', '.join(left_out)}")
        run = Run(root, options.seed, disk)
        try:
            rows, minutes = soak(run, kinds, options.minutes)
            steps = run.reached()
            problems = compare(run)
        finally:
            for start in run.starts:
                start.kill()
        # In five minutes there is no time for every kind.
        wanted = kinds if options.minutes >= 2 * len(kinds) else sorted({row.kind for row in rows})
        found = targets(rows, int(options.minutes), wanted, run.partial_directories(), problems)
    width = max(console.width, 120)
    console.print(table(rows, f"{len(rows)} faults in a run of {steps} steps, seed {options.seed}"), width=width)
    console.print(summary(found), width=width)
    if options.out:
        command = f"make soak MINUTES={options.minutes:g} SEED={options.seed}"
        about = dict(command=command, commit=commit(), machine=machine(), minutes_taken=minutes, steps=steps)
        write_json(options.out, to_json(rows, found, **about))
    sys.exit(not all(target.is_met for target in found))


def soak(run: Run, kinds: list[str], minutes: float) -> tuple[list[Row], float]:
    """Disturb the run for so long; returns the faults and the minutes that it took."""
    rows: list[Row] = []
    bag: list[str] = []
    order = random.Random(run.random.random())
    run.start()
    run.wait_for_step(1)
    begin = time.monotonic()

    def goes_on() -> bool:
        passed = (time.monotonic() - begin) / 60
        return passed < minutes or (len(rows) < minutes and passed < LONGEST * minutes)

    with Live(console=console, transient=True, auto_refresh=False) as live:
        while goes_on():
            bag = bag or order.sample(kinds, len(kinds))
            # Two whole checkpoints, so that one may be lost, and a step of this start; then some moment, but not late.
            try:
                run.wait(lambda: len(run.intact()) >= 2, "two checkpoints")
            except EndedError as error:
                rows.append(Row("none", "no fault", run.reached(), problem=f"{error}; {run.current.story()[-1000:]}"))
                run.current.kill()
                run.start()
                continue
            due = begin + 60 * len(rows) * 0.9 + order.uniform(0, 10)
            time.sleep(max(order.uniform(0, 4), min(60, due - time.monotonic())))
            rows.append(disturb(run, bag.pop()))
            if console.is_terminal:
                live.update(table(rows[-console.height + 6 :], f"{len(rows)} faults"), refresh=True)
            else:
                console.print("  ".join(cells(len(rows), rows[-1])), soft_wrap=True)
            if rows[-1].problem:
                console.print(f"  {rows[-1].problem}\n{run.current.story()}", soft_wrap=True)
    return rows, (time.monotonic() - begin) / 60


def disturb(run: Run, kind: str) -> Row:
    """A fault, and the run as far again as it was."""
    since, starts = time.monotonic(), len(run.starts)
    try:
        row = KINDS[kind](run)
    except Exception:
        row = Row(kind, kind, run.reached(), problem=traceback.format_exc())
        run.current.kill()
    again = len(run.starts) > starts
    if run.current.is_over():
        again = True
        run.start()
    try:
        run.wait_for_step(row.step + 1)
    except EndedError as error:
        row.problem = row.problem or f"{error}; {run.current.story()[-1000:]}"
    row.seconds_lost = time.monotonic() - since if again else 0.0
    if again:
        row.resumed = run.resumed()
        row.steps_again = max(0, row.step - (row.resumed or 0))
    return row


def compare(run: Run) -> list[str]:
    """End the run, let another one reach the same iteration undisturbed, and compare; a line per difference."""
    run.current.process.send_signal(signal.SIGUSR1)
    if (code := run.wait_for_end()) != SIGNALLED:
        return [f"the run did not end when it was told: exit code {code}; {run.current.story()[-500:]}"]
    steps = latest_iteration(run.save) or 0
    save = run.root / "unbroken"
    flags = run.flags(save=save, exit_interval=steps, save_interval=TRAIN_ITERS)
    console.print(f"the same {steps} steps without faults")
    unbroken = Start(run.root / "start_unbroken", flags, None)
    run.starts.append(unbroken)
    if unbroken.process.wait() != DONE:
        return [f"the unbroken run failed: {unbroken.story()[-500:]}"]
    found = [f"{name} differs" for name in differences(run.save / directory_name(steps), save / directory_name(steps))]
    other = Run.losses_of(save)
    found += [
        f"the loss of step {step} was {sorted(run.losses[step])}, not {other[step]}"
        for step in sorted(run.losses)
        if step <= steps and run.losses[step] != other[step]
    ]
    if run.torn_lines:
        found.append(f"{run.torn_lines} lines of log.jsonl are no records")
    return found


@contextlib.contextmanager
def workplace(keep: Path | None) -> Iterator[Path]:
    if keep:
        keep.mkdir(parents=True)
        yield keep.resolve()
        return
    root = Path(tempfile.mkdtemp(prefix="a2d_soak_"))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def small_disk(root: Path) -> Iterator[Path | None]:
    disk = mount(DISK, root / "disk")
    try:
        yield disk
    finally:
        if disk:
            unmount(disk)


if __name__ == "__main__":
    main()
