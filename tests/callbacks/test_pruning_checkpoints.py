"""A Trainer takes checkpoints from before a cut into models after it, and the other way round."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_neurons import NeuronPruningCallback, load_pruned
from tests.callbacks.modules import Net, OldNamespace, Plain, loader, trainer_of

WIDTHS = {"conv1": 4, "conv2": 6, "fc1": 8}
EPOCHS = 3

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")


class Aging(Plain):
    """Logs its age, by which either the first or the last checkpoint is the best."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("age", float(self.current_epoch))
        return super().validation_step(batch, batch_idx)


def pruner(criterion: str = "weight_l2", **kwargs: Any) -> NeuronPruningCallback:
    return NeuronPruningCallback(criterion, **({"amount": 0.4, "start_epoch": 1} | kwargs))


def saving(folder: Path, **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", **({"save_top_k": -1, "monitor": "age"} | kwargs))


def train(callbacks: list[Any], module: Any = None, ckpt: Path | None = None) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module = Aging() if module is None else module
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = trainer_of(callbacks, max_epochs=EPOCHS, enable_checkpointing=checkpoints)
    trainer.fit(module, loader(16), loader(24, seed=1), ckpt_path=ckpt)
    return trainer, module


def widths(module: Any) -> dict[str, int]:
    return {name: len(getattr(module.net, name).weight) for name in WIDTHS}


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def weights(path: Any) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint from before the only cut, and one from after it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("files")
    train([pruner(), saving(folder)])
    return folder / "epoch=0.ckpt", folder / f"epoch={EPOCHS - 1}.ckpt"


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("mode, epoch", [("min", 0), ("max", EPOCHS - 1)])
def test_the_best_checkpoint_is_run_whatever_its_widths(tmp_path, mode, epoch, stage):
    best = saving(tmp_path, mode=mode)
    trainer, module = train([pruner(), best])
    pruned = widths(module)
    assert pruned != WIDTHS
    assert Path(best.best_model_path).name == f"epoch={epoch}.ckpt"
    (found,) = getattr(trainer, stage)(module, loader(24, seed=1), ckpt_path="best", verbose=False)
    assert widths(module) == (WIDTHS if epoch == 0 else pruned)
    loaded = load_pruned(Aging, best.best_model_path)
    (expected,) = getattr(trainer_of(), stage)(loaded, loader(24, seed=1), verbose=False)
    name = {"validate": "val_loss", "test": "test_loss"}[stage]
    assert found[name] == expected[name]
    assert same(module, loaded)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_whole_module_takes_a_pruned_checkpoint_where_the_callback_is_and_nowhere_else(files, stage):
    module, (_, pruned) = Aging(), files
    with pytest.raises(RuntimeError, match=r"size mismatch for net.conv1.weight"):
        getattr(trainer_of(), stage)(module, loader(24, seed=1), ckpt_path=pruned, verbose=False)
    assert widths(module) == WIDTHS
    getattr(trainer_of([pruner()]), stage)(module, loader(24, seed=1), ckpt_path=pruned, verbose=False)
    assert same(module, load_pruned(Aging, pruned))


def test_a_module_can_go_to_and_fro_between_widths(files):
    module, trainer = Aging(), trainer_of([pruner()])
    for path in (files[1], files[0], files[1], files[0]):
        trainer.validate(module, loader(24, seed=1), ckpt_path=path, verbose=False)
        assert same(module, load_pruned(Aging, path))
    assert widths(module) == WIDTHS


@pytest.mark.parametrize("again", [False, True], ids=["new callback", "same callback"])
def test_training_goes_on_from_before_the_cut_in_a_module_that_has_been_cut(tmp_path, again):
    callback = pruner()
    _, live = train([callback, saving(tmp_path / "first")])
    whole = copy.deepcopy(live)
    assert widths(live) != WIDTHS
    callback = callback if again else pruner()
    train([callback, saving(tmp_path / "first", save_top_k=0)], live, tmp_path / "first" / "epoch=0.ckpt")
    assert same(live, whole)
    assert [one.epoch for one in callback.rounds.done] == [1]
    assert callback.rounds.widths() == {f"net.{n}": w for n, w in widths(live).items()} | {"net.fc2": 3}


def test_files_with_weights_alone_are_run_and_loaded(tmp_path):
    weights_only = saving(tmp_path, save_weights_only=True)
    trainer, module = train([pruner(), weights_only])
    pruned = copy.deepcopy(module)
    for epoch in (0, EPOCHS - 1):
        path = tmp_path / f"epoch={epoch}.ckpt"
        assert "optimizer_states" not in torch.load(path, weights_only=True)
        trainer.validate(module, loader(24, seed=1), ckpt_path=path, verbose=False)
        assert same(module, load_pruned(Aging, path))
        assert same(module, pruned) == (epoch > 0)


def other(change: Callable[[Net], None]) -> Aging:
    module = Aging()
    change(module.net)
    return module


OTHERS: dict[str, tuple[Callable[[Net], None], str]] = {
    "a layer more": (lambda net: setattr(net, "fc3", nn.Linear(2, 2)), "Missing key.*net.fc3.weight"),
    "a layer less": (lambda net: delattr(net, "norm2"), "Unexpected key.*net.norm2.weight"),
    "another name": (lambda net: setattr(net, "fc9", net._modules.pop("fc1")), "Missing key.*net.fc9.weight"),
    "another rank": (lambda net: setattr(net, "fc1", nn.Conv2d(6, 8, 1)), "size mismatch for net.fc1.weight"),
    "another bias": (lambda net: setattr(net, "fc1", nn.Linear(6, 8, bias=False)), "Unexpected key.*net.fc1.bias"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("which", [0, 1], ids=["whole", "pruned"])
def test_a_checkpoint_of_another_architecture_fails_as_torch_fails(files, name, which):
    change, message = OTHERS[name]
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        other(change).load_state_dict(weights(files[which]))
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        trainer_of([pruner()]).validate(
            other(change), loader(24, seed=1), ckpt_path=files[which], weights_only=True, verbose=False
        )


def test_nothing_is_left_on_the_module_by_any_stage(files):
    trainer, module = train([pruner()])
    assert not module._load_state_dict_pre_hooks
    for stage in ("validate", "test"):
        getattr(trainer, stage)(module, loader(24, seed=1), ckpt_path=files[0], verbose=False)
        assert not module._load_state_dict_pre_hooks
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict(weights(files[1]))
    assert same(pickle.loads(pickle.dumps(module)), module)


class Crash(L.Callback):
    """Somebody's mistake."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        setattr(self, hook, self.fail)

    def fail(self, *_: Any) -> None:
        raise ArithmeticError("somebody's mistake")


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end", "on_fit_end"])
def test_nothing_is_left_on_the_module_by_an_exception(hook):
    module = Aging()
    with pytest.raises(ArithmeticError):
        train([pruner(), Crash(hook)], module)
    assert not module._load_state_dict_pre_hooks


def test_nothing_is_left_on_the_module_by_a_checkpoint_that_cannot_be_loaded(files):
    module = other(OTHERS["a layer more"][0])
    with pytest.raises(RuntimeError, match="Missing key"):
        trainer_of([pruner()]).validate(module, loader(24, seed=1), ckpt_path=files[1], verbose=False)
    assert not module._load_state_dict_pre_hooks


def test_the_old_namespace_takes_its_own_pruned_checkpoints(tmp_path):
    import pytorch_lightning as pl

    torch.manual_seed(0)
    best = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", monitor="val_loss", mode="max")
    module = OldNamespace()
    trainer = trainer_of([pruner(), best], of=pl, max_epochs=EPOCHS, enable_checkpointing=True)
    trainer.fit(module, loader(16), loader(24, seed=1))
    last = copy.deepcopy(module)
    for epoch in (0, EPOCHS - 1):
        path = tmp_path / f"epoch={epoch}.ckpt"
        trainer.validate(module, loader(24, seed=1), ckpt_path=path, verbose=False)
        assert same(module, load_pruned(OldNamespace, path))
    assert same(module, last)


def test_two_pruning_callbacks_are_refused_before_anything_has_happened():
    callbacks, module = [pruner(), pruner("random", start_epoch=2)], Aging()
    whole = copy.deepcopy(module)
    with pytest.raises(MisconfigurationException, match="a Trainer can have one pruning callback"):
        train(callbacks, module)
    assert same(module, whole)
    assert not module._load_state_dict_pre_hooks


def test_two_trainers_prune_one_after_the_other_and_their_checkpoints_are_loaded(tmp_path):
    _, module = train([pruner(amount=0.2), saving(tmp_path / "first")])
    once = copy.deepcopy(module)
    train([pruner("random", amount=0.3), saving(tmp_path / "second")], module)
    assert all(widths(module)[name] <= width for name, width in widths(once).items())
    assert widths(module) != widths(once)
    for folder, expected in (("first", once), ("second", module)):
        assert same(load_pruned(Aging, tmp_path / folder / f"epoch={EPOCHS - 1}.ckpt"), expected)
    trainer_of([pruner()]).validate(
        module, loader(24, seed=1), ckpt_path=tmp_path / "first" / f"epoch={EPOCHS - 1}.ckpt", verbose=False
    )
    assert same(module, once)
