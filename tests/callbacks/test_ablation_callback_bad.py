"""What can go wrong in a measurement beside training: said once, and training goes on; before it, an error."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_neurons import ArgumentError, NeuronAblationCallback
from lightning_neurons.results.ablation_report import AblationReport
from tests.callbacks.modules import Altered, Plain, fit, loader, trainer_of


class FailsLater(Plain):
    """Under study, from some epoch on."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        is_study = "log" in vars(self)  # what is logged in a study is caught
        if is_study and not self.trainer.sanity_checking and self.current_epoch >= 1:
            raise RuntimeError("not now")
        return super().validation_step(batch, batch_idx)


def test_a_study_that_fails_is_told_once_and_training_goes_on():
    callback = NeuronAblationCallback(ends=2)
    with pytest.warns(UserWarning, match="epoch 1 was not measured: .*not now") as told:
        trainer = fit(FailsLater(), [callback], max_epochs=4)
    assert len([one for one in told if "was not measured" in str(one.message)]) == 1
    assert trainer.current_epoch == 4
    assert callback.ablation is not None, "that of epoch 0"


def no_loss(module: Any, batch: Any, batch_idx: int) -> None:
    module.log("accuracy", (module(batch[0]).argmax(1) == batch[1]).float().mean())


def test_before_training_and_without_training_a_failure_is_an_error():
    with pytest.raises(MisconfigurationException, match=r"NeuronAblationCallback: .*validation_step.*loss_fn="):
        fit(Altered(no_loss), [NeuronAblationCallback()])
    with pytest.raises(MisconfigurationException, match=r"NeuronAblationCallback: .*validation_step.*loss_fn="):
        trainer_of([NeuronAblationCallback()]).validate(Altered(no_loss), loader(24, seed=1), verbose=False)


@pytest.mark.parametrize("batch_size, steps", [(1, 1), (1, 2), (8, 1)])
def test_a_sanity_check_of_few_samples_does_not_stop_training(batch_size, steps):
    callback = NeuronAblationCallback(ends=2)
    fit(Plain(), [callback], val=loader(24, batch_size, seed=1), num_sanity_val_steps=steps)
    assert callback.ablation.samples == 24


WRONG = [
    ({"criterion": "fishr"}, "criterion: nothing matches 'fishr'. Did you mean 'fisher'"),
    ({"ends": 0}, "ends=0"),
    ({"ends": 1.5}, "ends=1.5"),
    ({"replacement": "men"}, "replacement='men'.*did you mean 'mean'"),
    ({"loss_fn": "mean"}, "loss_fn='mean'"),
    ({"loss_reduction": "avg"}, "loss_reduction='avg'"),
    ({"max_samples": 1}, "max_samples=1.*at least 2"),
    ({"every_n_epochs": 0}, "every_n_epochs=0"),
    ({"layers": "net.conv1"}, "layers='net.conv1'"),
    ({"layers": []}, r"layers=\[\]"),
]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(MisconfigurationException, match=message) as caught:
        NeuronAblationCallback(**arguments)
    assert isinstance(caught.value, ArgumentError)


def test_a_pattern_that_matches_nothing_is_refused_before_training():
    with pytest.raises(
        MisconfigurationException, match=r"NeuronAblationCallback: .*'net.con1'. Did you mean 'net.conv1'"
    ):
        fit(Plain(), [NeuronAblationCallback(layers=["net.con1"])])


def test_two_callbacks_write_beside_each_other(tmp_path: Path):
    first, second = NeuronAblationCallback("fisher", ends=2), NeuronAblationCallback("weight_l2", ends=2)
    trainer = fit(Plain(), [first, second], max_epochs=1, logger=CSVLogger(tmp_path))
    files = [AblationReport.load(Path(trainer.log_dir) / f"ablation{number}.json") for number in ("", "_2")]
    assert [report.settings["criterion"] for report in files] == ["fisher", "weight_l2"]
    assert files[1].settings["agreement"]["neurons"] == second.agreement.neurons == 4
    assert {"ablation/agreement", "ablation_2/agreement"} <= {*trainer.logger.experiment.metrics_keys}
