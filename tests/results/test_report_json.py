"""Reports on disk: bit by bit, readable, whole or not at all."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import NeuronReport, measure
from lightning_neurons.errors import ArgumentError
from tests.results.reports import batches, loss, network, report_of
from tests.tables import for_each


def same(a: object, b: object) -> bool:
    """Whether two values are the same in every bit, whichever NaN a NaN is."""
    if isinstance(a, Tensor):
        bits = lambda t: torch.where(t.isnan(), math.nan, t).view(torch.int64) if t.is_floating_point() else t
        return isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(bits(a), bits(b))
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and same(vars(a), vars(b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def spoiled(value: float, rows: slice) -> list[tuple[Tensor, Tensor]]:
    """The data with some samples replaced by a value."""
    inputs = [(x.clone(), y) for x, y in batches()]
    for x, _ in inputs:
        x[rows] = value
    return inputs


def infinite() -> NeuronReport:
    scores = torch.tensor([math.inf, -math.inf, math.nan, -0.0], dtype=torch.float64)
    return dataclasses.replace(report_of(["rms"]), scores={"rms": {"0": scores}})


REPORTS = {
    "default": lambda: dataclasses.replace(report_of(), epoch=3, step=120, notes=("one", "zw\u00f6lf")),
    "per class": lambda: report_of(per_class=lambda batch: batch[1] * 2),
    "nothing finite": lambda: measure(
        network(), spoiled(math.nan, slice(None)), loss_fn=loss, criteria=["gradient", "mean", "max", "near_zero"]
    ),
    "partly infinite": lambda: measure(network(), spoiled(math.inf, slice(1)), criteria=["rms", "near_zero", "apoz"]),
    "weights only": lambda: report_of(["weight_l1", "outgoing_l2", "norm_scale"]),
    "deadness only": lambda: report_of(["near_zero"], layers=["3"]),
    "infinite scores": infinite,
}


@for_each("name", REPORTS)
def test_a_report_survives_the_disk_bit_for_bit(name, tmp_path):
    report = REPORTS[name]()
    report.save(tmp_path / "neurons.json")
    loaded = NeuronReport.load(tmp_path / "neurons.json")
    for field in dataclasses.fields(NeuronReport):
        assert same(getattr(loaded, field.name), getattr(report, field.name)), field.name


@for_each("bits", [0x7FEFFFFFFFFFFFFF, 0x0000000000000001, 0x3FD5555555555555, -0x8000000000000000])
def test_extreme_numbers_survive_the_disk(bits, tmp_path):
    score = torch.tensor([bits, bits, bits, bits]).view(torch.float64)
    report = dataclasses.replace(report_of(["rms"]), scores={"rms": {"0": score}})
    report.save(tmp_path / "neurons.json")
    assert same(NeuronReport.load(tmp_path / "neurons.json").scores["rms"]["0"], score)


def test_counts_beyond_what_floats_can_count_survive_the_disk(tmp_path):
    report = report_of(["near_zero"])
    report.counts["0"].histogram[0, 0] = 2**60 + 1
    report.counts["0"].samples[0] = 2**60 + 1
    report.save(tmp_path / "neurons.json")
    counts = NeuronReport.load(tmp_path / "neurons.json").counts["0"]
    assert counts.histogram[0, 0].item() == counts.samples[0].item() == 2**60 + 1


def test_a_loaded_report_answers_like_the_saved_one(tmp_path):
    report = report_of()
    report.save(str(tmp_path / "neurons.json"))
    loaded = NeuronReport.load(str(tmp_path / "neurons.json"))
    assert loaded.ranking() == report.ranking()
    assert loaded.select(share=0.3) == report.select(share=0.3)
    assert loaded.to_frame().equals(report.to_frame())
    for layer, scores in loaded.deadness_at(0.2).items():
        assert torch.equal(scores, report.deadness_at(0.2)[layer])


def test_the_file_has_one_readable_entry_per_neuron(tmp_path):
    report = report_of()
    report.save(tmp_path / "neurons.json")
    entries = json.loads((tmp_path / "neurons.json").read_text())["neurons"]
    assert [(e["layer"], e["neuron"]) for e in entries] == [
        (layer, i) for layer, width in (("0", 4), ("3", 5), ("5", 3)) for i in range(width)
    ]
    for entry in entries:
        assert entry["deadness"] == report.deadness[entry["layer"]][entry["neuron"]].item()
        assert entry["importance"] == report.scores["taylor"][entry["layer"]][entry["neuron"]].item()
    assert entries[1]["deadness"] == 1


def test_a_file_of_before_keeps_its_main_criterion_and_hides_nothing(tmp_path):
    report_of(["gradient", "taylor"]).save(tmp_path / "neurons.json")
    document = json.loads((tmp_path / "neurons.json").read_text())
    document["settings"]["main_criterion"] = "gradient"
    for layer in document["layers"]:
        del layer["output"], layer["twins"]
    (tmp_path / "neurons.json").write_text(json.dumps(document))
    old = NeuronReport.load(tmp_path / "neurons.json")
    assert old.main_criterion == "gradient"
    assert {n.layer for n in old.ranking()} == {"0", "3", "5"}


def test_what_was_not_measured_is_null_in_the_entries(tmp_path):
    report_of(["apoz"]).save(tmp_path / "neurons.json")
    entries = json.loads((tmp_path / "neurons.json").read_text())["neurons"]
    assert [e["deadness"] is None for e in entries] == [False] * 4 + [True] * 8
    assert all(e["importance"] is None for e in entries)


def test_the_file_is_json_that_every_reader_accepts(tmp_path):
    REPORTS["nothing finite"]().save(tmp_path / "neurons.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads((tmp_path / "neurons.json").read_text(), parse_constant=refuse)
    assert document["scores"]["mean"]["0"] == [None] * 4


@for_each("text", [
        "", "{", '{"format": "lightning_neurons rep', "[1, 2]", "null", "3", '"text"', "{}", '{"format": "other"}',
        '{"version": 1}', "\x00\x01",
    ])  # fmt: skip
def test_a_file_that_is_no_report_is_refused_by_its_name(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(
        ArgumentError, match=r"path='.*other\.json' is not allowed: .*a JSON file that NeuronReport.save"
    ):
        NeuronReport.load(path)


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ArgumentError, match=r"a JSON file that NeuronReport\.save wrote"):
        NeuronReport.load(path)


def saved(folder: Path) -> tuple[Path, dict]:
    path = folder / "neurons.json"
    report_of(["rms", "near_zero"]).save(path)
    return path, json.loads(path.read_text())


def test_a_report_of_a_newer_version_is_refused_with_both_versions(tmp_path):
    path, document = saved(tmp_path)
    path.write_text(json.dumps({**document, "version": 99}))
    with pytest.raises(ArgumentError, match=r"neurons\.json of version 99.* expected version 1 or older"):
        NeuronReport.load(path)


@for_each("part", ["version", "scores", "layers", "counts", "settings"])
def test_a_report_with_a_part_missing_is_refused_by_its_name(part, tmp_path):
    path, document = saved(tmp_path)
    del document[part]
    path.write_text(json.dumps(document))
    with pytest.raises(ArgumentError, match=r"neurons\.json"):
        NeuronReport.load(path)


INCONSISTENT = {
    "too few scores": lambda d: d["scores"]["rms"]["0"].pop(),
    "too many dead": lambda d: d["deadness"]["near_zero"]["3"].append(0.5),
    "one number for a layer": lambda d: d["scores"]["rms"].update({"0": 1.0}),
    "unknown layer": lambda d: d["scores"]["rms"].update(other=[1.0]),
    "settings": lambda d: d.update(settings=[1, 2]),
    "criteria in units of the loss": lambda d: d["settings"].update(in_loss_units=None),
    "normalize": lambda d: d["settings"].update(normalize=["sum"]),
    "threshold": lambda d: d["settings"].update(threshold=None),
    "relative threshold": lambda d: d["settings"].update(relative_threshold="yes"),
    "refused": lambda d: d.update(refused=["rms"]),
    "epoch": lambda d: d.update(epoch="three"),
    "step": lambda d: d.update(step=1.5),
    "version": lambda d: d.update(version=0),
}


@for_each("part", INCONSISTENT)
def test_a_report_that_contradicts_itself_is_refused(part, tmp_path):
    path, document = saved(tmp_path)
    INCONSISTENT[part](document)
    path.write_text(json.dumps(document))
    with pytest.raises(ArgumentError, match=r"path='.*neurons\.json \(.*a JSON file that NeuronReport\.save wrote"):
        NeuronReport.load(path)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        NeuronReport.load(tmp_path / "nowhere.json")


def test_a_failed_save_leaves_the_old_report_and_nothing_else(tmp_path, monkeypatch):
    path, document = saved(tmp_path)
    with pytest.raises(TypeError):
        dataclasses.replace(report_of(["rms"]), settings={"what": object()}).save(path)

    def full(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="no space"):
            report_of(["mean"]).save(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="no space"):
            report_of(["mean"]).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["neurons.json"]
    assert json.loads(path.read_text()) == document


def test_saving_makes_folders_and_replaces_the_old_report(tmp_path):
    path = tmp_path / "logs" / "version_0" / "neurons.json"
    report_of(["mean"]).save(path)
    report_of(["rms"]).save(path)
    assert NeuronReport.load(path).scores.keys() == {"rms"}
    assert [p.name for p in path.parent.iterdir()] == ["neurons.json"]


def test_a_main_criterion_that_every_layer_refuses_can_be_saved(tmp_path):
    net = nn.Sequential(nn.Linear(3, 2))
    report = measure(net, [torch.randn(4, 3)], criteria=["norm_scale", "near_zero"])
    report.save(tmp_path / "neurons.json")
    entries = json.loads((tmp_path / "neurons.json").read_text())["neurons"]
    assert [entry["importance"] for entry in entries] == [None, None]
