"""Saliency maps: attributions of an output, or of a neuron's activation, to the inputs.

Gradient: Simonyan et al. 2013, arXiv:1312.6034. SmoothGrad: Smilkov et al. 2017, arXiv:1706.03825.
"""

import warnings
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_neurons.attribution.grad_cam import grad_cam
from lightning_neurons.attribution.integrated_gradients import COMPLETENESS, MOST_POINTS, Integrated, integrated
from lightning_neurons.attribution.objective import Of
from lightning_neurons.attribution.request import AttributionRequest, AttributionTarget, Values, open_request
from lightning_neurons.attribution.smoothing import gaussian_blur
from lightning_neurons.errors import (
    ArgumentError,
    check_choice,
    check_count,
    check_flag,
    check_seed,
    check_share,
    is_number,
)
from lightning_neurons.measurement.outcomes import Forward


def vanilla(request: AttributionRequest) -> Values:
    """Return the gradient itself."""
    values = request.explained.values
    return torch.cat([request.gradient(values[rows], rows)[1] for rows in request.parts()])


def smoothgrad(request: AttributionRequest, samples: int, noise: float, seed: int) -> Values:
    """Return the mean gradient over noisy copies of each sample.

    Args:
        request: The model, its inputs and the objective.
        samples: Number of copies.
        noise: Standard deviation of the noise, as a share of each sample's range of values.
        seed: Of the noise.

    Returns:
        Shaped like what is explained.
    """
    if noise == 0:
        return vanilla(request)
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for rows in request.parts():
        values = request.explained.values[rows]
        flat = values.flatten(1)
        deviation = (noise * (flat.amax(1) - flat.amin(1))).view(-1, *[1] * (values.ndim - 1))
        total = torch.zeros_like(values)
        for _ in range(samples):
            drawn = torch.randn(values.shape, generator=generator).to(values)
            total += request.gradient(values + deviation * drawn, rows)[1]
        gradients.append(total / samples)
    return torch.cat(gradients)


SaliencyMethod = Literal["gradient", "grad_x_input", "smoothgrad", "integrated_gradients", "grad_cam"]
METHODS: tuple[SaliencyMethod, ...] = get_args(SaliencyMethod)

_MOST_SMOOTHING = 1000


def saliency(
    model: nn.Module,
    inputs: Any,
    target: AttributionTarget = None,
    *,
    method: SaliencyMethod = "gradient",
    of: Of = "logit",
    absolute: bool = False,
    smoothing: float = 0.0,
    samples: int | None = None,
    noise: float | None = None,
    seed: int = 0,
    steps: int | None = None,
    baseline: Tensor | float | None = None,
    layer: str | None = None,
    forward: Forward | None = None,
) -> Float[Tensor, "batch ..."]:
    """Attribute an output, or a neuron's activation, to the inputs.

    The model runs in evaluation mode and is afterwards as it was. Where inputs are tokens (whole numbers), gradients
    are taken at the output of the embedding that reads them: of ``"gradient"`` and ``"smoothgrad"`` each token gets
    the Euclidean norm, of the others the sum.

    Gradients say what the output reacts to, not what caused it, and a map that looks right may not depend on what the
    model has learnt: see ``randomization_check``.

    Args:
        model: Any module that returns logits ``(batch, class)``, or an object with ``logits``.
        inputs: A batch: a tensor ``(batch, ...)``, or a tuple or dict of which one tensor is explained.
        target: A class, or one class per sample; ``("layer", neuron)`` or the name of a layer: its mean activation;
            None takes each sample's predicted class.
        method: ``"gradient"``; ``"grad_x_input"``; ``"smoothgrad"``: the mean gradient over noisy copies;
            ``"integrated_gradients"``; ``"grad_cam"``: above zero, and the same for every channel.
        of: Of a class, its ``"logit"``, softmax ``"probability"``, or the cross entropy with it, ``"loss"``.
        absolute: Give magnitudes; otherwise, values are signed.
        smoothing: Standard deviation, in positions, of a Gaussian that blurs the map. A blurred map is no gradient any
            more: it hides detail and cancels signs, and looks more plausible than it is.
        samples: Of SmoothGrad, the number of copies; 16 if None.
        noise: Of SmoothGrad, its standard deviation as a share of each sample's range; 0.15 if None.
        seed: Of SmoothGrad's noise.
        steps: Of integrated gradients, the number of equal steps; None takes as many as needed to be complete to 0.1 %,
            at most 2,048, and warns if that is not enough.
        baseline: Of integrated gradients, where the path begins: a number, or a tensor like a sample or the inputs;
            0 if None.
        layer: Of Grad-CAM, the layer; the last with positions if None.
        forward: Runs the model: ``(model, inputs) -> logits``; None calls it.

    Returns:
        A tensor shaped like the inputs.

    Raises:
        ArgumentError: If an argument is out of range, or belongs to another method.
        UnknownNameError: If there is no such layer.
        MeasurementError: If the model refuses the inputs, or the target does not depend on them.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
        >>> x = torch.rand(2, 1, 2, 2)
        >>> found = saliency(net, x, target=1, method="gradient")
        >>> torch.equal(found[0].flatten(), net[1].weight[1]), found.shape
        (True, torch.Size([2, 1, 2, 2]))
    """
    check_choice("method", method, METHODS)
    check_flag("absolute", absolute)
    check_smoothing(smoothing)
    own = {"samples": samples, "noise": noise, "steps": steps, "baseline": baseline, "layer": layer}
    _refuse_options_of_others(method, own)
    if method == "integrated_gradients":
        result = integrated_gradients(model, inputs, target, of=of, steps=steps, baseline=baseline, forward=forward)
        far = result.gap.abs() > COMPLETENESS * result.spread + result.tolerance
        if steps is None and bool(far.any()):
            missing = int(far.sum())
            warnings.warn(
                f"integrated gradients of {missing} of {len(result.gap)} samples are not complete to 0.1 % after "
                f"{MOST_POINTS:,} points: what is looked at may jump along the path",
                stacklevel=2,
            )
        return finished(result.attributions, absolute=absolute, smoothing=smoothing)
    samples = check_count("samples", 16 if samples is None else samples)
    noise, seed = check_share("noise", 0.15 if noise is None else noise), check_seed("seed", seed)
    with open_request(model, inputs, target, of, forward, cam=method == "grad_cam", layer=layer) as (
        request,
        cam_layer,
    ):
        if cam_layer is not None:
            values = grad_cam(request, cam_layer).expand(request.explained.shape).clone()
        elif method == "smoothgrad":
            values = _per_token(request, smoothgrad(request, samples, noise, seed), "norm")
        else:
            times_input = method == "grad_x_input"
            values = vanilla(request) * (request.explained.values if times_input else 1)
            values = _per_token(request, values, "sum" if times_input else "norm")
    return finished(values, absolute=absolute, smoothing=smoothing)


def integrated_gradients(
    model: nn.Module,
    inputs: Any,
    target: AttributionTarget = None,
    *,
    of: Of = "logit",
    steps: int | None = None,
    baseline: Tensor | float | None = None,
    forward: Forward | None = None,
) -> Integrated:
    """Return integrated gradients, the difference that they add up to, and by how much they miss it.

    Args:
        model: As for ``saliency``.
        inputs: As for ``saliency``.
        target: As for ``saliency``.
        of: As for ``saliency``.
        steps: As for ``saliency``.
        baseline: As for ``saliency``; of tokens, a number or a tensor like their embeddings.
        forward: As for ``saliency``.

    Returns:
        Attributions shaped like the inputs, in the unit of the objective; the rest has one entry per sample.

    Raises:
        ArgumentError: If an argument is out of range.
        UnknownNameError: If there is no such layer.
        MeasurementError: If the model refuses the inputs, or the target does not depend on them.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> found = integrated_gradients(net, torch.rand(5, 4), target=2)
        >>> bool(found.complete.all())
        True
    """
    if steps is not None:
        check_count("steps", steps)
    with open_request(model, inputs, target, of, forward) as (request, _):
        result = integrated(request, _baseline(baseline, request.explained.values), steps)
        return result._replace(attributions=_per_token(request, result.attributions, "sum"))


def finished(values: Tensor, *, absolute: bool, smoothing: float) -> Tensor:
    """Smooth a map and take its magnitude; warn of samples that are NaN or infinite.

    Returns:
        The map in its old shape, detached; smoothed by a Gaussian of ``smoothing`` positions if that is not 0, not
        negative if ``absolute``.
    """
    values = values.detach()
    wrong = int((~values.isfinite()).flatten(1).any(1).sum())
    if wrong:
        warnings.warn(
            f"saliency of {wrong} of {len(values)} samples is NaN or infinite: the model's activations or weights are",
            stacklevel=3,
        )
    if smoothing and values.ndim > 1:
        channels = values if values.ndim > 2 else values[:, None]
        values = gaussian_blur(channels, smoothing).view(values.shape)
    return values.abs() if absolute else values


def check_smoothing(smoothing: float) -> None:
    """Check the standard deviation of the smoothing.

    Raises:
        ArgumentError: If it is negative or no number.
    """
    if not is_number(smoothing) or not 0 <= smoothing <= _MOST_SMOOTHING:
        raise ArgumentError.of("smoothing", smoothing, f"a number of at least 0, at most {_MOST_SMOOTHING:,}")


def _refuse_options_of_others(method: str, options: dict[str, Any]) -> None:
    owners = {"smoothgrad": ("samples", "noise"), "integrated_gradients": ("steps", "baseline"), "grad_cam": ("layer",)}
    for owner, name in [(owner, name) for owner, names in owners.items() for name in names]:
        if options[name] is not None and owner != method:
            raise ArgumentError.of(name, options[name], f'None with method="{method}"; it belongs to "{owner}"')


def _baseline(baseline: Tensor | float | None, values: Tensor) -> Tensor:
    allowed = f"a finite number, or a finite tensor of shape {tuple(values.shape[1:])}"
    point: Any = 0.0 if baseline is None else baseline
    if is_number(point):
        point = torch.full_like(values, float(point))
    if not isinstance(point, Tensor) or point.shape not in (values.shape, values.shape[1:]):
        raise ArgumentError.of("baseline", tuple(point.shape) if isinstance(point, Tensor) else point, allowed)
    if not bool(point.isfinite().all()):
        raise ArgumentError.of("baseline", "NaN or infinite values" if point is baseline else baseline, allowed)
    return point.to(values)


def _per_token(request: AttributionRequest, values: Tensor, how: Literal["norm", "sum"]) -> Tensor:
    """Return one number per token, where an embedding was explained."""
    if request.explained.embedding is None:
        return values
    return values.norm(dim=-1) if how == "norm" else values.sum(-1)
