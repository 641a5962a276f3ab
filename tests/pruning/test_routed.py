"""MACs of models in which values decide what runs: they are those on the example, before a cut and after it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_neurons import describe_structure, prune
from tests.models import seeded
from tests.tables import for_each

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
ROUTED = "MACs are those on the example, as values decide which samples run through"


class Experts(nn.Module):
    """Each sample goes through the two experts that a gate chooses for it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        widths = (16, 16, 12, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, w), nn.ReLU(), nn.Linear(w, 8)) for w in widths)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        shares, chosen = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            out = out.index_add(0, rows, shares[rows, places, None] * expert(x[rows]))
        return self.head(out)


class Leaving(nn.Module):
    """Samples that are classified early leave."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.early, self.head = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.experts = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        out = self.early(x).clone()
        unsure = out.softmax(-1).amax(-1) < 0.5
        out[unsure] = self.head(self.experts(x[unsure]))
        return out


def recount(net: nn.Module, x: Tensor = X) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(x)
    return round(counter.get_total_flops() / 2 / len(x))


@for_each("seed", range(6))
@for_each("make", [Experts, Leaving])
def test_what_is_predicted_is_what_is_counted_afterwards(make, seed):
    torch.manual_seed(seed)
    net = make()
    before = recount(net)
    cost = prune(net, X, {"criterion": "weight_l2", "amount": 0.4}).cost
    assert (cost.macs, cost.macs_after) == (before, recount(net))
    assert describe_structure(net, X)["macs"] == cost.macs_after


@for_each("make", [Experts, Leaving])
def test_layers_that_do_not_run_on_every_sample_are_named(make):
    notes: list[Any] = [note for note in prune(seeded(make), X, 0.3).notes if note.startswith("MACs")]
    assert len(notes) == 1
    assert notes[0].startswith(ROUTED)
    assert "experts.0" in notes[0]
    assert "stem" not in notes[0]


def test_an_expert_that_no_sample_goes_through_is_counted_with_nothing():
    net = seeded(Experts)
    with torch.no_grad():
        net.gate.bias[2] = -1e6
    report = prune(net, X, 0.3)
    assert not any("no formula" in note for note in report.notes)
    assert report.cost.macs_after == recount(net)
