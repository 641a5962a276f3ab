"""Tensors in arguments and results of torch functions, their memory and versions."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd.forward_ad import unpack_dual
from torch.utils._python_dispatch import _disable_current_modes


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results of a torch function."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from tensors_in(branch)
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from tensors_in(branch)


def map_tensors_in(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the same structure with every tensor changed."""
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
    """Return the address of a tensor's storage; a number of its own if it has none (sparse, empty, transformed)."""
    try:
        address = tensor.untyped_storage().data_ptr()
    except RuntimeError:
        address = 0
    return address or -id(tensor)


Weights = tuple[tuple[Tensor, int], ...]
"""Parameters, each with the address of its memory."""


def weights_of(module: nn.Module) -> Weights:
    """Return the parameters with which a module computes."""
    owners = module.modules() if module._modules else (module,)
    parameters = [p for owner in owners for p in owner._parameters.values() if p is not None]
    with torch._C.DisableTorchFunction():
        try:
            return tuple([(p, p.data_ptr()) for p in parameters])
        except RuntimeError:  # in a transform, for example
            return tuple([(p, address_of(p)) for p in parameters])


def has_weights(module: nn.Module, weights: Weights) -> bool:
    """Return whether a module has the same parameters, or the same memory: otherwise it is another network.

    ``functional_call`` gives it other parameters; ``parameter.data = ...`` gives its own parameters other memory.
    """
    now = weights_of(module)
    if len(now) != len(weights):
        return False
    return all(p is q or here == there for (p, here), (q, there) in zip(now, weights, strict=True))


def in_transform() -> bool:
    """Return whether a transform of ``torch.func``, or ``torch.jit.trace``, is active: its calls are no plain ones."""
    return peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor that transforms of ``torch.func`` have wrapped, or the tensor itself."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def unheard() -> AbstractContextManager[None]:
    """Return a context in which no ``TorchDispatchMode`` of the user's, such as a counter of operations, is active."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor holds numbers that can be read: dense, and in no transform, nor in forward mode.

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
    """Return a number that changes when the tensor is written into; inference tensors have none and get -1."""
    return -1 if tensor.is_inference() else tensor._version


def same_tensors(first: Any, second: Any, tolerance: float = 0.0) -> bool:
    """Return whether two results have equal tensors, exactly or within a tolerance; NaN is equal to NaN."""
    left, right = list(tensors_in(first)), list(tensors_in(second))
    if len(left) != len(right) or any(a.shape != b.shape for a, b in zip(left, right, strict=True)):
        return False
    pairs = zip(left, right, strict=True)
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True) for a, b in pairs)
