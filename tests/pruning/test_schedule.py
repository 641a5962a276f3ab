"""When rounds are due, and how far each goes."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_neurons import ArgumentError, PruningBudget
from lightning_neurons.pruning.schedule import PruningSchedule
from tests.criteria.streams import laws
from tests.tables import for_each

SHAPES = ["linear", "cubic", "geometric"]
removals = st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.999, 1.0])


@st.composite
def schedules(draw, shapes: tuple[str, ...] = tuple(SHAPES)) -> PruningSchedule:
    start, length, every = draw(st.integers(1, 5)), draw(st.integers(0, 12)), draw(st.integers(1, 5))
    return PruningSchedule(draw(st.sampled_from(shapes)), start, start + length, every)


@laws
@given(schedules())
def test_rounds_are_made_at_every_nth_epoch_from_the_start_to_the_end(schedule):
    epochs = range(schedule.start_epoch, schedule.end_epoch + 1, schedule.every_n_epochs)
    assert schedule.rounds == len(epochs)
    assert [schedule.epoch_of(number) for number in range(1, schedule.rounds + 1)] == list(epochs)
    for epoch in range(40):
        assert schedule.due(epoch) == sum(begun <= epoch for begun in epochs)


@for_each("epoch", [1, 4])
def test_without_an_end_there_is_one_round(epoch):
    schedule = PruningSchedule(start_epoch=epoch)
    assert schedule.rounds == 1
    assert [schedule.due(e) for e in range(8)] == [int(e >= epoch) for e in range(8)]
    assert schedule.epoch_of(1) == epoch
    assert schedule.progress(1, 0.5) == 1


@for_each(
    "shape, parts",
    [
        ("linear", [0.25, 0.5, 0.75, 1.0]),
        ("cubic", [1 - 27 / 64, 1 - 1 / 8, 1 - 1 / 64, 1.0]),
        ("geometric", [(1 - 0.5) / 0.9375, (1 - 0.25) / 0.9375, (1 - 0.125) / 0.9375, 1.0]),
    ],
)
def test_four_rounds_that_remove_fifteen_sixteenths_go_these_parts_of_the_way(shape, parts):
    schedule = PruningSchedule(shape, start_epoch=2, end_epoch=9, every_n_epochs=2)
    assert [schedule.progress(number, 0.9375) for number in range(1, 5)] == pytest.approx(parts)


@laws
@given(schedules(("cubic",)), removals)
def test_cubic_is_the_sparsity_of_zhu_and_gupta(schedule, removed):
    rounds = schedule.rounds
    for number in range(1, rounds + 1):
        sparsity = removed + (0 - removed) * (1 - number / rounds) ** 3
        assert schedule.progress(number, removed) * removed == pytest.approx(sparsity)


@laws
@given(schedules(("geometric",)), removals.filter(lambda removed: removed < 1))
def test_geometric_removes_the_same_share_of_what_is_left_in_every_round(schedule, removed):
    left = [1 - removed * schedule.progress(number, removed) for number in range(1, schedule.rounds + 1)]
    shares = [1 - now / before for before, now in zip([1.0, *left], left, strict=False)]
    assert shares == pytest.approx([shares[0]] * len(shares), abs=1e-9)
    assert left[-1] == pytest.approx(1 - removed)


@laws
@given(schedules(), removals)
def test_every_round_goes_further_and_the_last_to_the_end(schedule, removed):
    parts = [schedule.progress(number, removed) for number in range(1, schedule.rounds + 1)]
    assert parts == sorted(parts)
    assert all(0 < part <= 1 + 1e-12 for part in parts)
    assert parts[-1] == pytest.approx(1)
    steps = [b - a for a, b in zip([0.0, *parts], parts, strict=False)]
    if schedule.shape != "linear":
        assert steps == pytest.approx(sorted(steps, reverse=True))


@laws
@given(schedules(), st.sampled_from(["amount", "target_params", "target_macs"]), removals)
def test_every_part_of_the_way_is_a_budget_and_the_last_is_the_whole_one(schedule, rule, value):
    budget = PruningBudget("weight_l2", **{rule: value})
    removed = value if rule == "amount" else 1 - value
    assume(removed > 0)
    steps = [budget.at(schedule.progress(number, removed)).rule[1] for number in range(1, schedule.rounds + 1)]
    assert steps == sorted(steps, reverse=rule != "amount")
    assert steps[-1] == pytest.approx(value)


@for_each("shape", SHAPES)
def test_where_nothing_is_to_be_removed_the_way_still_ends(shape):
    schedule = PruningSchedule(shape, end_epoch=4)
    parts = [schedule.progress(number, 0.0) for number in range(1, 5)]
    assert parts == sorted(parts)
    assert parts[-1] == 1


def test_one_shot_goes_all_the_way_at_once_also_where_an_end_is_given():
    schedule = PruningSchedule("one_shot", end_epoch=4)
    assert schedule.progress(1, 0.5) == 1


@for_each(
    "options, named",
    [
        ({"shape": "cubical"}, "schedule='cubical' is not allowed: expected one of 'one_shot', 'linear', 'cubic'"),
        ({"shape": "cubical"}, "did you mean 'cubic'?"),
        ({"shape": None}, "schedule=None"),
        ({"start_epoch": 0}, "start_epoch=0 is not allowed: expected a whole number of at least 1"),
        ({"start_epoch": 1.5}, "start_epoch=1.5"),
        ({"start_epoch": True}, "start_epoch=True"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"every_n_epochs": 2.0}, "every_n_epochs=2.0"),
        ({"shape": "linear", "start_epoch": 3, "end_epoch": 2}, "end_epoch=2 is not allowed: expected a whole number"),
        ({"shape": "linear", "end_epoch": "9"}, "end_epoch='9'"),
        *(({"shape": shape}, f'expected the epoch of the last round, with schedule="{shape}"') for shape in SHAPES),
    ],
)
def test_a_schedule_out_of_range_says_what_came_and_what_is_allowed(options, named):
    with pytest.raises(ArgumentError) as error:
        PruningSchedule(**options)
    assert named in str(error.value)
