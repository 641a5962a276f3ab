"""Formatting of numbers for the page."""

import math

import numpy as np

from lightning_neurons.report.figures.data import silent_shares
from lightning_neurons.report.numbers import THRESHOLDS
from lightning_neurons.results.neuron_report import NeuronReport


def percent(share: float) -> str:
    """Format a share in per cent.

    Returns:
        The number, with one decimal below 10 %, and the sign; ``"-"`` for NaN.

    Example:
        >>> percent(0.131), percent(0.004), percent(0.00001), percent(math.nan)
        ('13 %', '0.4 %', '< 0.1 %', '-')
    """
    if math.isnan(share):
        return "-"
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{share:.1%}".replace("%", " %") if 0 < share < 0.0995 else f"{share:.0%}".replace("%", " %")


def real(value: float) -> str:
    """Format a number with three digits.

    Returns:
        The number; ``"-"`` for NaN.

    Example:
        >>> real(0.012345), real(math.nan), real(1234.5)
        ('0.0123', '-', '1.23e+03')
    """
    return "-" if math.isnan(value) else f"{value:.3g}"


def whole(count: int | None) -> str:
    """Format a count with separated thousands.

    Returns:
        The count; ``"-"`` for None.

    Example:
        >>> whole(12345), whole(None)
        ('12,345', '-')
    """
    return "-" if count is None else f"{count:,}"


def many(count: int, singular: str, several: str = "") -> str:
    """Format a count and its noun, in the plural where needed.

    Returns:
        Count and noun; the plural is ``several``, or the singular with an "s".

    Example:
        >>> many(1, "layer"), many(2, "layer"), many(2, "class", "classes")
        ('1 layer', '2 layers', '2 classes')
    """
    return f"{whole(count)} {singular if count == 1 else several or singular + 's'}"


def dead_by_threshold(report: NeuronReport, layer: str | None = None) -> str:
    """List the numbers of dead neurons of a layer, or of all, at several thresholds.

    Returns:
        A phrase with the thresholds in the report's unit and the number of neurons.
    """
    silent = silent_shares(report, layer, np.array(THRESHOLDS))
    words = ", ".join(f"{int((shares == 1).sum())} at {t:g}" for t, shares in zip(THRESHOLDS, silent, strict=True))
    relative = report.settings.get("relative_threshold", True)
    unit = "root mean squares of the layer" if relative else "units of activations"
    return f"in {unit}: {words}, of {silent.shape[1]}"
