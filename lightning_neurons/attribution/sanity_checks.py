"""Sanity checks: the dependence of a map on what a model has learnt (Adebayo et al. 2018, arXiv:1810.03292).

Layers are given random weights, one after the other from the output down. A map that stays the same has never looked at
them: it shows the image, not the model.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from lightning_neurons.attribution.objective import logits_of
from lightning_neurons.attribution.readout import Readout, require_samples
from lightning_neurons.attribution.request import AttributionTarget
from lightning_neurons.attribution.saliency import SaliencyMethod, saliency
from lightning_neurons.criteria.ranking import agreement
from lightning_neurons.errors import ArgumentError, MeasurementError, UnknownNameError, check_seed
from lightning_neurons.isolation.copying import copy_of
from lightning_neurons.layers.layer import modules_by_name, public_name
from lightning_neurons.measurement.arguments import given_model
from lightning_neurons.measurement.outcomes import Forward

_WINDOW = 5
_STEPS = 32  # of integrated gradients: similarity does not need completeness


@dataclass(frozen=True)
class RandomizedLayer:
    """Similarity of the maps to those of the trained model when this layer, and all behind it, are randomised.

    Attributes:
        layer: Its path.
        spearman: Mean over samples of the rank correlation of magnitudes with those of the trained model.
        ssim: Mean structural similarity of the two magnitudes, each divided by its maximum; NaN without two axes of
            positions of at least 11.
    """

    layer: str
    spearman: float
    ssim: float


def randomization_check(
    model: nn.Module,
    inputs: Any,
    target: AttributionTarget = None,
    *,
    method: SaliencyMethod = "gradient",
    layers: Sequence[str] | None = None,
    seed: int = 0,
    forward: Forward | None = None,
    **options: Any,
) -> list[RandomizedLayer]:
    """Measure how similar saliency stays while a copy of the model is randomised from the output down.

    Args:
        model: Any module that can be copied; it is not changed.
        inputs: As for ``saliency``.
        target: As for ``saliency``; None takes the classes that the trained model predicts.
        method: As for ``saliency``.
        layers: Modules with ``reset_parameters()``, the first to be randomised first; all that have weights, from the
            last to the first to run, if None.
        seed: Of the random weights.
        forward: As for ``saliency``.
        **options: As for ``saliency``.

    Returns:
        One entry per layer. Values near 1 mean that a map does not depend on the weights; a warning names modules whose
        weights cannot be drawn anew, and stay.

    Raises:
        ArgumentError: If an argument is out of range, or a layer cannot be given random weights.
        MeasurementError: If the model cannot be copied, or refuses the inputs.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        >>> for step in randomization_check(net, torch.rand(4, 1, 8, 8)):
        ...     print(step.layer, step.spearman < 0.5)
        3 True
        1 True
    """
    check_seed("seed", seed)
    given_model(model)
    if layers is not None and (isinstance(layers, str) or not isinstance(layers, Sequence)):
        raise ArgumentError.of("layers", layers, "None, or a list of names of layers")
    require_samples(inputs)
    readout = Readout(model, (), forward)
    with readout.open():
        run_order, logits = _run_order(readout, inputs)
    target = logits_of(logits).argmax(1) if target is None else target
    names = run_order[::-1] if layers is None else [_resettable(model, name) for name in layers]
    if layers is None:
        _say_what_is_left(model, names)
    if method == "integrated_gradients":
        options.setdefault("steps", _STEPS)
    original = saliency(model, inputs, target, method=method, forward=forward, **options)
    steps = []
    with torch.inference_mode(False), torch.random.fork_rng():
        twin = _copied(model)
        torch.manual_seed(seed)
        paths = {public_name(path): path for path, _ in twin.named_modules()}
        for name in names:
            cast(Any, twin.get_submodule(paths[name])).reset_parameters()
            maps = saliency(twin, inputs, target, method=method, forward=forward, **options)
            steps.append(RandomizedLayer(name, _spearman(original, maps), _ssim(original, maps)))
    return steps


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy_of(model)
    except Exception as error:
        raise MeasurementError(f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}") from error


def _run_order(readout: Readout, inputs: Any) -> tuple[list[str], Any]:
    """Return the modules with weights that can be drawn anew, in the order in which they run first; and the output."""
    order: dict[str, None] = {}
    modules = {name: m for name, m in modules_by_name(readout.model).items() if _has_own_weights(m)}
    handles = [
        m.register_forward_hook(lambda *_, name=name: order.setdefault(name))
        for name, m in modules.items()
        if hasattr(m, "reset_parameters")
    ]
    try:
        with torch.no_grad():
            outputs, _ = readout(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(order), outputs


def _has_own_weights(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _say_what_is_left(model: nn.Module, names: Sequence[str]) -> None:
    left = [name for name, m in modules_by_name(model).items() if _has_own_weights(m) and name not in names]
    if not names:
        raise ArgumentError.of("model", type(model).__name__, "modules with reset_parameters(), such as nn.Linear")
    if left:
        listed = ", ".join(name or "the model itself" for name in left)
        warnings.warn(f"randomization_check leaves the weights of {listed} as they are", stacklevel=3)


def _resettable(model: nn.Module, name: Any) -> str:
    modules = modules_by_name(model)
    if not isinstance(name, str):
        raise ArgumentError.of("layers", name, "a list of names of layers")
    if name not in modules:
        raise UnknownNameError.among("layers", name, [n for n in modules if hasattr(modules[n], "reset_parameters")])
    if not hasattr(modules[name], "reset_parameters"):
        raise ArgumentError.of("layers", name, "layers with reset_parameters(), such as nn.Conv2d and nn.Linear")
    return name


def _spearman(first: Tensor, second: Tensor) -> float:
    pairs = zip(first.abs().flatten(1), second.abs().flatten(1), strict=True)
    correlations = [agreement(a, b).spearman for a, b in pairs]
    defined = [s for s in correlations if not math.isnan(s)]
    return sum(defined) / len(defined) if defined else math.nan


def _ssim(first: Tensor, second: Tensor) -> float:
    if first.ndim != 4 or min(first.shape[2:]) < 2 * _WINDOW + 1:
        return math.nan
    a, b = (_scaled(maps.abs().sum(1, keepdim=True)) for maps in (first, second))
    similarity = structural_similarity_index_measure(a, b, data_range=1.0)
    assert isinstance(similarity, Tensor), "one number for the batch"
    return float(similarity)


def _scaled(maps: Tensor) -> Tensor:
    return maps / maps.flatten(1).amax(1).clamp_min(torch.finfo(maps.dtype).tiny).view(-1, 1, 1, 1)
