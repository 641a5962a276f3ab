"""Running somebody's code a second time without leaving a trace.

Everything that a forward or a validation step may change is put aside and put back: what can be reached from the model
(``reachable.py``), such as modes, weights, buffers, metrics and attributes, and random states.
"""

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from lightning_neurons.isolation.fast_paths import zero_padding
from lightning_neurons.isolation.model_state import ModelState


@contextmanager
def isolated(model: nn.Module, *others: Any) -> Iterator[None]:
    """Leave ``model``, what its code can reach, and random states as they were.

    Args:
        model: The model.
        others: Objects that its code can reach on other ways than from the model.

    Raises:
        MeasurementError: If weights were changed that are too many to keep a copy of.
    """
    with (
        zero_padding(model),
        unremarked_hooks(model),
        returning_to(ModelState(model, *others)),
        kept_optimizers(),
        kept_random_state(model),
    ):
        yield


@contextmanager
def returning_to(state: ModelState) -> Iterator[None]:
    """Run code in a state and go back to it; as often as wanted, if nothing else changes the model.

    Args:
        state: Of the model that the code runs.

    Raises:
        MeasurementError: If weights were changed that are too many to keep a copy of.
    """
    try:
        state.substitute()
        yield
    finally:
        state.put_back()
    state.complain()


@contextmanager
def kept_optimizers() -> Iterator[None]:
    """Give every optimizer that steps meanwhile its state back, and what it moves, wherever it is held."""
    kept: dict[int, tuple[Optimizer, ModelState]] = {}

    def keep(optimizer: Optimizer, *_: Any) -> None:
        if id(optimizer) not in kept:
            kept[id(optimizer)] = optimizer, ModelState(optimizer, optimizer.state)
            kept[id(optimizer)][1].substitute()

    handle = register_optimizer_step_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        for _, state in kept.values():
            state.put_back()


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
def kept_random_state(model: nn.Module) -> Iterator[None]:
    """Put the random state of torch (the model's devices), numpy and Python back."""
    devices = {t.device.index for t in model.parameters() if t.is_cuda} if torch.cuda.is_initialized() else set()
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
