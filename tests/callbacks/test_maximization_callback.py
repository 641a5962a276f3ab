"""The callback that makes pictures: what it makes, whose cards it shows, and what stands on them."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lightning_neurons import ActivationStatisticsCallback, NeuronSensitivityCallback, maximize_activation
from lightning_neurons.report.logging.tags import kind_of
from tests.callbacks.modules import Plain, fit, loader, trainer_of
from tests.callbacks.pictured import (
    Dying,
    ImageLogger,
    files,
    is_picture,
    listed,
    maximizer,
    shown_in,
    without_matplotlib,  # noqa: F401
)
from tests.callbacks.pruned import Probe, pruner
from tests.callbacks.studied import SITES, NoForward, samples

KINDS = ("most important", "least important", "newly dead")


def activation(module: Any, name: str, inputs: Tensor) -> Tensor:
    """Of a neuron such as "net.conv1 2", or of "class 1": the mean over positions, in evaluation mode."""
    layer, _, index = name.rpartition(" ")
    kept: list[Tensor] = []
    place = "net.fc2" if layer in ("class", "net.fc2") else SITES[layer]
    handle = module.get_submodule(place).register_forward_hook(lambda *args: kept.append(args[2].detach().clone()))
    module.eval()
    with torch.no_grad():
        module.net(inputs)
    handle.remove()
    values = kept[0] if place == "net.fc2" else kept[0].relu()
    return values.flatten(2).mean(2)[:, int(index)] if values.ndim > 2 else values[:, int(index)]


def ends(report: Any, died: Any, each: int) -> list[tuple[str, str]]:
    """Which neurons should get cards, by the report alone."""
    ranking = [f"{row.layer} {row.neuron}" for row in report.ranking()]
    dead = [f"{layer} {neuron}" for layer, neurons in died.items() for neuron in neurons]
    found: list[tuple[str, str]] = []
    for why, names in zip(KINDS, (ranking, ranking[::-1], dead), strict=True):
        found += [(name, why) for name in names if name not in {n for n, _ in found}][:each]
    return found


def test_by_default_classes_are_maximised_in_the_range_of_the_data():
    module, callback = Plain(), maximizer()
    fit(module, [callback])
    found, (data, _) = callback.found, samples()
    assert found.targets == ("class 0", "class 1", "class 2")
    assert found.images.shape == (3, 1, 6, 6)
    assert float(found.images.min()) >= float(data.min())
    assert float(found.images.max()) <= float(data.max())
    assert callback.cards == ()
    for row, name in enumerate(found.targets):
        reached = activation(module, name, found.inputs)[row]
        assert float(found.activations[row]) == pytest.approx(float(reached), abs=1e-5)
        values = activation(module, name, data)
        assert sorted(found.data_activations[row].tolist()) == pytest.approx(sorted(values.tolist()), abs=1e-5)
        assert float(found.data_maximum[row]) == pytest.approx(float(values.max()), abs=1e-5)


def test_pictures_are_those_of_maximize_activation():
    targets, options = [2, ("net.conv2", 3), "net.fc1"], {"steps": 6, "validity": "clip", "seed": 3, "l2": 0.1}
    module, callback = Plain(), maximizer(targets, **options)
    trainer_of([callback]).validate(module, loader(24, seed=1), verbose=False)
    kept = samples()[0]
    module.eval()
    expected = maximize_activation(module, targets, images=kept, **options)
    assert callback.found.targets == expected.targets == ("class 2", "net.conv2 3", "net.fc1")
    assert torch.allclose(callback.found.images, expected.images, atol=1e-4)
    assert torch.allclose(callback.found.activations, expected.activations, atol=1e-3)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("each", [1, 3])
def test_cards_are_of_the_ends_of_this_epochs_report_and_the_newly_dead(each, first):
    callback, observer = maximizer(cards=each), NeuronSensitivityCallback()
    seen = Probe("on_validation_end", lambda *_: (observer.report, observer.history.entries[-1].died, callback.cards))
    fit(Dying(), [callback, observer, seen] if first else [observer, callback, seen], max_epochs=3)
    for report, died, cards in seen.seen.values():
        assert [(card.name, card.why) for card in cards] == ends(report, died, each)
    newly = [[c.name for c in cards if c.why == "newly dead"] for *_, cards in seen.seen.values()]
    assert newly[0] == newly[1] == []
    died = seen.seen[2][1]["net.conv1"]
    assert died == [2]
    assert "net.conv1 2" in {card.name for card in seen.seen[2][2]}


@pytest.mark.parametrize("make", [NeuronSensitivityCallback, ActivationStatisticsCallback])
def test_numbers_on_a_card_are_those_of_the_report(make):
    callback, observer = maximizer(cards=3), make()
    fit(Dying(), [callback, observer], max_epochs=2)
    report, found = observer.report, callback.found
    for row, card in enumerate(callback.cards, start=3):
        layer, neuron = card.name.split()[0], int(card.name.split()[1])
        expected = {"deadness": float(report.deadness[layer][neuron])} if layer in report.deadness else {}
        names = [name for name in report.scores if name in (report.main_criterion, "fisher")]
        expected |= {name: float(report.scores[name][layer][neuron]) for name in names}
        expected |= {
            "activation reached": float(found.activations[row]),
            "largest on the data": float(found.data_maximum[row]),
            "99th percentile on the data": float(found.data_p99[row]),
        }
        assert card.numbers == expected
        assert found.targets[row] == card.name
        assert torch.equal(card.maximized, found.shown[row])


def test_pictures_on_a_card_are_those_that_excite_the_neuron_most():
    module, callback = Plain(), maximizer(cards=4)
    fit(module, [callback, NeuronSensitivityCallback()], max_epochs=2)
    data, low, high = samples()[0], callback.found.range.low, callback.found.range.high
    assert len(callback.cards) == 8
    for card in callback.cards:
        values = activation(module, card.name, data)
        best = values.sort(descending=True).values[:6]
        assert torch.allclose(card.activations, best, atol=1e-5)
        for picture, value in zip(card.pictures, card.activations, strict=True):
            (place,) = [i for i, one in enumerate((data - low) / (high - low)) if torch.allclose(one, picture)]
            assert float(values[place]) == pytest.approx(float(value), abs=1e-5)


@pytest.mark.parametrize("samples_kept", [2, 5])
def test_few_pictures_make_small_cards(samples_kept):
    callback = maximizer(max_samples=samples_kept)
    fit(Plain(), [callback, NeuronSensitivityCallback()])
    assert {len(card.pictures) for card in callback.cards} == {samples_kept}


def test_files_are_the_latest_cards_and_old_ones_go(tmp_path):
    callback, observer = maximizer(cards=2), NeuronSensitivityCallback(max_figures=0)
    counts = Probe("on_validation_end", lambda *_: len(callback.cards))
    fit(Dying(), [callback, observer, counts], logger=TensorBoardLogger(tmp_path), max_epochs=4)
    folder = next((tmp_path / "lightning_logs").iterdir())
    entries = listed(folder, "cards")
    assert counts.seen[2] > counts.seen[3], "one had newly died"
    assert [(e["name"], e["why"]) for e in entries] == [(card.name, card.why) for card in callback.cards]
    for entry, card in zip(entries, callback.cards, strict=True):
        assert entry["numbers"] == pytest.approx(dict(card.numbers))
        assert is_picture(folder, entry["file"])
    assert [entry["file"] for entry in entries] == [f"cards-{n}.png" for n in range(len(entries))]
    assert {f for f in files(folder) if f.startswith("pictures/cards-")} == {f"pictures/{e['file']}" for e in entries}
    (picture,) = listed(folder, "pictures")
    assert (picture["file"], picture["title"]) == ("maximization.png", "Activation maximisation")
    assert is_picture(folder, "maximization.png")


def test_tags_are_those_of_the_table(tmp_path):
    memory = ImageLogger()
    observer = NeuronSensitivityCallback(max_figures=0)
    logger = [TensorBoardLogger(tmp_path), memory]
    trainer = fit(Dying(), [maximizer(cards=2), observer], logger=logger, max_epochs=3)
    found = shown_in(trainer.log_dir)
    always = {"maximization", *(f"cards/{kind}/{n}" for kind in ("most_important", "least_important") for n in (1, 2))}
    assert {tag: found[tag] for tag in always} == {tag: [3, 7, 11] for tag in always}
    assert found["cards/newly_dead/1"] == [11]
    assert found.keys() - always <= {"cards/newly_dead/1", "cards/newly_dead/2"}
    assert {kind_of(tag) for tag in found} == {"figure"}
    assert [(key, step) for key, step, _ in memory.images if key == "maximization"] == [
        ("maximization", s) for s in (3, 7, 11)
    ]
    assert {key for key, *_ in memory.images} == found.keys()


def test_a_second_callback_has_pictures_and_cards_of_its_own(tmp_path):
    callbacks = [maximizer([0], cards=2), maximizer([1], cards=1)]
    trainer = fit(Plain(), [*callbacks, NeuronSensitivityCallback(max_figures=0)], logger=TensorBoardLogger(tmp_path))
    groups = {"cards": 2, "cards_2": 1}
    wanted = {f"{g}/{kind}/{n + 1}" for g, count in groups.items() for kind in ("most_important", "least_important")
              for n in range(count)}  # fmt: skip
    assert shown_in(trainer.log_dir).keys() == wanted | {"maximization", "maximization_2"}
    assert [one["file"] for one in listed(trainer.log_dir, "pictures")] == ["maximization.png", "maximization_2.png"]
    names = [(one["name"], one["why"]) for one in listed(trainer.log_dir, "cards")]
    assert {(c.name, c.why) for callback in callbacks for c in callback.cards} == {*names}, "cards of both"
    wanted = {*(f"cards-{n}.png" for n in range(4)), *(f"cards_2-{n}.png" for n in range(2))}
    assert {one["file"] for one in listed(trainer.log_dir, "cards")} == wanted


def test_without_cards_or_without_an_observer_classes_alone_are_shown(tmp_path):
    for place, callbacks in enumerate([[maximizer()], [maximizer(cards=0), NeuronSensitivityCallback(max_figures=0)]]):
        trainer = fit(Plain(), callbacks, logger=TensorBoardLogger(tmp_path / str(place)))
        assert callbacks[0].cards == ()
        assert callbacks[0].found.targets == ("class 0", "class 1", "class 2")
        assert shown_in(trainer.log_dir).keys() == {"maximization"}
        assert listed(trainer.log_dir, "cards") == []


def test_a_pruning_callback_is_no_observer_whose_cards_are_made():
    callback = maximizer()
    fit(Plain(), [pruner("fisher"), callback], max_epochs=3)
    assert callback.cards == ()


def test_mean_and_std_give_pictures_before_normalisation():
    callback = maximizer(mean=0.5, std=[2.0], value_range=(-20, 20), cards=1)
    fit(Plain(), [callback, NeuronSensitivityCallback()])
    found, data = callback.found, samples()[0]
    assert torch.allclose(found.inputs, (found.images - 0.5) / 2)
    assert (found.range.low, found.range.high) == (-20, 20)
    best = callback.cards[0].pictures[0]
    assert min(float((best - (d * 2 + 0.5 + 20) / 40).abs().max()) for d in data) < 1e-5


def test_a_module_without_a_forward_and_one_that_says_its_own():
    for module, callback in [(NoForward(), maximizer()), (Plain(), maximizer(forward=lambda m, x: m.net(x)))]:
        fit(module, [callback, NeuronSensitivityCallback()])
        expected = maximize_activation(module.net.eval(), [0, 1, 2], images=samples()[0], steps=3)
        assert torch.allclose(callback.found.images[:3], expected.images, atol=1e-4)


def test_more_than_ten_classes_are_too_many_for_a_default():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 13))
    callback = maximizer()
    fit(Plain(net), [callback])
    assert callback.found.targets == tuple(f"class {k}" for k in range(10))


def test_the_callback_can_be_pickled():
    callback = maximizer()
    fit(Plain(), [callback, NeuronSensitivityCallback()])
    again = pickle.loads(pickle.dumps(callback))
    assert torch.equal(again.found.images, callback.found.images)
    assert [card.name for card in again.cards] == [card.name for card in callback.cards]
    assert again.state_key == copy.deepcopy(callback).state_key != maximizer([1]).state_key


def test_every_n_epochs_and_a_resume_keep_the_rhythm(tmp_path: Path):
    callback = maximizer(every_n_epochs=2)
    trainer = fit(Plain(), [callback], logger=TensorBoardLogger(tmp_path), max_epochs=5)
    assert shown_in(trainer.log_dir) == {"maximization": [7, 15]}
    assert callback.state_dict() == {"version": 1, "last": 3}
