"""Metrics give what they would without a measurement in between, under however many names and whoever holds them."""

from types import SimpleNamespace

import torch
from torch import nn
from torchmetrics import MetricCollection, MetricTracker, MinMaxMetric, SumMetric
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, MulticlassAccuracy
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, Running

from lightning_neurons.isolation.isolation import isolated
from tests.tables import for_each


def tracker():
    made = MetricTracker(BinaryAccuracy())
    made.increment()
    return made


def two_classes(**kwargs):
    return MulticlassAccuracy(2, **kwargs)


METRICS = {
    "a state": BinaryAccuracy,
    "a list of values": BinaryAUROC,
    "a sum of two": lambda: BinaryAccuracy() + BinaryAUROC(),
    "a collection": lambda: MetricCollection({"a": two_classes(), "b": two_classes(average="micro")}),
    "one a class": lambda: ClasswiseWrapper(two_classes(average=None)),
    "bounds": lambda: MinMaxMetric(BinaryAccuracy()),
    "bootstrap": lambda: BootStrapper(BinaryAccuracy(), num_bootstraps=2),
    "running": lambda: Running(SumMetric(), window=3),
    "tracker": tracker,
}
HOLDERS = {
    "an attribute": lambda metric: metric,
    "two names": lambda metric: nn.ModuleDict({"a": nn.ModuleList([metric]), "b": nn.ModuleList([metric])}),
    "an attribute of a list": lambda metric: [{"it": (metric,)}],
    "an object": lambda metric: SimpleNamespace(it=metric),
    "a closure": lambda metric: lambda: metric,
}


def results(metric, module, *, measured):
    """Three batches; after each, the measurement of another one."""
    found = []
    for number in range(3):
        random = torch.Generator().manual_seed(number)
        values, targets = torch.rand(8, generator=random).round(), torch.tensor([0, 1] * 4)
        given = (values,) if isinstance(metric, Running) else (values.long(), targets)
        state = torch.get_rng_state()
        metric.update(*given)
        if measured:
            with isolated(module):
                metric(*given)
                metric.update(*given)
                metric.compute()
        torch.set_rng_state(state)
        found.append(metric.compute())
    return repr(found)


@for_each("name", METRICS)
@for_each("holder", HOLDERS)
def test_a_metric_gives_what_it_would_without_a_measurement(name, holder):
    def run(measured):
        torch.manual_seed(0)
        metric, module = METRICS[name](), nn.Module()
        module.held, module.again = HOLDERS[holder](metric), metric
        return results(metric, module, measured=measured)

    assert run(measured=True) == run(measured=False)
