"""Snapshot of a training run's state, taken before a cut and restored if the cut is undone.

Everything is kept on the CPU in plain values and tensors, so that it can go into checkpoints. It is restored whole
or not at all.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_neurons.callbacks.pruning.cutting import average_models, averages_of
from lightning_neurons.callbacks.trainer.namespaces import Trainer
from lightning_neurons.data.batches import map_tensors
from lightning_neurons.dependency.conform import set_data
from lightning_neurons.dependency.sizes import all_sizes, put_sizes, refit
from lightning_neurons.pruning.surgery.optimizers import with_held
from lightning_neurons.pruning.surgery.surgery import Operation
from lightning_neurons.results.typed import typed

Snapshot = dict[str, Any]


def take_snapshot(trainer: Trainer, pl_module: nn.Module) -> Snapshot:
    """Return copies of model, averages of it, optimizers, schedulers and the state of the precision plugin."""
    return {
        "model": _tensors(pl_module),
        "sizes": _plain_sizes(pl_module),
        "averages": [_tensors(average) for average in average_models(trainer)],
        "optimizers": [_copy(optimizer.state_dict()) for optimizer in with_held(trainer.optimizers)],
        "schedulers": [_copy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "precision": _copy(trainer.precision_plugin.state_dict()),
    }


def restore_snapshot(
    trainer: Trainer, pl_module: nn.Module, snapshot: Snapshot, also: Callable[[Operation], None]
) -> None:
    """Restore a snapshot, also into layers that have become narrower; parameters stay the same objects.

    Args:
        trainer: Between two epochs, or after the last.
        pl_module: Its module.
        snapshot: The snapshot.
        also: Records the restoration as its last step; undone with it after an error.

    Raises:
        Exception: Whatever went wrong; everything is then as it was.
    """
    operation = Operation()
    strategy: Any = trainer.strategy  # of DDP, if it wraps the module
    wrapped = isinstance(strategy.model, DistributedDataParallel)
    if wrapped:
        strategy.model = strategy.lightning_module  # the wrapper knows the shapes of the cut model
    try:
        with torch.inference_mode(False), torch.no_grad():
            pairs = [(pl_module, snapshot["model"])]
            pairs += zip(average_models(trainer), snapshot["averages"], strict=True)
            for model, saved in pairs:
                _put(model, saved, operation)
            for model in (pl_module, *averages_of(trainer)):
                _put_sizes(model, snapshot, operation)
            for optimizer, saved in zip(with_held(trainer.optimizers), snapshot["optimizers"], strict=True):
                live = _Live.of(optimizer)
                operation.do(partial(_load_optimizer, optimizer, _copy(saved), live), partial(live.put_back, optimizer))
            for config, saved in zip(trainer.lr_scheduler_configs, snapshot["schedulers"], strict=True):
                _exchange(config.scheduler, _copy(saved), operation)
            _exchange(trainer.precision_plugin, _copy(snapshot["precision"]), operation)
            also(operation)
    except BaseException:
        operation.roll_back()
        raise
    finally:
        if wrapped:
            strategy.configure_ddp()


def restore_models(models: Sequence[nn.Module], snapshot: Snapshot, also: Callable[[Operation], None]) -> None:
    """Restore only the model, and copies of it, before training begins; whole or not at all."""
    operation = Operation()
    try:
        with torch.inference_mode(False), torch.no_grad():
            for model in models:
                _put(model, snapshot["model"], operation)
                _put_sizes(model, snapshot, operation)
            also(operation)
    except BaseException:
        operation.roll_back()
        raise


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, also those that are not saved in checkpoints."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in named}


def _plain_sizes(model: nn.Module) -> dict[str, dict[str, list[int]]]:
    return {path: {key: list(pair) for key, pair in by.items()} for path, by in all_sizes(model).items()}


def _put_sizes(model: nn.Module, snapshot: Snapshot, operation: Operation) -> None:
    """Restore the numbers in attributes; snapshots of earlier versions have none, as nothing changed them."""
    saved = typed(dict[str, dict[str, tuple[int, int]]], snapshot.get("sizes", {}), "sizes")
    operation.do(partial(put_sizes, model, saved), partial(put_sizes, model, all_sizes(model)))


def _copy(state: object) -> Any:
    """Return a deep copy, with tensors on the CPU."""
    return copy.deepcopy(map_tensors(state, lambda t: t.detach().to("cpu", copy=True)))


def _put(model: nn.Module, saved: Mapping[str, Tensor], operation: Operation) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    everything = partial(_refit_all, model)
    operation.do(lambda: None, everything)  # what is taken back goes the other way round: this is then the last
    for name, value in saved.items():
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        store: Any = module._parameters if leaf in module._parameters else module._buffers
        old, gradient = store[leaf], store[leaf].grad
        new = value.to(old.device, old.dtype, copy=True)
        data = old.data

        def put(store: Any = store, leaf: str = leaf, new: Tensor = new) -> None:
            set_data(store, leaf, new)

        def put_back(
            store: Any = store, leaf: str = leaf, old: Tensor = old, data: Tensor = data, gradient: Any = gradient
        ) -> None:
            set_data(store, leaf, data if isinstance(old, nn.Parameter) else old)
            store[leaf].grad = gradient

        operation.do(put, put_back)
    operation.do(everything, lambda: None)


def _refit_all(model: nn.Module) -> None:
    for module in model.modules():
        refit(module)


@dataclass(frozen=True)
class _Live:
    """The groups and state of an optimizer: the objects, which schedulers hold as well, and their contents."""

    groups: list[dict[str, Any]]
    members: list[dict[str, Any]]
    contents: list[dict[str, Any]]
    state: dict[Any, Any]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> "_Live":
        groups = optimizer.param_groups
        contents = [dict(group) for group in groups]
        return cls(groups, list(groups), contents, {p: dict(s) for p, s in optimizer.state.items()})

    def put_back(self, optimizer: torch.optim.Optimizer) -> None:
        self.refill(optimizer, self.contents)
        optimizer.state.clear()
        optimizer.state.update(self.state)

    def refill(self, optimizer: torch.optim.Optimizer, contents: Sequence[Mapping[str, Any]]) -> None:
        for group, content in zip(self.members, [dict(content) for content in contents], strict=True):
            group.clear()
            group.update(content)
        self.groups[:] = self.members
        optimizer.param_groups = self.groups


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], live: _Live) -> None:
    optimizer.load_state_dict(saved)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [index for group in saved["param_groups"] for index in group["params"]]
    for parameter, index in zip(parameters, names, strict=True):
        for key, value in saved["state"].get(index, {}).items():
            now = optimizer.state[parameter][key]
            if isinstance(value, Tensor) and now.dtype != value.dtype:  # it was given that of the parameter
                optimizer.state[parameter][key] = value.to(now.device)
    live.refill(optimizer, optimizer.param_groups)


def _exchange(target: Any, state: object, operation: Operation) -> None:
    before = _copy(target.state_dict())
    operation.do(partial(target.load_state_dict, state), partial(target.load_state_dict, before))
