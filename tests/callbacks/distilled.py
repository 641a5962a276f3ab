"""What the tests of distillation share: modules that can also add the loss by hand, and how they are trained."""

import copy
from typing import Any

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn

from lightning_neurons import NeuronPruningCallback
from lightning_neurons.pruning.distillation import distillation_loss
from tests.callbacks.modules import Net, Plain, loader, trainer_of
from tests.callbacks.pruned import pruner

EPOCHS, START, RECOVERY = 4, 1, 2
"""The cut is made when epoch 1 begins, epochs 1 and 2 are the recovery, and epoch 3 follows it."""

TAUGHT = (1, 2)


class Student(Plain):
    """Adds the loss by hand in some epochs, from a copy of its network as it was before the first cut."""

    def __init__(
        self,
        net: nn.Module | None = None,
        *,
        epochs: tuple[int, ...] = (),
        weight: float = 1.0,
        temperature: float = 2.0,
        loss: Any = distillation_loss,
    ) -> None:
        super().__init__(net)
        self.epochs, self.weight, self.temperature, self.formula = epochs, weight, temperature, loss
        self.dense: list[nn.Module] = []  # in a list, so that it is no part of the module

    def on_train_epoch_end(self) -> None:
        if self.epochs and self.current_epoch == START - 1:
            self.dense.append(copy.deepcopy(self.net).eval())

    def lesson(self, x: Tensor, logits: Tensor) -> Tensor | float:
        if self.current_epoch not in self.epochs:
            return 0.0
        with torch.no_grad():
            teacher = self.dense[0](x)
        return self.weight * self.formula(logits, teacher, temperature=self.temperature)

    def both(self, batch: Any) -> Tensor:
        """The loss of the task, and that of the lesson."""
        logits = self(batch[0])
        return nn.functional.cross_entropy(logits, batch[1]) + self.lesson(batch[0], logits)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.both(batch)


class NoForward(Student):
    """Calls its network."""

    forward = L.LightningModule.forward

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def both(self, batch: Any) -> Tensor:
        logits = self.net(batch[0])
        return nn.functional.cross_entropy(logits, batch[1]) + self.lesson(batch[0], logits)


class Pair(Student):
    """Its forward returns something else beside the logits, so it has to be said where they are."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(x)
        return logits.log_softmax(1), logits

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.nll_loss(self(batch[0])[0], batch[1])

    def both(self, batch: Any) -> Tensor:
        probabilities, logits = self(batch[0])
        return nn.functional.nll_loss(probabilities, batch[1]) + self.lesson(batch[0], logits)


class Twice(Student):
    """Two views of each sample."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.both(batch) + self.both((batch[0].flip(-1) + 0.1, batch[1]))


class InPlace(Student):
    """Overwrites its logits."""

    def both(self, batch: Any) -> Tensor:
        logits = self(batch[0])
        lesson = self.lesson(batch[0], logits)
        logits.mul_(0.5).add_(1.0)
        return nn.functional.cross_entropy(logits, batch[1]) + lesson


class ByHand(Student):
    """Steps its optimizer itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.both(batch))
        optimizer.step()


class Counting(Net):
    """Notes every forward of itself and of its copies, with the mode and whether gradients were on."""

    calls: list[tuple[bool, bool]] = []  # noqa: RUF012 (copies share it, that is what it is for)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.training, torch.is_grad_enabled()))
        return super().forward(x)


def distiller(**kwargs: Any) -> NeuronPruningCallback:
    """A third of all neurons, and two epochs with a teacher."""
    return pruner("weight_l2", **({"recovery": "distill", "recovery_epochs": RECOVERY} | kwargs))


def cutter(**kwargs: Any) -> NeuronPruningCallback:
    """The same cuts without a teacher."""
    return pruner("weight_l2", **kwargs)


def train(make: Any, callbacks: list[Any], *, samples: int = 24, ckpt: Any = None, **kwargs: Any) -> Any:
    """Make a module and train it; everything that is drawn is the same each time."""
    torch.manual_seed(3)
    module = make()
    trainer = trainer_of(callbacks, **({"max_epochs": EPOCHS} | kwargs))
    torch.manual_seed(4)
    trainer.fit(module, loader(samples, shuffle=True), loader(16, seed=1), ckpt_path=ckpt)
    return module


def distance(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of two modules' parameters and buffers."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in ours)
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)
