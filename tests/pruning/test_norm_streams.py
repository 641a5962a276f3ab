"""Streams under norms are cut as if sliced by hand where that is asked for, and refused otherwise."""

import copy
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import ArgumentError, PruningError, PruningPlan, describe_structure, plan_keeping, prune
from lightning_neurons.dependency.conform import conform
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.norm_streams import find_norms
from lightning_neurons.pruning.structure.structure import discover
from tests.models import pictures, seeded
from tests.pruning.nets import codes
from tests.pruning.test_structure import changed, photograph
from tests.tables import for_each

WIDTH, GONE = 12, [0, 3, 7, 8]
KEPT = [i for i in range(WIDTH) if i not in GONE]


class WrittenRMSNorm(nn.Module):
    """As in Llama: statistics in float32, whatever comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        single = x.float()
        return self.weight * (single * torch.rsqrt(single.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class LengthNorm(nn.Module):
    """A norm that knows its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.gain = width, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.width**0.5 * self.gain


class ChannelNorm(nn.LayerNorm):
    """A LayerNorm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)


class ResponseNorm(nn.Module):
    """Global response normalisation of ConvNeXt V2, channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(1, 2), keepdim=True)
        return self.gamma * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.beta + x


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return self._conv_forward(x, rows.view_as(self.weight), self.bias)


class Mixer(nn.Module):
    """Attention over tokens with heads of their own width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = *(nn.Linear(width, 8) for _ in range(3)), nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, norm: Callable[[int], nn.Module], *, pre: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mixer, self.pre = norm(width), norm(width), Mixer(width), pre
        self.up, self.down = nn.Linear(width, 10), nn.Linear(10, width)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = x + self.mixer(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.mixer(x))
        return self.norm2(x + self.mlp(x))


class VisionTransformer(nn.Module):
    """Patches, a class token and positions that are bare parameters, pre-norm blocks."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(*(Block(width, norm, pre=True) for _ in range(2)))
        self.norm, self.head = norm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class Encoder(nn.Module):
    """Embeddings of words and positions, post-norm blocks, as BERT."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(11, width), nn.Embedding(9, width), norm(width)
        self.blocks = nn.Sequential(*(Block(width, norm, pre=False) for _ in range(2)))
        self.pool, self.head = nn.Linear(width, 5), nn.Linear(5, 3)

    def forward(self, words: Tensor) -> Tensor:
        x = self.norm(self.words(words) + self.places(torch.arange(words.shape[1], device=words.device)))
        return self.head(torch.tanh(self.pool(self.blocks(x)[:, 0])))


class ConvNeXt(nn.Module):
    def __init__(self, width: int, inside: int = 10) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, width, 2, 2), ChannelNorm(width)
        self.deep, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.up, self.grn, self.down = nn.Linear(width, inside), ResponseNorm(inside), nn.Linear(inside, width)
        self.last, self.head = ChannelNorm(width), nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        y = self.norm(self.deep(x).movedim(1, -1))
        x = x + self.down(self.grn(F.gelu(self.up(y)))).movedim(-1, 1)
        return self.head(self.last(x)).mean((2, 3))


class Standardised(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, width, 3, padding=1), StandardisedConv(width, width, 3, padding=1)
        self.last, self.head = StandardisedConv(width, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.last(x + F.relu(self.conv(x)))).mean((2, 3)))


class OneGroup(nn.Module):
    """GroupNorm of one group, with scales and without."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, width, 3), nn.GroupNorm(1, width), nn.Conv2d(width, width, 1)
        self.last, self.head = nn.GroupNorm(1, width, affine=False), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.last(x + self.conv(F.relu(self.norm(x)))).amax((2, 3)))


class Tied(nn.Module):
    """A language model whose words are read and written by one tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.block = nn.Embedding(11, width), Block(width, nn.LayerNorm, pre=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.words(words))))


def images() -> Tensor:
    return pictures(3, double=True)[0][:, :, :8, :8]


NORMS_OF_BLOCKS = ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"]
NETS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Tensor], str, list[str]]] = {
    "pre-norm": (
        VisionTransformer,
        images,
        "patches",
        NORMS_OF_BLOCKS,
    ),
    "pre-norm RMSNorm": (
        lambda width: VisionTransformer(width, nn.RMSNorm),
        images,
        "patches",
        NORMS_OF_BLOCKS,
    ),
    "pre-norm written out": (
        lambda width: VisionTransformer(width, WrittenRMSNorm),
        images,
        "blocks.0.down",
        NORMS_OF_BLOCKS,
    ),
    "pre-norm without scales": (
        lambda width: VisionTransformer(width, partial(nn.LayerNorm, elementwise_affine=False)),
        images,
        "patches",
        NORMS_OF_BLOCKS,
    ),
    "post-norm with a width": (
        lambda width: Encoder(width, LengthNorm),
        codes,
        "blocks.0.mixer.out",
        NORMS_OF_BLOCKS,
    ),
    "post-norm": (
        Encoder,
        codes,
        "blocks.0.mixer.out",
        NORMS_OF_BLOCKS,
    ),
    "post-norm written out": (
        lambda width: Encoder(width, WrittenRMSNorm),
        codes,
        "blocks.0.mixer.out",
        NORMS_OF_BLOCKS,
    ),
    "channels of images": (ConvNeXt, images, "stem", ["first", "last", "norm"]),
    "global responses": (lambda width: ConvNeXt(8, width), images, "up", ["grn"]),
    "one group": (OneGroup, images, "stem", ["norm", "last"]),
    "tied": (Tied, codes, "block.mixer.out", ["block.norm1", "block.norm2", "norm"]),
    "standardised weights": (Standardised, images, "stem", ["conv", "last"]),
}


def net_and_inputs(name: str) -> tuple[nn.Module, Tensor]:
    """The network with random norms: what their scales hide must not be hidden."""
    make, inputs, *_ = NETS[name]
    net = seeded(make, WIDTH, double=True).eval()
    for parameter in net.requires_grad_(False).parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return net, inputs()


def sliced(name: str, net: nn.Module) -> nn.Module:
    """A narrower network of the same class with the weights of the neurons that stay."""
    right = NETS[name][0](len(KEPT)).double().eval().requires_grad_(False)
    for new, old in zip(right.parameters(), net.parameters(), strict=True):
        data = old.data
        for axis in range(data.ndim):
            if data.shape[axis] != new.shape[axis]:
                data = data.index_select(axis, torch.tensor(KEPT))
        new.data = data
    return right


@for_each("name", NETS)
def test_a_cut_is_the_network_sliced_by_hand_and_says_that_it_is_not_exact(name):
    net, x = net_and_inputs(name)
    layer, norms = NETS[name][2:]
    right, before = sliced(name, net), net(x)
    report = prune(net, x, {layer: GONE}, norm_streams="renormalize")
    assert [p.shape for p in net.parameters()] == [p.shape for p in right.parameters()]
    assert torch.allclose(net(x), right(x), rtol=0, atol=1e-6 if "written" in name else 1e-9)
    change = float((net(x) - before).abs().max() / before.abs().max())
    (note,) = [note for note in report.notes if note.startswith("not exact")]
    assert sorted(re.search(r" in (.*); before", note)[1].split(", ")) == sorted(norms)
    assert f"change by {change:.2g} of their size" in note
    assert report.plan.norm_streams == "renormalize"
    assert report.cost.parameters_after == sum(p.numel() for p in right.parameters())
    fresh = NETS[name][0](WIDTH).double().eval()
    conform(fresh, net.state_dict())
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), net(x))


REASONS = {
    "pre-norm": r"patches cannot be cut: blocks\.0\.norm1: LayerNorm normalises over all of them, and would do so over",
    "post-norm": r"blocks\.0\.mixer\.out cannot be cut: norm: LayerNorm normalises over all of them",
    "post-norm written out": r"blocks\.0\.mixer\.out cannot be cut: .* mean makes one value of all of them",
    "global responses": r"up cannot be cut: .* mean makes one value of all of them",
    "standardised weights": r"stem cannot be cut: the output differs",
}


@for_each("name", REASONS)
def test_by_default_it_is_refused_with_the_reason_and_nothing_changes(name):
    net, x = net_and_inputs(name)
    before = photograph(net)
    with pytest.raises(PruningError, match=REASONS[name]):
        prune(net, x, {NETS[name][2]: GONE})
    assert describe_structure(net, x) == describe_structure(net, x, norm_streams="refuse")
    assert changed(before, net) == []


def test_a_look_at_the_streams_leaves_no_trace_and_lists_the_norms():
    net, x = net_and_inputs("pre-norm written out")
    before = photograph(net)
    groups = describe_structure(net, x, norm_streams="renormalize")["groups"]
    assert changed(before, net) == []
    assert groups["patches"]["why_not"] is None
    assert sorted(groups["patches"]["renormalized"]) == sorted(NETS["pre-norm written out"][3])
    assert groups["blocks.0.up"]["renormalized"] == []


def test_a_plan_is_saved_with_its_norms_and_needs_them_again(tmp_path):
    net, x = net_and_inputs("pre-norm")
    plan = plan_keeping(net, x, dict.fromkeys(("patches", "blocks.0.mixer.out", "blocks.0.down"), KEPT))
    assert not plan
    assert plan.norm_streams == "refuse"
    kept = dict.fromkeys(describe_structure(net, x, norm_streams="renormalize")["groups"]["patches"]["layers"], KEPT)
    plan_keeping(net, x, kept, norm_streams="renormalize").save(tmp_path / "plan.json")
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert plan.neurons["patches"] == tuple(GONE)
    assert plan.then(PruningPlan.from_indices({})).norm_streams == plan.norm_streams == "renormalize"
    before = photograph(net)
    with pytest.raises(ArgumentError, match=r"norm_streams='refuse' is not allowed: expected 'renormalize', as"):
        prune(net, x, plan)
    assert changed(before, net) == []
    right = sliced("pre-norm", net)
    prune(net, x, plan, norm_streams="renormalize")
    assert torch.allclose(net(x), right(x), rtol=0, atol=1e-9)


def test_streams_compete_for_a_budget_and_least_squares_repairs_them():
    net, x = net_and_inputs("pre-norm")
    batches = [images() + 0.1 * torch.randn(3, 3, 8, 8).double() for _ in range(20)]
    with pytest.raises(PruningError, match="not reached"):
        prune(copy.deepcopy(net), x, {"criterion": "weight_l2", "target_macs": 0.5})
    off = {}
    for compensation in ("none", "least_squares"):
        cut = copy.deepcopy(net)
        budget = {"criterion": "weight_l2", "target_macs": 0.5}
        report = prune(cut, x, budget, batches, compensation=compensation, norm_streams="renormalize")
        assert report.plan.neurons["patches"]
        assert report.cost.macs_after <= 0.5 * report.cost.macs
        assert discover(cut, Example(x)).costs.macs() == report.cost.macs_after
        off[compensation] = float((cut(x) - net(x)).abs().max() / net(x).abs().max())
    assert off["least_squares"] < 0.5 * off["none"]
    assert f"with compensation, outputs on the example change by {off['least_squares']:.2g} of" in str(report)


def test_standardised_weights_are_not_solved_again():
    net, x = net_and_inputs("standardised weights")
    right = sliced("standardised weights", net)
    report = prune(net, x, {"stem": GONE}, [x], norm_streams="renormalize")
    assert [n for n in report.notes if "is not compensated: it standardises its weights" in n] == [
        "conv is not compensated: it standardises its weights",
        "last is not compensated: it standardises its weights",
    ]
    assert torch.allclose(net(x), right(x), rtol=0, atol=1e-9)


class HeadsUnderNorms(nn.Module):
    """Attention with norms of queries and keys: one scale for all heads, called by the name of their input."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.start, self.norm, self.q, self.k, self.v = (
            nn.Linear(6, 12),
            norm(12),
            *(nn.Linear(12, 8) for _ in range(3)),
        )
        self.norm_q, self.norm_k, self.out, self.head = norm(4), norm(4), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        q, k, v = (f(self.norm(x)).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        made = F.scaled_dot_product_attention(self.norm_q(x=q), self.norm_k(x=k), v)
        return self.head(x + self.out(made.transpose(1, 2).flatten(2))).mean(1)


class NamedLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@for_each("norm, norm_streams", [(n, s) for n in (NamedLayerNorm, WrittenRMSNorm) for s in ("refuse", "renormalize")])
def test_heads_with_norms_of_queries_are_cut_whole_and_exactly(norm, norm_streams):
    net, x = seeded(HeadsUnderNorms, norm, double=True).requires_grad_(False), torch.randn(2, 5, 6).double()
    right = copy.deepcopy(net)
    right.out.weight[:, 4:] = 0
    report = prune(net, x, {"v": [4, 5, 6, 7]}, norm_streams=norm_streams)
    assert report.plan.neurons == dict.fromkeys(("q", "k", "v"), (4, 5, 6, 7))
    assert torch.allclose(net(x), right(x), rtol=0, atol=1e-6 if norm is WrittenRMSNorm else 1e-9)
    assert report.plan.norm_streams == "refuse"
    assert (describe_structure(net, x, norm_streams=norm_streams)["groups"]["start"]["why_not"] is None) == (
        norm_streams == "renormalize"
    )


class Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


CHANNELS, FEATURES = torch.randn(2, 6, 4, 5), torch.randn(2, 4, 6)
NORMS: dict[str, tuple[nn.Module, Tensor, tuple[int, ...] | None]] = {
    "LayerNorm": (nn.LayerNorm(6), FEATURES, (6,)),
    "RMSNorm": (nn.RMSNorm(6), FEATURES, (6,)),
    "written out": (WrittenRMSNorm(6), FEATURES, (6,)),
    "of channels": (ChannelNorm(6), CHANNELS, (6, 1, 1)),
    "of responses": (ResponseNorm(5), CHANNELS, (5,)),
    "with a width": (LengthNorm(6), FEATURES, (6,)),
    "to length 1": (Call(lambda x: F.normalize(x, dim=1)), CHANNELS, (6, 1, 1)),
    "subtracted mean": (Call(lambda x: x - x.mean(1, True)), CHANNELS, (6, 1, 1)),
    "over all": (nn.LayerNorm((6, 4, 5)), CHANNELS, None),
    "for each channel": (nn.BatchNorm2d(6), CHANNELS, None),
    "over space": (Call(lambda x: F.instance_norm(x)), CHANNELS, None),
    "of one group": (nn.GroupNorm(1, 6), CHANNELS, (6, 1, 1)),
    "in groups": (Call(lambda x: F.group_norm(x, 3)), CHANNELS, None),
    "softmax": (Call(lambda x: x.softmax(-1)), FEATURES, None),
    "sums": (Call(lambda x: x.cumsum(-1)), FEATURES, None),
    "neighbours": (nn.LocalResponseNorm(3), CHANNELS, None),
    "one by one": (Call(F.gelu), FEATURES, None),
    "a map": (Call(lambda x: x @ torch.ones(6, 6).triu()), FEATURES, None),
}


@for_each("name", NORMS)
def test_norms_are_told_by_what_they_do(name):
    module, x, shape = NORMS[name]
    expected = {} if shape is None else {"0": shape}
    assert find_norms(nn.Sequential(module).eval(), Example(x)).layers == expected


ERRORS = {
    "unknown": ({"norm_streams": "renormalise"}, r"norm_streams='renormalise'.*'refuse', 'renormalize'; did you mean"),
    "no text": ({"norm_streams": None}, r"norm_streams=None is not allowed: expected one of 'refuse', 'renormalize'"),
    "without loss": (
        {"norm_streams": "renormalize", "lossless": True, "batches": [images()]},
        r"norm_streams='renormalize' is not allowed: expected 'refuse' with lossless=True",
    ),
}


@for_each("name", ERRORS)
def test_a_wrong_argument_is_refused_by_name(name):
    options, message = ERRORS[name]
    net, x = net_and_inputs("pre-norm")
    with pytest.raises(ArgumentError, match=message):
        prune(net, x, None if "lossless" in options else {"patches": GONE}, **options)
