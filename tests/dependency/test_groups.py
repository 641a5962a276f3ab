"""Which neurons can only go together; and the graph that says so is asked safely."""

import copy
import gc
import weakref
from functools import cache

import pytest
import torch
import torch_pruning
from torch import Tensor, nn

from lightning_neurons import PruningError, prune
from lightning_neurons.dependency.torch_pruning_adapter import find_coupling
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover
from tests.models import Single, pictures, seeded
from tests.pruning.nets import Joined, LeNet, net_and_inputs
from tests.tables import for_each


@cache
def coupling_of(name: str):
    net, x = net_and_inputs(name)
    return find_coupling(net, Example(x).run)


def parts_of(found, root: str) -> dict[str, tuple[str, list[list[int]]]]:
    (group,) = [group for group in found.groups if group.root == root]
    return {part.path: (part.role, [list(unit) for unit in part.indices]) for part in group.parts}


def from_(start: int, count: int, width: int = 1) -> list[list[int]]:
    """``count`` units of ``width`` places each, one after the other."""
    return [list(range(start + i * width, start + (i + 1) * width)) for i in range(count)]


@for_each(
    "name, root, parts",
    [
        ("LeNet", "conv1", {"conv1": ("makes", from_(0, 4)), "conv2": ("reads", from_(0, 4))}),
        ("LeNet", "conv2", {"conv2": ("makes", from_(0, 5)), "fc1": ("reads", from_(0, 5, width=4))}),
        (
            "joined",
            "b",
            {"b": ("makes", from_(0, 5)), "both": ("makes", from_(4, 5)), "head": ("reads", from_(4, 5))},
        ),
        (
            "DenseNet",
            "conv1",
            {
                "conv1": ("makes", from_(0, 3)),
                **{f"norm{i}": ("passes", from_(4, 3)) for i in (2, 3)},
                **{f"conv{i}": ("reads", from_(4, 3)) for i in (2, 3)},
            },
        ),
        (
            "ResNet B",
            "conv1",
            {
                **{n: ("makes", from_(0, 4)) for n in ("conv1", "layer1.0.conv2", "layer1.1.conv2")},
                **{n: ("passes", from_(0, 4)) for n in ("bn1", "layer1.0.bn2", "layer1.1.bn2")},
                **{f"layer1.{i}.conv1": ("reads", from_(0, 4)) for i in (0, 1)},
                **{f"layer2.0.{n}": ("reads", from_(0, 4)) for n in ("conv1", "shortcut.0")},
            },
        ),
        (
            "MobileNetV3",
            "features.2.block.0.0",
            {
                "features.2.block.0.0": ("makes", from_(0, 9)),
                "features.2.block.2.fc2": ("makes", from_(0, 9)),
                **{f"features.2.block.{n}": ("passes", from_(0, 9)) for n in ("0.1", "1.0", "1.1")},
                **{f"features.2.block.{n}": ("reads", from_(0, 9)) for n in ("2.fc1", "3.0")},
            },
        ),
        (
            "tokens",
            "fc2",
            {
                **{n: ("makes", from_(0, 6)) for n in ("embed", "fc2")},
                "place.bias": ("holds", from_(0, 6)),
                **{n: ("reads", from_(0, 6)) for n in ("fc1", "head")},
            },
        ),
    ],
)
def test_a_group_has_all_modules_that_get_narrower_and_the_places_of_each_unit_in_them(name, root, parts):
    assert parts_of(coupling_of(name), root) == parts


def test_of_a_bare_parameter_the_axis_is_known():
    (stream,) = [group for group in coupling_of("tokens").groups if group.root == "fc2"]
    assert all(part.axis == (1 if part.role == "holds" else None) for part in stream.parts)


@for_each("name", ["LeNet", "ResNet B", "DenseNet", "MobileNetV3", "joined", "transformer"])
def test_every_neuron_of_every_layer_that_ran_is_in_exactly_one_group(name):
    net, _ = net_and_inputs(name)
    places = [(n, i) for g in coupling_of(name).groups for n, units in g.layers.items() for unit in units for i in unit]
    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert sorted(places) == sorted((n, i) for n, m in layers.items() for i in range(m.weight.shape[0]))


def test_a_group_that_begins_with_the_wide_layer_has_units_without_a_place_in_the_narrow_ones():
    found = find_coupling(seeded(Joined, wide_first=True), Example(pictures(2)[0]).run)
    assert parts_of(found, "both") == {
        "both": ("makes", from_(0, 9)),
        "head": ("reads", from_(0, 9)),
        "a": ("makes", from_(0, 4) + [[]] * 5),
        "b": ("makes", [[]] * 4 + from_(0, 5)),
    }


def test_a_layer_that_never_runs_is_unseen_and_in_no_group():
    net, x = net_and_inputs("LeNet")
    net.unused = nn.Linear(3, 2)
    found = find_coupling(net, Example(x).run)
    assert found.unseen == {"unused": "it did not run"}
    assert [group.root for group in found.groups] == ["conv1", "conv2", "fc1", "fc2", "fc3"]


def test_who_reads_whom_who_ends_the_model_and_which_norm_follows_is_known():
    found = coupling_of("ResNet B")
    assert found.ends == {"linear"}
    assert found.unseen == {}
    assert found.reads["conv1"] == ()
    assert set(found.reads["layer1.1.conv1"]) == {"conv1", "layer1.0.conv2"}
    assert set(found.reads["linear"]) == {"layer2.0.conv2", "layer2.0.shortcut.0", "layer2.1.conv2"}
    assert found.norm_behind["layer2.0.shortcut.0"] == "layer2.0.shortcut.1"
    assert found.norm_behind["layer1.0.conv1"] == "layer1.0.bn1"
    assert coupling_of("LeNet").norm_behind == {}


class Failing(LeNet):
    """Its forward fails on its second half."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise ValueError("no such picture")


class Detached(LeNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Number(LeNet):
    def forward(self, x: Tensor) -> float:
        return super().forward(x).sum().item()


def hooks_of(net: nn.Module) -> list[int]:
    return [len(v) for m in net.modules() for k, v in vars(m).items() if k.endswith("_hooks")]


@for_each("make", [Failing, Detached, Number])
def test_a_model_that_cannot_be_traced_is_named_and_left_alone(make):
    net, x = seeded(make), pictures(2)[0]
    net.conv1.register_forward_hook(lambda module, inputs, out: None)
    before, hooks = copy.deepcopy(net.state_dict()), hooks_of(net)
    with pytest.raises(PruningError, match=make.__name__) as caught:
        discover(net, Example(x))
    assert (make is not Failing) or "no such picture" in str(caught.value)
    assert hooks_of(net) == hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_what_a_forward_has_left_behind_does_not_keep_a_model_from_being_cut():
    net, x = seeded(LeNet), pictures(2)[0]
    net.last = torch.ones(1, requires_grad=True) * 2
    prune(net, x, {"conv1": [0]})
    assert net.conv1.out_channels == 3
    assert net.last.grad_fn is not None


def test_a_model_that_cannot_be_copied_is_named_and_left_alone():
    net, x = seeded(LeNet), pictures(2)[0]
    net.only = Single(1, 1)
    before = hooks_of(net)
    with pytest.raises(PruningError, match="only in LeNet cannot be copied"):
        prune(net, x, {"conv1": [0]})
    assert hooks_of(net) == before
    assert net.conv1.out_channels == 4


def test_the_graph_is_dropped_as_it_would_keep_the_activations_of_a_forward_alive(monkeypatch):
    made, kind = [], torch_pruning.DependencyGraph

    def make() -> torch_pruning.DependencyGraph:
        graph = kind()
        made.append(weakref.ref(graph))
        return graph

    monkeypatch.setattr(torch_pruning, "DependencyGraph", make)
    structure = discover(seeded(LeNet), Example(pictures(2)[0]))
    gc.collect()
    assert structure.offered
    assert [graph() for graph in made] == [None]
