"""Where processes are killed: the places are still there, whatever was moved since."""

from __future__ import annotations

import importlib

import pytest

from tests.faults.fork_server import POINTS


@pytest.mark.parametrize("point", POINTS)
def test_points_exist(point: str) -> None:
    module, owner, function = POINTS[point]
    place = importlib.import_module(module)
    assert callable(getattr(getattr(place, owner) if owner else place, function))
