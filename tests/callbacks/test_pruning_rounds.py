"""Rounds: how much is due when, by which measurement, and in whose indices it is told."""

import copy
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from torch import nn

from lightning_neurons import NeuronPruningCallback, PruningBudget, PruningPlan, prune
from tests.callbacks.modules import Plain, fit, loader
from tests.callbacks.pruned import Probe, Tagged, pruner, tags

CANDIDATES = 4 + 6 + 8
SHAPES = {
    "linear": lambda way, removed: way,
    "cubic": lambda way, removed: 1 - (1 - way) ** 3,
    "geometric": lambda way, removed: (1 - (1 - removed) ** way) / removed,
}
HALF = PruningBudget("taylor", amount=0.5, scope="global")
VALIDATION = list(loader(24, seed=1))


def copied() -> Probe:
    """The module as the last validation of an epoch has seen it."""
    return Probe("on_validation_end", lambda _, module: copy.deepcopy(module))


def by_hand(module: nn.Module, budget: PruningBudget) -> dict[str, tuple[int, ...]]:
    """What one would remove oneself, in the indices of this module."""
    twin = copy.deepcopy(module)
    report = prune(twin, VALIDATION[0][0][:2], budget, VALIDATION, loss_fn=lambda m, b: m.loss(b))
    return dict(report.plan.neurons)


def removed_by(callback: NeuronPruningCallback) -> list[int]:
    """How many neurons had gone after each round."""
    counts = [len(made.plan) for made in callback.rounds.done]
    return [sum(counts[: i + 1]) for i in range(len(counts))]


class Wide(nn.Sequential):
    """So many neurons that something is due in every round."""

    def __init__(self) -> None:
        relu = nn.ReLU()
        super().__init__(nn.Flatten(), nn.Linear(36, 100), relu, nn.Linear(100, 100), relu, nn.Linear(100, 3))


@pytest.mark.parametrize("shape, every", [("linear", 1), ("linear", 2), ("cubic", 1), ("geometric", 1)])
def test_each_round_removes_the_share_that_is_due(shape, every):
    callback = pruner("weight_l2", amount=0.6, schedule=shape, end_epoch=5, every_n_epochs=every)
    fit(Plain(Wide()), [callback], max_epochs=6)
    rounds = list(range(1, 6, every))
    due = [0.6 * SHAPES[shape](number / len(rounds), 0.6) for number in range(1, len(rounds) + 1)]
    assert removed_by(callback) == [round(share * 200) for share in due]
    assert [made.epoch for made in callback.rounds.done] == rounds
    assert [made.number for made in callback.rounds.done] == list(range(1, len(rounds) + 1))


def test_with_scope_layer_each_layer_loses_the_share_that_is_due():
    callback = pruner("weight_l2", amount=0.6, scope="layer", schedule="linear", end_epoch=3)
    fit(Plain(Wide()), [callback], max_epochs=4)
    for number, made in enumerate(callback.rounds.done, start=1):
        due, before = round(0.6 * number / 3 * 100), round(0.6 * (number - 1) / 3 * 100)
        assert {layer: len(gone) for layer, gone in made.plan.neurons.items()} == {
            "net.1": due - before,
            "net.3": due - before,
        }


@pytest.mark.parametrize("rule", ["target_params", "target_macs"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_round_meets_its_target_and_overshoots_by_less_than_a_neuron(shape, rule):
    callback = pruner("weight_l2", **{rule: 0.5}, schedule=shape, end_epoch=3)
    fit(Plain(Wide()), [callback], max_epochs=4)
    name = {"target_params": "parameters", "target_macs": "macs"}[rule]
    whole = getattr(callback.rounds.dense, name)
    due = [1 - 0.5 * SHAPES[shape](number / 3, 0.5) for number in (1, 2, 3)]
    left = [getattr(made.plan.cost, f"{name}_after") / whole for made in callback.rounds.done]
    largest = (36 + 1 + 100) / whole
    assert all(target - largest < share <= target for share, target in zip(left, due, strict=True))


@pytest.mark.parametrize("criterion", ["fisher", "weight_l2"])
def test_each_round_is_decided_on_the_model_as_it_is_and_told_in_original_indices(criterion):
    callback, seen, module = pruner(criterion, amount=0.6, schedule="linear", end_epoch=3), copied(), Tagged()
    left = Probe("on_train_epoch_start", lambda _, module: tags(module))
    fit(module, [callback, seen, left], max_epochs=4)
    before = PruningPlan({}, dict(callback.plan.widths))
    for made in callback.rounds.done:
        share = len(made.plan) / (CANDIDATES - len(before))
        expected = by_hand(seen.seen[made.epoch - 1], PruningBudget(criterion, amount=share, scope="global"))
        assert PruningPlan(expected).lifted(before).neurons == made.plan.neurons
        before = before.then(PruningPlan(expected))
        assert left.seen[made.epoch] == {layer: before.remaining(layer) for layer in left.seen[made.epoch]}
    assert callback.plan.neurons == before.neurons
    assert len(callback.rounds.done) == 3
    assert tags(module) == {layer: callback.plan.remaining(layer) for layer in tags(module)}


def test_the_last_of_several_validations_of_an_epoch_decides():
    callback, seen = pruner("taylor"), copied()
    module = Tagged(lr=0.1)
    fit(module, [callback, seen], max_epochs=2, val_check_interval=0.25)
    expected = by_hand(seen.seen[0], PruningBudget("taylor", amount=0.33, scope="global"))
    assert callback.plan.neurons == expected


def test_the_callback_says_of_every_neuron_why_it_went():
    callback = pruner("taylor", amount=0.6, schedule="linear", end_epoch=3)
    fit(Plain(), [callback], max_epochs=4)
    assert {n: sorted(why) for n, why in callback.plan.reasons.items()} == {
        n: list(gone) for n, gone in callback.plan.neurons.items()
    }
    assert all("taylor" in text for why in callback.plan.reasons.values() for text in why.values())
    first, last = callback.rounds.done[0].plan.cost, callback.rounds.done[-1].plan.cost
    whole = callback.plan.cost
    assert (whole.parameters, whole.macs) == (first.parameters, first.macs) == (365, 9144)
    assert (whole.parameters_after, whole.macs_after) == (last.parameters_after, last.macs_after)


def neurons(callback: NeuronPruningCallback) -> set[tuple[str, int]]:
    return {(n, i) for n, gone in callback.plan.neurons.items() for i in gone}


def votes(seen: Probe, budget: PruningBudget, epochs: range) -> list[set[tuple[str, int]]]:
    return [{(n, i) for n, gone in by_hand(seen.seen[e], budget).items() for i in gone} for e in epochs]


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_only_what_several_measurements_in_a_row_have_chosen_goes(patience):
    callback, seen = pruner("taylor", amount=0.5, start_epoch=4, patience=patience), copied()
    fit(Tagged(lr=0.2), [callback, seen], max_epochs=5)
    chosen = votes(seen, HALF, range(4 - patience, 4))
    expected = set.intersection(*chosen)
    assert neurons(callback) == expected
    assert (len(expected) < 9) == (patience > 1)


def test_a_round_waits_until_enough_measurements_have_been_made():
    callback, seen = pruner("taylor", amount=0.5, patience=3), copied()
    fit(Tagged(lr=0.05), [callback, seen], max_epochs=4)
    chosen = votes(seen, HALF, range(3))
    assert [made.epoch for made in callback.rounds.done] == [3]
    assert neurons(callback) == set.intersection(*chosen)


def test_votes_are_counted_by_validation_where_there_are_several_in_an_epoch():
    callback = pruner("weight_l2", amount=0.5, patience=2)
    fit(Plain(), [callback], max_epochs=2, val_check_interval=0.5)
    assert [made.epoch for made in callback.rounds.done] == [1]


@pytest.mark.parametrize("every", [1, 2])
def test_later_rounds_remove_what_is_due_when_all_measurements_agree(every):
    callback = pruner(
        "weight_l2", amount=0.6, schedule="linear", start_epoch=2, end_epoch=4, every_n_epochs=every, patience=2,
        ignore=["net.conv*"],
    )  # fmt: skip
    fit(Plain(lr=0.0), [callback], max_epochs=5)  # nothing is trained, so every measurement of fc1 is the same
    rounds = len(range(2, 5, every))
    assert removed_by(callback) == [round(0.6 * number / rounds * 8) for number in range(1, rounds + 1)]


class Residual(nn.Module):
    """Three convolutions that write to one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 9, 3, 1, 1), nn.Conv2d(9, 9, 3, 1, 1), nn.Conv2d(9, 9, 3, 1, 1)
        self.head = nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.a(torch.relu(x))
        return self.head((x + self.b(torch.relu(x))).mean((2, 3)))


@pytest.mark.parametrize("amount", [0.4, 0.7])
def test_with_agreement_of_all_a_coupled_neuron_goes_only_where_each_layer_agrees(amount):
    callback, seen = pruner("weight_l2", amount=amount, agreement="all"), copied()
    with pytest.warns(UserWarning, match=rf"amount={amount} is not reached"):
        fit(Plain(Residual()), [callback, seen], max_epochs=2)
    lowest = round(amount * 9)
    agreed = set(range(9))
    for name in ("stem", "a", "b"):
        norms = getattr(seen.seen[0].net, name).weight.flatten(1).norm(dim=1)
        agreed &= set(norms.argsort()[:lowest].tolist())
    assert 0 < len(agreed) < lowest
    assert callback.plan.neurons == dict.fromkeys(("net.stem", "net.a", "net.b"), tuple(sorted(agreed)))


def test_random_choices_follow_the_seed_and_nothing_else():
    def plan(seed: int, module: Any, **kwargs: Any) -> list[Any]:
        L.seed_everything(seed, verbose=False)
        callback = pruner("random", amount=0.5, schedule="linear", end_epoch=2)
        fit(module, [callback], max_epochs=3, **kwargs)
        return [made.plan.neurons for made in callback.rounds.done]

    first = plan(1, Plain())
    assert plan(1, Plain(lr=0.1), precision="bf16-mixed") == first
    assert plan(2, Plain()) != first
    assert sum(len(gone) for neurons in first for gone in neurons.values()) == 9
    assert [sum(map(len, neurons.values())) for neurons in first] == [round(0.25 * CANDIDATES), 9 - 4]


def test_rounds_between_two_validations_are_caught_up_with():
    callback = pruner("weight_l2", amount=0.6, schedule="linear", end_epoch=4)
    fit(Plain(), [callback], max_epochs=6, check_val_every_n_epoch=2)
    assert [(made.epoch, made.number) for made in callback.rounds.done] == [(2, 2), (4, 4)]
    assert removed_by(callback) == [round(0.3 * CANDIDATES), round(0.6 * CANDIDATES)]


class Dying(Plain):
    """At the beginning of some epochs neurons of its first linear layer die."""

    def __init__(self, deaths: dict[int, list[int]]) -> None:
        super().__init__()
        self.deaths = deaths
        with torch.no_grad():
            self.net.fc1.bias.fill_(2.0)

    def on_train_epoch_start(self) -> None:
        with torch.no_grad():
            self.net.fc1.bias[self.deaths.get(self.current_epoch, [])] = -100.0


def test_neurons_that_die_are_removed_when_they_have_been_dead_for_long_enough():
    callback = NeuronPruningCallback(
        "deadness", threshold=1.0, patience=2, start_epoch=2, end_epoch=5, ignore=["net.conv*"]
    )
    first = pytest.warns(UserWarning, match=r"nothing is cut in round 1: .* 2 neurons stay: not each of the last 2")
    with (
        first,
        pytest.warns(UserWarning, match=r"nothing is cut in round 4: .* no neuron has a near_zero of 1"),
    ):
        fit(Dying({1: [2, 5], 2: [6]}), [callback], max_epochs=6)
    gone = [dict(made.plan.neurons) for made in callback.rounds.done]
    assert gone == [{}, {"net.fc1": (2, 5)}, {"net.fc1": (6,)}, {}]
    assert callback.plan.neurons == {"net.fc1": (2, 5, 6)}
    assert callback.plan.cost.parameters_after == 365 - 3 * 10
