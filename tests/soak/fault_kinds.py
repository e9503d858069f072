"""The faults of a soak: what is done to the run, by whom it has to be found, and with which word in the log.

Each is a function of the run that disturbs it and returns its Row. What a user would have to do afterwards (free the
disk, restore the data) is done there too; starting the same command again is the soak's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from megatron_a2d.checkpoint.directory import TRACKER, directory_name
from megatron_a2d.checkpoint.metadata_index import read_index
from megatron_a2d.utils.exit_codes import PEER_LOST, SAVE_FAILED, SIGNALLED, STALLED, USER_ERROR
from tests.soak.soak_report import HANG_FOUND, Row
from tests.soak.soak_run import HANG_LIMIT, SAVE_INTERVAL, EndedError, Run, Start, is_alive

KILLED = 128 + signal.SIGKILL
CHECKSUMS, NEXT_START, OTHERS, LAUNCHER = "checksums", "next start", "other ranks", "launch.torchrun"
RESUMES = [(r"iterations? .* computed again", NEXT_START), (r"resuming at iteration", NEXT_START)]


def begun(run: Run, kind: str, what: str, **others: Any) -> Row:
    """The row of a fault that is about to be."""
    row = Row(kind, what, run.reached(), **others)
    row.bound = SAVE_INTERVAL * (1 + run.is_async + run.failed_saves())
    row.expected = max(run.intact(), default=0)
    return row


def found(
    run: Run,
    row: Row,
    since: float,
    *patterns: tuple[str, str],
    patience: float = 300.0,
    is_over: Callable[[], bool] | None = None,
) -> None:
    """Wait for the line that names the fault; without one the row stays unnamed."""
    try:
        line, row.by = run.find(patterns, since, patience, is_over)
    except EndedError as error:
        row.problem = str(error)
        return  # what came of it, `ended` sees
    row.named, row.found_after = line.text[:300], max(0.0, line.time - since)


def ended(run: Run, row: Row, *codes: int) -> None:
    """Wait for the end of the start; its exit code must be one of these."""
    if row.problem:  # nobody has named it: it may never end
        run.current.kill()
    row.code = run.wait_for_end()
    settle(run, row)
    if row.code not in codes:
        row.problem = row.problem or f"exit code {row.code}, not {' or '.join(map(str, codes))}"


def settle(run: Run, row: Row) -> None:
    """When nothing runs any more: what it had reached by then, and where it must be taken up again."""
    row.step, row.expected = max(row.step, run.reached()), max(run.intact(), default=0)


def kill_rank(run: Run) -> Row:
    victim, pid = run.random.choice(sorted(run.current.ranks().items()))
    row, since = begun(run, "kill -9 of a rank", f"kill -9 of rank {victim}"), time.monotonic()
    os.kill(pid, signal.SIGKILL)
    found(run, row, since, (rf"error: rank {victim} \(.*no heartbeat", OTHERS))
    ended(run, row, KILLED, PEER_LOST)
    return row


def kill_all_ranks(run: Run) -> Row:
    pids = list(run.current.ranks().values())
    row, since = begun(run, "kill -9 of all ranks", "kill -9 of all ranks"), time.monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    found(run, row, since, (r"error: a worker killed by SIGKILL", LAUNCHER))
    ended(run, row, KILLED)
    return row


def kill_launcher(run: Run) -> Row:
    run.current.processes()
    row, since = begun(run, "kill -9 of the launcher", "kill -9 of torchrun"), time.monotonic()
    run.current.process.kill()
    patterns = [(r"error: the store of the process group is gone", "the ranks")]
    found(run, row, since, *patterns, is_over=lambda: not run.current.processes())
    ended(run, row, KILLED)
    return row


def power_loss(run: Run) -> Row:
    row, since = begun(run, "kill -9 of everything", "kill -9 of everything, as a power loss"), time.monotonic()
    run.current.kill()
    settle(run, row)
    run.start()
    found(run, row, since, *RESUMES)
    return row


def stop_rank(run: Run) -> Row:
    victim, pid = run.random.choice(sorted(run.current.ranks().items()))
    row = begun(run, "SIGSTOP of a rank", f"SIGSTOP of rank {victim}", limit=HANG_FOUND)
    since = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    patterns = ((rf"error: hung for .*rank {victim} \(", "watchdog"), (rf"error: rank {victim} \(.*no heart", OTHERS))
    found(run, row, since, *patterns, patience=HANG_LIMIT + 120)
    ended(run, row, STALLED, PEER_LOST, KILLED)
    return row


def flip_byte(path: Path, offset: int) -> None:
    """Another value in one byte; size and times stay as they were."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def damaged(run: Run, kind: str, damage: Callable[[Path], str], *patterns: tuple[str, str]) -> Row:
    """Power loss, damage to the newest checkpoint, and another start."""
    row = begun(run, kind, kind)
    run.current.kill()
    settle(run, row)
    intact = run.intact()
    newest = run.save / directory_name(intact[-1])
    row.what, since = damage(newest), time.monotonic()
    row.expected = max(run.intact(), default=0)
    row.bound += SAVE_INTERVAL * (intact[-1] != row.expected)  # the checkpoint that the fault took
    run.start()
    found(run, row, since, *((pattern.format(newest=newest.name), by) for pattern, by in patterns))
    return row


def flip_in_weights(run: Run) -> Row:
    def damage(newest: Path) -> str:
        file = run.random.choice(sorted(newest.glob("*.distcp")))
        flip_byte(file, run.random.randrange(file.stat().st_size))
        return f"a flipped byte in {newest.name}/{file.name}"

    return damaged(run, "a flipped byte in the newest checkpoint", damage, (r"{newest}/.*is damaged", CHECKSUMS))


def flip_in_optimizer(run: Run) -> Row:
    def damage(newest: Path) -> str:
        tensors = read_index(newest).tensors
        name = run.random.choice(sorted(name for name in tensors if name.startswith("optimizer.")))
        place = run.random.choice(tensors[name].chunks).location
        flip_byte(newest / place.file, place.offset + run.random.randrange(place.length))
        return f"a flipped byte in {name.removeprefix('optimizer.')[:40]} of the optimizer"

    return damaged(run, "a flipped byte in the optimizer", damage, (r"{newest}/.*is damaged", CHECKSUMS))


def torn_write(run: Run) -> Row:
    def damage(newest: Path) -> str:
        files = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
        chosen = run.random.choice([*files, run.save / TRACKER, run.save / "log.jsonl"])
        size = chosen.stat().st_size
        if chosen.name == "log.jsonl":
            os.truncate(chosen, size - run.random.randrange(2, 20))
            return "a torn write of log.jsonl"
        os.truncate(chosen, run.random.randrange(size - (chosen.name == TRACKER)))  # not its line's end alone
        return f"a torn write of {chosen.relative_to(run.save)}"

    return damaged(
        run, "a torn write", damage, (r"{newest}/\S+: (has|is|lacks|the|holds|cannot)", CHECKSUMS),
        (rf"{TRACKER}: contains|iter_\d+: is missing", NEXT_START), (r"log.jsonl: .*unfinished", NEXT_START),
    )  # fmt: skip


def delete_checkpoint(run: Run) -> Row:
    def damage(newest: Path) -> str:
        shutil.rmtree(newest)
        return f"{newest.name} deleted"

    return damaged(run, "a deleted checkpoint", damage, (r"{newest}: is missing", NEXT_START))


def flip_in_data(run: Run) -> Row:
    path = Path(f"{run.data}.bin")
    offset = run.random.randrange(path.stat().st_size)
    row, since = begun(run, "a flipped byte in a data file", f"a flipped byte in {path.name}"), time.monotonic()
    flip_byte(path, offset)
    try:
        found(run, row, since, (rf"error: .*{path.name}: checksum mismatch", CHECKSUMS))
        ended(run, row, USER_ERROR, PEER_LOST)
    finally:
        flip_byte(path, offset)  # the same bit again
    return row


def wait_for_save(run: Run) -> None:
    """Until a save has begun."""
    run.wait(lambda: run.partial_directories(), "a save")


def signal_in_save(run: Run) -> Row:
    wait_for_save(run)
    row, since = begun(run, "SIGUSR1 in the middle of a save", "SIGUSR1 in the middle of a save"), time.monotonic()
    os.kill(run.current.process.pid, signal.SIGUSR1)
    found(run, row, since, (r"SIGUSR1 received", "the ranks"))
    ended(run, row, SIGNALLED)
    row.expected, row.bound = row.step, 0  # it saves after the current step: nothing may be lost
    return row


def full_disk(run: Run) -> Row:
    assert run.disk is not None
    filler, spare = run.disk / "filler", run.random.choice([0, 1 << 19])
    row = begun(run, "a full disk", f"a full disk ({spare >> 10} KiB left)")
    since = time.monotonic()
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            pass
        file.truncate(max(0, file.tell() - spare))
    try:
        return without_space(run, row, since)
    finally:
        filler.unlink()


def read_only_disk(run: Run) -> Row:
    """Mounted over itself, so that files that are open for writing do not stand in the way."""
    assert run.disk is not None
    row, since = begun(run, "a read-only disk", "a read-only disk"), time.monotonic()
    subprocess.run(["mount", "--bind", str(run.save), str(run.save)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(run.save)], check=True)
    try:
        return without_space(run, row, since)
    finally:
        subprocess.run(["umount", "-l", str(run.save)], check=True)


def without_space(run: Run, row: Row, since: float) -> Row:
    """What a run says of a checkpoint that it cannot write: it ends, or continues until it can again."""
    found(run, row, since, (r"error: .*could not be written", "the save"))
    if not run.keeps_on:
        ended(run, row, SAVE_FAILED)
        row.bound += SAVE_INTERVAL  # the checkpoint that could not be written
    return row


def slow_disk(run: Run) -> Row:
    seconds = run.random.uniform(0.5, 2.0)
    row, since = begun(run, "a slow disk", f"{seconds:.1f} s more for each fsync"), time.monotonic()
    run.set("fsync", seconds)
    try:
        wait_for_save(run)
        start = since
        while not row.problem and not took(row.named, seconds):
            found(run, row, start, (r"checkpoint .*: written in [\d.]+ s", "the save"))
            start = time.monotonic()
        row.found_after = start - since
    finally:
        run.set("fsync", 0)
    return row


def took(line: str, seconds: float) -> bool:
    """Whether the line tells of a checkpoint that took so long to write."""
    written = re.search(r"written in ([\d.]+) s", line)
    return written is not None and float(written[1]) >= seconds


def two_jobs(run: Run) -> Row:
    row, since = begun(run, "two jobs on one directory", "the same command a second time"), time.monotonic()
    second = Start(run.root / f"second_{len(list(run.root.glob('second_*')))}", run.flags(), run.control)
    try:
        code = second.process.wait(300)
        lines = [line.text for line in second.output.read() if "is writing there" in line.text]
        row.named, row.by, row.found_after = (lines or [""])[0], "the lock", time.monotonic() - since
        if code != USER_ERROR:
            row.problem = f"the second one ended with exit code {code}: {second.story()[-300:]}"
    except psutil.TimeoutExpired:
        row.problem = "the second one did not end"
    finally:
        second.kill()
    return row


def jump_clock(run: Run) -> Row:
    seconds = run.random.choice([-1, 1]) * run.random.choice([90, 3600, 86_400, 30 * 86_400])
    row, since = begun(run, "a clock that jumps", f"the clock jumps by {seconds:+,} s"), time.monotonic()
    run.clock += seconds
    run.set("clock", run.clock)
    found(run, row, since, (r"the clock (jumped|was set)", "the log"))
    run.wait_for_step(row.step + SAVE_INTERVAL + 1)  # with a save
    return row


def memory_limit(run: Run) -> Row:
    victim, pid = run.random.choice(sorted(run.current.ranks().items()))
    row, since = begun(run, "no memory for a rank", f"no memory for rank {victim}"), time.monotonic()
    process = psutil.Process(pid)
    size = process.memory_info().vms + (64 << 20)
    process.rlimit(psutil.RLIMIT_AS, (size, size))
    run.set("hunger", 1 + victim)
    try:
        found(
            run, row, since, (rf"rank {victim} .*failed with", OTHERS), (rf"error: rank {victim} \(.*no heart", OTHERS)
        )
        ended(run, row, 1, KILLED, 128 + signal.SIGABRT, 128 + signal.SIGSEGV, PEER_LOST)
    finally:
        run.set("hunger", 0)
    return row


def kill_writer(run: Run) -> Row:
    """What the kernel does when memory is short: the writing process is the youngest and largest."""
    row, since = begun(run, "SIGKILL of a writing process", "SIGKILL of a writing process (out of memory)"), 0.0
    before = set(run.partial_directories())  # of a save that may be over at any moment
    run.set("fsync", 1.0)  # so that a later one can be met
    try:
        ranks = {psutil.Process(pid) for pid in run.current.ranks().values()}

        def writers() -> list[tuple[psutil.Process, str]]:
            """The processes of a save that has begun meanwhile, and the name of its checkpoint."""
            if not (begun_since := sorted(set(run.partial_directories()) - before)):
                return []
            (name,) = re.findall(r"iter_\d+", begun_since[-1])
            return [(child, name) for rank in ranks for child in rank.children() if is_alive(child)]

        is_lost = False
        while not is_lost:  # on a busy machine a process may have written its part, or ended, when the signal arrives
            start = time.monotonic()
            writer, name = run.random.choice(run.wait(writers, "a writing process"))
            row.step, row.expected, since = run.reached(), max(run.intact(), default=0), time.monotonic()
            with contextlib.suppress(psutil.NoSuchProcess):
                writer.kill()
            before = set(run.partial_directories())
            lost, kept = (r"error: .*could not be written", "the save"), (rf"checkpoint .*{name}: written in", "")
            try:
                is_lost = run.find([lost, kept], start)[1] != ""
            except EndedError:
                break  # neither line: `without_space` says so in the row
        run.set("fsync", 0)
        return without_space(run, row, since)
    finally:
        run.set("fsync", 0)


KINDS: dict[str, Callable[[Run], Row]] = {
    "kill -9 of a rank": kill_rank,
    "kill -9 of all ranks": kill_all_ranks,
    "kill -9 of the launcher": kill_launcher,
    "kill -9 of everything": power_loss,
    "SIGSTOP of a rank": stop_rank,
    "a flipped byte in the newest checkpoint": flip_in_weights,
    "a flipped byte in the optimizer": flip_in_optimizer,
    "a flipped byte in a data file": flip_in_data,
    "a torn write": torn_write,
    "a deleted checkpoint": delete_checkpoint,
    "SIGUSR1 in the middle of a save": signal_in_save,
    "a full disk": full_disk,
    "a read-only disk": read_only_disk,
    "a slow disk": slow_disk,
    "two jobs on one directory": two_jobs,
    "a clock that jumps": jump_clock,
    "no memory for a rank": memory_limit,
    "SIGKILL of a writing process": kill_writer,
}
NEED_A_DISK = {"a full disk", "a read-only disk"}
