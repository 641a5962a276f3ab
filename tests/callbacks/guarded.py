"""What the tests of the guard share: metrics that the test makes up, and everything that a run consists of."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from lightning_neurons import NeuronPruningCallback
from tests.callbacks.modules import Plain
from tests.callbacks.pruned import pruner

WHOLE = {"net.conv1": 4, "net.conv2": 6, "net.fc1": 8, "net.fc2": 3}
NAN = float("nan")


def hidden(module: nn.Module) -> int:
    """Neurons that could go; 18 in the whole network."""
    return sum(len(layer.weight) for layer in (module.net.conv1, module.net.conv2, module.net.fc1))


def by_neurons(module: Any) -> float:
    """So much per neuron: 18/32 for the whole network."""
    return hidden(module) / 32


def by_epoch(*values: float) -> Callable[[Any], float]:
    """A table; the last value stays."""
    return lambda module: values[min(module.current_epoch, len(values) - 1)]


class Scored(Plain):
    """Logs a score as ``val_score`` that has nothing to do with what the network can."""

    def __init__(self, score: Callable[[Any], float] = by_neurons, net: Any = None, **kwargs: Any) -> None:
        super().__init__(net, **kwargs)
        self.score = score

    def on_validation_epoch_end(self) -> None:
        self.log("val_score", float(self.score(self)))


def guard(criterion: Any = "weight_l2", **kwargs: Any) -> NeuronPruningCallback:
    """A third of all neurons, that is 6 of 18, and a metric that may fall by an eighth."""
    return pruner(criterion, **({"monitor": "val_score", "max_drop": 0.125} | kwargs))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and every buffer."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def averages(trainer: Any) -> list[nn.Module]:
    found = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [one for one in found if one is not None]


def optimizers(trainer: Any) -> list[torch.optim.Optimizer]:
    """Those of the Trainer, and what they hold as ``base``."""
    return [one for outer in trainer.optimizers for one in (outer, getattr(outer, "base", None)) if one is not None]


def state_of(trainer: Any, module: nn.Module) -> dict[str, Any]:
    """All that training goes on from, in copies."""
    return copy.deepcopy({
        "model": {name: tensor.detach() for name, tensor in tensors(module).items()},
        "averages": [{n: t.detach() for n, t in tensors(one).items()} for one in averages(trainer)],
        "optimizers": [optimizer.state_dict() for optimizer in optimizers(trainer)],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "precision": trainer.precision_plugin.state_dict(),
    })


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """The places at which two nested values are not the same, bit for bit."""
    if isinstance(expected, Tensor):
        same = isinstance(found, Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
        return [] if same else [where]
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping) or found.keys() != expected.keys():
            return [f"{where}: other keys"]
        return [one for key in expected for one in differences(found[key], expected[key], f"{where}.{key}")]
    if isinstance(expected, Sequence) and not isinstance(expected, str):
        if not isinstance(found, Sequence) or len(found) != len(expected):
            return [f"{where}: another length"]
        return [one for i, other in enumerate(expected) for one in differences(found[i], other, f"{where}.{i}")]
    return [] if found == expected or (found != found and expected != expected) else [f"{where}: {found}, {expected}"]


def made(callback: NeuronPruningCallback) -> list[tuple[int, int, int]]:
    """Of each round that stands: number, epoch, neurons."""
    return [(one.number, one.epoch, len(one.plan)) for one in callback.rounds.done]


def undone(callback: NeuronPruningCallback) -> list[tuple[int, int, int]]:
    """The same of those that were taken back."""
    return [(one.number, one.epoch, len(one.plan)) for one in callback.rounds.undone]


class Scaling(Precision):
    """Keeps a scale that grows with every step, as a GradScaler does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.growth = torch.tensor(2.0), {"steps": 0}

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
        self.scale, self.growth["steps"] = self.scale * 1.5, self.growth["steps"] + 1
        return super().optimizer_step(optimizer, model, closure, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "growth": self.growth}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scale, self.growth = state_dict["scale"], dict(state_dict["growth"])


def identities(trainer: Any, module: nn.Module) -> dict[str, Any]:
    """Which objects hold the state, as far as others hold them too."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    wrapped = module.optimizers(use_pl_optimizer=True)
    wrapped = wrapped if isinstance(wrapped, list) else [wrapped]
    return {
        "parameters": [id(p) for p in module.parameters()],
        "optimizers": [id(one) for one in trainer.optimizers],
        "groups": [id(group) for group in groups],
        "held": [[id(p) for p in group["params"]] for group in groups],
        "wrapped": [[id(group) for group in one.param_groups] for one in wrapped],
        "scheduled": [
            id(g) for config in trainer.lr_scheduler_configs for g in config.scheduler.optimizer.param_groups
        ],
        "sizes": {name: one.extra_repr() for name, one in module.named_modules()},
    }
