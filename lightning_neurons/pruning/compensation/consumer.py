"""One layer that reads removed neurons: its inputs with and without them, and its weights solved again."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_neurons.layers.width_handlers import axes
from lightning_neurons.pruning.compensation.moments import Moments, OutputMean, Reduce, applied, wide
from lightning_neurons.pruning.compensation.ridge import choose_ridge, refine
from lightning_neurons.pruning.compensation.unfold import by_feature, channels, has_patches, patches

AT_ONCE = 2**23
"""Values of patches that are processed together: 64 MB in float64."""

LARGEST = 8192
"""Inputs of a consumer up to which their covariance is kept: 0.5 GB in float64."""


class Consumer:
    """A convolution or linear layer that reads removed neurons.

    Args:
        path: Its path.
        module: As it is before the cut.
        gone: Indices of its inputs that are removed.
        patchwise: Whether whole receptive patches are to be regressed, instead of channels.
        has_constant: Whether a constant can be added to its outputs.
    """

    def __init__(
        self, path: str, module: nn.Module, gone: Sequence[int], *, patchwise: bool, has_constant: bool
    ) -> None:
        self.path, self.module, self.has_constant = path, module, has_constant
        self.axis = axes(module, "reads")["weight"]
        weight = module.get_parameter("weight").detach()
        self.weight = weight
        stays = torch.ones(weight.shape[self.axis], dtype=torch.bool)
        stays[list(gone)] = False
        self.keep = stays.nonzero().flatten().to(weight.device)
        taps = weight[0, 0].numel()
        self.notes: list[str] = [] if has_constant else [f"{path} has no bias, and no norm layer with a running mean"]
        self.patchwise = patchwise and taps > 1 and has_patches(module)
        if patchwise and taps > 1 and not self.patchwise:
            self.notes.append(f"{path} is no plain convolution: its channels were regressed instead of patches")
        if self.patchwise and len(self.keep) * taps > LARGEST:
            self.patchwise = False
            self.notes.append(f"{path} reads patches of more than {LARGEST} values: its channels were regressed")
        self.inputs = len(self.keep) * (taps if self.patchwise else 1)
        outputs = weight.numel() // len(stays)
        # What an output lacks says as much as what its inputs lack, so the fewer of the two are regressed.
        self.by_output = self.patchwise or (by_feature(module) and outputs < len(stays))
        self.targets = weight.shape[axes(module, "makes")["weight"]] if self.by_output else len(stays)
        self.is_large = max(len(stays), self.inputs) > LARGEST
        if self.is_large:
            self.notes.append(f"{path} reads more than {LARGEST} values: only their mean was compensated")
        self._halves: list[Moments] | None = None  # of the samples
        self.dense_mean, self.mean = OutputMean(module), OutputMean(module)

    def add(self, dense: Tensor, inputs: Tensor) -> None:
        """Add its inputs for one batch.

        Args:
            dense: Inputs in the model as it is.
            inputs: Inputs in the model that is being cut, without those that are removed.
        """
        self.dense_mean.add(dense)
        self.mean.add(inputs)
        if self.is_large:
            return
        second = _in_second_half(dense)
        lacking = dense.to(torch.promote_types(dense.dtype, torch.float32))
        lacking = lacking.index_add(-1 if by_feature(self.module) else 1, self.keep, inputs.to(lacking), alpha=-1)
        for moments, chosen in zip(self.halves, (~second, second), strict=True):
            x, y = inputs[chosen], lacking[chosen]
            few = max(AT_ONCE // max(self.inputs * x[0, 0].numel(), 1), 1) if self.patchwise and len(x) else len(x)
            for some, rest in zip(x.split(few), y.split(few), strict=True) if len(x) else ():
                wanted = applied(self.module, self.weight, rest) if self.by_output else rest
                given = patches(self.module, some) if self.patchwise else channels(self.module, some)
                moments.add(given, channels(self.module, wanted))

    @property
    def halves(self) -> list[Moments]:
        """The moments of each half of the samples; they take memory from the first use on."""
        if self._halves is None:
            self._halves = [Moments.empty(self.inputs, self.targets, self.weight.device) for _ in range(2)]
        return self._halves

    def kept(self, inputs: Tensor) -> Tensor:
        """Return the inputs that stay."""
        return inputs.index_select(-1 if by_feature(self.module) else 1, self.keep)

    def solve(self, reduce: Reduce) -> tuple[Tensor, Tensor]:
        """Return what has to be added to the weight, zero for removed inputs, and to the outputs.

        Args:
            reduce: Sums a tensor over processes.

        Returns:
            A tensor of the weight's shape, and one value for each output.
        """
        weight = self.weight.to(wide(self.weight.device))
        new = old = weight.index_select(self.axis, self.keep)
        if not self.is_large:
            first, second = (moments.reduced(reduce) for moments in self.halves)
            self._halves = None
            (first + second).check(self.path)
            if self.patchwise:
                new = old + self._refined(first, second, None).reshape(old.shape)
            elif self.by_output:
                new = old + self._refined(first, second, None).movedim(-1, self.axis)
            else:
                rows = weight.movedim(self.axis, 0).flatten(1)
                mixing = self._refined(first, second, rows @ rows.T)
                new = old + torch.tensordot(weight.movedim(self.axis, -1), mixing, 1).movedim(-1, self.axis)
        wanted, count = self.dense_mean.total(weight)
        got, _ = self.mean.total(new)
        change = torch.zeros_like(weight).index_copy(self.axis, self.keep, new - old)
        return change, (reduce(wanted) - reduce(got)) / reduce(count).clamp(min=1)

    @property
    def largest(self) -> float:
        """The largest magnitude of a mean input."""
        return self.dense_mean.largest

    def _refined(self, first: Moments, second: Moments, metric: Tensor | None) -> Tensor:
        """Return what to add for all samples, with the ridge that holds best from one half of them to the other."""
        start = first.yx.new_zeros(first.yx.shape)
        ridge = choose_ridge(first, second, start, metric, centred=self.has_constant)
        both = first + second
        refined = refine(both, start, ridge=ridge, centred=self.has_constant)
        if float(both.count) < len(both.xx):
            self.notes.append(
                f"{self.path} was solved with a larger ridge ({refined.ridge:g} of the mean variance), as there were "
                f"{int(both.count)} positions for {len(both.xx)} inputs; give more samples"
            )
        elif math.isinf(ridge):
            self.notes.append(f"{self.path}: only means were compensated, as more did not hold for other samples")
        elif refined.ridge > ridge:
            self.notes.append(
                f"{self.path} was solved with a larger ridge ({refined.ridge:g}), as its inputs are singular"
            )
        return refined.matrix


def _in_second_half(dense: Tensor) -> Tensor:
    """Return whether each sample belongs to the second half: by its values, so that batching does not matter.

    Args:
        dense: ``(batch, ...)``; the sixth bit of the sum of each sample is as good as a coin.
    """
    mantissa, _ = torch.frexp(dense.flatten(1).sum(1, dtype=torch.float32) if dense.ndim > 1 else dense)
    return (mantissa.abs() * 64).long() % 2 == 1
