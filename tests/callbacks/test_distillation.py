"""Distillation by a callback is the distillation loss added by hand, in the epochs of the recovery and in no others."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from tests.callbacks.distilled import (
    TAUGHT,
    ByHand,
    InPlace,
    NoForward,
    Pair,
    Student,
    Twice,
    cutter,
    distance,
    distiller,
    train,
)
from tests.callbacks.modules import Net


class Scaled(MixedPrecision):
    """Scales losses as float16 on a GPU would, and computes in float32."""

    def __init__(self) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5)
        super().__init__("16-mixed", "cpu", scaler)

    def forward_context(self) -> Any:
        return nullcontext()


class FakeScaler:
    """Nothing but a scale, that is no power of two."""

    def get_scale(self) -> float:
        return 3.0

    def scale(self, loss: Tensor) -> Tensor:
        return loss * 3.0

    def unscale_(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None if p.grad is None else p.grad / 3.0

    def step(self, optimizer: Any, **kwargs: Any) -> Any:
        return optimizer.step(**kwargs)

    def update(self) -> None:
        """It stays."""

    def state_dict(self) -> dict[str, Any]:
        return {}


def fake() -> MixedPrecision:
    plugin = Scaled()
    plugin.scaler = FakeScaler()
    return plugin


CASES: dict[str, tuple[type[Student], dict[str, Any], dict[str, Any]]] = {
    "plain": (Student, {}, {}),
    "accumulated": (Student, {}, {"accumulate_grad_batches": 2, "samples": 32}),
    "accumulated, the last group partial": (Student, {}, {"accumulate_grad_batches": 2}),
    "accumulated more and more": (
        Student, {}, {"more": lambda: [GradientAccumulationScheduler({0: 1, 2: 2})], "samples": 32},
    ),
    "clipped by norm": (Student, {}, {"gradient_clip_val": 0.05}),
    "clipped by value": (Student, {}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bfloat16": (Student, {}, {"precision": "bf16-mixed"}),
    "double": (Student, {}, {"precision": "64-true"}),
    "manual": (ByHand, {}, {}),
    "scaled": (Student, {}, {"plugins": Scaled}),
    "scaled and accumulated": (Student, {}, {"plugins": Scaled, "accumulate_grad_batches": 2}),
    "scaled and clipped": (Student, {}, {"plugins": Scaled, "gradient_clip_val": 0.05}),
    "scaled and manual": (ByHand, {}, {"plugins": Scaled}),
    "without a forward": (NoForward, {}, {}),
    "without a forward, by name": (NoForward, {"output": "net"}, {}),
    "without a forward, inside": (NoForward, {"output": "net.fc2"}, {}),
    "the forward, inside": (Pair, {"output": "net.fc2"}, {}),
    "the network in the forward": (Pair, {"output": "net"}, {}),
    "two calls in a step": (Twice, {}, {}),
    "logits that are overwritten": (InPlace, {}, {}),
    "another temperature and weight": (Student, {"temperature": 5.0, "distillation_weight": 3.0}, {}),
    "the last axis": (Student, {"class_axis": -1}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_loss_added_by_hand_bit_by_bit(case):
    make, options, settings = CASES[case]
    hand = {"weight": options.get("distillation_weight", 1.0), "temperature": options.get("temperature", 2.0)}
    found = []
    for callback, module in (
        (distiller(**options), make),
        (cutter(), lambda: make(epochs=TAUGHT, **hand)),
        (cutter(), make),
    ):
        given = dict(settings)
        more = given.pop("more", list)()
        given |= {"plugins": [given["plugins"]()]} if "plugins" in given else {}
        found.append(train(module, [callback, *more], **given))
    taught, by_hand, alone = found
    assert distance(taught, by_hand) == 0
    assert distance(taught, alone) > 1e-3


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 3}, {"plugins": fake}], ids=["thirds", "times three"])
def test_with_scales_that_are_rounded_it_is_the_loss_added_by_hand_up_to_rounding(settings):
    found = []
    for callback, module in ((distiller(), Sgd), (cutter(), lambda: Sgd(epochs=TAUGHT)), (cutter(), Sgd)):
        given = {"plugins": [settings["plugins"]()]} if "plugins" in settings else settings
        found.append(train(module, [callback], samples=32, **given))
    taught, by_hand, alone = found
    assert distance(taught, by_hand) < 1e-6
    assert distance(taught, alone) > 1e-3


class Sgd(Student):
    """Does not make a large step of a small gradient."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def written_out(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    q, p = (student.double() / temperature).softmax(1), (teacher.double() / temperature).softmax(1)
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


def test_it_is_the_formula_written_out():
    options = {"temperature": 3.0, "distillation_weight": 0.7}
    taught = train(Sgd, [distiller(**options)])
    by_hand = train(lambda: Sgd(epochs=TAUGHT, temperature=3.0, weight=0.7, loss=written_out), [cutter()])
    assert distance(taught, by_hand) < 1e-6
    assert distance(taught, train(Sgd, [cutter()])) > 1e-3


@pytest.mark.parametrize("positions", [(4,), (2, 3)])
@pytest.mark.parametrize("class_axis", [1, -1])
def test_several_positions_with_classes_on_either_axis(positions, class_axis):
    class Spread(Student):
        """Says something at each of several positions."""

        def both(self, batch: Any) -> Tensor:
            logits = self(batch[0])
            first = logits if class_axis == 1 else logits.movedim(-1, 1)
            target = batch[1].view(-1, *(1 for _ in positions)).expand(-1, *positions)
            return nn.functional.cross_entropy(first, target) + self.lesson(batch[0], logits)

        def loss(self, batch: Any) -> Tensor:
            return self.both(batch)

        def lesson(self, x: Tensor, logits: Tensor) -> Any:
            self.formula = lambda *args, **kwargs: by_position(*args, class_axis=class_axis, **kwargs)
            return super().lesson(x, logits) if self.training else 0.0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    def make(**kwargs: Any) -> Student:
        return Spread(SpreadNet(positions, class_axis), **kwargs)

    taught = train(make, [distiller(class_axis=class_axis)])
    assert distance(taught, train(lambda: make(epochs=TAUGHT), [cutter()])) < 1e-6
    assert distance(taught, train(make, [cutter()])) > 1e-3


class SpreadNet(Net):
    """Logits at several positions that differ."""

    def __init__(self, positions: tuple[int, ...], class_axis: int) -> None:
        super().__init__()
        self.positions, self.class_axis = positions, class_axis

    def forward(self, x: Tensor) -> Tensor:
        factors = torch.arange(1.0, 1.0 + torch.Size(self.positions).numel()).view(self.positions)
        logits = super().forward(x)
        logits = logits.view(*logits.shape, *(1 for _ in self.positions)) * factors / 3
        return logits if self.class_axis == 1 else logits.movedim(1, -1)


def by_position(student: Tensor, teacher: Tensor, *, temperature: float, class_axis: int) -> Tensor:
    """Position by position, as if each were a sample of its own."""
    flat = [t.movedim(class_axis, -1).reshape(-1, 3) for t in (student, teacher)]
    return written_out(*flat, temperature=temperature)


ROUNDS = {"schedule": "linear", "amount": 0.5, "end_epoch": 3, "every_n_epochs": 2}


@pytest.mark.parametrize("recovery, taught", [(1, (1, 3)), (2, (1, 2, 3, 4))])
def test_in_several_rounds_the_teacher_is_the_model_before_the_first(recovery, taught):
    callback, other = distiller(recovery_epochs=recovery, **ROUNDS), cutter(**ROUNDS)
    found = train(Student, [callback], max_epochs=6)
    by_hand = train(lambda: Student(epochs=taught), [other], max_epochs=6)
    assert [one.epoch for one in callback.rounds.done] == [1, 3]
    assert [one.plan for one in callback.rounds.done] == [one.plan for one in other.rounds.done]
    assert distance(found, by_hand) == 0


@pytest.mark.parametrize("epochs, wrong", [((1,), (1, 2)), ((1, 2), (1,)), ((1, 2), (1, 2, 3)), ((1, 2, 3), (1, 2))])
def test_it_ends_by_itself(epochs, wrong):
    found = train(Student, [distiller(recovery_epochs=len(epochs))])
    assert distance(found, train(lambda: Student(epochs=epochs), [cutter()])) == 0
    assert distance(found, train(lambda: Student(epochs=wrong), [cutter()])) > 1e-4


def test_a_weight_of_nothing_is_as_if_it_were_off():
    assert distance(train(Student, [distiller(distillation_weight=0.0)]), train(Student, [cutter()])) == 0
    assert distance(train(Student, [distiller(distillation_weight=0)]), train(Student, [cutter()])) == 0
