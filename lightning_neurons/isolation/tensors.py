"""The tensors in arguments and results of torch functions."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd.forward_ad import unpack_dual
from torch.utils._python_dispatch import _disable_current_modes


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results of a torch function."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from tensors_in(branch)
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from tensors_in(branch)


def map_tensors_in(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, torch.Size) or not isinstance(tree, list | tuple | dict):
        return tree
    if isinstance(tree, dict):
        return {key: map_tensors_in(value, change) for key, value in tree.items()}
    parts = [map_tensors_in(branch, change) for branch in tree]
    if isinstance(tree, list):
        return parts
    return type(tree)(parts) if type(tree).__module__ == "torch.return_types" else _tuple_like(tree, parts)


def _tuple_like(tree: tuple[Any, ...], parts: list[Any]) -> Any:
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def address_of(tensor: Tensor) -> int:
    """Which memory a tensor is a view of; one that has none to ask for (sparse, empty, transformed) is its own."""
    try:
        address = tensor.untyped_storage().data_ptr()
    except RuntimeError:
        address = 0
    return address or -id(tensor)


Weights = tuple[tuple[Tensor, int], ...]
"""Parameters, and which memory each has."""


def weights_of(module: nn.Module) -> Weights:
    """What a module computes with."""
    owners = module.modules() if module._modules else (module,)
    parameters = [p for owner in owners for p in owner._parameters.values() if p is not None]
    with torch._C.DisableTorchFunction():
        try:
            return tuple([(p, p.data_ptr()) for p in parameters])
        except RuntimeError:  # in a transform, for example
            return tuple([(p, address_of(p)) for p in parameters])


def has_weights(module: nn.Module, weights: Weights) -> bool:
    """Whether a module computes with the same parameters, or the same memory: otherwise it is another network.

    ``functional_call`` gives it other parameters; ``parameter.data = ...`` gives its own ones other numbers.
    """
    now = weights_of(module)
    if len(now) != len(weights):
        return False
    return all(p is q or here == there for (p, here), (q, there) in zip(now, weights, strict=True))


def in_transform() -> bool:
    """Whether a transform of ``torch.func``, or ``torch.jit.trace``, is going on: what runs then is no plain call."""
    return peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor that transforms of ``torch.func`` have wrapped, or the tensor itself."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def unheard() -> AbstractContextManager[None]:
    """No ``TorchDispatchMode`` of the user's, such as a counter of operations, hears what is computed inside."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that can be read: it is dense, and no part of a transform, also in forward mode.

    Example:
        >>> is_plain(torch.ones(2)), is_plain(torch.ones(2, device="meta"))
        (True, False)
        >>> torch.func.vmap(lambda row: row + is_plain(row))(torch.zeros(3, 2)).sum().item()
        0.0
    """
    with torch._C.DisableTorchFunction():  # to ask is no call of the model's
        return (
            not in_transform()
            and tensor.layout is torch.strided
            and not tensor.is_nested
            and tensor.device.type != "meta"
            and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
            and unpack_dual(tensor).tangent is None
        )


def version_of(tensor: Tensor) -> int:
    """A number that changes when the tensor is written into; inference tensors cannot be."""
    return -1 if tensor.is_inference() else tensor._version


def same_tensors(first: Any, second: Any, tolerance: float = 0.0) -> bool:
    """Whether two results have the same tensors, bit for bit unless tolerated; NaN is the same as NaN."""
    one, other = list(tensors_in(first)), list(tensors_in(second))
    if len(one) != len(other) or any(a.shape != b.shape for a, b in zip(one, other, strict=True)):
        return False
    pairs = zip(one, other, strict=True)
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True) for a, b in pairs)
