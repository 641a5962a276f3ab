"""Forward of a LightningModule, from a batch to logits."""

from typing import Any

from torch import nn

from lightning_neurons.callbacks.trainer.checks import overrides
from lightning_neurons.errors import MeasurementError
from lightning_neurons.measurement.measure import call_on_inputs


def forward_of(pl_module: Any) -> Any:
    """Return a function from module and batch to logits: the module's forward, or that of its only network.

    Raises:
        MeasurementError: If it has several.
    """
    if overrides(pl_module, "forward"):
        return call_on_inputs
    networks = networks_of(pl_module)
    if len(networks) != 1:
        raise MeasurementError(
            f"{type(pl_module).__name__} has no forward, and {len(networks)} networks, so it is not known where the "
            "logits come from; pass forward=lambda module, batch: ..."
        )

    def forward(module: nn.Module, batch: Any) -> Any:
        return call_on_inputs(module.get_submodule(networks[0]), batch)

    return forward


def networks_of(pl_module: nn.Module) -> list[str]:
    """Return the names of children that have parameters: any of them may be the network."""
    return [name for name, child in pl_module.named_children() if any(True for _ in child.parameters())]
