"""Whole numbers in modules' own attributes that depend on widths follow a cut, and come back with it."""

import copy
import cProfile
import io
import json
import pickle
import sys
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_neurons import PruningPlan, describe_structure, load_pruned, prune, pruned_widths
from lightning_neurons.dependency.conform import conforming
from lightning_neurons.dependency.groups import Group, Part
from lightning_neurons.dependency.sizes import all_sizes
from lightning_neurons.errors import ArgumentError, PruningError
from lightning_neurons.pruning.structure.example import Example
from lightning_neurons.pruning.structure.followers import joined
from lightning_neurons.pruning.structure.structure import discover, some_units
from lightning_neurons.pruning.structure.width_attributes import FORWARDS, mended
from lightning_neurons.pruning.surgery.surgery import cut, cuts_of
from tests.callbacks.guarded import Scored
from tests.callbacks.modules import Plain, fit, loader
from tests.callbacks.pruned import Probe, assert_equal, pruner
from tests.models import seeded
from tests.tables import for_each


class Viewed(nn.Module):
    """Reshapes by a number of its own; ``depth`` is the same number by chance."""

    def __init__(self, channels: int = 8, inputs: int = 1) -> None:
        super().__init__()
        self.channels, self.depth = channels, channels
        self.conv, self.norm, self.head = (
            nn.Conv2d(inputs, channels, 3),
            nn.BatchNorm2d(channels),
            nn.Linear(channels, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(x.view(len(x), self.channels, -1).mean(-1)) / self.depth


class Flat(nn.Module):
    """The number is a multiple of the width."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.size = channels * 4
        self.conv, self.head = nn.Conv2d(1, channels, 3), nn.Linear(channels * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.conv(x), 2).view(-1, self.size))


class Split(nn.Module):
    """Two numbers in a list, each of which follows a part of one layer."""

    def __init__(self, sizes: tuple[int, int] = (5, 7)) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.both, self.one, self.two = nn.Linear(6, sum(sizes)), nn.Linear(sizes[0], 3), nn.Linear(sizes[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        one, two = torch.split(torch.relu(self.both(x)), self.sizes, 1)
        return self.one(one) * self.two(two)


def unflattened(channels: int = 8) -> nn.Module:
    tail = nn.Conv1d(channels, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(nn.Linear(6, channels), nn.ReLU(), nn.Unflatten(1, (channels, 1)), *tail)


class Attention(nn.Module):
    """As in BERT of Hugging Face, with as many heads as a head has dimensions; reads its config if it has one."""

    def __init__(self, config: Any = None, heads: int = 4, size: int = 4) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, size, heads * size
        self.config = config
        self.q, self.k, self.v = (nn.Linear(6, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, 6)

    def split(self, x: Tensor) -> Tensor:
        heads = self.num_attention_heads if self.config is None else self.config.heads
        return x.view(*x.shape[:2], heads, self.attention_head_size).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*(self.split(f(x)) for f in (self.q, self.k, self.v)))
        y = y.permute(0, 2, 1, 3).contiguous()
        return self.out(y.view(*y.shape[:2], self.all_head_size))


class Fused(nn.Module):
    """As in timm: one layer for queries, keys and values."""

    def __init__(self, heads: int = 4, size: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, size
        self.qkv, self.out = nn.Linear(6, 3 * heads * size), nn.Linear(heads * size, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class Blocks(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], count: int = 2) -> None:
        super().__init__()
        self.start, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(make() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


IMAGES, VECTORS, TOKENS = (torch.randn(2, *size).double() for size in ((1, 6, 6), (6,), (3, 5)))
HEADS = [*range(4, 8), *range(12, 16)]  # the second and the fourth of four
CONFIG = SimpleNamespace(heads=4, layers=4, hidden=6)

SEPARATE = {f"blocks.0.{name}": HEADS for name in "qkv"}
FUSED = {"blocks.1.qkv": [16 * part + n for part in range(3) for n in HEADS]}
BERT = {"blocks.0.num_attention_heads": (4, 2), "blocks.0.all_head_size": (16, 8)}
CONFIGURED = {"blocks.0.config.heads": (4, 2), "blocks.0.all_head_size": (16, 8)}

CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, list[int]], dict[str, list[int]], Any]] = {
    "view": (Viewed, IMAGES, {"conv": [1, 6]}, {"head.weight": [1, 6]}, {"channels": (8, 6)}),
    "flat": (Flat, IMAGES, {"conv": [5]}, {"head.weight": [*range(20, 24)]}, {"size": (24, 20)}),
    "unflatten": (unflattened, VECTORS, {"0": [0]}, {"3.weight": [0]}, {"2.unflattened_size[0]": (8, 7)}),
    "split": (
        Split,
        VECTORS,
        {"both": [0, 3, 5]},
        {"one.weight": [0, 3], "two.weight": [0]},
        {"sizes[0]": (5, 3), "sizes[1]": (7, 6)},
    ),
    "heads": (lambda: Blocks(Attention), TOKENS, SEPARATE, {"blocks.0.out.weight": HEADS}, BERT),
    "config": (lambda: Blocks(lambda: Attention(CONFIG)), TOKENS, SEPARATE, {"blocks.0.out.weight": HEADS}, CONFIGURED),
    "fused": (
        lambda: Blocks(Fused),
        TOKENS,
        FUSED,
        {"blocks.1.out.weight": HEADS},
        {"blocks.1.num_heads": (4, 2)},
    ),
}


def silenced(net: nn.Module, columns: dict[str, list[int]]) -> nn.Module:
    """A copy in which what reads the neurons has weights of zero for them."""
    found = copy.deepcopy(net)
    with torch.no_grad():
        for name, places in columns.items():
            found.get_parameter(name)[:, places] = 0
    return found


def own_attributes(net: nn.Module) -> dict[str, Any]:
    """The objects that modules hold, but for tensors and modules; and the hooks of their state dicts."""
    plain = {f"{n}.{key}": id(value) for n, m in net.named_modules() for key, value in vars(m).items() if key[0] != "_"}
    return plain | {f"{n}.hooks": list(m._state_dict_hooks) for n, m in net.named_modules()}


def saved(net: nn.Module) -> dict[str, Any]:
    """A state dict, written to a file and read without objects."""
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@for_each("name", CASES)
def test_a_plan_changes_the_numbers_that_have_to_follow_and_no_others(name):
    make, x, plan, columns, numbers = CASES[name]
    net = seeded(make, double=True)
    right = silenced(net, columns)
    report = prune(net, x, plan)
    assert report.plan.attributes == numbers
    assert (net(x) - right(x)).abs().max() < 1e-12
    for attribute, (before, after) in numbers.items():
        assert f"{attribute}: {before} -> {after}" in str(report).splitlines()
    assert PruningPlan.from_dict(json.loads(json.dumps(report.plan.to_dict()))) == report.plan
    assert vars(CONFIG) == {"heads": 4, "layers": 4, "hidden": 6}


def test_a_config_that_modules_share_is_copied_for_the_one_that_changes():
    config = copy.copy(CONFIG)
    net = seeded(lambda: Blocks(lambda: Attention(config)), double=True)
    prune(net, TOKENS, SEPARATE)
    assert net.blocks[1].config is config
    assert [vars(block.config) for block in net.blocks] == [vars(config) | {"heads": 2}, vars(config)]
    right = silenced(net, {"blocks.1.out.weight": [*range(8)]})
    report = prune(net, TOKENS, {f"blocks.1.{name}": [*range(8)] for name in "qkv"})
    assert (net(TOKENS) - right(TOKENS)).abs().max() < 1e-12
    assert report.plan.attributes.keys() == {"blocks.1.config.heads", "blocks.1.all_head_size"}


@for_each("name", ["view", "flat", "split"])
def test_a_budget_finds_them_as_well_and_predicts_what_is_left(name):
    make, x, *_ = CASES[name]
    net = seeded(make, double=True)
    whole = copy.deepcopy(net)
    report = prune(net, x, 0.5)
    assert report.plan
    assert sum(p.numel() for p in net.parameters()) == report.cost.parameters_after < report.cost.parameters
    assert net(x).shape == whole(x).shape
    again = copy.deepcopy(whole)
    prune(again, x, report.plan)
    assert torch.equal(again(x), net(x))
    second = prune(net, x, 1 / 3)
    both = report.plan.then(second.plan)
    assert {key: pair[0] for key, pair in both.attributes.items()} == {
        key: pair[0] for key, pair in report.plan.attributes.items()
    }
    prune(whole, x, both)
    assert torch.equal(whole(x), net(x))


def test_where_heads_are_as_many_as_their_dimensions_trials_tell_them_apart_and_blocks_share_the_answer():
    net = seeded(lambda: Blocks(lambda: Attention(CONFIG), 4), double=True)
    structure = discover(net, Example(TOKENS))
    units = tuple(tuple(range(4 * i, 4 * i + 4)) for i in range(4))
    groups = []
    for block in (f"blocks.{i}" for i in range(4)):
        makes = [Part(f"{block}.{name}", "makes", units) for name in "qkv"]
        layers = {part.path: units for part in makes}
        groups.append(Group(f"{block}.q", 4, (*makes, Part(f"{block}.out", "reads", units)), layers))
    preflight, tried = structure.preflight, []
    difference = preflight.difference
    preflight.difference = lambda *args: tried.append(args) or difference(*args)
    found = mended(preflight, groups, {g.root: some_units(g, 0) for g in groups}, structure.widths)
    names = {root: {(a.path, a.name) for a in group.attributes} for root, group in found.items()}
    assert names == {
        f"blocks.{i}.q": {(f"blocks.{i}", "config.heads"), (f"blocks.{i}", "all_head_size")} for i in range(4)
    }
    assert len(tried) < FORWARDS / 2, "only those of the first block are searched"


def test_more_blocks_of_the_same_kind_need_no_more_trials():
    def runs(count: int) -> int:
        calls: list[nn.Module] = []
        net = seeded(Blocks, Fused, count, double=True)
        structure = discover(net, Example(TOKENS, lambda copy, x: calls.append(copy) or copy(x)))
        heads = {f"blocks.{n}.qkv" for n in range(count)}
        assert heads <= {root for root, group in structure.offered.items() if group.attributes}
        return len(calls)

    assert runs(2) == runs(7)


def test_a_profiler_that_runs_is_left_alone_and_names_the_same_numbers():
    profile = cProfile.Profile()
    with profile:
        structure = discover(seeded(Viewed, double=True), Example(IMAGES))
        json.dumps({})
    assert [a.name for a in structure.groups["conv"].attributes] == ["channels"]
    assert "dumps" in {entry.code.co_name for entry in profile.getstats() if not isinstance(entry.code, str)}


def test_after_an_error_at_the_end_of_a_cut_every_object_is_there_again():
    net = seeded(lambda: Blocks(lambda: Attention(copy.copy(CONFIG))), double=True)
    net.sizes = Split()
    before, outputs = own_attributes(net), net(TOKENS)

    def fail(_: Any) -> None:
        assert own_attributes(net) != before
        raise KeyboardInterrupt

    structure = discover(net, Example(TOKENS))
    units = tuple(tuple(range(4 * i, 4 * i + 4)) for i in range(4))
    makes = [Part(f"blocks.0.{name}", "makes", units) for name in "qkv"]
    group = Group("blocks.0.q", 4, (*makes, Part("blocks.0.out", "reads", units)), {part.path: units for part in makes})
    group = mended(structure.preflight, [group], {group.root: [1]}, structure.widths)[group.root]
    with pytest.raises(KeyboardInterrupt):
        cut(net, cuts_of([group], {group.root: [1]}), also=fail)
    assert own_attributes(net) == before
    assert torch.equal(net(TOKENS), outputs)


class Literal(Attention):
    """The number of heads stands in the code."""

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], 4, self.attention_head_size).transpose(1, 2)


def test_what_no_number_can_mend_is_refused_with_the_line_and_nothing_changes():
    net = seeded(lambda: Blocks(Literal), double=True)
    before, outputs = own_attributes(net), net(TOKENS)
    line = r"`return x.view\(\*x.shape\[:2\], 4, self.attention_head_size\).transpose\(1, 2\)`"
    with pytest.raises(PruningError, match=rf"blocks.0.q cannot be cut: .* at test_width_attributes.py:\d+, {line} "):
        prune(net, TOKENS, {"blocks.0.q": [0]})
    assert own_attributes(net) == before
    assert torch.equal(net(TOKENS), outputs)


def test_a_number_that_would_not_be_whole_is_refused_and_nothing_changes():
    group = discover(seeded(Split, double=True), Example(VECTORS)).groups["both"]
    net = seeded(Split, double=True)
    net.sizes = [3, 9]
    before = own_attributes(net)
    with pytest.raises(PruningError, match=r"sizes\[0\] of Split is 3 and would be 2.4, which is no number of neurons"):
        cut(net, cuts_of([group], {"both": [0]}))
    assert (own_attributes(net), net.both.out_features) == (before, 12)


@for_each("make, root", [(Attention, "q"), (lambda: Attention(CONFIG), "q"), (Fused, "qkv")])
def test_heads_are_units_of_a_budget(make, root):
    net = seeded(lambda: Blocks(make), double=True)
    structure = discover(net, Example(TOKENS))
    assert {structure.groups[f"blocks.{i}.{root}"].size for i in range(2)} == {4}
    shown = [group["attributes"] for group in describe_structure(net, TOKENS)["groups"].values()]
    right = copy.deepcopy(net)
    plan = prune(net, TOKENS, {"criterion": "weight_l2", "amount": 0.5, "ignore": ["start"], "scope": "layer"}).plan
    for i, block in enumerate(net.blocks):
        gone = plan.neurons[f"blocks.{i}.{root}"]
        with torch.no_grad():
            right.blocks[i].out.weight[:, [n for n in gone if n < 16]] = 0
        assert block.out.in_features == 8
        assert [name for name in plan.attributes if f"blocks.{i}." in name] in shown
        assert {pair for name, pair in plan.attributes.items() if f"blocks.{i}." in name} <= {(4, 2), (16, 8)}
    assert (net(TOKENS) - right(TOKENS)).abs().max() < 1e-12


@for_each("name", CASES)
def test_a_pruned_model_is_loaded_with_its_numbers_and_a_whole_one_gets_its_own_back(name, tmp_path):
    make, x, plan, *_ = CASES[name]
    net = seeded(make, double=True)
    whole = copy.deepcopy(net)
    prune(net, x, plan)
    torch.save(net.state_dict(), tmp_path / "pruned.pt")
    loaded = load_pruned(lambda: seeded(make, double=True), tmp_path / "pruned.pt")
    assert torch.equal(loaded(x), net(x))
    with pruned_widths():
        loaded.load_state_dict(whole.state_dict())
    assert torch.equal(loaded(x), whole(x))
    assert all_sizes(loaded) == {}
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.save(twin.state_dict(), tmp_path / "again.pt")
        assert torch.equal(load_pruned(make().double().eval(), tmp_path / "again.pt")(x), net(x))


@for_each("name", CASES)
def test_where_a_file_does_not_say_them_they_are_found_again_on_an_example(name, tmp_path):
    make, x, plan, *_ = CASES[name]
    net = seeded(make, double=True)
    prune(net, x, plan)
    torch.save(dict(net.state_dict()), tmp_path / "bare.pt")
    (tmp_path / "folder").mkdir(exist_ok=True)
    save_file(net.state_dict(), tmp_path / "folder" / "model.safetensors")
    for file in ("bare.pt", "folder/model.safetensors", "folder"):
        loaded = load_pruned(lambda: make().double().eval(), tmp_path / file, example_inputs=x)
        assert torch.equal(loaded(x), net(x))
        assert all_sizes(loaded) == all_sizes(net)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.back = nn.Embedding(7, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.back(torch.relu(self.inner(self.embedding(x)))))


def test_a_folder_of_several_files_without_the_second_names_of_tied_tensors_is_loaded(tmp_path):
    net, x = seeded(Tied), torch.arange(6).view(2, 3)
    prune(net, x, {"inner": [2, 5]})
    state = {name: tensor for name, tensor in net.state_dict().items() if name != "head.weight"}
    files = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in state.items() if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    loaded = load_pruned(Tied, tmp_path).eval()
    assert torch.equal(loaded(x), net(x))
    assert loaded.head.weight is loaded.embedding.weight
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match=r"path=.*empty.*a folder with one of model.safetensors, pytorch_model.bin"):
        load_pruned(Tied, tmp_path / "empty")


class Renamed(Tied):
    def save_pretrained(self, folder: Any) -> None:
        state = {name: tensor for name, tensor in self.state_dict().items() if name != "head.weight"}
        save_file(written_names(self, state), folder / "model.safetensors")


def written_names(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("inner", "mlp.first").replace("back", "mlp.second"): t for name, t in state.items()}


def test_names_that_a_library_writes_instead_of_the_models_own_are_found(tmp_path, monkeypatch):
    library = types.ModuleType("transformers.core_model_loading")
    library.revert_weight_conversion = written_names
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, library.__name__, library)
    net, x = seeded(Renamed), torch.arange(6).view(2, 3)
    prune(net, x, {"inner": [2, 5]})
    net.save_pretrained(tmp_path)
    loaded = load_pruned(Renamed, tmp_path).eval()
    assert torch.equal(loaded(x), net(x))
    library.revert_weight_conversion = None  # of another version
    with pytest.raises(PruningError, match=r"another architecture than Renamed: Missing key\(s\): back.bias"):
        load_pruned(Renamed, tmp_path)


class Followed(nn.Module):
    """A network, and a target network that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.target = Viewed(), Viewed()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_the_numbers_of_a_network_that_follows_another_change_with_it():
    model = seeded(Followed, double=True)
    structure = joined(discover(model, Example(IMAGES)), {"target": "net"})
    right = silenced(model, {"net.head.weight": [2], "target.head.weight": [2]})
    cut(model, cuts_of([structure.groups["net.conv"]], {"net.conv": [2]}))
    assert (model.net.channels, model.target.channels) == (7, 7)
    for name in ("net", "target"):
        difference = getattr(model, name)(IMAGES) - getattr(right, name)(IMAGES)
        assert difference.abs().max() < 1e-12


class Uneven(nn.Module):
    """Runs if each part loses as many neurons as the other, to which nothing but a plan can see."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 12
        self.both, self.one, self.two = nn.Linear(6, 12), nn.Linear(7, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, two = torch.relu(self.both(x)).split([self.width // 2 + 1, self.width // 2 - 1], 1)
        return self.one(one) * self.two(two)


def test_what_is_right_for_some_neurons_only_is_left_to_plans():
    net = seeded(Uneven, double=True)
    assert discover(net, Example(VECTORS)).failed == {"both"}
    right = silenced(net, {"one.weight": [0], "two.weight": [4]})
    report = prune(net, VECTORS, {"both": [0, 11]})
    assert report.plan.attributes == {"width": (12, 10)}
    assert (net(VECTORS) - right(VECTORS)).abs().max() < 1e-12


def test_files_without_numbers_and_of_other_architectures_change_none():
    net, other = seeded(Viewed, double=True), seeded(Viewed, double=True)
    prune(net, IMAGES, {"conv": [0, 1]})
    bare = dict(net.state_dict())  # what other libraries write
    with pruned_widths():
        other.load_state_dict(bare)
    assert (other.channels, other.conv.out_channels) == (8, 6)
    state = saved(net)
    state._metadata[""]["sizes_after_cuts"] = {"channels": [9, 6], "gone": [8, 6], "depth": "six", "head": [3]}
    other = seeded(Viewed, double=True)
    with pruned_widths():
        other.load_state_dict(state)
    assert (other.channels, other.depth) == (8, 8)
    other = seeded(Viewed, double=True)
    with pytest.raises(RuntimeError, match="Missing key"), conforming(other, net.state_dict()):
        other.load_state_dict({"conv.bias": net.conv.bias})
    assert (other.channels, other.conv.out_channels, all_sizes(other)) == (8, 8, {})


def test_plans_of_earlier_versions_have_no_attributes_and_wrong_ones_are_refused():
    document = PruningPlan({"conv": (0,)}, {"conv": 8}, attributes={"channels": (8, 7)}).to_dict()
    assert PruningPlan.from_dict({n: v for n, v in document.items() if n != "attributes"}).attributes == {}
    for wrong in ([1], {"channels": 7}, {"channels": [8]}, {"channels": [8, 0]}, {"channels": [8, "7"]}):
        with pytest.raises(ArgumentError, match="attributes with two whole numbers each"):
            PruningPlan.from_dict(document | {"attributes": wrong})


class Module(Plain):
    def __init__(self) -> None:
        super().__init__(Viewed())


def test_a_run_with_averages_is_cut_resumed_and_loaded(tmp_path):
    def run(stop: int, ckpt: Any = None) -> tuple[Module, Any, dict[int, int]]:
        torch.manual_seed(1)
        module, averaged = Module(), EMAWeightAveraging()
        probe = Probe("on_train_epoch_end", lambda *_: averaged._average_model.module.net.channels)
        callbacks = [pruner("weight_l2", amount=0.5, start_epoch=1), averaged, probe, _Saving(stop, tmp_path)]
        fit(module, callbacks, loader(16), max_epochs=3, ckpt=ckpt).save_checkpoint(tmp_path / "end.ckpt")
        return module, callbacks[0], probe.seen

    module, callback, seen = run(2)
    assert callback.plan.attributes == {"net.channels": (8, 4)}
    assert (module.net.channels, module.net.conv.out_channels, module.net.depth) == (4, 4, 8)
    assert seen == {0: 8, 1: 4, 2: 4}
    resumed, again, seen = run(9, tmp_path / "2.ckpt")
    assert seen == {2: 4}
    assert again.plan == callback.plan
    assert_equal(resumed.state_dict(), module.state_dict())
    loaded = load_pruned(Module, tmp_path / "end.ckpt")
    assert loaded.net.channels == 4
    assert_equal(loaded.state_dict(), module.state_dict())


@pytest.mark.filterwarnings("ignore:.*1 round taken back", "ignore:.*all cuts have been taken back")
@pytest.mark.parametrize("resumed", [False, True])
def test_a_cut_that_is_taken_back_takes_back_the_numbers(tmp_path, resumed):
    def run(stop: int, ckpt: Any = None) -> tuple[Any, Any]:
        torch.manual_seed(1)
        module, options = Scored(lambda scored: scored.net.channels / 8, Viewed()), {"monitor": "val_score"}
        callback = pruner("weight_l2", amount=0.5, start_epoch=1, max_drop=0.1, recovery_epochs=2, **options)
        trainer = fit(module, [callback, _Saving(stop, tmp_path)], loader(16), max_epochs=4, ckpt=ckpt)
        assert trainer.current_epoch == 4
        return module, callback

    module, callback = run(2)
    if resumed:  # from after the cut, and before it is judged
        module, callback = run(9, tmp_path / "2.ckpt")
    assert (module.net.channels, module.net.conv.out_channels) == (8, 8)
    assert all_sizes(module) == {}
    assert [one.plan.attributes for one in callback.rounds.undone] == [{"net.channels": (8, 4)}]


class _Saving(L.Callback):
    """Writes a checkpoint when an epoch begins."""

    def __init__(self, epoch: int, folder: Any) -> None:
        self.epoch, self.folder = epoch, folder

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch + 1 == self.epoch:
            assert pl_module.net.channels == 4
            trainer.save_checkpoint(self.folder / f"{self.epoch}.ckpt")
