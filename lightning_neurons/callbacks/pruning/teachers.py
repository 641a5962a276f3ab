"""Teachers for distillation: the module that computes the logits, or one of its architecture from a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_neurons.callbacks.trainer.checks import overrides
from lightning_neurons.callbacks.trainer.namespaces import LightningModule
from lightning_neurons.callbacks.trainer.steps import networks_of
from lightning_neurons.dependency.conform import conform
from lightning_neurons.errors import UnknownNameError
from lightning_neurons.pruning.structure.example import twin_of


def find_logits(who: str, pl_module: LightningModule, output: str | None) -> tuple[nn.Module, list[str], str]:
    """Find the module that the teacher replaces, and in it the modules that receive batches and return logits.

    Args:
        who: The callback, for messages.
        pl_module: The LightningModule; the teacher stands in for it if it has a forward, else for one of its children.
        output: The callback's argument of this name.

    Returns:
        The module; the paths in it of modules of which the outermost that runs is given the batch; and the path in it
        of the module whose output are the logits. "" is itself.

    Raises:
        MisconfigurationException: If there is no such module, or it has to be said which it is.
    """
    whole: nn.Module = pl_module
    if output is None:
        if overrides(pl_module, "forward"):
            return whole, [""], ""
        networks = networks_of(pl_module)
        if len(networks) != 1:
            raise MisconfigurationException(
                f'{who}(recovery="distill"): {type(pl_module).__name__} has no forward, so it is not known where the '
                f"logits come from; pass output= the path of the module whose output they are, such as {networks}"
            )
        return whole.get_submodule(networks[0]), [""], ""
    known = [name for name, _ in whole.named_modules() if name]
    if output not in known:
        raise MisconfigurationException(f"{who}: {UnknownNameError.among('output', output, known)}")
    child, _, inner = output.partition(".")
    if overrides(pl_module, "forward"):  # which training_step may call, or leave aside
        return whole, ["", child], output
    return whole.get_submodule(child), [""], inner


def state_of(teacher: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a teacher, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in teacher.state_dict().items()}


def from_state(source: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Return a copy of a module with other weights and widths, in evaluation mode, without gradients."""
    teacher = twin_of(source)
    conform(teacher, state)
    teacher.load_state_dict(state)
    return teacher.requires_grad_(False)


def read_teacher(who: str, path: Path, pl_module: nn.Module, source: nn.Module) -> nn.Module:
    """Build a teacher for a module from the part of a checkpoint that belongs to it.

    Args:
        who: The callback, for messages.
        path: A checkpoint of the LightningModule, or a file with a state dict of it or of ``source``.
        pl_module: The LightningModule.
        source: It, or the network in it that is given the batch.

    Returns:
        A copy of ``source`` with the weights and widths of the file, in evaluation mode, without gradients.

    Raises:
        MisconfigurationException: If the file is none, or holds another architecture.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("state_dict", content)
        state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:
        raise MisconfigurationException(
            f"{who}: expected teacher={str(path)!r} to be a checkpoint of a {type(pl_module).__name__} with nothing "
            f"but tensors and plain values, and it could not be read ({type(error).__name__}); of another checkpoint, "
            "save the state_dict alone"
        ) from error
    prefix = next((f"{name}." for name, module in pl_module.named_modules() if module is source and name), "")
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)} or state
    try:
        return from_state(source, own)
    except RuntimeError as error:
        reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise MisconfigurationException(
            f"{who}: teacher={str(path)!r} is of another architecture than {type(source).__name__}: {reasons}"
        ) from error
