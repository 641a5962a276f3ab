"""Activation points of all layers, found by following the identity of tensors through one forward.

Static tracing fails on too many real models, and module hooks alone miss functional, shared and in-place activations.
A ``TorchFunctionMode`` sees every call. A chain runs from a layer through one normalisation and whatever elementwise
functions follow, as long as all operands come from the layer's one value or from constants: parameters, buffers and
numbers. A branch that does not reunite, a residual sum or a concatenation ends it. An in-place call makes a new value
although the tensor stays the same object. The values computed from one output are kept in ``value_graph.py``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.hooks.chain_functions import CREATES, DETACHES, LOOKS, STEPS, Step, is_copied, operands
from lightning_neurons.hooks.function_mode import After, Before, HookedMode
from lightning_neurons.hooks.layer_flow import Flow, spread_behind
from lightning_neurons.hooks.neuron_positions import place_behind
from lightning_neurons.hooks.own_gradients import functions_running, unhooked
from lightning_neurons.hooks.unfollowed import Constants, Pieces
from lightning_neurons.hooks.unseen_code import ANYWHERE, HIDDEN, LEAVES, SCRIPT, TRANSFORM, UNUSED, script_functions
from lightning_neurons.hooks.value_graph import Value, ValueGraph, common_axis
from lightning_neurons.isolation.tensors import has_weights, in_transform, is_plain, tensors_in, unwrapped, weights_of
from lightning_neurons.isolation.writes import target_of_write
from lightning_neurons.layers.layer import Layer, calling_module
from lightning_neurons.layers.registry import LINKS, PASSING, family_of, neuron_axis

_Reads = list[tuple[ValueGraph, int] | None]


class Trace(HookedMode):
    """A mode that records how the values of ``layers`` are passed on.

    Values are kept (and copied before they are overwritten) until ``close``, so that the final ones can be handed out
    afterwards: the first batch is observed although the chains were not known when it ran.

    Args:
        model: The model that runs, whose modules give the links their names.
        layers: The layers to follow, by public name.
        fast: See ``HookedMode``.
        of_others: See ``HookedMode``.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        fast: Iterable[nn.Module] = (),
        *,
        of_others: bool = False,
    ) -> None:
        super().__init__(fast, of_others=of_others)
        self._model, self._layers = model, layers
        self._now: dict[int, tuple[ValueGraph, int]] = {}  # id of a tensor -> which value of which call it is
        self._carried: dict[int, tuple[Value, int]] = {}  # id of a tensor -> whose value it carries, inputs per neuron
        self._calls: dict[str, list[ValueGraph]] = {}
        self._constants = Constants()
        self._alive: list[Tensor] = []  # ids stay unique while the tensors live
        self._modules: list[str] = []  # the modules that are running, innermost last
        self._inside: list[str] = []  # the layers that are running
        self._flow, self._pieces = Flow(), Pieces()
        self._scripts = ExitStack()

    def _before_runs(self) -> Iterable[tuple[nn.Module, Before]]:
        self._constants.add_model(self._model)
        scripts = [m for m in self._model.modules() if isinstance(m, torch.jit.ScriptModule) and not weights_of(m)]
        hooks = [(module, self._starts(path, layer)) for path, module, layer in self._watched()]
        return hooks + [(module, lambda _, inputs: self._read_unseen(inputs, SCRIPT)) for module in scripts]

    def _after_runs(self) -> Iterable[tuple[nn.Module, After]]:
        return [(module, self._ends(path, layer)) for path, module, layer in self._watched()]

    def _hook(self) -> None:
        super()._hook()
        self._scripts.enter_context(script_functions(self._script_ran))

    def _unhook(self) -> None:
        self._scripts.close()
        super()._unhook()

    def _script_ran(self, args: Any, kwargs: Any, out: Any) -> None:
        if self._aside is None and not self._inside:
            self._read_unseen((args, kwargs), SCRIPT)
            self._flow.passes(torch.jit.ScriptFunction, args, kwargs, out, None)

    def _watched(self) -> Iterator[tuple[str, nn.Module, str | None]]:
        """Yield every module with its path, and its name if it is a layer."""
        names = {id(module): name for name, module in self._layers.items()}
        for path, module in self._model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # it cannot be looked into
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
                if id(tensor) in self._carried:
                    value, spread = self._carried[id(tensor)]
                    value.readers[layer] = spread
                if id(tensor) in self._now:
                    graph, number = self._now[id(tensor)]
                    graph.values[number].is_entered = True

        return start

    def _ends(self, path: str, layer: str | None) -> After:
        weights = () if layer is None else weights_of(self._layers[layer])

        def end(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if path in self._modules:
                del self._modules[self._modules.index(path) :]
            if layer is None and not self._modules and module._modules:
                self._flow.arrives(output)
            if layer is not None:
                if layer in self._inside:
                    self._inside.remove(layer)
                axis = neuron_axis(self._layers[layer], output)
                if axis is None or in_transform() or not has_weights(module, weights):
                    return  # with other weights (of ``functional_call``, for example) it is another network
                self._flow.leaves(layer, output, axis)
                if isinstance(output, Tensor) and is_plain(output):
                    graph = ValueGraph(output, axis, depth=functions_running(), in_model=bool(self._modules))
                    self._calls.setdefault(layer, []).append(graph)
                    self._name(output, graph, 0)
                    self._carried[id(output)] = graph.values[0], 1

        return end

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.failure is not None:
            return func(*args, **(kwargs or {}))
        return self._looked_at(self._follow, func, args, kwargs or {})

    def _follow(
        self, func: Callable[..., Any], call: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if in_transform():  # its inside is not followed, only that it reads a value
            self._read_unseen((args, kwargs), TRANSFORM)
            return call()
        if func in LOOKS:
            return self._look(func, call, args, kwargs)
        inputs = [unhooked(tensor) for tensor in operands(func, args, kwargs)]
        reads = [self._now.get(id(t)) for t in inputs]
        target = target_of_write(func, args, kwargs)
        self._copy_before(target, func)
        if func in LEAVES and reads[0] is not None:
            reads[0][0].take_out(reads[0][1])
        out = call()
        try:
            self._note_call(func, args, kwargs, inputs, reads, out, target)
        except Exception:  # noqa: BLE001 (unexpected arguments: the chain ends, and the model goes on)
            self._ends_here(func, reads, out)
        return out

    def _note_call(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        reads: _Reads,
        out: Any,
        target: Tensor | None,
    ) -> None:
        if not self._inside:
            self._flow.passes(func, args, kwargs, out, target)
        made = target if out is None else out
        is_copy = isinstance(made, Tensor) and is_copied(func, inputs, made) and self._copied(inputs[0], made)
        if is_copy or not any(True for _ in tensors_in(made)):
            return  # .shape and the like read nothing
        if target is None and func not in STEPS and args and out is args[0]:
            return  # the call returned its input as it was
        self._see(func, args, kwargs, inputs, reads, made)
        self._constants.see(inputs, made, target)

    def _ends_here(self, func: Callable[..., Any], reads: _Reads, made: Any) -> None:
        """Record that a call which is no step of a chain has read values."""
        for read in reads:
            if read is not None:
                name = getattr(func, "__name__", "a function").strip("_")
                read[0].values[read[1]].outside.append(name if functions_running() == read[0].depth else HIDDEN)
        for tensor in tensors_in(made):
            self._now.pop(id(tensor), None)

    def _read_unseen(self, arguments: Any, name: str) -> None:
        for tensor in map(unwrapped, map(unhooked, tensors_in(arguments))):
            if id(tensor) in self._now:
                graph, number = self._now[id(tensor)]
                graph.values[number].outside.append(name)
            if id(tensor) in self._carried:
                self._carried[id(tensor)][0].foreign = True

    def _look(
        self, func: Callable[..., Any], call: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        out = call()
        if not self._inside:
            self._flow.passes(func, args, kwargs, out, None)
        if func in CREATES:
            self._constants.see((), out, None)
        source = unhooked(args[0]) if args else None
        if func in DETACHES and isinstance(out, Tensor) and out is not source and id(source) in self._now:
            graph, number = self._now[id(source)]
            graph.add(out, graph.values[number].place, Step(func, args, kwargs, (number,), None))
            self._name(out, graph, len(graph.values) - 1)
        return out

    def _copied(self, source: Tensor, made: Tensor) -> bool:
        """Record a copy, or the very same tensor, as the value that it was made from.

        Returns:
            Whether it was recorded; False if numbers were rounded, so that it is another value.
        """
        if made is source:
            return True
        if source.is_floating_point() != made.is_floating_point() and source.dtype != torch.bool:
            return False
        self._alive.append(made)
        _pass_on(self._now, source, made)
        _pass_on(self._carried, source, made)
        self._pieces.copies(source, made)
        if self._constants.has(source):
            self._constants.add(made)
        return True

    def _see(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        reads: _Reads,
        made: Any,
    ) -> None:
        """Record a call that makes a step, or that only reads values."""
        carriers = {id(t): self._carried[id(t)] for t in inputs if id(t) in self._carried}
        graphs = {id(read[0]): read[0] for read in reads if read is not None}
        alone = len(graphs) == 1 and isinstance(made, Tensor) and is_plain(made)
        graph = next(iter(graphs.values())) if alone else None
        value = None if graph is None else self._step(func, args, kwargs, inputs, reads, made, graph)
        if value is None:
            self._ends_here(func, reads, made)
            self._torn(func, inputs, reads, made)
        self._carry(func, args, kwargs, carriers, made, value)

    def _torn(self, func: Callable[..., Any], inputs: list[Tensor], reads: _Reads, made: Any) -> None:
        """Follow pieces of one layer's values until the model has returned."""
        if self._inside:
            return
        values = [None if read is None or self._is_over(read[0]) else read[0].values[read[1]] for read in reads]
        constants = map(self._constants.has, inputs)
        self._pieces.see(func, list(zip(inputs, values, constants, strict=True)), made)

    def _is_over(self, graph: ValueGraph) -> bool:
        """Return whether the model has returned, so that later calls, such as those of the loss, are no part of it."""
        return graph.in_model and not self._modules

    def _step(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        reads: _Reads,
        made: Tensor,
        graph: ValueGraph,
    ) -> Value | None:
        """Return the value that a call makes of one layer's output and constants alone; None if it does otherwise."""
        if func not in STEPS or functions_running() != graph.depth or (self._is_over(graph) and func not in LINKS):
            return None
        numbers = tuple(None if read is None else read[1] for read in reads)
        step = Step(func, args, kwargs, numbers, calling_module(self._model, self._modules))
        places = [None if n is None else graph.values[n].place for n in numbers]
        if LINKS.get(func) != "norm" and not self._constants.fit(inputs, places):
            return None
        place = place_behind(func, args, kwargs, list(zip(inputs, places, strict=True)), made, step.kind == "affine")
        if place is None:
            return None
        value = graph.add(made, place, step)
        self._name(made, graph, len(graph.values) - 1)
        return value

    def _carry(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        carriers: dict[int, tuple[Value, int]],
        made: Any,
        value: Value | None,
    ) -> None:
        """Record which neurons a tensor still carries after pooling or a change of layout, and what reads them."""
        source = unhooked(args[0] if args else kwargs.get("input"))
        spread = 0
        if isinstance(made, Tensor):
            self._carried.pop(id(made), None)
            if len(carriers) == 1 and id(source) in carriers:
                carried, before = carriers[id(source)]
                if func in PASSING and carried.place.axis is not None:
                    spread = spread_behind(func, args, kwargs, made, carried.place.axis, before)
                elif LINKS.get(func) == "activation" and id(source) not in self._now and carried.place.stage < 2:
                    carried.pooled.append(STEPS[func])
            if value is not None and value.step is not None and not value.step.is_move:
                self._carried[id(made)] = value, 1
            elif spread:
                self._alive.append(made)
                self._carried[id(made)] = carried, spread
        if not spread:
            for carried, _ in carriers.values():
                carried.foreign |= not self._inside

    def _goes_on(self, seen: Tensor, output: Tensor) -> None:
        self._flow.goes_on_as(seen, output)
        if id(seen) in self._now:
            graph, number = self._now[id(seen)]
            if graph.values[number].tensor is seen:
                graph.values[number].tensor = output
        self._alive.append(output)
        _pass_on(self._now, seen, output)
        _pass_on(self._carried, seen, output)

    def _name(self, tensor: Tensor, graph: ValueGraph, number: int) -> None:
        self._now[id(tensor)] = graph, number
        self._alive.append(tensor)

    def _copy_before(self, target: Tensor | None, func: Callable[..., Any]) -> None:
        if target is None:
            return
        own = self._now.get(id(target))
        if func in LINKS and own is not None and own[0].goes_on_alone(own[1]):
            return  # the next link holds the value that is overwritten
        is_aside = own is not None and own[0].values[own[1]].is_aside
        for graph in (graph for calls in self._calls.values() for graph in calls):
            graph.keep_before_write(target, is_aside=is_aside)

    def traced_layers(self) -> dict[str, Layer]:
        """Return the traced layers, by name; layers that did not run have no calls and a note that says so."""
        outputs = self._flow.outputs()
        return {
            name: replace(self._layer(name, module), output=name in outputs, twins=self._flow.twins(name))
            for name, module in self._layers.items()
        }

    def _layer(self, name: str, module: nn.Module) -> Layer:
        family = family_of(module)
        assert family is not None, "candidates have families"
        calls = self._calls.get(name, [])
        axis = common_axis(calls)
        ends = [graph.end(axis) for graph in calls]
        whole = bool(ends) and all(end.readers and not end.foreign for end in ends)
        readers = tuple({r: s for end in ends for r, s in end.readers.items()}.items())
        # Where no module runs around the layer, what a loss makes of the output looks like more of the model.
        followed = [graph for graph in calls if graph.in_model or name not in self._flow.outputs()]
        notes = [note for graph in followed if (note := graph.note(axis))]
        return Layer(
            name=name,
            type=type(module).__name__,
            neurons=family.neurons(module),
            axis=family.axis if not ends or ends[0].place.axis is None else ends[0].place.axis,
            chains=tuple(graph.chain(axis) for graph in calls),
            readers=readers if whole else None,
            note=next(iter(notes), ANYWHERE if self._flow.is_lost(name) else "") if ends else UNUSED,
        )

    def in_order(self) -> list[str]:
        """Return the layers that ran, in the order in which they ran first."""
        return list(self._calls)

    def activations(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the final value of every call of every layer."""
        for name, calls in self._calls.items():
            axis = common_axis(calls)
            for graph in calls:
                yield name, graph.end(axis).tensor

    def close(self) -> None:
        """Let go of the tensors."""
        self._now.clear()
        self._carried.clear()
        self._calls.clear()
        self._constants.close()
        self._pieces.close()
        self._alive.clear()


def _pass_on(entries: dict[int, Any], source: Tensor, made: Tensor) -> None:
    entries.pop(id(made), None)
    if id(source) in entries:
        entries[id(made)] = entries[id(source)]
