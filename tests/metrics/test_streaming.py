"""Layers, copies and the life of the streaming metric."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_neurons import measure
from lightning_neurons.criteria import LayerTraits
from lightning_neurons.metrics.streaming import StreamingCriteria
from tests.criteria.streams import ACTIVITY, LAYER, named, open_metric, stream, traits, view_of
from tests.tables import for_each

STATES = ("totals", "maxima", "samples", "values", "nonfinite", "histogram")


def assert_same_results(first: StreamingCriteria, second: StreamingCriteria) -> None:
    a, b = first.compute(), second.compute()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys() == b[name].keys()
        for layer in a[name]:
            torch.testing.assert_close(a[name][layer], b[name][layer], rtol=0, atol=0, equal_nan=True)


def test_layers_do_not_mix():
    data = {"a": torch.randn(5, 2, 3), "b": torch.randn(5, 4, 1), "c": torch.randn(5, 1, 7)}
    metric = StreamingCriteria({n: t.shape[1] for n, t in data.items()}, named(ACTIVITY))
    for name, values in data.items():
        metric.describe(traits(values.shape[1], name))
    for name in ("b", "a", "c"):
        metric.update(name, view_of(data[name]))
    together = metric.compute()
    for name, values in data.items():
        alone = stream(ACTIVITY, values, layer=traits(values.shape[1]))
        for criterion in ACTIVITY:
            torch.testing.assert_close(together[criterion][name], alone[criterion], rtol=0, atol=0)


def test_what_waits_may_be_added_at_any_time(monkeypatch):
    data = {"a": torch.randn(6, 2, 3), "b": torch.randn(6, 2, 3), "twice": torch.randn(6, 2, 3)}
    results = []
    for limit in (2**22, 10):
        monkeypatch.setattr("lightning_neurons.metrics.streaming._HELD_NUMBERS", limit)
        metric = StreamingCriteria(dict.fromkeys(data, 2), named(ACTIVITY))
        torch.manual_seed(0)
        for name in data:
            metric.describe(traits(2, name), calls=1 + (name == "twice"))
        for rows in (slice(0, 4), slice(4, 6)):
            for name in ("twice", "a", "b", "twice"):
                metric.update(name, view_of(data[name][rows]))
            metric.finish_batch()
        results.append(metric)
    assert_same_results(*results)
    assert results[0].samples[0, 0].tolist() == [6] * 6


def test_a_refused_criterion_does_not_disturb_the_others():
    metric = StreamingCriteria({"smooth": 2, "relu": 2}, named(["apoz", "mean", "saturated", "rms"]))
    metric.describe(LayerTraits("smooth", "gelu"))
    metric.describe(LayerTraits("relu", "relu", rectified=True))
    values = torch.randn(6, 2, 3)
    metric.update("smooth", view_of(values))
    metric.update("relu", view_of(values.relu(), rectified=True))
    scores = metric.compute()
    assert {name: set(by_layer) for name, by_layer in scores.items()} == {
        "apoz": {"relu"}, "mean": {"smooth", "relu"}, "saturated": set(), "rms": {"smooth", "relu"},
    }  # fmt: skip
    torch.testing.assert_close(scores["mean"]["smooth"], values.mean((0, 2)).double())
    torch.testing.assert_close(scores["rms"]["relu"], values.relu().square().mean((0, 2)).sqrt().double())
    assert set(metric.refused["apoz"]) == {"smooth"}


def test_an_empty_batch_changes_nothing():
    metric = open_metric(ACTIVITY, traits(2), 2)
    metric.update(LAYER, view_of(torch.randn(4, 2, 3)))
    before = copy.deepcopy(metric)
    metric.update(LAYER, view_of(torch.zeros(0, 2, 3)))
    assert_same_results(metric, before)


@for_each("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_goes_on_by_itself(copier):
    metric = open_metric([*ACTIVITY, "taylor"], traits(2), 2)
    first, second = torch.randn(4, 2, 3), torch.randn(5, 2, 3)
    metric.update(LAYER, view_of(first))
    twin = copier(metric)
    assert_same_results(twin, metric)
    twin.update(LAYER, view_of(second))
    twin.finish_batch()
    assert metric.samples[0, 0].tolist() == [4, 4]
    metric.update(LAYER, view_of(second))
    assert_same_results(twin, metric)


def test_reset_starts_afresh_and_keeps_the_layers():
    values, layer = torch.randn(4, 2, 3), traits(2)
    metric = open_metric(ACTIVITY, layer, 2)
    metric.update(LAYER, view_of(torch.full((7, 2, 3), torch.nan)))
    metric.update(LAYER, view_of(torch.randn(9, 2, 3)))
    metric.compute()
    metric.reset()
    metric.finish_batch()
    assert metric.samples.sum() == metric.nonfinite.sum() == 0
    metric.update(LAYER, view_of(values))
    fresh = open_metric(ACTIVITY, layer, 2)
    fresh.update(LAYER, view_of(values))
    assert_same_results(metric, fresh)


def test_reset_forgets_calls_that_waited_for_the_end_of_their_batch():
    metric = open_metric(["mean"], traits(1), 1, calls=2)
    metric.update(LAYER, view_of(torch.full((3, 1, 1), 100.0)))
    metric.reset()
    for _ in range(2):
        metric.update(LAYER, view_of(torch.ones(3, 1, 1)))
    metric.finish_batch()
    assert metric.compute()["mean"][LAYER].item() == 1


@for_each("way", ["update", "hold"])
def test_results_follow_what_came_after_they_were_asked_for(way):
    metric = open_metric(["mean"], traits(1), 1)
    metric.update(LAYER, view_of(torch.ones(2, 1, 1)))
    assert metric.compute()["mean"][LAYER].item() == 1
    getattr(metric, way)(LAYER, view_of(torch.zeros(2, 1, 1)))
    assert metric.compute()["mean"][LAYER].item() == 0.5


@for_each("space", [1, 3, 40])
def test_what_happens_to_a_tensor_after_it_was_given_does_not_matter(space):
    values = torch.randn(4, 2, space)
    expected = stream(ACTIVITY, values.clone())
    metric = open_metric(ACTIVITY, traits(2), 2)
    metric.update(LAYER, view_of(values))
    values.fill_(7)
    found = metric.compute()
    for name in ACTIVITY:
        torch.testing.assert_close(found[name][LAYER], expected[name], rtol=0, atol=0)


def test_batches_of_one_layer_need_no_mark_between_them():
    values = torch.randn(9, 2, 3)
    metric = open_metric(ACTIVITY, traits(2), 2)
    for part in values.split([4, 4, 1]):
        metric.update(LAYER, view_of(part))
    expected = stream(ACTIVITY, values)
    for name, by_layer in metric.compute().items():
        torch.testing.assert_close(by_layer[LAYER], expected[name], rtol=1e-12, atol=0)


def test_a_layer_that_is_described_anew_is_judged_anew():
    metric = open_metric(["mean", "apoz"], LayerTraits(LAYER, "gelu"), 1)
    for function in ("gelu", "relu"):
        metric.reset()
        metric.describe(LayerTraits(LAYER, function, rectified=function == "relu"))
        metric.update(LAYER, view_of(torch.ones(2, 1, 1)))
        metric.finish_batch()
    assert metric.compute()["apoz"][LAYER].item() == 0


def test_a_layer_that_never_ran_is_left_out():
    metric = StreamingCriteria({"a": 1, "never": 2}, named(["mean"]))
    metric.describe(traits(1, "a"))
    metric.update("a", view_of(torch.ones(2, 1, 1)))
    assert metric.compute()["mean"].keys() == {"a"}


def test_no_graph_is_kept_by_sums_of_values_with_gradients():
    metric = open_metric(ACTIVITY, traits(2), 2)
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        metric.update(LAYER, view_of(layer(torch.randn(4, 3)).unsqueeze(-1)))
    assert not any(getattr(metric, name).requires_grad for name in STATES)


class Overwriting(nn.Module):
    """Goes on in the memory of its own activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Conv1d(1, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        hidden += 1000 * x.sum().sign()  # of another value, so that it is no step of the layer's own
        shape = self.second(hidden.unsqueeze(1))
        shape *= 0 * x.sum()
        return shape


def test_a_model_may_overwrite_its_activations():
    net, inputs = Overwriting(), torch.randn(12, 3)
    report = measure(net, inputs.split(4), criteria=["mean", "max", "near_zero"])
    hidden = net.first(inputs).detach()
    torch.testing.assert_close(report.scores["mean"]["first"], hidden.mean(0).double())
    torch.testing.assert_close(report.scores["max"]["first"], hidden.amax(0).double())
    torch.testing.assert_close(report.counts["first"].largest, hidden.abs().amax(0).double())
    assert report.deadness_at(0.5, relative=False)["first"].tolist() == pytest.approx(
        (hidden.abs() <= 0.5).double().mean(0).tolist()
    )
    assert report.deadness["second"].max() < 1


def test_measure_gives_what_the_metric_gives():
    net, inputs = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(20, 3)
    report = measure(net, inputs.split(6), criteria=["mean", "rms", "near_zero"])
    expected = stream(["mean", "rms", "near_zero"], net(inputs).detach().unsqueeze(-1))
    for name, by_layer in {**report.scores, **report.deadness_by}.items():
        torch.testing.assert_close(by_layer["0"], expected[name])
