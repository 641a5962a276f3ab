"""The contract: a metric that is worse than the bound brings the last good model back, and nothing else does."""

import contextlib
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.callbacks.guarded import NAN, WHOLE, Scored, by_epoch, by_neurons, guard, hidden, made, state_of, undone
from tests.callbacks.guarded import differences as differing
from tests.callbacks.modules import MemoryLogger, fit
from tests.callbacks.pruned import Probe, assert_sound, widths

pytestmark = pytest.mark.filterwarnings("ignore:.*(nothing has|all cuts have) been")
TAKEN = r"is the worst that is allowed: 1 round taken back"


def taken_back() -> Any:
    return pytest.warns(UserWarning, match=TAKEN)


BOUNDS = [
    # mode, max_drop, relative, the metric before, after, whether the cut may stay
    ("max", 0.125, False, 0.75, 0.625, True),
    ("max", 0.125, False, 0.75, 0.6249, False),
    ("max", 0.0, False, 0.75, 0.75, True),
    ("max", 0.0, False, 0.75, 0.7499, False),
    ("max", 0.125, False, 0.75, 0.9, True),
    ("min", 0.125, False, 0.75, 0.875, True),
    ("min", 0.125, False, 0.75, 0.8751, False),
    ("min", 0.125, False, 0.75, 0.1, True),
    ("max", 0.25, True, 0.5, 0.375, True),
    ("max", 0.25, True, 0.5, 0.3749, False),
    ("min", 0.25, True, 0.5, 0.625, True),
    ("min", 0.25, True, 0.5, 0.6251, False),
    ("max", 0.25, True, -0.5, -0.625, True),
    ("max", 0.25, True, -0.5, -0.6251, False),
    ("min", 0.25, True, -0.5, -0.375, True),
    ("min", 0.25, True, -0.5, -0.3749, False),
    ("max", 0.25, True, 0.0, 0.0, True),
    ("max", 0.25, True, 0.0, -0.0001, False),
    ("max", 0.125, False, 0.75, NAN, False),
    ("min", 0.125, False, 0.75, NAN, False),
    ("max", 0.125, False, 0.75, -float("inf"), False),
    ("min", 0.125, False, 0.75, float("inf"), False),
]


@pytest.mark.parametrize("row", range(len(BOUNDS)), ids=[str(row) for row in BOUNDS])
def test_a_cut_stays_if_and_only_if_the_metric_keeps_its_bound(row):
    mode, drop, relative, before, after, holds = BOUNDS[row]
    ends = row % 4 < 2  # training ends with the validation that judges the cut, or it goes on
    callback = guard(mode=mode, max_drop=drop, relative_drop=relative)
    module = Scored(by_epoch(before, after, *([] if ends else [before])))
    with contextlib.nullcontext() if holds else taken_back():
        trainer = fit(module, [callback], max_epochs=2 if ends else 3)
    assert_sound(trainer, module, callback, cut=holds)
    assert hidden(module) == (12 if holds else 18)
    assert made(callback) == ([(1, 1, 6)] if holds else [])
    assert undone(callback) == ([] if holds else [(1, 1, 6)])


@pytest.mark.parametrize("recovery", [1, 2, 3])
def test_a_cut_is_judged_when_its_epochs_of_recovery_are_over_and_not_before(recovery):
    scores = [0.75] + [0.25] * (recovery - 1) + [0.5] + [0.75] * 3
    callback = guard(recovery_epochs=recovery)
    seen = Probe("on_train_batch_start", lambda _, module: hidden(module))
    with taken_back():
        fit(Scored(by_epoch(*scores)), [callback, seen], max_epochs=recovery + 3)
    assert list(seen.seen.values()) == [18] + [12] * recovery + [18, 18]
    fine, seen = guard(recovery_epochs=recovery), Probe("on_train_batch_start", lambda _, module: hidden(module))
    fit(Scored(by_epoch(*scores[:recovery], 0.75)), [fine, seen], max_epochs=recovery + 3)
    assert list(seen.seen.values()) == [18] + [12] * (recovery + 2)


def test_of_several_rounds_those_before_the_violation_stay():
    callback = guard(amount=0.66, schedule="linear", start_epoch=1, end_epoch=3)  # 4, 8 and 12 of 18
    module, seen = Scored(), Probe("on_train_batch_start", lambda _, module: hidden(module))
    with taken_back():
        trainer = fit(module, [callback, seen], max_epochs=6)
    assert list(seen.seen.values()) == [18, 14, 10, 14, 14, 14]
    assert (made(callback), undone(callback)) == ([(1, 1, 4)], [(2, 2, 4)])
    assert_sound(trainer, module, callback)
    assert callback.plan.neurons == callback.rounds.done[0].plan.neurons
    assert callback.plan.cost.parameters_after == sum(p.numel() for p in module.parameters())


def test_each_round_is_held_to_the_metric_before_the_first_cut_not_to_that_before_itself():
    callback = guard(amount=0.66, schedule="linear", end_epoch=3)
    with taken_back():
        fit(Scored(by_epoch(0.75, 0.6875, 0.5, 0.75)), [callback], max_epochs=6)
    assert callback.keeping.baseline == 0.75
    assert (made(callback), undone(callback)) == ([(1, 1, 4)], [(2, 2, 4)])


def test_half_the_step_is_tried_until_it_is_below_a_sixteenth():
    callback = guard(amount=1.0, on_violation="halve", max_drop=0.0, min_neurons=1)
    due, plain = [], callback._pruner.due_budget
    callback._pruner.due_budget = lambda number: due.append(plain(number)) or due[-1]
    seen = Probe("on_train_batch_start", lambda _, module: hidden(module))
    limit = pytest.warns(UserWarning, match=r"amount=1.* is not reached")
    with limit, taken_back():
        fit(Scored(), [callback, seen], max_epochs=12)
    assert [budget.amount for budget in due] == [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
    assert [count for *_, count in undone(callback)] == [15, 9, round(18 / 4), round(18 / 8), 1]
    assert [epoch for _, epoch, _ in undone(callback)] == [1, 3, 5, 7, 9]
    assert made(callback) == []
    assert callback.keeping.stopped
    assert list(seen.seen.values())[9:] == [17, 18, 18]


def test_halved_steps_go_on_from_the_last_good_model_and_stay_halved():
    callback = guard(amount=0.66, schedule="linear", end_epoch=3, on_violation="halve", max_drop=0.25)
    due, plain = [], callback._pruner.due_budget
    callback._pruner.due_budget = lambda number: due.append(plain(number)) or due[-1]
    with taken_back():
        fit(Scored(), [callback], max_epochs=10)
    # 4 go, then 8 (which is the bound), then 12 are too many: the step from 2/3 of the way to 1 is halved.
    shares = [1 / 3, 2 / 3, 1, 5 / 6, 3 / 4, 17 / 24]
    assert [budget.amount for budget in due] == pytest.approx([0.66 * share for share in shares[: len(due)]])
    assert made(callback)[:2] == [(1, 1, 4), (2, 2, 4)]
    assert undone(callback)[0] == (3, 3, 4)
    assert sum(count for *_, count in made(callback)) == 8


def test_a_target_of_macs_is_approached_by_half_the_step():
    callback = guard(target_macs=0.4, on_violation="halve")
    due, plain = [], callback._pruner.due_budget
    callback._pruner.due_budget = lambda number: due.append(plain(number)) or due[-1]
    with taken_back():
        fit(Scored(by_epoch(0.75, 0.25, 0.75)), [callback], max_epochs=6)
    assert [budget.target_macs for budget in due] == pytest.approx([0.4, 0.7])
    assert callback.plan.cost.macs_after <= 0.7 * callback.plan.cost.macs


def test_training_that_ends_in_the_middle_of_a_recovery_ends_with_a_model_that_keeps_the_contract():
    for score, left in ((0.25, 18), (0.625, 12)):
        callback = guard(recovery_epochs=5)
        module = Scored(by_epoch(0.75, score))
        early = pytest.warns(UserWarning, match="training ends before the 5 epochs of recovery .* it would take 6")
        with early, taken_back() if left == 18 else contextlib.nullcontext():
            fit(module, [callback], max_epochs=3)
        assert hidden(module) == left


def test_early_stopping_in_the_middle_of_a_recovery():
    callback, stopping = guard(recovery_epochs=3), EarlyStopping("val_score", mode="max", patience=1)
    module = Scored(by_epoch(0.75, 0.25))
    with taken_back():
        trainer = fit(module, [callback, stopping], max_epochs=9)
    assert trainer.current_epoch == 2
    assert widths(module) == WHOLE


def test_training_that_ends_before_any_validation_after_the_cut_ends_with_the_model_before_it():
    callback, module = guard(), Scored()
    before = Probe("on_train_epoch_start", state_of)
    with pytest.warns(UserWarning, match="1 round taken back"):
        trainer = fit(module, [before, callback], max_epochs=3, max_steps=6)
    assert differing(state_of(trainer, module), before.seen[1]) == []


def test_a_metric_that_falls_after_a_recovery_that_was_fine_brings_the_last_good_model_back():
    callback, module = guard(), Scored(by_epoch(0.75, 0.75, 0.75, 0.25))
    judged = Probe("on_train_epoch_start", state_of)
    with pytest.warns(UserWarning, match="last good state comes back"):
        trainer = fit(module, [callback, judged], max_epochs=4)
    assert differing(state_of(trainer, module), judged.seen[3]) == []
    assert made(callback) == [(1, 1, 6)]
    assert_sound(trainer, module, callback)


@pytest.mark.parametrize("first", [True, False], ids=["EMA first", "EMA last"])
def test_what_comes_back_at_the_end_is_what_was_validated_and_that_is_the_average(first):
    callback, module, ema = guard(), Scored(by_epoch(0.75, 0.25)), EMAWeightAveraging(decay=0.5)
    validated = Probe("on_validation_end", lambda t, _: state_of(t, ema._average_model.module)["model"])
    with taken_back():
        fit(module, [*([ema, callback] if first else [callback, ema]), validated], max_epochs=2)
    trained = {name: tensor.detach() for name, tensor in module.named_parameters()}
    assert differing(trained, {name: validated.seen[0][name] for name in trained}) == []


@pytest.mark.parametrize("before", [NAN, float("inf")])
def test_what_is_no_number_before_the_cut_cannot_be_kept_so_nothing_is_cut(before):
    callback, module = guard(max_drop=0.5, relative_drop=True), Scored(by_epoch(before))
    with pytest.warns(
        UserWarning, match=f"round 1 is not made at epoch [12]: val_score is {before}, so there|no epoch follows"
    ):
        fit(module, [callback], max_epochs=3)
    assert widths(module) == WHOLE
    assert callback.plan.neurons == {}


def test_a_metric_that_becomes_a_number_later_lets_the_cut_be_made_then():
    callback = guard()
    with pytest.warns(UserWarning, match="round 1 is not made at epoch 1: val_score is nan"):
        fit(Scored(by_epoch(NAN, 0.75)), [callback], max_epochs=4)
    assert made(callback) == [(1, 2, 6)]


def test_a_metric_that_nobody_logs_is_an_error_that_names_the_nearest():
    callback, module = guard(monitor="val_scor"), Scored()
    unknown = pytest.warns(UserWarning, match="Did you mean 'val_score'|val_scor is None, so there is nothing to keep")
    with unknown, pytest.raises(MisconfigurationException, match=r"monitor: .*'val_scor'. Did you mean 'val_score'"):
        fit(module, [callback], max_epochs=3)
    assert widths(module) == WHOLE


def test_a_metric_that_is_too_low_already_lets_no_further_round_be_made():
    callback = guard(amount=0.66, schedule="linear", end_epoch=5, every_n_epochs=2)
    module = Scored(by_epoch(0.75, 0.75, 0.25, 0.25, 0.75))
    low = pytest.warns(UserWarning, match=r"round 2 is not made at epoch [34]: val_score is 0.25 already, and 0.625 is")
    with low:
        fit(module, [callback], max_epochs=7)
    assert [number for number, *_ in made(callback)] == [1, 3]


def test_torch_numbers_and_generators_are_left_alone_by_a_judgement():
    callback = guard()
    drawn = [Probe("on_train_epoch_start", lambda *_: torch.get_rng_state()) for _ in range(2)]
    with taken_back():
        fit(Scored(), [drawn[0], callback, drawn[1]], max_epochs=4)
    assert torch.equal(drawn[0].seen[2], drawn[1].seen[2])


def test_reports_tell_of_what_was_taken_back():
    callback, logger, module = guard(), MemoryLogger(), Scored()
    with taken_back():
        trainer = fit(module, [callback], max_epochs=4, logger=logger)
    assert [(name, value) for name, _, value in logger.rows if name == "pruning/taken_back"] == [
        ("pruning/taken_back", 1.0)
    ]
    (round_,) = callback.rounds.undone
    assert (round_.before, round_.after) == (18 / 32, 12 / 32)
    series = {name: [v for n, _, v in logger.rows if n == name] for name, *_ in logger.rows}
    assert series["pruning/parameters"] == [365, round_.plan.cost.parameters_after, 365]
    assert series["pruning/macs"] == [9144, round_.plan.cost.macs_after, 9144]
    assert [series[f"pruning/neurons/{layer}"][-1] for layer in ("net.conv1", "net.conv2", "net.fc1")] == [4, 6, 8]
    assert (callback.plan.neurons, callback.rounds.widths()) == ({}, WHOLE)
    assert callback.keeping.baseline == by_neurons(Scored())
    assert_sound(trainer, module, callback, cut=False)
