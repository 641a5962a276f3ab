"""A guarded run that crashes and is resumed, in whatever phase, ends as one that never stopped, bit by bit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from lightning_neurons import NeuronPruningCallback, load_pruned
from tests.callbacks.guarded import Scored, by_epoch, by_neurons, differences, guard, hidden, made, state_of, undone
from tests.callbacks.modules import dataset, loader, trainer_of

EPOCHS, BATCHES = 8, 2
NAMED: dict[str, Any] = {"auto_insert_metric_name": False}
DATA = [dataset(16)[8 * number : 8 * number + 8] for number in range(BATCHES)]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(nothing has|all cuts have) been", "ignore:.*taken back"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available", "ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*training ended before a plan", "ignore:.*has not been judged"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:.*Fine if training logs it", "ignore:.*training ends before"),
    pytest.mark.filterwarnings("ignore:.*last good state comes back", "ignore:.*so there is nothing to keep"),
    pytest.mark.filterwarnings("ignore:.*is not made at epoch", "ignore:.*while a cut was recovering"),
]


class Numbered(Scored):
    """Takes its batch by its number, so that an epoch goes on the same whatever the loader begins with."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("train_score", float(self.score(self)), on_step=False, on_epoch=True)
        return super().training_step(DATA[batch_idx], batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=BATCHES * EPOCHS)
        return [optimizer], [{"scheduler": cycle, "interval": "step"}]


# A third of the neurons is too much, a sixth is not: cut at 1, taken back at 3, cut again at 4, judged to be good at 6.
HALVE = {"on_violation": "halve", "recovery_epochs": 2}
# The second of two rounds, at 3, is too much and taken back at 5.
LINEAR = {"schedule": "linear", "start_epoch": 1, "end_epoch": 3, "every_n_epochs": 2, "recovery_epochs": 2}


@dataclass
class Setting:
    pruning: dict[str, Any]
    story: tuple[list[Any], list[Any]]
    callbacks: Callable[[], list[Any]] = list
    score: Callable[[Any], float] = by_neurons


SETTINGS = {
    "halve": Setting(HALVE, ([(1, 4, 3)], [(1, 1, 6)])),
    "linear": Setting(LINEAR, ([(1, 1, 3)], [(2, 3, 3)])),
    "EMA": Setting(HALVE, ([(1, 4, 3)], [(1, 1, 6)]), lambda: [EMAWeightAveraging(decay=0.9)]),
    "compensated": Setting(HALVE | {"compensation": "least_squares"}, ([(1, 4, 3)], [(1, 1, 6)])),
    "of training": Setting(HALVE | {"monitor": "train_score"}, ([(1, 4, 3)], [(1, 1, 6)])),
}


def turn(setting: Setting, phases: Sequence[Any], every: int) -> Sequence[Any]:
    """The phases of this setting, so that all settings together go through each of them."""
    return phases[[*SETTINGS.values()].index(setting) % every :: every]


class Crash(L.Callback):
    """Somebody's mistake when an epoch begins, or in its middle."""

    def __init__(self, hook: str, epoch: int) -> None:
        def fail(trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == epoch:
                raise ArithmeticError("somebody's mistake")

        setattr(self, hook, fail)


@dataclass
class Run:
    trainer: Any
    module: Numbered
    callback: NeuronPruningCallback

    def end(self) -> dict[str, Any]:
        """All that may not depend on whether it was resumed; times and some metrics of rounds are unknown then."""
        rounds, timed = self.callback.rounds.state_dict(), ("latency", "latency_before", "cut", "before")
        for one in (*rounds["done"], *rounds["undone"]):
            one |= dict.fromkeys(timed)
        progress = [self.trainer.global_step, self.trainer.current_epoch]
        keeping = self.callback.keeping.state_dict()
        return {"state": state_of(self.trainer, self.module), "rounds": rounds, "keeping": keeping, "at": progress}


def train(setting: Setting, saves: list[Any], ckpt: Path | None = None, crash: Any = None, **kwargs: Any) -> Run:
    torch.manual_seed(4)
    module, callback = Numbered(setting.score), guard(**setting.pruning)
    callbacks = [callback, *setting.callbacks(), *saves, *([] if crash is None else [crash])]
    trainer = trainer_of(callbacks, enable_checkpointing=bool(saves), **({"max_epochs": EPOCHS} | kwargs))
    run = Run(trainer, module, callback)
    if crash is None:
        trainer.fit(module, loader(16), loader(24, seed=1), ckpt_path=ckpt)
    else:
        with pytest.raises(ArithmeticError):
            trainer.fit(module, loader(16), loader(24, seed=1), ckpt_path=ckpt)
    return run


class Saves(ModelCheckpoint):
    """Several of them may stand side by side."""

    @property
    def state_key(self) -> str:
        return f"{super().state_key}{self.filename}"


def last(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_last=True)


def each(folder: Path, name: str, **kwargs: Any) -> ModelCheckpoint:
    return Saves(folder, f"{name}-{{{'step' if name == 'step' else 'epoch'}}}", save_top_k=-1, **NAMED, **kwargs)


@pytest.fixture(scope="module", params=SETTINGS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Setting, Path, Any]:
    """A run that never stopped, and its checkpoints: at the end of epochs, of validations and of steps."""
    torch.set_num_threads(1)
    setting, folder = SETTINGS[request.param], tmp_path_factory.mktemp("guarded")
    saves = [
        each(folder, "epoch", save_on_train_epoch_end=True),
        each(folder, "val", save_on_train_epoch_end=False),
        each(folder, "step", every_n_train_steps=1),
    ]
    run = train(setting, saves)
    assert (made(run.callback), undone(run.callback)) == setting.story
    assert run.callback.keeping.good is None
    return setting, folder, run


def test_after_a_crash_in_any_phase_the_last_checkpoint_leads_to_the_same_end(whole, tmp_path):
    setting, _, run = whole
    wrong, phases = {}, list(product([1, 2, 3, 4, 6], ["on_train_batch_end", "on_validation_start"]))
    for epoch, hook in turn(setting, phases, len(SETTINGS)):
        folder = tmp_path / f"{hook} {epoch}"
        train(setting, [last(folder)], crash=Crash(hook, epoch))
        resumed = train(setting, [last(folder / "again")], folder / "last.ckpt")
        found = differences(resumed.end(), run.end())
        wrong |= {(hook, epoch): found[:3]} if found else {}
    assert wrong == {}


def test_every_checkpoint_at_the_end_of_an_epoch_leads_to_the_same_end(whole):
    setting, folder, run = whole
    wrong = {}
    for kind, epoch in turn(setting, list(product(["epoch", "val"], range(EPOCHS - 1))), 3):
        resumed = train(setting, [], folder / f"{kind}-{epoch}.ckpt")
        if setting is SETTINGS["of training"] and kind == "val":  # what an unfinished epoch has logged is not saved
            assert by_neurons(resumed.module) >= 18 / 32 - 0.125
            continue
        found = differences(resumed.end(), run.end())
        wrong |= {(kind, epoch): found[:3]} if found else {}
    assert wrong == {}


def test_every_checkpoint_in_the_middle_of_an_epoch_leads_to_the_same_end(whole):
    setting, folder, run = whole
    if setting is SETTINGS["EMA"]:
        return  # Lightning itself then counts the average of a step twice
    wrong = {}
    for step in turn(setting, range(1, BATCHES * EPOCHS, 2), 2):
        found = differences(train(setting, [], folder / f"step-{step}.ckpt").end(), run.end())
        wrong |= {step: found[:3]} if found else {}
    assert wrong == {}


def test_a_checkpoint_after_the_last_batch_and_before_validation_leads_to_the_same_end(whole):
    setting, folder, run = whole
    for step in turn(setting, range(BATCHES, BATCHES * EPOCHS, BATCHES), 3):
        resumed = train(setting, [], folder / f"step-{step}.ckpt")
        if setting is not SETTINGS["of training"]:  # what an unfinished epoch has logged is not saved
            assert differences(resumed.end(), run.end()) == [], step
        assert hidden(resumed.module) >= 14, step
        assert resumed.callback.rounds.widths() == {
            name: len(layer.weight)
            for name, layer in resumed.module.named_modules()
            if name in run.callback.plan.widths
        }


def test_a_resume_that_has_no_epoch_left_ends_with_a_model_that_keeps_the_contract(whole):
    setting, folder, _ = whole
    for name, epoch in product(["epoch", "val"], range(1, EPOCHS)):
        resumed = train(setting, [], folder / f"{name}-{epoch}.ckpt", max_epochs=epoch + 1)
        assert resumed.trainer.global_step == BATCHES * (epoch + 1)
        assert by_neurons(resumed.module) >= 18 / 32 - 0.125, (name, epoch)
        assert resumed.callback.keeping.good is None
        widths = resumed.callback.rounds.widths()
        assert sum(widths.values()) == hidden(resumed.module) + 3


def test_a_resume_that_has_no_step_left_ends_with_a_model_that_keeps_the_contract(whole):
    setting, folder, _ = whole
    for step in range(3, BATCHES * EPOCHS, 2):
        resumed = train(setting, [], folder / f"step-{step}.ckpt", max_steps=step)
        assert resumed.trainer.global_step == step
        assert by_neurons(resumed.module) >= 18 / 32 - 0.125, step


def test_plain_values_and_tensors_are_all_that_a_checkpoint_holds(whole):
    _, folder, run = whole
    good = []
    for epoch in range(EPOCHS):
        content = torch.load(folder / f"epoch-{epoch}.ckpt", weights_only=True)
        keeping = content["callbacks"][run.callback.state_key]["keeping"]
        good.append(keeping["good"] is not None)
        assert keeping["baseline"] in (None, 18 / 32)
    assert good[1]
    assert not good[0]


def test_pruned_checkpoints_load_in_every_phase_and_are_validated(whole):
    setting, folder, _ = whole
    seen = set()
    for epoch in range(EPOCHS):
        path = folder / f"epoch-{epoch}.ckpt"
        loaded = load_pruned(Numbered, path)
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert differences(dict(loaded.state_dict()), dict(saved)) == []
        module = Numbered(setting.score)
        trainer = trainer_of([guard(**setting.pruning)])
        (result,) = trainer.validate(module, loader(24, seed=1), ckpt_path=path, verbose=False)
        assert result["val_score"] == by_neurons(loaded)
        assert differences(dict(module.state_dict()), dict(saved)) == []
        seen.add(hidden(loaded))
    assert seen == {18, 15, 12}


@pytest.mark.parametrize("scores, left", [((0.75, 0.25), 18), ((0.75, 0.625), 12)])
def test_a_crash_in_recovery_and_a_resume_without_an_epoch_left_by_hand(tmp_path, scores, left):
    setting = Setting({"recovery_epochs": 3}, ([], []), score=by_epoch(*scores))
    crashed = train(setting, [last(tmp_path)], crash=Crash("on_train_batch_end", 2))
    assert hidden(crashed.module) == 12
    before = torch.load(tmp_path / "last.ckpt", weights_only=True)
    good = before["callbacks"][crashed.callback.state_key]["keeping"]["good"]["model"]
    resumed = train(setting, [], tmp_path / "last.ckpt", max_epochs=2)
    assert hidden(resumed.module) == left
    expected = good if left == 18 else before["state_dict"]
    assert differences(dict(resumed.module.state_dict()), {n: expected[n] for n in before["state_dict"]}) == []
