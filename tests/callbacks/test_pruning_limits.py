"""What of a model can be cut, what is done about the rest, and what the model is traced with."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.callbacks.modules import Net, Plain, dataset, fit
from tests.callbacks.pruned import assert_refused, assert_sound, pruner, widths


def with_group_norm() -> Plain:
    module = Plain()
    module.net.norm1 = nn.GroupNorm(1, 4)
    return module


def test_a_layer_that_cannot_be_cut_is_refused_if_told_so():
    message = r"cannot cut net\.conv1: .*GroupNorm normalises over all of them"
    assert_refused(with_group_norm(), message, [pruner(on_unprunable="raise")])


def test_a_layer_that_cannot_be_cut_is_warned_of_once_and_the_rest_is_cut():
    callback, module = pruner(schedule="linear", end_epoch=3), with_group_norm()
    with pytest.warns(UserWarning, match=r"cannot cut net\.conv1.*GroupNorm") as caught:
        trainer = fit(module, [callback], max_epochs=4)
    assert len([w for w in caught if "GroupNorm" in str(w.message)]) == 1
    assert widths(module)["net.conv1"] == 4
    assert set(callback.plan.neurons) == {"net.conv2", "net.fc1"}
    assert_sound(trainer, module, callback)


def test_layers_that_are_to_be_ignored_may_be_such_that_cannot_be_cut():
    callback, module = pruner(on_unprunable="raise", ignore=["net.conv1"]), with_group_norm()
    assert_sound(fit(module, [callback], max_epochs=2), module, callback)


# With one neuron in each layer: two filters of nine weights at 36 positions, 1 + 3 weights; and biases and norms.
CLOSEST = {"target_macs": (36 * 18 + 4) / 9144, "target_params": (18 + 2 + 4 + 2 + 6) / 365}


@pytest.mark.parametrize("rule", CLOSEST)
def test_a_target_out_of_reach_is_refused_if_told_so_and_how_close_one_comes_is_said(rule):
    message = rf"NeuronPruningCallback: {rule}=0.01 is not reached: {CLOSEST[rule]:.3f} remain when all goes that may"
    assert_refused(Plain(), message, [pruner(**{rule: 0.01}, on_unprunable="raise")])


def test_a_target_out_of_reach_is_refused_before_training_with_how_close_it_comes_and_what_limits_it():
    message = r"target_macs=0.01 is not reached: 0\.071 remain .* as narrow as min_neurons, max_amount and"
    assert_refused(Plain(), message, [pruner(target_macs=0.01)])


@pytest.mark.parametrize("on_unprunable", ["warn", "raise"])
def test_a_threshold_is_no_promise_that_could_be_broken(on_unprunable):
    callback, module = pruner("weight_l2", threshold=0.6, on_unprunable=on_unprunable), Plain()
    assert_sound(fit(module, [callback], max_epochs=2), module, callback)


def test_nothing_to_cut_is_warned_of_with_the_reason_and_training_goes_on():
    callback, module = pruner("weight_l2", threshold=0.0), Plain()
    nothing = pytest.warns(UserWarning, match="nothing has been cut")
    why = r"nothing is cut in round 1: .*no neuron has a weight_l2 of 0 or less \(the lowest is 0\."
    with nothing, pytest.warns(UserWarning, match=why):
        trainer = fit(module, [callback], max_epochs=2)
    assert trainer.current_epoch == 2
    assert_sound(trainer, module, callback, cut=False)


def test_a_model_of_which_everything_is_to_be_ignored_is_warned_of_with_the_reason():
    callback, module = pruner(ignore=["net"]), Plain()
    nothing = pytest.warns(UserWarning, match="nothing has been cut")
    with nothing, pytest.warns(UserWarning, match=r"nothing is cut in round 1: .*net\.conv1 is to be ignored"):
        trainer = fit(module, [callback], max_epochs=2)
    assert_sound(trainer, module, callback, cut=False)


class TakesTwo(Plain):
    """Its forward needs more than a batch shows."""

    def forward(self, pictures: Tensor, scale: Tensor) -> Tensor:
        return self.net(pictures * scale)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0], torch.ones(1)), batch[1])


def test_example_inputs_that_forward_does_not_take_are_refused():
    message = r"TakesTwo does not run on example_inputs \(TypeError.*scale.*a tuple of arguments or a dict"
    assert_refused(TakesTwo(), message, [pruner(example_inputs=torch.zeros(2, 1, 6, 6))])
    shape = r"Plain does not run on example_inputs \(RuntimeError"
    assert_refused(Plain(), shape, [pruner(example_inputs=torch.zeros(2, 3, 6, 6))])


PICTURES = dataset(2).tensors[0]


@pytest.mark.parametrize("given", [(PICTURES, torch.ones(1)), {"pictures": PICTURES, "scale": torch.ones(1)}])
def test_the_model_is_traced_with_what_is_given(given):
    callback, module = pruner(example_inputs=given), TakesTwo()
    assert_sound(fit(module, [callback], max_epochs=2), module, callback)


class CountsSamples(Net):
    """Notes how many samples each forward had."""

    def forward(self, x: Tensor) -> Tensor:
        SIZES.append(len(x))
        return super().forward(x)


SIZES: list[int] = []


@pytest.mark.parametrize("source", ["argument", "module", "batch"])
def test_the_argument_comes_before_the_modules_example_and_that_before_a_batch(source):
    module = Plain(CountsSamples())
    if source != "batch":
        module.example_input_array = dataset(5).tensors[0]
    callback = pruner(example_inputs=dataset(7).tensors[0] if source == "argument" else None)
    SIZES.clear()
    assert_sound(fit(module, [callback], max_epochs=2), module, callback)
    assert {7: "argument", 5: "module", 2: "batch"}[min({2, 5, 7} & set(SIZES))] == source
    assert len({2, 5, 7} & set(SIZES)) == 1
