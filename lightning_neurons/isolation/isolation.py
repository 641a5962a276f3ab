"""Contexts that run the user's code a second time and leave no trace.

Everything that a forward or a validation step may change is kept and put back: what can be reached from the model
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
    """Keep ``model``, all that its code can reach, and random states, and put them back afterwards.

    Args:
        model: The model.
        others: Objects that its code can reach in other ways than from the model.

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
    """Run code in a state and return to it afterwards; may be used again while nothing else changes the model.

    Args:
        state: State of the model that the code runs.

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
    """Keep the state of every optimizer that steps meanwhile, and its parameters, and put them back afterwards."""
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
    """Enable gradients, also inside ``no_grad`` and ``inference_mode``, and run compiled code eagerly, for hooks."""
    with torch.inference_mode(False), torch.enable_grad(), eager():
        yield


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled code eagerly: hooks that are added after its first call would never fire."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and loading the compiler takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def unremarked_hooks(model: nn.Module) -> Iterator[None]:
    """Suppress torch's warning that global hooks fire twice on compiled modules, which ours allow for."""
    if not any(hasattr(module, "_orig_mod") for module in model.modules()):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile")
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters for a while."""
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
    """Keep the random states of torch (on the model's devices), numpy and Python, and put them back."""
    devices = {t.device.index for t in model.parameters() if t.is_cuda} if torch.cuda.is_initialized() else set()
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
