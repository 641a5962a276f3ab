"""Data that cannot be measured, or only in part: training goes on, and nobody has to guess why."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from lightning_neurons import ActivationStatisticsCallback, NeuronSensitivityCallback, measure
from tests.callbacks.modules import Altered, Plain, dataset, fit, loader, trainer_of

OBSERVERS = [ActivationStatisticsCallback, NeuronSensitivityCallback]


@pytest.mark.parametrize("observer", OBSERVERS)
def test_per_class_without_targets_says_what_a_batch_should_look_like(observer):
    step: Any = lambda module, batch, batch_idx: module(batch[0]).square().mean()
    val = DataLoader(TensorDataset(torch.randn(16, 1, 6, 6)), 8)
    with pytest.raises(MisconfigurationException, match=r"per_class=True.*targets.*per_class=lambda"):
        fit(Altered(step), [observer(per_class=True)], val=val)
    callback = observer(per_class=True)
    nothing = pytest.warns(UserWarning, match="nothing has been measured")
    with nothing, pytest.warns(UserWarning, match=r"epoch 0 was not measured.*per_class=True"):
        trainer = fit(Altered(step), [callback], val=val, num_sanity_val_steps=0)
    assert trainer.global_step == 4


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_counted_and_left_out(value, observer):
    poisoned, clean = dataset(24, seed=1), dataset(24, seed=1)
    poisoned.tensors[0][10, 0, 2, 2] = value
    keep = torch.arange(24) != 10
    module, callback = Plain(), observer()
    fit(module, [callback], val=DataLoader(poisoned, 8))
    loss = None if observer is ActivationStatisticsCallback else Plain.loss
    rest = [(clean.tensors[0][keep], clean.tensors[1][keep])]
    expected = measure(module, rest, loss_fn=loss)
    for name, counts in callback.report.counts.items():
        assert counts.samples.tolist() == [23] * len(counts.samples)
        assert (counts.nonfinite >= 1).all()
        for criterion, by_layer in callback.report.scores.items():
            assert torch.allclose(by_layer[name], expected.scores[criterion][name], rtol=1e-5, atol=1e-7), criterion
        unknown = torch.where(expected.deadness[name] == 1, torch.nan, expected.deadness[name])  # it may have fired
        assert torch.allclose(callback.report.deadness[name], unknown, atol=1e-6, equal_nan=True)


def test_a_loss_that_is_not_a_number_is_reported_and_never_averaged_in(capsys):
    def loss(module: Any, batch: Any) -> Tensor:
        return module.loss(batch) * (float("nan") if (batch[0][:, 0, 0, 0] > 90).any() else 1.0)

    poisoned = dataset(64, seed=1)
    poisoned.tensors[0][3, 0, 0, 0] = 99.0
    callback = NeuronSensitivityCallback(loss_fn=loss)
    fit(Plain(), [callback], val=DataLoader(poisoned, 32))
    counts = callback.report.counts["net.conv1"]
    assert counts.samples.tolist() == [64] * 4
    assert counts.gradient_samples.tolist() == [32] * 4
    assert (counts.nonfinite == 32).all()
    assert all(s.isfinite().all() for s in callback.report.scores["gradient"].values())
    assert "NaN or infinite values were left out" in capsys.readouterr().out


def test_a_loss_that_is_never_a_number_gives_no_scores_and_says_so(capsys):
    callback = NeuronSensitivityCallback(loss_fn=lambda m, b: m.loss(b) * float("nan"))
    trainer = fit(Plain(), [callback])
    assert trainer.global_step == 4
    assert callback.report.counts["net.conv1"].gradient_samples.tolist() == [0] * 4
    assert callback.report.scores["gradient"]["net.conv1"].isnan().all()
    assert callback.report.deadness["net.conv1"].isfinite().all()
    assert "NaN or infinite values were left out" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_frozen_parameters_do_not_matter(stage):
    module, callback, val = Plain(), NeuronSensitivityCallback(), loader(24, seed=1)
    module.net.requires_grad_(False)
    if stage == "fit":
        module.scale = nn.Parameter(torch.ones(()))
        module.training_step = lambda batch, batch_idx: module.loss(batch) * module.scale
        fit(module, [callback], val=val)
    else:
        trainer_of([callback]).validate(module, val, verbose=False)
    expected = measure(module, val, loss_fn=Plain.loss).scores["taylor"]["net.conv2"]
    assert torch.allclose(callback.report.scores["taylor"]["net.conv2"], expected, atol=1e-6)
    assert not any(p.requires_grad for p in module.net.parameters())


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_modules_of_other_precision_are_measured(precision, observer):
    torch.manual_seed(0)
    module, callback, exact = Plain(), observer(), observer()
    val = loader(24, seed=1)
    trainer_of([exact]).validate(module, val, verbose=False)
    trainer_of([callback], precision=precision).validate(module, val, verbose=False)
    assert callback.report.scores.keys() == exact.report.scores.keys()
    for name, by_layer in exact.report.scores.items():
        for layer, expected in by_layer.items():
            found = callback.report.scores[name][layer]
            scale = float(expected.abs().max())
            assert torch.allclose(found, expected, rtol=0.1, atol=0.1 * scale), (name, layer)


class OnTokens(Plain):
    """Integers go in."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)))


def _tokens() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 10, (16, 4), generator=generator)
    return DataLoader(TensorDataset(words, torch.arange(16) % 3), 8)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_integer_inputs_are_measured(observer):
    callback = observer()
    fit(OnTokens(), [callback], train=_tokens(), val=_tokens())
    assert callback.report.counts["net.1"].samples.tolist() == [16] * 5
    assert callback.report.counts["net.1"].values.tolist() == [64] * 5


def test_integer_inputs_cannot_be_shifted_and_the_message_says_so():
    with pytest.raises(MisconfigurationException, match=r'inputs="fgsm".*floating-point.*inputs="clean"'):
        fit(OnTokens(), [NeuronSensitivityCallback(inputs="fgsm", eps=0.1)], train=_tokens(), val=_tokens())


@dataclass
class Pictures:
    image: Tensor
    label: Tensor
    names: list[str]


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Any]]] = {
    "dict": (lambda x, y: {"image": x, "label": y}, lambda b: (b["image"], b["label"])),
    "dataclass": (lambda x, y: Pictures(x, y, ["a"] * len(x)), lambda b: (b.image, b.label)),
    "nested": (lambda x, y: {"inputs": [x, (x, 3)], "target": y}, lambda b: (b["inputs"][1][0], b["target"])),
    "list": (lambda x, y: [x, y], lambda b: b),
}


class ReadsForm(Plain):
    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self._read = read

    def loss(self, batch: Any) -> Tensor:
        return super().loss(self._read(batch))


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
@pytest.mark.parametrize("form, source", list(zip(FORMS, cycle(["val", "train"]))))
def test_batches_of_any_form_are_measured(form, source):
    build, read = FORMS[form]
    val = DataLoader(dataset(24, seed=1), 8, collate_fn=lambda items: build(*default_collate(items)))
    callback = NeuronSensitivityCallback(per_class=True, max_samples=12, source=source, loss_fn=ReadsForm.loss)
    fit(ReadsForm(read), [callback], train=val, val=val)
    assert 0 < int(callback.report.counts["net.conv1"].gradient_samples[0]) <= 12
    assert len(callback.report.class_counts) == 3
    assert callback.report.scores["gradient"]["net.conv1"].isfinite().all()


class Stream(IterableDataset):
    """Nobody knows how long it is."""

    def __init__(self, samples: int) -> None:
        self.data = dataset(samples, seed=1)

    def __iter__(self) -> Iterator[Any]:
        return iter([self.data[i] for i in range(len(self.data))])


def test_a_stream_of_unknown_length_is_measured_from_its_beginning():
    callback = NeuronSensitivityCallback(max_samples=10)
    fit(Plain(), [callback], val=DataLoader(Stream(20), 8))
    assert callback.report.counts["net.conv1"].samples.tolist() == [20] * 4
    assert callback.report.counts["net.conv1"].gradient_samples.tolist() == [10] * 4
    assert "first 10 samples" in callback.report.notes[0]


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_stream_without_samples_leaves_training_alone_and_is_told(observer):
    callback = observer()
    with pytest.warns(UserWarning, match="no sample was measured"):
        trainer = fit(Plain(), [callback], val=DataLoader(Stream(0), 8))
    assert trainer.global_step == 4


@pytest.mark.parametrize("observer", OBSERVERS)
def test_an_empty_loader_leaves_training_alone_and_is_told(observer):
    callback = observer()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer = fit(Plain(), [callback], val=DataLoader(dataset(0), 8))
    assert trainer.global_step == 4
    assert any(type(callback).__name__ in str(w.message) and "measured" in str(w.message) for w in told)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_fast_dev_run_measures(observer):
    callback = observer()
    fit(Plain(), [callback], fast_dev_run=True)
    assert callback.report.counts["net.conv1"].samples.tolist() == [8] * 4
