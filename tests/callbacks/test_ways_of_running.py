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


class Contrastive(Plain):
    """Its forward gives the representation that it is trained for, its steps go through a head and compare views."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.ReLU(), torch.nn.Linear(7, 4))

    def loss(self, batch):
        x = batch[0]
        views = torch.cat([x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)])
        seen = torch.nn.functional.normalize(self.head(self(views)), dim=1)
        likeness = (seen @ seen.T).masked_fill(torch.eye(len(views), dtype=torch.bool), -1e9)
        return torch.nn.functional.cross_entropy(likeness, torch.arange(len(views)).roll(len(x)))


class Embedding(Contrastive):
    """Validation looks at the representation alone."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0]).square().mean())


class Judged(Contrastive):
    """Its forward runs the network that the others are trained for, and reads a fixed number of its neurons."""

    def forward(self, x):
        return super().forward(x).view(-1, 3)


WHOLE = {"net.conv1": 4, "net.conv2": 6, "net.fc1": 8, "net.fc2": 3, "head.0": 7, "head.2": 4}


HEAD = "ignore:NeuronPruningCallback. cannot cut head"


@pytest.mark.filterwarnings(HEAD)
@pytest.mark.parametrize("make", [Contrastive, Judged])
def test_layers_that_only_the_validation_step_runs_are_cut_and_what_forward_gives_stays(make):
    torch.manual_seed(0)
    module, callback = make(), pruner("weight_l2", scope="layer")
    fit(module, [callback], max_epochs=2)
    assert widths(module) == {"net.conv1": 3, "net.conv2": 4, "net.fc1": 5, "net.fc2": 3, "head.0": 5, "head.2": 4}
    assert module(torch.zeros(2, 1, 6, 6)).shape == (2, 3)


@pytest.mark.filterwarnings(HEAD)
def test_the_user_has_the_last_word_on_how_the_module_is_run():
    torch.manual_seed(0)
    module = Contrastive()
    callback = pruner("weight_l2", scope="layer", example_inputs=torch.zeros(2, 1, 6, 6))
    fit(module, [callback], max_epochs=2)
    assert widths(module)["head.0"] == 7
    assert widths(module)["net.fc1"] == 5


def test_what_runs_in_no_way_is_named_and_the_rest_is_cut():
    torch.manual_seed(0)
    module, callback = Embedding(), pruner("weight_l2", scope="layer")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, [callback], max_epochs=2)
    said = {str(w.message).partition("cannot cut ")[2] for w in caught}
    assert {f"head.{i}: it is not in the model's graph: it did not run" for i in (0, 2)} <= said
    assert widths(module) == WHOLE | {"net.conv1": 3, "net.conv2": 4, "net.fc1": 5}


@pytest.mark.parametrize(("every", "said"), [(sys.maxsize, "it would run never"), (5, "it would run every 5 epochs")])
def test_a_trainer_that_ends_before_it_validates_is_told_so(every, said):
    options = {"check_val_every_n_epoch": every, "num_sanity_val_steps": 0, "max_epochs": 3}
    said = rf"runs no validation \({said}, and training ends after 3; pass check_val_every_n_epoch=1\)"
    with pytest.raises(MisconfigurationException, match=said):
        fit(Plain(), [pruner("weight_l2")], **options)
    with pytest.warns(UserWarning, match=said), pytest.warns(UserWarning, match="nothing has been measured"):
        fit(Plain(), [NeuronSensitivityCallback()], **options)
