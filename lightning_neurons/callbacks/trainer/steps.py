"""Steps of a module as Lightning runs them, the loss among their results, and its forward from a batch to logits."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_neurons.callbacks.trainer.checks import overrides
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer
from lightning_neurons.data.batches import tensors_of
from lightning_neurons.errors import MeasurementError
from lightning_neurons.measurement.measure import call_on_inputs

_PLAIN = {"loss", "val", "valid", "validation", "test", "train", "training", "total", "step", "epoch"}
"""Words of a name that stands for the whole loss; with others (``val/kl_loss``) it may be a part of it."""


def evaluation_loop(trainer: Trainer) -> Any:
    """Return the loop that validates or tests."""
    if trainer.state.fn == "test":
        return trainer.test_loop
    return trainer.validate_loop if trainer.state.fn == "validate" else trainer.fit_loop.epoch_loop.val_loop


LoadersOf = Callable[[Trainer], tuple[Any, Any]]
"""A function that returns dataloaders, and the number of batches of each."""


def evaluation_loaders(trainer: Trainer) -> tuple[Any, list[float]]:
    """Return the dataloaders that run one after the other, or the first of those that are combined into one.

    Returns:
        The dataloaders, and the number of batches of each.
    """
    loop = evaluation_loop(trainer)
    loaders, limits = list(loop._combined_loader.flattened), list(loop._max_batches)
    several = len(loaders) if loop._is_sequential else 1
    return loaders[:several], limits[:several]


def training_loaders(trainer: Trainer) -> tuple[Any, int | float]:
    """Return the training dataloader as the user has given it, and the number of its batches."""
    return trainer.train_dataloader, trainer.num_training_batches


def datasets_of(trainer: Trainer) -> list[Any]:
    """Return the datasets that a step can reach through its Trainer now."""
    readers = [loop._combined_loader for loop in (trainer.fit_loop, evaluation_loop(trainer))]
    loaders = [loader for reader in readers if reader is not None for loader in reader.flattened]
    return [loader.dataset for loader in loaders if hasattr(loader, "dataset")]


def takes_iterator(pl_module: nn.Module, step: str) -> bool:
    """Return True if a step takes the dataloader's iterator instead of batches."""
    function = getattr(pl_module, step, None)
    return function is not None and is_param_in_hook_signature(function, "dataloader_iter", explicit=True)


def step_arguments(
    trainer: Trainer, pl_module: LightningModule, step: str, batch_idx: int, dataloader_idx: int
) -> tuple[int, ...]:
    """Return the arguments that Lightning passes to a step after the batch.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        step: The name of the step.
        batch_idx: Index of the batch.
        dataloader_idx: Index of its dataloader; steps get it only if there are several, one after the other.

    Returns:
        ``(batch_idx, dataloader_idx)``, without those that the step does not take.
    """
    function = getattr(pl_module, step)
    index = (batch_idx,) if is_param_in_hook_signature(function, "batch_idx", min_args=2) else ()
    if step == "training_step":
        return index
    loop = evaluation_loop(trainer)
    known = loop._combined_loader is not None  # not yet, where training data is measured before any validation
    several = known and loop._is_sequential and loop.num_dataloaders > 1
    return (*index, dataloader_idx) if several or _has_to_get(function, "dataloader_idx") else index


def _has_to_get(function: Callable[..., Any], name: str) -> bool:
    parameter = inspect.signature(function).parameters.get(name)
    return parameter is not None and parameter.default is parameter.empty


class LossFinder:
    """A rule that finds the loss among the numbers that a step returns and logs.

    It is what the step returns, or what has "loss" in its name; else the only differentiable number that is returned,
    or else logged.

    Args:
        by_sample: Whether a loss is one number for each sample.

    Attributes:
        doubt: A note on which of several was taken, where no name tells which is the whole; else empty.
    """

    def __init__(self, *, by_sample: bool = False) -> None:
        self.doubt = ""
        self._by_sample = by_sample
        self._place: int | None = None

    def find(self, out: object, logged: Mapping[str, Any]) -> Tensor | str:
        """Find the loss; return a description of what is there instead if there is none.

        Args:
            out: The return value of the step.
            logged: The values that it has logged, by name.

        Returns:
            A scalar, or one loss per sample if ``by_sample``; else the text.
        """
        named, numbers = [*_named(out), *_named(logged)], [_floats(out), _floats(dict(logged))]
        offered = [value for _, value in named]
        every = [*offered, *numbers[0], *numbers[1]]
        if not torch.is_grad_enabled():  # nothing is differentiable; where it is not known yet, any will do
            known = every[self._place : self._place + 1] if self._place is not None else []
            likely = [value for value in every if self._fits(value)]
            return next((_scalar(value) for value in (*known, *likely, *offered)), _words(out, logged))
        places = [place for place, value in enumerate(offered) if value.requires_grad and self._fits(value)]
        base = len(offered)
        for group in numbers:
            single = {id(v): base + i for i, v in enumerate(group) if v.requires_grad and v.numel() == 1}
            places += single.values() if len(single) == 1 else ()
            base += len(group)
        # If nothing else, what may be one loss per sample.
        places += [i for i, v in enumerate(offered) if v.requires_grad and v.ndim and v.numel() == len(v)]
        if not places:
            return _words(out, logged)
        self._place = places[0]
        if self._place < len(offered):
            returned = len(_named(out))
            together = range(returned) if self._place < returned else range(returned, len(offered))
            self._doubt([named[place] for place in dict.fromkeys(places) if place in together])
        return _scalar(every[self._place])

    def _doubt(self, found: list[tuple[str, Tensor]]) -> None:
        (name, taken), *rest = found
        others = [other for other, value in rest if value is not taken]
        if others and not _is_plain(name):
            self.doubt = (
                f"sensitivity is that of {name}, though {' and '.join(others)} may be parts of the loss as well: give "
                "the whole the name loss, or pass loss_fn=lambda module, batch: ... that returns it"
            )

    def _fits(self, value: Tensor) -> bool:
        return value.numel() == 1 or self._by_sample


def _scalar(value: Tensor) -> Tensor:
    return value.reshape(()) if value.numel() == 1 else value


def _named(out: object) -> list[tuple[str, Tensor]]:
    """Return the floating-point tensors that are losses by their place or name, the likeliest first."""
    if isinstance(out, Tensor):
        return [("loss", out)] if out.is_floating_point() else []
    entries = dict(out) if isinstance(out, Mapping) else getattr(out, "__dict__", {})
    if not isinstance(out, Mapping) and "loss" not in entries and hasattr(out, "loss"):
        entries = {"loss": out.loss}  # a named tuple, or slots
    names = sorted((name for name in entries if "loss" in str(name).lower()), key=lambda name: not _is_plain(name))
    found = ((str(name), entries[name]) for name in names)
    return [(name, value) for name, value in found if isinstance(value, Tensor) and value.is_floating_point()]


def _is_plain(name: Any) -> bool:
    return {*re.findall("[a-z]+", str(name).lower())} <= _PLAIN


def _floats(tree: Any) -> list[Tensor]:
    return [value for value in tensors_of(tree) if value.is_floating_point()]


def _words(out: object, logged: Mapping[str, Any]) -> str:
    """Describe what is there instead of a loss.

    Returns:
        The end of a sentence, in brackets, with a space before it.
    """
    for verb, numbers in (("returned", out), ("logged", dict(logged))):
        several = len({id(v) for v in _floats(numbers) if v.requires_grad and v.numel() == 1})
        if several > 1:
            return f" ({several} of the numbers that it {verb} are differentiable, and none is called a loss)"
    return " (is it computed under no_grad, detached, or not there at all?)"


def forward_of(pl_module: LightningModule) -> Any:
    """Return a function from module and batch to logits: the module's forward, or that of its only network.

    Raises:
        MeasurementError: If it has several.
    """
    if overrides(pl_module, "forward"):
        return call_on_inputs
    networks = networks_of(pl_module)
    if len(networks) != 1:
        raise MeasurementError(
            f"{type(pl_module).__name__} has no forward, and {len(networks)} networks, so it is not known where the "
            "logits come from; pass forward=lambda module, batch: ..."
        )

    def forward(module: nn.Module, batch: object) -> Any:
        return call_on_inputs(module.get_submodule(networks[0]), batch)

    return forward


def networks_of(pl_module: nn.Module) -> list[str]:
    """Return the names of children that have parameters: any of them may be the network."""
    return [name for name, child in pl_module.named_children() if any(True for _ in child.parameters())]
