"""Networks that follow others (EMA or target copies): their weights change, although no optimizer trains them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.callbacks.trainer.namespaces import Trainer
from lightning_neurons.isolation.user_code import is_framework, names_in
from lightning_neurons.layers.layer import candidates, lazy_path, public_name
from lightning_neurons.pruning.surgery.optimizers import with_held

_WRITES = {"load_state_dict", "copy_", "lerp_", "mul_", "add_", "data", "update_parameters", "_foreach_lerp_", "set_"}
_APART = {
    "__init__", "setup", "configure_model", "configure_optimizers", "on_fit_start", "on_sanity_check_start",
    "on_train_start", "on_load_checkpoint",
}  # fmt: skip
"""Hooks that run once, before training: a copy that is made there follows nothing."""


@dataclass(frozen=True)
class Found:
    """The networks of the same architecture that follow others, or may follow.

    Attributes:
        followers: By the path of a follower, the path of the network that it follows.
        unclear: By the path of a network that may be followed, the reason why that is not known yet.
        untrained: Before the first step, networks that no optimizer holds, although it holds one like them: they may
            turn out to follow.
    """

    followers: Mapping[str, str]
    unclear: Mapping[str, str]
    untrained: frozenset[str]


class Following:
    """A detector of followers: compares the parameters of networks of the same architecture with earlier ones.

    Attributes:
        known: By the path of a follower, the path of the network that it follows.
        marks: By the path of a network, sums over its parameters before training.
    """

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.marks: dict[str, Tensor] = {}

    def begin(self, pl_module: nn.Module) -> None:
        """Store sums over the parameters before training; a resumed run has them from its checkpoint.

        Of a module with lazy layers that is known only when a batch, as of the sanity check, has finished them.
        """
        if self.marks or lazy_path(pl_module) is not None:
            return
        with torch.no_grad():
            alike = {path for paths in _alike(pl_module) for path in paths}
            self.marks = {path: _mark(pl_module.get_submodule(path)) for path in alike}

    def look(self, trainer: Trainer, pl_module: nn.Module, moving: Collection[str] = ()) -> Found:
        """Compare the parameters with those before training; before the first step, none can have changed.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
            moving: Parameters that are known to be changed by something else than an optimizer.

        Returns:
            The followers known by now, and the networks of which it is not known yet.
        """
        optimizers = with_held(trainer.optimizers)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        held = {id(p) for group in groups for p in group["params"] if p.requires_grad}
        stepped = {id(p) for optimizer in optimizers for p, state in optimizer.state.items() if state}
        unclear: dict[str, str] = {}
        untrained: set[str] = set()
        seen = [*self.known]
        for paths in _alike(pl_module):
            modules = {path: pl_module.get_submodule(path) for path in paths}
            # An optimizer may hold what gets no gradient; if it keeps a state, that shows which it has stepped.
            leaders = {path: m for path, m in modules.items() if _has_any(m, held & stepped)} or {
                path: m for path, m in modules.items() if _has_any(m, held)
            }
            for path, module in modules.items():
                if path in leaders or path not in self.marks or not leaders or _is_within(path, seen):
                    continue
                untrained.add(public_name(path))
                leader = min(leaders, key=lambda one: _distance(leaders[one], module))
                if not torch.equal(_mark(module), self.marks[path]) or any(_is_within(n, [path]) for n in moving):
                    self.known[public_name(path)] = public_name(leader)
                    seen.append(public_name(path))
                elif torch.equal(self.marks[path], self.marks[leader]) and _may_write(pl_module, path):
                    seen.append(public_name(path))
                    unclear[public_name(leader)] = (
                        f"{path} is a copy of {leader} that has not moved yet, so it is not known whether it follows"
                    )
        if not trainer.global_step:
            return Found(dict(self.known), {}, frozenset(untrained))
        return Found(dict(self.known), unclear, frozenset())


def _is_within(path: str, networks: Sequence[str]) -> bool:
    return any(f"{public_name(path)}.".startswith(f"{network}.") for network in networks)


def _alike(model: nn.Module) -> Iterator[list[str]]:
    """Yield the paths of networks of the same architecture, outer modules before inner ones."""
    found: dict[Any, list[str]] = {}
    for path, module in model.named_modules():
        if path and candidates(module):
            shapes = tuple((name, tensor.shape) for name, tensor in module.named_parameters())
            found.setdefault((type(module), shapes), []).append(path)
    yield from (paths for paths in found.values() if len(paths) > 1)


def _mark(module: nn.Module) -> Tensor:
    """Return sums over each parameter and its squares, which nearly any step changes."""
    values = [p.detach().double() for p in module.parameters()]
    return torch.stack([sum_ for v in values for sum_ in (v.sum(), v.square().sum())])


def _distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    with torch.no_grad():
        return float(sum(float((p.double() - q.double()).square().sum()) for p, q in pairs))


def _has_any(module: nn.Module, parameters: set[int]) -> bool:
    return any(id(p) in parameters for p in module.parameters())


def _may_write(pl_module: nn.Module, path: str) -> bool:
    """Return True if a function of the module's own uses both this network and a method that writes into parameters."""
    own = {name for base in type(pl_module).__mro__ if not is_framework(base.__module__) for name in vars(base)}
    functions = [getattr(type(pl_module), name, None) for name in own - _APART]
    codes = [function.__code__ for function in functions if isinstance(function, FunctionType)]
    first = path.partition(".")[0]
    return any(first in attributes and attributes & _WRITES for _, attributes in map(names_in, codes))
