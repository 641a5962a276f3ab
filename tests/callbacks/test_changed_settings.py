"""A run that is resumed with another budget: what has gone stays away, and shares are still of the whole model."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_neurons import ArgumentError, NeuronPruningCallback, PruningPlan
from lightning_neurons.callbacks.pruning.resume import Stage
from lightning_neurons.results.history import NeuronHistory
from tests.callbacks.modules import Plain, loader, trainer_of
from tests.callbacks.pruned import assert_sound, widths
from tests.tables import for_each

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
    assert (callback.plan, callback.rounds.dense, callback._pruner.progress.stage) == (
        pruner(0.5).plan,
        None,
        Stage.NEW,
    )


PLAN = {
    "format": "lightning_neurons pruning plan", "version": 1, "neurons": {"net.fc1": [4, 6, 7]},
    "widths": {"net.conv1": 4, "net.conv2": 6, "net.fc1": 8, "net.fc2": 3}, "reasons": {}, "notes": [],
    "cost": {"parameters": 365, "macs": 9144, "parameters_after": 335, "macs_after": 9117},
}  # fmt: skip
STATE: dict[str, Any] = {
    "version": 1,
    "history": NeuronHistory().state_dict(),
    "rounds": {
        "dense": {"widths": PLAN["widths"], "parameters": 365, "macs": 9144},
        "done": [],
        "pending": {
            "number": 1, "plan": PLAN, "shifts": {}, "decided": 1,
            "cuts": [
                {"path": "net.fc1", "role": "makes", "places": (4, 6, 7), "axis": None},
                {"path": "net.fc2", "role": "reads", "places": (4, 6, 7), "axis": None},
            ],
        },
        "votes": [], "undone": [], "earlier": 0,
    },
    "seed": 0, "validated": 8, "left_whole": {}, "followers": {}, "marks": {},
    "keeping": {
        "baseline": None, "good": None, "good_rounds": 0, "progress": 0.0, "judge_after": None, "latest": 0.5,
        "validated": 1, "measured": True, "step_of_latest": 8, "step": 1.0, "stopped": False,
    },
    "distillation": {"until": -1, "teacher": None},
}  # fmt: skip
"""A state as version 0.1.0 has written it, with a cut that is decided."""


def keys(state: Any) -> Any:
    return {name: keys(value) for name, value in state.items()} if isinstance(state, dict) else None


def test_a_state_of_the_first_version_is_read_and_its_cut_is_made():
    callback, module = pruner(0.4, monitor="val_loss", max_drop=9.0, recovery="distill"), Plain()
    callback.load_state_dict(copy.deepcopy(STATE))
    again = callback.state_dict()
    again["rounds"]["pending"]["plan"] = PLAN  # whose form has a version of its own
    assert keys(again) == keys(STATE), "the older version could read it as well"
    trainer_of([callback], max_epochs=2).fit(module, loader(16), loader(24, seed=1))
    assert callback.plan.neurons == {"net.fc1": (4, 6, 7)}
    assert module.net.fc1.out_features == module.net.fc2.in_features == 5
    assert callback.keeping.baseline == 0.5


@for_each("newer", ["validated", "left_whole", "followers", "marks", "keeping", "distillation"])
def test_what_states_have_not_always_had_may_be_missing(newer):
    callback = pruner(0.4)
    callback.load_state_dict({name: value for name, value in copy.deepcopy(STATE).items() if name != newer})
    assert callback.pending.neurons == {"net.fc1": (4, 6, 7)}
