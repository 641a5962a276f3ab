"""The objective of an attribution: one number per sample, from a model's output or a layer's activation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_neurons.errors import ArgumentError, MeasurementError, UnknownNameError, check_choice, is_number
from lightning_neurons.hooks.output_layers import logits_in
from lightning_neurons.layers.layer import Layer, widths_of
from lightning_neurons.layers.sample_axis import samples_of

Of = Literal["logit", "probability", "loss"]
OF: tuple[Of, ...] = get_args(Of)

ALLOWED = 'a class index, ("layer", neuron) or the name of a layer'


@dataclass(frozen=True)
class Objective:
    """An objective: a class of the output, a neuron or a layer.

    Attributes:
        layer: A layer's path; None for the model's output.
        index: A neuron of the layer, or a class; None for the layer's mean, or for the class that each sample is given.
        of: Of an output, its ``"logit"``, its softmax ``"probability"``, or the cross entropy (``"loss"``) with
            the class as target; or the ``"log_odds"`` of its probability.
        minus: The objective that is subtracted, or None.
    """

    layer: str | None
    index: int | None
    of: Of | Literal["log_odds"] = "logit"
    minus: "Objective | None" = None

    @property
    def name(self) -> str:
        """The objective in words, such as ``"class 4"``, ``"net.conv2 7"`` or ``"class 4 - class 9"``."""
        index = "" if self.index is None else f" {self.index}"
        own = f"class{index}" if self.layer is None else f"{self.layer}{index}"
        return own if self.minus is None else f"{own} - {self.minus.name}"

    @property
    def climbed(self) -> "Objective":
        """The objective to climb instead: the gradient of a probability vanishes near 1, that of log odds does not."""
        return replace(self, of="log_odds") if self.of == "probability" and self.minus is None else self

    @property
    def layers(self) -> set[str]:
        """The layers that it reads."""
        own = set() if self.layer is None else {self.layer}
        return own if self.minus is None else own | self.minus.layers

    @property
    def reads_output(self) -> bool:
        """True if it needs the model's output."""
        return self.layer is None or (self.minus is not None and self.minus.reads_output)

    def read(
        self,
        outputs: Any,
        activations: Mapping[str, Tensor],
        layers: Mapping[str, Layer],
        batch_size: int,
        classes: Int[Tensor, " batch"] | None = None,
        before: Mapping[str, Tensor] | None = None,
        name: str = "target",
    ) -> Float[Tensor, " batch"]:
        """Return the objective of each sample: mean over positions, and over neurons where none is named.

        Args:
            outputs: The output of the model.
            activations: Activations by layer.
            layers: By name, the layers with their activation points.
            batch_size: Number of samples.
            classes: The class of each sample, where the objective names none.
            before: By layer, the values in front of its activation function. If given, those of a neuron that a
                rectifier holds at zero are read there, where they have a gradient.
            name: The argument's name in errors.

        Returns:
            One number per sample: logit, probability, loss, log odds or activation.
        """
        if self.layer is None:
            values = self._read_output(outputs, classes, name)
        else:
            values = self._read_layer(activations[self.layer], layers[self.layer], batch_size)
            if before is not None and self.index is not None and layers[self.layer].rectified:
                values = values.where(values > 0, self._read_layer(before[self.layer], layers[self.layer], batch_size))
        if self.minus is None:
            return values
        return values - self.minus.read(outputs, activations, layers, batch_size, classes, before, "minus")

    def _read_layer(self, activation: Tensor, layer: Layer, batch_size: int) -> Tensor:
        values = samples_of(activation, layer, batch_size).mean(-1)
        if len(values) != batch_size:
            raise MeasurementError(f"target: {self.layer} does not have one activation per sample")
        return values.mean(1) if self.index is None else values[:, self.index]

    def _read_output(self, outputs: Any, classes: Tensor | None, name: str) -> Tensor:
        logits = logits_of(outputs)
        if classes is None or self.index is not None:
            assert self.index is not None, "objectives of outputs name a class unless they are given classes"
            classes = torch.full((len(logits),), self.index, device=logits.device)
        wrong = classes[(classes < 0) | (classes >= logits.shape[1])]
        if len(wrong):
            raise ArgumentError.of(name, int(wrong[0]), f"one of the model's outputs, 0 to {logits.shape[1] - 1}")
        if self.of == "log_odds":
            return _log_odds(logits, classes)
        if self.of == "logit":
            scores = logits
        else:  # of a binary model, the other class has no output
            binary = logits.shape[1] == 1
            logs = nn.functional.logsigmoid(logits) if binary else logits.log_softmax(1)
            scores = logs.exp() if self.of == "probability" else -logs
        return scores[torch.arange(len(scores), device=scores.device), classes]


def _log_odds(logits: Float[Tensor, "batch klass"], classes: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return the logarithm of p / (1 - p) of each sample's class; of a binary model, its one output."""
    own = logits.gather(1, classes[:, None])
    if logits.shape[1] == 1:
        return own[:, 0]
    return own[:, 0] - logits.scatter(1, classes[:, None], -torch.inf).logsumexp(1)


def logits_of(outputs: Any) -> Float[Tensor, "batch klass"]:
    """Return class scores, mean over positions where there are any: the output itself, or its ``logits``.

    Raises:
        MeasurementError: If the output is anything else.
    """
    logits = logits_in(outputs)
    if logits is None or logits.ndim < 1 or not logits.is_floating_point():
        got = type(outputs).__name__ if logits is None else tuple(logits.shape)
        raise MeasurementError(
            f"the model returned {got}: expected logits of shape (batch, class); pass forward=lambda model, inputs: "
            '... that returns them, or a target such as ("layer", neuron)'
        )
    if logits.ndim == 1:
        return logits[:, None]
    return logits.flatten(2).mean(2) if logits.ndim > 2 else logits


def objective_of(
    model: nn.Module, target: Any, of: Of = "logit", minus: Any = None, *, allowed: str = ALLOWED
) -> Objective:
    """Return the objective that a target stands for.

    Args:
        model: The model.
        target: A class, a pair of a layer's path and a neuron, or a layer's path.
        of: Logit, probability or loss of a class, see ``Objective``.
        minus: A target that is subtracted from it, of the same kinds, or None.
        allowed: Allowed targets, for errors.

    Returns:
        The objective, checked against the layers of the model.

    Raises:
        ArgumentError: If it is none of these, or a neuron is out of range.
        UnknownNameError: If there is no such layer; names the nearest.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> objective_of(net, ("0", 2)).name, objective_of(net, 1, minus=0).name
        ('0 2', 'class 1 - class 0')
    """
    check_choice("of", of, OF)
    objective = _single(model, target, of, "target", allowed)
    return objective if minus is None else replace(objective, minus=_single(model, minus, of, "minus", ALLOWED))


def layer_of(model: nn.Module, layer: Any) -> str:
    """Return the name of a layer, after a check that the model has it.

    Raises:
        ArgumentError: If it is no name.
        UnknownNameError: If there is no such layer; names the nearest.
    """
    if not isinstance(layer, str):
        raise ArgumentError.of("layer", layer, "the name of a layer")
    widths = widths_of(model)
    if layer not in widths:
        raise UnknownNameError.among("layer", layer, widths)
    return layer


def neuron_of(model: nn.Module, layer: str, neuron: Any) -> int:
    """Return the index of a neuron, after a check that the layer has it.

    Raises:
        ArgumentError: If it has none.
    """
    width = widths_of(model)[layer]
    if not (is_number(neuron) and hasattr(neuron, "__index__")) or not 0 <= neuron < width:
        raise ArgumentError.of("neuron", neuron, f"one of 0 to {width - 1} in {layer!r}")
    return int(neuron)


def target_parts(target: Any, name: str = "target", allowed: str = ALLOWED) -> tuple[str | None, int | None]:
    """Return the layer and the neuron, or the class, that a target consists of.

    Raises:
        ArgumentError: If it is none.
    """
    if isinstance(target, Tensor) and target.ndim == 0:
        target = target.item()
    if is_number(target) and hasattr(target, "__index__") and abs(target) < 2**31:
        return None, int(target)
    is_pair = isinstance(target, tuple | list) and len(target) == 2
    layer, index = target if is_pair else (target, None)
    if not isinstance(layer, str) or (is_pair and not (is_number(index) and hasattr(index, "__index__"))):
        raise ArgumentError.of(name, target, allowed)
    return layer, None if index is None else int(index)


def _single(model: nn.Module, target: Any, of: Of, name: str, allowed: str) -> Objective:
    layer, index = target_parts(target, name, allowed)
    if layer is None:
        return Objective(None, index, of)
    widths = widths_of(model)
    if layer not in widths:
        raise UnknownNameError.among(name, layer, widths)
    if index is not None and not 0 <= index < widths[layer]:
        raise ArgumentError.of(name, (layer, index), f"neurons of 0 to {widths[layer] - 1} in {layer!r}")
    if of != "logit":
        raise ArgumentError.of("of", of, f'"logit" where {name} is a neuron or a layer: its activation')
    return Objective(layer, index)
