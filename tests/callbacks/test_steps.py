"""Steps in all forms that Lightning takes: each is run again as Lightning ran it, and its loss is found."""

import functools
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_neurons import NeuronAblationCallback, NeuronSensitivityCallback, measure
from tests.callbacks.modules import OldNamespace, Plain, fit, loader, trainer_of

Result = namedtuple("Result", ["loss", "logits"])


def expected(module: Any, *loaders: Any) -> Any:
    data = [batch for one in loaders for batch in one]
    return measure(module, data, loss_fn=lambda m, batch: nn.functional.cross_entropy(m.net(batch[0]), batch[1]))


def same(report: Any, other: Any) -> None:
    for name in ("taylor", "fisher", "mean", "rms"):
        torch.testing.assert_close(report.scores[name], other.scores[name], rtol=1e-4, atol=1e-8)


def passed_on(step: Any) -> Any:
    def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
        return step(self, *args, **kwargs)

    return inner


def wrapped(step: Any) -> Any:
    return functools.wraps(step)(passed_on(step))


class Free(Plain):
    def validation_step(self, *args: Any, **kwargs: Any) -> Tensor:
        assert (len(args), kwargs) == (2, {})
        return self.loss(args[0])


class Alone(Plain):
    def validation_step(self, batch: Any) -> Tensor:
        return self.loss(batch)


class Decorated(Plain):
    @passed_on
    def validation_step(self, batch: Any, number: int) -> Tensor:
        assert isinstance(number, int)
        return self.loss(batch)


class Wrapped(Plain):
    @wrapped
    def validation_step(self, batch: Any) -> Tensor:
        return self.loss(batch)


class Ordinary(OldNamespace):
    @wrapped
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


@pytest.mark.parametrize("kind", [Free, Alone, Decorated, Wrapped, Ordinary])
def test_a_step_gets_the_arguments_that_lightning_gives_it(kind):
    import lightning
    import pytorch_lightning

    module, callback, data = kind(), NeuronSensitivityCallback(max_figures=0), loader(24, seed=1)
    of = pytorch_lightning if kind is Ordinary else lightning
    trainer_of([callback], of=of).validate(module, data, verbose=False)
    same(callback.report, expected(module, data))


FORMS: dict[str, Any] = {
    "another name": lambda m, loss, logits: {"x": loss},
    "one differentiable number": lambda m, loss, logits: {"x": loss, "n": torch.tensor(3.0), "logits": logits},
    "a pair": lambda m, loss, logits: (loss, logits),
    "a pair the other way round": lambda m, loss, logits: [logits, {"deep": loss}],
    "named tuple": lambda m, loss, logits: Result(loss, logits),
    "object": lambda m, loss, logits: SimpleNamespace(logits=logits, loss=loss, extra=loss * 2),
    "logits, and a logged loss": lambda m, loss, logits: (m.log("val_loss", loss), logits)[1],
    "largest logits, and a logged loss": lambda m, loss, logits: (m.log("val_loss", loss), logits.amax(1))[1],
    "logged under another name": lambda m, loss, logits: m.log_dict({"val_nll": loss, "n": 3.0}),
    "logged among its parts": lambda m, loss, logits: m.log_dict({"kl_loss": loss / 3, "Loss/val": loss, "r": loss}),
    "one loss per sample": lambda m, loss, logits: m.each,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_found_where_it_is_unambiguous(form):
    class Module(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch[0])
            self.each = nn.functional.cross_entropy(logits, batch[1], reduction="none")
            return FORMS[form](self, self.each.mean(), logits)

    module, callback, data = Module(), NeuronSensitivityCallback(max_figures=0), loader(24, seed=1)
    trainer_of([callback]).validate(module, data, verbose=False)
    same(callback.report, expected(module, data))


@pytest.mark.parametrize("verb", ["returned", "logged"])
@pytest.mark.parametrize("is_automatic", [True, False], ids=["automatic optimization", "by hand"])
def test_of_several_numbers_none_is_taken_for_the_loss(verb, is_automatic):
    class Module(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            numbers = {"a": self.loss(batch), "b": 2 * self.loss(batch)}
            return numbers if verb == "returned" else self.log_dict(numbers)

    module, callback = Module(), NeuronSensitivityCallback(max_figures=0)
    module.automatic_optimization = is_automatic
    with pytest.warns(UserWarning, match=rf"2 of the numbers that it {verb} are differentiable.*loss_fn=") as warned:
        trainer_of([callback]).validate(module, loader(24, seed=1), verbose=False)
    assert any('step="training"' in str(warning.message) for warning in warned) == is_automatic
    assert "mean" in callback.report.scores
    assert "taylor" not in callback.report.scores


class TakesTheIterator(Plain):
    def validation_step(self, dataloader_iter: Any) -> Tensor:
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


@pytest.mark.filterwarnings("ignore:You are using the .dataloader_iter", "ignore:Found .dataloader_iter")
def test_a_step_that_takes_the_iterator_is_watched_and_training_goes_on():
    callback, data = NeuronSensitivityCallback(max_figures=0), loader(24, seed=1)
    with pytest.warns(UserWarning, match=r"sensitivity was not measured.*dataloader_iter.*\(batch, batch_idx\)"):
        trainer = fit(TakesTheIterator(), [callback], val=data)
    assert trainer.global_step == 4
    torch.testing.assert_close(callback.report.scores["mean"], expected(trainer.lightning_module, data).scores["mean"])


class ByLoader(Plain):
    """A loss that differs from dataloader to dataloader."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Tensor:
        if torch.is_grad_enabled():
            with self.seen.open("a") as file:  # which isolation does not put back
                file.write(str(dataloader_idx))
        return self.loss(batch) * (1 + dataloader_idx)


@pytest.mark.parametrize("names", [None, ("a", "b", "c")])
def test_all_dataloaders_are_measured_each_with_its_own_index(names, tmp_path):
    loaders = [loader(24, seed=1), loader(20, seed=2), loader(16, batch_size=5, seed=3)]
    module, callback = ByLoader(), NeuronSensitivityCallback(max_figures=0)
    module.seen = seen = tmp_path / "seen"
    given = dict(zip(names, loaders, strict=True)) if names else loaders
    trainer_of([callback]).validate(module, given, verbose=False)
    data = [(x, y, 1 + i) for i, one in enumerate(loaders) for x, y in one]
    right = measure(
        module, data, loss_fn=lambda m, b: b[2] * nn.functional.cross_entropy(m.net(b[0]), b[1]), criteria=["taylor"]
    )
    torch.testing.assert_close(callback.report.scores["taylor"], right.scores["taylor"], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(callback.report.scores["mean"], expected(module, *loaders).scores["mean"])
    assert {*seen.read_text()} == {*"012"}
    assert "measured on all 3 dataloaders together" in callback.report.notes
    assert callback.report.counts["net.fc1"].gradient_samples.unique().tolist() == [60]


def test_a_bounded_sample_is_spread_over_all_dataloaders(tmp_path):
    loaders = [loader(40, seed=1), loader(40, seed=2), loader(40, seed=3)]
    module, callback = ByLoader(), NeuronSensitivityCallback(max_samples=24, max_figures=0)
    module.seen = seen = tmp_path / "seen"
    trainer_of([callback]).validate(module, loaders, verbose=False)
    assert {*seen.read_text()} == {*"012"}
    assert callback.report.counts["net.fc1"].gradient_samples.unique().tolist() == [24]


def test_loaders_that_are_read_side_by_side_make_one_batch():
    class Both(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch["a"]) + self.loss(batch["b"])

    both = CombinedLoader({"a": loader(24, seed=1), "b": loader(16, seed=2)}, "max_size_cycle")
    callback = NeuronSensitivityCallback(max_figures=0)
    trainer_of([callback]).validate(Both(), both, verbose=False)
    assert "taylor" in callback.report.scores
    assert not any("dataloaders" in note for note in callback.report.notes)


def test_an_ablation_says_which_dataloader_it_is_of(tmp_path):
    module, callback = ByLoader(), NeuronAblationCallback(ends=2)
    module.seen = tmp_path / "seen"
    trainer_of([callback]).validate(module, [loader(24, seed=1), loader(24, seed=2)], verbose=False)
    assert "on samples of the first of 2 validation dataloaders" in callback.ablation.notes


class NoLayers(Plain):
    def __init__(self) -> None:
        super().__init__(nn.Flatten())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean", batch[0].mean())

    def predict_step(self, batch: Any) -> Tensor:
        return self(batch[0])


def test_a_module_without_layers_predicts_and_is_tested():
    predicted = trainer_of([NeuronSensitivityCallback(), NeuronAblationCallback()]).predict(NoLayers(), loader(8))
    assert len(predicted) == 1
    nothing = pytest.warns(UserWarning, match="nothing has been measured")
    with nothing, pytest.warns(UserWarning, match="no convolutional or linear layer"):
        trainer_of([NeuronSensitivityCallback()]).test(NoLayers(), loader(8), verbose=False)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.norm = nn.Embedding(5, 4), nn.LSTM(4, 6, batch_first=True), nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.place, self.out = nn.Parameter(torch.zeros(3, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.rnn(self.embed(x))[0]) + self.place
        return self.out(self.attention(h, h, h)[0].mean(1))


def test_what_is_not_measured_is_named_with_its_share_of_the_parameters():
    module = Plain(Recurrent())
    data = DataLoader(TensorDataset(torch.randint(0, 5, (16, 3)), torch.randint(0, 3, (16,))), 8)
    callback = NeuronSensitivityCallback(max_figures=0)
    trainer_of([callback]).validate(module, data, verbose=False)
    (note,) = [note for note in callback.report.notes if note.startswith("not measured: ")]
    total = sum(p.numel() for p in module.parameters())
    for name, kind, part in (
        ("net.rnn", "LSTM", module.net.rnn),
        ("net.attention", "MultiheadAttention", module.net.attention),
        ("net.embed", "Embedding", module.net.embed),
    ):
        share = sum(p.numel() for p in part.parameters()) / total
        assert f"{name} ({kind}, {share:.0%} of parameters)" in note
    assert "net (Recurrent, " in note
    assert "net.out" not in note
    assert "norm" not in note
    chosen = NeuronSensitivityCallback(layers=["net.out"], max_figures=0)
    trainer_of([chosen]).validate(module, data, verbose=False)
    assert not any("not measured" in note for note in chosen.report.notes)


class InParts(Plain):
    """Returns a loss's parts by name, or logs them."""

    def __init__(self, names: tuple[str, ...], how: str) -> None:
        super().__init__()
        self.names, self.how = names, how

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        losses = [nn.functional.cross_entropy(logits, batch[1]), logits.square().mean()]
        found = dict(zip(self.names, [*losses, sum(losses)], strict=False))
        if self.how == "returned":
            return found
        return self.log_dict(found)


PARTS = [("ce_loss", "kl_loss"), ("kl_loss", "ce_loss"), ("loss_a", "loss_b", "loss_c")]
WHOLE = [("ce_loss", "kl_loss", "val/loss"), ("loss", "aux_loss"), ("loss_of_all",), ("total_loss", "loss_a")]


@pytest.mark.parametrize("how", ["returned", "logged"])
@pytest.mark.parametrize("names", PARTS + WHOLE)
def test_which_of_several_losses_was_taken_is_said_where_no_name_tells_the_whole(names, how):
    torch.manual_seed(0)
    module, callback = InParts(names, how), NeuronSensitivityCallback(criteria=["taylor"])
    trainer_of([callback]).validate(module, loader(24, seed=1), verbose=False)
    said = [note for note in callback.report.notes if note.startswith("sensitivity is that of")]
    if names in WHOLE:
        assert said == []
        return
    assert f"that of {names[0]}, though {' and '.join(names[1:])} may be" in said[0]
    assert "loss_fn=" in said[0]
    first = measure(module, [*loader(24, seed=1)], criteria=["taylor"], loss_fn=lambda m, b: m.loss(b))
    torch.testing.assert_close(callback.report.scores["taylor"], first.scores["taylor"], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("returned", [None, torch.ones(())])
def test_the_training_steps_loss_is_measured_where_validation_does_not_run_the_network(returned):
    class Elsewhere(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("mean", batch[0].mean())
            return returned

    module, callback = Elsewhere(), NeuronSensitivityCallback(criteria=["taylor", "mean"], step="training")
    trainer_of([callback]).validate(module, loader(24, seed=1), verbose=False)
    expected = measure(module, [*loader(24, seed=1)], criteria=["taylor"], loss_fn=lambda m, b: m.loss(b))
    torch.testing.assert_close(callback.report.scores["taylor"], expected.scores["taylor"], rtol=1e-4, atol=1e-8)
    assert callback.report.counts["net.fc1"].gradient_samples.tolist() == [24] * 8
    assert callback.report.counts["net.fc1"].samples.tolist() == [0] * 8
