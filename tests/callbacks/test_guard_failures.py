"""Whatever fails, and wherever: model, optimizers and schedulers are as they were, and nothing stays behind."""

import copy
from collections.abc import Callable
from itertools import cycle
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.optim import SGD, AdamW, lr_scheduler

from lightning_neurons.callbacks.pruning import guard as keeper
from lightning_neurons.callbacks.pruning import pruner, snapshot
from tests.callbacks.guarded import (
    Scaling,
    Scored,
    by_epoch,
    differences,
    guard,
    hidden,
    identities,
    made,
    state_of,
)
from tests.callbacks.modules import fit, loader, trainer_of
from tests.callbacks.pruned import Probe
from tests.callbacks.test_nothing_left import traces
from tests.pruning.test_surgery_failures import Interrupted, failing_at

pytestmark = pytest.mark.filterwarnings("ignore:.*(nothing has|all cuts have) been", "ignore:.*taken back")
SCORES = by_epoch(0.75, 0.25, 0.75)


class Module(Scored):
    """Two optimizers, two schedulers."""

    def __init__(self) -> None:
        super().__init__(SCORES)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def on_train_epoch_end(self) -> None:
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        net = self.net
        first = AdamW([*net.conv1.parameters(), *net.norm1.parameters(), *net.conv2.parameters()], 1e-2)
        second = SGD([*net.norm2.parameters(), *net.fc1.parameters(), *net.fc2.parameters()], 0.05, momentum=0.9)
        return [first, second], [lr_scheduler.StepLR(first, 1, 0.7), lr_scheduler.ExponentialLR(second, 0.9)]


def everything(trainer: Any, module: Any) -> dict[str, Any]:
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"state": state_of(trainer, module), "gradients": copy.deepcopy(gradients), **identities(trainer, module)}


class Run:
    """A run that is broken when a given epoch begins."""

    def __init__(self, epoch: int, arm: Callable[[pytest.MonkeyPatch, Any], list[int]], patch: Any) -> None:
        self.module, self.callback, self.calls = Module(), guard(), []
        self.before = Probe("on_train_epoch_start", everything)

        def break_it(trainer: Any, module: Any) -> None:
            if trainer.current_epoch == epoch and module is self.module:  # no copy on which the epoch is tried
                self.calls = arm(patch, trainer)

        callbacks = [EMAWeightAveraging(decay=0.9), self.before, Probe("on_train_epoch_start", break_it), self.callback]
        self.trainer = trainer_of(callbacks, max_epochs=4, plugins=[Scaling()])

    def fit(self) -> None:
        self.trainer.fit(self.module, loader(), loader(24, seed=1))


def in_module(where: Any, name: str, call: int, late: bool) -> Callable[[Any, Any], list[int]]:
    def arm(patch: Any, trainer: Any) -> list[int]:
        wrapped, calls = failing_at(call, getattr(where, name), late=late)
        patch.setattr(where, name, wrapped)
        return calls

    return arm


def of(find: Callable[[Any], Any], call: int, late: bool) -> Callable[[Any, Any], list[int]]:
    """Fails in ``load_state_dict`` of an object."""

    def arm(patch: Any, trainer: Any) -> list[int]:
        target = find(trainer)
        wrapped, calls = failing_at(call, target.load_state_dict, late=late)
        patch.setattr(target, "load_state_dict", wrapped)
        return calls

    return arm


def check(run: Run, epoch: int, patch: pytest.MonkeyPatch) -> None:
    """Everything is as when the epoch began, and can be used."""
    with pytest.raises(Interrupted):
        run.fit()
    assert run.calls
    patch.undo()
    left = everything(run.trainer, run.module)
    for name, was in run.before.seen[epoch].items():
        assert differences(left[name], was) == [], name
    found, plain = traces(run.module), traces(Module())
    assert {k: found[k] for k in ("hooks", "parameter hooks", "global hooks")} == {
        k: plain[k] for k in ("hooks", "parameter hooks", "global hooks")
    }
    assert run.module(torch.zeros(2, 1, 6, 6)).shape == (2, 3)


CUTTING = [(keeper, "take_snapshot", False), (keeper, "take_snapshot", True), (pruner, "cut_in_fit", False)]


@pytest.mark.parametrize("where, name, late", CUTTING)
def test_an_error_when_the_cut_is_made(where, name, late, monkeypatch):
    run = Run(1, in_module(where, name, 1, late), monkeypatch)
    check(run, 1, monkeypatch)
    assert made(run.callback) == []
    assert hidden(run.module) == 18


# 12 parameters and 6 buffers of the module, the same and the count of averages in the average; 6 buffers are no
# parameters, which are replaced.
TENSORS = 18 + 19


def test_a_roll_back_puts_every_tensor_back_once(monkeypatch):
    run = Run(2, in_module(snapshot, "set_data", 0, False), monkeypatch)
    run.fit()
    assert len(run.calls) == TENSORS
    assert hidden(run.module) == 18


@pytest.mark.parametrize("call, late", list(zip([1, 2, 9, 18, 19, 30, TENSORS], cycle([False, True]))))
def test_an_error_when_a_tensor_is_put_back(call, late, monkeypatch):
    run = Run(2, in_module(snapshot, "set_data", call, late), monkeypatch)
    check(run, 2, monkeypatch)
    assert hidden(run.module) == 12
    assert made(run.callback) == [(1, 1, 6)]


PARTS = {
    "first optimizer": lambda trainer: trainer.optimizers[0],
    "second optimizer": lambda trainer: trainer.optimizers[1],
    "first scheduler": lambda trainer: trainer.lr_scheduler_configs[0].scheduler,
    "second scheduler": lambda trainer: trainer.lr_scheduler_configs[1].scheduler,
    "precision": lambda trainer: trainer.precision_plugin,
}


@pytest.mark.parametrize("part, late", list(zip(PARTS, cycle([False, True]))))
def test_an_error_when_optimizers_schedulers_or_precision_are_put_back(part, late, monkeypatch):
    run = Run(2, of(PARTS[part], 1, late), monkeypatch)
    check(run, 2, monkeypatch)
    assert made(run.callback) == [(1, 1, 6)]
    assert run.callback.keeping.judge_after == 1


@pytest.mark.parametrize("call", [1, 3, 8])
def test_an_error_when_attributes_are_fitted_to_tensors(call, monkeypatch):
    run = Run(2, in_module(snapshot, "refit", call, True), monkeypatch)
    check(run, 2, monkeypatch)


def test_an_error_in_the_snapshot_of_what_has_been_judged_to_be_good(monkeypatch):
    run = Run(2, in_module(keeper, "take_snapshot", 1, False), monkeypatch)
    run.module.score = by_epoch(0.75)
    check(run, 2, monkeypatch)
    assert hidden(run.module) == 12


def test_an_error_in_the_roll_back_at_the_end_of_training(monkeypatch):
    module, callback = Scored(by_epoch(0.75, 0.25)), guard()
    ending = Probe("on_train_end", state_of)
    wrapped, calls = failing_at(7, snapshot.set_data, late=False)
    monkeypatch.setattr(snapshot, "set_data", wrapped)
    trainer = trainer_of([ending, callback], max_epochs=2)
    with pytest.raises(Interrupted):
        trainer.fit(module, loader(), loader(24, seed=1))
    assert len(calls) >= 7
    assert differences(state_of(trainer, module), ending.seen[2]) == []
    assert hidden(module) == 12


class Later(L.Callback):
    """Fails when an epoch begins, after the guard has done its work."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch and pl_module is trainer.lightning_module:  # not when it is tried
            raise Interrupted


@pytest.mark.parametrize("epoch, left", [(1, 12), (2, 18)])
def test_an_error_of_somebody_else_leaves_what_the_guard_has_done_whole(epoch, left):
    module, callback, done = Module(), guard(), Probe("on_train_epoch_start", state_of)
    trainer = trainer_of([callback, done, Later(epoch)], max_epochs=4)
    with pytest.raises(Interrupted):
        trainer.fit(module, loader(), loader(24, seed=1))
    assert hidden(module) == left
    assert differences(state_of(trainer, module), done.seen[epoch]) == []
    assert len(callback.rounds.done) == (left == 12)
    hooks = ("hooks", "parameter hooks", "global hooks")
    assert [traces(module)[one] for one in hooks] == [traces(Module())[one] for one in hooks]


def test_after_an_error_in_a_roll_back_a_second_fit_of_the_same_module_works(monkeypatch):
    run = Run(2, of(PARTS["second optimizer"], 1, True), monkeypatch)
    check(run, 2, monkeypatch)
    run.module.score = by_epoch(0.75)
    with pytest.warns(UserWarning, match="the model before that cut comes back"):
        fit(run.module, [run.callback], max_epochs=2)
    assert hidden(run.module) == 12
