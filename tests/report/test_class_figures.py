"""Every figure of a class study shows the numbers of the report, without a display and without global state."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from torch import nn

import lightning_neurons
from lightning_neurons import MissingPackageError, class_study
from lightning_neurons.report.class_figures import CLASS_FIGURES, save_class_figures
from lightning_neurons.report.drawing import can_draw, new_figure
from lightning_neurons.report.tags import TAGS
from lightning_neurons.results.class_report import ClassAccuracy, ClassReport

KINDS = ("whole", "subnetwork", "ablation", "random subnetwork", "random ablation", "other subnetworks")


def made(classes: int = 3, layers: int = 2, neurons: int = 7, kinds: tuple[str, ...] = KINDS) -> ClassReport:
    """A report of made up numbers; the classes are not 0, 1, 2."""
    generator = torch.Generator().manual_seed(classes + 31 * layers)
    names = [f"net.block{i}.conv" for i in range(layers)]
    draw = lambda: torch.rand(classes, neurons, generator=generator)
    labels = tuple(range(5, 5 + 2 * classes, 2))
    rows = [ClassAccuracy(kind, k, *torch.rand(4, generator=generator).tolist()) for k in labels for kind in kinds]
    members = {name: draw() > 0.4 for name in names}
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


def without_members() -> ClassReport:
    report = made()
    for member in report.members.values():
        member[:] = False
    return report


REPORTS = {
    "two layers": made,
    "one layer": lambda: made(layers=1),
    "many layers": lambda: made(layers=24),
    "two classes": lambda: made(classes=2),
    "two classes, many layers": lambda: made(classes=2, layers=30),
    "twenty classes": lambda: made(classes=20),
    "twenty classes, one layer": lambda: made(classes=20, layers=1),
    "one class": lambda: made(classes=1, kinds=KINDS[:5]),
    "one neuron": lambda: made(neurons=1),
    "NaN": with_nan,
    "no members": without_members,
}


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("figure", CLASS_FIGURES)
def test_every_figure_is_drawn_without_a_warning(figure, name):
    drawn = CLASS_FIGURES[figure](REPORTS[name]())
    drawn.draw_without_rendering()
    assert drawn.get_size_inches().min() > 0


def test_the_names_of_figures_are_those_of_the_table():
    assert {f"classes/{name}" for name in CLASS_FIGURES} == {tag.name for tag in TAGS if tag.kind == "figure"}


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_the_matrix_of_reuse(classes):
    report = made(classes)
    axes = CLASS_FIGURES["reuse_matrix"](report).axes[0]
    shown = torch.from_numpy(axes.images[0].get_array().filled(float("nan")))
    off = ~torch.eye(classes, dtype=torch.bool)
    assert torch.allclose(shown.double()[off], (report.jaccard - report.jaccard_chance).double()[off])
    assert shown.diagonal().isnan().all()
    assert ticks(axes.xaxis) == ticks(axes.yaxis) == [str(k) for k in report.classes]
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


def test_importance_is_shown_from_each_neurons_lowest_to_its_highest_in_the_order_of_its_class():
    report = made(4, layers=3)
    axes = CLASS_FIGURES["importance"](report).axes
    assert [one.get_title(loc="left") for one in axes] == list(report.importance)
    for one, scores in zip(axes, report.importance.values(), strict=True):
        shown = torch.as_tensor(one.images[0].get_array().data)
        assert shown.shape == scores.shape
        best = shown.argmax(0)
        assert best.tolist() == sorted(best.tolist())
        assert best.tolist() == sorted(scores.argmax(0).tolist())
        expected = [[(v - min(column)) / (max(column) - min(column)) for v in column] for column in scores.T.tolist()]
        for ours, theirs in zip(sorted(shown.T.tolist()), sorted(expected), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
        assert ticks(one.yaxis) == [str(k) for k in report.classes]


@pytest.mark.parametrize("kinds", [KINDS, KINDS[:4], KINDS[:5]])
def test_bars_are_the_accuracies(kinds):
    report = made(3, kinds=kinds)
    figure = CLASS_FIGURES["accuracy"](report)
    for axes, field in zip(figure.axes, ("on_class", "on_others"), strict=True):
        assert len(axes.patches) == 3 * len(kinds)
        heights = sorted(bar.get_height() for bar in axes.patches)
        assert heights == pytest.approx(sorted(getattr(row, field) for row in report.accuracies))
        for row in report.accuracies:
            near = [b for b in axes.patches if b.get_height() == pytest.approx(getattr(row, field))]
            at = [round(b.get_x() + b.get_width() / 2) for b in near]
            assert report.classes.index(row.klass) in at, "it stands over its class"
    assert ticks(figure.axes[1].xaxis) == ["5", "7", "9"]
    assert len(figure.legends[0].get_texts()) == len(kinds)
    assert len({bar.get_facecolor() for bar in figure.axes[0].patches}) == len(kinds)


def test_the_histogram_has_every_neuron_that_has_a_selectivity():
    for report in (made(), with_nan()):
        axes = CLASS_FIGURES["selectivity"](report).axes[0]
        found = torch.cat(list(report.selectivity.values()))
        assert sum(bar.get_height() for bar in axes.patches) == int(found.isfinite().sum())
        assert "it is not importance" in axes.get_title()
        assert axes.get_ylabel() == "neurons"


def test_the_circle_has_every_class_with_its_own_neurons_and_lines_where_two_share():
    report = made(5)
    axes = CLASS_FIGURES["sharing"](report).axes[0]
    own = dict.fromkeys(report.classes, 0)
    for member in report.members.values():
        for neuron in member.T.tolist():
            if sum(neuron) == 1:
                own[report.classes[neuron.index(True)]] += 1
    assert [text.get_text() for text in axes.texts] == [f"{k}\n{count}" for k, count in own.items()]
    excess = (report.jaccard - report.jaccard_chance).fill_diagonal_(0).clamp_min(0)
    pairs = [(i, j) for i in range(5) for j in range(i) if excess[i, j] > 0.05 * excess.max()]
    assert len(axes.lines) == len(pairs)


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
        "from lightning_neurons.report.class_figures import save_class_figures;"
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
