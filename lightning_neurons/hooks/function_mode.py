"""A mode that sees calls of torch functions, and runs of modules, as long as it is active.

Nothing is attached to a module, but to one that has hooks already: torch's hooks for all modules look for those that
are meant. So a copy that is made meanwhile is another module, and what pickles or compiles a module finds it as it is.
Where it is a user's own run that is watched, the mode steps aside around modules with a fast path
(``isolation/fast_paths.py``): they run unwatched, and once more to be watched.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_neurons.isolation.fast_paths import NOTHING, may_be_fast, only_forward_hooks
from lightning_neurons.isolation.isolation import isolated
from lightning_neurons.isolation.model_state import random_state, set_random_state
from lightning_neurons.isolation.tensors import in_transform, tensors_in, unheard

Before = Callable[[nn.Module, Any], None]
"""A function that is called with a module and its inputs before the module runs."""

After = Callable[[nn.Module, Any, Any], Any]
"""A function of a module, its inputs and its output (None if it failed), that returns another output or None."""


class HookedMode(TorchFunctionMode):
    """A mode that hooks modules when it is entered and unhooks them when it is left, or cannot be entered.

    Args:
        fast: The modules with a fast path if the run is the user's; none if it is our own, where they may be slow.
        of_others: Whether the run is the user's, which has to go on if watching it fails.

    Attributes:
        failure: The exception that ended the watching, or None.
    """

    def __init__(self, fast: Iterable[nn.Module] = (), *, of_others: bool = False) -> None:
        super().__init__()
        self._of_others = of_others
        self.failure: Exception | None = None
        self._fast = {id(module): module for module in fast}
        self._handles: list[RemovableHandle] = []
        self._told_before: dict[
            int, tuple[nn.Module, Before]
        ] = {}  # modules are kept alive, so that ids stay their own
        self._told_after: dict[int, tuple[nn.Module, After]] = {}
        self._aside: nn.Module | None = None  # the module around which the mode is not active now
        self._random: Any = None  # the random state before that module
        self._is_second = False  # whether that module is running once more

    def _before_runs(self) -> Iterable[tuple[nn.Module, Before]]:
        """Return the modules, each once, and the function to call before each runs."""
        return ()

    def _after_runs(self) -> Iterable[tuple[nn.Module, After]]:
        """Return the modules, each once, and the function to call after each has run."""
        return ()

    def _looks_into(self, module: nn.Module) -> bool:
        """Return whether a module with a fast path has to be run again, slowly, to be watched."""
        return True

    def _goes_on(self, seen: Tensor, output: Tensor) -> None:
        """Record that the model goes on with ``output``, which the second, watched run computed as ``seen``."""

    def __enter__(self) -> Self:
        try:
            self._hook()
        except BaseException:
            self._unhook()
            raise
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        if self._aside is None:
            super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._aside = self._random = None
        self._unhook()

    def _hook(self) -> None:
        # Hooks for all modules run first, and a module's own may change what it is given and gives: ours stand behind.
        for module, before in self._before_runs():
            if module._forward_pre_hooks:
                self._handles.append(module.register_forward_pre_hook(_Hook(module, partial(self._tell, before))))
            else:
                self._told_before[id(module)] = module, before
        for module, after in self._after_runs():
            if module._forward_hooks:
                hook = _Hook(module, partial(self._tell, after))
                self._handles.append(module.register_forward_hook(hook, always_call=True))
            else:
                self._told_after[id(module)] = module, after
        if self._told_before or self._fast:
            self._handles.append(every_module.register_module_forward_pre_hook(self._module_starts))
        if self._told_after or self._fast:
            hear = every_module.register_module_forward_hook(self._module_ends, with_kwargs=True, always_call=True)
            self._handles.append(hear)

    def _module_starts(self, module: nn.Module, inputs: Any) -> None:
        if (meant := self._told_before.get(id(module))) is not None:
            self._tell(meant[1], module, inputs)
        if id(module) in self._fast:
            self._safely(self._step_aside, module)

    def _module_ends(self, module: nn.Module, inputs: Any, *ended: Any) -> Any:
        if module is self._aside:
            self._safely(self._come_back, inputs, *ended)
        meant = self._told_after.get(id(module))
        return None if meant is None else self._tell(meant[1], module, inputs, ended[-1])

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
            every_module._global_forward_hooks_with_kwargs.pop(handle.id, None)  # which torch forgets
        self._handles.clear()
        self._told_before.clear()
        self._told_after.clear()

    def _tell(self, function: Callable[..., Any], module: nn.Module, *arguments: Any) -> Any:
        if self._aside not in (None, module):
            return None
        with torch._C.DisableTorchFunction():  # no mode counts the calls made in here
            return self._safely(function, module, *arguments)

    def _safely(self, look: Callable[..., Any], *arguments: Any) -> Any:
        """Call ``look``, unless watching has failed before; in a user's run, keep its exception.

        Returns:
            What ``look`` returns; None if it failed, now or before, in a user's run.
        """
        if not self._of_others:
            return look(*arguments)
        try:
            return look(*arguments) if self.failure is None else None
        except Exception as error:  # noqa: BLE001 (an observer must not stop what it observes)
            self.failure = error
            return None

    def _looked_at(
        self, look: Callable[..., Any], func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what ``look`` makes of a call; it gets the function, and an object that makes the call once."""
        call = _Call(func, args, kwargs)
        if not self._of_others:
            return look(func, call, args, kwargs)
        try:
            return look(func, call, args, kwargs)
        except Exception as error:
            if call.is_running:
                raise  # the call itself
            self.failure = error
            return call.out if call.is_done else func(*args, **kwargs)

    def _step_aside(self, module: nn.Module) -> None:
        """Leave the mode while a module takes its fast path, unless a mode of the user's makes it slow anyway."""
        if self._aside is not None or self._is_second:
            return
        if torch._C._len_torch_function_stack() == 1 and may_be_fast(module):
            self._aside, self._random = module, random_state()
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _come_back(self, inputs: Any, *ended: Any) -> None:
        """Enter the mode again; ``ended`` is the keyword arguments and the output, None alone if the module failed."""
        module, random = self._aside, self._random
        assert module is not None, "who steps aside knows where"
        self._aside = self._random = None
        super().__enter__()  # type: ignore[no-untyped-call]
        if len(ended) == 1 or in_transform() or not self._looks_into(module):
            return
        kwargs, output = ended
        if any(tensor.is_nested for tensor in tensors_in((inputs, kwargs))):
            return  # only the fast path can do that
        self._is_second = True
        try:
            with torch.no_grad(), unheard(), isolated(module), only_forward_hooks(module, _Hook):
                set_random_state(random)
                seen = module.forward(*inputs, **kwargs)
            for inner, other in zip(tensors_in(seen), tensors_in(output), strict=False):
                self._goes_on(inner, other)
        except Exception as error:  # noqa: BLE001 (the run that is watched has to go on)
            self.failure = error
        finally:
            self._is_second = False


class _Call:
    """A function call that is made once and keeps its result."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._func, self._args, self._kwargs = func, args, kwargs
        self.is_running = self.is_done = False
        self.out: Any = None

    def __call__(self) -> Any:
        self.is_running = True
        self.out = self._func(*self._args, **self._kwargs)
        self.is_running, self.is_done = False, True
        return self.out


class _Hook:
    """A hook on one module; in a copy of the module, and in a file, it does nothing."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self._module, self._function = module, function

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        return self._function(module, *arguments) if module is self._module else None

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, NOTHING
