"""What the saliency callback refuses, and what never takes training with it."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_neurons import SaliencyCallback
from lightning_neurons.callbacks import saliency as module_of_the_callback
from tests.callbacks.modules import Net, Plain, dataset, fit, loader, trainer_of
from tests.callbacks.pictured import ImageLogger, files
from tests.callbacks.pruned import assert_refused
from tests.callbacks.refusals import not_refused
from tests.callbacks.studied import TwoNetworks

WRONG = [
    ({"method": "gradcam"}, "method='gradcam'.*did you mean 'grad_cam'"),
    ({"of": "logits"}, "of='logits'.*did you mean 'logit'"),
    ({"absolute": 1}, "absolute=1.*True or False"),
    ({"smoothing": -1.0}, "smoothing=-1.0.*at least 0"),
    ({"smoothing": float("inf")}, "smoothing=inf"),
    ({"smoothing": "much"}, "smoothing='much'"),
    ({"layer": "net.conv1"}, "layer='net.conv1'.*method=\"gradient\".*grad_cam"),
    ({"max_samples": 1}, "max_samples=1.*at least 2"),
    ({"max_samples": 2.5}, r"max_samples=2\.5"),
    ({"every_n_epochs": 0}, "every_n_epochs=0"),
    ({"forward": Net()}, "forward='Net'.*a function"),
    ({"forward": Net}, "forward='type'"),
    ({"forward": "net"}, "forward='str'"),
    ({"mean": "x"}, "mean='x'"),
    ({"mean": [0.5, None]}, "mean="),
    ({"std": 0}, "std=0"),
    ({"std": [1.0, -1.0]}, "std="),
    ({"target": 1.5}, "target=1.5"),
    ({"target": [0, 1]}, "target="),
    ({"method": "grad_cam", "layer": 3}, "layer=3"),
]


def test_arguments_out_of_range():
    assert not_refused(SaliencyCallback, WRONG) == {}


def test_what_does_not_fit_the_model_is_found_before_training():
    for arguments, message in (
        ({"target": 3}, "target=3.*0 to 2"),
        ({"target": -1}, "target=-1.*0 to 2"),
        ({"target": "net.conv"}, "nothing matches 'net.conv'.*did you mean 'net.conv"),
        ({"target": ("net.conv1", 4)}, "net.conv1', 4.*0 to 3"),
        ({"method": "grad_cam", "layer": "net.cov2"}, "layer.*nothing matches 'net.cov2'.*'net.conv2'"),
        ({"forward": lambda module, inputs: "logits"}, "returned str"),
        ({"forward": lambda module, inputs: module(inputs).detach()}, "does not depend on the inputs"),
        ({"mean": [0.1, 0.2]}, r"mean=\[0.1, 0.2\].*1 channels"),
    ):
        assert_refused(Plain(), f"(?i)SaliencyCallback: .*{message}", [SaliencyCallback(**arguments)])


def test_two_networks_and_no_forward_are_said_and_training_goes_on():
    trial, later, nothing = (
        pytest.warns(UserWarning, match=m)
        for m in ("the sanity check could not.*2 networks", "epoch 0 was not.*no forward", "nothing has been")
    )
    with trial, later, nothing:
        trainer = fit(TwoNetworks(), [SaliencyCallback()], max_epochs=2)
    assert trainer.current_epoch == 2
    with pytest.warns(UserWarning, match=r"SaliencyCallback: .*no forward"):
        trainer_of([SaliencyCallback()]).validate(TwoNetworks(), loader(24, seed=1), verbose=False)


def test_batches_without_one_tensor_of_inputs_are_named():
    class Pairs(Plain):
        def loss(self, batch: Any) -> torch.Tensor:
            return super().loss((batch["x"]["a"], batch["y"]))

    data = DataLoader([{"x": {"a": x}, "y": y} for x, y in dataset(16)], 4)
    with pytest.raises(MisconfigurationException, match="SaliencyCallback: "):
        fit(Pairs(), [SaliencyCallback()], train=data, val=data)


def test_a_figure_that_fails_does_not_stop_training(tmp_path, monkeypatch):
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(module_of_the_callback, "saliency_rows", broken)
    callback, memory = SaliencyCallback(), ImageLogger()
    with pytest.warns(UserWarning, match=r"epoch \d was measured and not shown: RuntimeError: no ink"):
        trainer = fit(Plain(), [callback], logger=[TensorBoardLogger(tmp_path), memory], max_epochs=2)
    assert trainer.current_epoch == 2
    assert callback.found.maps.abs().max() > 0
    assert memory.images == []
    assert files(trainer.log_dir) == set()


def test_that_no_figure_can_be_drawn_is_said_once(monkeypatch):
    monkeypatch.setattr(module_of_the_callback, "saliency_rows", lambda *args, **kwargs: 1 / 0)
    with pytest.warns(UserWarning, match="was measured and not shown") as told:
        fit(Plain(), [SaliencyCallback()], logger=ImageLogger(), max_epochs=3)
    assert len([one for one in told if "not shown" in str(one.message)]) == 1


@pytest.mark.parametrize("what", ["file", "logger"])
def test_what_cannot_be_written_does_not_stop_training(tmp_path, monkeypatch, what):
    class Refuses(ImageLogger):
        def log_image(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("disk full")

    loggers: list[Any] = [TensorBoardLogger(tmp_path)]
    if what == "logger":
        loggers.append(Refuses())
    else:
        monkeypatch.setattr(
            "lightning_neurons.report.logging.images.save_figure", Mock(side_effect=OSError("disk full"))
        )
    with pytest.warns(UserWarning, match=r"epoch \d was measured and not shown"):
        trainer = fit(Plain(), [SaliencyCallback()], logger=loggers, max_epochs=2)
    assert trainer.current_epoch == 2


def test_without_validation_it_is_said():
    with (
        pytest.warns(UserWarning, match="SaliencyCallback: the Trainer runs no validation"),
        pytest.warns(UserWarning, match="SaliencyCallback: nothing has been measured"),
    ):
        fit(Plain(), [SaliencyCallback()], limit_val_batches=0)


def test_two_that_are_alike_are_refused_by_the_trainer():
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer_of([SaliencyCallback(), SaliencyCallback()])


def test_a_checkpoint_of_other_settings_is_left_aside(tmp_path):
    first = SaliencyCallback()
    fit(Plain(), [first])
    assert SaliencyCallback(max_samples=4).state_key != first.state_key
    assert SaliencyCallback(target=1).state_key != first.state_key
    assert SaliencyCallback(forward=lambda m, x: m(x)).state_key != first.state_key
