"""Deliver activations, and their gradients, while a model runs; a context that leaves no hook behind.

The chains are known (``trace.py``), so the last link is recognised as it happens: nothing is stored that is not needed,
and a statistic is taken before anybody can overwrite the value.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.hooks.chain_functions import FORMS, LOOKS, MAY_COPY, STEPS, is_copied, operands
from lightning_neurons.hooks.function_mode import After, HookedMode
from lightning_neurons.hooks.own_gradients import BACKWARDS, Hook, gated, needs_parameters, retaining, unhooked
from lightning_neurons.isolation.exchanged_weights import MovingWeights
from lightning_neurons.isolation.tensors import Weights, has_weights, is_plain, unheard, weights_of
from lightning_neurons.isolation.writes import share_memory, target_of_write
from lightning_neurons.layers.layer import Layer, Link

Deliver = Callable[[str, Tensor], None]
DeliverGradient = Callable[[str, Tensor, Tensor, Tensor | None], None]
"""A function of layer, activation, gradient, and a derivative by a factor (see ``WatchGradients``) or None."""


@dataclass(eq=False, slots=True)
class _Way:
    """The links of a layer's call that its output has not passed yet."""

    name: str
    links: tuple[Link, ...]
    alive: list[Tensor]  # so that their ids stay their own
    done: int = 0  # steps of the first link

    @property
    def next(self) -> tuple[str, tuple[int, ...]]:
        return self.links[0].steps[self.done]


class FollowLayers(HookedMode):
    """A mode that follows each layer's output through its chain and hands the last value to ``_arrive``."""

    def __init__(
        self,
        layers: Mapping[str, Layer],
        modules: Mapping[str, nn.Module],
        fast: Iterable[nn.Module] = (),
        *,
        of_others: bool = False,
    ) -> None:
        super().__init__(fast, of_others=of_others)
        self._layers, self._modules = layers, modules
        self._waiting: dict[int, tuple[_Way, int]] = {}  # id of a tensor -> which value it is on which way
        links = [link for name in modules for chain in layers[name].chains for link in chain]
        self._functions = frozenset(MAY_COPY).union(*(FORMS[name] for link in links for name, _ in link.steps))
        self._calls: dict[str, int] = {}
        self.unknown: set[str] = set()
        """Layers that did not run as they were traced: their activation points have to be found again."""

    def _after_runs(self) -> Iterable[tuple[nn.Module, After]]:
        self._calls.clear()
        return [(module, self._layer_hook(name, weights_of(module))) for name, module in self._modules.items()]

    def _looks_into(self, module: nn.Module) -> bool:
        running = {id(self._modules[name]) for name in self._modules if self._layers[name].chains}
        return not running.isdisjoint(map(id, module.modules()))

    def _goes_on(self, seen: Tensor, output: Tensor) -> None:
        if (entry := self._waiting.pop(id(seen), None)) is not None:
            self._wait(output, *entry)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self.unknown |= {way.name for way, _ in self._waiting.values()}
        self._waiting.clear()

    def _counts(self, value: Tensor) -> bool:
        """Return whether a tensor holds numbers of this network that can be read."""
        return is_plain(value)

    def _layer_hook(self, name: str, weights: Weights) -> After:
        chains = self._layers[name].chains

        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not self._counts(output) or not has_weights(module, weights):
                return None  # with other weights (of ``functional_call``, for example) it is another network
            if not chains:
                self.unknown.add(name)
                return None
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            return self._follow(name, chains[min(call, len(chains) - 1)], output)

        return hook

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # This runs for every call and every attribute of a tensor: the common case has to be short.
        if not self._waiting or func not in self._functions or self.failure is not None:
            return func(*args, **kwargs)
        return self._looked_at(self._see, func, args, kwargs)

    def _see(
        self, func: Callable[..., Any], call: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Follow a call that may read a followed tensor: as its next step, as a copy, or otherwise, which ends it.

        Returns:
            The result of the call, changed if the layer's activation is changed here.
        """
        inputs = operands(func, args, kwargs)
        waiting = [self._waiting.get(id(unhooked(tensor))) for tensor in inputs]
        read = [entry for entry in waiting if entry is not None]
        if not read:
            return call()
        way = read[0][0]
        out = call()
        if way.next == (STEPS[func], tuple(number for _, number in read)) and all(w is way for w, _ in read):
            return self._went(way, args[0] if out is None else out, has_result=out is not None)
        if is_copied(func, inputs, out):
            self._wait(out, *read[0])
            return out
        if func in LOOKS:
            return out
        for way, _ in read:
            self.unknown.add(way.name)
            self._leave(way)
        return out

    def _went(self, way: _Way, value: Tensor, *, has_result: bool) -> Any:
        way.done += 1
        if way.done < len(way.links[0].steps):
            self._wait(value, way, way.done)
            return value if has_result else None
        self._leave(way)
        links = way.links[1:]
        if has_result:
            return self._follow(way.name, links, value)
        # An assignment returns nothing that could be exchanged: what the model is to go on with is written over it.
        last = value.clone() if value.requires_grad and not links else value
        following = self._follow(way.name, links, last)
        if following is not value:
            value.copy_(following)
        return None

    def _leave(self, way: _Way) -> None:
        for tensor in way.alive:
            self._waiting.pop(id(tensor), None)

    def _follow(self, name: str, links: tuple[Link, ...], value: Tensor) -> Tensor:
        if not links:
            return self._arrive(name, value) if self._counts(value) else value
        self._wait(value, _Way(name, links, []), 0)
        return value

    def _wait(self, value: Tensor, way: _Way, number: int) -> None:
        way.alive.append(value)
        self._waiting[id(value)] = way, number

    def _arrive(self, name: str, value: Tensor) -> Tensor:
        """Take the value at the activation point and return the one with which the model goes on."""
        raise NotImplementedError


class WatchActivations(FollowLayers):
    """A mode that hands ``(layer, activation)`` to ``deliver`` at each activation point.

    Args:
        layers: The layers as ``trace.py`` found them, by name.
        modules: The module of each layer that is watched.
        deliver: Called in the middle of the model's forward; must not change the value.
        fast: See ``HookedMode``.
        of_others: See ``HookedMode``.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        modules: Mapping[str, nn.Module],
        deliver: Deliver,
        fast: Iterable[nn.Module] = (),
        *,
        of_others: bool = False,
    ) -> None:
        super().__init__(layers, modules, fast, of_others=of_others)
        self._deliver = deliver

    def _arrive(self, name: str, value: Tensor) -> Tensor:
        with unheard():
            self._deliver(name, value.detach())
        return value


class StepDifferentiates(BaseException):
    """The signal of a forward that takes gradients of its own, for which parameters or hooks had been left out."""


def _told_if_alive(watch: "weakref.ref[WatchGradients]", number: int, gradient: Tensor) -> Tensor | None:
    # A graph that the user's code keeps alive must not keep what was measured alive as well.
    listener = watch()
    return None if listener is None else listener.passed(number, gradient)


class WatchGradients(FollowLayers):
    """A mode that makes the forward differentiable with respect to the activations.

    Freeze the parameters first: a backward then costs a forward instead of two, and stores nothing for them.
    ``backward`` hands ``(layer, activation, gradient, None)`` to ``deliver``, the last layer first, and lets go of each
    activation as soon as its gradient has been delivered: the whole derivative of the loss, also through gradients that
    the forward took itself with ``create_graph=True``. There, a factor on an activation acts on its way back as well;
    what that adds to the derivative by such factors comes as the fourth value. An activation is copied only if a call
    is about to overwrite it.

    Backwards of the forward's own deliver nothing and leave the graph as it is; backward hooks of modules hear of
    those alone.

    Args:
        layers: The layers as ``trace.py`` found them, by name.
        modules: The module of each layer that is watched.
        deliver: Called with each activation and its gradient.
        deliver_activation: If given, called with every activation during the forward already.
        is_plain: Whether the forward is expected to take no gradients but those by tensors of its own: parameters are
            frozen and backward hooks left out. Else it runs as its author wrote it.
        told: Number of activations that ``deliver_activation`` got already, from a forward that was broken off.
        weights: Is shown each call before it runs, as it may overwrite the model's weights.

    Raises:
        StepDifferentiates: In the middle of the forward, if ``is_plain`` turns out to be wrong.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        modules: Mapping[str, nn.Module],
        deliver: DeliverGradient,
        deliver_activation: Deliver | None = None,
        *,
        is_plain: bool = True,
        told: int = 0,
        weights: MovingWeights | None = None,
    ) -> None:
        super().__init__(layers, modules)
        self._weights = weights
        self._deliver, self._deliver_activation, self._is_plain = deliver, deliver_activation, is_plain
        self._held: dict[int, tuple[str, Tensor]] = {}
        self._late: dict[int, Tensor] = {}
        self._factors: dict[int, Tensor] = {}
        self._root = torch.zeros((), requires_grad=True)
        self._is_ours, self._delivered, self._arrived, self._told = False, False, 0, told
        self._leaves_hooks_out = False

    @property
    def told(self) -> int:
        """The number of activations that ``deliver_activation`` has received."""
        return max(self._arrived, self._told)

    def choose_hooks(self, hooks: list[Hook]) -> list[Hook]:
        """Return the backward hooks that modules are to run in place of their own."""
        if self._is_plain:
            self._leaves_hooks_out |= bool(hooks)
            return []
        return [partial(self._unless_ours, hook) for hook in hooks]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._weights is not None:
            self._weights.before(func, args, kwargs or {})
        if func in BACKWARDS:
            return self._backward_of_its_own(func, args, kwargs or {})
        target = target_of_write(func, args, kwargs or {}) if self._held else None
        if target is not None:
            for key, (name, activation) in self._held.items():
                if share_memory(activation, target):
                    self._held[key] = name, activation.clone()
        return super().__torch_function__(func, types, args, kwargs)

    def _backward_of_its_own(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_plain and (self._leaves_hooks_out or needs_parameters(func, args, kwargs)):
            raise StepDifferentiates
        return retaining(func, args, kwargs)

    def _unless_ours(self, hook: Hook, *args: Any) -> Any:
        return None if self._is_ours else hook(*args)

    def _arrive(self, name: str, value: Tensor) -> Tensor:
        self._arrived += 1
        if self._deliver_activation is not None and self._arrived > self._told:
            self._deliver_activation(name, value.detach())
        if not torch.is_grad_enabled() or not value.is_floating_point():
            return value  # the model itself switched gradients off here
        number = self._arrived
        self._held[number] = name, value.detach()
        return gated(value, self._root, partial(_told_if_alive, weakref.ref(self), number))

    def passed(self, number: int, gradient: Tensor) -> Tensor | None:
        """Take a gradient that has reached an activation.

        Returns:
            A factor of ones to go on with, if the gradient may be differentiated again, else None.
        """
        if self._is_ours and number in self._factors:
            self._late[number] = gradient  # delivered when its factor's gradient is known
        elif self._is_ours:
            self._delivered = True
            name, activation = self._held.pop(number)
            self._deliver(name, activation, gradient, None)
        elif torch.is_grad_enabled():  # the gradient may become part of the loss
            if number not in self._factors:
                self._factors[number] = torch.ones_like(self._held[number][1]).requires_grad_()
            return self._factors[number]
        return None

    def backward(self, loss: Tensor) -> bool:
        """Run the backward of ``loss``, a scalar summed over the batch; no ``.grad`` is touched.

        Returns:
            True if the loss depends on any activation.
        """
        self._is_ours = True
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Full backward hook is firing")  # no hook of the user's does
                gradients = torch.autograd.grad(loss, [self._root, *self._factors.values()], allow_unused=True)
            for number, by_factor in zip(self._factors, gradients[1:], strict=True):
                gradient, (name, activation) = self._late.get(number), self._held.pop(number)
                if gradient is not None or by_factor is not None:
                    self._delivered = True
                    gradient = torch.zeros_like(activation) if gradient is None else gradient
                    self._deliver(name, activation, gradient, by_factor)
        finally:
            self._is_ours = False
            for kept in (self._held, self._late, self._factors):
                kept.clear()
        return self._delivered
