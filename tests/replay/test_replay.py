"""A replay gives, bit for bit, what a whole forward with the neuron changed by hand gives."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lightning_neurons.ablation.engine import AblationEngine, BatchAblation
from lightning_neurons.isolation.isolation import isolated
from tests.models import CharTransformer, pictures, seeded
from tests.replay import replayed
from tests.replay.replayed import changed

NETS = {
    "residual, functional": lambda: replayed.Residuals("functional"),
    "residual, in place": lambda: replayed.Residuals("in place"),
    "residual, one relu": lambda: replayed.Residuals("shared"),
    "squeezed and excited": replayed.Mobile,
    "densely connected": replayed.Dense,
    "branching": replayed.Branching,
    "swapping": replayed.Swapping,
    "writes one of two": replayed.WritesOneOfTwo,
    "sample by sample": replayed.PerSample,
    "counting": replayed.Counting,
    "twice": replayed.Twice,
    "views": replayed.Views,
    "lstm": replayed.Memory,
    "a mapping": lambda: replayed.TwoOutputs("mapping"),
    "a pair": lambda: replayed.TwoOutputs("pair"),
}
WHOLE = {"branching", "swapping", "writes one of two", "sample by sample"}
"""Networks of which some runs may have to be whole forwards."""


def logits_of(output):
    return output["logits"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output


def losses(model, batch):
    """One for each sample, so that nothing has to be taken apart."""
    return F.cross_entropy(logits_of(model(batch[0])), batch[1], reduction="none")


@contextmanager
def opened(net, batch, loss_fn=losses, **options) -> Iterator[tuple[AblationEngine, BatchAblation]]:
    study = AblationEngine(net, loss_fn, **options)
    with isolated(net), torch.no_grad(), study.open():
        with isolated(net):
            study.look(batch)
            if study.replacement == "mean":
                study.measure_means([batch])
        torch.manual_seed(5)
        here = study.on(batch)
        here.order(list(study.layers))
        yield study, here


def some_neurons(study: AblationEngine) -> list[tuple[str, int, int]]:
    return [(n, i, layer.axis) for n, layer in study.layers.items() for i in sorted({0, 1, layer.neurons - 1})]


def whole(twin, batch, layer, neuron, axis, new):
    """The losses of a whole forward of a copy of a copy, with the same random numbers."""
    torch.manual_seed(5)
    with torch.no_grad(), changed(layer, neuron, axis, new):
        return losses(copy.deepcopy(twin), batch).double()


@pytest.mark.parametrize("name", NETS)
def test_zeros_as_in_a_whole_forward(name):
    net, batch = seeded(NETS[name]), pictures(5)
    twin = copy.deepcopy(net)
    with opened(net, batch) as (study, here):
        for layer, neuron, axis in some_neurons(study) * 2:
            found = here.without([{layer: [neuron]}]).losses[0]
            assert torch.equal(found, whole(twin, batch, layer, neuron, axis, torch.zeros_like)), (layer, neuron)
        assert not study.remarks() or name in WHOLE


@pytest.mark.parametrize("name", NETS)
def test_means_as_in_a_whole_forward(name):
    net, batch = seeded(NETS[name]), pictures(5)
    twin = copy.deepcopy(net)
    with opened(net, batch, replacement="mean") as (study, here):
        for layer, neuron, axis in some_neurons(study):
            mean = study.means[layer][neuron].float()

            def new(old, mean=mean):
                return mean.expand_as(old)

            found = here.without([{layer: [neuron]}]).losses[0]
            assert torch.equal(found, whole(twin, batch, layer, neuron, axis, new)), (layer, neuron)


@pytest.mark.parametrize("name", sorted(NETS.keys() - {"sample by sample"}))
def test_values_of_other_samples_as_in_a_whole_forward(name, monkeypatch):
    net, batch, order = seeded(NETS[name]), pictures(5), torch.tensor([3, 0, 4, 2, 1])
    monkeypatch.setattr(AblationEngine, "shuffle", lambda self, samples: order)
    twin = copy.deepcopy(net)
    with opened(net, batch, replacement="resample") as (study, here):
        for layer, neuron, axis in some_neurons(study):
            found = here.without([{layer: [neuron]}]).losses[0]
            expected = whole(twin, batch, layer, neuron, axis, lambda old: old[order])
            assert torch.equal(found, expected), (layer, neuron)


@pytest.mark.parametrize("name", ["swapping", "writes one of two", "branching"])
def test_later_batches_may_take_another_way(name):
    """What is learnt from the first batch, such as who makes what, need not hold for the others."""
    net = seeded(NETS[name])
    batches = [(pictures(5, seed=seed)[0] + shift, pictures(5)[1]) for seed in (1, 2) for shift in (-1.0, 1.0)]
    twin = copy.deepcopy(net)
    with opened(net, batches[0]) as (study, _):
        for batch in batches:
            here = study.on(batch)
            here.order(list(study.layers))
            for layer, neuron, axis in some_neurons(study):
                found = here.without([{layer: [neuron]}]).losses[0]
                assert torch.equal(found, whole(twin, batch, layer, neuron, axis, torch.zeros_like)), (layer, neuron)


@pytest.mark.parametrize("norms_train", [False, True])
def test_dropout_draws_the_same_masks_again(norms_train):
    net, batch = seeded(replayed.Dropping).train(), pictures(5)
    net.bn1.train(norms_train)
    net.bn2.train(norms_train)
    twin = copy.deepcopy(net)
    with opened(net, batch) as (study, here):
        assert torch.equal(here.outcome.losses[0], whole(twin, batch, "", 0, 0, torch.zeros_like))
        for layer, neuron, axis in some_neurons(study):
            found = here.without([{layer: [neuron]}]).losses[0]
            assert torch.equal(found, whole(twin, batch, layer, neuron, axis, torch.zeros_like)), (layer, neuron)
        assert study.remarks() == []
    assert all(torch.equal(twin.state_dict()[name], value) for name, value in net.state_dict().items())


def next_code(model, batch):
    return F.cross_entropy(model(batch).transpose(1, 2), batch.roll(1, 1), reduction="none").mean(1)


def test_a_transformer_gives_what_it_gives_with_plain_hooks():
    net, codes = seeded(CharTransformer, 9), torch.randint(0, 9, (4, 16))
    readers = {f"blocks.{i}.fc1": net.blocks[i].fc2 for i in range(2)}  # behind GELU there is no other module
    with opened(net, codes, next_code) as (study, here):
        for layer, neuron, _ in some_neurons(study):

            def silence(value, neuron=neuron):
                value = value.clone()
                value[..., neuron] = 0
                return value

            if layer in readers:
                hook = readers[layer].register_forward_pre_hook(lambda m, given, change=silence: change(given[0]))
            else:
                module = net.get_submodule(layer)
                hook = module.register_forward_hook(lambda m, given, out, change=silence: change(out))
            expected = next_code(net, codes).double()
            hook.remove()
            assert torch.equal(here.without([{layer: [neuron]}]).losses[0], expected), (layer, neuron)
        assert study.remarks() == []


@pytest.mark.parametrize("name", ["residual, functional", "residual, in place", "squeezed and excited", "views"])
def test_several_neurons_of_several_layers_at_once(name):
    net, batch = seeded(NETS[name]), pictures(5)
    with opened(net, batch) as (study, here):
        layers = list(study.layers)
        for first, second in pairwise(layers):
            found = here.without([{second: [0], first: [1]}]).losses[0]
            one, other = study.layers[first], study.layers[second]
            with changed(first, 1, one.axis, torch.zeros_like):
                inner = replayed.CHANGES.copy()
                with changed(second, 0, other.axis, torch.zeros_like):
                    replayed.CHANGES.extend(inner)
                    assert torch.equal(found, losses(net, batch).double()), (first, second)


@pytest.mark.parametrize("name", NETS)
def test_with_hardly_any_memory_every_layer_is_recorded_anew_and_nothing_changes(name):
    net, batch = seeded(NETS[name]), pictures(5)
    with opened(net, batch) as (study, here):
        sets = [{layer: [neuron]} for layer, neuron, _ in some_neurons(study)]
        expected = here.without(sets).losses
    with opened(net, batch, memory_limit=1) as (_, here):
        assert torch.equal(here.without(sets).losses, expected)
        assert torch.equal(here.without(sets[::-1]).losses, expected.flip(0))


@pytest.mark.parametrize("name", NETS)
def test_shortcuts_are_equal_up_to_rounding(name):
    net, batch = seeded(NETS[name]), pictures(5)
    with opened(net, batch) as (study, here):
        sets = [{layer: [neuron]} for layer, neuron, _ in some_neurons(study)]
        expected = here.without(sets).losses
    with opened(net, batch, exact=False) as (_, here):
        torch.testing.assert_close(here.without(sets).losses, expected, rtol=1e-5, atol=1e-5)
