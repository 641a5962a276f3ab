"""Tied weights in the middle of a fit: cut once, with averages and moments, and loaded again."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_neurons import NeuronPruningCallback, load_pruned
from tests.callbacks.modules import Plain, fit
from tests.pruning.test_tied_weights import Language
from tests.tables import for_each

CODES = torch.arange(96).reshape(16, 6) * 7 % 11


class Words(Plain):
    """Predicts the next word."""

    def __init__(self) -> None:
        super().__init__(Language())

    def loss(self, batch: Any) -> Tensor:
        (codes,) = batch
        return F.cross_entropy(self(codes[:, :-1]).flatten(0, 1), codes[:, 1:].flatten())


def words() -> DataLoader[Any]:
    return DataLoader(TensorDataset(CODES), 4)


@for_each("averaged", [False, True])
def test_tied_weights_are_cut_in_a_fit_stay_tied_and_are_loaded_again(averaged, tmp_path):
    module = Words()
    cutting = NeuronPruningCallback("weight_l2", amount=0.3, start_epoch=1)
    callbacks = [cutting, *([EMAWeightAveraging(decay=0.9)] if averaged else [])]
    trainer = fit(module, callbacks, words(), words(), max_epochs=3)
    assert len(cutting.plan.neurons["net.down"]) == 4
    assert module.net.head.weight is module.net.embedding.weight
    assert module.net.head.weight.shape == (11, 8)
    assert (module.net.head.in_features, module.net.embedding.embedding_dim) == (8, 8)
    state = trainer.optimizers[0].state[module.net.head.weight]
    assert state["exp_avg"].shape == (11, 8)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    loaded = load_pruned(Words, tmp_path / "cut.ckpt")
    assert loaded.net.head.weight is loaded.net.embedding.weight
    assert torch.equal(loaded.net(CODES), module.net(CODES))
