"""Neurons of which it is not known whether they are dead: every output says so, and nothing counts them as dead."""

import dataclasses
import io
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_neurons import NeuronReport, PruningBudget, measure
from lightning_neurons.dependency.groups import Group
from lightning_neurons.pruning.selection.group_scores import group_scores, neuron_scores
from lightning_neurons.report.console.tables import table
from lightning_neurons.report.html.overview import layers
from lightning_neurons.report.logging.loggers import scalars
from lightning_neurons.report.logging.text_page import markdown
from lightning_neurons.report.numbers import effective_share, layer_rows
from lightning_neurons.results.history import NeuronHistory


def report_of(inputs: torch.Tensor) -> NeuronReport:
    """Of three neurons behind a ReLU: 0 fires for positive inputs, 1 for negative ones, 2 never."""
    net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0], [0.0]]))
        net[0].bias.copy_(torch.tensor([0.0, 0.0, -1.0]))
    return measure(net, [inputs], layers=["0"])


PARTLY = torch.tensor([[1.0], [2.0], [math.nan]])
NOTHING = torch.full((3, 1), math.nan)


def text_of(report: NeuronReport) -> str:
    out = io.StringIO()
    Console(width=200, file=out).print(table(report))
    return out.getvalue()


def test_what_is_partly_known_is_counted_of_what_is_known():
    report = report_of(PARTLY)
    assert report.unknown("0").tolist() == [False, True, True]
    (row,) = layer_rows(report)
    assert (row.dead, row.judged["dead"]) == (0, 1)
    values = scalars(report, NeuronHistory().add(report))
    assert values["neurons/dead_share"] == values["neurons/dead_share/0"] == 0
    assert "0 (2 unknown)" in text_of(report)
    assert "| 0 (2 unknown) |" in markdown(report, NeuronHistory().add(report))
    assert any(cell.text == "0 (2 unknown)" for cell in layers(report).parts[0].rows[0])


def test_where_nothing_is_known_nothing_is_said(tmp_path):
    report = report_of(NOTHING)
    (row,) = layer_rows(report)
    assert (row.dead, row.dormant, row.constant) == (None, None, None)
    values = scalars(report, NeuronHistory().add(report))
    assert not {name for name in values if "share" in name or "effective" in name}
    assert values["neurons/nonfinite"] == 9
    assert "unknown" not in text_of(report)
    assert "| `0` | 3 | - | - |" in markdown(report, NeuronHistory().add(report))
    report.save(tmp_path / "neurons.json")
    assert NeuronReport.load(tmp_path / "neurons.json").unknown("0").tolist() == [True] * 3


def test_the_effective_share_is_that_of_the_layers_of_which_it_is_known():
    (row,) = layer_rows(report_of(PARTLY))
    assert row.effective == 1
    unknown = dataclasses.replace(row, layer="other", neurons=5, effective=math.nan)
    assert effective_share([row, unknown]) == 1 / 3
    assert math.isnan(effective_share([unknown]))
    assert math.isnan(effective_share([])), "no layer ran"


@pytest.mark.parametrize("agreement", ["mean", "all"])
def test_a_neuron_that_is_dead_in_one_layer_and_unknown_in_another_is_not_removed(agreement):
    budget = PruningBudget(criterion="deadness", threshold=1.0, agreement=agreement)
    scores = {"a": -torch.tensor([1.0, 1.0, 0.5]), "b": -torch.tensor([1.0, math.nan, 0.5])}
    units = tuple((i,) for i in range(3))
    found = group_scores({"a": Group("a", 3, (), {"a": units, "b": units})}, scores, budget)["a"].value
    assert found[0] == -1
    assert math.isnan(found[1])
    assert neuron_scores(report_of(PARTLY), budget)["0"].isnan().tolist() == [False, True, True]
