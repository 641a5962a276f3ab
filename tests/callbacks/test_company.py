"""Samples whose loss depends on their batch are run again in the batch that they came in, and in no other."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import lightning as L  # noqa: N812
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_neurons import NeuronAblationCallback, NeuronSensitivityCallback, measure
from lightning_neurons.callbacks.trainer.processes import end_together
from tests.callbacks.modules import trainer_of

WEIGHTS = torch.tensor([1.0, 5.0, 0.2])


class Small(L.LightningModule):
    """One hidden layer, and a loss of the test's own."""

    def __init__(self, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self._loss = nn.Linear(6, 5), nn.Linear(5, 3), loss

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(self, batch)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(size: int, seed: int) -> Tensor:
    return torch.randint(0, 3, (size,), generator=torch.Generator().manual_seed(seed))


def weighted(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], WEIGHTS)


def contrastive(module: Any, batch: Any) -> Tensor:
    z = F.normalize(torch.cat([module(batch[0]), module(batch[0] + 0.1)]))
    alike = (z @ z.t() / 0.2).fill_diagonal_(-1e9)
    half = len(batch[0])
    return F.cross_entropy(alike, torch.arange(2 * half).roll(half))


def by_tokens(module: Any, batch: Any) -> Tensor:
    mask = torch.arange(4) < batch["length"][:, None]
    return (module(batch["x"]).square().mean(-1) * mask).sum() / mask.sum()


def scaled(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch["x"] * batch["scale"]), batch["y"])


def graph(module: Any, batch: Any) -> Tensor:
    hidden = torch.relu(module.first(batch["adjacency"] @ batch["x"]))
    return F.cross_entropy(module.last(batch["adjacency"] @ hidden), batch["y"])


def bag(module: Any, batch: Any) -> Tensor:
    instances, label = batch[0].squeeze(0), batch[1].reshape(-1)
    hidden = torch.relu(module.first(instances)).flatten(0, -2).mean(0)
    return F.cross_entropy(module.last(hidden)[None].expand(len(label), -1), label)


def faint(module: Any, batch: Any) -> Tensor:
    return by_tokens(module, batch) * 1e-7


def by_task(module: Any, batch: Any) -> Tensor:
    return {"labels": F.cross_entropy, "pairs": contrastive_of}[batch["task"]](module(batch["x"]), batch["y"])


def contrastive_of(z: Tensor, _: Tensor) -> Tensor:
    z = F.normalize(z)
    return F.cross_entropy(z @ z.t() / 0.2, torch.arange(len(z)))


def pairs(size: int, count: int) -> list[Any]:
    return [(drawn(size, 6, seed=i), labels(size, i)) for i in range(count)]


LENGTHS = [{"x": drawn(8, 4, 6, seed=i), "length": torch.arange(8) % (i + 2) + 1} for i in range(3)]

CASES = {
    "weights of classes": (weighted, pairs(8, 4)),
    "weights of classes, sorted": (weighted, [(drawn(8, 6, seed=i), torch.full((8,), i // 2)) for i in range(5)]),
    "contrastive": (contrastive, pairs(8, 4)),
    "tokens": (by_tokens, LENGTHS),
    "tokens, a tiny loss": (faint, LENGTHS),
    "a number for each batch": (scaled, [{"x": x, "y": y, "scale": 2.0**i} for i, (x, y) in enumerate(pairs(4, 4))]),
    "a tensor for each batch": (
        scaled,
        [{"x": x, "y": y, "scale": torch.tensor(2.0**i)} for i, (x, y) in enumerate(pairs(4, 4))],
    ),
    "graphs": (
        graph,
        [{"x": x, "y": y, "adjacency": drawn(6, 6, seed=9 + i).softmax(1)} for i, (x, y) in enumerate(pairs(6, 3))],
    ),
    "one bag a batch": (bag, [(drawn(1, 5, 6, seed=i), labels(1, i)) for i in range(6)]),
    "two bags a batch": (bag, [(drawn(2, 5, 6, seed=i), labels(2, i)) for i in range(4)]),
}


def half_squares(module: Any, loss: Callable[[Any, Any], Tensor], data: list[Any], sizes: list[int]) -> Tensor:
    """Fisher of the first layer by its definition, a whole batch at a time; space is summed within a sample."""
    sums = torch.zeros(5, dtype=torch.float64)
    for batch, size in zip(data, sizes, strict=True):
        kept: list[Tensor] = []

        def keep(layer: nn.Module, inputs: Any, output: Tensor, kept: list[Tensor] = kept) -> None:
            output.retain_grad()
            kept.append(output)

        handle = module.first.register_forward_hook(keep)
        (loss(module, batch) * size).backward()
        handle.remove()
        # ReLU's value times its gradient is that in front of it; several calls and positions belong to one sample.
        products = sum((output * output.grad).double().reshape(size, -1, 5).sum(1) for output in kept)
        sums += products.square().sum(0) / 2
    return sums.detach() / sum(sizes)


@pytest.mark.parametrize("case", CASES)
def test_sensitivity_is_that_of_the_batches_as_they_came(case):
    loss, data = CASES[case]
    module, callback = Small(loss), NeuronSensitivityCallback(criteria=["fisher"], max_figures=0)
    trainer_of([callback]).validate(module, DataLoader(data, batch_size=None), verbose=False)
    sizes = [len(batch[0] if isinstance(batch, tuple) else batch["x"]) for batch in data]
    expected = half_squares(module, loss, data, sizes)
    torch.testing.assert_close(
        callback.report.scores["fisher"]["first"], expected, rtol=1e-4, atol=1e-6 * float(expected.max())
    )


@pytest.mark.parametrize("case", CASES)
def test_measure_and_ablation_take_whole_batches_as_well(case, monkeypatch):
    loss, data = CASES[case]
    module = Small(loss)
    whole = measure(module, data, loss_fn=loss, criteria=["fisher"]).scores["fisher"]["first"]
    monkeypatch.setattr("lightning_neurons.measurement.passes._CACHED_BYTES", 1)
    monkeypatch.setattr("lightning_neurons.measurement.passes._SMALLEST_PART", 1)
    found = measure(module, data, loss_fn=loss, criteria=["fisher"]).scores["fisher"]["first"]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6 * float(whole.max()))
    callback = NeuronAblationCallback(ends=None)
    trainer_of([callback]).validate(module, DataLoader(data, batch_size=None), verbose=False)
    with torch.no_grad():
        sizes = torch.tensor([float(len(b[0] if isinstance(b, tuple) else b["x"])) for b in data])
        losses = torch.stack([loss(module, batch) for batch in data])
    assert callback.ablation.loss == pytest.approx(float((losses * sizes).sum() / sizes.sum()), rel=1e-5, abs=0)


def test_a_bounded_sample_of_dependent_samples_is_whole_batches_spread_over_the_data():
    data = [(torch.full((8, 6), float(i)), labels(8, i)) for i in range(20)]
    seen = Mock()  # a list would be put back after each run

    def noted(module: Any, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            seen(float(batch[0][0, 0]), len(batch[0]))
        return weighted(module, batch)

    for bound, batches in ((40, 5), (3, 1), (47, 5)):
        seen.reset_mock()
        callback = NeuronSensitivityCallback(max_samples=bound, max_figures=0)
        sized = DataLoader(torch.utils.data.ConcatDataset([list(zip(*one, strict=True)) for one in data]), 8)
        trainer_of([callback]).validate(Small(noted), sized, verbose=False)
        assert [call.args[1] for call in seen.call_args_list] == [8] * batches
        assert callback.report.counts["first"].gradient_samples.tolist() == [8 * batches] * 5
        assert "whole batches" in callback.report.notes[0]
        if batches > 1:
            assert seen.call_args.args[0] >= 13


def test_samples_that_stand_alone_are_still_picked_joined_and_divided():
    seen = Mock()  # a list would be put back after each run

    def noted(module: Any, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            seen(len(batch[0]))
        return F.cross_entropy(module(batch[0]), batch[1])

    data = torch.utils.data.TensorDataset(drawn(160, 6), labels(160, 0))
    callback = NeuronSensitivityCallback(max_samples=40, max_figures=0)
    trainer_of([callback]).validate(Small(noted), DataLoader(data, 8), verbose=False)
    sizes = [call.args[0] for call in seen.call_args_list]
    assert sum(sizes) == 40
    assert max(sizes) > 8
    assert "stratified over 3 classes" in callback.report.notes[0]


class Trained(Small):
    """Trained without being changed; its loss may look at the batch's index and at the epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(self, batch, batch_idx, self.current_epoch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda module, batch, index, epoch: F.cross_entropy(module(batch[0]), batch[1]) * (1 + index),
        lambda module, batch, index, epoch: F.cross_entropy(module(batch[0]), batch[1]) * float(index > 0),
        lambda module, batch, index, epoch: (
            F.cross_entropy(module(batch[0]), batch[1]) + 3 * epoch * contrastive(module, batch)
        ),
    ],
    ids=["the index weighs", "the first does not count", "a term from the second epoch on"],
)
def test_a_loss_may_look_at_the_index_of_the_batch_and_at_the_epoch(loss):
    data, module = pairs(8, 5), Trained(loss)
    sensitivity = NeuronSensitivityCallback(criteria=["fisher"], max_figures=0)
    ablation = NeuronAblationCallback(ends=None)
    batches = DataLoader(data, batch_size=None)
    trainer_of([sensitivity, ablation], max_epochs=2).fit(module, batches, batches)
    numbers = iter(range(5))
    expected = half_squares(module, lambda m, batch: loss(m, batch, next(numbers), 1), data, [8] * 5)
    torch.testing.assert_close(sensitivity.report.scores["fisher"]["first"], expected, rtol=1e-4, atol=1e-12)
    with torch.no_grad():
        mean = sum(float(loss(module, batch, index, 1)) for index, batch in enumerate(data)) / 5
    assert ablation.ablation.loss == pytest.approx(mean, rel=1e-5)


def test_batches_of_another_task_are_asked_for_themselves():
    seen = Mock()

    def noted(module: Any, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            seen(batch["task"], len(batch["x"]))
        return by_task(module, batch)

    data = [{"x": x, "y": y, "task": ["labels", "pairs"][i % 2]} for i, (x, y) in enumerate(pairs(8, 6))]
    callback = NeuronSensitivityCallback(max_samples=28, max_figures=0)
    trainer_of([callback]).validate(Small(noted), DataLoader(data, batch_size=None), verbose=False)
    assert {call.args[1] for call in seen.call_args_list if call.args[0] == "pairs"} == {8}


@pytest.mark.parametrize(
    "launcher, processes, waits", [("ddp_spawn", 2, True), ("ddp_spawn", 1, False), ("ddp", 2, False)]
)
def test_processes_that_were_spawned_end_together(launcher, processes, waits):
    strategy = L.Trainer(accelerator="cpu", devices=2, strategy=launcher, logger=False).strategy
    strategy._configure_launcher()
    trainer = Mock(world_size=processes, strategy=Mock(launcher=strategy.launcher))
    end_together(trainer)
    assert trainer.strategy.barrier.called == waits
