"""Class studies: the neurons that serve a class, and the accuracy of a network of those neurons alone."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from lightning_neurons.class_study.choice import ClassRule
from lightning_neurons.class_study.steps import ClassStudy
from lightning_neurons.criteria import CRITERIA
from lightning_neurons.errors import (
    ArgumentError,
    UnknownNameError,
    check_choice,
    check_count,
    check_flag,
    check_seed,
    is_number,
)
from lightning_neurons.isolation.isolation import isolated
from lightning_neurons.layers.layer import Pattern, require_materialized
from lightning_neurons.measurement.arguments import given_batches, given_model
from lightning_neurons.measurement.measure import call_on_inputs
from lightning_neurons.measurement.outcomes import Forward
from lightning_neurons.results.class_report import ClassReport

StudyMethod = Literal["thresholding", "masking"]


def class_study(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    classes: Sequence[int] | None = None,
    method: StudyMethod = "thresholding",
    importance: str = "mean",
    share: float | None = None,
    threshold: float | None = None,
    cumulative: float | None = None,
    layers: Sequence[Pattern] | None = None,
    replacement: Literal["zero", "mean"] = "zero",
    controls: int = 3,
    forward: Forward | None = None,
    progress: bool = False,
    seed: int = 0,
) -> ClassReport:
    """Find the neurons of each class, and measure the sub-network that they make, and the network without them.

    For every class: its important neurons; the accuracy of the model with only those (the sub-network) and without
    them (the ablation model), on all samples, on the class's own and on the others; the same with as many neurons drawn
    at random, and with the other classes' neurons. The layer that makes the logits keeps all its neurons.

    Args:
        model: A classifier, run in evaluation mode and left as it was. Batches must lie on its device.
        batches: An iterable of batches that show their targets, such as pairs; kept in memory.
        classes: The classes; None takes all that the data has.
        method: The measure of importance. ``"thresholding"``: from the samples of the class, one pass for all neurons;
            ``"masking"``: the measured change of the class's loss without each neuron, see ``ablate``.
        importance: For thresholding, the name of a criterion: ``"mean"`` activation, or ``"fisher"``, for example.
        share: The most important share of each layer belongs to the class; 0.5 if no rule is given.
        threshold: Neurons that are at least so important belong to the class.
        cumulative: The fewest neurons of a layer that hold this share of its importance belong to the class.
        layers: None for all, or patterns of paths, names of classes or module types; others are left alone.
        replacement: The activation of neurons that are off: ``"zero"``, or their ``"mean"`` over all samples.
        controls: Number of random draws to compare with; classes with as many neurons share them.
        forward: Returns the logits of the model on a batch, or an object with ``logits``; None calls the model on the
            batch's inputs.
        progress: Show progress bars.
        seed: Of the random draws.

    Returns:
        Neurons, overlaps and accuracies.

    Raises:
        ArgumentError: If an argument is out of range, a class has no samples, or a rule keeps nothing or everything.
        MeasurementError: If the model gives no logits, or batches show no targets.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> data = [(torch.randn(8, 4), torch.arange(8) % 2)]
        >>> report = class_study(net, data, share=0.5)
        >>> len(report.subnetwork(0)["0"]), [row.model for row in report.accuracies if row.klass == 0]
        (3, ['whole', 'subnetwork', 'ablation', 'random subnetwork', 'random ablation', 'other subnetworks'])
    """
    given_model(model)
    require_materialized(model)
    if forward is not None and (not callable(forward) or isinstance(forward, nn.Module | type)):
        raise ArgumentError.of("forward", type(forward).__name__, "a function (model, batch) -> logits")
    study = ClassStudy(
        model,
        forward or call_on_inputs,
        checked_settings(classes, method, importance, replacement, controls, layers, seed),
        ClassRule(share, threshold, cumulative),
    )
    check_flag("progress", progress)
    data = given_batches(batches)
    with isolated(model), torch.no_grad():
        model.eval()
        return study.run(data, progress=progress)


def checked_settings(
    classes: Any, method: Any, importance: Any, replacement: Any, controls: Any, layers: Any, seed: int
) -> dict[str, Any]:
    """Return the settings of a study, checked as far as they can be without a model.

    Raises:
        ArgumentError: If one is out of range.
    """
    check_choice("method", method, get_args(StudyMethod))
    check_choice("replacement", replacement, ("zero", "mean"))
    if method == "masking" and importance != "mean":
        raise ArgumentError.of("importance", importance, 'the default with method="masking", which measures it')
    names = [name for name, criterion in CRITERIA.items() if criterion.statistics and criterion.kind == "importance"]
    if importance not in names:
        raise UnknownNameError.among("importance", str(importance), names)
    return {
        "classes": None if classes is None else _class_numbers(classes),
        "method": method,
        "importance": "ablation" if method == "masking" else importance,
        "replacement": replacement,
        "controls": check_count("controls", controls),
        "layers": layers,
        "seed": check_seed("seed", seed),
    }


def _class_numbers(classes: Any) -> list[int]:
    allowed = "None for all, or a list of class numbers, each once"
    numbers = classes.tolist() if hasattr(classes, "tolist") else classes
    if not isinstance(numbers, Sequence) or isinstance(numbers, str) or not numbers:
        raise ArgumentError.of("classes", classes, allowed)
    are_whole = all(is_number(k) and hasattr(k, "__index__") and k >= 0 for k in numbers)
    if not are_whole or len({*numbers}) != len(numbers):
        raise ArgumentError.of("classes", classes, allowed)
    return [int(k) for k in numbers]
