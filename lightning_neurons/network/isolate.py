"""Running somebody's code a second time without leaving a trace.

Everything that a forward or a validation step may change is put aside and put back: modes, random state, buffers,
torchmetrics states, and plain attributes such as ``self.outputs.append(...)``. What lies deeper (an object of the
user's own behind an attribute) cannot be seen from here.
"""

import copy
import random
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_neurons.network.fastpath import zero_padding

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) | {"training", "_trainer", "_fabric"}
_LONG = 1000
_METRIC_BOOKKEEPING = (
    "_update_count", "_computed", "_forward_cache", "_is_synced", "_cache", "_to_sync", "_should_unsync",
    "_enable_grad",
)  # fmt: skip


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Leave modes, random state, buffers, metrics and plain attributes of ``model`` as they were."""
    with ExitStack() as stack:
        for keep in (kept_modes, kept_buffers, kept_metrics, kept_attributes, zero_padding, unremarked_hooks):
            stack.enter_context(keep(model))
        stack.enter_context(kept_random_state(model))
        yield


@contextmanager
def differentiable() -> Iterator[None]:
    """Gradients, also inside ``no_grad`` and ``inference_mode``; compiled code runs eagerly, so that hooks fire."""
    with torch.inference_mode(False), torch.enable_grad(), eager():
        yield


@contextmanager
def eager() -> Iterator[None]:
    """Hooks added after the first compiled call never fire; run what is compiled without its compilation."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and loading the compiler takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def unremarked_hooks(model: nn.Module) -> Iterator[None]:
    """Where a part is compiled, torch warns that hooks for all modules hear of it twice; ours do not mind."""
    if not any(hasattr(module, "_orig_mod") for module in model.modules()):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile")
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient meanwhile."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Put each module's training mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def kept_random_state(model: nn.Module) -> Iterator[None]:
    """Put the random state of torch (the model's devices), numpy and Python back."""
    devices = {t.device.index for t in model.parameters() if t.device.type == "cuda"}
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Let the model work on copies of its buffers. The copies are normal tensors, also of inference tensors."""
    with torch.inference_mode(False):
        owners = [m for m in model.modules() if m._buffers and not isinstance(m, Metric)]
        kept = [(m, dict(m._buffers)) for m in owners]
        for module in owners:
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.clear()
            module._buffers.update(buffers)


@contextmanager
def kept_metrics(model: nn.Module) -> Iterator[None]:
    """Give torchmetrics empty states meanwhile; ``reset`` would clear list states in place."""
    kept: list[tuple[Metric, dict[str, Any]]] = []
    for metric in model.modules():
        if isinstance(metric, Metric):
            names = [*metric._defaults, *_METRIC_BOOKKEEPING]
            kept.append((metric, {n: vars(metric)[n] for n in names if n in vars(metric)}))
            for name, default in metric._defaults.items():
                vars(metric)[name] = default.clone().to(metric.device) if isinstance(default, Tensor) else []
            vars(metric).update(_update_count=0, _computed=None, _forward_cache=None)
    try:
        yield
    finally:
        for metric, state in kept:
            vars(metric).update(state)


@contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Put plain attributes of all modules back: containers, arrays and tensors with their contents."""
    kept = [(m, plain_attributes(m)) for m in model.modules() if not isinstance(m, Metric)]
    contents = [entry for _, attributes in kept for v in attributes.values() for entry in _contents(v)]
    for module, attributes in kept:
        for name, value in attributes.items():
            if isinstance(value, Tensor):
                with torch.inference_mode(False):
                    vars(module)[name] = value.detach().clone()
    try:
        yield
    finally:
        for value, content in contents:
            _refill(value, content)
        for module, attributes in kept:
            for name in plain_attributes(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module's own code has set on it, apart from parameters, buffers and modules."""
    return {name: value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES}


def _contents(value: Any, depth: int = 3) -> Iterator[tuple[Any, Any]]:
    """Each container or array in ``value`` with a copy of what it holds, the outermost first."""
    if not isinstance(value, list | dict | set | deque | np.ndarray):
        return
    yield value, copy.copy(value)
    # A long list is data, and to look through it would take longer than the step.
    if depth and not isinstance(value, np.ndarray) and len(value) <= _LONG:
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _contents(inner, depth - 1)


def _refill(value: Any, content: Any) -> None:
    if isinstance(value, np.ndarray):
        value[...] = content
        return
    value.clear()
    if isinstance(value, list | deque):
        value.extend(content)
    else:
        value.update(content)
