"""Sums kept apart by class."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_neurons import measure
from lightning_neurons.criteria import CRITERIA
from lightning_neurons.errors import MeasurementError
from lightning_neurons.metrics.streaming import StreamingCriteria
from tests.criteria.streams import ACTIVITY, LAYER, laws, named, open_metric, stream, traits, view_of
from tests.tables import for_each

MEASURED = [name for name, c in CRITERIA.items() if c.statistics and "sampled_gradient" not in c.needs]


def by_class(names, activations, gradients, targets, sizes=None) -> StreamingCriteria:
    metric = open_metric(names, traits(activations.shape[1]), activations.shape[1], per_class=True)
    for rows in torch.arange(len(activations)).split(sizes or len(activations)):
        metric.update(LAYER, view_of(activations[rows]), targets=targets[rows])
        metric.update(LAYER, view_of(activations[rows], gradients[rows]), "gradient", targets[rows])
        metric.finish_batch()
    return metric


@laws
@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.sampled_from([None, [5, 7], [1] * 12]))
def test_the_sums_of_a_class_are_those_of_its_samples_alone(targets, sizes):
    activations, gradients, targets = torch.randn(12, 3, 2).relu(), torch.randn(12, 3, 2), torch.tensor(targets)
    metric = by_class(MEASURED, activations, gradients, targets, sizes)
    for klass in sorted(set(targets.tolist())):
        alone = stream(MEASURED, activations[targets == klass], gradients[targets == klass])
        for name in MEASURED:
            scores = CRITERIA[name].score(metric.summary(LAYER, klass))
            torch.testing.assert_close(scores, alone[name], rtol=1e-6, atol=1e-9)


@laws
@given(st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_all_classes_together_are_the_whole(targets):
    activations, gradients = torch.randn(12, 3, 2), torch.randn(12, 3, 2)
    metric = by_class(MEASURED, activations, gradients, torch.tensor(targets), [4, 8])
    whole = stream(MEASURED, activations, gradients)
    for name, by_layer in metric.compute().items():
        torch.testing.assert_close(by_layer[LAYER], whole[name], rtol=1e-6, atol=1e-9)


@for_each("name", MEASURED)
def test_a_class_without_samples_has_no_scores(name):
    activations = torch.randn(4, 3, 2)
    metric = by_class([name], activations, activations, torch.tensor([0, 2, 0, 2]))
    assert len(metric.totals) == 3
    assert CRITERIA[name].score(metric.summary(LAYER, 1)).isnan().all()


def test_batches_of_several_layers_do_not_swap_targets():
    """Two layers, two batches: what waits of the first batch belongs to the first targets."""
    metric = StreamingCriteria({"a": 1, "b": 1}, named(["mean"]), per_class=True)
    for name in ("a", "b"):
        metric.describe(traits(1, name))
    for targets, value in ((torch.tensor([0, 0]), 1.0), (torch.tensor([1, 1]), 5.0)):
        for name in ("a", "b"):
            metric.update(name, view_of(torch.full((2, 1, 1), value)), targets=targets)
    metric.finish_batch()
    for name in ("a", "b"):
        assert [CRITERIA["mean"].score(metric.summary(name, k)).item() for k in (0, 1)] == [1, 5]


def test_calls_of_a_shared_layer_stay_with_their_class():
    metric = open_metric(["mean", "fisher"], traits(1), 1, calls=2, per_class=True)
    targets = torch.tensor([1, 0])
    for value in (1.0, 2.0):
        values = torch.tensor([value, 10 * value])[:, None, None]
        metric.update(LAYER, view_of(values), targets=targets)
        metric.update(LAYER, view_of(values, torch.ones(2, 1, 1)), "gradient", targets)
    metric.finish_batch()
    means, fishers = ([CRITERIA[n].score(metric.summary(LAYER, k)).item() for k in (0, 1)] for n in ("mean", "fisher"))
    assert means == [15, 1.5]
    assert fishers == [450, 4.5]


@for_each("targets, got", [(None, "no targets"), (torch.tensor([0, 1]), "2 targets")])
def test_samples_without_targets_are_refused_by_the_name_of_their_layer(targets, got):
    metric = open_metric(["mean"], traits(1), 1, per_class=True)
    with pytest.raises(MeasurementError, match=rf"per_class: .*{LAYER}.* 3 samples but {got}.*layers="):  # noqa: PT012
        metric.update(LAYER, view_of(torch.ones(3, 1, 1)), targets=targets)
        metric.finish_batch()


def test_more_classes_than_memory_are_refused_with_what_to_do():
    metric = open_metric(ACTIVITY, traits(100), 100, per_class=True)
    with pytest.raises(MeasurementError, match=r"per_class: .* 50001 classes .* GiB .*layers=.*criteria="):  # noqa: PT012
        metric.update(LAYER, view_of(torch.ones(1, 100, 1)), targets=torch.tensor([50_000]))
        metric.finish_batch()
    assert len(metric.totals) == 0


def test_a_report_holds_scores_by_class():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    inputs, targets = torch.randn(20, 3), torch.tensor([0, 2] * 10)
    loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    names = ["mean", "dormant", "near_zero", "taylor", "weight_l1"]
    batches = list(zip(inputs.split(7), targets.split(7), strict=True))
    report = measure(net, batches, loss_fn=loss, criteria=names, per_class=True)
    assert report.class_counts == (10, 0, 10)
    assert report.per_class.keys() == set(names) - {"weight_l1"}
    for klass in (0, 2):
        mine = targets == klass
        alone = measure(net, [(inputs[mine], targets[mine])], loss_fn=loss, criteria=names)
        for name, scores in {**alone.scores, **alone.deadness_by}.items():
            if name != "weight_l1":
                torch.testing.assert_close(report.per_class[name]["0"][klass], scores["0"], rtol=1e-5, atol=1e-8)
    for name, by_layer in report.per_class.items():
        assert by_layer["0"][1].isnan().all(), name
