"""A compensation is a value in a table, and taken by its name."""

from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_neurons import ArgumentError, prune
from lightning_neurons.pruning.compensation.compensate import (
    COMPENSATIONS,
    Compensation,
    CompensationName,
    compensation_named,
)
from lightning_neurons.pruning.compensation.weight_shifts import Repair


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def test_one_entry_more_is_a_compensation_that_prune_takes(monkeypatch):
    raised = Compensation("none", lambda model, cuts, calibration, wiring: Repair({"2.bias": torch.ones(3)}))  # type: ignore[arg-type]
    monkeypatch.setitem(COMPENSATIONS, "raised", raised)
    model, x = net(), torch.randn(8, 4)
    bias, batch = model[2].bias.detach().clone(), (x, torch.zeros(8, dtype=torch.long))
    prune(model, x, 0.5, [batch], compensation="raised", loss_fn=loss)
    assert model[0].out_features == 3
    assert torch.equal(model[2].bias, bias + 1)


def test_each_has_its_name_and_says_whether_it_needs_data():
    assert {name: one.needs_data for name, one in COMPENSATIONS.items() if one.name == name} == {
        "least_squares": True, "patch_least_squares": True, "mean": True, "none": False
    }  # fmt: skip


def test_the_type_of_names_has_all_of_them():
    assert get_args(CompensationName) == tuple(COMPENSATIONS)


def test_a_name_that_is_none_gets_the_nearest():
    with pytest.raises(ArgumentError, match=r"compensation='least_square'.*least_squares"):
        compensation_named("least_square")
