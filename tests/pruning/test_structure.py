"""What cannot be cut is refused by name and stays whole; and to look at a model is to leave it alone."""

import random
import re
import sys
import warnings
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as masks

from lightning_neurons import PruningError, describe_structure, prune
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover
from tests.models import pictures, seeded
from tests.pruning.nets import LeNet, Tokens, codes, net_and_inputs
from tests.tables import for_each

BUDGET = {"criterion": "weight_l2", "amount": 0.3}


@pytest.fixture(autouse=True)
def _without_clock(monkeypatch):
    """To keep the time limit, a clock is read at every call: with checks of shapes that takes ten times as long."""
    monkeypatch.setattr(sys, "setprofile", lambda check: None)


def photograph(net: nn.Module) -> dict[str, Any]:
    """Everything of a model that somebody else could notice."""
    tensors = {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers())}
    modules = dict(net.named_modules())
    return {
        "objects": [*map(id, modules.values()), *map(id, tensors.values())],
        "versions": {name: t._version for name, t in tensors.items() if not t.is_inference()},
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "gradients": {name: None if t.grad is None else t.grad.clone() for name, t in tensors.items()},
        "flags": {name: t.requires_grad for name, t in tensors.items()},
        "modes": {name: m.training for name, m in modules.items()},
        "hooks": {n: [len(v) for k, v in vars(m).items() if k.endswith("_hooks")] for n, m in modules.items()},
        "sizes": repr(net),
        "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
        "random": [
            torch.get_rng_state(),
            torch.tensor(np.random.get_state()[1]),
            torch.tensor(random.getstate()[1][:-1]),
        ],
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


def changed(before: dict[str, Any], net: nn.Module) -> list[str]:
    after = photograph(net)
    return [what for what in before if not same(before[what], after[what])]


def freeze_some(net: nn.Module) -> None:
    for index, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(index % 3 == 0)


def train_some(net: nn.Module) -> None:
    for index, module in enumerate(net.modules()):
        module.training = index % 2 == 0


STATES = {
    "as it is": (lambda net: None, nullcontext),
    "frozen": (lambda net: net.requires_grad_(False), nullcontext),
    "partly frozen": (freeze_some, nullcontext),
    "training": (lambda net: net.train(), nullcontext),
    "partly training": (train_some, nullcontext),
    "no_grad": (lambda net: None, torch.no_grad),
    "inference_mode": (lambda net: None, torch.inference_mode),
}


@cache
def document_of(name: str) -> dict[str, Any]:
    return describe_structure(*net_and_inputs(name))


@for_each("state", STATES)
@for_each("name", ["MobileNetV3", "decoder", "tokens"])
def test_looking_at_a_model_finds_the_same_in_any_state_and_leaves_no_trace(name, state):
    net, x = net_and_inputs(name)
    prepare, context = STATES[state]
    net(x).sum().backward()
    prepare(net)
    before = photograph(net)
    with context():
        assert describe_structure(net, x) == document_of(name)
    assert changed(before, net) == []


@for_each("state", STATES)
def test_a_cut_in_any_state_is_the_same_and_keeps_modes_flags_and_random_numbers(state):
    net, x = net_and_inputs("VGG")
    expected, _ = net_and_inputs("VGG")
    prune(expected, x, {"features.4": [0, 3]})
    prepare, context = STATES[state]
    prepare(net)
    before = photograph(net)
    with context():
        prune(net, x, {"features.4": [0, 3]})
    assert not {"flags", "modes", "hooks", "random", "attributes"} & {*changed(before, net)}
    for name, tensor in expected.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor)
    net.requires_grad_(True)(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())


def test_the_model_itself_never_runs():
    net, x = net_and_inputs("LeNet")
    net.register_forward_pre_hook(lambda module, inputs: ran.append(module))
    ran: list[nn.Module] = []
    discover(net, Example(x))
    assert net not in ran


def convolutions(*start: nn.Module, width: int = 8) -> nn.Module:
    """``start`` makes 8 or ``width`` channels; behind it are ``fine`` and a hidden linear layer that can be cut."""
    net = nn.Sequential(*start)
    net.add_module("fine", nn.Conv2d(width, 5, 3))
    for name, module in (("pool", nn.AdaptiveAvgPool2d(2)), ("flat", nn.Flatten()), ("fc", nn.Linear(20, 6))):
        net.add_module(name, module)
    net.add_module("act", nn.ReLU())
    net.add_module("head", nn.Linear(6, 4))
    return net


class Call(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Sequences(nn.Module):
    """Tokens through a layer of attention or of recurrence."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.embed, self.start, self.mixer = nn.Embedding(11, 8), nn.Linear(8, 8), mixer
        self.fc, self.head = nn.Linear(8, 6), nn.Linear(6, 11)

    def forward(self, codes: Tensor) -> Tensor:
        x = F.relu(self.start(self.embed(codes)))
        mixed = self.mixer(x, x, x) if isinstance(self.mixer, nn.MultiheadAttention) else self.mixer(x)
        return self.head(F.relu(self.fc(mixed[0])))


def tied() -> nn.Module:
    """What the first reads, the second makes, with the same weights."""
    net = convolutions(conv(8, 8), nn.ReLU(), conv(8, 8))
    net[0].weight = net[2].weight
    return nn.Sequential(conv(), nn.ReLU(), *net)


def with_old_weight_norm(conv: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(conv)


def with_mask(conv: nn.Module) -> nn.Module:
    return masks.l1_unstructured(conv, "weight", 0.5)


def conv(inputs: int = 3, outputs: int = 8, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **kwargs)


def hard_coded() -> nn.Module:
    view = Call(lambda x: x.view(-1, 128))
    return nn.Sequential(conv(), nn.AdaptiveAvgPool2d(4), view, nn.Linear(128, 6), nn.ReLU(), nn.Linear(6, 4))


HARD_CODED = (
    r"the forward fails without them at test_structure.py:\d+, `view = Call\(lambda x: x.view\(-1, 128\)\)` "
    r"\(RuntimeError: shape '\[-1, 128\]'"
)
REFUSED = {
    "GroupNorm": (lambda: convolutions(conv(), nn.GroupNorm(1, 8)), "0", r"1: GroupNorm normalises over all of them"),
    "weight norm": (lambda: convolutions(parametrizations.weight_norm(conv())), "0", r"0: .* is parametrized"),
    "spectral norm": (lambda: convolutions(parametrizations.spectral_norm(conv())), "0", r"0: .* is parametrized"),
    "old weight norm": (lambda: convolutions(with_old_weight_norm(conv())), "0", r"0: .*reparametrized"),
    "mask": (lambda: convolutions(with_mask(conv())), "0", r"0: its Conv2d has a mask"),
    "attention": (
        lambda: Sequences(nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)),
        "start",
        r"mixer: MultiheadAttention adds a key and a value of its own to each head",
    ),
    "masked gates": (
        lambda: Sequences(masks.l1_unstructured(nn.GRU(8, 8, batch_first=True), "weight_hh_l0", 0.5)),
        "start",
        r"mixer: weight_hh_l0 of its GRU is masked or computed",
    ),
    "tied": (tied, "0", r"2.weight and 4.weight are one parameter, and it would not be cut alike for both"),
    "output": (LeNet, "fc3", r"its neurons are the model's output"),
    "hard-coded view": (hard_coded, "0", HARD_CODED),
    "norm over neighbours": (
        lambda: convolutions(conv(), nn.LocalResponseNorm(3)),
        "0",
        r"its neurons cannot be followed: something between them and their consumers adds channels",
    ),
    "mean of channels": (
        lambda: convolutions(conv(), Call(lambda x: x - x.mean(1, True))),
        "0",
        r"its neurons cannot be followed: mean makes one value of all of them",
    ),
    "queries": (lambda: Tokens(attend=True), "q", r"its neurons cannot be followed: a function reads them, .*\(bmm\)"),
    "features of style": (
        lambda: convolutions(conv(), Call(lambda x: (x.flatten(2) @ x.flatten(2).mT)[:, None]), width=1),
        "0",
        r"its neurons cannot be followed: a function multiplies each with each \(bmm\)",
    ),
    "likeness of places": (
        lambda: convolutions(conv(), Call(lambda x: (x.flatten(2).mT @ x.flatten(2))[:, None]), width=1),
        "0",
        r"its neurons cannot be followed: a function reads them, not a layer \(bmm\)",
    ),
    "softmax of channels": (lambda: convolutions(conv(), nn.Softmax(1)), "0", r"the output differs"),
    "shuffled channels": (lambda: convolutions(conv(), nn.ChannelShuffle(2)), "0", r"the output differs"),
}


def refused(name: str) -> tuple[nn.Module, Tensor, str, str]:
    make, layer, reason = REFUSED[name]
    net = seeded(make, double=True)
    return net, codes() if hasattr(net, "embed") else pictures(3, double=True)[0], layer, reason


@for_each("name", REFUSED)
def test_a_layer_that_cannot_be_cut_is_refused_with_the_reason_and_nothing_changes(name):
    net, x, layer, reason = refused(name)
    before = photograph(net)
    with pytest.raises(PruningError, match=rf"^{layer} cannot be cut: {reason}"):
        prune(net, x, {layer: [0]})
    assert changed(before, net) == []


@for_each("name", REFUSED)
def test_with_a_budget_it_stays_whole_and_the_notes_say_why_while_the_rest_is_cut(name):
    net, x, layer, reason = refused(name)
    report = prune(net, x, BUDGET, [x])
    assert [bool(re.match(f"{layer} is not cut: {reason}", note)) for note in report.notes].count(True) == 1
    assert report.plan
    assert layer not in report.plan.neurons
    assert net(x).isfinite().all()
