"""Deadness, counts and frames of a report."""

import builtins
import itertools
import math

import pandas as pd
import pytest
import torch
from torch import nn

from lightning_neurons import measure
from lightning_neurons.errors import ArgumentError, UnknownNameError
from tests import reference
from tests.results.reports import LAYERS, activations, flat, network, report_of
from tests.tables import for_each


def test_deadness_at_any_threshold_is_the_share_of_values_below_it():
    net = network()
    report = report_of(["near_zero"], net)
    for relative in (True, False):
        for threshold in (0.0, 0.01, 0.1, 0.5, 2.0, 50.0):
            found = report.deadness_at(threshold, relative=relative)
            for layer in (0, 3):
                values = activations(net, layer).double().tolist()
                limit = threshold * (reference.layer_rms(values) if relative else 1)
                below, above = (reference.share_at_most(values, limit * by) for by in (0.99, 1.01))
                scores = found[str(layer)].tolist()
                assert all(a <= s <= b for a, s, b in zip(below, scores, above, strict=True))


def test_deadness_at_the_threshold_of_the_run_is_the_deadness_of_the_run():
    for relative in (True, False):
        report = report_of(["near_zero"], threshold=0.3, relative_threshold=relative)
        found = report.deadness_at(0.3, relative=relative)
        for layer in LAYERS:
            assert torch.equal(found[layer], report.deadness[layer])


def test_deadness_grows_with_the_threshold():
    report = report_of(["near_zero"])
    steps = [report.deadness_at(t)["3"] for t in (0.0, 0.01, 0.1, 1.0, 10.0)]
    assert all((b >= a).all() for a, b in itertools.pairwise(steps))
    assert steps[-1].tolist() == [1] * 5


@for_each("threshold", [-1.0, math.nan, math.inf])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ArgumentError, match=f"threshold={threshold} is not allowed: expected a finite number of at"):
        report_of(["near_zero"]).deadness_at(threshold)


def test_deadness_at_a_threshold_needs_the_histogram():
    with pytest.raises(ArgumentError, match="expected a report whose criteria include 'near_zero'"):
        report_of(["apoz"]).deadness_at(0.1)


def test_the_dead_neuron_is_dead_and_dormant_and_bounded():
    report = report_of()
    assert report.dead("0").tolist() == [False, True, False, False]
    assert report.dormant("0").tolist() == [False, True, False, False]
    assert not report.dead("3").any()
    assert report.never_fired_bound("0").tolist() == [3 / 24] * 4


def test_nobody_is_dormant_where_dormancy_was_not_measured():
    assert report_of(["near_zero"]).dormant("0").tolist() == [False] * 4


@for_each("ask", ["dead", "dormant", "never_fired_bound"])
def test_an_unknown_layer_lists_the_known(ask):
    with pytest.raises(UnknownNameError, match=r"layer: nothing matches 'net\.0'.*Known: 0, 3, 5"):
        getattr(report_of(["near_zero"]), ask)("net.0")


def test_a_frame_has_one_row_per_neuron_and_one_column_per_measure():
    report = report_of(["rms", "taylor", "near_zero", "apoz"])
    frame = report.to_frame()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.columns) == ["layer", "neuron", "rms", "taylor", "near_zero", "apoz"]
    assert list(zip(frame.layer, frame.neuron, frame.rms, strict=True)) == flat(report.scores["rms"])
    assert frame[frame.layer != "0"].apoz.isna().all()
    assert frame[frame.layer == "0"].apoz.tolist() == report.deadness_by["apoz"]["0"].tolist()


def test_without_pandas_a_frame_says_how_to_get_it(monkeypatch):
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "pandas":
            raise ModuleNotFoundError(name)
        return imported(name, *args, **kwargs)

    report = report_of(["rms"])
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        report.to_frame()


def test_counts_say_what_the_numbers_rest_on():
    report = report_of()
    conv, linear = report.counts["0"], report.counts["3"]
    assert conv.samples.tolist() == conv.gradient_samples.tolist() == [24] * 4
    assert conv.values.tolist() == [96] * 4
    assert linear.values.tolist() == [24] * 5
    assert conv.nonfinite.tolist() == [0] * 4
    values = activations(network(), 0)
    assert conv.rms == pytest.approx(reference.layer_rms(values.tolist()))
    assert torch.equal(conv.largest, values.abs().amax((0, 2)).double())


def test_layers_that_never_run_are_listed_and_have_no_scores():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    report = measure(Idle(), [torch.randn(4, 2)], criteria=["rms", "near_zero"])
    assert [(layer.name, layer.calls) for layer in report.layers] == [("used", 1), ("unused", 0)]
    assert report.scores["rms"].keys() == report.deadness.keys() == report.counts.keys() == {"used"}
