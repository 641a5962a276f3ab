"""The model before a cut teaches the one after it, without a word of it in ``training_step``.

A hook on the logits adds the gradient of the distillation loss to theirs, scaled like the loss that Lightning
differentiates. So the weights go where they would with the loss added by hand (Hinton et al. 2015, section 2).
"""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_neurons.callbacks.recovery_settings import Distillation
from lightning_neurons.callbacks.teachers import find_logits, from_state, networks_of, read_teacher, state_of
from lightning_neurons.errors import PruningError
from lightning_neurons.network.isolate import kept_random_state
from lightning_neurons.pruning.distillation import distillation_gradient, logits_in
from lightning_neurons.pruning.example import twin_of


class Distiller:
    """Teaches while the recovery of a cut goes on.

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
        self._watched: list[nn.Module] = []  # copies of them have the hooks, too
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._heard = self._teaches = False
        self._inner = ""
        self._trainer: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distiller":
        """A copy of the module keeps its hooks; they do nothing there, and must not copy the Trainer."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """The teacher, unless it is a file, and how long it teaches."""
        saved = self._saved
        if self._teacher is not None and self.how.teacher is None:
            saved = state_of(self._teacher)
        return {"until": self.until, "teacher": saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint left off."""
        self.until, self._saved, self._teacher = state["until"], state["teacher"], None

    def forget(self) -> None:
        """Another model is trained now."""
        self.until, self._teacher, self._saved = -1, None, None

    def begin(self, pl_module: Any) -> None:
        """Find the module that makes the logits, and read the teacher.

        Raises:
            MisconfigurationException: If there is no such module, or the teacher is not one of this architecture.
        """
        source, self._inner = find_logits(self.who, pl_module, self.how.output)
        if self.how.teacher is not None and self._teacher is None:
            self._teacher = read_teacher(self.who, self.how.teacher, pl_module, source)
        elif self._saved is not None:
            self._teacher, self._saved = from_state(source, self._saved), None

    def learn(self, pl_module: Any) -> None:
        """Remember the model as it is, before the first cut."""
        if self._teacher is None:
            source, _ = find_logits(self.who, pl_module, self.how.output)
            self._teacher = twin_of(source).requires_grad_(False)

    def listen(self, trainer: Any, pl_module: Any) -> None:
        """Hang the hooks on the module; nothing happens before the first cut."""
        self.leave()
        self._trainer, self._heard = trainer, False
        self._teaches = trainer.current_epoch <= self.until  # a resume may leave the beginning of the epoch out
        source, inner = find_logits(self.who, pl_module, self.how.output)
        self._watched = [source, source.get_submodule(inner)]
        self._hooks = [
            source.register_forward_pre_hook(self._on_inputs, with_kwargs=True),
            self._watched[1].register_forward_hook(self._on_output),
        ]

    def leave(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._watched, self._inputs, self._trainer = [], [], None, None

    def on_epoch(self, epoch: int, *, is_over: bool) -> None:
        """Teach in this epoch or not.

        Args:
            epoch: The epoch that begins.
            is_over: Whether no other cut will follow; then the teacher is not needed after the recovery.
        """
        self._teaches = epoch <= self.until
        if is_over and not self._teaches:
            self._teacher = self._saved = None

    def check(self, pl_module: Any) -> None:
        """After a batch: the logits must have come by.

        Raises:
            MisconfigurationException: If they have not.
        """
        if self._heard or not self._hooks:
            return
        name = "its forward" if self.how.output is None else f"output={self.how.output!r}"
        raise MisconfigurationException(
            f'{self.who}(recovery="distill"): {type(pl_module).__name__}.training_step did not run {name} with '
            "gradients, so there are no logits to teach; pass output= the path of the module that training_step calls "
            f"and whose output are the logits, such as {networks_of(pl_module)}"
        )

    # -- what happens in a forward

    def _on_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Under DDP the whole training_step is run in the place of forward, and is given a batch.
        own = vars(module).get("forward")
        if self._is_training(module) and "_ForwardRedirection" not in getattr(own, "__qualname__", ""):
            self._inputs = args, kwargs

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._inputs is None or not self._is_training(module):
            return
        inputs, self._inputs = self._inputs, None
        is_first, self._heard = not self._heard, True
        if not self._teaches and not is_first:
            return
        try:
            logits = logits_in(output, self.how.class_axis)
            if self._teacher is None:
                return
            gradient = self._scale() * distillation_gradient(
                logits,
                self._target(*inputs),
                temperature=self.how.temperature,
                weight=self.how.weight,
                class_axis=self.how.class_axis,
            )
        except PruningError as error:
            raise MisconfigurationException(f'{self.who}(recovery="distill"): {error}') from error
        if self._teaches and logits.requires_grad:
            logits.register_hook(lambda given: given + gradient.to(given.dtype))

    def _target(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The teacher's logits for the same inputs."""
        teacher, caught = self._teacher, []
        assert teacher is not None, "asked before"
        module = teacher.get_submodule(self._inner)
        handle = module.register_forward_hook(lambda _, inputs, output: caught.append(output))
        try:
            with torch.no_grad(), kept_random_state(teacher):
                teacher(*args, **kwargs)
        finally:
            handle.remove()
        return logits_in(caught[-1], self.how.class_axis)

    def _is_training(self, module: nn.Module) -> bool:
        running = any(module is one for one in self._watched) and bool(self._trainer.training)
        return running and module.training and torch.is_grad_enabled()

    def _scale(self) -> float:
        """What Lightning multiplies the loss by before it is differentiated."""
        trainer = self._trainer
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        by_hand = not trainer.lightning_module.automatic_optimization
        return scale if by_hand else scale / trainer.accumulate_grad_batches
