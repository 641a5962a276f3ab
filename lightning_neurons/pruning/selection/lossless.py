"""Lossless pruning of neurons that are dead or constant; constants move into the layers that read them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_neurons.data.batches import results_of
from lightning_neurons.dependency.groups import Group
from lightning_neurons.errors import PruningError
from lightning_neurons.isolation.isolation import eager, isolated
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.pruning.compensation.calibration import Calibration
from lightning_neurons.pruning.compensation.means import fold_means
from lightning_neurons.pruning.compensation.trial_model import TrialModel
from lightning_neurons.pruning.compensation.weight_shifts import Wiring, constant_of
from lightning_neurons.pruning.cut import Cut
from lightning_neurons.pruning.selection.evidence import Constant
from lightning_neurons.pruning.selection.group_scores import GroupScores
from lightning_neurons.pruning.structure.structure import Structure
from lightning_neurons.pruning.surgery.surgery import TensorCut
from lightning_neurons.results.neuron_report import NeuronReport

TOLERANCE = 1e-5
"""Largest difference of outputs, relative to the largest of them: the order of sums is another one."""


def still_layers(report: NeuronReport) -> frozenset[str]:
    """Return layers none of whose neurons ever changes, such as saturated gates: their inputs make no difference.

    Args:
        report: A measurement with the criterion ``"constant"``.
    """
    measured = report.deadness_by["constant"]
    return frozenset(layer for layer, constant in measured.items() if len(constant) and bool((constant == 1).all()))


def lossless_scores(
    structure: Structure, model: nn.Module, constants: Mapping[str, Constant], still: frozenset[str] = frozenset()
) -> tuple[dict[str, GroupScores], tuple[str, ...]]:
    """Return the score -1 for units without which nothing changes and 0 for all others; and notes.

    Args:
        structure: The model's groups.
        model: The model.
        constants: By downstream layer, its inputs that never change.
        still: Downstream layers whose output is the same whatever they read.

    Returns:
        Scores by root, and notes on constant neurons that have to stay.
    """
    modules, notes = modules_by_name(model), []
    found = {}
    for root, group in structure.offered.items():
        value = torch.zeros(group.size, dtype=torch.float64)
        kept: dict[str, int] = {}
        for unit in range(group.size):
            why = _why_not(group, unit, modules, constants, still, structure.coupling.norm_behind)
            if why is None:
                value[unit] = -1.0
            elif why:
                kept[why] = kept.get(why, 0) + 1
        unread = [part.path for part in group.parts if part.role == "reads" and part.path not in constants]
        if unread:
            notes.append(f"{root} is not cut: it is not known what {', '.join(unread)} read")
        notes += [f"{root}: {count} constant neurons stay: {why}" for why, count in kept.items()]
        found[root] = GroupScores(value, value[None])
    return found, tuple(notes)


def _why_not(
    group: Group,
    unit: int,
    modules: Mapping[str, nn.Module],
    constants: Mapping[str, Constant],
    still: frozenset[str],
    norm_behind: Mapping[str, str],
) -> str | None:
    """Return why a unit has to stay: "" if it is not constant at all; None if it can go."""
    reading = [part for part in group.parts if part.role == "reads"]
    if not reading or any(part.path not in constants for part in reading):
        return ""
    reading = [part for part in reading if part.path not in still]
    for part in reading:
        places = list(part.indices[unit])
        if not bool(constants[part.path].is_constant()[places].all()):
            return ""
    for part in reading:
        places = list(part.indices[unit])
        if bool((constants[part.path].value[places] == 0).all()):
            continue
        if _pads_with_zeros(modules[part.path]):
            return f"at its zero-padded border, {part.path} reads 0 instead of the constant"
        if constant_of(part.path, modules, norm_behind) is None:
            return f"{part.path} has no bias, and no norm layer with a running mean, to take the constant"
    return None


def _pads_with_zeros(module: nn.Module) -> bool:
    padding = getattr(module, "padding", 0)
    transposed = bool(getattr(module, "transposed", False))  # it adds up fewer taps near the border
    padded = padding not in (0, "valid") and any(p != 0 for p in (padding if isinstance(padding, tuple) else (1,)))
    own = type(module).forward not in (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return transposed or own or (padded and module.padding_mode == "zeros")


def without_loss(
    model: nn.Module,
    candidates: Sequence[Cut],
    constants: Mapping[str, Constant],
    calibration: Calibration,
    wiring: Wiring,
) -> Cut:
    """Prepare a cut of constant neurons, and prove that it changes nothing. Every process has to take part.

    Args:
        model: As it is before the cut; it is left as it is.
        candidates: The cuts to try; the first for which the proof succeeds is taken.
        constants: By downstream layer, its constant inputs.
        calibration: The data that it is proven on.
        wiring: The order of the model's layers.

    Returns:
        The cut, with a note on the largest difference of outputs.

    Raises:
        PruningError: If the outputs would change.
    """
    values = {path: constant.value for path, constant in constants.items()}
    for candidate in candidates:
        shifts = dict(fold_means(model, candidate.tensor_cuts, values, wiring.norm_behind).shifts)
        shifts = {name: shift.cpu() for name, shift in shifts.items() if bool((shift != 0).any())}
        found = difference(model, candidate.tensor_cuts, shifts, calibration)
        if found <= TOLERANCE:
            break
    else:
        raise PruningError(
            f"nothing was changed: without the constant neurons, outputs would differ by {found:.1e} of the largest, "
            f"and lossless=True allows {TOLERANCE:g}"
        )
    note = f"outputs on the calibration data differ by {found:.1e} of the largest"
    return replace(candidate, shifts=calibration.agree(shifts)).noted([note] if candidate.tensor_cuts else [])


def difference(
    model: nn.Module, cuts: Sequence[TensorCut], shifts: Mapping[str, Tensor], calibration: Calibration
) -> float:
    """Measure how much a cut changes the outputs. Every process has to take part.

    Args:
        model: As it is before the cut; it is left as it is.
        cuts: The cuts.
        shifts: By parameter or buffer, what is added to it before the cut.
        calibration: The data.

    Returns:
        The largest difference, relative to the largest output.
    """
    trial = TrialModel(model, cuts, shifts)
    worst = 0.0
    with isolated(model), eager(), torch.no_grad():
        model.eval()
        for batch in calibration.batches:
            expected = results_of(calibration.run(model, batch))
            got = results_of(calibration.run(trial.twin, batch))
            worst = max([worst, *(_relative(a, b) for a, b in zip(expected, got, strict=True))])
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # There is no maximum over processes here; the sum is never less.
    return float(calibration.agree(float(calibration.reduce(torch.tensor(worst, device=device)))))


def _relative(expected: Tensor, got: Tensor) -> float:
    """Return the largest difference, relative to the largest value; other types than floating point must be equal."""
    if not expected.is_floating_point() or not expected.numel():
        return 0.0 if torch.equal(expected, got) else math.inf
    error = float((expected.double() - got.double()).abs().max())
    return error / max(float(expected.abs().max()), 1e-30) if error == error else math.inf
