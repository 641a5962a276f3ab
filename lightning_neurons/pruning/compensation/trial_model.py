"""A trial cut, made on a copy, which can still be corrected."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_neurons.pruning.structure.example import twin_of
from lightning_neurons.pruning.surgery.surgery import TensorCut, cut, stays_of


class TrialModel:
    """A cut copy of a model, in evaluation mode.

    Args:
        model: As it is before the cut.
        cuts: The cuts.
        shifts: By parameter or buffer, what is added to it before the cut.
    """

    def __init__(self, model: nn.Module, cuts: Sequence[TensorCut], shifts: Mapping[str, Tensor] | None = None) -> None:
        self.twin = twin_of(model)
        self.twin.requires_grad_(False)
        self._stays = stays_of(self.twin, cuts)
        self._wide = {name: self._tensor(name).shape for name in self._stays}
        cut(self.twin, cuts, shifts=shifts)

    def shift(self, name: str, value: Tensor) -> None:
        """Add a value that was meant for the model before the cut to a parameter or buffer."""
        tensor = self._tensor(name)
        tensor.add_(self._narrow(name, value).to(tensor))

    def widened(self, name: str, value: Tensor) -> Tensor:
        """Return a value of the copy's width at that of the model before the cut, zero for removed neurons."""
        for axis, stays in self._stays.get(name, {}).items():
            shape = list(value.shape)
            shape[axis] = self._wide[name][axis]
            value = value.new_zeros(shape).index_copy(axis, stays.to(value.device), value)
        return value

    def _tensor(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self.twin.get_submodule(owner), leaf)
        return found.data

    def _narrow(self, name: str, value: Tensor) -> Tensor:
        for axis, stays in self._stays.get(name, {}).items():
            value = value.index_select(axis, stays.to(value.device))
        return value
