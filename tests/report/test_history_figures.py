"""Figures over time show the numbers of the history."""

import math

import numpy as np
import pytest
import torch

from lightning_neurons import UnknownNameError
from lightning_neurons.metrics.histogram import BINS, bin_index, folded
from lightning_neurons.report.figures import history as history_figures
from lightning_neurons.report.figures.drawing import new_figure
from lightning_neurons.results.history import MAGNITUDE_PARTS, HistoryEntry, NeuronHistory
from lightning_neurons.results.pruning_history import PruningHistory, PruningPoint
from tests.tables import for_each

LAYER = "net.conv1"


def bars(values: torch.Tensor) -> list[int]:
    counts = torch.zeros(1, BINS, dtype=torch.int64)
    counts[0] = torch.bincount(bin_index(values).long(), minlength=BINS)
    return folded(counts, MAGNITUDE_PARTS).tolist()


def entry(epoch, width=8, dead=(1,), names=(LAYER,), values=None, magnitudes=True) -> HistoryEntry:
    generator = torch.Generator().manual_seed(width + (epoch or 0))
    drawn = torch.randn(50, generator=generator).relu() if values is None else values
    return HistoryEntry(
        epoch, epoch, dict.fromkeys(names, width), {name: list(dead) for name in names}, {}, {}, {},
        dict.fromkeys(names, bars(drawn)) if magnitudes else {},
    )  # fmt: skip


CASES = {
    "several epochs": lambda: [entry(e) for e in range(5)],
    "one epoch": lambda: [entry(3)],
    "no epoch": lambda: [entry(None), entry(None)],
    "every fifth": lambda: [entry(e) for e in range(0, 50, 5)],
    "pruned in between": lambda: [entry(0, width=16), entry(1, width=9, dead=()), entry(2, width=9)],
    "layer missing": lambda: [entry(0), entry(1, names=("other",)), entry(2)],
    "120 layers": lambda: [entry(e, names=[LAYER, *(f"net.block{i}.conv" for i in range(119))]) for e in range(3)],
    "hostile names": lambda: [entry(e, names=(LAYER, "_$x_", "$a$", "<script>", "x" * 200)) for e in range(3)],
    "zeros only": lambda: [entry(e, values=torch.zeros(5)) for e in range(3)],
    "far away": lambda: [entry(e, values=torch.tensor([1e-9, 1e9, 1e-5])) for e in range(3)],
    "no magnitudes": lambda: [entry(e, magnitudes=False) for e in range(3)],
    "no neurons": lambda: [entry(0, width=0, dead=())],
    "the same epoch twice": lambda: [entry(0), entry(1), entry(1)],
}


def progress(points=4, monitor="val_acc", **more) -> PruningHistory:
    made = [
        PruningPoint(3 * i, 5, 900 - 100 * i, 8000 - 1500 * i, 0.9 - 0.01 * i, 0.5, 0.85, taken_back=i == 2)
        for i in range(1, points + 1)
    ]
    return PruningHistory(1000, 10_000, {}, {}, monitor, tuple(made), **more)


PRUNING = {
    "some": progress,
    "no cut": lambda: progress(0),
    "one cut": lambda: progress(1),
    "hostile monitor": lambda: progress(monitor="_$x_$"),
    "no metric": lambda: PruningHistory(9, 9, {}, {}, None, (PruningPoint(0, 1, 5, 5),)),
    "NaN metric": lambda: PruningHistory(9, 9, {}, {}, "m", (PruningPoint(0, 1, 5, 5, math.nan, None, math.nan),)),
    "nothing to count": lambda: PruningHistory(0, 0, {}, {}, None, (PruningPoint(0, 0, 0, 0),)),
    "all taken back": lambda: PruningHistory(9, 9, {}, {}, "m", (PruningPoint(2, 1, 5, 5, 0.5, 0.1, 0.2, True),)),
}


def every_history_figure():
    history = NeuronHistory([entry(e) for e in range(3)])
    return [
        history_figures.magnitude_history(history, LAYER),
        history_figures.dead_history(history),
        history_figures.pruning_progress(progress()),
    ]


@for_each("name", CASES)
def test_histories_are_drawn_without_a_warning(name):
    history = NeuronHistory(CASES[name]())
    for axes in (history_figures.magnitude_history(history, LAYER), history_figures.dead_history(history)):
        axes.figure.draw_without_rendering()
        assert axes.get_xlabel() == ("measurement" if name in ("no epoch", "the same epoch twice") else "epoch")
        assert axes.get_ylabel()


@for_each("name", PRUNING)
def test_pruning_is_drawn_without_a_warning(name):
    axes = history_figures.pruning_progress(PRUNING[name]())
    axes.figure.draw_without_rendering()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "left of the model [%]")


def test_nothing_was_measured_yet():
    history_figures.dead_history(NeuronHistory()).figure.draw_without_rendering()
    with pytest.raises(UnknownNameError):
        history_figures.magnitude_history(NeuronHistory(), LAYER)


@for_each("name", ["several epochs", "every fifth", "pruned in between", "layer missing"])
def test_columns_are_the_shares_of_each_measurement(name):
    history = NeuronHistory(CASES[name]())
    zeros, inner = history_figures.magnitude_history(history, LAYER).collections[:2]
    edges = zeros.get_coordinates()[0, :, 0]
    for place, one in enumerate(history.entries):
        assert edges[place] < one.epoch < edges[place + 1], "a column lies around its epoch"
        lowest, column = zeros.get_array()[0, place], inner.get_array()[:, place]
        counts = np.array(one.magnitudes.get(LAYER, [0])) / 50
        if LAYER not in one.magnitudes:
            assert np.ma.getmaskarray(zeros.get_array())[:, place].all(), "a gap"
            assert np.ma.getmaskarray(inner.get_array())[:, place].all()
            continue
        assert lowest == pytest.approx(counts[0])
        drawn = sorted(share for share in column if share > history_figures.RAREST)
        assert drawn == pytest.approx(sorted(share for share in counts[1:] if share > 0))
    assert zeros.get_coordinates()[1, 0, 1] < inner.get_coordinates()[0, 0, 1], "zeros lie apart"
    assert zeros.get_clim() == inner.get_clim()
    assert zeros.get_cmap().name == "cividis"


def test_a_row_lies_over_its_magnitude():
    values = torch.tensor([0.01, 0.01, 0.01, 5.0])
    inner = history_figures.magnitude_history(NeuronHistory([entry(0, values=values)]), LAYER).collections[1]
    rows, heights = inner.get_array()[:, 0], inner.get_coordinates()[:, 0, 1]
    for value, share in ((0.01, 0.75), (5.0, 0.25)):
        (row,) = np.flatnonzero(np.isclose(rows, share))
        assert heights[row] <= math.log10(value) <= heights[row + 1]


def test_dead_neurons_by_layer_and_epoch():
    entries = [entry(0, dead=(0, 1), names=("a", "b")), entry(1, dead=(), names=("b", "c"), width=5)]
    axes = history_figures.dead_history(NeuronHistory(entries))
    found = axes.collections[0].get_array()
    assert np.ma.filled(found, -1).tolist() == [[25, -1], [25, 0], [-1, 0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.yaxis_inverted(), "the first layer is at the top"
    assert axes.collections[0].get_clim() == (0, 25)


def test_pruning_shows_what_is_left_and_what_was_taken_back():
    history = progress()
    axes = history_figures.pruning_progress(history)
    parameters, gone, macs, _ = axes.lines
    kept = [p for p in history.points if not p.taken_back]
    assert list(parameters.get_ydata()) == [100, *(p.parameters / 10 for p in kept), kept[-1].parameters / 10]
    assert list(macs.get_ydata()) == [100, *(p.macs / 100 for p in kept), kept[-1].macs / 100]
    assert list(parameters.get_xdata())[1:-1] == [p.epoch for p in kept]
    assert (list(gone.get_xdata()), list(gone.get_ydata())) == ([6], [70])
    assert axes.get_title() == "15 neurons removed in 3 cuts, 1 taken back"
    right = axes.figure.axes[1]
    assert right.get_ylabel() == "val_acc"
    points = {line.get_label(): list(line.get_ydata()) for line in right.lines if line.get_label().startswith("metric")}
    assert list(points.values()) == [[getattr(p, n) for p in history.points] for n in ("before", "cut", "after")]


def test_figures_are_drawn_on_the_axes_that_are_given():
    history = NeuronHistory([entry(0), entry(1)])
    for draw in (
        lambda axes: history_figures.magnitude_history(history, LAYER, axes),
        lambda axes: history_figures.dead_history(history, axes),
        lambda axes: history_figures.pruning_progress(progress(), axes),
    ):
        given = new_figure(4, 3).subplots()
        assert draw(given) is given
