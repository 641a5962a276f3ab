"""Batches that are lists of records, objects, or changed by the step that reads them."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_neurons import NeuronSensitivityCallback, measure
from tests.callbacks.modules import Plain, dataset, fit, trainer_of
from tests.callbacks.pruned import Probe, pruner, widths

ROWS = 22


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    label: torch.Tensor


class Opaque:
    def __init__(self, x: torch.Tensor, label: torch.Tensor) -> None:
        self.x, self.label = x, label


def collated(form: str) -> DataLoader:
    def collate(rows: list[Any]) -> Any:
        x, y = (torch.stack(column) for column in zip(*rows, strict=True))
        forms = {
            "records": [{"x": a, "label": b} for a, b in zip(x, y, strict=True)],
            "dataclasses": [Pair(a, b) for a, b in zip(x, y, strict=True)],
            "object": Opaque(x, y),
        }
        return forms[form]

    return DataLoader(dataset(ROWS, seed=3), batch_size=8, collate_fn=collate)


class Odd(Plain):
    def read(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(batch, Opaque):
            return batch.x, batch.label
        get = (lambda r, k: r[k]) if isinstance(batch[0], dict) else getattr
        return torch.stack([get(r, "x") for r in batch]), torch.stack([get(r, "label") for r in batch])

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = self.read(batch)
        return cross_entropy(self.net(x), y)


@pytest.mark.parametrize("form", ["records", "dataclasses", "object"])
def test_samples_are_counted_and_scored_whatever_form_a_batch_has(form):
    module, callback = Odd(), NeuronSensitivityCallback()
    trainer_of([callback]).validate(module, collated(form), verbose=False)
    plain = [*DataLoader(dataset(ROWS, seed=3), batch_size=8)]
    expected = measure(module, plain, loss_fn=lambda m, batch: cross_entropy(m.net(batch[0]), batch[1]))
    assert callback.report.counts["net.conv1"].samples.unique().tolist() == [ROWS]
    assert callback.report.counts["net.conv1"].gradient_samples.unique().tolist() == [ROWS]
    for name in ("fisher", "taylor", "rms"):
        for layer, scores in expected.scores[name].items():
            torch.testing.assert_close(callback.report.scores[name][layer], scores, rtol=1e-4, atol=1e-9)


class Changing(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        batch[0].mul_(2)
        loss = cross_entropy(self.net(batch[0]), batch[1])
        batch.clear()
        return loss


@pytest.mark.parametrize("max_samples", [512, 9])
def test_a_step_that_changes_its_batch_is_run_again_on_what_it_was_given(max_samples):
    module, callback = Changing(), NeuronSensitivityCallback(max_samples=max_samples, criteria=["fisher", "rms"])
    trainer_of([callback]).validate(module, DataLoader(dataset(ROWS, seed=3), batch_size=ROWS), verbose=False)
    (batch,) = DataLoader(dataset(ROWS, seed=3), batch_size=ROWS)
    report = measure(module, [batch], loss_fn=lambda m, b: cross_entropy(m.net(2 * b[0]), b[1]), criteria=["fisher"])
    if max_samples == 512:
        torch.testing.assert_close(callback.report.scores["fisher"], report.scores["fisher"], rtol=1e-4, atol=1e-9)
    else:
        assert callback.report.counts["net.conv1"].gradient_samples.unique().tolist() == [9]


class Checkpointed(Plain):
    reentrant = False

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return cross_entropy(checkpoint(self.net, batch[0], use_reentrant=self.reentrant), batch[1])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # validation runs without gradients
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_in_validation_makes_no_difference(reentrant):
    reports = []
    for module_type in (Checkpointed, Plain):
        torch.manual_seed(0)
        module, callback = module_type(), NeuronSensitivityCallback()
        module.reentrant = reentrant
        loader = DataLoader(dataset(ROWS, seed=3), batch_size=8)
        trainer_of([callback]).validate(module, loader, verbose=False)
        reports.append(callback.report)
    assert reports[0].counts["net.conv1"].samples.unique().tolist() == [ROWS]
    torch.testing.assert_close(reports[0].scores["fisher"], reports[1].scores["fisher"])


def test_a_lambda_that_moved_to_another_line_is_the_same_callback_in_a_checkpoint():
    first = NeuronSensitivityCallback(loss_fn=lambda module, batch: module.loss(batch))

    second = NeuronSensitivityCallback(loss_fn=lambda module, batch: module.loss(batch))
    assert first.state_key == second.state_key


@pytest.mark.parametrize("layers", [[3], [int], ["net.*", None]])
def test_layers_that_are_neither_names_nor_module_types_are_refused_at_once(layers):
    with pytest.raises(ValueError, match=r"layers=.* is not allowed: expected patterns of layer names"):
        NeuronSensitivityCallback(layers=layers)


class Wordless:
    """Holds numbers that nobody but the module finds."""

    def __init__(self, seed: int) -> None:
        self.numbers = f"{seed}"


WORDLESS = {"scalar": lambda seed: {"seed": torch.tensor(seed), "rows": 8}, "number": int, "object": Wordless}


class Seeded(Plain):
    """Its batches say what is to be made; nothing in them tells how many samples that gives."""

    def read(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seed = batch["seed"] if isinstance(batch, dict) else getattr(batch, "numbers", batch)
        return next(iter(DataLoader(dataset(8, seed=int(seed)), 8)))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(self.read(batch))

    def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(self.read(batch))
        self.log("val_loss", loss, batch_size=8)
        return loss


@pytest.mark.parametrize("compensation", ["none", "least_squares"])
@pytest.mark.parametrize("kind", WORDLESS)
def test_batches_that_tell_no_number_of_samples_do_not_keep_a_module_from_being_cut(kind, compensation):
    torch.manual_seed(0)
    module, seeds = Seeded(), DataLoader(range(4), 1, collate_fn=lambda one: WORDLESS[kind](one[0]))
    options: dict[str, Any] = {"monitor": "val_loss", "mode": "min", "max_drop": 9.0, "compensation": compensation}
    callback = pruner("weight_l2", amount=0.33, scope="layer", **options)

    def look(trainer: Any, module: Any) -> float:
        with torch.no_grad():
            losses = [copy.deepcopy(module).eval().loss(module.read(batch)) for batch in seeds]
        return float(torch.stack(losses).mean())

    after = Probe("on_train_epoch_start", look)
    fit(module, [callback, after], train=seeds, val=seeds, max_epochs=2)
    assert widths(module) == {"net.conv1": 3, "net.conv2": 4, "net.fc1": 5, "net.fc2": 3}
    assert callback.rounds.done[0].cut == pytest.approx(after.seen[1], rel=1e-6)
