"""What the maximising callback refuses, what it does without, and what never takes training with it."""

from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_neurons import (
    ActivationMaximizationCallback,
    NeuronSensitivityCallback,
    maximize_activation,
)
from lightning_neurons.report.logging import cards as module_of_cards
from tests.callbacks.modules import LAYERS, Net, Plain, dataset, fit, loader, trainer_of
from tests.callbacks.pictured import (
    Dying,
    ImageLogger,
    Mapped,
    files,
    is_picture,
    mapped,
    maximizer,
    shown_in,
    without_matplotlib,  # noqa: F401
)
from tests.callbacks.pruned import Probe, assert_refused, pruner
from tests.callbacks.refusals import not_refused
from tests.callbacks.studied import TwoNetworks, samples

WRONG = [
    ({"targets": []}, r"targets=\[\]"),
    ({"targets": "net.conv1"}, "targets='net.conv1'.*a list"),
    ({"targets": 3}, "targets=3.*a list"),
    ({"cards": -1}, "cards=-1.*at least 0"),
    ({"cards": 1.5}, r"cards=1\.5"),
    ({"of": "loss"}, "of='loss'"),
    ({"value_range": (1.0, 0.0)}, r"value_range=\(1.0, 0.0\).*least, largest"),
    ({"value_range": 1.0}, r"value_range=1\.0"),
    ({"parametrization": "fft"}, "parametrization='fft'"),
    ({"validity": "tanh"}, "validity='tanh'"),
    ({"steps": 0}, "steps=0"),
    ({"learning_rate": -0.1}, "learning_rate=-0.1"),
    ({"total_variation": -1}, "total_variation=-1"),
    ({"l2": float("nan")}, "l2=nan"),
    ({"seed": -1}, "seed=-1"),
    ({"max_samples": 1}, "max_samples=1"),
    ({"every_n_epochs": 0}, "every_n_epochs=0"),
    ({"forward": Net()}, "forward='Net'"),
    ({"forward": "net"}, "forward='str'"),
    ({"mean": "x"}, "mean='x'"),
    ({"std": 0}, "std=0"),
    ({"seed": [0, 1]}, r"seed=\[0, 1\]"),
    ({"targets": [1.5]}, "targets=1.5"),
    ({"targets": [None]}, "targets=None"),
]


def test_arguments_out_of_range():
    assert not_refused(ActivationMaximizationCallback, WRONG) == {}


def test_an_unknown_layer_or_neuron_is_found_before_any_forward():
    for target, message in (
        ("net.cov2", "nothing matches 'net.cov2'. Did you mean 'net.conv2'"),
        (("net.conv", 1), "nothing matches 'net.conv'. Did you mean 'net.conv"),
        (("net.conv1", 4), "neurons of 0 to 3 in 'net.conv1'"),
        (("net.conv1", -1), "neurons of 0 to 3 in 'net.conv1'"),
    ):
        for sanity in (0, 2):
            assert_refused(Plain(), message, [maximizer([0, target])], num_sanity_val_steps=sanity)
        with pytest.raises(MisconfigurationException, match=message):
            trainer_of([maximizer([target])]).validate(Plain(), loader(), verbose=False)


def test_what_does_not_fit_the_model_or_the_data_is_found_before_training():
    for arguments, message in (
        ({"targets": [3]}, "target=3.*0 to 2"),
        ({"mean": [0.1, 0.2]}, r"mean=\[0.1, 0.2\].*1 channels"),
        ({"value_range": (0.0, 0.1)}, r"value_range=\(0.0, 0.1\).*mean="),
        ({"forward": lambda module, inputs: "logits"}, "returned str"),
    ):
        assert_refused(Plain(), f"ActivationMaximizationCallback: .*{message}", [maximizer(**arguments)])


def test_two_networks_and_no_forward_are_said_and_training_goes_on():
    trial, later, nothing = (
        pytest.warns(UserWarning, match=m)
        for m in ("the sanity check could not.*2 networks", "epoch 0 was not.*no forward", "nothing has been")
    )
    with trial, later, nothing:
        trainer = fit(TwoNetworks(), [maximizer()], max_epochs=2)
    assert trainer.current_epoch == 2


def test_a_trial_run_writes_nothing(tmp_path):
    memory = ImageLogger()
    callbacks = [maximizer(), NeuronSensitivityCallback(html=True)]
    fit(Plain(), callbacks, logger=[memory, TensorBoardLogger(tmp_path)], fast_dev_run=True)
    assert memory.images == []
    assert list(tmp_path.rglob("*")) == []


def test_without_a_logger_pictures_are_made_and_nothing_is_written(tmp_path):
    callback = maximizer()
    fit(Plain(), [callback, NeuronSensitivityCallback()])
    assert len(callback.cards) == 4
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_it_is_said_once_and_made(tmp_path):
    callback = maximizer()
    with pytest.warns(UserWarning, match=r"pip install 'lightning_neurons\[figures\]'") as told:
        trainer = fit(Plain(), [callback], logger=TensorBoardLogger(tmp_path), max_epochs=2)
    trainer.validate(Plain(), loader(24, seed=1), verbose=False)
    assert len([one for one in told if "matplotlib" in str(one.message)]) == 1
    assert callback.found.images.shape == (3, 1, 6, 6)
    assert files(trainer.log_dir) == set()
    assert shown_in(trainer.log_dir) == {}


def test_a_figure_that_fails_does_not_stop_training(tmp_path, monkeypatch):
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(module_of_cards, "neuron_card", broken)
    callback, observer = maximizer(), NeuronSensitivityCallback(max_figures=0)
    with pytest.warns(UserWarning, match=r"epoch \d was measured and not shown: RuntimeError: no ink"):
        trainer = fit(Plain(), [callback, observer], logger=TensorBoardLogger(tmp_path), max_epochs=2)
    assert trainer.current_epoch == 2
    assert len(callback.cards) == 4


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_pictures_are_made_at_any_precision(tmp_path, precision):
    callbacks = [maximizer(), NeuronSensitivityCallback(criteria=["fisher", "near_zero"], max_figures=0)]
    trainer = fit(Plain(), callbacks, logger=TensorBoardLogger(tmp_path), precision=precision)
    assert is_picture(trainer.log_dir, "maximization.png")
    assert callbacks[0].found.images.isfinite().all()


def test_inputs_without_positions_are_made_value_by_value():
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    own = [(x.flatten()[:5], y) for x, y in dataset()]
    callback = maximizer()
    fit(Plain(net), [callback, NeuronSensitivityCallback()], train=DataLoader(own, 8), val=DataLoader(own, 8))
    assert callback.found.images.shape == (7, 5)


def test_batches_that_are_dicts_are_compared_with():
    module, callback = Mapped(), maximizer()
    fit(module, [callback, NeuronSensitivityCallback()], train=mapped(), val=mapped())
    expected = maximize_activation(module, [0, 1, 2], images=samples()[0], steps=3)
    assert torch.allclose(callback.found.images[:3], expected.images, atol=1e-4)
    assert len(callback.cards) == 4
    assert {tuple(card.pictures.shape) for card in callback.cards} == {(6, 1, 6, 6)}


def test_validation_after_training_makes_no_card_of_a_neuron_that_died_in_another_run():
    callback, observer = maximizer(cards=2), NeuronSensitivityCallback()
    trainer = fit(Dying(), [callback, observer], max_epochs=3)
    assert "newly dead" in {card.why for card in callback.cards}
    trainer.validate(Plain(), loader(24, seed=1), verbose=False)
    dead = {
        f"{layer} {i}" for layer in observer.report.deadness for i in observer.report.dead(layer).nonzero().flatten()
    }
    assert {card.name for card in callback.cards if card.why == "newly dead"} <= dead


@pytest.mark.parametrize("every", [1, 2])
def test_cards_are_of_neurons_that_are_there_while_the_model_is_cut(every):
    callback, observer = maximizer(cards=4), NeuronSensitivityCallback(every_n_epochs=every)
    cutting = pruner("fisher", amount=0.6, start_epoch=2)
    widths = Probe("on_validation_end", lambda _, m: {name: len(m.get_submodule(name).weight) for name in LAYERS})
    cards = Probe("on_validation_end", lambda *_: [card.name.split() for card in callback.cards])
    fit(Plain(), [callback, observer, cutting, widths, cards], max_epochs=4)
    assert cutting.plan
    for epoch, names in cards.seen.items():
        assert all(int(neuron) < widths.seen[epoch][layer] for layer, neuron in names)
        assert bool(names) == ((epoch + 1) % every == 0), "of a report of this validation"


def test_a_stale_report_makes_no_cards_that_look_new(tmp_path):
    callback, observer = maximizer(cards=2), NeuronSensitivityCallback(every_n_epochs=2, max_figures=0)
    trainer = fit(Dying(), [callback, observer], logger=TensorBoardLogger(tmp_path), max_epochs=5)
    assert shown_in(trainer.log_dir)["cards/newly_dead/1"] == [15], "it died between epochs 1 and 3"
