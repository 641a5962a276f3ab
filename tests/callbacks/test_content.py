"""What a callback reports is what ``measure`` says of the same weights and the same data."""

import math
import warnings
from typing import Any

import lightning
import pytest
import pytorch_lightning
import torch
from torch import nn

from lightning_neurons import (
    CRITERIA,
    ActivationStatisticsCallback,
    Criterion,
    NeuronReport,
    NeuronSensitivityCallback,
    Statistic,
    measure,
)
from tests.callbacks import modules
from tests.callbacks.modules import LAYERS, OldNamespace, Plain, fit, loader, trainer_of


def assert_same(got: NeuronReport, expected: NeuronReport, tolerance: float = 1e-6) -> None:
    for field in ("scores", "deadness_by", "per_class"):
        ours, theirs = getattr(got, field), getattr(expected, field)
        assert {n: list(v) for n, v in ours.items()} == {n: list(v) for n, v in theirs.items()}
        for name, by_layer in ours.items():
            for layer, values in by_layer.items():
                scale = float(theirs[name][layer].nan_to_num().abs().max())
                close = torch.allclose(
                    values, theirs[name][layer], rtol=tolerance, atol=tolerance * max(scale, 1e-30), equal_nan=True
                )
                assert close, (field, name, layer, values, theirs[name][layer])
    for layer, counts in got.counts.items():
        for field in ("samples", "gradient_samples", "values", "nonfinite"):
            assert torch.equal(getattr(counts, field), getattr(expected.counts[layer], field)), (layer, field)
    assert [vars(layer) for layer in got.layers] == [vars(layer) for layer in expected.layers]


def measured(module: Any, data: Any, **kwargs: Any) -> NeuronReport:
    kwargs.setdefault("loss_fn", lambda m, batch: m.loss(batch))
    return measure(module, data, **kwargs)


@pytest.mark.parametrize("module_type", [Plain, modules.ReturnsNone, modules.ReturnsDict, modules.OtherNames])
def test_a_report_in_fit_equals_measure_on_the_validation_data(module_type):
    module, callback, val = module_type(), NeuronSensitivityCallback(max_samples=10_000), loader(40, seed=1)
    trainer = fit(module, [callback], val=val, max_epochs=2)
    assert_same(callback.report, measured(module, val))
    assert tuple(callback.report.scores["gradient"]) == LAYERS
    for scores in callback.report.scores["gradient"].values():
        assert float(scores.sum()) == pytest.approx(1)
    assert (callback.report.epoch, callback.report.step) == (1, trainer.global_step)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_without_training_gives_the_same_report(stage):
    module, callback, data = Plain(), NeuronSensitivityCallback(max_samples=10_000), loader(40, seed=1)
    getattr(trainer_of([callback]), stage)(module, data, verbose=False)
    assert_same(callback.report, measured(module, data))
    assert (callback.report.epoch, callback.report.step) == (None, None)
    assert len(callback.history) == 0


def test_statistics_equal_those_of_measure():
    module, callback, val = Plain(), ActivationStatisticsCallback(threshold=0.3), loader(40, seed=1)
    fit(module, [callback], val=val)
    assert_same(callback.report, measured(module, val, loss_fn=None, threshold=0.3))


@pytest.mark.parametrize("compiled", ["function", "method"])
@pytest.mark.parametrize("observer", [ActivationStatisticsCallback, NeuronSensitivityCallback])
def test_a_compiled_network_is_measured_as_it_was_written(observer, compiled):
    torch._dynamo.reset()
    module, callback, val = Plain(), observer(), loader(24, seed=1)
    if compiled == "function":
        module.net = torch.compile(module.net, backend="eager")
    else:
        module.net.compile(backend="eager")
    fit(module, [callback], val=val)
    module.net = getattr(module.net, "_orig_mod", module.net)
    module.net._compiled_call_impl = None
    expected = measured(module, val, loss_fn=None if observer is ActivationStatisticsCallback else Plain.loss)
    for measure_name, by_layer in expected.deadness_by.items():
        for layer, values in by_layer.items():
            found = callback.report.deadness_by[measure_name]
            name = next(n for n in found if n.replace("_orig_mod.", "") == layer)
            assert torch.allclose(found[name], values, atol=1e-6), (measure_name, layer)
    assert sum(int(c.samples.sum()) for c in callback.report.counts.values()) == 24 * (4 + 6 + 8 + 3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"inputs": "fgsm", "eps": 0.1},
        {"per_class": True},
        {"per_class": lambda batch: 2 - batch[1]},
        {"layers": ["net.conv*"]},
        {"layers": [nn.Linear]},
        {"threshold": 0.5, "relative_threshold": False},
        {"criteria": ["gradient", "fisher", "weight_l1", "norm_scale"]},
        {"loss_fn": lambda m, batch: m.loss(batch) * len(batch[1]), "loss_reduction": "sum"},
        {
            "loss_fn": lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none"),
            "loss_reduction": "none",
        },
        {"loss_fn": lambda m, batch: m(batch[0])[:, 1].mean()},
    ],
    ids=lambda a: " ".join(a) if isinstance(a, dict) else None,
)
def test_every_argument_means_what_it_means_in_measure(arguments):
    module, callback, val = Plain(), NeuronSensitivityCallback(**arguments), loader(40, seed=1)
    fit(module, [callback], val=val)
    expected = measured(module, val, **arguments)
    if arguments.get("inputs") == "fgsm":
        expected = _with_clean_activity(expected, measured(module, val))
    assert_same(callback.report, expected)


def _with_clean_activity(shifted: NeuronReport, clean: NeuronReport) -> NeuronReport:
    """Activity rides on the module's own forward, whose inputs nobody shifts."""
    scores = {n: shifted.scores[n] if "gradient" in CRITERIA[n].needs else clean.scores[n] for n in shifted.scores}
    return NeuronReport(**{**vars(shifted), "scores": scores, "deadness_by": clean.deadness_by})


def test_mean_sum_and_none_give_the_same_scores():
    reports = []
    for reduction in ("mean", "sum", "none"):
        torch.manual_seed(0)
        loss = lambda m, b, how=reduction: nn.functional.cross_entropy(m(b[0]), b[1], reduction=how)
        callback = NeuronSensitivityCallback(loss_fn=loss, loss_reduction=reduction)
        trainer_of([callback]).validate(Plain(), loader(), verbose=False)
        reports.append(callback.report)
    assert_same(reports[0], reports[1])
    assert_same(reports[0], reports[2])


def test_training_batches_are_measured_with_the_weights_after_their_step():
    module, train = Plain(), loader(32, batch_size=32)
    callback = NeuronSensitivityCallback(source="train", loss_fn=Plain.loss)
    fit(module, [callback], train=train)
    assert_same(callback.report, measured(module, train))


def test_training_batches_can_be_measured_by_the_validation_step():
    module, train = Plain(), loader(32, batch_size=32)
    callback = NeuronSensitivityCallback(source="train")
    fit(module, [callback], train=train)
    assert_same(callback.report, measured(module, train))


def test_validate_and_test_agree_on_what_source_train_means():
    found = {}
    for stage in ("validate", "test"):
        callback = NeuronSensitivityCallback(source="train", loss_fn=Plain.loss)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            getattr(trainer_of([callback]), stage)(Plain(), loader(), verbose=False)
        found[stage] = callback.report is None
    assert found["validate"] == found["test"]


def test_a_small_sample_is_bounded_stratified_and_told():
    callback = NeuronSensitivityCallback(max_samples=12, per_class=True)
    fit(Plain(), [callback], val=loader(120, seed=1))
    counts = callback.report.counts["net.conv2"]
    assert counts.gradient_samples.tolist() == [12] * 6
    assert counts.samples.tolist() == [120] * 6
    note = " ".join(callback.report.notes)
    assert "12 of 120 samples" in note
    assert "3 classes" in note
    assert callback.report.settings["max_samples"] == 12
    gradients = callback.report.per_class["gradient"]["net.conv2"]
    assert gradients.isfinite().all(), "each class is in the sample"


@pytest.mark.parametrize("samples", [1, 5, 39, 40, 41])
def test_a_sample_is_never_larger_than_asked_for(samples):
    callback = NeuronSensitivityCallback(max_samples=samples)
    fit(Plain(), [callback], val=loader(40, seed=1))
    assert int(callback.report.counts["net.fc1"].gradient_samples.max()) == min(samples, 40)


def test_several_dataloaders_are_measured_together():
    module, callback = modules.SeveralLoaders(), NeuronSensitivityCallback()
    data = [loader(24, seed=1), loader(40, seed=2)]
    fit(module, [callback], val=data)
    assert_same(callback.report, measured(module, [batch for one in data for batch in one]))


def test_a_criterion_of_the_user_is_measured_like_any_other():
    peak = Statistic("my_peak", observe=lambda view: view.activation.amax(2))
    own = Criterion(
        "my_mean_peak",
        statistics=(peak,),
        score=lambda summary: summary.totals["my_peak"] / summary.samples["activation"],
    )
    module, val = Plain(), loader(24, seed=1)
    callback = ActivationStatisticsCallback(criteria=[own, "max"])
    fit(module, [callback], val=val)
    found = callback.report.scores["my_mean_peak"]["net.fc1"]
    with torch.no_grad():
        x = val.dataset.tensors[0]
        net = module.net.eval()
        x = torch.relu(net.norm1(net.conv1(x)))
        x = torch.relu(net.fc1(torch.relu(net.norm2(net.conv2(x))).mean((2, 3))))
    assert torch.allclose(found, x.mean(0).double(), atol=1e-6)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize("package, module_type", [(lightning, Plain), (pytorch_lightning, OldNamespace)])
def test_trainers_of_both_names_work(package, module_type, stage):
    observer = ActivationStatisticsCallback if stage == "test" else NeuronSensitivityCallback
    module, callback, val = module_type(), observer(), loader(24, seed=1)
    trainer = trainer_of([callback], of=package.pytorch if package is lightning else package)
    if stage == "fit":
        trainer.fit(module, loader(), val)
    else:
        getattr(trainer, stage)(module, val, verbose=False)
    loss = None if observer is ActivationStatisticsCallback else module_type.loss
    assert_same(callback.report, measured(module, val, loss_fn=loss))


def test_half_of_the_validation_data_is_measured_if_the_trainer_runs_half():
    callback = NeuronSensitivityCallback(max_samples=8)
    fit(Plain(), [callback], val=loader(64, seed=1), limit_val_batches=0.5)
    assert callback.report.counts["net.conv1"].samples.tolist() == [32] * 4
    assert callback.report.counts["net.conv1"].gradient_samples.tolist() == [8] * 4
    assert "8 of 32 samples" in callback.report.notes[0]


def test_overfitting_one_batch_measures_that_batch():
    callback = NeuronSensitivityCallback()
    fit(Plain(), [callback], train=loader(), val=loader(24, seed=1), overfit_batches=1)
    assert callback.report.counts["net.conv1"].samples.tolist() == [8] * 4
    assert not math.isnan(float(callback.report.scores["gradient"]["net.conv1"].sum()))


def test_a_step_may_return_one_loss_per_sample():
    class PerSample(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none")

    module, callback, val = PerSample(), NeuronSensitivityCallback(loss_reduction="none"), loader(24, seed=1)
    fit(module, [callback], val=val)
    assert_same(callback.report, measured(module, val))
