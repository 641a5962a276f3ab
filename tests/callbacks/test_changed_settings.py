"""A run that is resumed with another budget: what has gone stays away, and shares are still of the whole model."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_neurons import ArgumentError, NeuronPruningCallback, PruningPlan
from tests.callbacks.modules import Plain, loader, trainer_of
from tests.callbacks.pruned import assert_sound, widths

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
SAID = r"written with other settings \(amount=0.5 before\): the 9 neurons that have gone stay away"


def pruner(amount: float, **kwargs: Any) -> NeuronPruningCallback:
    return NeuronPruningCallback("weight_l2", amount=amount, compensation="none", **kwargs)


def train(callback: NeuronPruningCallback, folder: Path, epochs: int, ckpt: Path | None = None) -> Plain:
    torch.manual_seed(0)
    module = Plain()
    saves = ModelCheckpoint(folder, save_last=True)
    trainer = trainer_of([callback, saves], max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(module, loader(16), loader(24, seed=1), ckpt_path=ckpt)
    assert_sound(trainer, module, callback)
    return module


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], PruningPlan, Path]:
    folder, callback = tmp_path_factory.mktemp("half"), pruner(0.5)
    return widths(train(callback, folder, 2)), callback.plan, folder / "last.ckpt"


@pytest.mark.filterwarnings("ignore:.*The dirpath has changed")
def test_a_smaller_budget_that_is_met_already_cuts_nothing(half, tmp_path):
    before, plan, path = half
    callback = pruner(0.3)
    with pytest.warns(UserWarning, match=SAID):
        module = train(callback, tmp_path, 4, path)
    assert widths(module) == before
    assert callback.plan.neurons == plan.neurons
    with warnings.catch_warnings():  # the same settings again: nothing is said a second time
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*The dirpath has changed|.*does not have many workers")
        assert widths(train(pruner(0.3), tmp_path / "again", 5, tmp_path / "last.ckpt")) == before


@pytest.mark.filterwarnings("ignore:.*The dirpath has changed")
def test_a_larger_budget_is_reached_from_what_has_gone(half, tmp_path):
    _, plan, path = half
    callback = pruner(0.75, schedule="linear", start_epoch=3, end_epoch=4)
    with pytest.warns(UserWarning, match=SAID):
        module = train(callback, tmp_path, 5, path)
    assert widths(module) == {"net.conv1": 1, "net.conv2": 2, "net.fc1": 2, "net.fc2": 3}  # a quarter of 4, 6 and 8
    assert all({*neurons} <= {*callback.plan.neurons[layer]} for layer, neurons in plan.neurons.items())
    assert [one.number for one in callback.rounds.done] == [1, 1, 2]


@pytest.mark.parametrize("saving, said", [({}, True), ({"save_top_k": -1}, False), ({"monitor": None}, False)], ids=str)
def test_a_last_checkpoint_that_may_not_be_the_last_is_named_before_training(saving, said, tmp_path):
    saves = ModelCheckpoint(tmp_path, save_last=True, **({"monitor": "val_loss"} | saving))
    trainer = trainer_of([pruner(0.5), saves], max_epochs=2, enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Plain(), loader(16), loader(24, seed=1))
    assert any("can hold the network before a cut" in str(one.message) for one in caught) == said


BROKEN = {
    "no rounds": lambda state: state.pop("rounds"),
    "a text for a number": lambda state: state["rounds"]["done"][0].update(epoch="two"),
    "half a plan": lambda state: state["rounds"]["done"][0]["plan"].pop("neurons"),
    "a contract of other things": lambda state: state["keeping"].update(judge_after=[1]),
    "something else": lambda state: state["keeping"].update(other=1),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_state_is_refused_and_nothing_of_it_is_taken(half, what):
    callback = pruner(0.5)
    (state,) = [s for key, s in torch.load(half[2], weights_only=True)["callbacks"].items() if "NeuronPruning" in key]
    BROKEN[what](state)
    with pytest.raises(ArgumentError, match=r"ckpt_path=.the state of NeuronPruningCallback in a checkpoint"):
        callback.load_state_dict(state)
    assert (callback.plan, callback.rounds.dense, callback._restored) == (pruner(0.5).plan, None, False)
