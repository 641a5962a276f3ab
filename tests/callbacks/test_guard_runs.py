"""The guard beside other ways to train: validations at other times, metrics of training, several fits, lossless."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_neurons import NeuronPruningCallback
from tests.callbacks.guarded import WHOLE, Scored, by_epoch, guard, hidden, made, undone
from tests.callbacks.modules import Plain, fit
from tests.callbacks.pruned import Probe, assert_sound, widths

pytestmark = pytest.mark.filterwarnings("ignore:.*(nothing has|all cuts have) been")
TAKEN = "is the worst that is allowed: 1 round taken back"


def per_epoch() -> Probe:
    return Probe("on_train_batch_start", lambda _, module: hidden(module))


def test_with_a_validation_every_other_epoch_a_cut_is_judged_after_the_first_that_it_had_time_for():
    callback, seen = guard(start_epoch=2), per_epoch()
    with pytest.warns(UserWarning, match=TAKEN):
        fit(Scored(), [callback, seen], max_epochs=8, check_val_every_n_epoch=2)
    assert list(seen.seen.values()) == [18, 18, 12, 12, 18, 18, 18, 18]


def test_a_round_that_comes_before_the_judgement_of_the_last_waits_for_it():
    callback, seen = guard(amount=0.66, schedule="linear", end_epoch=3, max_drop=0.5), per_epoch()
    fit(Scored(), [callback, seen], max_epochs=8, check_val_every_n_epoch=2)
    assert list(seen.seen.values()) == [18, 18, 10, 10, 6, 6, 6, 6]
    assert [number for number, *_ in made(callback)] == [2, 3]


@pytest.mark.parametrize("last, left", [(0.25, 18), (0.75, 12)])
def test_of_several_validations_in_an_epoch_the_last_counts(last, left):
    class Several(Scored):
        count = 0

        def on_validation_epoch_end(self) -> None:
            first = self.global_step % 4 == 2
            other = {0.25: 0.75, 0.75: 0.25}[last]
            self.log("val_score", 0.75 if self.current_epoch != 1 else other if first else last)

    module, callback, seen = Several(), guard(), per_epoch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, [callback, seen], max_epochs=4, val_check_interval=0.5)
    assert list(seen.seen.values()) == [18, 12, left, left]
    assert sum(TAKEN in str(one.message) for one in caught) == (left == 18)


class TrainScored(Plain):
    """Logs its score in training, once for an epoch."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.score = by_epoch(*scores)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("score", float(self.score(self)), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("after, left", [(0.25, 18), (0.75, 12)])
@pytest.mark.filterwarnings("ignore:.*Fine if training logs it")
def test_a_metric_of_training_is_that_of_the_epoch_before(after, left):
    module, callback, seen = TrainScored(0.75, after, 0.75), guard(monitor="score"), per_epoch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, [callback, seen], max_epochs=4)
    assert callback.keeping.baseline == 0.75
    assert list(seen.seen.values()) == [18, 12, left, left]
    assert sum(TAKEN in str(one.message) for one in caught) == (left == 18)


@pytest.mark.filterwarnings("ignore:.*Fine if training logs it")
def test_a_metric_of_training_that_falls_in_the_last_epoch_is_seen_at_the_end():
    module, callback = TrainScored(0.75, 0.25), guard(monitor="score")
    with pytest.warns(UserWarning, match=TAKEN):
        fit(module, [callback], max_epochs=2)
    assert widths(module) == WHOLE


def two_rounds(**kwargs: Any) -> NeuronPruningCallback:
    return guard(amount=0.66, schedule="linear", end_epoch=2, **kwargs)


def test_a_second_fit_makes_the_rounds_that_are_left_under_the_same_contract():
    callback, module, seen = two_rounds(), Scored(by_epoch(0.75)), per_epoch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, [callback], max_epochs=2)  # ends in the middle of the recovery of round 1, and all is well
    assert made(callback) == [(1, 1, 6)]
    module.score = by_epoch(0.75, 0.75, 0.25, 0.75)
    with pytest.warns(UserWarning, match=TAKEN):
        trainer = fit(module, [callback, seen], max_epochs=5)
    assert list(seen.seen.values()) == [12, 12, 6, 12, 12]
    assert (made(callback), undone(callback)) == ([(1, 1, 6)], [(2, 2, 6)])
    assert_sound(trainer, module, callback)


def test_a_second_fit_that_ends_in_a_recovery_keeps_the_contract_of_the_first():
    callback, module = two_rounds(), Scored(by_epoch(0.75))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, [callback], max_epochs=2)
        module.score = by_epoch(0.75, 0.75, 0.25)
        fit(module, [callback], max_epochs=3)
    assert hidden(module) == 12
    assert callback.keeping.baseline == 0.75


def test_a_second_fit_that_only_trains_keeps_the_contract_too():
    callback, module = guard(), Scored(by_epoch(0.75))
    fit(module, [callback], max_epochs=3)
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.score = by_epoch(0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, [callback], max_epochs=3)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in module.state_dict().items())


def test_when_all_rounds_are_made_the_next_fit_may_be_as_short_as_one_likes():
    callback, module = guard(start_epoch=2), Scored(by_epoch(0.75))
    fit(module, [callback], max_epochs=4)
    trainer = fit(module, [callback], max_epochs=1)  # a warning would be an error
    assert_sound(trainer, module, callback)


def test_a_fresh_module_after_a_violation_begins_all_over():
    callback, module = guard(), Scored(by_epoch(0.75))
    with pytest.warns(UserWarning, match=TAKEN):
        fit(Scored(), [callback], max_epochs=3)
    trainer = fit(module, [callback], max_epochs=3)
    assert_sound(trainer, module, callback)
    assert made(callback) == [(1, 1, 6)]
    assert (callback.keeping.baseline, callback.keeping.stopped) == (0.75, False)


def test_a_fresh_module_after_a_cut_that_stayed_begins_all_over():
    callback, module = guard(), Scored(by_epoch(0.5))
    fit(Scored(by_epoch(0.75)), [callback], max_epochs=3)
    fit(module, [callback], max_epochs=3)
    assert made(callback) == [(1, 1, 6)]
    assert callback.keeping.baseline == 0.5


class Dead(Scored):
    """Three neurons of its first linear layer never fire, and are not trained."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.net.fc1.requires_grad_(False)
        with torch.no_grad():
            self.net.fc1.bias.fill_(2.0)
            self.net.fc1.bias[[1, 4, 6]] = -100.0


@pytest.mark.parametrize("after, left", [(0.25, 18), (0.75, 15)])
def test_a_lossless_cut_is_guarded_as_well(after, left):
    module = Dead(by_epoch(0.75, after, 0.75))
    callback = NeuronPruningCallback(lossless=True, monitor="val_score", max_drop=0.125)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, [callback], max_epochs=4)
    assert hidden(module) == left
    assert_sound(trainer, module, callback, cut=left == 15)
    assert sum(TAKEN in str(one.message) for one in caught) == (left == 18)
    assert module.net.fc1.bias.tolist().count(-100.0) == (3 if left == 18 else 0)
