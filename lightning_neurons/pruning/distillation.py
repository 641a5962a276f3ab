"""The distillation loss and its gradient with respect to a student's logits (Hinton et al. 2015)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_neurons.data.batches import tensors_of
from lightning_neurons.errors import PruningError
from lightning_neurons.hooks.output_layers import logits_in


def distillation_loss(
    student: Float[Tensor, "*shape"],
    teacher: Float[Tensor, "*shape"],
    *,
    temperature: float = 2.0,
    class_axis: int = 1,
) -> Float[Tensor, ""]:
    """Return ``T^2 KL(softmax(teacher / T) || softmax(student / T))``, the mean over samples and positions.

    The square keeps gradients of the size of those of the cross entropy, whatever the temperature.

    Args:
        student: Logits, ``(batch, class)`` or with more axes.
        teacher: Logits of the same shape.
        temperature: ``T``.
        class_axis: The axis of the classes.

    Returns:
        A scalar in float32.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> float(distillation_loss(logits, logits)), float(distillation_loss(logits, logits.flip(1))) > 0
        (0.0, True)
    """
    student, teacher = student.float() / temperature, teacher.float() / temperature
    pointwise = F.kl_div(
        student.log_softmax(class_axis), teacher.log_softmax(class_axis), reduction="none", log_target=True
    )
    return temperature**2 * pointwise.sum(class_axis).mean()


def distillation_gradient(
    student: Tensor, teacher: Tensor, *, temperature: float, weight: float, class_axis: int
) -> Tensor:
    """Return the gradient of ``weight`` times the distillation loss by the student's logits, in float32.

    Raises:
        PruningError: If the two have other shapes, so are not logits for the same classes.
    """
    if student.shape != teacher.shape:
        raise PruningError(
            f"the teacher's logits have the shape {tuple(teacher.shape)}, those of the model {tuple(student.shape)}: "
            "they are not for the same classes"
        )
    with torch.enable_grad(), torch.autocast(student.device.type, enabled=False):
        leaf = student.detach().float().requires_grad_()
        loss = distillation_loss(leaf, teacher.detach(), temperature=temperature, class_axis=class_axis)
        (gradient,) = torch.autograd.grad(weight * loss, leaf)
    return gradient


def checked_logits(output: Any, class_axis: int) -> Tensor:
    """Return the logits in an output: itself, its ``logits``, or its only floating-point tensor.

    Raises:
        PruningError: If there are none, or several tensors that could be them.
    """
    logits = logits_in(output)
    if logits is None or not logits.is_floating_point():
        shapes = [tuple(t.shape) for t in tensors_of(output) if t.is_floating_point()]
        raise PruningError(
            f"the output has {len(shapes)} tensors that could be logits {shapes}; pass output= the path of a module "
            'that returns one, or let it return them as "logits"'
        )
    known = -logits.ndim <= class_axis < logits.ndim
    if logits.ndim < 2 or not known or logits.shape[class_axis] < 2:
        raise PruningError(
            f"an output of shape {tuple(logits.shape)} has no logits of several classes on axis {class_axis}; pass "
            "output= or class_axis="
        )
    return logits
