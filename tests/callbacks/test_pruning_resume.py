"""Training that is resumed from any checkpoint ends as training that never stopped, bit by bit."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor

from lightning_neurons import NeuronPruningCallback, load_pruned
from tests.callbacks.modules import Net, Plain, dataset, loader, trainer_of

EPOCHS, BATCHES = 5, 2
DATA = [dataset(16)[8 * number : 8 * number + 8] for number in range(BATCHES)]

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*The last model of the previous `fit` call will be used"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:.*nothing is cut in round 2"),  # patience may find nobody to agree on
]


class Numbered(Plain):
    """Takes its batch by its number, so that the rest of an epoch is the same whatever the loader begins with."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(DATA[batch_idx], batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


@dataclass
class Setting:
    """Callbacks, and which checkpoints Lightning itself can resume with them.

    With averages of the weights, no step is left to bring the last ones back; and SWA begins only with an epoch.
    """

    make: Callable[[], list[Any]]
    averages: bool = False
    within_epochs: bool = True
    trainer: dict[str, Any] | None = None

    def resumable(self, path: Path) -> bool:
        within = path.stem.startswith("step")
        ended = f"step={EPOCHS * BATCHES}" in path.stem or f"step={EPOCHS * BATCHES + 1}" in path.stem
        return (self.within_epochs or not within) and not (self.averages and ended)


def pruner(criterion: str = "fisher", **kwargs: Any) -> NeuronPruningCallback:
    """Two rounds, unless told otherwise."""
    plain = {"target_params": 0.4, "schedule": "linear", "start_epoch": 1, "end_epoch": 2}
    return NeuronPruningCallback(criterion, **(plain | kwargs))


def deadness() -> NeuronPruningCallback:
    rule = {"target_params": None, "amount": 0.6, "activation_threshold": 1.0}
    return pruner("deadness", start_epoch=2, end_epoch=3, patience=2, **rule)


def ema() -> Any:
    return EMAWeightAveraging(decay=0.9)


def swa() -> Any:
    return StochasticWeightAveraging(1e-2, swa_epoch_start=2)


SETTINGS = {
    "fisher": Setting(lambda: [pruner(end_epoch=3, compensation="mean", monitor="val_loss")]),
    "deadness": Setting(lambda: [deadness()]),
    "random": Setting(lambda: [pruner("random")]),
    "often": Setting(lambda: [pruner(compensation="mean")], trainer={"val_check_interval": 0.5}),
    "EMA first": Setting(lambda: [ema(), pruner(compensation="mean")], averages=True),
    "EMA last": Setting(lambda: [pruner(), ema()], averages=True),
    "SWA first": Setting(lambda: [swa(), pruner()], averages=True, within_epochs=False),
    "SWA last": Setting(lambda: [pruner(), swa()], averages=True, within_epochs=False),
}


@dataclass
class Run:
    """What is left of a run."""

    module: Numbered
    callback: NeuronPruningCallback
    state: dict[str, Tensor]


def train(
    setting: Setting,
    folder: Path,
    ckpt: Path | None = None,
    extra: tuple[Any, ...] = (),
    keep: int = -1,
    module: Numbered | None = None,
) -> Run:
    module, callbacks = module or Numbered(), setting.make()
    torch.manual_seed(4 if ckpt is None else 5)  # what is drawn in the beginning is in the checkpoint
    module.net = Net()
    callbacks += [
        ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=keep, monitor="val_loss"),
        ModelCheckpoint(folder, filename="{step}", save_top_k=keep, every_n_train_steps=1),
        *extra,
    ]
    trainer = trainer_of(callbacks, enable_checkpointing=True, **({"max_epochs": EPOCHS} | (setting.trainer or {})))
    trainer.fit(module, loader(16), loader(24, seed=1), ckpt_path=ckpt)
    (optimizer,) = trainer.optimizers
    state = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        state |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    state["rates"] = torch.tensor([group["lr"] for group in optimizer.param_groups], dtype=torch.float64)
    state["steps"] = torch.tensor([trainer.global_step, trainer.current_epoch])
    (callback,) = [c for c in callbacks if isinstance(c, NeuronPruningCallback)]
    return Run(module, callback, state)


def differences(found: Run, expected: Run) -> list[str]:
    """What is not the same."""
    ours, theirs = found.state, expected.state
    wrong = [f"no {name}" for name in ours.keys() ^ theirs.keys()]
    wrong += [name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])]
    a, b = found.callback, expected.callback
    wrong += ["plan"] * (a.plan != b.plan) + ["votes"] * (a.rounds.votes != b.rounds.votes)
    wrong += ["pending"] * (a.pending is not None) + ["dense"] * (vars(a.rounds.dense) != vars(b.rounds.dense))
    rounds = [[(r.number, r.epoch, r.step, r.plan.to_dict()) for r in x.rounds.done] for x in (a, b)]
    wrong += ["rounds"] * (rounds[0] != rounds[1])
    return sorted(wrong)


@dataclass
class Study:
    """A run that never stopped, with all the checkpoints it wrote."""

    setting: Setting
    folder: Path
    whole: Run

    def files(self, pattern: str = "*.ckpt") -> list[Path]:
        found = sorted(self.folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
        return [path for path in found if self.setting.resumable(path)]

    def rounds(self, path: Path) -> dict[str, Any]:
        state = torch.load(path, weights_only=True)
        return state["callbacks"][self.whole.callback.state_key]["rounds"]


@pytest.fixture(scope="module", params=SETTINGS)
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Study:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("checkpoints")
    setting = SETTINGS[request.param]
    return Study(setting, folder, train(setting, folder))


def test_there_are_checkpoints_of_every_kind(study):
    states = [study.rounds(path) for path in study.files()]
    done = [len(state["done"]) for state in states]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == len(study.whole.callback.rounds.done) > 1
    assert len([state for state in states if state["pending"] is not None]) >= len(study.whole.callback.rounds.done)
    assert len(study.whole.callback.plan) >= 3


def test_resuming_from_any_checkpoint_ends_as_if_nothing_had_happened(study):
    files = study.files()
    assert len(files) >= EPOCHS - 1
    wrong = {}
    for path in files:
        found = differences(train(study.setting, study.folder, path, keep=0), study.whole)
        wrong |= {path.name: found} if found else {}
    assert wrong == {}


def test_the_metric_of_a_checkpoint_is_that_of_its_weights(study):
    for path in study.files("epoch=*.ckpt"):
        saved = torch.load(path, weights_only=True)
        scores = [s["current_score"] for key, s in saved["callbacks"].items() if "val_loss" in key]
        trainer = trainer_of()
        (found,) = trainer.validate(load_pruned(Numbered, path), loader(24, seed=1), verbose=False)
        assert [float(score) for score in scores] == [found["val_loss"]], path.name


def test_the_metrics_of_rounds_are_after_a_resume_those_of_the_whole_run_or_unknown(tmp_path):
    setting = Setting(lambda: [pruner(end_epoch=1, monitor="val_loss")])
    whole = train(setting, tmp_path)
    wrong = set()
    for epoch in range(EPOCHS):
        path = tmp_path / f"epoch={epoch}-step={BATCHES * (epoch + 1)}.ckpt"
        resumed = train(setting, tmp_path, path, keep=0)
        for ours, theirs in zip(resumed.callback.rounds.done, whole.callback.rounds.done, strict=True):
            names = [n for n in ("before", "cut", "after") if getattr(ours, n) not in (None, getattr(theirs, n))]
            wrong |= {(path.stem, ours.number, name) for name in names}
    assert wrong == set()


class Crash(L.Callback):
    """A mistake in somebody's callback, in the middle of an epoch."""

    def __init__(self, hook: str, step: int) -> None:
        super().__init__()

        def fail(trainer: Any, *_: Any) -> None:
            if trainer.global_step == step:
                raise ArithmeticError("somebody's mistake")

        setattr(self, hook, fail)


@pytest.mark.parametrize("name, hook", [("fisher", "on_train_batch_start"), ("EMA last", "on_train_batch_end")])
def test_after_a_crash_in_the_middle_of_an_epoch_the_last_checkpoint_leads_to_the_same_end(tmp_path, name, hook):
    setting = SETTINGS[name]
    whole = train(setting, tmp_path / "whole")
    for step in (1, 3, 5):
        folder = tmp_path / str(step)
        on_exception = OnExceptionCheckpoint(folder, "crashed")
        with pytest.raises(ArithmeticError, match="somebody's mistake"):
            train(setting, folder, extra=(on_exception, Crash(hook, step)))
        files = [folder / "crashed.ckpt"]
        files += [folder / f"step={step}.ckpt"] * (hook == "on_train_batch_start")  # the last one before the crash
        for path in files:
            found = differences(train(setting, folder, path, keep=0), whole)
            assert found == [], (step, path.name)


class Unlucky(Numbered):
    """Fails in a validation step, once a number of optimizer steps has been made."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == self.step and self.trainer.validating and batch_idx == 1:
            raise ArithmeticError("somebody's mistake")
        return super().validation_step(batch, batch_idx)


HOOKS = ["on_validation_start", "on_validation_batch_start", "validation_step", "on_validation_epoch_end"]
HOOKS += ["on_validation_end", "on_train_epoch_start"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(SETTINGS["deadness"], tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("hook", HOOKS)
def test_after_a_crash_in_a_validation_or_as_an_epoch_begins_the_run_ends_as_if_nothing_had_happened(
    tmp_path, hook, whole
):
    crash = (OnExceptionCheckpoint(tmp_path, "crashed"), Crash(hook, 4))
    with pytest.raises(ArithmeticError, match="somebody's mistake"):
        train(SETTINGS["deadness"], tmp_path, extra=crash, module=Unlucky(4) if hook == "validation_step" else None)
    assert differences(train(SETTINGS["deadness"], tmp_path, tmp_path / "crashed.ckpt", keep=0), whole) == []


@pytest.mark.parametrize("trainer", [{"max_steps": EPOCHS * BATCHES}, {"check_val_every_n_epoch": 2}], ids=str)
def test_resuming_in_other_rhythms_ends_as_if_nothing_had_happened(tmp_path, trainer):
    setting = Setting(lambda: [pruner("weight_l2", start_epoch=2, end_epoch=4, every_n_epochs=2)], trainer=trainer)
    whole = train(setting, tmp_path)
    assert len(whole.callback.rounds.done) == 2
    files = [tmp_path / f"{name}.ckpt" for name in ("step=3", "step=4", "epoch=1-step=4")]
    wrong = {path.name: differences(train(setting, tmp_path, path, keep=0), whole) for path in files}
    assert wrong == {path.name: [] for path in files}


class Waiting(Numbered):
    """Its learning rate waits for a metric."""

    def __init__(self, monitor):
        super().__init__()
        self.monitor = monitor

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()[0][0]
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor}}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("monitor", ["val_loss", "train_loss"])
def test_a_learning_rate_that_waits_for_a_validation_gets_it_after_a_resume(tmp_path, monitor):
    rates = []
    for path in (None, *(f"step={BATCHES * epoch}.ckpt" for epoch in (1, 2, 3))):
        checkpoint = tmp_path / path if path else None
        saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=BATCHES)
        torch.manual_seed(0)
        module, callback = Waiting(monitor), pruner("weight_l2")
        trainer = trainer_of([callback, saving], max_epochs=EPOCHS, enable_checkpointing=True)
        trainer.fit(module, loader(16), loader(24, seed=1), ckpt_path=checkpoint)
        rates.append((trainer.optimizers[0].param_groups[0]["lr"], trainer.lr_scheduler_configs[0].scheduler.best))
        assert callback.plan
    assert rates[0][0] == pytest.approx(1e-2 * 0.1 ** (EPOCHS - 1))
    if monitor == "val_loss":  # that of training is not known when the run goes on
        assert rates[1:] == rates[:1] * 3


class ReadInTraining(Numbered):
    """A layer that only training runs reads one entry for each of eight neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.extra(self.net.fc1.bias).square().sum()


@pytest.mark.filterwarnings("ignore:.*cannot cut (net.fc1|extra)")
def test_what_only_training_reads_is_left_whole_by_a_run_that_goes_on_behind_a_whole_epoch_as_well(tmp_path):
    setting = Setting(lambda: [pruner("weight_l2", target_params=None, amount=0.5, end_epoch=1)])
    train(setting, tmp_path, module=ReadInTraining())
    resumed = ReadInTraining()
    train(setting, tmp_path, tmp_path / f"step={BATCHES}.ckpt", keep=0, module=resumed)
    assert [len(layer.weight) for layer in (resumed.net.conv1, resumed.net.conv2, resumed.net.fc1)] == [2, 3, 8]
