"""The engine of ablation studies: each batch runs once, and then, for every change, from where that takes effect.

In mean ablation, a neuron's activation is replaced by its mean.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_neurons.data.batches import batch_size_of, inputs_of
from lightning_neurons.errors import MeasurementError, check_choice, check_count, check_flag, check_seed
from lightning_neurons.hooks.capture import WatchActivations
from lightning_neurons.hooks.find_neurons import call
from lightning_neurons.hooks.intervention import Edit, Replacement, edit_of
from lightning_neurons.isolation.isolation import eager, isolated
from lightning_neurons.layers.layer import Layer, candidates, require_materialized
from lightning_neurons.measurement.arguments import given_loss, given_model
from lightning_neurons.measurement.batch_splitting import divides
from lightning_neurons.measurement.losses import LOSS_REDUCTIONS, normal_tensors
from lightning_neurons.measurement.outcomes import LossFunction, Outcome, Outcomes
from lightning_neurons.measurement.passes import Passes
from lightning_neurons.replay.rerun import Rerun, Reruns


def activation_means(
    model: nn.Module,
    layers: Mapping[str, Layer],
    modules: Mapping[str, nn.Module],
    batches: Sequence[Any],
    run: Callable[[Any, Any], Any] | None = None,
    add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Float[Tensor, " neuron"]]:
    """Return the mean activation of every neuron over samples and positions, summed in float64.

    Args:
        model: The model; it runs without gradients in the mode that it is in.
        layers: The layers with their activation points.
        modules: Their modules.
        batches: The data.
        run: Runs the model on a batch; None calls it on the batch's inputs.
        add_up: Sums a tensor over processes.

    Returns:
        By layer, the means, of type float64.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def deliver(name: str, value: Tensor) -> None:
        axis = layers[name].axis % value.ndim
        others = [d for d in range(value.ndim) if d != axis]
        exact = value.cpu() if value.device.type == "mps" else value
        total = exact.sum(others, dtype=torch.float64) if others else exact.double()
        totals[name] = totals.get(name, 0) + total
        counts[name] = counts.get(name, 0) + value.numel() // value.shape[axis]

    watched = {name: modules[name] for name in layers}
    with torch.inference_mode(False), torch.no_grad(), eager(), WatchActivations(layers, watched, deliver):
        for batch in batches:
            normal = normal_tensors(batch)
            _ = call(model, inputs_of(normal)) if run is None else run(model, normal)
    counted = {name: torch.tensor(float(count), dtype=torch.float64) for name, count in counts.items()}
    return {name: add_up(total) / add_up(counted[name]).to(total.device) for name, total in totals.items()}


_STACKED = 16

NeuronSet = Mapping[str, Sequence[int]]
"""Neurons by layer."""


class AblationEngine:
    """An engine that runs a model with neurons switched off. Isolate the model, in the mode of your choice, around it.

    Args:
        model: The model.
        loss_fn: Returns the loss of the model on a batch.
        loss_reduction: The reduction of a scalar loss over samples: ``"mean"``, ``"sum"`` or ``"none"``.
        replacement: The new activation of a switched-off neuron, as in ``ablate``.
        exact: Whether losses are those of whole forwards bit for bit.
        by_sample: Whether to tell the losses of samples apart.
        memory_limit: Bytes of activations that may be kept for a batch.
        seed: Of the shuffles of ``"resample"``.

    Attributes:
        layers: The layers with their activation points, from the first batch on.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        *,
        loss_reduction: str = "mean",
        replacement: Replacement = "zero",
        exact: bool = True,
        by_sample: bool = True,
        memory_limit: int = 2**30,
        seed: int = 0,
    ) -> None:
        self.model, self.loss_fn, self.loss_reduction = model, loss_fn, loss_reduction
        self.replacement, self.exact, self.memory_limit = replacement, exact, memory_limit
        on_gpu = any(p.device.type == "cuda" for p in model.parameters())
        self.together = _STACKED if on_gpu and not exact else 1
        """Number of neurons that are switched off in one run, each in a repetition of the batch."""
        self.layers: dict[str, Layer] = {}
        self.means: dict[str, Tensor] = {}
        self.modules = candidates(model)
        self._passes = Passes(model, [])
        self._divides: bool | None = None
        self.outcomes = Outcomes(model, loss_fn, loss_reduction, by_sample=by_sample)
        self._generator = torch.Generator().manual_seed(seed)
        self._reruns: Reruns | None = None
        self._outputs: list[Any] = []

    @contextmanager
    def open(self) -> Iterator["AblationEngine"]:
        """Record the outputs of the model inside the context."""
        handle = self.model.register_forward_hook(self._hear)
        try:
            yield self
        finally:
            handle.remove()
            self._reruns, self._outputs = None, []

    def _hear(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._outputs.append(output)

    def remarks(self) -> list[str]:
        """Return notes on how the numbers were computed."""
        reruns = self._reruns
        if reruns is None or not reruns.forwards:
            return []
        total = reruns.replays + reruns.forwards
        return [f"{reruns.forwards} of {total} runs were whole forwards: a replay would not have given the same"]

    def look(self, batch: Any) -> None:
        """Find the activation points of the layers, on the first batch."""
        if self.layers:
            return

        def forward(data: Any) -> Any:
            return self._run(normal_tensors(data))

        with torch.inference_mode(False), isolated(self.model):
            self._passes.find(forward, batch)
            assert self._passes.traced is not None, "just found"
            self.layers = {n: layer for n, layer in self._passes.traced.layers.items() if layer.calls}
            self.modules = {n: self.modules[n] for n in self.layers}
        if not self.layers:
            raise MeasurementError(
                "no layer of the model ran: what gives the loss has to call the model that it is given, not a copy"
            )
        self.outcomes.know(list(self.modules.values()))

    def measure_means(self, batches: Sequence[Any]) -> None:
        """Measure the mean activation of every neuron, for the replacement ``"mean"``."""
        with isolated(self.model):
            self.means = activation_means(self.model, self.layers, self.modules, batches, self.loss_fn)

    def parts(self, batch: Any) -> list[Any]:
        """Return the batch in parts whose activations stay in a CPU's cache; whole, where that changes results."""
        parts = list(self._passes.parts(batch))
        return parts if len(parts) == 1 or self.may_divide(batch, parts) else [batch]

    def may_divide(self, batch: Any, parts: Sequence[Any]) -> bool:
        """Return whether a batch has the loss and the outputs of its parts; found out on the first batch."""
        if self._divides is None:
            self._divides = self.has_parts(batch, parts)
        return self._divides

    def has_parts(self, batch: Any, parts: Sequence[Any]) -> bool:
        """Return whether a batch has the loss and the outputs of these parts."""
        with torch.inference_mode(False), torch.no_grad(), eager(), isolated(self.model):
            whole = self._run(normal_tensors(batch))
            try:
                results = [whole, *(self._run(normal_tensors(part)) for part in parts)]
                return divides(self.outcomes, batch, parts, results)
            except Exception:  # noqa: BLE001 (whatever a model raises on other samples than it expects)
                return False

    def on(self, batch: Any) -> "BatchAblation":
        """Run a batch (or a part of one) once, unchanged.

        Returns:
            The batch with its unchanged result, ready to be run with changes to layers or parameters.
        """
        batch = normal_tensors(batch)
        samples = batch_size_of(batch)
        if self._reruns is None:
            self._reruns = Reruns(self.model, self.layers, self.modules, self._run, self.memory_limit, exact=self.exact)
        with torch.inference_mode(False):
            return BatchAblation(self, Rerun(self._reruns, batch, samples), batch, samples)

    def _run(self, batch: Any) -> tuple[Tensor, list[Any]]:
        self._outputs = []
        with torch.set_grad_enabled(torch.is_grad_enabled() or self._passes.needs_gradients):
            loss = self.loss_fn(self.model, batch)
        if not isinstance(loss, Tensor):
            raise MeasurementError(f"loss_fn returned {type(loss).__name__}: expected a tensor")
        return loss.detach(), list(self._outputs)

    def shuffle(self, samples: int) -> Tensor:
        """Return another sample for each sample: random, none stays where it is."""
        order = torch.randperm(samples, generator=self._generator)
        partners = torch.empty_like(order)
        partners[order] = order.roll(1)
        return partners


def require_present(study: AblationEngine, layers: Iterable[str]) -> None:
    """Check that layers have run.

    Raises:
        MeasurementError: Naming those that have not.
    """
    if missing := [name for name in layers if name not in study.layers]:
        raise MeasurementError(
            f"neurons: {', '.join(missing)} did not run as a module (unused, or its weights are used by a function)"
        )


class BatchAblation:
    """One batch that can be run again with changes.

    Attributes:
        outcome: Losses and outputs of the unchanged model.
    """

    def __init__(self, study: AblationEngine, rerun: Rerun, batch: Any, samples: int) -> None:
        self._study, self._rerun, self.batch, self.samples = study, rerun, batch, samples
        if study.replacement == "resample" and samples < 2:
            raise MeasurementError(
                'replacement="resample" takes values from other samples, and a batch has only one; use larger batches'
            )
        self._shuffle = study.shuffle(samples) if study.replacement == "resample" else None
        self.outcome = study.outcomes.of([rerun.result], batch, samples)

    def order(self, layers: Sequence[str]) -> list[str]:
        """Return layers in the order in which their neurons should be switched off."""
        return self._rerun.plan(layers)

    def without(self, sets: Sequence[NeuronSet]) -> Outcome:
        """Return the outcome without some neurons, one run for each of several sets."""
        with torch.inference_mode(False):
            if (stacked := self._stacked(sets)) is not None:
                return stacked
            results = []
            for neurons in sets:
                edits = {name: self._edit(name, indices) for name, indices in neurons.items()}
                unchanged = not edits or (len(edits) == 1 and self._is_unchanged(*next(iter(edits.items()))))
                results.append(self._rerun.result if unchanged else self._rerun.silenced(edits))
            return self._study.outcomes.of(results, self.batch, self.samples)

    def order_of(self, parameters: Sequence[Tensor]) -> list[int]:
        """Return the order in which parameters should be changed."""
        return self._rerun.plan_parameters(parameters)

    def prepare_parameter(self, parameter: Tensor) -> None:
        """Prepare for a change of a parameter, before it is made."""
        with torch.inference_mode(False):
            self._rerun.prepare_parameter(parameter)

    def _stacked(self, sets: Sequence[NeuronSet]) -> Outcome | None:
        """Return the outcome of several sets of one layer in one run, where that is allowed and possible."""
        study, layers = self._study, [name for neurons in sets for name in neurons]
        if study.together < 2 or len(sets) < 2 or any(len(neurons) != 1 for neurons in sets) or len({*layers}) != 1:
            return None
        outcomes: list[Outcome] = []
        for first in range(0, len(sets), study.together):
            some = sets[first : first + study.together]
            edits = [self._edit(layers[0], neurons[layers[0]]) for neurons in some]
            result = self._rerun.silenced_together(layers[0], edits)
            outcome = None if result is None else study.outcomes.of_stack(result, self.batch, self.samples, len(some))
            if outcome is None:
                return None
            outcomes.append(outcome)
        outputs = [output for outcome in outcomes for output in outcome.outputs]
        losses, means = (torch.cat([getattr(outcome, name) for outcome in outcomes]) for name in ("losses", "means"))
        return Outcome(losses, outcomes[0].weights, means, outputs)

    def with_changed(self, parameter: Tensor) -> Outcome:
        """Return the outcome with a parameter as it is now, if it had another value when the batch ran first."""
        with torch.inference_mode(False):
            return self._study.outcomes.of([self._rerun.with_changed(parameter)], self.batch, self.samples)

    def _is_unchanged(self, name: str, edit: Edit) -> bool:
        """Return whether neurons have the new values already, as dead ones do, so that nothing need be run."""
        value = self._rerun.activation(name) if self._rerun.prepare(name) else None
        return value is not None and not edit.changes(value)

    def _edit(self, name: str, neurons: Sequence[int]) -> Edit:
        study = self._study
        device = next((p.device for p in study.modules[name].parameters()), torch.device("cpu"))
        means = study.means.get(name)
        return edit_of(
            study.layers[name], neurons, study.replacement, device=device, means=means, shuffle=self._shuffle
        )


def given_study(
    model: Any,
    loss_fn: Any,
    *,
    replacement: Any,
    loss_reduction: Any,
    memory_limit: Any,
    progress: Any,
    seed: Any,
    exact: Any = True,
) -> AblationEngine:
    """Return the engine of an ablation study, after a check of its arguments.

    Raises:
        ArgumentError: If one is out of range; names it.
    """
    given_model(model)
    given_loss(loss_fn)
    require_materialized(model)
    check_flag("progress", progress)
    return AblationEngine(
        model,
        loss_fn,
        loss_reduction=check_choice("loss_reduction", loss_reduction, LOSS_REDUCTIONS),
        replacement=check_choice("replacement", replacement, get_args(Replacement)),  # type: ignore[arg-type]
        exact=check_flag("exact", exact),
        memory_limit=check_count("memory_limit", memory_limit),
        seed=check_seed("seed", seed),
    )
