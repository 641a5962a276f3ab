"""A note on the parts of a model that were not measured, and how much of the model they are."""

from collections.abc import Iterator

from torch import nn

from lightning_neurons.layers.width_handlers import is_depthwise, passes
from lightning_neurons.measurement.measurement import Measurement

_NAMED = 5


def unmeasured(measurement: Measurement) -> list[str]:
    """Return a note that names the modules with parameters that were not measured, the largest first.

    There is none if all were measured, or if layers were asked for by name.
    """
    if measurement.chosen is not None:
        return []
    model, ran = measurement.model, {n for n, layer in measurement.layers.items() if layer.calls}
    seen = {id(p) for name in ran for p in measurement.modules[name].parameters()}
    total = sum(p.numel() for p in model.parameters())
    missed = []
    for name, module in _owners(model):
        own = {id(p): p.numel() for p in _own_parameters(module) if id(p) not in seen}
        seen |= own.keys()
        if sum(own.values()):
            missed.append((sum(own.values()) / total, f"{name or type(module).__name__} ({type(module).__name__}"))
    if not missed:
        return []
    missed.sort(key=lambda row: -row[0])
    named = [f"{what}, {_percent(share)} of parameters)" for share, what in missed[:_NAMED]]
    rest = missed[_NAMED:]
    if rest:
        named.append(f"and {len(rest)} more ({_percent(sum(share for share, _ in rest))})")
    return [f"not measured: {', '.join(named)}"]


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that may hold parameters of their own; an attention stands for its projections."""
    inside: set[str] = set()
    for name, module in model.named_modules():
        if name.rpartition(".")[0] in inside or _only_scales(module):
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside.add(name)
        yield name, module


def _only_scales(module: nn.Module) -> bool:
    """Return True if its parameters scale the activations of the layer before it, and are measured there."""
    return passes(module) and not is_depthwise(module)


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=isinstance(module, nn.MultiheadAttention))


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "less than 1%"
