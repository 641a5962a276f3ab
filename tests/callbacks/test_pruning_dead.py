"""Without neurons that are dead in forward and gradient, training goes on bit by bit as with them.

Sums over neurons must not be taken in another order when some of them go. Convolutions add them up one by one, so that
zeros may stand anywhere; matrix products and norms add them in blocks, so that zeros come in whole blocks there.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from lightning_neurons import NeuronPruningCallback
from tests.callbacks.modules import MemoryLogger, Net, Plain, fit
from tests.callbacks.pruned import (
    Probe,
    assert_equal,
    assert_moved,
    assert_sound,
    remaining,
    state_by_name,
    weights,
)

SCATTERED, BLOCK = (1, 4, 6), tuple(range(16, 48))
ANYWHERE = tuple(sorted(torch.randperm(64, generator=torch.Generator().manual_seed(3))[:32].tolist()))


def with_dead_neurons(first: tuple[int, tuple[int, ...]], rest: Sequence[int]) -> Net:
    """The number of filters of the first layer and which of them are dead, and those that are dead in the others."""
    net, (width, dead) = Net(), first
    net.conv1, net.norm1 = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
    net.conv2, net.norm2 = nn.Conv2d(width, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
    net.fc1, net.fc2 = nn.Linear(64, 64), nn.Linear(64, 3)
    with torch.no_grad():
        net.fc1.bias.fill_(1.0)  # the others live
        for layers, gone in (((net.conv1, net.norm1), dead), ((net.conv2, net.norm2, net.fc1), rest)):
            for tensor in (t for layer in layers for t in (layer.weight, layer.bias) if t is not None):
                tensor[list(gone)] = 0
    return net


Optimizers = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
ADAMW: Optimizers = lambda p: torch.optim.AdamW(p, 1e-2)
SGD: Optimizers = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-4)
RMSPROP: Optimizers = lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5)


class WithDead(Plain):
    def __init__(self, net: Net, optimizer: Optimizers, scheduler: Any = None) -> None:
        super().__init__(net)
        self.optimizer, self.scheduler = optimizer, scheduler

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])


class Frozen(WithDead):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.net.conv1.requires_grad_(False)
        self.net.norm1.requires_grad_(False)


class Manual(WithDead):
    """Steps two optimizers itself, each every batch."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        self.log("train_loss", loss.detach())

    def configure_optimizers(self) -> Any:
        early = [*self.net.conv1.parameters(), *self.net.norm1.parameters(), *self.net.conv2.parameters()]
        late = [*self.net.norm2.parameters(), *self.net.fc1.parameters(), *self.net.fc2.parameters()]
        return [self.optimizer(early), SGD(late)]


@dataclass(frozen=True)
class Scenario:
    optimizer: Optimizers = ADAMW
    module: type[WithDead] = WithDead
    first: tuple[int, tuple[int, ...]] = (8, SCATTERED)
    rest: tuple[int, ...] = BLOCK
    scheduler: Any = None
    trainer: dict[str, Any] = field(default_factory=dict)
    callback: dict[str, Any] = field(default_factory=dict)


CLIPPED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
SCENARIOS = {
    "AdamW": Scenario(),
    "SGD with momentum": Scenario(SGD),
    "RMSprop": Scenario(RMSPROP),
    "silent is exactly zero": Scenario(callback={"activation_threshold": 0.0}),
    "after two measurements": Scenario(callback={"patience": 2, "start_epoch": 2}),
    "accumulated, clipped by value": Scenario(trainer=CLIPPED | {"gradient_clip_algorithm": "value"}),
    "accumulated, clipped by norm": Scenario(SGD, first=(64, BLOCK), trainer=CLIPPED),
    "bf16-mixed": Scenario(trainer={"precision": "bf16-mixed"}),
    "bf16-true": Scenario(trainer={"precision": "bf16-true"}),
    "manual, two optimizers": Scenario(module=Manual),
    "frozen layer": Scenario(module=Frozen),
    "StepLR": Scenario(scheduler=lambda o: StepLR(o, 1, 0.5)),
    "OneCycleLR": Scenario(SGD, scheduler=lambda o: {
        "scheduler": OneCycleLR(o, 0.1, total_steps=20), "interval": "step"
    }),
}  # fmt: skip


@dataclass
class Run:
    module: Any
    trainer: Any
    rows: list[tuple[str, int | None, float]]
    rates: list[Any]
    after_cut: dict[str, Tensor]


def run(scenario: Scenario, callbacks: list[Any]) -> Run:
    L.seed_everything(0, verbose=False)
    net = with_dead_neurons(scenario.first, scenario.rest)
    module, logger = scenario.module(net, scenario.optimizer, scenario.scheduler), MemoryLogger()
    rates = Probe("on_train_batch_end", lambda trainer, _: [copy.deepcopy(o.param_groups) for o in trainer.optimizers])
    started = Probe("on_train_epoch_start", lambda _, module: weights(module))
    trainer = fit(module, [*callbacks, rates, started], max_epochs=4, logger=logger, **scenario.trainer)
    hyper = [[{k: v for k, v in g.items() if k != "params"} for o in at for g in o] for at in rates.seen.values()]
    rows = [row for row in logger.rows if not row[0].startswith("pruning/")]
    return Run(module, trainer, rows, hyper, started.seen[3])


@pytest.mark.parametrize("name", SCENARIOS)
def test_training_without_dead_neurons_is_bitwise_training_with_them(name):
    scenario = SCENARIOS[name]
    callback = NeuronPruningCallback("deadness", threshold=1.0, **scenario.callback)
    whole, pruned = run(scenario, []), run(scenario, [callback])
    dead = {"net.conv1": scenario.first[1], "net.conv2": scenario.rest, "net.fc1": scenario.rest}
    assert callback.plan.neurons == dead
    assert_sound(pruned.trainer, pruned.module, callback)
    left = {n: remaining(n, t, callback.plan) for n, t in whole.module.state_dict().items()}
    assert_equal(pruned.module.state_dict(), left)
    for mine, other in zip(pruned.trainer.optimizers, whole.trainer.optimizers, strict=True):
        before = state_by_name(whole.module, other).items()
        assert_equal(state_by_name(pruned.module, mine), {n: _rest(n, t, callback) for n, t in before})
    assert {name for name, _, _ in pruned.rows} >= {"train_loss", "val_loss"}
    assert pruned.rows == whole.rows
    assert pruned.rates == whole.rates
    assert [p.requires_grad for p in pruned.module.parameters()] == [p.requires_grad for p in whole.module.parameters()]
    assert_moved(pruned.module, pruned.after_cut)


def _rest(name: str, tensor: Tensor, callback: NeuronPruningCallback) -> Tensor:
    """Of a state: its name ends in one word more than the parameter's."""
    return remaining(name.rpartition(".")[0], tensor, callback.plan)


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR"])
def test_the_learning_rate_of_a_scheduler_does_change_after_the_cut(name):
    rates = [group[0]["lr"] for group in run(SCENARIOS[name], [NeuronPruningCallback("deadness", threshold=1.0)]).rates]
    assert len(set(rates)) == len(rates) == 4


@pytest.mark.parametrize("optimizer", [SGD, RMSPROP], ids=["SGD", "RMSprop"])
def test_wherever_dead_neurons_are_only_rounding_differs(optimizer):
    scenario = Scenario(optimizer, rest=ANYWHERE, trainer={"precision": "64-true"})
    callback = NeuronPruningCallback("deadness", threshold=1.0)
    whole, pruned = run(scenario, []), run(scenario, [callback])
    assert callback.plan.neurons["net.fc1"] == ANYWHERE
    for name, tensor in whole.module.state_dict().items():
        torch.testing.assert_close(
            pruned.module.state_dict()[name], remaining(name, tensor, callback.plan), rtol=0, atol=1e-10
        )
    assert [v for _, _, v in pruned.rows] == pytest.approx([v for _, _, v in whole.rows], abs=1e-10)
