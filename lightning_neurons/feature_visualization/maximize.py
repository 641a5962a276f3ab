"""Images that maximise a neuron, a layer or an output (Erhan et al. 2009; Olah et al. 2017, distill.pub)."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_neurons.attribution.objective import Objective, Of, objective_of
from lightning_neurons.attribution.readout import Readout
from lightning_neurons.errors import ArgumentError, check_choice
from lightning_neurons.feature_visualization.init import (
    activations_on,
    batches_of,
    parametrization_of,
    shape_of,
    some_of,
    start_of,
)
from lightning_neurons.feature_visualization.optimize import Ascent
from lightning_neurons.feature_visualization.parametrization import ParametrizationKind
from lightning_neurons.feature_visualization.result import MaximizedActivation
from lightning_neurons.feature_visualization.settings import MaximizationSettings, range_of, seeds_of
from lightning_neurons.feature_visualization.value_range import Validity
from lightning_neurons.measurement.arguments import given_model
from lightning_neurons.measurement.outcomes import Forward

Target = int | str | tuple[str, int]


def maximize_activation(
    model: nn.Module,
    target: Target | Sequence[Target],
    *,
    input_shape: Sequence[int] | None = None,
    value_range: tuple[float, float] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    images: Any = None,
    of: Literal["logit", "probability"] = "logit",
    minus: Target | None = None,
    start: Literal["noise", "grey"] | Tensor = "noise",
    parametrization: ParametrizationKind | None = None,
    validity: Validity = "sigmoid",
    steps: int = 256,
    learning_rate: float | None = None,
    total_variation: float = 0.0,
    l2: float = 0.0,
    blur: float = 0.0,
    jitter: float | None = None,
    scale: float | None = None,
    rotation: float | None = None,
    seed: int | Sequence[int] = 0,
    frames: int = 0,
    forward: Forward | None = None,
) -> MaximizedActivation:
    """Find images on which an output, or a neuron, is as active as can be.

    The model runs in evaluation mode, frozen; its weights, modes, random state and hooks are afterwards as they were.
    Where no output is needed, its forward ends behind the layer that is looked at. All targets and seeds are optimised
    in one batch; the image of each is the same as alone, up to rounding.

    Args:
        model: Any module that returns logits ``(batch, class)``, or an object with ``logits``.
        target: A class; ``("layer", neuron)``: its activation, the mean over positions; the name of a layer: the mean
            of its neurons; or a list of those.
        input_shape: Of one input, ``(channel, *space)``; that of ``images`` if None.
        value_range: Least and largest value of a valid image, before normalisation; those of ``images`` if None.
        mean: Of the normalisation that the model's inputs have had, a number or one per channel: inputs are
            (image - mean) / std.
        std: The standard deviation of the same, likewise.
        images: Images of your own, as the model takes them (normalised): a tensor, or an iterable of batches, which
            is held in memory. Colours and spectrum come from them, and what the result is compared with.
        of: Of a class, its ``"logit"`` or its softmax ``"probability"``.
        minus: Another target, which is subtracted: the difference of the two is maximised.
        start: ``"noise"``, ``"grey"`` or an image in the range, ``(channel, *space)``.
        parametrization: ``"fourier"``: frequency by frequency, in the colours of ``images``; ``"pixel"``; ``"maco"``:
            phases alone, with the magnitudes of the spectrum of ``images``. Fourier if None and there are positions.
        validity: ``"sigmoid"`` bends values into the range; ``"clip"`` cuts them off after each step, which
            between Fourier coefficients and pixels can end short of the maximum.
        steps: Number of steps of Adam (NAdam for phases).
        learning_rate: 0.05 if None, 0.1 for phases.
        total_variation: Weight of the mean difference between neighbours, in units of the activation.
        l2: Weight of the mean square distance from the middle of the range.
        blur: Standard deviation, in positions, of a Gaussian over the image every fourth step.
        jitter: At each step the image is moved by up to so many positions along each axis; a sixteenth of the shorter
            side, rounded down, if None.
        scale: Grown or shrunk by up to this share; 0.05 if None and there are two axes of at least 16 positions.
        rotation: Turned by up to so many degrees; 5 if None and there are two axes of at least 16 positions.
        seed: Of the start and the movements; several make as many images of each target.
        frames: Number of images to keep along the way.
        forward: Runs the model: ``(model, inputs) -> logits``; None calls it.

    Returns:
        The images, the activations that they reach, and those of the given ``images``.

    Raises:
        ArgumentError: If an argument is out of range, missing, or contradicts another.
        UnknownNameError: If there is no such layer; names the nearest.
        MeasurementError: If the model refuses images of this shape, or the target does not depend on them.

    Example:
        >>> torch.manual_seed(0)
        <torch...Generator object at ...>
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        >>> found = maximize_activation(net, target=2, input_shape=(1, 8, 8), value_range=(0.0, 1.0), steps=16)
        >>> found.image.shape, found.activation > net(torch.full((1, 1, 8, 8), 0.5))[0, 2].item()
        (torch.Size([1, 8, 8]), True)
    """
    settings = MaximizationSettings(
        parametrization, validity, steps, learning_rate, total_variation, l2, blur, jitter, scale, rotation, frames
    )
    check_choice("of", of, ("logit", "probability"))
    return maximized(
        model, objectives_of(model, target, of, minus), settings, seeds_of(seed), input_shape=input_shape,
        value_range=value_range, mean=mean, std=std, images=images, start=start, forward=forward,
    )  # fmt: skip


def objectives_of(model: nn.Module, target: Any, of: Of = "logit", minus: Any = None) -> list[Objective]:
    """Return the objectives of one target or several.

    Raises:
        ArgumentError: If one is no target, or there are none.
        UnknownNameError: If there is no such layer.
    """
    given_model(model)
    is_pair = isinstance(target, tuple) and len(target) == 2 and isinstance(target[0], str)
    several = isinstance(target, Sequence | range) and not isinstance(target, str) and not is_pair
    targets = list(target) if several else [target]
    if not targets:
        raise ArgumentError.of("target", target, "at least one target")
    return [objective_of(model, entry, of, minus) for entry in targets]


@torch.inference_mode(False)  # what is made in it could not be differentiated
def maximized(
    model: nn.Module,
    objectives: Sequence[Objective],
    settings: MaximizationSettings,
    seeds: Sequence[int],
    *,
    input_shape: Sequence[int] | None,
    value_range: Any,
    mean: Any,
    std: Any,
    images: Any,
    start: Any = "noise",
    forward: Forward | None = None,
) -> MaximizedActivation:
    """Maximise several objectives from several seeds at once, as ``maximize_activation`` does for one.

    Returns:
        Images ``(row, channel, *space)``, one row for each objective and seed, with the activations that they reach.
    """
    batches = [] if images is None else list(batches_of(images))
    if images is not None and not batches:
        raise ArgumentError.of("images", images, "at least one image")
    samples = some_of(batches) if batches else None
    shape = shape_of(input_shape, samples)
    kind, robustness = settings.kind(shape, has_images=bool(batches)), settings.robustness(shape)
    valid = range_of(value_range, mean, std, settings.validity, batches, shape[0])
    latent = None if samples is None else valid.latent(valid.pictures(samples))
    described = parametrization_of(kind, shape, latent)
    rows = [(objective, seed) for objective in objectives for seed in seeds]
    readout = Readout(
        model,
        sorted({n for objective in objectives for n in objective.layers}),
        forward,
        stop=not any(objective.reads_output for objective in objectives),
    )
    with readout.open():
        ascent = Ascent(readout, [objective for objective, _ in rows], settings, kind, described, valid, robustness)
        own = activations_on(readout, objectives, batches).repeat_interleave(len(seeds), 0) if batches else None
        generators = [torch.Generator().manual_seed(seed) for _, seed in rows]
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        results, reached = ascent.run(start_of(start, described, valid, shape, generators).to(device), generators)
    notes = _notes(ascent, rows)
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return _result(ascent, rows, results.cpu(), reached.float().cpu(), own, notes)


def _result(
    ascent: Ascent,
    rows: Sequence[tuple[Objective, int]],
    images: Tensor,
    reached: Tensor,
    own: Tensor | None,
    notes: list[str],
) -> MaximizedActivation:
    nothing = torch.full((len(rows),), torch.nan)
    return MaximizedActivation(
        targets=tuple(objective.name for objective, _ in rows),
        seeds=tuple(seed for _, seed in rows),
        images=images,
        activations=reached,
        trajectory=torch.stack(ascent.trajectory).float(),
        frames=torch.stack(ascent.frames) if ascent.frames else images.new_zeros(0, *images.shape),
        data_maximum=nothing if own is None else own.amax(1),
        data_p99=nothing if own is None else own.quantile(0.99, dim=1),
        data_activations=torch.zeros(len(rows), 0) if own is None else own,
        range=ascent.range,
        notes=tuple(notes),
    )


def _notes(ascent: Ascent, rows: Sequence[tuple[Objective, int]]) -> list[str]:
    return [
        f"{rows[row][0].name} (seed {rows[row][1]}) was NaN or infinite, or its gradient was, at step {step}: stopped "
        "there, with the last good image"
        for row, step in ascent.stopped.items()
    ]
