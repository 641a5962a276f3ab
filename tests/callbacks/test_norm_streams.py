"""The pruning callback cuts streams under norms where that is asked for, in a fit and with its checkpoints."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_neurons import NeuronPruningCallback, PruningPlan, load_pruned
from tests.callbacks.modules import Plain, fit
from tests.callbacks.pruned import pruner, widths
from tests.models import pictures
from tests.tables import for_each


class RootMeanSquare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Stream(nn.Module):
    """A residual stream of 9 neurons under three norms, with a positional parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.place = nn.Linear(36, 9), nn.Parameter(torch.randn(9))
        self.norm1, self.up, self.down = nn.LayerNorm(9), nn.Linear(9, 8), nn.Linear(8, 9)
        self.norm2, self.mix, self.norm3, self.head = (
            RootMeanSquare(9),
            nn.Linear(9, 9),
            nn.LayerNorm(9),
            nn.Linear(9, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x.flatten(1)) + self.place
        x = x + self.down(F.gelu(self.up(self.norm1(x))))
        return self.head(self.norm3(x + self.mix(self.norm2(x))))


class Module(Plain):
    def __init__(self) -> None:
        super().__init__(Stream())


STREAM = ("net.start", "net.down", "net.mix")


def callback(**kwargs: object) -> NeuronPruningCallback:
    return pruner("weight_l2", amount=0.34, scope="layer", **kwargs)


@for_each("compensation", ["none", "least_squares"])
def test_a_stream_is_cut_in_a_fit_and_its_checkpoint_is_loaded(compensation, tmp_path):
    pruning, module = callback(norm_streams="renormalize", compensation=compensation), Module()
    trainer = fit(module, [pruning], max_epochs=3)
    assert [widths(module)[name] for name in STREAM] == [6, 6, 6]
    assert module.net.place.shape == module.net.norm2.weight.shape == module.net.norm3.bias.shape == (6,)
    assert pruning.plan.norm_streams == "renormalize"
    (note,) = [note for note in pruning.plan.notes if note.startswith("not exact")]
    assert "net.norm1, net.norm2, net.norm3" in note
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    pruning.plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json").norm_streams == "renormalize"
    loaded, x = load_pruned(Module, tmp_path / "pruned.ckpt").eval(), pictures(3, size=6, channels=1)[0]
    assert torch.equal(loaded(x), module.eval()(x))


def test_by_default_a_stream_stays_whole_with_the_reason():
    pruning, module = callback(), Module()
    with pytest.warns(UserWarning, match=r"cannot cut net\.(start|down|mix)"):
        fit(module, [pruning], max_epochs=3)
    assert [widths(module)[name] for name in (*STREAM, "net.up")] == [9, 9, 9, 5]
    assert pruning.plan.norm_streams == "refuse"


class Penalised(Module):
    """Training reads the stream beyond its norms: a mean over it depends on its width."""

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.net.start(batch[0].flatten(1)).square().mean()


def test_what_only_training_reads_of_a_stream_is_noticed_although_its_norms_change():
    pruning, module = callback(norm_streams="renormalize"), Penalised()
    with pytest.warns(UserWarning, match="the gradients of training_step differ"):
        fit(module, [pruning], max_epochs=3)
    assert [widths(module)[name] for name in (*STREAM, "net.up")] == [9, 9, 9, 5]


@for_each(
    "arguments, message",
    [
        ({"norm_streams": "renormalise"}, r"norm_streams='renormalise'.*did you mean 'renormalize'"),
        ({"norm_streams": "renormalize", "lossless": True}, r"norm_streams='renormalize'.*expected 'refuse' with"),
    ],
)
def test_a_wrong_value_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeuronPruningCallback(**({"amount": 0.3} if "lossless" not in arguments else {}), **arguments)
