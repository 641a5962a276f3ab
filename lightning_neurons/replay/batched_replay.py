"""Several changes of one activation in one replay: the batch is repeated, and each repetition gets its own change.

For devices on which a larger batch costs hardly more than a small one. Rounding in a kernel may depend on the size of
the batch, so results are equal to single replays up to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_neurons.hooks.intervention import Edit
from lightning_neurons.isolation.tensors import map_tensors_in
from lightning_neurons.replay.replay import Replay
from lightning_neurons.replay.tape import HOLE, Tape


class StackedReplay(Replay):
    """A mode for a run of the batch, repeated once for each change.

    Args:
        tape: The recording of the single batch; no memory on it is written into later.
        modules: The layers that are changed.
        start: The first call that is run; the one before it makes the activation.
        edits: The changes of that activation, one for each repetition.
        samples: Number of samples of the batch.

    Raises:
        DivergedError: If the run calls other functions than the recorded one, or needs a result that was not kept.
    """

    def __init__(
        self, tape: Tape, modules: Mapping[str, nn.Module], start: int, edits: Sequence[Edit | None], samples: int
    ) -> None:
        super().__init__(tape, modules, start, {})
        self._changes, self._samples = edits, samples

    def _answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super()._answer(func, args, kwargs)
        if self.now >= self._start:
            return result
        result = map_tensors_in(result, self._repeated)
        if self.now == self._start - 1:
            for place, edit in enumerate(self._changes):
                if edit is not None:
                    edit.write(result.narrow(0, place * self._samples, self._samples))
        return result

    def _repeated(self, tensor: Tensor) -> Tensor:
        if tensor is HOLE or not tensor.ndim or len(tensor) != self._samples:
            return tensor
        return tensor.repeat(len(self._changes), *[1] * (tensor.ndim - 1))
