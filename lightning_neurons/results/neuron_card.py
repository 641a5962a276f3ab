"""Card of one neuron."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NeuronCard:
    """A neuron, or an output class: images and samples that excite it, and its numbers.

    Attributes:
        name: The neuron or class, such as ``"net.conv2 7"`` or ``"class 4"``.
        why: The reason why it is shown, such as ``"most important"`` or ``"newly dead"``.
        numbers: Its numbers by name, such as ``"deadness"``; in the order to show.
        pictures: The samples of the data that excite it most, the strongest first, in [0, 1]; may be none.
        activations: Its activation on each of them.
        maximized: An image made to excite it, in [0, 1], or None.
    """

    name: str
    why: str
    numbers: Mapping[str, float]
    pictures: Float[Tensor, "image ..."]
    activations: Float[Tensor, " image"]
    maximized: Float[Tensor, "..."] | None = field(default=None)
