"""What pruning has done, on disk: every number comes back, and other files are refused."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_neurons.errors import ArgumentError
from lightning_neurons.results.pruning_history import PruningHistory, PruningPoint
from tests.tables import for_each

metrics = st.none() | st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**60)
points = st.builds(
    PruningPoint, epoch=counts, removed=counts, parameters=counts, macs=counts, before=metrics, cut=metrics,
    after=metrics, taken_back=st.booleans(),
)  # fmt: skip
widths = st.dictionaries(st.text(max_size=8), st.integers(0, 10_000), max_size=4)
histories = st.builds(
    PruningHistory, parameters=counts, macs=counts, widths=widths, widths_after=widths,
    monitor=st.none() | st.text(max_size=8), points=st.lists(points, max_size=4).map(tuple),
)  # fmt: skip


def example() -> PruningHistory:
    cuts = (PruningPoint(1, 2, 80, 800, 0.9, 0.8, 0.85), PruningPoint(3, 1, 70, 600, 0.9, 0.2, None, taken_back=True))
    return PruningHistory(100, 1000, {"fc": 4}, {"fc": 2}, "val_acc", cuts)


@settings(max_examples=60, deadline=None)
@given(histories)
def test_every_history_survives_the_disk(tmp_path_factory, history):
    path = tmp_path_factory.mktemp("pruning") / "pruning.json"
    history.save(path)
    found = PruningHistory.load(path)
    assert found == history
    assert [type(point) for point in found.points] == [PruningPoint] * len(history.points)
    assert isinstance(found.points, tuple)


def test_the_file_is_readable(tmp_path):
    example().save(str(tmp_path / "pruning.json"))
    document = json.loads((tmp_path / "pruning.json").read_text())
    assert (document["format"], document["version"]) == ("lightning_neurons pruning", 1)
    assert document["points"][1] == {
        "epoch": 3, "removed": 1, "parameters": 70, "macs": 600, "before": 0.9, "cut": 0.2, "after": None,
        "taken_back": True,
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["pruning.json"]
    assert PruningHistory.load(str(tmp_path / "pruning.json")) == example()


@for_each("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_comes_back_as_a_number_or_as_unknown(tmp_path, value):
    history = PruningHistory(1, 1, {}, {}, "loss", (PruningPoint(1, 1, 1, 1, value, 0.5, value),))
    history.save(tmp_path / "pruning.json")
    (point,) = PruningHistory.load(tmp_path / "pruning.json").points
    for found in (point.before, point.after):
        assert found is None or (math.isnan(found) and math.isnan(value)) or found == value
    assert point.cut == 0.5


def spoiled(folder: Path, **changes: object) -> Path:
    path = folder / "pruning.json"
    example().save(path)
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in document.items() if value != "left out"}))
    return path


@for_each("text", ["", "{", "[1, 2]", "null", "3", '"text"', "{}", '{"format": "other"}', '{"version": 1}', "\x00"])
def test_another_file_is_refused_by_its_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=r"other\.json.* a JSON file that PruningHistory.save wrote"):
        PruningHistory.load(path)


@for_each("changes", [
        {"version": 2}, {"format": "lightning_neurons history"}, {"points": [{"epoch": 1}]}, {"points": [3]},
        {"points": None}, {"unknown": 1}, {"version": None},
        *({name: "left out"} for name in ("format", "version", "points", "parameters", "macs", "widths")),
    ])  # fmt: skip
def test_a_file_of_another_kind_or_with_a_part_missing_is_refused(tmp_path, changes):
    with pytest.raises(ArgumentError, match=r"pruning\.json.*version 1 or older"):
        PruningHistory.load(spoiled(tmp_path, **changes))


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(bytes(range(256)))
    with pytest.raises(ArgumentError, match=r"PruningHistory\.save"):
        PruningHistory.load(tmp_path / "model.pt")


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        PruningHistory.load(tmp_path / "nowhere.json")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    path = tmp_path / "pruning.json"
    example().save(path)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        PruningHistory(1, 1, {}, {}).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["pruning.json"]
    assert PruningHistory.load(path) == example()
