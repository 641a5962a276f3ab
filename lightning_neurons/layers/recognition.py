"""Module types of users: what they do with neurons, told from their tensors and by a trial.

A subclass of a known type may have further tensors with an entry for each neuron; a type that nobody knows may be a
linear map, or a norm layer whose statistics are frozen. Those are tried: never the module itself, but a small one of
its type with random tensors, in a thread of its own, where no mode of torch watches.
"""

import copy
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

_MADE, _READ, _WIDTH = 5, 3, 3  # of the modules that are tried
_LAYOUTS = (((2, _WIDTH, 4, 5), 1), ((2, _WIDTH, 4), 1), ((2, _WIDTH, 4, 5, 2), 1), ((2, 4, _WIDTH), -1))
_FEW = 4  # attributes that may say a width
_T = TypeVar("_T")
_OWN = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Recognized:
    """The place of neurons in a module whose type nobody knows.

    Attributes:
        makes: By tensor, the axis of the neurons that it makes or hands on.
        reads: By tensor, the axis of the neurons that it reads, if it makes others of them.
        sizes: By attribute, which of them it counts.
        axis: Axis of the neurons in its input and output.
        centres: Whether it subtracts a ``running_mean`` from each neuron before anything else.
    """

    makes: Mapping[str, int]
    reads: Mapping[str, int]
    sizes: Mapping[str, Literal["makes", "passes", "reads"]]
    axis: int
    centres: bool = False


_SEEN: WeakKeyDictionary[nn.Module, Recognized] = WeakKeyDictionary()  # while a cut is made, sizes do not add up
_TRIED: WeakKeyDictionary[type, dict[Hashable, Any]] = WeakKeyDictionary()


def own_axes(
    module: nn.Module, makes: Mapping[str, int], reads: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Find the tensors of a subclass that have an entry for each neuron, such as the gain of a convolution's filters.

    Args:
        module: A module of a known type or of a subclass.
        makes: By tensor of the known type, the axis of the neurons that it makes or hands on.
        reads: The same of those that it reads.

    Returns:
        The axes of the other tensors whose size is the number of neurons made, on just one axis, and of those that have
        the number of neurons read, where that differs. Both are empty for types of torch.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def __init__(self, inputs, outputs):
        ...         super().__init__(inputs, outputs)
        ...         self.scale = nn.Parameter(torch.ones(outputs, 1))
        >>> own_axes(Scaled(4, 5), {"weight": 0, "bias": 0}, {"weight": 1})
        ({'scale': 0}, {})
    """
    if _is_of_torch(module):
        return {}, {}
    tensors = _tensors(module)
    made, read = (next((tensors[n].shape[axis] for n, axis in r.items() if n in tensors), 0) for r in (makes, reads))
    others = {name: tensor.shape for name, tensor in tensors.items() if name not in makes and name not in reads}
    entries = {name: axis for name, shape in others.items() if (axis := _only(shape, made)) is not None}
    if read != made:
        return entries, {name: axis for name, shape in others.items() if (axis := _only(shape, read)) is not None}
    shapes = tuple((name, axis, tensors[name].ndim) for name, axis in entries.items())
    of_inputs = _once(type(module), shapes, lambda: _of_inputs(module, makes, reads, entries)) if entries else ()
    return (
        {name: axis for name, axis in entries.items() if name not in of_inputs},
        {name: axis for name, axis in entries.items() if name in of_inputs},
    )


def _of_inputs(
    module: nn.Module, makes: Mapping[str, int], reads: Mapping[str, int], entries: Mapping[str, int]
) -> tuple[str, ...]:
    """Try which tensors of a layer with as many inputs as outputs have an entry for each input.

    Returns:
        Their names; none if the module runs with none of the choices.
    """
    tensors = {n: t.detach().cpu().double() if t.is_floating_point() else t.cpu() for n, t in _tensors(module).items()}
    taps: tuple[int, ...] = getattr(module, "kernel_size", ())
    x = torch.ones(2, _READ, *(8 * size for size in taps)).double() if taps else torch.ones(2, 4, _READ).double()
    sizes = {name: n for end, n in (("in_", _READ), ("out_", _MADE)) for name in vars(module) if name.startswith(end)}
    for count in range(min(len(entries), _FEW) + 1):
        for chosen in combinations(entries, count):
            axes = [(makes, _MADE), (reads, _READ)]
            axes += [({n: axis for n, axis in entries.items() if n not in chosen}, _MADE)]
            axes += [({n: axis for n, axis in entries.items() if n in chosen}, _READ)]
            small = dict(tensors)
            for by_name, size in axes:
                small |= {n: _resized(small[n], axis, size) for n, axis in by_name.items() if n in small}
            if _in_a_thread(_output, _stand_in(module, small, sizes), x) is not None:
                return chosen
    return ()


def _resized(tensor: Tensor, axis: int, size: int) -> Tensor:
    return tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])


def recognized(module: nn.Module) -> Recognized | None:
    """Recognise a linear map, or a norm layer with frozen statistics, of a type that nobody knows.

    Args:
        module: Any module; it is only looked at.

    Returns:
        Where its neurons lie; None if it is neither.

    Example:
        >>> class Transposed(nn.Module):
        ...     def __init__(self, inputs, outputs):
        ...         super().__init__()
        ...         self.outputs, self.weight = outputs, nn.Parameter(torch.zeros(inputs, outputs))
        ...     def forward(self, x):
        ...         return x @ self.weight
        >>> found = recognized(Transposed(2, 4))
        >>> found.makes, found.reads, found.sizes
        ({'weight': 1}, {'weight': 0}, {'outputs': 'makes'})
    """
    if module in _SEEN or _is_of_torch(module) or module._modules or "forward" in vars(module):
        return _SEEN.get(module)
    tensors = {**module._parameters, **module._buffers}
    if not tensors or len(_tensors(module)) < sum(tensor is not None for tensor in tensors.values()):
        return None  # some are lazy
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim == 2:
        place = _linear(module, weight)
    else:
        place = _norm(module) if module._buffers else None
    if place is not None:
        _SEEN[module] = place
    return place


def centres(module: object) -> bool:
    """Return True for a norm layer that subtracts a running mean of each neuron, also if it never learns one."""
    if isinstance(module, _NormBase):
        return module.running_mean is not None
    place = recognized(module) if isinstance(module, nn.Module) else None
    return place is not None and place.centres


def _is_of_torch(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) or type(module).__module__.startswith("torch.")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**module._parameters, **module._buffers}
    return {name: t for name, t in tensors.items() if t is not None and not is_lazy(t)}


def _only(shape: tuple[int, ...], size: int) -> int | None:
    """Return the only axis of some size above 1, or None."""
    axes = [axis for axis, length in enumerate(shape) if length == size]
    return axes[0] if size > 1 and len(axes) == 1 else None


def _linear(module: nn.Module, weight: Tensor) -> Recognized | None:
    bias = module._parameters.get("bias")
    names = {name for name, tensor in module._parameters.items() if tensor is not None}
    if _tensors(module).keys() - {"weight", "bias"} or names - {"weight", "bias"}:
        return None
    if not weight.is_floating_point():
        return None
    if bias is not None and (bias.ndim != 1 or len(bias) not in weight.shape):
        return None
    attributes = _integers(module, weight.shape)
    if len(attributes) > _FEW:
        return None
    fits = tuple((name, tuple(value == size for size in weight.shape)) for name, value in attributes.items())
    wide = None if bias is None else tuple(len(bias) == size for size in weight.shape)
    return _once(type(module), (wide, fits), lambda: _first(_maps(module, weight, bias, attributes)))


def _maps(
    module: nn.Module, weight: Tensor, bias: Tensor | None, attributes: Mapping[str, int]
) -> Iterator[Recognized | None]:
    """Try a module as a linear map: with its weight as it is, and transposed; for each meaning of its attributes."""
    for made in (1, 0):
        counts: dict[Literal["makes", "reads"], int] = {"makes": weight.shape[made], "reads": weight.shape[1 - made]}
        if bias is not None and len(bias) != counts["makes"]:
            continue
        meanings = [[role for role, count in counts.items() if count == value] for value in attributes.values()]
        # In a square weight an attribute may mean either; most types have one for each.
        for roles in sorted(product(*meanings), key=lambda chosen: -len(set(chosen))):
            sizes = dict(zip(attributes, roles, strict=True))
            if _is_map(module, made, sizes, has_bias=bias is not None):
                makes = {"weight": made} if bias is None else {"weight": made, "bias": 0}
                yield Recognized(makes, {"weight": 1 - made}, sizes, -1)


def _is_map(module: nn.Module, made: int, sizes: Mapping[str, str], *, has_bias: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(_READ, _MADE, dtype=torch.float64, generator=generator)
    tensors = {"weight": matrix if made else matrix.T.contiguous()}
    shift = torch.randn(_MADE, dtype=torch.float64, generator=generator)
    if has_bias:
        tensors["bias"] = shift
    small = _stand_in(module, tensors, {n: _MADE if role == "makes" else _READ for n, role in sizes.items()})
    for shape in ((2, 4, _READ), (4, _READ)):
        x = torch.randn(*shape, dtype=torch.float64, generator=generator)
        if _is_close(_output(small, x), x @ matrix + (shift if has_bias else 0)):
            return True
    return False


def _norm(module: nn.Module) -> Recognized | None:
    """Recognise a module that computes each neuron by itself, from what its buffers hold for it.

    Returns:
        Where they lie; None if its tensors are others, or neurons are not by themselves.
    """
    tensors = _tensors(module)
    wide = {name: [axis for axis, size in enumerate(t.shape) if size > 1] for name, t in tensors.items()}
    axes = {name: axes[0] for name, axes in wide.items() if axes}
    widths = {tensors[name].shape[axis] for name, axis in axes.items()}
    floating = all(tensors[name].is_floating_point() for name in axes)
    if any(len(axes) > 1 for axes in wide.values()) or len(widths) != 1 or not floating:
        return None
    if not axes.keys() & module._buffers.keys():
        return None  # parameters alone are followed by themselves
    attributes = _integers(module, widths)
    shapes = tuple((name, axes.get(name), t.ndim) for name, t in tensors.items())
    return _once(type(module), (shapes, tuple(attributes)), lambda: _first(_norms(module, axes, attributes)))


def _norms(module: nn.Module, axes: Mapping[str, int], attributes: Mapping[str, int]) -> Iterator[Recognized | None]:
    generator = torch.Generator().manual_seed(0)
    whole = {name: tensor.detach().cpu().clone() for name, tensor in _tensors(module).items()}
    for name, axis in axes.items():
        sides = [_WIDTH if i == axis else 1 for i in range(whole[name].ndim)]
        whole[name] = 0.5 + torch.rand(sides, dtype=torch.float64, generator=generator)
    keep = torch.tensor([0, 2])
    less = {name: t.index_select(axes[name], keep) if name in axes else t for name, t in whole.items()}
    modules = [_stand_in(module, t, dict.fromkeys(attributes, n)) for t, n in ((whole, _WIDTH), (less, len(keep)))]
    for shape, axis in _LAYOUTS:
        x = torch.randn(*shape, dtype=torch.float64, generator=generator)
        out = _output(modules[0], x)
        if out is not None and out.shape == x.shape:
            narrow = _output(modules[1], x.index_select(axis, keep))
            if _is_close(narrow, out.index_select(axis, keep)):
                centres = _centres(modules[0], x, axis)
                yield Recognized(dict(axes), {}, dict.fromkeys(attributes, "passes"), axis, centres)


def _centres(module: nn.Module, x: Tensor, axis: int) -> bool:
    out, mean = _output(module, x), module._buffers.get("running_mean")
    if mean is None or mean.ndim != 1:
        return False
    sides = [_WIDTH if i == axis % x.ndim else 1 for i in range(x.ndim)]
    shift = torch.arange(1, _WIDTH + 1, dtype=x.dtype)
    mean.add_(shift)
    return out is not None and _is_close(_output(module, x + shift.view(sides)), out)


def _first(tries: Iterator[Recognized | None]) -> Recognized | None:
    first: Recognized | None = _in_a_thread(next, tries, None)
    return first


def _in_a_thread(function: Callable[..., _T], *args: Any) -> _T:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def _once(kind: type, key: Hashable, find: Callable[[], _T]) -> _T:
    tried = _TRIED.setdefault(kind, {})
    if key not in tried:
        tried[key] = find()
    found: _T = tried[key]
    return found


def _integers(module: nn.Module, sizes: Any) -> dict[str, int]:
    return {name: n for name, n in vars(module).items() if name not in _OWN and type(n) is int and n in sizes}


def _stand_in(module: nn.Module, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> nn.Module:
    """Make a small module of a module's type.

    Args:
        module: The module.
        tensors: By name, the tensors of the small one.
        sizes: By name, attributes that are to say something else.

    Returns:
        A module in evaluation mode that shares nothing with the other that a forward is likely to change.
    """
    small: nn.Module = object.__new__(type(module))
    nn.Module.__init__(small)
    for name, value in vars(module).items():
        if name not in _OWN:
            vars(small)[name] = copy.copy(value) if isinstance(value, list | dict | set) else value
    vars(small).update(sizes)
    for name in module._parameters:
        small._parameters[name] = nn.Parameter(tensors[name], requires_grad=False) if name in tensors else None
    small._buffers.update({name: tensors.get(name) for name in module._buffers})
    small.training = False
    return small


def _output(module: nn.Module, x: Tensor) -> Tensor | None:
    """Return what a module makes of an input, which it may change; None if it fails or makes something else."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = module.forward(x.clone())
    except Exception:  # noqa: BLE001 (whatever it is, it is no such module)
        return None
    return out if isinstance(out, Tensor) and out.dtype == x.dtype else None


def _is_close(out: Tensor | None, expected: Tensor) -> bool:
    return out is not None and out.shape == expected.shape and bool(((out - expected).abs() < 1e-9).all())
