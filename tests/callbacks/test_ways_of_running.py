"""A module that cannot be followed in one way of running it is run in another; a run without validation is told why."""

import sys
import warnings

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_neurons import NeuronSensitivityCallback
from tests.callbacks.modules import Plain, fit
from tests.callbacks.pruned import assert_refused, pruner, widths


class Sampling(Plain):
    """Its forward answers with a class, and its steps are differentiable."""

    def forward(self, x):
        return self.net(x).argmax(1)

    def loss(self, batch):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Pairs(Sampling):
    """Its forward takes inputs and labels, and its validation step only counts what is right."""

    def forward(self, x, y):
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        hits = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_acc", hits)


class Neither(Sampling):
    validation_step = Pairs.validation_step


@pytest.mark.parametrize("make", [Plain, Sampling, Pairs])
def test_the_cut_does_not_depend_on_the_way_in_which_the_module_is_followed(make):
    torch.manual_seed(0)
    module, callback = make(), pruner("weight_l2", scope="layer")
    fit(module, [callback], max_epochs=2)
    assert widths(module) == {"net.conv1": 3, "net.conv2": 4, "net.fc1": 5, "net.fc2": 3}


def test_a_module_that_can_be_followed_in_no_way_is_refused():
    message = r"cannot be traced.*output depends on none of its parameters"
    assert_refused(Neither(), message, [pruner("weight_l2")])


ROWS = {}


class ByIdentity(Plain):
    """It looks a width up by the layer itself, which a copy is not."""

    def __init__(self) -> None:
        super().__init__()
        ROWS[id(self.net.fc1)] = 8
        self.net.drop.forward = lambda x: x.view(-1, ROWS.get(id(self.net.fc1), x.shape[1]))


def test_a_cut_with_which_the_module_itself_fails_is_taken_back_and_training_goes_on():
    torch.manual_seed(0)
    module, callback = ByIdentity(), pruner("weight_l2", scope="layer", ignore=["net.conv*"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, [callback], max_epochs=3)
    assert trainer.current_epoch == 3
    assert any("round 1 is not made at epoch 1: the model fails without" in str(w.message) for w in caught)
    assert widths(module) == {"net.conv1": 4, "net.conv2": 6, "net.fc1": 8, "net.fc2": 3}
    assert (callback.rounds.done, callback.pending) == ([], None)


@pytest.mark.parametrize(("every", "said"), [(sys.maxsize, "it would run never"), (5, "it would run every 5 epochs")])
def test_a_trainer_that_ends_before_it_validates_is_told_so(every, said):
    options = {"check_val_every_n_epoch": every, "num_sanity_val_steps": 0, "max_epochs": 3}
    said = rf"runs no validation \({said}, and training ends after 3; pass check_val_every_n_epoch=1\)"
    with pytest.raises(MisconfigurationException, match=said):
        fit(Plain(), [pruner("weight_l2")], **options)
    with pytest.warns(UserWarning, match=said), pytest.warns(UserWarning, match="nothing has been measured"):
        fit(Plain(), [NeuronSensitivityCallback()], **options)
