"""More than one run, runs that end early, and runs that fail: nothing is left half done."""

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_neurons.pruning.surgery import surgery
from tests.callbacks.modules import MemoryLogger, Plain, fit, loader, trainer_of
from tests.callbacks.pruned import (
    Probe,
    Tagged,
    assert_equal,
    assert_moved,
    assert_sound,
    pruner,
    state_by_name,
    tags,
    weights,
    widths,
)
from tests.callbacks.test_nothing_left import RaisesIn, assert_usable, traces

WHOLE = {"net.conv1": 4, "net.conv2": 6, "net.fc1": 8, "net.fc2": 3}


def everything(trainer: Any, module: nn.Module) -> Any:
    """The model with its sizes, and its optimizers with the objects that they hold."""
    tensors = {n: t.clone() for n, t in module.state_dict().items()}
    tensors |= {n: t for o in trainer.optimizers for n, t in state_by_name(module, o).items()}
    sizes = {n: m.extra_repr() for n, m in module.named_modules()}
    objects = [[id(p) for g in o.param_groups for p in g["params"]] for o in trainer.optimizers]
    held = {n: id(p) for n, p in module.named_parameters()}
    return tensors, sizes, objects, held


def test_a_second_fit_of_the_same_module_trains_the_narrow_model_on():
    callback, module, start = pruner(), Tagged(), Probe("on_train_epoch_start", lambda _, m: weights(m))
    fit(module, [callback], max_epochs=3)
    first, cut = callback.plan, widths(module)
    trainer = fit(module, [callback, start], max_epochs=3)
    assert_sound(trainer, module, callback)
    assert widths(module) == cut != WHOLE
    assert callback.plan == first
    assert tags(module) == {layer: callback.plan.remaining(layer) for layer in tags(module)}
    assert_moved(module, start.seen[0])
    assert_usable(module)


def test_a_second_fit_makes_the_rounds_that_the_first_did_not_reach():
    callback, module = pruner(amount=0.6, schedule="linear", end_epoch=4), Tagged()
    early = pytest.warns(UserWarning, match="training ends before the last round, of epoch 4")
    with early, pytest.warns(UserWarning, match=r"round 3 of 4 is not made: no epoch follows 2"):
        fit(module, [callback], max_epochs=3)
    assert [made.number for made in callback.rounds.done] == [1, 2]
    trainer = fit(module, [callback], max_epochs=6)
    assert_sound(trainer, module, callback)
    assert callback.rounds.number == 4
    assert tags(module) == {layer: callback.plan.remaining(layer) for layer in tags(module)}


def test_when_all_rounds_are_made_the_next_fit_may_be_as_short_as_one_likes():
    callback, module = pruner(start_epoch=2), Plain()
    fit(module, [callback], max_epochs=3)
    trainer = fit(module, [callback], max_epochs=1)
    assert_sound(trainer, module, callback)


def test_a_fresh_module_of_the_same_kind_begins_all_over():
    callback, module = pruner("weight_l2"), Tagged()
    fit(Plain(), [callback], max_epochs=3)
    trainer = fit(module, [callback], max_epochs=3)
    assert_sound(trainer, module, callback)
    assert len(callback.rounds.done) == 1
    assert tags(module) == {layer: callback.plan.remaining(layer) for layer in tags(module)}


def test_another_model_is_refused_before_training():
    callback, other = pruner(), Plain()
    other.net.fc1, other.net.fc2 = nn.Linear(6, 9), nn.Linear(9, 3)
    fit(Plain(), [callback], max_epochs=3)
    before = weights(other)
    with pytest.raises(MisconfigurationException, match=r"has pruned another model.*'net.fc1': 9.*new callback"):
        fit(other, [callback], max_epochs=3)
    assert_equal(weights(other), before)
    assert traces(other)["hooks"] == {}


def test_a_module_that_was_cut_by_one_callback_is_the_whole_model_of_the_next():
    module, first, second = Plain(), pruner(), pruner("taylor")
    fit(module, [first], max_epochs=2)
    cut = widths(module)
    trainer = fit(module, [second], max_epochs=2)
    assert_sound(trainer, module, second)
    assert second.plan.widths == cut


def test_validate_and_test_do_not_cut_and_do_not_forget():
    callback, module = pruner(), Plain()
    trainer = trainer_of([callback])
    trainer.validate(module, loader(24, seed=1), verbose=False)
    trainer.test(module, loader(24, seed=1), verbose=False)
    assert widths(module) == WHOLE
    assert not callback.plan
    fit(module, [callback], max_epochs=2)
    plan = callback.plan
    for stage in ("validate", "test"):
        getattr(trainer_of([callback]), stage)(module, loader(24, seed=1), verbose=False)
    assert callback.plan == plan
    assert widths(module) == callback.rounds.widths() != WHOLE
    assert traces(module)["hooks"] == {}


def test_a_trial_run_measures_and_never_cuts():
    callback, module = pruner(), Plain()
    fit(module, [callback], fast_dev_run=True)
    assert widths(module) == WHOLE
    assert not callback.plan
    assert callback.pending is None
    assert callback.measurement is not None
    assert (len(callback.report.plan), callback.report.widths) == (0, WHOLE)


@pytest.mark.parametrize("kwargs", [{"max_steps": 4, "max_epochs": -1}, {"max_steps": 4, "max_epochs": 5}])
def test_steps_that_end_with_the_epoch_before_the_cut_leave_the_model_whole(kwargs):
    callback, module = pruner(), Plain()
    message = pytest.warns(UserWarning, match="round 1 of 1 is not made: no epoch follows 0")
    with message, pytest.warns(UserWarning, match="nothing has been cut"):
        trainer = fit(module, [callback], **kwargs)
    assert trainer.global_step == 4
    assert_sound(trainer, module, callback, cut=False)
    assert widths(module) == WHOLE


def test_a_plan_that_early_stopping_cuts_off_is_announced_and_carried_out_in_the_next_fit():
    stop, callback, module = EarlyStopping("val_loss", divergence_threshold=-1.0), pruner(), Tagged()
    message = pytest.warns(UserWarning, match=r"before a plan for 6 neurons was carried out.*resumed")
    with message, pytest.warns(UserWarning, match="nothing has been cut"):
        fit(module, [stop, callback], max_epochs=3)
    assert widths(module) == WHOLE
    assert len(callback.pending) == 6
    planned = callback.pending.neurons
    trainer = fit(module, [callback], max_epochs=2)
    assert_sound(trainer, module, callback)
    assert callback.plan.neurons == planned
    assert tags(module) == {layer: callback.plan.remaining(layer) for layer in tags(module)}


def test_a_plan_that_was_left_over_is_not_carried_out_on_another_module():
    stop, callback, module = EarlyStopping("val_loss", divergence_threshold=-1.0), pruner(), Tagged()
    message = pytest.warns(UserWarning, match="before a plan for 6 neurons was carried out")
    with message, pytest.warns(UserWarning, match="nothing has been cut"):
        fit(Tagged(), [stop, callback], max_epochs=3)
    fit(module, [callback], max_epochs=3)
    assert [made.epoch for made in callback.rounds.done] == [1], "after a measurement of its own"


class Saboteur(Callback):
    """Lets the n-th tensor that surgery puts in place fail, once, and looks at the run just before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
        self.calls, self.fails_at, self.armed, self.before = 0, fails_at, False, None
        real: Callable[..., None] = surgery.set_data

        def failing(*args: Any) -> None:
            self.calls += self.armed
            if self.armed and self.calls == self.fails_at:
                raise MemoryError("in the middle of surgery")
            real(*args)

        monkeypatch.setattr(surgery, "set_data", failing)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.armed, self.before = True, everything(trainer, pl_module)


TENSORS = 11  # that are parameters and lose something: of two convolutions and norms, and two linear layers


@pytest.mark.parametrize("fails_at", [1, 2, 6, TENSORS])
def test_an_exception_in_the_middle_of_surgery_leaves_model_and_optimizer_as_they_were(monkeypatch, fails_at):
    callback, saboteur, module = pruner(scope="layer"), Saboteur(monkeypatch, fails_at), Plain()
    trainer = trainer_of([saboteur, callback], max_epochs=3)
    with pytest.raises(MemoryError, match="in the middle of surgery"):
        trainer.fit(module, loader(), loader(24, seed=1))
    tensors, *rest = everything(trainer, module)
    assert_equal(tensors, saboteur.before[0])
    assert rest == list(saboteur.before[1:])
    assert not callback.plan
    assert traces(module)["hooks"] == {}
    saboteur.armed = False
    again = fit(module.train(), [callback], max_epochs=3)
    assert_sound(again, module, callback)


def test_no_tensor_beyond_those_is_put_in_place(monkeypatch):
    saboteur = Saboteur(monkeypatch, fails_at=TENSORS + 1)
    fit(Plain(), [saboteur, pruner(scope="layer")], max_epochs=2)
    assert saboteur.calls == TENSORS


HOOKS = [
    "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end", "on_train_epoch_start",
    "on_train_batch_end",
]  # fmt: skip


@pytest.mark.parametrize("hook, first", list(zip(HOOKS, cycle([True, False]))))
def test_an_exception_in_another_callback_leaves_nothing_and_a_later_fit_works(hook, first):
    callback, module = pruner(), Plain()
    other = RaisesIn(hook)
    with pytest.raises(RuntimeError, match=hook):
        fit(module, [other, callback] if first else [callback, other], max_epochs=3)
    assert traces(module)["hooks"] == {}
    assert not callback.plan
    trainer = fit(module.train(), [callback], max_epochs=3, logger=MemoryLogger())
    assert_sound(trainer, module, callback)
    assert_usable(module)


def test_what_a_profiler_hangs_on_modules_does_not_keep_them_from_being_cut():
    module = Plain()
    with pytest.warns(UserWarning, match="default schedule will be overridden"):
        fit(module, [pruner()], max_epochs=3, profiler=PyTorchProfiler(export_to_chrome=False))
    assert widths(module) != WHOLE
