"""Where each layer's neurons get their final value: follow the identity of tensors through one forward.

Static tracing fails on too many real models, and module hooks alone miss functional, shared and in-place activations.
A ``TorchFunctionMode`` sees every call. A chain runs from a layer through normalisation, activation function and
dropout as long as each value has exactly one reader: a residual sum, ``x * sigmoid(x)``, a concatenation or a branch
ends it. An in-place call makes a new value although the tensor stays the same object.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.network.families import LINKS, ORDER, PASSING, family_of, function_name
from lightning_neurons.network.flow import Flow
from lightning_neurons.network.hooked import After, Before, HookedMode
from lightning_neurons.network.layer import Layer, Link, public_name
from lightning_neurons.network.own_gradients import unhooked
from lightning_neurons.network.spread import spread_behind
from lightning_neurons.network.trees import in_transform, is_plain, tensors_in, weights_of
from lightning_neurons.network.writes import share_memory, target_of_write


@dataclass(eq=False)
class _Value:
    """What a layer made, or a link of its chain."""

    tensor: Tensor
    axis: int
    link: Link | None = None
    reads: int = 0
    next: "_Value | None" = None
    readers: dict[str, int] = field(default_factory=dict)
    foreign: bool = False  # read by something that is neither a link, nor a layer, nor on the way to one

    @property
    def stage(self) -> int:
        return ORDER.index(self.link.kind) if self.link else -1


class Trace(HookedMode):
    """Records, while it is active, how the values of ``layers`` are passed on.

    Values are kept (and copied before they are overwritten) until ``close``, so that the final ones can be handed out
    afterwards: the first batch is observed although the chains were not known when it ran.

    Args:
        model: Whose modules give the links their names.
        layers: The layers to follow, by public name.
        fast: See ``HookedMode``.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], fast: Iterable[nn.Module] = ()) -> None:
        super().__init__(fast)
        self._model, self._layers = model, layers
        self._now: dict[int, tuple[_Value, int]] = {}  # id of a tensor -> whose value it carries, inputs per neuron
        self._calls: dict[str, list[_Value]] = {}
        self._alive: list[Tensor] = []  # ids stay unique while the tensors live
        self._modules: list[str] = []  # the modules that are running, innermost last
        self._inside: list[str] = []  # the layers that are running
        self._flow = Flow()

    def _before_runs(self) -> Iterable[tuple[nn.Module, Before]]:
        return [(module, self._starts(path, layer)) for path, module, layer in self._watched()]

    def _after_runs(self) -> Iterable[tuple[nn.Module, After]]:
        return [(module, self._ends(path, layer)) for path, module, layer in self._watched()]

    def _watched(self) -> Iterator[tuple[str, nn.Module, str | None]]:
        """Every module with its path, and its name if it is a layer."""
        names = {id(module): name for name, module in self._layers.items()}
        for path, module in self._model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # nobody can look into it
                yield path, module, names.get(id(module))

    def _starts(self, path: str, layer: str | None) -> Before:
        def start(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._modules.append(path)
            if layer is None:
                return
            self._inside.append(layer)
            if in_transform():
                return
            self._flow.enters(layer, inputs)
            for tensor in map(unhooked, tensors_in(inputs)):
                if id(tensor) in self._now:
                    value, spread = self._now[id(tensor)]
                    value.readers[layer] = spread

        return start

    def _ends(self, path: str, layer: str | None) -> After:
        family = None if layer is None else family_of(self._layers[layer])
        weights = () if layer is None else weights_of(self._layers[layer])

        def end(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if path in self._modules:
                del self._modules[self._modules.index(path) :]
            if layer is None and not self._modules and module._modules:
                self._flow.arrives(output)
            if layer is not None:
                if layer in self._inside:
                    self._inside.remove(layer)
                if family is None or in_transform() or weights_of(module) != weights:
                    return  # with other weights (of ``functional_call``, for example) it is another network
                self._flow.leaves(layer, output, family.axis)
                if isinstance(output, Tensor) and is_plain(output):
                    value = _Value(output, family.axis)
                    self._calls.setdefault(layer, []).append(value)
                    self._carry(output, value)

        return end

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        read = {id(t): self._now[id(t)] for t in map(unhooked, tensors_in((args, kwargs))) if id(t) in self._now}
        if in_transform():  # what goes on in there is not followed, but that it reads a value
            for value, _ in read.values():
                value.reads, value.foreign = value.reads + 1, True
            return func(*args, **kwargs)
        target = target_of_write(func, args, kwargs)
        own = read.get(id(target)) if func in LINKS else None
        if own is None or own[0].reads:  # else the value that is overwritten lives on in the next link
            self._copy_before(target)
        out = func(*args, **kwargs)
        if not self._inside:
            self._flow.passes(func, args, kwargs, out, target)
        if func in (torch.Tensor.detach, torch.Tensor.view_as) or not any(True for _ in tensors_in(out)):
            return out  # .shape and the like read nothing, nor does a backward hook that wraps a tensor (view_as)
        if target is None and func not in LINKS and args and out is args[0]:
            return out  # .contiguous(), .to(...) and the like that had nothing to do
        for value, _ in read.values():
            value.reads += 1
        self._pass_on(func, args, kwargs, out, read)
        return out

    def _pass_on(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        read: dict[int, tuple[_Value, int]],
    ) -> None:
        source = unhooked(args[0] if args else kwargs.get("input"))
        value, spread = read.get(id(source), (None, 0))
        if isinstance(out, Tensor):
            self._now.pop(id(out), None)
        kind = LINKS.get(func)
        if value is not None and isinstance(out, Tensor) and len(read) == 1:
            carried = spread_behind(func, args, kwargs, out, value.axis, spread) if func in PASSING else 0
            if kind is not None and ORDER.index(kind) > value.stage and value.tensor is source and is_plain(out):
                module = public_name(self._modules[-1]) if self._called_by_module() else None
                value.next = _Value(out, value.axis, Link(kind, function_name(func, args, kwargs), module))
                self._carry(out, value.next)
                return
            if carried:
                self._carry(out, value, carried)
                return
        for value, _ in read.values():
            value.foreign |= not self._inside

    def _called_by_module(self) -> bool:
        """A module without children that is no layer called the function; else the forward of a bigger one did."""
        if not self._modules or not self._modules[-1]:
            return False
        module = self._model.get_submodule(self._modules[-1])
        return family_of(module) is None and not any(True for _ in module.children())

    def _goes_on(self, seen: Tensor, output: Tensor) -> None:
        self._flow.goes_on_as(seen, output)
        if id(seen) in self._now:
            value, spread = self._now[id(seen)]
            if value.tensor is seen:
                value.tensor = output
            self._carry(output, value, spread)

    def _carry(self, tensor: Tensor, value: _Value, spread: int = 1) -> None:
        self._now[id(tensor)] = (value, spread)
        self._alive.append(tensor)

    def _copy_before(self, target: Tensor | None) -> None:
        if target is None:
            return
        for value in self._values():
            if share_memory(value.tensor, target):
                value.tensor = value.tensor.clone()

    def _values(self) -> Iterator[_Value]:
        for calls in self._calls.values():
            for value in calls:
                step: _Value | None = value
                while step is not None:
                    yield step
                    step = step.next

    def found(self) -> dict[str, Layer]:
        """What has been learnt, by layer; layers that did not run have no calls and a note that says so."""
        outputs = self._flow.outputs()
        return {
            name: replace(self._layer(name, module), output=name in outputs, twins=self._flow.twins(name))
            for name, module in self._layers.items()
        }

    def _layer(self, name: str, module: nn.Module) -> Layer:
        family = family_of(module)
        assert family is not None, "candidates have families"
        ends = [_final(value) for value in self._calls.get(name, [])]
        whole = bool(ends) and all(last.readers and not last.foreign and last.next is None for _, last in ends)
        readers = tuple({r: s for _, last in ends for r, s in last.readers.items()}.items())
        return Layer(
            name=name,
            type=type(module).__name__,
            neurons=family.neurons(module),
            axis=family.axis,
            chains=tuple(chain for chain, _ in ends),
            readers=readers if whole else None,
            note="" if ends else "did not run as a module (unused, or its weights are used by a function)",
        )

    def in_order(self) -> list[str]:
        """The layers that ran, in the order in which they ran first."""
        return list(self._calls)

    def activations(self) -> Iterator[tuple[str, Tensor]]:
        """The final value of every call of every layer."""
        for name, calls in self._calls.items():
            for value in calls:
                yield name, _final(value)[1].tensor

    def close(self) -> None:
        """Let go of the tensors."""
        self._now.clear()
        self._calls.clear()
        self._alive.clear()


def _final(value: _Value) -> tuple[tuple[Link, ...], _Value]:
    chain = []
    while value.next is not None and value.reads == 1:
        value = value.next
        assert value.link is not None, "only the layer itself has no link"
        chain.append(value.link)
    return tuple(chain), value
