"""Where results come from: ``Origins`` itself, and the layers that a class study therefore looks at."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import ArgumentError, class_study
from lightning_neurons.hooks.output_layers import Origins
from tests.models import seeded
from tests.tables import for_each


class Wired(nn.Module):
    """Four layers of four neurons, and an expression of them."""

    def __init__(self, run) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.norm, self.run = nn.BatchNorm1d(4), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def written_into(m, x):
    out = torch.zeros(len(x), 4)
    out[:, :2] = m.b(m.a(x))[:, :2]
    return out


WIRINGS = {
    "a chain": (lambda m, x: m.b(m.a(x)), "b", "ab"),
    "functions in between": (lambda m, x: F.softmax(m.norm(m.b(torch.relu(m.a(x)))) * 2 + 1, 1), "b", "ab"),
    "in place": (lambda m, x: m.b(m.a(x).relu_()).mul_(2), "b", "ab"),
    "added in place": (lambda m, x: m.b(m.a(x)).add_(m.c(x)), "bc", "abc"),
    "a sum": (lambda m, x: m.b(m.a(x)) + m.c(x), "bc", "abc"),
    "a shortcut": (lambda m, x: (lambda h: m.b(h) + h)(m.a(x)), "ab", "ab"),
    "joined": (lambda m, x: torch.cat([m.b(m.a(x)), m.c(x)], 1), "bc", "abc"),
    "stacked": (lambda m, x: torch.stack([m.a(x), m.c(x)]).mean(0), "ac", "ac"),
    "a part": (lambda m, x: m.b(m.a(x))[:, 1:3], "b", "ab"),
    "split": (lambda m, x: m.b(m.a(x)).chunk(2, 1)[0], "b", "ab"),
    "a method": (lambda m, x: m.b(m.a(x)).view(-1, 2, 2).transpose(1, 2).flatten(1), "b", "ab"),
    "an operator": (lambda m, x: 1 / m.b(-m.a(x)), "b", "ab"),
    "keywords": (lambda m, x: torch.where(x > 0, input=m.a(x), other=m.b(x)), "ab", "ab"),
    "by a condition": (lambda m, x: torch.where(m.a(x) > 0, m.b(x), m.c(x)), "abc", "abc"),
    "a layer twice": (lambda m, x: m.a(torch.relu(m.a(x))), "a", "a"),
    "a layer on the side": (lambda m, x: (m.b(m.a(x)), m.c(m.a(x)))[0], "b", "ab"),
    "a layer afterwards": (lambda m, x: (lambda h: (m.b(h), m.c(h)))(m.a(x))[0], "b", "ab"),
    "nothing": (lambda m, x: (m.a(x), x * 2)[1], "", ""),
    "a dictionary": (lambda m, x: {"out": [m.b(m.a(x)), m.c(x)], "n": 3}, "bc", "abc"),
    "written into": (written_into, "b", "ab"),
}


@for_each("name", WIRINGS)
def test_where_a_result_comes_from(name):
    run, nearest, every = WIRINGS[name]
    net, x = seeded(Wired, run), torch.randn(6, 4)
    expected = net(x)
    with torch.no_grad(), Origins({layer: net.get_submodule(layer) for layer in "abcd"}) as origins:
        found = net(x)
    assert origins.of(found) == ({*nearest}, {*every})
    assert not any(module._forward_hooks for module in net.modules())
    if isinstance(found, Tensor):
        assert type(found) is Tensor
        assert torch.equal(found, expected)


def test_only_the_layers_that_are_given_count():
    net, x = seeded(Wired, lambda m, x: m.c(m.b(m.a(x)))), torch.randn(6, 4)
    with Origins({"a": net.a, "d": net.d}) as origins:
        found = net(x)
    assert origins.of(found) == ({"a"}, {"a"})
    assert origins.of([x, None, 3]) == (set(), set())


def test_a_forward_that_fails_leaves_no_hooks():
    net = seeded(Wired, lambda m, x: m.b(m.a(x)) / None)
    with pytest.raises(TypeError), Origins({"a": net.a, "b": net.b}):
        net(torch.randn(6, 4))
    assert not any(module._forward_hooks for module in net.modules())
    assert type(torch.relu(torch.zeros(1))) is Tensor


class TwoHeads(nn.Module):
    def __init__(self, *, ours_first: bool) -> None:
        super().__init__()
        self.body, self.side = nn.Linear(5, 8), nn.Linear(8, 6)
        self.other, self.ours = nn.Linear(6, 3), nn.Linear(8, 3)
        self.ours_first = ours_first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.body(x))
        if self.ours_first:
            ours = self.ours(h)
        other = self.other(torch.relu(self.side(h)))
        return (ours if self.ours_first else self.ours(h)), other


DATA = [(torch.randn(24, 5, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3)]


@for_each("ours_first", [True, False])
def test_the_head_that_is_not_asked_for_is_left_out(ours_first):
    net = seeded(TwoHeads, ours_first=ours_first)
    for place, layers, chain in (
        (0, ["body"], nn.Sequential(net.body, nn.ReLU(), net.ours)),
        (1, ["body", "side"], nn.Sequential(net.body, nn.ReLU(), net.side, nn.ReLU(), net.other)),
    ):
        report = class_study(net, DATA, forward=lambda m, b, place=place: m(b[0])[place])
        alone = class_study(chain, DATA)
        assert list(report.members) == layers
        for ours, theirs in zip(report.members, alone.members, strict=True):
            assert torch.equal(report.members[ours], alone.members[theirs])
            torch.testing.assert_close(report.importance[ours], alone.importance[theirs])
        for ours, theirs in zip(report.accuracies, alone.accuracies, strict=True):
            assert ours[:2] == theirs[:2]
            assert ours[2:] == pytest.approx(theirs[2:], nan_ok=True)
    with pytest.raises(ArgumentError, match=r"layers=\['side'\].*lead to those of the logits: body"):
        class_study(net, DATA, forward=lambda m, b: m(b[0])[0], layers=["side"])


class Sliced(nn.Module):
    """A head that is wider than the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))[:, :3]


def test_a_wide_head_of_which_a_part_is_read_makes_the_logits():
    net = seeded(Sliced)
    report = class_study(net, DATA)
    narrow = nn.Sequential(net.body, nn.ReLU(), nn.Linear(8, 3))
    narrow[2].weight.data, narrow[2].bias.data = net.head.weight.data[:3].clone(), net.head.bias.data[:3].clone()
    alone = class_study(narrow, DATA)
    assert list(report.members) == ["body"]
    assert torch.equal(report.members["body"], alone.members["0"])
    for ours, theirs in zip(report.accuracies, alone.accuracies, strict=True):
        assert ours[2:] == pytest.approx(theirs[2:], nan_ok=True)
    with pytest.raises(ArgumentError, match=r"layers=\['head'\].*logits: body"):
        class_study(net, DATA, layers=["head"])


class Narrow(nn.Module):
    """A hidden layer of as many neurons as there are classes; the logits are made first and returned last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.head = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(torch.relu(self.first(x)))))


def test_a_hidden_layer_of_as_many_neurons_as_classes_is_studied():
    net = seeded(Narrow)
    assert list(class_study(net, DATA).members) == ["first", "hidden"]
    assert list(class_study(net, DATA, layers=["hidden"]).members) == ["hidden"]
    with pytest.raises(ArgumentError, match=r"layers=\['head'\].*logits: first, hidden"):
        class_study(net, DATA, layers=["head"])


def test_layers_that_do_not_lead_to_the_logits_change_nothing():
    class Idle(Narrow):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            self.idle(self.first(x))
            return logits

    net = seeded(Idle)
    report = class_study(net, DATA)
    assert list(report.members) == ["first", "hidden"]
    plain = Narrow()
    plain.load_state_dict({n: v for n, v in net.state_dict().items() if not n.startswith("idle")})
    for ours, theirs in zip(report.accuracies, class_study(plain, DATA).accuracies, strict=True):
        assert ours[2:] == pytest.approx(theirs[2:], nan_ok=True)
