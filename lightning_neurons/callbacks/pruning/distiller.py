"""Distillation from the model before a cut into the one after it, without any change of ``training_step``.

A hook on the logits adds the gradient of the distillation loss to theirs, scaled like the loss that Lightning
differentiates, so that weights change as with the loss added in ``training_step`` (Hinton et al. 2015, section 2).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_neurons.callbacks.pruning.part import Fit, Part
from lightning_neurons.callbacks.pruning.recovery_settings import Distillation
from lightning_neurons.callbacks.pruning.teachers import find_logits, from_state, read_teacher, state_of
from lightning_neurons.callbacks.trainer.namespaces import Trainer
from lightning_neurons.callbacks.trainer.steps import networks_of
from lightning_neurons.data.batches import map_tensors
from lightning_neurons.errors import PruningError
from lightning_neurons.isolation.isolation import kept_random_state
from lightning_neurons.pruning.cut import Cut
from lightning_neurons.pruning.distillation import checked_logits, distillation_gradient
from lightning_neurons.pruning.rounds import PruningRound
from lightning_neurons.pruning.structure.example import twin_of
from lightning_neurons.pruning.surgery.surgery import Operation

PATIENCE = 10
"""Number of batches in one of which the logits must be computed: a training step may leave some out."""


@final
class Distiller(Part):
    """A part with hooks that add the gradient of the distillation loss during the recovery of a cut.

    Args:
        who: The callback, for messages.
        how: The settings.

    Attributes:
        until: The last epoch of the recovery.
    """

    def __init__(self, who: str, how: Distillation) -> None:
        self.who, self.how = who, how
        self.until = -1
        self._teacher: nn.Module | None = None
        self._saved: dict[str, Tensor] | None = None
        self._hooks: list[Any] = []
        self._watched: set[int] = set()
        self._inputs: tuple[str, tuple[Any, ...], dict[str, Any]] | None = None
        self._heard = self._teaches = False
        self._batches = 0
        self._output = ""
        self._trainer: Trainer | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher's weights, unless it is a file, and the last epoch of its recovery."""
        weights = self._saved
        if self._teacher is not None and self.how.teacher is None:
            weights = state_of(self._teacher)
        return {"distillation": {"until": self.until, "teacher": weights}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint; of one without distillation, nothing."""
        own = state.get("distillation")
        if own is not None:
            self.until, self._saved, self._teacher = own["until"], own["teacher"], None

    def forget(self) -> None:
        """Drop the teacher, as another model is trained now."""
        self.until, self._teacher, self._saved = -1, None, None

    def on_fit_start(self, fit: Fit, *, is_resumed: bool) -> None:
        """Find the module that makes the logits, and read the teacher.

        Raises:
            MisconfigurationException: If there is no such module, or the teacher is not one of this architecture.
        """
        root, _, self._output = find_logits(self.who, fit.pl_module, self.how.output)
        if self.how.teacher is not None and self._teacher is None:
            self._teacher = read_teacher(self.who, Path(self.how.teacher), fit.pl_module, root)
        elif self._saved is not None:
            self._teacher, self._saved = from_state(root, self._saved), None

    def before_cut(self, fit: Fit, cut: Cut) -> str | None:
        """Copy the model before the first cut as the teacher.

        Returns:
            None: nothing is in the way of the cut.
        """
        if self._teacher is None:
            root, _, _ = find_logits(self.who, fit.pl_module, self.how.output)
            self._teacher = twin_of(root).requires_grad_(False)
        return None

    def during_cut(self, fit: Fit, made: PruningRound, operation: Operation) -> None:
        """Record until when the cut recovers."""
        operation.keep(self)
        self.until = fit.trainer.current_epoch + fit.settings.recovery_epochs - 1

    def during_undo(self, fit: Fit, operation: Operation) -> None:
        """Record that nothing recovers."""
        operation.keep(self)
        self.until = -1

    def on_train_start(self, fit: Fit) -> None:
        """Register the hooks before the first batch, so that an error about logits comes before a cut.

        They add nothing before the first cut.
        """
        pl_module, trainer = fit.pl_module, fit.trainer
        self.leave()
        self._trainer, self._heard, self._batches = trainer, False, 0
        self._teaches = trainer.current_epoch <= self.until  # a resume may leave the beginning of the epoch out
        root, sources, self._output = find_logits(self.who, pl_module, self.how.output)
        output = root.get_submodule(self._output)
        self._watched = {id(output), *(id(root.get_submodule(path)) for path in sources)}
        self._hooks = [output.register_forward_hook(Hook(self._on_output))]
        for path in sources:
            source = root.get_submodule(path)
            self._hooks.append(source.register_forward_pre_hook(Hook(self._on_inputs, path), with_kwargs=True))
            self._hooks.append(source.register_forward_hook(Hook(self._on_leave, path), always_call=True))

    def leave(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._watched, self._inputs, self._trainer = [], set(), None, None

    def after_epoch_start(self, fit: Fit, *, is_over: bool) -> None:
        """Switch distillation on or off for this epoch; after the last recovery, the teacher is not needed."""
        self._teaches = fit.trainer.current_epoch <= self.until
        if is_over and not self._teaches:
            self._teacher = self._saved = None

    def on_train_batch_end(self, fit: Fit) -> None:
        """Check that ``training_step`` makes the logits in one of the first batches."""
        self._batches += 1
        if self._batches >= PATIENCE:
            self._check(fit)

    def on_train_epoch_end(self, fit: Fit) -> None:
        """Check that ``training_step`` has made the logits in this epoch."""
        self._check(fit)

    def _check(self, fit: Fit) -> None:
        if self._heard or not self._hooks:
            return
        name = "its forward" if self.how.output is None else f"output={self.how.output!r}"
        raise MisconfigurationException(
            f'{self.who}(recovery="distill"): {type(fit.pl_module).__name__}.training_step did not run {name} with '
            "gradients, so there are no logits to teach; pass output= the path of the module that training_step calls "
            f"and whose output are the logits, such as {networks_of(fit.pl_module)}"
        )

    # -- what happens in a forward

    def _on_inputs(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Under DDP the whole training_step is run in the place of forward, and is given a batch.
        own = vars(module).get("forward")
        redirected = "_ForwardRedirection" in getattr(own, "__qualname__", "")
        if self._inputs is None and self._is_training(module) and not redirected:
            args, kwargs = map_tensors((args, kwargs), _copied) if self._teaches else (args, kwargs)
            self._inputs = path, args, kwargs

    def _on_leave(self, path: str, module: nn.Module, *_: object) -> None:
        if self._inputs is not None and self._inputs[0] == path and id(module) in self._watched:
            self._inputs = None

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if self._inputs is None or not self._is_training(module):
            return
        is_first, self._heard = not self._heard, True
        if not self._teaches and not is_first:
            return
        try:
            logits = checked_logits(output, self.how.class_axis)
            if self._teacher is None or self.how.weight == 0:
                return
            gradient = self._scale() * distillation_gradient(
                logits,
                self._target(*self._inputs),
                temperature=self.how.temperature,
                weight=self.how.weight,
                class_axis=self.how.class_axis,
            )
        except PruningError as error:
            raise MisconfigurationException(f'{self.who}(recovery="distill"): {error}') from error
        if self._teaches and logits.requires_grad:
            logits.register_hook(lambda given: given + gradient.to(given.dtype))

    def _target(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the teacher's logits for the same inputs."""
        teacher, caught = self._teacher, []
        assert teacher is not None, "asked before"
        handle = teacher.get_submodule(self._output).register_forward_hook(lambda _, i, output: caught.append(output))
        try:
            with torch.no_grad(), kept_random_state(teacher):
                teacher.get_submodule(path)(*args, **kwargs)
        except Exception as error:
            raise PruningError(f"the teacher does not run on what the model reads ({error})") from error
        finally:
            handle.remove()
        return checked_logits(caught[-1], self.how.class_axis)

    def _is_training(self, module: nn.Module) -> bool:
        """Return True in a training step of the module itself: copies have the hooks too, and measurements run it."""
        trainer = self._trainer
        if id(module) not in self._watched or trainer is None or not trainer.training or not torch.is_grad_enabled():
            return False
        return bool(trainer.lightning_module.training)

    def _scale(self) -> float:
        """Return the factor by which Lightning scales the loss before the backward."""
        trainer = self._trainer
        assert trainer is not None, "it trains"
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        by_hand = not trainer.lightning_module.automatic_optimization
        return scale if by_hand else scale / trainer.accumulate_grad_batches


class Hook:
    """A hook that is shared with copies of the module, where it does nothing: a copy of it would copy the Trainer."""

    def __init__(self, function: Callable[..., None], *given: object) -> None:
        self.function, self.given = function, given

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return self

    def __call__(self, *args: object) -> None:
        """Call the function."""
        self.function(*self.given, *args)


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, as a forward may change its inputs in place."""
    return tensor.detach().clone()
