"""What a run writes: every series is in the documented table, and every entry of the table is written."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_neurons import ActivationStatisticsCallback, NeuronReport, NeuronSensitivityCallback
from lightning_neurons.report.logging.tags import TAGS, kind_of
from lightning_neurons.report.numbers import THRESHOLDS
from tests.callbacks.modules import LAYERS, MemoryLogger, Plain, fit, loader, trainer_of

OWN = ("train_loss", "val_loss", "epoch", "hp_metric")
LAID_OUT = "custom_scalars__config__"  # the page of charts, which is no series
KINDS = {"scalars": "scalar", "histograms": "histogram", "tensors": "text", "images": "figure"}
OF_OTHERS = ("pruning/", "ablation/", "classes/", "saliency", "maximization", "cards/")


README = Path(__file__).parents[2] / "README.md"
MEASURED = [tag for tag in TAGS if not tag.name.startswith(OF_OTHERS)]  # of observers


def written(folder: Path) -> dict[str, list[str]]:
    """Tags by kind, read back from TensorBoard's own files."""
    accumulator = EventAccumulator(str(folder), size_guidance={"histograms": 0, "tensors": 0, "scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    return {
        ours: [t.removesuffix("/text_summary") for t in tags[theirs] if t not in (*OWN, LAID_OUT)]
        for theirs, ours in KINDS.items()
    }  # fmt: skip


def train(folder: Path, callback: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    loggers = [TensorBoardLogger(folder, name="tensorboard"), CSVLogger(folder, name="csv"), MemoryLogger()]
    return fit(Plain(), [callback], logger=loggers, **{"max_epochs": 2, **kwargs})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A Trainer that has written two epochs, and its callback."""
    callback = NeuronSensitivityCallback(per_class=True, max_figures=100)
    return train(tmp_path_factory.mktemp("run"), callback), callback


def test_every_series_in_tensorboard_is_in_the_table_with_its_kind(run):
    for kind, tags in written(run[0].log_dir).items():
        assert tags
        assert {tag: kind_of(tag) for tag in tags} == dict.fromkeys(tags, kind)


def test_every_entry_of_the_table_is_written(run):
    found = written(run[0].log_dir)
    for tag in MEASURED:
        assert any(kind_of(t) == tag.kind and _belongs(t, tag.name) for t in found[tag.kind]), tag.name


def _belongs(written_tag: str, name: str) -> bool:
    wanted, got = name.split("/"), written_tag.split("/")
    return len(wanted) == len(got) and all(w.startswith("{") or w == g for w, g in zip(wanted, got, strict=True))


def test_every_family_has_a_series_for_each_layer(run):
    found = written(run[0].log_dir)
    for layer in LAYERS:
        for tag in MEASURED:
            if "{layer}" in tag.name and "{criterion}" not in tag.name:
                assert tag.name.format(layer=layer) in found[tag.kind]
        assert f"scores/gradient/{layer}" in found["histogram"]
        assert f"deadness/near_zero/{layer}" in found["histogram"]


def test_no_tag_is_in_the_table_twice_and_each_has_a_meaning():
    assert len({tag.name for tag in TAGS}) == len(TAGS)
    assert all(tag.meaning for tag in TAGS)


def test_every_series_is_in_the_readme_and_the_readme_has_no_other():
    rows = re.findall(r"^\| (`.*?) \| (?:scalar|histogram|text|figure)", README.read_text(), re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`([^`]+)`", re.sub(r"\(.*?\)", "", row))}
    assert listed == {tag.name for tag in TAGS}


def test_the_number_of_series_does_not_depend_on_the_batch_size(tmp_path):
    found = []
    for batch_size in (3, 24):
        val = loader(24, batch_size, seed=1)
        trainer = train(tmp_path / str(batch_size), NeuronSensitivityCallback(), val=val, max_epochs=1)
        found.append({kind: sorted(tags) for kind, tags in written(trainer.log_dir).items()})
    assert found[0] == found[1]


def test_scalars_go_to_every_logger_with_the_same_values(run):
    trainer, _ = run
    accumulator = EventAccumulator(trainer.log_dir)
    accumulator.Reload()
    names = written(trainer.log_dir)["scalar"]
    memory = {(n, step): v for n, step, v in trainer.loggers[2].rows if n.startswith("neurons/")}
    from_tensorboard = {(n, e.step): e.value for n in names for e in accumulator.Scalars(n)}
    assert from_tensorboard.keys() == memory.keys()
    assert all(v == pytest.approx(memory[k], rel=1e-6) for k, v in from_tensorboard.items())
    with (Path(trainer.loggers[1].log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    from_csv = {(n, int(r["step"])): float(r[n]) for r in rows for n in r if n.startswith("neurons/") and r[n]}
    assert from_csv == {key: pytest.approx(value) for key, value in memory.items()}


def test_scalars_say_what_the_report_says(run):
    trainer, callback = run
    report, last = callback.report, {n: v for n, _, v in trainer.loggers[2].rows}
    dead = {layer: report.dead(layer).double().mean().item() for layer in LAYERS}
    assert {layer: last[f"neurons/dead_share/{layer}"] for layer in LAYERS} == pytest.approx(dead)
    everything = torch.cat([report.dead(layer) for layer in LAYERS]).double().mean().item()
    assert last["neurons/dead_share"] == pytest.approx(everything)
    for layer in LAYERS:
        share = report.scores["taylor"][layer]
        expected = torch.special.entr(share / share.sum()).sum().exp().item()
        assert last[f"neurons/effective/{layer}"] == pytest.approx(expected, rel=1e-6)
    entry = callback.history.entries[-1]
    assert last["neurons/rank_stability"] == pytest.approx(entry.mean_stability)
    assert last["neurons/died"] == sum(map(len, entry.died.values()))
    assert last["neurons/nonfinite"] == 0


def test_the_text_page_has_the_table_the_ranking_and_the_thresholds(run):
    trainer, callback = run
    accumulator = EventAccumulator(trainer.log_dir)
    accumulator.Reload()
    pages = accumulator.Tensors("neurons/ranking/text_summary")
    assert [page.step for page in pages] == [entry.step - 1 for entry in callback.history.entries]
    text = pages[-1].tensor_proto.string_val[0].decode()
    layers, ranking, thresholds = (text.index(heading) for heading in ("### Layers", "### Ranking", "### Deadness by"))
    assert layers < ranking < thresholds
    for layer in LAYERS:
        assert f"| `{layer}` | {len(callback.report.counts[layer].samples)} |" in text[layers:ranking]
    first = callback.report.ranking()[0]
    assert f"| 1 | `{first.layer}` {first.neuron} | {first.score:.3g} |" in text[ranking:thresholds]
    for threshold in THRESHOLDS:
        dead = sum(int((d == 1).sum()) for d in callback.report.deadness_at(threshold).values())
        assert f"| {threshold} | {dead} |" in text[thresholds:]
    assert all(note in text for note in callback.report.notes)


def test_neurons_json_in_the_log_folder_is_the_report_with_one_entry_per_neuron(run):
    trainer, callback = run
    path = Path(trainer.log_dir) / "neurons.json"
    loaded = NeuronReport.load(path)
    for name, by_layer in callback.report.scores.items():
        for layer, values in by_layer.items():
            assert torch.equal(loaded.scores[name][layer].nan_to_num(-1), values.nan_to_num(-1)), (name, layer)
    assert (loaded.epoch, loaded.step) == (1, trainer.global_step)
    entries = json.loads(path.read_text())["neurons"]
    assert [(e["layer"], e["neuron"]) for e in entries] == [
        (layer, i) for layer in LAYERS for i in range(len(callback.report.counts[layer].samples))
    ]
    assert all(0 <= e["deadness"] <= 1 and e["importance"] >= 0 for e in entries)
    assert not list(path.parent.glob(".neurons*")), "no unfinished file stays"


@pytest.mark.parametrize("kwargs", [{"logger": False}, {"fast_dev_run": True}, {"fast_dev_run": True, "logger": True}])
@pytest.mark.parametrize("observer", [ActivationStatisticsCallback, NeuronSensitivityCallback])
def test_nothing_is_written_without_loggers_or_in_fast_dev_run(tmp_path, observer, kwargs):
    callback = observer()
    fit(Plain(), [callback], default_root_dir=tmp_path, **kwargs)
    assert callback.report is not None
    assert list(tmp_path.rglob("*")) == []


def test_a_logger_without_a_folder_gets_scalars_and_nothing_else_is_written(tmp_path):
    logger = MemoryLogger()
    fit(Plain(), [NeuronSensitivityCallback()], default_root_dir=tmp_path, logger=logger)
    assert {name for name, _, _ in logger.rows} >= {"neurons/dead_share", "neurons/effective_share"}
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_is_written_as_well(tmp_path, stage):
    trainer = trainer_of([NeuronSensitivityCallback()], logger=TensorBoardLogger(tmp_path))
    getattr(trainer, stage)(Plain(), loader(24, seed=1), verbose=False)
    assert (Path(trainer.log_dir) / "neurons.json").exists()
    assert "neurons/dead_share" in written(trainer.log_dir)["scalar"]
