"""What ``prune`` keeps: its defaults for compensation, what contradicts, and the model after every error."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from lightning_neurons import ArgumentError, PruningError, UnknownNameError, prune
from tests.models import ConvNet, cross_entropy, pictures, seeded
from tests.pruning.nets import NETS
from tests.tables import for_each

X, Y = pictures(24)
BATCHES = [(X[:10], Y[:10]), (X[10:], Y[10:])]
PLAN = {"conv1": [1, 4], "fc1": [0, 3]}
RECONSTRUCTION = {"criterion": "reconstruction", "amount": 0.4}


def net() -> ConvNet:
    return seeded(ConvNet)


def cut_by(how: str | None, plan=PLAN, batches=BATCHES, **options) -> dict[str, torch.Tensor]:
    model = net()
    given = {} if how is None else {"compensation": how}
    prune(model, X[:2], plan, batches, **given, **options)
    return model.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@for_each("plan", [PLAN, 0.3, RECONSTRUCTION, {"criterion": "fisher", "target_macs": 0.6}])
def test_with_batches_it_is_least_squares_and_not_another_one(plan):
    found = cut_by(None, plan)
    assert same(found, cut_by("least_squares", plan))
    assert not any(same(found, cut_by(how, plan)) for how in ("patch_least_squares", "mean", "none"))


@for_each("batches", [None, [], iter(())])
def test_without_batches_there_is_none(batches):
    found = cut_by(None, batches=batches)
    assert same(found, cut_by("none"))
    stay = {"conv1": [0, 2, 3, 5], "fc1": [1, 2, 4, 5, 6]}
    assert torch.equal(found["fc1.weight"], net().fc1.weight[stay["fc1"]])
    assert torch.equal(found["conv2.weight"], net().conv2.weight[:, stay["conv1"]])
    assert torch.equal(found["bn2.running_mean"], net().bn2.running_mean)


@for_each("how", ["least_squares", "patch_least_squares", "mean"])
def test_batches_may_be_read_once_and_need_no_targets(how):
    expected = cut_by(how)
    assert same(cut_by(how, batches=iter(BATCHES)), expected)
    assert same(cut_by(how, batches=[X[:10], X[10:]]), expected)
    assert same(cut_by(how, batches=({"x": x, "label": y} for x, y in BATCHES)), expected)


def failing(model: nn.Module, batch) -> torch.Tensor:
    raise ZeroDivisionError("in the loss")


def broken():
    yield BATCHES[0]
    raise OSError("the disk is gone")


WRONG = [(X[:4], Y[:4]), (X[:4, :2], Y[:4])]
REFUSALS = {
    "compensation without batches": (
        {"batches": None, "compensation": "least_squares"},
        ArgumentError,
        "batches=None is not allowed: expected some batches to calibrate on, with compensation='least_squares'.",
    ),
    "patches without batches": (
        {"batches": [], "compensation": "patch_least_squares"},
        ArgumentError,
        "some batches to calibrate on, with compensation='patch_least_squares'.",
    ),
    "means without batches": ({"batches": None, "compensation": "mean"}, ArgumentError, "with compensation='mean'."),
    "unknown": ({"compensation": "leastsquares"}, ArgumentError, "did you mean 'least_squares'?"),
    "unknown patches": ({"compensation": "patch_squares"}, ArgumentError, "did you mean 'patch_least_squares'?"),
    "no name": (
        {"compensation": True},
        ArgumentError,
        "expected one of 'least_squares', 'patch_least_squares', 'mean'",
    ),
    "lossless and a plan": ({"lossless": True}, ArgumentError, "expected None with lossless=True"),
    "lossless and a compensation": (
        {"plan": None, "lossless": True, "compensation": "mean"},
        ArgumentError,
        "compensation='mean' is not allowed: expected nothing with lossless=True",
    ),
    "lossless without batches": ({"plan": None, "lossless": True, "batches": None}, ArgumentError, "to prove it on"),
    "lossless is no flag": ({"lossless": 1}, ArgumentError, "lossless=1 is not allowed: expected True or False"),
    "nothing asked": ({"plan": None}, ArgumentError, "plan_or_budget=None is not allowed"),
    "norms without batches": ({"batches": [], "reestimate_norms": True}, ArgumentError, "with reestimate_norms=True"),
    "unknown criterion": (
        {"plan": {"criterion": "reconstuction", "amount": 0.5}},
        UnknownNameError,
        "Did you mean 'reconstruction'",
    ),
    "reconstruction without batches": ({"plan": RECONSTRUCTION, "batches": None}, ArgumentError, "'reconstruction'"),
    "negative threshold": (
        {"plan": {"criterion": "reconstruction", "threshold": -0.1}},
        ArgumentError,
        "threshold=-0.1 is not allowed: expected a share of the variance",
    ),
    "unknown scope": ({"plan": {**RECONSTRUCTION, "scope": "layers"}}, ArgumentError, "did you mean 'layer'?"),
    "unknown layer": ({"plan": {"cnv1": [0]}}, UnknownNameError, "Did you mean 'conv1'"),
    "out of reach": ({"plan": {"criterion": "reconstruction", "target_macs": 0.001}}, PruningError, "is not reached"),
    "broken batches": ({"batches": broken()}, OSError, "the disk is gone"),
    "a batch of another shape": ({"batches": WRONG}, RuntimeError, "channels"),
    "the same, by reconstruction": ({"batches": WRONG, "plan": RECONSTRUCTION}, RuntimeError, "channels"),
    "the same, by patches": ({"batches": WRONG, "compensation": "patch_least_squares"}, RuntimeError, "channels"),
    "a loss that fails": ({"loss_fn": failing, "reestimate_norms": True}, ZeroDivisionError, "in the loss"),
    "a loss that fails between scopes": ({"plan": RECONSTRUCTION, "loss_fn": failing}, ZeroDivisionError, "the loss"),
}


@for_each("name", REFUSALS)
def test_what_is_refused_or_fails_changes_nothing(name):
    options, error, said = REFUSALS[name]
    model = net().train()
    model.bn1.eval()
    optimizer = torch.optim.Adam(model.parameters())
    cross_entropy(model, (X, Y)).backward()
    optimizer.step()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: (t.clone(), None if t.grad is None else t.grad.clone()) for name, t in tensors.items()}
    state, modes, random = copy.deepcopy(optimizer.state_dict()), str_of(model), torch.get_rng_state()
    given = {"plan": PLAN, "batches": BATCHES, **options}
    with pytest.raises(error) as refused:
        prune(model, X[:2], given.pop("plan"), given.pop("batches"), optimizer, **given)
    assert said in str(refused.value)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, (tensor, gradient) in before.items():
        assert after[name] is tensors[name]
        assert torch.equal(after[name], tensor)
        assert gradient is None or torch.equal(after[name].grad, gradient)
    for entry, moments in state["state"].items():
        assert all(torch.equal(v, optimizer.state_dict()["state"][entry][n]) for n, v in moments.items())
    assert str_of(model) == modes
    assert torch.equal(torch.get_rng_state(), random)


def str_of(model: nn.Module) -> list:
    return [(n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), str(m)) for n, m in model.named_modules()]


def with_dead(layers) -> ConvNet:
    """Neurons 1 and 4 of some layers never fire."""
    model = net()
    with torch.no_grad():
        for layer in layers:
            last = model.get_submodule({"conv1": "bn1", "conv2": "bn2"}.get(layer, layer))
            last.weight[[1, 4]], last.bias[[1, 4]] = 0, 0
    return model


@for_each("how", [None, "least_squares", "patch_least_squares", "mean"])
@for_each("layers", [["conv1"], ["conv2"], ["fc1"], ["conv1", "conv2", "fc1"]])
def test_without_dead_neurons_every_other_weight_is_what_it_was_to_the_bit(how, layers):
    model, expected = with_dead(layers), with_dead(layers)
    x = pictures(200)[0]
    plan = {layer: [1, 4] for layer in layers}
    prune(expected, x[:2], plan)
    prune(model, x[:2], plan, [x[:70], x[70:]], compensation=how)
    assert [n for n, t in model.state_dict().items() if not torch.equal(t, expected.state_dict()[n])] == []
    with torch.no_grad():
        torch.testing.assert_close(model(x), with_dead(layers)(x), rtol=1e-5, atol=1e-5)


@for_each("name", ["MLP", "tokens"])
def test_patches_of_linear_layers_are_what_they_read(name):
    x = torch.randint(0, 11, (30, 5)) if name == "tokens" else X
    plan = {"fc1": [1, 2, 6]} if name == "tokens" else {"1": [1, 2], "3": [0]}
    found = []
    for how in ("least_squares", "patch_least_squares"):
        model = seeded(NETS[name])
        report = prune(model, x[:2], plan, [x], compensation=how)
        found.append((model.state_dict(), report.notes, report.plan))
    assert same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    with torch.no_grad():
        assert not same(found[0][0], copy.deepcopy(seeded(NETS[name])).state_dict())


@for_each("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@for_each("how", ["least_squares", "patch_least_squares"])
def test_in_whatever_context_the_result_is_the_same_and_can_be_trained(context, how):
    model = net().train()
    with context():
        prune(model, X[:2], PLAN, BATCHES, compensation=how, reestimate_norms=True)
    assert same(model.state_dict(), cut_by(how, reestimate_norms=True))
    assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    cross_entropy(model, BATCHES[0]).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_batches_are_left_as_they_are():
    batches = [(x.clone(), y.clone()) for x, y in BATCHES]
    cut_by("least_squares", RECONSTRUCTION, batches, reestimate_norms=True)
    assert all(
        torch.equal(a, b)
        for ours, theirs in zip(batches, BATCHES, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
