"""The document that says how a model is built: blocks, roles, and which neurons can only go together."""

import json
import sys
from functools import cache

import lightning as L  # noqa: N812
import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import describe_structure, find_neurons, prune
from tests.models import pictures, seeded
from tests.pruning.nets import NETS, LeNet, Residual, net_and_inputs
from tests.tables import for_each


@pytest.fixture(autouse=True)
def _without_clock(monkeypatch):
    """To keep the time limit, a clock is read at every call: with checks of shapes that takes ten times as long."""
    monkeypatch.setattr(sys, "setprofile", lambda check: None)


@cache
def document_of(name: str):
    return describe_structure(*net_and_inputs(name))


def roles(document) -> dict[str, str]:
    return {layer: entry["role"] for block in document["blocks"].values() for layer, entry in block["layers"].items()}


def layers(document) -> dict[str, list[str]]:
    return {name: list(block["layers"]) for name, block in document["blocks"].items()}


def parents(document) -> dict[str, list[str]]:
    return {name: block["parents"] for name, block in document["blocks"].items()}


def in_a_row(*blocks: str) -> dict[str, list[str]]:
    return {block: [before] if before else [] for before, block in zip(["", *blocks], blocks, strict=False)}


SQUEEZE = "squeeze-and-excitation"
INVERTED = {"0.0": "expand", "1.0": "depthwise", "2.fc1": SQUEEZE, "2.fc2": SQUEEZE, "3.0": "project"}


def test_the_layers_of_an_inverted_residual_have_their_roles():
    document = document_of("MobileNetV3")
    found = roles(document)
    for block in (2, 3):
        inside = {name: role for name, role in found.items() if name.startswith(f"features.{block}.")}
        assert inside == {f"features.{block}.block.{name}": role for name, role in INVERTED.items()}
    assert [found[name] for name in ("features.0.0", "features.4.0", "classifier.0")] == ["layer"] * 3
    assert found["classifier.3"] == "head"


@for_each("name", ["MobileNetV2", "MobileNetV3"])
def test_a_residual_block_without_expansion_has_a_depthwise_and_a_projecting_layer(name):
    found = roles(document_of(name))
    assert found["features.1.block.0.0"] == "depthwise"
    assert found["features.1.block.1.0"] == "project"


def test_without_squeeze_and_excitation_nothing_is_called_so():
    found = roles(document_of("MobileNetV2"))
    assert [found[f"features.2.block.{i}.0"] for i in range(3)] == ["expand", "depthwise", "project"]
    assert SQUEEZE not in {role for name, role in found.items() if not name.startswith("features.1.")}


@for_each("name", ["MobileNetV2", "MobileNetV3"])
def test_the_blocks_of_a_mobile_net_follow_one_another(name):
    document = document_of(name)
    features = ["features.0.0", "features.1", "features.2", "features.3", "features.4.0"]
    assert parents(document) == in_a_row(*features, "classifier.0", "classifier.3")
    assert layers(document)["features.1"] == ["features.1.block.0.0", "features.1.block.1.0"]


def test_the_groups_of_a_mobile_net_have_their_layers_readers_and_sizes():
    document = document_of("MobileNetV3")
    sizes = {root: group["neurons"] for root, group in document["groups"].items()}
    inner = {"features.2.block.0.0": 9, "features.2.block.2.fc1": 3, "features.2.block.3.0": 6}
    inner |= {"features.3.block.0.0": 12, "features.3.block.2.fc1": 3}
    assert sizes == {"features.0.0": 4, **inner, "features.4.0": 10, "classifier.0": 7, "classifier.3": 4}
    wide = document["groups"]["features.2.block.0.0"]
    assert wide["layers"] == [f"features.2.block.{name}" for name in ("0.0", "1.0", "2.fc2")]
    assert sorted(wide["readers"]) == [f"features.2.block.{name}" for name in ("2.fc1", "3.0")]
    reasons = {root: group["why_not"] for root, group in document["groups"].items() if group["why_not"]}
    assert reasons == {"classifier.3": "its neurons are the model's output"}


@for_each("name", ["ResNet A", "ResNet B"])
def test_the_blocks_of_a_residual_net_are_its_modules_whatever_the_shortcuts(name):
    document = document_of(name)
    blocks = ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    assert parents(document) == in_a_row("conv1", *blocks, "linear")
    inside = {block: [f"{block}.conv1", f"{block}.conv2"] for block in blocks}
    inside["layer2.0"] += ["layer2.0.shortcut.0"] if name == "ResNet B" else []
    assert layers(document) == {"conv1": ["conv1"], **inside, "linear": ["linear"]}
    assert {role for layer, role in roles(document).items() if layer != "linear"} == {"layer"}
    assert roles(document)["linear"] == "head"


@for_each("name", ["LeNet", "VGG", "MLP"])
def test_in_a_plain_chain_each_layer_is_a_block(name):
    document = document_of(name)
    names = list(roles(document))
    assert layers(document) == {layer: [layer] for layer in names}
    assert parents(document) == in_a_row(*names)
    assert list(roles(document).values()) == ["layer"] * (len(names) - 1) + ["head"]


def test_a_block_that_reads_several_has_several_parents():
    assert parents(document_of("joined")) == {"a": [], "b": [], "both": [], "head": ["a", "b", "both"]}
    assert parents(document_of("transformer"))["out"] == ["q", "k", "v"]


class Attributes(nn.Module):
    """Blocks as attributes, with and without a container around them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block1, self.block2 = Residual(4, 4, 1, True), Residual(4, 4, 1, True)
        self.tail = nn.ModuleDict({"pair": nn.Sequential(nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 1))})
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail["pair"](self.block2(self.block1(self.stem(x)))).mean((2, 3)))


def test_modules_of_a_repeated_type_are_blocks_also_as_attributes():
    document = describe_structure(seeded(Attributes), pictures(2)[0])
    assert parents(document) == in_a_row("stem", "block1", "block2", "tail.pair", "head")
    assert layers(document)["block2"] == ["block2.conv1", "block2.conv2"]
    assert layers(document)["tail.pair"] == ["tail.pair.0", "tail.pair.1"]


@for_each("name", NETS)
def test_the_document_counts_what_the_model_has(name):
    (net, x), document = net_and_inputs(name), document_of(name)
    found = {layer: entry for block in document["blocks"].values() for layer, entry in block["layers"].items()}
    assert document["model"] == type(net).__name__
    assert document["parameters"] == sum(p.numel() for p in net.parameters())
    attention = 2 * 5 * 5 * 6 if name == "transformer" else 0  # products of queries and keys, of weights and values
    assert document["macs"] == sum(entry["macs"] for entry in found.values()) + attention
    assert list(found) == [layer.name for layer in find_neurons(net, x)]
    for layer in find_neurons(net, x):
        entry, module = found[layer.name], net.get_submodule(layer.name)
        assert (entry["type"], entry["neurons"]) == (layer.type, layer.neurons)
        assert entry["parameters"] == sum(p.numel() for p in module.parameters())
        assert layer.name in document["groups"][entry["group"]]["layers"]
        assert set(entry["reads"]) <= set(found)


def test_macs_are_weights_times_positions_per_sample():
    document = document_of("LeNet")
    macs = {name: block["layers"][name]["macs"] for name, block in document["blocks"].items()}
    assert macs == {"conv1": 8 * 8 * 4 * 27, "conv2": 4 * 4 * 5 * 36, "fc1": 140, "fc2": 42, "fc3": 24}


@pytest.mark.parametrize("name", NETS)
def test_the_document_is_plain_and_is_written_as_it_is(name, tmp_path):
    path = tmp_path / "new" / "structure.json"
    document = describe_structure(*net_and_inputs(name), path=path if name == "LeNet" else str(path))
    assert json.loads(json.dumps(document)) == document == document_of(name)
    assert json.loads(path.read_text()) == document
    assert (document["format"], document["version"]) == ("lightning_neurons structure", 1)


def test_a_layer_that_never_runs_is_listed_without_a_group():
    net = seeded(LeNet)
    net.unused = nn.Linear(3, 2)
    document = describe_structure(net, pictures(2)[0])
    entry = document["blocks"]["unused"]["layers"]["unused"]
    assert (entry["group"], entry["reads"], entry["macs"], entry["neurons"]) == (None, [], 0, 2)
    assert document["blocks"]["unused"]["parents"] == []


class Structured(nn.Module):
    """Takes a picture and perhaps a scale, and returns nested values of which some are none."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LeNet()

    def forward(self, picture: Tensor, scale: Tensor | None = None) -> dict[str, object]:
        logits = self.net(picture if scale is None else picture * scale)
        return {"logits": logits, "loss": None, "count": 3, "more": [None, (logits.softmax(1), "text")]}


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = LeNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


X, TWO = pictures(2)[0], torch.tensor(2.0)


@for_each(
    "make, inputs",
    [
        (Structured, X),
        (Structured, (X,)),
        (Structured, [X, TWO]),
        (Structured, {"picture": X}),
        (Structured, {"scale": TWO, "picture": X}),
        (Structured, {"picture": X, "scale": None}),
        (Lit, X),
        (Lit, {"x": X}),
    ],
)
def test_inputs_and_outputs_may_have_any_form(make, inputs):
    net = seeded(make)
    found = {root: group["neurons"] for root, group in describe_structure(net, inputs)["groups"].items()}
    assert found == {"net.conv1": 4, "net.conv2": 5, "net.fc1": 7, "net.fc2": 6, "net.fc3": 4}
    assert prune(net, inputs, {"net.conv2": [1]}).widths["net.conv2"] == 4


@for_each("ran_before", [False, True])
def test_the_names_in_a_compiled_net_are_its_own(ran_before):
    net = nn.Sequential(torch.compile(seeded(LeNet), backend="eager"))
    if ran_before:
        net(X)
    document = describe_structure(net, X)
    assert "_orig_mod" not in json.dumps(document)
    assert list(document["groups"]) == ["0.conv1", "0.conv2", "0.fc1", "0.fc2", "0.fc3"]
    assert prune(net, X, {"0.conv2": [1]}).widths["0.conv2"] == 4
    assert net(X).shape == (2, 4)


@for_each("kdim, neurons, weights", [(None, 24, 3 * 8 * 8), (5, 8, 8 * (8 + 5 + 8))])
def test_an_attention_of_torch_is_listed_with_the_rows_and_costs_of_its_projections(kdim, neurons, weights):
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, kdim=kdim, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x[..., :kdim], x)[0])

    found = describe_structure(seeded(Attending), torch.randn(2, 6, 8))
    entry = found["blocks"]["attention"]["layers"]["attention"]
    assert (entry["neurons"], entry["parameters"], entry["macs"]) == (neurons, weights + 24, 6 * weights)
    assert found["groups"]["attention"] | {"attributes": []} == {
        "neurons": 2,
        "layers": ["attention"],
        "readers": ["attention.out_proj"],
        "renormalized": [],
        "attributes": [],
        "why_not": None,
    }
