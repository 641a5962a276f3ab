"""Statistics of the inputs of layers on calibration data: second moments, or whether they ever change."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lightning_neurons.isolation.isolation import eager, isolated
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.layers.width_handlers import axes
from lightning_neurons.pruning.compensation.calibration import Calibration
from lightning_neurons.pruning.compensation.consumer import LARGEST
from lightning_neurons.pruning.compensation.moments import Moments, wide
from lightning_neurons.pruning.compensation.unfold import batched, channels


def second_moments(model: nn.Module, consumers: Sequence[str], calibration: Calibration) -> dict[str, Moments]:
    """Measure the moments of the inputs of layers; without layers that have more inputs than can be kept.

    Args:
        model: The model; it is left as it was. Every process has to take part.
        consumers: Paths of convolutions and linear layers.
        calibration: The data.

    Returns:
        By path, of all processes together.
    """
    modules = modules_by_name(model)
    found = {
        p: Moments.empty(_width(modules[p]), 0, _device(modules[p])) for p in consumers if _width(modules[p]) <= LARGEST
    }
    _watch(model, {path: moments.add for path, moments in found.items()}, calibration)
    reduced = {path: moments.reduced(calibration.reduce) for path, moments in found.items()}
    for path, moments in reduced.items():
        moments.check(path)
    return reduced


class Constant:
    """The inputs of a layer that never change, and their values.

    Attributes:
        value: ``(input,)``, their first values.
        changed: ``(input,)``, the number of positions with another value.
    """

    def __init__(self, value: Float[Tensor, " input"]) -> None:
        self.value = value
        self.changed = torch.zeros_like(value)

    def add(self, inputs: Float[Tensor, "input position"]) -> None:
        """Compare the inputs at more positions."""
        self.changed += (inputs.to(self.value.dtype) != self.value[:, None]).sum(1)

    def is_constant(self) -> Bool[Tensor, " input"]:
        """Return whether each input has been the same everywhere."""
        return self.changed == 0


def constants(
    model: nn.Module, consumers: Sequence[str], first: Mapping[str, Tensor], calibration: Calibration
) -> dict[str, Constant]:
    """Find the inputs of layers that never change.

    Args:
        model: The model; it is left as it was. Every process has to take part.
        consumers: Paths of convolutions and linear layers.
        first: By path, the inputs that a layer once had, ``(input,)``; the same in every process.
        calibration: The data.

    Returns:
        By path, counted over all processes.
    """
    modules = modules_by_name(model)
    found = {path: Constant(first[path].to(_device(modules[path]))) for path in consumers if path in first}
    _watch(model, {path: constant.add for path, constant in found.items()}, calibration)
    for constant in found.values():
        constant.changed = calibration.reduce(constant.changed)
    return found


def first_read(model: nn.Module, consumers: Sequence[str], run: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Return the inputs of layers at the first position of the first sample.

    Args:
        model: The model, in evaluation mode.
        consumers: Paths of convolutions and linear layers.
        run: Runs the model.

    Returns:
        By path, ``(input,)``, in float64 where the device has it.
    """
    found: dict[str, Tensor] = {}
    hooks = _hooks(model, {path: partial(_keep_first, found, path) for path in consumers})
    try:
        with torch.no_grad(), eager():
            run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _keep_first(found: dict[str, Tensor], path: str, inputs: Tensor) -> None:
    found.setdefault(path, inputs[:, 0].to(wide(inputs.device)).cpu())


def _watch(model: nn.Module, watching: Mapping[str, Callable[[Tensor], Any]], calibration: Calibration) -> None:
    with isolated(model), eager(), torch.no_grad():
        model.eval()
        hooks = _hooks(model, watching)
        try:
            for batch in calibration.batches:
                calibration.run(model, batch)
        finally:
            for hook in hooks:
                hook.remove()


def _hooks(model: nn.Module, watching: Mapping[str, Callable[[Tensor], Any]]) -> list[Any]:
    # After the module has run: what it cannot read is its own error.
    def hook(see: Callable[[Tensor], Any]) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            see(channels(module, batched(module, args, kwargs)))

        return look

    modules = modules_by_name(model)
    return [modules[p].register_forward_hook(hook(see), with_kwargs=True) for p, see in watching.items()]


def _width(module: nn.Module) -> int:
    return int(module.get_parameter("weight").shape[axes(module, "reads")["weight"]])


def _device(module: nn.Module) -> torch.device:
    return module.get_parameter("weight").device
