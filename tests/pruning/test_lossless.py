"""Only what makes no difference goes: neurons that are dead or constant, and the model stays the same function."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import ArgumentError, PruningBudget, PruningError, PruningPlan, prune
from lightning_neurons.pruning.selection import lossless
from tests.models import pictures, seeded
from tests.pruning.nets import NETS, MobileNet, SqueezeExcite, net_and_inputs
from tests.tables import for_each

X = pictures(12, double=True)[0]
BATCHES = [X[:5], X[5:]]
ROWS = torch.randn(600, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def silence(layer: nn.Module, neurons: list[int], value: float = 0.0) -> None:
    """Neurons that say the same to everything."""
    with torch.no_grad():
        layer.weight[neurons] = 0
        layer.bias[neurons] = value


def checked(model: nn.Module, x: Tensor, batches: list[Any] | None = None) -> Any:
    """Prune without loss; the function stays the same."""
    before = model(x)
    report = prune(model, x[:2], batches=[x[: len(x) // 2], x[len(x) // 2 :]] if batches is None else batches,
                   lossless=True)  # fmt: skip
    after = model(x)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    return report


def mlp(bias: bool = True) -> nn.Sequential:
    layers = [nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6, bias=bias), nn.ReLU(), nn.Linear(6, 3)]
    return nn.Sequential(*layers)


def test_dead_and_constant_neurons_go_and_no_others():
    model = seeded(mlp, double=True)
    silence(model[0], [1, 4], 0.7)
    silence(model[0], [6], -0.3)
    silence(model[2], [5])
    with torch.no_grad():
        model[2].bias[2] = -1e4  # never fires
    whole, bias = model[2].weight.detach().clone(), model[2].bias.detach().clone()
    report = checked(model, ROWS)
    assert report.plan.neurons == {"0": (1, 4, 6), "2": (2, 5)}
    expected = bias + 0.7 * (whole[:, 1] + whole[:, 4])  # what neurons 1 and 4 always say to the next layer
    assert torch.allclose(model[2].bias, expected[[0, 1, 3, 4]], atol=1e-12)
    assert torch.equal(model[2].weight, whole[[0, 1, 3, 4]][:, [0, 2, 3, 5, 7]])
    assert any("outputs on the calibration data differ by" in note for note in report.notes)


class Normed(nn.Module):
    """conv > norm > relu, twice; the convolution in between may have no bias, and pads in some way."""

    def __init__(self, padding: Any = 0, mode: str = "zeros", bias: bool = True, norm: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=padding, padding_mode=mode, bias=bias)
        self.bn2 = nn.BatchNorm2d(5) if norm else nn.Identity()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def with_scales(model: Normed, dead: int = 2, constant: int | None = 4) -> Normed:
    """One channel that is always 0, and one that is always 0.6."""
    with torch.no_grad():
        for unit, value in ((dead, -0.4), (constant, 0.6)):
            if unit is not None:
                model.bn1.weight[unit], model.bn1.bias[unit] = 0, value
    return model


FOLDED = {
    "no padding": {},
    "reflected": {"padding": 1, "mode": "reflect"},
    "replicated": {"padding": 1, "mode": "replicate"},
    "circular": {"padding": 1, "mode": "circular"},
    "same size, reflected": {"padding": "same", "mode": "reflect"},
}


@for_each("name", FOLDED)
def test_a_constant_channel_moves_into_the_bias_of_what_reads_it(name):
    model = with_scales(seeded(Normed, double=True, **FOLDED[name]))
    expected = model.conv2.bias + 0.6 * model.conv2.weight[:, 4].sum((1, 2))
    mean = model.bn2.running_mean.clone()
    assert checked(model, X).plan.neurons == {"conv1": (2, 4)}
    assert torch.allclose(model.conv2.bias, expected, atol=1e-12)
    assert torch.equal(model.bn2.running_mean, mean)


def test_without_a_bias_a_constant_moves_into_the_mean_of_the_norm_behind():
    model = with_scales(seeded(Normed, double=True, bias=False))
    expected = model.bn2.running_mean - 0.6 * model.conv2.weight[:, 4].sum((1, 2))
    assert checked(model, X).plan.neurons == {"conv1": (2, 4)}
    assert torch.allclose(model.bn2.running_mean, expected, atol=1e-12)
    assert model.conv2.bias is None


@for_each("padding", [1, (1, 0), "same"])
def test_at_a_zero_padded_border_a_constant_stays_and_the_dead_go(padding):
    model = with_scales(seeded(Normed, double=True, padding=padding))
    report = checked(model, X)
    assert report.plan.neurons == {"conv1": (2,)}
    wanted = "conv1: 1 constant neurons stay: at its zero-padded border, conv2 reads 0 instead of the constant"
    assert wanted in report.notes


def test_without_a_bias_and_a_norm_a_constant_stays_and_the_dead_go():
    model = with_scales(seeded(Normed, double=True, bias=False, norm=False))
    report = checked(model, X)
    assert report.plan.neurons == {"conv1": (2,)}
    assert any(note.startswith("conv1: 1 constant neurons stay: conv2 has no bias") for note in report.notes)
    linear = seeded(mlp, False, double=True)
    silence(linear[0], [3], 0.5)
    silence(linear[0], [5], -0.5)
    report = checked(linear, ROWS)
    assert report.plan.neurons == {"0": (5,)}
    assert any(note.startswith("0: 1 constant neurons stay: 2 has no bias") for note in report.notes)


@for_each("name", ["DenseNet", "decoder", "joined", "MLP", "tokens", "transformer"])
def test_where_nothing_is_constant_nothing_goes(name):
    model, x = net_and_inputs(name)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    report = checked(model, x, [x])
    assert report.plan.neurons == {}
    assert any("nothing" in note or "constant" in note for note in report.notes), report.notes
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@for_each("name", NETS)
def test_networks_stay_the_same_function(name):
    model, x = net_and_inputs(name)
    assert not {"head", "linear", "fc3", "out"} & checked(model, x, [x]).plan.neurons.keys()


def test_dead_and_constant_units_of_squeeze_and_excitation_go():
    model = seeded(lambda: MobileNet(squeeze=12, act=nn.Hardswish), double=True)
    block = next(module for module in model.modules() if isinstance(module, SqueezeExcite))
    path = next(name for name, module in model.named_modules() if module is block)
    with torch.no_grad():
        block.fc1.weight[1], block.fc1.bias[1] = 0, -1.0
        block.fc1.weight[2], block.fc1.bias[2] = 0, 0.8
        expected = block.fc2.bias + 0.8 * block.fc2.weight[:, 2, 0, 0]
        block.fc1.bias[[0, *range(3, 12)]] = 9.0  # the others always fire
    assert checked(model, X).plan.neurons[f"{path}.fc1"] == (1, 2)
    assert block.fc1.out_channels == 10
    assert torch.allclose(block.fc2.bias, expected, atol=1e-12)


STREAM = {"conv1", "layer1.0.conv2", "layer1.1.conv2"}


@for_each("norms", [1, 2, 3])
def test_a_residual_channel_goes_only_where_all_that_is_added_to_it_is_dead(norms):
    model = seeded(NETS["ResNet B"], double=True)
    with torch.no_grad():
        for number, name in enumerate(("bn1", "layer1.0.bn2", "layer1.1.bn2")):
            norm, dead = model.get_submodule(name), number < norms
            norm.weight[1], norm.bias[1] = 0 if dead else 1, 0 if dead else 2
    plan = checked(model, X).plan.neurons
    assert {name for name in STREAM if 1 in plan.get(name, ())} == (STREAM if norms == 3 else set())


class Stream(nn.Module):
    """Two convolutions added to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.a(x) + self.b(x)).mean((2, 3)))


def test_coupled_neurons_go_where_their_sum_is_constant():
    model = seeded(Stream, double=True)
    silence(model.a, [0, 2, 5], 0.25)
    silence(model.b, [2, 3, 5], 0.5)
    expected = model.head.bias + 0.75 * (model.head.weight[:, 2] + model.head.weight[:, 5])
    assert checked(model, X).plan.neurons == {"a": (2, 5), "b": (2, 5)}
    assert torch.allclose(model.head.bias, expected, atol=1e-12)


def test_what_is_another_constant_in_each_batch_is_none():
    model = seeded(mlp, double=True)
    with torch.no_grad():
        model[0].weight[2] = torch.tensor([1.0, 0, 0, 0, 0])  # reads a column that says which batch it is
        model[0].bias[2] = 0
        silence(model[0], [5], 1.0)
    batches = [ROWS[:300].clone(), ROWS[300:].clone()]
    batches[0][:, 0], batches[1][:, 0] = 1.0, 2.0
    joined = torch.cat(batches)
    assert checked(model, joined, batches).plan.neurons == {"0": (5,)}
    other = seeded(mlp, double=True)
    with torch.no_grad():
        other[0].weight[2], other[0].bias[2] = torch.tensor([1.0, 0, 0, 0, 0]), 0
    assert checked(other, joined[:300], [joined[:300]]).plan.neurons == {"0": (2,)}  # it knows of no other


BROKEN = {
    "a fold that goes wrong": ("fold_means", lambda *_: SimpleNamespace(shifts={"2.bias": torch.full((6,), 0.1)})),
    "nothing is near enough": ("TOLERANCE", -1.0),
    "outputs that are no numbers": ("difference", lambda *_: float("nan")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_where_the_proof_fails_nothing_is_changed(monkeypatch, name):
    model = seeded(mlp, double=True).train()
    silence(model[0], [1], 0.7)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    monkeypatch.setattr(lossless, *BROKEN[name])
    with pytest.raises(PruningError, match="nothing was changed: without the constant neurons, outputs would differ"):
        prune(model, ROWS[:2], None, [ROWS], optimizer, lossless=True)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


REFUSED = [
    ({"plan_or_budget": 0.5}, "plan_or_budget=0.5 is not allowed: expected None with lossless=True"),
    ({"plan_or_budget": PruningPlan.from_indices({"0": [1]})}, "plan_or_budget="),
    ({"plan_or_budget": PruningBudget("weight_l2", amount=0.5)}, "plan_or_budget="),
    ({"compensation": "mean"}, "compensation='mean' is not allowed: expected nothing with lossless=True"),
    ({"batches": None}, "batches=None is not allowed: expected some batches to prove it on"),
    ({"batches": []}, "batches=.* is not allowed: expected some batches to prove it on"),
    ({"lossless": 1}, "lossless=1 is not allowed: expected True or False"),
    ({"reestimate_norms": True}, "reestimate_norms=True"),
]


@for_each("given, message", REFUSED)
def test_what_contradicts_it_is_refused(given, message):
    model = seeded(mlp, double=True)
    silence(model[0], [1], 0.7)
    with pytest.raises(ArgumentError, match=message):
        prune(model, ROWS[:2], **({"batches": [ROWS], "lossless": True} | given))
    assert model[0].out_features == 8
