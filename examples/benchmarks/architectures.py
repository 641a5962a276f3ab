"""Architectures to cut, and checks of a cut that ask nothing of whoever has made it."""

import contextlib
import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from nets import ResNet20
from transformer import Transformer

from lightning_neurons.data.batches import map_tensors, tensors_of

Build = Callable[[], tuple[nn.Module, Any]]
Row = dict[str, Any]


def own_networks() -> dict[str, Build]:
    """Small networks: a residual one, one with fused attention, and one with groups, in norms and convolutions."""

    def grouped() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=4),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip

    return {
        "resnet20": lambda: (ResNet20(), torch.randn(2, 3, 32, 32)),
        "transformer": lambda: (Transformer(65), torch.randint(0, 65, (2, 64))),
        "grouped": lambda: (grouped(), torch.randn(2, 3, 16, 16)),
    }


def networks_in(folder: Path) -> dict[str, Build]:
    """Return the builders of all files of a folder that have some."""
    builders: dict[str, Build] = {}
    for path in sorted(folder.glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None, "it is a file of Python"
        assert spec.loader is not None, "and can be run"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        builders |= getattr(module, "Z", {})
    return builders


def built(build: Build, *, double: bool = False) -> tuple[nn.Module, Any]:
    """Return a network in evaluation mode and its inputs; no bias, scale or statistic is such that it hides a cut.

    In double precision, no two of its weights are equal.
    """
    torch.manual_seed(0)
    model, inputs = build()
    if double:
        model, inputs = model.double(), map_tensors(inputs, in_float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), Tensor):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval(), inputs


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the tensors that a network returns: the logits alone, where it names them."""
    out = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return [t for t in tensors_of(getattr(out, "logits", out)) if t.is_floating_point()]


def in_float64(value: Tensor) -> Tensor:
    """Return a tensor in double precision; whole numbers stay as they are."""
    return value.double() if value.is_floating_point() else value


def masked(whole: nn.Module, cut: nn.Module) -> nn.Module:
    """Return a copy of a network in which every weight that a cut has removed is 0.

    The weights of ``whole`` are all different, so the value of one that is left tells where it was. Nothing is asked of
    whoever has cut.
    """
    reference, left = copy.deepcopy(whole), dict(cut.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            values, order = parameter.flatten().sort()
            rest = left[name].flatten()
            places = torch.searchsorted(values, rest).clamp(max=len(values) - 1)
            if not torch.equal(values[places], rest) or not values.diff().all():
                raise ValueError(f"{name} has values that it did not have, or has one twice")
            zero = torch.zeros_like(values)
            zero[order[places]] = rest
            parameter.copy_(zero.view_as(parameter))
    return reference


def largest_difference(whole: nn.Module, cut: nn.Module, inputs: Any) -> float:
    """Return the largest difference of a cut network from its reference, relative to the largest output."""
    with torch.no_grad():
        pairs = list(zip(outputs(masked(whole, cut), inputs), outputs(cut, inputs), strict=True))
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def recount(model: nn.Module, inputs: Any) -> tuple[int, int]:
    """Return parameters, and the MACs of the whole batch, of a network as it is."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
            outputs(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@contextlib.contextmanager
def attempt(row: Row, name: str) -> Iterator[None]:
    """Keep the error of a step in the row, in short."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever it is, it belongs in the table)
        row[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
