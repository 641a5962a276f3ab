"""Whether a module's samples may be run again in other company than their batch's; found out in each measurement."""

from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lightning_neurons.callbacks.checks import name_of
from lightning_neurons.callbacks.replay import StepReplay
from lightning_neurons.network.batches import batch_size_of, is_divisible, kind_of
from lightning_neurons.studies.dividing import Independence
from lightning_neurons.studies.losses import LossReduction, summed

_FOUND: "WeakKeyDictionary[nn.Module, tuple[Any, dict[Any, Independence]]]" = WeakKeyDictionary()


def independence_of(replay: StepReplay, loss_reduction: LossReduction, batch: Any, place: tuple[int, int]) -> bool:
    """Whether the loss of a batch is known to be that of its samples, each for itself, whatever the batch's index.

    Args:
        replay: How to get the loss.
        loss_reduction: What that is of the samples' own.
        batch: The batch.
        place: Index of the batch, and of its dataloader.
    """
    if not is_divisible(batch):
        return False
    function = None if replay.loss_fn is None else (id(replay.loss_fn), name_of(replay.loss_fn))
    key = replay.step, function, loss_reduction, kind_of(batch), place[1]
    moment, found = _moment(replay.trainer), dict[Any, Independence]()
    if _FOUND.get(replay.pl_module, (None,))[0] != moment:
        _FOUND[replay.pl_module] = moment, found
    independence = _FOUND[replay.pl_module][1].setdefault(key, Independence())
    indices = count(place[0])

    def loss_of(given: Any) -> Tensor:
        replay.place = next(indices), place[1]  # another one each time, as samples of different batches are joined
        return summed(replay.loss(given), loss_reduction, batch_size_of(given))

    return independence.shown(loss_of, batch, replay.isolated)


def _moment(trainer: Any) -> tuple[Any, ...]:
    """What changes from one measurement to the next; a term of the loss may have been switched on in between."""
    step = trainer.current_epoch if trainer.training else (trainer.current_epoch, trainer.global_step)
    return id(trainer), trainer.state.fn, trainer.sanity_checking, step
