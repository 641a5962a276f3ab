"""Layers that no gradient of the loss reaches: they are named, and disturb nothing else."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import NeuronSensitivityCallback, measure
from tests.callbacks.modules import Plain, fit, loader


class Partly(nn.Module):
    """Beside its main way: a teacher, an index and a branch without gradients, and what the loss leaves out."""

    UNREACHED = ("teacher", "index", "detached", "aside")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.table = nn.Linear(5, 8), nn.Linear(8, 3), nn.Embedding(4, 5)
        self.teacher, self.index, self.detached, self.aside = (nn.Linear(5, width) for width in (3, 4, 5, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = self.teacher(x)
        x = x + self.table(self.index(x).argmax(-1)) + self.detached(x).relu().detach()
        return self.last(self.first(x).relu()) + target, self.aside(x)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0])[0], batch[1])


@pytest.fixture
def model() -> Partly:
    torch.manual_seed(0)
    return Partly().eval()


def test_layers_without_a_gradient_are_named_and_stand_last(model):
    batches = [(torch.randn(12, 5), torch.arange(12) % 3) for _ in range(3)]
    report = measure(model, batches, loss_fn=loss, criteria=["taylor", "gradient", "rms"])
    (note,) = [note for note in report.notes if "no gradient of the loss reaches" in note]
    assert f"reaches {', '.join(Partly.UNREACHED)}: " in note
    hidden = torch.cat([model.first(_inputs(model, x)).relu() for x, _ in batches]).detach().requires_grad_()
    offsets, labels = torch.cat([model.teacher(x) for x, _ in batches]), torch.cat([y for _, y in batches])
    logits = model.last(hidden) + offsets.detach()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), hidden)
    expected = (hidden * gradient).abs().double().mean(0).detach()
    torch.testing.assert_close(report.scores["taylor"]["first"], expected, rtol=1e-4, atol=1e-8)
    for name in Partly.UNREACHED:
        assert report.scores["taylor"][name].isnan().all()
        assert report.scores["rms"][name].isfinite().all()
    ranking = report.ranking("taylor")
    known = [entry.layer for entry in ranking if math.isfinite(entry.score)]
    assert known == ["first"] * 8 == [entry.layer for entry in ranking[:8]]
    chosen = report.select("taylor", count=6, scope="global")
    assert {name: len(neurons) for name, neurons in chosen.items() if neurons} == {"first": 6}
    assert not any(report.select("taylor", share=0.5)[name] for name in Partly.UNREACHED)


def _inputs(model: Partly, x: Tensor) -> Tensor:
    return x + model.table(model.index(x).argmax(-1)) + model.detached(x).relu()


def test_nothing_is_said_where_all_are_reached_or_none_was_asked_for(model):
    batches = [(torch.randn(12, 5), torch.arange(12) % 3)]
    asked = [
        measure(model, batches, loss_fn=loss, layers=["first", "last"]),
        measure(model, batches, loss_fn=loss, criteria=["rms", "weight_l2"]),
        measure(model, batches),
    ]
    assert not any("no gradient" in note for report in asked for note in report.notes)


def test_what_is_followed_stays_a_number():
    class Teaches(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(6, 3)

        def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            target = self.teacher(batch[0].mean((1, 2))).detach()
            return F.cross_entropy(self(batch[0]), batch[1]) + F.mse_loss(self(batch[0]), target)

    callback = NeuronSensitivityCallback(log_metrics=True, max_figures=0)
    metrics = fit(Teaches(), [callback], val=loader(24, seed=1), max_epochs=2).callback_metrics
    followed = {name: float(value) for name, value in metrics.items() if name.startswith("neurons/")}
    assert "neurons/effective_share" in followed
    assert all(map(math.isfinite, followed.values()))
    assert any("no gradient of the loss reaches teacher: " in note for note in callback.report.notes)
