"""Tests that need a GPU; elsewhere each skips itself and says why. `make gpu` runs them and keeps what they measured.

A2D_REHEARSE=1 runs them on a CPU, where Transformer Engine's layers compute over a stand-in of its kernels
(tests/transformer_engine): all but the card, its kernels, graphs and NCCL.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_a2d.utils.atomic_write import write_json
from tests.gpu.gpu_train import REHEARSAL, Model, write_models
from tests.transformer_engine.pretend_gpu import DIRECTORY, install, rehearse

if REHEARSAL and DIRECTORY:
    install()  # before anything imports megatron.core

REPORT: list[Path] = []  # the file of --gpu-report, if there is one
OUTCOMES: dict[str, str] = {}
FIGURES: dict[str, dict[str, Any]] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None
    if not torch.cuda.is_available() and not REHEARSAL:
        reason = "this machine has no CUDA device (A2D_REHEARSE=1 runs the tests over a stand-in of the kernels)"
    elif REHEARSAL and not DIRECTORY:
        reason = "A2D_TRANSFORMER_ENGINE names no directory with Transformer Engine; `make test` sets it"
    elif not REHEARSAL and find_spec("transformer_engine") is None:
        reason = "the package transformer_engine is not installed"
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    """Converted checkpoints and data, in sizes that every kernel takes."""
    warnings.filterwarnings("ignore")
    if REHEARSAL:
        rehearse()
    from megatron_a2d.config.settings import build
    from megatron_a2d.distributed import environment, process_groups

    config = build({})
    environment.apply(config)
    written = write_models(tmp_path_factory.mktemp("gpu"))  # before megatron.core is made to fit a machine without CUDA
    process_groups.initialize(config.parallel)
    yield written
    process_groups.finalize()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """Keep a figure of this test for the result file."""
    return FIGURES.setdefault(request.node.name, {}).__setitem__


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--gpu-report", None):
        REPORT.append(path)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Written after every test: should one of them hang, the others are known."""
    if "tests/gpu/" in report.nodeid and (report.when == "call" or report.outcome != "passed"):
        OUTCOMES[report.nodeid.partition("::")[2]] = report.outcome
        for path in REPORT:
            write_json(path, {"outcomes": OUTCOMES, "figures": FIGURES})
