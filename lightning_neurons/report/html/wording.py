"""Numbers as words of the page."""

import math

import numpy as np

from lightning_neurons.report.figures.data import silent_shares
from lightning_neurons.report.numbers import THRESHOLDS
from lightning_neurons.results.neuron_report import NeuronReport


def percent(share: float) -> str:
    """A share for people; ``"-"`` for NaN.

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
    """Three digits; ``"-"`` for NaN.

    Example:
        >>> real(0.012345), real(math.nan), real(1234.5)
        ('0.0123', '-', '1.23e+03')
    """
    return "-" if math.isnan(value) else f"{value:.3g}"


def whole(count: int | None) -> str:
    """A count with separated thousands; ``"-"`` for None.

    Example:
        >>> whole(12345), whole(None)
        ('12,345', '-')
    """
    return "-" if count is None else f"{count:,}"


def many(count: int, one: str, several: str = "") -> str:
    """A count and its noun.

    Example:
        >>> many(1, "layer"), many(2, "layer"), many(2, "class", "classes")
        ('1 layer', '2 layers', '2 classes')
    """
    return f"{whole(count)} {one if count == 1 else several or one + 's'}"


def dead_by_threshold(report: NeuronReport, layer: str | None = None) -> str:
    """How many neurons of a layer, or of all, are dead at several thresholds, in the units of the report's own."""
    silent = silent_shares(report, layer, np.array(THRESHOLDS))
    words = ", ".join(f"{int((found == 1).sum())} at {t:g}" for t, found in zip(THRESHOLDS, silent, strict=True))
    relative = report.settings.get("relative_threshold", True)
    unit = "root mean squares of the layer" if relative else "units of activations"
    return f"in {unit}: {words}, of {silent.shape[1]}"
