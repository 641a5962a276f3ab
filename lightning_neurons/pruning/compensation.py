"""Making up for what a cut takes away: what the remaining weights are given before it is made.

A compensation looks at what the readers of the neurons that go have been reading, and says by how much biases and norm
statistics are to move. It changes nothing itself; the shifts are part of the cut, and are taken back with it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_neurons.network.layer import modules_by_name
from lightning_neurons.network.widths import axes
from lightning_neurons.pruning.surgery import Cut

Compensation = Literal["none", "mean"]


@dataclass(frozen=True)
class Repair:
    """What goes with a cut.

    Attributes:
        shifts: By parameter or buffer, what is added to it before the cut.
        notes: What could not be compensated, and why.
    """

    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class InputMeans:
    """The mean of what modules read, by input, over samples and positions.

    Args:
        model: The model.
        readers: Paths of convolutions and linear layers.
    """

    def __init__(self, model: nn.Module, readers: Iterable[str]) -> None:
        modules = modules_by_name(model)
        self.modules = {path: modules[path] for path in readers}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def observe(self, run: Callable[[], Any]) -> None:
        """Add what is read while something runs."""
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

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, Float[Tensor, " input"]]:
        """The means.

        Args:
            reduce: Sums a tensor over processes.
        """
        found = {}
        for path, module in self.modules.items():
            weight = module.get_parameter("weight")
            width = weight.shape[axes(module, "reads")["weight"]]
            nothing = torch.zeros(width, dtype=_wide(weight.device), device=weight.device)
            total = reduce(self.sums.get(path, nothing))
            count = reduce(self.counts.get(path, nothing[:1].sum()))
            found[path] = total / count.clamp(min=1)
        return found

    def _hook(self, path: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given: Tensor = (args[0] if args else kwargs["input"]).detach()
            # Counted from the end: a convolution may be given a single sample without a batch axis.
            axis = given.ndim - 1 - len(getattr(module, "kernel_size", ()))
            wide = given.to(_wide(given.device))
            total = wide.sum([a for a in range(given.ndim) if a != axis]) if given.ndim > 1 else wide
            self.sums[path] = self.sums.get(path, 0) + total
            count = torch.tensor(given.numel() / given.shape[axis], dtype=total.dtype, device=total.device)
            self.counts[path] = self.counts.get(path, 0) + count

        return add


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def readers_of(cuts: Sequence[Cut]) -> list[str]:
    """The modules that read neurons that go."""
    return [one.path for one in cuts if one.role == "reads"]


def fold_means(
    model: nn.Module, cuts: Sequence[Cut], means: Mapping[str, Tensor], norm_behind: Mapping[str, str]
) -> Repair:
    """Let readers see the mean of what has gone: it moves into their bias, or into the norm layer behind them.

    Exact for neurons that never change, away from zero-padded borders.

    Args:
        model: As it is before the cut.
        cuts: What goes.
        means: By reader, the mean of each of its inputs.
        norm_behind: By layer, the norm layer that alone reads it.
    """
    modules, shifts, notes = modules_by_name(model), {}, []
    for one in cuts:
        if one.role != "reads":
            continue
        module = modules[one.path]
        lost = _contribution(module, one.places, means[one.path])
        norm = modules.get(norm_behind.get(one.path, ""))
        if getattr(module, "bias", None) is not None:
            shifts[f"{one.path}.bias"] = lost
        elif isinstance(norm, nn.modules.batchnorm._NormBase) and norm.running_mean is not None:
            shifts[f"{norm_behind[one.path]}.running_mean"] = -lost
        else:
            notes.append(
                f"{one.path} is not compensated: it has no bias, and no norm layer with a running mean follows"
            )
    return Repair(shifts, tuple(notes))


def _contribution(module: nn.Module, places: Sequence[int], mean: Tensor) -> Float[Tensor, " output"]:
    """What the inputs at some places add to each output on average."""
    weight = module.get_parameter("weight").detach().to(mean.dtype)
    transposed = isinstance(module, _ConvTransposeNd)
    taps = (weight.transpose(0, 1) if transposed else weight).flatten(2).sum(2) if weight.ndim > 2 else weight
    if transposed:
        taps = taps / torch.tensor(module.stride).prod()  # each output sees only every stride-th tap
    index = torch.tensor(list(places), device=mean.device)
    return taps[:, index] @ mean[index]
