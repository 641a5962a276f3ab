"""What comes back is what was there, bit for bit; and training goes on from it as if there had been no cut."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim import SGD, AdamW, lr_scheduler

from tests.callbacks.guarded import (
    Scaling,
    Scored,
    by_epoch,
    differences,
    guard,
    hidden,
    identities,
    optimizers,
    state_of,
)
from tests.callbacks.modules import Net, fit, loader
from tests.callbacks.pruned import Probe

pytestmark = pytest.mark.filterwarnings("ignore:.*(nothing has|all cuts have) been", "ignore:.*1 round taken back")
SCORES = by_epoch(0.75, 0.25, 0.75)  # the cut of epoch 1 is taken back when epoch 2 begins


class Module(Scored):
    """Has dropout, and a buffer that is in no checkpoint; its optimizer and scheduler are those of the case."""

    def __init__(self, optimizers: Callable[[Any], Any]) -> None:
        super().__init__(SCORES, Net(dropout=0.5))
        self.make = optimizers
        self.register_buffer("steps_done", torch.zeros(()), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps_done = self.steps_done + 1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return self.make(self)


class TwoByHand(Module):
    """Steps two optimizers itself, and schedulers when an epoch ends."""

    def __init__(self, optimizers: Callable[[Any], Any]) -> None:
        super().__init__(optimizers)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def on_train_epoch_end(self) -> None:
        for scheduler in self.lr_schedulers():
            scheduler.step()


def one_cycle(module: nn.Module) -> Any:
    optimizer = AdamW(module.parameters(), 1e-2)
    cycle = lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=60)
    return [optimizer], [{"scheduler": cycle, "interval": "step"}]


def in_steps(module: nn.Module) -> Any:
    optimizer = AdamW(module.parameters(), 1e-2, amsgrad=True)
    return [optimizer], [lr_scheduler.StepLR(optimizer, 1, 0.7)]


def momentum(module: nn.Module) -> Any:
    decays, others = [p for p in module.parameters() if p.ndim > 1], [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "lr": 0.02}]
    optimizer = SGD(groups, 0.05, momentum=0.9, nesterov=True)
    first, then = lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.MultiStepLR(optimizer, [2, 3])
    return [optimizer], [lr_scheduler.SequentialLR(optimizer, [first, then], [1])]


def plateau(module: nn.Module) -> Any:
    optimizer = SGD(module.parameters(), 0.05, momentum=0.9)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": lr_scheduler.ReduceLROnPlateau(optimizer, patience=0), "monitor": "val_loss"},
    }


class Sharpness(torch.optim.Optimizer):
    """Takes the gradient a little uphill (SAM), and lets another optimizer step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.base = SGD(self.param_groups, 0.05, momentum=0.9)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for p in parameters:
                self.state[p]["here"] = p.detach().clone()
                p.add_(p.grad, alpha=0.05)
        closure()
        with torch.no_grad():
            for p in parameters:
                p.copy_(self.state[p]["here"])
        self.base.step()
        return loss


def sharpness(module: nn.Module) -> Any:
    return Sharpness(module.parameters())


def two(module: Any) -> Any:
    first = AdamW([*module.net.conv1.parameters(), *module.net.conv2.parameters()], 1e-2)
    mine = {id(p) for p in first.param_groups[0]["params"]}
    second = SGD([p for p in module.parameters() if id(p) not in mine], 0.05, momentum=0.9)
    return [first, second], [lr_scheduler.StepLR(first, 1, 0.7), lr_scheduler.ExponentialLR(second, 0.9)]


@dataclass
class Case:
    optimizers: Callable[[Any], Any] = in_steps
    module: type[Module] = Module
    callbacks: Callable[[], list[Any]] = list
    trainer: Callable[[], dict[str, Any]] = field(default=dict)


CASES = {
    "AdamW, OneCycle": Case(one_cycle),
    "AMSGrad, StepLR": Case(in_steps),
    "momentum, groups, SequentialLR": Case(momentum),
    "momentum, plateau": Case(plateau),
    "accumulation": Case(one_cycle, trainer=lambda: {"accumulate_grad_batches": 3}),
    "two by hand": Case(two, TwoByHand),
    "one in another": Case(sharpness),
    "EMA": Case(callbacks=lambda: [EMAWeightAveraging(decay=0.9)]),
    "averages with buffers": Case(momentum, callbacks=lambda: [WeightAveraging(use_buffers=True)]),
    "precision": Case(trainer=lambda: {"plugins": [Scaling()]}),
    "bfloat16": Case(trainer=lambda: {"precision": "bf16-mixed"}),
    "double": Case(trainer=lambda: {"precision": "64-true"}),
}
with_each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Recording(L.Callback):
    """The state, the objects and the random state when each epoch begins, and the state when training ends."""

    def __init__(self) -> None:
        self.states: dict[int, Any] = {}
        self.objects: dict[int, Any] = {}
        self.random: dict[int, Tensor] = {}
        self.end: Any = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.states[trainer.current_epoch] = state_of(trainer, pl_module)
        self.objects[trainer.current_epoch] = identities(trainer, pl_module)
        self.random[trainer.current_epoch] = torch.get_rng_state()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.end = state_of(trainer, pl_module)


class Given(L.Callback):
    """Gives a run a state when epoch 2 begins, by plain assignment: what a roll-back has to amount to."""

    def __init__(self, state: dict[str, Any], random: Tensor) -> None:
        self.state, self.random = copy.deepcopy(state), random

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch != 2:
            return
        averages = [c._average_model for c in trainer.callbacks if hasattr(c, "_average_model")]
        for model, saved in zip([pl_module, *averages], [self.state["model"], *self.state["averages"]], strict=True):
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                with torch.no_grad():
                    tensor.copy_(saved[name])
        for one, saved in zip(optimizers(trainer), self.state["optimizers"], strict=True):
            one.load_state_dict(saved)
        for config, saved in zip(trainer.lr_scheduler_configs, self.state["schedulers"], strict=True):
            config.scheduler.load_state_dict(saved)
        trainer.precision_plugin.load_state_dict(self.state["precision"])
        torch.set_rng_state(self.random)


def run(case: Case, *callbacks: Any) -> Module:
    torch.manual_seed(3)
    module = case.module(case.optimizers)
    fit(module, [*case.callbacks(), *callbacks], loader(shuffle=True), max_epochs=5, **case.trainer())
    return module


@with_each_case
def test_right_after_a_roll_back_everything_is_as_it_was_right_before_the_cut(case):
    before, after = Recording(), Recording()
    run(case, before, guard(), after)
    assert differences(after.states[2], before.states[1]) == []
    assert len(differences(before.states[2], before.states[1])) > 10
    assert after.objects[2] == before.objects[1]
    assert after.objects[2]["sizes"] == before.objects[0]["sizes"] != before.objects[2]["sizes"]


@with_each_case
def test_after_a_roll_back_training_goes_on_as_without_the_cut_from_the_same_state(case):
    before, after = Recording(), Recording()
    module = run(case, before, guard(), after)
    assert hidden(module) == 18
    plain = Recording()
    run(case, Given(before.states[1], after.random[2]), plain)
    for epoch in (2, 3, 4):
        assert differences(after.states[epoch], plain.states[epoch]) == [], epoch
    assert differences(after.end, plain.end) == []
    assert len(differences(plain.end, before.states[1])) > 10  # it has been trained
    assert len(differences(plain.states[1], before.states[2])) > 10


@with_each_case
def test_a_cut_at_the_end_of_training_is_taken_back_bit_for_bit(case):
    before, ended = Recording(), Probe("on_fit_end", state_of)
    torch.manual_seed(3)
    module = case.module(case.optimizers)
    fit(module, [before, guard(), ended], loader(shuffle=True), max_epochs=2, **case.trainer())
    assert differences(next(iter(ended.seen.values())), before.states[1] | {"averages": []}) == []


@pytest.mark.filterwarnings("ignore:.*cannot cut tied")
def test_tied_weights_stay_tied():
    class Tied(Scored):
        def __init__(self) -> None:
            super().__init__(SCORES)
            self.tied = nn.Linear(8, 3)
            self.tied.weight = self.net.fc2.weight

    module, before, after = Tied(), Recording(), Recording()
    fit(module, [before, guard(ignore=["net.fc1"]), after], max_epochs=3)
    assert module.tied.weight is module.net.fc2.weight
    assert differences(after.states[2], before.states[1]) == []


def test_state_of_another_type_than_its_parameter_comes_back_in_its_own_type():
    class Precise(SGD):
        """Counts in whole numbers, and averages in double precision."""

        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                state = self.state[parameter]
                state["seen"] = state.get("seen", torch.zeros((), dtype=torch.int64)) + 2**24 + 1
                state["average"] = state.get("average", torch.zeros_like(parameter).double()) * 0.9 + parameter.detach()
            return loss

    module, before, after = Module(lambda m: Precise(m.parameters(), 0.05)), Recording(), Recording()
    fit(module, [before, guard(), after], max_epochs=3)
    assert differences(after.states[2], before.states[1]) == []
