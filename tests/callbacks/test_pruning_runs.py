"""However a Trainer is set up, layers become narrower in it and training goes on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning as L  # noqa: N812
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from tests.callbacks import modules
from tests.callbacks.modules import MemoryLogger, Net, Plain, dataset, fit, loader
from tests.callbacks.pruned import (
    Probe,
    assert_equal,
    assert_moved,
    assert_sound,
    pruner,
    state_by_name,
    traces_without_sizes,
    weights,
    widths,
)
from tests.callbacks.test_nothing_left import traces


class Stream(IterableDataset):
    """Samples one by one, of a number that nobody knows."""

    def __init__(self, samples: int) -> None:
        self.data = dataset(samples)

    def __iter__(self) -> Iterator[Any]:
        return iter([self.data[i] for i in range(len(self.data))])


class WithoutForward(Plain):
    """Only its steps know how the network is used."""

    forward = L.LightningModule.forward

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class SeveralInputs(Plain):
    """A batch is a dict, which its forward takes as keyword arguments."""

    def forward(self, pictures: Tensor, scale: Tensor) -> Tensor:
        return self.net(pictures * scale[:, None, None, None])

    def loss(self, batch: Any) -> Tensor:
        given = {"pictures": batch[0], "scale": torch.ones(len(batch[0]))}
        return nn.functional.cross_entropy(self(**given), batch[1])


class KeepsValues(Plain):
    """Leaves values of its last forward behind, with their graph."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.net.last = super().forward(x)
        return self.last


class MadeLate(Plain):
    """Its layers are made when the Trainer asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        self.net = Net() if self.net is None else self.net


class Scheduled(Plain):
    """Two groups of parameters, and a learning rate that follows the validation loss."""

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim > 1]
        groups = [{"params": matrices}, {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


@dataclass(frozen=True)
class Scenario:
    module: Callable[[], Any] = Plain
    trainer: dict[str, Any] = field(default_factory=dict)
    callback: dict[str, Any] = field(default_factory=dict)
    compiled: str | None = None
    train: Callable[[], Any] = lambda: loader(shuffle=True)
    val: Callable[[], Any] = lambda: loader(24, seed=1)


SCENARIOS = {
    "fp32": Scenario(),
    "bf16-mixed": Scenario(trainer={"precision": "bf16-mixed"}),
    "bf16-true": Scenario(trainer={"precision": "bf16-true"}),
    "64-true": Scenario(trainer={"precision": "64-true"}),
    "net.compile()": Scenario(compiled="method"),
    "torch.compile(net)": Scenario(compiled="function"),
    "an iterable dataset": Scenario(train=lambda: DataLoader(Stream(32), 8), val=lambda: DataLoader(Stream(24), 8)),
    "two validation dataloaders": Scenario(modules.SeveralLoaders, val=lambda: [loader(24, seed=i) for i in (1, 2)]),
    "validation twice an epoch": Scenario(trainer={"val_check_interval": 0.5}),
    "validation every three batches": Scenario(trainer={"val_check_interval": 3}),
    "validation every six batches of any epoch": Scenario(
        trainer={"val_check_interval": 6, "check_val_every_n_epoch": None}
    ),
    "validation every second epoch": Scenario(trainer={"check_val_every_n_epoch": 2}),
    "no sanity check": Scenario(trainer={"num_sanity_val_steps": 0}),
    "a whole sanity check": Scenario(trainer={"num_sanity_val_steps": -1}),
    "max_steps in the epoch of the cut": Scenario(trainer={"max_steps": 10, "max_epochs": -1}),
    "accumulated gradients": Scenario(trainer={"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}),
    "a monitored metric": Scenario(callback={"monitor": "val_loss"}),
    "compensation": Scenario(callback={"compensation": "mean"}),
    "compensation, compiled": Scenario(callback={"compensation": "mean"}, compiled="method"),
    "without forward": Scenario(WithoutForward, callback={"monitor": "val_loss"}),
    "forward of other arguments": Scenario(SeveralInputs),
    "values left behind": Scenario(KeepsValues),
    "layers that are made late": Scenario(MadeLate),
    "groups of parameters and a scheduler": Scenario(Scheduled),
    "profiler=advanced": Scenario(trainer={"profiler": "advanced"}),
    "metrics": Scenario(modules.WithMetrics, callback={"monitor": "accuracy"}),
} | {
    module.__name__: Scenario(module)
    for module in (
        modules.ReturnsNone, modules.ReturnsDict, modules.Noisy, modules.PartlyFrozen, modules.Manual,
        modules.LogsDirectly, modules.OtherNames,
    )
}  # fmt: skip


START = 2


@dataclass
class Outcome:
    trainer: Any
    module: Any
    callback: Any
    before: dict[int, Any]
    after: dict[int, Any]


def run(scenario: Scenario, callbacks: list[Any]) -> Outcome:
    torch._dynamo.reset()
    L.seed_everything(0, verbose=False)
    module = scenario.module()
    if scenario.compiled == "function":
        module.net = torch.compile(module.net, backend="eager")
    if scenario.compiled == "method":
        module.net.compile(backend="eager")
    before = Probe("on_train_epoch_start", everything)
    after = Probe("on_train_epoch_start", lambda _, module: (widths(module), weights(module)))
    kwargs = {"max_epochs": 4, "logger": MemoryLogger(), **scenario.trainer}
    trainer = fit(module, [before, *callbacks, after], train=scenario.train(), val=scenario.val(), **kwargs)
    return Outcome(trainer, module, (*callbacks, None)[0], before.seen, after.seen)


def everything(trainer: Any, module: Any) -> Any:
    """What could differ between two runs, up to now."""
    state = {n: t.clone() for n, t in module.state_dict().items()}
    state |= {n: t for o in trainer.optimizers for n, t in state_by_name(module, o).items()}
    state |= {"random": torch.get_rng_state(), "numpy": torch.from_numpy(np.random.get_state()[1].copy())}
    rows = [row for row in trainer.logger.rows if not row[0].startswith("pruning/")]
    return widths(module), state, rows, dict(trainer.callback_metrics)


@pytest.mark.parametrize("name", SCENARIOS)
def test_until_the_cut_a_run_is_bitwise_the_run_without_the_callback_and_then_narrower(name):
    scenario = SCENARIOS[name]
    without, pruned = run(scenario, []), run(scenario, [pruner(start_epoch=START, **scenario.callback)])
    assert_same_until_the_cut(without, pruned)
    assert_sound(pruned.trainer, pruned.module, pruned.callback)
    assert [made.epoch for made in pruned.callback.rounds.done] == [START]
    assert pruned.before[START][0] == pruned.callback.plan.widths != pruned.after[START][0]
    assert widths(pruned.module) == pruned.after[START][0]
    assert_moved(pruned.module, pruned.after[START][1])
    assert traces_without_sizes(traces(pruned.module)) == traces_without_sizes(traces(without.module))


def assert_same_until_the_cut(without: Outcome, pruned: Outcome) -> None:
    for epoch in range(START + 1):
        (_, state, rows, metrics), (_, expected, other_rows, other_metrics) = (
            pruned.before[epoch],
            without.before[epoch],
        )
        assert_equal(state, expected)
        assert rows == other_rows
        assert_equal(metrics, other_metrics)
    assert rows
