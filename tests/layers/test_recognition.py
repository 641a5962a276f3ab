"""Users' own module types: which are linear maps or frozen norm layers, and which tensors hold an entry a neuron."""

from typing import Any
from unittest.mock import Mock

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons.dependency.sizes import refit
from lightning_neurons.layers.layer import candidates
from lightning_neurons.layers.recognition import own_axes, recognized
from lightning_neurons.layers.width_handlers import handler_of, is_linear, why_fixed
from tests.pruning.user_types import (
    Adapted,
    Conv1D,
    CountingNorm,
    Frozen,
    FrozenFeatures,
    Smoothed,
    StandardizedConv,
    WrittenOut,
)
from tests.tables import for_each

FOUR = {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}
RECOGNIZED = [
    (Conv1D(5, 3), {"weight": 1, "bias": 0}, {"weight": 0}, {"nf": "makes", "nx": "reads"}, -1),
    (Conv1D(4, 4), {"weight": 1, "bias": 0}, {"weight": 0}, {"nf": "makes", "nx": "reads"}, -1),
    (WrittenOut(3, 5), {"weight": 0}, {"weight": 1}, {}, -1),
    (WrittenOut(4, 4), {"weight": 0}, {"weight": 1}, {}, -1),
    (Frozen(5), FOUR, {}, {"channels": "passes"}, 1),
    (FrozenFeatures(5), {"mean": 2, "scale": 0}, {}, {}, -1),
]


@for_each("module, makes, reads, sizes, axis", RECOGNIZED)
def test_linear_maps_and_frozen_norms_of_any_type_are_recognized(module, makes, reads, sizes, axis):
    handler = handler_of(module)
    assert (handler.makes, handler.reads, handler.sizes, handler.axis(module)) == (makes, reads, sizes, axis)
    assert handler.role == (None if reads else "passes")
    assert is_linear(module) is bool(reads)
    assert list(candidates(module)) == ([""] if reads else [])
    assert why_fixed(module) is None


class Other(nn.Module):
    """Some function of an input and of tensors."""

    def __init__(self, function: Any, *, buffers: bool = False, **tensors: Tensor) -> None:
        super().__init__()
        self.function, self.outside = function, []
        for name, tensor in tensors.items():
            if buffers:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        self.outside.append(x)
        return self.function(self, x)


SQUARE, FIVE = torch.rand(5, 5), torch.rand(5)
OTHERS = {
    "scaled": lambda: Other(lambda m, x: 2 * (x @ m.weight), weight=SQUARE),
    "rectified": lambda: Other(lambda m, x: (x @ m.weight).relu(), weight=SQUARE),
    "bias twice": lambda: Other(lambda m, x: x @ m.weight + 2 * m.bias, weight=SQUARE, bias=FIVE),
    "a further weight": lambda: Other(lambda m, x: x @ m.weight @ m.more, weight=SQUARE, more=SQUARE),
    "lookup": lambda: Other(lambda m, x: F.embedding(x, m.weight), weight=torch.rand(7, 5)),
    "positions": lambda: Other(lambda m, x: x + m.table[: x.shape[1]], buffers=True, table=torch.rand(9, 5)),
    "statistics": lambda: Other(lambda m, x: F.layer_norm(x, x.shape[-1:], m.scale), buffers=True, scale=FIVE),
    "order of channels": lambda: Other(lambda m, x: x[:, m.order], buffers=True, order=torch.arange(5)),
    "sum of all": lambda: Other(lambda m, x: (x * m.scale).sum(-1), buffers=True, scale=FIVE),
    "parameters alone": lambda: Other(lambda m, x: x * m.scale, scale=FIVE),
    "other widths": lambda: Other(lambda m, x: x * m.scale + m.more[:5], buffers=True, scale=FIVE, more=torch.rand(6)),
    "nothing": lambda: Other(lambda m, x: x),
    "parts": lambda: nn.Sequential(Conv1D(5, 3)),
    "of torch": lambda: nn.Linear(3, 5),
}  # fmt: skip


@for_each("name", OTHERS)
def test_what_is_another_function_is_not_recognized_and_not_touched(name):
    module = OTHERS[name]()
    before = torch.get_rng_state()
    assert recognized(module) is None
    assert getattr(module, "outside", []) == []
    assert torch.equal(torch.get_rng_state(), before)


def test_a_type_is_tried_once_and_outside_of_all_modes():
    class Watched(Conv1D):
        ran = Mock()

        def forward(self, x: Tensor) -> Tensor:
            self.ran(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
            return super().forward(x)

    with torch.inference_mode(), torch.autocast("cpu"):
        for module in (Watched(5, 3), Watched(6, 2), Watched(6, 2)):
            assert recognized(module) is not None
            assert recognized(module) is not None
    assert len(Watched.ran.mock_calls) == 1
    Watched.ran.assert_called_with(False, False, False)


OWN = [
    (StandardizedConv(3, 5, 3), {"gain": 0}, {}),
    (StandardizedConv(5, 5, 3), {"gain": 0}, {}),
    (Smoothed(3, 5), {"scale": 0}, {"smooth": 0}),
    (Smoothed(5, 5), {"scale": 0}, {"smooth": 0}),
    (Adapted(7, 5), {"up": 0}, {"down": 1}),
    (Adapted(5, 5), {"up": 0}, {"down": 1}),
    (CountingNorm(5), {"seen": 0}, {}),
    (nn.Linear(3, 5), {}, {}),
]


@for_each("module, makes, reads", OWN)
def test_tensors_that_a_subclass_adds_lie_with_the_neurons_that_it_makes_or_reads(module, makes, reads):
    base = type(module).__mro__[1] if type(module).__module__ == Conv1D.__module__ else type(module)
    of_base = handler_of(
        base(*([5] if isinstance(module, nn.BatchNorm2d) else [3, 5, 3][: 2 + ("Conv" in base.__name__)]))
    )
    assert own_axes(module, of_base.makes, of_base.reads) == (makes, reads)
    handler = handler_of(module)
    assert handler.makes == {**of_base.makes, **makes}
    assert handler.reads == {**of_base.reads, **reads}


def test_numbers_of_a_recognized_module_follow_its_tensors():
    module = Conv1D(6, 4)
    recognized(module)
    module.weight.data, module.bias.data = torch.rand(3, 5), torch.rand(5)
    refit(module)
    assert (module.nf, module.nx) == (5, 3)
