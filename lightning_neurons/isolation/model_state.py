"""The state of a model: all that a run may change, to be compared with what it leaves, or to be put back."""

import copy
import gc
import itertools
import pickle
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_neurons.errors import MeasurementError
from lightning_neurons.isolation.contents import ITERATORS, Numbers
from lightning_neurons.isolation.paths import name_of, put_at
from lightning_neurons.isolation.reachable import Reach

_said: set[str] = set()


class ModelState:
    """The state of a model and of what its code can reach.

    Args:
        model: The model, or an optimizer, which has a state as well.
        others: Objects that its code can reach in other ways.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm1d(2)
        >>> state = ModelState(norm)
        >>> _ = norm(torch.randn(4, 2))
        >>> state.has_changed()
        True
        >>> state.put_back()
        >>> norm.running_mean
        tensor([0., 0.])
    """

    def __init__(self, model: nn.Module | torch.optim.Optimizer, *others: Any) -> None:
        self._model = model
        with torch.inference_mode(False), torch.no_grad(), without_collector():
            self._reach = Reach([model, *others])
        self._random = _random_of_others()
        self._lost: list[str] = []
        self._weights: list[str] = []

    def has_changed(self) -> bool:
        """Return whether anything has changed, the random states of Python and numpy included.

        Substitutes count as a change, so they have to be in place before the state is taken.
        """
        if self._random != _random_of_others() or any(self._reach.empty):
            return True
        with torch.no_grad():
            return any(content.has_changed() for content, _ in self._reach.contents)

    def substitute(self) -> None:
        """Replace objects that could not be put back by others for a while.

        Metrics get empty states (their own may be long), and tensors of inference mode become normal ones.
        """
        substitutes: dict[int, Any] = {}
        with torch.inference_mode(False), torch.no_grad():
            for value, path in self._reach.movable:
                if id(value) not in substitutes:
                    try:
                        substitutes[id(value)] = _substitute_of(value)
                    except Exception:  # noqa: BLE001 (whatever an iterator over something of the user's may raise)
                        substitutes[id(value)] = Refusing(f"{type(self._model).__name__}.{name_of(path)}")
                put_at(path, substitutes[id(value)])
            for metric in self._reach.metrics:
                for name, default in metric._defaults.items():
                    vars(metric)[name] = default.clone().to(metric.device) if isinstance(default, Tensor) else []
                vars(metric).update(_update_count=0, _computed=None, _forward_cache=None)

    def put_back(self) -> None:
        """Put everything back, as far as that is possible."""
        for thing in self._reach.empty:
            thing.clear()
        with torch.inference_mode(False), torch.no_grad():
            for content, path in self._reach.contents:
                if not content.put_back():
                    (self._weights if isinstance(content, Numbers) else self._lost).append(name_of(path))

    def complain(self) -> None:
        """Warn, once, of what could not be put back.

        Raises:
            MeasurementError: If weights were changed that are too many to keep a copy of.
        """
        who = type(self._model).__name__
        if self._weights:
            raise MeasurementError(
                f"{who}: running it once more has changed {self._weights[0]} in place, too large to be put back; "
                "do not move weights in the step that is measured, or pass loss_fn=lambda module, batch: ..."
            )
        for name in self._lost:
            _say(f"{who}.{name} cannot be put back after the measurement has run the model once more")
        if not self._reach.is_whole:
            _say(f"{who} holds too many objects to put all of them back after the measurement has run it once more")


class Refusing:
    """A substitute for an iterator that cannot be copied (a generator, that of a DataLoader), or for its method.

    Args:
        name: Path of the iterator, for the message.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __iter__(self) -> "Refusing":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, if the substitute stands for a bound method.

        Returns:
            Nothing: the refusal is an exception.
        """
        return self.__next__()

    def __next__(self) -> Any:
        """Refuse, so that the real iterator stays where it is.

        Raises:
            MeasurementError: Always.
        """
        raise MeasurementError(
            f"{self._name} is an iterator that can neither be copied nor put back, so what draws from it is not run "
            "once more"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__next__()


@contextmanager
def without_collector() -> Iterator[None]:
    """Switch garbage collection off: many small objects are made, and it would scan all of them again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _say(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)


def _substitute_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad) if value.is_leaf else value.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.14 will not copy those of itertools
        nested = isinstance(value, enumerate | zip | map | filter) or type(value).__module__ == itertools.__name__
        return copy.deepcopy(value) if nested else _copied(value)


def _copied(value: Any) -> Any:
    """Return a copy that runs on its own; refuse iterators of other types, whose copies share what they run over."""
    if not isinstance(value, ITERATORS):
        raise TypeError(f"{type(value).__name__} may share what it runs over with its copy")
    return copy.copy(value)


def _random_of_others() -> tuple[Any, bytes]:
    return random.getstate(), pickle.dumps(np.random.get_state())


def random_state() -> tuple[Tensor, list[Tensor]]:
    """Return the random state of torch, on the CPU and on every GPU in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    """Set the random state of torch."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
