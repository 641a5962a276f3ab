"""Plans that keep just the neurons of a sub-network."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_neurons.errors import ArgumentError, PruningError
from lightning_neurons.layers.layer import widths_made
from lightning_neurons.pruning.plan import PruningPlan
from lightning_neurons.pruning.planning import complete
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.norm_streams import NormStreams
from lightning_neurons.pruning.structure.structure import discover


def plan_keeping(
    model: nn.Module,
    example_inputs: Any,
    kept: Mapping[str, Iterable[int]],
    *,
    norm_streams: NormStreams = "refuse",
) -> PruningPlan:
    """Plan to remove everything but some neurons: a class's sub-network, for example.

    Of neurons that can only go together, as in a residual stream, none goes while one of them is kept. Layers that are
    not named, and layers that cannot be cut, stay whole. So what is left may be more than the sub-network that a class
    study measures, which silences neurons one by one: measure the smaller network itself.

    Args:
        model: Any module; it is only read.
        example_inputs: One small batch: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        kept: By layer, the neurons to keep: ``ClassReport.subnetwork(classes)``.
        norm_streams: As in ``prune``, which then needs the same.

    Returns:
        A plan for ``prune``.

    Raises:
        ArgumentError: If it is for another model, or a layer would keep nothing.
        PruningError: If the model cannot be traced.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan_keeping(net, torch.zeros(1, 4), {"0": [1, 6]}).neurons
        {'0': (0, 2, 3, 4, 5, 7)}
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError.of("model", type(model).__name__, "a torch.nn.Module (an instance, not its class)")
    wanted = PruningPlan.from_indices(kept).neurons
    if not wanted:
        raise ArgumentError.of("kept", kept, 'neurons to keep, by layer, such as {"conv1": [0, 3]}')
    PruningPlan(wanted).check(widths_made(model))
    if empty := [layer for layer, neurons in wanted.items() if not neurons]:
        raise ArgumentError.of(f"kept[{empty[0]!r}]", [], "at least one neuron to keep, or leave the layer out")
    structure = discover(model, Example(example_inputs), norm_streams)
    gone, notes = {}, []
    for root, group in structure.groups.items():
        if not {*group.layers} & {*wanted}:
            continue
        if root in structure.refused:
            notes.append(f"{root} stays whole: {structure.refused[root]}")
            continue
        units = [
            unit
            for unit in range(group.size)
            if all(layer in wanted and i not in wanted[layer] for layer, of in group.layers.items() for i in of[unit])
        ]
        if len(group.layers) > 1 and not units:
            notes.append(f"{root} stays whole: each of its coupled neurons is kept in one of {', '.join(group.layers)}")
        gone[root] = units[: max(group.size - group.least, 0)]
    neurons = structure.neurons({root: units for root, units in gone.items() if units})
    try:
        plan = complete(structure, PruningPlan({layer: tuple(found) for layer, found in neurons.items()})).plan
    except PruningError as error:
        raise ArgumentError(f"kept: these neurons make no model of their own: {error}") from error
    return replace(plan, notes=(*plan.notes, *notes))
