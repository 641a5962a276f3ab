"""Figures of a training run: magnitudes and deadness over epochs, and what pruning has done.

Every function draws on the axes that it is given, or on those of a new figure, and returns them.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_neurons.errors import UnknownNameError
from lightning_neurons.metrics.histogram import folded_edges
from lightning_neurons.report.figures.drawing import (
    MAGNITUDES,
    PALETTE,
    given_or_new,
    put_title,
    say_instead,
    shortened,
)
from lightning_neurons.results.history import MAGNITUDE_PARTS, HistoryEntry, NeuronHistory
from lightning_neurons.results.pruning_history import PruningHistory, PruningPoint

RAREST = 1e-4
"""Shares of values below this are drawn like none."""

_GAP, _ROW = 0.15, 0.35
_METRICS = {
    "before": ("before a cut", "o", -1),
    "cut": ("right after it", "v", 0),
    "after": ("at next validation", "^", 1),
}


def magnitude_history(history: NeuronHistory, layer: str, axes: Any = None) -> Any:
    """Draw the histogram of a layer's activation magnitudes, one column per measurement; zeros are the lowest row.

    Args:
        history: The measurements; one that lacks the layer leaves a gap.
        layer: The layer's path.
        axes: Where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        UnknownNameError: If no measurement has the layer.
    """
    names = [name for entry in history.entries for name in entry.widths]
    if layer not in names:
        raise UnknownNameError.among("layer", layer, dict.fromkeys(names))
    axes = given_or_new(axes, 6.5, 3.6)
    _epochs(axes, history.entries)
    axes.set_ylabel("log10 of |activation|")
    put_title(axes, layer, ": how often which magnitude")
    counts = [entry.magnitudes.get(layer) for entry in history.entries]
    if not any(counts):
        return say_instead(axes, "magnitudes were not counted")
    blank = np.full(len(folded_edges(MAGNITUDE_PARTS)) + 1, math.nan)
    shares = np.stack([blank if not c else np.asarray(c) / max(sum(c), 1) for c in counts], axis=1)
    used = np.flatnonzero(np.nan_to_num(shares[1:-1]).any(1))
    first, last = (used[0], used[-1] + 1) if len(used) else (0, 1)
    edges = folded_edges(MAGNITUDE_PARTS).log10().numpy()[first : last + 1]
    bottom, top = edges[0] - _GAP, edges[-1] + _GAP
    parts = [(np.array([bottom - _ROW, bottom]), shares[:1]), (edges, shares[1 + first : 1 + last])]
    if np.nan_to_num(shares[-1]).any():
        parts.append((np.array([top, top + _ROW]), shares[-1:]))
    from matplotlib.colors import LogNorm  # optional, and slow to import

    norm = LogNorm(RAREST, max(float(np.nanmax(shares)), 10 * RAREST))
    for rows, values in parts:
        # With nan_to_num zeros would be gaps, as a logarithm has none; maximum keeps NaN, which is a real gap.
        mesh = axes.pcolormesh(_edges(history.entries), rows, np.maximum(values, RAREST), norm=norm, cmap=MAGNITUDES)
    decades = range(math.ceil(edges[0] + _GAP), math.floor(edges[-1]) + 1)
    ticks = {bottom - _ROW / 2: "zero", **{d: str(d) for d in decades}}
    ticks |= {top + _ROW / 2: "above"} if len(parts) == 3 else {}
    axes.set_yticks(list(ticks), list(ticks.values()))
    bar = axes.figure.colorbar(mesh, ax=axes, label="share of values", extend="min", format="{x:g}")
    bar.minorticks_off()  # a third of the time of drawing
    return axes


def dead_history(history: NeuronHistory, axes: Any = None) -> Any:
    """Draw the share of dead neurons by layer, first layer at the top, one column per measurement.

    Returns:
        The matplotlib axes: those given, or those of a new figure.
    """
    layers = list(dict.fromkeys(name for entry in history.entries for name in entry.dead))
    axes = given_or_new(axes, 6.5, min(1.4 + 0.18 * max(len(layers), 5), 13))
    _epochs(axes, history.entries)
    axes.set_ylabel("layer")
    put_title(axes, "", "dead neurons")
    if not layers:
        return say_instead(axes, "deadness was not measured")
    shares = np.array([[_dead_share(entry, layer) for entry in history.entries] for layer in layers])
    # At least 1 %, so that a network without dead neurons is not drawn in the colours of one that has some.
    highest = max(float(np.nanmax(np.append(shares, 0))), 1.0)
    rows = np.arange(len(layers) + 1) - 0.5
    mesh = axes.pcolormesh(_edges(history.entries), rows, shares, vmin=0, vmax=highest, cmap=MAGNITUDES)
    axes.invert_yaxis()
    step = -(-len(layers) // 65)
    axes.set_yticks(range(0, len(layers), step), [shortened(name, 32) for name in layers[::step]], fontsize=7)
    aspect = max(20, 5 * axes.bbox.height / axes.figure.dpi)  # as wide beside many layers as beside few
    axes.figure.colorbar(mesh, ax=axes, label="dead neurons [%]", aspect=aspect)
    return axes


def pruning_progress(history: PruningHistory, axes: Any = None) -> Any:
    """Draw the share of parameters and MACs left after each cut, and the monitored metric around it (on the right).

    Returns:
        The matplotlib axes: those given, or those of a new figure.
    """
    axes = given_or_new(axes, 6.5, 4.2)
    axes.set_xlabel("epoch")
    axes.set_ylabel("left of the model [%]")
    axes.set_ylim(0, 104)
    axes.grid(alpha=0.3)
    kept = [point for point in history.points if not point.taken_back]
    undone = [point for point in history.points if point.taken_back]
    epochs = [point.epoch for point in history.points]
    start, end = min(epochs, default=1) - 1, max(epochs, default=0) + 1
    for name, color in (("parameters", PALETTE[0]), ("macs", PALETTE[1])):
        whole = max(getattr(history, name), 1)
        left = [100 * getattr(point, name) / whole for point in kept]
        label = "MACs" if name == "macs" else name
        steps = [100, *left, left[-1] if left else 100]
        axes.step([start, *(p.epoch for p in kept), end], steps, where="post", color=color, label=label)
        if undone:
            gone = [100 * getattr(point, name) / whole for point in undone]
            axes.plot(
                [p.epoch for p in undone], gone, "x", color=color, label="cuts taken back" if name == "macs" else None
            )
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    handles, labels = axes.get_legend_handles_labels()
    if any(getattr(point, name) is not None for point in history.points for name in _METRICS):
        more = _metric(axes.twinx(), history)
        handles, labels = handles + more[0], labels + more[1]
    removed = f"{sum(point.removed for point in kept)} neurons removed in {len(kept)} cuts"
    put_title(axes, "", f"{removed}, {len(undone)} taken back" if undone else removed)
    below = -0.5 / (axes.bbox.height / axes.figure.dpi)
    axes.legend(handles, labels, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, below))
    return axes


def _metric(axes: Any, history: PruningHistory) -> tuple[list[Any], list[str]]:
    """Draw the metric around every cut, joined by a line.

    Returns:
        Handles and labels for the legend.
    """
    epochs = sorted({point.epoch for point in history.points})
    apart = 0.25 * min(np.diff(epochs), default=1)
    for point in history.points:
        measured = [(point.epoch + side * apart, value) for side, value in _measured(point)]
        axes.plot(*zip(*measured, strict=True), color="0.5", linewidth=0.8, zorder=1) if measured else None
    for name, (label, marker, side) in _METRICS.items():
        points = [point for point in history.points if getattr(point, name) is not None]
        if points:
            at, values = [p.epoch + side * apart for p in points], [getattr(p, name) for p in points]
            axes.plot(at, values, marker, color=PALETTE[2], markersize=5, label=f"metric {label}")
    axes.set_ylabel(shortened(history.monitor or "metric", 40))
    legend: tuple[list[Any], list[str]] = axes.get_legend_handles_labels()
    return legend


def _measured(point: PruningPoint) -> list[tuple[int, float]]:
    values = [(side, getattr(point, name)) for name, (_, _, side) in _METRICS.items()]
    return [(side, value) for side, value in values if value is not None]


def _dead_share(entry: HistoryEntry, layer: str) -> float:
    """Return the share of dead neurons in per cent of those of which it is known; NaN where there are none."""
    judged = entry.widths[layer] - len(entry.unknown.get(layer, [])) if layer in entry.dead else 0
    return 100 * len(entry.dead[layer]) / judged if judged else math.nan


def _places(entries: Sequence[HistoryEntry]) -> list[int] | None:
    """Return the epochs, or None if several measurements have the same."""
    epochs = [entry.epoch for entry in entries if entry.epoch is not None]
    return epochs if len(epochs) == len(entries) and epochs == sorted(set(epochs)) else None


def _epochs(axes: Any, entries: Sequence[HistoryEntry]) -> None:
    """Label the lower axis with epochs, or numbers of measurements."""
    axes.set_xlabel("measurement" if _places(entries) is None else "epoch")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _edges(entries: Sequence[HistoryEntry]) -> Any:
    """Return the edges of the columns: halfway between two measurements."""
    at = np.asarray(_places(entries) or range(len(entries)), dtype=float)
    if len(at) == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    half = (at[1:] + at[:-1]) / 2
    return np.concatenate([[2 * at[0] - half[0]], half, [2 * at[-1] - half[-1]]])
