"""Whether a module's samples may be run again in other company than their batch's; found out once for each module."""

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lightning_neurons.callbacks.checks import name_of
from lightning_neurons.callbacks.replay import StepReplay
from lightning_neurons.network.batches import batch_size_of, is_divisible, tensors_of
from lightning_neurons.studies.dividing import Independence
from lightning_neurons.studies.losses import LossReduction, summed

_FOUND: "WeakKeyDictionary[nn.Module, dict[Any, Independence]]" = WeakKeyDictionary()


def independence_of(replay: StepReplay, loss_reduction: LossReduction, batch: Any, place: tuple[int, int]) -> bool:
    """Whether the loss of a batch is known to be that of its samples, each for itself.

    Args:
        replay: How to get the loss.
        loss_reduction: What that is of the samples' own.
        batch: The batch.
        place: Index of the batch, and of its dataloader.
    """
    if not is_divisible(batch):
        return False
    function = None if replay.loss_fn is None else (id(replay.loss_fn), name_of(replay.loss_fn))
    kinds = tuple((tensor.ndim, tensor.dtype) for tensor in tensors_of(batch))
    key = replay.step, function, loss_reduction, type(batch), kinds, place[1]
    independence = _FOUND.setdefault(replay.pl_module, {}).setdefault(key, Independence())

    def loss_of(given: Any) -> Tensor:
        return summed(replay.loss(given), loss_reduction, batch_size_of(given))

    replay.place = place
    return independence.shown(loss_of, batch, replay.isolated)
