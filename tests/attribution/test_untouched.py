"""Whatever is asked, and however it ends: the model, its inputs and all random states are bit for bit as they were."""

import random
from contextlib import suppress
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_neurons import MeasurementError, activation_map, integrated_gradients, randomization_check, saliency
from lightning_neurons.attribution.saliency import METHODS
from tests.models import ConvNet, pictures, seeded
from tests.tables import for_each

QUESTIONS = {method: lambda net, x, method=method: saliency(net, x, 1, method=method) for method in METHODS} | {
    "predicted": lambda net, x: saliency(net, x),
    "neuron": lambda net, x: saliency(net, x, ("conv1", 1)),
    "layer": lambda net, x: saliency(net, x, "fc1", smoothing=1),
    "steps": lambda net, x: integrated_gradients(net, x, 2, steps=3).attributions,
    "activation map": lambda net, x: activation_map(net, x, "conv2", 1),
    "randomization check": lambda net, x: torch.tensor([s.spearman for s in randomization_check(net, x, 1)]),
}


class Restless(ConvNet):
    """Draws random numbers, counts, collects, and may fail: at its ``fails``-th forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, []
        self.register_buffer("total", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x.detach().mean())
        self.total += 1
        torch.rand(1), np.random.rand(), random.random()
        return super().forward(x)


def restless():
    """In a mixture of modes, partly frozen, with gradients and hooks of its own."""
    net = seeded(Restless)
    net.train()
    net.bn2.eval()
    net.conv2.requires_grad_(False)
    net.fc1.bias.requires_grad_(False)
    net.fc2.weight.grad = torch.full_like(net.fc2.weight, 0.5)
    net.act.register_forward_hook(lambda module, inputs, output: None)
    net.conv1.register_forward_pre_hook(lambda module, inputs: None)
    return net


def hooks_of(model):
    """How many entries each dict of hooks has, of all modules."""
    return [
        (path, name, list(value))
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if "hook" in name and hasattr(value, "__len__")
    ]


def kept(model):
    """Everything that can be compared afterwards; tensors with their identities and contents."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    grads = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return {
        "tensors": [(name, id(t), t._version, t.detach().numpy().tobytes()) for name, t in tensors + grads],
        "flags": [(name, p.requires_grad, p.is_leaf) for name, p in model.named_parameters()],
        "modes": [(path, m.training) for path, m in model.named_modules()],
        "hooks": hooks_of(model),
        "attributes": (getattr(model, "calls", 0), list(getattr(model, "seen", []))),
        "names": [(path, sorted(vars(m))) for path, m in model.named_modules()],
        "forwards": [(path, m.__dict__.get("forward")) for path, m in model.named_modules()],
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def differences(before, after):
    return [key for key in before if before[key] != after[key]]


@for_each("name", QUESTIONS)
def test_the_model_is_as_it_was(name):
    net, (x, _) = restless(), pictures(3)
    before = kept(net)
    QUESTIONS[name](net, x)
    assert differences(before, kept(net)) == []


@for_each("name", QUESTIONS)
def test_the_result_is_that_of_evaluation_mode(name):
    net, (x, _) = restless(), pictures(3)
    quiet = seeded(ConvNet).eval()
    quiet.load_state_dict({k: v for k, v in net.state_dict().items() if k != "total"})
    torch.testing.assert_close(QUESTIONS[name](net, x), QUESTIONS[name](quiet, x), rtol=0, atol=0)


@for_each("number, name", enumerate(QUESTIONS))
@for_each("when", [1, 2, 3])
def test_the_model_is_as_it_was_after_a_failure(number, name, when):
    error = (ZeroDivisionError, KeyboardInterrupt)[(number + when) % 2]
    net, (x, _) = restless(), pictures(70)
    counted, raised = Mock(calls=0), None  # what a hook holds of its own would be put back

    def fail(module, inputs):
        counted.calls += 1
        if counted.calls == when:
            raise error

    net.fc1.register_forward_pre_hook(fail)
    before = kept(net)
    try:
        QUESTIONS[name](net, x)
    except (MeasurementError, KeyboardInterrupt) as found:
        raised = found
    if counted.calls < when:  # forwards that are left early do not get there
        assert name in {"neuron", "activation map"}
    else:
        assert type(raised) is (KeyboardInterrupt if error is KeyboardInterrupt else MeasurementError)
    assert differences(before, kept(net)) == []


def test_a_failure_says_what_happened():
    net = seeded(ConvNet)
    net.act.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(
        MeasurementError, match=r"ConvNet refuses inputs of shape .*ZeroDivisionError: division by zero"
    ):
        saliency(net, pictures(2)[0], 1)


@for_each("name", QUESTIONS)
@for_each("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_where_they_are_switched_off(name, context):
    net, (x, _) = restless(), pictures(3)
    expected = QUESTIONS[name](net, x)
    with context():
        before = kept(net)
        assert torch.equal(QUESTIONS[name](net, x), expected)
        assert torch.equal(QUESTIONS[name](net, x.clone()), expected)
        assert differences(before, kept(net)) == []


@for_each("name", QUESTIONS)
def test_a_frozen_model_gives_the_same(name):
    net, (x, _) = seeded(ConvNet), pictures(3)
    expected = QUESTIONS[name](net, x)
    net.requires_grad_(False)
    assert torch.equal(QUESTIONS[name](net, x), expected)
    assert not any(p.requires_grad for p in net.parameters())


@for_each("name", QUESTIONS)
@for_each("grown", [False, True])
def test_inputs_stay_as_they_were(name, grown):
    net, (leaf, _) = seeded(ConvNet), pictures(3)
    leaf.requires_grad_()
    x = leaf * 1 if grown else leaf
    before = x.detach().clone()
    found = QUESTIONS[name](net, x)
    assert torch.equal(x, before)
    assert leaf.grad is None
    assert x.requires_grad
    assert not found.requires_grad
    assert not found.is_inference()


class WritesIntoItsInput(ConvNet):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        return super().forward(x)


@for_each("name", QUESTIONS)
def test_inputs_stay_as_they_were_though_the_model_writes_into_them(name):
    net, (x, _) = seeded(WritesIntoItsInput), pictures(3)
    before = x.clone()
    with suppress(MeasurementError):
        QUESTIONS[name](net, x)
    assert torch.equal(x, before)


@for_each("name", ["gradient", "smoothgrad", "grad_cam", "predicted", "neuron", "activation map"])
def test_a_model_that_writes_into_its_inputs_is_a_model_too(name):
    net, twin, (x, _) = seeded(WritesIntoItsInput), seeded(ConvNet), pictures(3)
    found = QUESTIONS[name](net, x.clone())
    torch.testing.assert_close(found, QUESTIONS[name](twin, x - 0.5))


@for_each("name", [n for n in QUESTIONS if n not in {"randomization check", "integrated_gradients"}])
@for_each("dtype, error", [(torch.float64, 1e-4), (torch.bfloat16, 0.2)])
def test_models_of_other_precisions(name, dtype, error):
    x = pictures(3)[0].bfloat16().float()
    net = seeded(ConvNet).bfloat16().float()
    exact = QUESTIONS[name](net, x)
    found = QUESTIONS[name](net.to(dtype), x.to(dtype))
    assert found.dtype == dtype
    assert float((found.double() - exact.double()).norm()) <= error * float(exact.double().norm())


def test_an_embedding_with_a_maximal_norm_is_as_it_was():
    net = nn.Sequential(nn.Embedding(9, 4, max_norm=0.1), nn.Flatten(), nn.Linear(12, 2))
    before = net[0].weight.detach().clone()
    saliency(net, torch.randint(0, 9, (2, 3)), 1)
    assert torch.equal(net[0].weight, before)
