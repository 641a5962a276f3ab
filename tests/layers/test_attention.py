"""Attention with fewer heads than fill its width, beside ``nn.MultiheadAttention`` with the same heads at zero."""

import copy
import io
import pickle
import re
import warnings
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import conform, prune
from lightning_neurons.layers.attention import PrunedMultiheadAttention, separate_heads, separated_heads, silent_rows
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover
from tests.models import seeded
from tests.tables import for_each

WIDTH, HEADS, SIZE = 12, 3, 4
BATCH, STEPS = 2, 5
FORMS = [
    {"batch_first": first, "bias": bias, "batched": batched, "crossed": crossed}
    for first, bias, batched, crossed in product((True, False), repeat=4)
]
MASKS: list[dict[str, Any]] = [
    {},
    {"key_padding_mask": bool},
    {"attn_mask": bool},
    {"attn_mask": float},
    {"attn_mask": bool, "by_head": True, "key_padding_mask": bool},
    {"attn_mask": float, "by_head": True},
    {"attn_mask": bool, "is_causal": True},
    {"attn_mask": float, "is_causal": True, "key_padding_mask": float},
]
WEIGHTS = [{"need_weights": False}, {}, {"average_attn_weights": False}]


def attention(heads: int = HEADS, **kwargs: Any) -> nn.MultiheadAttention:
    made = nn.MultiheadAttention(WIDTH, heads, **kwargs).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def rows_of(heads: list[int], width: int = WIDTH, size: int = SIZE) -> list[int]:
    """The rows of some heads in a packed projection of queries, keys and values."""
    return [width * part + size * head + i for part in range(3) for head in heads for i in range(size)]


def without(whole: nn.MultiheadAttention, heads: list[int]) -> nn.MultiheadAttention:
    """The same without some heads, made by hand."""
    small = copy.deepcopy(whole)
    stays = [head for head in range(whole.num_heads) if head not in heads]
    rows, columns = rows_of(stays), rows_of(stays)[: len(stays) * SIZE]
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_weight"):
        if (weight := getattr(whole, name)) is not None:
            setattr(small, name, nn.Parameter(weight[rows if name == "in_proj_weight" else columns].detach()))
    small.in_proj_bias = None if whole.in_proj_bias is None else nn.Parameter(whole.in_proj_bias[rows].detach())
    small.out_proj.weight = nn.Parameter(whole.out_proj.weight[:, columns].detach())
    small.num_heads, small.__class__ = len(stays), PrunedMultiheadAttention
    return small


def inputs(form: dict[str, bool], whole: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    def some(steps: int, width: int = WIDTH) -> Tensor:
        x = torch.randn(BATCH, steps, width).double()
        return x[0] if not form["batched"] else x if form["batch_first"] else x.transpose(0, 1)

    query = some(STEPS)
    if not form["crossed"]:
        return query, query, query
    return query, some(STEPS + 1, whole.kdim), some(STEPS + 1, whole.vdim)


def masks(told: dict[str, Any], form: dict[str, bool], heads: int) -> dict[str, Any]:
    """Masks of the kinds that are told; with one for each head, the first of them are those of the kept heads."""
    places, samples = STEPS + form["crossed"], BATCH if form["batched"] else 1

    def made(kind: type, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(len(shape))
        hidden = torch.rand(*shape, generator=generator) < 0.3
        hidden[..., 0] = False
        if "is_causal" in told and len(shape) == 2 and shape[0] == STEPS:
            hidden = torch.ones(shape).triu(1).bool()
        return hidden if kind is bool else torch.zeros(shape).double().masked_fill(hidden, -torch.inf)

    found = {name: value for name, value in told.items() if name == "is_causal"}
    if "attn_mask" in told:
        found["attn_mask"] = made(told["attn_mask"], STEPS, places)
        if told.get("by_head"):
            mask = made(told["attn_mask"], samples, HEADS, STEPS, places)
            found["attn_mask"] = mask[:, HEADS - heads :].flatten(0, 1)
    if "key_padding_mask" in told:
        padding = made(told["key_padding_mask"], BATCH, places)
        found["key_padding_mask"] = padding if form["batched"] else padding[0]
    return found


@for_each("form, told", list(product(FORMS, MASKS)))
def test_results_are_those_of_torch_and_without_heads_those_with_their_columns_at_zero(form, told):
    apart = form["crossed"] and form["batch_first"] == form["batched"]
    whole = attention(batch_first=form["batch_first"], bias=form["bias"], kdim=7 if apart else None)
    given, separate = inputs(form, whole), copy.deepcopy(whole)
    separate_heads(separate)
    assert type(separate) is PrunedMultiheadAttention
    small = without(whole, [0])
    with torch.no_grad():
        silent = copy.deepcopy(whole)
        silent.out_proj.weight[:, :SIZE] = 0
    for training, asked in product((True, False), WEIGHTS):
        for right, other, heads in ((whole, separate, HEADS), (silent, small, HEADS - 1)):
            expected = right.train(training)(*given, **asked, **masks(told, form, HEADS))
            got = other.train(training)(*given, **asked, **masks(told, form, heads))
            torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-12)
            if heads == HEADS:
                torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-12)
            elif expected[1] is not None and not asked.get("average_attn_weights", True):
                torch.testing.assert_close(got[1], expected[1][..., 1:, :, :], rtol=0, atol=1e-12)


def test_dropout_draws_the_same_numbers():
    whole, x = attention(dropout=0.4, batch_first=True), torch.randn(BATCH, STEPS, WIDTH).double()
    separate = copy.deepcopy(whole)
    separate_heads(separate)
    for needed in (True, False):
        results = []
        for module in (whole, separate):
            torch.manual_seed(0)
            results.append(module(x, x, x, need_weights=needed)[0])
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


def test_what_fits_no_head_is_an_error():
    small, x = without(attention(batch_first=True), [1]), torch.randn(BATCH, STEPS, WIDTH).double()
    mask = torch.zeros(BATCH * HEADS, STEPS, STEPS).double()
    with pytest.raises(RuntimeError, match=r"should be \(5, 5\) or, with 2 heads, \(4, 5, 5\)"):
        small(x, x, x, attn_mask=mask)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        small(x, x, x, is_causal=True)
    with pytest.raises(TypeError, match=r"booleans or floating-point numbers, got one of torch.int64"):
        small(x, x, x, key_padding_mask=torch.zeros(BATCH, STEPS).long())


def encoder(heads: int = 4, **kwargs: Any) -> nn.TransformerEncoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will not take its fast path
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, heads, 24, dropout=0.0, **kwargs), 2)


class Translator(nn.Module):
    """An encoder and a decoder of torch."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.encoder, self.decoder = encoder(batch_first=True), nn.TransformerDecoder(layer, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.head(self.decoder(x, self.encoder(x), tgt_mask=mask, tgt_is_causal=True))


class Captions(nn.Module):
    """Tokens that attend to a memory of another width."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, bias=bias, kdim=9, vdim=7, batch_first=True)
        self.keys, self.values, self.head = nn.Linear(16, 9), nn.Linear(16, 7), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, self.keys(x), self.values(x))[0])


NETS = {
    "memory": Captions,
    "memory without bias": lambda: Captions(bias=False),
    "encoder": lambda: encoder(batch_first=True),
    "steps first": lambda: encoder(norm_first=True, activation="gelu"),
    "without bias": lambda: encoder(batch_first=True, bias=False),
    "decoder": Translator,
}


@for_each("name", NETS)
def test_heads_are_units_and_a_cut_leaves_the_net_without_them(name):
    net, x = seeded(NETS[name], double=True), torch.randn(BATCH, STEPS, 16).double()
    right, keys = copy.deepcopy(net), list(net.state_dict())
    paths = [path for path, module in net.named_modules() if isinstance(module, nn.MultiheadAttention)]
    structure = discover(net, Example(x))
    assert [structure.offered[path].size for path in paths] == [4] * len(paths)
    assert all(type(net.get_submodule(path)) is nn.MultiheadAttention for path in paths)
    if name.startswith("memory"):
        assert re.search(r"reads them by weights of several widths", structure.refused["keys"])
    made = discover(net, Example(x)).widths
    rows = [i for i in rows_of([1], 16) if i < made[paths[0]]]  # 16 where queries, keys and values have a weight each
    report = prune(net, x, dict.fromkeys(paths, rows[:1]), compensation="none")
    assert report.plan.neurons == {path: tuple(rows) for path in paths}
    for path in paths:
        assert net.get_submodule(path).num_heads == 3
        with torch.no_grad():
            right.get_submodule(path).out_proj.weight[:, 4:8] = 0
    for model in (net, right):
        model.eval()
    torch.testing.assert_close(net(x), right(x), rtol=1e-10, atol=1e-12)
    assert list(net.state_dict()) == keys
    again = discover(net, Example(x))
    assert (again.costs.parameters(), again.costs.macs()) == (report.cost.parameters_after, report.cost.macs_after)
    rest = [i for i in rows_of([0, 2], 12) if i < again.widths[paths[0]]]
    prune(net, x, dict.fromkeys(paths, rest), compensation="none")  # one is left
    net.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_packs_padded_sequences_gives_what_the_whole_one_gives():
    net, x = seeded(encoder, batch_first=True, double=True).eval(), torch.randn(BATCH, STEPS, 16).double()
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    small, right = copy.deepcopy(net), copy.deepcopy(net)
    paths = [f"layers.{i}.self_attn" for i in range(2)]
    prune(small, (x, None, padding), {paths[0]: rows_of([1, 3], 16), paths[1]: rows_of([0], 16)}, compensation="none")
    with torch.no_grad():
        for path, columns in zip(paths, ([*range(4, 8), *range(12, 16)], [*range(4)]), strict=True):
            right.get_submodule(path).out_proj.weight[:, columns] = 0
        got, expected = (model.eval()(x, None, padding) for model in (small, right))
    assert expected[0, 3:].eq(0).all()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@for_each("name, path", [("encoder", "layers.0.self_attn"), ("memory", "attention")])
def test_copies_files_and_checkpoints_keep_the_heads(name, path):
    net, x = seeded(NETS[name], double=True).eval(), torch.randn(BATCH, STEPS, 16).double()
    whole = copy.deepcopy(net)
    prune(net, x, {path: [5]}, compensation="none")
    net.eval()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = copy.deepcopy(whole)
    assert conform(loaded, net.state_dict())
    loaded.load_state_dict(net.state_dict())
    others = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False), loaded]
    others.append(torch.export.export(net, (x,)).module())
    for other in others:
        torch.testing.assert_close(other(x), net(x), rtol=1e-10, atol=1e-12)
    strange = {name: tensor[:-3] if "proj_" in name else tensor for name, tensor in whole.state_dict().items()}
    assert [name for name in conform(copy.deepcopy(whole), strange) if "proj_" in name] == [], "no whole head"
    conform(loaded, whole.state_dict())
    loaded.load_state_dict(whole.state_dict())
    assert (type(loaded.get_submodule(path)), loaded.get_submodule(path).num_heads) == (nn.MultiheadAttention, 4)
    torch.testing.assert_close(loaded(x), whole(x), rtol=1e-10, atol=1e-12)


@for_each("kdim", [None, 7])
def test_a_context_separates_heads_and_rows_of_zeros_silence_them(kdim):
    whole, x = attention(batch_first=True, kdim=kdim), torch.randn(BATCH, STEPS, WIDTH).double()
    keys, rows = x[..., :kdim], rows_of([2])[: SIZE if kdim else None]
    seen: list[Tensor] = []
    whole.out_proj.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with separated_heads(whole):
        whole(x, keys, x)
    assert len(seen) == 1
    assert type(whole) is nn.MultiheadAttention
    kept = dict(whole.named_parameters())
    with silent_rows(whole, rows):
        got = whole(x, keys, x)[0]
    assert all(whole.get_parameter(name) is parameter for name, parameter in kept.items())
    torch.testing.assert_close(got, without(whole, [2])(x, keys, x)[0], rtol=0, atol=1e-12)
