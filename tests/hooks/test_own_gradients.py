"""Forwards that use autograd themselves: gradients are those of the loss, as zeros and factors on activations give."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import checkpoint

from lightning_neurons import measure
from lightning_neurons.errors import MeasurementError
from lightning_neurons.measurement.losses import fgsm
from lightning_neurons.measurement.passes import Passes
from tests.hooks.test_capture import Recorder
from tests.tables import for_each


class Net(nn.Module):
    """Two branches and a body; ``zeros`` collects a zero and a factor on every activation, to differentiate by."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h, self.o = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 5), nn.Linear(5, 2)
        self.act = nn.Tanh()
        self.zeros: list[tuple[str, Tensor, Tensor, Tensor]] | None = None
        self.own = (self.a.weight,)

    def point(self, name: str, value: Tensor) -> Tensor:
        if self.zeros is None or not torch.is_grad_enabled() or self.a.weight is not self.own[0]:
            return value  # a run with other weights is not the network's
        zero, factor = torch.zeros_like(value).requires_grad_(), torch.ones_like(value).requires_grad_()
        self.zeros.append((name, value.detach(), zero, factor))
        return (value + zero) * factor

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        both = self.point("a", self.act(self.a(x))) + self.point("b", F.softplus(self.b(z)))
        self.map = self.point("h", F.silu(self.h(both)))
        return self.point("o", self.o(self.map))


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def plain(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x, z), y, reduction="sum")


def attacked(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    start = x
    for _ in range(2):
        x = leaf(x)
        x = start + 0.1 * grad(plain(net, x, z, y), x)[0].sign()
    return plain(net, x.detach(), z, y)


def attacked_by_backward(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    x = leaf(x)
    torch.autograd.backward(plain(net, x, z, y))
    return plain(net, (x + 0.1 * x.grad.sign()).detach(), z, y)


def statistics_of_the_same_graph(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    x = leaf(x)
    loss = plain(net, x, z, y)
    net.seen = grad(loss, x)[0]  # and the graph is freed
    return loss


def backward_of_the_loss(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    loss = plain(net, x, z, y)
    loss.backward()
    net.seen = net.a.weight.grad.clone()
    return loss


def input_asks(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    return plain(net, leaf(x), z, y)


def penalty(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    x = leaf(x)
    out = net(x, z)
    (slope,) = grad(out.sum(), x, create_graph=True)
    return F.cross_entropy(out, y, reduction="sum") + (slope.norm(dim=1) - 1).square().sum()


def forces(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    x = leaf(x)
    (force,) = grad(net(x, z).square().sum(), x, create_graph=True)
    return (force[:, 0] + y).square().sum()


def second_derivative(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    x = leaf(x)
    (first,) = grad(net(x, z)[:, 0].sum(), x, create_graph=True)
    (second,) = grad(first[:, 0].sum(), x, create_graph=True)
    return (second[:, 1] + first[:, 2] - y).square().sum()


def slope_of_the_weights(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    loss = plain(net, x, z, y)
    slopes = grad(loss, [p for p in net.parameters() if p.requires_grad], create_graph=True)
    return loss + sum(s.square().sum() for s in slopes)


def adapted_weights(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    weights = dict(net.named_parameters())
    slopes = grad(plain(net, x, z, y), list(weights.values()), create_graph=True)
    moved = {name: w - 0.1 * s for (name, w), s in zip(weights.items(), slopes, strict=True)}
    return F.cross_entropy(torch.func.functional_call(net, moved, (x, z)), y, reduction="sum")


def two_calls(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    grad(plain(net, leaf(x), z, y), net.a.weight)
    return (net(x, z) - net(x.flip(0), z)).square().sum()


def jacobians(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    for vectorized in (False, True):
        jacobian = torch.autograd.functional.jacobian(lambda x: net(x, z).sum(0), x, vectorize=vectorized)
    net.seen = jacobian
    return plain(net, x, z, y)


def forward_mode(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    with warnings.catch_warnings(), torch.autograd.forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own
        out = net(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), z)
        net.seen = torch.autograd.forward_ad.unpack_dual(out).tangent
    return plain(net, x, z, y)


def seen_map(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    out = net(x, z)
    net.seen = grad(out[:, 0].sum(), net.map)[0]
    return F.cross_entropy(out, y, reduction="sum") + net.map.square().sum()


def checkpointed(net: Net, x: Tensor, z: Tensor, y: Tensor, reentrant: bool) -> Tensor:
    return F.cross_entropy(checkpoint(net, x, z, use_reentrant=reentrant), y, reduction="sum")


def reversed_gradient(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    out = net(x, z)
    turned = out * 1
    turned.register_hook(torch.neg)
    return F.cross_entropy(out, y, reduction="sum") + turned.square().sum()


LOSSES = [
    plain, attacked, attacked_by_backward, statistics_of_the_same_graph, backward_of_the_loss, input_asks, penalty,
    forces, second_derivative, slope_of_the_weights, adapted_weights, two_calls, jacobians, forward_mode, seen_map,
    reversed_gradient, partial(checkpointed, reentrant=True), partial(checkpointed, reentrant=False),
]  # fmt: skip


def data() -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, generator=made).double(), torch.randn(6, 2, generator=made).double(), torch.arange(6) % 2


def fresh() -> Net:
    torch.manual_seed(0)
    net = Net().double().eval()
    net.a.weight.grad = torch.ones_like(net.a.weight)
    return net


def by_hand(loss) -> tuple[dict[str, list[tuple[Tensor, Tensor, Tensor]]], Tensor | None]:
    """Activation, gradient and derivative by factors of each call that the loss depends on; what the loss saw."""
    net = fresh()
    net.zero_grad()
    net.zeros = []
    # A checkpointed function would add its zeros again.
    value = plain(net, *data()) if isinstance(loss, partial) else loss(net, *data())
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for name, activation, zero, factor in net.zeros:
        slope, by_factor = grad(value, [zero, factor], retain_graph=True, allow_unused=True)
        if by_factor is not None:
            slope = torch.zeros_like(by_factor) if slope is None else slope
            found.setdefault(name, []).append((activation, slope, by_factor))
    return found, getattr(net, "seen", None)


def measured(net: Net, loss) -> Recorder:
    recorder = Recorder(net)
    Passes(net, [recorder]).differentiate(lambda batch: loss(net, *batch), data(), observe=True)
    return recorder


@for_each("loss", LOSSES)
def test_gradients_are_those_of_the_returned_loss_alone(loss):
    (expected, seen), net = once_retained(loss), fresh()
    found = measured(net, loss)
    assert set(found.gradients) == set(expected)
    for name, calls in expected.items():
        assert len(found.gradients[name]) == len(calls)
        for (value, slope), by_factor, right in zip(found.gradients[name], found.by_factor[name], calls, strict=True):
            torch.testing.assert_close(value, right[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(slope, right[1], rtol=0, atol=1e-10)
            torch.testing.assert_close(by_factor, right[2], rtol=0, atol=1e-10)
    if seen is not None:
        torch.testing.assert_close(net.seen, seen, rtol=0, atol=1e-12)
    assert all(p.requires_grad for p in net.parameters())
    assert [n for n, p in net.named_parameters() if p.grad is not None] == ["a.weight"]
    assert torch.equal(net.a.weight.grad, torch.ones_like(net.a.weight))


def once_retained(loss):
    """The reference differentiates graphs that the loss has freed: there, they are retained."""
    freeing = torch.autograd.graph._engine_run_backward

    def retaining(outputs, slopes, retain, *others, **named):
        return freeing(outputs, slopes, True, *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "_engine_run_backward", retaining)
        return by_hand(loss)


def test_activity_is_told_once_although_the_forward_starts_anew_with_its_parameters():
    found = measured(fresh(), backward_of_the_loss)
    assert {name: len(values) for name, values in found.activations.items()} == {"a": 1, "b": 1, "h": 1, "o": 1}


def test_what_a_second_derivative_saves_of_an_activation_function_is_no_use_of_its_value():
    """tanh keeps its result for its slope; a change behind it does not change that slope."""
    net, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh()).double(), torch.randn(4, 2).double()
    recorder = Recorder(net)

    def loss(batch: Tensor) -> Tensor:
        x = leaf(batch)
        out = net(x)
        return grad(out.sum(), x, create_graph=True)[0].square().sum() + out.square().sum()

    Passes(net, [recorder]).differentiate(loss, x)
    ((value, slope),) = recorder.gradients["0"]
    torch.testing.assert_close(slope, 2 * value)


def test_forces_are_ranked_by_what_a_factor_on_a_neuron_does_to_them():
    """Of one hidden layer: a neuron's value is not in the slope, its factor is."""
    net, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double(), torch.randn(4, 2).double()

    def loss(model: nn.Module, batch: Tensor, factor: Tensor | float = 1.0) -> Tensor:
        x = leaf(batch)
        energy = model(x) if isinstance(factor, float) else model[2](factor * model[1](model[0](x)))
        return grad(energy.sum(), x, create_graph=True)[0].square().sum()

    factors = torch.ones(4, 3).double().requires_grad_()
    (expected,) = grad(loss(net, x, factors), factors)
    report = measure(net, [x], loss_fn=loss, loss_reduction="sum", criteria=["fisher"])
    torch.testing.assert_close(report.scores["fisher"]["0"], expected.square().mean(0) / 2)


def hooked(kind: str, module: nn.Module, hear) -> list:
    """Backward hooks of one kind, which double what passes where they may."""
    double = lambda module, slopes, outputs: hear() or tuple(s if s is None else 2 * s for s in slopes)
    if kind == "full":
        return [m.register_full_backward_hook(double) for m in module.modules()]
    if kind == "pre":
        return [m.register_full_backward_pre_hook(lambda m, slopes: hear()) for m in module.modules()]
    if kind == "deprecated":
        return [m.register_backward_hook(lambda *arguments: hear()) for m in module.children()]
    if kind == "global full":
        return [nn_module.register_module_full_backward_hook(double)]
    return [nn_module.register_module_full_backward_pre_hook(lambda m, slopes: hear())]


KINDS = ["full", "pre", "deprecated", "global full", "global pre"]


def own_backward_of_hidden_values(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    plain(net, leaf(x), leaf(z), y).backward()
    return plain(net, x, z, y)


@for_each("kind", KINDS)
def test_backward_hooks_change_nothing_and_hear_of_no_backward_but_the_forwards_own(kind):
    expected = {loss: once_retained(loss)[0] for loss in (plain, own_backward_of_hidden_values)}
    net, heard = fresh(), []
    handles = hooked(kind, net, lambda: heard.append(1))
    try:
        for loss, right in expected.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what torch says of the deprecated kind
                loss(net, *data())
                alone = len(heard)
                heard.clear()
                recorder = Recorder(net)
                passes = Passes(net, [recorder])
                passes.find(lambda batch: net(*batch[:2]), data())
                passes.differentiate(lambda batch, loss=loss: loss(net, *batch), data())
            assert len(heard) == alone
            assert (alone > 0) == (loss is not plain)
            heard.clear()
            for name, calls in right.items():
                assert len(recorder.gradients[name]) == len(calls)
                for (value, slope), right in zip(recorder.gradients[name], calls, strict=True):
                    torch.testing.assert_close(value, right[0])
                    torch.testing.assert_close(slope, right[1])
    finally:
        for handle in handles:
            handle.remove()


def test_activation_points_are_found_and_watched_behind_backward_hooks():
    net, plain_net = fresh(), fresh()
    for module in net.modules():
        module.register_full_backward_hook(lambda *arguments: None)
    found, expected = Recorder(net), Recorder(plain_net)
    for model, recorder in ((net, found), (plain_net, expected)):
        passes = Passes(model, [recorder])
        for _ in range(2):  # traced, then watched
            with passes.observe():
                model(*data()[:2])
    assert found.layers == expected.layers
    assert [str(link) for link in found.layers["a"].chain] == ["tanh (act)"]
    for name, values in expected.activations.items():
        assert len(found.activations[name]) == len(values) == 2
        assert all(torch.equal(*pair) for pair in zip(found.activations[name], values, strict=True))


@for_each("asks", ["first", "hidden"])
def test_activations_that_require_gradients_by_themselves_make_no_difference(asks):
    expected, net = measured(fresh(), plain).gradients, fresh()
    (net.a if asks == "first" else net.act).register_forward_hook(lambda m, inputs, output: output.requires_grad_(True))
    found = measured(net, plain).gradients
    assert set(found) == set(expected)
    for name, calls in expected.items():
        assert torch.equal(found[name][0][1], calls[0][1])


def test_a_value_that_a_hook_of_the_users_keeps_is_the_one_that_is_differentiated():
    net, kept = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double(), []
    net[0].register_forward_hook(lambda module, inputs, output: kept.append(output))
    recorder, x = Recorder(net), torch.randn(4, 3).double()
    Passes(net, [recorder]).differentiate(lambda batch: net(batch).sum() + kept[-1].square().sum(), x)
    expected = net[1].weight.sum(0) + 2 * net[0](x)
    torch.testing.assert_close(recorder.gradients["0"][0][1], expected.detach())


def test_views_and_values_that_are_written_into_are_differentiated():
    """A leaf, one of several views, a view from within no_grad, and a residual sum in place."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Half(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.one(x)
            hidden += x[:, :1]
            return self.two(hidden)

    class Half(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([F.linear(x, self.weight)] * 2, 1).chunk(2, 1)[0].view_as(x[:, :2])

    net, x = Odd().double(), torch.randn(4, 3).double()
    recorder = Recorder(net)
    Passes(net, [recorder]).differentiate(lambda batch: net(batch).square().sum(), x)
    hidden = leaf(F.linear(x, net.one.weight))
    (expected,) = grad(net.two(hidden + x[:, :1]).square().sum(), hidden)
    torch.testing.assert_close(recorder.gradients["one"][0][1], expected)
    torch.testing.assert_close(recorder.gradients["one"][0][0], hidden.detach())


def test_a_loss_of_other_values_is_refused_and_nothing_stays_behind():
    net, names = fresh(), ("_get_backward_hooks", "_get_backward_pre_hooks")
    before = [vars(nn.Module)[name] for name in names], dict(vars(torch.utils.checkpoint))
    with pytest.raises(MeasurementError, match="does not depend on any watched layer"):
        measured(net, lambda net, x, z, y: net(x, z).detach().sum() + leaf(x).sum())
    with pytest.raises(ZeroDivisionError):
        measured(net, lambda net, x, z, y: backward_of_the_loss(net, x, z, y) / 0 if 1 // 0 else None)
    assert before == ([vars(nn.Module)[name] for name in names], dict(vars(torch.utils.checkpoint)))
    assert all(p.requires_grad for p in net.parameters())


def test_inputs_are_shifted_against_losses_that_use_gradients():
    net, (x, z, y) = fresh(), data()
    net.a.register_full_backward_hook(lambda module, slopes, outputs: tuple(s if s is None else -s for s in slopes))
    shifted = fgsm(net, lambda batch: statistics_of(net, *batch), (x, z, y), 0.25)[0]
    inputs = leaf(x)
    (expected,) = grad(plain(fresh(), inputs, z, y), inputs)
    torch.testing.assert_close(shifted, x + 0.25 * expected.sign())


def statistics_of(net: Net, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
    loss = plain(net, x, z, y)
    grad(loss, x) if x.requires_grad else None
    return loss
