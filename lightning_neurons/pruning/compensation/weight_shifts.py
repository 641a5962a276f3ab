"""Changes of weights that make up for a cut. Nothing is changed here: the shifts are part of the cut."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_neurons.layers.recognition import centres
from lightning_neurons.layers.width_handlers import is_linear
from lightning_neurons.pruning.surgery.surgery import TensorCut


@dataclass(frozen=True)
class Repair:
    """The changes of weights that go with a cut.

    Attributes:
        shifts: By parameter or buffer, what is added to it before the cut.
        notes: Layers that could not be compensated, with the reasons.
    """

    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wiring:
    """The order of a model's layers, and the norm layers behind them.

    Attributes:
        calls: All downstream layers in the order in which they run, with the number of their calls.
        norm_behind: By layer, the norm layer that alone reads it.
        standardised: Layers that standardise their weights, in which they are not linear.
        behind: Other linear layers, which read downstream layers through what cannot be cut, such as a layer norm.
    """

    calls: Mapping[str, int]
    norm_behind: Mapping[str, str]
    standardised: Collection[str] = ()
    behind: Collection[str] = ()


def consumers_of(
    cuts: Sequence[TensorCut], modules: Mapping[str, nn.Module], standardised: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Return the linear modules that read removed neurons, and the places of those among their inputs."""
    linear = [one for one in cuts if one.role == "reads" and is_linear(modules[one.path])]
    return {one.path: one.places for one in linear if one.path not in standardised}


def without_compensation(
    cuts: Sequence[TensorCut], modules: Mapping[str, nn.Module], standardised: Collection[str] = ()
) -> list[str]:
    """Return notes of the other modules that read removed neurons."""
    reading = [one.path for one in cuts if one.role == "reads"]
    return [
        *(f"{path} is not compensated: it standardises its weights" for path in reading if path in standardised),
        *(
            f"{path} is not compensated: it is not known whether {type(modules[path]).__name__} is linear"
            for path in reading
            if not is_linear(modules[path])
        ),
    ]


def tied_with(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the path of another module that has a parameter of a module as well, or None."""
    own = {id(parameter) for parameter in modules[path]._parameters.values() if parameter is not None}
    tied = (name for name, other in modules.items() if own & {id(p) for p in other._parameters.values()})
    return next((name for name in tied if name != path), None)


def constant_of(
    path: str, modules: Mapping[str, nn.Module], norm_behind: Mapping[str, str]
) -> tuple[str, float] | None:
    """Return the name and sign of a tensor by which a constant can be added to a layer's outputs.

    That is the bias; or, with the other sign, the running mean of the norm layer that alone reads the layer; or None.
    """
    if getattr(modules[path], "bias", None) is not None:
        return f"{path}.bias", 1.0
    norm = modules.get(norm_behind.get(path, ""))
    if centres(norm):
        return f"{norm_behind[path]}.running_mean", -1.0
    return None
