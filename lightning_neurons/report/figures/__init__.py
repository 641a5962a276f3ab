"""Figures of measurements, training runs, class studies and images, as functions from data to matplotlib axes."""

from lightning_neurons.report.figures.classes import (
    accuracy_bars,
    importance_by_class,
    reuse_matrix,
    save_class_figures,
    selectivity_histogram,
    sharing_graph,
)
from lightning_neurons.report.figures.history import dead_history, magnitude_history, pruning_progress
from lightning_neurons.report.figures.images import (
    activation_overlay,
    attribution,
    filters_before_after,
    maximized_images,
    picture,
    saliency_rows,
)
from lightning_neurons.report.figures.measurements import (
    activation_histogram,
    agreement_scatter,
    deadness_curve,
    deadness_grid,
    importance_bars,
    sensitivity_by_layer,
)

__all__ = [
    "accuracy_bars",
    "activation_histogram",
    "activation_overlay",
    "agreement_scatter",
    "attribution",
    "dead_history",
    "deadness_curve",
    "deadness_grid",
    "filters_before_after",
    "importance_bars",
    "importance_by_class",
    "magnitude_history",
    "maximized_images",
    "picture",
    "pruning_progress",
    "reuse_matrix",
    "saliency_rows",
    "save_class_figures",
    "selectivity_histogram",
    "sensitivity_by_layer",
    "sharing_graph",
]
