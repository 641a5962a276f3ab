"""A pruned model is loaded by the class that builds it whole."""

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_neurons import (
    NeuronPruningCallback,
    NeuronSensitivityCallback,
    PrunedCheckpointMixin,
    load_pruned,
    prune,
    pruned_widths,
)
from lightning_neurons.errors import ArgumentError, PruningError
from tests.callbacks.modules import Net, Plain, fit, loader, trainer_of
from tests.callbacks.pruned import assert_equal
from tests.models import pictures
from tests.pruning.registered import Scaled

IMAGES = pictures(3, size=6, channels=1)[0]


class Configured(Plain):
    """Remembers what it was made with."""

    def __init__(self, width: int, rate: float = 1e-2, extra: Any = None) -> None:
        super().__init__(lr=rate)
        self.save_hyperparameters()
        self.net.fc1, self.net.fc2 = nn.Linear(6, width), nn.Linear(width, 3)


class Larger(Configured):
    """Has a layer more."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.net.fc3 = nn.Linear(2, 2)


class Mixed(PrunedCheckpointMixin, Configured):
    """Loads by itself."""


class Renaming(Configured):
    """Its checkpoints may have the names of an earlier version."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.replace("net.", "network."): tensor for name, tensor in state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.replace("network.", "net."): tensor for name, tensor in state.items()}


class Counting(PrunedCheckpointMixin, Configured):
    """Has something of its own in a checkpoint, and leaves the rest to others."""

    seen = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seen"] = 7

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = checkpoint["seen"]
        super().on_load_checkpoint(checkpoint)


class CountingAlone(Counting):
    """The same, without knowing of anybody else."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = checkpoint["seen"]


class RenamingMixed(PrunedCheckpointMixin, Renaming):
    """Renames behind the mixin."""


def pruned(module: Plain, folder: Path) -> tuple[Plain, Path]:
    """A module that has been pruned in training, and its checkpoint."""
    callback = NeuronPruningCallback("weight_l2", amount=0.4, start_epoch=1)
    trainer = fit(module, [callback], loader(16), max_epochs=2)
    trainer.save_checkpoint(folder / "pruned.ckpt")
    assert len(callback.plan) > 5
    return module.eval(), folder / "pruned.ckpt"


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Configured, Path]:
    torch.set_num_threads(1)
    return pruned(Configured(12, rate=2e-2), tmp_path_factory.mktemp("pruned"))


def assert_same(ours: nn.Module, theirs: nn.Module, inputs: Any) -> None:
    assert repr(ours) == repr(theirs), "sizes are also what attributes say"
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    with torch.no_grad():
        found, expected = (nets.eval()(inputs) for nets in (ours, theirs))
    assert torch.equal(found, expected)


def test_a_module_is_loaded_as_the_class_it_is_with_its_settings(configured):
    live, path = configured
    loaded = load_pruned(Configured, str(path))
    assert type(loaded) is Configured
    assert_same(loaded, live, IMAGES)
    assert dict(loaded.hparams) == {"width": 12, "rate": 2e-2, "extra": None}
    assert loaded.lr == 2e-2
    assert loaded.net.fc1.out_features < 12
    assert not loaded._load_state_dict_pre_hooks
    with pytest.raises(PruningError, match=r"(?s)size mismatch for net.conv1.weight.*load_pruned\(Configured, path\)"):
        Configured.load_from_checkpoint(path)


class OfOneself(Plain):
    """Has layers of a type that the package does not know by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net.fc1, self.net.fc2 = Scaled(6, 12), Scaled(12, 3)


def test_registered_layers_are_pruned_in_training_and_loaded(tmp_path):
    live, path = pruned(OfOneself(), tmp_path)
    loaded = load_pruned(OfOneself, path)
    assert_same(loaded, live, IMAGES)
    widths = [(layer.inputs, layer.units) for layer in (loaded.net.fc1, loaded.net.fc2)]
    assert widths == [(live.net.conv2.out_channels, live.net.fc1.units), (live.net.fc1.units, 3)]
    assert loaded.net.fc1.units < 12
    assert loaded.net.fc1.inputs < 6


def test_what_is_loaded_can_be_copied_trained_and_pruned_again(configured):
    live, path = configured
    loaded = load_pruned(Configured, path)
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert type(twin) is Configured
        assert_same(twin, live, IMAGES)
    fit(loaded, [], loader(16), max_epochs=1)
    assert not torch.equal(loaded.net.fc1.weight, live.net.fc1.weight)
    before = loaded.net.fc1.out_features
    callback = NeuronPruningCallback("weight_l2", amount=0.4, start_epoch=1)
    fit(loaded, [callback], loader(16), max_epochs=2)
    assert loaded.net.fc1.out_features == before - len(callback.plan.neurons["net.fc1"]) < before


def test_arguments_go_to_load_from_checkpoint(configured):
    live, path = configured
    places = []

    def where(storage: Any, location: str) -> Any:
        places.append(location)
        return storage

    loaded = load_pruned(Configured, path, map_location=where, rate=0.5)
    assert places
    assert (loaded.lr, loaded.hparams.rate, loaded.hparams.width) == (0.5, 0.5, 12)
    assert_same(loaded, live, IMAGES)
    with pytest.warns(UserWarning, match="not in the checkpoint: .*net.fc3.weight"):
        assert load_pruned(Larger, path, strict=False).net.fc3.out_features == 2


MIXED = [Mixed, Counting, CountingAlone, RenamingMixed]
WAYS = [*((one, "load_pruned") for one in [*MIXED, Renaming]), *((one, "load_from_checkpoint") for one in MIXED)]


@pytest.mark.parametrize("module_class, way", WAYS)
def test_a_class_of_any_kind_is_loaded_and_its_own_hook_is_called(tmp_path, module_class, way):
    live, path = pruned(module_class(12), tmp_path)
    loaded = load_pruned(module_class, path) if way == "load_pruned" else module_class.load_from_checkpoint(path)
    assert type(loaded) is module_class
    assert_same(loaded, live, IMAGES)
    assert getattr(loaded, "seen", 7) == 7


@pytest.mark.parametrize("module_class", [Configured, Mixed])
def test_a_whole_checkpoint_is_loaded_as_well(tmp_path, module_class):
    module = module_class(5)
    trainer = fit(module, [], loader(16))
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    assert_same(load_pruned(module_class, tmp_path / "whole.ckpt"), module, IMAGES)


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # of LightningCLI
@pytest.mark.parametrize("any_class", [False, True])
def test_a_checkpoint_of_a_run_by_the_command_line_is_loaded(tmp_path, monkeypatch, any_class):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = LightningCLI(
        L.LightningModule if any_class else Configured,
        args=[f"--model={__name__}.Configured"] * any_class + ["--model.width=12"],
        subclass_mode_model=any_class,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
    )
    cli.trainer = trainer_of([NeuronPruningCallback("weight_l2", amount=0.4)], max_epochs=2)
    cli.trainer.fit(cli.model, loader(16), loader(16))
    cli.trainer.save_checkpoint(tmp_path / "cli.ckpt")
    loaded = load_pruned(Configured, tmp_path / "cli.ckpt")
    assert type(loaded) is Configured
    assert_same(loaded, cli.model, IMAGES)


def test_what_makes_no_module_is_refused(configured):
    for wrong in ("Net", None, int, [Net], lambda: "Net"):
        with pytest.raises(ArgumentError, match=r"(?s)model=.*expected a (LightningModule class|function that)"):
            load_pruned(wrong, configured[1])
        with pytest.raises(ArgumentError, match=r"(?s)model=.*takes no further arguments"):
            load_pruned(Net(), configured[1], dropout=0.5)


@pytest.fixture
def state(configured, tmp_path) -> Path:
    """A state dict of the network in the module."""
    torch.save(configured[0].net.state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_a_function_or_a_module_is_as_good_as_a_class(configured, state):
    live, path = configured

    def make(width: int) -> nn.Module:
        return Configured(width).net

    given = make(12)
    assert load_pruned(given, state) is given
    for loaded in (given, load_pruned(make, state, width=12), load_pruned(lambda: make(12), state)):
        assert_same(loaded, live.net, IMAGES)
    assert_same(load_pruned(lambda: Configured(12), path), live, IMAGES)
    assert_same(load_pruned(Renaming(12), path).net, live.net, IMAGES)


def test_a_module_that_cannot_be_loaded_stays_as_it_was(state):
    net = Configured(12).net
    net.more = nn.Linear(2, 2)
    before, attributes = {name: tensor.clone() for name, tensor in net.state_dict().items()}, repr(net)
    with pytest.raises(PruningError, match=r"net.pt is of another architecture than Net: Missing key\(s\): more.bias"):
        load_pruned(net, state)
    assert repr(net) == attributes
    assert_equal(net.state_dict(), before)


def test_inside_of_a_context_whoever_builds_and_loads_a_model_takes_its_widths(configured, state):
    def of_a_library(path: Path) -> nn.Module:
        net = Configured(12).net
        net.load_state_dict(torch.load(path, weights_only=True), strict=True)
        return net

    live, path = configured
    own = nn.Module.load_state_dict
    with pruned_widths():
        assert_same(Configured.load_from_checkpoint(path), live, IMAGES)
        assert_same(of_a_library(state), live.net, IMAGES)
    assert nn.Module.load_state_dict is own
    with pytest.raises(RuntimeError, match=r"size mismatch for conv1\.weight"):
        of_a_library(state)
    with pytest.raises(ZeroDivisionError), pruned_widths():
        raise ZeroDivisionError
    assert nn.Module.load_state_dict is own


def test_after_an_error_in_the_context_a_module_has_its_own_sizes_again(state):
    other = Configured(12).net
    other.more = nn.Linear(2, 2)
    before = {name: tensor.shape for name, tensor in other.state_dict().items()}
    attributes = repr(other)
    with pruned_widths(), pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(torch.load(state, weights_only=True))
    assert {name: tensor.shape for name, tensor in other.state_dict().items()} == before
    assert repr(other) == attributes


def test_a_run_without_the_pruning_callback_says_what_loads_the_checkpoint(configured):
    module = Configured(12)
    with pytest.raises(PruningError, match=r"(?s)size mismatch.*load_pruned.*with the NeuronPruningCallback"):
        fit(module, [NeuronSensitivityCallback()], loader(16), ckpt=configured[1], max_epochs=3)
    assert not module._load_state_dict_pre_hooks


def test_other_errors_of_loading_are_those_of_torch():
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        Configured(12).load_state_dict({})
    assert not isinstance(caught.value, PruningError)
    wide = Configured(13).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        Configured(12).load_state_dict(wide)
    assert not isinstance(caught.value, PruningError)


def test_a_file_of_another_class_is_refused_with_what_is_missing(tmp_path, configured):
    torch.save({"fc1.weight": torch.zeros(2, 3, 3, 3)}, tmp_path / "net.pt")
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*conv1.weight.*size mismatch for fc1.weight"):
        load_pruned(Net, tmp_path / "net.pt")
    with pytest.raises(RuntimeError, match=r"Missing key.*net.fc3.weight"):
        load_pruned(Larger, configured[1])


CONTENTS: dict[str, Any] = {
    "tensor": torch.zeros(3),
    "list": [torch.zeros(3)],
    "numbers": {"conv1.weight": 1.0},
    "nested": {"model": {"conv1.weight": torch.zeros(3)}},
    "nothing": None,
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("module_class", [Net, Configured])
def test_a_file_with_something_else_is_refused_with_a_reason(tmp_path, module_class, content):
    torch.save(CONTENTS[content], tmp_path / "other.pt")
    with pytest.raises(ArgumentError, match=r"path=.*other.pt.*expected a"):
        load_pruned(module_class, tmp_path / "other.pt")


def test_checkpoints_and_state_dicts_are_not_confused(tmp_path, configured):
    torch.save(configured[0].state_dict(), tmp_path / "state.pt")
    with pytest.raises(ArgumentError, match=r"path=.*state.pt.*expected a"):
        load_pruned(Configured, tmp_path / "state.pt")
    with pytest.raises(ArgumentError, match=r"path=.*pruned.ckpt.*expected a file with the state dict of a Net"):
        load_pruned(Net, configured[1])


class Harmless:
    """Stands for an object that runs code when it is loaded."""


@pytest.mark.parametrize("module_class", [Net, Configured])
def test_no_object_is_unpickled(tmp_path, module_class):
    live, path = Configured(12, extra=Harmless()), tmp_path / "object.ckpt"
    trainer_of(max_epochs=1).fit(live, loader(16), loader(16))
    live.trainer.save_checkpoint(path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_pruned(module_class, path)
    if module_class is Configured:
        assert isinstance(load_pruned(Configured, path, weights_only=False).hparams.extra, Harmless)


@pytest.mark.parametrize("module_class", [Net, Configured])
def test_a_file_that_is_not_there_or_not_of_torch_says_so(tmp_path, module_class):
    with pytest.raises(FileNotFoundError):
        load_pruned(module_class, tmp_path / "nothing.ckpt")
    (tmp_path / "text.ckpt").write_text("weights")
    with pytest.raises(ArgumentError, match=r"path=.*text.ckpt \(UnpicklingError.*expected a"):
        load_pruned(module_class, tmp_path / "text.ckpt")


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


def test_a_lazy_model_takes_the_widths_of_the_file(tmp_path):
    net = lazy()
    net(IMAGES)
    prune(net, IMAGES, {"0": [1, 4]})
    torch.save(net.state_dict(), tmp_path / "net.pt")
    loaded = load_pruned(lazy, tmp_path / "net.pt")
    assert (loaded[0].in_channels, loaded[0].out_channels, loaded[4].in_features) == (1, 4, 64)
    assert torch.equal(loaded.eval()(IMAGES), net.eval()(IMAGES))
