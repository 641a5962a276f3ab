"""The example that shows a model's structure: a few samples, and how to call the model with them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_neurons.data.batches import map_tensors, tensors_of
from lightning_neurons.errors import PruningError, in_short
from lightning_neurons.hooks.find_neurons import call
from lightning_neurons.isolation.copying import copy_of, what_fails
from lightning_neurons.isolation.isolation import eager, isolated, kept_random_state
from lightning_neurons.layers.attention import separate_heads
from lightning_neurons.layers.width_handlers import keeps_statistics


@dataclass(frozen=True)
class Example:
    """Inputs, and the way to run a model on them.

    Attributes:
        inputs: Anything that ``forward`` takes.
        forward: Called with a model and ``inputs``.
    """

    inputs: Any
    forward: Callable[[nn.Module, Any], Any] = call

    def run(self, model: nn.Module) -> Any:
        """Run a model on a copy of the inputs, always with the same random numbers.

        Returns:
            What the model (or ``forward``) returns.
        """
        with kept_random_state(model), eager():
            torch.default_generator.manual_seed(0)  # torch.manual_seed would also look after devices that are not used
            if any(parameter.device.type == "cuda" for parameter in model.parameters()):
                torch.cuda.manual_seed_all(0)
            return self.forward(model, map_tensors(self.inputs, Tensor.clone))

    def check(self, model: nn.Module) -> None:
        """Run a model that has just been cut, and leave no trace: a copy may have run where it does not.

        Raises:
            PruningError: If it fails.
        """
        try:
            with isolated(model), torch.no_grad():
                model.eval()
                self.run(model)
        except Exception as error:
            raise PruningError(
                f"the model fails without the neurons that were to go, although its copy did not ({in_short(error)}); "
                "everything is as it was"
            ) from error

    def to(self, dtype: torch.dtype) -> "Example":
        """Return the example in another precision."""
        return replace(self, inputs=map_tensors(self.inputs, lambda t: in_precision(t, dtype)))


def varied(example: Example) -> list[Example]:
    """Return examples that tell more than one whose values are all the same, the best first.

    On a batch of zeros all positions are alike, so that a wrong cut may go unnoticed: what an attention weighs does not
    matter then. Numbers become random ones around their value, codes those up to their own.

    Args:
        example: The user's example; not every model takes other inputs.

    Returns:
        Examples of the same form; ``example`` itself is the last.
    """

    def with_numbers(tensor: Tensor) -> Tensor:
        if not _is_constant(tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        generator = torch.Generator().manual_seed(0)
        return tensor + torch.randn(tensor.shape, generator=generator).to(tensor)

    def with_codes(tensor: Tensor) -> Tensor:
        tensor = with_numbers(tensor)
        # Ones may be a mask; and on a GPU a code that does not exist could not be recovered from.
        if not _is_constant(tensor) or tensor.dtype not in (torch.int64, torch.int32) or tensor.device.type != "cpu":
            return tensor
        code = int(tensor.flatten()[0])
        return (
            tensor if code in (-1, 1) else (torch.arange(tensor.numel()) % max(code + 1, 2)).view_as(tensor).to(tensor)
        )

    whole = [map_tensors(example.inputs, change) for change in (with_codes, with_numbers)]
    if not any(_is_constant(tensor) for tensor in tensors_of(example.inputs)):
        return [example]
    return [*(replace(example, inputs=inputs) for inputs in whole), example]


def _is_constant(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())


def in_precision(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of another precision, complex if it was; one of whole numbers is as it is.

    Example:
        >>> in_precision(torch.zeros(2, dtype=torch.complex64), torch.float64).dtype
        torch.complex128
    """
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def twin_of(model: nn.Module, *, shared: bool = False) -> nn.Module:
    """Copy a model.

    Args:
        model: Any module.
        shared: Whether the copy has the same parameters and buffers, so that only its modules are copied.

    Returns:
        The copy, in evaluation mode, whose attentions run their output projections as modules; the model itself stays
        as it is.

    Raises:
        PruningError: If the model cannot be copied.
    """
    try:
        twin = copy_of(model, shared=shared).eval()
    except Exception as error:
        path, who = what_fails(model), type(model).__name__
        raise PruningError(
            f"{f'{path} in {who}' if path else who} cannot be copied ({in_short(error)}), so a cut cannot be tried "
            "before it is made; let copy.deepcopy copy it"
        ) from error
    separate_heads(twin)
    return twin


def scramble(twin: nn.Module) -> None:
    """Give a copy random weights, so that what holds for it holds by structure alone.

    In a trained model a wrong cut can go unnoticed: dead neurons, and norm layers that begin at zero, hide it.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.copy_(_random(parameter.shape, generator))
            elif parameter.is_complex():
                parts = [_random(parameter.shape, generator) for _ in range(2)]
                parameter.copy_(torch.complex(*parts))
        for module in twin.modules():
            if keeps_statistics(module):
                assert module.running_mean is not None and module.running_var is not None, "they come together"
                module.running_mean.copy_(0.3 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw weights that keep the size of activations; scales and biases of either sign, none of them small.

    Returns:
        Weights, normal with variance ``1 / fan_in``, or of vectors, magnitudes from 0.5 to 1.
    """
    if len(shape) > 1:
        return torch.randn(shape, generator=generator) * math.sqrt(shape[0] / max(shape.numel(), 1))
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    sizes: Tensor = 0.5 + 0.5 * torch.rand(shape, generator=generator)
    return sizes * signs
