"""The front door: what it takes, what it refuses, what it leaves and what it reports."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from lightning_neurons import (
    ArgumentError,
    MeasurementError,
    PruningBudget,
    PruningError,
    PruningPlan,
    UnknownNameError,
    find_neurons,
    prune,
)
from tests.models import ConvNet, ResidualNet, cross_entropy, pictures, seeded
from tests.pruning.test_selection import cost_of
from tests.tables import for_each

X, Y = pictures(12)
BATCHES = [(X[:6], Y[:6]), (X[6:], Y[6:])]
HEAD_NOTE = "fc2 is not cut: its neurons are the model's output"


def net() -> ConvNet:
    return seeded(ConvNet)


def pruned(*args):
    return prune(net(), X[:2], *args).plan.neurons


def widths_of(model: ConvNet) -> dict[str, int]:
    widths = {name: getattr(model, name).out_channels for name in ("conv1", "conv2")}
    return widths | {name: getattr(model, name).out_features for name in ("fc1", "fc2")}


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_plan_a_mapping_and_the_mapping_of_a_plan_are_the_same():
    indices = {"conv1": [5, 0], "fc1": (3,)}
    plan, by_hand = net(), net()
    first = prune(plan, X[:2], PruningPlan.from_indices(indices))
    second = prune(by_hand, X[:2], indices)
    assert first.plan == second.plan
    assert first.plan.neurons == {"conv1": (0, 5), "fc1": (3,)}
    assert first.widths == widths_of(plan) == {"conv1": 4, "conv2": 5, "fc1": 6, "fc2": 4}
    assert same_weights(plan, by_hand)
    assert torch.equal(plan.fc1.weight, net().fc1.weight[[0, 1, 2, 4, 5, 6]])


def test_a_budget_and_the_mapping_of_its_arguments_are_the_same():
    options = {"criterion": "rms", "target_macs": 0.5, "scope": "layer", "min_neurons": 2}
    assert pruned(options, BATCHES) == pruned(PruningBudget(**options), BATCHES) != {}


@for_each("batches", [None, BATCHES])
def test_a_number_is_the_share_to_remove_by_the_length_of_the_weights(batches):
    found = pruned(0.5, batches)
    assert found == pruned(PruningBudget("weight_l2", amount=0.5), batches)
    assert sum(map(len, found.values())) == 9


def test_what_never_fires_goes_and_nobody_notices():
    model = net()
    with torch.no_grad():
        model.fc1.bias[[1, 5]] = -1e6
        model.bn1.bias[2] = -1e6
        before = model(X)
        report = prune(model, X[:2], {"criterion": "deadness", "threshold": 1.0}, BATCHES)
        assert set(report.plan.neurons["fc1"]) >= {1, 5}
        assert 2 in report.plan.neurons["conv1"]
        assert torch.allclose(model(X), before, atol=1e-5)


def test_every_neuron_that_goes_has_a_reason():
    budget = {"criterion": "rms", "amount": 0.4}
    report = prune(seeded(ResidualNet, inplace=False), X[:2], budget, BATCHES)
    for layer, gone in report.plan.neurons.items():
        assert set(report.plan.reasons[layer]) == set(gone)
        assert all("rms " in why and " of 5 from below" in why for why in report.plan.reasons[layer].values())
    by_hand = prune(seeded(ResidualNet, inplace=False), X[:2], {"conv3": [1, 4], "conv2": [0]}).plan
    assert by_hand.neurons == {"conv1": (1, 4), "conv2": (0,), "conv3": (1, 4)}
    assert by_hand.reasons["conv3"] == {1: "asked for", 4: "asked for"}
    assert by_hand.reasons["conv1"] == {1: "goes with conv3 1", 4: "goes with conv3 4"}


@for_each(
    "wanted", [{"conv1": [0, 5], "conv2": [4], "fc1": [2]}, {"criterion": "random", "target_macs": 0.4}, {"fc1": []}]
)
def test_the_report_says_what_the_model_is_now(wanted):
    model, before = net(), cost_of(net(), X)
    report, after = prune(model, X[:2], wanted), cost_of(model, X)
    assert report.widths == widths_of(model) == {layer.name: layer.neurons for layer in find_neurons(model, X[:2])}
    assert (report.cost.parameters, report.cost.macs) == (before["target_params"], before["target_macs"])
    assert (report.cost.parameters_after, report.cost.macs_after) == (after["target_params"], after["target_macs"])
    assert report.plan.widths == widths_of(net())
    assert all(
        report.widths[n] == width - len(report.plan.neurons.get(n, ())) for n, width in report.plan.widths.items()
    )


def test_the_report_reads_as_text():
    report = prune(net(), X[:2], {"criterion": "random", "amount": 0.5})
    text, c = str(report), report.cost
    assert text.startswith("9 neurons removed\n")
    assert f"parameters 1,064 -> {c.parameters_after:,} ({c.parameters_after / 1064:.1%})" in text
    assert f"MACs 15,276 -> {c.macs_after:,} ({c.macs_after / 15276:.1%})" in text
    assert all(
        f"{layer}: {report.plan.widths[layer]} -> {report.widths[layer]}" in text for layer in report.plan.neurons
    )
    assert "fc2: 4" not in text
    assert HEAD_NOTE in text
    assert HEAD_NOTE in report.notes


def test_a_second_plan_means_the_model_as_it_is_then():
    twice, once = net(), net()
    first = prune(twice, X[:2], {"fc1": [0], "conv1": [1, 2]})
    second = prune(twice, X[:2], {"fc1": [0, 5], "conv1": [1]})
    together = first.plan.then(second.plan)
    assert together.neurons == {"conv1": (1, 2, 3), "fc1": (0, 1, 6)}
    report = prune(once, X[:2], together.neurons)
    assert same_weights(twice, once)
    assert together.cost == report.cost
    with pytest.raises(ArgumentError, match="applied already"):
        prune(twice, X[:2], first.plan)


@for_each("criterion", ["fisher", "weight_l2"])
def test_a_model_in_training_stays_in_training_and_the_frozen_stay_frozen(criterion):
    model = net().train()
    model.bn1.eval()
    model.conv2.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    statistics, state = copy.deepcopy(model.bn2.running_mean), torch.get_rng_state()
    prune(model, X[:2], {"criterion": criterion, "amount": 0.3, "ignore": ["conv2"]}, BATCHES)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert torch.equal(model.bn2.running_mean, statistics)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@for_each("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@for_each("compensation", ["none", "mean"])
def test_whatever_it_is_called_in_the_model_can_be_trained_after(context, compensation):
    model = net().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with context():
        prune(model, X[:2], {"criterion": "fisher", "amount": 0.5}, BATCHES, optimizer, compensation)
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(t.is_inference() or (t.is_floating_point() and not t.is_leaf) for t in tensors)
    assert all(p.requires_grad for p in model.parameters())
    before = copy.deepcopy(model.state_dict())
    cross_entropy(model, BATCHES[0]).backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert not torch.equal(model.fc1.weight, before["fc1.weight"])


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list:
    """Everything of both that a cut could change, each thing by its own copy."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    moments = {f"{i}.{n}": v for i, state in optimizer.state_dict()["state"].items() for n, v in state.items()}
    modes = {name: (m.training, len(m._forward_hooks), str(m)) for name, m in model.named_modules()}
    flags = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    return [copy.deepcopy({**tensors, **gradients, **moments}), modes, flags]


def broken():
    yield BATCHES[0]
    raise OSError("the disk is gone")


HALF = {"amount": 0.5}
FISHER = {"criterion": "fisher", **HALF}
REFUSALS = [
    ({"plan": None}, ArgumentError, "plan_or_budget=None is not allowed: expected a PruningPlan, a PruningBudget"),
    ({"plan": True}, ArgumentError, "plan_or_budget=True"),
    ({"plan": "conv1"}, ArgumentError, "plan_or_budget='conv1'"),
    ({"plan": [("conv1", [0])]}, ArgumentError, "plan_or_budget="),
    ({"plan": 0}, ArgumentError, "amount=0 is not allowed"),
    ({"plan": 1.5}, ArgumentError, "amount=1.5 is not allowed"),
    ({"plan": {**FISHER, "criterion": "fischer"}, "batches": broken()}, UnknownNameError, "Did you mean 'fisher'"),
    ({"plan": {**FISHER, "target_macs": 0.5}}, ArgumentError, "exactly one of amount"),
    ({"plan": {**FISHER, "ignore": ["con1"]}, "batches": BATCHES}, UnknownNameError, "Did you mean 'conv1'"),
    ({"plan": FISHER}, ArgumentError, "batches=None is not allowed: expected some batches, which the criterion"),
    ({"plan": FISHER, "batches": []}, ArgumentError, "batches=[] is not allowed"),
    ({"plan": {"criterion": "rms", **HALF}}, ArgumentError, "batches=None"),
    ({"plan": {"criterion": "deadness", "threshold": 1.0}, "batches": iter(())}, ArgumentError, "batches="),
    ({"plan": FISHER, "batches": X}, ArgumentError, "batches="),
    ({"plan": {"criterion": "rms", **HALF}, "batches": 3}, ArgumentError, "batches="),
    ({"plan": FISHER, "batches": [X]}, ArgumentError, "loss_fn=None is not allowed: expected a function"),
    ({"plan": FISHER, "batches": BATCHES, "loss_fn": lambda m, b: torch.zeros(())}, MeasurementError, ""),
    ({"plan": FISHER, "batches": broken()}, OSError, "the disk is gone"),
    ({"compensation": "mean"}, ArgumentError, "batches=None is not allowed: expected some batches to calibrate on"),
    ({"compensation": "mean", "batches": []}, ArgumentError, "batches=[]"),
    ({"compensation": "mean", "batches": X}, ArgumentError, "batches="),
    ({"compensation": "means"}, ArgumentError, "'mean', 'none'; did you mean 'mean'?"),
    ({"plan": {"cnv1": [0]}}, UnknownNameError, "plan: nothing matches 'cnv1'. Did you mean 'conv1'"),
    ({"plan": {"conv1": [0], "fc1": [7]}}, ArgumentError, "neurons of 0 to 6 in 'fc1'"),
    ({"plan": PruningPlan({"fc1": (0,)}, widths={"fc1": 8})}, ArgumentError, "made for 8 neurons in 'fc1'"),
    ({"plan": {"conv1": [0], "fc1": range(7)}}, PruningError, "fc1 cannot lose 7 of its 7 neurons: at least 1"),
    ({"plan": {"conv1": [0], "fc2": [0]}}, PruningError, "fc2 cannot be cut: its neurons are the model's output"),
    ({"example": X[:2, :1]}, PruningError, "cannot be traced"),
    ({"optimizer": "adam"}, ArgumentError, "optimizer='str' is not allowed: expected a torch.optim.Optimizer"),
    ({"optimizer": torch.optim.SGD(net().parameters())}, ArgumentError, "one that holds parameters of this model"),
]


@for_each("given, error, named", REFUSALS)
def test_what_is_refused_changes_nothing(given, error, named):
    model = net().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    cross_entropy(model, BATCHES[0]).backward()
    optimizer.step()
    before, random = state_of(model, optimizer), torch.get_rng_state()
    options = {"example": X[:2], "plan": {"fc1": [0]}, "optimizer": optimizer, **given}
    with pytest.raises(error) as refused:
        prune(model, options.pop("example"), options.pop("plan"), **options)
    assert named in str(refused.value)
    after = state_of(model, optimizer)
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert torch.equal(torch.get_rng_state(), random)


@for_each("model", [ConvNet, None, lambda x: x])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(ArgumentError, match=r"model=.* is not allowed: expected a torch\.nn\.Module"):
        prune(model, X[:2], 0.5)
