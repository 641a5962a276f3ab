"""Test, in each measurement, of whether samples may be run again in other batches than the one they came in."""

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lightning_neurons.callbacks.trainer.checks import name_of
from lightning_neurons.callbacks.trainer.namespaces import Trainer
from lightning_neurons.callbacks.trainer.step_replay import StepReplay
from lightning_neurons.data.batches import batch_size_of
from lightning_neurons.data.joining import kind_of
from lightning_neurons.measurement.batch_splitting import Independence
from lightning_neurons.measurement.losses import LossReduction, summed

_FOUND: "WeakKeyDictionary[nn.Module, tuple[Any, dict[Any, Independence]]]" = WeakKeyDictionary()


def independence_of(
    replay: StepReplay, loss_reduction: LossReduction, batch: object, place: tuple[int, int]
) -> tuple[bool, bool]:
    """Test whether the loss of a batch is the sum or mean of losses of single samples, whatever the batch's index.

    Also test whether it depends on state that the batches before have left.

    Args:
        replay: Computes the loss of a batch.
        loss_reduction: How the losses of the samples are reduced to that of the batch.
        batch: The batch.
        place: Index of the batch, and of its dataloader.

    Returns:
        Whether it is such a sum or mean; and whether it depends on the batches before.
    """
    function = None if replay.loss_fn is None else (id(replay.loss_fn), name_of(replay.loss_fn))
    key = replay.step, function, loss_reduction, kind_of(batch), place[1]
    moment, found = _moment(replay.trainer), dict[Any, Independence]()
    if _FOUND.get(replay.pl_module, (None,))[0] != moment:
        _FOUND[replay.pl_module] = moment, found
    independence = _FOUND[replay.pl_module][1].setdefault(key, Independence())
    asked: list[Any] = []

    def loss_of(given: object) -> Tensor:
        if not any(given is one for one in asked):
            asked.append(given)
        # Another one for each, as samples of different batches are joined.
        replay.place = place[0] + [given is one for one in asked].index(True), place[1]
        return summed(replay.loss(given), loss_reduction, batch_size_of(given))

    return independence.shown(loss_of, batch, replay.isolated), independence.is_stateful


def _moment(trainer: Trainer) -> tuple[Any, ...]:
    """Return a key that changes from one measurement to the next, as the loss may have got another term in between."""
    step = trainer.current_epoch if trainer.training else (trainer.current_epoch, trainer.global_step)
    return id(trainer), trainer.state.fn, trainer.sanity_checking, step
