"""Figures of a class study: importance by class, neurons shared by classes, and accuracy of sub-networks."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_neurons.report.figures.drawing import MAGNITUDES, PALETTE, new_figure, save_figure
from lightning_neurons.results.class_report import ClassReport

_MOST_LAYERS = 24

_BARS = {
    "whole": "whole network",
    "subnetwork": "its sub-network",
    "other subnetworks": "other classes' sub-networks",
    "random subnetwork": "random sub-networks",
    "ablation": "without its neurons",
    "random ablation": "without random neurons",
}


def importance_by_class(report: ClassReport) -> Any:
    """Draw a heat map for each layer: classes down, neurons across, in order of the class that they matter most for.

    Returns:
        A matplotlib figure of at most ``_MOST_LAYERS`` layers.
    """
    layers = list(report.importance)
    count = min(len(layers), _MOST_LAYERS)
    shown = [layers[i * len(layers) // count] for i in range(count)]
    height = min(0.35 + 0.13 * len(report.classes), 1.8)
    figure = new_figure(10, 0.9 + len(shown) * height)
    for axes, layer in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        scores = report.importance[layer].nan_to_num()
        spread = scores.amax(0) - scores.amin(0)
        scores = ((scores - scores.amin(0)) / spread.clamp_min(1e-30))[:, spread > 0]
        order = torch.argsort(scores.argmax(0), stable=True)
        if len(order):
            axes.imshow(
                scores[:, order].numpy(), aspect="auto", cmap=MAGNITUDES, interpolation="nearest", vmin=0, vmax=1
            )
        without = f" ({int((spread <= 0).sum())} that make no difference left out)" if (spread <= 0).any() else ""
        axes.set_title(f"{layer}{without}", fontsize=8, loc="left", pad=2)
        _ticks(axes.set_yticks, report, most=5, fontsize=6)
        axes.set_xticks([])
    some = "" if shown == layers else f"; {len(shown)} of {len(layers)} layers"
    figure.suptitle(
        f"importance of each neuron from its lowest class (dark) to its highest (bright){some}", fontsize=10
    )
    figure.supylabel("class", fontsize=8)
    figure.supxlabel("neurons, in order of the class that they matter most for", fontsize=8)
    return figure


def reuse_matrix(report: ClassReport) -> Any:
    """Draw the overlap of every two classes' neurons beyond chance (Jaccard index minus its chance level).

    Returns:
        A matplotlib figure with one cell for each pair of classes; the diagonal is blank.
    """
    figure = new_figure(6, 5)
    axes = figure.subplots()
    excess = (report.jaccard - report.jaccard_chance).fill_diagonal_(math.nan)
    limit = max(float(excess.abs().nan_to_num().max()), 1e-3)
    heat_map = axes.imshow(excess.numpy(), cmap="PuOr_r", vmin=-limit, vmax=limit)
    _ticks(axes.set_xticks, report, most=20)
    _ticks(axes.set_yticks, report, most=20)
    axes.set_xlabel("class")
    axes.set_ylabel("class")
    axes.set_title("neurons shared by two classes: Jaccard index minus chance", fontsize=10)
    figure.colorbar(heat_map, ax=axes)
    return figure


def selectivity_histogram(report: ClassReport) -> Any:
    """Draw a histogram of the class selectivity index of living neurons; it describes, and is not importance.

    Returns:
        A matplotlib figure of all layers together.
    """
    figure = new_figure(6, 4)
    axes = figure.subplots()
    selectivity = torch.cat(list(report.selectivity.values()))
    axes.hist(selectivity[selectivity.isfinite()].numpy(), bins=30, range=(0, 1), color=PALETTE[0])
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("class selectivity index (0: all classes alike, 1: one class alone)")
    axes.set_ylabel("neurons")
    axes.set_title("selectivity describes; it is not importance", fontsize=10)
    return figure


def accuracy_bars(report: ClassReport) -> Any:
    """Draw accuracy on each class's own samples (above) and on the others (below), of every kind of model.

    Returns:
        A matplotlib figure with one group of bars for each class.
    """
    kinds = [kind for kind in _BARS if any(row.model == kind for row in report.accuracies)]
    figure = new_figure(min(max(8, 0.9 * len(report.classes)), 16), 6.5)
    upper, lower = figure.subplots(2, 1, sharex=True)
    width = 0.85 / len(kinds)
    for place, kind in enumerate(kinds):
        rows = [report.accuracy(kind, klass) for klass in report.classes]
        at = [i + (place - (len(kinds) - 1) / 2) * width for i in range(len(rows))]
        errors = None if math.isnan(rows[0].deviation) else [row.deviation for row in rows]
        bars = {"label": _BARS[kind], "color": PALETTE[place]}
        upper.bar(at, [row.on_class for row in rows], width, yerr=errors, error_kw={"linewidth": 0.8}, **bars)
        lower.bar(at, [row.on_others for row in rows], width, color=PALETTE[place])
    upper.set_ylabel("on the class's own")
    lower.set_ylabel("on the others")
    lower.set_xlabel("class")
    _ticks(lower.set_xticks, report, most=20)
    for axes in (upper, lower):
        axes.set_ylim(0, 1)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle("accuracy (of random and other sub-networks: means and standard deviations)", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def sharing_graph(report: ClassReport) -> Any:
    """Draw classes on a circle: the larger, the more neurons of its own; lines where two share more than by chance.

    Returns:
        A matplotlib figure with at most three times as many lines as classes, those of the strongest sharing.
    """
    figure = new_figure(6, 6)
    axes = figure.subplots()
    count = len(report.classes)
    places = [(math.cos(a), math.sin(a)) for a in (math.tau * i / count + math.pi / 2 for i in range(count))]
    excess = (report.jaccard - report.jaccard_chance).nan_to_num().clamp_min(0).fill_diagonal_(0).tril()
    largest = max(float(excess.max()), 1e-9)
    strongest = excess.flatten().sort(descending=True).indices[: 3 * count].tolist()
    for i, j in (divmod(place, count) for place in strongest):
        strength = float(excess[i, j]) / largest
        if strength > 0:
            (x, u), (y, v) = zip(places[i], places[j], strict=True)
            axes.plot([x, u], [y, v], color=PALETTE[0], linewidth=6 * strength, alpha=0.15 + 0.6 * strength, zorder=1)
    own = sum((m & (m.sum(0) == 1)).sum(1) for m in report.members.values())
    assert isinstance(own, torch.Tensor), "there are layers"
    smaller, most = min(1.0, 12 / count), max(int(own.max()), 1)
    for (x, y), klass, alone in zip(places, report.classes, own.tolist(), strict=True):
        size = smaller**2 * (500 + 1300 * alone / most)
        axes.scatter([x], [y], s=size, color=PALETTE[1], zorder=2, edgecolor="k", linewidth=smaller)
        label = f"{klass}\n({alone})" if count <= 20 else str(klass)
        axes.annotate(label, (x, y), ha="center", va="center", fontsize=max(9 * smaller, 4), zorder=3)
    axes.set_title("classes (neurons that each has alone); lines: the strongest sharing beyond chance", fontsize=10)
    axes.set_xlim(-1.35, 1.35)
    axes.set_ylim(-1.35, 1.35)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure


def _ticks(put: Callable[..., Any], report: ClassReport, *, most: int, **style: Any) -> None:
    """Label an axis with classes, at most ``most`` of them."""
    step = -(-len(report.classes) // most)
    put(range(0, len(report.classes), step), report.classes[::step], **style)


CLASS_FIGURES: dict[str, Callable[[ClassReport], Any]] = {
    "importance": importance_by_class,
    "reuse_matrix": reuse_matrix,
    "selectivity": selectivity_histogram,
    "accuracy": accuracy_bars,
    "sharing": sharing_graph,
}
"""Every figure of a class study, by name."""


def save_class_figures(report: ClassReport, directory: str | Path) -> list[Path]:
    """Write every figure as PNG.

    Args:
        report: A class study.
        directory: Where; it is made if it is not there.

    Returns:
        The files.

    Raises:
        MissingPackageError: If matplotlib is not installed.
    """
    return [save_figure(draw(report), Path(directory) / f"{name}.png") for name, draw in CLASS_FIGURES.items()]
