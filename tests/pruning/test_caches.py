"""A model may return keys and values for its next call: heads go from these as well."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import prune
from lightning_neurons.data.batches import results_of
from tests.pruning.nets import seeded
from tests.pruning.user_types import Conv1D
from tests.tables import for_each


class KeyCache:
    """Keys and values of all earlier calls."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 2)
        self.values = values if self.values is None else torch.cat([self.values, values], 2)
        return self.keys, self.values


class Decoder(nn.Module):
    """Attention with the fused projection of GPT-2, which goes on where its last call ended."""

    def __init__(self, form: Any = dict) -> None:
        super().__init__()
        self.form, self.width, self.head_size = form, 12, 3
        self.embed, self.fused, self.out = nn.Embedding(9, 8), Conv1D(36, 8), Conv1D(8, 12)
        self.head = nn.Linear(8, 9)

    def forward(self, codes: Tensor, past_key_values: KeyCache | None = None) -> Any:
        x, cache = self.embed(codes), past_key_values or KeyCache()
        start = 0 if cache.keys is None else cache.keys.shape[2]
        parts = self.fused(x).split(self.width, -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in parts)
        keys, values = cache.update(k, v)
        mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool).tril(start)
        mixed = F.scaled_dot_product_attention(q, keys, values, mask).transpose(1, 2).flatten(2)
        logits = self.head(x + self.out(mixed))
        return (logits, cache) if self.form is tuple else {"logits": logits, "past_key_values": cache}


CODES = torch.arange(10).reshape(2, 5) % 9


@for_each("form", [dict, tuple])
def test_heads_of_a_model_that_returns_its_cache_go_and_the_cache_has_the_others(form):
    net = seeded(lambda: Decoder(form), double=True)
    reference = seeded(lambda: Decoder(form), double=True)
    with torch.no_grad():
        reference.out.weight[3:6] = 0  # the second of four heads
    prune(net, CODES, {"fused": [3, 4, 5]})
    assert (net.width, net.fused.nf, net.out.nx) == (9, 27, 9)
    (whole,), (expected,) = (results_of(model(CODES)) for model in (net, reference))
    torch.testing.assert_close(whole, expected, atol=1e-12, rtol=0)
    first = net(CODES[:, :3])
    cache = first[1] if form is tuple else first["past_key_values"]
    assert cache.keys.shape == (2, 3, 3, 3)
    (rest,) = results_of(net(CODES[:, 3:], cache))
    torch.testing.assert_close(rest, expected[:, 3:], atol=1e-12, rtol=0)


def test_other_results_count_wherever_they_are():
    a, b, c = (torch.zeros(n) for n in (1, 2, 3))
    kept = KeyCache()
    kept.update(b, b)
    assert [len(t) for t in results_of({"x": (a, [kept, c]), "past_key_values": [b], "y": b.clone()})] == [1, 3, 2]
