"""What cannot be distilled is said before anything has been cut, and what can be done about it."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_neurons import NeuronPruningCallback
from tests.callbacks.distilled import NoForward, Pair, Student, distiller
from tests.callbacks.modules import Net, Plain, loader, trainer_of
from tests.callbacks.pruned import assert_equal, assert_refused, weights, widths
from tests.callbacks.refusals import not_refused

pytestmark = pytest.mark.filterwarnings("ignore:.*it is not in the model's graph")

WRONG = [
    ({"temperature": 0}, "temperature=0 is not allowed: expected a number above 0"),
    ({"temperature": -1.0}, "temperature=-1.0 is not allowed"),
    ({"temperature": math.inf}, "temperature=inf is not allowed"),
    ({"temperature": math.nan}, "temperature=nan is not allowed"),
    ({"temperature": "warm"}, "temperature='warm' is not allowed"),
    ({"temperature": True}, "temperature=True is not allowed"),
    ({"temperature": None}, "temperature=None is not allowed"),
    ({"distillation_weight": -0.1}, "distillation_weight=-0.1 is not allowed: expected a number of at least 0"),
    ({"distillation_weight": math.nan}, "distillation_weight=nan is not allowed"),
    ({"distillation_weight": math.inf}, "distillation_weight=inf is not allowed"),
    ({"distillation_weight": "1"}, "distillation_weight='1' is not allowed"),
    ({"class_axis": 0}, "class_axis=0 is not allowed"),
    ({"class_axis": 1.0}, "class_axis=1.0 is not allowed"),
    ({"class_axis": True}, "class_axis=True is not allowed"),
    ({"output": 3}, "output=3 is not allowed"),
    ({"output": nn.Linear(2, 2)}, "output="),
    ({"teacher": nn.Linear(2, 2)}, "teacher='Linear' is not allowed: expected the path of a checkpoint"),
    ({"teacher": "nowhere.ckpt"}, "teacher='nowhere.ckpt' is not allowed.*there is no such file"),
    ({"teacher": "."}, "teacher='.' is not allowed.*there is no such file"),
    ({"recovery": "other"}, "recovery='other' is not allowed: expected one of 'distill'"),
    ({"recovery": "distil"}, "did you mean 'distill'"),
    ({"recovery": True}, "recovery=True is not allowed"),
    ({"recovery_epochs": 0}, "recovery_epochs=0 is not allowed"),
    ({"recovery_epochs": 3, "schedule": "linear", "end_epoch": 5}, "recovery_epochs=3 is not allowed"),
]
ALONE = [
    ({"temperature": 3.0}, "temperature=3.0 is not allowed: expected 2.0 without recovery=.distill."),
    ({"distillation_weight": 0.5}, 'distillation_weight=0.5 is not allowed: expected 1.0 without recovery="distill"'),
    ({"output": "net"}, "output='net' is not allowed: expected None without recovery=\"distill\""),
    ({"class_axis": -1}, 'class_axis=-1 is not allowed: expected 1 without recovery="distill"'),
    ({"teacher": "a.ckpt"}, "teacher='a.ckpt' is not allowed: expected None without recovery=\"distill\""),
    ({"recovery_epochs": 2}, "recovery_epochs=2 is not allowed"),
]


def test_arguments_are_refused_at_once():
    assert not_refused(partial(NeuronPruningCallback, amount=0.3, recovery="distill"), WRONG) == {}
    assert not_refused(partial(NeuronPruningCallback, amount=0.3), ALONE) == {}


class TwoNetworks(NoForward):
    """Which of them makes the logits is not for us to know."""

    def __init__(self) -> None:
        super().__init__()
        self.critic, self.nothing = nn.Linear(3, 1), nn.ReLU()


@pytest.mark.parametrize(
    "module, options, message",
    [
        (Student, {"output": "net.fc3"}, "output: nothing matches 'net.fc3'. Did you mean 'net.fc"),
        (Student, {"output": "model"}, "output: nothing matches 'model'"),
        (Student, {"output": ""}, "output: nothing matches ''"),
        (TwoNetworks, {}, r"TwoNetworks has no forward.*pass output= .*\['net', 'critic'\]"),
        (TwoNetworks, {"output": "net.fc"}, "output: nothing matches 'net.fc'. Did you mean 'net.fc"),
    ],
)
def test_logits_that_are_nowhere_are_an_error_before_training(module, options, message):
    assert_refused(module(), message, [distiller(**options)])


def test_one_of_several_networks_can_be_named():
    callback = distiller(output="net")
    trainer = trainer_of([callback], max_epochs=4)
    trainer.fit(module := Named(), loader(), loader(24, seed=1))
    assert len(callback.plan) > 0
    assert widths(module) == callback.rounds.widths()


class Named(TwoNetworks):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), 0.01)


class BesideForward(Plain):
    """Calls its network and not its forward."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class WithoutGradients(Plain):
    """Its logits have no gradients: only its last layer is trained, on what was computed without them."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            logits = self(batch[0])
        return self.net.fc2.weight.square().sum() + logits.mean()


class Unused(NoForward):
    """Has a network beside the one that is used."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Net()


class OneOutput(Plain):
    """A regression."""

    def __init__(self) -> None:
        super().__init__()
        self.net.fc2 = nn.Linear(8, 1)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self(batch[0])[:, 0], batch[1].float())


class Flat(Plain):
    """Returns one number for each sample."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).sum(1)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1].float())


LATE = {
    "the forward is not run": (BesideForward, {}, r"BesideForward.training_step did not run its forward.*\['net'\]"),
    "no gradients": (WithoutGradients, {}, "did not run its forward with gradients"),
    "another network is run": (Unused, {"output": "other"}, "did not run output='other'.*'net', 'other'"),
    "two tensors": (Pair, {}, r"has 2 tensors that could be logits \[\(8, 3\), \(8, 3\)\]; pass output="),
    "one class": (OneOutput, {}, r"an output of shape \(8, 1\) has no logits of several classes"),
    "no classes": (Flat, {}, r"an output of shape \(8,\) has no logits of several classes"),
    "an inner module without classes": (Student, {"output": "net.norm1", "class_axis": 7}, "axis 7"),
    "no such axis": (Student, {"class_axis": 2}, "axis 2"),
}


class Steps(L.Callback):
    """Counts batches that came to an end, and widths seen."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.ended += 1


@pytest.mark.parametrize("name", LATE)
def test_logits_that_do_not_come_by_are_an_error_before_anything_is_cut(name):
    kind, options, message = LATE[name]
    module, steps, callback = kind(), Steps(), distiller(**options)
    before, shapes = widths(module), {n: w.shape for n, w in weights(module).items()}
    with pytest.raises(MisconfigurationException, match=message):
        trainer_of([callback, steps], max_epochs=4).fit(module, loader(), loader(24, seed=1))
    assert steps.ended <= 4, "the first epoch"
    assert widths(module) == before
    assert {n: w.shape for n, w in weights(module).items()} == shapes
    assert not callback.plan
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())


def deeper() -> dict[str, Tensor]:
    return {f"net.{n}": t for n, t in Net().state_dict().items()} | {"net.fc3.weight": torch.zeros(3, 3)}


def shallower() -> dict[str, Tensor]:
    return {f"net.{n}": t for n, t in Net().state_dict().items() if "norm2" not in n}


def other_kernels() -> dict[str, Tensor]:
    return {f"net.{n}": t for n, t in Net().state_dict().items()} | {"net.conv1.weight": torch.zeros(4, 1, 5, 5)}


def classes(count: int) -> dict[str, Tensor]:
    head = {"net.fc2.weight": torch.zeros(count, 8), "net.fc2.bias": torch.zeros(count)}
    return {f"net.{n}": t for n, t in Net().state_dict().items()} | head


TEACHERS: dict[str, tuple[Any, str]] = {
    "deeper": (deeper, "is of another architecture than Student: .*net.fc3.weight"),
    "shallower": (shallower, "is of another architecture than Student: .*net.norm2"),
    "other kernels": (other_kernels, "is of another architecture than Student: .*net.conv1.weight"),
    "nothing": (dict, "is of another architecture than Student"),
    "of no checkpoint": (lambda: {"state_dict": None}, "to be a checkpoint of a Student .*could not be read"),
    "a tensor": (lambda: torch.zeros(3), "to be a checkpoint of a Student .*could not be read"),
    "a list": (lambda: [1, 2], "to be a checkpoint of a Student .*could not be read"),
    "a pickled module": (Net, "to be a checkpoint of a Student .*could not be read"),
    "more classes": (lambda: classes(4), r"have the shape \(8, 4\), those of the model \(8, 3\).*the same classes"),
    "fewer classes": (lambda: classes(2), r"have the shape \(8, 2\), those of the model \(8, 3\).*the same classes"),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_that_cannot_teach_is_refused_before_the_first_step(tmp_path, name):
    make, message = TEACHERS[name]
    torch.save(make(), tmp_path / "teacher.pt")
    assert_refused(Student(), message, [distiller(teacher=tmp_path / "teacher.pt")])


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path: Path = tmp_path / "teacher.pt"
    path.write_bytes(content)
    assert_refused(Student(), "teacher=.*teacher.pt.* to be a checkpoint of a Student", [distiller(teacher=path)])


def test_a_file_that_has_gone_since_is_refused(tmp_path):
    path = tmp_path / "teacher.pt"
    torch.save(Student().state_dict(), path)
    callback = distiller(teacher=path)
    path.unlink()
    assert_refused(Student(), "it could not be read .FileNotFoundError", [callback])


def test_after_a_refusal_the_callback_can_be_used_with_another_module():
    callback = distiller()
    with pytest.raises(MisconfigurationException, match="did not run its forward"):
        trainer_of([callback], max_epochs=4).fit(BesideForward(), loader(), loader(24, seed=1))
    module, before = Student(), Student().state_dict()
    trainer_of([callback], max_epochs=4).fit(module, loader(), loader(24, seed=1))
    assert len(callback.plan) > 0
    assert before.keys() == module.state_dict().keys()
    with pytest.raises(AssertionError):
        assert_equal(module.state_dict(), before)
