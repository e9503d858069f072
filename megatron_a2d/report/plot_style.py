"""Figures for reports and studies: matplotlib without a display, written atomically."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_a2d.utils.atomic_write import new_file
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import one_line


@contextmanager
def figure(
    path: Path, columns: int, rows: int = 1, size: tuple[float, float] = (5.0, 3.8), title: str = ""
) -> Iterator[list[Any]]:
    """Yield rows x columns axes of `size` inches each; the figure is saved as the PNG `path`."""
    pyplot = import_pyplot()
    drawn, axes = pyplot.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), constrained_layout=True, squeeze=False
    )
    try:
        yield list(axes.flat)
        for axis in drawn.axes:
            axis.grid(alpha=0.3)
        if title:
            drawn.suptitle(title)
        with new_file(path) as partial:
            drawn.savefig(partial, dpi=110, format="png")
    finally:
        pyplot.close(drawn)


def plain_label(text: str) -> str:
    """A name as a plot label: matplotlib would parse text between two $ as a formula."""
    return one_line(text).replace("$", r"\$")


def import_pyplot() -> Any:
    """matplotlib without a display; UserError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib: is not installed; in the clone, pip install --editable '.[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
