"""What is wrong in the arguments or the surroundings is said at once, with what would work."""

from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_neurons import ActivationStatisticsCallback, NeuronSensitivityCallback
from tests.callbacks.modules import Plain, fit, loader, trainer_of
from tests.callbacks.refusals import not_refused

OBSERVERS = [ActivationStatisticsCallback, NeuronSensitivityCallback]

ONLY_SENSITIVITY: list[tuple[dict[str, Any], str]] = [
    ({"max_samples": 0}, "max_samples=0"),
    ({"max_samples": -3}, "max_samples=-3"),
    ({"max_samples": 2.5}, "max_samples=2.5"),
    ({"max_samples": True}, "max_samples=True"),
    ({"source": "vall"}, r"source='vall'.*did you mean 'val'"),
    ({"inputs": "fgms"}, r"inputs='fgms'.*did you mean 'fgsm'"),
    ({"inputs": "fgsm"}, "eps=0.0.*positive"),
    ({"inputs": "fgsm", "eps": -0.1}, "eps=-0.1"),
    ({"inputs": "fgsm", "eps": float("nan")}, "eps=nan"),
    ({"eps": 0.1}, r'eps=0.1.*inputs="fgsm"'),
    ({"loss_reduction": "avg"}, "loss_reduction='avg'.*'mean'"),
    ({"loss_fn": "cross_entropy"}, "loss_fn='cross_entropy'.*function"),
]
BOTH: list[tuple[dict[str, Any], str]] = [
    ({"every_n_epochs": 0}, "every_n_epochs=0.*at least 1"),
    ({"every_n_epochs": 1.5}, "every_n_epochs=1.5"),
    ({"threshold": -0.1}, "threshold=-0.1"),
    ({"threshold": float("nan")}, "threshold=nan"),
    ({"threshold": float("inf")}, "threshold=inf"),
    ({"threshold": "0.1"}, "threshold='0.1'"),
    ({"normalize": "L2"}, "normalize='L2'.*'l2'"),
    ({"criteria": "mean"}, r"criteria='mean'.*\['mean'\]"),
    ({"criteria": []}, "criteria.*at least one"),
    ({"criteria": ["varience"]}, "criteria.*'varience'.*Did you mean 'variance'"),
    ({"criteria": [3]}, "criteria=3"),
    ({"layers": "net.conv1"}, r"layers='net.conv1'.*\["),
    ({"layers": []}, "layers=\\[\\]"),
    ({"per_class": "yes"}, "per_class='yes'"),
]


def test_an_argument_out_of_range_is_named_with_what_is_allowed():
    assert not_refused(NeuronSensitivityCallback, ONLY_SENSITIVITY + BOTH) == {}
    assert not_refused(ActivationStatisticsCallback, BOTH) == {}


def test_statistics_refuse_criteria_with_gradients_and_name_the_callback_that_has_them():
    with pytest.raises(MisconfigurationException, match=r"'gradient'.*NeuronSensitivityCallback"):
        ActivationStatisticsCallback(criteria=["mean", "gradient"])


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_pattern_that_matches_no_layer_stops_before_training_and_names_the_nearest(observer):
    module = Plain()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(MisconfigurationException, match=r"net\.cov1.*net\.conv1"):
        fit(module, [observer(layers=["net.cov1"])])
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


class Scaled(nn.Module):
    """Learns one number for each class, and has no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.scale * x.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_module_without_any_layer_is_trained_with_a_warning(observer):
    callback, plain, module = observer(), Plain(Scaled()), Plain(Scaled())
    trainer_of([]).fit(plain, loader(), loader())
    measured, layer = "nothing has been measured", "Plain has no convolutional or linear layer"
    with pytest.warns(UserWarning, match=measured), pytest.warns(UserWarning, match=layer):
        trainer_of([callback]).fit(module, loader(), loader())
    assert torch.equal(module.net.scale, plain.net.scale)
    assert callback.report is None


class FSDPStrategy(SingleDeviceStrategy):
    """Named like the one that shards layers."""


class OwnStrategy(FSDPStrategy):
    """Derived from it."""


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("strategy", [FSDPStrategy, OwnStrategy])
def test_sharded_strategies_are_refused_before_training(strategy, observer):
    module = Plain()
    trainer = trainer_of([observer()], strategy=strategy(device=torch.device("cpu")))
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy.*ddp"):
        trainer.fit(module, loader(), loader())
    assert trainer.global_step == 0


class WithoutValidation(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(36, 3)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_training_without_a_validation_loop_goes_on_and_says_what_to_do(observer):
    callback, trainer = observer(), trainer_of(max_epochs=1)
    trainer.callbacks.append(callback)
    message = pytest.warns(UserWarning, match=r'no validation.*NeuronSensitivityCallback\(source="train"\)')
    with message, pytest.warns(UserWarning, match="nothing has been measured"):
        trainer.fit(WithoutValidation(), loader())
    assert trainer.global_step == 4
    assert callback.report is None


@pytest.mark.parametrize("observer", OBSERVERS)
def test_training_with_limit_val_batches_0_goes_on_and_says_why_there_is_nothing(observer):
    message = pytest.warns(UserWarning, match=r"limit_val_batches=0.*nothing will be measured")
    with message, pytest.warns(UserWarning, match="nothing has been measured"):
        trainer = fit(Plain(), [observer()], limit_val_batches=0)
    assert trainer.global_step == 4


def test_training_data_without_any_loss_is_refused_before_training():
    with pytest.raises(MisconfigurationException, match=r"WithoutValidation has no validation_step.*loss_fn="):
        trainer_of([NeuronSensitivityCallback(source="train")]).fit(WithoutValidation(), loader())


def test_training_data_needs_no_validation_loop_with_a_loss():
    callback = NeuronSensitivityCallback(source="train", loss_fn=WithoutValidation.loss)
    trainer_of([callback]).fit(WithoutValidation(), loader())
    assert callback.report.counts["net"].gradient_samples.tolist() == [32] * 3
