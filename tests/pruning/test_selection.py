"""Which units go: how many of them, what limits that, and what is said of it."""

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import PruningBudget, UnknownNameError, prune
from lightning_neurons.pruning.selection.group_scores import GroupScores, group_scores
from lightning_neurons.pruning.selection.select import Selection, select
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.structure import Structure, discover
from lightning_neurons.pruning.surgery.surgery import cut, cuts_of
from tests.models import ConvNet, ResidualNet, pictures, seeded
from tests.tables import for_each

SIZES = {"conv1": 6, "conv2": 5, "fc1": 7}
"""The groups of ``ConvNet`` that can be cut."""


class Joined(nn.Module):
    """What one layer makes is added to what two others make side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 2, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(torch.cat([self.a(x), self.b(x)], 1) + self.both(x)).mean((2, 3)))


class Gated(nn.Module):
    """One half of a layer's neurons multiplies the other."""

    def __init__(self) -> None:
        super().__init__()
        self.gated, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gated(x).chunk(2, 1)
        return self.head(self.conv(a * b.sigmoid()).mean((2, 3)))


def two_blocks() -> nn.Sequential:
    """Blocks "0" and "1" of two layers each, and the head."""
    first = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
    second = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5), nn.ReLU())
    return nn.Sequential(nn.Flatten(), first, second, nn.Linear(5, 2))


NETS = {
    "convolutional": ConvNet,
    "residual": functools.partial(ResidualNet, inplace=False),
    "joined": Joined,
    "blocks": two_blocks,
}


def example(name: str) -> Example:
    return Example(pictures(2, channels=1 if name == "blocks" else 3)[0])


@functools.cache
def structure_of(name: str = "convolutional") -> Structure:
    return discover(seeded(NETS[name]), example(name))


def scores_of(**values) -> dict[str, GroupScores]:
    tensors = {root: torch.tensor(value, dtype=torch.float64) for root, value in values.items()}
    return {root: GroupScores(value, value[None]) for root, value in tensors.items()}


def shuffled(structure: Structure, seed: int = 0) -> dict[str, GroupScores]:
    """Distinct scores, the lowest anywhere."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {root: group.size for root, group in structure.offered.items()}
    order = torch.randperm(sum(sizes.values()), generator=generator).split(list(sizes.values()))
    return scores_of(**{root: part.tolist() for root, part in zip(sizes, order, strict=True)})


def choose(scores, name: str = "convolutional", criterion: str = "weight_l2", dense=None, **options) -> Selection:
    budget = PruningBudget(criterion, **{"scope": "global", **options})
    return select(structure_of(name), scores, budget, dense)


def lost(selection: Selection, *roots: str) -> int:
    return sum(len(selection.units.get(root, ())) for root in roots or selection.units)


def cut_net(name: str, units) -> nn.Module:
    """The network without these units."""
    net = seeded(NETS[name])
    cut(net, cuts_of(structure_of(name).groups.values(), units))
    return net


def cost_of(net: nn.Module, inputs: Tensor) -> dict[str, int]:
    """Counted on the network itself: numbers in parameters, and products in the forward of one picture."""
    macs = []

    def count(module: nn.Module, given: tuple, out: Tensor) -> None:
        macs.append(out[0].numel() // module.weight.shape[0] * module.weight.numel())

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(inputs[:1])
    return {"target_params": sum(p.numel() for p in net.parameters()), "target_macs": sum(macs)}


@for_each("amount", [0.01, 0.1, 0.25, 1 / 3, 0.5, 0.6, 0.75, 1.0])
def test_the_amount_of_all_layers_together_goes_from_the_lowest_up(amount):
    scores = shuffled(structure_of())
    selection = choose(scores, amount=amount)
    ranked = sorted((float(s.value[unit]), root, unit) for root, s in scores.items() for unit in range(len(s.value)))
    caps, expected = {root: size - 1 for root, size in SIZES.items()}, []
    for _, root, unit in ranked:
        if len(expected) < round(amount * 18) and caps[root]:
            caps[root] -= 1
            expected.append((root, unit))
    assert sorted((root, unit) for root, units in selection.units.items() for unit in units) == sorted(expected)
    assert all(units == sorted(units) for units in selection.units.values())


@for_each("amount", [0.01, 0.1, 0.25, 1 / 3, 0.5, 0.6, 0.75, 1.0])
def test_the_amount_of_each_layer_goes_whatever_the_others_score(amount):
    scores = shuffled(structure_of())
    selection = choose(scores, scope="layer", amount=amount)
    for root, size in SIZES.items():
        count = min(round(amount * size), size - 1)
        assert selection.units.get(root, []) == sorted(scores[root].value.argsort()[:count].tolist())


@for_each("amount", [0.1, 0.25, 0.5, 0.75])
def test_the_amount_of_each_block_goes_whatever_the_others_score(amount):
    structure, scores = structure_of("blocks"), shuffled(structure_of("blocks"))
    assert structure.blocks == {"1.0": "1", "1.2": "1", "2.0": "2", "2.2": "2", "3": "3"}
    selection = choose(scores, "blocks", scope="block", amount=amount)
    for block, size in (("1", 14), ("2", 14)):
        roots = [f"{block}.0", f"{block}.2"]
        assert lost(selection, *roots) == round(amount * size)
        gone = [float(scores[root].value[unit]) for root in roots for unit in selection.units.get(root, ())]
        everything = sorted(float(value) for root in roots for value in scores[root].value)
        assert sorted(gone) == everything[: len(gone)]


def test_coupled_neurons_count_once():
    selection = choose(shuffled(structure_of("residual")), "residual", amount=0.4)
    assert lost(selection) == round(0.4 * 10)


@for_each("target", [0.9, 0.6, 0.3])
@for_each("name", ["convolutional", "residual", "blocks"])
@for_each("rule", ["target_params", "target_macs"])
def test_a_target_is_met_and_would_not_be_with_one_unit_more(rule, name, target):
    inputs, scores = example(name).inputs, shuffled(structure_of(name))
    units = choose(scores, name, **{rule: target}).units
    allowed = target * cost_of(seeded(NETS[name]), inputs)[rule]
    assert cost_of(cut_net(name, units), inputs)[rule] <= allowed
    last = max(
        ((root, unit) for root, chosen in units.items() for unit in chosen), key=lambda u: scores[u[0]].value[u[1]]
    )
    given_back = {root: [unit for unit in chosen if (root, unit) != last] for root, chosen in units.items()}
    assert cost_of(cut_net(name, given_back), inputs)[rule] > allowed


@for_each("rule", ["target_params", "target_macs"])
def test_a_target_by_layer_takes_the_same_share_of_each(rule):
    for target in (0.8, 0.5, 0.3):
        selection = choose(shuffled(structure_of()), scope="layer", **{rule: target})
        shares = [lost(selection, root) / size for root, size in SIZES.items()]
        assert max(shares) - min(shares) <= 1 / min(SIZES.values())


def test_a_target_of_everything_removes_nothing():
    assert choose(shuffled(structure_of()), target_params=1.0).units == {}
    assert choose(shuffled(structure_of()), target_macs=1.0).units == {}


SCORES = scores_of(conv1=[-0.5, 0, 0.5, 1, 2, 3], conv2=[0.5, 0.25, 7, 7, 7], fc1=[9.0] * 7)


def test_a_threshold_of_importance_takes_what_is_at_most_so_important():
    assert choose(SCORES, threshold=0.5).units == {"conv1": [0, 1, 2], "conv2": [0, 1]}
    assert choose(SCORES, threshold=0.4999).units == {"conv1": [0, 1], "conv2": [1]}
    assert choose(SCORES, threshold=-0.5).units == {"conv1": [0]}
    assert choose(SCORES, threshold=-0.51).units == {}


def test_a_threshold_of_deadness_takes_what_is_at_least_so_dead():
    scores = scores_of(conv1=[-1.0, -0.999, -0.5, -0.0, 0, 0], conv2=[-0.9] * 3 + [0.0, -1.0], fc1=[0.0] * 7)
    assert choose(scores, criterion="deadness", threshold=1).units == {"conv1": [0], "conv2": [4]}
    assert choose(scores, criterion="apoz", threshold=0.9).units == {"conv1": [0, 1], "conv2": [0, 1, 2, 4]}
    assert choose(scores, criterion="deadness", threshold=0.9001).units == {"conv1": [0, 1], "conv2": [4]}


def test_the_head_is_never_cut_and_the_reason_is_given():
    for options in ({"amount": 1.0}, {"target_params": 0.01}, {"threshold": 1e9}):
        selection = choose({**shuffled(structure_of()), **scores_of(fc2=[-9.0] * 4)}, **options)
        assert "fc2" not in selection.units
        assert "fc2 is not cut: its neurons are the model's output" in selection.notes


def test_what_is_ignored_stays_with_all_that_is_coupled_with_it():
    selection = choose(shuffled(structure_of("residual")), "residual", amount=1.0, ignore=["conv3"])
    assert set(selection.units) == {"conv2"}
    assert "conv1 is not cut: conv3 is to be ignored" in selection.notes
    assert choose(shuffled(structure_of()), amount=1.0, ignore=["conv*", "fc1"]).units == {}
    with pytest.raises(UnknownNameError, match="ignore: nothing matches 'conv9'"):
        choose(shuffled(structure_of()), amount=0.5, ignore=["conv9"])


def test_with_agreement_only_the_lowest_share_of_every_layer_goes():
    layers = {"conv1": [0.0, 1, 2, 3, 4], "conv3": [30.0, 0, 20, 10, 40], "conv2": [0.0, 1, 2, 3, 4]}
    scores = {layer: torch.tensor(value, dtype=torch.float64) for layer, value in layers.items()}
    for amount in (0.2, 0.4, 0.6, 0.8):
        budget = PruningBudget("weight_l2", amount=amount, agreement="all", scope="layer")
        structure = structure_of("residual")
        selection = select(structure, group_scores(structure.offered, scores, budget), budget)
        low = round(amount * 5)
        both = set(range(low)) & set(torch.argsort(scores["conv3"])[:low].tolist())
        assert selection.units.get("conv1", []) == sorted(both)
        assert selection.units["conv2"] == list(range(low))
        if len(both) < low:
            assert any("conv1" in note and "not all of its layers agree" in note for note in selection.notes)


def test_with_agreement_layers_side_by_side_can_be_cut_too():
    layers = {"both": [0.0, 1, 2, 3, 4, 5], "a": [0.0, 1, 3, 2], "b": [0.0, 1]}
    scores = {layer: torch.tensor(value, dtype=torch.float64) for layer, value in layers.items()}
    budget = PruningBudget("weight_l2", amount=0.5, agreement="all", scope="layer")
    structure = structure_of("joined")
    assert list(structure.offered) == ["both"]
    found = group_scores(structure.offered, scores, budget)
    assert not found["both"].value.isnan().any()
    assert select(structure, found, budget).units["both"] == [0, 1]


@for_each("amount", [0.2, 0.5])
def test_a_budget_leaves_alone_what_it_cannot_cut_right(amount):
    net = seeded(Gated)
    report = prune(net, pictures(2)[0], PruningBudget("random", amount=amount))
    assert 0 < len(report.plan.neurons["conv"]) < 5
    assert net(pictures(2)[0]).isfinite().all()
