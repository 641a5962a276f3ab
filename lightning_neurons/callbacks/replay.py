"""Running a LightningModule's own step a second time, with gradients, without leaving a trace.

What ``network/isolate.py`` does for any module, and what only Lightning has: ``self.log`` is caught, loggers are
replaced by one that does nothing, the precision of the Trainer is kept, and a compiled step is run as it was written.
"""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from lightning_neurons.errors import MeasurementError
from lightning_neurons.network.batches import map_tensors
from lightning_neurons.network.isolate import isolated
from lightning_neurons.studies.measure import LossFunction

_COMPILED_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


class StepReplay:
    """The loss of a batch, from ``loss_fn`` or from the module's own step.

    Args:
        trainer: The Trainer that runs the module.
        pl_module: The module.
        step: ``"validation_step"`` or ``"test_step"``.
        loss_fn: Overrides the step.
    """

    def __init__(self, trainer: Any, pl_module: Any, step: str, loss_fn: LossFunction | None) -> None:
        self.trainer, self.pl_module, self.step, self.loss_fn = trainer, pl_module, step, loss_fn
        self.batch_idx = 0
        self.logged: dict[str, Any] = {}
        self._place: int | None = None  # of the loss among what the step returns and logs

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Inside, the module may be run at will, in evaluation mode; afterwards it is as it was."""
        module, trainer = self.pl_module, self.trainer
        with ExitStack() as stack:
            stack.enter_context(isolated(module))
            stack.enter_context(_attributes(module, log=self._log, log_dict=self._log_dict, **_uncompiled(module)))
            loggers = trainer.loggers
            stack.callback(setattr, trainer, "loggers", loggers)
            trainer.loggers = [DummyLogger()] if loggers else []
            stack.enter_context(trainer.precision_plugin.val_step_context())
            module.eval()
            yield

    def run(self, batch: Any) -> Any:
        """Run ``loss_fn`` or the step on a batch."""
        self.logged.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they came in the first run, or come of gradients alone
            if self.loss_fn is not None:
                return self.loss_fn(self.pl_module, batch)
            step = getattr(self.pl_module, self.step)
            wanted = len(inspect.signature(step).parameters)
            loaders = self.trainer.test_dataloaders if self.step == "test_step" else self.trainer.val_dataloaders
            several = isinstance(loaders, list | tuple) and len(loaders) > 1
            # As Lightning does it: by position, and the index of the dataloader only where there are several.
            # A copy, as a step may change its batch and is run on it more than once.
            return step(map_tensors(batch, Tensor.clone), *(self.batch_idx, 0)[: min(wanted - 1, 2 if several else 1)])

    def loss(self, batch: Any) -> Tensor:
        """The differentiable loss of a batch, as ``loss_fn`` or the step returns or logs it.

        Raises:
            MeasurementError: If there is none, or the step does not run with gradients.
        """
        try:
            out = self.run(batch)
        except Exception as error:
            name = "loss_fn" if self.loss_fn is not None else self.step
            hint = "" if self.loss_fn is not None else "; pass loss_fn=lambda module, batch: ... that returns the loss"
            raise MeasurementError(
                f"{name} failed when it was run with gradients on {type(self.pl_module).__name__} "
                f"({type(error).__name__}: {error}){hint}"
            ) from error
        if self.loss_fn is not None:
            return out  # type: ignore[no-any-return]
        usable = torch.is_grad_enabled()  # else the forward is run to find the layers, and any loss will do
        offered = [*_losses(out), *_losses(self.logged)]
        for place, found in enumerate(offered):
            likely = found.requires_grad if usable and isinstance(found, Tensor) else self._place in (None, place)
            if isinstance(found, Tensor) and found.is_floating_point() and likely:
                self._place = place if usable else self._place
                return found.reshape(()) if found.numel() == 1 else found
        raise MeasurementError(
            f"{type(self.pl_module).__name__}.{self.step} neither returned nor logged a differentiable loss (is it "
            "computed under no_grad, detached, or logged under a name without 'loss'?); return the loss from it, or "
            "pass loss_fn=lambda module, batch: ... that returns the loss"
        )

    def _log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.logged[name] = value

    def _log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        self.logged.update(dictionary.items())


def _losses(out: Any) -> list[Any]:
    """What may be a loss, the likeliest first."""
    if not isinstance(out, dict):
        return [out]
    names = [name for name in out if "loss" in str(name)]
    return [out[name] for name in sorted(names, key=lambda name: name not in ("loss", "val_loss", "test_loss"))]


def is_compiled(module: Any) -> bool:
    """Whether any part of the module has been compiled, so that hooks would not see its forward."""
    if getattr(module, "_compiler_ctx", None) is not None:
        return True
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules())


def _uncompiled(module: Any) -> dict[str, Any]:
    """What Lightning put aside when the whole module was compiled."""
    context = getattr(module, "_compiler_ctx", None) or {}
    return {step: context[f"original_{step}"] for step in _COMPILED_STEPS if f"original_{step}" in context}


@contextmanager
def _attributes(module: Any, **values: Any) -> Iterator[None]:
    """Set instance attributes, shadowing those of the class."""
    kept = {name: vars(module)[name] for name in values if name in vars(module)}
    vars(module).update(values)
    try:
        yield
    finally:
        for name in values:
            vars(module).pop(name, None)
        vars(module).update(kept)
