"""Calls of a training epoch in Lightning's order, on a copy of a module; no optimizer and no scheduler steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_neurons.callbacks.pruning.moments import Moment, Move
from lightning_neurons.callbacks.pruning.stand_ins import OptimizerStandIn
from lightning_neurons.callbacks.trainer.checks import overrides
from lightning_neurons.callbacks.trainer.namespaces import Trainer
from lightning_neurons.callbacks.trainer.steps import step_arguments
from lightning_neurons.data.batches import map_tensors
from lightning_neurons.errors import in_short


class HookError(Exception):
    """A hook of the user's has failed.

    Attributes:
        hook: The name of the hook.
        key: Its owner (None for the module) and its name.
    """

    def __init__(self, owner: object, hook: str, error: Exception) -> None:
        super().__init__(in_short(error))
        self.hook, self.key = hook, (owner, hook)


class Course:
    """A training loop that calls a module's steps and the hooks of module and callbacks around them.

    Args:
        trainer: The Trainer.
        move: Sets its counters to those of a moment.
        twin: A copy of its module, with stand-ins for optimizers.
        callbacks: The callbacks whose hooks are called.
        untried: Hooks that are not called, as in ``HookError.key``.
        look: Called where all gradients of a step are there, and before they are clipped.
    """

    def __init__(
        self,
        trainer: Trainer,
        move: Move,
        twin: Any,
        callbacks: Sequence[Any],
        untried: set[tuple[Any, str]],
        look: Callable[[], None],
    ) -> None:
        self._trainer, self._twin, self._callbacks, self._untried = trainer, twin, callbacks, untried
        self._look, self._move, self._epoch = look, move, -1
        self._modes = {name: module.training for name, module in twin.named_modules()}

    def step(self, batch: object, moment: Moment) -> None:
        """Run a training step on a batch; before the first of an epoch, the hooks of its start.

        Raises:
            HookError: If the step or a hook fails.
        """
        twin, batch_idx = self._twin, moment.batch_idx
        self._move(moment, is_over=False)
        if self._epoch != moment.epoch:
            self._call("on_train_epoch_start")
        self._epoch = moment.epoch
        twin.zero_grad()
        batch = map_tensors(batch, Tensor.clone)
        if self._call("on_train_batch_start", batch, batch_idx) == -1:
            return
        optimizers: Any = twin.optimizers()
        optimizer: OptimizerStandIn | None = (
            optimizers[0] if isinstance(optimizers, list) and optimizers else optimizers
        )
        results: list[Any] = []

        def closure() -> Any:
            arguments = step_arguments(self._trainer, twin, "training_step", batch_idx, 0)
            results.append(self._guarded(None, "training_step", batch, *arguments))
            loss = results[-1].get("loss") if isinstance(results[-1], Mapping) else results[-1]
            if twin.automatic_optimization and optimizer and isinstance(loss, Tensor) and loss.requires_grad:
                self._optimize(optimizer, loss, batch_idx)
            return loss

        if twin.automatic_optimization and self._is_tried("optimizer_step"):
            self._guarded(None, "optimizer_step", self._trainer.current_epoch, batch_idx, optimizer, closure)
        else:
            closure()
        if not twin.automatic_optimization:
            self._look()
        self._move(moment, is_over=True)
        out = results[-1] if results else None
        self._call("on_train_batch_end", {"loss": out.detach()} if isinstance(out, Tensor) else out, batch, batch_idx)

    def _optimize(self, optimizer: OptimizerStandIn, loss: Tensor, batch_idx: int) -> None:
        self._call("on_before_zero_grad", optimizer)
        self._own("optimizer_zero_grad", self._trainer.current_epoch, batch_idx, optimizer)
        self._call("on_before_backward", loss)
        self._guarded(None, "backward", loss)
        self._call("on_after_backward")
        self._call("on_before_optimizer_step", optimizer)
        self._look()
        self._own(
            "configure_gradient_clipping",
            optimizer,
            self._trainer.gradient_clip_val,
            self._trainer.gradient_clip_algorithm,
        )

    def end(self, batch: object, moment: Moment) -> None:
        """Run the end of an epoch, with one batch of its validation, or none if that is None.

        Raises:
            HookError: If the step or a hook fails.
        """
        self._move(moment, is_over=True)
        self._trainer.validating = True
        self._own("on_validation_model_zero_grad")
        self._twin.eval()
        self._own("on_validation_model_eval")
        with torch.no_grad():
            self._call("on_validation_start")
            self._call("on_validation_epoch_start")
            if batch is not None and self._is_tried("validation_step"):
                batch = map_tensors(batch, Tensor.clone)
                self._call("on_validation_batch_start", batch, 0)
                arguments = step_arguments(self._trainer, self._twin, "validation_step", 0, 0)
                out = self._guarded(None, "validation_step", batch, *arguments)
                self._call("on_validation_batch_end", out, batch, 0)
        self.finish()

    def finish(self) -> None:
        """Call the hooks after the last batch of a validation, up to a checkpoint of the epoch.

        Raises:
            HookError: If a hook fails.
        """
        with torch.no_grad():
            self._call("on_validation_epoch_end")
            self._call("on_validation_end")
        self._own("on_validation_model_train")
        for name, module in self._twin.named_modules():
            module.training = self._modes.get(name, module.training)
        self._trainer.training = True
        if self._twin.automatic_optimization:
            schedulers = self._twin.lr_schedulers()
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers] if schedulers else []:
                self._own("lr_scheduler_step", scheduler, None)
        self._call("on_train_epoch_end")
        self._call(
            "on_save_checkpoint",
            {
                "epoch": self._trainer.current_epoch,
                "global_step": self._trainer.global_step,
                "state_dict": self._twin.state_dict(),
            },
        )

    def _call(self, hook: str, *args: object) -> Any:
        """Call a hook of the user's callbacks, which may hold averages or masks, and of the module.

        Returns:
            What the module's hook returns; None if it has none.
        """
        for callback in self._callbacks:
            self._guarded(callback, hook, self._trainer, self._twin, *args)
        return self._own(hook, *args)

    def _own(self, hook: str, *args: object) -> Any:
        return self._guarded(None, hook, *args) if overrides(self._twin, hook) else None

    def _is_tried(self, hook: str) -> bool:
        return overrides(self._twin, hook) and (None, hook) not in self._untried

    def _guarded(self, owner: object, hook: str, *args: object) -> Any:
        """Return the result of a method of a callback, or for None of the module."""
        if (owner, hook) in self._untried:
            return None
        try:
            return getattr(self._twin if owner is None else owner, hook)(*args)
        except HookError:  # of what has been called inside
            raise
        except Exception as error:
            raise HookError(owner, hook, error) from error
