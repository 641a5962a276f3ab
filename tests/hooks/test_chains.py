"""Where neurons get their final value: the chain behind each layer, and what ends it."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import find_neurons
from tests.tables import for_each


class Body(nn.Module):
    """Any forward over a few ready-made modules."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.bn, self.act, self.inplace = nn.BatchNorm2d(4), nn.ReLU(), nn.ReLU(inplace=True)
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def points(forward, shape=(2, 4, 6, 6)) -> dict[str, str]:
    layers = find_neurons(Body(forward), torch.randn(shape))
    return {layer.name: layer.activation_point for layer in layers if layer.calls}


ACTIVATIONS = [
    (nn.ReLU(), "relu"), (nn.ReLU(inplace=True), "relu"), (nn.ReLU6(), "relu6"), (nn.LeakyReLU(), "leaky_relu"),
    (nn.PReLU(), "prelu"), (nn.ELU(), "elu"), (nn.SELU(), "selu"), (nn.CELU(), "celu"), (nn.GELU(), "gelu"),
    (nn.SiLU(), "silu"), (nn.Mish(), "mish"), (nn.Softplus(), "softplus"), (nn.Hardswish(), "hardswish"),
    (nn.Hardsigmoid(), "hardsigmoid"), (nn.Hardtanh(), "hardtanh"), (nn.Sigmoid(), "sigmoid"), (nn.Tanh(), "tanh"),
    (nn.Softsign(), "softsign"), (nn.Tanhshrink(), "tanhshrink"), (nn.LogSigmoid(), "log_sigmoid"),
    (nn.RReLU(), "rrelu"), (nn.Threshold(0.1, -1.0), "threshold"), (nn.Hardshrink(), "hardshrink"),
]  # fmt: skip


@for_each("module, function", ACTIVATIONS)
def test_every_activation_module_ends_the_chain_under_its_functions_name(module, function):
    (layer,) = find_neurons(nn.Sequential(nn.Linear(3, 4), module), torch.randn(5, 3))
    assert layer.activation_point == f"0 > {function} (1)"
    assert layer.rectified == isinstance(module, nn.ReLU | nn.ReLU6)
    assert layer.bounds == {"sigmoid": (0, 1), "hardsigmoid": (0, 1), "tanh": (-1, 1)}.get(function)


@for_each(
    "function",
    [F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu_, lambda x: F.relu(x, inplace=True), F.relu6],
)
def test_functional_rectifiers_are_seen_in_place_or_not(function):
    layers = find_neurons(Body(lambda m, x: function(m.bn(m.a(x)))), torch.randn(2, 4, 6, 6))
    assert layers[0].activation_point.startswith("a > batch_norm (bn) > relu")
    assert layers[0].rectified


NORMS = [
    (nn.BatchNorm2d(4), "batch_norm"), (nn.GroupNorm(2, 4), "group_norm"), (nn.LayerNorm((4, 6, 6)), "layer_norm"),
    (nn.InstanceNorm2d(4, affine=True), "instance_norm"), (nn.RMSNorm((4, 6, 6)), "rms_norm"),
    (nn.LocalResponseNorm(2), "local_response_norm"),
]  # fmt: skip


@for_each("module, function", NORMS)
def test_every_norm_module_is_a_link(module, function):
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), module, nn.ReLU())
    assert find_neurons(net, torch.randn(2, 4, 6, 6))[0].activation_point == f"0 > {function} (1) > relu (2)"


@for_each("dropout, name", [
        (nn.Dropout(), "dropout"), (nn.Dropout2d(), "dropout2d"), (nn.AlphaDropout(), "alpha_dropout"),
        (nn.Dropout(inplace=True), "dropout"),
    ])  # fmt: skip
def test_dropout_is_a_link_before_and_behind_an_activation_function(dropout, name):
    net = nn.Sequential(nn.Conv2d(4, 4, 3), dropout, nn.ReLU(), dropout)
    (layer,) = find_neurons(net, torch.randn(2, 4, 6, 6))
    assert layer.activation_point == f"0 > {name} (1) > relu (2) > {name} (1)"
    assert layer.rectified


def test_one_activation_module_shared_by_three_layers_follows_each():
    found = points(lambda m, x: m.act(m.c(m.act(m.b(m.act(m.a(x)))))))
    assert found == {name: f"{name} > relu (act)" for name in "abc"}


def test_one_in_place_activation_module_shared_by_three_layers_follows_each():
    found = points(lambda m, x: m.inplace(m.c(m.inplace(m.b(m.inplace(m.a(x)))))))
    assert found == {name: f"{name} > relu (inplace)" for name in "abc"}


def test_an_in_place_activation_whose_result_is_not_used_is_seen():
    def forward(m, x):
        x = m.a(x)
        m.inplace(x)
        return m.b(x)

    assert points(forward) == {"a": "a > relu (inplace)", "b": "b"}


def test_an_identity_between_layer_and_norm_changes_nothing():
    net = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.BatchNorm1d(4), nn.Identity(), nn.Tanh())
    assert find_neurons(net, torch.randn(5, 3))[0].activation_point == "0 > batch_norm (2) > tanh (4)"


def residual(m, x):
    return F.relu(m.bn(m.b(F.relu(m.a(x)))) + x)


def residual_in_place(m, x):
    out = m.bn(m.b(F.relu(m.a(x))))
    out += x
    return m.inplace(out)


@for_each("forward", [residual, residual_in_place])
def test_a_residual_sum_ends_the_chain_at_the_norm_in_place_or_not(forward):
    assert points(forward) == {"a": "a > relu", "b": "b > batch_norm (bn)"}


def test_a_concatenation_ends_the_chain():
    found = points(lambda m, x: F.relu(torch.cat([m.a(x), m.bn(m.b(x))], 1)))
    assert found == {"a": "a", "b": "b > batch_norm (bn)"}


def test_squeeze_and_excitation_branches_off_behind_the_activation_function():
    def forward(m, x):
        x = F.relu(m.bn(m.a(x)))
        scale = torch.sigmoid(m.fc2(F.relu(m.fc1(x.mean((2, 3))))))
        return m.b(x * scale[:, :, None, None])

    found = points(forward)
    assert found == {"a": "a > batch_norm (bn) > relu", "fc1": "fc1 > relu", "fc2": "fc2 > sigmoid", "b": "b"}
    layers = {layer.name: layer for layer in find_neurons(Body(forward), torch.randn(2, 4, 6, 6))}
    assert (layers["a"].readers, layers["fc1"].readers, layers["fc2"].readers) == (None, (("fc2", 1),), None)


def test_in_a_preactivation_block_the_chain_holds_what_comes_before_the_next_layer_only():
    def forward(m, x):
        x = m.a(x)
        return x + m.c(F.relu(m.b(F.relu(m.bn(x)))))

    assert points(forward) == {"a": "a", "b": "b > relu", "c": "c"}


def test_a_norm_behind_the_activation_function_is_no_part_of_the_chain():
    assert points(lambda m, x: m.b(m.bn(F.relu(m.a(x))))) == {"a": "a > relu", "b": "b"}


@for_each("unchanged", [Tensor.contiguous, Tensor.float, lambda x: x.to("cpu"), lambda x: x.to(x.dtype)])
def test_a_call_that_returns_the_very_same_tensor_is_no_reading(unchanged):
    assert points(lambda m, x: F.relu(unchanged(m.a(x)))) == {"a": "a > relu"}


def test_looking_at_shapes_and_printing_detached_values_is_no_reading():
    def forward(m, x):
        x = m.a(x)
        assert x.shape[1] == x.size(1) == 4
        m.seen = float(x.detach().mean())
        return F.relu(m.bn(x))

    assert points(forward) == {"a": "a > batch_norm (bn) > relu"}
