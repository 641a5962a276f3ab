"""Several changes in one replay give what they give one by one, up to rounding."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lightning_neurons.ablation.engine import AblationEngine
from lightning_neurons.isolation.isolation import isolated
from tests.models import CharTransformer, ConvNet, ResidualNet, cross_entropy, pictures, seeded
from tests.pruning.nets import ResNet


def each(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def next_code(model, codes):
    return F.cross_entropy(model(codes).transpose(1, 2), codes.roll(1, 1), reduction="none").mean(1)


CASES = {
    "convolutional": (ConvNet, cross_entropy, True),
    "losses of samples": (ConvNet, each, True),
    "residual": (lambda: ResNet(projection=True), cross_entropy, True),
    "in place": (lambda: ResidualNet(inplace=True), cross_entropy, False),  # what is written into is not repeated
}


def compared(net, batch, loss_fn, together):
    """By layer, what single runs give and what runs of several give; None where they are not possible."""
    study, found = AblationEngine(net, loss_fn, exact=False), {}
    with isolated(net), torch.no_grad(), study.open():
        study.look(batch)
        here = study.on(batch)
        for name, layer in study.layers.items():
            sets = [{name: [neuron]} for neuron in range(layer.neurons)]
            study.together = 1
            alone = here.without(sets).losses
            study.together = together
            stacked = here._stacked(sets)
            found[name] = alone, None if stacked is None else stacked.losses
            torch.testing.assert_close(here.without(sets).losses, alone, rtol=1e-5, atol=1e-6)
    return found


@pytest.mark.parametrize("together", [3, 64])
@pytest.mark.parametrize("name", CASES)
def test_as_one_by_one(name, together):
    make, loss_fn, possible = CASES[name]
    found = compared(seeded(make), pictures(6), loss_fn, together)
    for layer, (alone, stacked) in found.items():
        if possible:
            assert stacked is not None, layer
            torch.testing.assert_close(stacked, alone, rtol=1e-5, atol=1e-6)
    assert possible or any(stacked is None for _, stacked in found.values())


def test_tokens():
    codes = torch.randint(0, 9, (4, 16), generator=torch.Generator().manual_seed(0))
    for alone, stacked in compared(seeded(CharTransformer, 9), codes, next_code, 5).values():
        torch.testing.assert_close(stacked, alone, rtol=1e-5, atol=1e-6)


def test_sizes_that_the_model_remembers_are_noticed():
    class Remembering(ConvNet):
        def forward(self, x):
            x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
            size = len(x)
            x = self.act(self.bn2(self.conv2(x)))
            return self.fc2(F.relu(self.fc1(x.reshape(size, 80))))

    for alone, stacked in compared(seeded(Remembering), pictures(6), each, 4).values():
        if stacked is not None:
            torch.testing.assert_close(stacked, alone, rtol=1e-5, atol=1e-6)
