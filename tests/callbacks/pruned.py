"""What the tests of the pruning callback share: looks into a run, and what must hold after any of them."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_neurons import NeuronPruningCallback, PruningPlan
from tests.callbacks.modules import Plain, loader, trainer_of

MAKER = {"net.norm1": "net.conv1", "net.norm2": "net.conv2"}
READ = {"net.conv2": "net.conv1", "net.fc1": "net.conv2", "net.fc2": "net.fc1"}


class Probe(L.Callback):
    """Keeps what a function finds in one hook, by epoch; it sees what the callbacks before it have done."""

    def __init__(self, hook: str, look: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.seen: dict[int, Any] = {}

        def keep(trainer: Any, module: Any, *_: Any) -> None:
            if not trainer.sanity_checking:
                self.seen[trainer.current_epoch] = look(trainer, module)

        setattr(self, hook, keep)


class Tagged(Plain):
    """Each neuron carries its original number, in a bias that is not trained."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for layer in (self.net.conv1, self.net.conv2, self.net.fc1):
            layer.bias.requires_grad_(False).copy_(torch.arange(len(layer.bias)) / 64)


def tags(module: nn.Module) -> dict[str, list[int]]:
    """The original numbers of the neurons that are left."""
    layers = {"net.conv1": module.net.conv1, "net.conv2": module.net.conv2, "net.fc1": module.net.fc1}
    return {name: [round(64 * float(b)) for b in layer.bias] for name, layer in layers.items()}


def pruner(criterion: Any = "fisher", **kwargs: Any) -> NeuronPruningCallback:
    """A callback that removes a third of all neurons, unless told otherwise."""
    rule = {} if {"amount", "target_params", "target_macs", "threshold"} & kwargs.keys() else {"amount": 0.33}
    return NeuronPruningCallback(criterion, **({"scope": "global", "compensation": "none"} | rule | kwargs))


def plain_name(name: str) -> str:
    """A name without what ``torch.compile`` puts into it."""
    return name.replace("_orig_mod.", "")


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {plain_name(n): p.detach().clone() for n, p in module.named_parameters()}


def widths(module: nn.Module) -> dict[str, int]:
    """Neurons by layer, counted in the weights."""
    layers = {plain_name(n): m for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {name: len(m.weight) for name, m in layers.items()}


def remaining(name: str, tensor: Tensor, plan: PruningPlan) -> Tensor:
    """What a plan leaves of a tensor of ``Net``, by hand: the reference for every cut."""
    owner = name.rpartition(".")[0]
    maker = MAKER.get(owner, owner)
    if tensor.ndim and plan.neurons.get(maker):
        tensor = tensor[plan.remaining(maker)]
    if tensor.ndim > 1 and plan.neurons.get(READ.get(owner, "")):
        tensor = tensor[:, plan.remaining(READ[owner])]
    return tensor


def assert_equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Bit by bit; says by how much it differs."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        other = expected[name]
        assert value.shape == other.shape, name
        assert torch.equal(value, other), f"{name}: {(value - other).abs().max()}"


def state_by_name(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state and its parameters' gradients."""
    found = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}.{key}"] = torch.as_tensor(value).clone()
        if parameter.grad is not None:
            found[f"{name}.grad"] = parameter.grad.clone()
    return found


def assert_sound(trainer: Any, module: Any, callback: NeuronPruningCallback, *, cut: bool = True) -> None:
    """Model, plan and optimizers tell the same story."""
    assert bool(callback.plan) == cut
    assert callback.pending is None
    assert widths(module) == callback.rounds.widths()
    for layer in (m for m in module.modules() if isinstance(m, nn.Conv2d)):
        assert (layer.out_channels, layer.in_channels) == layer.weight.shape[:2]
    for layer in (m for m in module.modules() if isinstance(m, nn.Linear)):
        assert (layer.out_features, layer.in_features) == layer.weight.shape
    for layer in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        assert {len(t) for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var)} == {
            layer.num_features
        }
    held = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held)
    assert {id(p) for p in held} == {id(p) for p in module.parameters() if p.requires_grad}
    for optimizer in trainer.optimizers:
        assert set(optimizer.state) <= set(held)
        for parameter, state in optimizer.state.items():
            assert {v.shape for v in state.values() if isinstance(v, Tensor) and v.ndim} <= {parameter.shape}
    assert all(p.grad is None or p.grad.shape == p.shape for p in module.parameters())


def assert_moved(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Every trained parameter has changed, and no other."""
    for name, parameter in module.named_parameters():
        same = torch.equal(parameter, before[plain_name(name)])
        assert same != parameter.requires_grad, name


def traces_without_sizes(traces: Mapping[str, Any]) -> dict[str, Any]:
    """What may not differ from a run without the callback, although sizes do."""
    return {name: value for name, value in traces.items() if name != "buffers"}


def assert_refused(module: Any, message: str, callbacks: list[Any], **kwargs: Any) -> None:
    """Before the first step, and nothing has changed."""
    before, trainer = weights(module), trainer_of(callbacks, **({"max_epochs": 3} | kwargs))
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module, loader(), loader(24, seed=1))
    assert trainer.global_step == 0
    assert_equal(weights(module), before)
