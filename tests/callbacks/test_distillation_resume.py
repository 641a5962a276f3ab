"""A recovery that is interrupted goes on with the same teacher and ends as if nothing had happened."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_neurons import NeuronPruningCallback, load_pruned
from tests.callbacks.distilled import NoForward, Student, distiller
from tests.callbacks.modules import Net, dataset, loader, trainer_of
from tests.callbacks.pruned import assert_equal

BATCHES, EPOCHS = 3, 5
DATA = [dataset(24)[8 * number : 8 * number + 8] for number in range(BATCHES)]

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]


class Numbered(Student):
    """Takes its batch by its number, so that the rest of an epoch is the same whatever the loader begins with."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(DATA[batch_idx], batch_idx)


class NumberedNoForward(NoForward):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(DATA[batch_idx], batch_idx)


class Crash(L.Callback):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise ArithmeticError("somebody's mistake")


@dataclass
class Run:
    """What is left of a run."""

    callback: NeuronPruningCallback
    state: dict[str, Tensor]


def train(folder: Path, kind: Any = Numbered, ckpt: Any = None, extra: Any = (), **options: Any) -> Run:
    """Train and write ``last.ckpt`` after each step."""
    torch.manual_seed(4 if ckpt is None else 5)
    module, callback = kind(), distiller(**options)
    saves = ModelCheckpoint(folder, "{epoch}-{step}", save_last=True, save_top_k=-1, every_n_train_steps=1)
    trainer = trainer_of([callback, saves, *extra], max_epochs=EPOCHS, enable_checkpointing=True)
    trainer.fit(module, loader(24), loader(16, seed=1), ckpt_path=ckpt)
    state = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        state |= {f"{name}.{key}": value for key, value in trainer.optimizers[0].state[parameter].items()}
    return Run(callback, state | {"step": torch.tensor(trainer.global_step)})


def saved(path: Path, callback: NeuronPruningCallback) -> Any:
    """What a checkpoint holds of distillation; read as a checkpoint of somebody else would be."""
    return torch.load(path, weights_only=True)["callbacks"][callback.state_key]["distillation"]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A checkpoint of another model than the one that is trained, of the same architecture."""
    torch.manual_seed(11)
    module = Student()
    trainer = trainer_of([])
    trainer.fit(module, loader(24), loader(16, seed=1))
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    return tmp_path / "dense.ckpt"


SETTINGS = {
    "plain": (Numbered, {}),
    "without a forward": (NumberedNoForward, {}),
    "inside": (Numbered, {"output": "net.fc2"}),
    "two rounds": (Numbered, {"schedule": "linear", "amount": 0.5, "end_epoch": 3, "every_n_epochs": 2}),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("from_file", [False, True], ids=["in the checkpoint", "in a file"])
def test_after_a_crash_the_last_checkpoint_leads_to_the_same_end(tmp_path, dense, name, from_file):
    kind, options = SETTINGS[name]
    options = options | ({"teacher": dense} if from_file else {})
    whole = train(tmp_path / "whole", kind, **options)
    for step in (4, 5, 7, 10):  # in the first and the second epoch of the recovery, and in the one behind it
        folder = tmp_path / str(step)
        with pytest.raises(ArithmeticError, match="somebody's mistake"):
            train(folder, kind, extra=[Crash(step)], **options)
        teacher = saved(folder / "last.ckpt", whole.callback)["teacher"]
        assert (teacher is None) == (from_file or (step == 10 and name != "two rounds"))
        resumed = train(folder, kind, folder / "last.ckpt", **options)
        assert_equal(resumed.state, whole.state)
        assert resumed.callback.plan == whole.callback.plan


@pytest.mark.parametrize("name, taught", [("plain", (1, 2)), ("two rounds", (1, 2, 3, 4))])
def test_the_teacher_is_in_checkpoints_of_the_recovery_and_in_no_others(tmp_path, name, taught):
    kind, options = SETTINGS[name]
    whole = train(tmp_path, kind, **options)
    for epoch in range(EPOCHS):
        for step in range(epoch * BATCHES + 1, epoch * BATCHES + BATCHES + 1):
            found = saved(tmp_path / f"epoch={epoch}-step={step}.ckpt", whole.callback)
            assert (found["teacher"] is not None) == (epoch in taught), (epoch, step)


def test_the_teacher_in_a_checkpoint_is_the_model_before_the_cut_bit_by_bit(tmp_path):
    whole = train(tmp_path)
    before = torch.load(tmp_path / "epoch=0-step=3.ckpt", weights_only=True)["state_dict"]
    found = saved(tmp_path / "epoch=2-step=8.ckpt", whole.callback)
    assert_equal(found["teacher"], before)
    assert found["until"] == 2
    state = torch.load(tmp_path / "epoch=2-step=8.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == before.keys()
    assert any(state[name].shape != before[name].shape for name in before)


def test_a_teacher_that_is_a_file_is_never_in_a_checkpoint(tmp_path, dense):
    whole = train(tmp_path, teacher=dense)
    files = list(tmp_path.glob("epoch=*.ckpt"))
    assert len(files) == EPOCHS * BATCHES
    assert all(saved(path, whole.callback)["teacher"] is None for path in files)


def test_a_checkpoint_of_the_recovery_is_loaded_without_a_trainer(tmp_path):
    train(tmp_path)
    path = tmp_path / "epoch=1-step=5.ckpt"
    assert_equal(load_pruned(Student, path).state_dict(), torch.load(path, weights_only=True)["state_dict"])


class Wide(Net):
    """More neurons in the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = torch.nn.Conv2d(1, 9, 3, padding=1), torch.nn.BatchNorm2d(9)
        self.conv2, self.norm2 = torch.nn.Conv2d(9, 7, 3, padding=1), torch.nn.BatchNorm2d(7)
        self.fc1, self.fc2 = torch.nn.Linear(7, 12), torch.nn.Linear(12, 3)


class FromWide(Numbered):
    """Adds the loss by hand from a larger network."""

    def __init__(self, teacher: Wide) -> None:
        super().__init__(epochs=(1, 2))
        self.dense.append(teacher.eval())

    def on_train_epoch_end(self) -> None:
        """It is there already."""


@pytest.fixture
def larger() -> Wide:
    torch.manual_seed(12)
    return Wide()


FILES = {
    "a checkpoint": lambda state: {"state_dict": {f"net.{n}": t for n, t in state.items()}, "epoch": 3},
    "a state dict of the module": lambda state: {f"net.{n}": t for n, t in state.items()},
    "a state dict of the network": lambda state: state,
}


@pytest.mark.parametrize("content", FILES)
def test_a_larger_teacher_teaches_as_one_that_is_used_by_hand(tmp_path, larger, content):
    torch.save(FILES[content](larger.state_dict()), tmp_path / "teacher.pt")
    kind = NumberedNoForward if "network" in content else Numbered
    found = train(tmp_path / "a", kind, teacher=str(tmp_path / "teacher.pt")).state
    by_hand = train(tmp_path / "b", lambda: FromWide(larger), recovery=None, recovery_epochs=1).state
    assert_equal(found, by_hand)


def test_a_state_dict_of_the_network_is_no_teacher_of_a_module_whose_forward_is_taught(tmp_path, larger):
    torch.save(larger.state_dict(), tmp_path / "teacher.pt")
    with pytest.raises(MisconfigurationException, match="of another architecture than Numbered"):
        train(tmp_path / "a", teacher=tmp_path / "teacher.pt")


@pytest.mark.parametrize("kind", [Numbered, NumberedNoForward])
def test_a_whole_teacher_is_read_while_the_module_is_pruned_already(tmp_path, dense, kind):
    options = {"teacher": dense, "start_epoch": 2}
    whole = train(tmp_path / "whole", kind, **options)
    path = tmp_path / "whole" / "epoch=2-step=8.ckpt"
    widths = [len(t) for t in torch.load(path, weights_only=True)["state_dict"].values() if t.ndim]
    assert widths != [len(t) for t in torch.load(dense, weights_only=True)["state_dict"].values() if t.ndim]
    resumed = train(tmp_path / "again", kind, path, **options)
    assert_equal(resumed.state, whole.state)
