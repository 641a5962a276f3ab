"""Runs that draw alike: dropout is off in them, also where a function drops out values inside."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons.replay.same_draws import SameDraws
from tests.models import seeded
from tests.tables import for_each

X = 2, 3, 5, 4


INSIDE = {
    "attention": lambda p: lambda x: F.scaled_dot_product_attention(x, x, x, None, p),
    "attention by name": lambda p: lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=p),
    "attention of torch": lambda p: of_torch(nn.MultiheadAttention, p),
    "LSTM": lambda p: recurrent(nn.LSTM, p),
    "GRU": lambda p: recurrent(nn.GRU, p),
    "dropout": lambda p: lambda x: F.dropout(x, p),
}


def of_torch(kind: type[nn.MultiheadAttention], p: float) -> Callable[[Tensor], Tensor]:
    module = seeded(lambda: kind(4, 2, dropout=p, batch_first=True)).train()
    return lambda x: module(x[0], x[0], x[0])[0]


def recurrent(kind: type[nn.RNNBase], p: float) -> Callable[[Tensor], Tensor]:
    module = seeded(lambda: kind(4, 6, num_layers=2, dropout=p, batch_first=True)).train()
    return lambda x: module(x[0])[0]


@for_each("name", INSIDE)
def test_nothing_is_dropped_out(name):
    run, whole, x = INSIDE[name](0.5), INSIDE[name](0.0), torch.randn(X)
    with SameDraws({}):
        seen = run(x)
    assert torch.equal(seen, whole(x))
    assert not torch.equal(run(x), whole(x))  # it does drop out values by itself
