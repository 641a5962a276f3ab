"""Steps that lay samples out in several rows or run a batch in pieces: scores are those of one sample at a time."""

from collections.abc import Callable
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_neurons import NeuronSensitivityCallback, ablate_together, measure
from tests.callbacks.modules import Steps, trainer_of

Forward = Callable[[nn.Module, Tensor], Tensor]

FORWARDS: dict[str, Forward] = {
    "views that are concatenated": lambda net, x: sum(net(torch.cat([x[:, 0], x[:, 1]])).chunk(2)),
    "three views": lambda net, x: sum(net(torch.cat([x[:, 0], 2 * x[:, 1], x[:, 2]])).chunk(3)),
    "time in front of samples": lambda net, x: net(x.transpose(0, 1).flatten(0, 1)).view(4, len(x), -1).mean(0),
    "windows in front of samples": lambda net, x: (
        net(x.unflatten(1, (2, 2)).transpose(0, 1).flatten(0, 1)).view(2, len(x), 2, -1).mean((0, 2))
    ),
    "the same three times": lambda net, x: net(x[:, 0].repeat(3, 1)).view(3, len(x), -1).mean(0),
    "each three times": lambda net, x: net(x[:, 0].repeat_interleave(3, 0)).view(len(x), 3, -1).mean(1),
    "time behind samples": lambda net, x: net(x.flatten(0, 1)).view(len(x), 4, -1).mean(1),
    "pieces": lambda net, x: torch.cat([net(piece) for piece in x[:, 0].split(4)]),
    "uneven pieces": lambda net, x: torch.cat([net(piece) for piece in x[:, 0].split(3)]),
    "one by one": lambda net, x: torch.cat([net(sample[None]) for sample in x[:, 0]]),
    "one by one without a batch": lambda net, x: torch.stack([net(sample) for sample in x[:, 0]]),
    "calls on all": lambda net, x: net(x[:, 0]) + net(x[:, 1]),
}


class Rows(Steps, L.LightningModule):
    """Four time steps of six numbers for each sample."""

    def __init__(self, run: Forward) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.net, x)


def data(samples: int = 21) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, 4, 6, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (samples,), generator=generator))


def one_at_a_time(module: Rows, samples: TensorDataset) -> dict[str, Tensor]:
    """Taylor scores and means of the first layer, from a step of each sample alone and plain hooks."""
    gates, values = [], []
    for x, y in samples:
        seen: list[Tensor] = []
        hook = module.net[1].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        loss = cross_entropy(module(x[None]), y[None])
        hook.remove()
        gradients = torch.autograd.grad(loss, seen)
        gates.append(sum((a * g).reshape(-1, 8).sum(0) for a, g in zip(seen, gradients, strict=True)))
        values.append(torch.cat([a.reshape(-1, 8) for a in seen]))
    return {"taylor": torch.stack(gates).abs().mean(0), "mean": torch.cat(values).mean(0)}


def assert_right(report: Any, module: Rows, samples: TensorDataset) -> None:
    for name, expected in one_at_a_time(module.eval(), samples).items():
        torch.testing.assert_close(report.scores[name]["net.0"], expected.detach().double(), rtol=1e-4, atol=1e-7)
    assert report.counts["net.0"].samples.tolist() == [len(samples)] * 8
    assert report.counts["net.0"].gradient_samples.tolist() == [len(samples)] * 8


@pytest.mark.parametrize("case", FORWARDS)
def test_the_callback_scores_samples_however_a_step_lays_them_out(case):
    torch.manual_seed(0)
    module, callback, samples = Rows(FORWARDS[case]), NeuronSensitivityCallback(), data()
    trainer_of([callback]).validate(module, DataLoader(samples, 8), verbose=False)
    assert_right(callback.report, module, samples)


@pytest.mark.parametrize("case", FORWARDS)
def test_measure_scores_samples_however_a_model_lays_them_out(case):
    torch.manual_seed(0)
    module, samples = Rows(FORWARDS[case]), data()
    report = measure(module, DataLoader(samples, 8), loss_fn=lambda module, batch: module.loss(batch))
    assert_right(report, module, samples)


def test_classes_of_views_are_those_of_their_samples():
    torch.manual_seed(0)
    module, samples = Rows(FORWARDS["views that are concatenated"]), data()
    report = measure(module, DataLoader(samples, 8), per_class=True, loss_fn=lambda module, batch: module.loss(batch))
    for label in range(3):
        of_class = TensorDataset(*(tensor[samples.tensors[1] == label] for tensor in samples.tensors))
        for name, expected in one_at_a_time(module.eval(), of_class).items():
            found = report.per_class[name]["net.0"][label]
            torch.testing.assert_close(found, expected.detach().double(), rtol=1e-4, atol=1e-7)


def test_a_batch_in_pieces_is_refused_where_classes_are_kept_apart():
    """Gradients come in another order than the pieces ran in."""
    module = Rows(FORWARDS["pieces"])
    callback = NeuronSensitivityCallback(per_class=True)
    with pytest.raises(MisconfigurationException, match="saw 4 samples but 8 targets"):
        trainer_of([callback]).validate(module, DataLoader(data(), 8), verbose=False)


@pytest.mark.parametrize("case", ["three views", "time behind samples"])
def test_resampled_rows_are_those_of_another_sample(case):
    """Of two samples, a whole layer resampled: they change places."""
    module, x, y = Rows(FORWARDS[case]), data(2).tensors[0], torch.tensor([0, 2])

    def losses(module: Rows, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(module(batch[0]), batch[1], reduction="none")

    everything = {"net.0": list(range(8))}
    found = ablate_together(module, [(x, y)], losses, [everything], replacement="resample").delta_loss
    with torch.no_grad():
        expected = (losses(module, (x.flip(0), y)) - losses(module, (x, y))).mean()
    assert expected.abs() > 1e-4
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


class Single(L.LightningModule):
    """Runs on one picture without an axis for a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 5, 1), nn.Linear(5, 3)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(*batch)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        maps = self.norm(self.conv(x).relu()).relu()
        return cross_entropy(self.fc(maps.mean((-2, -1))), y)


def test_samples_that_come_without_a_batch_axis_are_samples():
    """Of loaders with ``batch_size=None``; the right values are those of batches of one."""
    torch.manual_seed(0)
    module, callbacks = Single(), [NeuronSensitivityCallback(), NeuronSensitivityCallback()]
    samples = TensorDataset(torch.randn(9, 2, 6, 7), torch.arange(9) % 3)
    for callback, size in zip(callbacks, (None, 1), strict=True):
        trainer_of([callback]).validate(module, DataLoader(samples, size), verbose=False)
    single, batched = (callback.report for callback in callbacks)
    for layer, neurons in (("conv", 4), ("norm", 5), ("fc", 3)):
        assert single.counts[layer].samples.tolist() == single.counts[layer].gradient_samples.tolist() == [9] * neurons
        for name in ("taylor", "fisher", "mean", "rms"):
            found, expected = (report.scores[name][layer] for report in (single, batched))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert single.notes == batched.notes
