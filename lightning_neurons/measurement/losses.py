"""Losses summed over samples, on clean or shifted inputs, on true or drawn labels; and losses of single samples.

For the losses of single samples, ``loss_fn(model, batch)`` is called again with a model that only hands out the output
of one sample: all samples at once by ``torch.vmap`` where that works, else one by one. Where they do not add up to the
loss of the batch (the model is used in other ways, or samples are compared with one another), there is no answer.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_neurons.data.batches import map_tensors, rows_of, tensors_of
from lightning_neurons.errors import MeasurementError
from lightning_neurons.hooks.own_gradients import shared_graph
from lightning_neurons.isolation.isolation import differentiable
from lightning_neurons.isolation.tensors import map_tensors_in, tensors_in

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

    Returns:
        A copy of the batch with the shifted tensor, detached; the given batch is not changed.

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


_CLOSE = 1e-4
_ROUNDING = 8
"""Rounding errors of the loss's own type that the mean of a batch may be off."""


class SampleLosses:
    """A splitter of losses of batches into those of samples.

    Args:
        model: The model.
        loss_fn: Returns the loss of the model on a batch.
        reduction: ``"mean"`` or ``"sum"``: what a scalar is of the losses of the samples.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], reduction: str) -> None:
        self.modules: Collection[nn.Module] = ()
        """Layers of the model. A loss function that runs one while it is asked again does not use what it is given."""
        self._model, self._loss_fn, self._is_mean = model, loss_fn, reduction != "sum"
        self._ways = [self._all_at_once, self._one_by_one]

    def of(
        self, losses: Sequence[Tensor], outputs: Sequence[Any], batch: Any, samples: int
    ) -> Float[Tensor, "run batch"] | None:
        """Return the losses of the samples in several runs of one batch, or None if they cannot be told apart.

        Args:
            losses: The value of ``loss_fn`` in each run: a scalar, or one loss per sample.
            outputs: The model's output in each run; None if it was not called exactly once.
            batch: The batch.
            samples: Its number of samples.

        Returns:
            Losses of type float64, in the unit of ``loss_fn``; None if they do not add up to those of the batch.
        """
        if all(loss.ndim and loss.numel() == samples for loss in losses):
            return torch.stack([loss.reshape(-1) for loss in losses]).double()
        tensors = [list(tensors_in(out)) for out in outputs]
        shapes = [[t.shape for t in run] for run in tensors]
        is_whole = all(run and all(t.ndim and len(t) == samples for t in run) for run in tensors)
        if (
            any(loss.numel() != 1 or not loss.is_floating_point() for loss in losses)
            or not is_whole
            or any(s != shapes[0] for s in shapes)
        ):
            return None
        whole = torch.stack([loss.reshape(()) for loss in losses]).double()
        return self._tell_apart(outputs, batch, samples, whole, losses[0].dtype)

    def of_stack(
        self, loss: Tensor, outputs: Sequence[Any], batch: Any, samples: int
    ) -> Float[Tensor, "run batch"] | None:
        """Return the losses of the samples of a repeated batch, from one loss for all repetitions together."""
        if loss.numel() != 1 or not loss.is_floating_point() or not list(tensors_in(outputs[0])):
            return None
        return self._tell_apart(outputs, batch, samples, loss.double().reshape(1), loss.dtype)

    def _tell_apart(
        self, outputs: Sequence[Any], batch: Any, samples: int, whole: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        columns = zip(*(list(tensors_in(out)) for out in outputs), strict=True)
        stacked = [torch.stack(column) for column in columns]
        tolerance = max(_CLOSE, _ROUNDING * torch.finfo(dtype).eps)
        for way in list(self._ways):
            try:
                with _refused(self.modules):
                    losses = way(stacked, outputs[0], batch, samples).double()
            except Exception:  # noqa: BLE001 (whatever a loss does that a way cannot do)
                self._ways.remove(way)
                continue
            if losses.shape == (len(outputs), samples) and self._adds_up(losses, whole, tolerance):
                return losses
        return None

    def _adds_up(self, losses: Tensor, whole: Tensor, tolerance: float) -> bool:
        losses = losses if len(whole) == len(losses) else losses.reshape(1, -1)
        again = losses.mean(1) if self._is_mean else losses.sum(1)
        is_close = torch.isclose(again, whole, rtol=tolerance, atol=1e-7) | ~(again.isfinite() | whole.isfinite())
        return bool(is_close.all())

    def _all_at_once(self, stacked: list[Tensor], form: Any, batch: Any, samples: int) -> Tensor:
        per_sample = [t for t in tensors_of(batch) if t.ndim and len(t) == samples]

        def loss_of_sample(rows: list[Tensor], out: list[Tensor]) -> Tensor:
            inside, answers = iter(rows), iter(out)
            part = map_tensors(batch, lambda t: next(inside)[None] if t.ndim and len(t) == samples else t)
            answer = map_tensors_in(form, lambda t: next(answers)[None])
            return self._loss_fn(_Answering(self._model, answer), part).reshape(())

        return torch.vmap(torch.vmap(loss_of_sample), in_dims=(None, 0))(per_sample, stacked)

    def _one_by_one(self, stacked: list[Tensor], form: Any, batch: Any, samples: int) -> Tensor:
        parts = [rows_of(batch, torch.tensor([i]), samples) for i in range(samples)]

        def loss_of_sample(run: int, i: int) -> Tensor:
            out = iter(stacked)
            answer = map_tensors_in(form, lambda t: next(out)[run, i : i + 1])
            return self._loss_fn(_Answering(self._model, answer), parts[i]).reshape(())

        return torch.stack([
            torch.stack([loss_of_sample(run, i) for i in range(samples)]) for run in range(len(stacked[0]))
        ])


@contextmanager
def _refused(modules: Collection[nn.Module]) -> Iterator[None]:
    """Refuse to run any of the modules inside the context."""

    def refuse(module: nn.Module, inputs: Any) -> None:
        raise RuntimeError("the loss runs the model itself")

    handles = [module.register_forward_pre_hook(refuse) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Answering:
    """A stand-in for a model that returns the output that it was given."""

    def __init__(self, model: nn.Module, answer: Any) -> None:
        self._model, self._answer = model, answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
