"""What a measurement needs is freed when it ends, by reference counts: Python may look for circles long after."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_neurons import (
    ActivationMaximizationCallback,
    ActivationStatisticsCallback,
    ClassNeuronsCallback,
    NeuronAblationCallback,
    NeuronPruningCallback,
    NeuronSensitivityCallback,
    SaliencyCallback,
)
from tests.callbacks.modules import Plain, fit, loader, trainer_of

CALLBACKS: dict[str, Callable[[], Any]] = {
    "statistics": lambda: ActivationStatisticsCallback(max_figures=0),
    "sensitivity": lambda: NeuronSensitivityCallback(max_figures=0, per_class=True),
    "source=train": lambda: NeuronSensitivityCallback(source="train", loss_fn=lambda m, b: m.loss(b), max_figures=0),
    "ablation": lambda: NeuronAblationCallback(ends=4),
    "classes": lambda: ClassNeuronsCallback(),
    "saliency": lambda: SaliencyCallback(max_samples=2),
    "maximization": lambda: ActivationMaximizationCallback([("net.fc2", 0)], steps=2),
    "pruning": lambda: NeuronPruningCallback("fisher", amount=0.1),
}


def bytes_alive() -> int:
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not is_lazy(o)]
    return sum(t.untyped_storage().nbytes() for t in tensors)


class Alive(L.Callback):
    """How many bytes of tensors there are at the end of each epoch."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.sizes.append(bytes_alive())


@pytest.fixture(autouse=True)
def _no_cycle_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


NEURONS = sum(Plain().net.get_submodule(name).weight.shape[0] for name in ("conv1", "conv2", "fc1", "fc2"))


@pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS.keys())
def test_tensors_do_not_grow_from_epoch_to_epoch(make):
    alive, module = Alive(), Plain()
    fit(module, [make(), alive], max_epochs=5)
    assert alive.sizes[4] - alive.sizes[2] < 2 * 1000 * NEURONS, alive.sizes


@pytest.mark.parametrize("stage", ["validate", "test", "fit with an error"])
def test_nothing_stays_after_the_run(stage):
    trainer, module = trainer_of([NeuronSensitivityCallback(max_figures=0)]), Plain()
    if stage == "fit with an error":
        module.register_forward_pre_hook(Fails())
        with pytest.raises(RuntimeError, match="in the middle"):
            trainer.fit(module, loader(), loader(24, seed=1))
    else:
        getattr(trainer, stage)(module, loader(24, seed=1), verbose=False)
    sums = [o for o in gc.get_objects() if type(o).__name__ in ("StreamingCriteria", "Measurement", "Member")]
    assert not sums


class Fails:
    """Raises after a few forwards."""

    def __init__(self) -> None:
        self.left = 8

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("in the middle")
