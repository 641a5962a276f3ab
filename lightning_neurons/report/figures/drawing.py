"""Figures without a display and without global state; matplotlib is optional.

Colours can be told apart by the colour-blind: ``cividis`` for magnitudes, and the palette of Okabe and Ito 2008.
"""

import importlib.util
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from lightning_neurons.errors import MissingPackageError
from lightning_neurons.results.whole_file import write_whole

Where = TypeVar("Where", bound=Path | str)

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
"""Blue, orange, green, vermilion, purple, sky blue, yellow, black."""

MAGNITUDES = "cividis"
"""The colour map of values that are not negative."""

SIGNED = "PuOr_r"
"""The colour map of values of both signs, with zero in its middle: purple below, orange above."""

_TITLE_SIZE = 10

MISSING_MATPLOTLIB = "figures need matplotlib, which is not installed: pip install 'lightning_neurons[figures]'"


def can_draw() -> bool:
    """Return True if matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Any:
    """Make an empty figure; sizes are in inches.

    Returns:
        A matplotlib figure without axes, which no window shows and nobody must close.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    if not can_draw():
        raise MissingPackageError(MISSING_MATPLOTLIB)
    from matplotlib.figure import Figure  # optional, and slow to import

    return Figure(figsize=(width, height), layout="constrained")


def given_or_new(axes: Any, width: float, height: float) -> Any:
    """Return the axes given, or those of a new figure of this size in inches.

    Raises:
        MissingPackageError: If there are none and matplotlib is not installed.
    """
    return new_figure(width, height).subplots() if axes is None else axes


def shortened(text: str, most: int) -> str:
    r"""Shorten a text, such as a layer's name, to ``most`` characters, and escape it for matplotlib.

    Names of layers tell more at their end, so the beginning goes.

    Returns:
        The text, with an ellipsis in place of its beginning if it was longer.

    Example:
        >>> shortened("backbone.layer3.0.conv1", 16), shortened("$x", 16)
        ('….layer3.0.conv1', '\\$x')
    """
    return (text if len(text) <= most else f"…{text[len(text) - most + 1 :]}").replace("$", r"\$")


def put_title(axes: Any, name: str, rest: str) -> None:
    """Write ``name`` and a remark above the axes; the name is shortened to fit."""
    characters = int(axes.bbox.width / axes.figure.dpi * 72 / (0.55 * _TITLE_SIZE))
    axes.set_title(f"{shortened(name, max(characters - len(rest), 8))}{rest}", fontsize=_TITLE_SIZE)


def log_where_positive(axes: Any, which: Literal["x", "y"], values: Tensor) -> tuple[Tensor, str]:
    """Make an axis logarithmic where no value is negative.

    Returns:
        The values with zeros at the lower end, and what its label should say of that.
    """
    positive = values[values > 0]
    if (values < 0).any() or not len(positive):
        return values, ""
    axes.set(**{f"{which}scale": "log"})
    if positive.max() < 100 * positive.min():
        # Else matplotlib writes all of 2, 3, 4, ... times a power of ten, one over the other.
        axis = getattr(axes, f"{which}axis")
        axis.get_major_locator().set_params(subs=(1, 2, 5))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    zeros = values == 0
    return values.where(~zeros, positive.min() / 3), " (zeros at the lower end)" if zeros.any() else ""


def say_instead(axes: Any, text: str) -> Any:
    """Write the reason why there is nothing to draw into the middle of the axes.

    Returns:
        The same axes, without ticks.
    """
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, fontsize=_TITLE_SIZE)
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


@contextmanager
def any_letters() -> Iterator[None]:
    """Suppress matplotlib's warnings of letters in names of layers that the font lacks: it draws boxes for them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def save_figure(figure: Any, path: Where) -> Where:
    """Write a figure as PNG, at 120 dots per inch.

    Returns:
        The path that was written.
    """
    packed = io.BytesIO()
    with any_letters():
        figure.savefig(packed, dpi=120, format="png")
    write_whole(path, packed.getvalue())
    return path
