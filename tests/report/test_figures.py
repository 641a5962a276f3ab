"""Every figure of a measurement shows the numbers of the report, whatever the names and the numbers are."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_neurons import NeuronReport, UnknownNameError, agreement, measure
from lightning_neurons.report.figures import measurements as figures
from lightning_neurons.report.figures.drawing import new_figure, shortened
from lightning_neurons.results.ablation_report import AblationReport
from tests.report.figured import CASES, HOSTILE, ablation_of, every_figure, made
from tests.results.reports import LAYERS, batches, report_of
from tests.tables import for_each


@pytest.fixture(scope="module")
def report() -> NeuronReport:
    return report_of()


@for_each("name", CASES)
def test_every_figure_is_drawn_without_a_warning(name):
    for axes in every_figure(CASES[name]()):
        axes.figure.draw_without_rendering()
        assert axes.get_xlabel() or axes.texts, "an axis says what it shows, or the figure why there is nothing"


@for_each("name", HOSTILE)
def test_names_are_shown_as_they_are_and_shortened_from_the_left(name):
    axes = figures.activation_histogram(made([name]), name)
    axes.figure.draw_without_rendering()
    assert not axes.title._preprocess_math(axes.get_title())[1], "no formula"
    title = axes.get_title().replace(r"\$", "$").split(":")[0]
    assert name == title if len(name) < 40 else title.startswith("…") and name.endswith(title[1:])
    box = axes.title.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= axes.figure.bbox.width


def test_shortening():
    assert [shortened("abcdef", n) for n in (6, 5, 2)] == ["abcdef", "…cdef", "…f"]


def test_figures_are_drawn_on_the_axes_that_are_given(report):
    for draw in (
        lambda axes: figures.activation_histogram(report, "0", axes),
        lambda axes: figures.deadness_curve(report, axes=axes),
        lambda axes: figures.deadness_grid(report, "0", axes),
        lambda axes: figures.importance_bars(report, axes=axes),
        lambda axes: figures.sensitivity_by_layer(report, axes=axes),
        lambda axes: figures.agreement_scatter(report, ablation_of(report), axes=axes),
    ):
        given = new_figure(4, 3).subplots()
        assert draw(given) is given


def test_unknown_layers_and_criteria_are_named(report):
    for call in (
        lambda: figures.activation_histogram(report, "net.conv9"),
        lambda: figures.deadness_curve(report, "net.conv9"),
        lambda: figures.deadness_grid(report, "net.conv9"),
        lambda: figures.importance_bars(report, layer="net.conv9"),
        lambda: figures.importance_bars(report, "tailor"),
        lambda: figures.sensitivity_by_layer(report, "tailor"),
        lambda: figures.agreement_scatter(report, ablation_of(report), "tailor"),
    ):
        with pytest.raises(UnknownNameError, match=r"net\.conv9|tailor"):
            call()


@for_each("layer", LAYERS)
def test_the_bars_of_the_histogram_are_the_counts(report, layer):
    axes, counts = figures.activation_histogram(report, layer), report.counts[layer].histogram.sum(0)
    *inner, zeros = [bar.get_height() for bar in axes.patches]
    assert sum(inner) + zeros == pytest.approx(100)
    assert zeros == pytest.approx(100 * float(counts[0] / counts.sum()))
    assert f"{zeros:.3g} % zero" in [text.get_text() for text in axes.texts]
    assert f"{int(report.dead(layer).sum())} dead" in axes.get_title()
    limit = report.settings["threshold"] * report.counts[layer].rms
    assert axes.lines[-1].get_xdata()[0] == pytest.approx(math.log10(limit))


def test_a_value_lies_in_the_bar_over_its_logarithm():
    axes = figures.activation_histogram(made(neurons=1, values=torch.tensor([[0.001, 3.0, 3.0, 0.0]])), "net.conv1")
    *inner, _ = axes.patches
    found = sorted(((b.get_x() + b.get_width() / 2, b.get_height()) for b in inner), key=lambda pair: -pair[1])
    assert sum(height for x, height in found if abs(x - math.log10(3)) < 0.1) == pytest.approx(50)
    assert sum(height for x, height in found if abs(x + 3) < 0.1) == pytest.approx(25)


@for_each("relative", [True, False])
@for_each("layer", [None, *LAYERS])
def test_the_curve_is_deadness_at_each_threshold(layer, relative):
    report = report_of(threshold=0.02, relative_threshold=relative)
    axes = figures.deadness_curve(report, layer)
    seldom, never, mark = axes.lines
    assert mark.get_xdata()[0] == 0.02
    for threshold, a, b in zip(never.get_xdata(), seldom.get_ydata(), never.get_ydata(), strict=True):
        found = report.deadness_at(float(threshold), relative=relative)
        silent = torch.cat(list(found.values())) if layer is None else found[layer]
        assert a == pytest.approx(100 * float((silent >= 0.99).double().mean()))
        assert b == pytest.approx(100 * float((silent == 1).double().mean()))
    assert ("activation units" in axes.get_xlabel()) != relative


@for_each("neurons, shape", [(1, (1, 1)), (12, (3, 4)), (64, (8, 8)), (512, (26, 20)), (2048, (41, 50))])
def test_the_grid_has_every_neuron_in_its_place(neurons, shape):
    report = made(neurons=neurons, dead=torch.linspace(1, 0, neurons).double())
    axes = figures.deadness_grid(report, "net.conv1")
    cells = axes.images[0].get_array()
    assert cells.shape == shape
    flat = cells.filled(np.nan).flatten()
    assert flat[:neurons].tolist() == report.deadness["net.conv1"].tolist()
    assert np.isnan(flat[neurons:]).all()
    assert axes.images[0].get_clim() == (0, 1)
    assert axes.collections[0].get_offsets().tolist() == [[0, 0]], "the first alone is dead"
    firsts = [int(label.get_text()) for label in axes.get_yticklabels()]
    assert firsts == [row * shape[1] for row in axes.get_yticks()]


@for_each("layer", [None, "3"])
def test_bars_are_the_scores_from_both_ends(report, layer):
    ranked = report.ranking(layer=layer)
    whole = figures.importance_bars(report, layer=layer)
    assert [bar.get_width() for bar in whole.patches] == [n.score for n in ranked]
    ends = figures.importance_bars(report, layer=layer, shown=2)
    expected = [*ranked[:2], *ranked[-2:]]
    assert [bar.get_width() for bar in ends.patches] == [n.score for n in expected]
    labels = [label.get_text() for label in ends.get_yticklabels()]
    assert labels == [str(n.neuron) if layer else f"{n.layer} {n.neuron}" for n in expected]
    assert ends.yaxis_inverted(), "the most important one is at the top"


def test_bars_leave_out_what_was_not_measured():
    scores = torch.tensor([1.0, math.nan, -2.0])
    axes = figures.importance_bars(made(neurons=3, scores=scores))
    assert [bar.get_width() for bar in axes.patches] == [1, -2]
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2


def test_layers_are_shown_by_their_quantiles_in_the_order_of_the_model(report):
    axes = figures.sensitivity_by_layer(report, "rms")
    scores = report.importance("rms")
    assert [label.get_text() for label in axes.get_yticklabels()] == list(scores)
    middle, extremes = axes.lines
    assert middle.get_xdata().tolist() == pytest.approx([float(s.double().quantile(0.5)) for s in scores.values()])
    ends = [float(end) for side in ("min", "max") for end in (getattr(s, side)() for s in scores.values())]
    positive = [end for end in ends if end > 0]
    assert extremes.get_xdata().tolist()[-len(scores) :] == pytest.approx(ends[-len(scores) :])
    assert axes.get_xscale() == "log"
    assert ("zeros" in axes.get_xlabel()) == (len(positive) < len(ends))
    assert figures.sensitivity_by_layer(made(scores=torch.linspace(-1, 1, 12))).get_xscale() == "linear"


def test_the_scatter_has_every_neuron_that_both_have_measured(report):
    ablation = ablation_of(report, scale=-2.0)
    ablation.delta_loss["3"][0] = math.nan
    axes = figures.agreement_scatter(report, ablation, "taylor")
    parts = [torch.as_tensor(points.get_offsets().data) for points in axes.collections]
    assert sum(map(len, parts)) == sum(map(len, report.scores["taylor"].values())) - 1
    x = torch.cat([report.scores["taylor"][n].double() for n in LAYERS])
    y = torch.cat([ablation.delta_loss[n].double().abs() for n in LAYERS])
    kept = ~y.isnan()
    shown = torch.cat(parts)
    for place, expected in enumerate((x[kept], y[kept])):
        positive = expected > 0
        assert torch.allclose(shown[positive, place], expected[positive])
        assert (shown[~positive, place] < expected[positive].min()).all(), "zeros at the lower end"
    assert f"Spearman {agreement(x, y).spearman:.2f}" in axes.get_title()
    assert [text.get_text().strip() for text in axes.get_legend().get_texts()] == LAYERS


def test_the_scatter_says_when_there_is_nothing_in_common(report):
    axes = figures.agreement_scatter(report, AblationReport(1.0, 8, {"other": torch.ones(3)}, {}))
    assert [text.get_text() for text in axes.texts] == ["no neuron was measured by both"]


def test_a_layer_with_an_empty_name_has_figures():
    torch.manual_seed(0)
    report = measure(nn.Conv2d(1, 4, 2), batches(), criteria=["near_zero", "rms"])
    for axes in every_figure(replace(report, scores={"taylor": report.scores["rms"]}, settings={})):
        axes.figure.draw_without_rendering()


def test_neither_pyplot_nor_a_display_is_needed():
    code = (
        "import sys\n"
        "from tests.report.figured import every_figure, made\n"
        "from tests.report.test_history_figures import every_history_figure\n"
        "from tests.report.test_picture_figures import every_picture_figure\n"
        "sys.modules.pop('matplotlib.pyplot', None)\n"  # others of our packages import it
        "for axes in [*every_figure(made()), *every_history_figure(), *every_picture_figure()]:\n"
        "    (getattr(axes, 'figure', None) or axes).draw_without_rendering()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "MPLBACKEND": "TkAgg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
