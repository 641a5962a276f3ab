"""Stand-ins for optimizers, schedulers and the Trainer, so that a step can run on a copy and change nothing else."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer
from lightning_neurons.data.batches import map_tensors


class OptimizerStandIn:
    """An optimizer for a training step on a copy: it accepts all calls, and changes no parameter.

    Args:
        optimizer: The optimizer.
        places: By the identity of a parameter, that of the copy.
        listen: Called where the optimizer would step, unless it is None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, places: dict[int, nn.Parameter], listen: Any) -> None:
        self.defaults = dict(optimizer.defaults)
        self.state: dict[Any, Any] = {}
        self.param_groups = [
            {**group, "params": [places.get(id(p), p) for p in group["params"]]} for group in optimizer.param_groups
        ]
        self._listen = listen

    @property
    def optimizer(self) -> "OptimizerStandIn":
        """The optimizer itself, as ``LightningOptimizer.optimizer`` gives it."""
        return self

    def step(self, closure: Any = None, **_: object) -> Any:
        """Run the closure, then call ``listen``, as gradients are complete; no parameter changes.

        Returns:
            What the closure returns; None without one.
        """
        value = None if closure is None else closure()
        if self._listen is not None:
            self._listen()
        return value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients to None."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def toggle_model(self, **_: object) -> Any:
        """Return a context manager that does nothing."""
        return nullcontext()


class SchedulerStandIn:
    """A learning rate scheduler that never changes the learning rate."""

    def __init__(self, scheduler: Any) -> None:
        self.last_epoch = getattr(scheduler, "last_epoch", 0)
        self._last = list(getattr(scheduler, "_last_lr", []))

    def step(self, *_: object, **__: object) -> None:
        """Do nothing."""

    def get_last_lr(self) -> list[Any]:
        """Return the current learning rates."""
        return self._last


def stand_in(trainer: Trainer, pl_module: LightningModule, twin: Any, listen: Any) -> dict[str, Any]:
    """Return attributes for a copy of a module that replace the methods which would change its Trainer.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        twin: The copy.
        listen: Called where an optimizer would step, unless it is None.

    Returns:
        The replacements by attribute name.
    """
    named = dict(twin.named_parameters(remove_duplicate=False))
    places = {id(p): named[n] for n, p in pl_module.named_parameters(remove_duplicate=False)}
    optimizers = [OptimizerStandIn(one, places, listen) for one in trainer.optimizers]
    schedulers = [SchedulerStandIn(config.scheduler) for config in trainer.lr_scheduler_configs]
    world = trainer.world_size

    def gather(data: Any, *_: object, **__: object) -> Any:
        return map_tensors(data, lambda t: t if world == 1 else torch.stack([t] * world))

    def backward(loss: Tensor, *args: object, **kwargs: object) -> None:
        loss.backward(*args, **kwargs)

    return {
        **dict.fromkeys(("log", "log_dict", "print", "toggle_optimizer", "untoggle_optimizer"), nothing),
        "clip_gradients": nothing,
        "manual_backward": backward,
        "all_gather": gather,
        "optimizers": lambda *_, **__: optimizers[0] if len(optimizers) == 1 else optimizers,
        "lr_schedulers": lambda: _one_or_all(schedulers),
    }


def _one_or_all(found: list[Any]) -> Any:
    return None if not found else found[0] if len(found) == 1 else found


def nothing(*_: object, **__: object) -> None:
    """Do nothing, in the place of a method with side effects."""
