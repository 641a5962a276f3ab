"""Layers whose neurons no graph knows are named with what really happens to them; the rest of the model is cut."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from lightning_neurons import describe_structure, prune
from tests.models import seeded

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
HIDDEN = "what it makes is cut off from the output"
TRANSFORMED = "it runs inside of a transform of torch.func"
USED = "its weights are used by a function"
IDLE = "it did not run"


class Aside(nn.Module):
    """Something is made of an odd layer, and added to what the head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.odd, self.stem, self.hidden, self.head = (nn.Linear(*sizes) for sizes in ((4, 7), (4, 6), (6, 7), (7, 2)))

    def aside(self, x: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(torch.relu(self.stem(x))) + self.aside(x)))


class Unread(Aside):
    def aside(self, x: Tensor) -> Any:
        return 0.0 * self.odd.weight.shape[0] * self.odd.weight.numel()


class WithoutGradient(Aside):
    def aside(self, x: Tensor) -> Any:
        with torch.no_grad():
            return self.odd(x)


class Inferred(Aside):
    def aside(self, x: Tensor) -> Any:
        with torch.inference_mode():
            out = self.odd(x)
        return out.clone()


class Detached(Aside):
    def aside(self, x: Tensor) -> Any:
        return self.odd(x).detach()


class Numpy(Aside):
    def aside(self, x: Tensor) -> Any:
        return torch.from_numpy(self.odd(x).detach().numpy())


class Reentrant(Aside):
    def aside(self, x: Tensor) -> Any:
        return checkpoint(self.odd, x, use_reentrant=True)


class Functional(Aside):
    def aside(self, x: Tensor) -> Any:
        return nn.functional.linear(x, self.odd.weight, self.odd.bias)


class FunctionalWithoutGradient(Aside):
    def aside(self, x: Tensor) -> Any:
        with torch.no_grad():
            return nn.functional.linear(x, self.odd.weight)


class WeightsInNumpy(Aside):
    def aside(self, x: Tensor) -> Any:
        return torch.from_numpy(x.numpy() @ self.odd.weight.detach().numpy().T)


class ByTangent(Aside):
    def aside(self, x: Tensor) -> Any:
        return jvp(self.odd, (x,), (torch.ones_like(x),))[1]


class SampleBySample(Aside):
    def aside(self, x: Tensor) -> Any:
        return vmap(self.odd)(x)


class ByGradient(Aside):
    def aside(self, x: Tensor) -> Any:
        return vmap(grad(lambda row: self.odd(row).square().sum()))(x).sum(1, keepdim=True)


REASONS = {
    Unread: IDLE,
    WithoutGradient: HIDDEN,
    Inferred: HIDDEN,
    Detached: HIDDEN,
    Numpy: HIDDEN,
    Reentrant: HIDDEN,
    Functional: USED,
    FunctionalWithoutGradient: USED,
    WeightsInNumpy: USED,
    ByTangent: TRANSFORMED,
    SampleBySample: TRANSFORMED,
    ByGradient: TRANSFORMED,
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("kind", REASONS)
def test_an_unseen_layer_is_named_with_the_reason_and_what_does_not_meet_it_is_cut(kind):
    net = seeded(kind)
    unseen = describe_structure(net, X)["unseen"]
    assert list(unseen) == ["odd"]
    assert unseen["odd"].startswith(REASONS[kind])
    report = prune(net, X, {"criterion": "weight_l2", "amount": 0.4})
    assert f"odd is not cut: it is not in the model's graph: {unseen['odd']}" in report.notes
    assert (net.stem.out_features, net.odd.out_features) == (4, 7)
    is_idle = "did not run, so not cut with what they may read in training: odd" in report.notes
    assert is_idle == (kind is Unread)


class Ensemble(nn.Module):
    """The members run as one, with their weights stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden = nn.Linear(4, 6), nn.Linear(6, 5)
        self.members = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.hidden(torch.relu(self.stem(x))))
        weights, buffers = stack_module_state(list(self.members))
        run = vmap(lambda w, b, x: functional_call(self.members[0], (w, b), (x,)), (0, 0, None))
        return run(weights, buffers, x).mean(0)


def test_members_of_an_ensemble_that_runs_as_one_stay_whole_and_what_is_in_front_of_it_is_cut():
    net = seeded(Ensemble)
    expected = {f"members.{member}.{layer}": USED if member else TRANSFORMED for member in range(3) for layer in (0, 2)}
    unseen = describe_structure(net, X)["unseen"]
    assert {name: next(r for r in (USED, TRANSFORMED) if why.startswith(r)) for name, why in unseen.items()} == expected
    whole = net.stem.weight.detach().clone(), net.hidden.weight.detach().clone()
    report = prune(net, X, {"stem": [1, 4]}, compensation="none")
    assert report.plan.neurons == {"stem": (1, 4)}
    kept = [0, 2, 3, 5]
    assert torch.equal(net.stem.weight, whole[0][kept])
    assert torch.equal(net.hidden.weight, whole[1][:, kept])
    assert any(note.startswith("hidden is not cut") for note in prune(net, X, 0.3).notes)
