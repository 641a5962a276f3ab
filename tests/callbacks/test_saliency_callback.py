"""The callback that shows what predictions rest on: the same pictures, and the maps that ``saliency`` gives of them."""

import copy
import pickle
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neurons import SaliencyCallback, saliency
from tests.callbacks.modules import OldNamespace, Plain, fit, loader, trainer_of
from tests.callbacks.pictured import (
    SHUFFLED,
    ImageLogger,
    Mapped,
    files,
    is_picture,
    listed,
    mapped,
    place_of,
    same_pictures,
    shown_in,
    without_matplotlib,  # noqa: F401
)
from tests.callbacks.pruned import Probe
from tests.callbacks.studied import NoForward, TwoNetworks, samples, sorted_by_class

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "times input": {"method": "grad_x_input", "absolute": True},
    "smoothgrad": {"method": "smoothgrad", "of": "probability"},
    "integrated": {"method": "integrated_gradients"},
    "grad_cam": {"method": "grad_cam", "layer": "net.conv1"},
    "grad_cam, last layer": {"method": "grad_cam"},
    "blurred loss": {"of": "loss", "smoothing": 1.0},
}


def by_hand(module: Any, found: Any, **settings: Any) -> Tensor:
    module.eval()
    return saliency(module, found.inputs, **({"target": found.targets} | settings))


@pytest.mark.parametrize("settings, stage", list(zip(SETTINGS, cycle(["fit", "validate"]))))
def test_maps_are_those_of_saliency_with_the_labels(settings, stage):
    module, callback = Plain(), SaliencyCallback(**SETTINGS[settings])
    if stage == "fit":
        fit(module, [callback], max_epochs=2)
    else:
        trainer_of([callback]).validate(module, loader(24, seed=1), verbose=False)
    assert torch.equal(callback.found.maps, by_hand(module, callback.found, **SETTINGS[settings]))
    assert callback.found.maps.abs().max() > 0
    assert callback.found.inputs.shape == callback.found.maps.shape == (8, 1, 6, 6)


def test_the_default_is_the_gradient_of_each_labels_logit():
    module, callback = Plain(), SaliencyCallback()
    fit(module, [callback])
    inputs = callback.found.inputs.clone().requires_grad_()
    module.eval()(inputs)[torch.arange(8), callback.found.targets].sum().backward()
    assert torch.allclose(callback.found.maps, inputs.grad, atol=1e-7)


@pytest.mark.parametrize("target", [1, ("net.conv2", 3), "net.fc1"], ids=str)
def test_a_target_that_is_given_takes_the_place_of_the_labels(target):
    module, callback = Plain(), SaliencyCallback(target=target)
    fit(module, [callback])
    assert callback.found.targets is None
    assert torch.equal(callback.found.maps, by_hand(module, callback.found, target=target))


def test_pictures_are_validation_samples_of_all_classes_with_their_labels():
    callback = SaliencyCallback(max_samples=6)
    fit(Plain(), [callback], val=sorted_by_class(0, 1, 2), num_sanity_val_steps=0)
    pictures, labels = samples(48)
    places = [place_of(row, pictures) for row in callback.found.inputs]
    assert [labels[place].tolist() for place in places] == [[y] for y in callback.found.targets.tolist()]
    assert {*callback.found.targets.tolist()} == {0, 1, 2}
    assert len({place[0] for place in places}) == 6


@pytest.mark.filterwarnings(SHUFFLED)
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_epoch_shows_the_same_pictures(shuffle):
    callback = SaliencyCallback()
    probe = Probe("on_validation_end", lambda *_: copy.deepcopy(callback.found))
    fit(Plain(), [callback, probe], val=loader(48, 4, 1, shuffle=shuffle), max_epochs=3)
    first, *others = probe.seen.values()
    assert len(others) == 2
    assert all(same_pictures(one, first) for one in others)
    assert not any(torch.equal(one.maps, first.maps) for one in others)


@pytest.mark.filterwarnings(SHUFFLED, "ignore:Checkpoint directory .* exists")
def test_a_resumed_run_goes_on_with_the_pictures_of_the_checkpoint(tmp_path):
    first, second, other = (SaliencyCallback() for _ in range(3))

    def train(callback: Any, seed: int, epochs: int, ckpt: Path | None = None) -> Any:
        L.seed_everything(seed, verbose=False)
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        val = loader(48, 4, 1, shuffle=True)
        return fit(Plain(), [callback, saving], val=val, ckpt=ckpt, max_epochs=epochs, enable_checkpointing=True)

    train(first, 0, 2)
    path = tmp_path / "epoch=1.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"][first.state_key]
    assert torch.equal(state["inputs"], first.found.inputs)
    assert torch.equal(state["labels"], first.found.targets)
    assert state["last"] == 1
    module = train(second, 5, 3, path).lightning_module
    assert same_pictures(second.found, first.found)
    assert torch.equal(second.found.maps, by_hand(module, second.found))
    train(other, 5, 1)
    assert not torch.equal(other.found.inputs, first.found.inputs), "another order shows other pictures"


def test_a_state_from_before_any_measurement_holds_no_pictures():
    callback = SaliencyCallback()
    callback.load_state_dict(SaliencyCallback().state_dict())
    fit(Plain(), [callback])
    assert len(callback.found.inputs) == 8


@pytest.mark.parametrize("every, steps", [(1, [3, 7, 11, 15]), (2, [7, 15]), (3, [11])])
def test_every_n_epochs(tmp_path, every, steps):
    trainer = fit(Plain(), [SaliencyCallback(every_n_epochs=every)], logger=TensorBoardLogger(tmp_path), max_epochs=4)
    assert shown_in(trainer.log_dir) == {"saliency": steps}


def test_the_latest_picture_lies_in_the_folder_with_its_caption(tmp_path):
    callback = SaliencyCallback(method="smoothgrad", of="probability")
    trainer = fit(Plain(), [callback], logger=TensorBoardLogger(tmp_path), max_epochs=2)
    assert files(trainer.log_dir) == {"pictures/saliency.png", "pictures/pictures.json"}
    assert is_picture(trainer.log_dir, "saliency.png")
    (entry,) = listed(trainer.log_dir, "pictures")
    assert entry == {
        "file": "saliency.png", "title": "Saliency", "caption": "smoothgrad of the probability, after epoch 1",
    }  # fmt: skip
    trainer = trainer_of([callback], logger=TensorBoardLogger(tmp_path / "again"))
    trainer.validate(Plain(), loader(24, seed=1), verbose=False)
    assert listed(trainer.log_dir, "pictures")[0]["caption"] == "smoothgrad of the probability"


def test_a_second_callback_has_a_picture_of_its_own(tmp_path):
    callbacks = [SaliencyCallback(), SaliencyCallback(method="grad_cam")]
    trainer = fit(Plain(), callbacks, logger=TensorBoardLogger(tmp_path), max_epochs=2)
    assert shown_in(trainer.log_dir) == {"saliency": [3, 7], "saliency_2": [3, 7]}
    assert [one["file"] for one in listed(trainer.log_dir, "pictures")] == ["saliency.png", "saliency_2.png"]
    pictures = [(Path(trainer.log_dir) / "pictures" / f"{n}.png").read_bytes() for n in ("saliency", "saliency_2")]
    assert pictures[0] != pictures[1]


def test_a_trial_run_writes_nothing(tmp_path):
    memory = ImageLogger()
    fit(Plain(), [SaliencyCallback()], logger=[memory, TensorBoardLogger(tmp_path)], fast_dev_run=True)
    assert memory.images == []
    assert list(tmp_path.rglob("*")) == []


def test_without_a_logger_it_is_measured_and_nothing_is_written(tmp_path):
    callback = SaliencyCallback()
    fit(Plain(), [callback])
    assert callback.found is not None
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_it_is_said_once_and_measured(tmp_path):
    callback = SaliencyCallback()
    with pytest.warns(UserWarning, match=r"pip install 'lightning_neurons\[figures\]'") as told:
        trainer = fit(Plain(), [callback], logger=TensorBoardLogger(tmp_path), max_epochs=2)
    trainer.validate(Plain(), loader(24, seed=1), verbose=False)
    assert len([one for one in told if "matplotlib" in str(one.message)]) == 1
    assert callback.found.maps.abs().max() > 0
    assert files(trainer.log_dir) == set()
    assert shown_in(trainer.log_dir) == {}


@pytest.mark.parametrize("of, make", [(L, NoForward), (pytorch_lightning, OldNamespace)])
def test_a_module_without_a_forward_is_run_by_its_one_network(of, make):
    module, callback = make(), SaliencyCallback()
    fit(module, [callback], of=of)
    assert torch.equal(callback.found.maps, by_hand(module.net, callback.found))


@pytest.mark.parametrize("name", ["net", "other"])
def test_a_forward_of_ones_own_says_where_the_logits_come_from(name):
    module, callback = TwoNetworks(), SaliencyCallback(forward=lambda m, inputs: m.get_submodule(name)(inputs))
    fit(module, [callback])
    assert torch.equal(callback.found.maps, by_hand(module.get_submodule(name), callback.found))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_pictures_are_drawn_at_any_precision(tmp_path, precision):
    callback = SaliencyCallback()
    trainer = fit(Plain(), [callback], logger=TensorBoardLogger(tmp_path), precision=precision)
    assert is_picture(trainer.log_dir, "saliency.png")
    assert callback.found.maps.isfinite().all()


class Reads(Plain):
    """A network of tokens."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 3)))


def data(make: Callable[[], Tensor]) -> DataLoader:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(make(), torch.arange(24) % 3), 8)


def test_tokens_and_signals_are_shown_too(tmp_path):
    tokens, signals = data(lambda: torch.randint(0, 9, (24, 5))), data(lambda: torch.randn(24, 2, 40))
    hears = Plain(nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(152, 3)))
    for place, (module, own) in enumerate([(Reads(), tokens), (hears, signals)]):
        callback, logger = SaliencyCallback(), TensorBoardLogger(tmp_path / str(place))
        trainer = fit(module, [callback], train=own, val=own, logger=logger)
        assert is_picture(trainer.log_dir, "saliency.png")
        assert torch.equal(callback.found.maps, by_hand(module, callback.found))


def test_batches_that_are_dicts_are_shown_like_pairs(tmp_path):
    callback, pairs, logger = SaliencyCallback(), SaliencyCallback(), TensorBoardLogger(tmp_path)
    trainer = fit(Mapped(lr=0.0), [callback], train=mapped(), val=mapped(), logger=logger)
    fit(Plain(lr=0.0), [pairs])
    assert is_picture(trainer.log_dir, "saliency.png")
    assert callback.found.maps.shape == pairs.found.maps.shape
    assert {*callback.found.targets.tolist()} == {0, 1, 2}


def test_the_callback_can_be_pickled():
    callback = SaliencyCallback()
    fit(Plain(), [callback])
    again = pickle.loads(pickle.dumps(callback))
    assert torch.equal(again.found.maps, callback.found.maps)
    assert again.state_key == callback.state_key != SaliencyCallback(method="grad_cam").state_key
