"""Runs of a LightningModule outside of its Trainer's loop: on an example, and on kept validation batches."""

import copy
import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_neurons.callbacks.trainer.checks import overrides, said_of
from lightning_neurons.callbacks.trainer.namespaces import LightningModule, Trainer
from lightning_neurons.callbacks.trainer.step_replay import StepReplay
from lightning_neurons.data.batches import (
    inputs_of,
    is_divisible,
    is_list_of_samples,
    map_tensors,
    rows_of,
    samples_in,
)
from lightning_neurons.errors import PruningError
from lightning_neurons.hooks.find_neurons import call
from lightning_neurons.isolation.isolation import eager, isolated
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.measurement.outcomes import Forward
from lightning_neurons.pruning.structure.example import Example

_FEW = 2


class Runner:
    """A function that runs a module or its copy by the forward, if that takes a batch's inputs, or the validation step.

    Where its layers cannot be traced in that way, there may be another one: ``take_another``.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        example_inputs: The callback's argument; None takes ``example_input_array`` or the batch.
        batch: A validation batch.

    Raises:
        MisconfigurationException: If the module runs in neither way.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, example_inputs: Any, batch: object) -> None:
        self.trainer, self._is_told = trainer, example_inputs is not None
        few = _first_of(batch, _FEW)
        self._run: Forward = self._step
        self._others: list[tuple[Example, Forward]] = [(Example(few, self._step), self._step)]
        given = pl_module.example_input_array if example_inputs is None else example_inputs
        if given is not None:
            given = map_tensors(given, lambda t: t.to(pl_module.device))
            self.example, self._run = Example(trainer.precision_plugin.convert_input(given)), _on_inputs
            self._require(pl_module, "example_input_array" if example_inputs is None else "example_inputs")
            return
        if overrides(pl_module, "forward"):
            self._others = [(Example(inputs_of(few)), _on_inputs), *self._others, (Example(few), call)]
            if isinstance(few, list | tuple) and not is_list_of_samples(few):
                self._others.append((Example(few, _on_first), _on_first))
        if not self.take_another(pl_module):
            self.example = Example(few, self._step)
            self._require(pl_module, "validation_step")

    def __call__(self, module: nn.Module, batch: object) -> Any:
        """Run a module on a whole batch.

        Returns:
            What the module (or its validation step) returns.
        """
        return self._run(module, batch)

    @property
    def ways_left(self) -> int:
        """The number of ways of running the module that have not been tried."""
        return len(self._others)

    def take_another(self, pl_module: LightningModule) -> bool:
        """Switch to the next way in which the module runs.

        Returns:
            Whether there was one; if not, nothing has changed.
        """
        while self._others:
            example, run = self._others.pop(0)
            if self._failure(pl_module, example) is None:
                self.example, self._run = example, run
                return True
        return False

    def other_ways(self, pl_module: LightningModule) -> Iterator["Runner"]:
        """Yield copies that run the module in the other ways; none if the user has given example inputs."""
        other = copy.copy(self)
        other._others = [] if self._is_told else [*self._others]
        while other.take_another(pl_module):
            yield other
            other = copy.copy(other)
            other._others = [*other._others]

    def become(self, other: "Runner") -> None:
        """Take over the way of another runner."""
        vars(self).update(vars(other))

    def runs_any(self, pl_module: LightningModule, names: Collection[str]) -> bool:
        """Return True if any of the named layers runs."""
        ran: list[nn.Module] = []
        with isolated(pl_module), torch.no_grad():
            hooks = [
                module.register_forward_hook(lambda module, *_: ran.append(module))
                for name, module in modules_by_name(pl_module).items()
                if name in names
            ]
            try:
                pl_module.eval()
                self.example.run(pl_module)
            finally:
                for hook in hooks:
                    hook.remove()
        return bool(ran)

    def _step(self, module: Any, batch: object) -> Any:
        """Run the validation step of a copy or an isolated module.

        Returns:
            The output of the step, and a list of the tensors that it logged.
        """
        logged: dict[str, Any] = {}
        vars(module).update(log=lambda name, value, *_, **__: logged.update({name: value}))
        vars(module).update(log_dict=lambda values, *_, **__: logged.update(values.items()))
        if module._trainer is None:  # a copy
            module.trainer = self.trainer
        out = StepReplay(self.trainer, module, "validation_step", None).run(batch)
        return [out, [value for value in logged.values() if isinstance(value, Tensor)]]

    def _failure(self, pl_module: LightningModule, example: Example) -> Exception | None:
        try:
            with isolated(pl_module), torch.no_grad():
                pl_module.eval()
                example.run(pl_module)
        except Exception as error:  # noqa: BLE001 (the next way may do)
            return error
        return None

    def _require(self, pl_module: LightningModule, name: str) -> None:
        error = self._failure(pl_module, self.example)
        if error is not None:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} does not run on {name} ({type(error).__name__}: {error}); pass "
                "example_inputs= that its forward takes: a tensor, a tuple of arguments or a dict of keyword arguments"
            ) from error


def _on_inputs(module: nn.Module, batch: object) -> Any:
    return call(module, inputs_of(batch))


def _on_first(module: nn.Module, batch: Sequence[Any]) -> Any:
    """Run a module's forward on the first entries of a batch, where targets and weights follow them.

    Returns:
        The output of the forward, which was called with as many entries as it has positional parameters.
    """
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    taken = sum(kind in {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD} for kind in kinds)
    return module(*batch[:taken])


def _first_of(batch: object, samples: int) -> Any:
    """Return the first samples of a batch; all of a batch that cannot be divided, such as a graph."""
    size = samples_in(batch)
    return rows_of(batch, torch.arange(samples), size) if samples < size and is_divisible(batch) else batch


def check_cut(trainer: Trainer, runner: Runner | None) -> None:
    """Run a module once after a cut, in every process that has a runner.

    Raises:
        PruningError: If it fails in some process; in every process.
    """
    failure = None
    if runner is not None:
        try:
            runner.example.check(trainer.lightning_module)
        except PruningError as error:
            failure = error
    if not trainer.strategy.reduce_boolean_decision(failure is None, all=True):
        raise failure or PruningError("the cut model fails in another process; everything is as it was")


class KeptBatches:
    """The first validation samples, kept on the CPU.

    Args:
        max_samples: How many at most; a batch that cannot be divided is kept whole all the same.
    """

    def __init__(self, max_samples: int) -> None:
        self.max_samples, self.samples = max_samples, 0
        self._batches: list[Any] = []

    def add(self, batch: object) -> None:
        """Keep samples of a batch, up to ``max_samples`` in all."""
        left = self.max_samples - self.samples
        if left > 0:
            part = _first_of(batch, left)
            self._batches.append(map_tensors(part, lambda t: t.detach().to("cpu", copy=True)))
            self.samples += samples_in(part)

    def on(self, device: torch.device) -> Iterator[Any]:
        """Yield the batches on a device."""
        for batch in self._batches:
            yield map_tensors(batch, lambda t: t.to(device))


def metric_on(trainer: Trainer, pl_module: LightningModule, kept: KeptBatches, monitor: str) -> float | None:
    """Compute a logged metric on kept samples, over all processes; None if the validation step does not log it.

    Args:
        trainer: The Trainer.
        pl_module: Its module; it is left as it was.
        kept: The samples.
        monitor: The name under which it is logged.

    Returns:
        The mean over samples, or the value of a torchmetrics metric; the same in every process.

    Raises:
        PruningError: If it could not be measured in some process; in every process.
    """
    replay, failure = StepReplay(trainer, pl_module, "validation_step", None), None
    name = monitor.removesuffix("/dataloader_idx_0")  # the samples are those of the first dataloader
    total, count, metric = 0.0, 0, None
    try:
        with replay.isolated(), torch.no_grad(), eager():
            for batch in kept.on(pl_module.device):
                replay.run(batch)
                value = replay.logged.get(name)
                if isinstance(value, Metric):
                    metric = value
                    metric._to_sync = False  # here; a process without samples could not join in
                elif value is not None:
                    total += float(value) * samples_in(batch)
                    count += samples_in(batch)
            if metric is not None:
                total, count = float(metric.compute()) * kept.samples, kept.samples
    except Exception as error:  # noqa: BLE001 (else the other processes would wait for ever)
        failure = error
    if not trainer.strategy.reduce_boolean_decision(failure is None, all=True):
        why = "another process failed" if failure is None else said_of(failure)
        raise PruningError(f"{monitor} cannot be measured on kept samples: {why}") from failure
    sums = torch.tensor([total, float(count)], dtype=torch.float32, device=pl_module.device)
    sums = trainer.strategy.reduce(sums, reduce_op="sum")
    return float(sums[0] / sums[1]) if sums[1] > 0 else None
