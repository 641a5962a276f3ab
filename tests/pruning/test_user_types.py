"""Layers of users' own types are cut as if sliced by hand, measured and compensated as those that they stand for."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import PruningError, measure, prune
from lightning_neurons.dependency.conform import conform
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover
from tests.pruning.user_types import (
    Adapted,
    Conv1D,
    CountingNorm,
    Frozen,
    FrozenFeatures,
    Smoothed,
    StandardizedConv,
)
from tests.tables import for_each

GONE, KEEP, WIDTH = [1, 4, 6], [0, 2, 3, 5, 7], 8
FEATURES, MAPS = (3, 6, 4), (2, 3, 7, 7)
NETS: dict[str, tuple[Any, tuple[int, ...], str, dict[str, int]]] = {  # how to build, input, what is cut, where it lies
    "transposed linear": (
        lambda n: nn.Sequential(Conv1D(n, 4), nn.GELU(), Conv1D(8, n), nn.GELU(), Conv1D(3, 8)), FEATURES, "0",
        {"0.weight": 1, "0.bias": 0, "2.weight": 0},
    ),
    "square transposed linear": (
        lambda n: nn.Sequential(Conv1D(8, 4), nn.GELU(), Conv1D(n, 8), nn.GELU(), Conv1D(3, n)), FEATURES, "2",
        {"2.weight": 1, "2.bias": 0, "4.weight": 0},
    ),
    "frozen norm": (
        lambda n: nn.Sequential(nn.Conv2d(3, n, 3), Frozen(n), nn.ReLU(), nn.Conv2d(n, 2, 3)), MAPS, "0",
        {"0.weight": 0, "0.bias": 0, "3.weight": 1}
        | {f"1.{name}": 0 for name in ("weight", "bias", "running_mean", "running_var")},
    ),
    "frozen features": (
        lambda n: nn.Sequential(nn.Linear(4, n), FrozenFeatures(n), nn.Tanh(), nn.Linear(n, 2)), FEATURES, "0",
        {"0.weight": 0, "0.bias": 0, "1.scale": 0, "1.mean": 2, "3.weight": 1},
    ),
    "standardised filters": (
        lambda n: nn.Sequential(StandardizedConv(3, n, 3), nn.ReLU(), nn.Conv2d(n, 2, 3)), MAPS, "0",
        {"0.weight": 0, "0.bias": 0, "0.gain": 0, "2.weight": 1},
    ),
    "scales of both sides": (
        lambda n: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Smoothed(8, n), nn.ReLU(), Smoothed(n, 3)), FEATURES, "2",
        {"2.weight": 0, "2.bias": 0, "2.scale": 0, "4.weight": 1, "4.smooth": 0},
    ),
    "low rank": (
        lambda n: nn.Sequential(Adapted(4, n), nn.ReLU(), Adapted(n, 3)), FEATURES, "0",
        {"0.weight": 0, "0.bias": 0, "0.up": 0, "2.weight": 1, "2.down": 1},
    ),
    "norm with a further buffer": (
        lambda n: nn.Sequential(nn.Conv2d(3, n, 3), CountingNorm(n), nn.ReLU(), nn.Conv2d(n, 2, 3)), MAPS, "0",
        {"0.weight": 0, "0.bias": 0, "3.weight": 1}
        | {f"1.{name}": 0 for name in ("weight", "bias", "running_mean", "running_var", "seen")},
    ),
}  # fmt: skip


def built(name: str) -> tuple[nn.Module, nn.Module, Tensor, str]:
    """A network, the same sliced by hand, inputs, and the layer that is cut."""
    make, shape, layer, where = NETS[name]
    net, small = make(WIDTH).double().eval(), make(len(KEEP)).double().eval()
    sliced = {n: t.index_select(where[n], torch.tensor(KEEP)) if n in where else t for n, t in net.state_dict().items()}
    small.load_state_dict(sliced)
    return net, small, torch.randn(shape).double(), layer


def numbers(net: nn.Module) -> list[dict[str, Any]]:
    return [{n: v for n, v in vars(module).items() if type(v) is int} for module in net.modules()]


@for_each("name", NETS)
def test_a_layer_of_a_users_type_is_cut_as_if_sliced_by_hand(name):
    net, small, x, layer = built(name)
    whole = copy.deepcopy(net)
    report = prune(net, x, {layer: GONE})
    torch.testing.assert_close(net(x), small(x), atol=1e-12, rtol=0)
    assert numbers(net) == numbers(small)
    assert report.cost.parameters_after == sum(p.numel() for p in small.parameters())
    assert report.cost.macs_after == discover(small, Example(x)).costs.macs()
    conform(whole, small.state_dict())
    whole.load_state_dict(small.state_dict())
    torch.testing.assert_close(whole(x), small(x), atol=1e-12, rtol=0)
    assert numbers(whole) == numbers(small)


def test_without_an_input_standardised_filters_are_others():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), StandardizedConv(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    with pytest.raises(PruningError, match=r"^0 cannot be cut: .*differs from that with silenced neurons"):
        prune(net, torch.randn(MAPS), {"0": [0]})


def twins() -> tuple[nn.Module, nn.Module]:
    """A network of transposed linear layers, and the same of nn.Linear."""
    net = nn.Sequential(Conv1D(8, 4), nn.GELU(), Conv1D(6, 8), nn.ReLU(), Conv1D(3, 6)).double().eval()
    twin = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    twin.load_state_dict({name: tensor.t() for name, tensor in net.state_dict().items()})
    return net, twin


def test_transposed_linear_layers_are_measured_as_linear_ones():
    net, twin = twins()
    criteria = ["taylor", "fisher", "rms", "weight_l1", "weight_l2", "outgoing_l2", "apoz"]
    data = [(torch.randn(7, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2, 0])) for _ in range(3)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    one, other = (measure(model, data, loss_fn=loss, criteria=criteria) for model in (net, twin))
    for name, by_layer in other.scores.items():
        for layer, scores in by_layer.items():
            torch.testing.assert_close(one.scores[name][layer], scores)
    assert one.scores.keys() == other.scores.keys() >= {"taylor", "weight_l1", "outgoing_l2"}


@for_each("how", ["least_squares", "mean"])
def test_transposed_linear_layers_are_compensated_as_linear_ones(how):
    net, twin = twins()
    x = torch.randn(40, 4).double()
    for model in (net, twin):
        prune(model, x, {"0": [1, 5, 6], "2": [0]}, [x], compensation=how)
    torch.testing.assert_close(net(x), twin(x), atol=1e-10, rtol=0)


def frozen_twins() -> tuple[nn.Module, nn.Module]:
    """A network with frozen norms behind convolutions without a bias, and the same with batch norms."""

    def built(norm: Any) -> nn.Module:
        first, second = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 6, 3, bias=False)
        return nn.Sequential(first, norm(8), nn.ReLU(), second, norm(6), nn.ReLU(), nn.Conv2d(6, 2, 1)).double().eval()

    net, twin = built(Frozen), built(nn.BatchNorm2d)
    twin.load_state_dict(net.state_dict(), strict=False)  # but for numbers of batches
    return net, twin


@for_each("how", ["least_squares", "mean"])
def test_behind_frozen_norms_layers_are_compensated_as_behind_batch_norms(how):
    net, twin = frozen_twins()
    before, x = copy.deepcopy(net), torch.randn(12, 3, 8, 8).double()
    reports = [prune(model, x, {"0": [1, 5, 6], "3": [0]}, [x], compensation=how) for model in (net, twin)]
    torch.testing.assert_close(net(x), twin(x), atol=1e-10, rtol=0)
    assert reports[0].notes == reports[1].notes
    assert not torch.equal(net[4].running_mean, before[4].running_mean[1:])


def test_layers_are_chosen_by_reconstruction_before_frozen_norms_as_before_batch_norms():
    net, twin = frozen_twins()
    x = torch.randn(12, 3, 8, 8).double()
    plans = [prune(model, x, {"criterion": "reconstruction", "target_macs": 0.5}, [x]).plan for model in (net, twin)]
    assert plans[0].neurons == plans[1].neurons
    torch.testing.assert_close(net(x), twin(x), atol=1e-10, rtol=0)
