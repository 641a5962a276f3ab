"""Without some neurons a network computes what it computes with them silenced, whatever the architecture."""

import copy
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import PruningPlan, prune
from lightning_neurons.pruning.planning import complete
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover
from tests.models import pictures, seeded
from tests.pruning.nets import NETS, Joined, net_and_inputs
from tests.tables import for_each


@pytest.fixture(autouse=True)
def _without_clock(monkeypatch):
    """To keep the time limit, a clock is read at every call: with checks of shapes that takes ten times as long."""
    monkeypatch.setattr(sys, "setprofile", lambda check: None)


@dataclass(frozen=True)
class Known:
    """A group, counted by hand; ``name@3`` is a module in which the group's first neuron has the number 3.

    Attributes:
        size: How many neurons each of its layers has.
        layers: The layers that make them, in the order of the model.
        behind: What else has to be silenced, because it makes something of zeros.
        least: How many neurons must stay.
    """

    size: int
    layers: str
    behind: str = ""
    least: int = 1

    @property
    def root(self) -> str:
        return self.layers.split()[0]

    def places(self, neurons: list[int], *, behind: bool = True) -> dict[str, list[int]]:
        """By module, the channels of its output that go with some neurons."""
        names = [name.partition("@") for name in f"{self.layers} {self.behind if behind else ''}".split()]
        return {name: [int(offset or 0) + n for n in neurons] for name, _, offset in names}


def in_stage(stage: str, size: int) -> list[Known]:
    return [Known(size, f"{stage}.{block}.conv1", f"{stage}.{block}.bn1") for block in (0, 1)]


def of_mobile_net(*, squeeze: bool) -> list[Known]:
    first, second, third = (f"features.{block}.block" for block in (1, 2, 3))
    last = 3 if squeeze else 2
    stem = Known(4, f"features.0.0 {first}.0.0 {first}.1.0", f"features.0.1 {first}.0.1 {first}.1.1", least=2)
    stream = Known(6, f"{second}.{last}.0 {third}.{last}.0", f"{second}.{last}.1 {third}.{last}.1")
    known = [stem, stream, Known(10, "features.4.0", "features.4.1"), Known(7, "classifier.0")]
    for block, wide in ((second, 9), (third, 12)):
        excite = f"{block}.2.fc2" if squeeze else ""
        known.append(Known(wide, f"{block}.0.0 {block}.1.0 {excite}", f"{block}.0.1 {block}.1.1", least=2))
        known += [Known(3, f"{block}.2.fc1")] if squeeze else []
    return known


STREAMS = [
    Known(4, "conv1 layer1.0.conv2 layer1.1.conv2", "bn1 layer1.0.bn2 layer1.1.bn2"),
    Known(8, "layer2.0.conv2 layer2.0.shortcut.0 layer2.1.conv2", "layer2.0.bn2 layer2.0.shortcut.1 layer2.1.bn2"),
]
KNOWN: dict[str, list[Known]] = {
    "LeNet": [Known(4, "conv1"), Known(5, "conv2"), Known(7, "fc1"), Known(6, "fc2")],
    "VGG": [
        *(Known(size, f"features.{i}", f"features.{i + 1}") for i, size in ((0, 4), (4, 6), (7, 5))),
        Known(8, "classifier.0"),
    ],
    "ResNet A": [*in_stage("layer1", 4), *in_stage("layer2", 8)],
    "ResNet B": [*STREAMS, *in_stage("layer1", 4), *in_stage("layer2", 8)],
    "DenseNet": [
        Known(4, "stem", "norm1 norm2 norm3"),
        Known(3, "conv1", "norm2@4 norm3@4"),
        Known(3, "conv2", "norm3@7"),
        Known(5, "conv3"),
    ],
    "MobileNetV2": of_mobile_net(squeeze=False),
    "MobileNetV3": of_mobile_net(squeeze=True),
    "decoder": [Known(5, "conv", "norm"), Known(6, "up", "bn")],
    "joined": [Known(4, "a both"), Known(5, "b both@4")],
    "MLP": [Known(8, "1"), Known(7, "3")],
    "tokens": [Known(9, "fc1"), Known(6, "fc2", "embed place")],
    "transformer": [Known(6, "v"), Known(9, "fc1")],
}
AMOUNTS = ["one", "a third", "all but the least"]
EVERY_GROUP = [(name, known) for name in NETS for known in KNOWN[name]]
GROUPS = [(*group, AMOUNTS[number % 3]) for number, group in enumerate(EVERY_GROUP)]


@contextmanager
def silenced(net: nn.Module, places: Iterable[dict[str, list[int]]]) -> Iterator[None]:
    """Hooks that put zeros into the outputs of modules."""

    def zero(channels: list[int]):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out.index_fill(1 if out.ndim == 4 else -1, torch.tensor(channels), 0)

        return hook

    hooks = [net.get_submodule(m).register_forward_hook(zero(c)) for by_module in places for m, c in by_module.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def some(known: Known, how_many: str) -> list[int]:
    count = {"one": 1, "a third": max(known.size // 3, 1), "all but the least": known.size - known.least}[how_many]
    order = torch.randperm(known.size, generator=torch.Generator().manual_seed(len(known.layers))).tolist()
    return sorted(order[:count])


def outputs(net: nn.Module, x: Tensor, places: Iterable[dict[str, list[int]]] = ()) -> Tensor:
    with torch.no_grad(), silenced(net, places):
        return net(x)


@for_each("name", NETS)
def test_the_groups_that_are_offered_are_those_that_one_counts_by_hand(name):
    net, x = net_and_inputs(name)
    offered = discover(net, Example(x)).offered
    assert {root: (group.size, group.least) for root, group in offered.items()} == {
        known.root: (known.size, known.least) for known in KNOWN[name]
    }
    for known in KNOWN[name]:
        everything = list(range(known.size))
        assert offered[known.root].neurons(everything) == known.places(everything, behind=False)


@for_each("name, known, how_many", GROUPS)
def test_removing_neurons_of_a_group_is_silencing_them(name, known, how_many):
    net, x = net_and_inputs(name)
    neurons = some(known, how_many)
    expected = outputs(net, x, [known.places(neurons)])
    report = prune(net, x, {known.root: neurons})
    removed = {layer: tuple(places) for layer, places in known.places(neurons, behind=False).items()}
    assert report.plan.neurons == removed
    for layer, places in removed.items():
        assert report.widths[layer] == report.plan.widths[layer] - len(places)
        assert (
            net.get_submodule(layer).weight.shape[isinstance(net.get_submodule(layer), nn.ConvTranspose2d)]
            == (report.widths[layer])
        )
    torch.testing.assert_close(outputs(net, x), expected, rtol=1e-5, atol=1e-12)


@for_each("how_many", AMOUNTS)
@for_each("name", NETS)
def test_removing_neurons_of_all_groups_at_once_is_silencing_them(name, how_many):
    net, x = net_and_inputs(name)
    neurons = {known.root: some(known, how_many) for known in KNOWN[name]}
    expected = outputs(net, x, [known.places(neurons[known.root]) for known in KNOWN[name]])
    assert not torch.allclose(expected, outputs(net, x)), "else nothing would be shown"
    prune(net, x, neurons)
    torch.testing.assert_close(outputs(net, x), expected, rtol=1e-5, atol=1e-12)


@for_each("name", NETS)
def test_any_coupled_layer_names_the_same_cut(name):
    net, x = net_and_inputs(name)
    structure = discover(net, Example(x))
    for known in KNOWN[name]:
        removed = known.places(some(known, "a third"), behind=False)
        for layer, places in removed.items():
            assert complete(structure, PruningPlan.from_indices({layer: places})).plan.neurons == {
                coupled: tuple(neurons) for coupled, neurons in removed.items()
            }


@for_each("amount", [0.3, 0.5, 0.7, 0.9])
def test_a_budget_leaves_each_layer_its_least_also_where_it_has_only_some_of_a_group(amount):
    net, x = seeded(Joined, wide_first=True, double=True), pictures(3, double=True)[0]
    dense = copy.deepcopy(net)
    report = prune(net, x, {"criterion": "weight_l2", "amount": amount, "min_neurons": 2}, [x], compensation="none")
    assert report.plan
    assert all(width >= 2 for width in report.widths.values())
    silent = {layer: list(neurons) for layer, neurons in report.plan.neurons.items()}
    torch.testing.assert_close(outputs(net, x), outputs(dense, x, [silent]), rtol=1e-5, atol=1e-12)
