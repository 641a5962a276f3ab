"""The weights that validation has used, in place again when our own hooks run.

Callbacks that average weights (``EMAWeightAveraging`` and its like) put the averages into the module while validation
runs and take them out when it ends, in the order of the Trainer's list. Where one that may do so stands before ours,
the weights are kept on the CPU from the first batch on; otherwise nothing is copied, as nothing can have changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_KEPT: "WeakKeyDictionary[Any, list[tuple[Tensor, Tensor]]]" = WeakKeyDictionary()
_HARMLESS = ("lightning.pytorch.callbacks.callback", "pytorch_lightning.callbacks.callback", "lightning_neurons.")


def keep_weights(trainer: Any, pl_module: nn.Module, callback: Any) -> None:
    """Keep the weights of this validation, once, if they may change before ``callback`` hears of its end.

    Args:
        trainer: The Trainer, about to run a batch.
        pl_module: Its module.
        callback: One of ours.
    """
    if trainer in _KEPT or not _may_change(trainer, callback):
        return
    tensors = [t for t in (*pl_module.parameters(), *pl_module.buffers()) if not is_lazy(t)]
    _KEPT[trainer] = [(t, t.detach().to("cpu", copy=True)) for t in tensors]


def forget_weights(trainer: Any) -> None:
    """Let go of what was kept."""
    _KEPT.pop(trainer, None)


@contextmanager
def validated_weights(trainer: Any) -> Iterator[None]:
    """Inside, the module has the weights that validation has used; afterwards those that it had, bit for bit."""
    exchanged: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.inference_mode():  # as in Lightning's own evaluation; ``data`` leaves no trace for autograd
            for tensor, kept in _KEPT.get(trainer, ()):
                now = tensor.data.clone()
                if tensor.shape == kept.shape and not torch.equal(now.cpu(), kept):
                    exchanged.append((tensor, now))
                    tensor.data.copy_(kept)
        yield
    finally:
        with torch.inference_mode():
            for tensor, now in exchanged:
                tensor.data.copy_(now)


def _may_change(trainer: Any, callback: Any) -> bool:
    """Whether a callback in front of this one does anything when validation (or the test) ends."""
    end = f"on_{'test' if trainer.testing else 'validation'}_epoch_end"
    before = trainer.callbacks[: trainer.callbacks.index(callback)] if callback in trainer.callbacks else []
    return any(not str(getattr(getattr(c, end, None), "__module__", "")).startswith(_HARMLESS) for c in before)
