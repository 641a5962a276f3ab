"""Figures of one measurement: magnitudes of activations, deadness, importance, and criteria against ablation.

Every function draws on the axes that it is given, or on those of a new figure, and returns them.
"""

import math
from typing import Any

import numpy as np
import torch

from lightning_neurons.criteria import agreement
from lightning_neurons.errors import check_count
from lightning_neurons.report.figures import data as figure_data
from lightning_neurons.report.figures import drawing
from lightning_neurons.report.figures.drawing import (
    MAGNITUDES,
    PALETTE,
    given_or_new,
    put_title,
    say_instead,
    shortened,
)
from lightning_neurons.results.ablation_report import AblationReport
from lightning_neurons.results.neuron_report import NeuronReport
from lightning_neurons.results.rankings import RankedNeuron

SELDOM = 0.99
"""The share of silent values from which on a neuron is drawn as one that seldom fires."""

_CURVE_THRESHOLDS = 25


def activation_histogram(report: NeuronReport, layer: str, axes: Any = None) -> Any:
    """Draw the histogram of a layer's activation magnitudes, with zeros apart, and the threshold of silence.

    A bar of zeros that would dwarf the others is cut off; its label says how high it is.

    Returns:
        The matplotlib axes: those given, or those of a new figure.

    Raises:
        UnknownNameError: If the layer was not measured.
    """
    axes = given_or_new(axes, 6, 3.6)
    counts = figure_data.layer_counts(report, layer)
    put_title(axes, layer, f": {_neurons(len(counts.samples))}{_dead(report, layer)}")
    axes.set_xlabel("log10 of |activation|")
    axes.set_ylabel("share of values [%]")
    if not counts.histogram.any():
        return say_instead(axes, "magnitudes were not counted")
    zeros, left, shares = figure_data.magnitude_shares(counts)
    shares, zeros = 100 * shares, 100 * zeros
    axes.bar(left, shares, figure_data.BAR, align="edge", color=PALETTE[0])
    limit = figure_data.silence_threshold(report, counts)
    lowest = min([*left, *([math.log10(limit)] if limit > 0 else [])], default=0.0)
    width = max(0.06 * (max([*left, lowest]) - lowest), 2 * figure_data.BAR)
    middle, top = lowest - 1.5 * width, 1.3 * max(shares, default=zeros)
    axes.bar([middle], [zeros], width, color=PALETTE[3])
    axes.set_ylim(0, top)
    height = min(max(zeros, 0.04 * top), 0.93 * top)
    style = {"color": PALETTE[3], "fontsize": 8, "va": "center", "bbox": {"color": "w", "pad": 1}}
    axes.text(middle + 0.7 * width, height, f"{zeros:.3g} % zero", **style)
    if zeros > top:
        axes.plot([middle - width, middle + width], [0.84 * top, 0.88 * top], color="w", linewidth=3)
    ticks = range(math.ceil(lowest), math.floor(max([*left, lowest]) + figure_data.BAR) + 1)
    axes.set_xticks([middle, *ticks], ["zero", *map(str, ticks)])
    if limit > 0:
        axes.axvline(math.log10(limit), color="k", linestyle="--", linewidth=1, label=f"silent below {limit:.2g}")
        axes.legend(fontsize=8, loc="upper right")
    return axes


def deadness_curve(report: NeuronReport, layer: str | None = None, axes: Any = None) -> Any:
    """Draw the share of neurons that would be dead, or silent in 99 % of values, at other thresholds.

    Args:
        report: A measurement with ``near_zero``.
        layer: None takes all layers together, each with the threshold in its own units.
        axes: Where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        UnknownNameError: If the layer was not measured.
    """
    axes = given_or_new(axes, 6, 3.6)
    thresholds = np.logspace(-4, 0, _CURVE_THRESHOLDS)
    silent = figure_data.silent_shares(report, layer, thresholds)
    put_title(axes, f"all {len(report.counts)} layers" if layer is None else layer, f": {_neurons(silent.shape[1])}")
    relative = report.settings.get("relative_threshold", True)
    axes.set_xlabel("threshold [root mean square of the layer]" if relative else "threshold [activation units]")
    axes.set_ylabel("share of neurons [%]")
    if not silent.shape[1]:
        return say_instead(axes, "magnitudes were not counted")
    seldom, never = ((100 * (silent >= share).double().mean(1)).numpy() for share in (SELDOM, 1))
    axes.plot(
        thresholds, seldom, color=PALETTE[5], linewidth=3, label=f"silent in {100 * SELDOM:g} % of values or more"
    )
    axes.plot(thresholds, never, color=PALETTE[3], linewidth=1, marker="o", markersize=3, label="never fire")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()  # a third of the time of drawing
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.3)
    if (threshold := report.settings.get("threshold", 0)) > 0:
        axes.axvline(threshold, color="k", linestyle="--", linewidth=1, label=f"used here: {threshold:g}")
    axes.legend(fontsize=8)
    return axes


def deadness_grid(report: NeuronReport, layer: str, axes: Any = None) -> Any:
    """Draw one cell per neuron, row by row: the brighter the deader; crosses are dead, blank cells unknown.

    Returns:
        The matplotlib axes: those given, or those of a new figure.

    Raises:
        UnknownNameError: If deadness of the layer was not measured.
    """
    axes = given_or_new(axes, 4.6, 4.2)
    dead = report.dead(layer)
    side = math.sqrt(len(dead))
    columns = max(math.ceil(side) if side < 10 else 10 * round(side / 10), 1)  # tens are easy to count
    rows = max(-(-len(dead) // columns), 1)
    cells = torch.full((rows * columns,), torch.nan, dtype=torch.float64)
    cells[: len(dead)] = report.deadness[layer]
    grid = axes.imshow(cells.view(rows, columns).numpy(), cmap=MAGNITUDES, vmin=0, vmax=1, interpolation="nearest")
    where = dead.nonzero().flatten()
    if len(where):
        size = (120 / max(rows, columns)) ** 2 / 4
        axes.scatter(
            where % columns, where // columns, size, "k", marker="x", linewidth=min(0.15 * math.sqrt(size), 1.5)
        )
    down, across = -(-rows // 10), max(columns // 10, 1)
    axes.set_yticks(range(0, rows, down), [str(columns * i) for i in range(0, rows, down)], fontsize=8)
    axes.set_xticks(range(0, columns, across), [f"+{i}" for i in range(0, columns, across)], fontsize=8)
    axes.set_xlabel("neuron: the number on the left plus the one below", fontsize=8)
    put_title(axes, layer, f": {_neurons(len(dead))}{_dead(report, layer)}")
    axes.figure.colorbar(grid, ax=axes, label="deadness (share of silent values)")
    return axes


def importance_bars(
    report: NeuronReport, criterion: str | None = None, layer: str | None = None, shown: int = 20, axes: Any = None
) -> Any:
    """Draw bars of the most and the least important neurons' scores; all of them if there are few.

    Args:
        report: A measurement.
        criterion: Any measured criterion; the main one if None.
        layer: Rank within this layer; None ranks all neurons together, as ``NeuronReport.ranking`` does.
        shown: Number of neurons at each end.
        axes: Where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        ArgumentError: If ``shown`` is no number of at least 1.
        UnknownNameError: If the criterion or the layer was not measured.
    """
    check_count("shown", shown)
    ranked = [n for n in report.ranking(criterion, layer=layer) if math.isfinite(n.score)]
    both_ends = len(ranked) > 2 * shown
    rows: list[RankedNeuron | None] = [*ranked[:shown], None, *ranked[-shown:]] if both_ends else [*ranked]
    axes = given_or_new(axes, 6, 1.2 + 0.16 * max(len(rows), 8))
    name = report.main_criterion if criterion is None else criterion
    axes.set_xlabel(f"importance by {shortened(name, 40)}")
    axes.set_ylabel("layer and neuron" if layer is None else "neuron")
    ends = f"{shown} most and {shown} least important of {len(ranked)}" if both_ends else f"all {len(ranked)} neurons"
    put_title(axes, "" if layer is None else f"{layer}: ", ends)
    if not ranked:
        return say_instead(axes, "no neuron has a score")
    places = [i for i, row in enumerate(rows) if row is not None]
    kept = [row for row in rows if row is not None]
    colors = [PALETTE[0] if row.score >= 0 else PALETTE[3] for row in kept]
    bars = axes.barh(places, [row.score for row in kept], color=colors)
    size = min(7.0, 0.62 * axes.bbox.height / axes.figure.dpi * 72 / len(rows))
    axes.bar_label(bars, fmt=" {:.2g}", fontsize=size)
    axes.margins(x=0.12, y=0.01)
    labels = [f"{shortened(row.where, 28)} {row.neuron}" if layer is None else str(row.neuron) for row in kept]
    axes.set_yticks(places, labels, fontsize=size)
    axes.invert_yaxis()
    if both_ends:
        axes.axhline(shown, color="k", linestyle=":", linewidth=1)
    return axes


def sensitivity_by_layer(report: NeuronReport, criterion: str | None = None, axes: Any = None) -> Any:
    """Draw the distribution of scores in each layer: median, 10 to 90 %, extremes; layers in the model's order.

    Args:
        report: A measurement.
        criterion: Any measured criterion; the main one if None.
        axes: Where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        UnknownNameError: If the criterion was not measured.
    """
    finite = {name: s[s.isfinite()].double() for name, s in report.importance(criterion).items()}
    axes = given_or_new(axes, 6.5, min(1.6 + 0.2 * len(finite), 14))
    name = report.main_criterion if criterion is None else criterion
    put_title(axes, "", f"{len(finite)} layers, first at the top")
    places = [i for i, s in enumerate(finite.values()) if len(s)]
    if not places:
        return say_instead(axes, "no neuron has a score")
    scores, note = drawing.log_where_positive(axes, "x", torch.cat(list(finite.values())))
    parts = [part for part in scores.split([len(s) for s in finite.values()]) if len(part)]
    least, low, median, high, most = (np.array([p.quantile(q).item() for p in parts]) for q in (0, 0.1, 0.5, 0.9, 1))
    axes.hlines(places, low, high, color=PALETTE[0], linewidth=4, alpha=0.5, label="10 % to 90 % of neurons")
    axes.plot(median, places, "o", color=PALETTE[0], markersize=5, label="median")
    axes.plot([*least, *most], [*places, *places], ".", color=PALETTE[3], markersize=4, label="extremes")
    axes.set_xlabel(f"importance by {shortened(name, 40)}{note}")
    axes.set_ylabel("layer")
    step = -(-len(finite) // 65)
    names = [shortened(n, 32) for n in finite]
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return axes


def agreement_scatter(
    report: NeuronReport, ablation: AblationReport, criterion: str | None = None, axes: Any = None
) -> Any:
    """Draw each neuron's score against the measured change of the loss without it.

    Args:
        report: A measurement.
        ablation: An ablation study of the same model.
        criterion: Any measured criterion; the main one if None.
        axes: Where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        UnknownNameError: If the criterion was not measured.
    """
    axes = given_or_new(axes, 5.6, 4.6)
    name = report.main_criterion if criterion is None else criterion
    pairs = figure_data.scored_and_measured(report, ablation, criterion)
    x, y = torch.cat([torch.zeros(2, 0), *pairs.values()], dim=1).double()
    rho = agreement(x, y).spearman
    put_title(axes, "", f"{_neurons(len(x))}, Spearman {'undefined' if math.isnan(rho) else f'{rho:.2f}'}")
    axes.set_xlabel(f"importance by {shortened(name, 30)}")
    axes.set_ylabel("|change of loss without the neuron|")
    if not pairs:
        return say_instead(axes, "no neuron was measured by both")
    x, below = drawing.log_where_positive(axes, "x", x)
    y, beneath = drawing.log_where_positive(axes, "y", y)
    axes.set_xlabel(axes.get_xlabel() + below)
    axes.set_ylabel(axes.get_ylabel() + beneath, fontsize=9)
    few, start = len(pairs) <= len(PALETTE), 0
    for place, (layer, both) in enumerate(pairs.items()):
        part = slice(start, start := start + both.shape[1])
        # A space in front, as matplotlib leaves labels out that begin with an underscore.
        style = {"color": PALETTE[place], "label": f" {shortened(layer, 28)}"} if few else {"color": PALETTE[0]}
        axes.scatter(x[part], y[part], s=14, alpha=0.7, linewidth=0, **style)
    if few:
        axes.legend(fontsize=7, loc="upper left")
    axes.grid(alpha=0.3)
    return axes


def _neurons(count: int) -> str:
    return "1 neuron" if count == 1 else f"{count} neurons"


def _dead(report: NeuronReport, layer: str) -> str:
    if layer not in report.deadness:
        return ""
    unknown = int(report.unknown(layer).sum())
    return f", {int(report.dead(layer).sum())} dead" + (f", {unknown} unknown" if unknown else "")
