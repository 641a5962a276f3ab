"""Passes in parts, and losses of every form."""

from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lightning_neurons import measure
from lightning_neurons.measurement.losses import fgsm, normal_tensors
from lightning_neurons.measurement.passes import Passes
from tests.hooks.test_capture import Recorder
from tests.models import ConvNet, cross_entropy, pictures, seeded
from tests.tables import for_each


def prepared(net: nn.Module, x, *, samples_that_fit: int) -> Passes:
    """Passes that believe so many samples to fill the cache."""
    passes = Passes(net, [Recorder(net)])
    passes.find(net, x)
    passes.traced = replace(passes.traced, bytes_per_sample=2 * 2**20 // samples_that_fit)
    return passes


@for_each("samples_that_fit, sizes", [(1000, [30]), (15, [15, 15]), (11, [10, 10, 10]), (1, [8, 8, 8, 6])])
def test_a_batch_is_cut_into_parts_that_fit_the_cache_but_not_smaller_than_worth_it(samples_that_fit, sizes):
    x, y = pictures(30)
    names = [f"n{i}" for i in range(30)]
    parts = list(
        prepared(seeded(ConvNet), x, samples_that_fit=samples_that_fit).parts({"x": x, "y": y, "names": names})
    )
    assert [len(part["x"]) for part in parts] == sizes
    assert torch.equal(torch.cat([part["x"] for part in parts]), x)
    assert torch.equal(torch.cat([part["y"] for part in parts]), y)
    assert [name for part in parts for name in part["names"]] == names


def test_a_batch_with_a_tensor_that_is_not_per_sample_stays_whole():
    x, y = pictures(30)
    batch = {"x": x, "y": y, "weights": torch.ones(4)}
    (part,) = prepared(seeded(ConvNet), x, samples_that_fit=1).parts(batch)
    assert part is batch


def test_parts_give_the_same_scores_as_the_whole(monkeypatch):
    net = seeded(ConvNet, double=True)
    batch = pictures(30, double=True)
    calls = []

    def loss_fn(model, given):
        calls.append(len(given[0]))
        return cross_entropy(model, given)

    whole = measure(net, [batch], loss_fn=loss_fn, per_class=True)
    monkeypatch.setattr("lightning_neurons.measurement.passes._CACHED_BYTES", 1)
    parts = measure(net, [batch], loss_fn=loss_fn, per_class=True)
    assert calls == [
        2,
        30,
        2,
        *[30] * 5,
        10,
        20,
        32,
        8,
        8,
        8,
        6,
    ]  # the whole (twice), two parts, and more, to see how it divides
    assert whole.class_counts == parts.class_counts
    for of in ("scores", "deadness_by", "per_class"):
        for name, by_layer in getattr(whole, of).items():
            for layer, expected in by_layer.items():
                torch.testing.assert_close(getattr(parts, of)[name][layer], expected, rtol=1e-9, atol=1e-12)


def test_a_model_that_does_not_run_on_few_samples_is_learnt_from_the_whole_batch():
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            if len(x) != 6:
                raise ValueError("six samples, please")
            return F.relu(self.fc(x))

    report = measure(Picky(), [(torch.randn(6, 3), torch.arange(6) % 4)], loss_fn=cross_entropy)
    assert report.layers[0].activation_point == "fc > relu"
    assert report.counts["fc"].samples.tolist() == [6] * 4


def test_inference_tensors_are_copied_and_others_share_their_memory_without_their_graph():
    x = torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        frozen = torch.ones(2)
    copied = normal_tensors({"x": x, "y": [frozen, "text"]})
    assert copied["x"].data_ptr() == x.data_ptr()
    assert not copied["x"].requires_grad
    assert x.requires_grad
    assert not copied["y"][0].is_inference()
    assert copied["y"][1] == "text"


def test_fgsm_shifts_the_first_floating_point_tensor_only_and_leaves_the_batch_alone():
    net, (x, y) = seeded(ConvNet), pictures()
    batch = {"label": y, "image": x, "extra": x + 1}
    shifted = fgsm(net, lambda b: F.cross_entropy(net(b["image"]), b["label"], reduction="sum"), batch, 0.25)
    assert torch.equal(shifted["label"], y)
    assert torch.equal(shifted["extra"], x + 1)
    assert torch.equal(batch["image"], pictures()[0])
    torch.testing.assert_close((shifted["image"] - x).abs(), torch.full_like(x, 0.25))
    assert not shifted["image"].requires_grad
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@for_each("ask", [lambda x: x.requires_grad_(), lambda x: setattr(x, "requires_grad", True)])
@for_each("copied", [torch.clone, torch.detach, lambda x: x * 1.0])
def test_fgsm_works_on_a_loss_that_attacks_its_inputs_itself(ask, copied):
    net, (x, y) = seeded(ConvNet), pictures()

    def loss_of(batch):
        inputs = copied(batch[0])
        ask(inputs)
        F.cross_entropy(net(inputs), batch[1], reduction="sum").backward()
        attacked = (inputs + 0.1 * inputs.grad.sign()).detach()
        return sum(F.cross_entropy(net(one), batch[1], reduction="sum") for one in (batch[0], attacked))

    shifted = fgsm(net, loss_of, (x, y), 0.25)[0]
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(net(leaf), y, reduction="sum"), leaf)
    torch.testing.assert_close(shifted, x + 0.25 * slope.sign())
    assert all(p.grad is None for p in net.parameters())
