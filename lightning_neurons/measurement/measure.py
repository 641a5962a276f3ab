"""Measurements without a Trainer."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_neurons.criteria import ACTIVATION_CRITERIA, GRADIENT_CRITERIA, Criterion
from lightning_neurons.criteria.deadness import SILENT
from lightning_neurons.criteria.ranking import Normalization
from lightning_neurons.data.batches import batch_size_of, inputs_of, is_graph
from lightning_neurons.errors import ArgumentError, MeasurementError
from lightning_neurons.hooks.find_neurons import call
from lightning_neurons.hooks.output_layers import logits_in
from lightning_neurons.isolation.isolation import isolated
from lightning_neurons.layers.layer import Pattern, candidates
from lightning_neurons.measurement.arguments import check_batches, given_model
from lightning_neurons.measurement.batch_splitting import Independence
from lightning_neurons.measurement.losses import LossReduction, fgsm, sampled_label_loss, summed
from lightning_neurons.measurement.measurement import Measurement
from lightning_neurons.measurement.outcomes import LossFunction
from lightning_neurons.measurement.passes import Passes
from lightning_neurons.measurement.settings import MeasurementSettings
from lightning_neurons.results.neuron_report import NeuronReport


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: LossFunction | None = None,
    loss_reduction: LossReduction = "mean",
    criteria: Sequence[str | Criterion] | None = None,
    layers: Sequence[Pattern] | None = None,
    per_class: bool | Callable[[Any], Tensor] = False,
    threshold: float = SILENT,
    relative_threshold: bool = True,
    normalize: Normalization = "none",
    inputs: Literal["clean", "fgsm"] = "clean",
    eps: float = 0.0,
) -> NeuronReport:
    """Measure which neurons of a model are dead and which matter, in evaluation mode, leaving no trace in it.

    One forward per batch; with a loss also one backward to the activations (another forward and backward each for
    ``second_order_ggn`` and for ``inputs="fgsm"``).

    Args:
        model: Any module. Batches must lie on its device.
        batches: An iterable of batches of any form; read once.
        loss_fn: Called with the model and a batch; what it returns is differentiated. ``predicted_logit`` and
            ``logit(index)`` of this package ask about the output instead. None measures activations and weights only.
        loss_reduction: The value of ``loss_fn``: the ``"mean"`` over the batch, the ``"sum"``, or ``"none"``: one loss
            per sample (which is recognised in any case).
        criteria: Names or ``Criterion`` objects; None for all that apply. See ``criteria.main_criterion`` for which of
            them rankings go by.
        layers: None for all, or patterns of paths, names of classes or module types.
        per_class: Keep classes apart: True finds the targets in the batch, a function gives them.
        threshold: Magnitude up to which an activation counts as silent, in units of the layer's root mean square.
        relative_threshold: False takes ``threshold`` in activation units.
        normalize: The normalization that makes layers comparable in global rankings.
        inputs: ``"fgsm"`` measures sensitivity on inputs shifted against the model.
        eps: Size of that shift, in units of the inputs.

    Returns:
        The report; layers are named by their path in ``model``.

    Raises:
        ArgumentError: If an argument is out of range, or a criterion needs a ``loss_fn`` that is not there.
        MeasurementError: If there are no batches, or the loss cannot be differentiated.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> data = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(2)]
        >>> loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> report = measure(net, data, loss_fn=loss, criteria=["gradient", "taylor"])
        >>> round(report.scores["gradient"]["0"].sum().item(), 6)
        1.0
    """
    defaults = ACTIVATION_CRITERIA + (GRADIENT_CRITERIA if loss_fn is not None else ())
    settings = MeasurementSettings.checked(
        criteria=defaults if criteria is None else criteria, layers=layers, per_class=per_class, threshold=threshold,
        relative_threshold=relative_threshold, normalize=normalize, inputs=inputs, eps=eps,
        loss_reduction=loss_reduction,
    )  # fmt: skip
    wanted = sorted(c.name for c in settings.criteria if c.needs - {"activation"})
    if wanted and loss_fn is None:
        raise ArgumentError.of("loss_fn", None, f"a function (model, batch) -> loss, which {', '.join(wanted)} need")
    given_model(model)
    check_batches(batches)
    if settings.inputs == "fgsm" and loss_fn is None:
        raise ArgumentError.of("inputs", settings.inputs, '"clean" where there is no loss_fn')
    if not candidates(model, settings.layers):
        got = type(model).__name__
        raise ArgumentError.of("model", got, "a model with convolutional or linear layers, or see register_layer")
    device = next((p.device for p in model.parameters()), None)
    measurement = Measurement(
        model, settings.criteria, layers=settings.layers, per_class=settings.by_class, device=device
    )
    with isolated(model):
        model.eval()
        seen = collect(measurement, batches, settings, loss_fn)
    if not seen:
        raise MeasurementError(
            f"batches={type(batches).__name__}: it gave no batch with a sample (has a generator been used up?)"
        )
    return measurement.report(settings=settings.plain(), notes=[f"measured on {seen} samples"])


def call_on_inputs(model: nn.Module, batch: Any) -> Any:
    """Return the output of the model on a batch without its targets."""
    return call(model, inputs_of(batch))


def collect(
    measurement: Measurement,
    batches: Iterable[Any],
    settings: MeasurementSettings,
    loss_fn: LossFunction | None,
    run: Callable[[Any, Any], Any] = call_on_inputs,
) -> int:
    """Measure batches. Isolate the model around it, in evaluation mode.

    Args:
        measurement: The measurement that the batches are added to.
        batches: The data.
        settings: The checked arguments.
        loss_fn: See ``measure``.
        run: Runs the model on a batch where no loss is needed.

    Returns:
        The number of samples.
    """
    passes, seen, independence = Passes(measurement.model, [measurement]), 0, Independence()
    for index, batch in enumerate(batches):
        seen += batch_size_of(batch)
        _one_batch(passes, independence, measurement, settings, loss_fn, run, batch, index)
    return seen


def _one_batch(
    passes: Passes,
    independence: Independence,
    measurement: Measurement,
    settings: MeasurementSettings,
    loss_fn: LossFunction | None,
    run: Callable[[Any, Any], Any],
    batch: Any,
    index: int,
) -> None:
    model = passes.model

    def loss_of(data: Any) -> Tensor:
        assert loss_fn is not None, "checked before the first batch"
        return summed(loss_fn(model, data), settings.loss_reduction, batch_size_of(data))

    def forward(data: Any) -> Any:
        return run(model, data)

    if passes.traced is None:
        passes.find(forward if loss_fn is None else loss_of, batch)
    parts = [batch] if loss_fn is None else list(passes.parts(batch))
    if len(parts) > 1 and not independence.shown(loss_of, batch, partial(isolated, model)):
        parts = [batch]
    for number, part in enumerate(parts):
        size = None if is_graph(part) else batch_size_of(part)
        measurement.start_batch(size, settings.targets(part) if settings.by_class else None)
        clean, fgsm_too = part, settings.inputs == "fgsm" and loss_fn is not None
        if fgsm_too:
            part = fgsm(model, loss_of, part, settings.eps)
        if fgsm_too or "gradient" not in measurement.needs:
            with torch.set_grad_enabled(passes.needs_gradients), passes.observe():
                forward(clean)  # activity is that on the data itself
        if "gradient" in measurement.needs:
            passes.differentiate(loss_of, part, observe=not fgsm_too)
        if "sampled_gradient" in measurement.needs:
            drawn = partial(sampled_loss, model, seed=index * 1_000_003 + number)
            passes.differentiate(drawn, part, "sampled_gradient")
        measurement.finish_batch()


def sampled_loss(model: Any, batch: Any, seed: int) -> Tensor:
    """Return the loss on labels drawn from the model's own prediction; the same labels for the same ``seed``."""
    output = call(model, inputs_of(batch))
    logits = logits_in(output)
    generator = torch.Generator("cpu" if logits is None else logits.device).manual_seed(seed)
    return sampled_label_loss(output if logits is None else logits, generator)


def predicted_logit(model: Any, batch: Any) -> Tensor:
    """Return each sample's largest output: a ``loss_fn`` that asks what the predictions rest on."""
    return _logits(model, batch).amax(1)


def logit(index: int) -> LossFunction:
    """Return a ``loss_fn`` that gives one output, by index: it asks what that class rests on."""

    def chosen(model: Any, batch: Any) -> Tensor:
        logits = _logits(model, batch)
        if not -logits.shape[1] <= index < logits.shape[1]:
            raise ArgumentError.of("index", index, f"one of the model's {logits.shape[1]} outputs")
        return logits[:, index]

    return chosen


def _logits(model: Any, batch: Any) -> Tensor:
    output = call(model, inputs_of(batch))
    logits = logits_in(output)
    if logits is None or logits.ndim != 2:
        got = type(output).__name__ if logits is None else tuple(logits.shape)
        raise MeasurementError(f"the model returned {got}: expected logits of shape (batch, class)")
    return logits
