"""Cuts of trained networks, against published figures and tables. Collected only where the data are at hand."""

import copy

import pytest
import torch

from lightning_neurons import describe_structure, prune
from tests.test_real_models import REAL_DATA, mobilenet, with_data

PUBLISHED = {0.5: 88.40, 0.6: 85.17, 0.7: 71.26, 0.8: 66.76}  # Kim et al. 2020, LeNet-300-100 on Fashion-MNIST
EXPANDED = [16, 72, 88, 96, 240, 240, 120, 144, 288, 576, 576]  # Howard et al. 2019, table 2
PROJECTED = [16, 24, 24, 40, 40, 40, 48, 48, 96, 96, 96]
SQUEEZED = {1, 4, 5, 6, 7, 8, 9, 10, 11}


@with_data
@pytest.mark.parametrize("share", PUBLISHED)
def test_plain_removal_reproduces_the_published_accuracy(share):
    import lnn_data
    import small_models

    pictures, labels = lnn_data.load_fashion_mnist("test")
    x, y = lnn_data.to_tensor(pictures, 0.5, 0.5), torch.from_numpy(labels)
    net = small_models.load(small_models.LeNet300(), str(REAL_DATA / "lenet300_fashion.safetensors"))
    hidden = {"ip1": net.ip1, "ip2": net.ip2}
    norms = {name: torch.cat([m.weight, m.bias[:, None]], 1).abs().sum(1) for name, m in hidden.items()}
    prune(net, x[:2], {name: n.argsort()[: len(n) - round(len(n) * (1 - share))] for name, n in norms.items()})
    with torch.no_grad():
        accuracy = 100 * float((net(x).argmax(1) == y).float().mean())
    assert round(accuracy, 2) == PUBLISHED[share]


@with_data
def test_the_blocks_of_mobilenet_are_those_of_its_table():
    found = describe_structure(copy.deepcopy(mobilenet()), torch.randn(2, 3, 64, 64))["blocks"]
    for number, (wide, out) in enumerate(zip(EXPANDED, PROJECTED, strict=True), 1):
        block = found[f"features.{number}"]
        widths = {layer["role"]: layer["neurons"] for layer in block["layers"].values()}
        expected = {"depthwise": wide, "project": out} | ({"expand": wide} if number > 1 else {})
        assert widths == expected | ({"squeeze-and-excitation": wide} if number in SQUEEZED else {})
        assert block["parents"] == [f"features.{number - 1}" if number > 1 else "features.0.0"]
