"""Modules that a graph could misread: one slope for all channels, norm layers under in-place functions, two names."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_neurons import prune
from tests.models import pictures, seeded
from tests.tables import for_each


class Joining(nn.Module):
    """What a layer makes goes into a concatenation and into another branch of it."""

    def __init__(self, norm: Callable[[], nn.Module], function: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.a, self.norm, self.function = nn.Conv2d(3, 8, 3), norm(), function()
        self.b, self.c, self.d = nn.Conv2d(8, 6, 1), nn.Conv2d(14, 9, 1), nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self.norm(self.a(x)))
        return self.d(torch.relu(self.c(torch.cat([h, self.b(h)], 1))))


NORMS = {
    "affine": lambda: nn.InstanceNorm2d(8, affine=True),
    "tracked": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
    "batch": lambda: nn.BatchNorm2d(8),
}
FUNCTIONS = {
    "one slope": nn.PReLU,
    "slopes": lambda: nn.PReLU(8),
    "in place": lambda: nn.ReLU(inplace=True),
}


@for_each("function", FUNCTIONS.values())
@for_each("norm", NORMS.values())
def test_what_stands_in_front_of_a_concatenation_is_cut_exactly(norm, function):
    net, (x, _) = seeded(Joining, norm, function, double=True), pictures(3, double=True)
    silent = copy.deepcopy(net)
    prune(net, x, {"a": [1, 6], "b": [0], "c": [8]})
    with torch.no_grad():  # what reads the neurons that have gone is zero
        silent.b.weight[:, [1, 6]], silent.c.weight[:, [1, 6, 8]], silent.d.weight[:, [8]] = 0, 0, 0
        assert (net.a.out_channels, net.b.out_channels, net.c.in_channels) == (6, 5, 11)
        assert torch.allclose(net(x), silent(x), rtol=0, atol=1e-12)


class Sometimes(nn.Module):
    """Only training runs the auxiliary head; a scale and an attention are used without running all of their modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.auxiliary = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.mix, self.scales = nn.MultiheadAttention(4, 1, batch_first=True), nn.ParameterList([torch.ones(8)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x[:, None], x[:, None], x[:, None])[0][:, 0]
        h = torch.relu(self.a(x)) * self.scales[0]
        return self.b(h) + (self.auxiliary(h) if self.training else 0)


@for_each("plan", [{"a": [0, 3]}, 0.25])
def test_modules_with_parameters_that_did_not_run_are_named(plan):
    report = prune(seeded(Sometimes), torch.randn(3, 4), plan)
    assert len(report.plan.neurons["a"]) == 2
    said = "did not run, so not cut with what they may read in training: auxiliary.0, auxiliary.1"
    assert [note for note in report.notes if note.startswith("did not run")] == [said]


@for_each("register", [Tensor.register_hook, Tensor.register_post_accumulate_grad_hook])
def test_hooks_on_gradients_are_named(register):
    net = seeded(Sometimes)
    register(net.a.weight, lambda gradient: None)
    said = "hooks on gradients may count on the number of neurons, and are left as they are: a.weight"
    assert said in prune(net, torch.randn(3, 4), {"a": [0, 3]}).notes


class TwoNames(nn.Module):
    def __init__(self, *, later: bool) -> None:
        super().__init__()
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        parts = {"backbone": net[:3], "net": net}
        for name in sorted(parts, reverse=later):
            self.add_module(name, parts[name])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@for_each("later", [False, True])
def test_a_module_with_two_names_is_one_module(later):
    net, x = seeded(TwoNames, later=later, double=True), torch.randn(3, 4).double()
    plain = copy.deepcopy(net.net)
    prune(plain, x, 0.5)
    report = prune(net, x, 0.5)
    assert [len(gone) for gone in report.plan.neurons.values()] == [4, 3]
    assert net.backbone[0] is net.net[0]
    assert net.backbone[0].out_features == 4
    assert torch.equal(net(x), plain(x))
