"""The ablation callback says what ``ablate`` and plain hooks say on the same samples, whatever module it is given."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from scipy.stats import spearmanr
from torch.utils.data import DataLoader

from lightning_neurons import NeuronAblationCallback, ablate, measure
from lightning_neurons.report.logging.tags import TAGS, kind_of
from lightning_neurons.results.ablation_report import AblationReport
from tests.callbacks.modules import (
    Altered,
    MemoryLogger,
    OldNamespace,
    Plain,
    ReturnsDict,
    ReturnsNone,
    SeveralLoaders,
    dataset,
    fit,
    loader,
    trainer_of,
)
from tests.callbacks.studied import HIDDEN, deltas, half, joined, samples
from tests.report.test_loggers import written


def plain_loss(module: Any, batch: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(module(batch[0]), batch[1])


def logs_only_a_loss_of_ones_own(module: Any, batch: Any, batch_idx: int) -> Any:
    """Returns how many are right, and logs the loss."""
    module.log("val_loss", module.loss(batch))
    return (module(batch[0]).argmax(1) == batch[1]).float().mean()


MODULES = {
    "returns": (Plain, {}),
    "logs only": (ReturnsNone, {}),
    "returns a dict": (ReturnsDict, {}),
    "loss_fn": (Plain, {"loss_fn": plain_loss}),
    "loss_fn by sample": (Plain, {"loss_fn": lambda m, b: torch.nn.functional.cross_entropy(
        m(b[0]), b[1], reduction="none")}),
    "returns accuracy, logs loss": (lambda: Altered(logs_only_a_loss_of_ones_own), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", MODULES)
def test_changes_of_the_loss_are_those_of_ablate_and_of_plain_hooks(case):
    make, arguments = MODULES[case]
    module, callback = make(), NeuronAblationCallback(ends=None, **arguments)
    fit(module, [callback])
    expected = ablate(module, [samples()], plain_loss, neurons=list(HIDDEN))
    assert callback.ablation.samples == 24
    assert callback.ablation.delta_loss.keys() == HIDDEN.keys(), "without the layer that makes the output"
    assert callback.ablation.loss == pytest.approx(expected.loss, abs=1e-6)
    naive = deltas(module, samples())
    for layer, found in callback.ablation.delta_loss.items():
        assert torch.allclose(found.double(), expected.delta_loss[layer].double(), atol=1e-6), layer
        assert torch.allclose(found.double(), naive[layer].double(), atol=1e-5), layer
        if not any("standard errors are over batches" in note for note in callback.ablation.notes):
            errors = callback.ablation.standard_error[layer]
            assert torch.allclose(errors.double(), expected.standard_error[layer].double(), atol=1e-5), layer


@pytest.mark.parametrize("module_type", [Plain, ReturnsNone])
def test_small_changes_of_the_loss_are_measured_as_well(module_type):
    module, callback = module_type(lr=0.0), NeuronAblationCallback(ends=None, layers=["net.fc1"])
    module.net.fc2.weight.data[:, 2:] *= 1e-3
    fit(module, [callback])
    expected = ablate(module, [samples()], plain_loss, neurons=["net.fc1"]).delta_loss["net.fc1"].double()
    found = callback.ablation.delta_loss["net.fc1"].double()
    assert torch.allclose(found, expected, rtol=0.05, atol=5e-7), (found, expected)


@pytest.mark.parametrize("replacement", ["mean", "zero"])
def test_other_replacements_are_those_of_ablate(replacement):
    module, callback = Plain(), NeuronAblationCallback(ends=None, replacement=replacement)
    fit(module, [callback])
    expected = ablate(module, [samples()], plain_loss, neurons=list(HIDDEN), replacement=replacement)
    for layer, found in callback.ablation.delta_loss.items():
        assert torch.allclose(found.double(), expected.delta_loss[layer].double(), atol=1e-5), layer


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "rms", "weight_l2", "near_zero", "gradient"])
def test_agreement_is_that_of_the_criterion_on_one_half_with_hooks_on_both(criterion):
    module, callback = Plain(), NeuronAblationCallback(criterion, ends=None)
    fit(module, [callback], max_epochs=2)
    module.eval()
    report = measure(module, [half(samples(), 0)], loss_fn=plain_loss, criteria=[criterion])
    scores = report.scores[criterion] if report.scores else {n: 1 - s for n, s in report.deadness_by[criterion].items()}
    first, second = (joined(deltas(module, half(samples(), start))).abs() for start in (0, 1))
    found, score = callback.agreement, joined(scores)
    assert found.neurons == 18
    assert found.same_data == pytest.approx(spearmanr(score, first).statistic, abs=0.02, nan_ok=True)
    assert found.held_out == pytest.approx(spearmanr(score, second).statistic, abs=0.02, nan_ok=True)
    assert found.reliability == pytest.approx(spearmanr(first, second).statistic, abs=0.02)


def test_both_ends_are_those_of_the_ranking_over_all_layers():
    module, callback = Plain(), NeuronAblationCallback("weight_l2", ends=3)
    fit(module, [callback])
    scores = measure(module, [samples()], criteria=["weight_l2"]).scores["weight_l2"]
    pairs = [(float(scores[layer][i]), layer, i) for layer, count in HIDDEN.items() for i in range(count)]
    wanted = {pair[1:] for pair in (*sorted(pairs)[:3], *sorted(pairs)[-3:])}
    assert {(row.layer, row.neuron) for row in callback.ablation.ranking()} == wanted
    assert callback.agreement.neurons == 6


def test_layers_and_a_bound_on_samples():
    callback = NeuronAblationCallback(layers=["net.conv2", "net.fc2"], max_samples=10, ends=None)
    fit(Plain(), [callback])
    assert {name: len(d) for name, d in callback.ablation.delta_loss.items()} == {"net.conv2": 6, "net.fc2": 3}
    assert callback.ablation.samples == 10


def test_scalars_histograms_and_text_are_written_where_the_table_says_and_the_file_is_read_again(tmp_path):
    callback = NeuronAblationCallback()
    loggers = [TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv"), MemoryLogger()]
    trainer = fit(Plain(), [callback], logger=loggers, max_epochs=2)
    own = [tag for tag in TAGS if tag.name.startswith("ablation/")]
    for kind, tags in written(trainer.log_dir).items():
        wanted = {tag.name.format(layer=layer) for tag in own if tag.kind == kind for layer in HIDDEN}
        assert set(tags) == wanted
        assert {kind_of(tag) for tag in tags} == {kind}
    last = {name: value for name, _, value in loggers[2].rows}
    assert last["ablation/loss"] == callback.ablation.loss
    assert last["ablation/agreement_held_out"] == callback.agreement.held_out
    loaded = AblationReport.load(Path(trainer.log_dir) / "ablation.json")
    for layer, found in callback.ablation.delta_loss.items():
        assert torch.equal(loaded.delta_loss[layer].nan_to_num(9), found.float().nan_to_num(9)), layer
    assert loaded.settings["criterion"] == "fisher"
    json.loads((Path(trainer.log_dir) / "ablation.json").read_text())


def steps_of(logger: MemoryLogger) -> list[int]:
    return [step // 4 for name, step, _ in logger.rows if name == "ablation/loss"]


@pytest.mark.parametrize("every, wanted", [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2]), (9, [])])
def test_every_n_epochs(every, wanted):
    callback, logger = NeuronAblationCallback(every_n_epochs=every, ends=2), MemoryLogger()
    if wanted:
        fit(Plain(), [callback], logger=logger, max_epochs=5)
    else:
        with pytest.warns(UserWarning, match="nothing has been measured"):
            fit(Plain(), [callback], logger=logger, max_epochs=5)
    assert steps_of(logger) == wanted
    assert (callback.ablation is not None) == bool(wanted)


def test_a_resumed_run_measures_when_the_uninterrupted_one_does(tmp_path):
    def run(epochs: int, ckpt: Any = None) -> list[int]:
        callback, logger = NeuronAblationCallback(every_n_epochs=2, ends=2), MemoryLogger()
        trainer = fit(Plain(), [callback], logger=logger, max_epochs=epochs, ckpt=ckpt)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return steps_of(logger)

    assert run(2) == [1]
    assert run(6, tmp_path / "2.ckpt") == [3, 5]


def test_validate_measures_and_writes(tmp_path):
    module, callback = Plain(), NeuronAblationCallback(ends=None)
    trainer = trainer_of([callback], logger=TensorBoardLogger(tmp_path))
    trainer.validate(module, loader(24, seed=1), verbose=False)
    naive = deltas(module, samples())
    assert torch.allclose(joined(callback.ablation.delta_loss), joined(naive), atol=1e-5)
    assert (Path(trainer.log_dir) / "ablation.json").exists()


@pytest.mark.parametrize("kwargs", [{"logger": False}, {"fast_dev_run": True}])
def test_nothing_is_written_without_loggers_or_in_fast_dev_run(tmp_path, kwargs):
    callback = NeuronAblationCallback()
    fit(Plain(), [callback], default_root_dir=tmp_path, **kwargs)
    assert callback.ablation is not None
    assert list(tmp_path.rglob("*")) == []


def test_the_sanity_check_is_a_trial_that_keeps_nothing():
    callback, logger = NeuronAblationCallback(every_n_epochs=2), MemoryLogger()
    with pytest.warns(UserWarning, match="nothing has been measured"):
        fit(Plain(), [callback], logger=logger)
    assert callback.ablation is None
    assert steps_of(logger) == []


@pytest.mark.parametrize("of, module", [("old", OldNamespace), ("new", Plain)])
def test_both_namespaces(of, module):
    callback = NeuronAblationCallback()
    fit(module(), [callback], **({"of": pytorch_lightning} if of == "old" else {}))
    assert callback.ablation.samples == 24


def test_of_several_dataloaders_the_first_is_looked_at():
    module, callback = SeveralLoaders(), NeuronAblationCallback(ends=None)
    fit(module, [callback], val=[loader(24, seed=1), loader(16, seed=2)])
    assert torch.allclose(joined(callback.ablation.delta_loss), joined(deltas(module, samples())), atol=1e-5)


class Named(Plain):
    def loss(self, batch: Any) -> torch.Tensor:
        pair = (batch["x"], batch["label"]) if isinstance(batch, dict) else batch
        return torch.nn.functional.cross_entropy(self(pair[0]), pair[1])


def test_batches_that_are_dicts():
    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        return {"x": torch.stack([x for x, _ in rows]), "label": torch.stack([y for _, y in rows])}

    module, callback = Named(), NeuronAblationCallback(ends=None)
    fit(module, [callback], val=DataLoader(dataset(24, 1), 7, collate_fn=collate))
    assert torch.allclose(joined(callback.ablation.delta_loss), joined(deltas(module, samples())), atol=1e-5)


def test_the_callback_can_be_pickled_after_fit():
    callback = NeuronAblationCallback()
    fit(Plain(), [callback])
    twin = pickle.loads(pickle.dumps(callback))
    assert torch.equal(joined(twin.ablation.delta_loss), joined(callback.ablation.delta_loss))
    assert twin.agreement == callback.agreement
