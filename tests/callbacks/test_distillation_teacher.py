"""What the teacher is, what it costs, and that nothing but the gradient knows of it."""

import copy
import random
from typing import Any

import lightning as L  # noqa: N812
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from tests.callbacks.distilled import (
    TAUGHT,
    Counting,
    NoForward,
    Student,
    Twice,
    cutter,
    distance,
    distiller,
    train,
)
from tests.callbacks.modules import Net, OldNamespace, loader, trainer_of
from tests.callbacks.pruned import Probe, assert_equal

OWN, ITS = (True, True), (False, False)
"""A forward of the model in training, and one of the teacher."""


class Forwards(L.Callback):
    """Counts the forwards of each training step and of each validation, by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, list[Any]] = {}
        self.validations: dict[int, list[Any]] = {}

    def on_train_batch_start(self, *_: Any) -> None:
        Counting.calls.clear()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.steps.setdefault(trainer.current_epoch, []).append(list(Counting.calls))

    def on_validation_batch_start(self, *_: Any) -> None:
        Counting.calls.clear()

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validations.setdefault(trainer.current_epoch, []).append(list(Counting.calls))


@pytest.mark.parametrize("kind, calls", [(Student, 1), (NoForward, 1), (Twice, 2)])
def test_a_step_of_the_recovery_has_one_more_forward_for_each_of_the_models_and_no_other_step_has(kind, calls):
    forwards = Forwards()
    train(lambda: kind(Counting()), [forwards, distiller()])
    plain, taught = [OWN] * calls, [OWN, ITS] * calls
    assert forwards.steps == {0: [plain] * 3, 1: [taught] * 3, 2: [taught] * 3, 3: [plain] * 3}


def test_validation_is_not_affected():
    forwards, losses = Forwards(), []
    for make, callback in ((Student, distiller()), (lambda *a: Student(*a, epochs=TAUGHT), cutter())):
        look = Probe("on_validation_end", lambda trainer, _: float(trainer.callback_metrics["val_loss"]))
        module = train(lambda make=make: make(Counting()), [look, forwards, callback])
        losses.append(look.seen)
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    assert all(step == [ITS] for epoch in (1, 2, 3) for step in forwards.validations[epoch])
    Counting.calls.clear()
    trainer_of([callback]).validate(module, loader(16, seed=1), verbose=False)
    assert Counting.calls == [ITS] * 2


def test_the_teacher_is_the_model_before_the_first_cut_and_stays_so_until_it_goes():
    callback = distiller()
    teacher = Probe("on_train_batch_end", lambda *_: copy.deepcopy(callback._pruner.distiller._teacher))
    model = Probe("on_train_epoch_end", lambda _, module: copy.deepcopy(module.state_dict()))
    train(Student, [model, teacher, callback])
    assert teacher.seen[0] is None
    assert teacher.seen[3] is None
    for epoch in TAUGHT:
        seen = teacher.seen[epoch]
        assert_equal({f"net.{n}": t for n, t in seen.net.state_dict().items()}, model.seen[0])
        assert not any(module.training for module in seen.modules())
        assert not any(p.requires_grad for p in seen.parameters())
        assert all(p.grad is None for p in seen.parameters())
    assert any(model.seen[1][name].shape != tensor.shape for name, tensor in model.seen[0].items())


class Gambler(Net):
    """Draws random numbers whether it is in training or not."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x) + float(np.random.rand()) + random.random()
        return super().forward(x + 0.1 * noise)


def states(*_: Any) -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize("net", [lambda: Net(dropout=0.5), Gambler], ids=["dropout", "always"])
def test_the_teacher_does_not_disturb_the_random_numbers_of_training(net):
    found = []
    for callback in (distiller(), cutter()):
        np.random.seed(0)
        random.seed(0)
        look = Probe("on_train_batch_end", states)
        train(lambda: Student(net()), [look, callback])
        found.append(look.seen)
    for epoch in (0, 1, 2, 3):
        assert found[0][epoch] == found[1][epoch], f"epoch {epoch}"


def test_with_dropout_it_is_the_loss_added_by_hand():
    found = train(lambda: Student(Net(dropout=0.5)), [distiller()])
    assert distance(found, train(lambda: Student(Net(dropout=0.5), epochs=TAUGHT), [cutter()])) == 0


def hooks_of(module: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("kind, output", [(Student, None), (NoForward, None), (NoForward, "net.fc2")])
def test_hooks_are_there_in_training_and_gone_afterwards(kind, output):
    callback = distiller(output=output)
    look = Probe("on_train_batch_end", lambda _, module: hooks_of(module))
    module = train(kind, [look, callback])
    assert set(look.seen.values()) == {3}
    assert hooks_of(module) == 0
    assert callback._pruner.distiller._trainer is None


@pytest.mark.parametrize("recovery", [2, 3])
def test_after_training_the_teacher_is_gone(recovery):
    callback = distiller(recovery_epochs=recovery)
    train(Student, [callback])
    assert callback._pruner.distiller._teacher is None
    assert callback.state_dict()["distillation"]["teacher"] is None


class Fails(L.Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1:
            raise ArithmeticError("somebody's mistake")


class FailsItself(Student):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.current_epoch == 1:
            raise ArithmeticError("somebody's mistake")
        return loss


@pytest.mark.filterwarnings("ignore:.*training_step does not run on a copy")
@pytest.mark.parametrize("kind, more", [(Student, [Fails()]), (FailsItself, [])])
def test_after_an_exception_hooks_are_gone(kind, more):
    callback, made = distiller(), []
    with pytest.raises(ArithmeticError, match="somebody's mistake"):
        train(lambda: made.append(kind()) or made[0], [*more, callback])
    assert len(callback.rounds.done) == 1
    assert hooks_of(made[0]) == 0
    assert callback._pruner.distiller._trainer is None
    assert callback._pruner.distiller._inputs is None


def test_no_optimizer_and_no_state_dict_ever_holds_the_teacher():
    callback, names = distiller(), list(Student().state_dict())

    def look(trainer: Any, module: Any) -> Any:
        held = [id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]]
        teacher = callback._pruner.distiller._teacher
        theirs = set() if teacher is None else {id(p) for p in teacher.parameters()}
        shared = {p.data_ptr() for p in module.parameters()}
        shared &= set() if teacher is None else {p.data_ptr() for p in teacher.parameters()}
        assert held == [id(p) for p in module.parameters()]
        assert not theirs & set(held)
        assert not shared
        assert list(module.state_dict()) == names
        return teacher is not None

    probe = Probe("on_train_batch_end", look)
    train(Student, [probe, callback])
    assert probe.seen == {0: False, 1: True, 2: True, 3: False}


class Copies(NoForward):
    """Also runs a copy of its network, as those do who look one step ahead."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        ahead = copy.deepcopy(self.net)
        ahead(batch[0]).sum().backward()
        return super().training_step(batch, batch_idx)


def test_copies_of_the_network_are_not_taught():
    forwards = Forwards()
    found = train(lambda: Copies(Counting()), [forwards, distiller()])
    assert distance(found, train(lambda: Copies(Counting(), epochs=TAUGHT), [cutter()])) == 0
    assert forwards.steps[1] == forwards.steps[2] == [[OWN, OWN, ITS]] * 3


def test_averages_of_the_weights_go_along():
    found = train(Student, [EMAWeightAveraging(decay=0.5), distiller()])
    by_hand = train(lambda: Student(epochs=TAUGHT), [EMAWeightAveraging(decay=0.5), cutter()])
    assert distance(found, by_hand) == 0


def test_both_namespaces_are_taught_the_same():
    found = []
    for kind, of in ((Student, L), (OldNamespace, pytorch_lightning)):
        found.append(train(kind, [distiller()], of=of))
    assert distance(*found) == 0


class Worse(Student):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", float(self.net.fc1.out_features == 8))  # worse once it has been cut
        self.log("val_loss", self.loss(batch))


@pytest.mark.filterwarnings("ignore:.*round taken back", "ignore:.*(nothing has|all cuts have) been")
def test_a_cut_that_is_taken_back_needs_no_teacher_any_more():
    forwards, callback = Forwards(), distiller(monitor="score", max_drop=0.5, recovery_epochs=1)
    train(lambda: Worse(Counting()), [forwards, callback])
    assert [len(step) for epoch in (0, 1, 2, 3) for step in forwards.steps[epoch]] == [1] * 3 + [2] * 3 + [1] * 6
    assert callback._pruner.distiller._teacher is None
    assert not callback.plan
