"""One reader of neurons that go: what it reads with and without them, and its weights solved again."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_neurons.network.widths import axes
from lightning_neurons.pruning.compensation.least_squares import RIDGE, refine
from lightning_neurons.pruning.compensation.moments import Moments, OutputMean, Reduce, applied, wide
from lightning_neurons.pruning.compensation.views import channels, has_patches, patches

LARGEST = 8192
"""Inputs of a reader up to which their covariance is kept: 0.5 GB in float64."""


class Reader:
    """A convolution or linear layer that reads what goes.

    Args:
        path: Its path.
        module: As it is before the cut.
        gone: The places of its inputs that go.
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
        self.moments: Moments | None = None
        if max(len(stays), len(self.keep) * taps if self.patchwise else 0) <= LARGEST:
            inputs = len(self.keep) * (taps if self.patchwise else 1)
            self.moments = Moments.empty(inputs, len(weight) if self.patchwise else len(stays), weight.device)
        else:
            self.notes.append(f"{path} reads more than {LARGEST} values: only their mean was compensated")
        self.dense_mean, self.mean = OutputMean(module), OutputMean(module)

    def add(self, dense: Tensor, inputs: Tensor) -> None:
        """Add what it reads for one batch.

        Args:
            dense: In the model as it is.
            inputs: In the model that is being cut, without what goes.
        """
        self.dense_mean.add(dense)
        self.mean.add(inputs)
        if self.moments is None:
            return
        if self.patchwise:
            targets = channels(self.module, applied(self.module, self.weight, dense))
            self.moments.add(patches(self.module, inputs), targets)
        else:
            self.moments.add(channels(self.module, inputs), channels(self.module, dense))

    def kept(self, inputs: Tensor) -> Tensor:
        """What stays of inputs."""
        return inputs.index_select(-1 if isinstance(self.module, nn.Linear) else 1, self.keep)

    def solve(self, reduce: Reduce) -> tuple[Tensor, Tensor]:
        """What has to be added to the weight, zero for what goes, and to the outputs.

        Args:
            reduce: Sums a tensor over processes.
        """
        weight = self.weight.to(wide(self.weight.device))
        new = old = weight.index_select(self.axis, self.keep)
        if self.moments is not None:
            moments = self.moments.reduced(reduce)
            if self.patchwise:
                refined = refine(moments, old.flatten(1), centred=self.has_constant)
                new = refined.matrix.reshape(old.shape)
            else:
                start = torch.eye(weight.shape[self.axis], dtype=weight.dtype, device=weight.device)[:, self.keep]
                refined = refine(moments, start, centred=self.has_constant)
                new = torch.tensordot(weight.movedim(self.axis, -1), refined.matrix, 1).movedim(-1, self.axis)
            self._note_ridge(moments, refined.ridge)
        wanted, count = self.dense_mean.total(weight)
        got, _ = self.mean.total(new)
        change = torch.zeros_like(weight).index_copy(self.axis, self.keep, new - old)
        return change, (reduce(wanted) - reduce(got)) / reduce(count).clamp(min=1)

    @property
    def largest(self) -> float:
        """The largest mean of what it reads."""
        return self.dense_mean.largest

    def _note_ridge(self, moments: Moments, ridge: float) -> None:
        if float(moments.count) < len(moments.xx):
            self.notes.append(
                f"{self.path} was solved with a larger ridge ({ridge:g} of the mean variance), as there were "
                f"{int(moments.count)} positions for {len(moments.xx)} inputs; give more samples"
            )
        elif ridge > RIDGE:
            self.notes.append(f"{self.path} was solved with a larger ridge ({ridge:g}), as its inputs are singular")
