"""Heads of ``nn.MultiheadAttention`` are cut in a fit: budgets, predicted metrics, averages and checkpoints."""

import copy
import warnings
from typing import Any

import lightning as L  # noqa: N812
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_neurons import NeuronPruningCallback, load_pruned
from lightning_neurons.layers.attention import PrunedMultiheadAttention
from tests.callbacks.modules import MemoryLogger, Plain, fit, loader
from tests.callbacks.pruned import Probe, state_by_name

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot cut .* LayerNorm normalises over all of them")
PATHS = [f"net.encoder.layers.{i}.self_attn" for i in range(2)]


class Encoder(nn.Module):
    """The rows of images as tokens of an encoder of torch."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 16, dropout=0.1, batch_first=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd number of heads keeps it off its fast path
            self.encoder = nn.TransformerEncoder(layer, 2)
        self.start, self.head = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.start(x.flatten(1, 2))).mean(1))


class Tokens(Plain):
    """Trains the encoder, beside an average of it; it hardly learns, so that validations see what was cut."""

    def __init__(self, lr: float = 1e-6) -> None:
        super().__init__(Encoder(), lr)
        self.save_hyperparameters()


def seeded(lr: float = 1e-6) -> Tokens:
    L.seed_everything(0, verbose=False)
    return Tokens(lr)


def heads(module: nn.Module) -> list[int]:
    return [module.get_submodule(path).num_heads for path in PATHS]


@pytest.mark.parametrize("criterion", ["fisher", "weight_l2", "reconstruction"])
def test_heads_are_cut_in_a_fit_and_loaded_again(criterion, tmp_path):
    callback = NeuronPruningCallback(criterion, target_macs=0.6, scope="layer", start_epoch=1)
    module = seeded(1e-2)
    trainer = fit(module, [callback], loader(16), max_epochs=3)
    assert sum(heads(module)) < 6
    for path, left in zip(PATHS, heads(module), strict=True):
        attention = module.get_submodule(path)
        assert len(attention.in_proj_weight) == 12 * left == 36 - len(callback.plan.neurons.get(path, ()))
        assert isinstance(attention, PrunedMultiheadAttention) == (left < 3)
    states = state_by_name(module, trainer.optimizers[0])
    parameters = dict(module.named_parameters())
    assert {n for n, s in states.items() if s.ndim and s.shape != parameters[n.rpartition(".")[0]].shape} == set()
    notes = [note for note in callback.rounds.plan.notes if "units are ranked" in note]
    assert len(notes) == (criterion == "fisher")
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    loaded = load_pruned(Tokens, tmp_path / "pruned.ckpt")
    images = torch.randn(4, 1, 6, 6)
    torch.testing.assert_close(loaded.eval()(images), module.eval()(images), rtol=0, atol=0)
    assert heads(loaded) == heads(module)


def test_the_metric_that_is_predicted_is_that_with_the_columns_of_heads_at_zero():
    options: dict[str, Any] = {"monitor": "val_loss", "max_drop": 99.0, "check": "ablation", "compensation": "none"}
    callback = NeuronPruningCallback("weight_l2", amount=0.4, start_epoch=1, **options)
    logger = MemoryLogger()

    def look(trainer: Any, module: Any) -> float | None:
        if not callback.pending:
            return None
        silent = copy.deepcopy(module.net)
        for name, neurons in callback.pending.neurons.items():
            layer = silent.get_submodule(name.removeprefix("net."))
            with torch.no_grad():
                if isinstance(layer, nn.MultiheadAttention):
                    layer.out_proj.weight[:, [i for i in neurons if i < 12]] = 0
                else:  # the first of two linear layers
                    following = silent.get_submodule(name.removeprefix("net.").replace("linear1", "linear2"))
                    following.weight[:, list(neurons)] = 0
        batches = list(trainer.val_dataloaders)
        with torch.no_grad():
            losses = [nn.functional.cross_entropy(silent.eval()(x), y, reduction="sum") for x, y in batches]
        return float(sum(losses)) / sum(len(y) for _, y in batches)

    probe = Probe("on_validation_end", look)
    fit(seeded(), [callback, probe], logger=logger, max_epochs=2)
    assert any(path in callback.plan.neurons for path in PATHS)
    values = [value for name, _, value in logger.rows if name == "pruning/metric_predicted"]
    assert values == [pytest.approx(probe.seen[0], abs=1e-5)]


class Averaging(L.Callback):
    """Keeps an average of the module's weights."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.average = AveragedModel(pl_module.net)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.average.update_parameters(pl_module.net)


def test_an_average_loses_the_same_heads():
    callback = NeuronPruningCallback("weight_l2", amount=0.4, start_epoch=2)
    module = seeded(1e-2)
    fit(module, [Averaging(), callback], loader(16), max_epochs=4)
    assert any(path in callback.plan.neurons for path in PATHS)
    averaged = [module.average.module.get_submodule(path.removeprefix("net.")) for path in PATHS]
    assert [attention.num_heads for attention in averaged] == heads(module)
    assert [type(attention) for attention in averaged] == [type(module.get_submodule(path)) for path in PATHS]
    images = torch.randn(4, 1, 6, 6)
    assert module.average(images).isfinite().all()
