"""Heads are chosen and made up for as channels are, and what is left works as a transformer does."""

import itertools
from typing import Any

import onnx.reference
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_neurons import PruningBudget, prune
from lightning_neurons.pruning.compensation.ridge import RIDGE, RIDGES
from tests.models import seeded
from tests.tables import for_each

HEADS, SIZE, WIDTH = 4, 3, 6


class Attention(nn.Module):
    """Causal attention of queries that share keys and values in groups, with a cache of the last steps."""

    def __init__(self, groups: int = HEADS) -> None:
        super().__init__()
        self.heads, self.groups = HEADS, groups
        self.q, self.out = nn.Linear(WIDTH, HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, groups * SIZE), nn.Linear(WIDTH, groups * SIZE)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = (layer(x).view(batch, length, self.groups, -1).transpose(1, 2) for layer in (self.k, self.v))
        if cache is not None:
            k, v = (torch.cat([old, new], 2) for old, new in zip(cache, (k, v), strict=True)) if cache else (k, v)
            cache[:] = [k, v]
        k, v = (some.repeat_interleave(self.heads // self.groups, 1) for some in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class Decoder(nn.Module):
    """Two blocks of attention and an MLP over tokens."""

    def __init__(self, groups: int = HEADS) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9)
        self.attentions = nn.ModuleList(Attention(groups) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH)) for _ in self.attentions
        )
        self.checkpointing = False

    def forward(self, tokens: Tensor, caches: list[list[Tensor]] | None = None) -> Tensor:
        x = self.embedding(tokens)
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            if self.checkpointing:
                x = x + checkpoint(attention, x, use_reentrant=False)
            else:
                x = x + attention(x, None if caches is None else caches[i])
            x = x + mlp(x)
        return self.head(x)


TOKENS = torch.randint(0, 9, (40, 5), generator=torch.Generator().manual_seed(0))
BATCHES = [TOKENS[:20], TOKENS[20:]]
PATH = "attentions.0.out"


def reads(net: nn.Module, path: str = PATH) -> Tensor:
    """What a layer reads, ``(position, input)``."""
    kept: list[Tensor] = []
    hook = net.get_submodule(path).register_forward_pre_hook(lambda _, args: kept.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        net(TOKENS)
    hook.remove()
    return kept[0]


def columns_of(heads: Any) -> list[int]:
    return [head * SIZE + i for head in heads for i in range(SIZE)]


@for_each("gone", [(1,), (0, 2), (0, 1, 3)])
def test_the_output_projection_is_solved_again_on_the_heads_that_stay(gone):
    net = seeded(Decoder, double=True)
    keep = columns_of(head for head in range(HEADS) if head not in gone)
    x, weight, bias = reads(net), net.attentions[0].out.weight.detach(), net.attentions[0].out.bias.detach()
    prune(net, TOKENS[:2], {"attentions.0.q": columns_of(gone)}, BATCHES, compensation="least_squares")
    out = net.attentions[0].out.requires_grad_(False)
    target, kept = x @ weight.T + bias, x[:, keep]
    centred, scale = kept - kept.mean(0), float(kept.var(0, correction=0).mean())
    solutions = []
    for ridge in RIDGES[:-1]:  # as rows that ask for no change
        rows = torch.cat([centred, (ridge * scale * len(x)) ** 0.5 * torch.eye(len(keep))])
        rest = target - kept @ weight[:, keep].T
        asked = torch.cat([rest - rest.mean(0), torch.zeros(len(keep), WIDTH)])
        solutions.append(weight[:, keep] + torch.linalg.lstsq(rows, asked).solution.T)
    solutions.append(weight[:, keep])
    assert min(float((out.weight - solution).abs().max()) for solution in solutions) < 1e-7
    torch.testing.assert_close(out(kept).mean(0), target.mean(0), rtol=1e-9, atol=1e-9)
    assert float((out(kept) - target).square().mean()) <= float((rest - rest.mean(0)).square().mean()) + 1e-12


def test_reconstruction_takes_the_head_that_the_others_make_up_for_best():
    net = seeded(Decoder, double=True)
    x, weight = reads(net), net.attentions[0].out.weight.detach()
    s = torch.cov(x.T, correction=0)
    s = s + RIDGE * s.diagonal().mean() * torch.eye(len(s))

    def error(heads: tuple[int, ...]) -> float:
        gone, stay = columns_of(heads), columns_of(h for h in range(HEADS) if h not in heads)
        rest = s[gone][:, gone] - s[gone][:, stay] @ torch.linalg.solve(s[stay][:, stay], s[stay][:, gone])
        return float(torch.trace(weight[:, gone] @ rest @ weight[:, gone].T))

    first = min(range(HEADS), key=lambda head: error((head,)))
    second = min((h for h in range(HEADS) if h != first), key=lambda head: error((first, head)))
    others = ["mlps.*", "attentions.1*", "head"]
    for amount, expected in ((0.25, {first}), (0.5, {first, second})):
        cut = seeded(Decoder, double=True)
        plan = prune(cut, TOKENS[:2], PruningBudget("reconstruction", amount=amount, ignore=others), BATCHES).plan
        assert plan.neurons["attentions.0.q"] == tuple(sorted(columns_of(expected)))


@pytest.fixture(params=[HEADS, 2])
def pruned(request) -> Decoder:
    net = seeded(Decoder, request.param)
    prune(net, TOKENS[:2], PruningBudget("weight_l2", target_macs=0.7))
    assert net.attentions[0].heads < HEADS
    return net.eval()


def test_a_pruned_decoder_continues_with_a_cache_as_without(pruned):
    caches: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        logits = [pruned(TOKENS[:, step : step + 1], caches) for step in range(5)]
        torch.testing.assert_close(torch.cat(logits, 1), pruned(TOKENS))
    assert caches[0][0].shape[1] == pruned.attentions[0].groups


def test_a_pruned_decoder_trains_with_checkpoints_as_without(pruned):
    gradients = []
    for pruned.checkpointing in (False, True):
        pruned.zero_grad()
        pruned(TOKENS).square().sum().backward()
        gradients.append([p.grad.clone() for p in pruned.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_pruned_decoder_is_exported(pruned, tmp_path):
    with torch.no_grad():
        expected = pruned(TOKENS)
        assert torch.equal(torch.export.export(pruned, (TOKENS,)).module()(TOKENS), expected)
    torch.onnx.export(pruned, (TOKENS,), dynamo=True, verbose=False).save(tmp_path / "net.onnx")
    evaluator = onnx.reference.ReferenceEvaluator(onnx.load(tmp_path / "net.onnx"))
    (outputs,) = evaluator.run(None, {evaluator.input_names[0]: TOKENS.numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs), expected, rtol=1e-5, atol=1e-5)


def test_every_choice_of_heads_can_be_cut_as_long_as_one_stays():
    for count in (1, 3):
        for heads in itertools.combinations(range(HEADS), count):
            net = seeded(Decoder, double=True)
            prune(net, TOKENS[:2], {"attentions.1.q": columns_of(heads)})
            assert net.attentions[1].heads == HEADS - count
