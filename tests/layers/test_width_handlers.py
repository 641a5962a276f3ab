"""Which axis one neuron takes, what cannot be changed, and what attributes say."""

import copy
import re

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_neurons.dependency.conform import set_data
from lightning_neurons.dependency.sizes import refit
from lightning_neurons.layers.width_handlers import axes, is_depthwise, why_fixed
from tests.tables import for_each

BOTH, NORM = {"weight": 0, "bias": 0}, {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}
AXES = [
    (nn.Linear(3, 5), BOTH, {"weight": 1}),
    (nn.Linear(3, 5, bias=False), {"weight": 0}, {"weight": 1}),
    (nn.Conv1d(3, 5, 2), BOTH, {"weight": 1}),
    (nn.Conv3d(3, 5, 2, bias=False), {"weight": 0}, {"weight": 1}),
    (nn.ConvTranspose2d(3, 5, 2), {"weight": 1, "bias": 0}, {"weight": 0}),
    (nn.BatchNorm1d(5), NORM, NORM),
    (nn.BatchNorm2d(5, affine=False), {"running_mean": 0, "running_var": 0}, {"running_mean": 0, "running_var": 0}),
    (nn.InstanceNorm2d(5), {}, {}),
    (nn.LayerNorm(5), {"weight": -1, "bias": -1}, {"weight": -1, "bias": -1}),
    (nn.LayerNorm(5, elementwise_affine=False), {}, {}),
    (nn.PReLU(5), {"weight": 0}, {"weight": 0}),
    (nn.PReLU(), {}, {}),
    (nn.Embedding(7, 5), {"weight": 1}, {"weight": 1}),
    (nn.ReLU(), {}, {}),
    (nn.LSTM(3, 5), {}, {"weight_ih_l0": 1}),
    (nn.GRU(3, 5, bidirectional=True), {}, {"weight_ih_l0": 1, "weight_ih_l0_reverse": 1}),
    (nn.GroupNorm(2, 6), {"weight": 0, "bias": 0}, {"weight": 0, "bias": 0}),
    (nn.GroupNorm(1, 5), {"weight": 0, "bias": 0}, {"weight": 0, "bias": 0}),
    (nn.Conv2d(4, 6, 3, groups=2), {"weight": 0, "bias": 0}, {}),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), {"bias": 0}, {"weight": 0}),
]


@for_each("module, makes, reads", AXES)
def test_axes_are_those_on_which_neurons_lie(module, makes, reads):
    assert axes(module, "makes") == axes(module, "passes") == makes
    assert axes(module, "reads") == reads


@for_each(
    "module, expected",
    [
        (nn.Conv2d(4, 4, 3, groups=4), True),
        (nn.Conv1d(4, 4, 3, groups=4), True),
        (nn.Conv2d(4, 8, 3, groups=4), False),
        (nn.Conv2d(4, 4, 3, groups=2), False),
        (nn.Conv2d(1, 1, 3), False),
        (nn.ConvTranspose2d(4, 4, 3, groups=4), False),
        (nn.Linear(4, 4), False),
    ],
)
def test_depthwise_means_one_filter_for_each_channel(module, expected):
    assert is_depthwise(module) is expected


def masked(module: nn.Module, name: str) -> nn.Module:
    return prune.l1_unstructured(module, name, 0.5)


FIXED = {
    "keys of its own": (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), "adds a key and a value of its own"),
    "keys of zeros": (lambda: nn.MultiheadAttention(4, 2, add_zero_attn=True), "adds a key and a value of zeros"),
    "attention of another type": (lambda: type("Own", (nn.MultiheadAttention,), {})(4, 2), "may have another forward"),
    "masked projection": (lambda: masked(nn.MultiheadAttention(4, 2), "in_proj_weight"), "computes its projections"),
    "recurrent": (lambda: nn.LSTM(3, 4, proj_size=2), "LSTM projects its hidden units"),
    "cell": (lambda: nn.LSTMCell(3, 4), "LSTMCell stacks its gates"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), "parametrized.*remove_parametrizations"),
    "spectral": (lambda: nn.utils.spectral_norm(nn.Linear(3, 4)), "reparametrized"),
    "masked weight": (lambda: masked(nn.Conv2d(3, 4, 3), "weight"), "has a mask"),
    "masked bias": (lambda: masked(nn.Conv2d(3, 4, 3), "bias"), "has a mask"),
    "layer norm of pictures": (lambda: nn.LayerNorm((4, 8, 8)), "normalises over .*more than the neurons"),
}


@for_each("name", FIXED)
def test_a_width_that_cannot_be_changed_is_refused_with_a_reason(name):
    make, reason = FIXED[name]
    assert re.search(reason, why_fixed(make()) or "no reason")


@for_each("module", [m for m, _, _ in AXES])
def test_other_widths_can_be_changed(module):
    assert why_fixed(module) is None


RESIZED = [
    (nn.Conv2d(3, 5, 3), (4, 2, 3, 3), {"out_channels": 4, "in_channels": 2, "groups": 1}),
    (nn.Conv2d(6, 6, 3, groups=6), (4, 1, 3, 3), {"out_channels": 4, "in_channels": 4, "groups": 4}),
    (nn.Conv2d(6, 4, 3, groups=2), (2, 3, 3, 3), {"out_channels": 2, "in_channels": 3, "groups": 1}),
    (nn.ConvTranspose2d(6, 4, 3, groups=2), (3, 2, 3, 3), {"out_channels": 2, "in_channels": 3, "groups": 1}),
    (nn.GroupNorm(4, 12), (9,), {"num_channels": 9, "num_groups": 3}),
    (nn.ConvTranspose2d(3, 5, 2), (2, 4, 2, 2), {"out_channels": 4, "in_channels": 2}),
    (nn.Linear(3, 5), (4, 2), {"out_features": 4, "in_features": 2}),
    (nn.BatchNorm2d(5), (4,), {"num_features": 4}),
    (nn.LayerNorm(5), (4,), {"normalized_shape": (4,)}),
    (nn.Embedding(7, 5), (9, 4), {"num_embeddings": 9, "embedding_dim": 4}),
    (nn.PReLU(5), (4,), {"num_parameters": 4}),
]


@for_each("module, shape, says", RESIZED)
def test_attributes_are_refitted_to_the_tensors(module, shape, says):
    module = copy.deepcopy(module)
    weight = module.weight
    set_data(module._parameters, "weight", torch.rand(shape))
    refit(module)
    assert module.weight is weight
    assert {name: getattr(module, name) for name in says} == says
