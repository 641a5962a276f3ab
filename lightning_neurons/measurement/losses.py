"""Losses that are differentiated: summed over samples, on clean or shifted inputs, on true or drawn labels."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_neurons.data.batches import map_tensors, tensors_of
from lightning_neurons.errors import MeasurementError
from lightning_neurons.hooks.own_gradients import shared_graph
from lightning_neurons.isolation.isolation import differentiable

LossReduction = Literal["mean", "sum", "none"]
LOSS_REDUCTIONS: tuple[str, ...] = get_args(LossReduction)


def normal_tensors(batch: Any) -> Any:
    """Return the batch detached from any graph, with copies of its inference tensors, which autograd would refuse."""
    return map_tensors(batch, lambda t: t.clone() if t.is_inference() else t.detach())


def summed(loss: Tensor, reduction: LossReduction, batch_size: int) -> Tensor:
    """Return the loss summed over samples, so that no score depends on the batch size.

    Args:
        loss: A scalar, or one loss per sample.
        reduction: The reduction of a scalar; one loss per sample is summed whatever it says.
        batch_size: Number of samples.

    Returns:
        A scalar, in units of the loss.

    Raises:
        MeasurementError: If the shape fits neither.
    """
    if not isinstance(loss, Tensor):
        raise MeasurementError(f"loss_fn returned {type(loss).__name__}: expected a tensor")
    if loss.ndim == 0 and reduction != "none":
        with torch.enable_grad():  # which a step may have switched off at its end
            return loss * batch_size if reduction == "mean" else loss
    if loss.numel() != batch_size:
        allowed = "a scalar or " if reduction != "none" else ""
        raise MeasurementError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)} for {batch_size} samples with "
            f"loss_reduction={reduction!r}: expected {allowed}one loss per sample"
        )
    with torch.enable_grad():
        return loss.sum()


def fgsm(model: nn.Module, loss_of: Callable[[Any], Tensor], batch: Any, eps: float) -> Any:
    """Shift the inputs by ``eps`` in the direction that raises each sample's loss the fastest.

    The fast gradient sign method of Goodfellow et al. 2015 (arXiv:1412.6572), equation 1, on the first floating-point
    tensor of the batch. ``eps`` is in units of that tensor; the result is not clipped.

    Raises:
        MeasurementError: If the batch has no floating-point tensor, or the loss does not depend on it.
    """
    with differentiable(), shared_graph(model):
        batch = normal_tensors(batch)
        inputs = next((t for t in tensors_of(batch) if t.is_floating_point()), None)
        if inputs is None:
            raise MeasurementError('inputs="fgsm": the batch has no floating-point tensor to shift; use inputs="clean"')
        leaf = inputs.detach().clone().requires_grad_()
        loss = loss_of(_exchange(batch, inputs, leaf))
        (slope,) = torch.autograd.grad(loss, [leaf], allow_unused=True) if loss.requires_grad else (None,)
        if slope is None:
            raise MeasurementError('inputs="fgsm": the loss does not depend on the inputs; use inputs="clean"')
        return _exchange(batch, inputs, (leaf + eps * slope.sign()).detach())


def _exchange(batch: Any, old: Tensor, new: Tensor) -> Any:
    return map_tensors(batch, lambda t: new if t is old else t)


def sampled_label_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return the cross entropy, summed, with labels drawn from the model's own prediction.

    Args:
        logits: ``(batch, class)``, ``(batch, token, class)`` or ``(batch, class, *space)`` with two or more space axes.
        generator: Of the draws, on the device of ``logits``.

    Returns:
        A scalar, summed over samples and positions.

    Raises:
        MeasurementError: If ``logits`` is not such a tensor.
    """
    if not (isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim >= 2):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise MeasurementError(
            f"second_order_ggn draws labels from the model's output and got {got}: the model must return logits, "
            "(batch, class) or more; leave the criterion out, or use 'second_order'"
        )
    flat = logits.movedim(1, -1) if logits.ndim > 3 else logits
    flat = flat.reshape(-1, flat.shape[-1])
    with torch.no_grad():
        labels = torch.multinomial(flat.float().softmax(-1), 1, generator=generator).squeeze(1)
    return nn.functional.cross_entropy(flat, labels, reduction="sum")
