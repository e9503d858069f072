"""Resharding: model and optimizer, saved under any layout, resume under any other.

Saved after two steps, continued for three. What is saved is compared too, tensor by tensor, with what one process
saves: since every layout writes the same checkpoint and every layout goes on from another's, the pairs that
were not run follow.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.cases import Case
from tests.exactness import Exactness, Resharded
from tests.parity.layouts import CP, DISTRIBUTED, EP, ETP, LAYOUTS, PP, TP_SP, VPP, Layout, each
from tests.parity.pool import Pool

TOLERANCE = 1e-6
EP4 = {"expert_model_parallel_size": 4}

# What differs most: experts whole, divided, and in slices; layers divided; the optimizer divided or not.
EXTREMES = [
    Layout("moe", "one process", 1, {}),
    Layout("moe", "EP4, distributed optimizer", 4, {**EP4, **DISTRIBUTED}),
    Layout("moe", "TP2+SP, EP1", 2, TP_SP),
    Layout("moe", "VPP2 x DP2, EP2, distributed optimizer", 4, {**VPP, **EP, **DISTRIBUTED}),
    Layout("moe", "DP2, ETP2", 2, ETP),
    Layout("moe", "CP2 x PP2, EP2", 4, {**CP, **PP, **EP}),
]
# Those that micro-batches alone tell apart are one layout to a checkpoint.
MATRIX = [layout for layout in LAYOUTS if layout.name != "micro-batches of 4"]
QUICK = {"dense_tied: PP2 x DP2, distributed optimizer", "moe: EP4, distributed optimizer"}


def settings_of(case: Case, layout: Layout, save: Path) -> dict[str, Any]:
    return {
        **case.settings, **layout.settings, "load": case.checkpoint, "save": str(save), "train_iters": 5,
        "save_interval": 2, "log_interval": 1, "lr_warmup_iters": 3,
    }  # fmt: skip


@pytest.fixture(scope="session")
def unbroken(cases: dict[str, Case], pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of five steps on one process, by case; made when a test asks for them."""
    root = tmp_path_factory.mktemp("unbroken")

    class Losses(dict[str, list[float]]):
        def __missing__(self, kind: str) -> list[float]:
            layout = Layout(kind, "one process", 1, {})
            self[kind] = pool.run("run", 1, settings=settings_of(cases[kind], layout, root / kind))[0]["losses"]
            return self[kind]

    return Losses()


@pytest.fixture(scope="session")
def saved(cases: dict[str, Case], pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """saved(layout): a run of that layout that has ended after two steps."""
    root, made = tmp_path_factory.mktemp("saved"), {}

    def get(layout: Layout) -> Path:
        if str(layout) not in made:
            save = root / str(len(made))
            settings = settings_of(cases[layout.case], layout, save)
            pool.run("run", layout.ranks, settings=settings, stop_at=2)
            made[str(layout)] = save
        return made[str(layout)]

    return get


def go_on(pool: Pool, case: Case, save: Path, layout: Layout, losses: list[float], tmp_path: Path) -> float:
    """Continue a copy of `save` under `layout`; the largest relative difference of the next three losses."""
    shutil.copytree(save, tmp_path / "run")
    ranks = pool.run("run", layout.ranks, settings=settings_of(case, layout, tmp_path / "run"))
    assert all(rank["start"] == 2 and len(rank["losses"]) == 3 for rank in ranks)
    return max(
        abs(ours - theirs) / theirs for rank in ranks for ours, theirs in zip(rank["losses"], losses[2:], strict=True)
    )


def content(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, model and optimizer, whole."""
    reader = dcp.FileSystemReader(str(directory))
    tensors = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in reader.read_metadata().state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def previous(layout: Layout) -> Layout:
    """The layout before this one, of the same model; each is saved once and loaded once."""
    same = [other for other in MATRIX if other.case == layout.case]
    return same[same.index(layout) - 1]


@each(MATRIX, quick=lambda layout: str(layout) in QUICK)
def test_each_layout_goes_on_from_another(
    layout: Layout, cases: dict[str, Case], saved: Any, unbroken: dict[str, list[float]], pool: Pool, tmp_path: Path,
    exactness: Exactness,
) -> None:  # fmt: skip
    other = previous(layout)
    difference = go_on(pool, cases[layout.case], saved(other), layout, unbroken[layout.case], tmp_path)
    exactness.resharded.append(Resharded(layout.case, other.name, layout.name, difference))
    assert difference < TOLERANCE


@pytest.mark.full
@pytest.mark.parametrize("target", EXTREMES, ids=lambda layout: f"to {layout.name}")
@pytest.mark.parametrize("source", EXTREMES, ids=lambda layout: f"from {layout.name}")
def test_every_pair_of_extremes(
    source: Layout, target: Layout, cases: dict[str, Case], saved: Any, unbroken: dict[str, list[float]], pool: Pool,
    tmp_path: Path, exactness: Exactness,
) -> None:  # fmt: skip
    difference = go_on(pool, cases["moe"], saved(source), target, unbroken["moe"], tmp_path)
    exactness.resharded.append(Resharded("moe", source.name, target.name, difference))
    assert difference < TOLERANCE


@each(MATRIX, quick=lambda layout: str(layout) in QUICK)
def test_every_layout_saves_the_same(layout: Layout, saved: Any, exactness: Exactness) -> None:
    alone = content(saved(Layout(layout.case, "one process", 1, {})) / "iter_0000002")
    ours = content(saved(layout) / "iter_0000002")
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in alone.items()
    }
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in ours)
    difference = max(float((tensor - alone[name]).abs().max()) for name, tensor in ours.items())
    exactness.saved[str(layout)] = difference
    assert difference < TOLERANCE


def test_moments_matter(cases: dict[str, Case], saved: Any, pool: Pool, tmp_path: Path, unbroken: Any) -> None:
    """Control: weights alone, with the optimizer's state at zero, do not give these losses."""
    layout = Layout("moe", "one process", 1, {})
    settings = settings_of(cases["moe"], layout, tmp_path / "run") | {"load": str(saved(layout)), "finetune": True}
    losses = pool.run("run", 1, settings=settings)[0]["losses"]
    assert abs(losses[1] - unbroken["moe"][3]) / losses[1] > 100 * TOLERANCE
