"""Ablation of several neurons at once: the check before a cut, and cumulative curves."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_neurons.ablation.engine import AblationEngine, given_study, require_present
from lightning_neurons.ablation.neuron_choice import NeuronChoice, chosen_neurons
from lightning_neurons.ablation.sums import Effects
from lightning_neurons.criteria.ranking import order
from lightning_neurons.errors import ArgumentError, UnknownNameError, check_count
from lightning_neurons.hooks.intervention import Replacement
from lightning_neurons.isolation.isolation import isolated
from lightning_neurons.layers.layer import widths_of
from lightning_neurons.measurement.arguments import given_batches
from lightning_neurons.measurement.losses import LossReduction
from lightning_neurons.measurement.outcomes import LossFunction
from lightning_neurons.results.ablation_report import AblationCurves, JointAblation


def ablate_together(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    sets: Sequence[NeuronChoice],
    *,
    replacement: Replacement = "zero",
    loss_reduction: LossReduction = "mean",
    memory_limit: int = 2**30,
    progress: bool = False,
    seed: int = 0,
) -> JointAblation:
    """Measure the loss without each of several sets of neurons, such as those of a pruning plan or of a coupled group.

    Args:
        model: Any module; it is left as it was. Batches must lie on its device.
        batches: An iterable of batches of any form; kept in memory.
        loss_fn: As in ``ablate``.
        sets: Sets of neurons, each in a form that ``ablate`` takes: ``plan.neurons``, for example.
        replacement: As in ``ablate``.
        loss_reduction: As in ``ablate``.
        memory_limit: As in ``ablate``.
        progress: Show a progress bar.
        seed: Of the shuffles of ``"resample"``.

    Returns:
        For each set, the change of the loss; interrupted from the keyboard, of what has been measured.

    Raises:
        ArgumentError: If a set is empty or names something unknown, or an argument is out of range.
        MeasurementError: If the model or its data cannot be measured.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> data = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
        >>> loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> ablate_together(net, data, loss, [{"0": [0, 1]}, {"0": [2]}]).delta_loss.shape
        torch.Size([2])
    """
    options = {"replacement": replacement, "loss_reduction": loss_reduction, "memory_limit": memory_limit}
    study = given_study(model, loss_fn, **options, progress=progress, seed=seed)
    if isinstance(sets, str | Mapping) or not isinstance(sets, Sequence) or not sets:
        raise ArgumentError.of("sets", sets, 'a list of sets, such as [{"conv1": [0, 3]}, plan.neurons]')
    chosen = [chosen_neurons(model, neurons, name=f"sets[{i}]") for i, neurons in enumerate(sets)]
    base, changes = measure_sets(study, given_batches(batches), chosen, progress=progress)
    return JointAblation(
        loss=float(base.mean[0]),
        samples=int(base.samples[0]),
        delta_loss=changes.mean,
        standard_error=changes.standard_error,
        neurons=tuple(chosen),
    )


def ablation_curves(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    scores: Mapping[str, Tensor],
    *,
    points: int = 11,
    random_orders: int = 5,
    replacement: Replacement = "zero",
    loss_reduction: LossReduction = "mean",
    memory_limit: int = 2**30,
    progress: bool = False,
    seed: int = 0,
) -> AblationCurves:
    """Remove more and more neurons: the least important first, the most important first, and in random orders.

    The cumulative ablation curves of Morcos et al. 2018. A ranking is worth something if the first curve stays below
    the random ones and the second above.

    Args:
        model: Any module; it is left as it was. Batches must lie on its device.
        batches: An iterable of batches of any form; kept in memory.
        loss_fn: As in ``ablate``.
        scores: By layer, higher more important: scores of a report, or ``AblationReport.delta_loss``. Layers and
            neurons (NaN) that it leaves out stay.
        points: Number of shares of neurons to measure, from none to all.
        random_orders: Number of random orders, the control.
        replacement: As in ``ablate``.
        loss_reduction: As in ``ablate``.
        memory_limit: As in ``ablate``.
        progress: Show a progress bar.
        seed: Of the random orders.

    Returns:
        Mean losses by share removed, and the areas under the curves; interrupted, of what has been measured.

    Raises:
        ArgumentError: If scores do not fit the model, or an argument is out of range.
        MeasurementError: If the model or its data cannot be measured.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> data = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
        >>> loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> curves = ablation_curves(net, data, loss, {"0": torch.tensor([3.0, 1.0, 2.0])}, points=4)
        >>> curves.shares.tolist(), curves.random.shape
        ([0.0, 0.333..., 0.666..., 1.0], torch.Size([5, 4]))
    """
    options = {"replacement": replacement, "loss_reduction": loss_reduction, "memory_limit": memory_limit}
    study = given_study(model, loss_fn, **options, progress=progress, seed=seed)
    check_count("points", points, least=2)
    check_count("random_orders", random_orders, least=1)
    ranked = _ranked(model, scores)
    generator = torch.Generator().manual_seed(seed)
    orders = [ranked[::-1], ranked]
    orders += [[ranked[i] for i in torch.randperm(len(ranked), generator=generator)] for _ in range(random_orders)]
    counts = [round(i * len(ranked) / (points - 1)) for i in range(points)]
    sets = [_by_layer(ordered[:count]) for ordered in orders for count in counts[1:-1]] + [_by_layer(ranked)]
    base, changes = measure_sets(study, given_batches(batches), sets, progress=progress)
    losses = base.mean[0] + changes.mean
    inner = losses[:-1].view(len(orders), points - 2)
    ends = losses.new_full((len(orders), 1), float(base.mean[0])), losses[-1:].expand(len(orders), 1)
    curves = torch.cat([ends[0], inner, ends[1]], 1)
    shares = torch.tensor(counts, dtype=torch.float64) / len(ranked)
    return AblationCurves(shares, least_first=curves[0], most_first=curves[1], random=curves[2:])


def measure_sets(
    study: AblationEngine,
    batches: Sequence[Any],
    sets: Sequence[Mapping[str, Sequence[int]]],
    *,
    progress: bool = False,
) -> tuple[Effects, Effects]:
    """Measure the loss, and its change without each set.

    Args:
        study: The engine.
        batches: The data.
        sets: Neurons by layer.
        progress: Whether to show a bar.

    Returns:
        Sums of the loss of the unchanged model, and of its change, one row for each set.
    """
    base, changes = Effects.of(1), Effects.of(len(sets))
    with isolated(study.model), torch.no_grad(), study.open():
        study.model.eval()
        study.look(batches[0])
        require_present(study, {name for neurons in sets for name in neurons})
        if study.replacement == "mean":
            study.measure_means(batches)
        parts = [part for batch in batches for part in study.parts(batch)]
        with tqdm(total=len(parts) * len(sets), desc="sets", disable=not progress) as bar, suppress(KeyboardInterrupt):
            for part in parts:
                here = study.on(part)
                here.order(list(dict.fromkeys(name for neurons in sets for name in neurons)))
                base.add([0], here.outcome.losses, here.outcome.weights)
                for row, neurons in enumerate(sets):
                    first, second = here.without([neurons]), here.outcome
                    if not first.agrees(second):
                        first, second = first.averaged(), second.averaged()
                    changes.add([row], first.losses - second.losses, second.weights)
                    bar.update()
    return base, changes


def _ranked(model: nn.Module, scores: Any) -> list[tuple[str, int]]:
    """Return neurons from the most to the least important."""
    if not isinstance(scores, Mapping) or not scores or not all(isinstance(s, Tensor) for s in scores.values()):
        raise ArgumentError.of("scores", scores, "scores by layer, such as report.scores['fisher']")
    widths = widths_of(model)
    for name, values in scores.items():
        if name not in widths:
            raise UnknownNameError.among("scores", str(name), widths)
        if values.shape != (widths[name],):
            raise ArgumentError.of(f"scores[{name!r}]", tuple(values.shape), f"one score for each of {widths[name]}")
    pairs = [(name, i) for name, values in scores.items() for i in range(len(values))]
    flat: Float[Tensor, " neuron"] = torch.cat([values.double().cpu() for values in scores.values()])
    ranked = [pairs[i] for i in order(flat).tolist() if not flat[i].isnan()]
    if not ranked:
        raise ArgumentError.of("scores", "NaN only", "at least one score that is a number")
    return ranked


def _by_layer(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    by_layer: dict[str, list[int]] = {}
    for layer, neuron in pairs:
        by_layer.setdefault(layer, []).append(neuron)
    return by_layer
