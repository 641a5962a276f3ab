"""Transformers of torch take another path when they are hooked: what a user logs is that of the path without us."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_neurons import (
    ActivationStatisticsCallback,
    NeuronAblationCallback,
    NeuronSensitivityCallback,
    ablate,
)
from tests.callbacks.modules import Plain, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own, of the fast path

CALLBACKS = {
    "statistics": lambda: ActivationStatisticsCallback(max_figures=0),
    "sensitivity": NeuronSensitivityCallback,
    "ablation": NeuronAblationCallback,
}


def layer(**kwargs: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **kwargs)


class Tokens(nn.Module):
    """Classifies every position, also the padded ones."""

    def __init__(self, body: nn.Module, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.embedding, self.body, self.out = nn.Embedding(20, 8, padding_idx=0), body, nn.Linear(8, 3)
        self._run = run

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self._run(self.body, self.embedding(tokens), tokens == 0))


class OwnEncoder(nn.TransformerEncoder):
    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        return super().forward(x, src_key_padding_mask=padded)


class OwnLayer(nn.TransformerEncoderLayer):
    def __init__(self) -> None:
        super().__init__(8, 2, 12, batch_first=True)
        self.more = nn.Linear(8, 8)

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.more(super().forward(src, *args, **kwargs))


def padded_encoder() -> Tokens:
    encoder = nn.TransformerEncoder(layer(), 2, norm=nn.LayerNorm(8))
    return Tokens(encoder, lambda body, x, padded: body(x, src_key_padding_mask=padded))


def own_encoder() -> Tokens:
    return Tokens(OwnEncoder(layer(activation="gelu"), 2), lambda body, x, padded: body(x, padded))


def bare_layers() -> Tokens:
    layers = nn.Sequential(layer(), OwnLayer(), nn.ReLU())
    return Tokens(layers, lambda body, x, padded: body(x))


def attention_alone() -> Tokens:
    return Tokens(
        nn.MultiheadAttention(8, 2, batch_first=True),
        lambda body, x, padded: x + body(x, x, x, key_padding_mask=padded)[0],
    )


def whole_transformer() -> Tokens:
    return Tokens(nn.Transformer(8, 2, 1, 1, 12, batch_first=True), lambda body, x, padded: body(x, x))


def nested() -> Tokens:
    def run(body: nn.Module, x: Tensor, padded: Tensor) -> Tensor:
        rows = torch.nested.nested_tensor([row[:3] for row in x])
        return body(x) if torch.is_grad_enabled() else body(rows).to_padded_tensor(0.0, x.shape)

    return Tokens(nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False), run)


def noisy() -> Tokens:
    """Dropout stays on in one place."""
    net = padded_encoder()

    def run(body: Any, x: Tensor, padded: Tensor) -> Tensor:
        body.layers[1].dropout2.train()
        return body(x, src_key_padding_mask=padded)

    net._run = run
    return net


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 20, (20, 7), generator=generator)
    for row, sentence in enumerate(tokens):
        sentence[3 + row % 4 :] = 0
    return DataLoader(TensorDataset(tokens, tokens % 3), batch_size=8)


class Tagger(Plain):
    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]).transpose(1, 2), batch[1])


def tagger(make: Callable[[], nn.Module]) -> Tagger:
    torch.manual_seed(0)
    return Tagger(make())


def logged(make: Callable[[], nn.Module], callbacks: Callable[[], list[Any]]) -> list[Any]:
    """What fit, validate and test log, and where random numbers are then."""
    module, batches = tagger(make), data()
    trainer = trainer_of(callbacks(), max_epochs=2)
    trainer.fit(module, batches, batches)
    found = [{name: value.item() for name, value in trainer.callback_metrics.items()}]
    found += trainer_of(callbacks()).validate(module, batches, verbose=False)
    found += trainer_of(callbacks()).test(module, batches, verbose=False)
    return [*found, torch.get_rng_state().tolist()]


@lru_cache
def plain() -> list[Any]:
    return logged(padded_encoder, list)


@pytest.mark.parametrize("name", CALLBACKS)
def test_what_an_encoder_with_padding_logs_is_that_of_its_fast_path(name):
    assert logged(padded_encoder, lambda: [CALLBACKS[name]()]) == plain()


def test_the_two_paths_differ_in_what_is_logged():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert abs(logged(padded_encoder, list)[1]["val_loss"] - plain()[1]["val_loss"]) > 1e-3
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("make", [own_encoder, bare_layers, attention_alone, whole_transformer, nested, noisy])
def test_every_module_with_a_fast_path_takes_it(make):
    observers = [CALLBACKS["statistics"]()]
    assert logged(make, lambda: observers) == logged(make, list)
    assert "net.out" in observers[0].report.scores["mean"]


class Operations(TorchDispatchMode):
    """Counts what runs below autograd."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Counts calls of torch functions."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Operations, Functions])
@pytest.mark.parametrize("name", CALLBACKS)
def test_who_counts_operations_in_a_step_counts_none_of_ours(mode, name):
    def counted(callbacks: list[Any]) -> float:
        def step(batch: Any, batch_idx: int) -> Tensor:
            with mode() as counter:
                loss = module.loss(batch)
            module.log("operations", float(counter.count))
            return loss

        module = tagger(padded_encoder)
        module.validation_step = step
        trainer = trainer_of(callbacks, max_epochs=2)
        trainer.fit(module, data(), data())
        return trainer.callback_metrics["operations"].item()

    assert counted([CALLBACKS[name]()]) == counted([])


@contextmanager
def slow(net: Tokens) -> Iterator[dict[str, list[Tensor]]]:
    """By hand: torch's slow path, zeros at padded positions behind the last layer; collects what linear2 is given."""
    given: dict[str, list[Tensor]] = {"0": [], "1": []}
    padding: list[Tensor] = []
    hooks = [net.embedding.register_forward_pre_hook(lambda m, inputs: padding.append(inputs[0] == 0))]
    for name, kept in given.items():

        def hear(module: nn.Module, inputs: Any, kept: list[Tensor] = kept) -> None:
            kept.append(inputs[0])

        hooks.append(net.body.layers[int(name)].linear2.register_forward_pre_hook(hear))
    hooks.append(net.body.layers[1].register_forward_hook(lambda m, i, o: o.masked_fill(padding[-1][..., None], 0)))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield given
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        for hook in hooks:
            hook.remove()


def test_activity_and_sensitivity_are_those_of_the_function_that_was_evaluated():
    module, observer = tagger(padded_encoder), NeuronSensitivityCallback(criteria=["mean", "fisher"])
    module.lr = 0.0
    trainer_of([observer]).fit(module, data(), data())
    module.eval()
    values: dict[str, list[Tensor]] = {"0": [], "1": []}
    squares: dict[str, list[Tensor]] = {"0": [], "1": []}
    for sentence, labels in (one for batch in data() for one in zip(*batch, strict=True)):
        with slow(module.net) as given:
            loss = module.loss((sentence[None], labels[None]))
        for name, (activation,) in given.items():
            (gradient,) = torch.autograd.grad(loss, activation, retain_graph=True)
            squares[name].append((gradient * activation)[0].sum(0).detach().square())
            values[name].append(activation[0].detach())
    loosely = {"check_dtype": False}
    for name in values:
        scores = {key: score[f"net.body.layers.{name}.linear1"] for key, score in observer.report.scores.items()}
        torch.testing.assert_close(scores["mean"], torch.cat(values[name]).mean(0), rtol=1e-4, atol=1e-6, **loosely)
        torch.testing.assert_close(
            scores["fisher"], torch.stack(squares[name]).mean(0) / 2, rtol=1e-3, atol=1e-8, **loosely
        )


def test_an_ablation_starts_from_the_loss_of_a_plain_evaluation_and_keeps_to_that_function():
    module = tagger(padded_encoder).eval()
    batch = next(iter(data()))
    with torch.no_grad():
        loss = module.loss(batch)
    found = ablate(module, [batch], lambda model, given: model.loss(given))
    assert found.loss == pytest.approx(loss.item(), abs=1e-6)
    weight = module.net.body.layers[0].linear2.weight
    with torch.no_grad(), slow(module.net):
        for neuron in range(12):
            column = weight[:, neuron].clone()
            weight[:, neuron] = 0  # as the neuron itself at zero
            without = module.loss(batch).item()
            weight[:, neuron] = column
            change = found.delta_loss["net.body.layers.0.linear1"][neuron].item()
            assert change == pytest.approx(without - loss.item(), abs=2e-6)


def test_hooks_of_the_users_own_inside_of_an_encoder_hear_of_one_run():
    heard: list[int] = []

    def hooked() -> Tokens:
        net = padded_encoder()
        net.body.layers[0].linear1.register_forward_hook(lambda *_: heard.append(1))
        return net

    expected, calls = logged(hooked, list), len(heard)
    observers = [CALLBACKS["statistics"]()]
    assert logged(hooked, lambda: observers) == expected
    assert len(heard) == 2 * calls
    assert "net.body.layers.0.linear1" in observers[0].report.scores["mean"]
