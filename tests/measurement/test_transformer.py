"""A small GELU transformer on text: tokens are positions, hidden units of the MLPs are neurons."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lightning_neurons import find_neurons, measure
from tests.models import CharTransformer, seeded

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, "
    "this truth is so well fixed in the minds of the surrounding families, that he is considered the rightful "
    "property of some one or other of their daughters."
)
LETTERS = sorted(set(TEXT))


def batches(*, size: int = 7, length: int = 16):
    codes = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    lines = codes[: len(codes) // (length + 1) * (length + 1)].view(-1, length + 1)
    return [(part[:, :-1], part[:, 1:]) for part in lines.split(size)]


def next_letter(model, batch):
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1])


@pytest.fixture
def net():
    return seeded(CharTransformer, len(LETTERS), double=True)


def test_the_hidden_units_are_found_behind_gelu_with_fc2_as_their_reader(net):
    layers = {layer.name: layer for layer in find_neurons(net, batches()[0][0])}
    assert len(layers) == 9
    for block in ("blocks.0", "blocks.1"):
        hidden = layers[f"{block}.fc1"]
        assert (hidden.neurons, hidden.axis, hidden.activation) == (12, -1, "gelu")
        assert hidden.activation_point == f"{block}.fc1 > gelu"
        assert hidden.readers == ((f"{block}.fc2", 1),)
        assert (hidden.rectified, hidden.bounds) == (False, None)
        assert layers[f"{block}.fc2"].chain == layers[f"{block}.qkv"].chain == ()


def test_scores_sum_to_one_and_equal_a_loop_over_lines_and_tokens(net):
    report = measure(net, batches(), loss_fn=next_letter, criteria=["gradient", "taylor", "rms"])
    squares, gates, values = [], [], []
    for codes, following in batches(size=1):
        kept: list[torch.Tensor] = []
        handle = net.blocks[1].fc1.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output))
        hidden_loss = next_letter(net, (codes, following))
        handle.remove()
        # The derivative behind GELU, from the one before it.
        (before,) = torch.autograd.grad(hidden_loss, kept)
        slope = torch.func.vmap(torch.func.vmap(torch.func.vmap(torch.func.grad(F.gelu))))(kept[0].detach())
        gradient, activation = before / slope, F.gelu(kept[0].detach())
        squares.append(sum(gradient[0, t] ** 2 for t in range(16)))
        gates.append(sum(gradient[0, t] * activation[0, t] for t in range(16)))
        values.append(activation[0])
    expected = torch.stack(squares).mean(0)
    close = {"rtol": 1e-6, "atol": 1e-12}
    torch.testing.assert_close(report.scores["gradient"]["blocks.1.fc1"], expected / expected.sum(), **close)
    torch.testing.assert_close(report.scores["taylor"]["blocks.1.fc1"], torch.stack(gates).abs().mean(0), **close)
    rms = torch.cat(values).square().mean(0).sqrt()
    torch.testing.assert_close(report.scores["rms"]["blocks.1.fc1"], rms, **close)
    for layer, scores in report.scores["gradient"].items():
        assert scores.sum().item() == pytest.approx(1), layer


def test_tokens_count_as_positions_and_lines_as_samples(net):
    report = measure(net, batches(), loss_fn=next_letter)
    lines = sum(len(part[0]) for part in batches())
    for layer, counts in report.counts.items():
        assert counts.samples.tolist() == [lines] * len(counts.samples), layer
        assert counts.values.tolist() == [lines * 16] * len(counts.samples), layer


def test_exact_zeros_are_refused_with_the_reason_and_small_values_are_counted_instead(net):
    with torch.no_grad():
        net.blocks[0].fc1.weight[5].zero_()
        net.blocks[0].fc1.bias[5] = -30.0  # GELU is zero there for good
        net.blocks[0].fc1.weight[7].zero_()
        net.blocks[0].fc1.bias[7] = 1.0  # constant, but not silent
    report = measure(net, batches(), criteria=["apoz", "near_zero", "constant"])
    assert report.deadness_by["apoz"] == {}
    assert "gelu makes none in 'blocks.0.fc1'; use 'near_zero' or 'constant'" in report.refused["apoz"]["blocks.0.fc1"]
    assert "no activation function" in report.refused["apoz"]["head"]
    assert report.dead("blocks.0.fc1").nonzero().flatten().tolist() == [5]
    assert report.deadness_by["constant"]["blocks.0.fc1"].nonzero().flatten().tolist() == [5, 7]
    for shares in report.deadness_by["near_zero"].values():
        assert ((shares >= 0) & (shares <= 1)).all()


@pytest.mark.parametrize("size", [1, 7, 100])
def test_the_number_of_lines_in_a_batch_changes_no_score(net, size):
    expected = measure(net, batches(size=5), loss_fn=next_letter).scores
    found = measure(net, batches(size=size), loss_fn=next_letter).scores
    for name, by_layer in expected.items():
        for layer, scores in by_layer.items():
            torch.testing.assert_close(found[name][layer], scores, rtol=1e-9, atol=1e-12)
