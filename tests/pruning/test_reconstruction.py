"""The criterion "reconstruction": its order, what it divides by, which allocation is taken, and what comes out."""

import copy
import math
import re

import pytest
import torch
from torch import nn

from lightning_neurons import ArgumentError, PruningBudget, prune
from lightning_neurons.layers.width_handlers import axes
from lightning_neurons.pruning.compensation.calibration import Calibration
from lightning_neurons.pruning.decision import gather, score
from lightning_neurons.pruning.planning import allocations
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover
from tests.models import ConvNet, cross_entropy, pictures, seeded
from tests.pruning.nets import NETS
from tests.tables import for_each

X, Y = pictures(24)
BATCHES = [(X[:12], Y[:12]), (X[12:], Y[12:])]
RULES = [("amount", 0.4), ("target_params", 0.6), ("target_macs", 0.6), ("threshold", 0.05)]
with_rules = for_each("rule, value", RULES)


def net(name: str = "") -> nn.Module:
    return seeded(NETS[name]) if name else seeded(ConvNet)


def looked_at(model: nn.Module, budget: PruningBudget, batches=BATCHES):
    """The structure, the scores, and what readers were seen to read."""
    structure = discover(model, Example(X[:2]))
    calibration = Calibration(batches, lambda m, batch: m(batch[0]), cross_entropy)
    evidence = gather(model, budget, calibration, structure.wiring, lossless=False)
    return structure, score(structure, model, budget, evidence=evidence)[0], evidence.moments


def budget_of(**options) -> PruningBudget:
    return PruningBudget("reconstruction", **options)


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(cross_entropy(model, batch)) * len(batch[0]) for batch in BATCHES) / len(X)


@pytest.mark.parametrize("name, scope", [("", None), ("", "layer"), ("", "block"), ("", "global"), ("ResNet B", None)])
@with_rules
def test_every_rule_and_scope_does_what_is_asked(name, scope, rule, value):
    model = net(name)
    report = prune(model, X[:2], {"criterion": "reconstruction", rule: value, "scope": scope}, BATCHES)
    cost, gone = report.cost, report.plan.neurons
    assert model(X).shape == (24, 4)
    if rule == "target_params":
        assert sum(p.numel() for p in model.parameters()) == cost.parameters_after <= value * cost.parameters
    elif rule == "target_macs":
        assert cost.macs_after <= value * cost.macs
    elif rule == "amount" and not name:
        widths = report.plan.widths
        assert sum(map(len, gone.values())) == pytest.approx(value * (widths["conv1"] + widths["conv2"] + 7), abs=1.5)
    assert gone or rule == "threshold"
    assert all("reconstruction " in why for reasons in report.plan.reasons.values() for why in reasons.values())


def test_a_threshold_is_the_share_of_the_variance_that_readers_lose_at_most():
    model = net()
    for threshold in (0.01, 0.2):
        structure, scores, _ = looked_at(model, budget_of(threshold=threshold))
        plan = prune(copy.deepcopy(model), X[:2], budget_of(threshold=threshold), BATCHES).plan
        for root in structure.offered:
            value = scores[root].value
            below = [u for u in value.argsort().tolist() if value[u] <= threshold]
            assert list(plan.neurons.get(root, ())) == sorted(below[: structure.widths[root] - 1])


@for_each(
    "name, rule, share",
    [("", "amount", 0.3), ("", "target_macs", 0.6), ("LeNet", "amount", 0.6), ("ResNet B", "amount", 0.3)],
)
def test_the_calibration_loss_decides_between_allocations(name, rule, share):
    budget, model = budget_of(**{rule: 1 - share if rule != "amount" else share}), net(name)
    structure, scores, _ = looked_at(model, budget)
    losses, plans = {}, {}
    for scope, choice in zip(("layer", "global"), allocations(structure, budget, scores), strict=True):
        twin = copy.deepcopy(model)
        plans[scope] = prune(twin, X[:2], structure.neurons(choice.units), BATCHES).plan.neurons
        losses[scope] = loss_of(twin)
    report = prune(model, X[:2], budget, BATCHES)
    best = min(losses, key=lambda scope: losses[scope])
    assert report.plan.neurons == plans[best]
    assert loss_of(model) == pytest.approx(losses[best], rel=1e-5)
    said = [note for note in report.notes if note.startswith("calibration loss by scope")]
    if plans["layer"] == plans["global"]:
        assert said == []
        return
    told = re.fullmatch(r"calibration loss by scope: layer (\S+), global (\S+); (\w+) was taken", said[0])
    assert (float(told[1]), float(told[2])) == pytest.approx((losses["layer"], losses["global"]), rel=1e-3)
    assert told[3] == best


@for_each("share", [0.3, 0.5, 0.8])
@for_each("name", ["", "LeNet", "ResNet B"])
def test_a_choice_over_all_layers_leaves_half_of_what_an_even_one_would(name, share):
    budget = budget_of(amount=share)
    structure, scores, _ = looked_at(net(name), budget)
    even, free = allocations(structure, budget, scores)
    assert (even.units.keys() | free.units.keys()) <= structure.offered.keys()
    for root, group in structure.offered.items():
        stays = group.size - len(even.units.get(root, ()))
        assert len(even.units.get(root, ())) == round(share * group.size) or stays == 1
        assert group.size - len(free.units.get(root, ())) >= math.ceil(stays / 2)
    assert len(allocations(structure, budget_of(amount=share, scope="global"), scores)) == 1


def solved_again(weight, covariance, gone):
    """What readers lose with some inputs, by inverting what is left."""
    stay = [i for i in range(len(covariance)) if i not in gone]
    s = covariance
    rest = s[gone][:, gone] - s[gone][:, stay] @ torch.linalg.inv(s[stay][:, stay]) @ s[stay][:, gone]
    return float(torch.trace(weight[gone].T @ rest @ weight[gone]))


@for_each("name, root", [("", "fc1"), ("", "conv2"), ("LeNet", "fc1"), ("joined", "a")])
def test_scores_follow_the_order_in_which_neurons_go_one_by_one(name, root):
    """Where no norm layer follows the only reader: its weights and what it reads are all there is to know."""
    model = net(name)
    structure, scores, moments = looked_at(model, budget_of(amount=0.5))
    group = structure.offered[root]
    (part,) = [part for part in group.parts if part.role == "reads"]
    module, s = model.get_submodule(part.path), moments[part.path].covariance_xx
    few = 0.1 if int(moments[part.path].count) < len(s) else 1e-3
    s = s + few * s.diagonal().mean() * torch.eye(len(s))
    weight = module.weight.detach().double().movedim(axes(module, "reads")["weight"], 0).flatten(1)
    order, total, costs = [], 0.0, []
    while len(order) < group.size:
        tried = {}
        for unit in set(range(group.size)) - set(order):
            tried[unit] = solved_again(weight, s, [i for u in (*order, unit) for i in part.indices[u]])
        order.append(min(tried, key=lambda u: tried[u]))
        costs.append(tried[order[-1]] - total)
        total = tried[order[-1]]
    value = scores[root].value
    assert value.argsort().tolist() == order
    assert len(set(value.tolist())) == group.size, "no ties"
    highest = [max(costs[: i + 1]) / costs[0] for i in range(group.size)]
    torch.testing.assert_close(value[order] / value[order[0]], torch.tensor(highest).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["LeNet", "ResNet A", "DenseNet", "MobileNetV3"])
@with_rules
def test_no_two_neurons_of_a_layer_have_one_score(name, rule, value):
    structure, scores, _ = looked_at(net(name), budget_of(**{rule: value}))
    assert scores.keys() == structure.offered.keys()
    for root, found in scores.items():
        assert len(found.value) == structure.groups[root].size == len(found.value.unique())
        assert bool((found.value >= 0).all())


def test_a_target_divides_by_the_share_that_goes_with_a_neuron():
    model = net()
    _, plain, _ = looked_at(model, budget_of(amount=0.5))
    for rule in ("target_params", "target_macs"):
        structure, scores, _ = looked_at(model, budget_of(**{rule: 0.5}))
        whole = structure.costs_without({})
        for root in structure.offered:
            without = structure.costs_without({root: [0]})
            at = rule == "target_macs"
            price = 1 - without[at] / whole[at]
            torch.testing.assert_close(scores[root].value * price, plain[root].value, rtol=1e-9, atol=1e-15)


class PostNorm(nn.Module):
    """A block whose sum with its input is normalised, as in the first transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.outer = nn.Linear(12, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.norm, self.last = nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.first(x.flatten(1)[:, :12])
        return self.last(3 * self.norm(x + 0.01 * self.outer(torch.relu(self.inner(x)))))


def test_errors_in_a_stream_are_weighed_by_what_is_read_behind_its_norm():
    model = seeded(PostNorm)
    _, scores, moments = looked_at(model, budget_of(amount=0.5))
    s, weight = moments["outer"].covariance_xx, model.outer.weight.detach().double()
    s = s + 1e-3 * s.diagonal().mean() * torch.eye(8)
    errors = weight.square().sum(0) / torch.linalg.inv(s).diagonal()
    behind = float(moments["last"].covariance_xx.trace())
    assert float(scores["inner"].value.min()) == pytest.approx(float(errors.min()) / behind, rel=1e-6)
    assert float((weight @ s @ weight.T).trace()) < 0.5 * behind, "its own variance would be another measure"


@for_each("layer, pair", [("fc1", (2, 5)), ("conv1", (0, 4)), ("conv2", (1, 3))])
def test_a_double_goes_first_and_is_not_missed(layer, pair):
    model, batches = net(), [pictures(200)]
    with torch.no_grad():
        model.fc1.bias.add_(0.5)  # none of them is dead, which would go first as well
        for name in (layer, {"conv1": "bn1", "conv2": "bn2"}.get(layer, layer)):
            for tensor in model.get_submodule(name).state_dict().values():
                if tensor.ndim:
                    tensor[pair[1]] = tensor[pair[0]]
        expected = model(X)
    _, scores, _ = looked_at(model, budget_of(amount=0.5), batches)
    first, second = scores[layer].value.argsort()[:2].tolist()
    assert first in pair
    assert float(scores[layer].value[first]) < 0.3 * float(scores[layer].value[second])
    others = [n for n in ("conv1", "conv2", "fc1") if n != layer]
    report = prune(model, X[:2], budget_of(amount=1 / 7, ignore=others), batches)
    assert report.plan.neurons == {layer: (first,)}
    with torch.no_grad():
        assert float((model(X) - expected).square().mean()) < 0.01 * float(expected.var())


@for_each("name, root", [("ResNet B", "conv1"), ("ResNet A", "layer1.0.conv1"), ("DenseNet", "stem")])
def test_what_never_changes_goes_first_from_groups_with_several_readers_too(name, root):
    model, dead = net(name), 1
    norms = {
        "conv1": ["bn1", "layer1.0.bn2", "layer1.1.bn2"],
        "layer1.0.conv1": ["layer1.0.bn1"],
        "stem": ["norm1", "norm2", "norm3"],
    }
    with torch.no_grad():
        for path in norms[root]:
            norm = model.get_submodule(path)
            norm.weight[dead], norm.bias[dead] = 0, 0
        expected = model(X)
        _, scores, _ = looked_at(model, budget_of(amount=0.5))
        assert int(scores[root].value.argmin()) == dead
        report = prune(model, X[:2], {root: [dead]}, BATCHES)
        assert dead in report.plan.neurons[root]
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)


@for_each("batches", [None, [], iter(())])
def test_it_is_measured_on_batches(batches):
    model = net()
    with pytest.raises(ArgumentError, match=r"batches=.* some batches, which the criterion 'reconstruction' is"):
        prune(model, X[:2], {"criterion": "reconstruction", "amount": 0.5}, batches)
    assert all(torch.equal(t, net().state_dict()[n]) for n, t in model.state_dict().items())
