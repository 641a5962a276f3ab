"""What is wrong in the arguments is said when the callback is made, with what would be right."""

import re
from functools import partial
from typing import Any

import pytest

from lightning_neurons import NeuronPruningCallback
from tests.callbacks.refusals import not_refused

NONE_OF_THEM = "exactly one of amount, target_params, target_macs, threshold"
SHARE = r"a share in \(0, 1\]"
COUNT = "a whole number of at least"

RULES: list[tuple[dict[str, Any], str]] = [
    ({}, rf"budget=\{{\}}.*{NONE_OF_THEM}"),
    ({"amount": 0.3, "target_macs": 0.5}, rf"budget=\{{'amount': 0.3, 'target_macs': 0.5\}}.*{NONE_OF_THEM}"),
    ({"target_params": 0.3, "target_macs": 0.5, "threshold": 1.0}, NONE_OF_THEM),
    ({"amount": 0}, f"amount=0 is.*{SHARE}"),
    ({"amount": -0.2}, f"amount=-0.2.*{SHARE}"),
    ({"amount": 1.01}, f"amount=1.01.*{SHARE}"),
    ({"amount": float("nan")}, f"amount=nan.*{SHARE}"),
    ({"amount": "0.3"}, f"amount='0.3'.*{SHARE}"),
    ({"amount": True}, f"amount=True.*{SHARE}"),
    ({"target_params": 0.0}, f"target_params=0.0.*{SHARE}"),
    ({"target_macs": 50}, f"target_macs=50.*{SHARE}"),
    ({"threshold": float("nan")}, "threshold=nan.*a number"),
    ({"threshold": "low"}, "threshold='low'.*a number"),
    ({"criterion": "deadness", "threshold": 0}, r"threshold=0.*a deadness in \(0, 1\].*never fires"),
    ({"criterion": "deadness", "threshold": 1.1}, r"threshold=1.1.*a deadness in \(0, 1\]"),
    ({"criterion": "dormant", "threshold": 2}, r"threshold=2.*a deadness in \(0, 1\]"),
    ({"criterion": "random", "threshold": 0.5}, "threshold=0.5.*amount, target_params or target_macs.*random"),
]
OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"criterion": "fischer"}, "criterion: nothing matches 'fischer'. Did you mean 'fisher'.*Known: deadness, random"),
    ({"criterion": 3}, "criterion=3"),
    ({"schedule": "qubic"}, r"schedule='qubic'.*'one_shot', 'linear', 'cubic', 'geometric'; did you mean 'cubic'\?"),
    ({"schedule": "linear"}, 'end_epoch=None.*the last round, with schedule="linear"'),
    ({"end_epoch": 5}, 'end_epoch=5.*None with schedule="one_shot", which has one round'),
    ({"schedule": "cubic", "start_epoch": 4, "end_epoch": 3}, f"end_epoch=3.*{COUNT} 4"),
    ({"schedule": "cubic", "end_epoch": 3.5}, f"end_epoch=3.5.*{COUNT} 1"),
    ({"start_epoch": 0}, f"start_epoch=0.*{COUNT} 1"),
    ({"start_epoch": 1.5}, f"start_epoch=1.5.*{COUNT} 1"),
    ({"every_n_epochs": 0}, f"every_n_epochs=0.*{COUNT} 1"),
    ({"scope": "model"}, "scope='model'.*'global', 'block', 'layer'"),
    ({"aggregate": "maxx"}, r"aggregate='maxx'.*'mean', 'sum', 'max'; did you mean 'max'\?"),
    ({"agreement": "any"}, "agreement='any'.*'mean', 'all'"),
    ({"patience": 0}, f"patience=0.*{COUNT} 1"),
    ({"patience": True}, f"patience=True.*{COUNT} 1"),
    ({"normalize": "L2"}, r"normalize='L2'.*'none', 'sum', 'l2'"),
    ({"min_neurons": 0}, f"min_neurons=0.*{COUNT} 1"),
    ({"max_amount": 0.0}, f"max_amount=0.0.*{SHARE}"),
    ({"max_amount": 1.5}, f"max_amount=1.5.*{SHARE}"),
    ({"round_to": -8}, f"round_to=-8.*{COUNT} 1"),
    ({"ignore": "net.conv1"}, r"ignore='net.conv1'.*a list of patterns.*\["),
    ({"ignore": [1]}, r"ignore=\[1\].*a list of patterns"),
    ({"ignore": None}, "ignore=None.*a list of patterns"),
    ({"ignore": 1}, "ignore=1.*a list of patterns"),
    ({"compensation": "meen"}, r"compensation='meen'.*'mean', 'none'; did you mean 'mean'\?"),
    ({"monitor": 3}, "monitor=3.*the name of a logged metric"),
    ({"monitor": ["val_loss"]}, r"monitor=\['val_loss'\].*the name of a logged metric"),
    ({"monitor": True}, "monitor=True.*the name of a logged metric"),
    ({"reset_early_stopping": "yes"}, "reset_early_stopping='yes'.*True or False"),
    ({"on_unprunable": "error"}, "on_unprunable='error'.*'warn', 'raise'"),
    ({"loss_fn": "cross_entropy"}, r"loss_fn='cross_entropy'.*a function \(module, batch\) -> loss"),
    ({"loss_reduction": "avg"}, "loss_reduction='avg'.*'mean'"),
    ({"max_samples": 0}, f"max_samples=0.*{COUNT} 1"),
    ({"max_samples": 12.5}, f"max_samples=12.5.*{COUNT} 1"),
    ({"activation_threshold": -0.1}, "activation_threshold=-0.1.*at least 0"),
    ({"activation_threshold": float("inf")}, "activation_threshold=inf.*finite"),
    ({"relative_threshold": 1}, "relative_threshold=1.*True or False"),
]


def test_an_argument_that_is_wrong_is_named_with_what_came_and_what_is_allowed():
    assert not_refused(NeuronPruningCallback, RULES) == {}
    assert not_refused(partial(NeuronPruningCallback, amount=0.3), OTHERS) == {}


def test_arguments_at_the_end_of_their_range_are_taken():
    for arguments in (
        {"amount": 1},
        {"target_params": 1.0},
        {"criterion": "near_zero", "threshold": 1},
        {"criterion": "deadness", "threshold": 0.9, "end_epoch": 9, "patience": 3},
        {"criterion": "random", "target_macs": 0.5, "schedule": "geometric", "end_epoch": 1},
        {"amount": 0.5, "ignore": ("net.*",), "max_amount": 1, "monitor": "val_loss"},
    ):
        callback = NeuronPruningCallback(**arguments)
        assert callback.pruning.schedule.rounds >= 1
        assert not callback.plan
        assert callback.pending is None


def test_arguments_are_by_name_but_for_the_criterion():
    with pytest.raises(TypeError, match="positional"):
        NeuronPruningCallback("fisher", 0.3)


def test_different_settings_have_different_places_in_a_checkpoint():
    keys = [
        NeuronPruningCallback(**arguments).state_key
        for arguments in (
            {"amount": 0.3}, {"amount": 0.4}, {"target_macs": 0.3}, {"amount": 0.3, "criterion": "taylor"},
            {"amount": 0.3, "criterion": "random"}, {"amount": 0.3, "ignore": ["net.conv1"]},
        )
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert all(re.match("NeuronPruningCallback", key) for key in keys)
    assert NeuronPruningCallback(amount=0.3).state_key == keys[0]
