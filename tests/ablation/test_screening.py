"""Ablations that a criterion asks for: halves of the data, both ends of a ranking, and how far the two agree."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_neurons.ablation.screening import OracleAgreement, Screening, halves, oracle_agreement, screen
from lightning_neurons.criteria import CRITERIA
from lightning_neurons.errors import MeasurementError
from lightning_neurons.isolation.isolation import isolated
from lightning_neurons.measurement.measure import call_on_inputs, measure
from tests.ablation.silenced import WIDTHS, batches_of, each, net_of, without
from tests.tables import for_each

HIDDEN = {layer: width for layer, width in WIDTHS.items() if layer != "6"}


def numbered(*sizes: int, form: str = "pair") -> list[Any]:
    numbers = list(torch.arange(sum(sizes)).split(list(sizes)))
    forms = {"pair": lambda n: (n[:, None].float(), n), "dict": lambda n: {"x": n[:, None], "name": n.tolist()}}
    return [forms[form](n) for n in numbers]


class Opaque:
    def __init__(self, x: Tensor) -> None:
        self.x = x


@for_each("sizes", [(1, 1), (2,), (3,), (8, 8, 8), (7, 5, 1), (40, 33)])
@for_each("form", ["pair", "dict"])
def test_halves_are_every_second_sample_in_small_batches(sizes, form):
    first, second = halves(numbered(*sizes, form=form))
    read = lambda batch: batch[1].tolist() if form == "pair" else batch["name"]
    everything = list(range(sum(sizes)))
    assert [n for batch in first for n in read(batch)] == everything[::2]
    assert [n for batch in second for n in read(batch)] == everything[1::2]
    assert all(1 <= len(read(batch)) <= 16 for batch in (*first, *second))


def test_batches_that_cannot_be_joined_are_taken_in_turn():
    longer = [(torch.zeros(4, 5 + i), torch.zeros(4)) for i in range(5)]
    assert [[len(x[0]) for x, _ in part] for part in halves(longer)] == [[5, 7, 9], [6, 8]]
    objects = [Opaque(torch.full((3, 2), float(i))) for i in range(4)]
    assert [[float(one.x[0, 0]) for one in part] for part in halves(objects)] == [[0, 2], [1, 3]]


@for_each("batches", [numbered(1), [Opaque(torch.zeros(3, 2))]])
def test_too_few_samples_for_two_halves(batches):
    with pytest.raises(MeasurementError, match="samples cannot be divided into two halves; raise max_samples"):
        halves(batches)


def studied(net: Any, batches: list[Any], criterion: str = "weight_l2", **kwargs: Any) -> Screening:
    with isolated(net), torch.no_grad():
        net.eval()
        return screen(net, batches, each, CRITERIA[criterion], run=call_on_inputs, **kwargs)


def naive(net: Any, x: Tensor, y: Tensor, layer: str, neuron: int) -> float:
    with without(net, {layer: [neuron]}):
        changed = each(net, (x, y)).double().mean()
    with torch.no_grad():
        return float(changed - each(net, (x, y)).double().mean())


def naive_deltas(net: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {n: torch.tensor([naive(net, x, y, n, i) for i in range(w)]) for n, w in HIDDEN.items()}


@for_each("sizes", [(20, 4), (7, 9, 5)])
@for_each("criterion", ["weight_l2", "fisher", "near_zero"])
def test_measurement_and_agreement_are_those_of_plain_hooks(sizes, criterion):
    net, batches = net_of().eval(), batches_of(*sizes)
    found = studied(net, batches, criterion, ends=None)
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    whole = naive_deltas(net, x, y)
    assert (found.criterion, found.ablation.samples) == (criterion, sum(sizes))
    for layer, values in whole.items():
        assert torch.allclose(found.ablation.delta_loss[layer].double(), values.double(), atol=1e-6), layer
    report = measure(net, [(x[::2], y[::2])], loss_fn=each, criteria=[criterion], layers=list(HIDDEN))
    dead = report.deadness_by.get(criterion)
    scores = report.scores[criterion] if dead is None else {n: 1 - d for n, d in dead.items()}
    expected = oracle_agreement(scores, naive_deltas(net, x[::2], y[::2]), naive_deltas(net, x[1::2], y[1::2]))
    assert found.agreement.neurons == expected.neurons == 9
    for name in ("same_data", "held_out", "reliability"):
        assert getattr(found.agreement, name) == pytest.approx(getattr(expected, name), abs=0.05, nan_ok=True)


@for_each("ends", [1, 2, 3, 4, 5, 99, None])
def test_both_ends_of_the_ranking_are_measured_and_nothing_between(ends):
    net, batches = net_of().eval(), batches_of(12)
    found = studied(net, batches, ends=ends)
    scores = measure(net, batches, criteria=["weight_l2"], layers=list(HIDDEN)).scores["weight_l2"]
    ranked = sorted(((float(s), n, i) for n, by in scores.items() for i, s in enumerate(by)), reverse=True)
    chosen = ranked if ends is None or 2 * ends >= 9 else ranked[:ends] + ranked[-ends:]
    assert {(r.layer, r.neuron) for r in found.ablation.ranking()} == {(n, i) for _, n, i in chosen}
    assert found.agreement.neurons == len(chosen)


def test_the_output_takes_part_only_where_it_is_named_or_alone():
    net, batches = net_of().eval(), batches_of(8)
    assert list(studied(net, batches, ends=None).ablation.delta_loss) == ["0", "3"]
    assert set(studied(net, batches, ends=None, layers=["6", "3"]).ablation.delta_loss) == {"3", "6"}
    alone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    assert list(studied(alone, batches, ends=None).ablation.delta_loss) == ["1"]


@for_each("replacement", ["mean", "resample"])
def test_other_replacements_change_the_loss_otherwise(replacement):
    net, batches = net_of().eval(), batches_of(16)
    zero, other = (studied(net, batches, ends=None, replacement=r).ablation.delta_loss for r in ("zero", replacement))
    assert all(d.isfinite().all() for d in other.values())
    assert not torch.allclose(zero["0"], other["0"])


def of(*values: float) -> dict[str, Tensor]:
    return {"a": torch.tensor(values[:2]), "b": torch.tensor(values[2:])}


NAN = math.nan
CLOSED = [
    # criterion, measured on the same half, on the other; correlations by hand
    (of(1, 2, 3, 4), of(1, 2, 3, 4), of(4, 3, 2, 1), OracleAgreement(1.0, -1.0, -1.0, 4)),
    (of(1, 2, 3, 4), of(-1, 2, -3, 4), of(1, -2, 3, -4), OracleAgreement(1.0, 1.0, 1.0, 4)),
    (of(1, 2, 3, 4), of(1, 2, 4, 3), of(2, 1, 3, 4), OracleAgreement(0.8, 0.8, 0.6, 4)),
    (of(9, 1, 2, 3), of(NAN, 1, 2, 3), of(7, 1, 3, 2), OracleAgreement(1.0, 0.5, 0.5, 3)),
    (of(5, 5, 5, 5), of(1, 2, 3, 4), of(1, 2, 3, 4), OracleAgreement(NAN, NAN, 1.0, 4)),
    (of(1, 2, 3, 4), of(0, 0, 0, 0), of(1, 2, 3, 4), OracleAgreement(NAN, 1.0, NAN, 4)),
    (of(1, NAN, NAN, NAN), of(1, 2, 3, 4), of(1, 2, 3, 4), OracleAgreement(NAN, NAN, NAN, 1)),
    ({}, {}, {}, OracleAgreement(NAN, NAN, NAN, 0)),
]


@for_each("scores, measured, held_out, expected", CLOSED)
def test_agreement_by_hand(scores, measured, held_out, expected):
    found = oracle_agreement(scores, measured, held_out)
    assert found.neurons == expected.neurons
    for name in ("same_data", "held_out", "reliability"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), nan_ok=True)


def test_layers_that_one_side_alone_knows_are_left_out():
    found = oracle_agreement(of(1, 2, 3, 4), {"a": torch.tensor([1.0, 2.0])}, of(1, 2, 4, 3))
    assert (found.neurons, found.same_data) == (2, 1.0)
