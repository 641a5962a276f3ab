"""What a slip costs: a clear word, and nothing else."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import ArgumentError, PruningError, UnknownNameError, describe_structure, load_pruned, prune
from lightning_neurons.dependency.conform import conform
from tests.models import ConvNet, pictures, seeded
from tests.tables import for_each


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(3, 5), nn.Linear(11, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([torch.relu(self.left(a)), torch.relu(self.right(b))], 1))


def unchanged(net: nn.Module, x: Any, *arguments: Any, error: type[Exception], said: str, **options: Any) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(error, match=said):
        prune(net, x, *arguments, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@for_each("given", [1, 1.0])
def test_one_is_no_share_as_it_may_mean_one_neuron(given):
    unchanged(seeded(ConvNet), pictures(2)[0], given, error=ArgumentError, said="a share of neurons below 1")


def test_an_unknown_argument_of_a_budget_is_not_taken_for_a_layer():
    budget = {"criterion": "weight_l2", "ammount": 0.3}
    unchanged(seeded(ConvNet), pictures(2)[0], budget, error=UnknownNameError, said="Did you mean 'amount'")


def test_a_target_that_cannot_be_met_cuts_nothing_and_says_how_close_it_comes():
    budget = {"criterion": "weight_l2", "target_macs": 0.001}
    said = r"target_macs=0.001 is not reached: 0\.\d+ remain.*as narrow as min_neurons"
    unchanged(seeded(ConvNet), pictures(2)[0], budget, error=PruningError, said=said)


def lazy(*, norm: bool) -> nn.Module:
    middle = nn.LazyBatchNorm1d() if norm else nn.LazyLinear(6)
    return nn.Sequential(nn.Linear(4, 6), middle, nn.ReLU(), nn.Linear(6, 2))


@for_each("norm", [False, True])
def test_a_lazy_model_is_refused_by_name_until_it_has_seen_a_batch(norm):
    net, x = lazy(norm=norm), torch.randn(3, 4)
    for ask in (prune, describe_structure):
        with pytest.raises(ArgumentError, match=r"model='1: Lazy.*run one batch through the model first"):
            ask(net, x)
    net(x)
    assert prune(net, x, 0.5).widths["0"] == net[0].out_features == 3


@for_each("given", [None, "pictures", torch.zeros(0, 3, 8, 8)])
def test_example_inputs_are_at_least_one_sample(given):
    unchanged(seeded(ConvNet), given, 0.3, error=ArgumentError, said="example_inputs=.*at least one sample")


def test_batches_for_a_model_of_several_inputs_are_dicts():
    a, b = torch.randn(8, 4), torch.randn(8, 3)
    deadness = {"criterion": "rms", "amount": 0.3}
    unchanged(seeded(Two), (a, b), deadness, [(a, b)], error=ArgumentError, said="batches='tuple'.*dicts of keyword")
    net = seeded(Two)
    prune(net, (a, b), deadness, [{"a": a, "b": b, "label": torch.zeros(8, dtype=torch.int64)}], compensation="mean")
    assert (net.left.out_features, net.right.out_features) == (4, 3)


def test_indices_may_be_a_tensor():
    net = seeded(ConvNet)
    prune(net, pictures(2)[0], {"conv1": torch.tensor([1, 4])})
    assert net.conv1.out_channels == 4


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.fc1, self.fc2 = nn.Bilinear(4, 4, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(self.pairs(x, x))))


def test_what_is_not_counted_is_said():
    report = prune(seeded(Pairs), torch.randn(2, 4), {"criterion": "weight_l2", "target_macs": 0.5})
    assert "MACs are not counted in pairs: no formula is known for them" in report.notes


def test_an_empty_plan_says_so():
    assert prune(seeded(ConvNet), pictures(2)[0], {}).notes == ("nothing is cut: the plan is empty",)


@for_each("shapes", [{"conv1.weight": (6, 3, 5, 5)}, {"conv1.weight": (3, 3, 3, 3)}])
def test_a_file_that_differs_in_more_than_widths_or_contradicts_itself_is_left_for_torch_to_refuse(shapes, tmp_path):
    state = seeded(ConvNet).state_dict() | {name: torch.zeros(shape) for name, shape in shapes.items()}
    assert conform(seeded(ConvNet), state) == []
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(RuntimeError, match=re.escape("size mismatch for conv1.weight")):
        load_pruned(ConvNet, tmp_path / "net.pt")


def test_a_file_that_holds_no_weights_is_named(tmp_path):
    (tmp_path / "net.pt").write_text("else")
    with pytest.raises(ArgumentError, match=r"net\.pt"):
        load_pruned(ConvNet, tmp_path / "net.pt")
