"""Saliency of models that differentiate themselves, or whose author listens to gradients."""

import torch
from torch import Tensor, nn

from lightning_neurons import saliency
from lightning_neurons.attribution.saliency import METHODS
from tests.tables import for_each


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


@for_each("create_graph", [True, False])
def test_a_forward_that_takes_slopes_of_its_inputs_is_explained(create_graph):
    def forward(model: nn.Module, inputs: Tensor) -> Tensor:
        x = inputs if inputs.requires_grad else inputs.clone().requires_grad_()
        with torch.enable_grad():
            out = model(x)
            (slope,) = torch.autograd.grad(out[:, 0].sum(), x, create_graph=create_graph)
        return torch.stack([out[:, 0], slope.square().sum(1)], 1)

    net, x = network(), torch.randn(4, 3)
    leaf = x.clone().requires_grad_()
    out = net(leaf)
    (slope,) = torch.autograd.grad(out[:, 0].sum(), leaf, create_graph=True)
    target, value = (1, slope.square().sum()) if create_graph else (0, out[:, 0].sum())
    (expected,) = torch.autograd.grad(value, leaf)
    found = saliency(net, x, target=target, forward=forward)
    torch.testing.assert_close(found, expected)


@for_each("method", sorted(set(METHODS) - {"grad_cam"}))
def test_backward_hooks_neither_change_a_map_nor_hear_of_it(method):
    plain, hooked, x, heard = network(), network(), torch.randn(4, 3), []
    for module in hooked.modules():
        module.register_full_backward_hook(
            lambda module, slopes, outputs: heard.append(1) or tuple(s if s is None else 3 * s for s in slopes)
        )
    assert torch.equal(saliency(hooked, x, target=0, method=method), saliency(plain, x, target=0, method=method))
    assert not heard
