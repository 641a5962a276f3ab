"""What can go wrong in a measurement beside training: said once, and training goes on; before it, an error."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_neurons import NeuronAblationCallback
from lightning_neurons.results.ablation_report import AblationReport
from tests.callbacks.modules import Altered, Plain, fit, loader, trainer_of
from tests.callbacks.refusals import not_refused


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


@torch.no_grad()
def no_gradients(module: Any, batch: Any, batch_idx: int) -> Any:
    return module.loss(batch)


def on_a_copy(module: Any, batch: Any, batch_idx: int) -> Any:
    return nn.functional.cross_entropy(copy.deepcopy(module.net)(batch[0]), batch[1])


@pytest.mark.parametrize(
    "step, why", [(no_loss, "loss_fn="), (no_gradients, "loss_fn="), (on_a_copy, "no layer of the model ran.*copy")]
)
def test_a_step_without_a_loss_of_the_model_is_said_and_training_goes_on(step, why):
    callback, module, plain = NeuronAblationCallback(), Altered(step), Altered(step)
    plain.load_state_dict(module.state_dict())
    trial, later, nothing = (
        pytest.warns(UserWarning, match=m)
        for m in (f"the sanity check could not be measured.*{why}", f"epoch 0 was not.*{why}", "nothing has been")
    )
    train = loader()
    with trial, later, nothing:
        fit(module, [callback], train, max_epochs=2)
    fit(plain, [], train, max_epochs=2)
    assert callback.ablation is None
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), plain.parameters(), strict=True))
    with pytest.warns(UserWarning, match=f"NeuronAblationCallback: .*{why}"):
        trainer_of([NeuronAblationCallback()]).validate(Altered(step), loader(24, seed=1), verbose=False)


def test_a_step_that_leaves_out_the_sanity_check_is_measured_in_each_epoch():
    def step(module: Any, batch: Any, batch_idx: int) -> Any:
        return None if module.trainer.sanity_checking else module.loss(batch)

    late, at_once = NeuronAblationCallback(ends=2), NeuronAblationCallback(ends=2)
    modules = Altered(step), Plain()
    modules[1].load_state_dict(modules[0].state_dict())
    train = loader()
    with pytest.warns(UserWarning, match="the sanity check could not be measured"):
        fit(modules[0], [late], train)
    fit(modules[1], [at_once], train)
    found, expected = late.ablation.delta_loss, at_once.ablation.delta_loss
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].nan_to_num(), expected[name].nan_to_num()) for name in found)


def test_before_training_and_without_training_an_argument_at_fault_is_an_error():
    def broken(module: Any, batch: Any) -> Any:
        raise KeyError("target")

    with pytest.raises(MisconfigurationException, match=r"NeuronAblationCallback: .*target"):
        fit(Plain(), [NeuronAblationCallback(loss_fn=broken)])
    with pytest.raises(MisconfigurationException, match=r"NeuronAblationCallback: .*loss_reduction='none'"):
        trainer_of([NeuronAblationCallback(loss_reduction="none")]).validate(Plain(), loader(24, seed=1), verbose=False)


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


def test_arguments_out_of_range():
    assert not_refused(NeuronAblationCallback, WRONG) == {}


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
