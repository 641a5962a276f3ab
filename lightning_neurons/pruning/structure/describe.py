"""The block structure of a model as a document, for pruning block by block."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_neurons.dependency.sizes import key_of
from lightning_neurons.layers.attention import WEIGHTS_APART, has_weights_apart
from lightning_neurons.layers.layer import modules_by_name, public_name
from lightning_neurons.layers.width_handlers import is_depthwise, weight_name
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.norm_streams import NormStreams
from lightning_neurons.pruning.structure.structure import Structure, discover
from lightning_neurons.results.whole_file import write_whole

FORMAT, VERSION = "lightning_neurons structure", 1


def describe_structure(
    model: nn.Module, example_inputs: Any, *, path: str | Path | None = None, norm_streams: NormStreams = "refuse"
) -> dict[str, Any]:
    """Describe a model's blocks, the role of each layer in its block, and which neurons can only go together.

    Roles: ``"expand"``, ``"depthwise"`` and ``"project"`` of an inverted residual; ``"squeeze-and-excitation"`` for
    both layers of one; ``"head"`` for what makes the output; ``"layer"`` for everything else. A block is an entry of a
    container, or one of several modules of a type; a layer outside of any is a block of its own.

    Args:
        model: Any module; it is only read.
        example_inputs: One batch: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        path: The file to write the same to as JSON; None writes nothing.
        norm_streams: As in ``prune``: whether groups that norm layers take their statistics over can be cut.

    Returns:
        A document of plain values. ``blocks`` has for each block its ``parents`` (the nearest blocks whose layers it
        reads) and its ``layers``, each with role, type, number of neurons, group, the layers that it reads, parameters
        and MACs per sample; ``groups`` has for each group its size, its layers, its consumers (``readers``), the norms
        that would take their statistics over fewer neurons (so that a cut is not exact), the numbers in modules'
        attributes that follow a cut, and why it cannot be cut, or None; ``unseen`` has for each layer without a group
        the reason, as under ``torch.no_grad`` or inside of a function.

    Raises:
        PruningError: If the model cannot be copied, run or traced.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> found = describe_structure(net, torch.zeros(1, 1, 4, 4))
        >>> found["blocks"]["3"]["layers"]["3"]["role"], found["blocks"]["3"]["parents"]
        ('head', ['0'])
    """
    structure = discover(model, Example(example_inputs), norm_streams)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": type(model).__name__,
        "parameters": structure.costs.parameters(),
        "macs": structure.costs.macs(),
        "blocks": _blocks(model, structure),
        "groups": {
            root: {
                "neurons": group.size,
                "layers": list(group.layers),
                "readers": [part.path for part in group.parts if part.role == "reads"],
                "renormalized": structure.preflight.norms.of(group),
                "attributes": [f"{a.path}.{key_of(a.name, a.place)}".lstrip(".") for a in group.attributes],
                "why_not": structure.refused.get(root),
            }
            for root, group in structure.groups.items()
        },
        "unseen": dict(structure.coupling.unseen),
    }
    if path is not None:
        write_whole(path, json.dumps(document, indent=1))
    return document


def _blocks(model: nn.Module, structure: Structure) -> dict[str, Any]:
    modules, roles = modules_by_name(model), roles_of(model, structure)
    group_of: dict[str, str] = {}
    for root, group in structure.groups.items():
        for layer in group.layers:
            group_of.setdefault(layer, root)
    found: dict[str, Any] = {}
    sources: dict[str, dict[str, None]] = {}
    names = {id(parameter): public_name(name) for name, parameter in model.named_parameters()}  # the first of several
    for layer, block in structure.blocks.items():
        weights = WEIGHTS_APART if has_weights_apart(modules[layer]) else (weight_name(modules[layer]),)
        own = [names.get(id(modules[layer]._parameters.get(weight)), f"{layer}.{weight}") for weight in weights]
        has_layers = isinstance(modules[layer], nn.MultiheadAttention)  # its output projection is one by itself
        reads = structure.coupling.reads.get(layer, ())
        entry = found.setdefault(block, {"parents": [], "layers": {}})
        sources[block] = dict.fromkeys([*sources.get(block, ()), *(structure.blocks[name] for name in reads)])
        entry["layers"][layer] = {
            "role": roles[layer],
            "type": type(modules[layer]).__name__,
            "neurons": structure.widths[layer],
            "group": group_of.get(layer),
            "reads": list(reads),
            "parameters": sum(p.numel() for p in modules[layer].parameters(recurse=not has_layers)),
            "macs": sum(map(structure.costs.macs_of, own)),
        }
    for block, entry in found.items():
        entry["parents"] = _nearest(block, sources)
    return found


def _nearest(block: str, sources: Mapping[str, Mapping[str, None]]) -> list[str]:
    """Return the blocks that a block reads, without those that it reads through another, as along a residual stream."""

    def ancestors(name: str, seen: set[str]) -> set[str]:
        for source in sources[name]:
            if source not in seen and source != name:
                seen.add(source)
                ancestors(source, seen)
        return seen

    direct = [source for source in sources[block] if source != block]
    further = {name for source in direct for name in ancestors(source, {source}) - {source}}
    return [source for source in direct if source not in further]


def roles_of(model: nn.Module, structure: Structure) -> dict[str, str]:
    """Return the role of each layer in its block."""
    modules, blocks = modules_by_name(model), structure.blocks
    roles = {name: "head" if name in structure.coupling.ends else "layer" for name in structure.widths}
    reads: Mapping[str, tuple[str, ...]] = {name: structure.coupling.reads.get(name, ()) for name in structure.widths}
    for deep in (name for name in structure.widths if is_depthwise(modules[name])):
        group = next((g for g in structure.groups.values() if deep in g.layers), None)
        inside = [name for name, block in blocks.items() if block == blocks[deep] and name != deep]
        # A squeezing layer reads what the depthwise one makes, and the exciting layer that reads it scales just that.
        squeezing = {
            name: [e for e in inside if name in reads[e] and group is not None and e in group.layers]
            for name in inside
            if deep in reads[name] and group is not None and name not in group.layers
        }
        gates = {name for squeeze, excited in squeezing.items() if excited for name in (squeeze, *excited)}
        roles[deep] = "depthwise"
        roles |= {name: "expand" for name in inside if name in reads[deep]}
        roles |= {name: "project" for name in inside if deep in reads[name] and name not in gates}
        roles |= dict.fromkeys(gates, "squeeze-and-excitation")
    return roles
