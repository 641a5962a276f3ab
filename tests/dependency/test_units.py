"""Units of several neurons: heads, groups and packed layers, each cut beside the same net with them at zero."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import PruningError, prune
from lightning_neurons.dependency.places import Places, combined, compressed
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover
from tests.models import seeded
from tests.tables import for_each

HEAD = 4


class Separate(nn.Module):
    """Attention with a layer each for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(12, 12) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, HEAD).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x)))
        return self.proj(y.transpose(1, 2).flatten(2))


class WrittenOut(Separate):
    """The same with products and a softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        y = (q @ k.mT / HEAD**0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(*x.shape[:2], -1))


class ByEinsum(Separate):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], -1, HEAD) for layer in (self.q, self.k, self.v))
        shares = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        return self.proj(torch.einsum("bhts,bshd->bthd", shares, v).flatten(2))


class OverChannels(Separate):
    """Keys and values are multiplied over positions, as in linear attention."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        return self.proj((q @ (k.mT @ v)).transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """Attention with one layer for queries, keys and values, and a bias for each head and distance."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.distances = nn.Parameter(torch.randn(9, 3))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).reshape(*x.shape[:2], 3, -1, HEAD).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        place = torch.arange(x.shape[1])
        bias = self.distances[(place[:, None] - place).add(4).flatten()].view(len(place), len(place), -1)
        y = ((q @ k.mT) + bias.permute(2, 0, 1)[None]).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(*x.shape[:2], -1))


class FusedByHead(Fused):
    """Each head has its queries, keys and values side by side."""

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).view(*x.shape[:2], -1, 3 * HEAD).transpose(1, 2).chunk(3, -1)


class Net(nn.Module):
    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.attention, self.head = attention(), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x))


ATTENTIONS = {cls.__name__: cls for cls in (Separate, WrittenOut, ByEinsum, OverChannels, Fused, FusedByHead)}
TOKENS = 2, 5, 12


def same(net: nn.Module, right: nn.Module, *inputs: Tensor) -> bool:
    return torch.allclose(net(*inputs), right(*inputs), rtol=1e-10, atol=1e-12)


def rows_of(attention: nn.Module, heads: list[int]) -> dict[str, list[int]]:
    """The neurons of some heads, by layer."""
    own = [HEAD * h + d for h in heads for d in range(HEAD)]
    if isinstance(attention, FusedByHead):
        return {"attention.qkv": [3 * HEAD * h + d for h in heads for d in range(3 * HEAD)]}
    if isinstance(attention, Fused):
        return {"attention.qkv": [12 * part + i for part in range(3) for i in own]}
    return {f"attention.{name}": own for name in "qkv"}


@for_each("name", ATTENTIONS)
def test_heads_are_units_and_a_cut_leaves_the_net_without_them(name):
    net, x = seeded(Net, ATTENTIONS[name], double=True), torch.randn(TOKENS).double()
    right = copy.deepcopy(net)
    rows = rows_of(net.attention, [1])
    root = next(iter(rows))
    group = discover(net, Example(x)).offered[root]
    assert group.size == 3
    assert group.neurons([1]) == rows
    report = prune(net, x, {root: rows[root][:1]}, compensation="none")  # a single neuron brings its head
    assert {layer: list(gone) for layer, gone in report.plan.neurons.items()} == rows
    with torch.no_grad():
        right.attention.proj.weight[:, HEAD : 2 * HEAD] = 0
    assert same(net, right, x)
    assert net.attention.proj.in_features == 2 * HEAD
    net(x).sum().backward()


@for_each("name", ATTENTIONS)
def test_a_budget_counts_heads_and_keeps_one(name):
    net, x = seeded(Net, ATTENTIONS[name], double=True), torch.randn(TOKENS).double()
    report = prune(net, x, {"criterion": "weight_l2", "amount": 0.99}, compensation="none")
    assert net.attention.proj.in_features == HEAD
    assert net(x).isfinite().all()
    assert all(
        len(gone) in (2 * HEAD, 6 * HEAD) for n, gone in report.plan.neurons.items() if n.startswith("attention")
    )


class Tower(nn.Module):
    """Convolutions around one that is tried."""

    def __init__(self, *middle: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.start, self.middle, self.end = nn.Conv2d(3, 8, 1), nn.Sequential(*middle), nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(F.relu(self.middle(F.relu(self.start(x)))))


def blocks(count: int, size: int) -> list[tuple[int, ...]]:
    return [tuple(range(size * i, size * (i + 1))) for i in range(count)]


TOWERS = {
    "norm by groups": (lambda: Tower(nn.GroupNorm(4, 8)), {"start": blocks(4, 2)}),
    "norm without scales": (lambda: Tower(nn.GroupNorm(4, 8, affine=False)), {"start": blocks(4, 2)}),
    "convolution by groups": (
        lambda: Tower(nn.Conv2d(8, 12, 3, groups=4), width=12),
        {"start": blocks(4, 2), "middle.0": blocks(4, 3)},
    ),
    "transposed": (
        lambda: Tower(nn.ConvTranspose2d(8, 12, 2, groups=4), width=12),
        {"start": blocks(4, 2), "middle.0": blocks(4, 3)},
    ),
    "transposed without bias": (
        lambda: Tower(nn.ConvTranspose2d(8, 12, 2, groups=4, bias=False), width=12),
        {"start": blocks(4, 2), "middle.0": blocks(4, 3)},
    ),
    "both": (
        lambda: Tower(nn.Conv2d(8, 12, 3, groups=4), nn.GroupNorm(2, 12), width=12),
        {"start": blocks(2, 4), "middle.0": blocks(2, 6)},
    ),
    "pixels of channels": (lambda: Tower(nn.PixelShuffle(2), width=2), {"start": blocks(2, 4)}),
    "a filter or more for each channel": (
        lambda: Tower(nn.Conv2d(8, 16, 3, groups=8), width=16),
        {"start": blocks(8, 1), "middle.0": blocks(8, 2)},
    ),
}


@for_each("name", TOWERS)
def test_groups_of_channels_are_units_and_a_cut_leaves_the_net_without_them(name):
    make, layers = TOWERS[name]
    net, x = seeded(make, double=True), torch.randn(2, 3, 6, 6).double()
    right = copy.deepcopy(net)
    group = discover(net, Example(x)).offered["start"]
    assert {layer: list(units) for layer, units in group.layers.items()} == layers
    gone = group.neurons([1])
    prune(net, x, {"start": gone["start"]}, compensation="none")
    reads = next(part.indices[1] for part in group.parts if part.path == "end")
    with torch.no_grad():
        right.end.weight[:, list(reads)] = 0
    assert same(net, right, x)
    assert net.start.out_channels == 8 - len(gone["start"])
    prune(net, x, {"criterion": "weight_l2", "amount": 0.3}, compensation="none")  # what is left can be cut again
    net(x).sum().backward()


def test_shuffled_channels_are_followed():
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.end = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.left(x), self.right(x)], 1)
            return self.end(F.relu(x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)))

    net, x = seeded(Shuffled, double=True), torch.randn(2, 3, 4, 4).double()
    found = discover(net, Example(x))
    reads = {p.path: list(p.indices) for p in found.groups["left"].parts if p.role == "reads"}
    assert reads == {"end": [(0,), (2,), (4,), (6,)]}


def test_reversed_single_channels_are_followed():
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.stack(F.relu(self.first(x)).unbind(-1)[::-1], -1))

    net, x = seeded(Reversed, double=True), torch.randn(4, 3).double()
    right = copy.deepcopy(net)
    prune(net, x, {"first": [1]}, compensation="none")
    with torch.no_grad():
        right.last.weight[:, 3] = 0
    assert same(net, right, x)


def test_a_group_of_one_unit_is_refused_with_the_number_of_its_neurons():
    net, x = seeded(Tower, nn.Conv2d(8, 8, 3, groups=2), nn.GroupNorm(1, 8)), torch.randn(2, 3, 6, 6)
    with pytest.raises(PruningError, match=r"start cannot be cut: middle.1: GroupNorm normalises over all of them"):
        prune(net, x, {"start": [0]})


def test_components_are_those_of_a_slow_search():
    generator = torch.Generator().manual_seed(0)
    places = Places()
    numbers = places.new(60)
    pairs = torch.randint(0, 60, (2, 35), generator=generator)
    for a, b in pairs.T:
        places.join(a[None], b[None])
    reached = {i: {i} for i in numbers.tolist()}
    for _ in range(60):
        for a, b in pairs.T.tolist():
            reached[a] = reached[b] = reached[a] | reached[b]
    assert places.components().tolist() == [min(reached[i]) for i in range(60)]


def test_numbers_shrink_to_the_axes_that_tell_them_apart():
    grid = torch.arange(6).view(1, 2, 1, 3).expand(4, 2, 5, 3)
    assert compressed(grid).shape == (1, 2, 1, 3)
    assert compressed(torch.tensor([[-1, 3, 3]])).tolist() == [[3]]


def test_places_on_disjoint_axes_are_lost_and_others_are_joined():
    places = Places()
    heads, single, other = places.new(2).view(2, 1, 1), places.new(6).view(2, 1, 3), places.new(4).view(1, 4, 1)
    result = combined(places, [single, heads, single, other], "on another axis")
    assert torch.equal(result, single)
    assert [(numbers.tolist(), reason) for numbers, reason in places.lost] == [([8, 9, 10, 11], "on another axis")]
    assert places.components()[:8].tolist() == [0, 1, 0, 0, 0, 1, 1, 1]


class Scaled(nn.Module):
    """An attribute that is a width, and by whose square root scores are divided."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.q, self.k, self.v, self.proj = 12, *(nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, HEAD).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = ((q @ k.mT) / self.dim**0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(*x.shape[:2], self.dim))


@for_each("value", [0.0, 1.0])
def test_a_wrong_cut_is_refused_on_an_example_whose_positions_are_all_alike(value):
    net, x = seeded(Scaled, double=True), torch.full(TOKENS, value).double()
    before = copy.deepcopy(net)
    with pytest.raises(PruningError, match="q cannot be cut"):
        prune(net, x, {"q": [0]})
    assert same(net, before, torch.randn(TOKENS).double())


def test_codes_that_are_all_alike_are_varied_where_the_model_takes_others():
    class Coded(nn.Module):
        def __init__(self, codes: int) -> None:
            super().__init__()
            self.embed, self.inner = nn.Embedding(codes, 12), Scaled()

        def forward(self, codes: Tensor) -> Tensor:
            return self.inner(self.embed(codes))

    codes = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(PruningError, match=r"inner\.q cannot be cut"):
        prune(seeded(Coded, 7, double=True), codes, {"inner.q": [0]})
    prune(seeded(Coded, 1, double=True), codes, {"inner.q": [0]})  # with one code, all positions are alike at all times


class Averaged(Separate):
    """Heads share the mean of their weights, so neurons of v can only go by as many as there are heads."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.proj = nn.Linear(12, 18), nn.Linear(18, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.heads(self.q(x)), self.heads(self.k(x))
        v = self.v(x).view(*x.shape[:2], 3, self.v.out_features // 3).transpose(1, 2)
        y = (q @ k.mT).softmax(-1).mean(1, keepdim=True) @ v
        return self.proj(y.transpose(1, 2).reshape(*x.shape[:2], -1))


def test_a_target_of_which_every_plan_fails_its_trial_is_an_error():
    net, x = seeded(Net, Averaged, double=True), torch.randn(TOKENS).double()
    before = copy.deepcopy(net)
    with pytest.raises(PruningError, match=r"^target_macs=0.9 is not reached: nothing can be removed; .*v is not cut"):
        prune(net, x, {"criterion": "weight_l2", "target_macs": 0.9}, compensation="none")
    assert same(net, before, x)
