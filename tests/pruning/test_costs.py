"""Parameters and operations, counted by hand and on models that were really cut."""

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from lightning_neurons import prune
from lightning_neurons.dependency.torch_pruning_adapter import Group, Part
from lightning_neurons.pruning.structure.costs import Costs, costs_of, effects, removed_by
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import Structure, discover
from lightning_neurons.pruning.surgery.surgery import TensorCut, cut, cuts_of
from tests.models import NETS, CharTransformer, pictures
from tests.tables import for_each


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.again, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.again(self.start(x)).relu()).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.embed(codes))


class ByKeyword(nn.Module):
    """Names the inputs of its layers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


class Attention(nn.Module):
    """Heads of 3 values, several of queries for one of keys; in a kernel of the user's choice."""

    def __init__(self, kernel: SDPBackend, heads: int = 4, groups: int = 4) -> None:
        super().__init__()
        self.q, self.kv, self.kernel = nn.Linear(5, 3 * heads), nn.Linear(5, 6 * groups), kernel

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, 3)).transpose(1, 2) for t in (self.q(x), *self.kv(x).chunk(2, -1)))
        with sdpa_kernel(self.kernel):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], is_causal=True)


class WithItself(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention, self.kwargs = nn.MultiheadAttention(6, 2, batch_first=True), kwargs

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, **self.kwargs)[0]


class Packed(nn.Module):
    """Reads one step less of each sample than of the one before."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        lengths = [x.shape[1] - i for i in range(len(x))]
        return self.layer(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[0].data


def recurrent(gates: int, steps: int, inputs: int, hidden: int, layers: int, directions: int) -> int:
    wide = [inputs] + [directions * hidden] * (layers - 1)
    return sum(gates * hidden * (width + hidden) * steps * directions for width in wide)


def attended(width: int, tokens: int) -> int:
    """Four projections; queries times keys, and weights times values."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width


def block() -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 9, batch_first=True)


PICTURE = (3, 9, 9)
BY_HAND: dict[str, tuple[Any, Any, int, int]] = {  # a model, the shape of a sample, parameters, MACs
    "conv": (lambda: nn.Conv2d(3, 8, 3), PICTURE, 8 * 27 + 8, 7 * 7 * 8 * 27),
    "conv without bias": (lambda: nn.Conv2d(3, 8, 3, bias=False), PICTURE, 8 * 27, 7 * 7 * 8 * 27),
    "stride and padding": (lambda: nn.Conv2d(3, 8, 3, 2, 1), PICTURE, 224, 5 * 5 * 8 * 27),
    "oblong": (lambda: nn.Conv2d(3, 8, (1, 5), padding=(0, 2), stride=(3, 1)), PICTURE, 8 * 15 + 8, 3 * 9 * 8 * 15),
    "dilation": (lambda: nn.Conv2d(3, 8, 3, dilation=2), PICTURE, 224, 5 * 5 * 8 * 27),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3), PICTURE, 27 + 3, 7 * 7 * 27),
    "two groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 9, 9), 6 * 18 + 6, 7 * 7 * 6 * 18),
    "sequence": (lambda: nn.Conv1d(3, 8, 4, 2), (3, 10), 8 * 12 + 8, 4 * 8 * 12),
    "space": (lambda: nn.Conv3d(3, 2, 2), (3, 4, 4, 4), 2 * 24 + 2, 27 * 2 * 24),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 4, 2), PICTURE, 3 * 5 * 16 + 5, 81 * 3 * 5 * 16),
    "transposed, groups": (lambda: nn.ConvTranspose2d(4, 6, 2, 2, groups=2), (4, 3, 3), 4 * 3 * 4 + 6, 9 * 4 * 3 * 4),
    "linear": (lambda: nn.Linear(4, 5), (4,), 25, 20),
    "tokens": (lambda: nn.Linear(4, 5), (7, 4), 25, 7 * 20),
    "norms": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.InstanceNorm2d(3, affine=True), nn.PReLU(3)), PICTURE, 15, 0
    ),
    "a whole net": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 2)),
        PICTURE, 112 + 8 + 394, 49 * 108 + 392,
    ),
    "one layer twice": (Twice, PICTURE, 112 + 148 + 10, 49 * 108 + 2 * 49 * 144 + 8),
    "tied weights": (Tied, (5,), 36, 5 * 36),
    "LSTM": (lambda: nn.LSTM(3, 5, batch_first=True), (7, 3), 4 * 5 * (3 + 5 + 2), recurrent(4, 7, 3, 5, 1, 1)),
    "LSTM, two ways": (
        lambda: nn.LSTM(3, 5, 2, batch_first=True, bidirectional=True), (7, 3),
        2 * 20 * (3 + 5 + 2) + 2 * 20 * (10 + 5 + 2), recurrent(4, 7, 3, 5, 2, 2),
    ),
    "GRU": (
        lambda: nn.GRU(3, 5, 2, batch_first=True, bidirectional=True), (7, 3),
        2 * 15 * (3 + 5 + 2) + 2 * 15 * (10 + 5 + 2), recurrent(3, 7, 3, 5, 2, 2),
    ),
    "RNN": (lambda: nn.RNN(3, 5, batch_first=True), (7, 3), 5 * (3 + 5 + 2), recurrent(1, 7, 3, 5, 1, 1)),
    "cell": (lambda: nn.LSTMCell(3, 5), (3,), 4 * 5 * (3 + 5 + 2), recurrent(4, 1, 3, 5, 1, 1)),
    "attention": (WithItself, (7, 6), 4 * 42, attended(6, 7)),
    "attention, weights unasked": (lambda: WithItself(need_weights=False), (7, 6), 4 * 42, attended(6, 7)),
    "encoder": (
        lambda: nn.TransformerEncoder(block(), 2), (7, 6),
        2 * (4 * 42 + 63 + 60 + 24), 2 * (attended(6, 7) + 7 * 2 * 54),
    ),
    "flash": (
        lambda: Attention(SDPBackend.FLASH_ATTENTION), (7, 5), 12 * 6 + 24 * 6, 7 * 36 * 5 + 2 * 49 * 12
    ),
    "flash, shared keys": (
        lambda: Attention(SDPBackend.FLASH_ATTENTION, groups=2), (7, 5), 12 * 6 + 12 * 6, 7 * 24 * 5 + 2 * 49 * 12
    ),
    "written out, shared keys": (
        lambda: Attention(SDPBackend.MATH, groups=2), (7, 5), 12 * 6 + 12 * 6, 7 * 24 * 5 + 2 * 49 * 12
    ),
    "named inputs": (lambda: ByKeyword(nn.Conv2d(3, 8, 3)), PICTURE, 224, 49 * 8 * 27),
    "named inputs, transposed": (lambda: ByKeyword(nn.ConvTranspose2d(3, 5, 2, 2)), PICTURE, 65, 81 * 60),
}  # fmt: skip


@for_each("batch", [1, 3])
@for_each("name", BY_HAND)
def test_parameters_and_operations_are_those_counted_by_hand(name, batch):
    make, shape, parameters, macs = BY_HAND[name]
    x = torch.zeros(batch, *shape, dtype=torch.long if name == "tied weights" else torch.float)
    net = make().eval().requires_grad_(False)
    costs = costs_of(net, Example(x))
    assert (costs.parameters(), costs.macs()) == (parameters, macs)
    assert not any(module._forward_hooks for module in net.modules())


def test_operations_are_known_by_layer():
    costs = costs_of(Twice().eval(), Example(torch.zeros(2, *PICTURE)))
    assert [costs.macs_of(f"{name}.weight") for name in ("start", "again", "head", "unknown")] == [5292, 14112, 8, 0]


@for_each("kind, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_of_sequences_of_several_lengths_the_steps_that_are_there_count(kind, gates):
    costs = costs_of(Packed(kind(3, 5)).eval(), Example(torch.zeros(3, 7, 3)))
    assert costs.macs() == recurrent(gates, 6, 3, 5, 1, 1)  # of 7 + 6 + 5 steps, a third
    assert costs.uncounted == ()


def test_a_projection_of_a_recurrent_layer_counts():
    net = nn.LSTM(3, 5, batch_first=True, proj_size=2).double()
    assert costs_of(net, Example(torch.zeros(2, 7, 3).double())).macs() == 7 * (20 * (3 + 2) + 10)


def test_a_kernel_for_all_layers_of_a_recurrent_network_counts_by_weight():
    net = nn.LSTM(3, 5, 2, bidirectional=True, device="meta")
    weights = [p for name, p in net.named_parameters() if "weight" in name]

    def run(_, x: Tensor) -> Tensor:  # as on a GPU: LSTM, time first, no dropout
        state = torch.zeros(4, 2, 5, device="meta")
        return torch.ops.aten._cudnn_rnn(
            x, weights, 2, None, state, state, 2, 5, 0, 2, False, 0.0, False, True, [], None
        )[0]  # fmt: skip

    costs = costs_of(net, Example(torch.zeros(7, 2, 3, device="meta"), run))
    assert {name: costs.positions[name] for name, p in net.named_parameters() if p.ndim > 1} == {
        name: 7 * 2 / 7 for name, p in net.named_parameters() if p.ndim > 1
    }
    assert costs.rest == 0


def test_a_recurrent_layer_counts_whatever_is_cut_behind_it():
    net = nn.Sequential(nn.LSTM(6, 4, batch_first=True), First(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    structure = discover(net, Example(torch.randn(2, 6, 6)))
    assert (structure.routed, structure.costs.uncounted, structure.costs.rest) == ((), (), 0)
    own = recurrent(4, 6, 6, 4, 1, 1)
    assert structure.costs.macs() == own + 6 * (20 + 10)
    assert structure.costs_without({"2": [0, 3]}) == structure.counted_without({"2": [0, 3]})
    assert structure.costs_without({"2": [0, 3]})[1] == own + 6 * (12 + 6)


@for_each("form", [lambda x: x, lambda x: (x,), lambda x: {"input": x}])
def test_inputs_of_any_form_count_the_same(form):
    assert costs_of(nn.Conv2d(3, 8, 3), Example(form(torch.zeros(2, *PICTURE)))).macs() == 49 * 216


def test_hooks_are_gone_when_the_forward_fails():
    net = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(RuntimeError):
        costs_of(net, Example(torch.zeros(2, 4)))
    assert not net[0]._forward_hooks


class Depthwise(nn.Module):
    """Depthwise, a sum, slopes, and a norm without tensors of its own to cut but statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm, self.slopes = nn.BatchNorm2d(6, affine=False), nn.PReLU(6)
        self.up, self.out = nn.ConvTranspose2d(6, 5, 2, 2), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.out(F.relu(self.up(self.slopes(x + self.norm(self.deep(x))))))


class Joined(nn.Module):
    """Two layers side by side; scaled by a parameter; flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.join, self.hidden, self.head = nn.Conv2d(9, 6, 3), nn.Linear(96, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = F.relu(self.join(x)) * self.scale
        return self.head(F.relu(self.hidden(x.flatten(1))))


EXAMPLES = {name: (make, pictures()[0]) for name, make in [*NETS.items(), ("depthwise", Depthwise), ("joined", Joined)]}
EXAMPLES["one layer twice"] = (Twice, pictures()[0])
EXAMPLES["transformer"] = (lambda: CharTransformer(9), torch.arange(24).reshape(2, 12) % 9)


def recount(net: nn.Module, x: Tensor) -> tuple[int, int]:
    """Half of what PyTorch's own counter says, with attention written out."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.enable_grad():
        net(x)
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2 // len(x)


def some_units(structure: Structure, seed: int) -> dict[str, list[int]]:
    choose, units = random.Random(seed), {}
    for root, group in structure.offered.items():
        count = choose.randint(0, group.size - group.least)
        if count:
            units[root] = choose.sample(range(group.size), count)
    return units


@for_each("name", EXAMPLES)
def test_costs_without_units_are_those_of_a_model_that_was_really_cut(name):
    make, x = EXAMPLES[name]
    net = make().eval()
    structure = discover(net, Example(x))
    assert structure.offered
    assert (structure.costs.parameters(), structure.costs.macs()) == recount(net, x) == structure.costs_without({})
    for seed in range(12):
        units = some_units(structure, seed)
        smaller = copy.deepcopy(net)
        cut(smaller, cuts_of(structure.groups.values(), units))
        assert structure.costs_without(units) == structure.counted_without(units) == recount(smaller, x), units


class Graph(nn.Module):
    """Means over neighbours, whose cost depends on a width; and a layer whose weight is given to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.given = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 7)
        self.register_buffer("neighbours", torch.rand(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.neighbours @ F.relu(self.first(x))
        return F.linear(F.relu(self.neighbours @ self.second(x)), self.given.weight, self.given.bias)


def normed() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Conv1d(6, 8, 3)), nn.ReLU(), nn.Conv1d(8, 7, 1), nn.ReLU(), nn.Conv1d(7, 2, 1))


class Scaled(nn.Linear):
    """Computes its weight anew in each call."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.5, self.bias)


WITHOUT_A_WEIGHT = {
    "graph": Graph,
    "weight norm": normed,
    "scaled": lambda: nn.Sequential(Scaled(6, 8), nn.ReLU(), Scaled(8, 5), nn.ReLU(), Scaled(5, 2)),
    "encoder": lambda: nn.Sequential(nn.TransformerEncoderLayer(6, 2, 9, batch_first=True), nn.Linear(6, 2)),
    "recurrent": lambda: nn.Sequential(nn.GRU(6, 4, batch_first=True), First(), nn.Linear(4, 5), nn.Linear(5, 2)),
}


class First(nn.Module):
    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return x[0]


@for_each("name", WITHOUT_A_WEIGHT)
def test_operations_without_a_weight_of_their_own_count_before_and_after_a_cut(name):
    net, x = WITHOUT_A_WEIGHT[name]().eval(), torch.randn(2, 6, 6)
    before = recount(net, x)
    structure = discover(net, Example(x))
    assert (structure.costs.parameters(), structure.costs.macs()) == before
    for seed in range(3):
        units = some_units(structure, seed)
        smaller = copy.deepcopy(net)
        cut(smaller, cuts_of(structure.groups.values(), units))
        assert structure.costs_without(units) == structure.counted_without(units) == recount(smaller, x)
    report = prune(net, x, {"criterion": "weight_l2", "amount": 0.4}, compensation="none")
    cost = report.cost
    assert (cost.parameters, cost.macs) == before
    assert (cost.parameters_after, cost.macs_after) == recount(net, x)
    assert cost.macs_after < cost.macs


def test_what_goes_is_counted_once_for_each_tensor_and_axis():
    group = Group(
        "conv", 3, (Part("conv", "makes", ((0,), (1,), (2,))), Part("fc", "reads", ((0, 1), (2, 3), (4, 5)))), {}
    )
    held = Group("scale", 2, (Part("scale", "holds", ((0,), (1,)), 0), Part("fc", "reads", ((6,), (7,)))), {})
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(2))
    modules = {"": model, "conv": nn.Conv2d(3, 3, 3), "fc": nn.Linear(8, 2)}
    by_root = {"conv": effects(group, modules), "scale": effects(held, modules)}
    removed = removed_by(by_root, {"conv": [0, 2], "scale": [1]})
    assert removed == {("conv.weight", 0): 2, ("conv.bias", 0): 2, ("fc.weight", 1): 5, ("scale", 0): 1}
    costs = Costs({"conv.weight": (3, 3, 3, 3), "fc.weight": (2, 8), "scale": (2,)}, {"fc.weight": 1.0})
    assert (costs.parameters(), costs.parameters(removed)) == (99, 27 + 6 + 1)
    assert (costs.macs(), costs.macs(removed)) == (16, 6)


def test_units_of_several_groups_become_one_cut_per_module_and_role():
    one = Group("a", 2, (Part("a", "makes", ((0,), (1,))), Part("c", "reads", ((0, 1), (2, 3)))), {})
    other = Group("b", 2, (Part("b", "makes", ((0,), (1,))), Part("c", "reads", ((4,), (5,)))), {})
    held = Group("d", 1, (Part("d.scale", "holds", ((2,),), 1),), {})
    assert cuts_of([one, other, held], {"a": [1], "b": [1, 0], "c": [], "d": [0]}) == [
        TensorCut("a", "makes", (1,)),
        TensorCut("c", "reads", (2, 3, 4, 5)),
        TensorCut("b", "makes", (0, 1)),
        TensorCut("d.scale", "holds", (2,), 1),
    ]
