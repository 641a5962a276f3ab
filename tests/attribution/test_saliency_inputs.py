"""Tokens, signals, volumes and tables; dicts and tuples; and whatever models return."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import ArgumentError, MeasurementError, integrated_gradients, randomization_check, saliency
from lightning_neurons.demo import DigitsModule
from tests.callbacks.modules import Plain, dataset
from tests.models import ConvNet, pictures, seeded
from tests.tables import for_each


class Reader(nn.Module):
    """Classifies tokens; with or without places, with or without a mask."""

    def __init__(self, *, places: bool = False) -> None:
        super().__init__()
        self.place = nn.Embedding(5, 6) if places else None  # runs first, and is registered first
        self.word, self.hidden, self.head = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        place = 0 if self.place is None else self.place(torch.arange(tokens.shape[1]))
        return self.behind(self.word(tokens), place, mask)

    def behind(self, words: Tensor, place: Tensor | int, mask: Tensor | None) -> Tensor:
        x = torch.tanh(self.hidden(words + place))
        x = x if mask is None else x * mask[..., None]
        return self.head(x.mean(1) + x.amax(1))

    def by_hand(self, words: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.behind(words, 0 if self.place is None else self.place.weight[: words.shape[1]], mask)


TOKENS = torch.tensor([[1, 2, 0, 0, 0], [4, 4, 10, 7, 1], [9, 3, 2, 5, 0], [0, 1, 2, 3, 4]])
MASKS = {
    "none": None,
    "booleans": TOKENS.bool(),
    "whole numbers": TOKENS.bool().long(),
}


def reader(places=False):
    return seeded(Reader, places=places, double=True)


def at_words(net, tokens, klass, mask=None):
    """The embeddings of tokens, and the gradient there."""
    words = net.word.weight[tokens].detach().requires_grad_()
    logits = net.by_hand(words, mask)
    return words.detach(), torch.autograd.grad(logits[:, klass].sum(), words)[0]


@for_each("places", [False, True])
@for_each("mask", MASKS)
def test_a_token_has_the_norm_of_the_gradient_at_its_embedding(places, mask):
    net, extra = reader(places), MASKS[mask]
    words, gradient = at_words(net, TOKENS, 1, extra)
    inputs = {"tokens": TOKENS} | ({} if extra is None else {"mask": extra})
    torch.testing.assert_close(saliency(net, inputs, 1), (gradient**2).sum(-1).sqrt())
    torch.testing.assert_close(saliency(net, tuple(inputs.values()), 1), (gradient**2).sum(-1).sqrt())
    torch.testing.assert_close(saliency(net, inputs, 1, method="grad_x_input"), (gradient * words).sum(-1))


def test_a_single_row_of_tokens_that_counts_from_zero_is_not_taken_for_places():
    net, tokens = reader(places=True), torch.arange(5)[None]
    torch.testing.assert_close(saliency(net, tokens, 1), at_words(net, tokens, 1)[1].norm(dim=-1))


@for_each("dtype", [torch.int64, torch.int32])
def test_tokens_of_any_integer_type(dtype):
    net = reader()
    assert torch.equal(saliency(net, TOKENS.to(dtype), 2), saliency(net, TOKENS, 2))


@for_each("target", [None, ("hidden", 2), "hidden", [0, 1, 2, 0]])
@for_each("method", ["gradient", "smoothgrad", "integrated_gradients"])
def test_tokens_can_be_asked_about_anything(target, method):
    found = saliency(reader(places=True), {"tokens": TOKENS, "mask": MASKS["booleans"]}, target, method=method)
    assert found.shape == TOKENS.shape
    assert bool(found.isfinite().all() & found.any())


def test_a_layer_behind_tokens_has_the_gradient_of_its_mean_over_tokens():
    net = reader()
    words = net.word.weight[TOKENS].detach().requires_grad_()
    total = torch.tanh(net.hidden(words))[..., 2].mean(1).sum()
    expected = torch.autograd.grad(total, words)[0].norm(dim=-1)
    torch.testing.assert_close(saliency(net, TOKENS, ("hidden", 2)), expected)


def test_integrated_gradients_of_tokens_are_complete_in_their_embeddings():
    net = reader(places=True)
    found = integrated_gradients(net, TOKENS, 1)
    words = net.word.weight[TOKENS].detach()
    with torch.no_grad():
        difference = (net.by_hand(words) - net.by_hand(0 * words))[:, 1]
    assert found.attributions.shape == TOKENS.shape
    torch.testing.assert_close(found.difference, difference)
    torch.testing.assert_close(found.attributions.sum(1), difference, rtol=1e-3, atol=1e-6)
    somewhere = integrated_gradients(net, TOKENS, 1, baseline=words.mean(0))
    with torch.no_grad():
        difference = (net.by_hand(words) - net.by_hand(words.mean(0).expand_as(words)))[:, 1]
    torch.testing.assert_close(somewhere.attributions.sum(1), difference, rtol=1e-3, atol=1e-6)


def test_smoothgrad_of_tokens_without_noise_is_their_gradient():
    assert torch.equal(saliency(reader(), TOKENS, 1, method="smoothgrad", noise=0), saliency(reader(), TOKENS, 1))


def test_many_texts_are_independent_of_each_other():
    net, tokens = reader(places=True), torch.randint(0, 11, (70, 5))
    found = saliency(net, {"tokens": tokens, "mask": tokens > 3}, 1)
    alone = saliency(net, {"tokens": tokens[33:34], "mask": tokens[33:34] > 3}, 1)
    torch.testing.assert_close(found[33:34], alone)


def test_similarity_of_token_maps_falls_too():
    assert [s.layer for s in randomization_check(reader(), TOKENS)] == ["head", "hidden", "word"]


class Hashed(Reader):
    """Its embedding does not read the tokens themselves."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward((7 * tokens + 1) % 11, mask)


@for_each("make, inputs, dtype", [
    (ConvNet, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "uint8"),
    (ConvNet, torch.zeros(2, 3, 8, 8, dtype=torch.int64), "int64"),
    (lambda: nn.Linear(4, 2), torch.zeros(2, 4, dtype=torch.bool), "bool"),
    (lambda: nn.Linear(4, 2), torch.zeros(2, 4, dtype=torch.complex64), "complex64"),
    (Hashed, TOKENS, "int64"),
])  # fmt: skip
def test_what_has_no_gradient_is_refused(make, inputs, dtype):
    with pytest.raises(ArgumentError, match=rf"inputs='torch\.{dtype}'.*floating point.*nn\.Embedding"):
        saliency(seeded(make), inputs, 1)


def test_tokens_that_the_embedding_refuses_are_refused_with_the_cause():
    with pytest.raises(MeasurementError, match=r"Reader refuses inputs of shape \(1, 2\): IndexError"):
        saliency(seeded(Reader), torch.tensor([[3, 11]]), 1)


@for_each("shape", [(5,), (4, 9), (3, 5, 6), (2, 3, 4, 5)])
@for_each("method", ["gradient", "grad_x_input", "smoothgrad", "integrated_gradients"])
def test_inputs_of_any_number_of_axes(shape, method):
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 3)), torch.randn(35, *shape)
    found = saliency(model, x, 1, method=method)
    weight = model[1].weight[1].detach().view(shape).expand_as(x)
    factor = 1 if method in {"gradient", "smoothgrad"} else x
    torch.testing.assert_close(found, weight * factor, rtol=1e-4, atol=1e-5)


def test_signals_through_a_convolution():
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)
    ).double()
    x = torch.randn(3, 2, 9, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(saliency(model, x, 1), torch.autograd.grad(model(x)[:, 1].sum(), x)[0])


def test_a_lightning_module_is_a_model():
    module, x = seeded(Plain), dataset(5)[:][0]
    torch.testing.assert_close(saliency(module, x, 1), saliency(module.net, x, 1))
    torch.testing.assert_close(saliency(module, x, ("net.conv2", 1)), saliency(module.net, x, ("conv2", 1)))


@for_each("method", ["gradient", "smoothgrad", "integrated_gradients", "grad_cam"])
def test_forward_says_how_to_run_a_model(trained, method):
    module, (net, x, _) = DigitsModule(), trained
    module.net = net
    found = saliency(module, x[:3], 4, method=method, forward=lambda model, inputs: model.net(inputs))
    torch.testing.assert_close(found, saliency(net, x[:3], 4, method=method))
    with pytest.raises(MeasurementError, match=r"DigitsModule refuses inputs of shape \(3, 1, 8, 8\)"):
        saliency(module, x[:3], 4, method=method)


def test_forward_gets_inputs_of_any_form():
    net, (x, labels) = seeded(ConvNet), pictures(4)
    batch = {"image": x, "labels": labels, "names": list("abcd")}
    found = saliency(net, batch, 1, forward=lambda model, inputs: model(inputs["image"]))
    torch.testing.assert_close(found, saliency(net, x, 1))


@dataclass
class Outputs:
    logits: Tensor
    loss: Tensor | None = None


class Wrapped(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.net, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x: Tensor):
        return self.wrap(self.net(x))


WRAPPED = {
    "dict": lambda logits: {"loss": None, "logits": logits},
    "dataclass": Outputs,
    "places": lambda logits: torch.stack([logits - 1, logits + 1], 2),
    "its only floating-point tensor": lambda logits: {"scores": logits, "labels": logits.argmax(1)},
    "picture of places": lambda logits: logits[:, :, None, None].expand(-1, -1, 2, 2),
}


@for_each("wrap", WRAPPED)
@for_each("of", ["logit", "probability", "loss"])
def test_logits_are_found_in_outputs(wrap, of):
    model, x = seeded(Wrapped, WRAPPED[wrap]), torch.randn(5, 4)
    for target in (2, None):
        torch.testing.assert_close(saliency(model, x, target, of=of), saliency(model.net, x, target, of=of))


@for_each("wrap", [lambda y: (y, y), lambda y: None, lambda y: y.argmax(1), lambda y: {"y": y, "z": y},
                                  lambda y: y.sum()])  # fmt: skip
@for_each("target", [1, None])
def test_outputs_without_logits_are_refused_unless_a_layer_is_meant(wrap, target):
    model, x = seeded(Wrapped, wrap), torch.randn(5, 4)
    with pytest.raises(MeasurementError, match=r'the model returned .*expected logits .*forward=.*\("layer", neuron\)'):
        saliency(model, x, target)
    torch.testing.assert_close(saliency(model, x, ("net", 1)), saliency(model.net, x, 1))


SLOPES = {
    "logit": lambda y: 1,
    "probability": lambda y: y.sigmoid() * (1 - y.sigmoid()),
    "loss": lambda y: y.sigmoid() - 1,  # of binary cross entropy with the one class there is: -log of its probability
}


@for_each("columns", [lambda y: y[:, 0], lambda y: y[:, :1]])
@for_each("of", SLOPES)
def test_a_binary_model_has_one_class(columns, of):
    model, x = seeded(Wrapped, columns, double=True), torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = model.net.weight[0] * torch.as_tensor(SLOPES[of](model.net(x)[:, :1])).expand(5, 1)
    for target in (0, None, [0] * 5):
        torch.testing.assert_close(saliency(model, x, target, of=of), expected)
    with pytest.raises(ArgumentError, match=r"target=1 .*0 to 0"):
        saliency(model, x, 1, of=of)
