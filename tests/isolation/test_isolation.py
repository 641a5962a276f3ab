"""Each way of putting something aside puts it back, also when the code in between raises."""

import random
from collections import Counter, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

from lightning_neurons.isolation.isolation import (
    differentiable,
    frozen,
    isolated,
    kept_random_state,
)
from tests.tables import for_each


@pytest.fixture(params=["normally", "with an exception"])
def leave(request):
    """Runs an action inside a context that ends in one of two ways."""

    def run(context, action) -> None:
        try:
            with context:
                action()
                if request.param == "with an exception":
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert request.param == "with an exception"

    return run


def test_modes_come_back_one_by_one(leave):
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    net[1].eval()
    leave(isolated(net), lambda: net.eval() and net[1].train())
    assert [m.training for m in net.modules()] == [True, True, False]


def test_random_states_come_back(leave):
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    context = kept_random_state(nn.Linear(1, 1))  # made before: checking its argument's type may draw a number
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = draw()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    leave(context, draw)
    assert draw() == expected


def test_buffers_and_running_statistics_come_back_as_the_same_objects(leave):
    net = nn.Sequential(nn.BatchNorm1d(3))
    net.register_buffer("steps", torch.zeros(2))
    net.register_buffer("nothing", None)
    before = {name: (id(b), b.clone()) for name, b in net.named_buffers()}

    def action():
        net(torch.randn(8, 3) + 5)
        net.steps += 1
        net.nothing = torch.ones(1)
        net.register_buffer("late", torch.ones(1))

    leave(isolated(net), action)
    assert {name: id(b) for name, b in net.named_buffers()} == {name: i for name, (i, _) in before.items()}
    assert all(torch.equal(b, before[name][1]) for name, b in net.named_buffers())
    assert net.nothing is None


def test_only_parameters_that_were_trained_require_gradients_again(leave):
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    during = []
    leave(frozen(net), lambda: during.extend(p.requires_grad for p in net.parameters()))
    assert during == [False, False]
    assert (net.weight.requires_grad, net.bias.requires_grad) == (True, False)


def test_gradients_are_possible_inside_inference_mode():
    with torch.inference_mode():
        with differentiable():
            x = torch.ones(2, requires_grad=True)
            (x * 3).sum().backward()
        assert torch.is_inference_mode_enabled()
    assert x.grad.tolist() == [3, 3]


class Collector(nn.Module):
    """A module with every kind of plain attribute that a validation step may write to."""

    def __init__(self) -> None:
        super().__init__()
        self.outs, self.named, self.classes, self.count = [1], {"a": 1}, {1, 2}, 0
        self.tensor, self.votes, self.text = torch.zeros(2), Counter("aab"), "old"
        self.by_loader = {"val": [1], "test": []}
        self.groups = defaultdict(list, val=[1])
        self.window, self.array = deque([1, 2], maxlen=4), np.zeros(2)
        self.inner = nn.Linear(1, 1)


CHANGES = {
    "a list is appended to": lambda m: m.outs.append(2),
    "a list is cleared": lambda m: m.outs.clear(),
    "a dict gains and loses entries": lambda m: (m.named.update(b=2), m.named.pop("a")),
    "a set grows": lambda m: m.classes.add(3),
    "a number is counted up": lambda m: setattr(m, "count", m.count + 1),
    "a counter counts": lambda m: m.votes.update("ac"),
    "a tensor is written to": lambda m: m.tensor.add_(1),
    "attributes are exchanged": lambda m: vars(m).update(text="new", outs=[], tensor=None),
    "an attribute is deleted": lambda m: delattr(m, "text"),
    "an attribute is new": lambda m: setattr(m, "cache", torch.ones(1)),
    "an attribute of a submodule is new": lambda m: setattr(m.inner, "cache", 1),
    "a list in a dict is appended to": lambda m: m.by_loader["val"].append(2),
    "a list in a defaultdict is appended to": lambda m: (m.groups["val"].append(2), m.groups["new"].append(1)),
    "a deque is appended to": lambda m: m.window.append(3),
    "an array is written to": lambda m: m.array.__iadd__(1),
}


def plain(module: Collector) -> dict[str, object]:
    names = sorted(n for n in vars(module) if not n.startswith("_"))
    values = {n: vars(module)[n] for n in names}
    contents = {n: v.tolist() if isinstance(v, torch.Tensor | np.ndarray) else v for n, v in values.items()}
    return {
        "contents": repr(contents),
        "objects": {n: id(v) for n, v in values.items()},
        "inner": sorted(vars(module.inner)),
    }


@for_each("change", CHANGES)
def test_plain_attributes_come_back_as_the_same_objects_with_their_contents(change, leave):
    module = Collector()
    before = plain(module)
    leave(isolated(module), lambda: CHANGES[change](module))
    assert plain(module) == before


class ListMetric(Metric):
    def __init__(self) -> None:
        super().__init__()
        self.add_state("kept", default=[], dist_reduce_fx="cat")

    def update(self, value) -> None:
        self.kept.append(value)

    def compute(self):
        return torch.cat(self.kept).sum()


def test_metrics_with_tensor_and_list_states_come_back(leave):
    net = nn.Module()
    net.mean, net.listed = MeanMetric(), ListMetric()
    net.mean.update(3.0), net.listed.update(torch.ones(2))

    def action():
        assert net.mean._update_count == 0
        net.mean(100.0), net.listed.update(torch.ones(5)), net.listed.compute(), net.mean.reset()

    leave(isolated(net), action)
    assert (net.mean.compute().item(), net.listed.compute().item()) == (3, 2)
    assert (net.mean._update_count, net.listed._update_count) == (1, 1)


@pytest.mark.parametrize("used_before", [False, True])
def test_a_collection_of_metrics_that_share_states_comes_back(used_before, leave):
    def collection():
        return MetricCollection([MulticlassAccuracy(3, average="micro"), MulticlassRecall(3, average="macro")])

    net, twin = nn.Module(), collection()
    net.metrics = collection()
    first, second = (
        (torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2])),
        (torch.zeros(4).long(), torch.arange(4) % 3),
    )
    if used_before:
        net.metrics.update(*first), twin.update(*first)
    before = {group: list(names) for group, names in net.metrics.compute_groups.items()}
    leave(isolated(net), lambda: (net.metrics.update(*second), net.metrics.compute()))
    assert net.metrics.compute_groups == before
    net.metrics.update(*second), twin.update(*second)
    assert net.metrics.compute() == twin.compute()
    assert net.metrics.compute_groups == twin.compute_groups
