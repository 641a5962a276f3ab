"""Compensation by means: the mean of removed neurons moves into biases, or into the norm layers behind them."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_neurons.errors import PruningError
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.layers.width_handlers import axes
from lightning_neurons.pruning.compensation.moments import Reduce, alone, wide
from lightning_neurons.pruning.compensation.unfold import batched, channels
from lightning_neurons.pruning.compensation.weight_shifts import Repair, constant_of, consumers_of, without_compensation
from lightning_neurons.pruning.surgery.surgery import TensorCut


class InputMeans:
    """The mean of each input of some modules, over samples and positions.

    Args:
        model: The model.
        consumers: Paths of convolutions and linear layers.
    """

    def __init__(self, model: nn.Module, consumers: Iterable[str]) -> None:
        modules = modules_by_name(model)
        self.modules = {path: modules[path] for path in consumers}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def observe(self, run: Callable[[], Any]) -> None:
        """Add the inputs of the modules while something runs."""
        hooks = [
            module.register_forward_pre_hook(self._hook(path), with_kwargs=True)
            for path, module in self.modules.items()
        ]
        try:
            with torch.no_grad():
                run()
        finally:
            for hook in hooks:
                hook.remove()

    def means(self, reduce: Reduce = alone) -> dict[str, Float[Tensor, " input"]]:
        """Return the mean of each input.

        Args:
            reduce: Sums a tensor over processes.

        Returns:
            By path of a module, in float64 where the device has it.
        """
        found = {}
        for path, module in self.modules.items():
            weight = module.get_parameter("weight")
            width = weight.shape[axes(module, "reads")["weight"]]
            nothing = torch.zeros(width, dtype=wide(weight.device), device=weight.device)
            total = reduce(self.sums.get(path, nothing))
            count = reduce(self.counts.get(path, nothing[:1].sum()))
            found[path] = total / count.clamp(min=1)
            if not bool(total.isfinite().all()):
                raise PruningError(f"{path} reads NaN or infinite values on the calibration data, which have no mean")
        return found

    def _hook(self, path: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = channels(module, batched(module, args, kwargs))
            given = given.to(wide(given.device))
            self.sums[path] = self.sums.get(path, 0) + given.sum(1)
            count = torch.tensor(given.shape[1], dtype=given.dtype, device=given.device)
            self.counts[path] = self.counts.get(path, 0) + count

        return add


def fold_means(
    model: nn.Module,
    cuts: Sequence[TensorCut],
    means: Mapping[str, Tensor],
    norm_behind: Mapping[str, str],
    standardised: Collection[str] = (),
) -> Repair:
    """Make up for removed neurons by their mean in the layers that read them.

    Exact for neurons that never change, away from zero-padded borders.

    Args:
        model: As it is before the cut.
        cuts: The cuts.
        means: By path of a downstream layer, the mean of each of its inputs.
        norm_behind: By layer, the norm layer that alone reads it.
        standardised: Layers that standardise their weights, which are left out.

    Returns:
        The changes of biases or running means; a note for each layer that has neither.
    """
    modules, shifts = modules_by_name(model), {}
    notes = without_compensation(cuts, modules, standardised)
    for path, places in consumers_of(cuts, modules, standardised).items():
        lost = contribution(modules[path], places, means[path])
        where = constant_of(path, modules, norm_behind)
        if where is None:
            notes.append(f"{path} is not compensated: it has no bias, and no norm layer with a running mean follows")
        else:
            name, sign = where
            shifts[name] = sign * lost
    return Repair(shifts, tuple(notes))


def contribution(module: nn.Module, places: Sequence[int], mean: Tensor) -> Float[Tensor, " output"]:
    """Return what the inputs at some places add to each output on average."""
    weight = module.get_parameter("weight").detach().to(mean.dtype)
    weight = weight.movedim(axes(module, "reads")["weight"], 1)
    taps = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    if getattr(module, "transposed", False):
        taps = taps / torch.tensor(module.stride).prod()  # each output sees only every stride-th tap
    index = torch.tensor(list(places), device=mean.device)
    return taps[:, index] @ mean[index]
