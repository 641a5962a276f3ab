"""Every figure of a class study shows the numbers of the report, without a display and without global state."""

import importlib
import importlib.util
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib.container import BarContainer
from torch import nn

import lightning_neurons
from lightning_neurons import MissingPackageError, class_study
from lightning_neurons.report import figures as report_figures
from lightning_neurons.report.figures.classes import _BARS, CLASS_FIGURES, save_class_figures
from lightning_neurons.report.figures.drawing import can_draw, new_figure
from lightning_neurons.report.logging.tags import TAGS
from lightning_neurons.results.class_report import ClassAccuracy, ClassReport
from tests.tables import for_each

KINDS = ("whole", "subnetwork", "ablation", "random subnetwork", "random ablation", "other subnetworks")


def made(classes: int = 3, layers: int = 2, neurons: int = 7, kinds: Any = KINDS, **has: float) -> ClassReport:
    """A report of made up numbers; the classes are not 0, 1, 2."""
    generator = torch.Generator().manual_seed(classes + 31 * layers)
    names = [f"net.block{i}.conv" for i in range(layers)]
    draw = lambda: torch.rand(classes, neurons, generator=generator)
    labels = tuple(range(5, 5 + 2 * classes, 2))
    rows = [ClassAccuracy(kind, k, *torch.rand(4, generator=generator).tolist()) for k in labels for kind in kinds]
    rows = [
        row._replace(deviation=has.get("spread", 0.3) * row.on_all) if row.model in KINDS[3:] else row for row in rows
    ]
    members = {name: draw() > has.get("members_above", 0.4) for name in names}
    selectivity = {name: torch.rand(neurons, generator=generator) for name in names}
    importance = {name: draw() - 0.2 for name in names}
    return ClassReport(labels, (4,) * classes, importance, members, selectivity, tuple(rows), {})


def with_nan() -> ClassReport:
    report = made()
    for by_layer in (report.importance, report.selectivity):
        for values in by_layer.values():
            values[..., 0] = torch.nan
    report.importance["net.block0.conv"][:] = torch.nan
    return report


def without_differences() -> ClassReport:
    """Two neurons of the first layer, and all of the second, are alike for all classes."""
    report = made()
    report.importance["net.block0.conv"][:, [1, 4]] = torch.tensor([0.3, 0.0])
    report.importance["net.block1.conv"][:] = torch.linspace(0, 1, 7)
    return report


CASES = {
    "importance, many layers and classes": ("importance", lambda: made(classes=40, layers=30)),
    "importance, one class": ("importance", lambda: made(classes=1, kinds=KINDS[:5])),
    "importance, NaN": ("importance", with_nan),
    "importance, no differences": ("importance", without_differences),
    "reuse, one class": ("reuse_matrix", lambda: made(classes=1)),
    "reuse, no members": ("reuse_matrix", lambda: made(members_above=1)),
    "selectivity, NaN": ("selectivity", with_nan),
    "accuracy, one draw": ("accuracy", lambda: made(spread=math.nan)),
    "accuracy, many classes": ("accuracy", lambda: made(classes=50, layers=1)),
    "sharing, one neuron": ("sharing", lambda: made(neurons=1)),
    "sharing, no members": ("sharing", lambda: made(members_above=1)),
    "sharing, many classes": ("sharing", lambda: made(classes=50, layers=1)),
}


@for_each("name", CASES)
def test_every_figure_is_drawn_without_a_warning(name):
    figure, report = CASES[name]
    drawn = CLASS_FIGURES[figure](report())
    drawn.draw_without_rendering()
    assert drawn.get_size_inches().min() > 0


def test_the_names_of_figures_are_those_of_the_table():
    assert {f"classes/{n}" for n in CLASS_FIGURES} == {
        t.name for t in TAGS if t.kind == "figure" and "classes" in t.name
    }


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


@for_each("classes, step", [(2, 1), (3, 1), (20, 1), (21, 2), (47, 3)])
def test_the_matrix_of_reuse(classes, step):
    report = made(classes)
    axes = CLASS_FIGURES["reuse_matrix"](report).axes[0]
    shown = torch.from_numpy(axes.images[0].get_array().filled(float("nan")))
    off = ~torch.eye(classes, dtype=torch.bool)
    assert torch.allclose(shown.double()[off], (report.jaccard - report.jaccard_chance).double()[off])
    assert shown.diagonal().isnan().all()
    assert ticks(axes.xaxis) == ticks(axes.yaxis) == [str(k) for k in report.classes[::step]]
    assert axes.get_xticks().tolist() == axes.get_yticks().tolist() == [*range(0, classes, step)]
    assert axes.get_xlabel() == axes.get_ylabel() == "class"
    low, high = axes.images[0].get_clim()
    assert low == -high, "no sharing beyond chance is the middle of the colours"


def test_drawing_does_not_change_the_report():
    report = made()
    before = report.jaccard.clone(), {n: v.clone() for n, v in report.importance.items()}
    for draw in CLASS_FIGURES.values():
        draw(report)
    assert torch.equal(report.jaccard, before[0])
    assert all(torch.equal(report.importance[n], v) for n, v in before[1].items())


@for_each("make", [lambda: made(4, layers=3), with_nan, without_differences])
def test_importance_is_shown_from_lowest_to_highest_without_neurons_that_make_no_difference(make):
    report = make()
    for one, (layer, scores) in zip(CLASS_FIGURES["importance"](report).axes, report.importance.items(), strict=True):
        columns = [[0.0 if math.isnan(v) else v for v in column] for column in scores.T.tolist()]
        kept = [column for column in columns if len({*column}) > 1]
        said = f" ({len(columns) - len(kept)} that make no difference left out)" if len(kept) < len(columns) else ""
        assert one.get_title(loc="left") == f"{layer}{said}"
        assert len(one.images) == (1 if kept else 0)
        assert ticks(one.yaxis) == [str(k) for k in report.classes]
        if kept:
            shown = torch.as_tensor(one.images[0].get_array().data).T.tolist()
            expected = [[(v - min(c)) / (max(c) - min(c)) for v in c] for c in kept]
            for ours, theirs in zip(sorted(shown), sorted(expected), strict=True):
                assert ours == pytest.approx(theirs, abs=1e-5)
            best = [column.index(max(column)) for column in shown]
            assert best == sorted(column.index(max(column)) for column in kept), "in the order of their class"


@for_each("count", [24, 25, 60])
def test_heat_maps_are_of_24_layers_at_most_spread_over_the_model(count):
    report = made(classes=11, layers=count)
    figure, layers = CLASS_FIGURES["importance"](report), list(report.importance)
    places = [layers.index(axes.get_title(loc="left")) for axes in figure.axes]
    assert (len(places), places[0]) == (24, 0)
    assert {after - before for before, after in pairwise(places)} <= {count // 24, count // 24 + 1}
    assert places[-1] >= count - count // 24 - 1
    assert (f"24 of {count} layers" in figure.get_suptitle()) == (count > 24)
    assert ticks(figure.axes[0].yaxis) == [str(k) for k in report.classes[::3]], "at most 5"


@for_each("kinds, spread", [(KINDS, 0.3), (KINDS[:4], 0.3), (KINDS[:5], math.nan)])
def test_bars_are_the_accuracies(kinds, spread):
    report = made(3, kinds=kinds, spread=spread)
    figure = CLASS_FIGURES["accuracy"](report)
    order = [next(kind for kind in kinds if _BARS[kind] == text.get_text()) for text in figure.legends[0].get_texts()]
    for axes, field in zip(figure.axes, ("on_class", "on_others"), strict=True):
        bars = [one for one in axes.containers if isinstance(one, BarContainer)]
        assert (len(bars), len(axes.patches), {*order}) == (len(kinds), 3 * len(kinds), {*kinds})
        for kind, container in zip(order, bars, strict=True):
            rows = [report.accuracy(kind, k) for k in report.classes]
            assert [bar.get_height() for bar in container] == pytest.approx([getattr(row, field) for row in rows])
            assert [round(bar.get_x() + bar.get_width() / 2) for bar in container] == [0, 1, 2], "over its class"
            if field == "on_others" or kind in KINDS[:3] or math.isnan(spread):
                assert container.errorbar is None
                continue
            ends = [end for line in container.errorbar.lines[2][0].get_segments() for end in line[:, 1].tolist()]
            expected = [row.on_class + sign * row.deviation for row in rows for sign in (-1, 1)]
            assert ends == pytest.approx(expected)
    assert ticks(figure.axes[1].xaxis) == ["5", "7", "9"]
    assert len({bar.get_facecolor() for bar in figure.axes[0].patches}) == len(kinds)
    many = CLASS_FIGURES["accuracy"](made(47, layers=1)).axes[1]
    assert many.get_xticks().tolist() == [*range(0, 47, 3)], "at most 20"
    assert ticks(many.xaxis) == [str(5 + 2 * i) for i in range(0, 47, 3)]


def test_the_histogram_has_every_neuron_that_has_a_selectivity():
    for report in (made(), with_nan()):
        axes = CLASS_FIGURES["selectivity"](report).axes[0]
        found = torch.cat(list(report.selectivity.values()))
        assert sum(bar.get_height() for bar in axes.patches) == int(found.isfinite().sum())
        assert "it is not importance" in axes.get_title()
        assert axes.get_ylabel() == "neurons"


@for_each("classes", [3, 5, 20, 21])
def test_the_circle_has_every_class_with_its_own_neurons_and_the_strongest_sharing(classes):
    report = made(classes, neurons=40)
    axes = CLASS_FIGURES["sharing"](report).axes[0]
    own = dict.fromkeys(report.classes, 0)
    for member in report.members.values():
        for neuron in member.T.tolist():
            if sum(neuron) == 1:
                own[report.classes[neuron.index(True)]] += 1
    labels = [f"{k}\n({count})" if classes <= 20 else str(k) for k, count in own.items()]
    assert [text.get_text() for text in axes.texts] == labels
    places = [text.xy for text in axes.texts]
    excess = (report.jaccard - report.jaccard_chance).tolist()
    pairs = {frozenset((i, j)): excess[i][j] for i in range(classes) for j in range(i) if excess[i][j] > 0}
    expected = sorted(pairs, key=lambda pair: -pairs[pair])[: 3 * classes]
    assert (len(expected) < len(pairs)) == (classes >= 20)
    widths = {}
    for line in axes.lines:
        ends = [min(range(classes), key=lambda i, end=end: math.dist(places[i], end)) for end in line.get_xydata()]
        widths[frozenset(ends)] = line.get_linewidth()
    assert len(axes.lines) == len(expected)
    assert widths == pytest.approx({pair: 6 * pairs[pair] / pairs[expected[0]] for pair in expected}, abs=1e-5)


@pytest.fixture(scope="module")
def studied() -> ClassReport:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    return class_study(net, [(torch.randn(30, 6), torch.arange(30) % 3)], controls=1)


def test_figures_of_a_real_study_are_saved_as_png(studied, tmp_path):
    before = dict(mpl.rcParams)
    paths = save_class_figures(studied, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [f"{name}.png" for name in CLASS_FIGURES]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 3000 for path in paths)
    assert dict(mpl.rcParams) == before


def test_neither_pyplot_nor_a_display_is_needed(tmp_path):
    code = (
        "import sys, torch; from torch import nn; from lightning_neurons import class_study;"
        "from lightning_neurons.report.figures.classes import save_class_figures;"
        "net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3));"
        "save_class_figures(class_study(net, [(torch.randn(9, 6), torch.arange(9) % 3)]), sys.argv[1]);"
        "plt = sys.modules.get('matplotlib.pyplot');"  # others of our packages import it
        "assert plt is None or plt.get_fignums() == []"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "MPLBACKEND": "TkAgg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.glob("*.png"))) == len(CLASS_FIGURES)
    sources = [path.read_text() for path in Path(lightning_neurons.__file__).parent.rglob("*.py")]
    assert not any("pyplot" in source for source in sources)


def test_without_matplotlib_the_message_says_how_to_get_it(monkeypatch, tmp_path, studied):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    assert not can_draw()
    for call in (lambda: new_figure(1, 1), lambda: save_class_figures(studied, tmp_path / "none")):
        with pytest.raises(MissingPackageError, match=r"pip install 'lightning_neurons\[figures\]'") as caught:
            call()
        assert isinstance(caught.value, ImportError)
    assert not (tmp_path / "none").exists()


def test_the_former_place_of_these_figures_says_where_they_are_now():
    sys.modules.pop("lightning_neurons.report.class_figures", None)
    with pytest.warns(DeprecationWarning, match="is lightning_neurons.report.figures now"):
        former = importlib.import_module("lightning_neurons.report.class_figures")
    assert {name: getattr(former, name) for name in former.__all__} == {
        name: getattr(report_figures, name) for name in former.__all__
    }
