"""The arguments of ``prune``, checked and brought into one form."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args

from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_neurons.data.batches import batch_size_of, tensors_of
from lightning_neurons.errors import ArgumentError, UnknownNameError, check_choice, is_number
from lightning_neurons.layers.layer import require_materialized
from lightning_neurons.pruning.budget import PruningBudget
from lightning_neurons.pruning.compensation.compensate import (
    LEAST_SQUARES,
    NONE,
    Compensation,
    CompensationName,
    compensation_named,
)
from lightning_neurons.pruning.plan import PruningPlan
from lightning_neurons.pruning.structure.norm_streams import NormStreams

CONSTANT = PruningBudget("constant", threshold=1.0)
"""The budget of a lossless cut."""


def check_model(model: Any) -> None:
    """Check that the model is a module, and that its widths are known."""
    if not isinstance(model, nn.Module):
        raise ArgumentError.of("model", type(model).__name__, "a torch.nn.Module (an instance, not its class)")
    require_materialized(model)


def kept_batches(batches: Any) -> list[Any] | None:
    """Return the batches as a list, as they are run several times."""
    if batches is None:
        return None
    if isinstance(batches, Tensor | Dataset) or not isinstance(batches, Iterable):
        raise ArgumentError.of("batches", type(batches).__name__, "an iterable of batches: a DataLoader, or [batch]")
    found = list(batches)
    filled = [batch for batch in found if not tensors_of(batch) or batch_size_of(batch)]
    if found and not filled:
        raise ArgumentError.of("batches", f"{len(found)} without a sample", "batches with samples")
    return filled


def chosen_compensation(how: CompensationName | None, batches: Sequence[Any] | None, lossless: bool) -> Compensation:
    """Return the compensation that is asked for, or the best one that there is data for."""
    if lossless:
        if how is not None:
            raise ArgumentError.of("compensation", how, "nothing with lossless=True, which folds constants")
        if not batches:
            raise ArgumentError.of("batches", batches, "some batches to prove it on, with lossless=True")
        return NONE
    if how is None:
        return LEAST_SQUARES if batches else NONE
    chosen = compensation_named(how)
    if chosen.needs_data and not batches:
        raise ArgumentError.of("batches", batches, f"some batches to calibrate on, with compensation={how!r}")
    return chosen


def checked_norm_streams(given: Any, lossless: bool) -> NormStreams:
    """Return what happens to neurons that norm layers take their statistics over.

    Raises:
        ArgumentError: If it is neither of both, or contradicts ``lossless``.
    """
    chosen: Any = check_choice("norm_streams", given, get_args(NormStreams))
    if lossless and chosen != "refuse":
        allowed = "'refuse' with lossless=True, as norms over fewer neurons are another function"
        raise ArgumentError.of("norm_streams", chosen, allowed)
    return chosen  # type: ignore[no-any-return]


def check_inputs(example: Any, batches: Sequence[Any]) -> None:
    """Refuse examples without samples, and batches that do not say which of several inputs is which."""
    if not tensors_of(example) or any(t.ndim and not len(t) for t in tensors_of(example)):
        got = type(example).__name__ if not tensors_of(example) else [tuple(t.shape) for t in tensors_of(example)]
        allowed = "a batch of at least one sample: a tensor, a tuple of arguments or a dict of keyword arguments"
        raise ArgumentError.of("example_inputs", got, allowed)
    several = isinstance(example, Mapping) or (isinstance(example, list | tuple) and len(example) > 1)
    strange = [type(batch).__name__ for batch in batches if several and not isinstance(batch, Mapping)]
    if strange:
        allowed = 'dicts of keyword arguments, with targets under "label", as the model takes several inputs'
        raise ArgumentError.of("batches", strange[0], allowed)


def wanted(given: Any, lossless: bool) -> PruningPlan | PruningBudget:
    """Return the plan or the budget that is asked for.

    Args:
        given: The argument of ``prune``.
        lossless: Whether only constant neurons may go; then nothing else can be asked for.

    Returns:
        A plan where neurons are named, else a budget.
    """
    if not isinstance(lossless, bool):
        raise ArgumentError.of("lossless", lossless, "True or False")
    if lossless:
        if given is not None:
            raise ArgumentError.of("plan_or_budget", given, "None with lossless=True, which takes all constant neurons")
        return CONSTANT
    if isinstance(given, PruningPlan | PruningBudget):
        return given
    if is_number(given):
        if given == 1:  # a slip that would leave one neuron in each layer
            raise ArgumentError.of("plan_or_budget", given, "a share of neurons below 1, such as 0.3")
        return PruningBudget("weight_l2", amount=given)
    if isinstance(given, Mapping):
        names = [field.name for field in fields(PruningBudget)]
        if not any(name in names for name in given):
            return PruningPlan.from_indices(given)
        unknown = [name for name in given if name not in names]
        if unknown:
            raise UnknownNameError.among("plan_or_budget", str(unknown[0]), names)
        return PruningBudget(**given)
    allowed = "a PruningPlan, a PruningBudget, a mapping of layers to neurons, or a share of neurons"
    raise ArgumentError.of("plan_or_budget", given, allowed)
