"""Which layers make the output, and which are summed into one stream: by name, for nets whose answer is known."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons.hooks.find_neurons import find_neurons
from tests.tables import for_each


class Net(nn.Module):
    """Layers by name, and a forward over them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x: Tensor):
        return self.run(self, x)


def lin(inputs: int = 4, outputs: int = 4) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def fed_back(net, x):
    y = torch.zeros(len(x), 4)
    for _ in range(3):
        y = net.head(torch.relu(net.inner(x + y)))
    return y


class Square(torch.autograd.Function):
    """Not seen by anybody who watches torch functions."""

    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def tied(net, x):
    h = torch.relu(net.inner(net.emb(x.long() % 5)))
    return F.linear(net.last(h), net.emb.weight)


def tokens(net, x):
    stream = net.patch(x.view(-1, 1, 2, 2)).flatten(2).transpose(1, 2)
    stream = torch.cat([net.cls.expand(len(x), -1, -1), stream], 1) + net.pos
    stream = stream + net.mlp(torch.relu(net.up(stream)))
    return net.head(stream[:, 0])


OUTPUTS = {
    "a classifier with softmax": (
        Net(lambda n, x: n.head(torch.relu(n.inner(x))).softmax(-1), inner=lin(), head=lin()), {"head"},
    ),
    "several heads, in a dict": (
        Net(lambda n, x: {"a": n.a(n.inner(x)), "b": n.b(n.inner(x)).sigmoid()}, inner=lin(), a=lin(), b=lin(4, 2)),
        {"a", "b"},
    ),
    "an autoencoder whose code is looked at as well": (
        Net(lambda n, x: (n.decode(z := torch.relu(n.encode(x))), z.abs().mean()), encode=lin(4, 2), decode=lin(2, 4)),
        {"decode"},
    ),
    "a head that is scaled by a matrix of parameters": (
        Net(lambda n, x: n.head(n.inner(x)) * n.scale, inner=lin(), head=lin(), scale=nn.Parameter(torch.ones(2, 4))),
        {"head"},
    ),
    "predictions that are fed back": (Net(fed_back, inner=lin(), head=lin()), {"head"}),
    "a head of tied weights, which is no module": (Net(tied, emb=nn.Embedding(5, 4), inner=lin(), last=lin()), set()),
    "a matrix product with parameters": (
        Net(lambda n, x: n.inner(x) @ n.out.t(), first=lin(), inner=lin(), out=nn.Parameter(torch.ones(3, 4))), set(),
    ),
    "behind a function that cannot be watched": (
        Net(lambda n, x: n.head(Square.apply(n.inner(x))), inner=lin(), head=lin()), {"head"},
    ),
    "a transformer in its fast path": (
        Net(
            lambda n, x: n.head(n.encoder(n.inner(x).unsqueeze(1)).mean(1)), inner=lin(),
            encoder=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), head=lin(),
        ),
        {"head"},
    ),
    "one layer alone": (Net(lambda n, x: n.head(x), head=lin()), set()),
    "a layer that does not run": (Net(lambda n, x: n.head(n.inner(x)), inner=lin(), head=lin(), spare=lin()), {"head"}),
    "written in place": (
        Net(lambda n, x: n.head(x.new_zeros(2, 4).add_(n.inner(x))), inner=lin(), head=lin()), {"head"},
    ),
}  # fmt: skip


@for_each("name", OUTPUTS)
def test_the_layers_that_make_the_output(name):
    net, expected = OUTPUTS[name]
    assert {layer.name for layer in find_neurons(net, torch.ones(2, 4)) if layer.output} == expected


def conv(inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1)


def basic_blocks(net, x):
    x = torch.relu_(net.norm(net.a(x.view(-1, 4, 1, 1).repeat(1, 1, 3, 3))))
    x = F.max_pool2d(x, 2)
    y = net.b(torch.relu(net.inner(x)))
    y += x
    return net.head(torch.relu_(y + net.c(y)).mean((2, 3)))


STREAMS = {
    "blocks of a residual network, in place": (
        Net(basic_blocks, a=conv(), norm=nn.BatchNorm2d(4), b=conv(), inner=conv(), c=conv(), head=lin()),
        [{"a", "b", "c"}],
    ),
    "tokens behind a convolution": (
        Net(
            tokens, patch=nn.Conv2d(1, 6, 1), cls=nn.Parameter(torch.zeros(1, 1, 6)),
            pos=nn.Parameter(torch.zeros(1, 5, 6)), up=lin(6, 8), mlp=lin(8, 6), head=lin(6, 2),
        ),
        [{"patch", "mlp"}],
    ),
    "a product gates and does not add": (
        Net(lambda n, x: n.head(n.a(x) * n.b(x).sigmoid()), a=lin(), b=lin(), head=lin(4, 2)), [],
    ),
    "a gate of one value a channel": (
        Net(
            lambda n, x: n.head((h := n.a(x)) + n.b(h) * n.gate(h).mean(0, keepdim=True)),
            a=lin(), b=lin(), gate=lin(), head=lin(),
        ),
        [{"a", "b"}],
    ),
    "the squared difference of a loss does not add": (
        Net(lambda n, x: (n.a(x) - n.b(x)).square().mean(), a=lin(), b=lin()), [],
    ),
    "channels behind channels": (
        Net(lambda n, x: n.head(torch.cat([n.a(x), n.b(x)], 1)), a=lin(), b=lin(), head=lin(8, 2)), [],
    ),
    "flattened, a neuron has several places": (
        Net(
            lambda n, x: n.head(n.a(x.view(-1, 4, 1, 1).repeat(1, 1, 2, 1)).flatten(1) + n.b(x)),
            a=conv(4, 4), b=lin(4, 8), head=lin(8, 2),
        ),
        [],
    ),
}  # fmt: skip


@for_each("name", STREAMS)
def test_the_layers_that_are_summed(name):
    net, expected = STREAMS[name]
    found = {frozenset({layer.name, *layer.twins}) for layer in find_neurons(net, torch.ones(2, 4)) if layer.twins}
    assert found == {frozenset(group) for group in expected}
