"""Modules of torch with a fused path in evaluation mode: transformer encoders and attention.

They take it only if no ``TorchFunctionMode`` is active and no hook is on a module inside. That path rounds differently,
and an encoder with a padding mask gives zeros at padded positions, while its slow path gives other numbers there.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

_TYPES = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
_ENCODER = nn.TransformerEncoder.forward.__code__


def fast_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that have a fast path, those inside of others as well."""
    return [module for module in model.modules() if isinstance(module, _TYPES)]


def may_be_fast(module: nn.Module) -> bool:
    """Return whether a module with a fast path, or one inside, may take it; other conditions can only rule it out."""
    if not torch.backends.mha.get_fastpath_enabled() or torch.is_autocast_enabled():
        return False
    return any(not inner.training for inner in fast_modules(module))


@contextmanager
def only_forward_hooks(module: nn.Module, kind: type) -> Iterator[None]:
    """Remove all forward hooks of a module and its parts for a while, except those of one type."""
    kept = [(m, m._forward_hooks) for m in module.modules() if m._forward_hooks]
    for owner, hooks in kept:
        owner._forward_hooks = OrderedDict((key, hook) for key, hook in hooks.items() if isinstance(hook, kind))
    try:
        yield
    finally:
        for owner, hooks in kept:
            owner._forward_hooks = hooks


@contextmanager
def zero_padding(model: nn.Module) -> Iterator[None]:
    """Make encoders give zeros at padded positions on their slow path too, where the fast one would."""
    handles = []
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and getattr(encoder, "use_nested_tensor", False):
            last = encoder.layers[-1]
            if not any(isinstance(hook, _ZeroPadding) for hook in last._forward_hooks.values()):
                handles.append(last.register_forward_hook(_ZeroPadding(encoder), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _ZeroPadding:
    """A hook on an encoder's last layer; in a copy of it, and in a file, it does nothing."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self._encoder = encoder

    def __call__(self, layer: nn.Module, inputs: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        mask = kwargs.get("src_key_padding_mask")
        if mask is None or kwargs.get("src_mask") is not None or not self._runs(layer) or output.dim() != 3:
            return None
        padded = mask != 0
        if getattr(self._encoder, "mask_check", True) and bool((padded[:, 1:] < padded[:, :-1]).any()):
            return None  # values stand behind padding: torch takes the slow path then
        return output.masked_fill(padded.unsqueeze(-1), 0.0)

    def _runs(self, layer: nn.Module) -> bool:
        """Return whether torch's own forward of the encoder runs the layer, and might take the fast path."""
        encoder = self._encoder
        if layer is not encoder.layers[-1] or encoder.layers[0].training or not may_be_fast(encoder):
            return False
        frame = sys._getframe(1)  # a subclass may call it, or run the layers by itself
        while frame.f_back is not None and frame.f_code is not _ENCODER:
            frame = frame.f_back
        return frame.f_locals.get("self") is encoder

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, NOTHING


NOTHING = (nullcontext(), "__exit__")
"""Object and attribute of a hook that does nothing, and can be loaded from a file without this package."""
