"""Deprecated module: the figures of a class study are in ``report.figures`` now."""

import warnings

from lightning_neurons.report.figures.classes import (
    accuracy_bars,
    importance_by_class,
    reuse_matrix,
    save_class_figures,
    selectivity_histogram,
    sharing_graph,
)

__all__ = [
    "accuracy_bars",
    "importance_by_class",
    "reuse_matrix",
    "save_class_figures",
    "selectivity_histogram",
    "sharing_graph",
]

warnings.warn(
    "lightning_neurons.report.class_figures is lightning_neurons.report.figures now; the old name goes with the next "
    "release",
    DeprecationWarning,
    stacklevel=2,
)
