"""Weights that validation has used, put into the module again while our own hooks run.

Callbacks that average weights (``EMAWeightAveraging`` and its like) put the averages into the module while validation
runs and take them out when it ends, in the order of the Trainer's list; some do so around each batch. Where one that
may do so is there, the weights are kept on the CPU when the first batch runs; otherwise nothing is copied, as nothing
can have changed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from lightning_neurons.callbacks.trainer.checks import overrides
from lightning_neurons.callbacks.trainer.namespaces import EitherCallback, Trainer, callbacks_of
from lightning_neurons.callbacks.trainer.step_replay import is_compiled

_LIGHTNING = ("lightning.pytorch.callbacks.", "pytorch_lightning.callbacks.")
_READS_ONLY = ("callback", "progress", "device_stats_monitor", "throughput_monitor")
_HARMLESS = ("lightning_neurons.", *(place + name for place in _LIGHTNING for name in _READS_ONLY))

_FEW = 8


@dataclass
class _Kept:
    """The weights by name at the time of a batch.

    Attributes:
        waiting: A hook that will keep them once more, when a module runs.
        failure: The error if that failed.
    """

    weights: dict[str, Tensor]
    batch_idx: int
    by_batch: bool
    waiting: RemovableHandle | None = None
    failure: Exception | None = None


_KEPT: "WeakKeyDictionary[Any, _Kept]" = WeakKeyDictionary()


def keep_weights(trainer: Trainer, pl_module: nn.Module, callback: EitherCallback, batch_idx: int) -> None:
    """Keep the weights of this validation, once, if they may change before the end hook of ``callback`` runs.

    Args:
        trainer: The Trainer, about to run a batch.
        pl_module: Its module.
        callback: One of ours, which will not run the module any more before the Trainer does.
        batch_idx: The index of the batch.
    """
    kept = _KEPT.get(trainer)
    if kept is None:
        by_batch = _may_change_by_batch(trainer, pl_module) and not is_compiled(pl_module)  # which takes no hooks
        if not by_batch and not _may_change(trainer, callback):
            return
        kept = _KEPT[trainer] = _Kept(_copies(pl_module), batch_idx, by_batch)
    if not kept.by_batch or kept.batch_idx != batch_idx or kept.waiting is not None:
        return

    def runs(*_: object) -> None:  # what others do before each batch comes between now and then
        try:
            kept.weights = _copies(pl_module)
        except Exception as error:  # noqa: BLE001 (the run of the module must not fail)
            kept.failure = error
        _stop_waiting(kept)

    kept.waiting = register_module_forward_pre_hook(runs)


def forget_weights(trainer: Trainer) -> None:
    """Drop the kept weights."""
    if trainer in _KEPT:
        _stop_waiting(_KEPT.pop(trainer))


@contextmanager
def validated_weights(trainer: Trainer, *, in_batch: bool = False) -> Iterator[None]:
    """Give the module the weights that validation has used; afterwards restore its own, bit for bit.

    Args:
        trainer: The Trainer.
        in_batch: Whether validation is going on, so that they differ only if they are exchanged around each batch.

    Raises:
        Exception: While validation is going on, if the weights could not be kept.
    """
    kept = _KEPT.get(trainer)
    if in_batch and kept is not None and kept.failure is not None:
        raise kept.failure
    weights = {} if kept is None else kept.weights
    if in_batch and not (kept and kept.by_batch and _differs(trainer.lightning_module, weights)):
        weights = {}
    exchanged: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.inference_mode():  # as in Lightning's own evaluation; ``data`` leaves no trace for autograd
            for name, tensor in _named(trainer.lightning_module) if weights else ():
                before = weights.get(name)
                if before is not None and tensor.shape == before.shape and not torch.equal(tensor.data.cpu(), before):
                    exchanged.append((tensor, tensor.data.clone()))
                    tensor.data.copy_(before)
        yield
    finally:
        with torch.inference_mode():
            for tensor, now in exchanged:
                tensor.data.copy_(now)


def _named(pl_module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, as parameters may be exchanged for others."""
    for name, tensor in (*pl_module.named_parameters(), *pl_module.named_buffers()):
        if not is_lazy(tensor):
            yield name, tensor


def _copies(pl_module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in _named(pl_module)}


def _differs(pl_module: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Return True if the module's weights differ from these, by sums over a few values of each, to save time."""
    pairs = [(t.detach(), weights[n]) for n, t in _named(pl_module) if n in weights and t.is_floating_point()]
    marks = [[_mark(tensor) for tensor in column] for column in zip(*pairs, strict=True)]
    return bool(marks) and not torch.equal(*map(torch.stack, marks))


def _mark(tensor: Tensor) -> Tensor:
    return tensor.flatten()[:: max(1, tensor.numel() // _FEW)].double().sum().cpu()


def _stop_waiting(kept: _Kept) -> None:
    if kept.waiting is not None:
        kept.waiting.remove()
        kept.waiting = None


def _may_change(trainer: Trainer, callback: EitherCallback) -> bool:
    """Return True if a callback before this one acts when validation (or the test) ends."""
    before = callbacks_of(trainer)[: callbacks_of(trainer).index(callback)] if callback in callbacks_of(trainer) else []
    return any(_does(one, f"on_{_stage(trainer)}_epoch_end") for one in before)


def _may_change_by_batch(trainer: Trainer, pl_module: nn.Module) -> bool:
    """Return True if the module or a callback acts before or after each batch."""
    hooks = [f"on_{_stage(trainer)}_batch_{when}" for when in ("start", "end")]
    return any(overrides(pl_module, hook) or any(_does(one, hook) for one in callbacks_of(trainer)) for hook in hooks)


def _stage(trainer: Trainer) -> str:
    return "test" if trainer.testing else "validation"


def _does(callback: EitherCallback, hook: str) -> bool:
    return not str(getattr(getattr(callback, hook, None), "__module__", "")).startswith(_HARMLESS)
