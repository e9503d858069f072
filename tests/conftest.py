"""Fixtures that all tests share, and what is written when a suite has passed."""
# ruff: noqa: E402

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # until all is imported, of which nothing is garbage: a fifth of the time that takes

from tests.cases import VARIANTS, WIDE, Case
from tests.exactness import Exactness, Fault
from tests.parity.pool import Pool
from tests.tiny import write_hf, write_tokens

EXACTNESS = Exactness()


@pytest.fixture(scope="session")
def exactness() -> Exactness:
    """Collects the figures of tests/parity/RESULTS.md."""
    return EXACTNESS


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four processes that serve every layout (tests/parity/pool.py)."""
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """dense, dense_tied, moe and qwen2; and moe with isolated documents, and with the autoregressive objective."""
    from checkpoints_tools import convert_hf

    root = tmp_path_factory.mktemp("cases")
    write_tokens(root / "train", 60, 250, seed=0)
    write_tokens(root / "valid", 20, 250, seed=1)
    settings = {"train_data_path": str(root / "train"), "valid_data_path": str(root / "valid")}
    cases = {}
    for kind in ("dense", "dense_tied", "moe", "qwen2"):
        write_hf(root / kind, kind)
        convert_hf.main(["--hf-model", str(root / kind), "--out", str(root / f"{kind}_checkpoint")])
        cases[kind] = Case(root / kind, str(root / f"{kind}_checkpoint"), settings)
    cases["isolated"] = cases["moe"]._replace(settings={**settings, "reset_attention_mask": True})
    cases["ar"] = cases["moe"]._replace(settings={**settings, "objective": "ar"})
    for name, options in VARIANTS.items():
        cases[name] = cases["moe"]._replace(settings={**settings, **options})
    return cases


@pytest.fixture(scope="session")
def wide(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Options of the job `train_steps` for a dense and an MoE model whose sizes are whole blocks of every FP8 recipe."""
    from checkpoints_tools import convert_hf

    root, found = tmp_path_factory.mktemp("wide"), {}
    for kind, sizes in (("dense", {"intermediate_size": 256}), ("moe", {"moe_intermediate_size": 128})):
        write_hf(root / kind, kind, **WIDE, **sizes)
        convert_hf.main(["--hf-model", str(root / kind), "--out", str(root / f"{kind}_checkpoint")])
        settings = {**cases[kind].settings, "seq_length": 256, "global_batch_size": 2, "transformer_impl": "local"}
        found[kind] = {"checkpoint": str(root / f"{kind}_checkpoint"), "settings": settings}
    return found


@pytest.fixture(scope="session")
def trained(cases: dict[str, Case], pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run on two ranks that has saved iterations 1, 2, 3 and 4, and its results."""
    root = tmp_path_factory.mktemp("faults")
    case = cases["moe"]
    settings = {
        **case.settings, "expert_model_parallel_size": 2, "use_distributed_optimizer": True, "load": case.checkpoint, "train_iters": 4, "save_interval": 1, "log_interval": 1,
        "eval_interval": 4, "save": str(root / "run"),
    }  # fmt: skip
    return {"settings": settings, "results": pool.run("run", 2, settings=settings)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exactness", type=Path, default=None, help="write the measured tables into this file")
    parser.addoption(
        "--engine-results", type=Path, default=None, help="write tests/transformer_engine's tables into this file"
    )
    parser.addoption("--gpu-report", type=Path, default=None, help="write outcomes and figures of tests/gpu as JSON")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With pytest-xdist: file by file, and a directory's files that use a pool of ranks in one process, which has it."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # the package may be missing
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return str(Path(file).parent) if uses_pool(config.rootpath / file) else file

    return Scheduling(config, log)


@functools.cache
def uses_pool(file: Path) -> bool:
    return "pool: " in file.read_text(encoding="utf-8")


def pytest_collection_finish() -> None:
    """Collections of garbage, which megatron asks for twice a save, pass over what the imports have made."""
    gc.freeze()
    gc.enable()


def pytest_deselected(items: list[pytest.Item]) -> None:
    EXACTNESS.is_partial = True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        EXACTNESS.is_partial = True


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = [tuple(fault) for fault in EXACTNESS.faults]
    path: Path | None = session.config.getoption("--exactness")
    if path is not None and exitstatus == 0 and not EXACTNESS.is_partial:
        EXACTNESS.write(path)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of pytest-xdist has ended; its faults belong into the summary."""
    EXACTNESS.faults += [Fault(*fault) for fault in getattr(node, "workeroutput", {}).get("faults", ())]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if EXACTNESS.faults:
        terminalreporter.section("faults tried, and what was lost")
        terminalreporter.write_line(EXACTNESS.faults_table())
