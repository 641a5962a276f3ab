"""Who died, who revived, who stays dead, and how stable the ranking is."""

import math
from typing import Any

import pytest
import torch

from lightning_neurons.errors import ArgumentError
from lightning_neurons.results.history import RECENT, NeuronHistory
from lightning_neurons.results.neuron_report import LayerCounts, NeuronReport
from tests import reference
from tests.results.reports import network, report_of


def report(
    dead: dict[str, list[int]], scores: dict[str, list[float]] | None = None, width: int = 4, **options: Any
) -> NeuronReport:
    """A report by hand: which neurons are dead, and their scores."""
    deadness = {n: torch.tensor([1.0 if i in ids else 0.25 for i in range(width)]) for n, ids in dead.items()}
    whole = torch.full((width,), 10)
    counts = LayerCounts(
        whole, whole, whole, 0 * whole, 0 * whole, 1.0, torch.ones(width), torch.zeros(0, 3, dtype=torch.int64)
    )
    tensors = {n: torch.tensor(s, dtype=torch.float64) for n, s in (scores or {}).items()}
    return NeuronReport(
        layers=(), scores={"rms": tensors} if tensors else {}, deadness_by={"near_zero": deadness}, per_class={},
        class_counts=(), counts=dict.fromkeys(dead, counts), refused={}, settings={}, **options,
    )  # fmt: skip


def history_of(*reports: NeuronReport) -> NeuronHistory:
    history = NeuronHistory()
    for one in reports:
        history.add(one)
    return history


def assert_same_entries(first: NeuronHistory, second: NeuronHistory) -> None:
    assert len(first) == len(second)
    for a, b in zip(first.entries, second.entries, strict=True):
        assert {k: v for k, v in vars(a).items() if k != "stability"} == {
            k: v for k, v in vars(b).items() if k != "stability"
        }
        assert a.stability == pytest.approx(b.stability, nan_ok=True)


def test_the_first_measurement_knows_no_change():
    entry = history_of(report({"a": [1]}, {"a": [1, 2, 3, 4]}, epoch=0, step=7)).entries[0]
    assert (entry.epoch, entry.step, entry.dead, entry.widths) == (0, 7, {"a": [1]}, {"a": 4})
    assert not any(entry.died.values())
    assert not any(entry.revived.values())
    assert math.isnan(entry.stability["a"])
    assert math.isnan(entry.mean_stability)


def test_neurons_die_and_revive():
    first, second, third = history_of(
        report({"a": [0, 1], "b": []}), report({"a": [1, 3], "b": [2]}), report({"a": [1], "b": [2]})
    ).entries
    assert (second.died, second.revived) == ({"a": [3], "b": [2]}, {"a": [0], "b": []})
    assert (third.died, third.revived) == ({"a": [], "b": []}, {"a": [3], "b": []})
    assert first.dead == {"a": [0, 1], "b": []}


def test_the_persistently_dead_were_dead_every_time():
    history = history_of(report({"a": [0, 1, 2]}), report({"a": [1, 2]}), report({"a": [1, 3]}))
    assert history.persistently_dead() == {"a": [1]}
    assert history.persistently_dead(1) == {"a": [1, 3]}
    assert history.persistently_dead(2) == {"a": [1]}
    assert history.persistently_dead(3) == {"a": [1]}
    assert history.persistently_dead(4) == {}


def test_an_empty_history_knows_nobody():
    assert NeuronHistory().persistently_dead() == {}
    assert len(NeuronHistory()) == 0


def test_stability_is_the_rank_correlation_with_the_measurement_before():
    scores = [[1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 9.0], [4.0, 3.0, 3.0, 1.0]]
    entries = history_of(*(report({"a": []}, {"a": s}) for s in scores)).entries
    for before, now, entry in zip(scores[:-1], scores[1:], entries[1:], strict=True):
        assert entry.stability["a"] == pytest.approx(reference.spearman(before, now))


def test_mean_stability_leaves_out_what_has_none():
    scores = {"a": [1.0, 2.0, 3.0, 4.0], "b": [1.0, 1.0, 1.0, 1.0], "c": [1.0, 2.0, 3.0, 4.0]}
    later = scores | {"c": [4.0, 3.0, 2.0, 1.0]}
    dead = {"a": [], "b": [], "c": []}
    entry = history_of(report(dead, scores), report(dead, later)).entries[1]
    assert entry.stability == pytest.approx({"a": 1, "b": math.nan, "c": -1}, nan_ok=True)
    assert entry.mean_stability == pytest.approx(0)


def test_a_layer_that_changed_its_width_starts_anew():
    before = report({"a": [1], "b": [0]}, {"a": [1, 2, 3, 4], "b": [1, 2, 3, 4]})
    after = report({"a": [0]}, {"a": [1, 2, 3]}, width=3)
    history = history_of(before, after)
    entry = history.entries[1]
    assert not entry.died.get("a")
    assert not entry.revived.get("a")
    assert math.isnan(entry.stability["a"])
    assert history.persistently_dead() == {}
    assert history.persistently_dead(1) == {"a": [0]}
    again = history.add(report({"a": [0, 2]}, {"a": [3, 2, 1]}, width=3))
    assert (again.died["a"], again.revived["a"]) == ([2], [])
    assert again.stability["a"] == pytest.approx(-1)


def test_a_layer_that_appears_later_knows_no_change():
    entry = history_of(report({"a": []}), report({"a": [0], "new": [1]})).entries[1]
    assert entry.died == {"a": [0]}
    assert entry.dead["new"] == [1]


def test_an_unmeasured_neuron_is_not_dead():
    one = report({"a": []})
    one.deadness_by["near_zero"]["a"][2] = math.nan
    assert history_of(one).entries[0].dead == {"a": []}


def test_comparing_keeps_nothing():
    history = history_of(report({"a": [0]}))
    assert history.compare(report({"a": [0, 1]})).died == {"a": [1]}
    assert len(history) == 1


def test_a_history_keeps_its_own_scores():
    one, two = (report({"a": []}, {"a": [1, 2, 3, 4]}) for _ in range(2))
    history = history_of(one)
    one.scores["rms"]["a"].neg_()
    assert history.add(two).stability["a"] == pytest.approx(1)


def test_a_history_survives_a_checkpoint_and_goes_on(tmp_path):
    reports = [
        report({"a": [0, 1]}, {"a": [1, 2, 3, 4]}, epoch=0, step=10),
        report({"a": [1]}, {"a": [1, 3, 2, math.nan]}, epoch=1, step=20),
        report({"a": [1, 2]}, {"a": [2, 3, 1, 5]}, epoch=2, step=30),
    ]
    whole, part = history_of(*reports), history_of(*reports[:2])
    torch.save(part.state_dict(), tmp_path / "checkpoint.pt")
    resumed = NeuronHistory()
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert_same_entries(resumed, part)
    resumed.add(reports[2])
    assert_same_entries(resumed, whole)
    assert resumed.persistently_dead() == whole.persistently_dead() == {"a": [1]}


def test_a_saved_state_does_not_change_with_the_history():
    history = history_of(report({"a": [0]}, {"a": [1, 2, 3, 4]}))
    state = history.state_dict()
    history.add(report({"a": [1]}, {"a": [4, 3, 2, 1]}))
    old = NeuronHistory()
    old.load_state_dict(state)
    assert len(old) == 1
    assert old.entries[0].dead == {"a": [0]}
    assert old.add(report({"a": [0]}, {"a": [1, 2, 3, 4]})).stability["a"] == pytest.approx(1)


def test_real_reports_tell_a_neuron_that_dies_and_revives():
    net = network()
    history = history_of(report_of(["gradient", "near_zero"], net))
    with torch.no_grad():
        net[0].bias[1], net[0].bias[3] = 0.5, -1e6
    entry = history.add(report_of(["gradient", "near_zero"], net))
    assert (entry.died["0"], entry.revived["0"]) == ([3], [1])
    assert all(-1 <= s <= 1 for s in entry.stability.values())
    assert history.persistently_dead()["0"] == []


def test_weights_alone_make_a_history_too():
    history = history_of(report_of(["weight_l2"]), report_of(["weight_l2"]))
    assert history.entries[1].dead == {}
    assert history.entries[1].stability["0"] == pytest.approx(1)


def test_an_unknown_neuron_has_neither_died_nor_revived():
    reports = [report({"a": dead}) for dead in ([0], [0], [1])]
    reports[1].deadness_by["near_zero"]["a"][:2] = math.nan  # samples of 0 and 1 were left out
    history = history_of(*reports)
    first, second, third = history.entries
    assert (first.unknown, second.unknown, second.dead) == ({}, {"a": [0, 1]}, {"a": []})
    assert (second.died, second.revived) == ({"a": []}, {"a": []})
    assert (third.died, third.revived) == ({"a": []}, {"a": []}), "0 was not known before, nor was 1"
    assert history.persistently_dead() == {"a": []}


def test_a_long_history_is_bounded_and_remembers_who_was_always_dead():
    history, sizes = NeuronHistory(), []
    for epoch in range(1000):
        history.add(report({"a": [0, 2] if epoch == 3 else [0, 1, 2, 3]}, epoch=epoch))
        sizes.append(len(history))
    assert max(sizes) <= 2 * RECENT
    assert (history.measured, history.entries[0].epoch) == (1000, 0)
    epochs = [entry.epoch for entry in history.entries]
    assert epochs == sorted(set(epochs))
    assert epochs[-RECENT:] == list(range(1000 - RECENT, 1000))
    assert history.persistently_dead() == history.persistently_dead(1000) == {"a": [0, 2]}, (
        "also after epoch 3 was let go"
    )
    assert history.persistently_dead(RECENT) == {"a": [0, 1, 2, 3]}
    assert history.persistently_dead(1001) == {}
    with pytest.raises(ArgumentError, match="measurements=500 is not allowed: expected at most 100"):
        history.persistently_dead(500)
    resumed = NeuronHistory()
    resumed.load_state_dict(history.state_dict())
    resumed.add(report({"a": [2, 3]}, epoch=1000))
    assert (resumed.measured, resumed.persistently_dead()) == (1001, {"a": [2]})


def test_a_file_of_a_long_history_remembers_as_well(tmp_path):
    history = history_of(*(report({"a": [0] if epoch else [0, 1]}) for epoch in range(250)))
    history.save(tmp_path / "history.json")
    loaded = NeuronHistory.load(tmp_path / "history.json")
    assert (loaded.measured, loaded.persistently_dead()) == (250, {"a": [0]})
    assert_same_entries(loaded, history)
