"""The structure of a model for pruning: groups that can be cut, why others cannot, and costs."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import get_args

import torch
from torch import Tensor, nn

from lightning_neurons.dependency.groups import Coupling, Group, Part
from lightning_neurons.dependency.torch_pruning_adapter import find_coupling
from lightning_neurons.errors import PruningError, check_choice
from lightning_neurons.isolation.isolation import isolated
from lightning_neurons.isolation.model_state import without_collector
from lightning_neurons.layers.layer import blocks_of, makers, modules_by_name, require_materialized, widths_made
from lightning_neurons.layers.prunable import check_prunable
from lightning_neurons.layers.width_handlers import axes, handler_of, is_linear, unknown_width, why_fixed
from lightning_neurons.pruning.compensation.synchronized_forwards import calls_of
from lightning_neurons.pruning.compensation.weight_shifts import Wiring
from lightning_neurons.pruning.structure.costs import Costs, Counter, Effects, effects, removed_by, routed
from lightning_neurons.pruning.structure.example import Example, scramble, twin_of, varied
from lightning_neurons.pruning.structure.norm_streams import Norms, NormStreams, follow_through
from lightning_neurons.pruning.structure.preflight import Preflight, silenced
from lightning_neurons.pruning.structure.width_attributes import tried
from lightning_neurons.pruning.surgery.surgery import cuts_of

Units = Mapping[str, list[int]]
"""Units by a group's root."""


@dataclass(frozen=True)
class Structure:
    """The groups of coupled neurons of a model, and its costs.

    Attributes:
        groups: All of them, by root.
        refused: By root, why a group cannot be cut.
        coupling: Groups and connections of layers, from the model's graph.
        widths: Neurons by layer.
        blocks: By layer, the block that it is in.
        costs: The sizes of all tensors.
        preflight: Tries a cut on a copy of the model.
        counter: Counts what the model costs, whole or cut.
        norm_streams: What happens to neurons that norm layers take their statistics over.
        routed: Layers that do not run on every sample: the model's weights decide on which.
        failed: Roots of refused groups whose trial failed: other units than those that were tried may be removable.
    """

    groups: Mapping[str, Group]
    refused: Mapping[str, str]
    coupling: Coupling
    widths: Mapping[str, int]
    blocks: Mapping[str, str]
    costs: Costs
    preflight: Preflight
    counter: Counter
    norm_streams: NormStreams = "refuse"
    routed: tuple[str, ...] = ()
    failed: frozenset[str] = frozenset()

    @property
    def offered(self) -> dict[str, Group]:
        """The groups that can be cut."""
        return {root: group for root, group in self.groups.items() if root not in self.refused}

    @property
    def unseen(self) -> dict[str, str]:
        """The layers that cannot be cut as nothing is known of what reads them, each with the reason."""
        return {name: f"it is not in the model's graph: {why}" for name, why in self.coupling.unseen.items()}

    def group_of(self, layer: str, neuron: int) -> tuple[str, int] | None:
        """Return the group and the unit that a neuron belongs to."""
        return self._owners.get((layer, neuron))

    def neurons(self, units: Units) -> dict[str, list[int]]:
        """Return the neurons that go with some units, by layer in the order of the model."""
        found: dict[str, set[int]] = {}
        for root, chosen in units.items():
            for layer, neurons in self.groups[root].neurons(chosen).items():
                found.setdefault(layer, set()).update(neurons)
        return {layer: sorted(found[layer]) for layer in self.widths if found.get(layer)}

    def costs_without(self, units: Units) -> tuple[int, int]:
        """Return parameters and MACs when units have gone, from the sizes of tensors."""
        removed = removed_by(self._effects, units)
        rest = sum(self._rest_per_unit.get(root, 0.0) * len(gone) for root, gone in units.items())
        return self.costs.parameters(removed), self.costs.macs(removed) - round(rest)

    def inexact(self, units: Units) -> tuple[str, ...]:
        """Say which norms take their statistics over fewer neurons when units have gone, and what that changes.

        Returns:
            A note, or nothing if there are no such norms.
        """
        norms = [p for root, gone in units.items() if gone for p in self.preflight.norms.of(self.groups[root])]
        if not norms:
            return ()
        listed = ", ".join(norms[:5]) + f" and {len(norms) - 5} more" * (len(norms) > 5)
        changes = (
            "before any compensation, outputs on the example change by {:.2g} of their size, and by {:.2g} from those"
        )
        changes = f"{changes} with neurons silenced".format(*self.changes(units))
        return (f"not exact: statistics run over fewer neurons in {listed}; {changes}",)

    def changes(
        self, units: Mapping[str, Sequence[int]], shifts: Mapping[str, Tensor] | None = None
    ) -> tuple[float, float]:
        """Return by how much the outputs on the example differ when units have gone.

        Args:
            units: By root.
            shifts: By parameter or buffer, what is added to it before the cut.

        Returns:
            The largest differences from the outputs of the whole model and from those with silenced neurons, as shares
            of the largest output.
        """
        cuts = cuts_of(self.groups.values(), units)
        return self.counter.changes(cuts, shifts, partial(silenced, self.counter.twin, cuts))

    def counted_without(self, units: Units) -> tuple[int, int]:
        """Return parameters and MACs when units have gone, with the MACs counted on a copy that is cut."""
        macs = self._counted(units).macs() if any(units.values()) else self.costs.macs()
        return self.costs.parameters(removed_by(self._effects, units)), macs

    @cached_property
    def wiring(self) -> Wiring:
        """The downstream layers in the order in which they run, and the norm layers behind layers."""
        modules = modules_by_name(self.preflight.twin)
        reading = [part.path for group in self.groups.values() for part in group.parts if part.role == "reads"]
        consumers = [path for path in dict.fromkeys(reading) if is_linear(modules[path])]
        calls = calls_of(self.preflight.twin, consumers, self.preflight.example.run)
        behind = [path for path in self.coupling.reads if path not in calls and is_linear(modules[path])]
        return Wiring(calls, dict(self.coupling.norm_behind), frozenset(self.preflight.norms.readers), behind)

    @cached_property
    def _owners(self) -> dict[tuple[str, int], tuple[str, int]]:
        return {
            (layer, neuron): (root, unit)
            for root, group in self.groups.items()
            for layer, units in group.layers.items()
            for unit, neurons in enumerate(units)
            for neuron in neurons
        }

    @cached_property
    def _rest_per_unit(self) -> dict[str, float]:
        """By root, the MACs of operations without a weight, such as products with neighbours, that go with a unit."""
        tried = {root: some_units(group, 0) for root, group in self.offered.items()}
        whole = self.costs.rest
        if not whole or self.routed or self._counted(tried).rest == whole:
            return {}
        return {root: (whole - self._counted({root: gone}).rest) / len(gone) for root, gone in tried.items() if gone}

    def _counted(self, units: Units) -> Costs:
        return self.counter.costs(cuts_of(self.groups.values(), units))

    @cached_property
    def _effects(self) -> dict[str, Effects]:
        modules = modules_by_name(self.preflight.twin)
        return {root: effects(group, modules) for root, group in self.offered.items()}


def discover(model: nn.Module, example: Example, norm_streams: NormStreams = "refuse") -> Structure:
    """Find the groups of a model that can be cut, and its costs. The model is only read.

    Args:
        model: Any module.
        example: A few samples, and how to run the model on them.
        norm_streams: ``"renormalize"`` offers neurons that norm layers take their statistics over, although these then
            run over fewer of them; ``"refuse"`` does not.

    Returns:
        Groups and costs, with the means to try and to count cuts.

    Raises:
        PruningError: If the model cannot be copied, run or traced.
        ArgumentError: If a layer is lazy and has not been materialised, or is not what ``register_prunable`` was told;
            or if ``norm_streams`` is neither.
    """
    check_choice("norm_streams", norm_streams, get_args(NormStreams))
    require_materialized(model)
    check_prunable(model)
    # A copy may share with the model what its code reaches on other ways.
    with without_collector(), isolated(model):
        return _structure_of(twin_of(model), example, norm_streams)


def _structure_of(twin: nn.Module, example: Example, norm_streams: NormStreams) -> Structure:
    coupling, norms = follow_through(twin, example, norm_streams, partial(find_coupling, forward=example.run))
    preflight = _preflight(twin, example, [name for name in makers(twin) if name in coupling.ends], norms)
    twin.requires_grad_(False)
    counter = Counter(twin, example)
    costs = counter.costs()
    widths, blocks = widths_made(twin), blocks_of(twin)
    groups = {group.root: group for group in coupling.groups}
    refused = _refused(preflight, coupling)
    failed = _try_groups(groups, refused, preflight, widths)
    reasons, sizes, ran = {**refused, **failed}, (widths, blocks, costs), routed(costs, preflight.costs)
    return Structure(groups, reasons, coupling, *sizes, preflight, counter, norm_streams, ran, frozenset(failed))


def _try_groups(
    groups: dict[str, Group], refused: Mapping[str, str], preflight: Preflight, widths: Mapping[str, int]
) -> dict[str, str]:
    """Try all groups that are not refused yet; those that need it are given attributes that follow.

    Returns:
        By root, the reason why the trial of a group failed.
    """
    over = {root: _norm_over(group, preflight) for root, group in groups.items() if root not in refused}
    failed = {root: reason for root, reason in over.items() if reason is not None}  # no trial is needed for that
    untouched = dict(groups)
    for seed in range(6):  # one choice alone might happen to have the symmetry that a wrong group needs
        left = {root: group for root, group in groups.items() if root not in {**refused, **failed}}
        fixed = {root for root, group in left.items() if group is not untouched[root]}
        # An attribute may be right for some choices only, as where one of two parts must not be the larger one.
        units = {root: some_units(group, seed) for root, group in left.items() if seed < 2 or root in fixed}
        if not units:
            break
        with preflight.on_one_sample() if seed > 1 else nullcontext():
            able, reasons = tried(preflight, [groups[root] for root in units], units, widths, fixed)
        groups |= able
        failed |= reasons
    return failed


def _preflight(twin: nn.Module, example: Example, ends: list[str], norms: Norms) -> Preflight:
    for telling in varied(example):
        scrambled = twin_of(twin)
        scramble(scrambled)
        try:
            return Preflight(scrambled, telling, ends, norms)
        except (PruningError, IndexError):  # not every model is finite with random weights, or takes other inputs
            continue
    return Preflight(twin_of(twin), example, ends, norms)


def some_units(group: Group, seed: int) -> list[int]:
    """Choose about a third of a group's units, without any pattern, as a trial.

    Returns:
        Sorted units whose removal leaves every layer at least ``group.least`` neurons; at least one where that allows
        it.
    """
    chosen: list[int] = []
    left = {name: sum(map(len, units)) for name, units in group.layers.items()}
    for unit in torch.randperm(group.size, generator=torch.Generator().manual_seed(seed)).tolist():
        lost = {name: len(units[unit]) for name, units in group.layers.items() if units[unit]}
        if len(chosen) < max(group.size // 3, 1) and all(left[n] - count >= group.least for n, count in lost.items()):
            chosen.append(unit)
            left |= {name: left[name] - count for name, count in lost.items()}
    return sorted(chosen)


def _refused(preflight: Preflight, coupling: Coupling) -> dict[str, str]:
    """Return the groups that cannot be cut, as far as that can be told without a trial, with the reasons."""
    modules, tied = modules_by_name(preflight.twin), _tied(preflight.twin, preflight.example)
    refused = {}
    for group in coupling.groups:
        lost, end = coupling.lost.get(group.root), any(layer in coupling.ends for layer in group.layers)
        reason = lost if lost and not end else _why_not(group, modules, preflight.norms)
        if end and reason is None:
            reason = "its neurons are the model's output"
        reason = reason or _differing(group, modules, tied)
        if reason is None and group.size <= group.least:
            neurons = len(group.neurons(range(group.size))[group.root])
            together = f"its {neurons} neurons can only be removed together"
            reason = f"it has {neurons} neuron{'s' * (neurons > 1)}, and {group.least} must stay"
            reason = _norm_over(group, preflight) or (together if neurons > group.size else reason)
        if reason is not None:
            refused[group.root] = reason
    return refused


def _norm_over(group: Group, preflight: Preflight) -> str | None:
    """Return why a group whose cut is wrong cannot be cut, if a norm layer runs over all of it."""
    modules = modules_by_name(preflight.twin)
    for part in group.parts:
        owner = part.path.rpartition(".")[0] if part.role == "holds" else part.path
        handler = handler_of(modules[owner])
        if handler is not None and handler.over_all and owner not in preflight.norms.layers:
            return f"{owner}: {type(modules[owner]).__name__} normalises over all of them, and would do so over fewer"
    return None


def _why_not(group: Group, modules: Mapping[str, nn.Module], norms: Norms) -> str | None:
    for part in group.parts:
        owner = part.path.rpartition(".")[0] if part.role == "holds" else part.path
        reason = why_fixed(modules[owner])
        if reason is not None:
            return f"{owner}: {reason}"
        leaves = _leaves(part, modules)
        unknown = handler_of(modules[owner]) is None and owner not in norms.layers
        if not leaves and unknown and any(True for _ in modules[owner].parameters(False)):
            return f"{owner}: {unknown_width(modules[owner])}"
    return None


def _leaves(part: Part, modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return the axes on which a part lies, by name of a tensor."""
    if part.role == "holds":
        return {part.path: part.axis or 0}
    found = axes(modules[part.path], part.role)
    return {f"{part.path}.{leaf}" if part.path else leaf: axis for leaf, axis in found.items()}


def _differing(group: Group, modules: Mapping[str, nn.Module], tied: Mapping[str, Sequence[str]]) -> str | None:
    """Return the reason why a parameter that several modules have cannot be cut: not all of them are cut alike."""
    cuts: dict[str, set[tuple[int, tuple[tuple[int, ...], ...]]]] = {}
    for part in group.parts:
        for name, axis in _leaves(part, modules).items():
            if name in tied:
                owner, _, leaf = name.rpartition(".")
                axis %= modules[owner].get_parameter(leaf).ndim
                cuts.setdefault(name, set()).add((axis, part.indices))
    for name, same in cuts.items():
        other = next((n for n in tied[name] if cuts.get(n) != same), None)
        if other is not None:
            return f"{name} and {other} are one parameter, and it would not be cut alike for both"
    return None


def _tied(model: nn.Module, example: Example) -> dict[str, list[str]]:
    """Return weights that several layers that run share, each with all of its names. A module may have two names."""
    modules, names = modules_by_name(model), dict[int, list[str]]()
    for path, module in modules.items():
        for leaf in {**axes(module, "makes"), **axes(module, "reads")}:
            if leaf in module._parameters:
                names.setdefault(id(module._parameters[leaf]), []).append(f"{path}.{leaf}" if path else leaf)
    several = [same for same in names.values() if len(same) > 1]
    if not several:
        return {}
    ran = calls_of(model, {name.rpartition(".")[0] for same in several for name in same}, example.run)
    used = [[name for name in same if name.rpartition(".")[0] in ran] for same in several]
    return {name: same for same in used for name in same}
