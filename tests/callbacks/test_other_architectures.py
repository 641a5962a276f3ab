"""A file of another architecture is refused, or said to look like one, and nothing of it is left in the model."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import conform, load_pruned, prune
from lightning_neurons.errors import ArgumentError, PruningError
from tests.callbacks.modules import Plain
from tests.callbacks.pruned import assert_equal
from tests.models import pictures, seeded

X = pictures(3, size=6, channels=3)[0]


class Deep(nn.Module):
    """One layer of each kind that is loaded in its own way."""

    def __init__(self, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.deep, self.groups = nn.Conv2d(width, width, 3, groups=width), nn.Conv2d(6, 6, 3, groups=2)
        self.wide, self.head = nn.Conv2d(width, 6, 1), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.deep(torch.relu(self.norm(self.conv(x)))))
        return self.head(self.groups(torch.relu(self.wide(x))).mean((2, 3)))


class OfNet(Plain):
    def __init__(self) -> None:
        super().__init__(Deep())


def cut_state() -> dict[str, Any]:
    net = seeded(Deep)
    prune(net, X, {"conv": [1, 4]})
    return net.state_dict()


def narrower(name: str, axis: int) -> Any:
    return lambda state: {name: state[name].narrow(axis, 0, state[name].shape[axis] - 1).clone()}


REFUSED = {
    "of a wider network": lambda _: Deep(width=9).state_dict(),
    "with other images": lambda state: {"conv.weight": torch.zeros(6, 4, 3, 3)},
    "more channels for each filter": lambda state: {"deep.weight": torch.zeros(6, 2, 3, 3)},
    "no channel for a filter": lambda state: {"deep.weight": torch.zeros(6, 0, 3, 3)},
    "nothing is left": lambda state: {"wide.weight": torch.zeros(6, 0, 1, 1)},
    "other groups": lambda state: {"groups.weight": torch.zeros(5, 3, 3, 3), "groups.bias": torch.zeros(5)},
    "other kernels": narrower("conv.weight", 2),
    "it contradicts itself": narrower("conv.bias", 0),
    "sparse": lambda state: {"head.weight": state["head.weight"].to_sparse()},
    "without numbers": lambda state: {"head.weight": state["head.weight"].to("meta")},
    "a layer more": lambda state: {"more.weight": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_no_cut_can_have_made_is_refused_and_the_model_is_as_it_was(name, tmp_path):
    state = {**cut_state()}
    torch.save(state | REFUSED[name](state), tmp_path / "net.pt")
    net = seeded(Deep)
    before, attributes = {name: tensor.clone() for name, tensor in net.state_dict().items()}, repr(net)
    with pytest.raises(PruningError, match="of another architecture"):
        load_pruned(net, tmp_path / "net.pt")
    assert repr(net) == attributes
    assert_equal(net.state_dict(), before)


def test_names_that_are_no_text_are_refused(tmp_path):
    torch.save({**cut_state(), 3: torch.zeros(2)}, tmp_path / "net.pt")
    with pytest.raises(ArgumentError, match=r"path=.*expected a file with the state dict of a Deep"):
        load_pruned(Deep, tmp_path / "net.pt")


def test_the_same_holds_for_a_checkpoint(tmp_path):
    module = OfNet()
    module.net = Deep(width=9)
    state = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.0"}
    torch.save(state, tmp_path / "wide.ckpt")
    said = r"or was written before OfNet was cut: larger than in the model are net\.conv\.weight, net\.conv\.bias, "
    with pytest.raises(PruningError, match=said):
        load_pruned(OfNet, tmp_path / "wide.ckpt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda: Deep(classes=2).state_dict(),
            r"neurons are made than in Deep \(by head\), but as many are read",
        ),
        (
            lambda: {"conv.weight": torch.zeros(8, 1, 3, 3)},
            r"neurons are read than in Deep \(by conv\), but as many",
        ),
    ],
    ids=["classes", "channels of images"],
)
def test_a_file_in_which_one_side_alone_is_narrower_looks_like_another_architecture(change, said, tmp_path):
    torch.save(seeded(Deep).state_dict() | change(), tmp_path / "net.pt")
    with pytest.warns(UserWarning, match=f"{said}.*; is it a file of another architecture"):
        load_pruned(Deep, tmp_path / "net.pt")


@pytest.mark.parametrize("state", [cut_state, lambda: seeded(Deep).state_dict()], ids=["cut", "whole"])
def test_of_a_file_that_fits_nothing_is_said(state, tmp_path):
    torch.save(state(), Path(tmp_path / "net.pt"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(load_pruned(Deep, tmp_path / "net.pt").state_dict(), state())


def test_a_module_takes_wider_tensors_back_where_that_is_asked_for():
    net = seeded(Deep)
    prune(net, X, {"conv": [1, 4]})
    assert {"conv.weight", "deep.weight"} <= {*conform(net, Deep().state_dict())}
    assert (net.conv.out_channels, net.deep.groups, net.wide.in_channels) == (8, 8, 8)
