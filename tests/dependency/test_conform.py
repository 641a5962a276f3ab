"""Models that are given the widths of a checkpoint."""

import random

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons.dependency.conform import conform, set_data
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover
from lightning_neurons.pruning.surgery.surgery import cut, cuts_of
from tests.models import NETS, CharTransformer, ConvNet, pictures, seeded
from tests.tables import for_each


def test_new_data_keeps_the_object_and_forgets_the_old_gradient():
    layer = nn.Linear(3, 5)
    layer(torch.ones(1, 3)).sum().backward()
    weight, new = layer.weight, torch.rand(4, 3)
    set_data(layer._parameters, "weight", new)
    assert layer.weight is weight
    assert weight.grad is None
    assert weight.data_ptr() == new.data_ptr()
    F.linear(torch.ones(1, 3), weight).sum().backward()
    assert weight.grad.shape == (4, 3)


class Spread(nn.Module):
    """Depthwise, transposed, slopes, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)
        self.slopes, self.scale = nn.PReLU(6), nn.Parameter(torch.rand(6, 1, 1))
        self.up, self.out = nn.ConvTranspose2d(6, 5, 2, 2), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slopes(self.norm(self.deep(self.conv(x)))) * self.scale
        return self.out(F.relu(self.up(x)))


class Listed(nn.Module):
    """Parameters of its own in torch's containers for them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)
        self.scales = nn.ParameterList([torch.rand(6, 1, 1)])
        self.shifts = nn.ParameterDict({"one": torch.rand(6, 1, 1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.conv(x) * self.scales[0] + self.shifts["one"]))


OWN = [("parameter", Spread), ("parameters in a list", Listed)]
NETWORKS = {name: (make, pictures()[0]) for name, make in [*NETS.items(), *OWN]}
NETWORKS["transformer"] = (lambda: CharTransformer(9), torch.arange(24).reshape(2, 12) % 9)


def narrowed(make, x: Tensor) -> nn.Module:
    """A model of which some units of every group have really been cut."""
    net, choose = seeded(make, seed=3), random.Random(0)
    structure = discover(net, Example(x))
    units = {r: choose.sample(range(g.size), max(1, (g.size - g.least) // 2)) for r, g in structure.offered.items()}
    cut(net, cuts_of(structure.groups.values(), units))
    return net


def sizes(net: nn.Module) -> list[str]:
    """What modules say of themselves."""
    return [str(module) for module in net.modules()]


def check_conforms(target: nn.Module, source: nn.Module, x: Tensor) -> None:
    state, objects = source.state_dict(), list(target.parameters())
    differ = [name for name, tensor in target.state_dict().items() if tensor.shape != state[name].shape]
    assert sorted(conform(target, state)) == sorted(differ) != []
    target.load_state_dict(state, strict=True)
    assert all(a is b for a, b in zip(objects, target.parameters(), strict=True))
    assert torch.equal(target(x), source(x))
    assert sizes(target) == sizes(source)
    target.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in target.parameters())


@for_each("name", NETWORKS)
def test_a_model_shrinks_to_a_checkpoint_and_grows_back(name):
    make, x = NETWORKS[name]
    wide, narrow = seeded(make, seed=5), narrowed(make, x)
    check_conforms(seeded(make), narrow, x)
    check_conforms(narrow.eval(), wide, x)


def test_names_may_begin_with_a_prefix():
    net, narrow = nn.Linear(3, 5), nn.Linear(3, 4)
    state = {f"net.{name}": tensor for name, tensor in narrow.state_dict().items()}
    assert conform(net, state) == []
    assert conform(net, state, prefix="net.") == ["weight", "bias"]
    assert net.out_features == 4


def test_what_is_missing_of_another_rank_or_no_tensor_is_left_alone():
    net = seeded(ConvNet)
    was = {name: t.clone() for name, t in net.state_dict().items()}
    state = {"conv1.weight": torch.zeros(4, 27), "fc1.bias": torch.zeros(()), "bn2.num_batches_tracked": torch.zeros(1)}
    state |= {"fc2.weight": "none", "other": torch.ones(1)}
    assert conform(net, state) == conform(net, {}) == []
    assert all(torch.equal(t, was[name]) for name, t in net.state_dict().items())


def test_a_model_that_fits_already_is_not_touched():
    net = seeded(ConvNet)
    held = [(t, t.data_ptr(), t.clone()) for t in (*net.parameters(), *net.buffers())]
    assert conform(net, seeded(ConvNet, seed=4).state_dict()) == []
    assert all(t.data_ptr() == at and torch.equal(t, was) for t, at, was in held)


def test_types_and_frozen_parameters_are_kept_and_checkpoints_of_another_type_fit():
    net, narrow = nn.Linear(3, 5).double(), nn.Linear(3, 4)
    net.weight.requires_grad_(False)
    conform(net, narrow.state_dict())
    net.load_state_dict(narrow.state_dict())
    assert (net.weight.dtype, net.weight.requires_grad, net.bias.requires_grad) == (torch.float64, False, True)


def test_layers_that_have_no_width_yet_are_left_to_be_materialised():
    net = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d())
    source = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    assert conform(net, source.state_dict()) == []
    net.load_state_dict(source.state_dict())
    assert net[0].weight.shape == (5, 3)


def test_tied_weights_are_resized_once_and_both_modules_say_so():
    net, source = nn.ModuleDict({"embed": nn.Embedding(7, 5), "head": nn.Linear(5, 7)}), nn.Embedding(7, 4)
    net["head"].weight = net["embed"].weight
    conform(net, {"embed.weight": source.weight.detach(), "head.weight": source.weight.detach()})
    assert net["head"].weight is net["embed"].weight
    assert (net["embed"].embedding_dim, net["head"].in_features) == (4, 4)
