"""Magnitudes in a history, and histories on disk: what comes back, and which files are refused."""

import dataclasses
import json
import math

import pytest
import torch

from lightning_neurons.errors import ArgumentError
from lightning_neurons.metrics.histogram import folded_edges
from lightning_neurons.results.history import MAGNITUDE_PARTS, NeuronHistory
from tests.results.reports import report_of
from tests.results.test_history import assert_same_entries, history_of, report
from tests.tables import for_each


def of_real_reports() -> NeuronHistory:
    return history_of(*(dataclasses.replace(report_of(["gradient", "near_zero"]), epoch=epoch) for epoch in range(2)))


def test_magnitudes_are_the_counts_of_the_report_in_coarser_bars():
    one = report_of(["gradient", "near_zero"])
    entry = history_of(one).entries[0]
    assert entry.magnitudes.keys() == one.counts.keys()
    for layer, counts in one.counts.items():
        bars = entry.magnitudes[layer]
        assert len(bars) == len(folded_edges(MAGNITUDE_PARTS)) + 1
        assert sum(bars) == int(counts.histogram.sum())
        assert bars[0] == int(counts.histogram[:, 0].sum())
    assert entry.magnitudes["0"][0] >= 24, "the dead neuron is silent on every sample"


def test_where_magnitudes_were_not_counted_there_are_none():
    assert history_of(report({"a": [0]})).entries[0].magnitudes == {}
    assert history_of(report_of(["weight_l2"])).entries[0].magnitudes == {}


def test_magnitudes_survive_a_checkpoint(tmp_path):
    history, resumed = of_real_reports(), NeuronHistory()
    torch.save(history.state_dict(), tmp_path / "checkpoint.pt")
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert_same_entries(resumed, history)
    assert resumed.entries[1].magnitudes["0"]


def test_a_checkpoint_from_before_magnitudes_were_kept_goes_on():
    history, old = of_real_reports(), NeuronHistory()
    state = history.state_dict()
    old.load_state_dict({
        **state,
        "entries": [{k: v for k, v in e.items() if k != "magnitudes"} for e in state["entries"]],
    })
    assert [entry.magnitudes for entry in old.entries] == [{}, {}]
    entry = old.add(report_of(["gradient", "near_zero"]))
    assert entry.magnitudes == history.entries[1].magnitudes
    assert entry.died["0"] == []
    assert entry.stability["0"] == pytest.approx(1)


def test_a_history_survives_the_disk(tmp_path):
    path = tmp_path / "logs" / "history.json"
    history = of_real_reports()
    history.save(path, {"torch": "2.13.0"})
    found = NeuronHistory.load(str(path))
    assert_same_entries(found, history)
    assert found.persistently_dead() == history.persistently_dead() == {"0": [1], "3": [], "5": []}
    assert json.loads(path.read_text())["versions"] == {"torch": "2.13.0"}
    entry = found.add(report_of(["gradient", "near_zero"]))
    assert entry.died["0"] == []
    assert math.isnan(entry.stability["0"]), "scores are not in the file"


def test_an_empty_history_survives_the_disk(tmp_path):
    NeuronHistory().save(tmp_path / "history.json")
    assert len(NeuronHistory.load(tmp_path / "history.json")) == 0


def test_a_file_without_magnitudes_can_be_read(tmp_path):
    path = tmp_path / "history.json"
    of_real_reports().save(path)
    document = json.loads(path.read_text())
    for entry in document["entries"]:
        del entry["magnitudes"]
    path.write_text(json.dumps(document))
    assert [entry.magnitudes for entry in NeuronHistory.load(path).entries] == [{}, {}]


OTHERS = ["", "{", "[1, 2]", "null", "3", "{}", '{"format": "other", "version": 1, "entries": []}', "\x00"]
HISTORY = {"format": "lightning_neurons history", "version": 1, "entries": []}


@for_each("text", OTHERS)
def test_a_file_that_is_no_history_is_refused_by_its_name(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=r"other\.json.* a JSON file that NeuronHistory.save wrote"):
        NeuronHistory.load(path)


@for_each(
    "changes", [{"version": 2}, {"entries": [3]}, {"entries": [{"epoch": 1}]}, {"entries": None}, {"version": "1"}]
)
def test_a_history_of_a_newer_version_or_with_a_part_missing_is_refused(changes, tmp_path):
    path = tmp_path / "history.json"
    path.write_text(json.dumps({**HISTORY, **changes}))
    with pytest.raises(ArgumentError, match=r"history\.json.*version 1 or older"):
        NeuronHistory.load(path)


def test_a_binary_or_missing_file_is_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(bytes(range(256)))
    with pytest.raises(ArgumentError, match=r"NeuronHistory\.save"):
        NeuronHistory.load(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError):
        NeuronHistory.load(tmp_path / "nowhere.json")
