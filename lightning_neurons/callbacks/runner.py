"""How a LightningModule is run outside of its Trainer's loop: on an example, and on kept validation batches."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_neurons.callbacks.checks import overrides
from lightning_neurons.callbacks.replay import StepReplay
from lightning_neurons.network.batches import batch_size_of, inputs_of, map_tensors, rows_of
from lightning_neurons.network.isolate import eager, isolated
from lightning_neurons.network.neurons import call
from lightning_neurons.pruning.example import Example

_FEW = 2


class Runner:
    """Runs a module, or a copy of it, by its forward where that takes a batch's inputs, else by its validation step.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        example_inputs: What the user has given; None takes ``example_input_array`` or the batch.
        batch: A validation batch.

    Raises:
        MisconfigurationException: If the module runs in neither way.
    """

    def __init__(self, trainer: Any, pl_module: Any, example_inputs: Any, batch: Any) -> None:
        self.trainer, self.by_forward = trainer, True
        given = pl_module.example_input_array if example_inputs is None else example_inputs
        if given is not None:
            given = map_tensors(given, lambda t: t.to(pl_module.device))
            self.example = Example(trainer.precision_plugin.convert_input(given))
            self._try(pl_module, self.example, "example_input_array" if example_inputs is None else "example_inputs")
            return
        size = batch_size_of(batch)
        few = rows_of(batch, torch.arange(min(_FEW, size)), size)
        self.example = Example(inputs_of(few))
        if overrides(pl_module, "forward") and self._runs(pl_module, self.example) is None:
            return
        self.by_forward, self.example = False, Example(few, self._step)
        self._try(pl_module, self.example, "validation_step")

    def __call__(self, module: nn.Module, batch: Any) -> Any:
        """Run a module on a whole batch."""
        return call(module, inputs_of(batch)) if self.by_forward else self._step(module, batch)

    def _step(self, module: Any, batch: Any) -> Any:
        """What the validation step returns and logs; on a module of which nobody minds what is set in it."""
        logged: dict[str, Any] = {}
        vars(module).update(log=lambda name, value, *_, **__: logged.update({name: value}))
        vars(module).update(log_dict=lambda values, *_, **__: logged.update(values.items()))
        if module._trainer is None:  # a copy
            module.trainer = self.trainer
        out = StepReplay(self.trainer, module, "validation_step", None).run(batch)
        return [out, [value for value in logged.values() if isinstance(value, Tensor)]]

    def _runs(self, pl_module: Any, example: Example) -> Exception | None:
        try:
            with isolated(pl_module), torch.no_grad():
                pl_module.eval()
                example.run(pl_module)
        except Exception as error:  # noqa: BLE001 (the next way may do)
            return error
        return None

    def _try(self, pl_module: Any, example: Example, name: str) -> None:
        error = self._runs(pl_module, example)
        if error is not None:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} does not run on {name} ({type(error).__name__}: {error}); pass "
                "example_inputs= that its forward takes: a tensor, a tuple of arguments or a dict of keyword arguments"
            ) from error


class KeptBatches:
    """The first validation samples, kept on the CPU.

    Args:
        max_samples: How many at most.
    """

    def __init__(self, max_samples: int) -> None:
        self.max_samples, self.samples = max_samples, 0
        self._batches: list[Any] = []

    def add(self, batch: Any) -> None:
        """Keep what there is room for."""
        size = batch_size_of(batch)
        wanted = min(size, self.max_samples - self.samples)
        if wanted > 0:
            part = batch if wanted == size else rows_of(batch, torch.arange(wanted), size)
            self._batches.append(map_tensors(part, lambda t: t.detach().to("cpu", copy=True)))
            self.samples += wanted

    def on(self, device: torch.device) -> Iterator[Any]:
        """The batches, one by one, on a device."""
        for batch in self._batches:
            yield map_tensors(batch, lambda t: t.to(device))


def metric_on(trainer: Any, pl_module: Any, kept: KeptBatches, monitor: str) -> float | None:
    """A logged metric on kept samples, over all processes; None if the validation step does not log it.

    Args:
        trainer: The Trainer.
        pl_module: Its module; it is left as it was.
        kept: The samples.
        monitor: The name under which it is logged.
    """
    replay = StepReplay(trainer, pl_module, "validation_step", None)
    name = monitor.removesuffix("/dataloader_idx_0")  # the samples are those of the first dataloader
    total, count, metric = 0.0, 0, None
    with replay.isolated(), torch.no_grad(), eager():
        for batch in kept.on(pl_module.device):
            replay.run(batch)
            value = replay.logged.get(name)
            if isinstance(value, Metric):
                metric = value
                metric._to_sync = False  # here; a process without samples could not join in
            elif value is not None:
                total += float(value) * batch_size_of(batch)
                count += batch_size_of(batch)
        if metric is not None:
            total, count = float(metric.compute()) * kept.samples, kept.samples
    sums = torch.tensor([total, float(count)], dtype=torch.float32, device=pl_module.device)
    sums = trainer.strategy.reduce(sums, reduce_op="sum")
    return float(sums[0] / sums[1]) if sums[1] > 0 else None
