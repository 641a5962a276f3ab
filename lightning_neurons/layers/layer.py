"""A record of one layer, and the choice of layers by name and type."""

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_neurons.errors import ArgumentError, UnknownNameError
from lightning_neurons.layers.attention import has_separable_heads
from lightning_neurons.layers.recurrent import has_hidden_units, width_made
from lightning_neurons.layers.registry import BOUNDS, LAYER_FAMILIES, RECTIFIERS, LinkKind, family_of
from lightning_neurons.layers.width_handlers import width

Pattern = str | type[nn.Module]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Link:
    """A step between a layer and the downstream layers that read it.

    Attributes:
        kind: ``"norm"``, ``"activation"``, ``"dropout"``, or ``"affine"`` for a scale or shift that is written out.
        function: The function that ran, such as ``"relu"`` or ``"batch_norm"``; of an activation function that is
            written out, the last that ran, and those inside: ``"mul(sigmoid)"``.
        module: Path of the module that called it, or None for a functional call.
        rectified: Whether its values are zero or positive, and exactly zero where the neuron is silent.
        steps: The calls that it consists of: the name of each function and the values that it reads. 0 is the value
            that enters the link, 1 the result of the first call, and so on.
    """

    kind: LinkKind
    function: str
    module: str | None = None
    rectified: bool = False
    steps: tuple[tuple[str, tuple[int, ...]], ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return f"{self.function} ({self.module})" if self.module else self.function


@dataclass(frozen=True)
class Layer:
    """A module that has neurons, and the point where they get their final value.

    Attributes:
        name: Path in the model.
        type: Name of the module's class.
        neurons: Number of neurons.
        axis: Axis of the neurons at the activation point: 1 for channels, -1 for features, unless the chain changes the
            layout, as a LayerNorm over the channels of images does.
        chain: The links between the layer and those that read it; the activation point is after the last one.
        chains: The same for each call in one forward; ``chain`` is the first.
        readers: Paths of the downstream layers that read the activation, each with the number of its inputs that belong
            to one neuron; None where something else reads it too, such as a residual sum.
        rows_per_sample: Number of entries on the first axis of its output that belong to one sample, where that is
            known and not 1: tokens or windows folded into the batch.
        rows_apart: Whether these lie a whole batch apart, as those of concatenated views and of time steps in front of
            the samples; else they are adjacent.
        note: A hint for the user, such as the reason why the layer was not seen.
        output: Whether it makes the model's output: no other layer reads its values.
        twins: The other layers of its residual stream: their values are added to its own, neuron by neuron, so that
            neuron ``i`` of all of them can only be removed together.
    """

    name: str
    type: str
    neurons: int
    axis: int
    chains: tuple[tuple[Link, ...], ...] = ()
    readers: tuple[tuple[str, int], ...] | None = None
    rows_per_sample: int | None = None
    rows_apart: bool = False
    note: str = ""
    output: bool = False
    twins: tuple[str, ...] = ()

    @property
    def calls(self) -> int:
        """The number of times that the layer ran in one forward; 0 if it did not."""
        return len(self.chains)

    @property
    def chain(self) -> tuple[Link, ...]:
        """The links after the layer's first call."""
        return self.chains[0] if self.chains else ()

    @property
    def activation(self) -> str | None:
        """The activation function after the layer, or None; several, where one follows the other."""
        return " > ".join(link.function for link in self.chain if link.kind == "activation") or None

    @property
    def rectified(self) -> bool:
        """True if the values of every call end in a rectifier."""
        ends = self._ends()
        return bool(ends) and all(end is not None and (end.rectified or end.function in RECTIFIERS) for end in ends)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The bounds of a saturating activation function that every call ends in, or None."""
        found = {BOUNDS.get(end.function) if end is not None else None for end in self._ends()}
        return found.pop() if len(found) == 1 else None

    def _ends(self) -> list[Link | None]:
        """Return the last link of each call, dropout aside."""
        chains = [[link for link in chain if link.kind != "dropout"] for chain in self.chains]
        return [chain[-1] if chain else None for chain in chains]

    @property
    def activation_point(self) -> str:
        """The links up to the activation point in words, such as ``"conv1 > batch_norm (bn1) > relu"``."""
        return " > ".join([self.name, *map(str, self.chain)])


def public_name(path: str) -> str:
    """Return a module's path without the parts that ``torch.compile`` adds."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def calling_module(model: nn.Module, running: Sequence[str]) -> str | None:
    """Return the path of the module that calls a function, if it has no submodules and is no layer, else None.

    Args:
        model: The model.
        running: The paths of the modules that are running, the innermost last.
    """
    module = model.get_submodule(running[-1]) if running and running[-1] else None
    is_alone = module is not None and family_of(module) is None and not any(True for _ in module.children())
    return public_name(running[-1]) if is_alone else None


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by path, without the parts that ``torch.compile`` adds."""
    return {public_name(path): module for path, module in model.named_modules()}


def widths_of(model: nn.Module) -> dict[str, int]:
    """Return the number of neurons of each layer, in the order of the model.

    Example:
        >>> widths_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
        {'0': 3, '2': 1}
    """
    return {name: family.neurons(m) for name, m in candidates(model).items() if (family := family_of(m))}


def makers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose neurons can be removed by name, by path, in the order of the model.

    These are its layers; attentions of torch with separable heads: what these make are the rows of their packed
    projections of queries, keys and values, which are no module; and recurrent layers, which make hidden units in each
    direction. Nothing is measured at the last two.

    Example:
        >>> list(makers(nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))))
        ['0', '1', '1.out_proj']
    """
    layers = candidates(model)
    inside = tuple(f"{name}." for name, module in layers.items() if family_of(module) is not None)
    return {
        name: module
        for name, module in modules_by_name(model).items()
        if name in layers or ((has_separable_heads(module) or has_hidden_units(module)) and not name.startswith(inside))
    }


def widths_made(model: nn.Module) -> dict[str, int]:
    """Return the number of neurons of each module whose neurons can be removed by name, in the order of the model.

    Example:
        >>> widths_made(nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)))
        {'0': 4, '1': 12, '1.out_proj': 4}
    """
    layers = widths_of(model)
    return {name: layers[name] if name in layers else _unmeasured_width(m) for name, m in makers(model).items()}


def _unmeasured_width(module: nn.Module) -> int:
    return width_made(module) if has_hidden_units(module) else width(module, "makes") or 0


def candidates(model: nn.Module, patterns: Sequence[Pattern] | None = None) -> dict[str, nn.Module]:
    """Return the modules that have neurons, by path, in the order of the model; all of them or those that match.

    Args:
        model: The model to search.
        patterns: Paths with wildcards (``"net.layer1.*"``), names of classes (``"Conv2d"``) or module types.

    Raises:
        ArgumentError: If ``patterns`` is not a list of patterns, or is empty, or a layer is still lazy.
        UnknownNameError: If a pattern matches no layer; names the nearest.

    Example:
        >>> list(candidates(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(2, 1)), ["Linear"]))
        ['2']
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        # Part of a layer, such as the linear map in a registered layer of one's own, is not a layer again.
        inside = any(path.startswith(outer + ".") for outer in found)
        if family_of(module) is not None and not inside:
            found[path] = module
    named = {public_name(path): module for path, module in found.items()}
    if patterns is not None:
        if isinstance(patterns, str | type) or not patterns:
            raise ArgumentError.of("layers", patterns, "None for all layers, or a list of patterns or module types")
        chosen = {name for pattern in patterns for name in _matching(pattern, named)}
        named = {name: module for name, module in named.items() if name in chosen}
    return named


def require_materialized(model: nn.Module) -> None:
    """Refuse models whose widths are not known yet.

    Raises:
        ArgumentError: If a module is lazy and has not seen a batch.
    """
    path = lazy_path(model)
    if path is not None:
        got = f"{public_name(path) or 'the model itself'}: {type(model.get_submodule(path)).__name__}"
        raise ArgumentError.of("model", got, "materialised layers; run one batch through the model first")


def lazy_path(model: nn.Module) -> str | None:
    """Return the path of the first module that is lazy and has not seen a batch, or None."""
    for path, module in model.named_modules():
        if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None):
            return str(path)
    return None


def _matching(pattern: Pattern, layers: dict[str, nn.Module]) -> list[str]:
    if isinstance(pattern, type):
        names = [n for n, m in layers.items() if isinstance(m, pattern)]
        if not names:
            raise UnknownNameError.among(
                "layers", pattern.__name__, sorted({type(m).__name__ for m in layers.values()})
            )
        return names
    if not isinstance(pattern, str):
        raise ArgumentError.of("layers", pattern, "patterns of layer names, or module types")
    types = {t.__name__ for t in LAYER_FAMILIES} | {type(m).__name__ for m in layers.values()}
    names = [n for n in layers if fnmatch.fnmatchcase(n, pattern)]
    names += [n for n, m in layers.items() if pattern in types and type(m).__name__ == pattern]
    if not names:
        raise UnknownNameError.among("layers", pattern, layers)
    return names


def blocks_of(model: nn.Module) -> dict[str, str]:
    """Return the name of each layer's block.

    A block is the outermost module with several layers that is an entry of a container, or one of several of its type;
    a layer outside of any is a block of its own.

    Example:
        >>> blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Bilinear(2, 2, 2)])))
        {'0': '0'}
    """
    layers = list(makers(model))
    modules = modules_by_name(model)

    def count(path: str) -> int:
        return sum(name.startswith(path + ".") for name in layers)

    several = {path: module for path, module in modules.items() if path and count(path) > 1}
    types = Counter(type(module) for module in several.values())

    def is_block(path: str, module: nn.Module) -> bool:
        if type(module) in _CONTAINERS and any(child in several for child in _children(path, modules)):
            return False  # a container of blocks
        parent = modules.get(path.rpartition(".")[0])
        inside = isinstance(parent, _CONTAINERS)
        return inside or (type(module) not in _CONTAINERS and types[type(module)] > 1)

    found = [path for path, module in several.items() if is_block(path, module)]
    outermost = [path for path in found if not any(path.startswith(other + ".") for other in found)]
    return {n: next((path for path in outermost if n.startswith(path + ".")), n) for n in layers}


def _children(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    return [other for other in modules if other.startswith(path + ".") and "." not in other[len(path) + 1 :]]
