"""Compensation by least squares: layers that read removed neurons are solved again, one after the other.

Targets come from the model as it is, inputs from the model as cut and corrected so far; the same batches walk through
both in lockstep.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.isolation.isolation import eager, isolated
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.measurement.outcomes import Forward
from lightning_neurons.pruning.compensation.calibration import Calibration, in_few
from lightning_neurons.pruning.compensation.consumer import Consumer
from lightning_neurons.pruning.compensation.moments import Reduce
from lightning_neurons.pruning.compensation.synchronized_forwards import Lockstep
from lightning_neurons.pruning.compensation.trial_model import TrialModel
from lightning_neurons.pruning.compensation.unfold import batched
from lightning_neurons.pruning.compensation.weight_shifts import (
    Repair,
    Wiring,
    constant_of,
    consumers_of,
    tied_with,
    without_compensation,
)
from lightning_neurons.pruning.surgery.surgery import TensorCut

_WALKS = 32
"""Batches that run at the same time: each takes two threads."""

_ROUNDING = 1e-6
"""Relative rounding error of float32 sums of some hundred terms."""


def least_squares(
    model: nn.Module,
    cuts: Sequence[TensorCut],
    calibration: Calibration,
    wiring: Wiring,
    *,
    patchwise: bool = False,
) -> Repair:
    """Solve the weights of all layers that read removed neurons again.

    Args:
        model: As it is before the cut; it is left as it is.
        cuts: The cuts.
        calibration: The data.
        wiring: The order of the model's layers.
        patchwise: Whether convolutions are solved over whole receptive patches, instead of over channels.

    Returns:
        The changes of weights and of biases or running means, at the model's full width.
    """
    modules = modules_by_name(model)
    reading = consumers_of(cuts, modules, wiring.standardised)
    tied = {path: other for path in reading if (other := tied_with(path, modules)) is not None}
    gone = {path: places for path, places in reading.items() if path not in tied}
    calls, run, reduce = wiring.calls, calibration.run, calibration.reduce
    constants = {path: constant_of(path, modules, wiring.norm_behind) for path in gone}
    consumers = {
        path: Consumer(path, modules[path], gone[path], patchwise=patchwise, has_constant=constants[path] is not None)
        for path in calls
        if path in gone
    }
    notes = without_compensation(cuts, modules, wiring.standardised)
    notes += [f"{path} is not compensated: {other} has the same weights" for path, other in tied.items()]
    notes += [f"{path} is not compensated: it did not run" for path in gone if path not in calls]
    shifts: dict[str, Tensor] = {}
    trial = TrialModel(model, cuts)
    with isolated(model), eager(), torch.no_grad():
        model.eval()
        batches = in_few(calibration.batches, _WALKS, partial(run, model))
        # What runs several times in a forward cannot be waited for: it is solved by what it reads in the whole model.
        repeated = [path for path in consumers if calls[path] > 1]
        _watch(model, [consumers[path] for path in repeated], batches, run)
        for path in repeated:
            _correct(trial, consumers[path], constants[path], shifts, reduce)
        passed, order = set(repeated), [path for path in consumers if path not in repeated]
        with Lockstep(model, order, run, batches) as whole, Lockstep(trial.twin, order, run, batches) as cutting:
            for path in order:
                for index in range(len(batches)):
                    dense, inputs = whole.walk_to(path, passed, index), cutting.walk_to(path, passed, index)
                    if dense is not None and inputs is not None:
                        consumers[path].add(dense, inputs)
                passed.add(path)
                _correct(trial, consumers[path], constants[path], shifts, reduce)
    return Repair(shifts, (*notes, *(note for consumer in consumers.values() for note in consumer.notes)))


def _watch(model: nn.Module, consumers: Sequence[Consumer], batches: Sequence[Any], run: Forward) -> None:
    """Record the inputs of consumers in the whole model, in all of their calls."""

    def hook(consumer: Consumer) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = batched(module, args, kwargs)
            consumer.add(given, consumer.kept(given))

        return add

    hooks = [consumer.module.register_forward_pre_hook(hook(consumer), with_kwargs=True) for consumer in consumers]
    try:
        for batch in batches if consumers else ():
            run(model, batch)
    finally:
        for handle in hooks:
            handle.remove()


def _correct(
    trial: TrialModel, consumer: Consumer, constant: tuple[str, float] | None, shifts: dict[str, Tensor], reduce: Reduce
) -> None:
    """Solve a consumer, correct it in the copy, and store the change."""
    change, offset = consumer.solve(reduce)
    name = f"{consumer.path}.weight"
    # What is below the weights' precision corrects nothing, and would keep dead neurons from going without a trace.
    small = _ROUNDING * consumer.weight.abs().max()
    if float(change.abs().max()) > small:
        shifts[name] = change.cpu()
        trial.shift(name, change)
    if constant is not None and float(offset.abs().max()) > small * max(consumer.largest, 1e-30):
        where, sign = constant
        shifts[where] = (sign * offset).cpu()
        trial.shift(where, sign * offset)
