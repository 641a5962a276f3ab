"""Which heads of ``nn.MultiheadAttention`` a budget removes, beside norms of their rows by hand."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import PruningBudget, PruningError, prune
from lightning_neurons.pruning.planning import allocations
from lightning_neurons.pruning.selection.budget_fill import Dense
from lightning_neurons.pruning.selection.head_scores import head_scores
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import discover
from tests.models import seeded
from tests.tables import for_each

HEADS, SIZE, WIDTH = 4, 3, 12


class Net(nn.Module):
    """Attention over tokens, with heads of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.Linear(WIDTH, 3)
        with torch.no_grad():
            self.attention.in_proj_weight.mul_(
                torch.tensor([3.0, 1.0, 4.0, 2.0]).repeat_interleave(SIZE).repeat(3)[:, None]
            )
            self.attention.out_proj.weight.mul_(torch.tensor([1.0, 4.0, 2.0, 3.0]).repeat_interleave(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def rows_of(head: int) -> list[int]:
    return [WIDTH * part + SIZE * head + i for part in range(3) for i in range(SIZE)]


def made() -> tuple[Net, Tensor]:
    return seeded(Net, double=True), torch.randn(16, 5, WIDTH).double()


def by_hand(net: Net, criterion: str) -> list[float]:
    incoming, columns = net.attention.in_proj_weight.detach(), net.attention.out_proj.weight.detach()
    found = []
    for head in range(HEADS):
        if criterion == "outgoing_l2":
            vectors = [columns[:, i] for i in range(SIZE * head, SIZE * (head + 1))]
        else:
            vectors = [incoming[i] for i in rows_of(head)]
        norms = [float(v.abs().sum() if criterion == "weight_l1" else v.square().sum().sqrt()) for v in vectors]
        found.append(sum(norms) / len(norms))
    return found


@for_each("criterion", ["weight_l1", "weight_l2", "outgoing_l2", "fisher", "rms"])
def test_scores_are_mean_norms_of_rows(criterion):
    net, x = made()
    structure, budget = discover(net, Example(x)), PruningBudget(criterion, amount=0.3)
    scores, notes = head_scores(structure.offered, net, budget, {})
    torch.testing.assert_close(scores["attention"].value, torch.tensor(by_hand(net, criterion)).double())
    ranked = "heads and hidden units are ranked by the L2 norm of their weights"
    told = (f"{ranked}, as {criterion} is not measured in attention",)
    assert notes == (told if criterion in ("fisher", "rms") else ())


@for_each(
    "budget",
    [
        {"criterion": "deadness", "amount": 0.5},
        {"criterion": "fisher", "threshold": 100.0},
        {"criterion": "fisher", "amount": 0.5, "scope": "global"},
        {"criterion": "norm_scale", "amount": 0.5},
    ],
)
def test_what_is_not_comparable_gives_heads_no_score(budget):
    net, x = made()
    batches = [(x, torch.zeros(16, 5, dtype=torch.long))]
    loss = {"loss_fn": lambda model, batch: model(batch[0]).square().mean()}
    report = prune(net, x, budget, batches, compensation="none", **loss)
    assert "attention" not in report.plan.neurons
    assert "attention: 4 of 4 neurons have no score (not measured) and stay" in report.notes


def test_the_reasons_say_what_the_heads_were_ranked_by():
    net, x = made()
    report = prune(net, x, {"criterion": "rms", "amount": 0.5}, [x], compensation="none")
    assert report.plan.neurons["attention"] == tuple(sorted(rows_of(1) + rows_of(3)))
    assert re.match(r"L2 norm of weights \d\.\d+: place 1 of 4 from below", report.plan.reasons["attention"][SIZE])


@for_each("criterion", ["reconstruction", "weight_l2"])
def test_least_squares_solves_the_output_projection_again(criterion):
    net, x = made()
    with torch.no_grad():  # the values of two heads are those of the others, turned round
        attention, half = net.attention, WIDTH // 2
        for weight in (attention.in_proj_weight, attention.in_proj_bias):
            for part in range(3):
                weight[WIDTH * part + half : WIDTH * (part + 1)] = weight[WIDTH * part : WIDTH * part + half]
        attention.in_proj_bias[2 * WIDTH :].normal_()
    small, expected = copy.deepcopy(net), net(x)
    budget = {"criterion": criterion, "amount": 0.5, "scope": "layer"}
    report = prune(small, x, budget, [x[:8], x[8:]], compensation="least_squares")
    assert small.attention.num_heads == 2
    if criterion == "reconstruction":  # one of each pair can make up for the other
        kept = {head % 2 for head in range(HEADS) if rows_of(head)[0] not in report.plan.neurons["attention"]}
        assert kept == {0, 1}
        torch.testing.assert_close(small(x), expected, rtol=0, atol=0.01 * float(expected.detach().abs().max()))


def test_an_amount_counts_heads_over_several_cuts():
    net, x = made()
    dense = Dense.of(discover(net, Example(x)))
    prune(net, x, {"attention": rows_of(0)}, compensation="none")
    structure, chosen = discover(net, Example(x)), {}
    group = structure.offered["attention"]
    assert (dense.size(group, structure), group.size) == (HEADS, HEADS - 1)
    for amount in (0.25, 0.5, 0.75):
        budget = PruningBudget("weight_l2", amount=amount)
        scores, _ = head_scores(structure.offered, net, budget, {})
        chosen[amount] = len(allocations(structure, budget, scores, dense=dense)[0].units.get("attention", ()))
    assert chosen == {0.25: 0, 0.5: 1, 0.75: 2}


def test_less_than_a_head_is_nothing_and_all_heads_are_too_many():
    net, x = made()
    report = prune(net, x, {"criterion": "weight_l2", "amount": 0.1, "ignore": ["*out_proj"]}, compensation="none")
    assert "nothing is cut: amount=0.1 is less than one unit, such as a head" in report.notes
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(PruningError, match=r"attention cannot lose 36 of its 36 neurons: at least 1 must stay"):
        prune(net, x, {"attention": range(36)})
    with pytest.raises(PruningError, match=r"target_macs=0.01 is not reached"):
        prune(net, x, {"criterion": "weight_l2", "target_macs": 0.01})
    assert type(net.attention) is nn.MultiheadAttention
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
