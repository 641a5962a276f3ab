"""Figures without a display and without global state; matplotlib is optional.

Colours can be told apart by the colour-blind: ``cividis`` for magnitudes, and the palette of Okabe and Ito 2008.
"""

import importlib.util
from pathlib import Path
from typing import Any

from lightning_neurons.errors import MissingPackageError

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
"""Blue, orange, green, vermilion, purple, sky blue, yellow, black."""

MAGNITUDES = "cividis"
"""The colour map of values that are not negative."""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    if not can_draw():
        raise MissingPackageError(
            "figures need matplotlib, which is not installed: pip install 'lightning_neurons[figures]'"
        )
    from matplotlib.figure import Figure  # optional, and slow to import

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG; returns where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
