"""One odd block does not make a whole model unprunable: neurons are followed through it, or it alone is left out."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_neurons import PruningError, describe_structure, prune
from lightning_neurons.dependency.torch_pruning_adapter import find_coupling
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover
from tests.models import seeded
from tests.tables import for_each


class CrossStage(nn.Module):
    """Half of a layer goes through a residual branch, and all parts are read together, as in CSP and C2f blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(9, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(F.silu(self.first(x)).chunk(2, 1))
        parts.append(parts[-1] + self.inner(parts[-1]))
        return self.head(F.silu(self.last(torch.cat(parts, 1))))


class GatedHalves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(5, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class GatedByFunction(GatedHalves):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.glu(self.both(x)))


class Experts(nn.Module):
    """Each of two branches is scaled by one neuron of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.choice = nn.Linear(4, 5), nn.Linear(5, 2)
        self.first, self.second, self.head = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        shares = self.choice(x).softmax(-1)
        return self.head(shares[:, :1] * self.first(x) + shares[:, 1:] * self.second(x))


class Mixer(nn.Module):
    """Tokens are mixed as well as channels, and both are added to one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.tokens, self.channels, self.head = (nn.Linear(*n) for n in ((4, 6), (5, 5), (6, 6), (6, 2)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        x = x + self.tokens(x.mT).mT
        return self.head(x + F.relu(self.channels(x)))


class WeighedSum(nn.Module):
    """Two branches are summed with weights that are learnt, one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.shares, self.left, self.right = nn.Parameter(torch.ones(2)), nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.shares / self.shares.sum()
        return self.head(F.relu(shares[0] * self.left(x) + shares[1] * self.right(x)))


class Gate(nn.Module):
    """A map of one channel scales all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.gate = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 1, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.wide(x))
        return self.head(x * torch.sigmoid(self.gate(F.relu(self.narrow(x)))))


class FlatJoin(nn.Module):
    """A pooled convolution, a flat one and a linear layer side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled, self.flat, self.linear = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 3, 7), nn.Linear(2, 5)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(F.relu(self.pooled(x)), 1).flatten(1)
        flat = F.relu(self.flat(x)).flatten(1)
        return self.head(torch.cat([pooled, flat, F.relu(self.linear(x[:, 0, 0, :2]))], -1))


class NormBeforeJoin(nn.Module):
    """One slope for all, and a norm by instance, in front of a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.slope, self.right, self.norm = nn.Conv2d(3, 4, 3), nn.PReLU(), nn.Conv2d(3, 3, 3), None
        self.norm, self.head = nn.InstanceNorm2d(3, affine=True), nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        right = F.relu_(self.norm(self.right(x)))
        return self.head(torch.cat([self.slope(self.left(x)), right], 1))


def turned(x: Tensor) -> Tensor:
    """Rotary positions: halves of a head change places."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / 10 ** torch.arange(half, dtype=x.dtype)
    other = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * torch.cat([angle, angle], -1).cos() + other * torch.cat([angle, angle], -1).sin()


class Decoder(nn.Module):
    """A block with positions, grouped queries and a gated MLP."""

    def __init__(self, turn=turned) -> None:
        super().__init__()
        self.turn = turn
        self.embed, self.norm = nn.Embedding(11, 8), nn.RMSNorm(8)
        self.q, self.k, self.v, self.o = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 8)
        self.gate, self.up, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embed(codes)
        y = self.norm(x)
        q, k, v = (f(y).view(*y.shape[:2], -1, 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (z.repeat_interleave(2, 1) for z in (self.turn(k), v))
        mixed = F.scaled_dot_product_attention(self.turn(q), k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o(mixed)
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


def alone(start: int, count: int) -> list[tuple[int, ...]]:
    return [(i,) for i in range(start, start + count)]


IMAGES = 2, 3, 7, 7
CASES = {
    "cross stage": (
        CrossStage,
        IMAGES,
        {
            ("first", "makes"): [(0, 3), (1, 4), (2, 5)],  # halves stay halves
            ("inner", "makes"): alone(0, 3),
            ("inner", "reads"): alone(0, 3),
            ("last", "reads"): [(0, 3, 6), (1, 4, 7), (2, 5, 8)],
        },
    ),
    "gated halves": (
        GatedHalves,
        (2, 3, 5),
        {("both", "makes"): [(0, 4), (1, 5), (2, 6), (3, 7)], ("down", "reads"): alone(0, 4)},
    ),
    "gated by a function": (
        GatedByFunction,
        (2, 3, 5),
        {("both", "makes"): [(0, 4), (1, 5), (2, 6), (3, 7)], ("down", "reads"): alone(0, 4)},
    ),
    "experts": (
        Experts,
        (3, 4),
        {("first", "makes"): alone(0, 3), ("second", "makes"): alone(0, 3), ("head", "reads"): alone(0, 3)},
    ),
    "weighed sum": (
        WeighedSum,
        IMAGES,
        {("left", "makes"): alone(0, 4), ("right", "makes"): alone(0, 4), ("head", "reads"): alone(0, 4)},
    ),
    "gate": (
        Gate,
        IMAGES,
        {("wide", "makes"): alone(0, 6), ("narrow", "reads"): alone(0, 6), ("head", "reads"): alone(0, 6)},
    ),
    "pooled": (FlatJoin, IMAGES, {("pooled", "makes"): alone(0, 4), ("head", "reads"): alone(0, 4)}),
    "flat": (FlatJoin, IMAGES, {("flat", "makes"): alone(0, 3), ("head", "reads"): alone(4, 3)}),
    "one slope": (
        NormBeforeJoin,
        IMAGES,
        {("left", "makes"): alone(0, 4), ("head", "reads"): alone(0, 4)},
    ),
    "norm by instance": (
        NormBeforeJoin,
        IMAGES,
        {("right", "makes"): alone(0, 3), ("norm", "passes"): alone(0, 3), ("head", "reads"): alone(4, 3)},
    ),
}


@for_each("name", CASES)
def test_neurons_are_followed_through_what_lays_them_out_anew(name):
    make, size, parts = CASES[name]
    found = find_coupling(seeded(make, double=True), Example(torch.randn(size).double()).run)
    root = next(iter(parts))[0]
    (group,) = [group for group in found.groups if group.root == root]
    assert {(part.path, part.role): list(part.indices) for part in group.parts} == parts
    assert group.size == len(next(iter(parts.values())))
    assert found.lost == {}


def test_neurons_on_another_axis_are_left_out_of_the_stream_that_they_are_added_to():
    net, x = seeded(Mixer, double=True), torch.randn(2, 5, 4).double()
    right = copy.deepcopy(net)
    report = prune(net, x, {"criterion": "weight_l2", "amount": 0.5}, compensation="none")
    gone = list(report.plan.neurons["start"])
    assert report.plan.neurons == {"start": tuple(gone), "channels": tuple(gone)}
    assert len(gone) == 3
    (note,) = [note for note in report.notes if note.startswith("tokens is not cut")]
    assert note.endswith("they are combined with neurons on another axis")
    with torch.no_grad():
        right.channels.weight[:, gone], right.head.weight[:, gone] = 0, 0
    assert torch.allclose(net(x), right(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("turn", [turned, torch.Tensor.clone], ids=["rotary positions", "no positions"])
def test_of_a_decoder_the_mlp_and_heads_with_shared_keys_are_cut_by_half(turn):
    net, codes = seeded(Decoder, turn, double=True), torch.randint(0, 11, (2, 5))
    right = copy.deepcopy(net)
    report = prune(net, codes, {"criterion": "weight_l2", "amount": 0.5}, compensation="none")
    gone, heads = list(report.plan.neurons["gate"]), list(report.plan.neurons["q"])
    assert len(gone) == 3
    assert heads in ([0, 1, 2, 3], [4, 5, 6, 7])  # a head of keys and values, with the two that it serves
    assert report.plan.neurons["k"] == report.plan.neurons["v"] == ((0, 1) if heads[0] == 0 else (2, 3))
    assert report.plan.neurons.keys() == {"q", "k", "v", "gate", "up"}
    right.down.weight.data[:, gone], right.o.weight.data[:, heads] = 0, 0
    assert torch.allclose(net(codes), right(codes), rtol=1e-12, atol=1e-12)
    assert any(note.startswith(("embed is not cut", "o is not cut")) for note in report.notes)


class Odd(nn.Module):
    """One layer whose neurons cannot be followed, between two that can."""

    def __init__(self, way) -> None:
        super().__init__()
        self.first, self.odd, self.last, self.head = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 2)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(self.way(self.odd(F.relu(self.first(x)))))))


@for_each(
    "way, reason",
    [
        (lambda x: x - x.mean(1, keepdim=True), "mean makes one value of all of them"),
        (lambda x: F.pad(x[:, :6], (1, 1)), "something between them and their consumers adds channels"),
        (lambda x: x[:, 3][:, None] + x, "single ones of them are picked out"),
        (lambda x: x @ torch.ones(8, 8), r"a function reads them, not a layer \(mm\)"),
        (lambda x: torch.cat([x[:, :1], torch.ones(2, 1), x[:, 1:6], torch.zeros(2, 1)], 1), "more than one constant"),
    ],
)
def test_the_layer_that_cannot_be_followed_is_refused_with_the_reason_and_the_others_are_cut(way, reason):
    net, x = seeded(Odd, way), torch.randn(2, 4)
    before = copy.deepcopy(net)
    report = prune(net, x, {"criterion": "weight_l2", "amount": 0.5}, compensation="none")
    (note,) = [note for note in report.notes if note.startswith("odd is not cut")]
    assert re.search(f"its neurons cannot be followed: .*{reason}", note)
    assert {name: len(gone) for name, gone in report.plan.neurons.items()} == {"first": 3, "last": 2}
    with torch.no_grad():
        before.odd.weight[:, list(report.plan.neurons["first"])] = 0
        before.head.weight[:, list(report.plan.neurons["last"])] = 0
    assert torch.allclose(net(x), before(x), atol=1e-6)
    with pytest.raises(PruningError, match=f"^odd cannot be cut: its neurons cannot be followed: .*{reason}"):
        prune(before, x, {"odd": [0]})


class HalfSeen(nn.Module):
    """The way from one layer to the rest is not that of autograd."""

    def __init__(self, way) -> None:
        super().__init__()
        self.hidden, self.next, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.next(self.way(self.hidden, x))))


def without_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x).relu()


CUT_OFF = "what it makes is cut off from the output"
WAYS = {
    "no_grad": (without_gradient, CUT_OFF),
    "detached": (lambda layer, x: layer(x).relu().detach(), CUT_OFF),
    "numpy": (lambda layer, x: torch.from_numpy(layer(x).detach().numpy()).relu(), CUT_OFF),
    "checkpoint": (lambda layer, x: checkpoint(layer, x.requires_grad_(), use_reentrant=True).relu(), CUT_OFF),
    "function": (lambda layer, x: F.linear(x, layer.weight, layer.bias).relu(), "its weights are used by a function"),
    "another": (lambda layer, x: torch.cat([x, x], 1), "it did not run"),
}


@for_each("name", WAYS)
def test_a_layer_that_is_not_seen_is_named_with_the_reason_and_the_rest_is_cut(name):
    way, reason = WAYS[name]
    net, x = seeded(HalfSeen, way), torch.randn(3, 4)
    assert describe_structure(net, x)["unseen"].keys() == {"hidden"}
    report = prune(net, x, {"criterion": "weight_l2", "amount": 0.5})
    (note,) = [note for note in report.notes if note.startswith("hidden is not cut: it is not in the model's graph: ")]
    assert reason in note
    assert {name: len(gone) for name, gone in report.plan.neurons.items()} == {"next": 3}
    with pytest.raises(PruningError, match=f"hidden cannot be cut: it is not in the model's graph: {reason}"):
        prune(net, x, {"hidden": [0]})


class Stream(nn.Module):
    """A residual stream with norms behind its sums; its mean, and the size of it, may be outputs too."""

    def __init__(self, end) -> None:
        super().__init__()
        self.start, self.norm, self.up, self.down = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.head, self.end = nn.Linear(6, 3), end

    def forward(self, x: Tensor) -> object:
        x = self.start(x)
        return self.end(self, self.norm(x + self.down(F.relu(self.up(x)))))


ENDS = {
    "read by a layer": (lambda net, x: net.head(x), r"norm: LayerNorm normalises over all of them"),
    "read by a product": (lambda net, x: x @ net.head.weight.T, r"a function reads them, not a layer \(mm\)$"),
    "the output itself": (lambda net, x: x, r"its neurons are the model's output$"),
    "its mean": (lambda net, x: (net.head(x), x.abs().mean()), r"mean makes one value of all of them$"),
}


@for_each("name", ENDS)
def test_the_reason_why_a_stream_is_not_cut_is_the_true_one(name):
    end, reason = ENDS[name]
    found = discover(seeded(Stream, end), Example(torch.randn(3, 4)))
    assert re.search(reason, found.refused["start"])
    assert ("start" in found.coupling.ends) is (name == "the output itself")
    assert "up" in found.offered


def test_a_layer_whose_values_are_summed_to_the_output_makes_the_output():
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.hidden(x))).square().mean()

    found = discover(seeded(Loss), Example(torch.randn(3, 4)))
    assert found.refused == {"head": "its neurons are the model's output"}


OTHER_BLOCKS = {
    "TorchScript": (lambda: torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), False),
    "a transform": (lambda: torch.vmap(lambda row: row * 2), True),
    "a sparse product": (lambda: lambda x: torch.sparse.mm(torch.eye(len(x)).to_sparse(), x), True),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", OTHER_BLOCKS)
def test_blocks_of_other_kinds_do_not_stop_the_rest(name):
    make, goes = OTHER_BLOCKS[name]
    report = prune(seeded(Odd, make()), torch.randn(2, 4), {"criterion": "weight_l2", "amount": 0.5})
    assert {name: len(gone) for name, gone in report.plan.neurons.items()} == (
        {"first": 3, "odd": 4, "last": 2} if goes else {"first": 3, "last": 2}
    )
    assert goes or any(note.startswith("odd is not cut: way.0: it is TorchScript") for note in report.notes)


class Forces(nn.Module):
    """Returns an energy and its slope, so that its forward differentiates twice."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))
        self.other, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
            (slope,) = torch.autograd.grad(force.square().sum(), x, create_graph=True)
        return slope, self.head(F.relu(self.other(x)))


def test_a_forward_that_differentiates_itself_is_traced():
    report = prune(seeded(Forces), torch.randn(2, 5, 3), {"criterion": "weight_l2", "amount": 0.5})
    assert {name: len(gone) for name, gone in report.plan.neurons.items()} == {"other": 2}
    assert any(note.startswith("energy.0 is not cut: ") for note in report.notes)
