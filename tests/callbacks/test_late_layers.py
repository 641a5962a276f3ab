"""Layers that come after the callbacks' setup: in the module's own, in configure_model, or with the first batch."""

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_neurons import (
    ActivationMaximizationCallback,
    ActivationStatisticsCallback,
    NeuronAblationCallback,
    NeuronSensitivityCallback,
)
from tests.callbacks.modules import Plain, fit
from tests.callbacks.pruned import pruner

CALLBACKS = [ActivationStatisticsCallback, NeuronSensitivityCallback, NeuronAblationCallback]


def small(*, lazy: bool = False) -> nn.Sequential:
    first = nn.LazyLinear(5) if lazy else nn.Linear(36, 5)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(5, 3))


class Late(Plain):
    """Builds its network when it is set up, as one that needs to know its data does."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def setup(self, stage: str) -> None:
        self.net = small()


class Lazy(Plain):
    def __init__(self) -> None:
        super().__init__(small(lazy=True))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)  # AdamW refuses parameters without a size


def measured(callback: Any) -> list[str]:
    found = callback.ablation.delta_loss if isinstance(callback, NeuronAblationCallback) else callback.report.layers
    return [name if isinstance(name, str) else name.name for name in found]


@pytest.mark.parametrize("module", [Late, Lazy])
@pytest.mark.parametrize("callback", CALLBACKS)
def test_layers_that_come_late_are_measured_and_found_by_patterns(callback, module):
    observer = callback(layers=["net.1"])
    fit(module(), [observer])
    assert measured(observer) == ["net.1"]


@pytest.mark.parametrize(
    "callback",
    [
        *(lambda kind=kind: kind(layers=["net.7"]) for kind in CALLBACKS),
        lambda: ActivationMaximizationCallback(targets=[("net.7", 0)]),
        lambda: pruner(ignore=["net.7"]),
    ],
)
def test_a_pattern_that_matches_no_late_layer_is_refused_before_training(callback):
    module = Late()
    with pytest.raises(MisconfigurationException, match=r"net\.7.*net\."):
        fit(module, [callback()], num_sanity_val_steps=0, max_epochs=3)
    assert module.trainer.global_step == 0


def test_lazy_layers_that_no_sanity_check_has_finished_cost_the_first_epoch_on_training_data():
    observer = NeuronSensitivityCallback(source="train")
    with pytest.warns(UserWarning, match="epoch 0 was not measured: Lazy has lazy layers"):
        fit(Lazy(), [observer], num_sanity_val_steps=0, max_epochs=2)
    assert measured(observer) == ["net.1", "net.3"]


@pytest.mark.parametrize("checks", [0, 2])
def test_lazy_layers_are_cut_when_a_batch_has_finished_them(checks):
    module, cutting = Lazy(), pruner("weight_l2", amount=0.4, start_epoch=1)
    fit(module, [cutting], num_sanity_val_steps=checks, max_epochs=3)
    assert len(cutting.plan.neurons["net.1"]) == 2
    assert (module.net[1].out_features, module.net[3].in_features) == (3, 3)
