"""Forwards of many batches that run through a model together and stop before each downstream layer.

When all have arrived at a layer, its inputs are known for all batches; its weights can be changed, and the walk goes
on with the new ones. So a whole model is corrected layer by layer in the time of one forward. A forward is Python code
that cannot be left and entered again, except in a thread of its own; only one of them runs at any time.
"""

import contextvars
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.isolation.isolation import eager
from lightning_neurons.layers.layer import modules_by_name
from lightning_neurons.pruning.compensation.unfold import batched
from lightning_neurons.pruning.structure.example import twin_of


class _Enough(BaseException):
    """A signal that ends a walk; no ``except Exception`` of a model stops it."""


class Walk:
    """One forward that stops before some modules.

    Args:
        run: The forward.
        device: Device of the model.
    """

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        self.at: str | None = None
        self.inputs: Tensor | None = None
        self._run, self._device = run, device
        kind = device.type
        self._context = contextvars.copy_context()
        self._autocast: dict[str, Any] = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
            "cache_enabled": False,  # it would remember weights that are corrected meanwhile
        }
        self._error: BaseException | None = None
        self._over = self._ending = False
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Run to the next stop, or to the end; then ``at`` is None.

        Raises:
            Exception: The error that the forward has raised.
        """
        self.at = self.inputs = None
        if self._over:
            return
        self._turn.release()
        self._back.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def end(self) -> None:
        """End the forward before it is complete."""
        self._ending = True
        if not self._over:
            self._turn.release()
        self._thread.join()

    def stop(self, path: str, inputs: Tensor) -> None:
        """Wait before a module runs; called in the walk's own thread."""
        if self._ending:  # a model's own clean-up may run more of it
            raise _Enough
        self.at, self.inputs = path, inputs
        self._back.release()
        self._turn.acquire()
        if self._ending:
            raise _Enough

    def is_here(self) -> bool:
        """Return whether the current thread is that of this walk."""
        return threading.current_thread() is self._thread

    def _work(self) -> None:
        self._turn.acquire()
        try:
            if not self._ending:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)
                with torch.no_grad(), torch.autocast(**self._autocast):
                    self._context.run(self._run)
        except _Enough:
            pass
        except BaseException as error:  # noqa: BLE001 (raised again in the thread that waits)
            self._error = error
        finally:
            self._over = True
            self._back.release()


class Lockstep:
    """Forwards of a model on some batches, each of which stops before the same modules.

    Args:
        model: The model; in the mode in which it is to be run.
        stops: Paths of convolutions and linear layers.
        run: Runs the model on one of the batches.
        batches: The batches.
    """

    def __init__(
        self, model: nn.Module, stops: Sequence[str], run: Callable[[nn.Module, Any], Any], batches: Iterable[Any]
    ) -> None:
        self.model, self.run, self.batches, self.stops = model, run, list(batches), stops
        self.walks: list[Walk] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> "Lockstep":
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        modules = modules_by_name(self.model)
        for path in self.stops:
            stop = Stop(self, path)
            self._hooks.append(modules[path].register_forward_pre_hook(stop, with_kwargs=True, prepend=True))
        try:
            for batch in self.batches:
                self.walks.append(Walk(partial(self.run, self._own_copy(), batch), device))
        except BaseException:
            self.__exit__()
            raise
        return self

    def _own_copy(self) -> nn.Module:
        """Return a copy for one forward: the same tensors, but what a forward keeps on a module is its own."""
        return twin_of(self.model, shared=True)

    def __exit__(self, *_: Any) -> None:
        for walk in self.walks:
            walk.end()
        for hook in self._hooks:
            hook.remove()

    def walk_to(self, path: str, passed: set[str], index: int) -> Tensor | None:
        """Run one of the forwards until it stands before a module, and return what that is going to read.

        Args:
            path: The module.
            passed: Modules at which it need not stop any more.
            index: Index of the forward.

        Returns:
            The inputs, or None if the forward ended or waits at a module whose turn comes later.
        """
        walk = self.walks[index]
        if walk.at is None or walk.at in passed:
            walk.go_on()
            while walk.at is not None and walk.at in passed:
                walk.go_on()
        return walk.inputs if walk.at == path else None


class Stop:
    """The hook of a lockstep; copies of the module share it."""

    def __init__(self, lockstep: Lockstep, path: str) -> None:
        self.lockstep, self.path = lockstep, path

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stop":
        return self

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Stop the forward that runs the module, if it is one of the lockstep's."""
        walk = next((walk for walk in self.lockstep.walks if walk.is_here()), None)
        if walk is not None:
            walk.stop(self.path, batched(module, args, kwargs))


def calls_of(model: nn.Module, paths: Iterable[str], run: Callable[[nn.Module], Any]) -> dict[str, int]:
    """Count how often each of some modules runs in a forward, in the order in which they come first.

    Args:
        model: The model.
        paths: The modules.
        run: Runs the model.

    Returns:
        By path, the number of calls; without modules that did not run.
    """
    calls: dict[str, int] = {}

    def counter(path: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            calls[path] = calls.get(path, 0) + 1

        return count

    modules = modules_by_name(model)
    hooks = [modules[path].register_forward_pre_hook(counter(path)) for path in paths]
    try:
        with torch.no_grad(), eager():
            run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
