"""Perturbation: the loss after a shift of the weights of a parameter, or of one neuron."""

import fnmatch
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_neurons.ablation.engine import AblationEngine
from lightning_neurons.ablation.neuron_choice import layers_matching
from lightning_neurons.ablation.sums import Effects
from lightning_neurons.errors import ArgumentError, UnknownNameError, check_choice, check_flag, check_seed, is_number
from lightning_neurons.hooks.weights import neuron_weights
from lightning_neurons.isolation.isolation import isolated
from lightning_neurons.layers.layer import public_name, require_materialized
from lightning_neurons.layers.width_handlers import weight_name
from lightning_neurons.measurement.arguments import given_batches, given_loss, given_model
from lightning_neurons.measurement.losses import LOSS_REDUCTIONS, LossReduction
from lightning_neurons.measurement.outcomes import LossFunction
from lightning_neurons.results.ablation_report import PerturbationReport, Perturbed

PerturbationMode = Literal["add", "scale", "noise"]
Level = Literal["parameter", "neuron"]


@dataclass(frozen=True)
class _Target:
    name: str
    parameter: Tensor
    part: Tensor  # a view of what is shifted
    neuron: int | None = None


def perturb(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    *,
    delta: float = 0.1,
    mode: PerturbationMode = "add",
    level: Level = "parameter",
    parameters: Sequence[str] | None = None,
    loss_reduction: LossReduction = "mean",
    progress: bool = False,
    seed: int = 0,
) -> PerturbationReport:
    """Rank parameters, or neurons, by the loss after a shift of their weights, in evaluation mode.

    For every parameter (or every neuron of every layer) in turn: shift, measure, restore bit for bit. Only what reads
    the shifted weights, and what comes behind it, is computed again; the losses are those of whole forwards. (The fused
    path of ``nn.TransformerEncoder``, which rounds otherwise, is off wherever calls are watched.)

    Args:
        model: Any module. Batches must lie on its device.
        batches: An iterable of batches of any form; kept in memory.
        loss_fn: Called with the model and a batch; returns a scalar, or one loss per sample.
        delta: Size of the shift, see ``mode``.
        mode: ``"add"`` adds ``delta``, ``"scale"`` multiplies by ``1 + delta``, ``"noise"`` adds normal noise of
            standard deviation ``delta``.
        level: ``"parameter"`` shifts whole parameters; ``"neuron"`` the incoming weights of one neuron at a time.
        parameters: Patterns of names of parameters; None takes those whose name contains ``weight``. With
            ``level="neuron"``, patterns of layers; None takes all.
        loss_reduction: Reduction of a scalar of ``loss_fn`` over samples: ``"mean"`` or ``"sum"``.
        progress: Show a progress bar.
        seed: Of the noise.

    Returns:
        The losses. Interrupted from the keyboard, nothing is returned, and the weights are as they were.

    Raises:
        ArgumentError: If an argument is out of range, or a pattern matches nothing.
        MeasurementError: If the model or its data cannot be measured.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> data = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
        >>> loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> sorted(row.name for row in perturb(net, data, loss).ranking())
        ['0.weight', '2.weight']
        >>> len(perturb(net, data, loss, level="neuron", delta=1.0).ranking())
        5
    """
    given_model(model)
    given_loss(loss_fn)
    require_materialized(model)
    check_choice("mode", mode, get_args(PerturbationMode))
    check_choice("level", level, get_args(Level))
    check_choice("loss_reduction", loss_reduction, LOSS_REDUCTIONS)
    check_flag("progress", progress)
    check_seed("seed", seed)
    if not is_number(delta) or not -1e30 < delta < 1e30 or delta == 0 or (mode == "noise" and delta < 0):
        raise ArgumentError.of("delta", delta, "a number other than 0" if mode != "noise" else "a number above 0")
    targets = list((_parameters if level == "parameter" else _neurons)(model, parameters))
    data = given_batches(batches)
    study = AblationEngine(model, loss_fn, loss_reduction=loss_reduction, by_sample=False)
    base, changed = Effects.of(1), Effects.of(len(targets))
    with isolated(model), torch.no_grad(), study.open():
        model.eval()
        study.look(data[0])
        with tqdm(total=len(data) * len(targets), desc="perturbation", disable=not progress) as bar:
            for batch in data:
                here = study.on(batch)
                base.add([0], here.outcome.losses, here.outcome.weights)
                for row in here.order_of([target.parameter for target in targets]):
                    target = targets[row]
                    here.prepare_parameter(target.parameter)
                    with shifted(target.part, mode, delta, seed + row):
                        outcome = here.with_changed(target.parameter)
                    changed.add([row], outcome.losses, outcome.weights)
                    bar.update()
    return _report(base, changed, targets, {"delta": delta, "mode": mode, "level": level, "seed": seed})


@contextmanager
def shifted(weights: Tensor, mode: PerturbationMode, delta: float, seed: int = 0) -> Iterator[None]:
    """Shift weights in place; they are put back bit for bit, whatever happens.

    Args:
        weights: The weights: a parameter, or a view of a part of one.
        mode: See ``perturb``.
        delta: See ``perturb``.
        seed: Of the noise.
    """
    kept = weights.detach().clone()
    with torch.no_grad():
        try:
            if mode == "scale":
                weights.mul_(1 + delta)
            elif mode == "add":
                weights.add_(delta)
            else:
                generator = torch.Generator().manual_seed(seed)
                weights.add_(torch.randn(weights.shape, generator=generator).to(weights), alpha=delta)
            torch.clear_autocast_cache()  # it would go on with the weights as they were
            yield
        finally:
            weights.copy_(kept)
            torch.clear_autocast_cache()


def _parameters(model: nn.Module, patterns: Sequence[str] | None) -> Iterator[_Target]:
    named = {public_name(name): parameter for name, parameter in model.named_parameters()}
    if patterns is None:
        chosen = [name for name in named if "weight" in name]
    else:
        _check_patterns(patterns)
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in named):
                raise UnknownNameError.among("parameters", pattern, named)
        chosen = [name for name in named if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise ArgumentError.of("model", type(model).__name__, 'a model with parameters named "weight", or parameters=')
    yield from (_Target(name, named[name], named[name].detach()) for name in chosen)


def _neurons(model: nn.Module, patterns: Sequence[str] | None) -> Iterator[_Target]:
    if patterns is not None:
        _check_patterns(patterns)
    has_neurons = False
    for layer, module in layers_matching("parameters", model, patterns).items():
        name = weight_name(module)
        weight = getattr(module, name, None)
        if isinstance(weight, Tensor) and module._parameters.get(name) is not weight:
            allowed = f'"parameter", as the {name} of {layer!r} is computed from others; or parameters= without it'
            raise ArgumentError.of("level", "neuron", allowed)
        for neuron, part in enumerate(neuron_weights(module)):
            has_neurons = True
            assert isinstance(weight, Tensor), "it has weights of neurons"
            yield _Target(f"{layer}.{name}[{neuron}]", weight, part, neuron)
    if not has_neurons:
        raise ArgumentError.of("model", type(model).__name__, "a model with convolutional or linear layers")


def _check_patterns(patterns: Any) -> None:
    is_list = isinstance(patterns, Sequence) and not isinstance(patterns, str)
    if not is_list or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentError.of("parameters", patterns, 'None, or a list of patterns such as ["layer1.*"]')


def _report(
    base: Effects, changed: Effects, targets: Sequence[_Target], settings: dict[str, Any]
) -> PerturbationReport:
    loss = float(base.mean[0])
    rows = tuple(
        Perturbed(target.name, mean, mean - loss, target.neuron)
        for target, mean in zip(targets, changed.mean.tolist(), strict=True)
    )
    broken = [row.name for row in rows if not math.isfinite(row.loss)]
    notes = [f"the loss was not finite, so ranked last: {', '.join(broken)}"] if broken else []
    return PerturbationReport(loss, int(base.samples[0]), rows, settings, tuple(notes))
