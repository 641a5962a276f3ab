"""A report, a study and a decision to cut are of the weights that validation used, whoever swaps them, in any order."""

import copy
from itertools import cycle, product
from unittest.mock import Mock

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_neurons import (
    ClassNeuronsCallback,
    NeuronAblationCallback,
    NeuronSensitivityCallback,
    SaliencyCallback,
)
from lightning_neurons.callbacks.trainer import validated_weights
from tests.callbacks.modules import Plain, dataset, fit, loader
from tests.callbacks.pruned import Probe, assert_equal, pruner, weights
from tests.callbacks.studied import accuracy_without, loss_without, samples


class SwapsStates(L.Callback):
    """An average of one's own, exchanged as whole states, or by giving parameters other memory."""

    def __init__(self, *, pointers: bool) -> None:
        self.pointers, self.average, self.current = pointers, None, {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        now = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
        self.average = self.average or now
        self.average = {n: 0.8 * a + 0.2 * now[n] for n, a in self.average.items()}

    def on_validation_start(self, trainer, pl_module):
        if self.average is not None:
            self.current = {n: p.data if self.pointers else p.data.clone() for n, p in pl_module.named_parameters()}
            self._put(pl_module, {n: a.clone() for n, a in self.average.items()})

    def on_validation_epoch_end(self, trainer, pl_module):
        self._put(pl_module, self.current)
        self.current = {}

    def _put(self, pl_module, state):
        for name, value in state.items():
            parameter = pl_module.get_parameter(name)
            if self.pointers:
                parameter.data = value
            else:
                parameter.data.copy_(value)


class SwapsAroundBatches(SwapsStates):
    """The average is there while a batch runs, and only then."""

    def on_validation_start(self, trainer, pl_module):
        pass

    on_validation_epoch_end = on_validation_start

    def on_validation_batch_start(self, trainer, pl_module, *_):
        super().on_validation_start(trainer, pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *_):
        super().on_validation_epoch_end(trainer, pl_module)


class SwapsParameters(SwapsStates):
    """Other parameters take the place of the module's, after observers have heard that validation begins."""

    def on_validation_start(self, trainer, pl_module):
        pass

    def on_validation_epoch_start(self, trainer, pl_module):
        super().on_validation_start(trainer, pl_module)

    def _put(self, pl_module, state):
        for name, value in state.items():
            owner, _, short = name.rpartition(".")
            held = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
            setattr(pl_module.get_submodule(owner), short, held)

    def on_validation_epoch_end(self, trainer, pl_module):
        self._put(pl_module, self.trained)

    def setup(self, trainer, pl_module, stage):
        self.trained = dict(pl_module.named_parameters())


class Stream(IterableDataset):
    """Data of unknown length."""

    def __iter__(self):
        yield from dataset(24, 1)


AVERAGES = {
    "EMA": lambda: EMAWeightAveraging(decay=0.8),
    "states": lambda: SwapsStates(pointers=False),
    "memory": lambda: SwapsStates(pointers=True),
    "batches": lambda: SwapsAroundBatches(pointers=False),
    "parameters": lambda: SwapsParameters(pointers=False),
}


def validated(spy: Probe) -> Plain:
    """The network that the last validation used."""
    module = Plain()
    module.load_state_dict(spy.seen[max(spy.seen)])
    return module.eval()


def spying() -> Probe:
    return Probe("on_validation_batch_end", lambda _, module: copy.deepcopy(module.state_dict()))


def hidden(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What ``fc2`` reads."""
    x = torch.relu(net.norm1(net.conv1(x)))
    return torch.relu(net.fc1(torch.relu(net.norm2(net.conv2(x))).mean((2, 3))))


def fisher(net: nn.Module) -> torch.Tensor:
    """Of ``fc1``: half the mean square of activation times gradient, one sample at a time."""
    terms = []
    for x, y in dataset(24, 1):
        a = hidden(net, x[None]).detach().requires_grad_()
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(net.fc2(a), y[None]), a)
        terms.append((a * g).detach().double()[0])
    return 0.5 * torch.stack(terms).square().mean(0)


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-6)


ORDERS = list(product(AVERAGES, [True, False]))


@pytest.mark.parametrize("average, first, streams", [(*case, of) for case, of in zip(ORDERS, cycle([0, 1, 1, 0]))])
def test_a_report_is_of_the_weights_that_validation_used(average, first, streams):
    data = DataLoader(Stream(), 5) if streams else loader(24, seed=1)
    watching = NeuronSensitivityCallback(criteria=["mean", "fisher", "weight_l2", "norm_scale"], max_figures=0)
    spy, ema, module = spying(), AVERAGES[average](), Plain(lr=0.05)
    fit(module, [spy, *([ema, watching] if first else [watching, ema])], val=data, max_epochs=3)
    net, scores = validated(spy).net, watching.report.scores
    with torch.no_grad():
        assert near(scores["mean"]["net.fc1"], hidden(net, samples()[0]).double().mean(0))
    assert near(scores["fisher"]["net.fc1"], fisher(net))
    assert near(scores["weight_l2"]["net.fc1"], net.fc1.weight.detach().double().norm(dim=1))
    assert near(scores["norm_scale"]["net.conv1"], net.norm1.weight.detach().abs())


@pytest.mark.parametrize("average, first", list(zip(AVERAGES, cycle([True, False]))))
def test_studies_are_of_the_weights_that_validation_used(average, first):
    switching = NeuronAblationCallback(ends=None, max_samples=24)
    classes, saliency = ClassNeuronsCallback(share=0.5, controls=1, max_samples=24), SaliencyCallback(max_samples=4)
    spy, ema = spying(), AVERAGES[average]()
    studies = [switching, classes, saliency]
    fit(Plain(lr=0.05), [spy, *([ema, *studies] if first else [*studies, ema])], max_epochs=3)
    module, batch = validated(spy), samples()
    base = loss_without(module, batch, {})
    assert switching.ablation.loss == pytest.approx(base, rel=1e-5)
    for neuron in range(8):
        change = loss_without(module, batch, {"net.fc1": [neuron]}) - base
        assert float(switching.ablation.delta_loss["net.fc1"][neuron]) == pytest.approx(change, abs=1e-5)
    for klass in classes.report.classes:
        rows = batch[1] == klass
        right = accuracy_without(module, (batch[0][rows], batch[1][rows]), {})
        assert classes.report.accuracy("whole", klass).on_class == pytest.approx(right)
    inputs = saliency.found.inputs.clone().requires_grad_()
    chosen = module(inputs).gather(1, saliency.found.targets[:, None]).sum()
    assert near(saliency.found.maps, torch.autograd.grad(chosen, inputs)[0])


@pytest.mark.parametrize("first", [True, False], ids=["average first", "average last"])
def test_a_decision_to_cut_is_of_the_weights_that_validation_used(first):
    callback = pruner("weight_l2", amount=0.4, scope="layer", start_epoch=2, monitor="val_loss")
    spy, ema, module = spying(), EMAWeightAveraging(decay=0.8), Plain(lr=0.05)
    cut = Probe("on_train_epoch_start", lambda *_: copy.deepcopy(ema._average_model.module).eval())
    fit(module, [spy, *([ema, callback] if first else [callback, ema]), cut], max_epochs=3)
    spy.seen.pop(2)  # that of the network after the cut
    sizes = validated(spy).net.fc1.weight.detach().norm(dim=1)
    assert callback.plan.neurons["net.fc1"] == tuple(sorted(sizes.argsort()[:3].tolist()))
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(cut.seen[2].net(samples()[0]), samples()[1]))
    assert callback.rounds.done[0].cut == pytest.approx(loss, rel=1e-5), "the average, right after the cut"


@pytest.mark.parametrize("average", AVERAGES)
def test_training_is_what_it_is_without_us(average):
    def trained(*callbacks: L.Callback) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = Plain()
        trainer = fit(module, [AVERAGES[average](), *callbacks], max_epochs=2)
        return weights(module) | {"val_loss": trainer.callback_metrics["val_loss"]}

    alone = trained()
    assert_equal(trained(NeuronSensitivityCallback(max_figures=0), NeuronAblationCallback(ends=2)), alone)


def test_nothing_is_copied_where_nothing_can_change(monkeypatch):
    copies = Mock(side_effect=validated_weights._copies)
    monkeypatch.setattr(validated_weights, "_copies", copies)
    observers = [NeuronSensitivityCallback(max_figures=0), NeuronAblationCallback(ends=2)]
    fit(Plain(), [*observers, EMAWeightAveraging()])
    assert copies.call_count == 0
    trainer = fit(Plain(), [EMAWeightAveraging(), *observers])
    assert copies.call_count > 0
    assert trainer not in validated_weights._KEPT
