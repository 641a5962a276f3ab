"""Replay of a LightningModule's own step, with gradients and without side effects.

What ``isolation/isolation.py`` does for any module, and what only Lightning has: ``self.log`` is caught, what a step
prints is dropped, loggers are replaced by one that does nothing, the precision of the Trainer is kept, and a compiled
step is run as it was written.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer
from lightning_neurons.callbacks.trainer.steps import LossFinder, datasets_of, step_arguments
from lightning_neurons.data.batches import map_tensors, tensors_of
from lightning_neurons.errors import MeasurementError, NoLossError
from lightning_neurons.isolation.isolation import isolated
from lightning_neurons.isolation.surroundings import kept_attributes, kept_environment, silent
from lightning_neurons.measurement.outcomes import LossFunction
from lightning_neurons.replay.checked_run import DivergedError

_OF_DYNAMO = ("__compiled_fn_", "__resume_at_")  # what the compiler leaves in a file of which it has compiled something
_FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "builtins")
_COMPILED_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


class StepReplay:
    """A function that computes the loss of a batch, by ``loss_fn`` or the module's own step.

    Args:
        trainer: The Trainer that runs the module.
        pl_module: The module.
        step: ``"validation_step"``, ``"test_step"`` or ``"training_step"``.
        loss_fn: Overrides the step.
        by_sample: Whether the step's loss is one number for each sample.

    Attributes:
        place: Index of the batch that is run, and of its dataloader.
        places: Batches that are not at ``place``, each with its own place.
        logged: The values that the last run has logged, by name.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        step: str,
        loss_fn: LossFunction | None,
        *,
        by_sample: bool = False,
    ) -> None:
        self.trainer, self.pl_module, self.step, self.loss_fn = trainer, pl_module, step, loss_fn
        self.place = 0, 0
        self.places: list[tuple[Any, tuple[int, int]]] = []
        self.logged: dict[str, Any] = {}
        self._finder = LossFinder(by_sample=by_sample)

    @property
    def doubt(self) -> str:
        """A note on which of several losses of the step was taken, where that is not clear; else empty."""
        return self._finder.doubt

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Isolate the module: inside, it may be run in evaluation mode; afterwards all of its state is restored."""
        module, trainer = self.pl_module, self.trainer
        with ExitStack() as stack:
            stack.enter_context(kept_environment())
            for data in (getattr(trainer, "datamodule", None), *datasets_of(trainer)):
                stack.enter_context(kept_attributes(data))
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            stack.enter_context(isolated(module, vars(trainer), *trainer.optimizers, *schedulers))
            shadows = {"log": self._log, "log_dict": self._log_dict, "print": _silent, **_uncompiled(module)}
            if self.step == "training_step":
                shadows |= {"optimizers": _refuse, "lr_schedulers": _refuse, "manual_backward": _refuse}
            stack.enter_context(_attributes(module, **shadows))
            loggers = trainer.loggers
            stack.callback(setattr, trainer, "loggers", loggers)
            trainer.loggers = [DummyLogger()] if loggers else []
            stack.enter_context(trainer.precision_plugin.val_step_context())
            module.eval()
            yield

    def run(self, batch: object) -> Any:
        """Run ``loss_fn`` or the step on a batch, without warnings or logging.

        Returns:
            What ``loss_fn`` or the step returns; what the step logged is in ``logged``.
        """
        self.logged.clear()
        # Entering the grad mode that is on has it put back, if the step switches it.
        with warnings.catch_warnings(), torch.set_grad_enabled(torch.is_grad_enabled()):
            warnings.simplefilter("ignore")  # they came in the first run, or come of gradients alone
            if self.loss_fn is not None:
                return self.loss_fn(self.pl_module, batch)
            # A copy, as a step may change its batch and is run on it more than once.
            arguments = step_arguments(self.trainer, self.pl_module, self.step, *self._place_of(batch))
            with silent():
                return getattr(self.pl_module, self.step)(map_tensors(batch, Tensor.clone), *arguments)

    def loss(self, batch: object) -> Tensor:
        """Compute the loss of a batch, as ``loss_fn`` or the step returns or logs it.

        Returns:
            The loss with its graph: a single number, or one for each sample if ``loss_fn`` returns them.

        Raises:
            MeasurementError: If ``loss_fn`` does not run with gradients.
            NoLossError: If the step has none, or does not run with gradients.
        """
        who = type(self.pl_module).__name__
        try:
            out = self.run(batch)
        except (NoLossError, DivergedError):
            raise  # a run that diverges is repeated on the whole batch
        except Exception as error:
            if self.loss_fn is not None:
                raise MeasurementError(
                    f"loss_fn failed when it was run with gradients on {who} ({type(error).__name__}: {error})"
                ) from error
            raise NoLossError(
                f"{self.step} failed when it was run with gradients on {who} ({type(error).__name__}: {error}); "
                f"{self._remedy()}"
            ) from error
        if self.loss_fn is not None:
            return out  # type: ignore[no-any-return]
        found = self._finder.find(out, self.logged)
        self.logged.clear()  # a logged loss holds its graph, which would live until the next run
        if isinstance(found, Tensor):
            return found
        raise NoLossError(
            f"{who}.{self.step} neither returned nor logged a differentiable loss{found}; "
            f"return the loss from it, or {self._remedy()}"
        )

    def _remedy(self) -> str:
        other_step = self.step != "training_step" and self.pl_module.automatic_optimization
        training = ', or step="training" to take that of training_step' if other_step else ""
        return f"pass loss_fn=lambda module, batch: ... that returns the loss{training}"

    def _place_of(self, batch: object) -> tuple[int, int]:
        memory = _memory_of(batch) if self.places else None
        return next((place for known, place in self.places if _memory_of(known) == memory), self.place)

    def _log(self, name: str, value: object, *args: object, **kwargs: object) -> None:
        self.logged[name] = value

    def _log_dict(self, dictionary: Any, *args: object, **kwargs: object) -> None:
        self.logged.update(dictionary.items())


def _memory_of(batch: object) -> list[tuple[int, Any]]:
    return [(tensor.data_ptr(), tensor.shape) for tensor in tensors_of(batch)[:1]]


def _refuse(*args: object, **kwargs: object) -> Any:
    raise NoLossError(
        "training_step uses its optimizers or learning rate schedulers itself, so it is not run a second time; pass "
        "loss_fn=lambda module, batch: ... that returns the loss"
    )


def _silent(*args: object, **kwargs: object) -> None:
    """Replace ``self.print``, as the first run has printed already."""


def is_compiled(module: nn.Module) -> bool:
    """Return True if anything that runs in a step has been compiled: hooks would change what it computes.

    Looks at all parts of the module, and at what their classes and the files that define those can name.
    """
    if getattr(module, "_compiler_ctx", None) is not None:
        return True
    classes = {cls for m in module.modules() for cls in type(m).__mro__ if not cls.__module__.startswith(_FRAMEWORKS)}
    files = {cls.__module__ for cls in classes} & sys.modules.keys()
    places = [*module.modules(), *classes, *(sys.modules[file] for file in files)]
    named = [value for place in places for name, value in list(vars(place).items()) if not name.startswith(_OF_DYNAMO)]
    return any(map(_is_compiled, [*module.modules(), *named]))


def _is_compiled(value: object) -> bool:
    if isinstance(value, nn.Module):
        return hasattr(value, "_orig_mod") or value._compiled_call_impl is not None
    return isinstance(value, FunctionType) and hasattr(value, "_torchdynamo_orig_callable")


def _uncompiled(module: object) -> dict[str, Any]:
    """Return the original steps that Lightning kept when the whole module was compiled."""
    context = getattr(module, "_compiler_ctx", None) or {}
    return {step: context[f"original_{step}"] for step in _COMPILED_STEPS if f"original_{step}" in context}


@contextmanager
def _attributes(module: object, **values: Any) -> Iterator[None]:
    """Set instance attributes, shadowing those of the class."""
    kept = {name: vars(module)[name] for name in values if name in vars(module)}
    vars(module).update(values)
    try:
        yield
    finally:
        for name in values:
            vars(module).pop(name, None)
        vars(module).update(kept)
