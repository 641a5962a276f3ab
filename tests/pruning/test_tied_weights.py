"""A tensor that several modules have is cut once, as if sliced by hand, and stays one; or it is refused."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import PruningError, describe_structure, prune
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.preflight import silenced
from lightning_neurons.pruning.structure.structure import discover
from lightning_neurons.pruning.surgery.surgery import TensorCut
from tests.tables import for_each

GONE, KEEP = [0, 3, 7, 9], [1, 2, 4, 5, 6, 8, 10, 11]
CODES = torch.arange(15).reshape(3, 5) % 11


class Language(nn.Module):
    """A residual stream between an embedding and the output layer, which has its weights."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.up, self.down = nn.Linear(width, 9), nn.Linear(9, width)
        self.head = nn.Linear(width, 11)
        self.tie_weights()

    def tie_weights(self) -> None:
        self.head.weight = self.embedding.weight

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embedding(codes)
        return self.head(x + self.down(F.relu(self.up(x))))


class TwoNames(Language):
    """Its embedding has another name, and there is an embedding with the same weights that never runs."""

    def __init__(self, width: int = 12) -> None:
        super().__init__(width)
        self.embed_tokens = self.embedding
        self._modules = {"shared": nn.Embedding(11, width), **self._modules}
        self.shared.weight = self.embedding.weight


class Functional(nn.Module):
    """Reads its embedding's weights by functions: as the output layer, and as positions that are added."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(11, width), nn.Embedding(7, width)
        self.up, self.down = nn.Linear(width, 9), nn.Linear(9, width)
        self.shift = nn.Parameter(torch.randn(11))

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embedding(codes) + self.place.weight[: codes.shape[1]]
        return F.linear(x + self.down(F.relu(self.up(x))), self.embedding.weight, self.shift)


class Multiplied(Functional):
    """Reads them in products of other forms, and mixes words by them."""

    def __init__(self, width: int = 12) -> None:
        super().__init__(width)
        del self.place, self.shift

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embedding(codes)
        mixed = (x @ self.embedding.weight.T).softmax(-1) @ self.embedding.weight
        return torch.einsum("btd,vd->btv", x + self.down(F.relu(self.up(mixed))), self.embedding.weight)


class Alike(nn.Module):
    """Two layers side by side with the same weights."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.start, self.left, self.right = nn.Linear(4, 5), nn.Linear(5, width), nn.Linear(5, width)
        self.right.weight = self.left.weight
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.start(x))
        return self.head(F.relu(self.left(x)) * self.right(x))


AXES = {
    "embedding": 1,
    "shared": 1,
    "embed_tokens": 1,
    "place": 1,
    "up": 1,
    "down": 0,
    "left": 0,
    "right": 0,
    "head": 1,
}
NETS: dict[str, tuple[Any, Tensor, str]] = {
    "language": (Language, CODES, "down"),
    "two names": (TwoNames, CODES, "down"),
    "functional": (Functional, CODES, "down"),
    "multiplied": (Multiplied, CODES, "down"),
    "side by side": (Alike, torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double(), "left"),
}


def sliced(net: nn.Module, tensor: Tensor, name: str) -> Tensor:
    layer, _, leaf = name.rpartition(".")
    if layer in ("", "start") or (leaf == "bias" and AXES[layer] == 1):
        return tensor.clone()
    return tensor.index_select(AXES[layer], torch.tensor(KEEP)).clone()


def narrowed(net: Any) -> nn.Module:
    """The same network, made narrow and sliced by hand."""
    small = type(net)(len(KEEP)).double()
    with torch.no_grad():
        for (name, new), old in zip(small.named_parameters(), net.parameters(), strict=True):
            new.copy_(sliced(net, old, name))
    return small


@for_each("name", NETS)
def test_tied_weights_are_cut_once_as_if_sliced_by_hand_and_stay_tied(name):
    make, x, layer = NETS[name]
    net = make().double().eval()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(x).square().mean().backward()
    optimizer.step()
    reference, objects = narrowed(net), [id(p) for p in net.parameters()]
    moments = {n: sliced(net, optimizer.state[p]["exp_avg"], n) for n, p in net.named_parameters()}
    report = prune(net, x, {layer: GONE}, optimizer=optimizer)
    torch.testing.assert_close(net(x), reference(x), atol=1e-12, rtol=0)
    assert [id(p) for p in net.parameters()] == objects
    assert repr(net) == repr(reference)
    assert report.cost.parameters_after == sum(p.numel() for p in reference.parameters())
    assert report.cost.macs_after == discover(reference, Example(x)).costs.macs()
    for parameter, moment in zip(net.parameters(), moments.values(), strict=True):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
    for model, steps in ((net, optimizer), (reference, torch.optim.SGD(reference.parameters(), 0.1))):
        steps.zero_grad()
        model(x).square().mean().backward()
    for one, other in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=0)
    optimizer.step()


@for_each("name", NETS)
def test_predicted_costs_of_tied_weights_are_those_of_the_cut_model(name):
    make, x, layer = NETS[name]
    net = make().double().eval()
    structure = discover(net, Example(x))
    root, _ = structure.group_of(layer, 0)
    whole, small = structure.costs, discover(narrowed(net), Example(x)).costs
    assert (whole.parameters(), whole.macs()) == structure.costs_without({})
    assert structure.costs_without({root: GONE}) == (small.parameters(), small.macs())


def test_the_costs_of_a_head_of_tied_weights_are_told_of_the_head():
    layers = {k: v for b in describe_structure(Language(), CODES)["blocks"].values() for k, v in b["layers"].items()}
    assert layers["head"]["macs"] == 5 * 11 * 12
    assert layers["head"]["parameters"] == 11 * 12 + 11


def test_weights_of_an_embedding_are_not_changed_to_compensate_for_the_inputs_of_the_head():
    net = Language().double().eval()
    before = copy.deepcopy(net)
    report = prune(net, CODES, {"down": GONE}, [CODES])
    assert torch.equal(net.embedding.weight, before.embedding.weight[:, KEEP])
    assert not torch.equal(net.up.weight, before.up.weight[:, KEEP])
    assert "head is not compensated: embedding has the same weights" in report.notes


def test_silence_of_a_head_leaves_the_embedding_as_it_is():
    net = Language()
    before = net.embedding.weight.clone()
    with silenced(net, [TensorCut("head", "reads", (0, 3)), TensorCut("embedding", "makes", (0, 3))]):
        assert torch.equal(net.embedding.weight, before)
        assert torch.equal(net.head.weight, before.index_fill(1, torch.tensor([0, 3]), 0))
    assert net.head.weight is net.embedding.weight
    assert torch.equal(net.embedding.weight, before)


class Cosine(Language):
    """A head that reads directions: without a value, those of the others change."""

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(F.normalize(self.embedding(codes) + self.down(self.up(self.embedding(codes))), dim=-1))


class Square(nn.Module):
    """What one layer makes, another one with the same weights reads."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.one, self.other, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.other(F.relu(self.one(F.relu(self.start(x)))))))


REFUSED = [
    (Cosine, CODES, "down", "its neurons cannot be followed: linalgvectornorm makes one value of all of them"),
    (Language, CODES, "head", "its neurons are the model's output"),
    (
        Square,
        torch.zeros(2, 4),
        "start",
        "one.weight and other.weight are one parameter, and it would not be cut alike",
    ),
    (
        Square,
        torch.zeros(2, 4),
        "other",
        "other.weight and one.weight are one parameter, and it would not be cut alike",
    ),
]


@for_each("make, x, layer, reason", REFUSED)
def test_what_would_not_be_cut_alike_is_refused_with_both_names_and_stays_whole(make, x, layer, reason):
    net = make().eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(PruningError, match=f"^{layer} cannot be cut: {reason}"):
        prune(net, x, {layer: [0]})
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
