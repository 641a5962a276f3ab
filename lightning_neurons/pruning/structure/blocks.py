"""The blocks of a model, by layer."""

from collections import Counter
from collections.abc import Mapping

from torch import nn

from lightning_neurons.layers.layer import candidates, modules_by_name

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(model: nn.Module) -> dict[str, str]:
    """Return the name of each layer's block.

    A block is the outermost module with several layers that is an entry of a container, or one of several of its type;
    a layer outside of any is a block of its own.

    Example:
        >>> blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Bilinear(2, 2, 2)])))
        {'0': '0'}
    """
    layers = list(candidates(model))
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
