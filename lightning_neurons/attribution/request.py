"""A question about a model and a batch: an objective for each sample, and its gradient."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_neurons.attribution.inputs import Entrance
from lightning_neurons.attribution.objective import ALLOWED, OF, Aim, Of, aim_of, layer_of, logits_of
from lightning_neurons.attribution.readout import Forward, Readout
from lightning_neurons.errors import ArgumentError, MeasurementError, check_choice, is_number
from lightning_neurons.layers.layer import candidates
from lightning_neurons.measurement.arguments import given_model

_PART = 32

Values = Float[Tensor, "batch ..."]

Target = int | str | tuple[str, int] | Sequence[int] | Tensor | None
"""A class, one per sample, a neuron, a layer, or None for each sample's predicted class."""


@dataclass(frozen=True)
class Question:
    """A question about a batch: its inputs, and the objective that they are attributed to.

    Attributes:
        readout: The model.
        entrance: The inputs.
        aim: The objective.
        classes: The class of each sample, where the objective names none.
    """

    readout: Readout
    entrance: Entrance
    aim: Aim
    classes: Int[Tensor, " batch"] | None = None

    def value(self, values: Values, rows: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Return the objective of some samples, with ``values`` as their inputs."""
        outputs, activations = self.entrance.run(values, rows)
        classes = None if self.classes is None else self.classes[rows]
        return self.aim.read(outputs, activations, self.readout.layers, len(rows), classes)

    def gradient(self, values: Values, rows: Int[Tensor, " row"]) -> tuple[Float[Tensor, " row"], Values]:
        """Return the objective, and its gradient with respect to the inputs."""
        at = values.detach().requires_grad_()
        value = self.value(at, rows)
        total = value.sum()
        found = torch.autograd.grad(total, at, allow_unused=True)[0] if total.requires_grad else None
        if found is None:
            raise MeasurementError(
                f"target: {self.aim.name} does not depend on the inputs by anything that can be differentiated (does "
                "the model detach them, or run under no_grad?)"
            )
        return value.detach(), found

    def parts(self, rows: Int[Tensor, " row"] | None = None) -> Iterator[Int[Tensor, " part"]]:
        """Yield the samples in parts, so that the memory for gradients stays small."""
        rows = torch.arange(len(self.entrance), device=self.entrance.values.device) if rows is None else rows
        yield from rows.split(_PART)


@contextmanager
def asked(
    model: nn.Module,
    inputs: Any,
    target: Target,
    of: Of,
    forward: Forward | None,
    *,
    cam: bool = False,
    layer: str | None = None,
) -> Iterator[tuple[Question, str | None]]:
    """Open a model, and yield a question to it and the layer of Grad-CAM, if that is asked for.

    Raises:
        ArgumentError: If an argument is out of range.
    """
    given_model(model)
    check_choice("of", of, OF)
    by_sample = target is None or (not isinstance(target, str) and _is_list_of_classes(target))
    allowed = f"{ALLOWED}, or one class for each sample, as a list or tensor"
    aim = Aim(None, None, of) if by_sample else aim_of(model, target, of, allowed=allowed)
    read = aim.layers if layer is None else aim.layers | {layer_of(model, layer)}
    readout = Readout(model, sorted(read), forward, stop=not aim.reads_output and not cam)
    with readout.open():
        entrance = Entrance(readout, inputs)
        if cam:
            layer = layer or _last_with_positions(readout, inputs)
            readout.modules[layer] = candidates(model)[layer]
        yield Question(readout, entrance, aim, _classes(readout, entrance, target) if by_sample else None), layer


def _is_list_of_classes(target: Any) -> bool:
    if isinstance(target, Tensor):
        return target.ndim == 1
    return isinstance(target, list | tuple) and bool(target) and all(is_number(one) for one in target)


def _classes(readout: Readout, entrance: Entrance, target: Any) -> Int[Tensor, " batch"]:
    """Return the class of each sample: given, or predicted."""
    device = entrance.values.device
    if target is None:
        with torch.no_grad():
            parts = torch.arange(len(entrance), device=device).split(_PART)
            return torch.cat([logits_of(entrance.run(entrance.values[rows], rows)[0]).argmax(1) for rows in parts])
    if isinstance(target, Tensor):
        classes = target
    else:
        beyond = [one for one in target if abs(one) >= 2**31]
        if beyond:
            raise ArgumentError.of("target", beyond[0], "one of the model's outputs")
        classes = torch.as_tensor(target)
    if classes.is_floating_point() or classes.dtype == torch.bool or len(classes) != len(entrance):
        got = f"{len(classes)} of {classes.dtype}"
        raise ArgumentError.of("target", got, f"one whole number for each of the {len(entrance)} samples")
    return classes.to(device, torch.int64)


def _last_with_positions(readout: Readout, inputs: Any) -> str:
    found = [name for name, layer in readout.learn(inputs).items() if layer.calls and layer.axis == 1]
    if not found:
        raise MeasurementError("grad_cam needs a layer with positions, a convolution, and the model has none that runs")
    return found[-1]
