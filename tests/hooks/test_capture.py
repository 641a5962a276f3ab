"""What is delivered while a model runs: the same activations and gradients as written out by hand."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons.layers.layer import candidates
from lightning_neurons.measurement.passes import Passes
from tests.models import NETS, ConvNet, Recurrent, ResidualNet, pictures, seeded
from tests.tables import for_each


class Recorder:
    """A receiver that keeps copies of everything, by kind of pass and layer."""

    def __init__(self, model: nn.Module, layers=None) -> None:
        self.modules = candidates(model, layers)
        self.activations: dict[str, list[Tensor]] = {}
        self.gradients: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.by_factor: dict[str, list[Tensor]] = {}

    def learn(self, layers) -> None:
        self.layers = dict(layers)

    def receive(self, layer, activation, gradient, need, inner=None) -> None:
        assert not activation.requires_grad
        if gradient is None:
            self.activations.setdefault(layer, []).append(activation.clone())
        else:
            self.gradients.setdefault(layer, []).insert(0, (activation.clone(), gradient.clone()))
            self.by_factor.setdefault(layer, []).insert(0, activation * gradient + (0 if inner is None else inner))


def loss_of(model: nn.Module, y: Tensor):
    return lambda x: F.cross_entropy(model(x), y, reduction="sum")


def differentiated(model: nn.Module, x: Tensor, y: Tensor) -> Recorder:
    recorder = Recorder(model)
    Passes(model, [recorder]).differentiate(loss_of(model, y), x, observe=True)
    return recorder


@for_each("name", NETS)
def test_gradients_and_activations_equal_those_written_by_hand(name):
    net = seeded(NETS[name], double=True)
    x, y = pictures(double=True)
    by_hand, logits = net.by_hand(x)
    loss = F.cross_entropy(logits, y, reduction="sum")
    expected = {n: torch.autograd.grad(loss, values, retain_graph=True) for n, values in by_hand.items()}
    recorder = differentiated(net, x, y)
    assert set(recorder.gradients) == set(by_hand)
    for layer, values in by_hand.items():
        assert len(recorder.gradients[layer]) == len(recorder.activations[layer]) == len(values)
        for call, (value, gradient) in enumerate(zip(values, expected[layer], strict=True)):
            torch.testing.assert_close(recorder.activations[layer][call], value.detach(), rtol=0, atol=1e-12)
            torch.testing.assert_close(recorder.gradients[layer][call][0], value.detach(), rtol=0, atol=1e-12)
            torch.testing.assert_close(recorder.gradients[layer][call][1], gradient, rtol=0, atol=1e-12)


@for_each("name", NETS)
def test_the_first_forward_that_is_watched_delivers_the_same_as_later_ones(name):
    net = seeded(NETS[name], double=True)
    x, _ = pictures(double=True)
    by_hand, _ = net.by_hand(x)
    recorder = Recorder(net)
    passes = Passes(net, [recorder])
    for _ in range(2):
        recorder.activations.clear()
        with torch.no_grad(), passes.observe():
            net(x)
        for layer, values in by_hand.items():
            for seen, value in zip(recorder.activations[layer], values, strict=True):
                torch.testing.assert_close(seen, value.detach(), rtol=0, atol=1e-12)


@for_each("name", NETS)
def test_the_models_output_is_bitwise_the_same_while_it_is_watched(name):
    net, (x, y) = seeded(NETS[name]), pictures()
    outputs = [net(x).detach()]
    passes = Passes(net, [Recorder(net)])

    def loss(inputs: Tensor) -> Tensor:
        outputs.append(net(inputs))
        return F.cross_entropy(outputs[-1], y)

    for _ in range(2):
        with torch.no_grad(), passes.observe():
            outputs.append(net(x))
    passes.differentiate(loss, x)
    assert len(outputs) == 4
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_activation_times_gradient_equals_the_gradients_by_scale_and_shift_of_the_norm():
    """The gate identity: sum(a g) = gamma dL/dgamma + beta dL/dbeta, through a rectifier as well."""
    net = seeded(ResidualNet, inplace=True, double=True)
    x, y = pictures(double=True)
    recorder = differentiated(net, x, y)
    loss_of(net, y)(x).backward()
    for layer, norm in (("conv1", net.bn1), ("conv2", net.bn2), ("conv3", net.bn3)):
        ((activation, gradient),) = recorder.gradients[layer]
        expected = norm.weight * norm.weight.grad + norm.bias * norm.bias.grad
        torch.testing.assert_close((activation * gradient).sum((0, 2, 3)), expected.detach(), rtol=0, atol=1e-12)


def test_frozen_parameters_make_no_difference():
    net, (x, y) = seeded(ConvNet), pictures()
    expected = differentiated(net, x, y).gradients
    net.requires_grad_(False)
    found = differentiated(net, x, y).gradients
    assert not any(p.requires_grad for p in net.parameters())
    for layer, calls in expected.items():
        assert torch.equal(found[layer][0][1], calls[0][1])


def test_inputs_that_require_gradients_make_no_difference_and_get_none():
    net, (x, y) = seeded(ConvNet), pictures()
    expected = differentiated(net, x, y).gradients
    x = x.clone().requires_grad_()
    found = differentiated(net, x, y).gradients
    assert x.grad is None
    assert set(found) == set(expected)
    for layer, calls in expected.items():
        assert torch.equal(found[layer][0][1], calls[0][1])


def test_no_gradient_is_written_to_any_parameter_and_old_ones_stay():
    net, (x, y) = seeded(Recurrent), pictures()
    net.start.weight.grad = torch.ones_like(net.start.weight)
    differentiated(net, x, y)
    assert torch.equal(net.start.weight.grad, torch.ones_like(net.start.weight))
    assert all(p.grad is None for n, p in net.named_parameters() if n != "start.weight")


class PartlyWithoutGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.aside, self.head = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(self.body(x.mean((2, 3))))
        self.aside(x)
        return self.head(x)


def test_a_part_under_no_grad_has_activations_and_the_rest_its_gradients():
    net, (x, y) = seeded(PartlyWithoutGradients), pictures()
    recorder = differentiated(net, x, y)
    assert set(recorder.activations) == {"body", "aside", "head"}
    assert set(recorder.gradients) == {"head"}


def test_integer_inputs_are_followed_through_an_embedding():
    net = nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 5), nn.GELU(), nn.Flatten(), nn.Linear(10, 4)).double()
    codes, y = torch.randint(0, 9, (6, 2)), torch.arange(6) % 4
    recorder = differentiated(net, codes, y)
    hidden = net[2](net[1](net[0](codes)))
    (expected,) = torch.autograd.grad(F.cross_entropy(net[4](hidden.flatten(1)), y, reduction="sum"), [hidden])
    torch.testing.assert_close(recorder.gradients["1"][0][1], expected, rtol=0, atol=1e-12)


def test_each_receiver_hears_of_its_own_layers_only():
    net, (x, y) = seeded(ConvNet), pictures()
    one, other = Recorder(net, ["conv*"]), Recorder(net, ["fc1"])
    Passes(net, [one, other]).differentiate(loss_of(net, y), x)
    assert (set(one.gradients), set(other.gradients)) == ({"conv1", "conv2"}, {"fc1"})
    assert (set(one.layers), set(other.layers)) == ({"conv1", "conv2"}, {"fc1"})
